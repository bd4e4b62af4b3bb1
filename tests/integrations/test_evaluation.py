"""scikit-learn, torchmetrics and faiss on angles: verification, thresholds, retrieval, search."""

import pytest
import torch
from torch.nn import functional as F

import angular_losses as al
from tests.integrations import of_tools, tool

pytestmark = of_tools


def embeddings(seed=0, rows=60, classes=10, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = torch.randn(classes, 16, generator=generator)
    noise = torch.randn(rows, 16, generator=generator)
    lengths = 0.1 + 5 * torch.rand(rows, 1, generator=generator)  # mean nothing
    return (lengths * (centres[labels] + noise)).to(dtype), labels


def pairs(seed=0):
    """Scores (P,) in [0, 1], 1 at angle 0 and 0 at pi, and whether both are of one class."""
    rows, labels = embeddings(seed)
    first, second = torch.combinations(torch.arange(len(labels))).T
    scores = 1 - al.angle_between(rows[first], rows[second]) / torch.pi
    return scores, (labels[first] == labels[second]).long()


def rates(scores, same, threshold):
    """The shares of impostors and of genuine pairs that a threshold accepts, by counting."""
    accepted = scores >= threshold
    return accepted[same == 0].float().mean().item(), accepted[same == 1].float().mean().item()


def test_a_threshold_of_scikit_learn_keeps_what_it_promises():
    metrics = tool("sklearn.metrics")
    scores, same = pairs()
    far, tar, thresholds = metrics.roc_curve(same, scores)
    at = (far <= 0.01).nonzero()[0][-1]  # the largest rate that is allowed
    found = rates(scores, same, float(thresholds[at]))
    assert found == pytest.approx((far[at], tar[at]))
    assert found[0] <= 0.01 < far[at + 1]


def test_equal_error_rate_is_that_of_counting():
    metrics, classification = (
        tool("sklearn.metrics"),
        tool("torchmetrics.functional.classification"),
    )
    scores, same = pairs()
    far, tar, _ = metrics.roc_curve(same, scores, drop_intermediate=False)
    at = abs(far - (1 - tar)).argmin()
    theirs = classification.binary_eer(scores, same)
    assert theirs.item() == pytest.approx((far[at] + 1 - tar[at]) / 2, abs=5e-3)
    assert 0.02 < theirs < 0.4


def test_torchmetrics_threshold_at_a_false_acceptance_rate():
    classification = tool("torchmetrics.functional.classification")
    scores, same = pairs()
    tar, threshold = classification.binary_sensitivity_at_specificity(
        scores, same, min_specificity=0.99
    )
    false, true = rates(scores, same, threshold)
    assert true == pytest.approx(tar.item())
    assert false <= 0.0101


def test_torchmetrics_applies_a_sigmoid_to_cosines_but_not_to_scores_of_angles():
    """A batch with a negative cosine goes through a sigmoid, one without does not."""
    classification = tool("torchmetrics.functional.classification")
    scores, same = pairs()
    cosines = torch.cos(torch.pi * (1 - scores))
    assert cosines.min() < 0
    *_, thresholds = classification.binary_roc(cosines, same)
    assert not torch.isin(cosines, thresholds).any()
    *_, thresholds = classification.binary_roc(scores, same)
    assert torch.isin(scores, thresholds).all()


@pytest.mark.parametrize("k", [1, 5])
def test_recall_at_k(k):
    retrieval = tool("torchmetrics.retrieval")
    rows, labels = embeddings()
    unit = F.normalize(rows)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    nearest = cosines.topk(k).indices
    expected = (labels[nearest] == labels[:, None]).any(1).double().mean().item()

    others = ~torch.eye(len(labels), dtype=torch.bool)
    relevant = (labels[:, None] == labels)[others]
    query = torch.arange(len(labels))[:, None].expand(others.shape)[others]
    found = retrieval.RetrievalHitRate(top_k=k)(cosines[others], relevant, indexes=query)
    assert found.item() == pytest.approx(expected)
    assert 0.3 < expected < 1


@pytest.mark.parametrize("sub_centers", [1, 3])
def test_faiss_finds_the_class_that_the_logits_do(sub_centers):
    faiss = tool("faiss")
    rows, _ = embeddings()
    torch.manual_seed(0)
    loss = al.ArcFaceLoss(10, 16, sub_centers=sub_centers)
    index = faiss.IndexFlatIP(16)
    index.add(F.normalize(loss.weight.detach()).numpy())
    cosines, nearest = index.search(F.normalize(rows).numpy(), 1)
    logits = loss.get_logits(rows)
    assert (torch.from_numpy(nearest[:, 0]) // sub_centers == logits.argmax(1)).all()
    assert cosines[:, 0] == pytest.approx(logits.amax(1).detach().numpy() / loss.scale, abs=1e-5)


def test_faiss_ranks_a_gallery_by_the_angle():
    faiss = tool("faiss")
    rows, _ = embeddings()
    index = faiss.IndexFlatIP(16)
    index.add(F.normalize(rows[:40]).numpy())
    _, nearest = index.search(F.normalize(rows[40:]).numpy(), 3)
    each = rows[40:, None].expand(-1, 40, -1)
    angles = al.angle_between(each, rows[:40].expand_as(each))
    assert torch.equal(torch.from_numpy(nearest), angles.topk(3, largest=False).indices)
    index = faiss.IndexFlatIP(16)  # without normalisation long embeddings come first
    index.add(rows[:40].numpy())
    assert (index.search(rows[40:].numpy(), 3)[1] != nearest).any()

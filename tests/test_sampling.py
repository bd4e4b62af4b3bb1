"""Sampled classes on one device."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import angular_losses as al
from angular_losses.distributed import clip_grad_norm_
from tests.batches import drawn_in

SIZE, CLASSES, ROWS = 6, 40, 9


def made(cls=al.ArcFaceLoss, rate=0.3, **options):
    torch.manual_seed(0)
    return al.sample_classes(cls(CLASSES, SIZE, dtype=torch.float64, **options), rate)


def batch(num_labels=None):
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS,) if num_labels is None else (ROWS, num_labels)
    embeddings = torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64)
    return embeddings.requires_grad_(), torch.randint(CLASSES, shape, generator=generator)


@pytest.mark.parametrize("num_labels", [None, 3])
@pytest.mark.parametrize("sub_centers", [1, 2])
@pytest.mark.parametrize("cls", [al.ArcFaceLoss, al.AdaFaceLoss, al.CurricularFaceLoss])
def test_it_is_the_loss_of_the_classes_drawn(cls, sub_centers, num_labels):
    loss = made(cls, sub_centers=sub_centers)
    embeddings, labels = batch(num_labels)
    labels.view(-1)[0] = -100
    value, drawn = drawn_in(lambda: loss(embeddings, labels))
    value.backward()
    drawn = torch.tensor(drawn)
    kept = labels != -100
    assert set(labels[kept].tolist()) <= set(drawn.tolist())
    assert len(drawn) == max(12, len(labels.where(kept, 0).unique()))
    rows = (drawn[:, None] * sub_centers + torch.arange(sub_centers)).flatten()
    few = cls(len(drawn), SIZE, dtype=torch.float64, sub_centers=sub_centers)
    with torch.no_grad():
        few.weight.copy_(loss.weight[rows])
    among = torch.searchsorted(drawn, labels.where(kept, 0)).where(kept, -100)
    others = embeddings.detach().clone().requires_grad_()
    expected = few(others, among)
    expected.backward()
    gradient = loss.weight.grad.coalesce()
    assert gradient.indices()[0].tolist() == rows.tolist()
    for found, wanted in (
        (value, expected),
        (gradient.values(), few.weight.grad),
        (embeddings.grad, others.grad),
    ):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", al.available())
def test_every_softmax_loss_can_be_sampled(name):
    given = {"class_counts": range(1, CLASSES + 1)} if name == "KappaFaceLoss" else {}
    loss = getattr(al, name)(CLASSES, SIZE, **given)
    if name in ("P2SGradLoss", "SphereFace2Loss", "UniFaceLoss"):
        with pytest.raises(ValueError, match="a sum over all classes"):
            al.sample_classes(loss, 0.5)
        return
    al.sample_classes(loss, 0.5)
    embeddings, labels = torch.randn(ROWS, SIZE) * 20, torch.randint(CLASSES, (ROWS,))
    for _ in range(2):
        loss(embeddings, labels).backward()
    assert loss.weight.grad.is_sparse
    assert loss.weight.grad.coalesce().values().isfinite().all()


def test_each_step_draws_anew_from_torchs_generator():
    loss, (embeddings, labels) = made(), batch()
    drawn = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        drawn.append(drawn_in(lambda: loss(embeddings, labels))[1])
    assert drawn[0] == drawn[2] != drawn[1]


def test_the_same_step_keeps_the_classes_drawn():
    loss, (embeddings, labels) = made(), batch()
    first, drawn = drawn_in(lambda: loss(embeddings, labels))
    with loss.same_step():
        assert torch.equal(loss(embeddings, labels), first)
        others = torch.arange(CLASSES - 3, CLASSES)
        _, again = drawn_in(lambda: loss(embeddings[:3], others))
        assert len(again) == len(drawn)
        assert {*again} <= {*drawn, *others.tolist()}
    assert drawn_in(lambda: loss(embeddings, labels))[1] != drawn


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_pass_of_the_same_step_has_its_classes(use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        loss, (embeddings, labels) = made(), batch()
        loss(embeddings, labels).backward()
        loss.weight.grad = None
        with loss.same_step():
            if checkpointed:
                value = checkpoint(loss, embeddings, labels, use_reentrant=use_reentrant)
            else:
                value = loss(embeddings, labels)
        value.backward()
        gradients.append(loss.weight.grad.to_dense())
    assert torch.equal(*gradients)


def test_recomputed_passes_of_several_steps_have_their_classes():
    """A pass, one of the same step, and one of the next, checkpointed before one backward pass."""
    gradients = []
    for checkpointed in (False, True):
        loss, (embeddings, labels) = made(), batch()

        def call(rows, labels, loss=loss, checkpointed=checkpointed):
            return (
                checkpoint(loss, rows, labels, use_reentrant=False)
                if checkpointed
                else loss(rows, labels)
            )

        values = [call(embeddings, labels)]
        with loss.same_step():
            values.append(call(2 * embeddings, (labels + 20) % CLASSES))
        values.append(call(3 * embeddings, (labels + 40) % CLASSES))
        sum(values).backward()
        gradients.append([loss.weight.grad.to_dense(), embeddings.grad])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_moves_the_rows_drawn_alone(optimizer):
    loss, (embeddings, labels) = made(), batch()
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    stepping = optimizer(loss.parameters(), lr=0.1, weight_decay=0.1, **options)
    al.sample_optimizer(stepping, loss)
    for _ in range(3):
        before = loss.weight.detach().clone()
        stepping.zero_grad()
        value, drawn = drawn_in(lambda: loss(embeddings, labels))
        value.backward()
        assert clip_grad_norm_(loss, 1.0) > 0
        stepping.step()
        moved = (loss.weight.detach() != before).any(1).nonzero()[:, 0]
        assert moved.tolist() == drawn
    for value in stepping.state_dict()["state"][0].values():
        assert value is None or value.dim() == 0 or value.shape == loss.weight.shape


def test_all_classes_drawn_train_as_the_loss_without_sampling():
    weights = []
    for rate in (1.0, 0.999):
        loss, (embeddings, labels) = made(rate=rate), batch()
        stepping = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)
        if rate < 1:
            al.sample_optimizer(stepping, loss)
        for _ in range(4):
            stepping.zero_grad()
            loss(embeddings, labels).backward()
            stepping.step()
        weights.append(loss.weight.detach())
    assert torch.equal(*weights)


def test_evaluation_uses_all_classes():
    loss, whole, (embeddings, labels) = made(), made(rate=1.0), batch()
    loss(embeddings, labels)
    assert torch.equal(loss.eval()(embeddings, labels), whole.eval()(embeddings, labels))
    assert torch.equal(loss.get_logits(embeddings), whole.get_logits(embeddings))
    assert not isinstance(whole, type(loss))


def test_angles_between_steps_are_those_of_all_classes():
    loss, whole, (embeddings, _) = made(), made(rate=1.0), batch()
    loss(*batch())
    labels = torch.arange(ROWS)
    found, expected = (each.eval().target_angles(embeddings, labels) for each in (loss, whole))
    assert torch.equal(found, expected)


def test_copies_files_and_the_end_of_sampling():
    loss, (embeddings, labels) = made(), batch()
    torch.manual_seed(5)
    expected = loss(embeddings, labels)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.manual_seed(5)
        assert torch.equal(other(embeddings, labels), expected)
        assert type(other).__name__ == "SampledArcFaceLoss"
    plain = al.ArcFaceLoss(CLASSES, SIZE, dtype=torch.float64)
    plain.load_state_dict(loss.state_dict())
    ended = al.sample_classes(loss, 1.0)
    assert type(ended) is al.ArcFaceLoss
    assert repr(ended) == repr(plain)
    assert torch.equal(ended(embeddings, labels), plain(embeddings, labels))
    for other in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert al.sample_classes(other, 0.5).shard.count == CLASSES


def test_extended_losses_draw_new_classes_too():
    loss = made()
    loss.extend(20)
    embeddings, _ = batch()
    _, drawn = drawn_in(lambda: loss(embeddings, torch.full((ROWS,), 59)))
    assert len(drawn) == 18
    assert 59 in drawn


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_empty_batches(rate):
    loss = made(rate=rate)
    nothing = torch.empty(0, SIZE, dtype=torch.float64)
    value = loss(nothing, torch.empty(0, dtype=torch.int64))
    value.backward()
    assert value == 0


@pytest.mark.parametrize(
    "copied", [lambda loss: loss, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))]
)
def test_an_optimiser_that_is_not_prepared_raises(copied):
    loss, (embeddings, labels) = copied(made()), batch()
    stepping = torch.optim.SGD(loss.parameters(), lr=0.1)
    loss(embeddings, labels).backward()
    with pytest.raises(RuntimeError, match=r"by sample_optimizer\(optimizer, loss\)"):
        stepping.step()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: al.sample_classes(torch.nn.Linear(2, 2), 0.5), TypeError, "loss: "),
        (lambda: made(rate=1.5), ValueError, "sample_rate: "),
        (lambda: made(al.P2SGradLoss), ValueError, "sample_rate: .*a sum over all classes"),
        (lambda: made(label_smoothing=0.1), ValueError, "sample_rate: .*a mean over all classes"),
        (lambda: al.sample_optimizer(optimizer_of(made()), made()), ValueError, "optimizer: "),
        (lambda: prepared(torch.optim.Rprop), TypeError, "optimizer: .* got Rprop"),
        (lambda: prepared(torch.optim.SGD, 1.0), TypeError, "loss: .*sampled one, got ArcFaceLoss"),
        (lambda: made()(*batch()[:1], torch.full((ROWS,), 40)), ValueError, "labels: "),
        (lambda: made()(*batch()[:1], torch.rand(ROWS)), TypeError, "labels: "),
        (lambda: made()(*batch()[:1], None), TypeError, "labels: "),
    ],
)
def test_what_does_not_fit_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def optimizer_of(loss, cls=torch.optim.SGD):
    return cls(loss.parameters(), lr=0.1)


def prepared(cls, rate=0.3):
    loss = made(rate=rate)
    al.sample_optimizer(optimizer_of(loss, cls), loss)


def test_a_share_of_the_classes_is_rounded_up_once():
    loss = al.sample_classes(al.ArcFaceLoss(100, 8), 0.07)  # 7.000000000000001 classes
    loss(torch.randn(1, 8), torch.tensor([3])).backward()
    assert loss.weight.grad._nnz() == 7


def test_outside_of_a_step_all_classes_take_part():
    loss, (embeddings, labels) = made(), batch()
    loss(embeddings, labels)
    others = (labels + 1) % CLASSES
    found = loss.target_angles(embeddings, others)
    assert torch.equal(found, al.sample_classes(loss, 1).target_angles(embeddings, others))


def test_a_refused_call_leaves_no_sample():
    loss, (embeddings, labels) = made(), batch()
    with pytest.raises(ValueError, match="sample_weight"):
        loss(embeddings, labels, torch.ones(1))
    whole = made()
    whole.load_state_dict(loss.state_dict())
    al.sample_classes(whole, 1)
    assert torch.equal(loss.eval()(embeddings, labels), whole(embeddings, labels))

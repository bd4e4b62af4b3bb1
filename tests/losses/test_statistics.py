"""Running statistics against the papers' updates: in training, in eval, over processes."""

import copy
import math

import pytest
import torch

import angular_losses as al
from tests import papers
from tests.cases import in_chunks_of
from tests.processes import Processes

SIZE, CLASSES = 6, 7


def batch(num_rows=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = 2 * torch.randn(num_rows, SIZE, generator=generator, dtype=torch.float64)
    return embeddings, torch.randint(CLASSES, (num_rows,), generator=generator)


def built(cls, *arguments, **options):
    torch.manual_seed(0)
    return cls(CLASSES, SIZE, *arguments, dtype=torch.float64, **options)


def cosine_of_targets(loss, embeddings, labels):
    cosine = papers.cosines(embeddings, loss.weight.detach())
    return papers.at_labels(cosine, labels)


def test_curricular_t():
    loss, t = built(al.CurricularFaceLoss, momentum=0.2), torch.tensor(0.0)
    for seed in range(3):
        embeddings, labels = batch(seed=seed)
        t = papers.curricularface_t(t, cosine_of_targets(loss, embeddings, labels), 0.2)
        value = loss(embeddings, labels)
        assert loss.t.item() == pytest.approx(t.item(), rel=1e-6)
        rows = papers.curricularface(
            embeddings, loss.weight, labels, margin=0.5, scale=64.0, t=loss.t.double()
        )
        assert torch.allclose(value, rows.mean())


@pytest.mark.parametrize("mode", ["stash", "recompute"])
def test_hard_negatives_by_the_margin_of_their_pass(mode):
    loss = built(al.MVSoftmaxLoss, mode=mode, schedule=al.MarginWarmup(2))
    embeddings, labels = batch()
    with in_chunks_of(2):
        first = loss(embeddings, labels)
        (alone,) = torch.autograd.grad(first, loss.weight, retain_graph=True)
        loss(*batch(seed=1))
        (later,) = torch.autograd.grad(first, loss.weight)
    assert torch.equal(alone, later)


def test_adaface_statistics():
    loss = built(al.AdaFaceLoss, momentum=0.3)
    mean, std = torch.tensor(20.0), torch.tensor(100.0)
    for seed in range(3):
        embeddings, labels = batch(seed=seed)
        mean, std = papers.adaface_statistics(mean, std, embeddings, 0.3, clip=(1e-3, 100.0))
        loss(embeddings, labels)
        assert loss.mean.item() == pytest.approx(mean.item(), rel=1e-6)
        assert loss.deviation.item() == pytest.approx(std.item(), rel=1e-6)


@pytest.mark.parametrize(("num_rows", "deviation"), [(0, 100.0), (1, 100.0)])
def test_adaface_takes_batches_of_one_and_none(num_rows, deviation):
    loss = built(al.AdaFaceLoss, momentum=0.5)
    value = loss(*batch(num_rows))
    assert value.isfinite()
    assert loss.deviation.item() == deviation
    assert (loss.mean.item() == 20.0) == (num_rows == 0)


@pytest.mark.parametrize("weight", [0.25 / 9, 0.5 / 9])
def test_adaface_takes_labels_that_weigh_1_or_less_together(weight):
    loss = built(al.AdaFaceLoss, momentum=0.5)
    embeddings, labels = batch()
    two = torch.stack([labels, (labels + 1) % CLASSES], 1)
    loss(embeddings, two, label_weight=torch.full((9, 2), weight))
    assert loss.deviation.item() == 100.0
    assert loss.mean.item() == pytest.approx(10 + embeddings.norm(dim=1).mean().item() / 2)


@pytest.fixture
def default_bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_bfloat16")
@pytest.mark.parametrize(
    ("build", "name", "expected"),
    [
        (lambda: al.AdaFaceLoss(CLASSES, SIZE), "deviation", 100.0),
        (lambda: al.CurricularFaceLoss(CLASSES, SIZE), "t", 0.0),
        (lambda: al.AdaCosLoss(1001, SIZE), "scale", 2**0.5 * math.log(1000)),
        (lambda: al.CosFaceLoss(2, SIZE, margin=[0.1, 0.1]), "margin", 0.1),
        (lambda: al.ArcFaceLoss(2, SIZE, class_weight=[0.1, 0.1]), "class_weight", 0.1),
    ],
)
def test_buffers_made_in_half_precision(build, name, expected):
    """As transformers makes them, which sets the default dtype while it makes a model."""
    buffer = build().get_buffer(name)
    assert buffer.dtype == torch.float32
    assert buffer.max().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", ["dense", "stash"])
def test_adacos_scale(mode):
    loss = built(al.AdaCosLoss, mode=mode)
    scale = papers.adacos_fixed_scale(CLASSES)
    assert loss.scale.item() == pytest.approx(scale)
    for seed in range(3):
        embeddings, labels = batch(seed=seed)
        cosine = papers.cosines(embeddings, loss.weight.detach())
        scale = papers.adacos_scale(scale, cosine, labels)
        value = loss(embeddings, labels)
        assert loss.scale.item() == pytest.approx(scale.item(), rel=1e-6)
        rows = papers.adacos(embeddings, loss.weight, labels, scale=loss.scale.double())
        assert torch.allclose(value, rows.mean())


def test_adacos_fixed_stays():
    loss = built(al.AdaCosLoss, dynamic=False)
    loss(*batch())
    assert loss.scale.item() == pytest.approx(papers.adacos_fixed_scale(CLASSES))


def test_adacos_scale_stays_above_1():
    loss = al.AdaCosLoss(3, 2)
    with torch.no_grad():
        angle = torch.arange(3) * 2 * torch.pi / 3
        loss.weight.copy_(torch.stack([angle.cos(), angle.sin()], 1))
        loss.scale.fill_(30.0)
    loss(loss.weight.detach(), torch.arange(3))  # all others' cosines are -1/2
    assert loss.scale == 1.0


def test_elasticface_draws():
    theta = torch.linspace(0.1, 1.0, 20000, dtype=torch.float64)
    labels = torch.zeros(20000, dtype=torch.int64)
    loss = al.ElasticFaceLoss(3, 4, kind="cos", deviation=0.05)
    drawn = theta.cos() - loss.margin_function(torch.ones(20000, 4), labels)(theta)
    assert drawn.mean().item() == pytest.approx(0.35, abs=2e-3)
    assert drawn.std().item() == pytest.approx(0.05, rel=0.03)
    plus = al.ElasticFaceLoss(3, 4, kind="cos", plus=True, deviation=0.05)
    order = torch.randperm(50)
    shuffled = theta[:50][order]
    margin = plus.margin_function(torch.ones(50, 4), labels[:50])
    torch.manual_seed(3)
    draws = torch.randn(50) * 0.05 + 0.35
    torch.manual_seed(3)
    margin = plus.margin_function(torch.ones(50, 4), labels[:50])
    expected = papers.elasticface_plus_margins(draws, shuffled.cos())
    assert torch.allclose(shuffled.cos() - margin(shuffled), expected.double(), atol=1e-6)


def test_kappaface_margins_after_an_epoch():
    counts = torch.tensor([50.0, 9.0, 30.0, 30.0, 20.0, 10.0, 15.0])
    loss = built(al.KappaFaceLoss, counts)
    assert torch.allclose(loss.margin, torch.full((CLASSES,), 0.8))
    rows, labels = torch.randn(40, SIZE, dtype=torch.float64), torch.arange(40) % CLASSES
    rows += torch.eye(CLASSES, SIZE, dtype=torch.float64)[labels] * labels[:, None]
    for part in range(0, 40, 8):
        loss(rows[part : part + 8], labels[part : part + 8])
    loss.update_margins()
    unit = rows / rows.norm(dim=1, keepdim=True)
    kappa = papers.kappaface_concentration(unit, labels, CLASSES)
    expected = papers.kappaface_margins(kappa, counts, margin=0.8, temperature=0.4, gamma=0.7)
    assert torch.allclose(loss.margin.double(), expected, atol=1e-5)
    assert loss.seen.sum() == 0
    assert loss.direction_sums.count_nonzero() == 0


def test_kappaface_margins_of_unseen_classes():
    loss = built(al.KappaFaceLoss, torch.full((CLASSES,), 10.0), gamma=1.0)
    embeddings, labels = batch(40)
    loss(embeddings, labels % 5)
    loss.update_margins()
    assert loss.margin.isfinite().all()
    assert torch.allclose(loss.margin[5:], torch.full((2,), 0.4))  # of middling concentration
    assert not torch.isclose(loss.margin[:5], torch.tensor(0.4)).any()
    loss.update_margins()  # nothing seen at all
    assert loss.margin.isfinite().all()


def test_kappaface_with_a_class_of_one_image():
    """A mean of one direction has length 1, a concentration without bound."""
    counts = torch.full((CLASSES,), 40.0)
    counts[-1] = 1
    spread = torch.arange(1.0, CLASSES + 1, dtype=torch.float64)
    labels = torch.cat([torch.arange(40 * (CLASSES - 1)) % (CLASSES - 1), torch.tensor([6])])
    torch.manual_seed(0)
    embeddings = torch.randn(len(labels), SIZE, dtype=torch.float64)
    embeddings += spread[labels, None] * torch.eye(CLASSES, SIZE, dtype=torch.float64)[labels]
    margins = []
    for rows in (slice(None), slice(-1), [*range(len(labels)), -1]):  # with it, without, twice
        loss = built(al.KappaFaceLoss, counts, gamma=1.0)
        loss(embeddings[rows], labels[rows])
        loss.update_margins()
        margins.append(loss.margin)
    assert torch.allclose(margins[0], margins[1])
    assert torch.allclose(margins[0], margins[2])
    assert margins[0][:-1].std() > 0.05
    assert margins[0][-1].item() == pytest.approx(0.4)


def test_kappaface_sums_are_saved_but_no_buffers():
    loss = built(al.KappaFaceLoss, torch.full((CLASSES,), 10.0))
    loss(*batch())
    names = {"direction_sums", "seen"}
    assert not names & dict(loss.named_buffers()).keys()
    assert names < loss.state_dict().keys()
    outer = torch.nn.ModuleDict({"loss": built(al.KappaFaceLoss, torch.full((CLASSES,), 10.0))})
    outer.load_state_dict({f"loss.{name}": value for name, value in loss.state_dict().items()})
    assert torch.equal(outer["loss"].direction_sums, loss.direction_sums)
    assert outer["loss"].seen.sum() == 9
    del (state := outer.state_dict())["loss.seen"]
    state["loss.direction_sums"] = torch.zeros(2, 2)
    with pytest.raises(
        RuntimeError, match=r"(?s)Missing key.*loss.seen.*size mismatch for loss.dir"
    ):
        outer.load_state_dict(state)
    assert copy.deepcopy(loss).seen is not loss.seen
    loss.to("meta")
    assert loss.seen.is_meta
    assert not names & dict(loss.named_buffers()).keys()


def test_kappaface_sums_are_no_parameters():
    loss, other = (built(al.KappaFaceLoss, range(1, CLASSES + 1)) for _ in range(2))
    loss(*batch())
    for name in ("direction_sums", "seen"):
        setattr(other, name, torch.nn.Parameter(getattr(loss, name).bfloat16()))
    assert [name for name, _ in other.named_parameters()] == ["weight"]
    assert torch.equal(other.seen, loss.seen)
    assert torch.allclose(other.direction_sums, loss.direction_sums, rtol=0.01)
    assert other.direction_sums.dtype == torch.float32
    assert other.double().state_dict()["seen"].dtype == torch.float64


def test_margins_of_counts():
    counts = torch.tensor([3, 1000, 20, 20])
    assert torch.allclose(
        al.ldam_margins(counts, 0.4).double(), papers.ldam_margins(counts, max_margin=0.4)
    )
    a, b = papers.landmark_coefficients(counts, low=0.1, high=0.6, power=0.5)
    assert torch.allclose(
        al.power_law_margins(counts, (0.1, 0.6), 0.5).double(),
        papers.landmark_margins(counts, a=a, b=b, power=0.5),
        atol=1e-7,
    )
    assert torch.allclose(al.power_law_margins(torch.tensor([7, 7])), torch.full((2,), 0.275))


STATEFUL = {
    "curricular": lambda **options: built(al.CurricularFaceLoss, momentum=0.3, **options),
    "adaface": lambda **options: built(al.AdaFaceLoss, momentum=0.3, **options),
    "adacos": lambda **options: built(al.AdaCosLoss, **options),
    "kappaface": lambda **options: built(
        al.KappaFaceLoss, torch.arange(1.0, CLASSES + 1), **options
    ),
}


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
def test_backward_uses_statistics_of_its_forward(name, mode):
    """As in gradient accumulation over several forward passes."""
    loss = STATEFUL[name](mode=mode)
    with in_chunks_of(2):
        first = loss(*batch())
        (alone,) = torch.autograd.grad(first, loss.weight, retain_graph=True)
        loss(*batch(seed=1))
        (later,) = torch.autograd.grad(first, loss.weight)
    assert torch.equal(alone, later)


@pytest.mark.parametrize("name", STATEFUL)
def test_ignored_rows_count_for_nothing(name):
    loss, reference = STATEFUL[name](ignore_index=-1), STATEFUL[name]()
    embeddings, labels = batch()
    labels[::3] = -1
    loss(embeddings, labels)
    reference(embeddings[labels >= 0], labels[labels >= 0])
    for key, value in loss.state_dict().items():
        assert torch.allclose(value, reference.state_dict()[key], rtol=1e-6), key
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    loss(embeddings, torch.full_like(labels, -1))
    for key, value in loss.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", STATEFUL)
def test_bad_input_changes_nothing(name):
    loss = STATEFUL[name]()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    embeddings, labels = batch()
    with pytest.raises(ValueError, match="labels: "):
        loss(embeddings, labels + CLASSES)
    with pytest.raises(ValueError, match="sample_weight: "):
        loss(embeddings, labels, torch.ones(1))
    for key, value in loss.state_dict().items():
        assert torch.equal(value, before[key])


def _in_ddp(mesh):
    loss = built(al.KappaFaceLoss, torch.arange(1.0, CLASSES + 1))
    in_ddp = torch.nn.parallel.DistributedDataParallel(loss)
    for seed in range(3):
        embeddings, labels = batch(10, seed)
        mine = slice(0, 7) if mesh.get_rank() == 0 else slice(7, 10)
        in_ddp(embeddings[mine].requires_grad_(), labels[mine]).backward()
    loss.update_margins()
    return loss.margin.tolist()


@pytest.fixture(scope="module")
def processes():
    members = Processes(2)
    yield members
    members.close()


def test_kappaface_in_ddp(processes):
    found = processes.run(_in_ddp, 2)
    loss = built(al.KappaFaceLoss, torch.arange(1.0, CLASSES + 1))
    for seed in range(3):
        loss(*batch(10, seed))
    loss.update_margins()
    assert found[0] == found[1] == pytest.approx(loss.margin.tolist(), rel=1e-5)


def _states(mesh):
    states = {}
    for name, build in STATEFUL.items():
        loss = build()
        for seed in range(2):
            embeddings, labels = batch(10, seed)
            mine = slice(0, 7) if mesh.get_rank() == 0 else slice(7, 10)  # of different sizes
            loss(embeddings[mine], labels[mine])
        if name == "kappaface":
            loss.update_margins()
        states[name] = {key: value.tolist() for key, value in loss.state_dict().items()}
    return states


def test_processes_share_their_statistics(processes):
    first, second = processes.run(_states, 2)
    for name, build in STATEFUL.items():
        loss = build()
        for seed in range(2):
            loss(*batch(10, seed))
        if name == "kappaface":
            loss.update_margins()
        for key, value in loss.state_dict().items():
            assert first[name][key] == second[name][key], (name, key)
            if name != "adacos":  # whose median is the mean of the processes' medians
                assert torch.allclose(value.new_tensor(first[name][key]), value, rtol=1e-5), (
                    name,
                    key,
                )

"""Every loss of the family against its paper's formula, in every mode, with every option."""

import contextlib
import copy
import functools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import angular_losses as al
from angular_losses.engine import modes
from tests import papers
from tests.cases import MODES, in_chunks_of
from tests.family import CLASSES, COUNTS, FAMILY, NAMES, with_defaults
from tests.profiling import peak_bytes
from tests.strategies import seeds

SIZE = 6
SOFT = ("SphereFace-R-soft", "SphereFace-R-v2-soft")
every_loss = pytest.mark.parametrize("row", FAMILY, ids=NAMES)


def batch(num_rows=9, dtype=torch.float64, seed=0):
    """Embeddings that lean towards their classes, whose angles are of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (num_rows,), generator=generator)
    embeddings = torch.randn(num_rows, SIZE, generator=generator, dtype=torch.float64)
    return embeddings.to(dtype).requires_grad_(), labels


def built(row, seed=0, **options):
    torch.manual_seed(seed)
    loss = row.build(CLASSES, SIZE, dtype=torch.float64, **options)
    return loss.eval()


def towards(loss, embeddings, labels):
    """The batch moved nearer to the class centres, so that no target angle is near pi."""
    own = loss.weight.detach().view(CLASSES, -1, SIZE)[labels, 0]
    return (embeddings + 2.0 * own).detach().requires_grad_()


def variables(loss):
    return list(loss.parameters())


@every_loss
def test_values_and_gradients_of_the_papers(row):
    embeddings, labels = batch()
    embeddings = towards(built(row), embeddings, labels)
    for mode, chunk in MODES:
        loss = built(row, reduction="none", mode=mode)
        inputs = [embeddings, *variables(loss)]
        with in_chunks_of(chunk):
            found = loss(embeddings, labels)
            gradients = torch.autograd.grad(found.square().sum(), inputs)
        expected = row.paper(loss, embeddings, loss.weight, labels)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9), (mode, chunk)
        papers_gradients = torch.autograd.grad(expected.square().sum(), inputs)
        for ours, paper in zip(gradients, papers_gradients, strict=True):
            close = torch.allclose(ours, paper, rtol=1e-7, atol=1e-7 * paper.abs().max().item())
            assert close, (mode, chunk)
        assert any(gradient.abs().max() > 1e-6 for gradient in gradients)


@pytest.mark.parametrize("row", [row for row in FAMILY if row.exact], ids=lambda row: row.name)
def test_gradcheck_to_second_order(row):
    loss = built(row, mode="dense")
    embeddings, labels = batch(4, seed=3)
    embeddings = towards(loss, embeddings, labels)
    parameters = dict(loss.named_parameters())

    def function(embeddings, *values):
        given_parameters = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(loss, given_parameters, (embeddings, labels))

    inputs = (embeddings, *(p.detach().clone().requires_grad_() for p in parameters.values()))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4, fast_mode=True)


@every_loss
@settings(deadline=None, max_examples=12)
@given(
    seed=seeds,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["parallel", "opposite", "zero", "long", "short", "mixed"]),
    mode=st.sampled_from(["dense", "stash", "recompute"]),
    train=st.booleans(),
)
def test_no_input_gives_nan(row, seed, dtype, kind, mode, train):
    torch.manual_seed(seed)
    loss = row.build(CLASSES, SIZE, mode=mode).train(train)
    embeddings, labels = batch(seed=seed)
    own = loss.weight.detach().double().view(CLASSES, -1, SIZE)[labels, 0]
    with torch.no_grad():
        # A gradient is as large as the embedding is short, and float16 ends at 65504.
        short = 1e-2 if dtype == torch.float16 else 1e-4
        length = {"long": 1e4, "short": short, "zero": 0.0}.get(kind, 1.0)
        embeddings *= length
        if kind in ("parallel", "mixed"):
            embeddings[:5] = 3 * own[:5]
        if kind in ("opposite", "mixed"):
            embeddings[3:] = -2 * own[3:]
    embeddings = embeddings.detach().to(dtype).requires_grad_()
    with in_chunks_of(3):
        value = loss(embeddings, labels)
        value.backward()
    assert value.isfinite()
    assert value.dtype == torch.float32
    assert embeddings.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())
    assert all(buffer.isfinite().all() for buffer in loss.buffers())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@every_loss
def test_modes_agree_with_every_option(row, smoothing):
    if smoothing and not row.smoothing:
        pytest.skip("has no label smoothing")
    options = {
        "class_weight": torch.rand(CLASSES, dtype=torch.float64) + 0.5,
        "ignore_index": -1,
        "label_smoothing": smoothing,
    }
    sample_weight = torch.rand(9, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        results = []
        for mode, chunk in MODES:
            loss = built(row, mode=mode, reduction=reduction, **options)
            embeddings, labels = batch()
            labels[2] = -1
            with in_chunks_of(chunk):
                value = loss(embeddings, labels, sample_weight)
                gradients = torch.autograd.grad(value.sum(), [embeddings, *variables(loss)])
            assert gradients[0][2].count_nonzero() == 0
            results.append((value, *gradients))
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert torch.allclose(one, two, rtol=1e-9, atol=1e-11)


@every_loss
def test_smoothing_and_weights_as_in_cross_entropy(row):
    if not row.smoothing:
        with pytest.raises(ValueError, match="label_smoothing: expected 0"):
            row.build(CLASSES, SIZE, label_smoothing=0.1)
        return
    class_weight = torch.rand(CLASSES, dtype=torch.float64) + 0.5
    loss = built(row, reduction="none", label_smoothing=0.3, class_weight=class_weight)
    embeddings, labels = batch()
    embeddings = towards(loss, embeddings, labels)
    smoothed = functools.partial(
        F.cross_entropy, weight=class_weight, label_smoothing=0.3, reduction="none"
    )
    with mock.patch.object(papers, "cross_entropy", smoothed):
        expected = row.paper(loss, embeddings, loss.weight, labels)
    if row.name in ("MagFace", *SOFT):  # the row's weight is that of its penalty too
        penalty = loss.penalty(embeddings)
        expected = expected + penalty * (class_weight[labels] - 1)
    assert torch.allclose(loss(embeddings, labels), expected, rtol=1e-9)


@every_loss
def test_mean_is_weighted_by_classes(row):
    embeddings, labels = batch()
    class_weight = torch.rand(CLASSES, dtype=torch.float64) + 0.5
    rows, of_rows = built(row, reduction="none")(embeddings, labels), class_weight[labels]
    weighted = built(row, class_weight=class_weight)(embeddings, labels)
    assert torch.allclose(weighted, (rows * of_rows).sum() / of_rows.sum())


@every_loss
def test_two_labels_a_row(row):
    embeddings, labels = batch()
    others = (labels + 1 + torch.arange(9) % 3) % CLASSES
    lam = torch.linspace(0, 1, 9, dtype=torch.float64)
    rows = built(row, reduction="none")
    expected = lam * rows(embeddings, labels) + (1 - lam) * rows(embeddings, others)
    found = rows(embeddings, labels, other_labels=others, lam=lam)
    assert torch.allclose(found, expected)
    assert torch.allclose(
        built(row)(embeddings, labels, other_labels=others, lam=lam), expected.mean()
    )
    sample_weight = torch.rand(9, dtype=torch.float64)
    weighted = built(row)(embeddings, labels, sample_weight, other_labels=others, lam=lam)
    assert torch.allclose(weighted, (expected * sample_weight).sum() / sample_weight.sum())
    one = built(row)(embeddings, labels, other_labels=others, lam=0.3)
    expected = 0.3 * rows(embeddings, labels) + 0.7 * rows(embeddings, others)
    assert torch.allclose(one, expected.mean())


@every_loss
def test_state_is_saved_and_untouched_in_eval(row):
    torch.manual_seed(0)
    loss = row.build(CLASSES, SIZE, dtype=torch.float64).train()
    for step in range(3):
        loss(*batch(seed=step))
    twin = row.build(CLASSES, SIZE, dtype=torch.float64)
    twin.load_state_dict(loss.state_dict())
    state = copy.deepcopy(loss.state_dict())
    embeddings, labels = batch(seed=7)
    assert torch.equal(twin.eval()(embeddings, labels), loss.eval()(embeddings, labels))
    for name, value in loss.state_dict().items():
        assert torch.equal(value, state[name]), name


@every_loss
def test_logits_are_those_of_inference(row):
    loss = built(row)
    embeddings, _ = batch()
    logits = loss.get_logits(embeddings)
    if not loss.normalize_weight:
        assert torch.allclose(logits, embeddings @ loss.weight.T)
        return
    centres = loss.weight.view(CLASSES, -1, SIZE)
    cosine = torch.cosine_similarity(embeddings[:, None, None], centres, dim=-1).amax(2)
    keeps_length = row.name in ("SphereFace", "SphereFace-annealed", *SOFT)
    scale = embeddings.norm(dim=1, keepdim=True) if keeps_length else loss.scale
    assert torch.allclose(logits, scale * cosine)


@pytest.mark.parametrize("name", ["Li-ArcFace", "InterTopK-arc", "SphereFace-R-v2"])
@pytest.mark.parametrize("mode", ["dense", "stash"])
@pytest.mark.parametrize(
    ("dtype", "angle", "error"),
    [
        (torch.float64, 1e-5, 1e-5),
        (torch.float64, 3e-4, 1e-7),
        (torch.float32, 1e-2, 0.01),
        (torch.float32, 3e-3, 0.1),
    ],
)
def test_gradients_near_a_wrong_centre(name, mode, dtype, angle, error):
    row = FAMILY[NAMES.index(name)]
    loss = built(row, mode=mode).float().to(dtype)  # the centres in float32
    wrong = F.normalize(loss.weight.detach().double()[1], dim=0)
    towards = torch.randn(32, SIZE, dtype=torch.float64)
    towards = F.normalize(towards - (towards @ wrong)[:, None] * wrong)
    embeddings = (math.cos(angle) * wrong + math.sin(angle) * towards).to(dtype).requires_grad_()
    labels = torch.zeros(32, dtype=torch.int64)
    (found,) = torch.autograd.grad(loss(embeddings, labels), embeddings)
    precise = embeddings.detach().double().requires_grad_()
    expected = row.paper(loss, precise, loss.weight.detach().double(), labels).mean()
    (expected,) = torch.autograd.grad(expected, precise)
    worst = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max()
    assert worst < error


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("name", "mode"),
    [("InterTopK-arc", "dense"), ("NPCFace", "dense"), ("SphereFace-annealed", "stash")],
)
def test_graph_breaks(name, mode):
    loss = built(FAMILY[NAMES.index(name)], mode=mode)
    embeddings, labels = batch()
    value = torch.compile(loss, backend="eager", fullgraph=True)(embeddings, labels)
    assert torch.allclose(value, loss(embeddings, labels))


def test_every_loss_has_a_row():
    tested = {type(row.build(CLASSES, SIZE)) for row in FAMILY}
    public = {
        value
        for value in vars(al).values()
        if isinstance(value, type) and issubclass(value, al.MarginLoss)
    }
    assert public - tested - {al.MarginLoss} == {al.CombinedMarginLoss}  # in cases.py


PROFILED = (
    "ArcFace",
    "SubCenterArcFace",
    "CurricularFace",
    "Li-ArcFace",
    "InterTopK-arc",
    "UniFace",
)


@pytest.mark.parametrize("name", PROFILED)
def test_memory_is_within_the_plan(name):
    num_classes, num_rows = 20_000, 64
    loss = FAMILY[NAMES.index(name)].build(num_classes, 16, mode="recompute")
    embeddings = torch.randn(num_rows, 16, requires_grad=True)
    labels = torch.randint(num_classes, (num_rows,))

    def step():
        loss.weight.grad = embeddings.grad = None
        loss(embeddings, labels).backward()

    with in_chunks_of(512):
        predicted = al.plan(num_rows, len(loss.weight), 16, mode="recompute", reweighted=True)
        loss(embeddings, labels).backward()
        loss.weight.grad = embeddings.grad = None
        taken = peak_bytes(step) - predicted.gradient_bytes
    assert taken < 1.1 * predicted.extra_bytes
    assert taken < 0.5 * num_rows * num_classes * 4


@every_loss
def test_nothing_is_read_back_from_the_device(row, monkeypatch):
    # The meta device has no values: whatever reads one, as a synchronisation does, fails there.
    # In training mode test_edges makes losses there.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    for mode in ("dense", "recompute"):
        loss = row.build(CLASSES, SIZE, mode=mode).to("meta").eval()
        embeddings = torch.empty(5, SIZE, device="meta", requires_grad=True)
        with in_chunks_of(3):
            loss(embeddings, torch.empty(5, dtype=torch.int64, device="meta")).backward()
        assert embeddings.grad.shape == embeddings.shape


def test_budget_includes_reweighting():
    embeddings, labels = torch.randn(64, 16), torch.randint(20_000, (64,))
    al.ArcFaceLoss(20_000, 16, memory_budget=300_000)(embeddings, labels)
    al.CurricularFaceLoss(20_000, 16, memory_budget=400_000)(embeddings, labels)
    with pytest.raises(ValueError, match="memory_budget: expected at least 346240 bytes"):
        al.CurricularFaceLoss(20_000, 16, memory_budget=300_000)(embeddings, labels)


BAD_BATCHES = [
    (lambda x, y: (x, y + CLASSES), ValueError, r"labels: expected values in \[0, 7\)"),
    (lambda x, y: (x, -1 - y), ValueError, r"labels: expected values in \[0, 7\)"),
    (lambda x, y: (x, y.double()), TypeError, "labels: expected an integer tensor"),
    (lambda x, y: (x, y.tolist()), TypeError, "labels: expected an integer tensor"),
    (lambda x, y: (x, y[:-1]), ValueError, r"labels: expected shape \(9,\)"),
    (lambda x, y: (x[:, :-1], y), ValueError, r"embeddings: expected shape \(N, 6\)"),
    (lambda x, y: (x[0], y), ValueError, "embeddings: expected shape"),
    (lambda x, y: (x.long(), y), TypeError, "embeddings: expected a floating-point tensor"),
]


@every_loss
def test_bad_batches_are_named(row):
    loss = built(row).train()
    for change, error, message in BAD_BATCHES:
        with pytest.raises(error, match=message):
            loss(*change(*batch()))


def softmax(**options):
    settings = {"margin": torch.cos, "scale": 8.0, **options}
    return al.margin_softmax_loss(torch.randn(4, 3), torch.randn(6, 3), torch.arange(4), **settings)


def one_vs_rest(**options):
    settings = {"positive": torch.cos, "negative": lambda cosine, bias: cosine, **options}
    return al.one_vs_rest_loss(torch.randn(4, 3), torch.randn(6, 3), torch.arange(4), **settings)


def mixed(**options):
    return al.ArcFaceLoss(6, 3)(torch.randn(4, 3), torch.arange(4), **options)


OTHERS = torch.arange(4) + 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: softmax(negatives=3), TypeError, "negatives: expected a function"),
        (
            lambda: softmax(negatives=lambda cosine, target: cosine[0]),
            ValueError,
            r"negatives: expected it to return shape \(6, 4\), got \(4,\)",
        ),
        (
            lambda: softmax(negatives=lambda cosine, target: None),
            ValueError,
            r"negatives: expected it to return shape .*, got None",
        ),
        (lambda: softmax(sub_centers=0), ValueError, "sub_centers: expected at least 1"),
        (lambda: softmax(sub_centers=4), ValueError, "weight: expected a multiple of sub_centers"),
        (lambda: softmax(sub_centers=2), ValueError, r"labels: expected values in \[0, 3\)"),
        (lambda: softmax(penalty=torch.ones(3)), ValueError, r"penalty: expected shape \(4,\)"),
        (lambda: one_vs_rest(positive=1), TypeError, "positive: expected a function"),
        (lambda: one_vs_rest(negative=None), TypeError, "negative: expected a function"),
        (lambda: one_vs_rest(bias=torch.ones(2)), ValueError, "bias: expected a tensor of one"),
        (lambda: one_vs_rest(bias=1.0), ValueError, "bias: expected a tensor of one"),
        (lambda: one_vs_rest(reduction="max"), ValueError, "reduction: "),
        (lambda: mixed(other_labels=OTHERS), ValueError, "lam: expected it beside"),
        (lambda: mixed(lam=0.5), ValueError, "other_labels: expected it beside"),
        (lambda: mixed(other_labels=OTHERS, lam=1.5), ValueError, r"lam: .*\[0, 1\], got 1\.5"),
        (lambda: mixed(other_labels=OTHERS[:2], lam=0.5), ValueError, "labels: expected shape"),
        (lambda: mixed(other_labels=OTHERS + 5, lam=0.5), ValueError, "labels: expected values"),
        (lambda: mixed(other_labels=OTHERS, lam=torch.ones(3)), ValueError, "lam: expected shape"),
        (
            lambda: mixed(other_labels=OTHERS, lam=0.5, sample_weight=torch.ones(3)),
            ValueError,
            "sample_weight: expected shape",
        ),
        (lambda: al.ArcFaceLoss(5, 8, sub_centers=0), ValueError, "sub_centers: "),
        (
            lambda: al.ArcFaceLoss(5, 8, margin=torch.ones(4)),
            ValueError,
            r"margin: expected shape \(5,\)",
        ),
        (
            lambda: al.ArcFaceLoss(5, 8, margin=28.6 * torch.ones(5)),
            ValueError,
            "margin: .*degrees are not accepted",
        ),
        (lambda: al.LSoftmaxLoss(5, 8, sub_centers=2), ValueError, "sub_centers: expected 1"),
        (lambda: al.SphereFaceRLoss(5, 8, kind="v3"), ValueError, "kind: expected one of"),
        (lambda: al.SphereFaceRLoss(5, 8, normalization="x"), ValueError, "normalization: "),
        (
            lambda: al.SphereFaceRLoss(5, 8, kind="v2", schedule=al.MarginWarmup(5)),
            ValueError,
            "schedule: expected None",
        ),
        (
            lambda: al.CircleLoss(5, 8, schedule=al.MarginWarmup(5)),
            ValueError,
            "schedule: expected None",
        ),
        (lambda: al.AdaCosLoss(2, 8), ValueError, "num_classes: expected at least 3"),
        (lambda: al.AdaFaceLoss(5, 8, h=0), ValueError, "h: expected a number above 0"),
        (lambda: al.AdaFaceLoss(5, 8, momentum=1.1), ValueError, "momentum: "),
        (lambda: al.MagFaceLoss(5, 8, length_bounds=(9, 3)), ValueError, "length_bounds: .*lower"),
        (lambda: al.MagFaceLoss(5, 8, margin_bounds=(25, 45)), ValueError, "margin_bounds: .*deg"),
        (lambda: al.MagFaceLoss(5, 8, length_bounds=3), ValueError, "length_bounds: .*two numbers"),
        (lambda: al.ElasticFaceLoss(5, 8, kind="sphere"), ValueError, "kind: "),
        (lambda: al.ElasticFaceLoss(5, 8, deviation=-1), ValueError, "deviation: "),
        (lambda: al.KappaFaceLoss(5, 8, torch.ones(4)), ValueError, "class_counts: expected shape"),
        (lambda: al.KappaFaceLoss(5, 8, 5), TypeError, "class_counts: expected a number for each"),
        (lambda: al.KappaFaceLoss(2, 8, torch.tensor([3, 0])), ValueError, "class_counts: .*1 s"),
        (lambda: al.InterTopKLoss(5, 8, k=5), ValueError, "k: expected fewer than num_classes 5"),
        (lambda: al.MVSoftmaxLoss(5, 8, t=-0.1), ValueError, "t: "),
        (lambda: al.NPCFaceLoss(5, 8, mask_margin=28.6), ValueError, "mask_margin: .*degrees"),
        (lambda: al.SphereFace2Loss(5, 8, balance=1.0), ValueError, "balance: "),
        (lambda: al.SphereFace2Loss(1, 8), ValueError, "num_classes: expected at least 2"),
        (lambda: al.ldam_margins(torch.tensor([])), ValueError, "class_counts: expected shape"),
        (lambda: al.power_law_margins(COUNTS, (0.5, 0.1)), ValueError, "bounds: .*lower first"),
        (lambda: al.power_law_margins(COUNTS, power=0), ValueError, "power: "),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


ONCE = ("SphereFace-annealed", "SubCenterArcFace", "CurricularFace", "UniFace")


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize("mode", ["stash", "recompute"])
def test_second_derivatives_are_refused(name, mode):
    loss = built(FAMILY[NAMES.index(name)], mode=mode)
    embeddings, labels = batch()
    (gradient,) = torch.autograd.grad(loss(embeddings, labels), embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="mode='dense'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    "build",
    [
        al.UniFaceLoss,
        with_defaults(al.SphereFace2Loss, kind="A"),
        with_defaults(al.MVSoftmaxLoss, kind="cos"),
        al.LiArcFaceLoss,
        al.ElasticFaceLoss,
        al.ArcFaceLoss,
    ],
)
def test_warm_up_of_the_margin(build):
    embeddings, labels = batch()
    torch.manual_seed(0)
    warm = build(CLASSES, SIZE, schedule=al.MarginWarmup(4), dtype=torch.float64).eval()
    plain, whole = build(CLASSES, SIZE, margin=0.0), build(CLASSES, SIZE)
    for other in (plain, whole):
        other.double().eval().weight = warm.weight
        if hasattr(other, "bias"):
            other.bias = warm.bias
    assert torch.allclose(warm(embeddings, labels), plain(embeddings, labels))
    warm.schedule.step += 4
    assert torch.allclose(warm(embeddings, labels), whole(embeddings, labels))
    assert not torch.allclose(plain(embeddings, labels), whole(embeddings, labels))


def test_x2_softmax_warms_up_from_the_cosine():
    theta = torch.linspace(0, math.pi, 7, dtype=torch.float64)
    loss, parabola = al.X2SoftmaxLoss(3, 4), 0.65 - 0.9 * theta**2
    assert torch.equal(loss.target(theta, 0.0), theta.cos())
    assert torch.allclose(loss.target(theta, 0.25), 0.75 * theta.cos() + 0.25 * parabola)
    assert torch.allclose(loss.target(theta, 1.0), parabola)
    for bad in ({"a": 0.0}, {"a": -math.inf}, {"h": math.inf}, {"k": -math.inf}):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}: expected a number in "):
            al.X2SoftmaxLoss(3, 4, **bad)


REDUCED = ("SubCenterArcFace", "CurricularFace", "MV-arc-adaptive", "UniFace", "L-Softmax")


@pytest.mark.parametrize("mode", ["stash", "recompute"])
@pytest.mark.parametrize("name", REDUCED)
def test_many_classes_in_bfloat16(name, mode, monkeypatch):
    """Products in bfloat16 under autocast, or of a bfloat16 weight in float32."""
    monkeypatch.setattr(modes, "_multiplies_bfloat16", lambda device: True)
    torch.manual_seed(0)
    loss = FAMILY[NAMES.index(name)].build(5000, 64, mode=mode).eval()
    embeddings, labels = torch.randn(32, 64), torch.randint(5000, (32,))

    def results(loss, embeddings):
        embeddings = embeddings.detach().requires_grad_()
        with in_chunks_of(512):
            value = loss(embeddings, labels)
        return value, *torch.autograd.grad(value, (embeddings, loss.weight))

    exact = results(loss, embeddings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = results(loss, embeddings)
    for found, expected in zip(under, exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() / expected.norm() < 2e-2
    assert (under[2] - exact[2]).norm() / exact[2].norm() > 1e-5  # bfloat16 was used
    rounded = copy.deepcopy(loss).bfloat16()
    exact = results(copy.deepcopy(rounded).float(), embeddings)
    halved = results(rounded, embeddings)
    assert halved[2].dtype == torch.bfloat16
    for found, expected in zip(halved, exact, strict=True):
        assert (found.float() - expected).norm() / expected.norm() < 5e-3


@pytest.mark.parametrize("sub_centers", [1, 2])
@every_loss
def test_correct_rows(row, sub_centers):
    if row.name.startswith("L-Softmax") and sub_centers > 1:
        pytest.skip("has one centre a class")
    embeddings, labels = batch(40)
    labels[3] = -100
    for mode, chunk in MODES:
        loss = built(row, mode=mode, sub_centers=sub_centers)
        with in_chunks_of(chunk):
            value, correct = loss(embeddings, labels, return_correct=True)
            assert torch.equal(value, loss(embeddings, labels))
        assert torch.equal(correct, loss.get_logits(embeddings).argmax(1) == labels)

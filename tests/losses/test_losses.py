import copy
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import angular_losses as al
from tests import papers
from tests.cases import CASES, NAMES


def batch(dtype=torch.float32):
    torch.manual_seed(0)
    embeddings = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    return embeddings, torch.tensor([0, 1, 2, 3, 4, 1])


@pytest.mark.parametrize("gradient", ["exact", "detached"])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_module_equals_function(case, gradient):
    options = {
        "class_weight": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
        "label_smoothing": 0.1,
        "ignore_index": 1,
        "reduction": "sum",
    }
    module = case.loss(5, 8, gradient=gradient, **options)
    embeddings, labels = batch()
    margin = al.detached(case.margin) if gradient == "detached" else case.margin
    expected = al.margin_softmax_loss(
        embeddings, module.weight, labels, margin=margin, scale=module.scale, **options
    )
    loss = module(embeddings, labels)
    assert torch.equal(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (embeddings, module.weight)),
        torch.autograd.grad(expected, (embeddings, module.weight)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sample_weights_reach_the_loss(reduction):
    module = al.ArcFaceLoss(5, 8, reduction=reduction)
    embeddings, labels = batch()
    sample_weight = torch.tensor([1.0, 0.0, 5.0, 2.0, 0.5, 1.0])
    rows = al.ArcFaceLoss(5, 8, reduction="none")
    rows.weight = module.weight
    expected = rows(embeddings, labels) * sample_weight
    if reduction == "mean":
        expected = expected.sum() / sample_weight.sum()
    assert torch.allclose(module(embeddings, labels, sample_weight), expected)


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
def test_mode_and_budget_reach_the_softmax(mode):
    module = al.ArcFaceLoss(5, 8, mode=mode, memory_budget=10**6)
    embeddings, labels = batch()
    (gradient,) = torch.autograd.grad(module(embeddings, labels), embeddings, create_graph=True)
    if mode == "dense":
        gradient.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="mode='dense'"):
            gradient.sum().backward()
    module.memory_budget = 1
    with pytest.raises(ValueError, match=r"memory_budget: expected at least .*, got 1"):
        module(embeddings, labels)
    assert f"mode='{mode}'" in repr(module)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_logits_have_no_margin(case):
    module = case.loss(5, 8, scale=7.0)
    embeddings, _ = batch()
    logits = module.get_logits(embeddings)
    expected = 7 * torch.cosine_similarity(embeddings[:, None], module.weight[None], dim=-1)
    assert logits.shape == (6, 5)
    assert torch.allclose(logits, expected, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.get_logits(embeddings), logits)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_saving_copying_and_pickling(case):
    module = case.loss(5, 8, schedule=al.LambdaAnnealing())
    embeddings, labels = batch()
    for _ in range(3):
        module(embeddings, labels)
    restored = case.loss(5, 8, schedule=al.LambdaAnnealing())
    restored.load_state_dict(module.state_dict())
    for twin in (restored, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(embeddings, labels), module(embeddings, labels))
        module.schedule.step -= 1


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_learns_to_separate_classes(case):
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    points = torch.randn(60, 8) + 4 * torch.eye(8)[labels]
    module = case.loss(3, 8, schedule=al.MarginWarmup(20))
    network = torch.nn.Linear(8, 8)
    optimiser = torch.optim.Adam([*network.parameters(), *module.parameters()], lr=0.05)
    for _ in range(60):
        optimiser.zero_grad()
        module(network(points), labels).backward()
        optimiser.step()
    accuracy = (module.get_logits(network(points)).argmax(1) == labels).float().mean()
    assert accuracy > 0.95


def test_defaults_are_the_papers():
    assert (al.SphereFaceLoss(2, 3).margin, al.SphereFaceLoss(2, 3).scale) == (4, 30.0)
    assert (al.CosFaceLoss(2, 3).margin, al.CosFaceLoss(2, 3).scale) == (0.35, 64.0)
    assert (al.ArcFaceLoss(2, 3).margin, al.ArcFaceLoss(2, 3).scale) == (0.5, 64.0)
    combined = al.CombinedMarginLoss(2, 3)
    assert (combined.m1, combined.m2, combined.m3, combined.scale) == (1.0, 0.3, 0.2, 64.0)


def test_peers_variants_reach_the_margin():
    theta = torch.tensor([3.0], dtype=torch.float64)
    batch = torch.ones(1, 3), torch.tensor([0])
    plain = al.ArcFaceLoss(2, 3, beyond="plain").margin_function(*batch)
    assert plain(theta).item() == pytest.approx(math.cos(3.5))
    plain = al.SphereFaceLoss(2, 3, beyond="plain").margin_function(*batch)
    assert plain(theta).item() == pytest.approx(math.cos(12.0))
    plain = al.CombinedMarginLoss(2, 3, 2.0, 0.1, 0.2, beyond="plain").margin_function(*batch)
    assert plain(theta).item() == pytest.approx(math.cos(6.1) - 0.2)


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
def test_interclass_filtering_is_insightfaces(mode):
    torch.manual_seed(0)
    loss = al.CombinedMarginLoss(
        7, 4, scale=8.0, interclass_filtering_threshold=0.3, mode=mode, dtype=torch.float64
    )
    embeddings = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(20) % 7
    cosine = F.linear(F.normalize(embeddings), F.normalize(loss.weight))
    is_target = F.one_hot(labels, 7).bool()
    is_dirty = (cosine > 0.3) & ~is_target
    assert is_dirty.any()
    angle = cosine.clamp(-1 + 1e-9, 1 - 1e-9).acos()
    target = (angle + 0.3).cos() - 0.2
    expected = F.cross_entropy(8 * torch.where(is_target, target, cosine * ~is_dirty), labels)
    found = loss(embeddings, labels)
    variables = embeddings, loss.weight
    assert found.item() == pytest.approx(expected.item(), abs=1e-8)
    for one, other in zip(
        torch.autograd.grad(found, variables), torch.autograd.grad(expected, variables), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-7)


def test_a_new_loss_is_a_few_lines():
    class QuadraticMargin(al.MarginLoss):
        def target(self, theta, share):
            return torch.cos(theta) - 0.1 * share * theta**2

    module = QuadraticMargin(5, 8, scale=10.0)
    embeddings, labels = batch()
    expected = al.margin_softmax_loss(
        embeddings,
        module.weight,
        labels,
        margin=lambda theta: torch.cos(theta) - 0.1 * theta**2,
        scale=10.0,
    )
    assert torch.equal(module(embeddings, labels), expected)


def test_target_is_required():
    class Incomplete(al.MarginLoss):
        pass

    for cls in (Incomplete, al.MarginLoss):
        with pytest.raises(TypeError, match=f"{cls.__name__}: expected a loss that defines target"):
            cls(5, 8, 10.0)


def test_repr_tells_the_settings():
    assert repr(al.ArcFaceLoss(5, 8)) == "ArcFaceLoss(5, 8, scale=64.0, margin=0.5)"
    text = repr(al.SphereFaceLoss(5, 8, schedule=al.LambdaAnnealing(), reduction="sum"))
    assert "reduction='sum'" in text
    assert "LambdaAnnealing(base=1000.0, gamma=0.12, power=1.0, minimum=5.0)" in text
    assert "tensor" not in repr(al.KappaFaceLoss(5, 8, range(1, 6)))
    module = al.ArcFaceLoss(5, 8)
    module.counts = np.ones(2)
    assert "counts=array([1., 1.])" in repr(module)


def test_initial_weight():
    torch.manual_seed(0)
    module = al.ArcFaceLoss(500, 256)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert module.weight.shape == (500, 256)
    assert module.weight.norm(dim=1).mean().item() == pytest.approx(1.0, abs=0.01)
    assert al.ArcFaceLoss(2, 3, dtype=torch.float64).weight.dtype == torch.float64
    assert al.ArcFaceLoss(2, 3, device="meta").weight.device.type == "meta"


def test_class_weight_is_a_buffer():
    module = al.ArcFaceLoss(3, 4, class_weight=torch.tensor([1.0, 2.0, 3.0]))
    assert "class_weight" in module.state_dict()
    assert module.double().class_weight.dtype == torch.float64


@pytest.mark.parametrize(
    "build",
    [
        lambda numbers: al.ArcFaceLoss(3, 4, class_weight=numbers),
        lambda numbers: al.ArcFaceLoss(3, 4, margin=numbers),
        lambda numbers: al.KappaFaceLoss(3, 4, numbers),
    ],
)
def test_buffers_are_not_the_users_tensors(build):
    numbers = torch.ones(3)
    for buffer in build(numbers).buffers():
        buffer.fill_(2.0)
    assert numbers.tolist() == [1, 1, 1]


@pytest.mark.parametrize("schedule", [None, al.LambdaAnnealing(base=3.0, minimum=3.0)])
def test_detached_l_softmax_keeps_the_gradient_of_lengths(schedule):
    """With a margin the value is the margin's, and the gradient is that without one."""
    options = {"gradient": "detached", "schedule": schedule, "dtype": torch.float64}
    found, embeddings = [], torch.randn(6, 8, dtype=torch.float64).requires_grad_()
    labels, drawn = torch.arange(6) % 5, 2 * torch.randn(5, 8, dtype=torch.float64)
    for margin, more in ((1, {}), (1, options), (4, options), (4, {"schedule": schedule})):
        loss = al.LSoftmaxLoss(5, 8, margin=margin, **{"dtype": torch.float64, **more})
        loss.weight.data.copy_(drawn)
        theta = loss.target_angles(embeddings, labels)
        target = loss.margin_function(embeddings, labels)(theta)
        variables = embeddings, loss.weight
        found.append([target.detach(), *torch.autograd.grad(target.sum(), variables)])
    (plain, *exact), (same, *of_same), (detached, *of_detached), (with_margin, *_) = found
    assert torch.allclose(plain, same)
    assert torch.allclose(detached, with_margin)
    for one, other, expected in zip(of_same, of_detached, exact, strict=True):
        assert torch.allclose(one, expected)
        assert torch.allclose(other, expected)


def test_schedule_in_a_compiled_graph():
    torch.manual_seed(0)
    module = al.SphereFaceLoss(5, 8, schedule=al.LambdaAnnealing())
    embeddings, labels = batch()
    eager = [module(embeddings, labels).item() for _ in range(3)]
    module.schedule.step.zero_()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert [compiled(embeddings, labels).item() for _ in range(3)] == pytest.approx(eager, rel=1e-6)
    assert module.schedule.step == 3


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: al.ArcFaceLoss(0, 8), ValueError, "num_classes: expected at least 1, got 0"),
        (lambda: al.ArcFaceLoss(5.0, 8), TypeError, "num_classes: expected an int, got 5.0"),
        (lambda: al.ArcFaceLoss(5, -1), ValueError, "embedding_size: "),
        (
            lambda: al.ArcFaceLoss(5, 8, margin=28.6),
            ValueError,
            "margin: .*degrees are not accepted",
        ),
        (
            lambda: al.ArcFaceLoss(5, 8, margin="0.5"),
            TypeError,
            "margin: expected a number",
        ),
        (
            lambda: al.ArcFaceLoss(5, 8, margin=np.array(0.5)),
            TypeError,
            "margin: expected a num",
        ),
        (lambda: al.ArcFaceLoss(5, 8, dtype=torch.complex64), TypeError, "dtype: expected a float"),
        (lambda: al.ArcFaceLoss(5, 8, scale=0), ValueError, "scale: expected a number above 0"),
        (lambda: al.ArcFaceLoss(5, 8, beyond="up"), ValueError, "beyond: "),
        (
            lambda: al.ArcFaceLoss(5, 8, gradient="no"),
            ValueError,
            "gradient: expected one of 'exact'",
        ),
        (lambda: al.ArcFaceLoss(5, 8, reduction="avg"), ValueError, "reduction: "),
        (lambda: al.ArcFaceLoss(5, 8, schedule=1000), TypeError, "schedule: expected a Schedule"),
        (lambda: al.ArcFaceLoss(5, 8, class_weight=torch.ones(4)), ValueError, "class_weight: "),
        (lambda: al.ArcFaceLoss(5, 8, label_smoothing=-0.1), ValueError, "label_smoothing: "),
        (lambda: al.ArcFaceLoss(5, 8, mode="fast"), ValueError, "mode: expected one of 'auto'"),
        (lambda: al.ArcFaceLoss(5, 8, ignore_index=None), TypeError, "ignore_index: .* an int"),
        (lambda: al.ArcFaceLoss(5, 8, memory_budget=0), ValueError, "memory_budget: "),
        (lambda: al.ArcFaceLoss(5, 8, memory_budget=1e9), TypeError, "memory_budget: .* an int"),
        (lambda: al.SphereFaceLoss(5, 8, margin=0.5), ValueError, r"margin: .*\[1, inf\)"),
        (lambda: al.SphereFaceLoss(5, 8, beyond="linear"), ValueError, "beyond: "),
        (lambda: al.CosFaceLoss(5, 8, margin=2.0), ValueError, r"margin: .*\[0, 2\)"),
        (lambda: al.CombinedMarginLoss(5, 8, m1=0), ValueError, "m1: "),
        (lambda: al.CombinedMarginLoss(5, 8, m2=17.0), ValueError, "m2: .*degrees"),
        (lambda: al.CombinedMarginLoss(5, 8, m3=-1), ValueError, "m3: "),
        (lambda: al.CombinedMarginLoss(5, 8, beyond="x"), ValueError, "beyond: "),
        (lambda: al.ArcFaceLoss(5, 8).get_logits(torch.ones(2, 3)), ValueError, "embeddings: .*8"),
        (lambda: al.ArcFaceLoss(5, 8).get_logits([1.0]), TypeError, "embeddings: "),
    ],
)
def test_bad_arguments_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


class TestBias:
    @pytest.mark.parametrize("scale", [1.0, 40.0, 46.0, 64.0, 1000.0])
    @pytest.mark.parametrize(("kind", "balance"), [("C", 0.7), ("A", 0.7), ("C", 0.5)])
    @pytest.mark.parametrize("num_classes", [2, 3, 1000])
    def test_initial_bias_of_sphereface2(self, num_classes, scale, kind, balance):
        options = {"kind": kind, "balance": balance, "scale": scale}
        loss = al.SphereFace2Loss(num_classes, 4, dtype=torch.float64, **options)
        expected = papers.sphereface2_bias(num_classes, margin=0.4, t=3.0, **options)
        assert loss.bias.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)

    @pytest.mark.parametrize("cls", [al.SphereFace2Loss, al.UniFaceLoss])
    @pytest.mark.parametrize("assign", [False, True])
    def test_scalars_of_older_checkpoints(self, cls, assign):
        losses = torch.nn.ModuleList([cls(5, 4), cls(5, 4)])
        assert all(parameter.dim() for parameter in losses.parameters())
        state = losses.state_dict()
        state["1.bias"] = torch.tensor(2.5)
        losses.load_state_dict(state, assign=assign)
        assert losses[1].bias.shape == (1,)
        assert losses[1].bias.item() == 2.5
        assert state["1.bias"].shape == ()  # the caller's own


OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(al.MarginLoss).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}


def test_typed_options():
    assert al.LossOptions.__annotations__.keys() == OPTIONS.keys()
    assert [*inspect.signature(al.MarginLoss).parameters][3:] == [*OPTIONS]


@pytest.mark.parametrize("name", al.available())
def test_signatures_show_all_options(name):
    cls = getattr(al, name)
    shown = inspect.signature(cls).parameters
    expected = OPTIONS | ({"sub_centers": 3} if name == "SubCenterArcFaceLoss" else {})
    for option, default in expected.items():
        assert shown[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[option].default == default
        assert shown[option].annotation == al.LossOptions.__annotations__[option].__forward_arg__
    assert all(each.kind is not each.VAR_KEYWORD for each in shown.values())

    sizes = {"num_classes": 7, "embedding_size": 8, "class_counts": [1] * 7}
    loss = cls(**{name: value for name, value in sizes.items() if name in shown})
    for option in OPTIONS.keys() - {"device", "dtype"}:  # what is shown is what is done
        assert getattr(loss, option) == shown[option].default
    assert "schedule" not in inspect.signature(loss).parameters  # that of a call


def test_signature_of_a_user_defined_loss():
    class Own(al.MarginLoss):
        def __init__(self, num_classes, embedding_size, margin=0.1, **options):
            super().__init__(num_classes, embedding_size, 30.0, **options)

    class Closed(Own):
        def __init__(self, num_classes):
            super().__init__(num_classes, 8)

    class Smoothed(al.SubCenterArcFaceLoss):
        def __init__(self, num_classes, label_smoothing=0.1, **options):
            super().__init__(num_classes, 8, label_smoothing=label_smoothing, **options)

    own = ["num_classes", "embedding_size", "margin"]
    assert list(inspect.signature(Own).parameters) == [*own, *OPTIONS]
    assert list(inspect.signature(Closed).parameters) == ["num_classes"]
    shown = inspect.signature(Smoothed).parameters
    assert shown.keys() == {"num_classes", *OPTIONS}
    assert (shown["label_smoothing"].default, shown["sub_centers"].default) == (0.1, 3)


def test_signatures_of_pmls_interface_show_all_options():
    pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is missing")
    from angular_losses.integrations import pytorch_metric_learning as ours

    common = {"embedding_regularizer", "embedding_reg_weight", "reducer", "distance"}
    common.add("collect_stats")
    more = {"weight_regularizer", "weight_reg_weight", "weight_init_func", "mode", "memory_budget"}
    for name in ours.__all__:
        if getattr(getattr(ours, name), "__module__", "") != ours.__name__:  # PML's own
            continue
        shown = inspect.signature(getattr(ours, name)).parameters
        options = {k: each.default for k, each in shown.items() if each.kind is each.KEYWORD_ONLY}
        assert options.keys() == (common if name == "P2SGradLoss" else common | more)
        assert options["embedding_reg_weight"] == 1
        assert options.get("mode", "auto") == "auto"
        assert all(each.kind is not each.VAR_KEYWORD for each in shown.values())


def test_public_methods():
    hooks = {"target", "row_target", "row_scale", "negatives_function", "penalty", "observe"}
    called = {"get_logits", "extend", "same_step", "advance", "reset_parameters"}
    called |= {"drop_sub_centers", "register_statistic"}
    angles = {"margin_function", "target_angles"}
    attributes = {"statistics", "normalize_weight", "is_random", "ignore_index"}
    public = {name for name in dir(al.MarginLoss) if not name.startswith("_")}
    assert public - set(dir(torch.nn.Module)) == hooks | called | angles | attributes


def test_ignored_rows_take_no_draws_of_elasticface_plus():
    torch.manual_seed(0)
    loss = al.ElasticFaceLoss(10, 16, plus=True, deviation=0.1)
    labels = torch.randint(10, (4000,))
    kept = torch.arange(4000) % 2 == 0
    embeddings = loss.weight.detach()[labels] + 0.2 * torch.randn(4000, 16)
    embeddings = embeddings * kept[:, None]  # as a loss has ignored rows
    labels = labels.where(kept, 0)
    theta = al.target_angle(embeddings, loss.weight, labels)
    with torch.no_grad():
        margins = (loss.row_target(embeddings, labels)(theta, 1.0).acos() - theta)[kept]
    assert margins.mean().item() == pytest.approx(0.5, abs=0.02)  # eight standard errors
    assert margins.std().item() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("cls", [al.UniFaceLoss, al.SphereFace2Loss])
def test_reset_after_extend_sets_the_bias_of_all_classes(cls):
    loss = cls(10, 6)
    loss.extend(90)
    loss.reset_parameters()
    torch.testing.assert_close(loss.bias, cls(100, 6).bias)


def test_npcface_has_one_second_derivative_in_all_modes_of_autograd():
    torch.manual_seed(0)
    loss = al.NPCFaceLoss(4, 5, scale=8.0, mode="dense", dtype=torch.float64).eval()
    rows, direction = torch.randn(2, 3, 5, dtype=torch.float64)
    of_rows = lambda rows: loss(rows, torch.arange(3))  # noqa: E731
    _, found = torch.func.jvp(of_rows, (rows,), (direction,))
    torch.testing.assert_close(found, (torch.func.grad(of_rows)(rows) * direction).sum())

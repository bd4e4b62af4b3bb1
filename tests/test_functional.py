import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from angular_losses import arcface, margin_softmax_loss, one_vs_rest_loss, sphereface
from angular_losses.margins import Combined, KnownDescent
from angular_losses.negatives import KnownSlope
from tests import reference
from tests.cases import CASES, MODES, identifier, in_chunks_of, needs_compiler, spread

CLASS_WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "weighted": {"class_weight": CLASS_WEIGHT},
    "smoothed": {"label_smoothing": 0.1},
    "both": {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.3},
}
REDUCTIONS = ["mean", "sum", "none"]


def margin(theta):
    return arcface(theta, 0.5)


def batch(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    embeddings = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    return embeddings, weight, torch.tensor([0, 1, -100, 3, 4, 1])


def cross_entropy(embeddings, weight, labels, margin, scale, **options):
    """The textbook way, in float64: acos, replace the target column, F.cross_entropy."""
    cosine = F.normalize(embeddings) @ F.normalize(weight).T
    column = labels.clamp(min=0)[:, None]
    target = margin(torch.acos(cosine.gather(1, column)))
    options["weight"] = options.pop("class_weight", None)
    scale = scale[:, None] if isinstance(scale, torch.Tensor) else scale
    return F.cross_entropy(scale * cosine.scatter(1, column, target), labels, **options)


@pytest.mark.parametrize(
    ("case", "way", "options", "reduction"),
    spread(CASES, MODES, list(OPTIONS), REDUCTIONS),
    ids=identifier,
)
def test_equals_cross_entropy_on_margin_logits(case, way, options, reduction):
    (mode, chunk), (embeddings, weight, labels) = way, batch()
    arguments = {"margin": case.margin, "scale": 8.0, "reduction": reduction, **OPTIONS[options]}
    with in_chunks_of(chunk):
        ours = margin_softmax_loss(embeddings, weight, labels, mode=mode, **arguments)
    results = []
    for loss in (ours, cross_entropy(embeddings, weight, labels, **arguments)):
        results.append((loss, *torch.autograd.grad(loss.sum(), (embeddings, weight))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "reduction", "case"), spread(OPTIONS, REDUCTIONS, CASES), ids=identifier
)
def test_gradcheck_to_second_order(options, reduction, case):
    embeddings, weight, labels = batch()

    def loss(embeddings, weight):
        return margin_softmax_loss(
            embeddings,
            weight,
            labels,
            margin=case.margin,
            scale=4.0,
            reduction=reduction,
            mode="dense",
            **OPTIONS[options],
        )

    assert torch.autograd.gradcheck(loss, (embeddings, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (embeddings, weight), fast_mode=True)


@pytest.mark.parametrize(("way", "options", "case"), spread(MODES, OPTIONS, CASES), ids=identifier)
def test_gradcheck_of_every_mode(way, options, case):
    (mode, chunk), (embeddings, weight, labels) = way, batch()
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64, requires_grad=True)

    def loss(embeddings, weight, scale):
        with in_chunks_of(chunk):
            return margin_softmax_loss(
                embeddings,
                weight,
                labels,
                margin=case.margin,
                scale=scale,
                mode=mode,
                **OPTIONS[options],
            )

    for one in (scale, scale[0]):
        assert torch.autograd.gradcheck(loss, (embeddings, weight, one), fast_mode=True)


@pytest.mark.parametrize(("mode", "chunk"), MODES)
def test_a_scale_of_its_own_for_each_sample(mode, chunk):
    embeddings, weight, labels = batch()
    scale = torch.tensor([1.0, 20.0, 300.0, 4.0, 50.0, 600.0], dtype=torch.float64)
    with in_chunks_of(chunk):
        loss = margin_softmax_loss(
            embeddings, weight, labels, margin=margin, scale=scale, label_smoothing=0.1, mode=mode
        )
    expected = cross_entropy(embeddings, weight, labels, margin, scale, label_smoothing=0.1)
    assert torch.allclose(loss, expected, rtol=1e-10)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("mode", "chunk"), MODES)
def test_sample_weights_multiply_and_average_like_class_weights(mode, chunk, reduction):
    embeddings, weight, labels = batch()
    options = {"margin": margin, "scale": 8.0, **OPTIONS["both"]}
    sample_weight = torch.tensor([1.0, 0.0, 5.0, 2.0, 0.5, 1.0])
    with in_chunks_of(chunk):
        loss = margin_softmax_loss(
            embeddings,
            weight,
            labels,
            sample_weight=sample_weight,
            mode=mode,
            reduction=reduction,
            **options,
        )
    rows = cross_entropy(embeddings, weight, labels, reduction="none", **options) * sample_weight
    share = (labels >= 0) * sample_weight * options["class_weight"][labels.clamp(min=0)]
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / share.sum()}[reduction]
    assert torch.allclose(loss, expected, rtol=1e-10)


@pytest.mark.parametrize("dimensions", [2, 128, 512])
@pytest.mark.parametrize("spread", [0.0, 0.03, 0.3, 3.0])
@pytest.mark.parametrize(("mode", "chunk"), MODES)
def test_relative_error_in_float32_however_small_the_loss(mode, chunk, dimensions, spread):
    torch.manual_seed(dimensions)
    weight = torch.randn(6, dimensions)
    labels = torch.arange(6)
    embeddings = (weight + spread * torch.randn(6, dimensions)) * torch.rand(6, 1)
    with in_chunks_of(chunk):
        losses = margin_softmax_loss(
            embeddings, weight, labels, margin=margin, scale=64.0, reduction="none", mode=mode
        )
    centres = [reference.exact(row) for row in weight]
    for loss, embedding, label in zip(losses, embeddings, labels.tolist(), strict=True):
        expected = reference.loss(
            reference.exact(embedding), centres, label, lambda t: reference.arcface(t, 0.5), 64
        )
        assert float(abs(reference.mp.mpf(loss.item()) / expected - 1)) <= 1e-5


@pytest.mark.parametrize(("mode", "chunk"), MODES)
def test_a_loss_of_1e_minus_30_keeps_its_digits_and_its_gradient(mode, chunk):
    # The loss is about exp(-64 - 5), where cross_entropy gives 0.
    embeddings = torch.tensor([[1.0, 1e-3]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    labels = torch.tensor([0])

    def flat(theta):
        return torch.cos(theta) + 5 / 64

    with in_chunks_of(chunk):
        loss = margin_softmax_loss(embeddings, weight, labels, margin=flat, scale=64.0, mode=mode)
    loss.backward()
    theta = math.atan(embeddings[0, 1].item())
    expected = math.exp(-64 * (math.sin(theta) + math.cos(theta)) - 5)
    assert expected < 1.1e-30
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert embeddings.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_gives_float32_at_least(dtype):
    embeddings, weight, labels = batch(dtype)
    loss = margin_softmax_loss(embeddings, weight, labels, margin=margin, scale=8.0)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert embeddings.grad.dtype == dtype
    exact = margin_softmax_loss(
        embeddings.double(), weight.double(), labels, margin=margin, scale=8.0
    )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(exact, weight)
    assert torch.allclose(weight.grad, gradient, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_embeddings_and_weight_may_differ_in_dtype():
    embeddings, weight, labels = batch()
    loss = margin_softmax_loss(embeddings.bfloat16(), weight, labels, margin=margin, scale=8.0)
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_digit(dtype):
    embeddings, weight, labels = batch(torch.float32)
    plain = margin_softmax_loss(embeddings, weight, labels, margin=margin, scale=64.0)
    with torch.autocast("cpu", dtype=dtype):
        under = margin_softmax_loss(embeddings, weight, labels, margin=margin, scale=64.0)
    assert under.dtype == torch.float32
    assert torch.equal(under, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parallel_embeddings_under_autocast_give_finite_gradients(dtype):
    # Where copies of ArcFace return NaN: the cosine rounds to 1.
    torch.manual_seed(0)
    weight = torch.randn(10, 64, requires_grad=True)
    embeddings = (weight.detach() * 3 + 1e-3 * torch.randn(10, 64)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = margin_softmax_loss(
            embeddings, weight, torch.arange(10), margin=margin, scale=64.0, reduction="sum"
        )
    loss.backward()
    assert embeddings.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert (weight.grad.norm(dim=1) > 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", ["none", "all ignored"])
@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
def test_no_rows_to_learn_from_gives_0_with_zero_gradients(mode, rows, reduction):
    embeddings, weight, labels = batch(torch.float32)
    if rows == "none":
        embeddings, labels = embeddings[:0], labels[:0]
    else:
        labels = torch.full_like(labels, -100)
    loss = margin_softmax_loss(
        embeddings, weight, labels, margin=margin, scale=8.0, reduction=reduction, mode=mode
    )
    gradients = torch.autograd.grad(loss.sum(), (embeddings, weight))
    assert loss.sum() == 0
    assert all((gradient == 0).all() for gradient in gradients)
    assert loss.shape == (labels.shape if reduction == "none" else ())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [8.0, 100.0])
@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
def test_one_class_leaves_nothing_to_tell_apart(mode, scale, smoothing):
    embeddings, weight = torch.randn(3, 4, requires_grad=True), torch.randn(1, 4).requires_grad_()
    loss = margin_softmax_loss(
        embeddings,
        weight,
        torch.zeros(3).long(),
        margin=margin,
        scale=scale,
        label_smoothing=smoothing,
        mode=mode,
    )
    loss.backward()
    assert loss.abs() <= 1e-5 * smoothing * scale
    assert embeddings.grad.abs().max() <= 1e-5 * smoothing * scale
    assert weight.grad.abs().max() <= 1e-5 * smoothing * scale


def test_a_users_own_function_of_theta():
    embeddings, weight, labels = batch()

    def own(theta):
        return torch.cos(theta) - 0.1 * theta**2

    loss = margin_softmax_loss(embeddings, weight, labels, margin=own, scale=8.0)
    assert torch.allclose(loss, cross_entropy(embeddings, weight, labels, own, 8.0))


@pytest.mark.parametrize("is_learned", [False, True])
@pytest.mark.parametrize(("mode", "chunk"), MODES)
def test_a_combined_margin_that_may_be_learned(mode, chunk, is_learned):
    embeddings, weight, labels = batch()
    m2 = torch.tensor(0.4, dtype=torch.float64, requires_grad=is_learned)
    variables = [embeddings, weight, m2] if is_learned else [embeddings, weight]
    results = []
    for function in (margin_softmax_loss, cross_entropy):
        options = {"mode": mode} if function is margin_softmax_loss else {}
        with in_chunks_of(chunk):
            loss = function(
                embeddings, weight, labels, margin=Combined(1.1, m2, 0.2), scale=8.0, **options
            )
        results.append((loss, *torch.autograd.grad(loss, variables)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("mode", "chunk"), MODES)
def test_a_margin_of_its_own_for_each_sample(mode, chunk):
    embeddings, weight, labels = batch()
    margins = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)

    def own(theta):
        return arcface(theta, margins)

    with in_chunks_of(chunk):
        loss = margin_softmax_loss(embeddings, weight, labels, margin=own, scale=8.0, mode=mode)
    results = []
    expected = cross_entropy(
        embeddings, weight, labels, lambda theta: own(theta[:, 0])[:, None], 8.0
    )
    for value in (loss, expected):
        results.append((value, *torch.autograd.grad(value, (embeddings, weight))))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_per_sample_gradients_with_torch_func():
    embeddings, weight, labels = batch(torch.float32)
    labels = labels.clamp(min=0)

    def one(embedding, label):
        return margin_softmax_loss(
            embedding[None], weight.detach(), label[None], margin=margin, scale=8.0
        )

    per_sample = torch.func.vmap(torch.func.grad(one))(embeddings.detach(), labels)
    loss = margin_softmax_loss(
        embeddings, weight, labels, margin=margin, scale=8.0, reduction="sum"
    )
    (expected,) = torch.autograd.grad(loss, embeddings)
    assert torch.allclose(per_sample, expected, atol=1e-6)


def test_scales_and_margins_with_torch_func():
    embeddings, weight, labels = batch(torch.float32)

    def of(scale, m):
        return margin_softmax_loss(
            embeddings.detach(),
            weight.detach(),
            labels.clamp(min=0),
            margin=lambda theta: arcface(theta, m),
            scale=scale,
        )

    scales, margins = torch.tensor([2.0, 8.0]), torch.tensor([0.1, 0.5])
    each = torch.stack([of(*both) for both in zip(scales, margins, strict=True)])
    assert torch.allclose(torch.func.vmap(of)(scales, margins), each)
    assert torch.allclose(torch.func.vmap(of, (None, 0))(8.0, margins)[1], each[1])


@pytest.mark.parametrize("call", ["negatives", "negative"])
def test_parameters_of_the_negatives_need_the_dense_mode(call):
    """The other modes find no gradient of them, and would leave them as they are."""
    embeddings, weight, labels = batch()
    factor = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def loss(factor, mode):
        if call == "negative":
            return one_vs_rest_loss(
                embeddings,
                weight,
                labels,
                positive=torch.square,
                negative=lambda cosine, bias: factor * cosine.square(),
                mode=mode,
            )
        return margin_softmax_loss(
            embeddings,
            weight,
            labels,
            margin=margin,
            scale=8.0,
            negatives=lambda cosine, target: factor * cosine,
            mode=mode,
        )

    assert torch.autograd.gradcheck(lambda factor: loss(factor, "dense"), (factor,))
    for mode in ("auto", "stash", "recompute"):
        with pytest.raises(ValueError, match=rf"{call}: expected it without .*mode='dense'"):
            loss(factor, mode)
        with torch.no_grad():
            assert torch.allclose(loss(factor, mode), loss(factor, "dense"))
        assert loss(factor.detach(), mode).requires_grad


def test_one_compiled_graph_with_the_same_values_and_gradients():
    embeddings, weight, labels = batch(torch.float32)

    def loss(embeddings, weight, labels):
        return margin_softmax_loss(
            embeddings,
            weight,
            labels,
            margin=lambda theta: sphereface(theta, 4),
            scale=30.0,
            label_smoothing=0.1,
        )

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (loss, compiled):
        value = function(embeddings, weight, labels)
        results.append((value, *torch.autograd.grad(value, (embeddings, weight))))
    for eager, traced in zip(*results, strict=True):
        assert torch.allclose(eager, traced, rtol=1e-5, atol=1e-7)
    with pytest.raises(RuntimeError, match="labels: expected values in"):
        compiled(embeddings, weight, labels + 5)


@needs_compiler
def test_a_small_loss_survives_compilation():
    """With the whole compiler, whose C++ may reorder sums, forward and backward."""
    embeddings, weight = torch.eye(2, requires_grad=True), torch.eye(2)

    def loss(embeddings):
        return margin_softmax_loss(
            embeddings, weight, torch.arange(2), margin=margin, scale=64.0, reduction="none"
        )

    compiled = torch.compile(loss, fullgraph=True)(embeddings)
    assert torch.allclose(compiled, torch.full((2,), math.exp(-64 * math.cos(0.5))), rtol=1e-5)
    eager, traced = (
        torch.autograd.grad(value.sum(), embeddings)[0] for value in (loss(embeddings), compiled)
    )
    assert eager.count_nonzero() > 0
    assert torch.allclose(eager, traced, rtol=1e-5, atol=0)


@given(
    st.sampled_from(MODES),
    st.integers(0, 2**31 - 1),
    st.sampled_from(CASES),
    st.floats(0.01, 1000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(-20, 20),
)
@settings(max_examples=200, deadline=None)
def test_no_nan_anywhere(mode, seed, case, scale, dtype, exponent):
    torch.manual_seed(seed)
    if dtype == torch.float16:  # in which larger gradients are infinite
        exponent, scale = max(-2, min(2, exponent)), min(scale, 64)
    embeddings = (torch.randn(4, 8) * 10.0**exponent).to(dtype)
    embeddings[0] = 0
    weight = torch.randn(3, 8).to(dtype)
    weight[1] = embeddings[1]
    weight[2] = -embeddings[2]
    embeddings.requires_grad_()
    weight.requires_grad_()
    with in_chunks_of(mode[1]):
        loss = margin_softmax_loss(
            embeddings,
            weight,
            torch.tensor([0, 1, 2, 1]),
            margin=case.margin,
            scale=scale,
            mode=mode[0],
        )
    loss.backward()
    assert loss.isfinite()
    assert loss >= 0
    assert embeddings.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert (embeddings.grad[0] == 0).all()


@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        *((torch.float32, length) for length in (1e-45, 1e-34, 1e-30, 1e-20, 1e20, 1e30, 1e37)),
        *((torch.float64, length) for length in (1e-320, 1e-200, 1e200, 1e300)),
        *((torch.bfloat16, length) for length in (1e-34, 1e-30, 1e30, 1e37)),
        *((torch.float16, length) for length in (6e-8, 1e-4, 3e-4, 6e4)),
    ],
)
@pytest.mark.parametrize("mode", ["stash", "recompute"])
def test_every_mode_takes_the_same_lengths_for_zero(mode, dtype, length):
    embeddings, weight, labels = batch(torch.float64)
    with torch.no_grad():
        for tensor in (embeddings, weight):
            tensor /= tensor.abs().amax(1, keepdim=True)
        embeddings[0] *= length
        weight[1] *= length
    results = []
    for used in ("dense", mode):
        tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in (embeddings, weight)]
        with in_chunks_of(2):
            loss = margin_softmax_loss(
                *tensors, labels, margin=margin, scale=8.0, mode=used, reduction="none"
            )
        results.append((loss, *torch.autograd.grad(loss.sum(), tensors)))
    tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
    for dense, chunked in zip(*results, strict=True):
        assert torch.equal(dense.isfinite(), chunked.isfinite())  # float16 may overflow
        dense, chunked = (value.nan_to_num().double() for value in (dense, chunked))
        largest = dense.abs().amax(-1, keepdim=True)
        assert ((dense - chunked).abs() <= tolerance * largest).all()


@given(st.integers(0, 2**31 - 1), st.sampled_from(CASES))
@settings(max_examples=50, deadline=None)
def test_symmetries(seed, case):
    torch.manual_seed(seed)
    embeddings, weight, labels = batch(seed=seed)

    def loss(embeddings, weight, labels):
        return margin_softmax_loss(
            embeddings, weight, labels, margin=case.margin, scale=16.0, reduction="sum"
        )

    plain = loss(embeddings, weight, labels)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    assert torch.allclose(loss(embeddings @ rotation, weight @ rotation, labels), plain)
    assert torch.allclose(loss(embeddings * 7, weight * 0.3, labels), plain)
    order = torch.randperm(5)
    renamed = torch.where(labels >= 0, torch.argsort(order)[labels.clamp(min=0)], labels)
    assert torch.allclose(loss(embeddings, weight[order], renamed), plain)
    halves = [loss(embeddings[part], weight, labels[part]) for part in (slice(3), slice(3, 6))]
    assert torch.allclose(sum(halves), plain)


@pytest.mark.parametrize("is_smoothed", [False, True])
def test_gradient_of_class_weights(is_smoothed):
    embeddings, weight, labels = batch()
    class_weight = torch.rand(5, dtype=torch.float64).requires_grad_()
    found = []
    for mode in ("dense", "stash", "recompute", "auto"):
        options = {"mode": mode, "label_smoothing": 0.1 * is_smoothed, "class_weight": class_weight}
        options |= {"margin": margin, "scale": 8.0}
        if is_smoothed and mode != "dense":
            with pytest.raises(ValueError, match=r"class_weight: .*pass mode='dense'"):
                margin_softmax_loss(embeddings, weight, labels, **options)
            with torch.no_grad():
                margin_softmax_loss(embeddings, weight, labels, **options)
        else:
            loss = margin_softmax_loss(embeddings, weight, labels, **options)
            found.append(torch.autograd.grad(loss, class_weight)[0])
    for gradient in found[1:]:
        assert torch.allclose(gradient, found[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"margin": 0.5}, TypeError, "margin: expected a function of the target angle"),
        ({"margin": lambda theta: 0.5}, TypeError, "margin: expected it to return a tensor"),
        ({"margin": lambda theta: theta.sum()}, ValueError, r"margin: .*shape \(6,\), got \(\)"),
        ({"scale": 0.0}, ValueError, "scale: expected a number above 0"),
        ({"scale": -1.0}, ValueError, "scale: "),
        ({"scale": math.inf}, ValueError, "scale: .*inf"),
        ({"scale": "64"}, TypeError, "scale: expected a number, got '64'"),
        ({"scale": torch.ones(5)}, ValueError, r"scale: expected shape \(6,\), got \(5,\)"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none'"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight: expected shape \(5,\)"),
        ({"class_weight": [1.0]}, TypeError, "class_weight: expected a floating-point tensor"),
        ({"sample_weight": torch.ones(5)}, ValueError, r"sample_weight: expected shape \(6,\)"),
        ({"mode": "fast"}, ValueError, "mode: expected one of 'auto', 'dense', 'stash', 'rec"),
        ({"memory_budget": 0}, ValueError, "memory_budget: expected at least 1, got 0"),
        ({"memory_budget": 100}, ValueError, "memory_budget: expected at least .*, got 100"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing: .*\[0, 1\)"),
        ({"ignore_index": -1}, ValueError, "labels: .* or ignore_index -1, got -100"),
        ({"weight": [[1.0]]}, TypeError, r"weight: expected a floating-point .* \[\[1.0\]\]"),
        ({"weight": torch.tensor(1.0)}, ValueError, r"weight: expected shape \(C, d\), got \(\)"),
        ({"sub_centers": 0}, ValueError, "sub_centers: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_named(change, error, message):
    given = dict(zip(("embeddings", "weight", "labels"), batch(), strict=True))
    with pytest.raises(error, match=message):
        margin_softmax_loss(**given | {"margin": margin, "scale": 8.0} | change)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_row_may_be_left_without_negatives(mode):
    embeddings, weight, labels = batch(torch.float64)

    def negatives(cosine, target):
        hidden = torch.zeros_like(cosine, dtype=torch.bool)
        hidden[:, 0] = True  # all of the first row's
        return torch.where(hidden, -torch.inf, cosine)

    with in_chunks_of(mode[1]):
        loss = margin_softmax_loss(
            *(embeddings, weight, labels),
            margin=lambda theta: arcface(theta, 0.5),
            scale=8.0,
            negatives=negatives,
            reduction="none",
            mode=mode[0],
        )
    others = margin_softmax_loss(
        *(embeddings[1:], weight, labels[1:]),
        margin=lambda theta: arcface(theta, 0.5),
        scale=8.0,
        reduction="none",
        mode="dense",
    )
    assert loss[0] == 0
    found = torch.autograd.grad(loss.sum(), (embeddings, weight))
    expected = torch.autograd.grad(others.sum(), (embeddings, weight))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def small_batch():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(8, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    return embeddings, weight, torch.arange(8) % 4


def of_exponential(cosine):
    value = torch.exp(cosine - 1)
    return value, value  # one tensor: the function is its own derivative


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
def test_value_and_slope_may_be_one_tensor(mode):
    embeddings, weight, labels = small_batch()
    negatives = KnownSlope(lambda cosine: torch.exp(cosine - 1), of_exponential)
    options = {"margin": Combined(m2=0.3), "scale": 8.0}
    found, expected = (
        margin_softmax_loss(embeddings, weight, labels, negatives=each, mode=each_mode, **options)
        for each, each_mode in (
            (negatives, mode),
            (lambda cosine, target: torch.exp(cosine - 1), "dense"),
        )
    )
    for one, other in zip(
        torch.autograd.grad(found, [embeddings, weight]),
        torch.autograd.grad(expected, [embeddings, weight]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sub_centers", [1, 2])
@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
def test_negatives_may_be_constant_in_steps(mode, sub_centers):
    embeddings, weight, labels = small_batch()
    loss = margin_softmax_loss(
        *(embeddings, weight, labels % (4 // sub_centers)),
        margin=Combined(m2=0.3),
        scale=8.0,
        negatives=lambda cosine, target: (cosine > target).to(cosine),
        sub_centers=sub_centers,
        mode=mode,
    )
    found = torch.autograd.grad(loss, [embeddings])[0]
    assert found.isfinite().all()
    assert found.any()


def test_given_derivatives_have_no_variables():
    embeddings, weight, labels = small_batch()
    factor = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    margin = KnownDescent(
        lambda theta: factor * theta.cos(), lambda theta: (factor * theta.cos(), theta.sin())
    )
    negatives = KnownSlope(
        lambda cosine: factor * cosine, lambda cosine: (factor * cosine, factor.expand_as(cosine))
    )
    for name, functions in (
        ("margin", {"margin": margin}),
        ("negatives", {"margin": torch.cos, "negatives": negatives}),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected no variables"):
            margin_softmax_loss(embeddings, weight, labels, scale=8.0, **functions)
        loss = margin_softmax_loss(embeddings, weight, labels, scale=8.0, mode="dense", **functions)
        assert torch.autograd.grad(loss, [factor])[0] != 0
    for options in (
        {"scale": torch.tensor(8.0)},
        {"scale": torch.full((8,), 8.0)},
        {"scale": 8.0, "normalize_weight": False},
    ):
        with pytest.raises(ValueError, match=r"^negatives: expected it without variables"):
            margin_softmax_loss(
                *(embeddings, weight, labels), margin=torch.cos, negatives=negatives, **options
            )


@pytest.mark.parametrize("mode", ["dense", "stash", "recompute"])
def test_the_bias_has_a_number_for_each_row(mode):
    embeddings, weight, labels = small_batch()
    bias = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    loss = one_vs_rest_loss(
        *(embeddings, weight, labels),
        positive=torch.zeros_like,
        negative=lambda cosine, bias: cosine * bias[None, :],
        bias=bias,
        mode=mode,
    )
    torch.testing.assert_close(torch.autograd.grad(loss, bias)[0] * bias, loss[None])


def test_functions_of_other_shapes_are_named():
    embeddings, weight, labels = small_batch()
    margin = KnownDescent(torch.cos, lambda theta: (theta.cos()[:, None], theta.sin()))
    with pytest.raises(ValueError, match=r"^margin: .* shape \(8,\), got \[\(8, 1\), \(8,\)\]"):
        margin_softmax_loss(embeddings, weight, labels, margin=margin, scale=8.0)
    margin = KnownDescent(torch.cos, lambda theta: None)
    with pytest.raises(ValueError, match=r"^margin: .* shape \(8,\), got None"):
        margin_softmax_loss(embeddings, weight, labels, margin=margin, scale=8.0)
    square = lambda cosine, bias: cosine**2  # noqa: E731
    for name, positive, negative in (
        ("positive", lambda theta: theta[:, None], square),
        ("positive", lambda theta: 3.0, square),
        ("negative", torch.cos, lambda cosine, bias: cosine.sum(0)),
        ("negative", torch.cos, lambda cosine, bias: 3.0),
        ("negative", torch.cos, lambda cosine, bias: cosine > bias),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected it to return"):
            one_vs_rest_loss(embeddings, weight, labels, positive=positive, negative=negative)


def test_forward_mode_does_not_see_what_is_constant():
    embeddings, weight, labels = small_batch()
    direction = torch.ones_like(embeddings)

    def loss(rows):
        return margin_softmax_loss(
            *(rows, weight.detach(), labels),
            margin=Combined(m2=0.3),
            scale=8.0,
            negatives=lambda cosine, target: torch.where(
                cosine > target, cosine + 0.3 * (cosine - target), cosine
            ),
        )

    _, found = torch.func.jvp(loss, (embeddings.detach(),), (direction,))
    expected = (torch.func.grad(loss)(embeddings.detach()) * direction).sum()
    torch.testing.assert_close(found, expected)


def test_embeddings_are_freed_by_the_backward_pass():
    _, weight, labels = small_batch()
    embeddings = torch.randn(8, 6, dtype=torch.float64, requires_grad=True).exp()
    held = weakref.ref(embeddings)
    loss = margin_softmax_loss(embeddings, weight, labels, margin=Combined(m2=0.3), scale=8.0)
    loss.backward()
    del embeddings
    assert held() is None


@pytest.mark.parametrize("num_rows", [2, 8])  # more than classes: both passes at once
def test_given_derivatives_of_another_dtype(num_rows):
    embeddings, weight, labels = (each[:num_rows] for each in small_batch())
    embeddings, weight = (each.detach().float().requires_grad_() for each in (embeddings, weight))
    negatives = KnownSlope(
        lambda cosine: cosine / 2, lambda cosine: (cosine.double() / 2, cosine.double() * 0 + 0.5)
    )
    gradients = [
        torch.autograd.grad(
            margin_softmax_loss(
                embeddings, weight, labels % len(weight), margin=torch.cos, scale=8.0, **options
            ),
            [embeddings, weight],
        )
        for options in (
            {"negatives": negatives},
            {"negatives": lambda cosine, target: cosine / 2, "mode": "dense"},
        )
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mode", ["stash", "recompute"])
def test_modes_inside_torch_func_are_named(mode):
    embeddings, weight, labels = small_batch()

    def loss(rows):
        return margin_softmax_loss(rows, weight, labels, margin=torch.cos, scale=8.0, mode=mode)

    with pytest.raises(ValueError, match=r"^mode: expected 'auto' or 'dense' inside torch\.func"):
        torch.func.grad(loss)(embeddings)

"""The chunked modes against the dense one, and what they promise: memory, products, operators."""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from angular_losses import ArcFaceLoss, arcface, margin_softmax_loss
from angular_losses.engine import modes, operators, passes
from angular_losses.engine.batch import checked
from angular_losses.engine.chunks import Inputs, Others, Settings
from angular_losses.engine.operators import margin_parts
from angular_losses.engine.placement import Placement
from tests.cases import in_chunks_of
from tests.profiling import matrix_products, peak_bytes

CHUNKED = ["stash", "recompute"]


def margin(theta):
    return arcface(theta, 0.5)


def batch(num_rows=6, num_classes=9, size=4, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    embeddings = torch.randn(num_rows, size, dtype=dtype, requires_grad=True)
    weight = torch.randn(num_classes, size, dtype=dtype, requires_grad=True)
    return embeddings, weight, torch.randint(num_classes, (num_rows,))


def results(embeddings, weight, labels, *, chunk=4, **options):
    with in_chunks_of(chunk):
        loss = margin_softmax_loss(embeddings, weight, labels, margin=margin, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (embeddings, weight))


@given(
    num_rows=st.integers(1, 9),
    num_classes=st.integers(1, 40),
    size=st.integers(1, 12),
    chunk=st.one_of(st.integers(1, 50), st.none()),
    mode=st.sampled_from(CHUNKED),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    scale=st.one_of(st.floats(0.1, 1000), st.just(None)),
    seed=st.integers(0, 2**31 - 1),
    options=st.fixed_dictionaries(
        {"reduction": st.sampled_from(["mean", "sum", "none"])},
        optional={
            "label_smoothing": st.floats(0.01, 0.9),
            "class_weight": st.just(True),
            "sample_weight": st.just(True),
        },
    ),
)
@settings(max_examples=400, deadline=None)
def test_modes_differ_by_rounding_alone(
    num_rows, num_classes, size, chunk, mode, dtype, scale, seed, options
):
    embeddings, weight, labels = batch(num_rows, num_classes, size, dtype, seed)
    shortest = torch.finfo(dtype).tiny ** (7 / 8)  # what is shorter counts as without a direction
    assume(all((x.double().norm(dim=1) > shortest).all() for x in (embeddings, weight)))
    labels[0] = -100 if seed % 3 == 0 else labels[0]
    scale = scale or torch.rand(num_rows, dtype=torch.float64) * 200 + 1
    for name, length in (("class_weight", num_classes), ("sample_weight", num_rows)):
        if name in options:
            options[name] = torch.rand(length) + 0.1
    exact = results(
        embeddings.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
        labels,
        scale=scale,
        mode="dense",
        **options,
    )
    ours = results(embeddings, weight, labels, scale=scale, mode=mode, chunk=chunk, **options)
    # The gradient of an angle goes with 1 / length, and a cosine's rounding with the scale: once in
    # the loss, once more in a gradient.
    largest = scale if isinstance(scale, float) else scale.max().item()
    rounding = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (1 + largest)
    lengths = (
        1,
        *(tensor.detach().double().norm(dim=1)[:, None] for tensor in (embeddings, weight)),
    )
    for name, computed, expected, length in zip("LXW", ours, exact, lengths, strict=True):
        error = (computed.double() - expected).abs() * length
        own = torch.finfo(computed.dtype).eps * expected.abs() * length
        least = 1e-6 if dtype == torch.float16 else 1e-30
        assert (error <= own + rounding * max(1, largest) * num_rows + least).all(), name


@pytest.mark.parametrize("scale", [64.0, 65.0, 300.0, 1000.0])
@pytest.mark.parametrize("mode", CHUNKED)
def test_every_negative_far_away_or_on_top(mode, scale):
    # Logits of -s and of s: a sum that underflows or overflows if it is not shifted as it should.
    for sign in (-1.0, 1.0):
        embeddings = torch.tensor([[1.0, 0.0]], requires_grad=True)
        weight = torch.tensor([[0.0, 1.0], [sign, 0.0], [sign, 1e-3]], requires_grad=True)
        labels = torch.tensor([0])
        options = {"scale": scale, "chunk": 1}
        ours = results(embeddings, weight, labels, mode=mode, **options)
        exact = results(
            *(t.detach().double().requires_grad_() for t in (embeddings, weight)),
            labels,
            mode="dense",
            **options,
        )
        for computed, expected in zip(ours, exact, strict=True):
            error = (computed.double() - expected).abs().max()
            assert error <= 1e-3 * expected.abs().max() + 1e-37


@pytest.mark.parametrize("mode", CHUNKED)
def test_second_derivatives_are_refused(mode):
    embeddings, weight, labels = batch()
    loss = margin_softmax_loss(embeddings, weight, labels, margin=margin, scale=8.0, mode=mode)
    (gradient,) = torch.autograd.grad(loss, embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="mode='dense'"):
        torch.autograd.grad(gradient.square().sum(), weight)


@pytest.mark.parametrize("mode", CHUNKED)
def test_gradients_accumulate_and_scale(mode):
    embeddings, weight, labels = batch()

    def loss():
        return margin_softmax_loss(embeddings, weight, labels, margin=margin, scale=8.0, mode=mode)

    once = torch.autograd.grad(loss(), weight)[0]
    for factor in (1.0, 1024.0):
        (factor * loss()).backward()
    assert torch.allclose(weight.grad, 1025 * once, rtol=1e-5)


@pytest.mark.parametrize("frozen", ["embeddings", "weight"])
@pytest.mark.parametrize("mode", CHUNKED)
def test_frozen_inputs(mode, frozen):
    embeddings, weight, labels = batch()
    _, *both = results(embeddings, weight, labels, scale=8.0, mode=mode)
    tensors = {"embeddings": embeddings, "weight": weight}
    tensors[frozen].requires_grad_(False)
    with in_chunks_of(4):
        loss = margin_softmax_loss(embeddings, weight, labels, margin=margin, scale=8.0, mode=mode)
    loss.backward()
    assert tensors[frozen].grad is None
    other = "weight" if frozen == "embeddings" else "embeddings"
    assert torch.equal(tensors[other].grad, both[other == "weight"])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", CHUNKED)
def test_any_strides(mode, compiled):
    plain = batch(6, 9, 4)
    transposed = [tensor.detach().T.contiguous().T.requires_grad_() for tensor in plain[:2]]
    assert not any(tensor.is_contiguous() for tensor in transposed)
    expected = results(*plain, scale=8.0, mode=mode)

    def loss(embeddings, weight):
        return margin_softmax_loss(
            embeddings, weight, plain[2], margin=margin, scale=8.0, mode=mode
        )

    if compiled:
        torch.compiler.reset()
        loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with in_chunks_of(4):
        value = loss(*transposed)
    found = (value.detach(), *torch.autograd.grad(value, transposed))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [30.0, 100.0])
@pytest.mark.parametrize("mode", CHUNKED)
def test_bit_identical_twice(mode, scale):
    embeddings, weight, labels = batch(64, 1001, 32)
    first, second = (
        results(embeddings, weight, labels, scale=scale, mode=mode, chunk=128) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", CHUNKED)
def test_failed_allocation_changes_no_gradient(mode):
    embeddings, _, labels = batch()
    loss = ArcFaceLoss(9, 4, mode=mode)
    with in_chunks_of(2):
        loss(embeddings, labels).backward()
    before = [embeddings.grad.clone(), loss.weight.grad.clone()]
    multiply, calls = passes.multiply, []

    def fails_half_way(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no more")
        return multiply(*arguments, **options)

    with in_chunks_of(2):
        second = loss(embeddings, labels)
    with (
        mock.patch.object(passes, "multiply", fails_half_way),
        pytest.raises(torch.OutOfMemoryError),
    ):
        second.backward()
    assert len(calls) == 3
    assert torch.equal(embeddings.grad, before[0])
    assert torch.equal(loss.weight.grad, before[1])


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}])
@pytest.mark.parametrize("scale", [30.0, 300.0, "by row"])
@pytest.mark.parametrize("mode", ["auto", *CHUNKED])
def test_nothing_is_read_back_from_the_device(mode, scale, options, monkeypatch):
    # The meta device has no values: whatever reads one, as a synchronisation does, fails there.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)
    embeddings = torch.empty(6, 4, device="meta", requires_grad=True)
    weight = torch.empty(9, 4, device="meta", requires_grad=True)
    labels = torch.empty(6, dtype=torch.int64, device="meta")
    scale = torch.empty(6, device="meta") if scale == "by row" else scale
    with in_chunks_of(4):
        loss = margin_softmax_loss(
            embeddings, weight, labels, margin=margin, scale=scale, mode=mode, **options
        )
        loss.sum().backward()
    assert embeddings.grad.shape == embeddings.shape
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize(
    ("mode", "products"), [("stash", 3), ("recompute", 4)], ids=["stash", "recompute"]
)
def test_number_of_products(mode, products):
    embeddings, weight, labels = batch(16, 64, 8)

    def step():
        with in_chunks_of(16):
            loss = margin_softmax_loss(
                embeddings, weight, labels, margin=margin, scale=8.0, mode=mode
            )
        if loss.requires_grad:
            loss.backward()

    assert matrix_products(step) == 4 * products
    weight.requires_grad_(False)
    assert matrix_products(step) == 4 * 2
    with torch.no_grad():
        assert matrix_products(step) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", CHUNKED)
def test_memory_of_a_step(mode, dtype, monkeypatch):
    monkeypatch.setattr(modes, "_multiplies_bfloat16", lambda device: True)
    num_rows, num_classes, size = 128, 20_000, 32
    embeddings, weight, labels = batch(num_rows, num_classes, size)

    def step():
        with in_chunks_of(512), torch.autocast("cpu", dtype, dtype != torch.float32):
            loss = margin_softmax_loss(
                embeddings, weight, labels, margin=margin, scale=8.0, mode=mode
            )
        loss.backward()

    gradient, kept = num_classes * size * 4, num_rows * num_classes * dtype.itemsize
    expected = gradient + (kept if mode == "stash" else 0)
    workspace = 2**20  # of a chunk of 512
    assert expected <= peak_bytes(step) <= 1.05 * expected + workspace


def test_an_evaluation_keeps_nothing():
    embeddings, weight, labels = batch(128, 20_000, 32)

    def step():
        with in_chunks_of(512):
            margin_softmax_loss(embeddings, weight, labels, margin=margin, scale=8.0, mode="stash")

    workspace = 2**20
    assert peak_bytes(step) >= 128 * 20_000 * 4
    with torch.no_grad():
        assert peak_bytes(step) <= workspace


def tensors_of_operator(
    dtype=torch.float32, scale=30.0, by_row=False, shares=True, transposed=False
):
    embeddings, weight, labels = batch(dtype=dtype)
    if transposed:
        embeddings, weight = (
            tensor.detach().T.contiguous().T.requires_grad_() for tensor in (embeddings, weight)
        )
    row_scale = torch.rand(6, dtype=dtype).add(1).requires_grad_() if by_row else None
    class_share = torch.rand(9, dtype=dtype) if shares else None
    return embeddings, weight, labels, row_scale, class_share, scale, 4, dtype


# torch 2.15's own check looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("stash", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        tensors_of_operator(),
        tensors_of_operator(torch.float64, 100.0, shares=False),
        tensors_of_operator(by_row=True),
        tensors_of_operator(transposed=True),
    ],
)
def test_operators_are_well_formed(arguments, stash):
    torch.library.opcheck(operators._forward_operator, (*arguments, stash, True, False))
    evaluation = (*arguments, False, False, False)
    torch.library.opcheck(operators._forward_operator, evaluation, test_utils="test_faketensor")
    outputs = operators._forward_operator(*arguments, stash, True, False)
    detached = [tensor.detach() for tensor in outputs]
    gradients = [torch.randn_like(part) for part in detached[:3]]
    needed = [True, True, arguments[3] is not None]
    backward = (
        *(*gradients, *arguments[:5], *detached[3:], *arguments[5:]),
        *(stash, True, False, needed),
    )
    torch.library.opcheck(
        operators._backward_operator,
        backward,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize(("mode", "dynamic"), [("auto", True), ("recompute", False)])
def test_one_compiled_graph_for_every_mode(mode, dynamic):
    def loss(embeddings, weight, labels, scale):
        return margin_softmax_loss(
            embeddings, weight, labels, margin=margin, scale=scale, mode=mode, label_smoothing=0.1
        )

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_rows in (6, 7):
        embeddings, weight, labels = batch(num_rows)
        with in_chunks_of(4):
            for scale in (30.0, torch.rand(num_rows) * 100):
                eager, traced = (
                    (value.detach(), *torch.autograd.grad(value, (embeddings, weight)))
                    for value in (f(embeddings, weight, labels, scale) for f in (loss, compiled))
                )
                for one, other in zip(eager, traced, strict=True):
                    assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_compiled_second_derivatives_are_refused():
    embeddings, weight, labels = batch()
    parts = operators._forward_operator(
        embeddings, weight, labels, None, None, 8.0, 4, torch.float32, True, True, False
    )
    (gradient,) = torch.autograd.grad(parts[1].sum(), embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="mode='dense'"):
        gradient.sum().backward()


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", CHUNKED)
def test_autocast_products_are_bfloat16(mode, autocast, monkeypatch):
    monkeypatch.setattr(modes, "_multiplies_bfloat16", lambda device: True)
    embeddings, weight, labels = batch(32, 5000, 64)
    exact = results(embeddings, weight, labels, scale=30.0, mode=mode, chunk=512)
    with torch.autocast("cpu", dtype=autocast):
        found = results(embeddings, weight, labels, scale=30.0, mode=mode, chunk=512)
    for computed, expected in zip(found, exact, strict=True):
        assert computed.dtype == torch.float32
        error = (computed - expected).norm() / expected.norm()
        assert 1e-6 < error < 1e-2  # bfloat16 was used, and no worse than its 2^-8


def test_processes_with_fewer_classes_plan_like_those_with_the_most(monkeypatch):
    monkeypatch.setattr(modes, "_multiplies_bfloat16", lambda device: True)

    class Shared(Placement):
        def most_centres(self, weight, sub_centers):
            return modes.FEW_CLASSES + 1

    plans = []
    for num_classes in (modes.FEW_CLASSES, modes.FEW_CLASSES + 1):
        shared = checked(*batch(8, num_classes, 4), shard=Shared())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plans.append(modes.choose(shared, "recompute", None))
    assert plans[0] == plans[1]


@pytest.mark.parametrize("mode", CHUNKED)
def test_autocast_leaves_few_classes_and_float64_alone(mode):
    for embeddings, weight, labels in (batch(8, 100, 16), batch(8, 5000, 4, torch.float64)):
        plain = results(embeddings, weight, labels, scale=30.0, mode=mode, chunk=64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = results(embeddings, weight, labels, scale=30.0, mode=mode, chunk=64)
        for one, other in zip(plain, under, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("stash", [True, False])
def test_backward_under_autocast_keeps_its_precision(stash):
    embeddings, weight, labels = batch(8, 12, 16)
    inputs = Inputs(embeddings, weight, labels, class_share=torch.ones(12))
    gradients = []
    for enabled in (False, True):
        parts = margin_parts(inputs, Settings(9.0, 5, torch.float32, stash, True), Others())
        total = sum(part.sum() for part in parts)
        with torch.autocast("cpu", torch.bfloat16, enabled):
            gradients.append(torch.autograd.grad(total, (embeddings, weight)))
    for plain, under in zip(*gradients, strict=True):
        assert torch.equal(plain, under)


def test_auto_is_dense_inside_a_transform():
    embeddings, _, labels = batch()
    loss = ArcFaceLoss(9, 4, mode="auto", scale=8.0)

    def of_one(embedding, label):
        return loss(embedding[None], label[None])

    rows = torch.func.vmap(torch.func.grad(of_one))(embeddings.detach(), labels)
    total = sum(loss(row[None], label[None]) for row, label in zip(embeddings, labels, strict=True))
    (expected,) = torch.autograd.grad(total, embeddings)
    assert torch.allclose(rows, expected, atol=1e-6)

import math

import pytest
import torch
from hypothesis import given, settings

from angular_losses import angle_between, target_angle
from angular_losses.engine.chunks import Inputs, Others, Settings
from angular_losses.engine.operators import margin_parts
from angular_losses.engine.passes import whole_step
from angular_losses.geometry import cosines, directions, nearest_sub_centers, pairs
from tests import reference, strategies
from tests.strategies import ANGLES, pair_at


def angle_of_engine(embeddings, weight, labels):
    """The angle as the chunked modes find it, with a gradient of its own."""
    inputs = Inputs(embeddings, weight, labels)
    return margin_parts(inputs, Settings(8.0, 1, torch.float32, True, True), Others()).theta


def step_of_angle(*inputs):
    """A step over few classes, of which the loss is the target's angle, and its gradients."""

    def itself(theta, negatives):
        return theta, torch.ones_like(theta), torch.zeros_like(theta)

    return whole_step(Inputs(*inputs), 8.0, Others(), itself)


class WholeStep(torch.autograd.Function):
    """The angle as a step over few classes finds it."""

    @staticmethod
    def forward(ctx, embeddings, weight, labels):
        others = torch.ones(1, weight.shape[1]).to(weight)
        theta, of_embeddings, of_weight = step_of_angle(
            embeddings, torch.cat([weight, others]), labels
        )
        ctx.save_for_backward(of_embeddings, of_weight[:-1])
        return theta

    @staticmethod
    def backward(ctx, grad):
        of_embeddings, of_weight = ctx.saved_tensors
        return grad[:, None] * of_embeddings, grad.sum() * of_weight, None


EVERY_WAY = pytest.mark.parametrize("angle_of", [target_angle, angle_of_engine, WholeStep.apply])


def angle_and_gradients(first, second, angle_of=target_angle):
    first, second = (vector.clone().requires_grad_() for vector in (first, second))
    theta = angle_of(first[None], second[None], torch.tensor([0]))[0]
    theta.backward()
    return theta, first.grad, second.grad


@EVERY_WAY
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("dimensions", [2, 128, 512])
@pytest.mark.parametrize("theta", ANGLES)
def test_angle_and_gradient_against_50_digits(theta, dimensions, aligned, angle_of):
    first, second = pair_at(theta, dimensions, seed=7, aligned=aligned)
    computed, *gradients = angle_and_gradients(first, second, angle_of)
    exact = reference.exact(first), reference.exact(second)
    expected = reference.angle(*exact)
    assert computed.dtype == torch.float64
    assert abs(float(reference.mp.mpf(computed.item()) - expected)) <= 1e-15
    for gradient, pair in zip(gradients, (exact, exact[::-1]), strict=True):
        assert reference.relative_error(gradient, reference.tangent(*pair)) <= 1e-6


@EVERY_WAY
@pytest.mark.parametrize("ratio", [3.0, -3.0, 11.0, -11.0])
def test_parallel_vectors_have_no_gradient_though_their_directions_round_apart(ratio, angle_of):
    first = torch.arange(1.0, 32.0)  # 1 to 7 would round alike
    theta, *gradients = angle_and_gradients(first, first * ratio, angle_of)
    assert theta.item() == pytest.approx(0.0 if ratio > 0 else math.pi, rel=0, abs=1e-300)
    rounding = 0 if angle_of is target_angle else 1e-17  # sin(pi) is 1e-16, and the length over 100
    for gradient in gradients:
        assert gradient.abs().max() <= rounding


def test_derivatives_at_exactly_0_and_pi_are_zero():
    first = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64, requires_grad=True)
    for second in (first.detach() * 2, first.detach() * -2):
        hessian = torch.autograd.functional.hessian(
            lambda x, second=second: angle_between(x, second).sum(), first
        )
        assert hessian.abs().max() == 0


@pytest.mark.parametrize("theta", [1e-6, 1e-3, 1.0, math.pi - 1e-3, math.pi - 1e-6])
def test_second_derivative_against_its_closed_form(theta):
    # On the unit sphere: cot(theta) (I - u u' - t t'), plus the change of the direction's length.
    u = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    v = torch.tensor([math.cos(theta), math.sin(theta), 0.0], dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda x: angle_between(x, v), u)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[2, 2] = 1 / math.tan(theta)
    expected[0, 1] = expected[1, 0] = 1.0
    # The angle's own rounding, 1e-16, is 1e-10 of theta at 1e-6, and the curvature 1 / theta.
    assert torch.allclose(hessian, expected, rtol=1e-9, atol=1e-9)


@EVERY_WAY
@given(strategies.angles, strategies.exponents, strategies.exponents, strategies.seeds)
@settings(max_examples=100, deadline=None)
def test_lengths_do_not_matter(angle_of, theta, first_exponent, second_exponent, seed):
    first, second = pair_at(theta, 8, seed=seed)
    plain, *_ = angle_and_gradients(first, second, angle_of)
    # Powers of two change no digit, so the angle must not change either.
    scaled = (first * 2.0 ** (3 * first_exponent), second * 2.0 ** (3 * second_exponent))
    theta, first_gradient, second_gradient = angle_and_gradients(*scaled, angle_of)
    assert theta == plain
    assert first_gradient.isfinite().all()
    assert second_gradient.isfinite().all()


@pytest.mark.parametrize("length", [1e-30, 1e-10, 1e10, 1e30])
def test_any_finite_length_in_float32(length):
    first, second = pair_at(0.7, 64, seed=3)
    first = first / first.norm() * length
    theta, gradient, _ = angle_and_gradients(first, second)
    exact = reference.exact(first), reference.exact(second)
    assert abs(theta.item() - float(reference.angle(*exact))) <= 1e-15
    assert reference.relative_error(gradient, reference.tangent(*exact)) <= 1e-6
    assert torch.allclose(directions(first).norm(), torch.tensor(1.0))


@pytest.mark.parametrize("zero", ["first", "second", "both"])
def test_a_zero_vector_is_at_a_right_angle_and_has_no_gradient(zero):
    first, second = torch.ones(4), torch.arange(4.0)
    if zero in ("first", "both"):
        first = torch.zeros(4)
    if zero in ("second", "both"):
        second = torch.zeros(4)
    theta, first_gradient, second_gradient = angle_and_gradients(first, second)
    assert theta.item() == math.pi / 2
    assert first_gradient.abs().max() == 0
    assert second_gradient.abs().max() == 0


def test_a_zero_vector_has_no_direction_in_a_narrower_dtype_either():
    assert directions(torch.zeros(2, 4, dtype=torch.float64), torch.float32).abs().max() == 0


def test_second_derivative_of_a_zero_vector_is_zero():
    for first, second in ((torch.zeros(3), torch.ones(3)), (torch.zeros(3), torch.zeros(3))):
        first, second = first.double(), second.double()
        hessian = torch.autograd.functional.hessian(
            lambda x, second=second: angle_between(x, second), first
        )
        assert hessian.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_subnormal_vectors_leave_finite_gradients(dtype):
    first = torch.full((4,), torch.finfo(dtype).smallest_normal / 4, dtype=dtype)
    theta, gradient, _ = angle_and_gradients(first, torch.tensor([1.0, 0, 0, 0], dtype=dtype))
    assert theta.item() == math.pi / 2
    assert gradient.abs().max() == 0


def test_gradcheck_to_second_order():
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(angle_between, (first, second), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(angle_between, (first, second))


def test_cosines_promote_and_match_float64():
    torch.manual_seed(0)
    embeddings, weight = torch.randn(20, 64), torch.randn(30, 64)
    expected = torch.cosine_similarity(embeddings.double()[:, None], weight.double()[None], dim=-1)
    assert cosines(embeddings.bfloat16(), weight.half()).dtype == torch.float32
    assert cosines(embeddings.double(), weight).dtype == torch.float64
    assert (cosines(embeddings, weight) - expected).abs().max() < 3e-7


def test_float32_fallback_of_devices_without_float64(monkeypatch):
    monkeypatch.setattr("angular_losses.geometry.precise_dtype", lambda device: torch.float32)
    for theta in (1e-4, 1e-2, 1.0, 3.0):
        first, second = pair_at(theta, 16, seed=1)
        computed, gradient, _ = angle_and_gradients(first, second)
        exact = reference.exact(first), reference.exact(second)
        assert computed.dtype == torch.float32
        assert abs(computed.item() - float(reference.angle(*exact))) <= 5e-7
        assert reference.relative_error(gradient, reference.tangent(*exact)) <= 1e-6 + 1e-6 / theta


@pytest.mark.parametrize(("number", "error"), [(0, ValueError), (0.5, TypeError)])
def test_bad_numbers_of_sub_centres_are_named(number, error):
    with pytest.raises(error, match="sub_centers: expected"):
        target_angle(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), number)


@pytest.mark.parametrize(
    ("embeddings", "weight", "labels", "error", "message"),
    [
        (
            [[1.0]],
            torch.ones(2, 1),
            torch.tensor([0]),
            TypeError,
            "embeddings: expected a floating",
        ),
        (torch.ones(2, 3, 1), torch.ones(2, 3), torch.zeros(2).long(), ValueError, r"\(N, d\)"),
        (
            torch.ones(2, 3),
            torch.ones(4, 2),
            torch.zeros(2).long(),
            ValueError,
            r"embeddings: .*\(N, 2\)",
        ),
        (
            torch.ones(2, 3),
            torch.ones(0, 3),
            torch.zeros(2).long(),
            ValueError,
            "weight: .*one class",
        ),
        (
            torch.ones(2, 3),
            torch.ones(4, 3),
            torch.zeros(2),
            TypeError,
            "labels: expected an integer",
        ),
        (
            torch.ones(2, 3),
            torch.ones(4, 3),
            torch.zeros(3).long(),
            ValueError,
            r"labels: .*\(2,\)",
        ),
        (torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 4]), ValueError, r"labels: .*got 4"),
        (
            torch.ones(2, 3),
            torch.ones(4, 3),
            torch.tensor([0, -1]),
            ValueError,
            r"labels: .*got -1",
        ),
        (
            torch.ones(2, 3),
            torch.ones(4, 3, device="meta"),
            torch.tensor([0, 1]),
            ValueError,
            "weight: expected device cpu",
        ),
    ],
)
def test_bad_input_names_the_argument(embeddings, weight, labels, error, message):
    with pytest.raises(error, match=message):
        target_angle(embeddings, weight, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_labels(dtype):
    embeddings = torch.eye(3)
    assert target_angle(embeddings, embeddings, torch.arange(3, dtype=dtype)).abs().max() == 0


@pytest.mark.parametrize("seed", range(8))
def test_many_dimensions_leave_opposite_vectors_opposite(seed):
    torch.manual_seed(seed)
    weight, labels = torch.randn(3, 2048), torch.arange(64) % 3
    theta, of_embeddings, _ = step_of_angle(-weight[labels], weight, labels)
    # As far as one rounding of the product allows, which depends on the processor.
    is_opposite = ~pairs(-weight[labels], weight, labels).tangent.any(1)
    assert is_opposite.any()
    assert torch.allclose(theta, torch.full_like(theta, math.pi), rtol=1e-14)
    assert of_embeddings[is_opposite].abs().max() < 1e-30


@pytest.mark.parametrize("length", [1.0, 1e306, 1e-250])
@pytest.mark.parametrize("sizes", [(5, 3, 7), (64, 40, 256)])  # the latter's products are many
def test_nearest_sub_centers(sizes, length):
    num_rows, num_classes, size = sizes
    generator = torch.Generator().manual_seed(0)
    embeddings, weight = (
        torch.randn(rows, size, dtype=torch.float64, generator=generator)
        for rows in (num_rows, 3 * num_classes)
    )
    labels = torch.arange(num_rows) % num_classes
    cosine = cosines(embeddings, weight).view(num_rows, num_classes, 3)
    expected = 3 * labels + cosine[range(num_rows), labels].argmax(1)
    labels[1] = expected[1] = -1
    for dtype in (torch.float32, torch.float64) if length == 1 else (torch.float64,):
        found = nearest_sub_centers((length * embeddings).to(dtype), weight.to(dtype), labels, 3)
        assert torch.equal(found, expected)

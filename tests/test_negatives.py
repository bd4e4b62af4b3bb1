import pytest
import torch

from angular_losses.negatives import (
    LINEAR_ANGLE,
    circle,
    circle_with_slope,
    divided_angle,
    divided_angle_with_slope,
    linear_angle,
)

KNOWN = {
    "linear": (linear_angle, LINEAR_ANGLE.with_slope),
    "circle": (lambda c: circle(c, 0.25), lambda c: circle_with_slope(c, 0.25)),
    "divided": (lambda c: divided_angle(c, 1.5), lambda c: divided_angle_with_slope(c, 1.5)),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_known_slope_is_that_of_autograd(dtype, name):
    function, with_slope = KNOWN[name]
    eps = torch.finfo(dtype).eps
    ends = [1.0, 1 + 2 * eps, 1 - eps, 1 - 4 * eps, 1 - 8 * eps, 0.999]
    cosine = torch.tensor([[-each for each in ends], ends, [0.0, 0.1, -0.1, 0.6, 1e-30, -0.9]])
    cosine = cosine.to(dtype).requires_grad_()
    value = function(cosine)
    (expected,) = torch.autograd.grad(value.sum(), cosine)
    found, slope = with_slope(cosine.detach())
    assert torch.allclose(found, value, rtol=4 * eps, atol=2 * eps)
    assert torch.allclose(slope, expected, rtol=64 * eps, atol=0)  # of 1 - c^2, near 1
    assert found.abs().max() <= 1

"""The harness itself must be able to fail: a wrong margin, a wrong angle, a wrong gradient."""

import math

import mpmath as mp
import pytest
import torch

from tests import reference
from tests.strategies import pair_at


def test_known_angles():
    assert float(reference.angle([mp.mpf(1), mp.mpf(0)], [mp.mpf(0), mp.mpf(2)])) == math.pi / 2
    first, second = [mp.mpf(1), mp.mpf(0)], [mp.mpf(1), mp.mpf("1e-8")]
    assert abs(reference.angle(first, second) - mp.atan(mp.mpf("1e-8"))) < mp.mpf(10) ** -30


def test_known_psi():
    # Values of psi at the ends of its intervals, from the paper's figure: 1 - 2k at k pi / m.
    for m in (2, 4, 5):
        for k in range(m + 1):
            assert abs(reference.sphereface(k * mp.pi / m, m) - (1 - 2 * k)) < mp.mpf(10) ** -40


def test_margins_agree_where_they_are_the_same_function():
    for theta in (mp.mpf("0.3"), mp.mpf(2), mp.mpf(3)):
        assert mp.almosteq(reference.combined(theta, 4, 0, 0), reference.sphereface(theta, 4))
        assert mp.almosteq(reference.combined(theta, 1, 0.5, 0), reference.arcface(theta, 0.5))


@pytest.mark.parametrize("theta", [1e-3, 1.0, 3.0])
def test_a_gradient_that_is_off_by_a_millionth_is_seen(theta):
    first, second = map(reference.exact, pair_at(theta, 16, seed=0, dtype=torch.float64))
    gradient = reference.tangent(first, second)
    wrong = [value * (1 + mp.mpf("2e-6")) for value in gradient]
    assert reference.relative_error(wrong, gradient) > 1e-6

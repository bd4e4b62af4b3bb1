import functools
import itertools
import math

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import angular_losses as al
from angular_losses import angle_between, arcface, combined, cosface, detached, sphereface
from angular_losses.margins import ARCFACE_BEYOND, Combined, has_descent
from tests import reference, strategies
from tests.cases import CASES, NAMES
from tests.strategies import ANGLES, kinks, pair_at

GRID = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
# What a returned gradient may lose: the rounding of each component to the dtype.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def logit_and_gradients(margin, first, second):
    first, second = (vector.clone().requires_grad_() for vector in (first, second))
    logit = margin(angle_between(first, second))
    logit.backward()
    return logit.float(), first.grad, second.grad


def every_angle(case):
    return ANGLES + kinks(case.kinked_at)


@pytest.mark.parametrize("dimensions", [2, 512])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_float32_logit_and_gradients_against_50_digits(case, dimensions):
    for index, theta in enumerate(every_angle(case)):
        for aligned in (False, True):
            check_against_reference(case, theta, dimensions, index, torch.float32, aligned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_half_precision_input_is_as_exact_as_its_rounding(case, dtype):
    for index, theta in enumerate(every_angle(case)):
        check_against_reference(case, theta, 128, index, dtype)


@functools.cache  # most angles are those of every case, and 50 digits take long
def pair_and_reference(theta, dimensions, seed, dtype, aligned):
    """A pair about `theta` apart; its angle in 50 digits, and that angle's gradients by each."""
    pair = pair_at(theta, dimensions, seed=seed, dtype=dtype, aligned=aligned)
    exact = [reference.exact(vector) for vector in pair]
    tangents = reference.tangent(*exact), reference.tangent(*exact[::-1])
    return pair, reference.angle(*exact), tangents


def check_against_reference(case, theta, dimensions, seed, dtype, aligned=False):
    pair, theta, tangents = pair_and_reference(theta, dimensions, seed, dtype, aligned)
    logit, *gradients = logit_and_gradients(case.margin, *pair)
    expected = case.expected(theta)
    assert abs(logit.item() - float(expected)) <= 2e-7 * max(1, abs(float(expected)))
    slope = reference.derivative(case.expected, theta)
    for gradient, tangent in zip(gradients, tangents, strict=True):
        assert gradient.isfinite().all()
        expected_gradient = [slope * value for value in tangent]
        size = float(reference.norm(expected_gradient))
        # float16 keeps no digit below its smallest subnormal number, 2 ** -24.
        underflow = 2**-25 * math.sqrt(dimensions) if dtype == torch.float16 else 0
        error = reference.relative_error(gradient, expected_gradient) * (size or 1)
        if theta >= 1e-6:
            # Exactly at k pi / m the true gradient is 0; 1e-13 is the rounding of theta
            assert error <= ROUNDING[dtype] * size + underflow + 1e-13
            assert size < 1e-7 or gradient.abs().max() > 0, "a dead gradient"


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_continuous_and_decreasing_on_the_whole_half_circle(case):
    values = case.margin(GRID)
    steps = values.diff()
    assert (steps <= 0).all()
    # No jump: |d psi / d theta| <= m, and a step of the grid is pi / 20000.
    assert steps.abs().max() <= 7 * math.pi / 20000


@given(st.floats(1, 12), st.floats(0, 3), st.floats(0, 1.9), strategies.angles, strategies.angles)
@settings(max_examples=200, deadline=None)
def test_any_combination_decreases(m1, m2, m3, first, second):
    low, high = sorted((first, second))
    values = combined(torch.tensor([low, high], dtype=torch.float64), m1, m2, m3)
    assert values.isfinite().all()
    assert values[1] <= values[0] + 1e-12


@pytest.mark.parametrize("m", [1, 1.35, 2, 4, 7])
def test_psi_ends_at_the_papers_values(m):
    ends = sphereface(torch.tensor([0.0, math.pi], dtype=torch.float64), m)
    k = math.ceil(m) - 1
    assert ends[0] == 1
    assert ends[1].item() == pytest.approx((-1) ** k * math.cos(m * math.pi) - 2 * k, abs=1e-12)


def test_the_combined_margin_holds_the_others():
    assert torch.equal(combined(GRID, 3.0, 0.0, 0.0), sphereface(GRID, 3.0))
    assert torch.equal(combined(GRID, 1.0, 0.5, 0.0), arcface(GRID, 0.5))
    assert torch.allclose(combined(GRID, 1.0, 0.0, 0.35), cosface(GRID, 0.35), atol=1e-15)


@pytest.mark.parametrize(
    ("beyond", "jump", "rises"),
    [
        # As measured on the peers' code at m = 0.5: the jump at pi - m, and whether psi rises.
        ("decreasing", 0.0, False),
        ("plain", 0.0, True),
        ("linear", -0.117, False),
        ("shifted", 0.0, False),
        ("clamped", 0.0, False),
        ("cosine", 0.122, True),
    ],
)
def test_the_peers_variants_behave_as_theirs_do(beyond, jump, rises):
    edge = math.pi - 0.5
    around = torch.tensor([edge - 1e-9, edge + 1e-9], dtype=torch.float64)
    assert arcface(around, 0.5, beyond=beyond).diff().item() == pytest.approx(jump, abs=1e-3)
    assert (arcface(GRID, 0.5, beyond=beyond).diff() > 1e-12).any().item() == rises
    before = GRID[edge > GRID]
    assert torch.equal(arcface(before, 0.5, beyond=beyond), torch.cos(before + 0.5))


def test_values_of_the_variants_past_the_edge():
    theta, m = torch.tensor([3.0], dtype=torch.float64), 0.5
    expected = {
        "decreasing": -2 - math.cos(3.5),
        "plain": math.cos(3.5),
        "linear": math.cos(3.0) - 0.5 * math.sin(0.5),
        "shifted": math.cos(3.0) - (1 - math.cos(0.5)),
        "clamped": -1.0,
        "cosine": math.cos(3.0),
        "easy": math.cos(3.0),
    }
    assert set(expected) == set(ARCFACE_BEYOND)
    for beyond, value in expected.items():
        assert arcface(theta, m, beyond=beyond).item() == pytest.approx(value, abs=1e-14)
        per_sample = arcface(theta, torch.tensor([m], dtype=torch.float64), beyond=beyond)
        assert per_sample.item() == pytest.approx(value, abs=1e-14)


def test_easy_margin_stops_at_a_right_angle():
    theta = torch.tensor([1.5, 1.6])
    assert torch.allclose(
        arcface(theta, 0.5, beyond="easy"), torch.tensor([math.cos(2.0), math.cos(1.6)])
    )


def test_plain_sphereface_and_combined_are_bare_cosines():
    assert torch.equal(sphereface(GRID, 1.35, beyond="plain"), torch.cos(1.35 * GRID))
    assert torch.equal(
        combined(GRID, 1.35, 0.2, 0.1, beyond="plain"), torch.cos(1.35 * GRID + 0.2) - 0.1
    )


def test_a_margin_of_its_own_for_each_sample():
    theta = torch.tensor([0.3, 1.0, 2.9], dtype=torch.float64)
    m = torch.tensor([1.0, 2.5, 4.0], dtype=torch.float64)
    for function in (sphereface, cosface, arcface):
        margin = m if function is sphereface else m / 4
        expected = [function(t, value.item()) for t, value in zip(theta, margin, strict=True)]
        assert torch.allclose(function(theta, margin), torch.stack(expected), atol=1e-15)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_detached_keeps_the_value_and_takes_the_gradient_of_the_cosine(case):
    theta = torch.tensor([0.2, 1.1, 2.8], dtype=torch.float64, requires_grad=True)
    value = detached(case.margin)(theta)
    assert torch.allclose(value, case.margin(theta), atol=1e-15)
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    assert torch.allclose(gradient, -torch.sin(theta))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_gradcheck_to_second_order(case):
    theta = torch.tensor([0.1, 0.7, 1.3, 2.0, 2.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(case.margin, theta, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(case.margin, theta)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda t: sphereface(t, 0.9), ValueError, r"m: expected a number in \[1, inf\), got 0.9"),
        (lambda t: sphereface(t, math.nan), ValueError, "m: .*nan"),
        (lambda t: sphereface(t, math.inf), ValueError, "m: .*inf"),
        (lambda t: sphereface(t, "4"), TypeError, "m: expected a number, got '4' of type str"),
        (lambda t: sphereface(t, True), TypeError, "m: expected a number, got True"),
        (lambda t: sphereface(t, 4, beyond="up"), ValueError, "beyond: .*'plain', got 'up'"),
        (lambda t: cosface(t, -0.1), ValueError, r"m: .*\[0, 2\), got -0.1"),
        (
            lambda t: arcface(t, 28.6),
            ValueError,
            "m: .*radians, got 28.6; degrees .*0.4992 radians",
        ),
        (lambda t: arcface(t, 0.5, beyond="x"), ValueError, "beyond: .*'easy', got 'x'"),
        (lambda t: combined(t, 0.0, 0.1, 0.1), ValueError, "m1: expected a number above 0"),
        (lambda t: combined(t, 1.0, 4.0, 0.1), ValueError, "m2: .*radians"),
        (lambda t: combined(t, 1.0, 0.5, 2.0), ValueError, "m3: "),
    ],
)
def test_bad_margins_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(1))


def reference_target(beyond, theta, m1, m2, m3):
    """The table of the module's docstring, and its derivative by theta, to 50 digits."""
    phi, m = m1 * theta + m2, m2
    k = mp.floor(phi / mp.pi)
    past = {
        "decreasing": (lambda: (-1) ** k * mp.cos(phi) - 2 * k, lambda: -((-1) ** k) * mp.sin(phi)),
        "plain": (lambda: mp.cos(phi), lambda: -mp.sin(phi)),
        "linear": (lambda: mp.cos(theta) - m * mp.sin(m), lambda: -mp.sin(theta)),
        "shifted": (lambda: mp.cos(theta) - (1 - mp.cos(m)), lambda: -mp.sin(theta)),
        "clamped": (lambda: mp.mpf(-1), lambda: mp.mpf(0)),
        "cosine": (lambda: mp.cos(theta), lambda: -mp.sin(theta)),
        "easy": (lambda: mp.cos(theta), lambda: -mp.sin(theta)),
    }
    is_past = theta >= mp.pi / 2 if beyond == "easy" else phi > mp.pi
    value, slope = past[beyond if is_past else "plain"]
    return value() - m3, m1 * slope()


TURNED = [(1.0, 0.0, 0.0), (1.0, 0.0, 0.35), (1.0, 2.5, 0.0)]
MULTIPLIED = [(4.0, 0.0, 0.0), (1.5, 0.3, 0.2)]


@pytest.mark.parametrize("share", [1.0, 0.3, torch.tensor(0.3, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize(
    ("beyond", "margins"),
    [
        *itertools.product(("decreasing", "plain"), TURNED + MULTIPLIED),
        *itertools.product(("clamped",), [*TURNED, (1.5, 0.0, 0.0)]),
        *itertools.product(("linear", "shifted", "cosine", "easy"), TURNED),
    ],
    ids=str,
)
def test_the_known_descent_is_that_of_50_digits(beyond, margins, share):
    m1, m2, m3 = margins
    theta = torch.linspace(0.001, math.pi - 0.001, 50, dtype=torch.float64)
    combined = Combined(*margins, beyond)
    value, descent = combined.with_descent(theta, share)
    assert torch.allclose(combined(theta, share), value, rtol=1e-14, atol=1e-14)
    s = float(share)
    for at, found, slope in zip(theta.tolist(), value.tolist(), descent.tolist(), strict=True):
        now = 1 + s * (m1 - 1), s * m2, s * m3
        expected, derivative = reference_target(beyond, mp.mpf(at), *now)
        assert found == pytest.approx(float(expected), abs=1e-13)
        assert slope == pytest.approx(float(-derivative), abs=1e-13)


@pytest.mark.parametrize("share", [1.0, 0.3, torch.tensor(0.3, dtype=torch.float64)], ids=str)
def test_the_known_descents_of_a_parabola_and_a_line_are_those_of_50_digits(share):
    s = mp.mpf(float(share))
    parabola = al.X2SoftmaxLoss(2, 3, a=-0.9, h=-0.2, k=0.65)
    line = al.LiArcFaceLoss(2, 3, margin=0.45)
    a, h, k, m = (mp.mpf(value) for value in (-0.9, -0.2, 0.65, 0.45))
    formulas = {
        parabola: lambda theta: (1 - s) * mp.cos(theta) + s * (a * (theta - h) ** 2 + k),
        line: lambda theta: 1 - 2 / mp.pi * (theta + s * m),
    }
    theta = torch.cat([10.0 ** -torch.arange(1, 9), torch.linspace(0.5, math.pi, 9)]).double()
    for loss, formula in formulas.items():
        target = loss.row_target(torch.ones(1, 3), torch.zeros(1, dtype=torch.int64))
        assert has_descent(target)
        found = target(theta, share), *target.with_descent(theta, share)
        for at, *numbers in zip(theta.tolist(), *(each.tolist() for each in found), strict=True):
            value, descent = formula(mp.mpf(at)), -mp.diff(formula, mp.mpf(at))
            expected = float(value), float(value), float(descent)
            assert numbers == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_a_descent_is_known_only_where_autograd_has_nothing_else_to_do():
    margin = torch.tensor([0.5], requires_grad=True)
    assert not has_descent(Combined(m2=margin))
    assert has_descent(Combined(m2=margin.detach()))

import math
from unittest import mock

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import angular_losses as al
from angular_losses import diagnostics
from angular_losses.diagnostics import measures
from tests.cases import CASES, NAMES
from tests.diagnostics.brute_force import batch, brute_force


@given(
    st.integers(0, 9),
    st.integers(2, 9),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 10),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_batch_angles_against_brute_force(rows, classes, size, sub_centers, at_once, seed):
    embeddings, weight, labels = batch(rows, classes, size, seed, sub_centers)
    with mock.patch.object(measures, "CLASSES_AT_ONCE", at_once):
        angles = diagnostics.batch_angles(embeddings, weight, labels, sub_centers)
    target, nearest, nearest_class = brute_force(embeddings, weight, labels, sub_centers)
    np.testing.assert_allclose(angles.target, target, atol=3e-8)
    np.testing.assert_allclose(angles.nearest, nearest, atol=3e-8)
    np.testing.assert_allclose(angles.gap, nearest - target, atol=6e-8)
    if size > 1:  # on a line all classes tie
        assert angles.nearest_class.tolist() == nearest_class.tolist()


def test_a_small_angle_keeps_its_digits():
    embeddings = torch.tensor([[1.0, 1e-10]])
    angles = diagnostics.batch_angles(embeddings, torch.eye(2), torch.tensor([0]))
    assert angles.target.item() == pytest.approx(1e-10, rel=1e-6)


def test_the_product_is_full_precision_under_autocast():
    embeddings, weight, labels = batch(500, 2000, 4)
    plain = diagnostics.batch_angles(embeddings, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = diagnostics.batch_angles(embeddings, weight, labels)
    assert torch.equal(plain.nearest_class, cast.nearest_class)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    embeddings, weight, labels = batch(20, 10, 8, dtype=dtype)
    angles = diagnostics.batch_angles(embeddings, weight, labels)
    target, nearest, _ = brute_force(embeddings, weight, labels)
    np.testing.assert_allclose(angles.target, target, atol=3e-8)
    np.testing.assert_allclose(angles.nearest, nearest, atol=3e-8)


def test_centres_without_a_direction_are_never_the_nearest():
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.0, 0.0], [torch.nan, 1.0], [torch.inf, 0]])
    embeddings = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])
    angles = diagnostics.batch_angles(embeddings, weight, torch.tensor([0, 0]))
    assert angles.nearest_class[0] == 1
    assert angles.target.isnan().tolist() == angles.nearest.isnan().tolist() == [False, True]


def test_no_matrix_of_all_cosines_is_held():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    embeddings, weight, labels = batch(64, 1000, 4)
    with mock.patch.object(measures, "COSINES_AT_ONCE", 640), Largest() as largest:
        diagnostics.batch_angles(embeddings, weight, labels)
    assert largest.elements == 640


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_effective_margin_inverts_the_unrolled_cosine(case):
    theta = torch.linspace(0.05, math.pi - 0.01, 50, dtype=torch.float64)
    asked = diagnostics.effective_margin(case.margin, theta)
    for angle, extra in zip(theta.tolist(), asked.tolist(), strict=True):
        phi = mpmath.mpf(angle + extra)
        k = int(mpmath.floor(phi / mpmath.pi))
        unrolled = (-1) ** k * mpmath.cos(phi) - 2 * k
        assert float(unrolled) == pytest.approx(float(case.expected(mpmath.mpf(angle))), abs=1e-12)


def test_effective_margin_of_published_margins():
    theta = torch.linspace(0.1, 3.1, 31, dtype=torch.float64)
    for margin, expected in (
        (lambda theta: theta.cos(), 0 * theta),
        (lambda theta: al.arcface(theta, 0.5), 0.5 + 0 * theta),
        (lambda theta: al.sphereface(theta, 4), 3 * theta),
        (lambda theta: theta.cos() + 5, -theta),
    ):
        asked = diagnostics.effective_margin(margin, theta)
        assert torch.allclose(asked, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_violations_by_logits_and_by_angles(case):
    angles = diagnostics.batch_angles(*batch(500, 3, 3))
    violated = diagnostics.margin_violations(angles, case.margin)
    logits = torch.tensor([float(case.expected(theta)) for theta in angles.target.tolist()])
    assert torch.equal(violated, logits <= angles.nearest.cos().float())
    asked = diagnostics.effective_margin(case.margin, angles.target)
    assert torch.equal(violated, angles.gap <= asked)
    assert 0 < violated.sum() < 500


def test_a_tie_and_a_nan_are_violations():
    angle = torch.tensor([0.5, 0.5, torch.nan], dtype=torch.float64)
    angles = diagnostics.BatchAngles(angle, torch.tensor([0.5, 0.6, 0.6]).double(), angle.long())
    assert diagnostics.margin_violations(angles, torch.cos).tolist() == [True, False, True]


@given(st.integers(2, 12), st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.integers())
@settings(max_examples=100, deadline=None)
def test_centre_separation_against_brute_force(classes, size, sub_centers, at_once, seed):
    _, weight, _ = batch(1, classes, size, seed % 2**31, sub_centers)
    with mock.patch.object(measures, "ROWS_AT_ONCE", at_once):
        separation = diagnostics.centre_separation(weight, sub_centers)
    own = np.repeat(np.arange(classes), sub_centers)
    _, nearest, nearest_class = brute_force(weight, weight, own, sub_centers)
    by_class = nearest.reshape(classes, sub_centers)
    np.testing.assert_allclose(separation.nearest, by_class.min(1), atol=3e-8)
    if size > 1:
        which = nearest_class.reshape(classes, sub_centers)
        expected = which[np.arange(classes), by_class.argmin(1)]
        assert separation.nearest_class.tolist() == expected.tolist()


def test_collapsed_classes():
    angles = torch.tensor([0.0, 0.02, 1.0, 1.01, 2.0, 3.0])
    weight = torch.stack([angles.cos(), angles.sin()], 1)
    weight[4], weight[5] = 0, torch.nan
    separation = diagnostics.centre_separation(weight)
    assert separation.nearest.isnan().tolist() == [False] * 4 + [True] * 2
    assert separation.minimum == pytest.approx(0.01, rel=1e-4)
    collapsed = diagnostics.collapsed_classes(separation, angle=0.015)
    assert collapsed.pairs.tolist() == [[2, 3]]
    collapsed = diagnostics.collapsed_classes(separation)
    assert collapsed.pairs.tolist() == [[2, 3], [0, 1]]
    np.testing.assert_allclose(collapsed.angles, [0.01, 0.02], rtol=1e-4)
    assert collapsed.without_direction.tolist() == [4, 5]


def test_gradient_norms():
    gradient = torch.randn(12, 5)
    expected = gradient.double().square().sum(1).view(4, 3).sum(1).sqrt()
    norms = diagnostics.gradient_norm_per_class(gradient, sub_centers=3)
    assert torch.allclose(norms.double(), expected)
    half = torch.full((2, 4), 60000.0, dtype=torch.float16)
    assert diagnostics.gradient_norm_per_class(half).tolist() == [120000.0] * 2


@given(st.lists(st.floats(0, math.pi), max_size=50), st.integers(1, 200))
@settings(deadline=None)
def test_histogram_against_numpy(angles, bins):
    theta = torch.tensor(angles, dtype=torch.float64)
    counts = diagnostics.angle_histogram(theta, bins)
    assert counts.sum() == len(angles)
    middles = (torch.arange(bins).double() + 0.5) * math.pi / bins
    found = middles.repeat_interleave(counts)
    assert (found - theta.sort().values).abs().max() <= math.pi / bins / 2 + 1e-9 if angles else 1


@given(st.lists(st.floats(0, math.pi), min_size=1), st.floats(0, 1))
@settings(deadline=None)
def test_quantiles_are_within_a_bin(angles, share):
    counts = diagnostics.angle_histogram(torch.tensor(angles, dtype=torch.float64))
    found = diagnostics.histogram_quantile(counts, share)
    lower, upper = (np.quantile(angles, share, method=way) for way in ("lower", "higher"))
    assert lower - math.pi / 180 <= found <= upper + math.pi / 180
    assert math.isnan(diagnostics.histogram_quantile(torch.zeros(3), share))


ONES, LABELS = torch.ones(2, 3), torch.zeros(2).long()
COUNTS = torch.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diagnostics.batch_angles(ONES, ONES, LABELS + 2), ValueError, "labels: .*got 2"),
        (lambda: diagnostics.batch_angles(ONES.long(), ONES, LABELS), TypeError, "embeddings:"),
        (lambda: diagnostics.batch_angles(ONES, ONES[:1], LABELS), ValueError, "weight: .*two cl"),
        (
            lambda: diagnostics.batch_angles(ONES, ONES[:, :2], LABELS),
            ValueError,
            r"embeddings: .*\(N, 2\)",
        ),
        (lambda: diagnostics.batch_angles(ONES, ONES, LABELS, 3), ValueError, "weight: .*multiple"),
        (
            lambda: diagnostics.batch_angles(ONES, ONES.repeat(2, 1), LABELS + 2, 2),
            ValueError,
            r"labels: .*\[0, 2\)",
        ),
        (lambda: diagnostics.batch_angles(ONES, ONES, LABELS, 1.0), TypeError, "sub_centers:"),
        (lambda: diagnostics.centre_separation(ONES[0]), ValueError, "weight:"),
        (lambda: diagnostics.centre_separation(ONES[:, :0]), ValueError, "weight:"),
        (
            lambda: diagnostics.collapsed_classes(diagnostics.centre_separation(ONES), 5),
            ValueError,
            "angle: .*degrees",
        ),
        (
            lambda: diagnostics.collapsed_classes(diagnostics.centre_separation(ONES), 0),
            ValueError,
            "angle:",
        ),
        (lambda: diagnostics.gradient_norm_per_class(None), TypeError, "gradient:"),
        (lambda: diagnostics.gradient_norm_per_class(ONES, 4), ValueError, "gradient:"),
        (lambda: diagnostics.angle_histogram(LABELS), TypeError, "theta:"),
        (lambda: diagnostics.angle_histogram(COUNTS, 0), ValueError, "bins:"),
        (lambda: diagnostics.histogram_quantile(COUNTS, 50), ValueError, "share:"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

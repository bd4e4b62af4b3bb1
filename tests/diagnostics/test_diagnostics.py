import importlib.util
import itertools
import math
import sys
from fractions import Fraction
from pathlib import Path
from unittest import mock

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import angular_losses as al
from angular_losses import diagnostics, margins
from angular_losses.diagnostics import measures
from tests import family
from tests.cases import CASES, NAMES
from tests.processes import Processes


def brute_force(embeddings, weight, labels, sub_centers=1):
    """Target, nearest other and its class, row by row, by acos in float64 over all centres."""
    embeddings, weight = (
        each.double().numpy() / np.linalg.norm(each.double().numpy(), axis=1, keepdims=True)
        for each in (embeddings, weight)
    )
    angles = np.arccos(np.clip(embeddings @ weight.T, -1, 1))
    angles = angles.reshape(len(embeddings), len(weight) // sub_centers, sub_centers).min(2)
    rows = np.arange(len(labels))
    target = angles[rows, labels]
    angles[rows, labels] = np.inf
    return target, angles.min(1), angles.argmin(1)


def batch(rows, classes, size, seed=0, sub_centers=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, size, generator=generator).to(dtype)
    weight = torch.randn(classes * sub_centers, size, generator=generator).to(dtype)
    return embeddings, weight, torch.randint(classes, (rows,), generator=generator)


# Angles of a batch


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


# Margins


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


# Centres


def polygon(count):
    angle = torch.arange(count).double() * 2 * math.pi / count
    return torch.stack([angle.cos(), angle.sin()], 1)


def signed(vectors):
    return torch.cat([vectors, -vectors])


def simplex(size):
    return torch.eye(size + 1).double() - 1 / (size + 1)


def e8():
    pairs = itertools.combinations(range(8), 2)
    roots = []
    for (i, j), a, b in itertools.product(pairs, (1, -1), (1, -1)):
        roots.append([a if k == i else b if k == j else 0 for k in range(8)])
    halves = itertools.product((0.5, -0.5), repeat=8)
    return torch.tensor([*roots, *(half for half in halves if math.prod(half) > 0)])


def d4():
    """The 24-cell."""
    pairs = itertools.product(itertools.combinations(range(4), 2), (1, -1), (1, -1))
    return torch.tensor(
        [[a if k == i else b if k == j else 0.0 for k in range(4)] for (i, j), a, b in pairs]
    )


def icosahedron():
    golden = (1 + 5**0.5) / 2
    corners = [(0, a, b * golden) for a in (1, -1) for b in (1, -1)]
    return torch.tensor([corner[k:] + corner[:k] for corner in corners for k in range(3)]).double()


ARRANGEMENTS = {
    **{f"polygon-{count}": (polygon(count), 2, True) for count in (3, 4, 5, 17)},
    **{f"simplex-{size}": (simplex(size), size, True) for size in (1, 2, 3, 7)},
    **{f"cross-polytope-{size}": (signed(torch.eye(size)), size, True) for size in (2, 3, 4, 9)},
    "icosahedron": (icosahedron(), 3, True),
    "E8": (e8(), 8, True),
    "24-cell": (d4(), 4, False),
    "cube": (torch.tensor(list(itertools.product((1.0, -1.0), repeat=3))), 3, False),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_optimal_arrangements_satisfy_the_bound_and_attain_it_where_it_is_tight(name):
    centres, size, is_tight = ARRANGEMENTS[name]
    separation = diagnostics.centre_separation(centres)
    bound = diagnostics.separation_bound(len(centres), size)
    assert separation.minimum <= bound + 1e-7
    assert (abs(separation.minimum - bound) < 1e-7) == is_tight
    if centres.shape[1] == size:
        assert separation.bound == bound
    assert torch.allclose(separation.nearest, separation.minimum, rtol=0, atol=1e-6)


# Cohn and Kumar, "Universally Optimal Distribution of Points on Spheres", 2007, table 1: dimension,
# number of points, and the largest cosine, in all of which Levenshtein's bound is reached.
SHARP = [(5, 16, 5), (6, 27, 4), (7, 56, 3), (8, 240, 2), (21, 162, 7), (22, 100, 11)]
SHARP += [(22, 275, 6), (22, 891, 4), (23, 552, 5), (23, 4600, 3), (24, 196560, 2)]


@pytest.mark.parametrize(("size", "count", "inverse"), SHARP)
def test_sharp_configurations_reach_the_bound(size, count, inverse):
    bound = diagnostics.separation_bound(count, size)
    assert math.cos(bound) == pytest.approx(Fraction(1, inverse), abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 17, 64])
def test_the_bound_falls_with_the_classes_and_stays_below_that_of_disjoint_caps(size):
    bounds = [diagnostics.separation_bound(count, size) for count in range(2, 1500)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(bounds))
    if size == 1:
        return

    def share_of_cap(angle):
        half = mpmath.betainc((size - 1) / 2, 0.5, 0, mpmath.sin(angle / 2) ** 2, regularized=True)
        return half / 2 if angle <= math.pi else 1 - half / 2

    for count in (5, 100, 1400):
        assert count * share_of_cap(bounds[count - 2]) <= 1 + 1e-9


@pytest.mark.parametrize("size", [4, 5, 64])
def test_between_simplex_and_cross_polytope_the_bound_is_a_right_angle(size):
    for count in range(size + 2, 2 * size + 1):
        assert diagnostics.separation_bound(count, size) == math.pi / 2
    assert diagnostics.separation_bound(2 * size + 1, size) < math.pi / 2


def test_the_bound_on_any_default_device():
    expected = diagnostics.separation_bound(100, 8)
    with torch.device("meta"):
        assert diagnostics.separation_bound(100, 8) == expected


def test_no_random_centres_beat_the_bound():
    for size, count in itertools.product((1, 2, 3, 4, 6), (2, 3, 5, 8, 13, 40)):
        for seed in range(20):
            _, weight, _ = batch(1, count, size, seed)
            separation = diagnostics.centre_separation(weight)
            assert separation.minimum <= separation.bound + 1e-7
    assert diagnostics.separation_bound(3, 1) == 0  # on a line there are two directions


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


# Histograms


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


# The monitor

CLASSES, SIZE = 5, 8


def watched(loss=None, **options):
    torch.manual_seed(0)
    return diagnostics.AngularMonitor(loss or al.ArcFaceLoss(CLASSES, SIZE, margin=0.3), **options)


def rows_for(monitor, rows=40, seed=1):
    embeddings, _, labels = batch(rows, CLASSES, SIZE, seed)
    return embeddings + 2 * monitor.loss.weight.detach()[labels * monitor.loss.sub_centers], labels


@pytest.mark.parametrize("ignore", [-100, 2, 255])
@pytest.mark.parametrize("sub_centers", [1, 3])
def test_monitor_against_brute_force(sub_centers, ignore):
    options = {"sub_centers": sub_centers, "ignore_index": ignore}
    monitor = watched(al.CosFaceLoss(CLASSES, SIZE, margin=0.2, **options))
    batches = [rows_for(monitor, rows, seed) for rows, seed in ((40, 1), (0, 2), (17, 3))]
    batches[0][1][:3] = ignore
    for embeddings, labels in batches:
        monitor.update(embeddings, labels)
    snapshot = monitor.snapshot()
    embeddings, labels = map(torch.cat, zip(*batches, strict=True))
    embeddings, labels = embeddings[labels != ignore], labels[labels != ignore]
    weight = monitor.loss.weight.detach()
    target, nearest, _ = brute_force(embeddings, weight, labels, sub_centers)
    violated = np.cos(target) - 0.2 <= np.cos(nearest)
    expected = {
        "rows": len(labels),
        "not_finite": 0,
        "classes_seen": len(set(labels.tolist())),
        "target_mean": target.mean(),
        "nearest_mean": nearest.mean(),
        "violation_rate": violated.mean(),
        "error_rate": (target >= nearest).mean(),
        "margin_mean": (np.arccos(np.cos(target) - 0.2) - target).mean(),
    }
    numbers = monitor.summary()
    assert numbers == pytest.approx(snapshot.numbers, nan_ok=True)
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert 0 < numbers["error_rate"] < numbers["violation_rate"] < 1
    for name, angles in (("target", target), ("nearest", nearest)):
        counts = getattr(snapshot, name)
        assert counts.tolist() == np.histogram(angles, 180, (0, math.pi))[0].tolist()
        assert numbers[f"{name}_median"] == pytest.approx(np.median(angles), abs=math.pi / 90)
    for c in set(labels.tolist()):
        own = labels.numpy() == c
        assert snapshot.rows[c] == own.sum()
        assert snapshot.target_mean[c] == pytest.approx(target[own].mean())
        assert snapshot.violation_rate[c] == pytest.approx(violated[own].mean())


def test_rows_that_are_not_finite_are_counted_apart():
    monitor = watched()
    embeddings, labels = rows_for(monitor)
    monitor.update(embeddings, labels)
    clean = monitor.summary()
    broken = torch.tensor([[torch.nan] * SIZE, [torch.inf] * SIZE, [torch.nan] * SIZE])
    monitor.update(broken, torch.tensor([0, 1, monitor.loss.ignore_index]))
    assert monitor.summary() == pytest.approx({**clean, "not_finite": 2.0}, nan_ok=True)


def test_every_k_th_batch_and_reset():
    monitor = watched(every=3)
    counted = []
    for _ in range(7):
        monitor.update(*rows_for(monitor, 10))
        monitor.update_gradients(torch.ones(CLASSES, SIZE))
        counted.append(monitor.summary()["rows"])
    assert counted == [10, 10, 10, 20, 20, 20, 30]
    assert monitor.summary()["gradient_norm_mean"] == pytest.approx(SIZE**0.5)
    monitor.reset()
    numbers = monitor.summary()
    assert numbers["rows"] == 0
    assert math.isnan(numbers["target_mean"])
    assert math.isnan(numbers["target_median"])
    assert monitor.figures() == {}


def test_the_margin_in_force_is_the_schedules():
    monitor = watched(al.ArcFaceLoss(CLASSES, SIZE, margin=0.4, schedule=al.MarginWarmup(4)))
    with monitor.attach():
        for share in (0, 1, 2, 3, 4, 4):
            monitor.reset()
            monitor.loss(*rows_for(monitor))
            assert monitor.summary()["margin_mean"] == pytest.approx(0.1 * share, abs=1e-7)


def test_an_attached_monitor_measures_training_batches_and_changes_nothing():
    monitor, by_hand = watched(), watched()
    by_hand.loss.load_state_dict(monitor.loss.state_dict())
    for _ in range(2):
        embeddings, labels = rows_for(monitor)
        embeddings.requires_grad_()
        with monitor.attach():
            value = monitor.loss(embeddings, labels=labels)
            value.backward()
            gradient, grad_of_centres = embeddings.grad.clone(), monitor.loss.weight.grad.clone()
            (2 * monitor.loss.eval()(embeddings, labels)).backward()
            monitor.loss.train()
        (2 * monitor.loss(embeddings, labels)).backward()  # detached again
        embeddings.grad = monitor.loss.weight.grad = by_hand.loss.weight.grad = None
        expected = by_hand.loss(embeddings, labels)
        expected.backward()
        by_hand.update(embeddings, labels)
        by_hand.update_gradients(by_hand.loss.weight.grad)
        assert torch.equal(value, expected)
        assert torch.equal(gradient, embeddings.grad)
        assert torch.equal(grad_of_centres, by_hand.loss.weight.grad)
    assert monitor.summary() == by_hand.summary()
    norms = monitor.snapshot().gradient_norm
    assert torch.allclose(norms.float(), grad_of_centres.norm(dim=1))
    assert list(monitor.loss.state_dict()) == ["weight"]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_batch_that_is_recomputed_counts_once(use_reentrant):
    monitor = watched()
    with monitor.attach():
        embeddings, labels = rows_for(monitor)
        embeddings.requires_grad_()
        checkpoint(monitor.loss, embeddings, labels, use_reentrant=use_reentrant).backward()
    assert monitor.summary()["rows"] == len(labels)


@pytest.mark.parametrize("row", family.FAMILY, ids=family.NAMES)
def test_every_loss_can_be_watched(row):
    monitor = watched(row.build(family.CLASSES, SIZE))
    with monitor.attach():
        embeddings, labels = rows_for(monitor)
        monitor.loss(embeddings.requires_grad_(), labels).backward()
    numbers = monitor.summary()
    assert numbers["rows"] == len(labels)
    assert all(math.isfinite(number) for number in numbers.values())
    assert 0 <= numbers["violation_rate"] <= 1


def test_several_labels_count_once_each():
    monitor, single = watched(), watched()
    embeddings, labels = rows_for(monitor)
    labels = torch.stack([labels, (labels + 1) % CLASSES], 1)
    labels[:4, 1] = -100
    with monitor.attach():
        monitor.loss(embeddings, labels)
    for of_rows in labels.T:
        single.update(embeddings, of_rows)
    assert monitor.summary() == pytest.approx(single.summary(), nan_ok=True)
    assert monitor.summary()["rows"] == 2 * len(labels) - 4


def test_frozen_centres_are_watched_without_their_gradient():
    monitor = watched()
    monitor.loss.weight.requires_grad_(False)
    with monitor.attach():
        embeddings, labels = rows_for(monitor)
        monitor.loss(embeddings.requires_grad_(), labels).backward()
    numbers = monitor.summary()
    assert numbers["rows"] == len(labels)
    assert math.isnan(numbers["gradient_norm_mean"])


def test_a_window_begun_in_inference_mode_goes_on_outside():
    monitor = watched()
    with torch.inference_mode():
        monitor.update(*rows_for(monitor))
    monitor.update(*rows_for(monitor))
    assert monitor.summary()["rows"] == 80


def test_new_classes_begin_a_new_window():
    monitor = watched()
    monitor.update(*rows_for(monitor))
    monitor.loss.extend(2)
    assert monitor.summary()["rows"] == 0
    monitor.update(torch.randn(3, SIZE), torch.tensor([0, CLASSES, CLASSES + 1]))
    assert monitor.snapshot().rows.tolist() == [1, 0, 0, 0, 0, 1, 1]


def test_an_attached_monitor_measures_the_gradient_of_new_classes():
    monitor = watched()
    embeddings, labels = rows_for(monitor)
    with monitor.attach():
        monitor.loss(embeddings, labels).backward()
        old = monitor.loss.weight
        monitor.loss.extend(2)
        monitor.loss(embeddings, labels).backward()
        norms = monitor.loss.weight.grad.norm(dim=1)
        assert torch.allclose(monitor.snapshot().gradient_norm.float(), norms)
    assert not old._backward_hooks
    assert not monitor.loss.weight._backward_hooks


@pytest.mark.parametrize("plus", [False, True])
def test_random_margins_are_those_of_the_pass(plus, monkeypatch):
    """The monitor leaves the random numbers to the loss, and measures the draws to come."""
    loss = al.ElasticFaceLoss(CLASSES, SIZE, plus=plus, deviation=0.1)
    monitor, drawn = watched(loss), []
    embeddings, labels = rows_for(monitor)
    torch.manual_seed(5)
    expected = loss(embeddings, labels)
    additive = margins.additive
    monkeypatch.setattr(margins, "additive", lambda kind, m: drawn.append(m) or additive(kind, m))
    torch.manual_seed(5)
    with monitor.attach():
        assert torch.equal(loss(embeddings, labels), expected)
    assert torch.equal(drawn[0], drawn[-1])
    assert monitor.summary()["margin_mean"] == pytest.approx(drawn[0].mean().item(), rel=1e-6)


def test_lengths_of_centres_are_no_part_of_the_margin():
    monitor, angular = watched(al.LSoftmaxLoss(CLASSES, SIZE, margin=2)), watched()
    with torch.no_grad():
        monitor.loss.weight.mul_(torch.linspace(0.5, 5, CLASSES)[:, None])
    angular.loss = al.SphereFaceLoss(CLASSES, SIZE, margin=2)
    angular.loss.weight = monitor.loss.weight
    embeddings, labels = rows_for(monitor)
    for each in (monitor, angular):
        each.update(embeddings, labels)
    assert monitor.summary() == pytest.approx(angular.summary(), nan_ok=True)


def test_updates_never_need_a_value():
    # A meta tensor has none: whatever asks for one, or for a size that depends on one, raises.
    loss = al.ArcFaceLoss(CLASSES, SIZE, schedule=al.LambdaAnnealing(), device="meta")
    loss.schedule.to("meta")
    monitor = watched(loss)
    embeddings = torch.randn(9, SIZE, device="meta")
    monitor.update(embeddings, torch.zeros(9, dtype=torch.int64, device="meta"))
    monitor.update_gradients(torch.zeros(CLASSES, SIZE, device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        monitor.summary()


def test_only_measured_batches_cost_a_product():
    monitor = watched(every=2)
    with FlopCounterMode(display=False) as counter:
        monitor.update(*rows_for(monitor, 30))
    assert counter.get_total_flops() == 2 * 30 * CLASSES * SIZE
    with FlopCounterMode(display=False) as counter:
        monitor.update(*rows_for(monitor, 30))
    assert counter.get_total_flops() == 0


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="its compiler fails on the hook")
def test_compiled_losses_are_watched_too():
    monitor = watched(every=2)
    with monitor.attach():
        compiled = torch.compile(monitor.loss, backend="eager")
        for _ in range(4):
            compiled(*rows_for(monitor, 10)).backward()
    numbers = monitor.summary()
    assert numbers["rows"] == 20
    assert numbers["gradient_norm_mean"] > 0


def test_the_centres_are_compared_on_demand():
    monitor = watched()
    monitor.loss.weight.data[1] = monitor.loss.weight.data[0] * 2
    monitor.loss.weight.data[4] = 0
    numbers = monitor.summary(centres=True)
    assert numbers["separation_min"] == pytest.approx(0, abs=1e-7)
    assert numbers["separation_bound"] == diagnostics.separation_bound(CLASSES, SIZE)
    assert (numbers["collapsed_pairs"], numbers["without_direction"]) == (1, 1)


class Writer:
    def __init__(self):
        self.scalars, self.histograms, self.drawn = {}, {}, {}

    def add_scalar(self, tag, value, step):
        assert isinstance(value, float)
        self.scalars[tag, step] = value

    def add_histogram(self, tag, values, step):
        self.histograms[tag, step] = values

    def add_figure(self, tag, figure, step):
        self.drawn[tag, step] = figure


def test_log():
    monitor, writer = watched(), Writer()
    monitor.update(*rows_for(monitor))
    monitor.update_gradients(torch.ones(CLASSES, SIZE))
    summary = monitor.summary(centres=True)
    snapshot = monitor.snapshot()
    assert monitor.log(7, writer, centres=True, figures=True) == {"step": 7.0, **summary}
    assert writer.scalars == {(f"angular/{name}", 7): value for name, value in summary.items()}
    values = writer.histograms["angular/target_degrees", 7]
    assert torch.equal(torch.histc(values, 180, 0, 180), snapshot.target.float())
    assert [tag for tag, _ in writer.drawn] == ["angular/angles", "angular/gradient_norms"]
    assert monitor.summary()["rows"] == 0
    only_scalars = mock.Mock(spec=["add_scalar"])
    monitor.update(*rows_for(monitor))
    monitor.log(8, only_scalars, figures=True)
    monitor.log(9)
    assert [numbers["step"] for numbers in monitor.history] == [7.0, 8.0, 9.0]
    with pytest.raises(TypeError, match="writer: expected an object with add_scalar"):
        monitor.log(10, object())


def summaries(mesh):
    """Of one's own rows their number, and of those of all ranks everything."""
    monitor, rank = watched(), mesh.get_rank()
    monitor.update(*rows_for(monitor, 10 + rank, seed=rank))
    monitor.update_gradients(torch.full((CLASSES, SIZE), 1.0 + rank))
    own = monitor.summary(across_ranks=False)["rows"]
    both = monitor.summary()
    assert both == monitor.summary()
    return own, list(both.values())


def test_sums_of_all_ranks():
    processes = Processes(2)
    own, numbers = zip(*processes.run(summaries, 2), strict=True)
    processes.close()
    assert own == (10, 11)
    alone = watched()
    for rank in range(2):
        alone.update(*rows_for(alone, 10 + rank, seed=rank))
        alone.update_gradients(torch.full((CLASSES, SIZE), 1.0 + rank))
    for found in numbers:
        assert found == pytest.approx(list(alone.summary().values()))


# Plots


def figures():
    embeddings, weight, labels = batch(200, 60, 8)
    angles = diagnostics.batch_angles(embeddings, weight, labels)
    counts = [diagnostics.angle_histogram(each) for each in (angles.target, angles.nearest)]
    separation = diagnostics.centre_separation(weight)
    norms, rows = torch.arange(60.0), torch.arange(60)
    keys = ("target_median", "nearest_median", "margin_mean", "violation_rate", "error_rate")
    yield "angles", diagnostics.plot_angles(*counts), True
    yield "angles and margin", diagnostics.plot_angles(*counts, margin=0.5), True
    yield "margin", diagnostics.plot_margin(lambda theta: al.cosface(theta, 0.3)), True
    yield "margin of a batch", diagnostics.plot_margin(torch.cos, counts[0]), True
    yield "separation", diagnostics.plot_separation(separation, margin=0.5), True
    yield "few centres", diagnostics.plot_separation(separation._replace(bound=2.0)), True
    yield "gradients", diagnostics.plot_gradient_norms(norms), False
    yield "gradients by rows", diagnostics.plot_gradient_norms(norms, rows), False
    history = [{"step": float(step), **dict.fromkeys(keys, 0.5)} for step in range(3)]
    yield "history", diagnostics.plot_history(history), True
    yield "one step", diagnostics.plot_history(history[:1]), True


def test_figures_are_labelled_in_degrees_and_radians(tmp_path):
    for name, figure, has_angles in figures():
        figure.savefig(tmp_path / "figure.png", dpi=40)
        assert figure.axes[0].get_title(), name
        every = [*figure.axes, *(child for a in figure.axes for child in a.child_axes)]
        labels = " ".join(f"{a.get_xlabel()} {a.get_ylabel()}" for a in every)
        assert ("(degrees)" in labels and "radians" in labels) == has_angles, name
        assert all(a.get_ylabel() or a.get_yticks().size == 0 for a in figure.axes), name


def lines_of(axes):
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.get_lines()}


def test_what_the_figures_show():
    target, nearest = torch.zeros(180), torch.zeros(180)
    target[30], nearest[90] = 4, 4
    axes = diagnostics.plot_angles(target, nearest, margin=math.radians(20)).axes[0]
    assert lines_of(axes)["own class + margin, 50.5°"][0] == pytest.approx([50.5, 50.5])
    assert axes.get_legend_handles_labels()[1][:2] == [
        "own class, median 30.5°",
        "nearest other, median 90.5°",
    ]
    upper, lower = diagnostics.plot_margin(lambda theta: al.arcface(theta, 0.5)).axes[:2]
    theta = np.radians(lines_of(upper)["margin"][0])
    inside = theta < math.pi - 0.5
    for axes, expected in ((upper, np.cos(theta + 0.5)), (lower, np.sin(theta + 0.5))):
        np.testing.assert_allclose(
            np.array(lines_of(axes)["margin"][1])[inside], expected[inside], atol=1e-9
        )
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    axes = diagnostics.plot_separation(diagnostics.centre_separation(weight)).axes[0]
    assert lines_of(axes)["classes"][1] == pytest.approx([90, 90, 90])
    assert lines_of(axes)["bound on the closest, 90.0°"][1] == pytest.approx([90, 90])
    axes = diagnostics.plot_gradient_norms(torch.tensor([1.0, 0.0, 3.0, torch.nan])).axes[0]
    assert axes.get_lines()[0].get_ydata().tolist() == [3.0, 1.0]
    assert "(2 without one)" in axes.get_title()


def test_plots_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install angular-losses\[plots\]"):
        diagnostics.plot_margin(torch.cos)


def test_plots_leave_pyplot_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it fails
    place = Path(diagnostics.__file__).with_name("plots.py")
    name = f"{diagnostics.__name__}.a_second_time"
    spec = importlib.util.spec_from_file_location(name, place)
    plots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plots)
    plots.plot_margin(torch.cos)


# Bad input

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
        (lambda: diagnostics.separation_bound(1, 3), ValueError, "num_classes: .*at least 2"),
        (lambda: diagnostics.separation_bound(3, 2.0), TypeError, "embedding_size:"),
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
        (lambda: diagnostics.AngularMonitor(torch.nn.Linear(1, 1)), TypeError, "loss:"),
        (lambda: diagnostics.AngularMonitor(al.ArcFaceLoss(1, 2)), ValueError, "loss:"),
        (lambda: watched(every=0), ValueError, "every:"),
        (lambda: watched().update(ONES, LABELS), ValueError, "embeddings: expected shape"),
        (lambda: watched().update_gradients(ONES), ValueError, "gradient:"),
        (lambda: diagnostics.plot_angles([1], COUNTS), TypeError, "target:"),
        (lambda: diagnostics.plot_angles(COUNTS, COUNTS[:2]), ValueError, "nearest: .*4"),
        (lambda: diagnostics.plot_angles(0 * COUNTS, COUNTS), ValueError, "target: .*none"),
        (lambda: diagnostics.plot_angles(COUNTS, COUNTS, margin="1"), TypeError, "margin:"),
        (lambda: diagnostics.plot_margin(lambda theta: theta.sum()), ValueError, "margin:"),
        (lambda: diagnostics.plot_gradient_norms(0 * COUNTS), ValueError, "norms:"),
        (lambda: diagnostics.plot_gradient_norms(COUNTS, LABELS), ValueError, "rows:"),
        (lambda: diagnostics.plot_history([]), ValueError, "history:"),
        (
            lambda: diagnostics.plot_separation(diagnostics.centre_separation(0 * ONES)),
            ValueError,
            "separation:",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

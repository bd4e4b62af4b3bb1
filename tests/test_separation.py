"""The bound on the separation of class centres, against arrangements whose angles are known."""

import itertools
import math
from fractions import Fraction

import mpmath
import pytest
import torch

from angular_losses import diagnostics
from tests.diagnostics.brute_force import batch


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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diagnostics.separation_bound(1, 3), ValueError, "num_classes: .*at least 2"),
        (lambda: diagnostics.separation_bound(3, 2.0), TypeError, "embedding_size:"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

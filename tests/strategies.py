"""Inputs that several tests share: pairs of vectors at a given angle, and hypothesis strategies."""

import math

import torch
from hypothesis import strategies as st

ANGLES = [0.0, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, math.pi / 2]
ANGLES += [math.pi - angle for angle in (1e-2, 1e-3, 1e-4, 1e-6, 0.0)]


def kinks(m):
    """The angles 1e-6 before and after every k pi / m inside (0, pi)."""
    inner = [k * math.pi / m for k in range(1, math.ceil(m))]
    return [kink + shift for kink in inner for shift in (-1e-6, 1e-6)]


def pair_at(theta, dimensions, *, seed, dtype=torch.float32, aligned=False):
    """A pair of vectors of random lengths, rounded to ``dtype``, about ``theta`` apart.

    At 0 and pi the pair is exactly parallel. ``aligned`` keeps the pair in a coordinate plane,
    where angles far below the dtype's resolution can be represented.
    """
    generator = torch.Generator().manual_seed(seed)
    if aligned:
        u, towards = torch.eye(dimensions, dtype=torch.float64)[:2]
    else:
        u, towards = torch.randn(2, dimensions, generator=generator, dtype=torch.float64)
        u = u / u.norm()
        towards = towards - (towards @ u) * u
        towards = towards / towards.norm()
    lengths = 2.0 ** torch.randint(-3, 4, (2,), generator=generator)
    if theta in (0.0, math.pi):
        first = (lengths[0] * u).to(dtype)
        return first, first * (2.0 if theta == 0.0 else -2.0)
    second = math.cos(theta) * u + math.sin(theta) * towards
    return (lengths[0] * u).to(dtype), (lengths[1] * second).to(dtype)


angles = st.floats(0.0, math.pi)
exponents = st.integers(-30, 30)
seeds = st.integers(0, 2**31 - 1)

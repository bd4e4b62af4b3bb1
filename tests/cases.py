"""One table of margins and losses; every test of a margin or a loss runs over it.

A new loss is one more row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import angular_losses as al
from tests import reference


@dataclass(frozen=True)
class Case:
    name: str
    loss: Callable[..., al.MarginLoss]
    margin: Callable[[Any], Any]
    expected: Callable[[Any], Any]
    kinked_at: float = 1.0


def sphereface(m):
    return Case(
        f"sphereface-{m}",
        lambda *sizes, **options: al.SphereFaceLoss(*sizes, margin=m, **options),
        lambda theta: al.sphereface(theta, m),
        lambda theta: reference.sphereface(theta, m),
        kinked_at=m,
    )


CASES = [
    Case(
        "normalized",
        al.NormalizedSoftmaxLoss,
        lambda theta: theta.cos(),
        lambda theta: reference.cosface(theta, 0),
    ),
    *map(sphereface, (1, 1.7, 2, 4, 5, 6.5)),
    Case(
        "cosface",
        al.CosFaceLoss,
        lambda theta: al.cosface(theta, 0.35),
        lambda theta: reference.cosface(theta, 0.35),
    ),
    Case(
        "arcface",
        al.ArcFaceLoss,
        lambda theta: al.arcface(theta, 0.5),
        lambda theta: reference.arcface(theta, 0.5),
    ),
    Case(
        "combined",
        lambda *sizes, **options: al.CombinedMarginLoss(*sizes, 1.5, 0.3, 0.2, **options),
        lambda theta: al.combined(theta, 1.5, 0.3, 0.2),
        lambda theta: reference.combined(theta, 1.5, 0.3, 0.2),
        kinked_at=1.5,
    ),
]
NAMES = [case.name for case in CASES]

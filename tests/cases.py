"""One table of margins and losses, and one of modes; every test of one runs over it.

A new loss is one more row.
"""

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

import angular_losses as al
from angular_losses import margins
from angular_losses.engine import passes, planner
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
    Case(
        "x2softmax",
        lambda *sizes, **options: al.X2SoftmaxLoss(*sizes, -0.9, -0.2, 0.65, **options),
        lambda theta: margins.x2_softmax(theta, -0.9, -0.2, 0.65),
        lambda theta: reference.x2_softmax(theta, -0.9, -0.2, 0.65),
    ),
]
NAMES = [case.name for case in CASES]

# Modes, each with a number of classes in a chunk, as in_chunks_of takes it; 2 leaves a ragged chunk
# where C is odd.
MODES = [
    ("dense", 2),
    *(("stash", chunk) for chunk in (2, 2048, None)),
    *(("recompute", chunk) for chunk in (2, 2048)),
]


needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")),
    reason="torch.compile's inductor needs a C++ compiler",
)


def spread(first, second, *others):
    """Cases: every value of the first with every one of the second, while the others take turns."""
    pairs = enumerate(itertools.product(first, second))
    return [(*pair, *(values[k % len(values)] for values in others)) for k, pair in pairs]


def identifier(value):
    """What a test is called by; None leaves that to pytest."""
    return value.name if isinstance(value, Case) else str(value)


@contextmanager
def in_chunks_of(size: int | None) -> Iterator[None]:
    """The planner chooses chunks of this size; None is one chunk, no product of which is small."""

    def chunk(num_rows: int, device: torch.device) -> int:  # a Mock would not compile
        return size or 2048

    planner.cached_plan.cache_clear()
    few = passes.FEW_PRODUCTS if size else 0
    with (
        mock.patch.object(planner, "_chunk", chunk),
        mock.patch.object(passes, "FEW_PRODUCTS", few),
    ):
        yield
    planner.cached_plan.cache_clear()

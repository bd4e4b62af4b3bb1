"""Reductions over processes: all, where torch.distributed is initialised, or those of a group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_group: ProcessGroup | None = None  # all processes
_is_alone = False


@contextmanager
def over(group: ProcessGroup | None) -> Iterator[None]:
    """Context in which reductions are over the processes of a group; None: over this one alone."""
    global _group, _is_alone
    before, (_group, _is_alone) = (_group, _is_alone), (group, group is None)
    try:
        yield
    finally:
        _group, _is_alone = before


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over the processes; the tensor itself with a single process."""
    return _reduced(values, "SUM")


def largest(values: Tensor) -> Tensor:
    """The element-wise maximum over the processes."""
    return _reduced(values, "MAX")


def spread(values: Tensor) -> Tensor:
    """The element-wise range (maximum minus minimum) over the processes."""
    return largest(torch.stack([values, -values])).sum(0)


def mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of the rows (N,), weighted, over all processes; NaN if all weights are 0."""
    sums = _sums(values, weights)
    return sums[0] / sums[1]


def mean_and_deviation(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation (unbiased) of the rows, weighted, over all processes.

    The deviation is not finite if the weights sum to 1 (to rounding) or less, nor the mean if they
    sum to 0.
    """
    centre = mean(values, weights)
    sums = _sums((values - centre).square(), weights)
    return centre, (sums[0] / torch.threshold(sums[1] - 1, 1e-6, 0)).sqrt()


def _sums(values: Tensor, weights: Tensor | None) -> Tensor:
    """The sums (2,) of the weighted rows and of the weights."""
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    return total(torch.stack([(values * weights).sum(), weights.sum()]))


def _reduced(values: Tensor, operation: str) -> Tensor:
    if _is_alone or not (dist.is_available() and dist.is_initialized()):
        return values
    if dist.get_world_size(_group) > 1:
        values = values.clone()
        dist.all_reduce(values, getattr(dist.ReduceOp, operation), group=_group)
    return values

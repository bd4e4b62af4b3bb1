"""Statistics over all processes of a training run, where torch.distributed is initialised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

# How many processes have the same rows, which then count once.
_copies = 1


@contextmanager
def rows_of_several(processes: int) -> Iterator[None]:
    """While this lasts each process has the rows of so many, and they all have the same."""
    global _copies
    before, _copies = _copies, processes
    try:
        yield
    finally:
        _copies = before


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over the processes; the tensor itself where there is one process."""
    if not _are_several():
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / _copies if _copies > 1 else values


def largest(values: Tensor) -> Tensor:
    """The largest over the processes, number by number."""
    if not _are_several():
        return values
    values = values.clone()
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def spread(values: Tensor) -> Tensor:
    """How far apart the processes are, number by number; 0 where they have the same."""
    return largest(torch.stack([values, -values])).sum(0)


def mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of the rows (N,), weighted, over all processes; NaN where no row has a weight."""
    weights = _weights_of(values, weights)
    summed = total(torch.stack([(values * weights).sum(), weights.sum()]))
    return summed[0] / summed[1]


def mean_and_deviation(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation (unbiased) of the rows, weighted, over all processes.

    The deviation is NaN where the weights sum to less than two rows', as the mean is where to none.
    """
    centre, weights = mean(values, weights), _weights_of(values, weights)
    square = ((values - centre).square() * weights).sum()
    summed = total(torch.stack([square, weights.sum()]))
    return centre, (summed[0] / (summed[1] - 1).clamp(min=0)).sqrt()


def _weights_of(values: Tensor, weights: Tensor | None) -> Tensor:
    return torch.ones_like(values) if weights is None else weights.to(values.dtype)


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > _copies

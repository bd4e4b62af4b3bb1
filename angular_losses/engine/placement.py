"""Where the class centres are that take part in a batch: in one process all, or some of them.

Those that processes share are in :mod:`.shard`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import BeginSum, Deferred
from .passes import Parts


@dataclass(frozen=True)
class Placement:
    """All classes in one place: nothing to translate or to add."""

    is_partial = False
    begin_sum: BeginSum | None = None

    def __repr__(self) -> str:
        return "all classes"

    @property
    def all_classes(self) -> int | None:
        """The number of classes in all, where the weight may have some of them."""
        return None

    def most_centres(self, weight: Tensor, sub_centers: int) -> int:
        """The number of centres."""
        return weight.shape[0]

    def unchanged(self, values: Tensor) -> Tensor:
        """The values, for there is nothing to translate, to add up or to compare."""
        return values

    local = of_classes = shared = shared_rows = total = largest = nearest = unchanged

    def centres(self, weight: Tensor, sub_centers: int) -> Tensor:
        """The weight."""
        return weight

    def averaged(self, total: float | Tensor) -> float | Tensor:
        """A sum over the rows, as a mean over replicas of the classes: there are none."""
        return total

    def completed(
        self, parts: Parts, own: Tensor, deferred: Deferred, *, summed: bool, is_bounded: bool
    ) -> Parts:
        """The parts."""
        return parts

    def add_of_rows(self, kept: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Add rows (N, ...) to what is kept of their classes here (C, ...)."""
        kept.index_add_(0, labels, rows)

    def joined(self, values: Tensor, each: int = 1) -> Tensor:
        """What is kept here, ``each`` rows of a class, after that of the classes before."""
        return values

    def appended(self, values: Tensor, new: Tensor, num_new: int) -> Tensor:
        """What is kept here, with that of some new classes after all."""
        return torch.cat([values, new.to(values.dtype)])

    def of_targets(
        self, function: Callable[[Tensor], Tensor], weight: Tensor, own: Tensor
    ) -> Tensor:
        """A function of the centres of the targets."""
        return function(weight.index_select(0, own))

    def reductions(self) -> AbstractContextManager[None]:
        """Context of statistics over rows: over all processes, each with its own."""
        return nullcontext()


WHOLE = Placement()


def number_of(rate: float, num_classes: int) -> int:
    """The number of classes that a share makes, rounded up."""
    return math.ceil(round(rate * num_classes, 6))  # 0.07 * 100 is more than 7


class Sampled(Placement):
    """Some of the classes of one process, drawn anew for each training step.

    Args:
        num_classes: The number of classes, C.

    Attributes:
        first: The first class of this process.
        count: The number of its classes.
        sampled: Which of them take part in this pass, (n,) int64 in ascending order from 0; None
            where all do.
    """

    def __init__(self, num_classes: int) -> None:
        self.first, self.count = 0, num_classes
        self.sampled: Tensor | None = None

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __repr__(self) -> str:
        return f"samples of {self.count} classes"

    def draw(
        self,
        labels: Tensor,
        rate: float,
        generator: torch.Generator | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """Choose the classes of a pass: those of the labels (N,), and random others up to a share.

        Labels of no class here count for nothing. Classes drawn before are preferred to others.
        """
        chances = torch.rand(self.count + 1, generator=generator, device=labels.device)
        if before is not None:
            chances[before.to(labels.device)] += 1
        chances[self._place(labels)] = 3.0  # the last, of no class, for -1
        chances = chances[:-1]
        wanted = max(number_of(rate, self.count), int((chances == 3.0).sum()))
        self.sampled = chances.topk(wanted).indices.sort().values
        return self.sampled

    def _place(self, labels: Tensor) -> Tensor:
        """The classes (N,) as this process counts its own; -1 for those of others."""
        here = labels - self.first
        return here.where((here >= 0) & (here < self.count), -1)

    def local(self, labels: Tensor) -> Tensor:
        """The classes (N,) as this process counts those that take part here; -1 for others."""
        here = self._place(labels)
        if self.sampled is None:
            return here
        if not len(self.sampled):
            return torch.full_like(here, -1)
        place = torch.searchsorted(self.sampled, here).clamp(max=len(self.sampled) - 1)
        return place.where(self.sampled.index_select(0, place) == here, -1)

    def centres(self, weight: Tensor, sub_centers: int) -> Tensor:
        """The centres that take part; their gradient is sparse where not all of them do."""
        if self.sampled is None:
            return weight
        rows = self.sampled[:, None] * sub_centers
        rows = rows + torch.arange(sub_centers, device=rows.device)
        return torch.embedding(weight, rows.flatten(), sparse=True)

    def of_classes(self, values: Tensor) -> Tensor:
        """The part of what is kept for all classes (C,) that belongs to those taking part here."""
        values = values[self.first : self.first + self.count]
        return values if self.sampled is None else values.index_select(0, self.sampled)

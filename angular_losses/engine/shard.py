"""The collectives of processes that share the classes of a loss, and their gradients.

Each process (rank) holds the centres of some classes and embeds some rows. The rows of all ranks
are gathered, each rank does all rows with its own classes, and sums over classes become sums over
ranks. Everything that is not a sum over classes, such as a margin or a mean over rows, every rank
does for itself, with the same numbers; so its gradient is complete on every rank, and only that of
the rows through the classes has to be summed:

- ``total`` adds up over ranks; its gradient is that of each term, 1.
- ``shared`` takes rows as they are; its gradient is added up over ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import collectives
from ..geometry import precise_dtype
from .chunks import Deferred
from .passes import Parts
from .placement import Sampled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_Result = TypeVar("_Result")
# Their names until torch 2.12; the new ones do the same.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Shard(Sampled):
    """The classes of one rank, and the collectives over all ranks.

    Rows are in blocks of equal size, one a rank, in the order of the ranks.

    Args:
        mesh: One dimension, of the processes that share the classes.
        num_classes: The number of classes in all, C. Each rank but the last ones has ceil(C /
            size) of them, as ``torch.chunk`` and DTensor's ``Shard(0)`` cut.

    Attributes:
        rank: Of this process in the group.
        size: How many processes there are.
        each: The most classes of a rank, ceil(C / size).
        count: The number of classes of this rank; 0 where the others have all.
        device: Of this rank in the mesh.
        most: The most classes of a rank that take part in this batch, the same on all ranks.
        replicas: The processes with the same classes and other rows; None where there are none.
    """

    is_partial = True

    def __init__(self, mesh: DeviceMesh, num_classes: int) -> None:
        self.mesh, self.num_classes = mesh, num_classes
        self.group = mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.each = -(-num_classes // self.size)
        first = min(self.rank * self.each, num_classes)
        super().__init__(min(self.each, num_classes - first))
        self.first = first
        self.most = self.each
        self.replicas: ProcessGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        """A copy with the same process group, which cannot be copied."""
        return copy.copy(self)

    @property
    def device(self) -> torch.device:
        """The device of this rank, on which it can reach the others."""
        kind = self.mesh.device_type
        if kind == "cpu":
            return torch.device(kind)
        return torch.device(kind, torch.get_device_module(kind).current_device())

    def __repr__(self) -> str:
        return f"{self.first}:{self.first + self.count} of {self.num_classes} classes"

    @property
    def all_classes(self) -> int:
        """The number of classes in all."""
        return self.num_classes

    def most_centres(self, weight: Tensor, sub_centers: int) -> int:
        """The most centres of a rank: all ranks plan alike, and fail alike."""
        return self.most * sub_centers

    def block(self, rows: int) -> slice:
        """Where this rank's rows are among all."""
        each = rows // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def of_targets(
        self, function: Callable[[Tensor], Tensor], weight: Tensor, own: Tensor
    ) -> Tensor:
        """A function (N,) of the centres of the targets (N, d), which are rows ``own`` or not here.

        Its gradient goes to the centres, and to no rows.
        """
        centres = weight.new_zeros(len(own), weight.shape[1])
        if len(weight):
            centres = weight.index_select(0, own.clamp(min=0))
        return self.total(function(centres).where(own >= 0, 0))

    def add_of_rows(self, kept: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Add rows (N, ...) to what is kept of their classes here (count, ...)."""
        own = self._place(labels)
        if len(kept):
            kept.index_add_(0, own.clamp(min=0), rows.where((own >= 0)[:, None], 0))

    def joined(self, values: Tensor, each: int = 1) -> Tensor:
        """What all ranks keep of their classes, ``each`` rows of a class; without a graph."""
        padded = values.new_zeros(self.each * each, *values.shape[1:])
        padded[: len(values)] = values.detach()
        return self.gathered(padded).flatten(0, 1)[: self.num_classes * each]

    def appended(self, values: Tensor, new: Tensor, num_new: int) -> Tensor:
        """What this rank is to keep where new classes follow all others, partitioned anew.

        What the others keep passes through its memory, one rank's at a time.
        """
        each = len(new) // num_new
        grown = Shard(self.mesh, self.num_classes + num_new)
        start, stop = grown.first * each, (grown.first + grown.count) * each
        found = values.new_empty(stop - start, *values.shape[1:])
        place = 0  # the row, of all, with which the next part begins
        for rank in range(self.size + 1):
            if rank < self.size:
                count = min(self.each, max(self.num_classes - rank * self.each, 0))
                part = self.sent(values.detach(), count * each, rank)
            else:
                part = new.to(values.dtype)
            first, last = max(start, place), min(stop, place + len(part))
            if first < last:
                found[first - start : last - start] = part[first - place : last - place]
            place += len(part)
        return found

    def nearest(self, cosines: Tensor) -> Tensor:
        """Of the k largest cosines of each rank (N, k) those of all, without a graph."""
        of_ranks = self.gathered(cosines).transpose(0, 1).flatten(1)
        return of_ranks.topk(cosines.shape[1], 1).values

    def reductions(self) -> AbstractContextManager[None]:
        """Context of statistics over rows: over the replicas, for all ranks have the same rows."""
        return collectives.over(self.replicas)

    def averaged(self, total: float | Tensor) -> float | Tensor:
        """The mean over the replicas of a sum over rows, of the rows themselves or their weights.

        With it as denominator, what averages the replicas' gradients makes those of the mean over
        the rows of all replicas.
        """
        if self.replicas is None:
            return total
        if isinstance(total, Tensor) and total.requires_grad:
            raise RuntimeError(
                "sample_weight: expected none that needs a gradient with replicas of the classes"
            )
        if not isinstance(total, Tensor):  # filled on the device, without a copy from the host
            dtype = precise_dtype(self.device)
            total = torch.full((), total, dtype=dtype, device=self.device)
        return collectives.total(total) / dist.get_world_size(self.replicas)

    def total(self, values: Tensor, deferred: Deferred | None = None) -> Tensor:
        """The sum over ranks, with a gradient; for what every rank then uses alike."""
        total: Tensor = _Total.apply(values, self, deferred or ())  # type: ignore[no-untyped-call]
        return total

    def shared(self, values: Tensor) -> Tensor:
        """The values, the same on every rank; their gradient is summed over ranks."""
        shared: Tensor = _Shared.apply(values, self)  # type: ignore[no-untyped-call]
        return shared

    def shared_rows(self, rows: Tensor) -> Tensor:
        """The rows (N, d) of all ranks; the gradient of this rank's own is summed over ranks."""
        shared: Tensor = _SharedRows.apply(rows, self)  # type: ignore[no-untyped-call]
        return shared

    def completed(
        self, parts: Parts, own: Tensor, deferred: Deferred, *, summed: bool, is_bounded: bool
    ) -> Parts:
        """The parts over all classes, from those of the classes here.

        One stack is reduced; where exp(negatives) might overflow, their maximum before it.

        Args:
            parts: theta of each row whose target is here; negatives and mean cosine of all rows.
            own: (N,) -1 where a row's target is not here.
            deferred: What to do while they are summed.
            summed: Whether the negatives are a sum, and not the log of one.
            is_bounded: Whether exp(negatives) cannot overflow.
        """
        theta, dtype = parts.theta.where(own >= 0, 0), parts.theta.dtype
        if summed:
            theta, negatives = self.total(torch.stack([theta, parts.negatives]), deferred)
            return Parts(theta, negatives, parts.mean_cosine)
        values, mean, shift = parts.negatives, parts.mean_cosine, torch.zeros_like(parts.negatives)
        if not is_bounded:
            shift = self.largest(values.detach()).clamp(min=torch.finfo(values.dtype).min)
        here = [(values - shift).exp(), theta]
        if mean is not None:
            here.append(mean.to(dtype))
        total, theta, *means = self.total(torch.stack(here), deferred)
        is_none = total == 0  # its logarithm has no gradient
        negatives = (total.masked_fill(is_none, 1).log() + shift).masked_fill(is_none, -torch.inf)
        return Parts(theta, negatives, None if mean is None else means[0].to(mean.dtype))

    def largest(self, values: Tensor) -> Tensor:
        """The maximum over ranks, without a gradient."""
        values = values.clone()
        _reached(lambda: dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group))
        return values

    def gathered(self, values: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, stacked (size, ...); without a graph."""
        found = values.new_empty(self.size, *values.shape)
        flat, values = found.view(-1), values.detach().reshape(-1).contiguous()
        _reached(lambda: _all_gather(flat, values, group=self.group))
        return found

    def sent(self, values: Tensor, rows: int, rank: int) -> Tensor:
        """The tensor of that rank (rows, ...), on every rank."""
        sent = values.clone() if rank == self.rank else values.new_empty(rows, *values.shape[1:])
        source = dist.get_global_rank(self.group, rank)
        _reached(lambda: dist.broadcast(sent, source, group=self.group))
        return sent

    def attached(self, rows: Tensor, own: Tensor, factor: float) -> Tensor:
        """The gathered rows, those of this rank on its graph; their gradient times a factor."""
        attached: Tensor = _Attached.apply(own, rows, self, factor)  # type: ignore[no-untyped-call]
        return attached

    def own(self, losses: Tensor, count: int) -> Tensor:
        """Of the losses of all rows those of this rank's first ``count``."""
        own: Tensor = _Own.apply(losses, self, count)  # type: ignore[no-untyped-call]
        return own

    def distributed(self, values: Tensor, sub_centers: int) -> Tensor:
        """What this rank keeps for the rows of its weight, as its part of what all ranks keep.

        Args:
            values: (rows, ...).
            sub_centers: The number of rows of a class.

        Returns:
            A DTensor (C, ...), or (C, sub_centers, ...), for a class is not to be cut. Values that
            are not of these rows are returned as they are.
        """
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor import Shard as ByRow

        if isinstance(values, DTensor) or len(values) != self.count * sub_centers:
            return values
        if sub_centers > 1:
            values = values.view(self.count, sub_centers, *values.shape[1:])
        shape = torch.Size((self.num_classes, *values.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            values, self.mesh, [ByRow(0)], run_check=False, shape=shape, stride=stride
        )

    def undistributed(self, values: Tensor, sub_centers: int) -> Tensor:
        """This rank's rows (rows, ...) of what :meth:`distributed` made, or of a whole weight's.

        The latter also as torch's full state has them, (C, sub_centers, d).
        """
        from torch.distributed.tensor import DTensor

        if isinstance(values, DTensor):
            values = values.to_local()
            return values.flatten(0, 1) if sub_centers > 1 else values
        by_class = self.num_classes, sub_centers
        if sub_centers > 1 and values.dim() == 3 and values.shape[:2] == by_class:
            values = values.flatten(0, 1)
        if len(values) != self.num_classes * sub_centers:
            return values
        return values[self.first * sub_centers : (self.first + self.count) * sub_centers]

    def begin_sum(self, gradient: Tensor) -> Callable[[], Tensor]:
        """Begin to sum gradients of rows (N, d) over ranks; the result ends it, and returns them.

        What is returned is 0 but for this rank's own rows.
        """
        summed = torch.zeros_like(gradient)
        block = summed[self.block(len(summed))]
        sent = gradient.contiguous()
        work = _reached(lambda: _reduce_scatter(block, sent, group=self.group, async_op=True))

        def end() -> Tensor:
            _reached(work.wait)
            return summed

        return end


def _reached(collective: Callable[[], _Result]) -> _Result:
    """What the collective returns; its failure is that of another rank, and says so."""
    try:
        return collective()
    except RuntimeError as error:
        raise RuntimeError(
            "sharded: the other ranks could not be reached: one of them has failed, or did not "
            "come within the process group's timeout; a rank without a batch has to bring one of "
            f"0 rows ({error})"
        ) from error


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: Shard, deferred: Deferred) -> Tensor:
        values = values.clone()
        work = _reached(lambda: dist.all_reduce(values, group=shard.group, async_op=True))
        for each in deferred:
            each()
        _reached(work.wait)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.total(gradient), None


class _SharedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.begin_sum(gradient)(), None


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, rows: Tensor, shard: Shard, factor: float) -> Tensor:
        ctx.shard, ctx.factor, ctx.count, ctx.dtype = shard, factor, len(own), own.dtype
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        own = gradient[ctx.shard.block(len(gradient))][: ctx.count] * ctx.factor
        return own.to(ctx.dtype), None, None, None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, shard: Shard, count: int) -> Tensor:
        ctx.shard, ctx.rows = shard, len(losses)
        return losses[shard.block(len(losses))][:count].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = gradient.new_zeros(ctx.rows // ctx.shard.size)
        own[: len(gradient)] = gradient
        return ctx.shard.gathered(own).view(-1), None, None

"""A loss with a shard of its class centres."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import functional as F

from .. import validation
from ..engine.placement import number_of
from ..engine.shard import Shard
from ..losses.base import MarginLoss
from ..losses.sampled_loss import averaging_wrapper, refuse_unprepared_optimizers
from ..losses.state import is_in_backward, recomputed_pass
from .gathering import Gathering, RankBatch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ShardedLoss(MarginLoss):
    """A loss converted by :func:`shard`: the same loss over the rows of all ranks.

    Every rank has to call its methods, even without rows; the number of rows N may differ. What one
    rank rejects is an error on all: there the TypeError or ValueError of the unsharded loss,
    elsewhere a ValueError with its message (on a GPU with ``batch_size`` that of the timeout). It
    has first derivatives only, in every mode, and does not work inside ``torch.func``.

    Attributes:
        weight: The centres of this rank's classes, a parameter.
        shard: The partition of the classes.
    """

    shard: Shard
    sample_rate: float
    seed: int
    gatherings: tuple[Gathering, Gathering]  # for training steps, and for all else
    batches: int  # the number of training steps, for random numbers
    _drawn: int | None = None  # that of this pass
    own_weight: weakref.ref[nn.Parameter]  # which fully_shard would replace

    @_disable_dynamo
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        *,
        label_weight: Tensor | None = None,
        other_labels: Tensor | None = None,
        lam: float | Tensor | None = None,
        return_correct: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of the batches of all ranks.

        The arguments are those of :meth:`angular_losses.MarginLoss.forward`, for this rank's rows.
        K, the number of labels of a row, is the same on all ranks, and an optional argument is
        given on all or none.

        Returns:
            The loss of all rows, the same scalar on every rank; with reduction "none" (N,), the
            losses of this rank's rows. The gradients are those of the loss of all rows. With
            ``return_correct`` a pair of it and (N,) booleans: which of this rank's rows are
            classified correctly, among the classes that take part.

        Raises:
            RuntimeError: If a rank cannot be reached within the process group's timeout; or if
                DistributedDataParallel or fully_shard wraps the loss as if all ranks had the same
                centres, with what to do instead.
        """
        replicas = self._replicas()

        def checked() -> RankBatch:
            of_rows = self._labels(embeddings, labels, label_weight, other_labels, lam)
            return self._own_batch(embeddings, of_rows, sample_weight)

        rows = self._gathering()(checked, 2 * self.training + return_correct)
        _used.add(self)
        # The same random numbers on every rank, different for each batch.
        number, is_drawn = self._batch(), self.training and self.is_random
        self._drawn = number if is_drawn else None
        drawing = self._seeded(self.seed, number) if is_drawn else nullcontext()
        with self._averaging(replicas), drawing, self._sampling(rows, number):
            found = super().forward(
                rows.embeddings,
                rows.labels,
                rows.sample_weight,
                label_weight=rows.label_weight,
                return_correct=return_correct,
            )
        value, correct = found if isinstance(found, tuple) else (found, None)
        count = len(embeddings)
        value = self.shard.own(value, count) if self.reduction == "none" else value
        if correct is None:
            return value
        return value, correct[self.shard.block(len(correct))][:count]

    def advance(self) -> None:
        """Count a training step; each has its own random numbers."""
        super().advance()
        if self.is_random:
            self.batches += 1

    @torch.no_grad()
    def get_logits(self, embeddings: Tensor) -> Tensor:
        """The logits (N, C) of all classes, as of the unsharded loss, without a graph.

        Gathers the logits of the rows of all ranks; :meth:`topk` gathers only the largest.

        Args:
            embeddings: (N, d), of this rank.
        """
        here = self._logits_here(embeddings, 0)
        own = self.shard.joined(here.T).T[self.shard.block(len(here))]
        return own[: len(embeddings)].contiguous()

    @torch.no_grad()
    def topk(self, embeddings: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The largest logits (N, k), in descending order, and their classes (N, k), int64.

        They have no graph; such as for the accuracy during training.

        Args:
            embeddings: (N, d), of this rank.
            k: How many, at most C.

        Raises:
            TypeError: If k is not an int.
            ValueError: If it is out of range.
        """
        k = validation.positive_integer("k", k)
        if k > self.num_classes:
            raise ValueError(f"k: expected at most {self.num_classes} classes, got {k}")
        here = self._logits_here(embeddings, k)
        block = self.shard.block(len(here))

        def of_all_ranks(found: Tensor) -> Tensor:
            own_rows = self.shard.gathered(found)[:, block]
            return own_rows.transpose(0, 1).flatten(1)[: len(embeddings)]

        logits, classes = F.pad(here, (0, k), value=-torch.inf).topk(k, 1)
        logits, place = of_all_ranks(logits).topk(k, 1)
        return logits, of_all_ranks(classes + self.shard.first).gather(1, place)

    def _logits_here(self, embeddings: Tensor, k: int) -> Tensor:
        """The logits of the rows of all ranks for the classes here; k are wanted, or all for 0."""
        length = len(embeddings) if isinstance(embeddings, Tensor) and embeddings.dim() else 0
        labels = torch.zeros(length, dtype=torch.int64, device=self.weight.device)
        gathering = self._gathering(is_step=False)
        rows = gathering(lambda: self._own_batch(embeddings, (labels, None)), 4 + k)
        return super().get_logits(rows.embeddings)

    def _gathering(self, *, is_step: bool = True) -> Gathering:
        """What gathers the rows: large batches of an evaluation enlarge no messages of steps."""
        return self.gatherings[not (is_step and self.training)]

    def extend(self, num_new: int, init: Tensor | None = None) -> None:
        """Add classes, as :meth:`angular_losses.MarginLoss.extend`, and partition all of them anew.

        The arguments are the same on all ranks, as are centres drawn at random. A rank's part of
        the weight passes through the memory of all ranks, one at a time. Call
        :func:`shard_optimizer` for the new optimiser.
        """
        with self._seeded(self.seed, self.num_classes):
            super().extend(num_new, init)
        self.shard = Shard(self.shard.mesh, self.num_classes)
        for gathering in self.gatherings:
            gathering.shard = self.shard
        self.own_weight = weakref.ref(self.weight)

    @contextmanager
    def _averaging(self, replicas: ProcessGroup | None) -> Iterator[None]:
        """Context of a pass with these replicas; a recomputed one has those of the step before."""
        before = self.shard.replicas
        if not is_in_backward():  # where nothing is wrapped
            self.shard.replicas = replicas
        is_step = self.training and torch.is_grad_enabled()
        try:
            with self.shard.reductions():
                yield
        finally:
            if replicas is None and not is_step:
                self.shard.replicas = before

    def _replicas(self) -> ProcessGroup | None:
        """The processes with the same classes that average their gradients by DDP, if any."""
        if getattr(self, "_is_fsdp_managed_module", False) and self.weight is not self.own_weight():
            raise RuntimeError(
                "fully_shard: expected it without the centres of a sharded loss, which it would "
                "shard again; use fully_shard(network), or "
                "fully_shard(module, ignored_params={loss.weight})"
            )
        wrapper, name = averaging_wrapper(self.weight)
        if wrapper is None:
            return None
        group = wrapper.process_group
        ranks = set(dist.get_process_group_ranks(group))
        if len(ranks.intersection(dist.get_process_group_ranks(self.shard.group))) > 1:
            raise RuntimeError(
                "DistributedDataParallel: expected it without the centres of a sharded loss, which "
                "it has just overwritten with those of one rank, and whose gradients it would "
                "average; use DistributedDataParallel(network), or set "
                f"module._ddp_params_and_buffers_to_ignore = [{name!r}] before wrapping the "
                "module that contains both"
            )
        if self.sample_rate < 1:
            raise RuntimeError(
                "sample_rate: expected 1 under DistributedDataParallel over replicas of the "
                f"classes, which cannot average sparse gradients, got {self.sample_rate}"
            )
        return group

    def reset_parameters(self, init: Tensor | None = None) -> None:
        """Set anew what the constructor sets; centres start from directions before :func:`shard`.

        Each rank draws other centres, whatever it is seeded with.
        """
        if init is not None:
            raise RuntimeError("init: expected an unsharded loss, use unshard(loss)")
        with self._seeded(int(torch.randint(2**62, (), device="cpu")), self.shard.rank):
            super().reset_parameters()

    def drop_sub_centers(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Not available for a shard; see :func:`unshard`."""
        raise RuntimeError("drop_sub_centers: expected an unsharded loss, use unshard(loss)")

    def _own_batch(
        self,
        embeddings: Tensor,
        labels: tuple[Tensor, Tensor | None],
        sample_weight: Tensor | None = None,
    ) -> RankBatch:
        """This rank's batch; raises unless it is valid."""
        of_rows, label_weight = labels
        each = of_rows.T if label_weight is not None else [of_rows]
        for of_row in each:
            sizes = self.sub_centers, self.num_classes
            validation.batch(embeddings, self.weight, of_row, self.ignore_index, *sizes)
        if sample_weight is not None:
            device = embeddings.device
            validation.floating("sample_weight", sample_weight, len(of_rows), device=device)
        return RankBatch(embeddings, of_rows, sample_weight, label_weight)

    @contextmanager
    def _seeded(self, *seeds: int) -> Iterator[None]:
        """Context with random numbers of its own, here and on the device of the centres."""
        device = self.weight.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type):
            torch.manual_seed(mixed(*seeds))
            yield

    def _batch(self) -> int:
        """The number of the training step of this pass, from 1."""
        if not self._repeats_a_step():
            return self.batches + 1
        again = recomputed_pass(self)
        return self.batches if again is None or again.drawn is None else int(again.drawn)

    @contextmanager
    def _sampling(self, rows: RankBatch, number: int) -> Iterator[None]:
        """Context in which the classes of a step take part: those of the labels, and others."""
        shard = self.shard
        if self.sample_rate < 1.0 and self.training:
            labels, share = rows.labels.flatten(), number_of(self.sample_rate, shard.each)
            shard.most = min(shard.each, max(share, len(labels), 1))
            if shard.count:
                generator = torch.Generator(labels.device)
                generator.manual_seed(mixed(self.seed, number, shard.rank))
                drawn = labels.where(labels != self.ignore_index, -1)
                shard.draw(drawn, self.sample_rate, generator)
        try:
            yield
        finally:
            shard.sampled, shard.most = None, shard.each

    def rows_of_a_class(self) -> dict[str, int]:
        """What is kept for the classes of this rank alone, and how many rows for each."""
        return {"weight": self.sub_centers, **dict.fromkeys(self._class_rows, 1)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose weight is its own, and its optimiser to be prepared too."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.own_weight = weakref.ref(self.weight)
        if self.sample_rate < 1:
            refuse_unprepared_optimizers(self)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, each in self.rows_of_a_class().items():
            values, expected = getattr(self, name).detach(), self.shard.count * each
            if len(values) != expected:
                raise RuntimeError(f"{name}: expected {expected} rows, got {len(values)}")
            destination[f"{prefix}{name}"] = self.shard.distributed(values, each)
        if self.is_random:
            destination[f"{prefix}batches"] = torch.tensor(self.batches)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *others: object
    ) -> None:
        is_kept = metadata.get("assign_to_params_buffers", False)
        for name, each in self.rows_of_a_class().items():
            key = f"{prefix}{name}"
            if isinstance(state_dict.get(key), Tensor):
                rows = self.shard.undistributed(state_dict[key], each)
                state_dict[key] = rows.clone() if is_kept else rows  # not all classes' memory
        if f"{prefix}batches" in state_dict:
            self.batches = int(state_dict.pop(f"{prefix}batches"))
        super()._load_from_state_dict(state_dict, prefix, metadata, *others)


def mixed(*numbers: int) -> int:
    """Combine several integers into a seed."""
    seed = 0
    for number in numbers:
        seed = (seed ^ number) * 0x9E3779B97F4A7C15 % 2**63  # Fibonacci hashing
        seed ^= seed >> 29
    return seed


_used: weakref.WeakSet[ShardedLoss] = weakref.WeakSet()


def sharded_weights() -> dict[Tensor, Shard]:
    """The weights of the sharded losses that have computed something."""
    return {loss.weight: loss.shard for loss in _used}

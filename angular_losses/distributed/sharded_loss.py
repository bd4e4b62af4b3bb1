"""A loss with a shard of its class centres."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .. import collectives, validation
from ..engine.placement import Shard
from ..losses.base import MarginLoss
from .gathering import Batch, Gathering


class ShardedLoss(MarginLoss):
    """A loss converted by :func:`shard`: the same loss over the rows of all ranks.

    Attributes:
        weight: The centres of this rank's classes, a parameter.
        shard: The partition of the classes.
    """

    shard: Shard
    factor: float
    sample_rate: float
    seed: int
    gathering: Gathering
    batches: int  # the number of training steps, for random numbers

    @_disable_dynamo
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        sample_weight: Tensor | None = None,
        *,
        other_labels: Tensor | None = None,
        lam: float | Tensor | None = None,
        return_correct: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of the batches of all ranks; every rank has to call it, even without rows.

        Args:
            embeddings: (N, d), of this rank; N may differ between ranks, and be 0.
            labels: (N,) integers in [0, C) for all C classes, or ``ignore_index``.
            sample_weight: (N,), on all ranks or none.
            other_labels: (N,), on all ranks or none.
            lam: A number or (N,), with ``other_labels``.
            return_correct: Whether to return which of this rank's rows are classified correctly
                too, among the classes that take part; on all ranks or none.

        Returns:
            The loss of all rows, the same scalar on every rank; with reduction "none" (N,), the
            losses of this rank's rows. The gradients are those of the loss of all rows. With
            ``return_correct`` a pair of it and (N,) booleans.

        Raises:
            TypeError: If a dtype is wrong, on every rank.
            ValueError: If a batch of any rank is invalid, on every rank, with its message (on a GPU
                only without ``batch_size``).
            RuntimeError: If a rank cannot be reached within the process group's timeout.
        """
        batch = Batch(embeddings, labels, sample_weight, other_labels, lam)
        rows = self.gathering(batch, self._check_own)
        attached = self.shard.attached(rows.embeddings, embeddings, self.factor)
        with self._same_random_numbers(embeddings.device):
            self.shard.sampled = self._sample(rows) if self.training else None
            found = super().forward(
                attached,
                rows.labels,
                rows.sample_weight,
                other_labels=rows.other_labels,
                lam=rows.lam,
                return_correct=return_correct,
            )
        value, correct = found if isinstance(found, tuple) else (found, None)
        count = len(embeddings)
        value = self.shard.own(value, count) if self.reduction == "none" else value
        if correct is None:
            return value
        return value, correct[self.shard.block(len(correct))][:count]

    def observe(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        """Update the running statistics with the rows of all ranks."""
        with collectives.gathered_rows(self.shard.size):
            super().observe(embeddings, labels, weights)

    def advance(self) -> None:
        """Count a training step; each has its own random numbers."""
        super().advance()
        if self.is_random:
            self.batches += 1

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Not available for a shard; see :func:`unshard`."""
        raise RuntimeError("get_logits: expected an unsharded loss, use unshard(loss)")

    def extend(self, num_new: int, init: Tensor | None = None) -> None:
        """Not available for a shard; see :func:`unshard`."""
        raise RuntimeError("extend: expected an unsharded loss, use unshard(loss)")

    def drop_sub_centers(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Not available for a shard; see :func:`unshard`."""
        raise RuntimeError("drop_sub_centers: expected an unsharded loss, use unshard(loss)")

    def _check_own(self, batch: Batch) -> None:
        """Raise unless this rank's batch is valid."""
        self._checked(batch.embeddings, batch.labels)
        device, rows = batch.embeddings.device, len(batch.labels)
        if batch.sample_weight is not None:
            validation.floating("sample_weight", batch.sample_weight, rows, device=device)
        if (batch.other_labels is None) != (batch.lam is None):
            missing = "lam" if batch.lam is None else "other_labels"
            raise ValueError(f"{missing}: expected it beside the other of other_labels and lam")
        if batch.other_labels is not None:
            self._checked(batch.embeddings, batch.other_labels)
        if isinstance(batch.lam, Tensor) and batch.lam.dim():
            validation.floating("lam", batch.lam, rows, device=device)
        elif batch.lam is not None and not isinstance(batch.lam, Tensor):
            validation.share("lam", batch.lam)

    @contextmanager
    def _same_random_numbers(self, device: torch.device) -> Iterator[None]:
        """Context with the same random numbers on every rank, different for each batch."""
        if not (self.training and self.is_random):
            yield
            return
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type):
            torch.manual_seed(mixed(self.seed, self._batch()))
            yield

    def _batch(self) -> int:
        """The number of the training step of this pass, from 1."""
        return self.batches if self._repeats_a_step() else self.batches + 1

    def _sample(self, rows: Batch) -> Tensor | None:
        """Sampled classes in ascending order: those of the batch's labels, and random others."""
        if self.sample_rate == 1.0 or not self.shard.count:
            return None
        labels = rows.labels
        if rows.other_labels is not None:
            labels = torch.cat([labels, rows.other_labels])
        count, device = self.shard.count, labels.device
        # At least as many as labels, which may all differ: counting them would synchronise.
        wanted = min(count, max(math.ceil(self.sample_rate * count), len(labels)))
        generator = torch.Generator(device)
        generator.manual_seed(mixed(self.seed, self._batch(), self.shard.rank))
        chances = torch.rand(count + 1, generator=generator, device=device)
        known = labels.where(labels != self.ignore_index, 0)
        here = known - self.shard.first
        is_here = (here >= 0) & (here < count)
        chances[here.where(is_here, count)] = 2.0
        return chances[:count].topk(wanted).indices.sort().values

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.shard.distributed(
            self.weight.detach(), self.sub_centers
        )
        if self.is_random:
            destination[f"{prefix}batches"] = torch.tensor(self.batches)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *others: object
    ) -> None:
        key = f"{prefix}weight"
        if isinstance(state_dict.get(key), Tensor):
            state_dict[key] = self.shard.undistributed(state_dict[key], self.sub_centers)
        if f"{prefix}batches" in state_dict:
            self.batches = int(state_dict.pop(f"{prefix}batches"))
        super()._load_from_state_dict(state_dict, prefix, *others)


def mixed(*numbers: int) -> int:
    """Combine several integers into a seed."""
    seed = 0
    for number in numbers:
        seed = (seed ^ number) * 0x9E3779B97F4A7C15 % 2**63  # Fibonacci hashing
        seed ^= seed >> 29
    return seed

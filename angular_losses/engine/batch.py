"""A batch, checked once, as everything after the public entry takes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import validation
from ..geometry import nearest_sub_centers, without_autocast
from .placement import WHOLE, Placement


class Batch(NamedTuple):
    """Embeddings, class centres and labels that belong together.

    Attributes:
        embeddings: (N, d), ones in ignored rows: a NaN there reaches no gradient, and what depends
            on a length is finite.
        weight: (C, d) the class centres that take part here; (C * sub_centers, d).
        labels: (N,) int64 in [0, num_classes), 0 in ignored rows.
        own: (N,) int64, the row of ``weight`` that is the target's (nearest) centre, or -1 where
            that is not here.
        kept: (N,) which rows are not ignored; None where it is known that all are not.
        num_classes: The number of classes in all.
        sub_centers: The number of centres of a class.
        shard: Where the centres are, and how sums over the classes are completed.
    """

    embeddings: Tensor
    weight: Tensor
    labels: Tensor
    own: Tensor
    kept: Tensor | None
    num_classes: int
    sub_centers: int
    shard: Placement


def checked(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int | None = None,
    sub_centers: int = 1,
    shard: Placement = WHOLE,
) -> Batch:
    """The batch of what a user passes, checked by :func:`angular_losses.validation.batch`."""
    total = shard.all_classes
    kept = validation.batch(embeddings, weight, labels, ignore_index, sub_centers, total)
    num_classes = weight.shape[0] // sub_centers if total is None else total
    labels = labels.long()
    if torch.compiler.is_compiling():  # whose kernels may look labels up before they are asserted
        labels = labels.clamp(0, num_classes - 1)
    return of_rows(embeddings, weight, labels, kept, num_classes, sub_centers, shard)


def of_rows(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    kept: Tensor | None,
    num_classes: int,
    sub_centers: int,
    shard: Placement,
) -> Batch:
    """The batch of checked tensors."""
    if kept is not None:
        embeddings, labels = embeddings.where(kept[:, None], 1), labels.where(kept, 0)
    weight, own = shard.centres(weight, sub_centers), shard.local(labels)
    if sub_centers > 1:
        with without_autocast(embeddings.device):
            own = nearest_sub_centers(embeddings, weight, own, sub_centers)
    return Batch(embeddings, weight, labels, own, kept, num_classes, sub_centers, shard)

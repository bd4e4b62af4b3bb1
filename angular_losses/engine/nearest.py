"""Passes over the cosines of the other classes, in chunks of classes and without a graph.

They take embeddings (N, d), class centres ``weight`` (C, d), with sub-centres (C * sub_centers, d),
and labels (N,) int64 in [0, C), or -1 for a class that is not here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..geometry import (
    directions,
    inverse_lengths,
    precise_dtype,
    without_autocast,
    working_dtype,
)
from .chunks import multiply, replaced

# The number of centres in a chunk.
CHUNK = 1024


@torch.no_grad()
def nearest(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    k: int,
    *,
    sub_centers: int = 1,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """The cosines of the k nearest other classes (N, k), in the :func:`working_dtype`.

    The largest comes first, and -2 where there are fewer. The factors of the products are of
    ``product_dtype``, by default that of the cosines.

    Example:
        >>> nearest(torch.tensor([[3.0, 4.0]]), torch.eye(2), torch.tensor([1]), 1)
        tensor([[0.6000]])
    """
    dtype = working_dtype(embeddings, weight)
    found = embeddings.new_full((k, len(labels)), -2.0, dtype=dtype)
    for cosine in _others(embeddings, weight, labels, sub_centers, product_dtype or dtype):
        found = torch.cat([found, cosine]).topk(k, 0).values
    return found.T


@torch.no_grad()
def sums_above(
    embeddings: Tensor, weight: Tensor, labels: Tensor, threshold: Tensor, *, sub_centers: int = 1
) -> Tensor:
    """The sums and numbers (2, N) of other classes' cosines above a threshold (N,), in its dtype.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
        >>> sums_above(weight[:1], weight, torch.tensor([0]), torch.tensor([0.5]))
        tensor([[1.4000],
                [2.0000]])
    """
    total, count = 0.0 * threshold, 0.0 * threshold
    product_dtype = working_dtype(embeddings, weight)
    for cosine in _others(embeddings, weight, labels, sub_centers, product_dtype):
        above = cosine > threshold
        total += cosine.where(above, 0).sum(0)
        count += above.sum(0)
    return torch.stack([total, count])


def _others(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    sub_centers: int,
    product_dtype: torch.dtype,
) -> Iterator[Tensor]:
    """The cosines of each chunk's classes (K, N), -2 for the target's own; as the engine rounds."""
    dtype = working_dtype(embeddings, weight)
    unit = directions(embeddings, precise_dtype(embeddings.device)).to(dtype)
    factors, chunk = unit.to(product_dtype).T, max(1, CHUNK // sub_centers)
    for start in range(0, weight.shape[0] // sub_centers, chunk):
        rows = slice(start * sub_centers, (start + chunk) * sub_centers)
        centres = weight[rows] * inverse_lengths(weight[rows], dtype)
        with without_autocast(unit.device):
            cosine = multiply(centres.to(product_dtype), factors, dtype)
        cosine = cosine.view(len(centres) // sub_centers, sub_centers, len(labels)).amax(1)
        yield replaced(cosine, labels - start, -2.0)

"""Passes over the cosines of the other classes, in chunks of classes and without a graph."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..geometry import directions, inverse_lengths, precise_dtype, without_autocast
from .chunks import multiply


@torch.no_grad()
def nearest(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    k: int = 1,
    *,
    sub_centers: int = 1,
    chunk: int = 1024,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """The cosines of the k nearest other classes, in chunks of classes; without a graph.

    Args:
        embeddings: (N, d), floating point.
        weight: (C, d) class centres; with sub-centres (C * sub_centers, d).
        labels: (N,) int64 in [0, C), or -1 for a class that is not here.
        k: How many.
        sub_centers: The number of centres of a class.
        chunk: The number of centres in a chunk.
        product_dtype: The dtype of the factors of the products; by default that of the cosines.

    Returns:
        (N, k), the largest first, and -2 where there are fewer; float32, or float64 when either
        input is float64.

    Example:
        >>> nearest(torch.tensor([[3.0, 4.0]]), torch.eye(2), torch.tensor([1]))
        tensor([[0.6000]])
    """
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)
    found = embeddings.new_full((k, len(labels)), -2.0, dtype=dtype)
    for cosine in _others(embeddings, weight, labels, sub_centers, chunk, product_dtype):
        found = torch.cat([found, cosine]).topk(k, 0).values
    return found.T


@torch.no_grad()
def sums_above(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    threshold: Tensor,
    *,
    sub_centers: int = 1,
    chunk: int = 1024,
) -> Tensor:
    """The sum and number of other classes' cosines above a threshold, in chunks; without a graph.

    Args:
        embeddings: (N, d), floating point.
        weight: (C, d) class centres; with sub-centres (C * sub_centers, d).
        labels: (N,) int64 in [0, C), or -1 for a class that is not here.
        threshold: (N,) cosines.
        sub_centers: The number of centres of a class.
        chunk: The number of centres in a chunk.

    Returns:
        (2, N), the sums and the numbers, in the dtype of the threshold.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
        >>> sums_above(weight[:1], weight, torch.tensor([0]), torch.tensor([0.5]))
        tensor([[1.4000],
                [2.0000]])
    """
    total, count = 0.0 * threshold, 0.0 * threshold
    for cosine in _others(embeddings, weight, labels, sub_centers, chunk):
        above = cosine > threshold
        total += cosine.where(above, 0).sum(0)
        count += above.sum(0)
    return torch.stack([total, count])


def _others(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    sub_centers: int,
    chunk: int,
    product_dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """The cosines of each chunk's classes (K, N), -2 for the target's own; as the engine rounds."""
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)
    unit = directions(embeddings, precise_dtype(embeddings.device)).to(dtype)
    factors, chunk = unit.to(product_dtype or dtype).T, max(1, chunk // sub_centers)
    for start in range(0, weight.shape[0] // sub_centers, chunk):
        rows = slice(start * sub_centers, (start + chunk) * sub_centers)
        centres = weight[rows] * inverse_lengths(weight[rows], dtype)
        with without_autocast(unit.device):
            cosine = multiply(centres.to(factors.dtype), factors, dtype)
        cosine = cosine.view(len(centres) // sub_centers, sub_centers, len(labels)).amax(1)
        own = labels - start
        row = own.clamp(0, len(cosine) - 1)
        present = cosine.gather(0, row[None]).masked_fill(row == own, -2.0)
        yield cosine.scatter(0, row[None], present)

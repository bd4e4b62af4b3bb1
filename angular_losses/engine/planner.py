"""The planner: which mode of the margin softmax suits a size of batch, and the memory it takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import validation
from ..geometry import FEW_PRODUCTS

MODES = ("auto", "dense", "stash", "recompute")
DEFAULT_BUDGET = 256 * 2**20
# A smaller chunk than the first is slow; than the second, slower than the memory is worth.
SMALLEST_FAST_CHUNK = 1024
SMALLEST_CHUNK = 64
# Both passes are done at once over no more classes than rows, or than these where products are few.
FEW_AT_ONCE = 64
# Copies of a chunk's cosines that a function of negatives and its derivative take.
REWEIGHTING = 12


@dataclass(frozen=True)
class Plan:
    """How a batch of one size is run; made by :func:`plan`, printed as a sentence.

    Attributes:
        mode: "dense", "stash" or "recompute".
        chunk: How many classes are done at a time.
        product_dtype: The dtype of the factors of the matrix products.
        extra_bytes: The most memory taken beyond the arguments and their gradients, predicted.
        gradient_bytes: The memory of those gradients.

    Example:
        >>> print(plan(512, 100_000, 512))
        stash: chunks of 1024 classes, float32 products; 211 MiB beside 196 MiB of gradients
    """

    mode: str
    chunk: int
    product_dtype: torch.dtype
    extra_bytes: int
    gradient_bytes: int

    def __str__(self) -> str:
        dtype = str(self.product_dtype).removeprefix("torch.")
        extra, gradients = (round(size / 2**20) for size in (self.extra_bytes, self.gradient_bytes))
        return (
            f"{self.mode}: chunks of {self.chunk} classes, {dtype} products; "
            f"{extra} MiB beside {gradients} MiB of gradients"
        )


def plan(
    num_rows: int,
    num_classes: int,
    embedding_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    product_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    mode: str = "auto",
    memory_budget: int | None = None,
    reweighted: bool = False,
) -> Plan:
    """Choose mode and chunk for a size of batch, and predict the memory.

    "auto" takes "stash", three matrix products, where what it keeps fits the budget, and otherwise
    "recompute", four. Chunks become smaller where that makes "stash" fit, or where a
    ``memory_budget`` is given that they have to fit.

    Args:
        num_rows: The number of embeddings, N.
        num_classes: The number of classes, C.
        embedding_size: The length of an embedding, d.
        dtype: The dtype of embeddings and weight.
        product_dtype: The dtype of the products where autocast sets another.
        device: Where the tensors are.
        mode: "auto", "dense", "stash" or "recompute".
        memory_budget: Bytes that may be used beyond the arguments and their gradients; by default
            256 MiB, or as much as the gradients take where that is more.
        reweighted: Whether a function reweights the negatives, which takes more for each chunk.

    Returns:
        A :class:`Plan`.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If a number is out of range, the mode unknown, or the budget too small for it.

    Example:
        >>> plan(128, 1_000_000, 256, memory_budget=64 * 2**20).mode
        'recompute'
    """
    validation.choice("mode", mode, MODES)
    if num_rows != 0:  # an empty batch is one too
        num_rows = validation.positive_integer("num_rows", num_rows)
    num_classes = validation.positive_integer("num_classes", num_classes)
    embedding_size = validation.positive_integer("embedding_size", embedding_size)
    working = torch.promote_types(dtype, torch.float32)
    product = working if product_dtype is None else product_dtype
    gradient_bytes = (num_rows + num_classes) * embedding_size * dtype.itemsize
    budget = max(DEFAULT_BUDGET, gradient_bytes)
    if memory_budget is not None:
        budget = validation.positive_integer("memory_budget", memory_budget)

    def extra(mode: str, chunk: int) -> int:
        extra_bytes = _extra_bytes(
            mode, num_rows, num_classes, embedding_size, chunk, dtype, product
        )
        per_chunk = 0 if mode == "dense" else chunk * num_rows * working.itemsize
        return extra_bytes + (REWEIGHTING * per_chunk if reweighted else 0)

    largest = min(num_classes, _chunk(num_rows, torch.device(device)))
    chunk = num_classes if mode == "dense" else largest
    if mode == "auto":
        fast = _fitting(lambda chunk: extra("stash", chunk), budget, largest, SMALLEST_FAST_CHUNK)
        fits = extra("stash", fast) <= budget
        mode, chunk = ("stash", fast) if fits else ("recompute", largest)
    if memory_budget is not None and mode != "dense":
        chunk = _fitting(lambda chunk: extra(mode, chunk), budget, chunk, SMALLEST_CHUNK)
    if mode == "dense":
        product = working
    needed = extra(mode, chunk)
    if memory_budget is not None and needed > budget:
        raise ValueError(
            f"memory_budget: expected at least {needed} bytes for mode {mode!r} with "
            f"{num_rows} rows and {num_classes} classes, got {memory_budget}"
        )
    return Plan(mode, chunk, product, needed, gradient_bytes)


# The same batch comes again and again. (The compiler traces the function itself.)
cached_plan = functools.lru_cache(1024)(plan)


def _fitting(extra: Callable[[int], int], budget: int, chunk: int, least: int) -> int:
    """The largest chunk that fits the budget, or the least allowed."""
    while extra(chunk) > budget and chunk > least:
        chunk = max(least, chunk // 2)
    return chunk


def _chunk(num_rows: int, device: torch.device) -> int:
    """Classes in a chunk: on the CPU what its cache holds, elsewhere work enough for a launch."""
    if device.type == "cpu":
        return 2048 if num_rows < 256 else 1024
    return max(4096, min(65536, 2**24 // max(1, num_rows)) // 4096 * 4096)


def fits_at_once(rows: int, classes: int, size: int, chunk: int) -> bool:
    """Whether the classes are so few that both passes can be done at once."""
    most = max(rows, FEW_AT_ONCE) if rows * size * classes <= FEW_PRODUCTS else rows
    return classes <= min(chunk, most)


def _extra_bytes(
    mode: str,
    rows: int,
    classes: int,
    size: int,
    chunk: int,
    dtype: torch.dtype,
    product_dtype: torch.dtype,
) -> int:
    """The peak over forward and backward of what the modes allocate, as measured."""
    working, product = torch.promote_types(dtype, torch.float32).itemsize, product_dtype.itemsize
    if mode == "dense":
        return (4 * rows * classes + classes * size) * working + 7 * 8 * rows * size
    # In the chunk: the centres and a scratch, E where that is not kept, and more where its dtype is
    # not the working one.
    in_chunk = chunk * 2 * size * working
    if mode == "recompute":
        in_chunk += chunk * rows * product
    if product != working:
        in_chunk += chunk * (rows * working + size * product)
    if dtype.itemsize != working:
        in_chunk += chunk * size * working
    kept = rows * classes * product if mode == "stash" else 0
    extra = kept + in_chunk + (11 * rows * size + classes) * working
    if rows * size * classes <= FEW_PRODUCTS and fits_at_once(rows, classes, size, chunk):
        at_once = (28 - dtype.itemsize) * (rows + classes) * size + 8 * rows * (classes + 16)
        extra = max(extra, at_once)
    return extra

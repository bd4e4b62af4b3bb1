"""An optional Triton kernel: the exponentials of a chunk in the epilogue of the product.

Done by torch, the logits of a chunk are written, read to be exponentiated, read to be summed and
read to be rounded; here they never leave the registers. Triton is imported at the first use.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton
    import triton.language as tl

# What one program computes, and the depth it loads at a time: 96 KiB of shared memory in bfloat16.
TILE = {"tile_classes": 128, "tile_rows": 128, "tile_depth": 64}
# Fusion is the default, but Triton 3.9 warns where that is not stated.
OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}


def is_available(device: torch.device, product_dtype: torch.dtype) -> bool:
    """Whether :func:`exponentials` can run with tensors of this device and product dtype.

    It can where Triton is installed: in bfloat16 on an NVIDIA GPU of compute capability 8.0 or more
    (in float32 it would have to do without tensor cores, and in float16 exp overflows), and to be
    tested in float32 on the CPU where the environment asks for Triton's interpreter, which is
    silently wrong in bfloat16.
    """
    if device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if interpreted:
        suits = device.type == "cpu" and product_dtype == torch.float32
    else:
        suits = (
            device.type == "cuda"
            and product_dtype == torch.bfloat16
            and torch.version.hip is None
            and torch.cuda.is_available()
            and torch.cuda.get_device_capability(device) >= (8, 0)
        )
    return suits and find_spec("triton") is not None


def exponentials(
    centres: Tensor, scaled: Tensor, labels: Tensor, start: int, shift: Tensor | None, out: Tensor
) -> Tensor:
    """Exp(s cos - shift) of a chunk of classes, 0 for the target of a row, and its sums.

    Products, exponentials and sums are in float32, and bitwise the same in every run.

    Args:
        centres: (K, d) directions of the chunk's centres, in the product dtype.
        scaled: (N, d) directions of the embeddings times the scale, in the product dtype.
        labels: (N,) int64 class indices; one outside of [start, start + K) has no target here.
        start: The index of the chunk's first class.
        shift: (N,) float32, what is subtracted from a row's logits, or None.
        out: (K, N) in the product dtype, contiguous; overwritten with the exponentials.

    Returns:
        (N,) float32, the sums over the chunk's classes of the exponentials before their rounding.
    """
    if not out.is_contiguous():
        raise ValueError("exponentials: out must be contiguous")
    (num_classes, size), num_rows = centres.shape, scaled.shape[0]
    class_tiles = -(-num_classes // TILE["tile_classes"])
    row_tiles = -(-num_rows // TILE["tile_rows"])
    sums = torch.empty(class_tiles, num_rows, dtype=torch.float32, device=out.device)
    factors = (tensor.contiguous() for tensor in (centres, scaled, labels))
    shift = None if shift is None else shift.contiguous()
    with torch.cuda.device(out.get_device()):  # -1 on the CPU, which changes nothing
        _compiler()[(class_tiles * row_tiles,)](
            *factors, shift, out, sums, start, num_classes, num_rows, size, **TILE, **OPTIONS
        )
    return sums.sum(0)


@cache
def _compiler() -> triton.JITFunction:
    """The kernel, to be launched; compiled at its first launch."""
    global tl
    import triton
    import triton.language as tl

    # These two differ between the chunks of a run, and would have it compiled again.
    return triton.jit(_kernel, do_not_specialize=["start", "num_classes"])


def _kernel(
    centres: tl.tensor,
    scaled: tl.tensor,
    labels: tl.tensor,
    shift: tl.tensor,  # or None
    out: tl.tensor,
    sums: tl.tensor,
    start: tl.tensor,
    num_classes: tl.tensor,
    num_rows: tl.tensor,
    size: tl.constexpr,
    tile_classes: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_depth: tl.constexpr,
) -> None:
    """One tile of ``out``, and of ``sums`` the part over its classes: (class tiles, N)."""
    class_tiles, row_tiles = tl.cdiv(num_classes, tile_classes), tl.cdiv(num_rows, tile_rows)
    program = tl.program_id(0)
    # Programs that run at the same time share their factors in the cache.
    i, j = tl.swizzle2d(program // row_tiles, program % row_tiles, class_tiles, row_tiles, 8)
    # In 64 bits, as is every offset made of them: K N may exceed 2^31.
    i, j = i.to(tl.int64), j.to(tl.int64)
    classes = i * tile_classes + tl.arange(0, tile_classes)
    rows = j * tile_rows + tl.arange(0, tile_rows)
    is_class, is_row = classes < num_classes, rows < num_rows

    logits = tl.zeros((tile_classes, tile_rows), tl.float32)
    for first in range(0, size, tile_depth):
        depth = first + tl.arange(0, tile_depth)
        is_depth = depth < size
        left = tl.load(
            centres + classes[:, None] * size + depth[None, :],
            mask=is_class[:, None] & is_depth[None, :],
            other=0.0,
        )
        right = tl.load(
            scaled + rows[None, :] * size + depth[:, None],
            mask=is_row[None, :] & is_depth[:, None],
            other=0.0,
        )
        logits = tl.dot(left, right, logits, input_precision="ieee")

    if shift is not None:
        logits -= tl.load(shift + rows, mask=is_row, other=0.0)[None, :]
    own = tl.load(labels + rows, mask=is_row, other=0) - start
    is_negative = is_class[:, None] & (classes[:, None] != own[None, :])
    # Selected and not multiplied: a target may overflow.
    exponentials = tl.where(is_negative, tl.exp(logits), 0.0)
    tl.store(sums + i * num_rows + rows, tl.sum(exponentials, 0), mask=is_row)
    tl.store(
        out + classes[:, None] * num_rows + rows[None, :],
        exponentials.to(out.dtype.element_ty),
        mask=is_class[:, None] & is_row[None, :],
    )

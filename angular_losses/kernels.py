"""An optional Triton kernel: E = exp(s cos - shift) in the epilogue of its matrix product.

Without it, the logits of a chunk go to memory and come back three times on their way to E. The
engine imports this module when it first meets a CUDA device; without Triton it does without.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CLASSES, ROWS, DIMENSIONS = 128, 128, 64  # of a tile


def suits(device: torch.device, product_dtype: torch.dtype) -> bool:
    """Whether the kernel is worth its while: bfloat16 products on sm_80 or newer.

    In float32, tensor cores would round the factors to TF32, and without them cuBLAS is faster.
    """
    return (
        device.type == "cuda"
        and product_dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def exponentials(
    centres: Tensor,
    scaled: Tensor,
    labels: Tensor,
    start: int,
    shift: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Write E of a chunk of classes and return its sums over them.

    Args:
        centres: (K, d) directions of the chunk's centres, contiguous.
        scaled: (N, d) directions of the embeddings times the scale, contiguous, the same dtype.
        labels: (N,) int64; E is 0 for the class that a row's label names.
        start: The label of the chunk's first class.
        shift: (N,) float32, or None for 0.
        out: (K, N) contiguous, for E.

    Returns:
        (N,) float32: the sums of E before it is rounded to the dtype of ``out``. Each tile has a
        place of its own for its sum, so the result is the same every time.
    """
    (num_classes, size), num_rows = centres.shape, scaled.shape[0]
    tiles = (triton.cdiv(num_rows, ROWS), triton.cdiv(num_classes, CLASSES))
    sums = torch.zeros(tiles[1], num_rows, dtype=torch.float32, device=out.device)
    if num_rows:
        with torch.cuda.device_of(out):
            # Rows of tiles vary fastest: the centres, which are many, are read once.
            exponentials_kernel[tiles](
                centres,
                scaled,
                labels,
                labels if shift is None else shift,
                out,
                sums,
                num_classes,
                num_rows,
                size,
                start,
                HAS_SHIFT=shift is not None,
                CLASSES=CLASSES,
                ROWS=ROWS,
                DIMENSIONS=DIMENSIONS,
                num_warps=8,
                num_stages=3,
                enable_fp_fusion=True,
            )
    return sums.sum(0)


@triton.jit
def exponentials_kernel(  # noqa: D103, ANN201
    centres,  # noqa: ANN001
    scaled,  # noqa: ANN001
    labels,  # noqa: ANN001
    shift,  # noqa: ANN001
    out,  # noqa: ANN001
    sums,  # noqa: ANN001
    num_classes,  # noqa: ANN001
    num_rows,  # noqa: ANN001
    size,  # noqa: ANN001
    start,  # noqa: ANN001
    HAS_SHIFT: tl.constexpr,  # noqa: N803
    CLASSES: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    DIMENSIONS: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    is_row, is_class = row < num_rows, index < num_classes
    of_centres = centres + index.to(tl.int64)[:, None] * size
    of_scaled = scaled + row.to(tl.int64)[None, :] * size
    logits = tl.zeros((CLASSES, ROWS), dtype=tl.float32)
    for first in range(0, size, DIMENSIONS):
        dimension = first + tl.arange(0, DIMENSIONS)
        inside = dimension < size
        left = tl.load(
            of_centres + dimension[None, :], mask=is_class[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            of_scaled + dimension[:, None], mask=is_row[None, :] & inside[:, None], other=0.0
        )
        logits = tl.dot(left, right, logits, input_precision="ieee")
    if HAS_SHIFT:
        logits -= tl.load(shift + row, mask=is_row, other=0.0)[None, :]
    own = tl.load(labels + row, mask=is_row, other=-1) - start
    is_negative = is_class[:, None] & (index[:, None] != own[None, :])
    exponential = tl.where(is_negative, tl.exp(logits), 0.0)
    tl.store(
        sums + tl.program_id(1).to(tl.int64) * num_rows + row, tl.sum(exponential, 0), mask=is_row
    )
    tl.store(
        out + index.to(tl.int64)[:, None] * num_rows + row[None, :],
        exponential.to(out.dtype.element_ty),
        mask=is_class[:, None] & is_row[None, :],
    )

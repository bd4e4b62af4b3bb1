"""Labels as a user passes them: one a row, or several with a weight for each."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import validation
from ..geometry import precise_dtype


def several(
    embeddings: Tensor,
    labels: Tensor,
    label_weight: Tensor | None,
    ignore_index: int,
    num_classes: int,
) -> tuple[Tensor, Tensor | None]:
    """Labels (N,), not checked, without weights; or (N, K) with their weights (N, K)."""
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        if label_weight is not None:
            raise ValueError("label_weight: expected it with labels (N, K)")
        return labels, None
    validation.floating("embeddings", embeddings, "N", "d")
    if labels.shape[0] != embeddings.shape[0] or not labels.shape[1]:
        raise ValueError(
            f"labels: expected shape ({embeddings.shape[0]},), or ({embeddings.shape[0]}, K) "
            f"with K labels an embedding, got {tuple(labels.shape)}"
        )
    is_wide = labels.shape[1] == num_classes > 2 and ignore_index not in (0, 1)
    is_read = is_wide and label_weight is None and validation.is_readable(labels)
    if is_read and labels.numel() and torch.equal(labels.long(), labels.long().clamp(0, 1)):
        raise ValueError(
            "labels: expected numbers of classes, got (N, C) zeros and ones; pass "
            "labels.argmax(1), or with several labels a row their numbers (N, K)"
        )
    if label_weight is None:
        kept = (labels.long() != ignore_index).to(precise_dtype(labels.device))
        return labels, kept / kept.sum(1, keepdim=True).clamp(min=1)
    validation.floating("label_weight", label_weight, *labels.shape, device=embeddings.device)
    return labels, label_weight


def mixed(
    embeddings: Tensor, labels: Tensor, other_labels: Tensor, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Labels (N, 2) of mixed rows, and their weights (N, 2), from two checked labels a row."""
    device, num_rows = embeddings.device, labels.shape[0]
    if isinstance(lam, Tensor) and not lam.dim() and lam.device != device:
        lam = lam.item() if validation.is_readable(lam) else lam
    if not isinstance(lam, Tensor):  # filled on the device, without a copy from the host
        validation.share("lam", lam)
        lam = embeddings.new_full((), lam, dtype=precise_dtype(device))
    elif lam.dim():
        validation.floating("lam", lam, num_rows, device=device)
    if validation.is_readable(lam):
        outside = lam[~((lam >= 0) & (lam <= 1))]
        if len(outside):
            raise ValueError(f"lam: expected a share in [0, 1], got {outside[0].item()}")
    share = lam.to(device).expand(num_rows)
    both = torch.stack([labels.long(), other_labels.long()], 1)
    return both, torch.stack([share, 1 - share], 1)


def of_rows(label_weight: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the labels (N, K), row by row: how much each counts, and its weight (N * K,)."""
    counts = label_weight.flatten()
    if sample_weight is None:
        return counts, counts
    num_rows, each = label_weight.shape
    validation.floating("sample_weight", sample_weight, num_rows, device=label_weight.device)
    return counts, counts * sample_weight.repeat_interleave(each)

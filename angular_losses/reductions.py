"""From the losses of the rows to the loss of a batch: weights, ignored rows, reductions."""

from __future__ import annotations

from torch import Tensor

from . import checks

REDUCTIONS = ("mean", "sum", "none")


def check_weights(
    embeddings: Tensor,
    num_classes: int,
    reduction: str,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
    penalty: Tensor | None,
) -> None:
    """Raise unless these options fit the batch."""
    num_rows, device = embeddings.shape[0], embeddings.device
    checks.choice("reduction", reduction, REDUCTIONS)
    if class_weight is not None:
        checks.floating("class_weight", class_weight, num_classes, device=device)
    if sample_weight is not None:
        checks.floating("sample_weight", sample_weight, num_rows, device=device)
    if penalty is not None:
        checks.floating("penalty", penalty, num_rows, device=device)


def without_ignored(embeddings: Tensor, kept: Tensor | None) -> Tensor:
    """The embeddings (N, d), zero in the rows that are not kept: a NaN there reaches no gradient.

    Args:
        embeddings: (N, d).
        kept: (N,) which rows are not ignored; None where all are kept.
    """
    return embeddings if kept is None else embeddings.where(kept[:, None], 0)


def reduce(
    total: Tensor,
    reduction: str,
    *,
    of_class: Tensor | None,
    sample_weight: Tensor | None,
    kept: Tensor | None,
) -> Tensor:
    """The loss of a batch, from the losses of its rows (N,).

    Args:
        total: (N,), with the weights of the classes in it.
        reduction: "mean", weighted, "sum" or "none".
        of_class: (N,) the weight of each row's class, or None.
        sample_weight: (N,) the weight of each row on top of that, or None.
        kept: (N,) which rows are not ignored; None where all are kept.
    """
    row_weight = None if kept is None else kept.to(total.dtype)
    if sample_weight is not None:
        row_weight = sample_weight.to(total.dtype)
        row_weight = row_weight if kept is None else row_weight.where(kept, 0)
    if row_weight is not None:
        total = total * row_weight
    if reduction == "none":
        return total
    if reduction == "sum" or total.numel() == 0:
        return total.sum()
    if of_class is not None:
        row_weight = of_class if row_weight is None else of_class * row_weight
    if row_weight is None:
        return total.mean()
    denominator = row_weight.sum()
    return total.sum() / denominator.masked_fill(denominator == 0, 1)

"""The margin softmax: one loss for every margin, with the margin on the target logit alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks
from .geometry import angle_between, cosines
from .margins import MarginFunction


def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: MarginFunction,
    scale: float | Tensor,
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    r"""Softmax cross-entropy of scaled cosines, with a margin on the target's.

    .. math:: L_i = \log\Bigl(1 + \sum_{j \ne y_i} e^{z_{ij} - f_i}\Bigr), \qquad
        z_{ij} = s\cos\theta_{ij}, \quad f_i = s\,\mathrm{margin}(\theta_{i y_i})

    In exact arithmetic this is ``F.cross_entropy(logits, labels)`` with ``logits = scale *
    cosines(embeddings, weight)`` whose target column is replaced by f. Here the loss keeps its
    relative precision (a few scale * eps) however small it is, where cross_entropy returns 0, and
    the target's angle and gradient are exact at every angle (:func:`angle_between`). The products
    run in float32 at least, under autocast too.

    Args:
        embeddings: (N, d), floating point, of any finite length.
        weight: (C, d) class centres, floating point, of any finite length.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        margin: A function of the target angles theta (N,), in radians, float64, that returns the
            target logits before scaling (N,): one of :mod:`angular_losses.margins`, such as
            ``lambda theta: arcface(theta, 0.5)``, or your own.
        scale: The scale s > 0, a float or an (N,) tensor.
        reduction: "mean" (weighted by ``class_weight``, ignored rows left out), "sum" or "none".
        class_weight: (C,) weight of each class, as in ``F.cross_entropy``.
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1), as in
            ``F.cross_entropy``.
        ignore_index: Rows with this label have loss 0 and gradient 0.

    Returns:
        A scalar, or (N,) for reduction "none"; float32, or float64 for float64 input. The mean
        over no rows (an empty batch, or all of it ignored) is 0 with zero gradients.

    Raises:
        TypeError: If a dtype is wrong, or ``margin`` is not a function of theta.
        ValueError: If a shape, a device, a label or an option is out of place; the message starts
            with the argument's name.

    Example:
        >>> from angular_losses import arcface
        >>> embeddings, weight = torch.tensor([[1.0, 0.0]]), torch.eye(2)
        >>> loss = margin_softmax_loss(
        ...     embeddings, weight, torch.tensor([0]),
        ...     margin=lambda theta: arcface(theta, 0.5), scale=64.0,
        ... )
        >>> f"{loss.item():.3e}"
        '4.053e-25'
    """
    checks.batch(embeddings, weight, labels, ignore_index)
    _check_options(margin, scale, reduction, class_weight, label_smoothing, embeddings, weight)
    kept = labels != ignore_index
    labels = labels.long().where(kept, 0)
    with torch.autocast(embeddings.device.type, enabled=False):
        theta = angle_between(embeddings, weight.index_select(0, labels))
        target = scale * _check_target(margin(theta), theta)
        cosine = cosines(embeddings, weight)
        loss = F.softplus(
            _log_negatives(cosine, labels, scale, target.dtype) - target, threshold=50
        )
        row_weight = kept.to(loss.dtype)
        if class_weight is not None:
            row_weight = row_weight * class_weight.to(loss.dtype).index_select(0, labels)
        total = loss * row_weight
        if label_smoothing:
            smooth = _uniform_cross_entropy(cosine, labels, scale, target, loss, class_weight)
            total = (1 - label_smoothing) * total + label_smoothing * smooth * kept
        return _reduce(total, row_weight, reduction).to(cosine.dtype)


def _log_negatives(
    cosine: Tensor, labels: Tensor, scale: float | Tensor, dtype: torch.dtype
) -> Tensor:
    """Log of the sum over j != y of exp(scale cos_j): (N,), the log itself in ``dtype``."""
    if cosine.shape[1] == 1:
        return cosine.new_full(cosine.shape[:1], -torch.inf, dtype=dtype)
    column = labels[:, None]
    largest = cosine.detach().scatter(1, column, -torch.inf).amax(1, keepdim=True)
    # The largest is subtracted from the cosines, not from the logits: that difference is nearly
    # exact, while scale * cosine would round to an ulp of 64 first. The target's own difference is
    # set to 0 before the exponential, which could overflow, and its term to 0 after it.
    exponent = _column(scale) * (cosine - largest).scatter(1, column, 0.0)
    summed = exponent.exp().scatter(1, column, 0.0).sum(1)
    return scale * largest[:, 0].to(dtype) + summed.to(dtype).log()


def _uniform_cross_entropy(
    cosine: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    target: Tensor,
    loss: Tensor,
    class_weight: Tensor | None,
) -> Tensor:
    """The cross-entropy against all classes alike, each by its class weight, divided by C: (N,)."""
    logits = (_column(scale) * cosine).to(target.dtype).scatter(1, labels[:, None], target[:, None])
    per_class = (target + loss)[:, None] - logits
    if class_weight is not None:
        per_class = per_class * class_weight.to(per_class.dtype)
    return per_class.mean(1)


def _reduce(total: Tensor, row_weight: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return total
    if reduction == "sum":
        return total.sum()
    denominator = row_weight.sum()
    return total.sum() / denominator.masked_fill(denominator == 0, 1)


def _column(scale: float | Tensor) -> float | Tensor:
    return scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale


def _check_options(
    margin: object,
    scale: object,
    reduction: str,
    class_weight: Tensor | None,
    label_smoothing: float,
    embeddings: Tensor,
    weight: Tensor,
) -> None:
    if not callable(margin):
        raise TypeError(
            "margin: expected a function of the target angle theta, such as "
            f"`lambda theta: arcface(theta, 0.5)`, got {margin!r}"
        )
    if isinstance(scale, Tensor):
        if scale.dim():
            checks.floating("scale", scale, embeddings.shape[0], device=embeddings.device)
    else:
        checks.positive("scale", scale)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.number("label_smoothing", label_smoothing, 0.0, 1.0)
    if class_weight is not None:
        checks.floating("class_weight", class_weight, weight.shape[0], device=embeddings.device)


def _check_target(target: object, theta: Tensor) -> Tensor:
    if not isinstance(target, Tensor):
        raise TypeError(f"margin: expected it to return a tensor, got {target!r}")
    if target.shape != theta.shape:
        raise ValueError(
            f"margin: expected one target logit a sample, shape {tuple(theta.shape)}, "
            f"got {tuple(target.shape)}"
        )
    return target.to(theta.dtype)

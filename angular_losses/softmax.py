"""The margin softmax: one loss for every margin, with the margin on the target logit alone.

Each mode finds the same three numbers for every row, :class:`angular_losses.engine.Parts`; the loss
is made of them here, once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks
from .engine import Parts, margin_parts, working_dtype
from .geometry import angle_between, cosines
from .margins import MarginFunction
from .planner import MODES, Plan, plan

# With fewer classes the products cost little beside any network, and keep full precision under
# autocast.
FEW_CLASSES = 4096


def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: MarginFunction,
    scale: float | Tensor,
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mode: str = "auto",
    memory_budget: int | None = None,
) -> Tensor:
    r"""Softmax cross-entropy of scaled cosines, with a margin on the target's.

    .. math:: L_i = \log\Bigl(1 + \sum_{j \ne y_i} e^{z_{ij} - f_i}\Bigr), \qquad
        z_{ij} = s\cos\theta_{ij}, \quad f_i = s\,\mathrm{margin}(\theta_{i y_i})

    In exact arithmetic this is ``F.cross_entropy(logits, labels)`` with ``logits = scale *
    cosines(embeddings, weight)`` whose target column is replaced by f. Here the loss keeps its
    relative precision (a few scale * eps) however small it is, where cross_entropy returns 0, and
    the target's angle and gradient are exact at every angle (:func:`angle_between`).

    The modes differ in their rounding only. "stash" keeps one N x C matrix for the backward pass,
    "recompute" one chunk of classes at a time; "dense" is plain PyTorch with several such matrices,
    and alone has second derivatives and works inside ``torch.func``. The products run in float32 at
    least, but in bfloat16 under autocast, unless the classes are few (up to 4096) or the mode is
    "dense"; weight and gradients stay as they are.

    Args:
        embeddings: (N, d), floating point, of any finite length.
        weight: (C, d) class centres, floating point, of any finite length.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        margin: A function of the target angles theta (N,), in radians, float64, that returns the
            target logits before scaling (N,): one of :mod:`angular_losses.margins`, such as
            ``lambda theta: arcface(theta, 0.5)``, or your own.
        scale: The scale s > 0, a float or an (N,) tensor.
        reduction: "mean" (weighted by ``class_weight`` and ``sample_weight``, ignored rows left
            out), "sum" or "none".
        class_weight: (C,) weight of each class, as in ``F.cross_entropy``.
        sample_weight: (N,) weight of each row, on top of that of its class.
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1), as in
            ``F.cross_entropy``.
        ignore_index: Rows with this label have loss 0 and gradient 0.
        mode: "auto", "dense", "stash" or "recompute". "auto" is :func:`plan`'s choice of the last
            two, but "dense" inside ``torch.func``.
        memory_budget: Bytes that may be used beyond the arguments and their gradients; by default
            as :func:`plan` says.

    Returns:
        A scalar, or (N,) for reduction "none"; float32, or float64 for float64 input. The mean
        over no rows (an empty batch, or all of it ignored) is 0 with zero gradients.

    Raises:
        TypeError: If a dtype is wrong, or ``margin`` is not a function of theta.
        ValueError: If a shape, a device, a label or an option is out of place; the message starts
            with the argument's name.
        RuntimeError: In the backward pass, if a second derivative is asked of "stash" or
            "recompute".

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
    kept = checks.batch(embeddings, weight, labels, ignore_index)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    checks.number("label_smoothing", label_smoothing, 0.0, 1.0)
    _check_tensors(embeddings, weight, margin, scale, class_weight, sample_weight)
    chosen = _plan(embeddings, weight, mode, memory_budget)
    labels = labels.long() if kept is None else labels.long().where(kept, 0)
    dtype = working_dtype(embeddings, weight)
    if class_weight is not None:
        class_weight = class_weight.to(dtype)
    share = _class_share(weight, class_weight, dtype) if label_smoothing else None
    with torch.autocast(embeddings.device.type, enabled=False):
        parts = _parts(embeddings, weight, labels, scale, share, chosen)
        target = scale * _check_target(margin(parts.theta), parts.theta)
        loss = F.softplus(parts.log_negatives - target, threshold=50)
        total = loss
        row_weight = None if kept is None else kept.to(loss.dtype)
        if sample_weight is not None:
            row_weight = _product(sample_weight.to(loss.dtype), row_weight)
        if class_weight is not None:
            of_class = class_weight.index_select(0, labels)
            total = total * of_class
        if share is not None:
            smooth = _uniform_cross_entropy(parts, target, loss, labels, scale, share)
            total = (1 - label_smoothing) * total + label_smoothing * smooth
        if row_weight is not None:
            total = total * row_weight
        if class_weight is not None:
            row_weight = _product(of_class, row_weight)
        return _reduce(total, row_weight, reduction).to(dtype)


def _plan(embeddings: Tensor, weight: Tensor, mode: str, memory_budget: int | None) -> Plan:
    """:func:`plan` for these tensors, as autocast and torch.func have it."""
    checks.choice("mode", mode, MODES)
    if mode == "auto" and (checks.is_transformed(embeddings) or checks.is_transformed(weight)):
        mode = "dense"
    (num_rows, size), num_classes, device = embeddings.shape, weight.shape[0], weight.device
    product_dtype = None
    if (
        num_classes > FEW_CLASSES
        and working_dtype(embeddings, weight) == torch.float32
        and torch.is_autocast_enabled(device.type)
        and torch.get_autocast_dtype(device.type) != torch.float32
    ):
        product_dtype = torch.bfloat16  # for float16 too, whose range cannot hold E
    return plan(
        num_rows,
        num_classes,
        size,
        dtype=weight.dtype,
        product_dtype=product_dtype,
        device=device,
        mode=mode,
        memory_budget=memory_budget,
    )


def _parts(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    share: Tensor | None,
    chosen: Plan,
) -> Parts:
    """The angle, the negatives and the mean cosine, in the mode chosen."""
    if chosen.mode != "dense":
        return margin_parts(
            embeddings,
            weight,
            labels,
            row_scale=scale.expand(len(labels)) if isinstance(scale, Tensor) else None,
            class_share=share,
            scale=1.0 if isinstance(scale, Tensor) else float(scale),
            chunk=chosen.chunk,
            product_dtype=chosen.product_dtype,
            stash=chosen.mode == "stash",
        )
    theta = angle_between(embeddings, weight.index_select(0, labels))
    cosine = cosines(embeddings, weight)
    mean_cosine = cosine.new_zeros(len(labels)) if share is None else cosine @ share
    return Parts(theta, _log_negatives(cosine, labels, scale, theta.dtype), mean_cosine)


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
    by_row = scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale
    exponent = by_row * (cosine - largest).scatter(1, column, 0.0)
    summed = exponent.exp().scatter(1, column, 0.0).sum(1)
    return scale * largest[:, 0].to(dtype) + summed.to(dtype).log()


def _class_share(weight: Tensor, class_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The share of each class in the mean over classes, (C,)."""
    even = weight.new_full((weight.shape[0],), 1 / weight.shape[0], dtype=dtype)
    return even if class_weight is None else even * class_weight


def _uniform_cross_entropy(
    parts: Parts,
    target: Tensor,
    loss: Tensor,
    labels: Tensor,
    scale: float | Tensor,
    share: Tensor,
) -> Tensor:
    """The cross-entropy against all classes, each by its share: (N,)."""
    own = share.index_select(0, labels)
    mean_logit = scale * (parts.mean_cosine - own * parts.theta.cos()) + own * target
    return share.sum() * (target + loss) - mean_logit


def _product(first: Tensor, second: Tensor | None) -> Tensor:
    return first if second is None else first * second


def _reduce(total: Tensor, row_weight: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return total
    if reduction == "sum" or total.numel() == 0:
        return total.sum()
    if row_weight is None:
        return total.mean()
    denominator = row_weight.sum()
    return total.sum() / denominator.masked_fill(denominator == 0, 1)


def _check_tensors(
    embeddings: Tensor,
    weight: Tensor,
    margin: object,
    scale: object,
    class_weight: Tensor | None,
    sample_weight: Tensor | None,
) -> None:
    if not callable(margin):
        raise TypeError(
            "margin: expected a function of the target angle theta, such as "
            f"`lambda theta: arcface(theta, 0.5)`, got {margin!r}"
        )
    (num_rows, _), device = embeddings.shape, embeddings.device
    if not isinstance(scale, Tensor):
        checks.positive("scale", scale)
    elif scale.dim():
        checks.floating("scale", scale, num_rows, device=device)
    if class_weight is not None:
        checks.floating("class_weight", class_weight, weight.shape[0], device=device)
    if sample_weight is not None:
        checks.floating("sample_weight", sample_weight, num_rows, device=device)


def _check_target(target: object, theta: Tensor) -> Tensor:
    if not isinstance(target, Tensor):
        raise TypeError(f"margin: expected it to return a tensor, got {target!r}")
    if target.shape != theta.shape:
        raise ValueError(
            f"margin: expected one target logit a sample, shape {tuple(theta.shape)}, "
            f"got {tuple(target.shape)}"
        )
    return target.to(theta.dtype)

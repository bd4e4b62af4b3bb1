"""The losses as functions: the margin softmax, and one class versus the rest.

Each mode finds the same three numbers for every row, :class:`.Parts`; the loss is made of
them here, once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from . import validation
from .engine import modes
from .engine.chunks import PLAIN, Rule
from .engine.passes import working_dtype
from .engine.placement import WHOLE, Shard, Whole
from .geometry import angle_between, nearest_sub_centers, without_autocast
from .margins import MarginFunction
from .negatives import NegativeFunction

REDUCTIONS = ("mean", "sum", "none")


def margin_softmax_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    margin: MarginFunction,
    scale: float | Tensor,
    negatives: NegativeFunction | None = None,
    sub_centers: int = 1,
    normalize_weight: bool = True,
    penalty: Tensor | None = None,
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mode: str = "auto",
    memory_budget: int | None = None,
    shard: Shard | Whole = WHOLE,
) -> Tensor:
    r"""Softmax cross-entropy of scaled cosines, with a margin on the target's.

    .. math:: L_i = \log\Bigl(1 + \sum_{j \ne y_i} e^{z_{ij} - f_i}\Bigr), \qquad
        z_{ij} = s\cos\theta_{ij}, \quad f_i = s\,\mathrm{margin}(\theta_{i y_i})

    In exact arithmetic this is ``F.cross_entropy(logits, labels)`` with ``logits = scale *
    cosines(embeddings, weight)`` whose target column is replaced by f. Here the loss keeps its
    relative precision (a few scale * eps) down to 1e-38, where cross_entropy returns 0, and
    the target's angle and gradient are exact at every angle (:func:`angle_between`).

    The modes differ in their rounding only. "stash" keeps one N x C matrix for the backward pass,
    "recompute" one chunk of classes at a time; "dense" is plain PyTorch with several such matrices,
    and alone has second derivatives and works inside ``torch.func``. The products run in float32 at
    least, but in bfloat16 under autocast, unless the classes are few (up to 4096) or the mode is
    "dense"; weight and gradients stay as they are.

    Args:
        embeddings: (N, d), floating point, of any finite length (below 6e-34, in float16 2e-4, a
            vector counts as zero: no direction, no gradient, pi / 2 from everything).
        weight: (C, d) class centres, floating point, likewise.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        margin: A function of the target angles theta (N,), in radians, float64, that returns the
            target logits before scaling (N,): one of :mod:`angular_losses.margins`, such as
            ``lambda theta: arcface(theta, 0.5)``, or your own.
        scale: The scale s > 0, a float or an (N,) tensor.
        negatives: A function that reweights the other classes: from some of their cosines (K, N)
            and the target logits before scaling (N,), without a graph, to what takes the place of
            those cosines (K, N): one of :mod:`angular_losses.negatives`, or your own. It must
            treat every cosine by itself and have a finite derivative. By default the cosines stay
            as they are.
        sub_centers: The number of centres of a class, K. ``weight`` is (C * K, d) then, with
            sub-centre k of class c in row c * K + k, and a class's angle is that of its nearest.
        normalize_weight: Whether centres enter the other classes' logits by direction alone. If
            False their lengths are factors of the cosines, and ``margin`` has to do the same.
        penalty: (N,) added to the loss of each row before its weights.
        reduction: "mean" (weighted by ``class_weight`` and ``sample_weight``, ignored rows left
            out), "sum" or "none".
        class_weight: (C,) weight of each class, as in ``F.cross_entropy``.
        sample_weight: (N,) weight of each row, on top of that of its class.
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1), as in
            ``F.cross_entropy``.
        ignore_index: Rows with this label have loss 0 and gradient 0, whatever is in them.
        mode: "auto", "dense", "stash" or "recompute". "auto" is :func:`plan`'s choice of the last
            two, but "dense" inside ``torch.func``.
        memory_budget: Bytes that may be used beyond the arguments and their gradients; by default
            as :func:`plan` says.
        shard: Which of the classes ``weight`` holds, where processes share them
            (:mod:`angular_losses.distributed`); the rows are those of all processes then.

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
    rule = _rule(negatives, sub_centers, normalize_weight)
    num_classes = shard.num_classes_of(weight, sub_centers)
    kept = validation.batch(embeddings, weight, labels, ignore_index, sub_centers, num_classes)
    validation.number("label_smoothing", label_smoothing, 0.0, 1.0)
    check_weights(embeddings, num_classes, reduction, class_weight, sample_weight, penalty)
    _check_margin(margin, scale, embeddings)
    embeddings = without_ignored(embeddings, kept)
    weight = shard.centres(weight, sub_centers)
    chosen = modes.choose(embeddings, weight, mode, memory_budget, rule)
    labels = labels.long() if kept is None else labels.long().where(kept, 0)
    dtype = working_dtype(embeddings, weight)
    if class_weight is not None:
        class_weight = class_weight.to(dtype)
    share = _class_share(weight, num_classes, class_weight, dtype) if label_smoothing else None
    with without_autocast(embeddings.device):
        here = None if share is None else shard.of_classes(share)
        own = nearest_sub_centers(embeddings, weight, shard.local(labels), sub_centers)
        before = None
        if negatives:
            before = _target_before(embeddings, weight, own, margin, dtype, shard)
        # A scale of each row is part of a function's terms, whose derivatives are autograd's.
        of_rows = scale.to(dtype) if negatives and isinstance(scale, Tensor) else None
        parts = modes.parts(
            embeddings,
            weight,
            own,
            chosen,
            scale=scale if of_rows is None else 1.0,
            class_share=here if rule == PLAIN else None,
            rule=rule,
            target=before,
            bias=of_rows,
            shard=shard,
        )
        target = scale * _check_target(margin(parts.theta), parts.theta)
        loss = F.softplus(parts.negatives - target, threshold=50)
        total = loss
        of_class = None if class_weight is None else class_weight.index_select(0, labels)
        if of_class is not None:
            total = total * of_class
        if share is not None:
            share_of_own = share.index_select(0, labels)
            if rule == PLAIN:
                others = parts.mean_cosine - share_of_own * parts.theta.cos()
            else:  # not a sum of cosines
                summed = rule._replace(summed=True)
                others = modes.parts(
                    embeddings,
                    weight,
                    own,
                    chosen,
                    class_share=here,
                    rule=summed,
                    target=before,
                    shard=shard,
                ).negatives
            mean_logit = scale * others + share_of_own * target
            smooth = share.sum() * (target + loss) - mean_logit
            total = (1 - label_smoothing) * total + label_smoothing * smooth
        if penalty is not None:
            penalty = penalty.to(total.dtype)
            total = total + (penalty if of_class is None else of_class * penalty)
        return reduce(
            total, reduction, of_class=of_class, sample_weight=sample_weight, kept=kept
        ).to(dtype)


@torch.no_grad()
def _target_before(
    embeddings: Tensor,
    weight: Tensor,
    own: Tensor,
    margin: MarginFunction,
    dtype: torch.dtype,
    shard: Shard | Whole,
) -> Tensor:
    """The target logits before scaling (N,), for the negatives to be compared with."""
    theta = shard.of_targets(lambda centres: angle_between(embeddings, centres), weight, own)
    return _check_target(margin(theta), theta).to(dtype)


def _class_share(
    weight: Tensor, num_classes: int, class_weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The share of each class in the mean over classes, (C,)."""
    even = weight.new_full((num_classes,), 1 / num_classes, dtype=dtype)
    return even if class_weight is None else even * class_weight


def _rule(
    negatives: NegativeFunction | None,
    sub_centers: int,
    normalize_weight: bool,
) -> Rule:
    validation.positive_integer("sub_centers", sub_centers)
    if negatives is None:
        return Rule(sub_centers=sub_centers, keep_lengths=not normalize_weight)
    if not callable(negatives):
        raise TypeError(
            "negatives: expected a function of cosines (K, N) and target logits (N,), "
            f"got {negatives!r}"
        )

    def terms(cosine: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
        assert target is not None
        found = negatives(cosine, target)
        if not isinstance(found, Tensor) or found.shape != cosine.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else repr(found)
            raise ValueError(
                f"negatives: expected it to return shape {tuple(cosine.shape)}, got {got}"
            )
        return found if bias is None else bias * found

    return Rule(terms, sub_centers=sub_centers, keep_lengths=not normalize_weight)


def _check_margin(margin: object, scale: object, embeddings: Tensor) -> None:
    if not callable(margin):
        raise TypeError(
            "margin: expected a function of the target angle theta, such as "
            f"`lambda theta: arcface(theta, 0.5)`, got {margin!r}"
        )
    if not isinstance(scale, Tensor):
        validation.positive("scale", scale)
    elif scale.dim():
        validation.floating("scale", scale, embeddings.shape[0], device=embeddings.device)


def _check_target(target: object, theta: Tensor) -> Tensor:
    if not isinstance(target, Tensor):
        raise TypeError(f"margin: expected it to return a tensor, got {target!r}")
    if target.shape != theta.shape:
        raise ValueError(
            f"margin: expected one target logit a sample, shape {tuple(theta.shape)}, "
            f"got {tuple(target.shape)}"
        )
    return target.to(theta.dtype)


def one_vs_rest_loss(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    positive: MarginFunction,
    negative: Callable[[Tensor, Tensor], Tensor],
    bias: Tensor | None = None,
    sub_centers: int = 1,
    penalty: Tensor | None = None,
    reduction: str = "mean",
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    ignore_index: int = -100,
    mode: str = "auto",
    memory_budget: int | None = None,
    shard: Shard | Whole = WHOLE,
) -> Tensor:
    r"""A loss of the target's angle, plus one of each other class's cosine.

    .. math:: L_i = \mathrm{positive}(\theta_{i y_i})
        + \sum_{j \ne y_i} \mathrm{negative}(\cos\theta_{ij}, b)

    Where the softmax compares the classes with each other, here each is judged by itself. Modes,
    precision and memory are those of :func:`margin_softmax_loss`.

    Args:
        embeddings: (N, d), floating point, of any finite length (below 6e-34, in float16 2e-4, a
            vector counts as zero: no direction, no gradient, pi / 2 from everything).
        weight: (C, d) class centres, floating point, likewise.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        positive: A function of the target angles theta (N,), in radians, float64, that returns the
            loss of the targets (N,).
        negative: A function of some cosines (K, N) and the bias (N,) that returns the loss of each
            negative (K, N). It must treat every cosine by itself and have a finite derivative.
        bias: A scalar that ``negative`` needs and that has a gradient; 0 by default. What
            ``positive`` does with it autograd follows by itself.
        sub_centers: The number of centres of a class, as in :func:`margin_softmax_loss`.
        penalty: (N,) added to the loss of each row before its weights.
        reduction: "mean", weighted by ``class_weight`` and ``sample_weight``, "sum" or "none".
        class_weight: (C,) weight of the rows of each class.
        sample_weight: (N,) weight of each row, on top of that of its class.
        ignore_index: Rows with this label have loss 0 and gradient 0.
        mode: "auto", "dense", "stash" or "recompute".
        memory_budget: Bytes that may be used beyond the arguments and their gradients.
        shard: Which of the classes ``weight`` holds, where processes share them
            (:mod:`angular_losses.distributed`); the rows are those of all processes then.

    Returns:
        A scalar, or (N,) for reduction "none"; float32, or float64 for float64 input.

    Raises:
        TypeError: If a dtype is wrong, or a function is none.
        ValueError: If a shape, a device, a label or an option is out of place.
        RuntimeError: In the backward pass, if a second derivative is asked of "stash" or
            "recompute".

    Example:
        >>> import torch
        >>> loss = one_vs_rest_loss(
        ...     torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.tensor([0]),
        ...     positive=lambda theta: (1 - theta.cos()) ** 2,
        ...     negative=lambda cosine, bias: cosine**2,
        ... )
        >>> loss.item()
        0.0
    """
    for name, function in (("positive", positive), ("negative", negative)):
        if not callable(function):
            raise TypeError(f"{name}: expected a function, got {function!r}")
    validation.positive_integer("sub_centers", sub_centers)
    num_classes = shard.num_classes_of(weight, sub_centers)
    kept = validation.batch(embeddings, weight, labels, ignore_index, sub_centers, num_classes)
    check_weights(embeddings, num_classes, reduction, class_weight, sample_weight, penalty)
    if bias is not None and (not isinstance(bias, Tensor) or bias.numel() != 1):
        raise ValueError(f"bias: expected a tensor of one number, got {bias!r}")
    labels = labels.long() if kept is None else labels.long().where(kept, 0)
    dtype = working_dtype(embeddings, weight)
    rule = Rule(_terms(negative), summed=True, sub_centers=sub_centers)
    embeddings = without_ignored(embeddings, kept)
    weight = shard.centres(weight, sub_centers)
    chosen = modes.choose(embeddings, weight, mode, memory_budget, rule)
    with without_autocast(embeddings.device):
        own = nearest_sub_centers(embeddings, weight, shard.local(labels), sub_centers)
        offset = embeddings.new_zeros((), dtype=dtype) if bias is None else bias.to(dtype)
        parts = modes.parts(
            embeddings,
            weight,
            own,
            chosen,
            rule=rule,
            bias=offset.reshape(()),
            shard=shard,
        )
        total = positive(parts.theta) + parts.negatives
        if penalty is not None:
            total = total + penalty.to(total.dtype)
        of_class = None
        if class_weight is not None:
            of_class = class_weight.to(dtype).index_select(0, labels)
            total = total * of_class
        return reduce(
            total, reduction, of_class=of_class, sample_weight=sample_weight, kept=kept
        ).to(dtype)


def _terms(
    negative: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    def terms(cosine: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
        assert bias is not None
        return negative(cosine, bias)

    return terms


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
    validation.choice("reduction", reduction, REDUCTIONS)
    if class_weight is not None:
        validation.floating("class_weight", class_weight, num_classes, device=device)
    if sample_weight is not None:
        validation.floating("sample_weight", sample_weight, num_rows, device=device)
    if penalty is not None:
        validation.floating("penalty", penalty, num_rows, device=device)


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

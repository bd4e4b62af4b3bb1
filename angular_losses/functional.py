"""The losses as functions: the margin softmax, and one class versus the rest.

Each mode finds the same three numbers for every row, :class:`.Parts`; the loss is made of them
here, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from . import validation
from .engine import modes
from .engine.batch import Batch, checked
from .engine.chunks import PLAIN, Others, Ranking, Rule
from .engine.operators import RowLoss, margin_loss
from .engine.placement import WHOLE, Placement
from .engine.planner import Plan
from .geometry import pairs, precise_dtype, without_autocast, working_dtype
from .margins import MarginFunction, has_descent
from .negatives import KnownSlope, NegativeFunction

REDUCTIONS = ("mean", "sum", "none")


class Options(NamedTuple):
    """What does not depend on which loss it is, as :func:`margin_softmax_loss` describes it."""

    penalty: Tensor | None = None
    reduction: str = "mean"
    class_weight: Tensor | None = None
    sample_weight: Tensor | None = None
    mode: str = "auto"
    memory_budget: int | None = None
    ranking: Ranking | None = None


class Softmax(NamedTuple):
    """Which margin softmax it is, as :func:`margin_softmax_loss` describes it."""

    margin: MarginFunction
    scale: float | Tensor
    negatives: NegativeFunction | None = None
    normalize_weight: bool = True
    label_smoothing: float = 0.0


def _check_options(batch: Batch, options: Options) -> None:
    """Raise unless these options fit the batch."""
    num_rows, device = batch.embeddings.shape[0], batch.embeddings.device
    validation.choice("reduction", options.reduction, REDUCTIONS)
    for name, value, size in (
        ("class_weight", options.class_weight, batch.num_classes),
        ("sample_weight", options.sample_weight, num_rows),
        ("penalty", options.penalty, num_rows),
    ):
        if value is not None:
            validation.floating(name, value, size, device=device)


def _check_softmax(batch: Batch, softmax: Softmax) -> None:
    """Raise unless this margin softmax fits the batch."""
    margin, scale, negatives = softmax.margin, softmax.scale, softmax.negatives
    if not callable(margin):
        raise TypeError(
            "margin: expected a function of the target angle theta, such as "
            f"`lambda theta: arcface(theta, 0.5)`, got {margin!r}"
        )
    if negatives is not None and not callable(negatives):
        raise TypeError(
            "negatives: expected a function of cosines (K, N) and target logits (N,), "
            f"got {negatives!r}"
        )
    if not isinstance(scale, Tensor):
        validation.positive("scale", scale)
    elif scale.dim():
        num_rows, device = batch.embeddings.shape[0], batch.embeddings.device
        validation.floating("scale", scale, num_rows, device=device)
    validation.number("label_smoothing", softmax.label_smoothing, 0.0, 1.0)


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
    shard: Placement = WHOLE,
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
            treat every cosine by itself and have a finite derivative; parameters of its own need
            "dense". By default the cosines stay as they are.
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
            as :func:`plan` says. With ``label_smoothing`` and ``sub_centers`` or ``negatives``,
            which take two passes, twice that may be used.
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
    batch = checked(embeddings, weight, labels, ignore_index, sub_centers, shard)
    softmax = Softmax(margin, scale, negatives, normalize_weight, label_smoothing)
    options = Options(penalty, reduction, class_weight, sample_weight, mode, memory_budget)
    return softmax_loss(batch, softmax, options)


def softmax_loss(batch: Batch, softmax: Softmax, options: Options) -> Tensor:
    """The margin softmax of a checked batch."""
    _check_softmax(batch, softmax)
    _check_options(batch, options)
    margin, scale, negatives = softmax.margin, softmax.scale, softmax.negatives
    if isinstance(scale, Tensor) and batch.kept is not None:
        scale = scale.where(batch.kept, 1)
    rule = _rule(softmax, batch.sub_centers)
    chosen = modes.choose(batch, options.mode, options.memory_budget, rule)
    dtype = working_dtype(batch.embeddings, batch.weight)
    with without_autocast(batch.embeddings.device):
        looks_at_target = not (negatives is None or isinstance(negatives, KnownSlope))
        before = _target_before(batch, margin, dtype) if looks_at_target else None
        # A scale of each row is part of a function's terms, whose derivatives are autograd's.
        of_rows = scale.to(dtype) if negatives and isinstance(scale, Tensor) else None
        if negatives is not None and not (rule.with_slopes and rule.has_slopes):
            _check_constant("negatives", negatives, before, batch, chosen.mode)
        others = Others(rule, before, of_rows, ranking=options.ranking)
        if _is_closed(batch, softmax, options, chosen.mode):
            return _closed_loss(batch, softmax, options, chosen, others)
        share = _class_share(batch, softmax, options, dtype)
        if share is not None and share.requires_grad and chosen.mode != "dense":
            raise ValueError(
                "class_weight: expected none that needs a gradient with label_smoothing in mode "
                f"{chosen.mode!r}, whose gradient would lack a part; pass mode='dense'"
            )
        parts = modes.parts(
            batch,
            chosen,
            others,
            scale=scale if of_rows is None else 1.0,
            class_share=share if rule == PLAIN else None,
        )
        target = scale * _of_rows("margin", margin(parts.theta), parts.theta)
        losses = F.softplus(parts.negatives - target, threshold=50)
        of_class = _class_weights(batch, options, dtype)
        weighted = losses if of_class is None else losses * of_class
        if share is not None:
            share_of_own = share.index_select(0, batch.labels)
            if parts.mean_cosine is not None:
                mean_of_others = parts.mean_cosine - share_of_own * parts.theta.cos()
            else:  # not a sum of cosines
                summed = Others(rule._replace(summed=True), before)
                mean_of_others = modes.parts(batch, chosen, summed, class_share=share).negatives
            mean_logit = scale * mean_of_others + share_of_own * target
            # The weights of the classes are in it already.
            smooth = share.sum() * (target + losses) - mean_logit
            weighted = (1 - softmax.label_smoothing) * weighted + softmax.label_smoothing * smooth
        return _reduced(batch, options, weighted, of_class).to(dtype)


def _is_closed(batch: Batch, softmax: Softmax, options: Options, mode: str) -> bool:
    """Whether the derivative of the loss by the cosines is known, and autograd not needed."""
    weights = options.class_weight, options.sample_weight
    return (
        modes.is_one_step(batch, mode)
        and has_descent(softmax.margin)
        and not isinstance(softmax.scale, Tensor)
        and not softmax.label_smoothing
        and options.penalty is None
        and not any(weight is not None and weight.requires_grad for weight in weights)
    )


def _closed_loss(
    batch: Batch, softmax: Softmax, options: Options, chosen: Plan, others: Others
) -> Tensor:
    """The loss whose derivative is known, as one step of autograd."""
    margin, scale = softmax.margin, softmax.scale
    assert has_descent(margin)
    assert not isinstance(scale, Tensor)
    inputs, settings = modes.inputs(batch, scale), modes.settings(batch, chosen, scale)
    of_class = _class_weights(batch, options, working_dtype(batch.embeddings, batch.weight))
    row_weight = _row_weights(batch, options, of_class)
    is_mean = options.reduction == "mean" and not isinstance(row_weight, Tensor)
    row_loss = RowLoss(
        _known("margin", margin.with_descent),
        scale,
        row_weight if of_class is None else row_weight * of_class,
        is_summed=options.reduction != "none",
        is_mean=is_mean and batch.labels.shape[0] > 0,
    )
    return margin_loss(inputs, settings, others, row_loss)


def _check_constant(
    name: str, function: Callable[..., Tensor], given: Tensor | None, batch: Batch, mode: str
) -> None:
    """Raise if a function of the other classes has variables of its own, but in the dense mode.

    The others differentiate it by the cosines and the bias alone.
    """
    if mode == "dense" or not torch.is_grad_enabled():
        return
    dtype = working_dtype(batch.embeddings, batch.weight)
    found = function(batch.embeddings.new_zeros(1, len(batch.labels), dtype=dtype), given)
    if isinstance(found, Tensor) and found.requires_grad:
        raise ValueError(
            f"{name}: expected it without variables of its own in mode {mode!r}, which finds no "
            "gradient of them; detach them, or pass mode='dense'"
        )


def _target_before(batch: Batch, margin: MarginFunction, dtype: torch.dtype) -> Tensor:
    """The target logits before scaling (N,), for the negatives to be compared with."""
    with torch.no_grad():
        theta = batch.shard.of_targets(
            lambda centres: pairs(batch.embeddings, centres).theta[:, 0], batch.weight, batch.own
        )
        return _of_rows("margin", margin(theta), theta).to(dtype).detach()


def _class_share(
    batch: Batch, softmax: Softmax, options: Options, dtype: torch.dtype
) -> Tensor | None:
    """The share of each class in the mean over classes that smooths labels, (C,)."""
    if not softmax.label_smoothing:
        return None
    even = batch.weight.new_full((batch.num_classes,), 1 / batch.num_classes, dtype=dtype)
    return even if options.class_weight is None else even * options.class_weight.to(dtype)


def _rule(softmax: Softmax, sub_centers: int) -> Rule:
    keep_lengths, negatives = not softmax.normalize_weight, softmax.negatives
    if negatives is None:
        return Rule(sub_centers=sub_centers, keep_lengths=keep_lengths)

    def terms(cosine: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
        found = negatives(cosine, cast(Tensor, target))  # None for one that does not look at it
        found = _of_classes("negatives", found, cosine)
        return found if bias is None else bias * found

    with_slopes = None
    if isinstance(negatives, KnownSlope) and not isinstance(softmax.scale, Tensor):
        # But not if each row's scale is a factor of the terms.
        with_slopes = _known("negatives", negatives.with_slope)
    return Rule(terms, with_slopes, sub_centers=sub_centers, keep_lengths=keep_lengths)


def _of_rows(name: str, found: object, theta: Tensor) -> Tensor:
    """What a function of the target angles has returned, if it is a number a row (N,)."""
    if not isinstance(found, Tensor):
        raise TypeError(f"{name}: expected it to return a tensor, got {found!r}")
    if found.shape != theta.shape:
        raise ValueError(
            f"{name}: expected it to return a number a row, shape {tuple(theta.shape)}, "
            f"got {tuple(found.shape)}"
        )
    return found.to(theta.dtype)


def _of_classes(name: str, found: object, cosine: Tensor) -> Tensor:
    """What a function of some cosines has returned, if it is of their shape (K, N)."""
    if not isinstance(found, Tensor) or found.shape != cosine.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else repr(found)
        raise ValueError(f"{name}: expected it to return shape {tuple(cosine.shape)}, got {got}")
    if not found.is_floating_point():
        raise TypeError(f"{name}: expected it to return floating-point numbers, got {found.dtype}")
    return found


def _known(
    name: str, function: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function with its derivative, unless they depend on something trained."""

    def checked(given: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            found = function(given)
        shapes: object = found
        if isinstance(found, tuple) and all(isinstance(each, Tensor) for each in found):
            shapes = [tuple(each.shape) for each in found]
        if shapes != 2 * [tuple(given.shape)]:
            raise ValueError(
                f"{name}: expected its values and derivatives to have shape {tuple(given.shape)}, "
                f"got {shapes}"
            )
        if any(each.requires_grad for each in found):
            raise ValueError(
                f"{name}: expected no variables of its own where its derivative is given, which "
                "would get no gradient; pass the function alone, or mode='dense'"
            )
        value, derivative = found
        return value.to(given.dtype), derivative.to(given.dtype)

    return checked


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
    shard: Placement = WHOLE,
) -> Tensor:
    r"""A loss of the target's angle, plus one of each other class's cosine.

    .. math:: L_i = \mathrm{positive}(\theta_{i y_i})
        + \sum_{j \ne y_i} \mathrm{negative}(\cos\theta_{ij}, b)

    Where the softmax compares the classes with each other, here each is judged by itself. Modes,
    precision and memory are those of :func:`margin_softmax_loss`, as are the arguments that are
    not described here in full.

    Args:
        embeddings: (N, d), floating point.
        weight: (C, d) class centres, floating point.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        positive: A function of the target angles theta (N,), in radians, float64, that returns the
            loss of the targets (N,).
        negative: A function of some cosines (K, N) and the bias (N,) that returns the loss of each
            negative (K, N). It must treat every cosine by itself and have a finite derivative.
        bias: A scalar that ``negative`` needs and that has a gradient; 0 by default. What
            ``positive`` does with it autograd follows by itself.
        sub_centers: The number of centres of a class.
        penalty: (N,) added to the loss of each row before its weights.
        reduction: "mean", "sum" or "none".
        class_weight: (C,) weight of the rows of each class.
        sample_weight: (N,) weight of each row, on top of that of its class.
        ignore_index: Rows with this label have loss 0 and gradient 0.
        mode: "auto", "dense", "stash" or "recompute".
        memory_budget: Bytes that may be used beyond the arguments and their gradients.
        shard: Which of the classes ``weight`` holds, where processes share them.

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
    if bias is not None and (not isinstance(bias, Tensor) or bias.numel() != 1):
        raise ValueError(f"bias: expected a tensor of one number, got {bias!r}")
    batch = checked(embeddings, weight, labels, ignore_index, sub_centers, shard)
    options = Options(penalty, reduction, class_weight, sample_weight, mode, memory_budget)
    return rest_loss(batch, positive, negative, bias, options)


def rest_loss(
    batch: Batch,
    positive: MarginFunction,
    negative: Callable[[Tensor, Tensor], Tensor],
    bias: Tensor | None,
    options: Options,
) -> Tensor:
    """One versus the rest of a checked batch."""
    _check_options(batch, options)

    def terms(cosine: Tensor, target: Tensor | None, bias: Tensor | None) -> Tensor:
        assert bias is not None
        return _of_classes("negative", negative(cosine, bias), cosine)

    dtype = working_dtype(batch.embeddings, batch.weight)
    rule = Rule(terms, summed=True, sub_centers=batch.sub_centers)
    chosen = modes.choose(batch, options.mode, options.memory_budget, rule)
    with without_autocast(batch.embeddings.device):
        bias = batch.embeddings.new_zeros(()) if bias is None else bias.reshape(())
        bias = bias.to(dtype)
        of_rows = bias.detach().expand(len(batch.labels))
        _check_constant("negative", negative, of_rows, batch, chosen.mode)
        others = Others(rule, bias=bias, ranking=options.ranking)
        parts = modes.parts(batch, chosen, others)
        losses = _of_rows("positive", positive(parts.theta), parts.theta) + parts.negatives
        of_class = _class_weights(batch, options, dtype)
        losses = losses if of_class is None else losses * of_class
        return _reduced(batch, options, losses, of_class).to(dtype)


def _class_weights(batch: Batch, options: Options, dtype: torch.dtype) -> Tensor | None:
    """The weights of the rows' classes (N,)."""
    if options.class_weight is None:
        return None
    return options.class_weight.to(dtype).index_select(0, batch.labels)


def _row_weights(batch: Batch, options: Options, of_class: Tensor | None) -> float | Tensor:
    """What the losses of the rows, times the weights of their classes, are multiplied with."""
    precise, weight = precise_dtype(batch.embeddings.device), None
    if batch.kept is not None:
        weight = batch.kept.to(precise)
    if options.sample_weight is not None:
        weight = options.sample_weight.to(precise)
        weight = weight if batch.kept is None else weight.where(batch.kept, 0)
    if options.reduction != "mean":
        return 1.0 if weight is None else weight
    of_rows = 1.0 if weight is None else weight
    each = of_rows if of_class is None else of_rows * of_class
    total = batch.shard.averaged(each.sum() if isinstance(each, Tensor) else len(batch.labels))
    if not isinstance(total, Tensor):
        return of_rows / max(total, 1.0)
    return of_rows / total.masked_fill(total == 0, 1)


def _reduced(batch: Batch, options: Options, losses: Tensor, of_class: Tensor | None) -> Tensor:
    """The loss of a batch, from the losses of its rows (N,) with the weights of their classes."""
    if options.penalty is not None:
        penalty = options.penalty.to(losses.dtype)
        penalty = penalty if batch.kept is None else penalty.where(batch.kept, 0)
        losses = losses + (penalty if of_class is None else of_class * penalty)
    losses = losses * _row_weights(batch, options, of_class)
    return losses if options.reduction == "none" else losses.sum()

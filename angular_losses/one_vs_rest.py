"""One versus the rest: losses that ask of each class by itself whether a row belongs to it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import checks, modes
from .chunks import Rule
from .engine import working_dtype
from .geometry import nearest_sub_centers, without_autocast
from .margins import MarginFunction
from .reductions import check_weights, reduce, without_ignored
from .shards import WHOLE, Shard, Whole


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
            (:mod:`angular_losses.sharded`); the rows are those of all processes then.

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
    checks.positive_integer("sub_centers", sub_centers)
    num_classes = shard.num_classes_of(weight, sub_centers)
    kept = checks.batch(embeddings, weight, labels, ignore_index, sub_centers, num_classes)
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

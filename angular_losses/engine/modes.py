"""The parts of a loss, in the mode chosen: densely as the specification says, or by the engine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import validation
from ..geometry import (
    angle_between,
    directions,
    is_autocast_enabled,
    precise_dtype,
    working_dtype,
)
from .batch import Batch
from .chunks import BOUNDED_SCALE, PLAIN, Deferred, Inputs, Others, Rule, Settings
from .operators import margin_parts
from .passes import Parts
from .planner import MODES, Plan, cached_plan, plan

# With fewer classes the products cost little beside any network, and keep full precision under
# autocast.
FEW_CLASSES = 4096


def choose(batch: Batch, mode: str, memory_budget: int | None, rule: Rule = PLAIN) -> Plan:
    """:func:`plan` for this batch, as autocast and torch.func have it."""
    embeddings, weight = batch.embeddings, batch.weight
    validation.choice("mode", mode, MODES)
    if mode != "dense" and validation.is_transforming():
        if mode != "auto":
            raise ValueError(f"mode: expected 'auto' or 'dense' inside torch.func, got {mode!r}")
        mode = "dense"
    num_rows, size = embeddings.shape
    function = plan if torch.compiler.is_compiling() else cached_plan
    num_centres = batch.shard.most_centres(weight, batch.sub_centers)
    return function(
        num_rows,
        num_centres,
        size,
        dtype=weight.dtype,
        product_dtype=product_dtype(embeddings, weight, num_centres, mode),
        device=weight.device,
        mode=mode,
        memory_budget=memory_budget,
        reweighted=not rule.is_linear,
    )


def product_dtype(embeddings: Tensor, weight: Tensor, num_centres: int, mode: str) -> torch.dtype:
    """The dtype of the factors of the matrix products, as autocast has it.

    ``num_centres`` are the most of any process, so that all of them choose alike.
    """
    dtype, kind = working_dtype(embeddings, weight), weight.device.type
    if (
        num_centres > FEW_CLASSES
        and mode != "dense"
        and dtype == torch.float32
        and is_autocast_enabled(weight.device)
        and torch.get_autocast_dtype(kind) != torch.float32
        and _multiplies_bfloat16(weight.device)
    ):
        return torch.bfloat16  # for float16 too, whose range cannot hold E
    return dtype


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device is faster in bfloat16: a CPU without instructions for it is far slower."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def is_one_step(batch: Batch, mode: str) -> bool:
    """Whether one step of autograd can lead from the inputs of a batch to its loss."""
    return mode != "dense" and not (torch.compiler.is_compiling() or batch.shard.is_partial)


def settings(batch: Batch, chosen: Plan, scale: float | Tensor, *others: Tensor | None) -> Settings:
    """Those of the passes over a batch; ``others`` are variables beside embeddings and weight."""
    differentiate = torch.is_grad_enabled() and any(
        isinstance(each, Tensor) and each.requires_grad
        for each in (batch.embeddings, batch.weight, scale, *others)
    )
    return Settings(
        scale=1.0 if isinstance(scale, Tensor) else float(scale),
        chunk=chosen.chunk,
        product_dtype=chosen.product_dtype,
        stash=chosen.mode == "stash" and differentiate,
        differentiate=differentiate,
        partial=batch.shard.is_partial,
    )


def inputs(batch: Batch, scale: float | Tensor, class_share: Tensor | None = None) -> Inputs:
    """Those of the passes over a batch."""
    row_scale = scale.expand(batch.own.shape[0]) if isinstance(scale, Tensor) else None
    return Inputs(batch.embeddings, batch.weight, batch.own, row_scale, class_share)


def parts(
    batch: Batch,
    chosen: Plan,
    others: Others,
    *,
    scale: float | Tensor = 1.0,
    class_share: Tensor | None = None,
) -> Parts:
    """The angle, the negatives and the mean cosine, over all classes wherever they are.

    Args:
        batch: The batch.
        chosen: How to run it.
        others: How the other classes enter, with a bias () or (N,).
        scale: A number or a tensor () or (N,).
        class_share: (C,) of all classes: see :class:`Inputs`.
    """
    shard, rule, bias = batch.shard, others.rule, others.bias
    # Before the rows, whose gradients then are summed first, on every rank.
    scale = shard.shared(scale) if isinstance(scale, Tensor) else scale
    bias = None if bias is None else shard.shared(bias).expand(batch.own.shape[0])
    share = None if class_share is None else shard.of_classes(class_share)
    deferred: Deferred = []
    if not batch.weight.shape[0]:
        here = _no_parts(batch, rule, scale, bias, has_mean=share is not None)
    elif chosen.mode == "dense":
        here = _dense(batch, others._replace(bias=bias), scale, share)
    else:
        here = margin_parts(
            inputs(batch, scale, share),
            settings(batch, chosen, scale, bias),
            others._replace(
                bias=bias,
                begin_sum=shard.begin_sum,
                deferred=deferred if shard.is_partial else None,
            ),
        )
    is_bounded = not isinstance(scale, Tensor) and scale <= BOUNDED_SCALE and rule.has_slopes
    return shard.completed(here, batch.own, deferred, summed=rule.summed, is_bounded=is_bounded)


def _no_parts(
    batch: Batch, rule: Rule, scale: float | Tensor, bias: Tensor | None, *, has_mean: bool
) -> Parts:
    """Those of no classes: on the graph, for every rank takes part in the sums of gradients."""
    nothing = batch.shard.shared_rows(batch.embeddings)[:, :0].sum(1) + batch.weight.sum()
    for variable in (scale, bias):
        if isinstance(variable, Tensor):
            nothing = nothing + 0 * variable
    precise = nothing.to(precise_dtype(nothing.device))
    negatives = precise if rule.summed else precise - torch.inf
    return Parts(precise, negatives, nothing if has_mean and not rule.summed else None)


def _dense(
    batch: Batch, others: Others, scale: float | Tensor, class_share: Tensor | None
) -> Parts:
    rule, ranking = others.rule, others.ranking
    weight, own, partial = batch.weight, batch.own, batch.shard.is_partial
    embeddings = batch.shard.shared_rows(batch.embeddings)
    dtype, labels = working_dtype(embeddings, weight), own // rule.sub_centers
    theta = angle_between(embeddings, weight.index_select(0, own.clamp(min=0)))
    factor = weight.to(dtype) if rule.keep_lengths else directions(weight, dtype)
    cosine = F.linear(directions(embeddings, dtype), factor)
    if ranking is not None:
        shape = len(own), len(weight) // rule.sub_centers, rule.sub_centers
        of_class = cosine.detach().view(shape).amax(2)
        of_own = of_class.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        of_others = _replaced(of_class, labels, -torch.inf, partial=partial).amax(1)
        ranking.add(of_own.masked_fill(own < 0, -torch.inf), of_others)
    mean_cosine = None
    if rule == PLAIN and class_share is not None:
        mean_cosine = cosine @ class_share
    terms = rule.of_classes(cosine.T, others.target, others.bias).T
    if not rule.summed:
        negatives = _log_sum(terms, labels, scale, theta.dtype, partial=partial)
        return Parts(theta, negatives, mean_cosine)
    share = torch.ones_like(terms) if class_share is None else class_share.expand_as(terms)
    share = _replaced(share, labels, 0.0, partial=partial)
    # Not their product alone: a target's term, which does not count, may be infinite.
    negatives = torch.where(share == 0, 0, terms * share).sum(1, dtype=theta.dtype)
    return Parts(theta, negatives, mean_cosine)


def _log_sum(
    terms: Tensor, labels: Tensor, scale: float | Tensor, dtype: torch.dtype, *, partial: bool
) -> Tensor:
    """Log of the sum over j != y of exp(scale * term_j): (N,), the log itself in ``dtype``."""
    if terms.shape[1] == 1 and not partial:
        return terms.new_full(terms.shape[:1], -torch.inf, dtype=dtype)

    def without_target(values: Tensor, instead: float) -> Tensor:
        return _replaced(values, labels, instead, partial=partial)

    # Finite, where there is no other class here.
    lowest = torch.finfo(terms.dtype).min / 2
    largest = without_target(terms.detach(), lowest).amax(1, keepdim=True)
    # The largest is subtracted from the terms, not from the logits: that difference is nearly
    # exact, while scale * term would round to an ulp of 64 first. The target's own difference is
    # set to 0 before the exponential, which could overflow, and its term to 0 after it.
    by_row = scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale
    exponent = by_row * without_target(terms - largest, 0.0)
    summed = without_target(exponent.exp(), 0.0).sum(1)
    return scale * largest[:, 0].to(dtype) + summed.to(dtype).log()


def _replaced(values: Tensor, labels: Tensor, instead: float, *, partial: bool) -> Tensor:
    """Values (N, C) with another in the column of each label; where partial, none for -1."""
    if not partial:
        return values.scatter(1, labels[:, None], instead)
    classes = torch.arange(values.shape[1], device=values.device)
    return values.masked_fill(classes == labels[:, None], instead)

"""The parts of a loss, in the mode chosen: densely as the specification says, or by the engine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import validation
from ..geometry import angle_between, directions, precise_dtype
from .chunks import BOUNDED_SCALE, PLAIN, Rule
from .operators import Parts, margin_parts
from .passes import working_dtype
from .placement import WHOLE, Shard, Whole
from .planner import MODES, Plan, plan

# With fewer classes the products cost little beside any network, and keep full precision under
# autocast.
FEW_CLASSES = 4096


def choose(
    embeddings: Tensor, weight: Tensor, mode: str, memory_budget: int | None, rule: Rule = PLAIN
) -> Plan:
    """:func:`plan` for these tensors, as autocast and torch.func have it."""
    validation.choice("mode", mode, MODES)
    if mode == "auto" and any(map(validation.is_transformed, (embeddings, weight))):
        mode = "dense"
    (num_rows, size), num_centres, device = embeddings.shape, weight.shape[0], weight.device
    return plan(
        num_rows,
        max(num_centres, 1),  # where others have all
        size,
        dtype=weight.dtype,
        product_dtype=product_dtype(embeddings, weight, mode),
        device=device,
        mode=mode,
        memory_budget=memory_budget,
        reweighted=not rule.is_linear,
    )


def product_dtype(embeddings: Tensor, weight: Tensor, mode: str) -> torch.dtype:
    """The dtype of the factors of the matrix products, as autocast has it."""
    dtype, kind = working_dtype(embeddings, weight), weight.device.type
    if (
        len(weight) > FEW_CLASSES
        and mode != "dense"
        and dtype == torch.float32
        and torch.amp.is_autocast_available(kind)
        and torch.is_autocast_enabled(kind)
        and torch.get_autocast_dtype(kind) != torch.float32
        and _multiplies_bfloat16(weight.device)
    ):
        return torch.bfloat16  # for float16 too, whose range cannot hold E
    return dtype


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device is faster in bfloat16: a CPU without instructions for it is far slower."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def parts(
    embeddings: Tensor,
    weight: Tensor,
    own: Tensor,
    chosen: Plan,
    *,
    scale: float | Tensor = 1.0,
    class_share: Tensor | None = None,
    rule: Rule = PLAIN,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    shard: Shard | Whole = WHOLE,
) -> Parts:
    """The angle, the negatives and the mean cosine; see :func:`margin_parts`.

    ``own`` is what :func:`nearest_sub_centers` returns; scale and bias may be scalars. With a
    shard, weight and class_share are those of its classes, and the parts those of all.
    """
    if isinstance(shard, Whole):
        return _parts_here(
            embeddings, weight, own, chosen, scale, class_share, rule, target, bias, None
        )
    # Before the rows, whose gradients then are summed first, on every rank.
    scale = shard.shared(scale) if isinstance(scale, Tensor) else scale
    bias = None if bias is None else shard.shared(bias)
    if len(weight):
        here = _parts_here(
            embeddings, weight, own, chosen, scale, class_share, rule, target, bias, shard
        )
    else:
        here = _no_parts(embeddings, weight, scale, rule, bias, shard)
    theta, dtype = here.theta.where(own >= 0, 0), here.theta.dtype
    if rule.summed:
        theta, negatives = shard.total(torch.stack([theta, here.negatives]))
        return Parts(theta, negatives, here.mean_cosine)
    is_bounded = (
        not isinstance(scale, Tensor)
        and scale <= BOUNDED_SCALE
        and rule.terms is None
        and not rule.keep_lengths
    )
    others = [theta] if class_share is None else [theta, here.mean_cosine.to(dtype)]
    negatives, sums = shard.log_total(here.negatives, torch.stack(others), is_bounded=is_bounded)
    mean = here.mean_cosine if class_share is None else sums[1].to(here.mean_cosine.dtype)
    return Parts(sums[0], negatives, mean)


def _no_parts(
    embeddings: Tensor,
    weight: Tensor,
    scale: float | Tensor,
    rule: Rule,
    bias: Tensor | None,
    shard: Shard,
) -> Parts:
    """Those of no classes: on the graph, for every rank takes part in the sums of gradients."""
    nothing = shard.shared_rows(embeddings)[:, :0].sum(1) + weight.sum()
    for variable in (scale, bias):
        if isinstance(variable, Tensor):
            nothing = nothing + 0 * variable
    precise = nothing.to(precise_dtype(nothing.device))
    return Parts(precise, precise if rule.summed else precise - torch.inf, nothing)


def _parts_here(
    embeddings: Tensor,
    weight: Tensor,
    own: Tensor,
    chosen: Plan,
    scale: float | Tensor,
    class_share: Tensor | None,
    rule: Rule,
    target: Tensor | None,
    bias: Tensor | None,
    shard: Shard | None,
) -> Parts:
    """The parts of the classes that are here."""
    if chosen.mode == "dense":
        if shard is not None:
            embeddings = shard.shared_rows(embeddings)
        arguments = embeddings, weight, own, scale, class_share, rule, target, bias
        return _dense(*arguments, partial=shard is not None)
    return margin_parts(
        embeddings,
        weight,
        own,
        row_scale=scale.expand(len(own)) if isinstance(scale, Tensor) else None,
        class_share=class_share,
        scale=1.0 if isinstance(scale, Tensor) else float(scale),
        chunk=chosen.chunk,
        product_dtype=chosen.product_dtype,
        stash=chosen.mode == "stash",
        rule=rule,
        row_target=target,
        row_bias=None if bias is None else bias.expand(len(own)),
        begin_sum=None if shard is None else shard.begin_sum,
    )


def _dense(
    embeddings: Tensor,
    weight: Tensor,
    own: Tensor,
    scale: float | Tensor,
    class_share: Tensor | None,
    rule: Rule,
    target: Tensor | None,
    bias: Tensor | None,
    *,
    partial: bool,
) -> Parts:
    dtype, labels = working_dtype(embeddings, weight), own // rule.sub_centers
    theta = angle_between(embeddings, weight.index_select(0, own.clamp(min=0)))
    factor = weight.to(dtype) if rule.keep_lengths else directions(weight, dtype)
    cosine = F.linear(directions(embeddings, dtype), factor)
    mean_cosine = cosine.new_zeros(len(own))
    if rule == PLAIN and class_share is not None:
        mean_cosine = cosine @ class_share
    terms = rule.of_classes(cosine.T, target, bias).T
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

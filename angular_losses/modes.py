"""The parts of a loss, in the mode chosen: densely as the specification says, or by the engine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import checks
from .chunks import PLAIN, Rule
from .engine import working_dtype
from .geometry import angle_between, directions
from .operators import Parts, margin_parts
from .planner import MODES, Plan, plan

# With fewer classes the products cost little beside any network, and keep full precision under
# autocast.
FEW_CLASSES = 4096


def choose(
    embeddings: Tensor, weight: Tensor, mode: str, memory_budget: int | None, rule: Rule = PLAIN
) -> Plan:
    """:func:`plan` for these tensors, as autocast and torch.func have it."""
    checks.choice("mode", mode, MODES)
    if mode == "auto" and (checks.is_transformed(embeddings) or checks.is_transformed(weight)):
        mode = "dense"
    (num_rows, size), num_centres, device = embeddings.shape, weight.shape[0], weight.device
    product_dtype = None
    if (
        num_centres > FEW_CLASSES
        and working_dtype(embeddings, weight) == torch.float32
        and torch.is_autocast_enabled(device.type)
        and torch.get_autocast_dtype(device.type) != torch.float32
    ):
        product_dtype = torch.bfloat16  # for float16 too, whose range cannot hold E
    return plan(
        num_rows,
        num_centres,
        size,
        dtype=weight.dtype,
        product_dtype=product_dtype,
        device=device,
        mode=mode,
        memory_budget=memory_budget,
        reweighted=not rule.is_linear,
    )


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
) -> Parts:
    """The angle, the negatives and the mean cosine; see :func:`margin_parts`.

    ``own`` is what :func:`nearest_sub_centers` returns; scale and bias may be scalars.
    """
    if chosen.mode == "dense":
        return _dense(embeddings, weight, own, scale, class_share, rule, target, bias)
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
) -> Parts:
    dtype, labels = working_dtype(embeddings, weight), own // rule.sub_centers
    theta = angle_between(embeddings, weight.index_select(0, own))
    factor = weight.to(dtype) if rule.keep_lengths else directions(weight, dtype)
    cosine = F.linear(directions(embeddings, dtype), factor)
    mean_cosine = cosine.new_zeros(len(own))
    if rule == PLAIN and class_share is not None:
        mean_cosine = cosine @ class_share
    terms = rule.of_classes(cosine.T, target, bias).T
    if not rule.summed:
        negatives = _log_sum(terms, labels, scale, theta.dtype)
        return Parts(theta, negatives, mean_cosine)
    share = torch.ones_like(terms) if class_share is None else class_share.expand_as(terms)
    share = share.scatter(1, labels[:, None], 0.0)
    # Not their product alone: a target's term, which does not count, may be infinite.
    negatives = torch.where(share == 0, 0, terms * share).sum(1, dtype=theta.dtype)
    return Parts(theta, negatives, mean_cosine)


def _log_sum(terms: Tensor, labels: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """Log of the sum over j != y of exp(scale * term_j): (N,), the log itself in ``dtype``."""
    if terms.shape[1] == 1:
        return terms.new_full(terms.shape[:1], -torch.inf, dtype=dtype)
    column = labels[:, None]
    largest = terms.detach().scatter(1, column, -torch.inf).amax(1, keepdim=True)
    # The largest is subtracted from the terms, not from the logits: that difference is nearly
    # exact, while scale * term would round to an ulp of 64 first. The target's own difference is
    # set to 0 before the exponential, which could overflow, and its term to 0 after it.
    by_row = scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale
    exponent = by_row * (terms - largest).scatter(1, column, 0.0)
    summed = exponent.exp().scatter(1, column, 0.0).sum(1)
    return scale * largest[:, 0].to(dtype) + summed.to(dtype).log()

r"""The margin softmax in chunks of classes, as one registered operator.

A margin touches the N target logits and nothing else. So the operator leaves it to its caller and
returns, of all N x C cosines, only what a loss needs of them: the target's angle, one number a row
for the negatives, and (for label smoothing) one for the mean of all cosines:

.. math:: \theta_i = \theta_{i y_i}, \qquad
    \ell_i = \log \sum_{j \ne y_i} e^{s_i\cos\theta_{ij}}, \qquad
    c_i = \sum_j \kappa_j \cos\theta_{ij}

With E = exp(s cos - shift), never normalised, and g the gradient of the negatives, theirs is

.. math:: \partial X = \mathrm{diag}(v)\,(E\,W), \qquad \partial W = E^T\,(\mathrm{diag}(v)\,X),
    \qquad v_i = s_i\, g_i \Big/ \sum_j E_{ij}

and the sums over E need no second pass. *stash* keeps E from the forward to the backward: three
matrix products, the least possible. *recompute* computes it again: four products, in the memory of
one chunk however many classes there are. The weight is normalised, and its gradient projected, a
chunk at a time, while the chunk is in the cache. A chunk has classes along its rows, (K, N): so a
chunk of E and its part of the gradient are contiguous.

Where the centre of a row's target is not among these, ``own`` is -1: the row has negatives alone,
and a theta without meaning, which must get no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import angle_and_tangent, normalize, precise_dtype
from .chunks import BOUNDED_SCALE, PLAIN, Chunks, Rule, Terms, multiply


def working_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of sums and of products in full precision: float32, or float64 if either is."""
    return torch.float64 if torch.float64 in (embeddings.dtype, weight.dtype) else torch.float32


def forward(
    embeddings: Tensor,
    weight: Tensor,
    own: Tensor,
    row_scale: Tensor | None,
    class_share: Tensor | None,
    scale: float,
    chunk: int,
    product_dtype: torch.dtype,
    stash: bool,
    differentiate: bool,
    partial: bool = False,
    rule: Rule = PLAIN,
    row_target: Tensor | None = None,
    row_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The three parts, and what the backward pass needs: the outputs of the operator."""
    unit, inverse_of_rows, theta, tangent = _rows(embeddings, weight, own)
    inverse = unit.new_empty(weight.shape[0], 1)
    scales, bounded = scales_of(scale, row_scale, unit.dtype, rule)
    terms = Terms(rule, row_target, row_bias, differentiate=differentiate)
    chunks = Chunks(
        weight, inverse, unit, own, scales, chunk, product_dtype, terms, class_share, partial
    )

    pull = unit.new_zeros(unit.shape if differentiate else 0)
    has_mean = class_share is not None and rule == PLAIN
    mean_direction = unit.new_zeros(unit.shape[1] if has_mean else 0)
    stashed = unit.new_empty(weight.shape[0] if stash else 0, unit.shape[0], dtype=product_dtype)
    shifts = unit.new_empty(0 if bounded else len(chunks.spans), unit.shape[0])
    total = theta.new_zeros(unit.shape[0])
    if not bounded:  # below every logit, but finite for a row without negatives
        largest = unit.new_full((unit.shape[0],), torch.finfo(unit.dtype).min / 2)
    for index, span in enumerate(chunks.spans):
        centres = chunks.first_centres(span)
        kept = stashed[span] if stash else None
        if bounded:
            exponentials, sums = chunks.exponentials(span, centres, None, kept)
        else:
            logits = chunks.logits(span, centres, kept)
            shifts[index] = torch.maximum(largest, logits.amax(0))
            decay = (largest - shifts[index]).exp()
            largest = shifts[index]
            total *= decay
            if differentiate:
                pull *= decay[:, None]
                terms.rescale(decay)
            exponentials, sums = chunks.exponentiate(logits, largest, kept)
        total += sums
        if differentiate:
            multiply(exponentials.T, centres, out=pull, accumulate=True)
        if class_share is not None and has_mean:
            share = class_share[span] * inverse[span, 0]
            mean_direction.addmv_(weight[span].to(unit.dtype).T, share)

    negatives = total
    if not rule.summed:
        negatives = total.log() if bounded else total.log() + largest
        if differentiate:
            over_total = total.reciprocal().masked_fill_(total == 0, 0).to(unit.dtype)
            pull *= over_total[:, None]
            terms.rescale(over_total)
    mean_cosine = unit @ mean_direction if has_mean else unit.new_zeros(unit.shape[0])
    return (
        theta,
        negatives,
        mean_cosine,
        unit,
        inverse_of_rows,
        tangent,
        inverse,
        pull,
        mean_direction,
        stashed,
        shifts,
        unit.new_empty(0) if terms.bias_slope is None else terms.bias_slope,
    )


def backward(
    grad_theta: Tensor,
    grad_negatives: Tensor,
    grad_mean_cosine: Tensor,
    embeddings: Tensor,
    weight: Tensor,
    own: Tensor,
    row_scale: Tensor | None,
    class_share: Tensor | None,
    theta: Tensor,
    negatives: Tensor,
    unit: Tensor,
    inverse_of_rows: Tensor,
    tangent: Tensor,
    inverse: Tensor,
    pull: Tensor,
    mean_direction: Tensor,
    stashed: Tensor,
    shifts: Tensor,
    scale: float,
    chunk: int,
    product_dtype: torch.dtype,
    partial: bool,
    needed: list[bool],
    rule: Rule = PLAIN,
    row_target: Tensor | None = None,
    row_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of embeddings, weight and row_scale; empty where they are not needed."""
    scales, bounded = scales_of(scale, row_scale, unit.dtype, rule)
    pulled = grad_negatives.to(unit.dtype)[:, None] * scales
    turned = grad_theta.to(unit.dtype)[:, None]
    has_mean = class_share is not None and rule == PLAIN
    grad_embeddings, grad_weight, grad_scale = (unit.new_empty(0) for _ in range(3))
    if needed[0]:
        along = pulled * pull
        if has_mean:
            along.addr_(grad_mean_cosine, mean_direction)
        along.addcmul_(unit, (along * unit).sum(1, keepdim=True), value=-1)
        along.addcmul_(tangent, turned, value=-1)
        grad_embeddings = torch.mul(along, inverse_of_rows, out=torch.empty_like(embeddings))
    if needed[2]:
        grad_scale = scale * grad_negatives * (pull * unit).sum(1)
    if needed[1]:
        terms = Terms(rule, row_target, row_bias, differentiate=True)
        chunks = Chunks(
            weight, inverse, unit, own, scales, chunk, product_dtype, terms, class_share, partial
        )
        last, push = None if bounded else shifts[-1], unit * pulled
        if not rule.summed:
            log_total = negatives if last is None else negatives - last
            over_total = (-log_total).exp().masked_fill_(negatives == -torch.inf, 0)
            push = unit * (pulled * over_total.to(unit.dtype)[:, None])
        sine, cosine = (part.to(unit.dtype)[:, None] for part in (theta.sin(), theta.cos()))
        towards = (cosine * tangent).addcmul_(unit, sine, value=-1)
        towards *= turned * inverse.index_select(0, own.clamp(min=0))
        mean_push = grad_mean_cosine @ unit if has_mean else None
        grad_weight = _weight_gradient(
            chunks, push, towards, stashed, shifts, last, class_share, mean_push
        )
    return grad_embeddings, grad_weight, grad_scale


def _weight_gradient(
    chunks: Chunks,
    push: Tensor,
    towards: Tensor,
    stashed: Tensor,
    shifts: Tensor,
    last: Tensor | None,
    class_share: Tensor | None,
    mean_push: Tensor | None,
) -> Tensor:
    """The gradient of the weight, (C, d), from E and what each row pushes its negatives with.

    Args:
        chunks: The classes.
        push: (N, d), to be multiplied with E relative to ``last``.
        towards: (N, d), the gradients of the targets' centres through their angles.
        stashed: (C, N) E, each chunk's relative to its own of the ``shifts``; or (0, N).
        shifts: (number of chunks, N), or (0, N) where nothing was subtracted.
        last: (N,) the last of them.
        class_share: (C,), or None.
        mean_push: (d,), what the mean cosine pushes each class with, by its share.
    """
    weight, inverse, dtype = chunks.weight, chunks.inverse, push.dtype
    gradient = torch.empty_like(weight)
    # Sums over the rows stay in the working dtype where the device, and what follows, allow it.
    exact = weight.is_cuda or weight.dtype != dtype or class_share is not None
    buffer = weight.new_empty(
        chunks.size, weight.shape[1], dtype=dtype if exact else chunks.product_dtype
    )
    scratch = torch.empty_like(buffer, dtype=dtype)
    for index, span in enumerate(chunks.spans):
        unit_centres, factor = chunks.unit_centres(span), push
        if stashed.shape[0]:
            exponentials = stashed[span]
            if last is not None:
                factor = push * (shifts[index] - last).exp()[:, None]
        else:
            exponentials, _ = chunks.exponentials(span, chunks.centres(unit_centres), last)
        result, size = gradient[span], unit_centres.shape[0]
        pushed = result if weight.dtype == buffer.dtype else buffer[:size]
        tangential = result if weight.dtype == dtype else pushed
        multiply(exponentials, factor.to(chunks.product_dtype), out=pushed)
        if class_share is not None and mean_push is not None:
            pushed.addr_(class_share[span], mean_push)
        if chunks.rule.keep_lengths:
            if tangential is not pushed:
                tangential.copy_(pushed)
        else:
            # A centre's length does not matter: its gradient has no component along it.
            radial = torch.mul(pushed, unit_centres, out=scratch[:size]).sum(1, keepdim=True)
            torch.mul(pushed, inverse[span], out=tangential)
            tangential.addcmul_(unit_centres, radial.mul_(inverse[span]), value=-1)
        if tangential is not result:  # the target's part too, before it is rounded
            row, is_here = chunks.own_row(span)
            tangential.index_add_(0, row, towards * is_here[:, None])
            result.copy_(tangential)
    if weight.dtype == dtype:
        gradient.index_add_(0, chunks.own.clamp(min=0), towards)
    return gradient


def _rows(embeddings: Tensor, weight: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Directions (N, d), inverse lengths (N, 1), target angles (N,) and unit tangents (N, d)."""
    dtype = working_dtype(embeddings, weight)
    unit = embeddings.new_empty(embeddings.shape, dtype=precise_dtype(embeddings.device))
    centres = torch.empty_like(unit)
    inverse = normalize(embeddings, unit, out=unit)
    normalize(weight.index_select(0, own.clamp(min=0)), centres, out=centres)
    theta, tangent = angle_and_tangent(unit, centres)
    return unit.to(dtype), inverse, theta, tangent.to(dtype)


def scales_of(
    scale: float, row_scale: Tensor | None, dtype: torch.dtype, rule: Rule
) -> tuple[float | Tensor, bool]:
    """The scale of each row, (N, 1) or one for all; whether no maximum has to be subtracted."""
    if row_scale is not None:
        return (scale * row_scale.to(dtype))[:, None], rule.summed
    is_small = scale <= BOUNDED_SCALE and rule.is_linear and not rule.keep_lengths
    return scale, rule.summed or is_small

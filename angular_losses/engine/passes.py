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

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import (
    FEW_PRODUCTS,
    angle_of_units,
    inverse_lengths,
    pairs,
    unit_vectors,
    working_dtype,
)
from .chunks import (
    BOUNDED_SCALE,
    Chunks,
    Deferred,
    Inputs,
    Others,
    Rule,
    Settings,
    Terms,
    multiply,
)


class Parts(NamedTuple):
    """What a loss needs of the cosines, each (N,): the target's angle and two sums over classes.

    Attributes:
        theta: The target angles, in float64 (float32 on MPS).
        negatives: The log of the sum over the other classes of exp(scale * term), or the sum of the
            terms, likewise.
        mean_cosine: The sum over all classes of kappa times their cosine, in the working dtype;
            None without a ``class_share`` or with a rule.
    """

    theta: Tensor
    negatives: Tensor
    mean_cosine: Tensor | None


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass.

    Attributes:
        unit: (N, d) directions of the embeddings, in the working dtype as all here.
        inverse_of_rows: (N, 1) 1 / lengths of the embeddings.
        inverse: (C, 1) 1 / lengths of the centres.
        directions: (C, d) of the centres, where one chunk has all of them and E is kept.
        tangent: (N, d) unit tangents at the embeddings' directions, towards their targets' centres.
        cos_sin: (2, N, 1) cosine and sine of theta over the lengths of those centres, whose
            gradients of theta are the first times the tangent less the second times ``unit``.
        weighted_centres: (N, d) E times the centres.
        over_total: (N, 1) 1 / the sum of E; None where terms are summed.
        mean_direction: (d,) the gradient of the mean cosine by each direction, or None.
        stashed: (C, N) E, each chunk's relative to its own of the shifts, or None.
        shifts: (number of chunks, N) what was subtracted from the logits, or None.
        bias_slope: (N,) the derivative of the negatives by the bias, or None.
    """

    unit: Tensor
    inverse_of_rows: Tensor
    inverse: Tensor
    directions: Tensor | None
    tangent: Tensor
    cos_sin: Tensor
    weighted_centres: Tensor | None
    over_total: Tensor | None
    mean_direction: Tensor | None
    stashed: Tensor | None
    shifts: Tensor | None
    bias_slope: Tensor | None


class Gradients(NamedTuple):
    """Of the inputs; None where one is not needed."""

    embeddings: Tensor | None
    weight: Tensor | None
    row_scale: Tensor | None


class _Sums:
    """Sums over the classes, chunk after chunk, relative to the largest logit so far."""

    def __init__(self, terms: Terms, dtype: torch.dtype) -> None:
        self.total: Tensor | None = None
        self.weighted_centres: Tensor | None = None
        self.shifts: list[Tensor] = []
        self._terms, self._dtype = terms, dtype

    def shift_for(self, logits: Tensor) -> Tensor:
        """What to subtract from a chunk's logits (N,); the sums so far become relative to it."""
        # Finite, for a row without negatives.
        largest = logits.amax(0).clamp(min=torch.finfo(logits.dtype).min / 2)
        if self.total is not None:
            largest = torch.maximum(self.shifts[-1], largest)
            decay = (self.shifts[-1] - largest).exp()
            self.total *= decay
            self._terms.rescale(decay)
            if self.weighted_centres is not None:
                self.weighted_centres *= decay[:, None]
        self.shifts.append(largest)
        return largest

    def add(
        self, exponentials: Tensor, sums: Tensor, factors: Tensor, deferred: Deferred | None = None
    ) -> None:
        """Add a chunk's; its product with the centres is put in ``deferred``, where given."""
        self.total = sums if self.total is None else self.total.add_(sums)
        if not self._terms.differentiate:
            return
        is_more = self.weighted_centres is not None
        if self.weighted_centres is None:
            shape = exponentials.shape[1], factors.shape[1]
            self.weighted_centres = factors.new_empty(shape, dtype=self._dtype)
        out = (
            self.weighted_centres if deferred is None else self.weighted_centres.data
        )  # which autograd has saved by then
        product = partial(
            multiply, exponentials.T, factors, self._dtype, out=out, accumulate=is_more
        )
        if deferred is None:
            product()
        else:
            deferred.append(product)


def forward(inputs: Inputs, settings: Settings, others: Others) -> tuple[Parts, Saved]:
    """The parts of a loss, and what the backward pass needs.

    The product of the last chunk is no part of the former: it is put in ``deferred``, where given,
    to be done before the backward pass, while the parts are summed over processes.
    """
    weight, rule, dtype = inputs.weight, others.rule, working_dtype(*inputs[:2])
    terms, deferred = Terms(others, differentiate=settings.differentiate), others.deferred
    own = inputs.own.clamp(min=0) if settings.partial else inputs.own
    num_rows, found = len(own), pairs(inputs.embeddings, weight.index_select(0, own))
    theta, unit = found.theta[:, 0], found.directions[:num_rows].to(dtype)
    scales, bounded = scales_of(inputs, settings, dtype, rule)
    chunks, sums = Chunks(inputs, settings, unit, scales, terms), _Sums(terms, dtype)
    share = None if rule.summed else inputs.class_share
    mean_direction = None if share is None else unit.new_zeros(unit.shape[1])
    kept = _Kept(settings, unit, None if chunks.spans[0] is None else weight.shape[0])
    for span in chunks.spans:
        part = chunks.rows(weight, span)
        inverse = inverse_lengths(part, dtype)
        directions = chunks.directions(part, inverse)
        factors = chunks.factors(directions)
        out = kept.place_of(span)
        if bounded:
            exponentials, of_chunk = chunks.exponentials(span, factors, out=out)
        else:
            logits = chunks.logits(span, factors, out)
            exponentials, of_chunk = chunks.exponentiate(logits, sums.shift_for(logits), out)
        # Several chunks are summed in the wider type.
        of_chunk = of_chunk if span is None else of_chunk.to(theta.dtype)
        sums.add(exponentials, of_chunk, factors, deferred if span is chunks.spans[-1] else None)
        if share is not None and mean_direction is not None:
            of_centre = chunks.rows(share, span) * inverse[:, 0]
            mean_direction.addmv_(part.to(dtype).T, of_centre)
        kept.keep(span, inverse, exponentials, directions)
    assert sums.total is not None
    assert kept.inverse is not None

    negatives, over_total = sums.total.to(theta.dtype), None
    if not rule.summed:
        negatives = negatives.log() + sums.shifts[-1] if sums.shifts else negatives.log()
        if settings.differentiate:
            total, has_one_class = sums.total, weight.shape[0] == rule.sub_centers
            if settings.partial or has_one_class or rule.terms is not None:
                total = torch.threshold(total, 0, math.inf)  # a row may have no negatives
            over_total = total.reciprocal().to(dtype)
            terms.rescale(over_total)
            over_total = over_total[:, None]
    saved = Saved(
        unit=unit,
        inverse_of_rows=found.inverse[:num_rows].to(dtype),
        inverse=kept.inverse,
        directions=kept.directions,
        tangent=found.tangent.to(dtype),
        cos_sin=(found.cos_sin * found.inverse[num_rows:]).to(dtype),
        weighted_centres=sums.weighted_centres,
        over_total=over_total,
        mean_direction=mean_direction,
        stashed=kept.stashed,
        shifts=torch.stack(sums.shifts) if sums.shifts and settings.differentiate else None,
        bias_slope=terms.bias_slope,
    )
    return Parts(theta, negatives, None if mean_direction is None else unit @ mean_direction), saved


class _Kept:
    """What is kept of each chunk: in one piece, or as it is where there is one chunk."""

    def __init__(self, settings: Settings, unit: Tensor, several: int | None) -> None:
        self._stash = settings.stash
        self.inverse: Tensor | None = None
        self.stashed: Tensor | None = None
        self.directions: Tensor | None = None
        if several is not None:
            self.inverse = unit.new_empty(several, 1)
            if settings.stash:
                shape = several, unit.shape[0]
                self.stashed = unit.new_empty(shape, dtype=settings.product_dtype)

    def place_of(self, span: slice | None) -> Tensor | None:
        """Where E of a chunk is to be kept, if there is such a place already."""
        return None if self.stashed is None or span is None else self.stashed[span]

    def keep(
        self, span: slice | None, inverse: Tensor, exponentials: Tensor, directions: Tensor
    ) -> None:
        """Keep what a chunk has."""
        if span is not None and self.inverse is not None:
            self.inverse[span] = inverse
        else:
            self.inverse = inverse
            if self._stash:
                self.stashed, self.directions = exponentials, directions


def backward(
    grads: Parts,
    inputs: Inputs,
    settings: Settings,
    saved: Saved,
    others: Others,
    needed: Sequence[bool],
) -> Gradients:
    """The gradients of embeddings, weight and row_scale, where they are needed."""
    unit, weighted_centres, dtype = saved.unit, saved.weighted_centres, saved.unit.dtype
    assert weighted_centres is not None
    scales, _ = scales_of(inputs, settings, dtype, others.rule)
    of_negatives = grads.negatives.to(dtype)[:, None]
    factor = of_negatives if saved.over_total is None else of_negatives * saved.over_total
    scaled = factor * scales
    of_theta = grads.theta.to(dtype)[:, None]
    of_embeddings = of_weight = of_scale = None
    if needed[0]:
        along = scaled * weighted_centres
        if saved.mean_direction is not None and grads.mean_cosine is not None:
            along.addr_(grads.mean_cosine, saved.mean_direction)
        _take_off_along(unit, along)
        along.addcmul_(saved.tangent, of_theta, value=-1).mul_(saved.inverse_of_rows)
        of_embeddings = along.to(inputs.embeddings.dtype)
    if needed[2]:
        of_scale = settings.scale * (factor * weighted_centres * unit).sum(1)
    if needed[1]:
        of_mean = None
        if saved.mean_direction is not None and grads.mean_cosine is not None:
            of_mean = grads.mean_cosine @ unit
        terms = Terms(others, differentiate=settings.differentiate)
        chunks = Chunks(inputs, settings, unit, scales, terms)
        cosine, sine = (saved.cos_sin * of_theta).unbind()
        of_targets = torch.mul(saved.tangent, cosine).addcmul_(unit, sine, value=-1)
        of_weight = _weight_gradient(chunks, saved, unit * scaled, of_targets, of_mean)
    return Gradients(of_embeddings, of_weight, of_scale)


def _weight_gradient(
    chunks: Chunks, saved: Saved, rows: Tensor, of_targets: Tensor, of_mean: Tensor | None
) -> Tensor:
    """The gradient of the weight, (C, d), from E and the rows that it is multiplied with.

    Args:
        chunks: The classes.
        saved: What the forward pass kept.
        rows: (N, d) the scaled directions of the embeddings, relative to the last shift.
        of_targets: (N, d), the gradients of the targets' centres through their angles.
        of_mean: (d,), the gradient of each direction by the mean cosine, over its share.
    """
    weight, dtype = chunks.weight, rows.dtype
    is_whole, same = chunks.spans[0] is None, weight.dtype == dtype
    gradient = weight if is_whole else weight.new_empty(weight.shape)
    for index, span in enumerate(chunks.spans):
        part, inverse = chunks.rows(weight, span), chunks.rows(saved.inverse, span)
        directions = saved.directions
        if directions is None:
            directions = chunks.directions(part, inverse)
        exponentials, factor = _exponentials(chunks, saved, index, span, directions, rows)
        result = chunks.rows(gradient, span)
        out = result if same and not is_whole else chunks.workspace("gradient", part.shape, dtype)
        found = multiply(exponentials, factor.to(exponentials.dtype), dtype, out=out)
        if of_mean is not None and chunks.class_share is not None:
            found.addr_(chunks.rows(chunks.class_share, span), of_mean)
        if not chunks.rule.keep_lengths:
            # A centre's length does not matter: its gradient has no component along it.
            out = chunks.workspace("scratch", part.shape, dtype)
            _take_off_along(directions, found, out).mul_(inverse)
        if not same:  # the target's part too, before it is rounded
            row, is_here = chunks.own_row(span)
            found.index_add_(0, row, of_targets * is_here[:, None])
        if is_whole:
            gradient = found.to(weight.dtype)
        elif not same:
            result.copy_(found)
    if same:
        own = chunks.own if chunks.has_all_targets else chunks.own.clamp(min=0)
        gradient.index_add_(0, own, of_targets)
    return gradient


def _take_off_along(directions: Tensor, vectors: Tensor, scratch: Tensor | None = None) -> Tensor:
    """The vectors without their components along unit vectors, all (K, d), in their place."""
    along = torch.mul(vectors, directions, out=scratch).sum(1, keepdim=True)
    return vectors.addcmul_(directions, along, value=-1)


def whole_step(
    inputs: Inputs,
    scale: float,
    others: Others,
    of_parts: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Both passes at once, over a few classes of a rule that ``has_slopes``.

    Where the products are small they are in float64: then those of the targets' gradients can be
    among them.

    Args:
        inputs: Embeddings, weight and own.
        scale: The scale, up to ``BOUNDED_SCALE``.
        others: The rule, and the ranking to fill.
        of_parts: From the target angles and the negatives (N,) to what the loss is made of, (N,)
            too, and its gradients by both, that by the negatives times the scale.

    Returns:
        What the loss is made of, and the gradients of the embeddings and of the weight.
    """
    embeddings, weight, own = inputs[:3]
    sizes, rows, found = (embeddings.shape[0], weight.shape[0]), own[None], None
    if embeddings.numel() * sizes[1] <= FEW_PRODUCTS:
        both, inverse = unit_vectors(embeddings, weight)
    else:
        found, dtype = pairs(embeddings, weight, own), working_dtype(embeddings, weight)
        both, inverse = found.directions.to(dtype), found.inverse.to(dtype)
    unit, centres = both.split_with_sizes(sizes)
    cosines = torch.mm(centres, unit.T)
    if found is None:
        theta, sines = angle_of_units(unit, centres.index_select(0, own))
    else:
        theta = found.theta[:, 0]
    rule, slopes = others.rule, None
    terms, is_nearest = rule.nearest(cosines)
    labels = rows if rule.sub_centers == 1 else rows // rule.sub_centers
    if others.ranking is not None:
        of_others = terms.scatter(0, labels, -math.inf).amax(0)
        others.ranking.add(terms.gather(0, labels)[0], of_others)
    if rule.with_slopes is not None:
        terms, slopes = rule.with_slopes(terms)
    scaled = terms.mul_(scale) if slopes is None else terms * scale  # which may be one tensor
    exponentials = scaled.scatter_(0, labels, -math.inf).exp_()
    total = exponentials.sum(0)
    if slopes is not None:
        exponentials *= slopes
    excess, of_theta, of_negatives = of_parts(theta, total.to(theta.dtype).log())
    exponentials *= of_negatives.to(both.dtype).div_(total)
    of_cosines = rule.of_centres(exponentials, is_nearest)
    if found is None:
        of_cosines.scatter_(0, rows, of_theta.div_(sines).neg_()[None])
    gradient = torch.empty_like(both)
    of_rows, of_centres = gradient.split_with_sizes(sizes)
    torch.mm(of_cosines.T, centres, out=of_rows)
    torch.mm(of_cosines, unit, out=of_centres)
    _take_off_along(both, gradient)
    if found is not None:
        tangent, of_angle = found.tangent.to(both.dtype), of_theta.to(both.dtype)[:, None]
        cosine, sine = (found.cos_sin.to(both.dtype) * of_angle).unbind()
        of_rows.addcmul_(tangent, of_angle, value=-1)
        of_centres.index_add_(0, own, tangent.mul_(cosine).addcmul_(unit, sine, value=-1))
    gradient *= inverse
    return excess, of_rows.to(embeddings.dtype), of_centres.to(weight.dtype)


def _exponentials(
    chunks: Chunks,
    saved: Saved,
    index: int,
    span: slice | None,
    directions: Tensor,
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """E of a chunk, kept or computed again, and what to multiply it with (N, d)."""
    if saved.stashed is None:
        last = None if saved.shifts is None else saved.shifts[-1]
        return chunks.exponentials(span, chunks.factors(directions), last)[0], rows
    if saved.shifts is not None and span is not None:
        rows = rows * (saved.shifts[index] - saved.shifts[-1]).exp()[:, None]
    return chunks.rows(saved.stashed, span), rows


def scales_of(
    inputs: Inputs, settings: Settings, dtype: torch.dtype, rule: Rule
) -> tuple[float | Tensor, bool]:
    """The scale of each row, (N, 1) or one for all; whether no maximum has to be subtracted."""
    if inputs.row_scale is not None:
        return (settings.scale * inputs.row_scale.to(dtype))[:, None], rule.summed
    is_small = settings.scale <= BOUNDED_SCALE and rule.has_slopes
    return settings.scale, rule.summed or is_small

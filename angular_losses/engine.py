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
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import kernels
from .geometry import angle_and_tangent, normalize, precise_dtype

# Up to this scale exp(s cos), its sums over classes and their inverses stay inside float32
# (e^64 = 6e27), and no maximum has to be found and subtracted.
BOUNDED_SCALE = 64.0

_Result = TypeVar("_Result", bound=tuple[Tensor, ...])


class Parts(NamedTuple):
    """What a loss needs of the cosines, each (N,): the target's angle and two sums over classes."""

    theta: Tensor
    log_negatives: Tensor
    mean_cosine: Tensor


def margin_parts(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    row_scale: Tensor | None,
    class_share: Tensor | None,
    scale: float,
    chunk: int,
    product_dtype: torch.dtype,
    stash: bool,
) -> Parts:
    """The parts of the margin softmax, differentiable once.

    Args:
        embeddings: (N, d), floating point.
        weight: (C, d) class centres, floating point.
        labels: (N,) int64 in [0, C).
        row_scale: (N,) factor of the scale for each row, or None.
        class_share: (C,) the weights kappa, in the :func:`working_dtype`; None makes them 0.
        scale: The scale s > 0.
        chunk: The number of classes in a chunk.
        product_dtype: The dtype of the factors of the matrix products.
        stash: Whether E is kept for the backward pass, or computed again.

    Returns:
        theta and log_negatives in float64 (float32 on MPS), mean_cosine in the working dtype.
    """
    variables = (embeddings, weight) if row_scale is None else (embeddings, weight, row_scale)
    differentiate = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in variables)
    arguments = (
        embeddings,
        weight,
        labels,
        row_scale,
        class_share,
        scale,
        chunk,
        product_dtype,
        stash and differentiate,
        differentiate,
    )
    if torch.compiler.is_compiling():
        return Parts(*_forward_operator(*arguments)[:3])
    return Parts(*_Eager.apply(*arguments))  # type: ignore[no-untyped-call]


def working_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of sums and of products in full precision: float32, or float64 if either is."""
    return torch.float64 if torch.float64 in (embeddings.dtype, weight.dtype) else torch.float32


class _Chunks:
    """The classes, chunk by chunk, in one workspace."""

    def __init__(
        self,
        weight: Tensor,
        inverse: Tensor,
        unit: Tensor,
        labels: Tensor,
        scales: float | Tensor,
        chunk: int,
        product_dtype: torch.dtype,
    ) -> None:
        num_classes, size = weight.shape
        self.size = min(chunk, num_classes)
        starts = range(0, num_classes, self.size)
        self.spans = [slice(start, min(start + self.size, num_classes)) for start in starts]
        self.weight, self.inverse, self.labels = weight, inverse, labels
        self.product_dtype = product_dtype
        self._scaled = (unit * scales).to(product_dtype).T
        self._has_kernel = kernels.is_available(weight.device, product_dtype)
        self._centres = unit.new_empty(self.size, size, dtype=product_dtype)
        self._exponentials = unit.new_empty(self.size, unit.shape[0], dtype=product_dtype)
        # The same memory again where the products are done in the working dtype.
        self._is_reduced = product_dtype != unit.dtype
        self._unit, self._logits = self._centres, self._exponentials
        if self._is_reduced:
            self._unit = unit.new_empty(self.size, size)
            self._logits = unit.new_empty(self.size, unit.shape[0])

    def first_centres(self, span: slice) -> Tensor:
        """The directions of a chunk of centres (K, d), to multiply; finds their inverse lengths."""
        weight = self.weight[span]
        centres = self._centres[: weight.shape[0]]
        self.inverse[span] = normalize(weight, self._unit[: weight.shape[0]], out=centres)
        return centres

    def unit_centres(self, span: slice) -> Tensor:
        """The same directions in the working dtype, from the inverse lengths."""
        weight = self.weight[span]
        return torch.mul(weight, self.inverse[span], out=self._unit[: weight.shape[0]])

    def centres(self, unit_centres: Tensor) -> Tensor:
        """Those to multiply again."""
        if not self._is_reduced:
            return unit_centres
        return self._centres[: unit_centres.shape[0]].copy_(unit_centres)

    def logits(self, span: slice, centres: Tensor, out: Tensor | None = None) -> Tensor:
        """The logits of a chunk (K, N) in the working dtype; -inf for each target that is in it.

        In ``out``, where E is to be kept, if that has the working dtype.
        """
        logits = self._logits[: centres.shape[0]] if out is None or self._is_reduced else out
        _multiply(centres, self._scaled, out=logits)
        if len(self.spans) == 1:
            return logits.scatter_(0, self.labels[None], -torch.inf)
        row, is_here = self.own(span)
        present = logits.gather(0, row[None])
        return logits.scatter_(0, row[None], present.masked_fill_(is_here, -torch.inf))

    def own(self, span: slice) -> tuple[Tensor, Tensor]:
        """The place of each row's target in a chunk (N,), and whether it is there at all (N,)."""
        own = self.labels - span.start
        row = own.clamp(0, span.stop - span.start - 1)
        return row, row == own

    def exponentials(
        self, span: slice, centres: Tensor, shift: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """E of a chunk (K, N), to multiply, and its sums over the classes (N,)."""
        if not self._has_kernel:
            return self.exponentiate(self.logits(span, centres, out), shift, out)
        out = self._exponentials[: centres.shape[0]] if out is None else out
        columns = self._scaled.T
        return out, kernels.exponentials(centres, columns, self.labels, span.start, shift, out)

    def exponentiate(
        self, logits: Tensor, shift: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same from the logits, in their place."""
        if shift is not None:
            logits -= shift
        sums = logits.exp_().sum(0)
        if not self._is_reduced:
            return logits, sums
        out = self._exponentials[: logits.shape[0]] if out is None else out
        return out.copy_(logits), sums


def _forward(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_scale: Tensor | None,
    class_share: Tensor | None,
    scale: float,
    chunk: int,
    product_dtype: torch.dtype,
    stash: bool,
    differentiate: bool,
) -> tuple[Tensor, ...]:
    """The three parts, and what the backward pass needs: the outputs of the operator."""
    unit, inverse_of_rows, theta, tangent = _rows(embeddings, weight, labels)
    inverse = unit.new_empty(weight.shape[0], 1)
    scales, bounded = _scales(scale, row_scale, unit.dtype)
    chunks = _Chunks(weight, inverse, unit, labels, scales, chunk, product_dtype)

    pull = unit.new_zeros(unit.shape if differentiate else 0)
    mean_direction = unit.new_zeros(unit.shape[1] if class_share is not None else 0)
    stashed = unit.new_empty(weight.shape[0] if stash else 0, unit.shape[0], dtype=product_dtype)
    shifts = unit.new_empty(0 if bounded else len(chunks.spans), unit.shape[0])
    total = theta.new_zeros(unit.shape[0])
    if not bounded:  # no logit is below -s, which holds for a row without negatives too
        largest = (unit.new_zeros(unit.shape[0], 1) - scales)[:, 0]
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
            exponentials, sums = chunks.exponentiate(logits, largest, kept)
        total += sums
        if differentiate:
            _multiply(exponentials.T, centres, out=pull, accumulate=True)
        if class_share is not None:
            share = class_share[span] * inverse[span, 0]
            mean_direction.addmv_(weight[span].to(unit.dtype).T, share)

    log_negatives = total.log()
    if not bounded:
        log_negatives += largest
    if differentiate:
        pull *= total.reciprocal().masked_fill_(total == 0, 0).to(unit.dtype)[:, None]
    mean_cosine = (
        unit @ mean_direction if class_share is not None else unit.new_zeros(unit.shape[0])
    )
    return (
        theta,
        log_negatives,
        mean_cosine,
        unit,
        inverse_of_rows,
        tangent,
        inverse,
        pull,
        mean_direction,
        stashed,
        shifts,
    )


def _backward(
    grad_theta: Tensor,
    grad_log_negatives: Tensor,
    grad_mean_cosine: Tensor,
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_scale: Tensor | None,
    class_share: Tensor | None,
    theta: Tensor,
    log_negatives: Tensor,
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
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of embeddings, weight and row_scale; empty where they are not needed."""
    scales, bounded = _scales(scale, row_scale, unit.dtype)
    pulled = grad_log_negatives.to(unit.dtype)[:, None] * scales
    turned = grad_theta.to(unit.dtype)[:, None]
    grad_embeddings, grad_weight, grad_scale = (unit.new_empty(0) for _ in range(3))
    if needed[0]:
        along = pulled * pull
        if class_share is not None:
            along.addr_(grad_mean_cosine, mean_direction)
        along.addcmul_(unit, (along * unit).sum(1, keepdim=True), value=-1)
        along.addcmul_(tangent, turned, value=-1)
        grad_embeddings = torch.mul(along, inverse_of_rows, out=torch.empty_like(embeddings))
    if needed[2]:
        grad_scale = scale * grad_log_negatives * (pull * unit).sum(1)
    if needed[1]:
        chunks = _Chunks(weight, inverse, unit, labels, scales, chunk, product_dtype)
        last = None if bounded else shifts[-1]
        log_total = log_negatives if last is None else log_negatives - last
        over_total = (-log_total).exp().masked_fill_(log_negatives == -torch.inf, 0)
        push = unit * (pulled * over_total.to(unit.dtype)[:, None])
        sine, cosine = (part.to(unit.dtype)[:, None] for part in (theta.sin(), theta.cos()))
        towards = (cosine * tangent).addcmul_(unit, sine, value=-1)
        towards *= turned * inverse.index_select(0, labels)
        mean_push = None if class_share is None else grad_mean_cosine @ unit
        grad_weight = _weight_gradient(
            chunks, push, towards, stashed, shifts, last, class_share, mean_push
        )
    return grad_embeddings, grad_weight, grad_scale


def _weight_gradient(
    chunks: _Chunks,
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
        _multiply(exponentials, factor.to(chunks.product_dtype), out=pushed)
        if class_share is not None and mean_push is not None:
            pushed.addr_(class_share[span], mean_push)
        # A centre's length does not matter: its gradient has no component along it.
        radial = torch.mul(pushed, unit_centres, out=scratch[:size]).sum(1, keepdim=True)
        torch.mul(pushed, inverse[span], out=tangential)
        tangential.addcmul_(unit_centres, radial.mul_(inverse[span]), value=-1)
        if tangential is not result:  # the target's part too, before it is rounded
            row, is_here = chunks.own(span)
            tangential.index_add_(0, row, towards * is_here[:, None])
            result.copy_(tangential)
    if weight.dtype == dtype:
        gradient.index_add_(0, chunks.labels, towards)
    return gradient


def _rows(
    embeddings: Tensor, weight: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Directions (N, d), inverse lengths (N, 1), target angles (N,) and unit tangents (N, d)."""
    dtype = working_dtype(embeddings, weight)
    unit = embeddings.new_empty(embeddings.shape, dtype=precise_dtype(embeddings.device))
    own = torch.empty_like(unit)
    inverse = normalize(embeddings, unit, out=unit)
    normalize(weight.index_select(0, labels), own, out=own)
    theta, tangent = angle_and_tangent(unit, own)
    return unit.to(dtype), inverse, theta, tangent.to(dtype)


def _scales(
    scale: float, row_scale: Tensor | None, dtype: torch.dtype
) -> tuple[float | Tensor, bool]:
    """The scale of each row, (N, 1) or one for all, and whether it is known to be small enough."""
    if row_scale is None:
        return scale, scale <= BOUNDED_SCALE
    return (scale * row_scale.to(dtype))[:, None], False


def _multiply(first: Tensor, second: Tensor, *, out: Tensor, accumulate: bool = False) -> None:
    """The matrix product into ``out``, whose dtype may be wider than that of the factors."""
    if first.dtype == out.dtype:
        if accumulate:
            out.addmm_(first, second)
        else:
            torch.mm(first, second, out=out)
    elif first.is_cuda:  # its sums are in float32, and stay there
        if accumulate:
            torch.addmm(out, first, second, out_dtype=out.dtype, out=out)
        else:
            torch.mm(first, second, out_dtype=out.dtype, out=out)
    elif accumulate:  # the CPU rounds each product to the dtype of its factors
        out += torch.mm(first, second)
    else:
        out.copy_(torch.mm(first, second))


def _without_autocast(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """The function with its dtypes as it has them, whatever surrounds the call."""

    def run(first: Tensor, *others: Any) -> _Result:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *others)

    return run


_forward_operator = torch.library.custom_op(
    "angular_losses::margin_parts",
    _without_autocast(_forward),
    mutates_args=(),
    schema=(
        "(Tensor embeddings, Tensor weight, Tensor labels, Tensor? row_scale, Tensor? class_share, "
        "float scale, int chunk, ScalarType product_dtype, bool stash, bool differentiate) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
_backward_operator = torch.library.custom_op(
    "angular_losses::margin_parts_backward",
    _without_autocast(_backward),
    mutates_args=(),
    schema=(
        "(Tensor grad_theta, Tensor grad_log_negatives, Tensor grad_mean_cosine, "
        "Tensor embeddings, Tensor weight, Tensor labels, Tensor? row_scale, Tensor? class_share, "
        "Tensor theta, Tensor log_negatives, Tensor unit, Tensor inverse_of_rows, Tensor tangent, "
        "Tensor inverse, Tensor pull, Tensor mean_direction, Tensor stashed, Tensor shifts, "
        "float scale, int chunk, ScalarType product_dtype, bool[] needed) -> "
        "(Tensor, Tensor, Tensor)"
    ),
)


@_forward_operator.register_fake
def _(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    row_scale: Tensor | None,
    class_share: Tensor | None,
    scale: float,
    chunk: int,
    product_dtype: torch.dtype,
    stash: bool,
    differentiate: bool,
) -> tuple[Tensor, ...]:
    (num_rows, size), num_classes = embeddings.shape, weight.shape[0]
    unit = embeddings.new_empty(num_rows, size, dtype=working_dtype(embeddings, weight))
    theta = unit.new_empty(num_rows, dtype=precise_dtype(unit.device))
    _, bounded = _scales(scale, row_scale, unit.dtype)
    return (
        theta,
        torch.empty_like(theta),
        unit.new_empty(num_rows),
        unit,
        theta.new_empty(num_rows, 1),
        torch.empty_like(unit),
        unit.new_empty(num_classes, 1),
        unit.new_empty(unit.shape if differentiate else 0),
        unit.new_empty(size if class_share is not None else 0),
        unit.new_empty(num_classes if stash else 0, num_rows, dtype=product_dtype),
        unit.new_empty(0 if bounded else -(-num_classes // chunk), num_rows),
    )


@_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    grad_log_negatives, embeddings, weight = arguments[1], *arguments[3:5]
    working = embeddings.new_empty(0, dtype=working_dtype(embeddings, weight))
    return tuple(
        torch.empty_like(tensor if wanted else working)
        for tensor, wanted in zip(
            (embeddings, weight, grad_log_negatives), arguments[-1], strict=True
        )
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    theta, log_negatives, _, *saved = output
    ctx.save_for_backward(*inputs[:5], theta, log_negatives, *saved)
    ctx.settings = inputs[5:8]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    like = (tensors[5], tensors[6], tensors[7][:, 0])
    of_parts = [
        torch.zeros_like(part) if grad is None else grad
        for part, grad in zip(like, grads[:3], strict=True)
    ]
    needed = [ctx.needs_input_grad[index] for index in (0, 1, 3)]
    # With a graph wanted of the backward pass itself, the operator says that there is none.
    backward = _backward_operator if torch.is_grad_enabled() else _without_autocast(_backward)
    found = backward(*of_parts, *tensors, *ctx.settings, needed)
    embeddings, weight, row_scale = (
        grad if wanted else None for grad, wanted in zip(found, needed, strict=True)
    )
    return embeddings, weight, None, row_scale, *[None] * 6


class _Eager(torch.autograd.Function):
    """The operator without its dispatch, which would take longer than a small batch does."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = _forward(*arguments)
        _save(ctx, arguments, output)
        return output[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, *grads)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "margin_softmax_loss: the modes 'stash' and 'recompute' have first derivatives only; "
        "for a second derivative pass mode='dense'"
    )


_forward_operator.register_autograd(_differentiate, setup_context=_save)
_backward_operator.register_autograd(_refuse)

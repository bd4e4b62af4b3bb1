"""The engine's two passes as registered operators, and the autograd that joins them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler
from torch.nn import functional as F

from ..geometry import precise_dtype, without_autocast, working_dtype
from ..margins import Combined, KnownDescent
from . import passes
from .chunks import BOUNDED_SCALE, PLAIN, Inputs, Others, Settings
from .passes import Gradients, Parts, Saved


class Ending(NamedTuple):
    """From the parts to the loss of a batch, where the margin knows its derivative.

    Attributes:
        margin: The margin.
        scale: The scale of the target logits.
        row_weight: The weight of each row's loss, a number or (N,), without a gradient.
        is_summed: Whether the losses of the rows are added up.
        is_mean: Whether that is their plain mean.
    """

    margin: KnownDescent | Combined
    scale: float
    row_weight: float | Tensor
    is_summed: bool
    is_mean: bool

    def gradients(self, theta: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits' excess over the target's (N,), of which the softplus is a row's loss.

        And the derivatives of the loss, by theta and by the negatives times the scale.
        """
        target, descent = self.margin.with_descent(theta)
        excess = torch.sub(negatives, target, alpha=self.scale)
        pull = torch.sigmoid(excess) * (self.row_weight * self.scale)
        return excess, pull * descent, pull

    def reduced(self, excess: Tensor) -> Tensor:
        """The weighted losses of the rows, or their sum, from what :meth:`gradients` finds."""
        losses: Tensor = F.softplus(excess, threshold=50)
        if not self.is_mean:
            losses = losses * self.row_weight
            return losses.sum() if self.is_summed else losses
        return losses.mean()


def margin_parts(inputs: Inputs, settings: Settings, others: Others) -> Parts:
    """The parts of a loss, differentiable once."""
    if not torch.compiler.is_compiling():
        return _eager(inputs, settings, others)
    if others.rule == PLAIN and others.begin_sum is None and others.ranking is None:
        theta, negatives, mean_cosine, *_ = _forward_operator(*inputs, *settings)
        return Parts(theta, negatives, None if inputs.class_share is None else mean_cosine)
    # The compiled graph breaks here.
    return _disable_dynamo(_eager)(inputs, settings, others)


def _eager(*problem: Any) -> Parts:
    inputs, _, others = problem
    variables = inputs.embeddings, inputs.weight, inputs.row_scale, others.bias
    return Parts(*_Parts.apply(*variables, problem))  # type: ignore[no-untyped-call]


def margin_loss(inputs: Inputs, settings: Settings, others: Others, ending: Ending) -> Tensor:
    """The weighted losses of the rows (N,), or their sum: one step of autograd."""
    problem = inputs, settings, others
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        inputs.embeddings, inputs.weight, None, None, problem, ending
    )
    return loss


class _Parts(torch.autograd.Function):
    """The operator without its dispatch, which would take longer than a small batch does."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Parts:
        inputs, settings, others = arguments[4]
        parts, saved = passes.forward(inputs, settings, others)
        _save(ctx, inputs, settings, saved, others)
        ctx.set_materialize_grads(False)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, saved, others, _ = _unpacked(ctx)
        nothing = saved.unit.new_zeros(len(saved.unit))
        theta, negatives = (nothing if grad is None else grad for grad in grads[:2])
        return *_gradients(ctx, Parts(theta, negatives, grads[2]), inputs, saved, others), None


class _Loss(torch.autograd.Function):
    """The softplus of the negatives less the target."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        (inputs, settings, others), ending = arguments[4:]
        ctx.is_done = ending.is_summed and _fits_whole_step(inputs, settings, others)
        if ctx.is_done:  # but for the factor to come
            excess, *found = passes.whole_step(inputs, ending.scale, others, ending.gradients)
            ctx.save_for_backward(*found)
            ctx.variables = inputs[:2]  # never read, so not saved
        else:
            parts, saved = passes.forward(inputs, settings, others)
            excess, of_theta, pull = ending.gradients(parts.theta, parts.negatives)
            if settings.differentiate:
                _save(ctx, inputs, settings, saved, others, of_theta, pull / ending.scale)
        loss: Tensor = ending.reduced(excess)
        return loss.to(working_dtype(*inputs[:2]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_done:
            with torch.no_grad():
                found = [grad * each for each in ctx.saved_tensors]
            return *_once(found, *ctx.variables, grad), *[None] * 4
        inputs, saved, others, (of_theta, of_negatives) = _unpacked(ctx)
        with torch.no_grad():
            grads = Parts(grad * of_theta, grad * of_negatives, None)
        return *_gradients(ctx, grads, inputs, saved, others, grad), None, None


def _fits_whole_step(inputs: Inputs, settings: Settings, others: Others) -> bool:
    """Whether both passes can be done at once: over few classes, while all is in the cache.

    Not in float16, where the factor to come is a GradScaler's, without which gradients underflow.
    """
    embeddings, weight = inputs[:2]
    return (
        others.rule.sub_centers < weight.shape[0] <= min(settings.chunk, embeddings.shape[0])
        and embeddings.requires_grad
        and weight.requires_grad
        and settings.differentiate
        and settings.scale <= BOUNDED_SCALE
        and others.rule.has_slopes
        and torch.float16 not in (embeddings.dtype, weight.dtype)
    )


def _save(
    ctx: Any, inputs: Inputs, settings: Settings, saved: Saved, others: Others, *more: Tensor
) -> None:
    ctx.save_for_backward(*inputs, *saved, others.target, others.bias, *more)
    ctx.settings, ctx.rule, ctx.begin_sum = settings, others.rule, others.begin_sum


def _unpacked(ctx: Any) -> tuple[Inputs, Saved, Others, list[Tensor]]:
    tensors = iter(ctx.saved_tensors)  # to be read once
    inputs = Inputs(*(next(tensors) for _ in Inputs._fields))
    saved = Saved(*(next(tensors) for _ in Saved._fields))
    others = Others(ctx.rule, next(tensors), next(tensors), ctx.begin_sum)
    return inputs, saved, others, list(tensors)


def _gradients(
    ctx: Any, grads: Parts, inputs: Inputs, saved: Saved, others: Others, *variables: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of embeddings, weight, scale of rows and bias."""
    needed = list(ctx.needs_input_grad[:3])

    def run(*needed: bool) -> Gradients:
        return passes.backward(grads, inputs, ctx.settings, saved, others, needed)

    with torch.no_grad(), without_autocast(saved.unit.device):
        if others.begin_sum is None or not needed[0]:
            found = run(*needed)
        else:
            rows = run(True, False, needed[2])
            assert rows.embeddings is not None
            end_sum = others.begin_sum(rows.embeddings)
            of_weight = run(False, needed[1], False).weight
            found = Gradients(end_sum(), of_weight, rows.row_scale)
        of_bias = None
        if ctx.needs_input_grad[3] and saved.bias_slope is not None:
            of_bias = grads.negatives.to(saved.bias_slope.dtype) * saved.bias_slope
    of = inputs.embeddings, inputs.weight, inputs.row_scale, others.bias, *grads, *variables
    return _once((*found, of_bias), *of)


def _once(
    gradients: Sequence[Tensor | None], *variables: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients; where a graph is wanted of the backward pass itself, that says it has none."""
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return tuple(None if each is None else _Once.apply(each, *variables) for each in gradients)  # type: ignore[no-untyped-call]


class _Once(torch.autograd.Function):
    """A gradient, to be differentiated no further."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *variables: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        _refuse()


def _refuse(*_: object) -> NoReturn:
    raise RuntimeError(
        "the modes 'stash' and 'recompute' have first derivatives only; "
        "for a second derivative pass mode='dense'"
    )


# Under torch.compile the passes are operators of a plain rule, of tensors and numbers alone. What
# is None is a tensor () there.


def _operator_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, settings = Inputs(*arguments[:5]), Settings(*arguments[5:])
    with without_autocast(inputs.weight.device):
        parts, saved = passes.forward(inputs, settings, Others())
    nothing = saved.unit.new_zeros(())
    return tuple(nothing.clone() if each is None else each for each in (*parts, *saved))


def _operator_backward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors: list[Any] = [
        None if each is None or each.dim() == 0 else each for each in arguments[:20]
    ]
    grads, inputs, saved = Parts(*tensors[:3]), Inputs(*tensors[3:8]), Saved(*tensors[8:])
    settings, needed = Settings(*arguments[20:-1]), arguments[-1]
    with without_autocast(saved.unit.device):
        found = passes.backward(grads, inputs, settings, saved, Others(), needed)
    nothing = saved.unit.new_zeros(())
    return tuple(nothing.clone() if each is None else each for each in found)


_INPUTS = "Tensor embeddings, Tensor weight, Tensor own, Tensor? row_scale, Tensor? class_share, "
_SETTINGS = (
    "float scale, int chunk, ScalarType product_dtype, bool stash, bool differentiate, bool partial"
)
_OUTPUTS = ", ".join(["Tensor"] * (len(Parts._fields) + len(Saved._fields)))
_forward_operator = torch.library.custom_op(
    "angular_losses::margin_parts",
    _operator_forward,
    mutates_args=(),
    schema=f"({_INPUTS}{_SETTINGS}) -> ({_OUTPUTS})",
)
_backward_operator = torch.library.custom_op(
    "angular_losses::margin_parts_backward",
    _operator_backward,
    mutates_args=(),
    schema=(
        f"({''.join(f'Tensor grad_{name}, ' for name in Parts._fields)}{_INPUTS}"
        f"{''.join(f'Tensor {name}, ' for name in Saved._fields)}{_SETTINGS}, bool[] needed) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)


@_forward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, settings = Inputs(*arguments[:5]), Settings(*arguments[5:])
    (num_rows, size), num_classes = inputs.embeddings.shape, inputs.weight.shape[0]
    dtype = working_dtype(inputs.embeddings, inputs.weight)
    unit = inputs.embeddings.new_empty(num_rows, size, dtype=dtype)
    theta = unit.new_empty(num_rows, dtype=precise_dtype(unit.device))
    _, bounded = passes.scales_of(inputs, settings, dtype, PLAIN)
    has_mean, differentiate = inputs.class_share is not None, settings.differentiate
    stash_dtype = settings.product_dtype if settings.stash else dtype
    chunks = -(-num_classes // min(settings.chunk, num_classes))

    def optional(exists: bool, *shape: Any, dtype: torch.dtype = dtype) -> Tensor:
        return unit.new_empty(shape if exists else (), dtype=dtype)

    return (
        theta,
        torch.empty_like(theta),
        optional(has_mean, num_rows),
        unit,
        unit.new_empty(num_rows, 1),
        unit.new_empty(num_classes, 1),
        optional(settings.stash and chunks == 1, num_classes, size),
        unit.new_empty(num_rows, size),
        unit.new_empty(2, num_rows, 1),
        optional(differentiate, num_rows, size),
        optional(differentiate, num_rows, 1),
        optional(has_mean, size),
        optional(settings.stash, num_classes, num_rows, dtype=stash_dtype),
        optional(differentiate and not bounded, chunks, num_rows),
        optional(False),
    )


@_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    embeddings, weight = arguments[3:5]
    nothing = embeddings.new_empty((), dtype=working_dtype(embeddings, weight))
    # Not len(), which would be a constant of the compiled graph.
    like = embeddings, weight, nothing.new_empty(embeddings.shape[0])
    return tuple(
        each.new_empty(each.shape) if wanted else torch.empty_like(nothing)
        for each, wanted in zip(like, arguments[-1], strict=True)
    )


def _save_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.settings = inputs[5:]


def _differentiate_operator(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, theta, negatives, mean_cosine = ctx.saved_tensors[:8]
    of_parts = [
        torch.zeros_like(part) if grad is None else grad
        for part, grad in zip((theta, negatives, mean_cosine), grads, strict=False)
    ]
    needed = [ctx.needs_input_grad[index] for index in (0, 1, 3)]
    saved = ctx.saved_tensors[8:]
    found = _backward_operator(*of_parts, *inputs, *saved, *ctx.settings, needed)
    embeddings, weight, row_scale = (
        grad if wanted else None for grad, wanted in zip(found, needed, strict=True)
    )
    return embeddings, weight, None, row_scale, *[None] * 7


_forward_operator.register_autograd(_differentiate_operator, setup_context=_save_operator)
_backward_operator.register_autograd(_refuse)

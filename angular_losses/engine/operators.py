"""The engine's two passes as registered operators, and the autograd that joins them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler
from torch.nn import functional as F

from ..geometry import precise_dtype, without_autocast, working_dtype
from . import passes
from .chunks import BOUNDED_SCALE, PLAIN, Inputs, Others, Settings
from .passes import Gradients, Parts, Saved
from .planner import fits_at_once


class RowLoss(NamedTuple):
    """From the parts to the loss of a batch, where the margin knows its derivative.

    Attributes:
        with_descent: The margin, with minus its derivative by theta.
        scale: The scale of the target logits.
        row_weight: The weight of each row's loss, a number or (N,), without a gradient.
        is_summed: Whether the losses of the rows are added up.
        is_mean: Whether that is their plain mean.
    """

    with_descent: Callable[[Tensor], tuple[Tensor, Tensor]]
    scale: float
    row_weight: float | Tensor
    is_summed: bool
    is_mean: bool

    def gradients(self, theta: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits' excess over the target's (N,), of which the softplus is a row's loss.

        And the derivatives of the loss, by theta and by the negatives times the scale.
        """
        target, descent = self.with_descent(theta)
        excess = torch.sub(negatives, target, alpha=self.scale)
        of_negatives = torch.sigmoid(excess) * (self.row_weight * self.scale)
        return excess, of_negatives * descent, of_negatives

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


def margin_loss(inputs: Inputs, settings: Settings, others: Others, row_loss: RowLoss) -> Tensor:
    """The weighted losses of the rows (N,), or their sum: one step of autograd."""
    problem = inputs, settings, others
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        inputs.embeddings, inputs.weight, None, None, problem, row_loss
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
        (inputs, settings, others), row_loss = arguments[4:]
        ctx.is_done = row_loss.is_summed and _fits_whole_step(inputs, settings, others)
        if ctx.is_done:  # but for the factor to come
            excess, *found = passes.whole_step(inputs, row_loss.scale, others, row_loss.gradients)
            ctx.save_for_backward(*found, *inputs[:2])
        else:
            parts, saved = passes.forward(inputs, settings, others)
            excess, of_theta, scaled = row_loss.gradients(parts.theta, parts.negatives)
            if settings.differentiate:
                _save(ctx, inputs, settings, saved, others, of_theta, scaled / row_loss.scale)
        loss: Tensor = row_loss.reduced(excess)
        return loss.to(working_dtype(*inputs[:2]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_done:
            of_embeddings, of_weight, *variables = ctx.saved_tensors
            found = grad * of_embeddings, grad * of_weight
            return *_once(found, *variables, grad), *[None] * 4
        inputs, saved, others, (of_theta, of_negatives) = _unpacked(ctx)
        with torch.no_grad():
            grads = Parts(grad * of_theta, grad * of_negatives, None)
        return *_gradients(ctx, grads, inputs, saved, others, grad), None, None


def _fits_whole_step(inputs: Inputs, settings: Settings, others: Others) -> bool:
    """Whether both passes can be done at once: over few classes, while all is in the cache.

    Not in float16, where the factor to come is a GradScaler's, without which gradients underflow.
    """
    embeddings, weight = inputs[:2]
    num_rows, num_centres = embeddings.shape[0], weight.shape[0]
    return (
        fits_at_once(num_rows, num_centres, weight.shape[1], settings.chunk)
        and num_centres > others.rule.sub_centers
        and num_rows > 0
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


# Under torch.compile the passes are operators of a plain rule, of tensors and numbers alone: the
# fields of named tuples, one after another. What is None is a tensor () there.


def _named(values: Iterable[Any], *types: Any) -> list[Any]:
    """The named tuples of these types whose fields the values are, one after another."""
    remaining = iter(values)
    return [cls(*itertools.islice(remaining, len(cls._fields))) for cls in types]


def _operator_forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, settings = _named(arguments, Inputs, Settings)
    with without_autocast(inputs.weight.device):
        parts, saved = passes.forward(inputs, settings, Others())
    nothing = saved.unit.new_zeros(())
    return tuple(nothing.clone() if each is None else each for each in (*parts, *saved))


def _operator_backward(*arguments: Any) -> tuple[Tensor, ...]:
    given = [
        None if isinstance(each, Tensor) and each.dim() == 0 else each for each in arguments[:-1]
    ]
    grads, inputs, saved, settings = _named(given, Parts, Inputs, Saved, Settings)
    with without_autocast(saved.unit.device):
        found = passes.backward(grads, inputs, settings, saved, Others(), needed=arguments[-1])
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
def _(*arguments: Any) -> tuple[Tensor | None, ...]:
    inputs, settings = _named(arguments, Inputs, Settings)
    (num_rows, size), num_classes = inputs.embeddings.shape, inputs.weight.shape[0]
    dtype = working_dtype(inputs.embeddings, inputs.weight)
    unit: Tensor = inputs.embeddings.new_empty(num_rows, size, dtype=dtype)
    theta = unit.new_empty(num_rows, dtype=precise_dtype(unit.device))
    _, bounded = passes.scales_of(inputs, settings, dtype, PLAIN)
    has_mean, differentiate = inputs.class_share is not None, settings.differentiate
    stash_dtype = settings.product_dtype if settings.stash else dtype
    chunks = -(-num_classes // min(settings.chunk, num_classes))

    def optional(exists: bool, *shape: Any, dtype: torch.dtype = dtype) -> Tensor:
        return unit.new_empty(shape if exists else (), dtype=dtype)

    parts = Parts(theta, torch.empty_like(theta), optional(has_mean, num_rows))
    saved = Saved(
        unit=unit,
        inverse_of_rows=unit.new_empty(num_rows, 1),
        inverse=unit.new_empty(num_classes, 1),
        directions=optional(settings.stash and chunks == 1, num_classes, size),
        tangent=unit.new_empty(num_rows, size),
        cos_sin=unit.new_empty(2, num_rows, 1),
        weighted_centres=optional(differentiate, num_rows, size),
        over_total=optional(differentiate, num_rows, 1),
        mean_direction=optional(has_mean, size),
        stashed=optional(settings.stash, num_classes, num_rows, dtype=stash_dtype),
        shifts=optional(differentiate and not bounded, chunks, num_rows),
        bias_slope=optional(False),
    )
    return *parts, *saved


@_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, inputs = _named(arguments, Parts, Inputs)
    nothing = inputs.embeddings.new_empty((), dtype=working_dtype(*inputs[:2]))
    # Not len(), which would be a constant of the compiled graph.
    like = inputs.embeddings, inputs.weight, nothing.new_empty(inputs.embeddings.shape[0])
    return tuple(
        each.new_empty(each.shape) if wanted else torch.empty_like(nothing)
        for each, wanted in zip(like, arguments[-1], strict=True)
    )


def _save_operator(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.settings = _named(inputs, Inputs, Settings)
    ctx.save_for_backward(*tensors, *output)


def _differentiate_operator(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, parts, saved = _named(ctx.saved_tensors, Inputs, Parts, Saved)
    of_parts = [
        torch.zeros_like(part) if grad is None else grad
        for part, grad in zip(parts, grads, strict=False)
    ]
    of = ctx.needs_input_grad
    needed = [of[Inputs._fields.index(name)] for name in Gradients._fields]
    found = _backward_operator(*of_parts, *inputs, *saved, *ctx.settings, needed)
    gradients = Gradients(*(g if wanted else None for g, wanted in zip(found, needed, strict=True)))
    of_inputs = (getattr(gradients, name, None) for name in Inputs._fields)
    return *of_inputs, *[None] * len(Settings._fields)


_forward_operator.register_autograd(_differentiate_operator, setup_context=_save_operator)
_backward_operator.register_autograd(_refuse)

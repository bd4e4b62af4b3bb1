"""The engine's two passes as registered operators, and the autograd that joins them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler

from ..geometry import precise_dtype, without_autocast
from . import passes
from .chunks import PLAIN, Rule
from .passes import working_dtype

_Result = TypeVar("_Result", bound=tuple[Tensor, ...])
BeginSum: TypeAlias = Callable[[Tensor], Callable[[], Tensor]]


class Parts(NamedTuple):
    """What a loss needs of the cosines, each (N,): the target's angle and two sums over classes."""

    theta: Tensor
    negatives: Tensor
    mean_cosine: Tensor


def margin_parts(
    embeddings: Tensor,
    weight: Tensor,
    own: Tensor,
    *,
    row_scale: Tensor | None,
    class_share: Tensor | None,
    scale: float,
    chunk: int,
    product_dtype: torch.dtype,
    stash: bool,
    rule: Rule = PLAIN,
    row_target: Tensor | None = None,
    row_bias: Tensor | None = None,
    begin_sum: BeginSum | None = None,
) -> Parts:
    """The parts of a loss, differentiable once.

    Args:
        embeddings: (N, d), floating point.
        weight: (C, d) class centres, floating point; with sub-centres (C * sub_centers, d).
        own: (N,) int64, the row of the weight that is the centre of the target; -1 where that is
            not here, if there is a ``begin_sum``. The theta of such a row means nothing, and must
            get no gradient.
        row_scale: (N,) factor of the scale for each row, or None. Its gradient is right for a
            linear rule alone.
        class_share: (C,) the weights kappa, in the :func:`working_dtype`: those of the mean cosine
            (None makes it 0), or, where the rule is summed, those of the sum.
        scale: The scale s > 0.
        chunk: The number of centres in a chunk.
        product_dtype: The dtype of the factors of the matrix products.
        stash: Whether E is kept for the backward pass, or computed again.
        rule: How the other classes enter; under ``torch.compile`` only the plain one.
        row_target: (N,) the logit of the target before scaling, for a rule that looks at it.
        row_bias: (N,) the bias of a rule, in the :func:`working_dtype`, or None.
        begin_sum: Where the classes are shared between processes: what begins to sum the gradient
            of the embeddings over them, and returns how to end that. Between the two the gradient
            of the weight is computed.

    Returns:
        theta and negatives in float64 (float32 on MPS), mean_cosine in the working dtype.
        ``negatives`` is the log of the sum over the other classes of exp(scale * term), or the sum
        of the terms.
    """
    variables = (embeddings, weight, row_scale, row_bias)
    differentiate = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in variables
    )
    arguments = (
        embeddings,
        weight,
        own,
        row_scale,
        class_share,
        scale,
        chunk,
        product_dtype,
        stash and differentiate,
        differentiate,
        begin_sum is not None,
    )
    others = rule, row_target, row_bias, begin_sum
    if not torch.compiler.is_compiling():
        return _eager(*arguments, *others)
    if rule == PLAIN and begin_sum is None:
        return Parts(*_forward_operator(*arguments)[:3])
    # A rule is a Python function, which no operator can take: the compiled graph has a gap here.
    return _disable_dynamo(_eager)(*arguments, *others)


def _eager(*arguments: Any) -> Parts:
    return Parts(*_Eager.apply(*arguments))  # type: ignore[no-untyped-call]


def _without_autocast(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """The function with its dtypes as it has them, whatever surrounds the call."""

    def run(first: Tensor, *others: Any) -> _Result:
        with without_autocast(first.device):
            return function(first, *others)

    return run


_forward_operator = torch.library.custom_op(
    "angular_losses::margin_parts",
    _without_autocast(passes.forward),
    mutates_args=(),
    schema=(
        "(Tensor embeddings, Tensor weight, Tensor own, Tensor? row_scale, Tensor? class_share, "
        "float scale, int chunk, ScalarType product_dtype, bool stash, bool differentiate, "
        "bool partial) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
        "Tensor)"
    ),
)
_backward_operator = torch.library.custom_op(
    "angular_losses::margin_parts_backward",
    _without_autocast(passes.backward),
    mutates_args=(),
    schema=(
        "(Tensor grad_theta, Tensor grad_negatives, Tensor grad_mean_cosine, "
        "Tensor embeddings, Tensor weight, Tensor own, Tensor? row_scale, Tensor? class_share, "
        "Tensor theta, Tensor negatives, Tensor unit, Tensor inverse_of_rows, Tensor tangent, "
        "Tensor inverse, Tensor pull, Tensor mean_direction, Tensor stashed, Tensor shifts, "
        "float scale, int chunk, ScalarType product_dtype, bool partial, bool[] needed) -> "
        "(Tensor, Tensor, Tensor)"
    ),
)


@_forward_operator.register_fake
def _(
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
    partial: bool,
) -> tuple[Tensor, ...]:
    (num_rows, size), num_classes = embeddings.shape, weight.shape[0]
    unit = embeddings.new_empty(num_rows, size, dtype=working_dtype(embeddings, weight))
    theta = unit.new_empty(num_rows, dtype=precise_dtype(unit.device))
    _, bounded = passes.scales_of(scale, row_scale, unit.dtype, PLAIN)
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
        unit.new_empty(0),
    )


@_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    grad_negatives, embeddings, weight = arguments[1], *arguments[3:5]
    working = embeddings.new_empty(0, dtype=working_dtype(embeddings, weight))
    return tuple(
        torch.empty_like(tensor if wanted else working)
        for tensor, wanted in zip((embeddings, weight, grad_negatives), arguments[-1], strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    theta, negatives, _, *saved = output
    ctx.rule, *of_rows, ctx.begin_sum = inputs[11:] or (PLAIN, None, None, None)
    ctx.save_for_backward(*inputs[:5], theta, negatives, *saved, *of_rows)
    ctx.settings = *inputs[5:8], inputs[10]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, bias_slope, row_target, row_bias = ctx.saved_tensors  # to be read once
    like = (tensors[5], tensors[6], tensors[7][:, 0])
    of_parts = [
        torch.zeros_like(part) if grad is None else grad
        for part, grad in zip(like, grads[:3], strict=True)
    ]
    needed = [ctx.needs_input_grad[index] for index in (0, 1, 3)]
    arguments = (*of_parts, *tensors, *ctx.settings)
    others = ctx.rule, row_target, row_bias
    # With a graph wanted of the backward pass itself, there is none, and these two say so.
    if not torch.is_grad_enabled():
        run = _without_autocast(passes.backward)
        if ctx.begin_sum is None or not needed[0]:
            found = run(*arguments, needed, *others)
        else:
            rows = run(*arguments, [True, False, needed[2]], *others)
            end_sum = ctx.begin_sum(rows[0])
            of_weight = run(*arguments, [False, needed[1], False], *others)
            found = end_sum(), of_weight[1], rows[2]
    elif ctx.rule == PLAIN and ctx.begin_sum is None:
        found = _backward_operator(*arguments, needed)
    else:
        found = _Once.apply(*arguments, needed, *others)  # type: ignore[no-untyped-call]
    embeddings, weight, row_scale = (
        grad if wanted else None for grad, wanted in zip(found, needed, strict=True)
    )
    gradients = embeddings, weight, None, row_scale, *[None] * 7
    if len(ctx.needs_input_grad) == len(gradients):
        return gradients
    of_bias = None
    if ctx.needs_input_grad[13] and grads[1] is not None:
        of_bias = grads[1].to(bias_slope.dtype) * bias_slope
    return *gradients, None, None, of_bias, None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "the modes 'stash' and 'recompute' have first derivatives only; "
        "for a second derivative pass mode='dense'"
    )


class _Eager(torch.autograd.Function):
    """The operator without its dispatch, which would take longer than a small batch does."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *of_engine, _ = arguments
        output = passes.forward(*of_engine)
        _save(ctx, arguments, output)
        return output[:3]

    backward = staticmethod(_differentiate)


class _Once(torch.autograd.Function):
    """The backward pass, to be differentiated no further."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return _without_autocast(passes.backward)(*arguments)

    backward = staticmethod(_refuse)


_forward_operator.register_autograd(_differentiate, setup_context=_save)
_backward_operator.register_autograd(_refuse)

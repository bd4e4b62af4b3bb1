"""Optimisers for sharded class centres: sparse steps and sharded state."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..losses.base import MarginLoss
from .sharded_loss import ShardedLoss, sharded_weights


def shard_optimizer(optimizer: torch.optim.Optimizer, loss: MarginLoss) -> None:
    """Make an optimiser update only sampled rows, and save its state as a shard.

    Momentum, moments and weight decay then change no row that was not sampled since the last step;
    the momentum of a row is that of its own steps. The state has the size of the shard, and
    ``optimizer.state_dict()`` returns it as distributed tensors, so that :func:`save` and
    ``torch.distributed.checkpoint`` can load it on any number of ranks.

    A step that raises, or is interrupted, leaves weight and state of the loss as they were before.
    As in ``torch.optim.SparseAdam``, a count of steps is that of the whole weight: the bias
    correction of a row sampled for the first time late in the training is that of the other rows.

    Args:
        optimizer: Any element-wise optimiser of ``torch.optim``, such as SGD or AdamW; with sampled
            classes not Rprop, whose state does not begin with zeros.
        loss: A :class:`ShardedLoss` whose weight the optimiser holds.

    Raises:
        TypeError: If the loss is not sharded, or the optimiser cannot step rows.
        ValueError: If the optimiser does not hold its weight.
    """
    if not isinstance(loss, ShardedLoss):
        raise TypeError(f"loss: expected a sharded one, got {type(loss).__name__}")
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = next((i for i, parameter in enumerate(held) if parameter is loss.weight), None)
    if index is None:
        raise ValueError("optimizer: expected it to hold the weight of the loss")
    if loss.sample_rate < 1:
        if isinstance(optimizer, _NOT_BY_ROWS):
            raise TypeError(
                "optimizer: expected one that can begin with a row at any step, such as SGD or "
                f"AdamW, got {type(optimizer).__name__}"
            )
        _step_rows(optimizer, loss.weight)

    def converted(
        state: dict[str, Any], convert: Callable[[Tensor, int], Tensor]
    ) -> dict[str, Any]:
        # By position: torch.distributed.checkpoint replaces the indices by names.
        key = [key for group in state["param_groups"] for key in group["params"]][index]
        if key not in state["state"]:
            return state
        of_weight = {
            name: convert(value, loss.sub_centers) if _is_of_rows(value) else value
            for name, value in state["state"][key].items()
        }
        return {**state, "state": {**state["state"], key: of_weight}}

    def to_save(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return converted(state, loss.shard.distributed)

    def to_load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return converted(state, loss.shard.undistributed)

    optimizer.register_state_dict_post_hook(to_save)
    optimizer.register_load_state_dict_pre_hook(to_load)


# Whose state of a row does not begin with zeros, or mixes rows.
_NOT_BY_ROWS = tuple(
    getattr(torch.optim, name)
    for name in ("Rprop", "LBFGS", "Adafactor", "Muon", "SparseAdam")
    if hasattr(torch.optim, name)
)


def _step_rows(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
    """Make each step of an optimiser one of the rows that a sparse gradient of a weight has."""
    whole_step: Callable[..., object] = optimizer.step

    @functools.wraps(whole_step)
    def step(
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], object] | None = None,
        **options: object,
    ) -> object:
        value: object = None
        if closure is not None:  # a forward pass, which needs the whole weight
            with torch.enable_grad():
                value = closure()
        with _sampled_rows(optimizer, weight):
            found = whole_step(**options)
        return found if closure is None else value

    # Not a subclass: a scheduler may have replaced the method of this optimiser already.
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]


@contextmanager
def _sampled_rows(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Iterator[None]:
    """While this lasts, weight, gradient and state are their sampled rows alone."""
    gradient = weight.grad
    if gradient is None or not gradient.is_sparse:
        yield
        return
    gradient, whole = gradient.coalesce(), weight.data
    rows, before = gradient.indices()[0], optimizer.state.get(weight, {})
    kept = {
        name: value
        for name, value in before.items()
        if _is_of_rows(value) and len(value) == len(whole)
    }
    is_done = False
    try:
        if before:
            optimizer.state[weight] = {
                name: value.index_select(0, rows)
                if name in kept
                else value.clone()
                if isinstance(value, Tensor)
                else value
                for name, value in before.items()
            }
        weight.grad = None
        weight.data = whole.index_select(0, rows)
        weight.grad = gradient.values()
        yield
        is_done = True
    finally:
        stepped, state = weight.data, optimizer.state.pop(weight, {})
        weight.grad = None
        weight.data = whole
        weight.grad = gradient
        if before or is_done:
            optimizer.state[weight] = before
        if is_done:
            with torch.no_grad():
                weight.index_copy_(0, rows, stepped)
            before.update(_of_whole(state, kept, rows, len(whole)))


def _of_whole(
    state: dict[str, Any], kept: dict[str, Tensor], rows: Tensor, count: int
) -> dict[str, Any]:
    """The state of a whole weight (count rows), from that of its rows after a step."""
    whole = {}
    for name, value in state.items():
        whole[name] = value
        if _is_of_rows(value) and len(value) == len(rows):
            old = kept.get(name)
            if old is None:  # the optimiser's first step
                old = value.new_zeros(count, *value.shape[1:])
            whole[name] = old.index_copy_(0, rows, value)
    return whole


@functools.cache
def refuse_unprepared_optimizers() -> None:
    """Make every step with the sparse gradient of a sharded loss raise, in this process.

    None reaches an optimiser that :func:`shard_optimizer` has prepared.
    """
    register_optimizer_step_pre_hook(_refuse)


def _refuse(optimizer: torch.optim.Optimizer, *_: object) -> None:
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for weight in sharded_weights():
        if weight.grad is not None and weight.grad.is_sparse and id(weight) in held:
            raise RuntimeError(
                "optimizer: expected it to be prepared for sampled classes by "
                "shard_optimizer(optimizer, loss)"
            )


def _is_of_rows(value: object) -> TypeGuard[Tensor]:
    """Whether a state has one row per row of the weight; scalars, such as Adam's step, do not."""
    return isinstance(value, Tensor) and value.dim() > 0

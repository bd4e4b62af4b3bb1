"""Optimisers for sharded class centres: sparse steps and sharded state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..losses.base import MarginLoss
from .sharded_loss import ShardedLoss


def shard_optimizer(optimizer: torch.optim.Optimizer, loss: MarginLoss) -> None:
    """Make an optimiser update only sampled rows, and save its state as a shard.

    Momentum, moments and weight decay then change no row that was not sampled since the last step;
    the momentum of a row is that of its own steps. The state has the size of the shard, and
    ``optimizer.state_dict()`` returns it as distributed tensors, so that :func:`save` and
    ``torch.distributed.checkpoint`` can load it on any number of ranks.

    Args:
        optimizer: Any element-wise optimiser of ``torch.optim``, such as SGD or AdamW.
        loss: A :class:`ShardedLoss` whose weight the optimiser holds.

    Raises:
        TypeError: If the loss is not sharded.
        ValueError: If the optimiser does not hold its weight.
    """
    if not isinstance(loss, ShardedLoss):
        raise TypeError(f"loss: expected a sharded one, got {type(loss).__name__}")
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = next((i for i, parameter in enumerate(held) if parameter is loss.weight), None)
    if index is None:
        raise ValueError("optimizer: expected it to hold the weight of the loss")
    rows = _SampledRows(loss.weight)
    optimizer.register_step_pre_hook(rows.extract)
    optimizer.register_step_post_hook(rows.restore)

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


class _SampledRows:
    """Replaces a weight with a sparse gradient by its sampled rows during an optimiser step."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._whole: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]] | None = None

    def extract(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Replace weight, gradient and state by their sampled rows."""
        gradient = self.weight.grad
        if gradient is None or not gradient.is_sparse:
            return
        gradient = gradient.coalesce()
        rows, whole = gradient.indices()[0], self.weight.data
        state = optimizer.state.get(self.weight, {})
        kept = {
            name: value
            for name, value in state.items()
            if _is_of_rows(value) and len(value) == len(whole)
        }
        self._whole = whole, rows, gradient, kept
        state.update({name: value.index_select(0, rows) for name, value in kept.items()})
        self.weight.grad = None
        self.weight.data = whole.index_select(0, rows)
        self.weight.grad = gradient.values()

    @torch.no_grad()
    def restore(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Restore weight, gradient and state with the updated rows."""
        if self._whole is None:
            return
        (whole, rows, gradient, kept), self._whole = self._whole, None
        stepped, state = self.weight.data, optimizer.state[self.weight]
        self.weight.grad = None
        self.weight.data = whole
        self.weight.grad = gradient
        self.weight.index_copy_(0, rows, stepped)
        for name, value in state.items():
            if _is_of_rows(value) and len(value) == len(rows):
                before = kept.get(name)
                if before is None:  # the optimiser's first step
                    before = value.new_zeros(len(whole), *value.shape[1:])
                state[name] = before.index_copy_(0, rows, value)


def _is_of_rows(value: object) -> TypeGuard[Tensor]:
    """Whether a state has one row per row of the weight; scalars, such as Adam's step, do not."""
    return isinstance(value, Tensor) and value.dim() > 0

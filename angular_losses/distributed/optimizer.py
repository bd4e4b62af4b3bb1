"""Optimisers for sharded class centres: sparse steps and sharded state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses.base import MarginLoss
from ..sampling import NOT_BY_ROWS, is_of_rows, place_of_weight, step_rows
from .sharded_loss import ShardedLoss


def shard_optimizer(optimizer: torch.optim.Optimizer, loss: MarginLoss) -> None:
    """Make an optimiser update only sampled rows, and save its state as a shard.

    The rows are stepped as by :func:`angular_losses.sample_optimizer`. The state has the size of
    the shard, and ``optimizer.state_dict()`` returns it as distributed tensors, so that
    :func:`save` and ``torch.distributed.checkpoint`` can load it on any number of ranks.

    Args:
        optimizer: Any element-wise optimiser of ``torch.optim``, such as SGD or AdamW; with sampled
            classes not Rprop, whose state does not begin with zeros.
        loss: A :class:`ShardedLoss` whose weight the optimiser holds.

    Raises:
        TypeError: If the loss is not sharded, or the optimiser is not element-wise.
        ValueError: If the optimiser does not hold its weight.
    """
    if not isinstance(loss, ShardedLoss):
        raise TypeError(f"loss: expected a sharded one, got {type(loss).__name__}")
    index = place_of_weight(optimizer, loss)
    if loss.sample_rate < 1:
        step_rows(optimizer, loss.weight)
    elif isinstance(optimizer, NOT_BY_ROWS) and not isinstance(optimizer, torch.optim.Rprop):
        raise TypeError(
            "optimizer: expected an element-wise one, such as SGD or AdamW, got "
            f"{type(optimizer).__name__}"
        )

    def converted(
        state: dict[str, Any], convert: Callable[[Tensor, int], Tensor]
    ) -> dict[str, Any]:
        # By position: torch.distributed.checkpoint replaces the indices by names.
        key = [key for group in state["param_groups"] for key in group["params"]][index]
        if key not in state["state"]:
            return state
        of_weight = {
            name: convert(value, loss.sub_centers) if is_of_rows(value) else value
            for name, value in state["state"][key].items()
        }
        return {**state, "state": {**state["state"], key: of_weight}}

    optimizer.register_state_dict_post_hook(
        lambda optimizer, state: converted(state, loss.shard.distributed)
    )
    optimizer.register_load_state_dict_pre_hook(
        lambda optimizer, state: converted(state, loss.shard.undistributed)
    )

"""Checkpoints of a training with sharded class centres, independent of the number of ranks."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..losses.base import MarginLoss
from .sharded_loss import ShardedLoss

# The file that names the current checkpoint; it is replaced when a new one is complete.
CURRENT = "current"


def save(
    directory: str | os.PathLike[str],
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Save a training; the previous checkpoint is kept until all ranks have finished.

    Writes a new subdirectory with ``torch.distributed.checkpoint``, then replaces the file
    ``current``, which names it, and removes the previous subdirectory.

    Args:
        directory: A directory accessible to all ranks; created if missing.
        module: Contains the network and the loss, sharded or not, with all parameters of the
            optimiser: ``nn.ModuleList([backbone, loss])``. Every rank has to call this.
        optimizer: The optimiser, prepared by :func:`shard_optimizer` if a loss is sharded.

    Raises:
        RuntimeError: If a rank could not write; ``torch.distributed.checkpoint`` says which.
    """
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    directory = Path(directory)
    before = _current(directory)
    number = 1 + int(before.name) if before else 1
    path = directory / f"{number:06}"
    is_first = not _is_distributed() or dist.get_rank() == 0
    if is_first and path.exists():  # left by an interrupted save
        shutil.rmtree(path)
    _barrier()
    with _without_single_process_warning():
        save_shards(_state(module, optimizer), checkpoint_id=path, no_dist=not _is_distributed())
    if is_first:
        partial = directory / f"{CURRENT}.partial"
        partial.write_text(path.name)
        partial.replace(directory / CURRENT)
        if before:
            shutil.rmtree(before, ignore_errors=True)
    _barrier()


def load(
    directory: str | os.PathLike[str],
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Load a checkpoint of :func:`save`, written by any number of ranks.

    Both the saved and the loaded loss may be sharded or not. The files contain pickled data: load
    only those that you trust.

    Args:
        directory: The directory of :func:`save`.
        module: A module with the structure of the saved one.
        optimizer: The optimiser, prepared by :func:`shard_optimizer` if a loss is sharded.

    Raises:
        FileNotFoundError: If there is no complete checkpoint.
        RuntimeError: If the checkpoint does not match the module.
    """
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    path = _current(Path(directory))
    if path is None:
        raise FileNotFoundError(f"directory: expected a complete checkpoint, got {directory}")
    state = _state(module, optimizer)
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    # The count of batches is missing where the saved loss used no random numbers.
    wanted = {
        key: value
        for key, value in state["module"].items()
        if key.rpartition(".")[2] != "batches" or f"module.{key}" in saved
    }
    with _without_single_process_warning():
        load_shards({**state, "module": wanted}, checkpoint_id=path, no_dist=not _is_distributed())
    _reshape(module, state, lambda values, loss: values.flatten(0, 1))
    states.set_model_state_dict(module, state["module"])
    if optimizer is not None:
        states.set_optimizer_state_dict(module, optimizer, state["optimizer"])


def _state(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """The state to save, with weights of losses by class: (C, ...) or (C, sub_centers, ...)."""
    from torch.distributed.checkpoint import state_dict as states

    state: dict[str, Any] = {"module": states.get_model_state_dict(module)}
    if optimizer is not None:
        state["optimizer"] = states.get_optimizer_state_dict(module, optimizer)
    _reshape(
        module, state, lambda values, loss: values.view(-1, loss.sub_centers, *values.shape[1:])
    )
    return state


def _reshape(
    module: nn.Module, state: dict[str, Any], change: Callable[[Tensor, MarginLoss], Tensor]
) -> None:
    """Reshape the weights and optimiser states of unsharded losses with sub-centres in a state."""
    of_optimizer = state.get("optimizer", {}).get("state", {})
    for name, loss in module.named_modules():
        if not isinstance(loss, MarginLoss) or isinstance(loss, ShardedLoss):
            continue
        key = f"{name}.weight" if name else "weight"
        if loss.sub_centers == 1 or key not in state["module"]:
            continue
        state["module"][key] = change(state["module"][key], loss)
        if key in of_optimizer:  # the dictionary of the optimiser, which must not be modified
            of_optimizer[key] = {
                option: change(value, loss) if isinstance(value, Tensor) and value.dim() else value
                for option, value in of_optimizer[key].items()
            }


def _current(directory: Path) -> Path | None:
    """The last complete checkpoint, or None."""
    try:
        return directory / (directory / CURRENT).read_text().strip()
    except FileNotFoundError:
        return None


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _barrier() -> None:
    if _is_distributed():
        dist.barrier()


@contextmanager
def _without_single_process_warning() -> Iterator[None]:
    """Suppress torch's warning that a single process saves without torch.distributed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield

"""Checkpoints of a training with sharded classes, which any number of processes may load."""

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

# Names the checkpoint that counts; it is replaced when a new one is complete.
CURRENT = "current"


def save(
    directory: str | os.PathLike[str],
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Save a training, as its ranks hold it; until all have, the checkpoint before stays.

    By ``torch.distributed.checkpoint``, in a subdirectory that is new. Then the file ``current``
    is replaced, which names it, and the subdirectory before is removed.

    Args:
        directory: Where to save, seen by all ranks; made if it is not there.
        module: Holds the network and the loss, sharded or not, and all that the optimiser holds:
            ``nn.ModuleList([backbone, loss])``. Every rank has to call this.
        optimizer: The optimiser, prepared by :func:`shard_optimizer` where a loss is sharded.

    Raises:
        RuntimeError: If a rank could not write; ``torch.distributed.checkpoint`` says which.
    """
    from torch.distributed.checkpoint.state_dict_saver import save as save_parts

    directory = Path(directory)
    before = _current(directory)
    number = 1 + int(before.name) if before else 1
    path = directory / f"{number:06}"
    is_first = not _is_group() or dist.get_rank() == 0
    if is_first and path.exists():  # left by a save that was cut off
        shutil.rmtree(path)
    _wait_for_all()
    with _silence_of_one_process():
        save_parts(_state(module, optimizer), checkpoint_id=path, no_dist=not _is_group())
    if is_first:
        partial = directory / f"{CURRENT}.partial"
        partial.write_text(path.name)
        partial.replace(directory / CURRENT)
        if before:
            shutil.rmtree(before, ignore_errors=True)
    _wait_for_all()


def load(
    directory: str | os.PathLike[str],
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Load what :func:`save` saved, on this number of ranks, whatever it was then.

    Into a sharded loss or a whole one, from either. The files are torch's own, with a pickle among
    them: load none that you would not run.

    Args:
        directory: What :func:`save` was given.
        module: Holds what the saved one held.
        optimizer: The optimiser, prepared by :func:`shard_optimizer` where a loss is sharded.

    Raises:
        FileNotFoundError: If there is no checkpoint that was completed.
        RuntimeError: If what is there does not fit the module.
    """
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_parts

    path = _current(Path(directory))
    if path is None:
        raise FileNotFoundError(f"directory: expected a complete checkpoint, got {directory}")
    state = _state(module, optimizer)
    known = FileSystemReader(path).read_metadata().state_dict_metadata
    # A count of batches is missing where the loss that was saved drew nothing.
    wanted = {
        key: value
        for key, value in state["module"].items()
        if key.rpartition(".")[2] != "batches" or f"module.{key}" in known
    }
    with _silence_of_one_process():
        load_parts({**state, "module": wanted}, checkpoint_id=path, no_dist=not _is_group())
    _reshape(module, state, lambda values, loss: values.flatten(0, 1))
    states.set_model_state_dict(module, state["module"])
    if optimizer is not None:
        states.set_optimizer_state_dict(module, optimizer, state["optimizer"])


def _state(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What is saved: of each loss's weight by class, (C, ...) or (C, sub_centers, ...)."""
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
    """Change the shapes in a state of what belongs to sub-centres of losses that are whole."""
    of_optimizer = state.get("optimizer", {}).get("state", {})
    for name, loss in module.named_modules():
        if not isinstance(loss, MarginLoss) or isinstance(loss, ShardedLoss):
            continue
        key = f"{name}.weight" if name else "weight"
        if loss.sub_centers == 1 or key not in state["module"]:
            continue
        state["module"][key] = change(state["module"][key], loss)
        if key in of_optimizer:  # the optimiser's own dictionary, which must not change
            of_optimizer[key] = {
                option: change(value, loss) if isinstance(value, Tensor) and value.dim() else value
                for option, value in of_optimizer[key].items()
            }


def _current(directory: Path) -> Path | None:
    """The checkpoint that was completed last, or None."""
    try:
        return directory / (directory / CURRENT).read_text().strip()
    except FileNotFoundError:
        return None


def _is_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _wait_for_all() -> None:
    if _is_group():
        dist.barrier()


@contextmanager
def _silence_of_one_process() -> Iterator[None]:
    """Torch warns a process without others that it is taken for one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield

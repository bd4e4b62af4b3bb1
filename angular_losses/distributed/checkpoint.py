"""Checkpoints of a training with sharded class centres, independent of the number of ranks."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..losses.base import MarginLoss
from ..sampling import is_of_rows
from .sharded_loss import ShardedLoss

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        Metadata,
        TensorStorageMetadata,
    )

_Value = TypeVar("_Value")

# The file that names the current checkpoint; it is replaced when a new one is complete.
CURRENT = "current"
# The subdirectory of a checkpoint, and what is in it.
NAME = re.compile(r"\d{6,}")
METADATA, CHECKSUMS = ".metadata", "checksums.json"
FILE = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|checksums\.json")


def save(
    directory: str | os.PathLike[str],
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Save a training; the previous checkpoint is kept until all ranks have finished.

    Writes a new subdirectory, chosen by rank 0, with ``torch.distributed.checkpoint``; then, with
    the files of all ranks and their checksums on the disk, replaces the file ``current``, which
    names it; then removes the files of other checkpoints, complete or not, and nothing else.

    Args:
        directory: A directory accessible to all ranks; created if missing.
        module: Contains the network and the loss, sharded or not, with all parameters of the
            optimiser: ``nn.ModuleList([backbone, loss])``. Every rank has to call this.
        optimizer: The optimiser, prepared by :func:`shard_optimizer` if a loss is sharded.

    Raises:
        RuntimeError: On every rank, if one of them could not write, or the optimiser is not
            prepared; the message has its reason. The previous checkpoint is still the current one,
            or the new one already is.
    """
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    directory = Path(directory)
    with _heard_by_all("save"):
        state = _state(module, optimizer)
        name = _new_name(directory) if _rank() == 0 else ""
    path = directory / _gathered(name)[0]
    with _heard_by_all("save"), _without_torchs_warnings():
        save_shards(state, checkpoint_id=path)
        own = {file.name: _checksum(file) for file in path.glob(f"__{_rank()}_*.distcp")}
    checksums = {name: each for of_rank in _gathered(own) for name, each in of_rank.items()}
    with _heard_by_all("save"):
        if _rank() == 0:
            _complete(path, checksums)


def load(
    directory: str | os.PathLike[str],
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Load a checkpoint of :func:`save`, written by any number of ranks.

    Both the saved and the loaded loss may be sharded or not. Of the pickled data in the files only
    tensors, numbers and the metadata of ``torch.distributed.checkpoint`` are accepted.

    Args:
        directory: The directory of :func:`save`.
        module: A module with the structure of the saved one.
        optimizer: The optimiser, prepared by :func:`shard_optimizer` if a loss is sharded.

    Raises:
        FileNotFoundError: If there is no complete checkpoint.
        RuntimeError: On every rank, if the checkpoint does not match the module, or its files are
            not those that were saved.
    """
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    directory = Path(directory)
    with _heard_by_all("load"):
        current = _current(directory) if _rank() == 0 else None
    path = _gathered(current)[0]
    if path is None:
        raise FileNotFoundError(f"directory: expected a complete checkpoint, got {directory}")
    with _heard_by_all("load"):
        _check_files(path)
        reader, planner = _reader(path)
        state = _state(module, optimizer, is_read=True)
        wanted = _wanted(state, optimizer, reader.read_metadata())
    with _heard_by_all("load"), _without_torchs_warnings():
        load_shards(wanted, storage_reader=reader, planner=planner)
    with _heard_by_all("load"):
        state["module"].update(wanted["module"])
        if optimizer is not None:
            own, read = state["optimizer"], wanted["optimizer"]
            names = [name for group in own["param_groups"] for name in group["params"]]
            own["state"] = {name: {} for name in names} | read["state"]
            for group, options in zip(own["param_groups"], read["param_groups"], strict=True):
                group.update(options)
        _reshape(module, state, _by_row)
        states.set_model_state_dict(module, state["module"])
        if optimizer is not None:
            with _trained(_of_groups(optimizer)):
                states.set_optimizer_state_dict(module, optimizer, state["optimizer"])


def _wanted(
    state: dict[str, Any], optimizer: torch.optim.Optimizer | None, metadata: Metadata
) -> dict[str, Any]:
    """What of a state to read: what may be missing in a checkpoint, only if it is there.

    Raises RuntimeError if a part of the checkpoint has no place in the state.
    """
    saved = metadata.state_dict_metadata
    own = {f"module.{key}" for key in state["module"]}
    missing = [
        key
        for key in saved
        if key.startswith("module.") and key not in own and key.rpartition(".")[2] != "batches"
    ]
    if missing:
        raise RuntimeError(f"module: expected all that was saved, missing {', '.join(missing)}")
    # The count of batches is missing where the saved loss used no random numbers.
    wanted: dict[str, Any] = {
        "module": {
            key: value
            for key, value in state["module"].items()
            if key.rpartition(".")[2] != "batches" or f"module.{key}" in saved
        }
    }
    if optimizer is None:
        return wanted
    # The places in the state of what was saved.
    places = {key: place for key, place in (metadata.planner_data or {}).items() if len(place) > 3}
    trained = {place[2] for place in places.values() if place[1] == "state"}
    count = len({place[2] for place in places.values() if place[1] == "param_groups"})
    if count != len(optimizer.param_groups):
        raise RuntimeError(
            f"optimizer: expected as many groups of parameters as were saved, {count}, "
            f"got {len(optimizer.param_groups)}"
        )
    groups = []
    for number, group in enumerate(state["optimizer"]["param_groups"]):
        there = {
            place[3]: key for key, place in places.items() if place[1:3] == ("param_groups", number)
        }
        # The options of schedulers, such as initial_lr, are not among the defaults.
        asked = {each: group[each] for each in group if each in optimizer.defaults or each in there}
        added = {
            each: _empty(saved[key])
            for each, key in there.items()
            if each not in group and len(places[key]) == 4
        }
        groups.append({**asked, **added})
    of_trained = {
        name: dict(each) for name, each in state["optimizer"]["state"].items() if name in trained
    }
    for key, place in places.items():
        if place[1] == "state" and len(place) == 4:  # also what other options would not make
            like = state["module"].get(place[2])
            of_trained.setdefault(place[2], {}).setdefault(place[3], _empty(saved[key], like))
    return {**wanted, "optimizer": {"state": of_trained, "param_groups": groups}}


def _empty(
    saved: TensorStorageMetadata | BytesStorageMetadata, like: Tensor | None = None
) -> Tensor | None:
    """What a saved value is read into: where it has that shape, what lies as ``like`` does."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if not isinstance(saved, TensorStorageMetadata):
        return None
    if like is None or like.shape != saved.size:
        return torch.empty(saved.size, dtype=saved.properties.dtype)
    return torch.empty_like(like, dtype=saved.properties.dtype)


def _state(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, *, is_read: bool = False
) -> dict[str, Any]:
    """The state to save or read, with weights of losses by class.

    These are (C, ...) or (C, sub_centers, ...).
    """
    from torch.distributed.checkpoint import state_dict as states

    state: dict[str, Any] = {"module": states.get_model_state_dict(module)}
    if optimizer is not None:
        state["optimizer"] = _of_optimizer(module, optimizer, is_read=is_read)
        _check_prepared(module, state["optimizer"]["state"])
    _reshape(module, state, _by_class)
    return state


def _of_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, *, is_read: bool
) -> dict[str, Any]:
    """The state of an optimiser, which is left as it is; to be read, that of all parameters."""
    from torch.distributed.checkpoint import state_dict as states

    parameters = _of_groups(optimizer)
    foreign = {*parameters} - {*module.parameters()}
    if foreign:
        shapes = [tuple(each.shape) for each in parameters if each in foreign]
        raise RuntimeError(
            f"optimizer: expected the module to have all of its parameters, not of shapes {shapes}"
        )
    gradients = [each.grad for each in parameters]
    for parameter in parameters:  # with a gradient torch would not make the state
        parameter.grad = None
    state = optimizer.state
    is_partial = not all(map(state.get, parameters))
    if not state or (is_read and is_partial):
        optimizer.state = defaultdict(dict)  # which torch fills by a step without a rate
    try:
        with _trained(parameters):
            found = states.get_optimizer_state_dict(module, optimizer)
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.state = state
    if not state and not is_read:
        found["state"] = {}
    # Numbers of numpy, such as a schedule's learning rates, could not be loaded.
    found["param_groups"] = tree_map(
        lambda value: value.item() if type(value).__module__ == "numpy" else value,
        found["param_groups"],
    )
    return found


def _of_groups(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


@contextmanager
def _trained(parameters: list[Tensor]) -> Iterator[None]:
    """Context in which all of them need gradients: torch leaves out the state of others."""
    frozen = [each for each in parameters if each.is_floating_point() and not each.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _weights(module: nn.Module) -> Iterator[tuple[MarginLoss, str]]:
    """The losses of a module, and the names of their weights in a state."""
    # The names leave out those of wrappers, such as DistributedDataParallel.
    from torch.distributed.checkpoint.state_dict import _get_fqns

    for name, loss in module.named_modules(remove_duplicate=False):
        if isinstance(loss, MarginLoss):
            (key,) = _get_fqns(module, f"{name}.weight" if name else "weight")
            yield loss, key


def _check_prepared(module: nn.Module, of_optimizer: dict[str, Any]) -> None:
    """Raise RuntimeError if the ranks' states of sharded weights would overwrite each other."""
    from torch.distributed.tensor import DTensor

    for loss, key in _weights(module):
        for value in of_optimizer.get(key, {}).values() if isinstance(loss, ShardedLoss) else ():
            is_own = is_of_rows(value) and len(value) == len(loss.weight)
            if is_own and not isinstance(value, DTensor):
                raise RuntimeError(
                    "optimizer: expected it to be prepared for the sharded loss by "
                    "shard_optimizer(optimizer, loss)"
                )


def _reshape(
    module: nn.Module, state: dict[str, Any], change: Callable[[Tensor, MarginLoss], Tensor]
) -> None:
    """Reshape the weights and optimiser states of unsharded losses with sub-centres in a state."""
    of_optimizer = state.get("optimizer", {}).get("state", {})
    for loss, key in _weights(module):
        if isinstance(loss, ShardedLoss) or loss.sub_centers == 1 or key not in state["module"]:
            continue
        state["module"][key] = change(state["module"][key], loss)
        if key in of_optimizer:  # the dictionary of the optimiser, which must not be modified
            of_optimizer[key] = {
                option: change(value, loss) if is_of_rows(value) else value
                for option, value in of_optimizer[key].items()
            }


def _by_class(values: Tensor, loss: MarginLoss) -> Tensor:
    """What is of the rows of the weight, as (C, sub_centers, ...)."""
    from torch.distributed.tensor import DTensor

    if len(values) != len(loss.weight):
        return values
    if isinstance(values, DTensor) and loss.num_classes % values.device_mesh.size():
        values = values.full_tensor()  # torch cuts no unequal parts
    return values.view(-1, loss.sub_centers, *values.shape[1:])


def _by_row(values: Tensor, loss: MarginLoss) -> Tensor:
    """What :func:`_by_class` made, as it was."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if values.shape[:2] != (loss.num_classes, loss.sub_centers):
        return values
    rows, weight = values.flatten(0, 1), loss.weight.data
    if isinstance(weight, DTensor) and not isinstance(rows, DTensor):
        rows = distribute_tensor(rows, weight.device_mesh, weight.placements)
    return rows


def _current(directory: Path) -> Path | None:
    """The last complete checkpoint, or None."""
    try:
        name = (directory / CURRENT).read_text().strip()
    except FileNotFoundError:
        return None
    path = directory / name
    return path if NAME.fullmatch(name) and path.is_dir() else None


def _new_name(directory: Path) -> str:
    """The name of a subdirectory that does not exist yet."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name) for path in directory.iterdir() if NAME.fullmatch(path.name)]
    return f"{1 + max(numbers, default=0):06}"


def _complete(path: Path, checksums: dict[str, str]) -> None:
    """Make a checkpoint the current one, and remove the others."""
    missing = [name for name in checksums if not (path / name).is_file()]
    if missing:
        raise RuntimeError(f"{path}: expected the files of all ranks, missing {missing}")
    checksums[METADATA] = _checksum(path / METADATA)
    _write(path / CHECKSUMS, json.dumps(checksums))
    partial = path.parent / f"{CURRENT}.partial"
    _write(partial, path.name)
    partial.replace(path.parent / CURRENT)
    _sync_directory(path.parent)
    for other in path.parent.iterdir():
        is_checkpoint = NAME.fullmatch(other.name) and other.is_dir() and not other.is_symlink()
        if is_checkpoint and other.name != path.name:
            _remove(other)


def _remove(path: Path) -> None:
    """Remove a checkpoint; what else there is in its directory stays."""
    with suppress(OSError):
        for file in path.iterdir():
            if FILE.fullmatch(file.name):
                file.unlink()
        path.rmdir()


def _write(path: Path, text: str) -> None:
    """Write a file to the disk, its name included."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    if os.name != "posix":  # where directories cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _check_files(path: Path) -> None:
    """Raise RuntimeError if a file is not the one that was saved; each rank checks some of them."""
    checksums = json.loads((path / CHECKSUMS).read_text())
    unknown = {METADATA, *(file.name for file in path.glob("__*.distcp"))} - {*checksums}
    if unknown:
        raise RuntimeError(f"{path / CHECKSUMS}: expected a checksum of each file, not {unknown}")
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for name in sorted(checksums)[_rank() :: world_size]:
        if _checksum(path / name) != checksums[name]:
            raise RuntimeError(f"{path / name}: expected the file that was saved, got another")


# What the metadata of torch.distributed.checkpoint consist of.
_OF_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        *(name for name, each in vars(torch).items() if isinstance(each, torch.dtype)),
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


class _Unpickler(pickle.Unpickler):
    """Reads metadata, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if name not in _OF_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"expected metadata, got {module}.{name}")
        return super().find_class(module, name)


def _reader(path: Path) -> tuple[Any, Any]:
    """The reader of the files of a checkpoint, and the planner, which reads pickled numbers."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.planner import ReadItem

    class Reader(FileSystemReader):
        def read_metadata(self, *arguments: object, **options: object) -> Metadata:
            _Unpickler(io.BytesIO((path / METADATA).read_bytes())).load()
            return super().read_metadata(*arguments, **options)

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
            torch.load(value, weights_only=True)
            value.seek(0)
            super().load_bytes(read_item, value)

    return Reader(path), Planner()


@contextmanager
def _heard_by_all(what: str) -> Iterator[None]:
    """Context after which all ranks go on, or raise a RuntimeError with the reason of one."""
    from torch.distributed.checkpoint.api import CheckpointException  # not an Exception

    error: BaseException | None = None
    failures: dict[int, BaseException] = {}
    try:
        yield
    except CheckpointException as caught:
        error, failures = caught, {rank: each for rank, (each, _) in caught.failures.items()}
    except Exception as caught:
        error, failures = caught, {_rank(): caught}
    reasons = [f"rank {k} failed: {type(each).__name__}: {each}" for k, each in failures.items()]
    of_all = list(itertools.chain(*_gathered(reasons)))
    if of_all:
        raise RuntimeError(f"{what}: {of_all[0]}") from error


def _gathered(value: _Value) -> list[_Value]:
    """The values of all ranks."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def _without_torchs_warnings() -> Iterator[None]:
    """Suppress torch's warnings of a single process and, of torch 2.6, of its own storages."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "torch.distributed is (disabled|unavailable)", UserWarning
        )
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        yield

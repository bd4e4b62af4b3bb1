"""State that each training step updates: schedules, running statistics.

It is kept in buffers and updated in place, so that whatever refers to a buffer (a captured CUDA
graph, DistributedDataParallel) has the new value. A forward pass reads copies, which do not change
before its backward pass, and which a recomputation of that pass reads again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler

from ..schedules import Schedule
from ..validation import hooks_in_force

# What is checkpointed, or recomputed, in one go: the passes of each loss so far, also those without
# a graph.
Region: TypeAlias = "weakref.WeakKeyDictionary[nn.Module, list[Pass]]"


class Pass:
    """A forward pass, identified by the sequence number of its first autograd node.

    Attributes:
        copies: Of the state that it reads.
        drawn: What it has drawn.
        region: In which it is, while that has a graph; None if nothing is checkpointed.
    """

    @_disable_dynamo
    def __init__(self, loss: nn.Module, copies: list[Tensor], drawn: Any) -> None:  # noqa: ANN401
        self.loss, self.copies, self.drawn = weakref.ref(loss), copies, drawn
        self.first_node: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        region = _region()
        self.region = None if region is None else weakref.ref(region)
        if region is not None:
            region.setdefault(loss, []).append(self)

    @_disable_dynamo
    def keep(self, value: Tensor) -> None:
        """Keep this pass for as long as the graph of its value exists."""
        if value.grad_fn is not None:
            value.grad_fn.metadata["angular_losses"] = self  # type: ignore[index]
            with _lock:
                _passes.add(self)


_passes: weakref.WeakSet[Pass] = weakref.WeakSet()
# By checkpointing's hooks of saved tensors, which are others each time.
_regions: weakref.WeakKeyDictionary[object, Region] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # other threads may train other losses


def _region() -> Region | None:
    """That of the next pass, if any."""
    hooks = hooks_in_force()
    # Those of a user may be in force for good, and so would what is kept.
    if hooks is None or getattr(hooks[1], "__module__", None) != "torch.utils.checkpoint":
        return None
    with _lock:
        return _regions.setdefault(hooks[1], weakref.WeakKeyDictionary())


@contextmanager
def state_of_a_pass(
    loss: nn.Module,
    statistics: Sequence[str],
    schedule: Schedule | None,
    drawn: Tensor | int | None,
    *,
    draws: bool,
    repeats: bool,
) -> Iterator[Pass | None]:
    """Context in which a loss reads copies of its state: the current, or of the repeated step."""
    moving: list[tuple[nn.Module, str]] = [(loss, name) for name in statistics]
    if schedule is not None:
        moving.append((schedule, "step"))
    if not (moving or draws):
        yield None
        return
    kept = [module.get_buffer(name) for module, name in moving]
    before = recomputed_pass(loss) if repeats else None
    copy = _copy if torch.compiler.is_compiling() else Tensor.clone
    copies = [copy(buffer) for buffer in kept] if before is None else before.copies
    for (module, name), buffer in zip(moving, copies, strict=True):
        setattr(module, name, buffer)
    try:
        if repeats and before is None and schedule is not None:
            schedule.step.sub_(1).clamp_(min=0)
        yield None if torch.compiler.is_compiling() else Pass(loss, copies, drawn)
    finally:
        for (module, name), buffer in zip(moving, kept, strict=True):
            setattr(module, name, buffer)


def kept_passes(loss: nn.Module) -> list[Pass]:
    """The passes of a loss whose graphs exist, the oldest first."""
    with _lock:
        own = [each for each in _passes if each.loss() is loss]
    return sorted(own, key=lambda each: each.first_node)


@_disable_dynamo
def recomputed_pass(loss: nn.Module) -> Pass | None:
    """The pass that a backward pass needs again; None where it is not known.

    ``torch.utils.checkpoint`` recomputes what the current node saved: the last of the passes that
    began before that node was created, or, in a region of several, one after another.
    """
    if not is_in_backward() or is_in_reentrant_checkpoint():
        return None
    node: int = torch._C._current_autograd_node()._sequence_nr()
    began = [each for each in kept_passes(loss) if each.first_node <= node]
    if not began:
        return None
    region = None if began[-1].region is None else began[-1].region()
    again = _region()
    number = 0 if again is None else len(again.get(loss, []))
    together = [] if region is None else region.get(loss, [])
    return (together[number:] or began[-1:])[0]


def is_in_backward() -> bool:
    """Whether a backward pass is running; a forward pass inside it recomputes a part."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


@_disable_dynamo
def is_in_reentrant_checkpoint() -> bool:
    """Whether it recomputes a pass that had no gradients, so that this is the first with them."""
    node = torch._C._current_autograd_node()
    return node is not None and node.name() == "CheckpointFunctionBackward"


# A compiled backward pass recomputes cheap operations, from the values of the buffers at that time.
# A custom operator is not computed again.
_copy = torch.library.custom_op(
    "angular_losses::copy", Tensor.clone, mutates_args=(), schema="(Tensor buffer) -> Tensor"
)
_copy.register_fake(torch.empty_like)

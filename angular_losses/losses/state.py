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
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler

from ..schedules import Schedule


class Pass:
    """A forward pass, identified by the sequence number of its first autograd node.

    Attributes:
        copies: Of the state that it reads.
        drawn: What it has drawn.
        region: Identifies what is checkpointed together; None outside of it.
    """

    @_disable_dynamo
    def __init__(self, loss: nn.Module, copies: list[Tensor], drawn: Any) -> None:  # noqa: ANN401
        self.loss, self.copies, self.drawn = weakref.ref(loss), copies, drawn
        self.first_node: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        hooks = _saved_tensors_hooks(False)
        self.region = None if hooks is None else weakref.ref(hooks[1])

    @_disable_dynamo
    def keep(self, value: Tensor) -> None:
        """Keep this pass for as long as the graph of its value exists."""
        if value.grad_fn is not None:
            value.grad_fn.metadata["angular_losses"] = self  # type: ignore[index]
            with _lock:
                _passes.add(self)


_saved_tensors_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None
)
_passes: weakref.WeakSet[Pass] = weakref.WeakSet()
# How many passes of a loss a node of a backward pass has recomputed.
_recomputed: weakref.WeakKeyDictionary[nn.Module, tuple[object, int]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # other threads may train other losses


@contextmanager
def state_of_a_pass(
    loss: nn.Module,
    statistics: Sequence[str],
    schedule: Schedule | None,
    drawn: Tensor | int | None,
    *,
    repeats: bool,
) -> Iterator[Pass | None]:
    """Context in which a loss reads copies of its state: the current, or of the repeated step."""
    moving: list[tuple[nn.Module, str]] = [(loss, name) for name in statistics]
    if schedule is not None:
        moving.append((schedule, "step"))
    if not moving and drawn is None:
        yield None
        return
    kept = [module.get_buffer(name) for module, name in moving]
    before = recomputed_pass(loss, is_begun=True) if repeats else None
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


@_disable_dynamo
def recomputed_pass(loss: nn.Module, *, is_begun: bool = False) -> Pass | None:
    """The pass that a backward pass needs again; None where it is not known.

    ``torch.utils.checkpoint`` recomputes what the current node saved: the last of the passes that
    began before that node was created; where it is checkpointed together with others, all of them
    in their order. ``is_begun``, the next is another one.
    """
    if not is_in_backward() or is_in_reentrant_checkpoint():
        return None
    node: int = torch._C._current_autograd_node()._sequence_nr()
    with _lock:
        own = sorted(
            (each for each in _passes if each.loss() is loss), key=lambda each: each.first_node
        )
    began = [each for each in own if each.first_node <= node]
    if not began:
        return None
    together = [each for each in own if each.region is began[-1].region is not None] or began[-1:]
    key = torch._C._current_graph_task_id(), node
    before, count = _recomputed.get(loss, (None, 0))
    count = count if before == key else 0
    if is_begun:
        _recomputed[loss] = key, count + 1
    return together[min(count, len(together) - 1)]


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

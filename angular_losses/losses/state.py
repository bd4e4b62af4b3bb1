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

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler

from ..schedules import Schedule


class Pass:
    """A forward pass, identified by the sequence number of its first autograd node."""

    @_disable_dynamo
    def __init__(self, loss: nn.Module, copies: list[Tensor]) -> None:
        self.loss, self.copies = weakref.ref(loss), copies
        self.first_node: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]

    @_disable_dynamo
    def keep(self, value: Tensor) -> None:
        """Keep this pass for as long as the graph of its value exists."""
        if value.grad_fn is not None:
            value.grad_fn.metadata["angular_losses"] = self  # type: ignore[index]
            with _lock:
                _passes.add(self)


_passes: weakref.WeakSet[Pass] = weakref.WeakSet()
_lock = threading.Lock()  # other threads may train other losses


@contextmanager
def state_of_a_pass(
    loss: nn.Module, statistics: Sequence[str], schedule: Schedule | None, *, repeats: bool
) -> Iterator[Pass | None]:
    """Context in which a loss reads copies of its state: the current, or of the repeated step."""
    moving: list[tuple[nn.Module, str]] = [(loss, name) for name in statistics]
    if schedule is not None:
        moving.append((schedule, "step"))
    if not moving:
        yield None
        return
    kept = [module.get_buffer(name) for module, name in moving]
    before = _recomputed_copies(loss) if repeats else None
    copy = _copy if torch.compiler.is_compiling() else Tensor.clone
    copies = [copy(buffer) for buffer in kept] if before is None else before
    for (module, name), buffer in zip(moving, copies, strict=True):
        setattr(module, name, buffer)
    try:
        if repeats and before is None and schedule is not None:
            schedule.step.sub_(1).clamp_(min=0)
        yield None if torch.compiler.is_compiling() else Pass(loss, copies)
    finally:
        for (module, name), buffer in zip(moving, kept, strict=True):
            setattr(module, name, buffer)


@_disable_dynamo
def _recomputed_copies(loss: nn.Module) -> list[Tensor] | None:
    """What the pass read that a backward pass needs again; None where it is not known.

    ``torch.utils.checkpoint`` recomputes what the current node saved: the last of the passes that
    began before that node was created.
    """
    if not is_in_backward():
        return None
    node: int = torch._C._current_autograd_node()._sequence_nr()
    with _lock:
        began = [each for each in _passes if each.loss() is loss and each.first_node <= node]
    return max(began, key=lambda each: each.first_node).copies if began else None


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

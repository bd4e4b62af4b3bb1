"""State that moves with each training step: schedules, running statistics.

It is kept in buffers and moved in place, so that whatever holds a buffer (a captured CUDA graph,
DistributedDataParallel) sees it move. What a forward pass reads are copies, which stay as they are
until its backward pass, and which a recomputation of that pass reads again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler

from ..schedules import Schedule


class Pass:
    """A forward pass, to be told by the place of its nodes in the order in which all were made."""

    @_disable_dynamo
    def __init__(self, loss: nn.Module, copies: list[Tensor]) -> None:
        self.loss, self.copies = weakref.ref(loss), copies
        self.first_node: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]

    @_disable_dynamo
    def keep(self, value: Tensor) -> None:
        """Remember this pass for as long as the graph of its value lives, which holds it."""
        if value.grad_fn is not None:
            value.grad_fn.metadata["angular_losses"] = self  # type: ignore[index]
            _passes.add(self)


_passes: weakref.WeakSet[Pass] = weakref.WeakSet()


@contextmanager
def state_of_a_pass(
    loss: nn.Module, statistics: Sequence[str], schedule: Schedule | None, *, repeats: bool
) -> Iterator[Pass | None]:
    """While this lasts, a loss reads copies of its state: that now, or of the step it repeats."""
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

    ``torch.utils.checkpoint`` recomputes what the node at work saved: of the passes that began
    before that node was made, it is the last.
    """
    if not is_in_backward():
        return None
    node: int = torch._C._current_autograd_node()._sequence_nr()
    began = [each for each in _passes if each.loss() is loss and each.first_node <= node]
    return max(began, key=lambda each: each.first_node).copies if began else None


def is_in_backward() -> bool:
    """Whether a backward pass is running, which a forward pass inside it recomputes a part for."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


# A compiled backward pass computes again what costs little, from the buffers as they are by then.
# An operator of one's own is not computed again.
_copy = torch.library.custom_op(
    "angular_losses::copy", Tensor.clone, mutates_args=(), schema="(Tensor buffer) -> Tensor"
)
_copy.register_fake(torch.empty_like)

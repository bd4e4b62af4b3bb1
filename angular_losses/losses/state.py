"""State that moves with each training step: schedules, running statistics.

It is kept in buffers and moved in place, so that whatever holds a buffer (a captured CUDA graph,
DistributedDataParallel) sees it move. What a forward pass reads are copies, which stay as they are
until its backward pass, and which a recomputation of that pass reads again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler


@contextmanager
def copied(
    buffers: Sequence[tuple[nn.Module, str]], copies: Sequence[Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """While this lasts, these buffers, each named by its module, are copies: of now, or those."""
    kept = [module.get_buffer(name) for module, name in buffers]
    copy = _copy if torch.compiler.is_compiling() else Tensor.clone
    read = [copy(buffer) for buffer in kept] if copies is None else list(copies)
    for (module, name), buffer in zip(buffers, read, strict=True):
        setattr(module, name, buffer)
    try:
        yield read
    finally:
        for (module, name), buffer in zip(buffers, kept, strict=True):
            setattr(module, name, buffer)


@dataclass(eq=False)
class Pass:
    """A forward pass, to be told by the place of its nodes in the order in which all were made."""

    loss: weakref.ref[nn.Module]
    first_node: int
    copies: list[Tensor]

    @_disable_dynamo
    def keep(self, value: Tensor) -> None:
        """Remember this pass for as long as the graph of its value lives, which holds it."""
        if value.grad_fn is not None:
            value.grad_fn.metadata["angular_losses"] = self  # type: ignore[index]
            _passes.add(self)


_passes: weakref.WeakSet[Pass] = weakref.WeakSet()


@_disable_dynamo
def begin_pass(loss: nn.Module, copies: list[Tensor]) -> Pass:
    """A forward pass that reads these copies and begins now."""
    number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return Pass(weakref.ref(loss), number, copies)


@_disable_dynamo
def recomputed_copies(loss: nn.Module) -> list[Tensor] | None:
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

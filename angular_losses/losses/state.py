"""State that moves with each training step: schedules, running statistics.

It is kept in buffers and moved in place, so that whatever holds a buffer (a captured CUDA graph,
DistributedDataParallel) sees it move. What a forward pass reads are copies, which stay as they are
until its backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def copied(buffers: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """While this lasts, these buffers, each named by its module, are copies of themselves."""
    kept = [module.get_buffer(name) for module, name in buffers]
    for (module, name), buffer in zip(buffers, kept, strict=True):
        copy = _copy(buffer) if torch.compiler.is_compiling() else buffer.clone()
        setattr(module, name, copy)
    try:
        yield
    finally:
        for (module, name), buffer in zip(buffers, kept, strict=True):
            setattr(module, name, buffer)


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

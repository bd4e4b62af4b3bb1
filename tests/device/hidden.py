"""What a CPU hides: on a GPU each of these makes the host wait for the device."""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from angular_losses import validation

aten = torch.ops.aten
READING = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
}
FROM_THE_HOST = {torch.as_tensor, torch.from_numpy, torch.tensor}


class _NoReading(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        by_mask = operator in (aten.index.Tensor, aten.index_put_.default) and any(
            each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
        )
        if operator in READING or "unique" in operator.__name__ or by_mask:
            raise AssertionError(f"{operator} reads a value from the device")
        return operator(*args, **kwargs or {})


class _NoCopies(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in FROM_THE_HOST and not isinstance(args[0], torch.Tensor):
            raise AssertionError(f"{function.__name__} copies from the host")
        return function(*args, **kwargs or {})


@contextlib.contextmanager
def no_synchronisation(device):
    """An error where the host waits for the device; on the CPU, where it would."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    unreadable = mock.patch.object(validation, "is_readable", return_value=False)
    with unreadable, _NoReading(), _NoCopies():
        yield

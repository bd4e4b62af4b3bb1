"""Reads slices in a process that may come to grief, and says what became of it.

The process imports what reading takes and no more, so that a new one starts at once.
"""

import sys
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

try:
    import resource
except ImportError:  # on Windows
    resource = None

import numpy as np

from examples.brain_tumor.data.matlab import Slice, read_slice
from examples.brain_tumor.data.reader import READER, limit_address_space
from examples.brain_tumor.errors import UserError

MEMORY = 1 << 30  # bytes that reading one file may take
PATIENCE = 120.0  # seconds until an answer; the reader gives up after 20 of the processor's


class TrialReader:
    """Reads slices in another process, and starts a new one when that is lost."""

    def __enter__(self) -> "TrialReader":
        self._start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def read(self, path: Path) -> tuple[str, str]:
        """Return what became of reading a file, and the fault if it failed."""
        self._connection.send(path)
        outcome, fault = "failed", f"no answer within {PATIENCE:.0f} s"
        if self._connection.poll(PATIENCE):
            try:
                outcome, fault = self._connection.recv()
            except EOFError:
                self._process.join()
                fault = f"the process ended with {self._process.exitcode}"
        if outcome == "failed":
            self._stop()
            self._start()
        return outcome, fault

    def _start(self) -> None:
        context = get_context("spawn")  # a fork would inherit the parent's memory
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_answer, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._connection.recv()  # it has started

    def _stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _answer(connection: Connection) -> None:
    """Read the files whose paths arrive, until the other side hangs up."""
    before = peak_memory()
    limit_address_space(2 * MEMORY)  # spares the machine; what counts is the peak
    connection.send("ready")
    with suppress(EOFError):
        while True:
            outcome, fault = _try_reading(connection.recv())
            if peak_memory() - before > MEMORY:
                outcome, fault = "failed", "took more than 1 GiB of memory"
            connection.send((outcome, fault))


def _try_reading(path: Path) -> tuple[str, str]:
    try:
        found = read_slice(path)
    except UserError as error:
        message = str(error)
        if message.startswith(f"{path}: ") and len(message.splitlines()) == 1:
            return "refused", ""
        return "failed", f"not one line that names the file: {message!r}"
    except Exception as error:
        return "failed", repr(error)
    return ("read", "") if _is_sound(found) else ("failed", "not a sound slice")


def _is_sound(found: Slice) -> bool:
    return bool(
        found.image.ndim == 2
        and found.image.dtype == np.float32
        and np.isfinite(found.image).all()
        and found.mask.shape == found.image.shape
        and found.mask.dtype == bool
        and found.label in (0, 1, 2)
        and found.border.ndim == 2
        and np.isfinite(found.border).all()
        and found.patient.isprintable()
    )


def peak_memory() -> int:
    """Return the most memory this process and its `READER` ever held, in bytes; 0 if unknown."""
    processes = ["self", *([str(READER.process.pid)] if READER.process else [])]
    with suppress(OSError, StopIteration):  # Linux's getrusage hands a child its parent's peak
        return sum(map(_high_water_mark, processes))
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _high_water_mark(process: str) -> int:
    lines = Path("/proc", process, "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

"""What the process apart does (see reader.py): it reads files for another one, under limits."""

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

try:
    import resource
except ImportError:  # on Windows, which therefore sets no limit to the memory
    resource = None

import numpy as np

from ..errors import FormatError
from .dicom import read_dicom
from .hdf5 import read_matrices

MEMORY = 3 << 28  # bytes that reading a file may take; the largest allowed takes two thirds of it
PATIENCE = 20.0  # seconds that it may take; the archive's take a hundredth of one
READERS: Mapping[str, Callable[..., dict[str, np.ndarray]]] = {
    "hdf5": read_matrices,
    "dicom": read_dicom,
}


def serve() -> None:
    """Answer requests from standard input until it ends, as it does when the other side dies."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    answers.write(b"ready\n")
    answers.flush()
    with Path(os.devnull).open("wb") as nowhere:  # no last words of a library that crashes
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    limit_address_space(MEMORY)
    for request in sys.stdin.buffer:
        limit_time(PATIENCE)
        answer(request, answers)
        limit_time(0)


def answer(request: bytes, answers: BinaryIO) -> None:
    """Answer one request, a line of JSON: which of the READERS, and its arguments, a path first.

    The answer is a line of JSON, a list of the matrices' names, dtypes and shapes, then their
    bytes; or a line with the reason why the file is refused.
    """
    try:
        name, *arguments = json.loads(request)
        matrices = READERS[name](*arguments)
        header: object = [(name, one.dtype.str, one.shape) for name, one in matrices.items()]
    except FormatError as error:
        matrices, header = {}, str(error)
    answers.write(json.dumps(header).encode() + b"\n")
    for matrix in matrices.values():
        answers.write(matrix)
    answers.flush()


def limit_address_space(extra: int) -> None:
    """Let this process map so many bytes more than now, where the system says how many it has."""
    with suppress(OSError, ValueError):  # ValueError: a lower limit is set already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + extra
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_time(seconds: float) -> None:
    """End this process after so long, though the parent may be dead by then; 0 lifts the limit.

    It is the processor's time where the system measures that: a busy machine refuses no file.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal, without a handler, kills
    elif seconds:
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()

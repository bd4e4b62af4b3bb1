"""A process apart that reads files: one on which a library crashes costs that process alone.

It starts with the first file and ends with this process, however that ends. A file that it does not
survive is refused, and the next file gets a new one. Its time is limited everywhere, its memory
where the system says how much it has, which is on Linux. `Reader` is this process's side of the
pipes between the two, `serve` the other's.
"""

import atexit
import faulthandler
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import BinaryIO

try:
    import resource
except ImportError:  # on Windows, which therefore sets no limit to the memory
    resource = None

import numpy as np

from ..errors import FormatError, UserError
from .dicom import read_dicom
from .hdf5 import read_matrices

MEMORY = 3 << 28  # bytes that reading a file may take; the largest allowed takes two thirds of it
PATIENCE = 20.0  # seconds that it may take; the archive's take a hundredth of one
READERS = {"hdf5": read_matrices, "dicom": read_dicom}

# It finds the modules that this process would, but imports no main module, which may need torch.
PROGRAM = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import serve; serve()"
ROOT = str(Path(__file__).parents[__package__.count(".") + 1])


class Reader:
    """Asks that process, a file at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None  # where there is one
        self._lock = Lock()

    def read(self, path: Path, reader: str, *arguments: object) -> dict[str, np.ndarray]:
        """Read matrices from a file with one of the READERS, given the path and these arguments.

        Raises:
            UserError: The file is damaged, or a matrix is missing or not as it should be.
        """
        with self._lock:
            try:
                answer = self._ask(json.dumps([reader, str(path.absolute()), *arguments]))
            except (EOFError, BrokenPipeError):  # the latter is no closed output of this process
                self.stop()
                answer = "damaged: reading it crashes or never ends"
            except BaseException:  # the answer may still be on its way
                self.stop()
                raise
        if isinstance(answer, str):
            raise UserError(f"{path}: {answer}")
        return answer

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()  # closes the pipes and waits

    def forget(self) -> None:
        """Leave the process to the one that this was forked from.

        The pipes' ends are closed, for while any is open the process takes no one for dead.
        """
        process = self.process
        self.__init__()
        if process is not None:
            process.stdin.raw.close()  # what another thread was writing is not written twice
            process.stdout.raw.close()
            process.returncode = 0  # no child of this process, which need not wait for it

    def _ask(self, request: str) -> str | dict[str, np.ndarray]:
        if self.process is None or self.process.poll() is not None:
            self.stop()
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *sys.path, ROOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for this process, which then ends that one
            )
            if self.process.stdout.readline() != b"ready\n":
                raise RuntimeError("the process that reads files does not start")
        self.process.stdin.write(request.encode() + b"\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        header = json.loads(line)
        if isinstance(header, str):
            return header
        matrices = {name: np.empty(shape, dtype) for name, dtype, shape in header}
        for matrix in matrices.values():
            if self.process.stdout.readinto(matrix) < matrix.nbytes:
                raise EOFError
        return matrices


READER = Reader()
atexit.register(READER.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=READER.forget)


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

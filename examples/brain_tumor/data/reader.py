"""A process apart that reads files: one on which a library crashes costs that process alone.

It starts with the first file and ends with this process, however that ends. A file that it does not
survive is refused, and the next file gets a new one. Its time is limited everywhere, its memory
where the system says how much it has, which is on Linux.
"""

import atexit
import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Lock

import numpy as np

from ..errors import UserError

# It finds the modules that this process would, but imports no main module, which may need torch.
PROGRAM = (
    f"import sys; sys.path[:] = sys.argv[1:]; from {__package__} import serving; serving.serve()"
)
ROOT = str(Path(__file__).parents[__package__.count(".") + 1])


class Reader:
    """Speaks to that process as serving.py says.

    Attributes:
        process: It, or None where there is none yet.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def read(self, path: Path, reader: str, *arguments: object) -> dict[str, np.ndarray]:
        """Read matrices from a file with one of serving.py's READERS.

        The arguments are what it is told besides the path, of JSON's types.

        Raises:
            UserError: The file is damaged, or a matrix is missing or not as it should be.
        """
        with self._lock:
            try:
                answer = self._ask(json.dumps([reader, str(path.absolute()), *arguments]))
            except EOFError:
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
            self._start()
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

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *sys.path, ROOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
        )
        if self.process.stdout.readline() != b"ready\n":
            raise RuntimeError("the process that reads files does not start")


READER = Reader()
atexit.register(READER.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=READER.forget)

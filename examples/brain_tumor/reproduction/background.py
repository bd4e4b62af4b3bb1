"""Long trainings behind other work: at the lowest priority, and stopped while something is timed.

    python -m examples.brain_tumor.reproduction.background run -- COMMAND ...
    python -m examples.brain_tumor.reproduction.background pause -- make test

`run` starts a command and stops it, with all its processes, as long as any `pause` is busy. A
killed `pause` holds nothing up, for its lock goes with it; an interrupted `run` ends its command.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

LOCK = Path.home() / ".cache" / "angular_losses" / "pause.lock"
INTERVAL = 0.1  # seconds between two looks at the lock
LOWEST = 19


def run(command: Sequence[str], lock: IO[str]) -> int:
    """Run a command at the lowest priority, stopped while `pause` is busy; return its exit code."""
    # A group of its own: a signal to it reaches the trainings that the command starts.
    child = subprocess.Popen(["nice", "-n", str(LOWEST), *command], start_new_session=True)
    # Where Linux schedules sessions as groups, niceness counts inside one only.
    with contextlib.suppress(OSError):
        Path(f"/proc/{child.pid}/autogroup").write_text(str(LOWEST))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it too takes the command along
    stopped = False
    try:
        while child.poll() is None:
            if _is_held(lock) != stopped:
                stopped = not stopped
                os.killpg(child.pid, signal.SIGSTOP if stopped else signal.SIGCONT)
            time.sleep(INTERVAL)
    finally:
        if child.poll() is None:
            for one in (signal.SIGTERM, signal.SIGCONT):  # a stopped process hears nothing
                os.killpg(child.pid, one)
    return child.wait()


def pause(command: Sequence[str], lock: IO[str]) -> int:
    """Run a command while what `run` started stands still; return its exit code."""
    fcntl.flock(lock, fcntl.LOCK_SH)  # several may pause at a time
    time.sleep(2 * INTERVAL)  # until `run` has looked
    return subprocess.run(command, check=False).returncode


def _is_held(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(lock, fcntl.LOCK_UN)
    return False


def main(arguments: Sequence[str]) -> int:
    """Run `run -- COMMAND` or `pause -- COMMAND`."""
    actions = {"run": run, "pause": pause}
    if len(arguments) < 3 or arguments[0] not in actions or arguments[1] != "--":
        print(f"usage: python -m {__spec__.name} run|pause -- COMMAND ...", file=sys.stderr)
        return 2
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w") as lock:
        return actions[arguments[0]](arguments[2:], lock)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The most memory that one training step takes beyond its arguments, in a process of its own.

    python -m benchmarks.memory "ArcFace, stash" 512 512 100000

Prints bytes: the peak of the resident set during the step less the resident set before it, after a
step of a small batch has loaded all code. The system's allocator is left as it is.
"""

import re
import subprocess
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(candidate, num_rows, size, num_classes, bfloat16=False):
    """Bytes, measured in a new process."""
    arguments = [candidate, num_rows, size, num_classes, *(["bfloat16"] if bfloat16 else [])]
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, arguments)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def resident(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def main():
    from benchmarks.candidates import steps_of

    candidate, *sizes = sys.argv[1:5]
    num_rows, size, num_classes = map(int, sizes)
    bfloat16 = "bfloat16" in sys.argv[5:]
    steps_of([candidate], num_rows, size, 5000, bfloat16)[candidate]()
    step = steps_of([candidate], num_rows, size, num_classes, bfloat16)[candidate]
    CLEAR.write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step()
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main()

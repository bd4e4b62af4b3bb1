"""All that matters of a GPU in a few minutes, in the order of its worth.

    python -m benchmarks.gpu --out results                 # six minutes
    python -m benchmarks.gpu --out results --phases speed  # one phase, or several, in that order
    python -m benchmarks.gpu --out /tmp/results --device cpu --small

``works`` runs tests/device, ``speed`` measures training steps, ``profile`` says where their time
goes. Each is a process of its own with a time budget of its own, and writes its JSON file after
every result: what is cut off leaves all before it. A phase that fails says why, and the next one
runs. The exit status is 1 if a phase failed or a test did.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.results import Results, machine

SECONDS = {
    "works": 150,
    "speed": 150,
    "profile": 45,
}  # each one's share, or as --minutes stretches it


def run(phase, options, seconds):
    """Why the phase ended early, or None."""
    command = [sys.executable, "-u", "-m", f"benchmarks.gpu.{phase}", "--seconds", str(seconds)]
    command += ["--device", options.device, "--out", str(options.out / f"{phase}.json")]
    command += ["--small"] if options.small else []
    # Deterministic algorithms ask for it before cuBLAS starts.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    try:
        status = subprocess.run(command, env=environment, timeout=seconds + 5).returncode
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds:.0f} s"
    return f"exit status {status}" if status else None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("gpu_results"), help="a folder (default gpu_results)")
    add("--minutes", type=float, default=sum(SECONDS.values()) / 60, help="in all (default 5.75)")
    add("--phases", nargs="+", choices=SECONDS, default=list(SECONDS), help="default all")
    add("--device", default="cuda", help="default cuda")
    add("--small", action="store_true", help="small sizes, to try the phases on a CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    summary = Results(options.out / "summary.json", {"machine": machine(), "phases": {}})
    share = 60 * options.minutes / sum(SECONDS[phase] for phase in options.phases)
    for phase in options.phases:
        print(f"\n== {phase}", flush=True)
        started = time.monotonic()
        failure = run(phase, options, share * SECONDS[phase])
        spent = round(time.monotonic() - started, 1)
        summary.found["phases"][phase] = {"seconds": spent, "failure": failure}
        summary.save()
        print(f"== {phase}: {failure or 'done'}, {spent} s", flush=True)
    print(json.dumps(summary.found, default=str), flush=True)
    sys.exit(any(each["failure"] for each in summary.found["phases"].values()))


if __name__ == "__main__":
    main()

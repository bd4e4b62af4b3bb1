"""Time and memory of the margin softmax, compared with other libraries, for the docs.

    python -m benchmarks.engine

Runs the benchmarks of `test_speed.py`, measures the memory of each candidate in a process of its
own, and then time and memory as the numbers of classes and rows grow. Writes every number to
engine_results.json and the tables to engine_results.md in docs/benchmarks, and the picture to
docs/images/engine.png. Takes about half an hour on two cores; leave the machine alone meanwhile.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib as mpl
import pytorch_metric_learning

from benchmarks.candidates import ALLOCATOR, NAIVE, machine, process_seconds, steps_of
from benchmarks.memory import measure
from benchmarks.test_speed import OURS, PEERS

mpl.use("Agg")
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
STASH, RECOMPUTE, PEER, LINEAR = (
    "ArcFace, stash",
    "ArcFace, recompute",
    "PML ArcFace",
    "linear_cross_entropy",
)
COLOURS = {STASH: "C0", RECOMPUTE: "C2", PEER: "C1", NAIVE: "0.5", LINEAR: "C3"}
NAMES = {
    STASH: "angular_losses, stash",
    RECOMPUTE: "angular_losses, recompute",
    PEER: "pytorch-metric-learning",
    NAIVE: "F.cross_entropy of F.linear",
    LINEAR: "F.linear_cross_entropy",
}
SIZE = 128
BY_CLASSES = [(128, SIZE, 1000 * 4**power) for power in range(6)] + [(128, SIZE, 2_000_000)]
BY_ROWS = [(num_rows, SIZE, 10_000) for num_rows in (64, 256, 1024, 4096)]
ROUNDS = 3


def main():
    if any(os.environ.get(key) != value for key, value in ALLOCATOR.items()):
        command = [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | ALLOCATOR)
    if sys.argv[1:2] == ["point"]:
        point(*map(int, sys.argv[2:]))
        return
    results = {
        "machine": machine()
        | {"python": platform.python_version(), "pml": pytorch_metric_learning.__version__},
        "cases": speed(),
    }
    for name, case in results["cases"].items():
        sizes, bfloat16 = case["N, d, C"], case["bfloat16"]
        case["gradient bytes"] = sizes[1] * sizes[2] * 4
        case["bytes"] = {
            candidate: memory(candidate, sizes, bfloat16)
            for candidate in (*OURS, *PEERS)
            if sizes[2] >= 10_000
        }
        print(json.dumps({name: case}), flush=True)
    results["by classes"] = [growth(sizes) for sizes in BY_CLASSES]
    results["by rows"] = [growth(sizes) for sizes in BY_ROWS]
    (DOCS / "benchmarks" / "engine_results.json").write_text(json.dumps(results, indent=1) + "\n")
    (DOCS / "benchmarks" / "engine_results.md").write_text(tables(results))
    picture(results).savefig(DOCS / "images" / "engine.png", dpi=150)


def speed():
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "speed.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "benchmarks/test_speed.py", "-q"),
                *("-W", "default", "--benchmark-enable", f"--benchmark-json={output}"),
            ],
            check=True,
        )
        found = json.loads(output.read_text())["benchmarks"]
    return {benchmark["params"]["case"]: benchmark["extra_info"] for benchmark in found}


def memory(candidate, sizes, bfloat16=False):
    for key in ALLOCATOR:
        os.environ.pop(key, None)
    found = measure(candidate, *sizes, bfloat16)
    os.environ.update(ALLOCATOR)
    return found


def growth(sizes):
    """Time and memory of each candidate at one size, the times in one process of its own."""
    command = [sys.executable, "-m", "benchmarks.engine", "point", *map(str, sizes)]
    seconds = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    found = {
        "N, d, C": sizes,
        "seconds": seconds,
        "bytes": {name: memory(name, sizes) for name in seconds},
    }
    print(json.dumps(found), flush=True)
    return found


def point(num_rows, size, num_classes):
    # linear_cross_entropy takes minutes a step beyond this.
    names = [name for name in COLOURS if name != LINEAR or num_rows * num_classes <= 10_000_000]
    steps = steps_of(names, num_rows, size, num_classes)
    seconds = {name: [] for name in names}
    for repeat in range(ROUNDS + 1):
        for name, step in steps.items():
            spent = process_seconds(step)
            if repeat:  # the first one warms up
                seconds[name].append(spent)
    print(json.dumps({name: statistics.median(times) for name, times in seconds.items()}))


def tables(results):
    lines = []
    for case in results["cases"].values():
        num_rows, size, num_classes = case["N, d, C"]
        kind = "bfloat16 autocast" if case["bfloat16"] else "float32"
        lines += [
            f"**N = {num_rows}, d = {size}, C = {num_classes:,}, {kind}** "
            f"(compared with: {case['floor']})",
            "",
            "| | time | memory beyond the gradient of weight |",
            "|---|---|---|",
        ]
        for candidate in dict.fromkeys([*case["ratios"], *case["bytes"]]):
            if candidate != case["floor"]:
                lines.append(f"| {candidate} | {' | '.join(cells(case, candidate))} |")
        lines.append("")
    versions = results["machine"]
    lines.append(
        f"torch {versions['torch']}, pytorch-metric-learning (PML) {versions['pml']}, Python "
        f"{versions['python']}, {versions['threads']} threads, {versions['cpu']}."
    )
    return "\n".join(lines) + "\n"


def cells(case, candidate):
    """The time of a candidate and its memory, as far as they were measured."""
    ratio, taken = case["ratios"].get(candidate), case["bytes"].get(candidate)
    once = " (one step)" if case["rounds"].get(candidate) == 1 else ""
    time = "not timed" if ratio is None else f"{ratio:.2f}{once}"
    memory = "" if taken is None else f"{(taken - case['gradient bytes']) / 1e6:,.0f} MB"
    return time, memory


def picture(results):
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True, sharey="row")
    for column, (key, index, label) in enumerate(
        (("by classes", 2, "classes C"), ("by rows", 0, "rows N"))
    ):
        for name, colour in COLOURS.items():
            points = [point for point in results[key] if name in point["seconds"]]
            at = [point["N, d, C"][index] for point in points]
            seconds = [point["seconds"][name] for point in points]
            # Where a step fits into what the one before it left there is nothing to be drawn.
            megabytes = [point["bytes"][name] / 1e6 or math.nan for point in points]
            for axes, values in zip(panels[:, column], (seconds, megabytes), strict=True):
                axes.loglog(at, values, "o-", markersize=3, color=colour, label=NAMES[name])
        gradient = [SIZE * point["N, d, C"][2] * 4 / 1e6 for point in results[key]]
        at = [point["N, d, C"][index] for point in results[key]]
        panels[1, column].loglog(
            at, gradient, ":", color="k", label="the gradient of weight itself"
        )
        panels[1, column].set_xlabel(label)
    panels[0, 0].set(ylabel="CPU seconds of a training step", title=f"N = 128, d = {SIZE}, float32")
    # Below some megabytes a step fits into what the one before it left.
    panels[1, 0].set(ylabel="memory of a training step, MB", ylim=(3, None))
    panels[0, 1].set(title=f"C = 10,000, d = {SIZE}, float32")
    panels[1, 0].legend(frameon=False, fontsize=8)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()

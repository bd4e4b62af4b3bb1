"""Time of one training step, relative to its three matrix products: `make bench`.

A row of the table is one benchmark. Each of its rounds runs every candidate once, one after the
other, so that what else the machine does falls on all alike; ratios are of medians of the process's
CPU time. They are kept with the benchmark as ``extra_info`` and asserted by nobody.
"""

import statistics

import pytest

from benchmarks.candidates import FLOOR, NAIVE, machine, process_seconds, steps_of

# (N, d, C), bfloat16 autocast or not, rounds, the candidates, what they are compared with
CASES = {
    "10k": ((256, 512, 10_000), False, 15, FLOOR),
    "100k": ((512, 512, 100_000), False, 5, FLOOR),
    "1M": ((128, 256, 1_000_000), False, 3, FLOOR),
    "100k bfloat16": ((512, 512, 100_000), True, 7, FLOOR),
    "3": ((64, 256, 3), False, 25, NAIVE),
    "1k": ((256, 512, 1000), False, 25, NAIVE),
}
OURS = [
    f"{name}, {mode}"
    for name in ("ArcFace", "SphereFace", "CosFace")
    for mode in ("stash", "recompute")
]
PEERS = ["PML ArcFace", "PML SphereFace", "PML CosFace", NAIVE, "linear_cross_entropy"]
ONCE = {"100k": ["linear_cross_entropy"], "100k bfloat16": ["linear_cross_entropy"]}
# Beside the peers, which take 5 GB each, the machine would run out of memory and measure that.
NEVER = {"1M": [*PEERS, "CosFace, stash", "CosFace, recompute"]}


@pytest.mark.parametrize("case", CASES)
def test_step(benchmark, case):
    sizes, bfloat16, rounds, floor = CASES[case]
    candidates = [name for name in (FLOOR, *OURS, *PEERS) if name not in NEVER.get(case, ())]
    steps = steps_of(candidates, *sizes, bfloat16)
    seconds = {candidate: [] for candidate in candidates}
    for step in steps.values():
        step()

    def one_round():
        for candidate, step in steps.items():
            if candidate in ONCE.get(case, ()) and seconds[candidate]:
                continue
            seconds[candidate].append(process_seconds(step))

    benchmark.pedantic(one_round, rounds=rounds)
    medians = {candidate: statistics.median(times) for candidate, times in seconds.items()}
    benchmark.extra_info |= {
        "machine": machine(),
        "N, d, C": sizes,
        "bfloat16": bfloat16,
        "floor": floor,
        "rounds": {candidate: len(times) for candidate, times in seconds.items()},
        "seconds": medians,
        "ratios": {candidate: median / medians[floor] for candidate, median in medians.items()},
    }

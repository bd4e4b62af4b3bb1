"""The phase "profile": where the time of a training step goes, by torch.profiler."""

import collections
import re
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.candidates import CANDIDATES, FLOOR, inputs
from benchmarks.gpu.results import Results, attempt, options_of_phase
from benchmarks.gpu.speed import elapsed

CASES = [(4096, 512, 100_000), (256, 512, 100_000), (1024, 512, 1_000_000), (64, 256, 3)]  # N, d, C
SMALL_CASES = [(32, 64, 5000), (64, 256, 3)]
STEPS, DEAREST = 5, 10
PRODUCT = re.compile(r"gemm|cutlass|nvjet|xmma|matmul|::mm|::addmm|^mm|^addmm", re.IGNORECASE)
KERNEL = "_kernel"  # Triton's, by the name of its function


def run(case, name, options):
    """The kernels of a few steps."""
    num_rows, size, num_classes = case
    tensors = inputs(num_rows, num_classes, size, device=options.device)
    step = CANDIDATES[name](*tensors, num_classes > 1000)
    for _ in range(3):  # what is compiled, is compiled
        step()
    is_cuda = options.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if is_cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if is_cuda else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == wanted]
    if not is_cuda:  # calls inside of others count there
        events = [event for event in events if event.cpu_parent is None]
    found = summarized([(e.name, e.time_range.start, e.time_range.end) for e in events])
    if is_cuda:
        found |= of_peak(found, case, tensors)
    return found


def summarized(events):
    """Where the microseconds of events (name, start, end) go."""
    taken, count = collections.Counter(), collections.Counter()
    for name, start, end in events:
        taken[name] += end - start
        count[name] += 1
    busy, until = 0.0, -float("inf")
    for start, end in sorted((start, end) for _, start, end in events):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    span = until - min(start for _, start, _ in events)
    all_taken = sum(taken.values())
    products = sum(us for name, us in taken.items() if PRODUCT.search(name))
    return {
        "microseconds a step": span / STEPS,
        "kernels a step": len(events) / STEPS,
        "share of time in products": products / all_taken,
        "share of time with nothing running": 1 - busy / span,
        "dearest": [
            {"name": name, "microseconds a step": us / STEPS, "calls a step": count[name] / STEPS}
            for name, us in taken.most_common(DEAREST)
        ],
    }


def of_peak(found, case, tensors):
    """The products a second of the Triton kernel, beside cuBLAS's of the same shape."""
    num_rows, size, num_classes = case
    own = [each for each in found["dearest"] if each["name"] == KERNEL]
    if not own:
        return {}
    work = 2 * num_rows * size * num_classes
    floor = CANDIDATES[FLOOR](*tensors, True)
    floor()
    milliseconds = min(elapsed(floor) for _ in range(5))
    return {
        "TFLOP/s of the Triton kernel": work / own[0]["microseconds a step"] / 1e6,
        "TFLOP/s of cuBLAS in three products": 3 * work / milliseconds / 1e9,
    }


def main():
    options = options_of_phase()
    report = Results(options.out, {"cases": [], "ended": "cut off"})
    for case in SMALL_CASES if options.small else CASES:
        for name in ("ArcFace, stash", "ArcFace, recompute"):
            if time.monotonic() > options.deadline - 5:
                return
            result = attempt(run, case, name, options)
            report.found["cases"].append({"N, d, C": case, "candidate": name, **result})
            report.save()
            print(case, name, {k: v for k, v in result.items() if k != "dearest"}, flush=True)
    report.found["ended"] = "in time"
    report.save()


if __name__ == "__main__":
    main()

"""The phase "speed": training steps beside three bare matrix products, and beside other libraries.

Time: forward and backward between two CUDA events, after an untimed run of the same candidate, so
with all kernels compiled; candidates take turns. "queued" is measured with other work queued before
it, as behind a network, so that the host runs ahead; "idle" with nothing queued, so with the
launches. On the CPU it is process time. A ratio is of medians, to three bare matrix products of
that size and dtype into memory allocated before. cross_entropy, linear_cross_entropy,
cut-cross-entropy and liger-kernel have no margin; the last two are measured where installed.

Memory: the allocator's peak beyond the arguments and the gradients; beside it what
``angular_losses.plan`` predicts.
"""

import functools
import importlib
import math
import statistics
import time
from unittest import mock

import torch
from torch.nn import functional as F

import angular_losses as al
from angular_losses.engine import kernels
from benchmarks.candidates import (
    CANDIDATES,
    FLOOR,
    NAIVE,
    OURS,
    SCALE,
    inputs,
    of_module,
    with_backward,
)
from benchmarks.gpu.results import Results, attempt, options_of_phase, version

ROWS, CLASSES, SIZE = [4096, 1024, 256], [100_000, 1_000_000, 10_000], 512
SMALL_CASES = [(64, 256, 3), (256, 512, 1000)]  # N, d, C
TARGETS, FROM_CLASSES = {4096: 1.35, 1024: 1.7, 256: 2.6}, 100_000  # rows: ratio, in bfloat16
REPEATS, AT_LEAST, STEPS = 12, 3, 100
MODES = ("stash", "recompute")


def without_triton(build):
    """The same step with torch's operators alone."""

    def built(*arguments):
        step = build(*arguments)

        def run():
            with mock.patch.object(kernels, "is_available", return_value=False):
                step()

        return run

    return built


def unit_factors(embeddings, weight):
    x, w = F.normalize(embeddings) * SCALE, F.normalize(weight)
    return x.bfloat16(), w.bfloat16()


@with_backward
def cut_cross_entropy(embeddings, weight, labels):
    cce = importlib.import_module("cut_cross_entropy")
    return cce.linear_cross_entropy(*unit_factors(embeddings, weight), labels)


@with_backward
def liger(embeddings, weight, labels):
    fused = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    x, w = unit_factors(embeddings, weight)
    return fused.LigerFusedLinearCrossEntropyLoss()(w, x, labels)


def builders(bfloat16, device):
    ours = [f"{name}, {mode}" for name in ("ArcFace", "SphereFace") for mode in MODES]
    found = {name: CANDIDATES[name] for name in (FLOOR, *ours, NAIVE)}
    if hasattr(F, "linear_cross_entropy"):
        found["linear_cross_entropy"] = CANDIDATES["linear_cross_entropy"]
    if version("pytorch_metric_learning"):
        found["PML ArcFace"] = CANDIDATES["PML ArcFace"]
    if bfloat16 and kernels.is_available(device, torch.bfloat16):
        for mode in MODES:
            name = f"ArcFace, {mode}"
            found[f"{name}, without Triton"] = without_triton(CANDIDATES[name])
    if bfloat16 and version("cut_cross_entropy"):
        found["cut-cross-entropy"] = cut_cross_entropy
    if bfloat16 and version("liger_kernel"):
        found["liger-kernel"] = liger
    return found


def peak(step, tensors):
    """The bytes of a step beyond the arguments and the gradients, on a GPU."""
    step()
    if not tensors[0].is_cuda:
        return {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    gradients = sum(tensor.nbytes for tensor in tensors[:2])
    return {"extra_bytes": torch.cuda.max_memory_allocated() - before - gradients}


def sample(step, work):
    """The milliseconds of one step."""
    step()
    if not work.is_cuda:
        started = time.process_time()
        step()
        return {"process": 1e3 * (time.process_time() - started)}
    for _ in range(64):  # 5 ms or so
        work.zero_()
    queued = elapsed(step)
    return {"queued": queued, "idle": elapsed(step)}


def elapsed(step):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(rows, classes, size, bfloat16, options):
    """The results of each candidate on one size."""
    tensors = inputs(rows, classes, size, device=options.device)
    work = torch.empty(2**26 if tensors[0].is_cuda else 1, device=options.device)
    built, results, samples = builders(bfloat16, options.device), {}, {}
    for name, build in built.items():
        results[name], samples[name] = (
            attempt(lambda b=build: peak(b(*tensors, bfloat16), tensors)),
            [],
        )
    results[FLOOR].pop("extra_bytes", None)  # it makes no gradients
    for repeat in range(REPEATS):
        if repeat >= AT_LEAST and time.monotonic() > options.deadline - 10:
            break
        for name in (name for name in built if "error" not in results[name]):
            # Built anew, so that only one holds memory at a time.
            times = attempt(lambda n=name: sample(built[n](*tensors, bfloat16), work))
            samples[name].append(times)
            results[name] |= {"error": times["error"]} if "error" in times else {}
    product = torch.bfloat16 if bfloat16 else None
    for name in (f"{loss}, {mode}" for loss in ("ArcFace", "SphereFace") for mode in MODES):
        plan = al.plan(
            *(rows, classes, size),
            **{"product_dtype": product, "device": options.device, "mode": name.split(", ")[1]},
        )
        results[name] |= {"planned_extra_bytes": plan.extra_bytes, "chunk": plan.chunk}
    return summarized(results, samples)


def summarized(results, samples):
    """With the quartiles of the times, and the ratios of their medians to the floor's."""
    for name, result in results.items():
        if "error" not in result:
            result["milliseconds"] = {
                kind: statistics.quantiles([t[kind] for t in samples[name]], method="inclusive")
                for kind in samples[name][0]
            }
    floor = results[FLOOR].get("milliseconds", {})
    for result in results.values():
        times = result.get("milliseconds", {})
        result["ratio"] = {kind: times[kind][1] / floor[kind][1] for kind in times if kind in floor}
    return results


def target_of(rows, classes, results, device):
    """The target of a size in bfloat16, beside what "auto" chooses there."""
    mode = al.plan(rows, classes, SIZE, product_dtype=torch.bfloat16, device=device).mode
    ratios = {
        loss: results.get(f"{loss}, {mode}", {}).get("ratio", {}).get("queued", math.inf)
        for loss in ("ArcFace", "SphereFace")
    }
    limit = TARGETS[rows]
    return {"limit": limit, "mode": mode, "ratios": ratios, "met": max(ratios.values()) <= limit}


def graphed(step):
    """Replays a CUDA graph of the step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def small_steps(num_rows, size, num_classes, device):
    """Functions that build the step of each candidate of a small case."""
    tensors = inputs(num_rows, num_classes, size, device=device)
    make = functools.partial(OURS["ArcFace"], device="meta")
    eager = {
        "ArcFace": of_module(make, "weight"),
        NAIVE: CANDIDATES[NAIVE],
    }
    if version("pytorch_metric_learning"):
        eager["PML ArcFace"] = CANDIDATES["PML ArcFace"]
    # On the CPU the compiler would take a minute.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = of_module(make, "weight", functools.partial(torch.compile, backend=backend))
    found = {name: functools.partial(build, *tensors, False) for name, build in eager.items()}
    found["ArcFace, compiled"] = functools.partial(compiled, *tensors, False)
    if device.type == "cuda":
        for name in ("ArcFace", NAIVE):
            found[f"{name}, CUDA graph"] = lambda name=name: graphed(eager[name](*tensors, False))
    return found


def small(build, device):
    """Microseconds of a step, of as many one after the other, and its kernels."""
    step = build()
    for _ in range(5):
        step()
    if device.type != "cuda":
        started = time.process_time()
        for _ in range(AT_LEAST):
            step()
        return {"microseconds": 1e6 * (time.process_time() - started) / AT_LEAST}
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - started) / STEPS)
    return {"microseconds": statistics.median(times), "kernels": kernels_of(step)}


def kernels_of(step):
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def print_row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def print_case(case, results):
    for name, result in results.items():
        ratios = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in result.get("ratio", {}).items())
        sizes = (result.get(key) for key in ("extra_bytes", "planned_extra_bytes"))
        sizes = ("-" if size is None else f"{size / 2**20:.0f} MiB" for size in sizes)
        print_row(*case.values(), name, result.get("error") or ratios, *sizes)


def main():
    options = options_of_phase()
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Results(options.out, {"sizes": [], "small": [], "ended": "cut off"})
    rows, classes, size = ([8, 32], [5000], 64) if options.small else (ROWS, CLASSES, SIZE)

    def grid(precision):
        for num_classes in classes:
            for num_rows in rows:
                if time.monotonic() > options.deadline - 10:
                    return
                bfloat16 = precision == "bfloat16"
                results = attempt(measure, num_rows, num_classes, size, bfloat16, options)
                results = {"all": results} if "error" in results else results
                case = {"rows": num_rows, "classes": num_classes, "precision": precision}
                entry = {**case, "candidates": results}
                if bfloat16 and num_rows in TARGETS and num_classes >= FROM_CLASSES:
                    entry["target"] = target_of(num_rows, num_classes, results, options.device)
                report.found["sizes"].append(entry)
                report.save()
                print_case(case, results)

    grid("bfloat16")
    for case in SMALL_CASES:
        for name, build in small_steps(*case, options.device).items():
            if time.monotonic() < options.deadline - 5:
                result = attempt(small, build, options.device)
                report.found["small"].append({"N, d, C": case, "candidate": name, **result})
                report.save()
                print_row(case, name, result)
    grid("float32")
    report.found["ended"] = "in time" if time.monotonic() < options.deadline - 10 else "out of time"
    report.save()


if __name__ == "__main__":
    main()

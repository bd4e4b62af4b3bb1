"""The margin softmax on a CUDA device: correctness, time and memory, beside three bare products.

    python -m benchmarks.gpu --out results.json    # 10 minutes, by estimate; bfloat16 first
    python -m benchmarks.gpu --device cpu --small  # does the script itself run?
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python -m benchmarks.gpu --check

``--check`` runs the correctness part alone, on small sizes; without the caching allocator the
sanitizer sees where each tensor ends. The exit status is 1 if a check failed.

Time: forward and backward between two CUDA events, after an untimed run of the same candidate;
candidates take turns. "queued" is measured with other work queued before it, as behind a network,
so that the host runs ahead; "idle" with nothing queued, so with the launches. On the CPU it is
process time. A ratio is of medians, to three bare matrix products of that size and dtype (X W^T,
E W, E^T X) into memory allocated before. Of the peers, pytorch-metric-learning's (PML, where it is
installed) has the margin; cross_entropy and linear_cross_entropy have none.

Memory: the allocator's peak in a second step, beyond the arguments and the gradients; beside it
what ``angular_losses.plan`` predicts.
"""

import argparse
import datetime
import functools
import gc
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import angular_losses as al
from benchmarks.candidates import products

ROWS, CLASSES, SIZE = [256, 1024, 4096], [10_000, 100_000, 1_000_000, 2_000_000], 512
CHECKED = [(256, 20_000), (1000, 50_021), (4097, 600_011)]  # the last: more than 2^31 cosines
SMALL_ROWS, SMALL_CLASSES, SMALL_SIZE = [8, 32], [5_000], 64
SMALL_CHECKED = [(8, 5_000), (1025, 13_011)]
MODES, PRECISIONS = ["stash", "recompute"], ["bfloat16", "float32"]
TARGETS, FROM_CLASSES = {4096: 1.35, 1024: 1.7, 256: 2.6}, 100_000  # rows: ratio, in bfloat16
LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}  # of a check's relative errors
PEER_SCALE, PEER_MARGIN = 64.0, 0.5
SLOW = 3.0  # seconds
FLOOR = "three products"


def plain_arcface(theta):
    turned = theta + 0.5
    return torch.where(turned <= math.pi, turned.cos(), -turned.cos() - 2)


def plain_sphereface(theta):
    k = (4 * theta / math.pi).floor().clamp(max=3)
    return (1 - 2 * (k % 2)) * (4 * theta).cos() - 2 * k


# The margin, the scale, and the margin again, plainly.
LOSSES = {
    "ArcFace": (functools.partial(al.arcface, m=0.5), 64.0, plain_arcface),
    "SphereFace": (functools.partial(al.sphereface, m=4), 30.0, plain_sphereface),
}


# A builder takes the tensors, and whether the products are in bfloat16; it returns one step, as a
# function without arguments, and the leaves whose gradients that leaves.


def three_products(embeddings, weight, labels, bfloat16):
    return products(embeddings, weight, labels, bfloat16), ()


def step(loss_of, parameters, bfloat16):
    def run():
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(parameters[0].device.type, torch.bfloat16, bfloat16):
            loss = loss_of()
        loss.backward()

    return run, parameters


def cross_entropy(embeddings, weight, labels, bfloat16):
    def loss():
        logits = F.linear(F.normalize(embeddings), F.normalize(weight)) * PEER_SCALE
        return F.cross_entropy(logits, labels)

    return step(loss, (embeddings, weight), bfloat16)


def linear_cross_entropy(embeddings, weight, labels, bfloat16):
    """In chunks of rows, as torch chooses them. Autocast does not reach it: it gets bfloat16."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    options = torch.nn.LinearCrossEntropyOptions()

    def loss():
        x, w = F.normalize(embeddings) * PEER_SCALE, F.normalize(weight)
        return F.linear_cross_entropy(x.to(dtype), w.to(dtype), labels, options=options)

    return step(loss, (embeddings, weight), bfloat16)


def arcface_of_pml(embeddings, weight, labels, bfloat16):
    pml = importlib.import_module("pytorch_metric_learning.losses")
    # Made with one class: it would draw all of them on the CPU first.
    loss = pml.ArcFaceLoss(1, weight.shape[1], margin=math.degrees(PEER_MARGIN), scale=PEER_SCALE)
    loss.num_classes = len(weight)
    loss.W = torch.nn.Parameter(weight.detach().T.contiguous())
    return step(lambda: loss(embeddings, labels), (embeddings, loss.W), bfloat16)


def ours(name, mode, embeddings, weight, labels, bfloat16):
    loss = functools.partial(margin_loss, name, mode, embeddings, weight, labels)
    return step(loss, (embeddings, weight), bfloat16)


def margin_loss(name, mode, *tensors, reduction="mean"):
    margin, scale, _ = LOSSES[name]
    return al.margin_softmax_loss(
        *tensors, margin=margin, scale=scale, mode=mode, reduction=reduction
    )


def candidates():
    builders = {FLOOR: three_products, "cross_entropy": cross_entropy}
    if hasattr(F, "linear_cross_entropy"):
        builders["linear_cross_entropy"] = linear_cross_entropy
    if optional("pytorch_metric_learning"):
        builders["PML ArcFace"] = arcface_of_pml
    for name in LOSSES:
        builders |= {f"{name}, {mode}": functools.partial(ours, name, mode) for mode in MODES}
    return builders


def planned(rows, classes, size, precision, device, mode):
    product = torch.bfloat16 if precision == "bfloat16" else None
    return al.plan(rows, classes, size, product_dtype=product, device=device, mode=mode)


def inputs(rows, classes, options, nearness=0.0):
    """Leaves; with a nearness, rows from far away up to that many lengths towards their centres."""
    device, size = options.device, options.size
    draw = torch.Generator(device).manual_seed(options.seed)
    weight = torch.randn(classes, size, device=device, generator=draw)
    labels = torch.randint(classes, (rows,), device=device, generator=draw)
    embeddings = torch.randn(rows, size, device=device, generator=draw)
    embeddings += torch.linspace(0, nearness, rows, device=device)[:, None] * weight[labels]
    return embeddings.requires_grad_(), weight.requires_grad_(), labels


def attempt(function, *arguments):
    """What the function returns, or {"error": why it does not}, with its memory given back."""
    try:
        return function(*arguments)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"error": "out of memory" if "out of memory" in message else message}


def reference(embeddings, weight, labels, name):
    """Losses, and the gradients of their mean, in float64: dense, over blocks of rows."""
    x, w = (tensor.detach().double().requires_grad_() for tensor in (embeddings, weight))
    _, scale, plain = LOSSES[name]
    losses = x.new_empty(len(x))
    for rows in (slice(start, start + 256) for start in range(0, len(x), 256)):
        column = labels[rows, None]
        cosine = F.normalize(x[rows]) @ F.normalize(w).T
        target = plain(cosine.gather(1, column).acos())
        logits = (scale * cosine).scatter(1, column, scale * target)
        of_rows = F.cross_entropy(logits, labels[rows], reduction="none")
        (of_rows.sum() / len(x)).backward()
        losses[rows] = of_rows.detach()
    return losses, x.grad, w.grad


def compare(truth, name, mode, precision, tensors):
    """The errors of the library's losses and gradients; and are they the same bits twice?"""

    def found():
        with torch.autocast(tensors[0].device.type, torch.bfloat16, precision == "bfloat16"):
            losses = margin_loss(name, mode, *tensors, reduction="none")
        return losses.detach(), *torch.autograd.grad(losses.mean(), tensors[:2])

    errors = [
        ((result.double() - true).norm() / true.norm()).item()
        for result, true in zip(found(), truth, strict=True)
    ]
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN, too
    try:
        identical = all(torch.equal(*pair) for pair in zip(found(), found(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    passed = identical and all(error <= LIMITS[precision] for error in errors)
    errors = dict(zip(("losses", "embeddings", "weight"), errors, strict=True))
    return {"passed": passed, "identical": identical, "errors": errors}


def check(rows, classes, loss, options):
    tensors = inputs(rows, classes, options, nearness=2.0)
    truth = reference(*tensors, loss)
    return {
        f"{mode}, {precision}": attempt(compare, truth, loss, mode, precision, tensors)
        for mode in MODES
        for precision in options.precisions
    }


def check_all(options, report, save):
    print("\n| rows | classes | loss | errors: losses, dX, dW | the same bits twice | passed |")
    print("|---" * 6 + "|")
    for rows, classes in SMALL_CHECKED if options.small else CHECKED:
        for loss in LOSSES:
            results = attempt(check, rows, classes, loss, options)
            results = {"all": results} if "error" in results else results
            for key, result in results.items():
                case = {"rows": rows, "classes": classes, "loss": f"{loss}, {key}"}
                report["checks"].append({**case, "passed": False, **result})
                errors = ", ".join(f"{error:.0e}" for error in result.get("errors", {}).values())
                ending = [result.get("identical"), result.get("passed", False)]
                print_row(*case.values(), errors or result["error"], *ending)
            save()


def sample(build, tensors, bfloat16, work):
    """The milliseconds of one step."""
    run, _ = build(*tensors, bfloat16)
    run()  # untimed: its memory is in the allocator's cache now
    if not work.is_cuda:
        started = time.process_time()
        run()
        return {"process": 1e3 * (time.process_time() - started)}
    for _ in range(64):  # 5 ms or so
        work.zero_()
    queued = elapsed(run)
    return {"queued": queued, "idle": elapsed(run)}


def elapsed(run):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak(build, tensors, bfloat16):
    """The bytes beyond the arguments and the gradients, where they can be known."""
    is_cuda = tensors[0].is_cuda
    run, parameters = build(*tensors, bfloat16)
    started = time.perf_counter()
    run()
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if seconds > SLOW:
        return {"error": f"too slow to repeat: the first step took {seconds:.1f} s"}
    if not is_cuda or not parameters:
        return {}
    for parameter in parameters:
        parameter.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    gradients = sum(parameter.grad.nbytes for parameter in parameters)
    return {"extra_bytes": torch.cuda.max_memory_allocated() - before - gradients}


def measure(rows, classes, precision, options):
    """The results of each candidate on one size."""
    tensors, bfloat16 = inputs(rows, classes, options), precision == "bfloat16"
    work = torch.empty(2**26 if options.device.type == "cuda" else 1, device=options.device)
    builders, results, samples = candidates(), {}, {}

    def in_turn(function, name, *arguments):
        result = attempt(function, builders[name], tensors, bfloat16, *arguments)
        tensors[0].grad = tensors[1].grad = None
        return result

    for name in builders:
        results[name], samples[name] = in_turn(peak, name), []
    started = time.perf_counter()
    for repeat in range(options.repeats):
        if repeat >= 3 and time.perf_counter() - started > options.seconds:
            break
        for name in (name for name in builders if "error" not in results[name]):
            times = in_turn(sample, name, work)
            samples[name].append(times)
            results[name] |= {"error": times["error"]} if "error" in times else {}
    for name, mode in ((f"{loss}, {mode}", mode) for loss in LOSSES for mode in MODES):
        plan = planned(rows, classes, options.size, precision, options.device, mode)
        results[name] |= {"planned_extra_bytes": plan.extra_bytes, "chunk": plan.chunk}
    return summarize(results, samples)


def summarize(results, samples):
    """With the quartiles of the times, and the ratios of their medians to the floor's."""
    for name, result in results.items():
        if "error" not in result:
            result["samples"] = len(samples[name])
            result["milliseconds"] = {
                kind: statistics.quantiles([t[kind] for t in samples[name]], method="inclusive")
                for kind in samples[name][0]
            }
    floor = results[FLOOR].get("milliseconds", {})
    for result in results.values():
        times = result.get("milliseconds", {})
        result["ratio"] = {kind: times[kind][1] / floor[kind][1] for kind in times if kind in floor}
    return results


def measure_all(options, report, save):
    print("\n| rows | classes | precision | candidate | milliseconds [quartiles]: ratio ", end="")
    print("| MiB beyond the gradients | planned |\n" + "|---" * 7 + "|")
    for precision in options.precisions:
        for classes in options.classes:
            for rows in options.rows:
                results = attempt(measure, rows, classes, precision, options)
                results = {"all": results} if "error" in results else results
                case = {"rows": rows, "classes": classes, "precision": precision}
                report["timings"].append({**case, "candidates": results})
                for name, result in results.items():
                    print_row(*case.values(), name, *described(result))
                save()


def described(result):
    times = [
        f"{kind} {median:.3f} [{first:.3f}, {third:.3f}]: {result['ratio'].get(kind, math.nan):.2f}"
        for kind, (first, median, third) in result.get("milliseconds", {}).items()
    ]
    sizes = (result.get(key) for key in ("extra_bytes", "planned_extra_bytes"))
    sizes = ["-" if size is None else round(size / 2**20) for size in sizes]
    return [result.get("error") or "; ".join(times), *sizes]


def targets(report, device):
    """Each target, and whether it is met; what was not measured is not."""
    timings = {
        (c["precision"], c["rows"], c["classes"]): c["candidates"] for c in report["timings"]
    }
    listed = []
    for rows, limit in TARGETS.items():
        for classes in (classes for classes in CLASSES if classes >= FROM_CLASSES):
            results = timings.get(("bfloat16", rows, classes), {})
            auto = planned(rows, classes, SIZE, "bfloat16", device, "auto").mode
            for loss, mode in ((loss, mode) for loss in LOSSES for mode in MODES):
                result = results.get(f"{loss}, {mode}", results.get("all", {"error": "not run"}))
                ratio = result.get("ratio") or {}
                why = result.get("error") or results.get(FLOOR, {}).get("error")
                met = {kind: ratio.get(kind, math.inf) <= limit for kind in ("queued", "idle")}
                entry = {"rows": rows, "classes": classes, "loss": f"{loss}, {mode}"}
                entry |= {"mode_of_auto": auto, "limit": limit, "measured": ratio, "met": met}
                listed.append({**entry, "error": why})
    return listed


def print_targets(listed):
    print("\n| rows | classes | loss | mode of auto | limit | measured | met | error |")
    print("|---" * 8 + "|")
    for entry in listed:
        ratios = "; ".join(f"{kind} {ratio:.2f}" for kind, ratio in entry["measured"].items())
        met = "; ".join(f"{kind} {is_met}" for kind, is_met in entry["met"].items())
        print_row(*{**entry, "measured": ratios or "-", "met": met}.values())


def print_row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def optional(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def machine(device):
    matmul, gpu = torch.backends.cuda.matmul, {}
    if device.type == "cuda":
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        gpu = {
            "capability": torch.cuda.get_device_capability(device),
            "memory": torch.cuda.get_device_properties(device).total_memory,
            "driver": subprocess.getoutput(query),
        }
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "CPU",
        **gpu,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": getattr(optional("triton"), "__version__", None),
        "PML": getattr(optional("pytorch_metric_learning"), "__version__", None),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "allow_tf32": matmul.allow_tf32,
        "bfloat16 sums may be reduced": matmul.allow_bf16_reduced_precision_reduction,
        "environment": {
            key: value
            for key, value in os.environ.items()
            if key.startswith(("CUDA_", "CUBLAS_", "NVIDIA_TF32", "PYTORCH_", "TORCH_"))
        },
    }


def write(path, report, device):
    """All there is so far: an interruption leaves the file before or the file after."""
    report["targets"] = targets(report, device)
    if path is not None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(report, indent=1, default=str) + "\n")
        partial.replace(path)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="JSON to write, again after each case")
    add("--device", type=torch.device, default="cuda", help="default cuda")
    add("--check", action="store_true", help="correctness alone, on small sizes")
    add("--small", action="store_true", help="small sizes")
    add("--seed", type=int, default=0, help="of the inputs (default 0)")
    add("--repeats", type=int, default=20, help="timed runs, at least 2 (default 20)")
    add("--seconds", type=float, default=30.0, help="limit for a size after 3 runs (default 30)")
    add("--rows", type=int, nargs="+", help=f"default {ROWS}")
    add("--classes", type=int, nargs="+", help=f"default {CLASSES}")
    add("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    options = parser.parse_args()
    options.repeats = max(2, options.repeats)
    options.small |= options.check
    options.size = SMALL_SIZE if options.small else SIZE
    options.rows = options.rows or (SMALL_ROWS if options.small else ROWS)
    options.classes = options.classes or (SMALL_CLASSES if options.small else CLASSES)
    return options


def main():
    options = parse()
    # Deterministic algorithms ask for it before cuBLAS starts; it is torch's default on an H100.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    report = {"machine": machine(options.device), "settings": vars(options), "seed": options.seed}
    report |= {"checks": [], "timings": []}
    print(json.dumps({**report["machine"], "seed": options.seed}, default=str), flush=True)
    save = functools.partial(write, options.out, report, options.device)
    check_all(options, report, save)
    if not options.check:
        measure_all(options, report, save)
        print_targets(report["targets"])
    failed = sum(not case["passed"] for case in report["checks"])
    print(f"\n{len(report['checks'])} checks, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

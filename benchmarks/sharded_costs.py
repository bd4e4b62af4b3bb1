"""Memory and communication of a step with sharded classes: a model, and measurements.

    python -m benchmarks.sharded_costs

Measures small cases with one rank and two, on the CPU with gloo, in a minute or two; writes every
number to distributed_results.json in docs/benchmarks and prints the tables of its
distributed_training.md.
"""

import itertools
import json
import math
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from angular_losses import ArcFaceLoss, plan
from angular_losses.distributed import shard, shard_optimizer

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks" / "distributed_results.json"
FLOAT, DOUBLE, INTEGER = 4, 8, 8  # bytes
HEADER = 512  # bytes of a rank's message before its rows
# What an optimiser keeps of a weight, and what its step takes beside that, in copies of the weight.
OPTIMIZERS = {"SGD, momentum": (1, 0), "AdamW": (2, 2), "AdamW, fused": (2, 0)}
COLLECTIVES = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::allreduce_": "all_reduce",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
}
CASES = [(128, 20_000, 64), (256, 100_000, 128), (64, 200_000, 256)]  # N, C, d
VARIANTS = [(None, 1.0), (1, 1.0), (2, 1.0), (1, 0.1), (2, 0.1)]  # ranks, sample rate
ROUNDS = 7
FITS = (1_000_000, 10_000_000, 30_000_000, 100_000_000)
PUBLISHED = (125_000, 1_400_000, 5_500_000, 8_000_000, 16_000_000, 29_000_000)  # by insightface
SHOWN = [(name, rate) for name in ("SGD, momentum", "AdamW, fused") for rate in (1.0, 0.1)]


def exchanged(num_rows, size, ranks):
    """Bytes of the tensors of a step's collectives, for N rows of all ranks and a fixed margin."""
    return {
        "all_gather": ranks * HEADER + num_rows * (INTEGER + size * FLOAT),
        "all_reduce": num_rows * 2 * DOUBLE,
        "reduce_scatter": num_rows * size * FLOAT,
    }


def sent(tensors, ranks):
    """Bytes that a rank sends for them, where each collective goes round a ring."""
    rounds = {"all_gather": 1, "all_reduce": 2, "reduce_scatter": 1}
    return {name: rounds[name] * of * (ranks - 1) // ranks for name, of in tensors.items()}


def held(num_rows, num_classes, size, ranks, sample_rate, optimizer, **options):
    """Bytes that a rank holds of the classes, and what loss and optimiser take beside them.

    Args:
        num_rows: Of all ranks.
        num_classes: Of all ranks.
        size: Of an embedding.
        ranks: How many there are.
        sample_rate: As :func:`angular_losses.distributed.shard` has it.
        optimizer: One of ``OPTIMIZERS``.
        **options: For :func:`angular_losses.plan`.
    """
    states, scratch = OPTIMIZERS[optimizer]
    own, is_sampled = math.ceil(num_classes / ranks), sample_rate < 1
    positives = min(own, math.ceil(num_rows / ranks))  # at most, where labels are spread evenly
    taken = max(math.ceil(sample_rate * own), positives) if is_sampled else own
    centre = size * FLOAT
    rows = num_rows * (INTEGER + centre)
    gathered = 2 * rows + rows // ranks  # those of all ranks, and unpacked; the message
    picked = taken * (centre + 2 * INTEGER) if is_sampled else 0
    copied = 1 + states if is_sampled else 0  # the rows that the optimiser sees
    return {
        "weight": own * centre,
        "gradient": taken * (centre + (INTEGER if is_sampled else 0)),
        "optimizer": states * own * centre,
        "loss beside": plan(num_rows, taken, size, **options).extra_bytes + gathered + picked,
        "step beside": (copied + scratch) * taken * centre,
    }


def most(parts):
    """The most bytes at a time, of what :func:`held` returns."""
    lasting = parts["weight"] + parts["gradient"] + parts["optimizer"]
    return lasting + max(parts["loss beside"], parts["step beside"])


class Counted(TorchDispatchMode):
    """Counts the bytes of the tensors of all collectives while it lasts, by their names."""

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(COLLECTIVES.values(), 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = COLLECTIVES.get(function._schema.name)
        if name is not None:
            tensors = [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]
            self.bytes[name] += max(tensor.nbytes for tensor in tensors)
        return function(*args, **(kwargs or {}))


class Candidate:
    """A loss, sharded over a mesh or whole, with its optimiser and the batch of this rank."""

    def __init__(self, mesh, sample_rate, num_rows, num_classes, size):
        self.loss = ArcFaceLoss(num_classes, size, device=None if mesh is None else "meta")
        if mesh is not None:
            shard(self.loss, mesh, sample_rate=sample_rate)
        self.optimizer = torch.optim.SGD([self.loss.weight], lr=0.1, momentum=0.9)
        if mesh is not None:
            shard_optimizer(self.optimizer, self.loss)
        own = num_rows // (1 if mesh is None else mesh.size())
        self.embeddings = torch.randn(own, size, requires_grad=True)
        self.labels = torch.randint(num_classes, (own,))
        self.seconds = []

    def clear(self):
        self.embeddings.grad = self.loss.weight.grad = None

    def find_gradients(self):
        self.loss(self.embeddings, self.labels).backward()

    def step(self):
        self.clear()
        self.find_gradients()
        self.optimizer.step()

    def time(self):
        started = time.process_time()
        self.step()
        self.seconds.append(time.process_time() - started)

    def sizes(self):
        """What it holds, as :func:`held` has it, and exchanges, as :func:`exchanged` has it."""
        from tests.profiling import peak_bytes

        self.clear()
        in_loss, in_step = peak_bytes(self.find_gradients), peak_bytes(self.optimizer.step)
        with Counted() as counted:
            self.step()
        weight, gradient = self.loss.weight, bytes_of(self.loss.weight.grad)
        return {
            "weight": weight.nbytes,
            "gradient": gradient,
            "optimizer": self.optimizer.state[weight]["momentum_buffer"].nbytes,
            "loss beside": in_loss - gradient,
            "step beside": in_step,
            "exchanged": counted.bytes,
        }


def bytes_of(gradient):
    """Of a gradient, dense or sparse."""
    if not gradient.is_sparse:
        return gradient.nbytes
    gradient = gradient.coalesce()
    return gradient.values().nbytes + gradient.indices().nbytes


def measure(mesh, *sizes):
    """CPU seconds of each variant's steps, in turn, and its bytes; None for those of others."""
    rank, alone = dist.get_rank(), dist.new_group([0])
    meshes = {None: None, 2: mesh}
    if rank == 0:
        meshes[1] = DeviceMesh.from_group(alone, "cpu", mesh=[0])
    candidates = [
        Candidate(meshes[ranks], sample_rate, *sizes) if rank < (ranks or 1) else None
        for ranks, sample_rate in VARIANTS
    ]
    for repeat in range(ROUNDS + 1):
        for candidate in candidates:
            dist.barrier()
            if candidate is not None:
                candidate.time()
                if not repeat:  # the first one warms up
                    candidate.seconds.clear()
    return [candidate and (candidate.seconds, candidate.sizes()) for candidate in candidates]


def case(processes, num_rows, num_classes, size):
    """Measurements of each variant, summed over its ranks or of rank 0, beside the model."""
    answers = processes.run(measure, 2, num_rows, num_classes, size, timeout=300)
    found = []
    for (ranks, sample_rate), *of_ranks in zip(VARIANTS, *answers, strict=True):
        seconds = [answer[0] for answer in of_ranks if answer]
        measured = {
            "CPU seconds, all ranks": statistics.median(map(sum, zip(*seconds, strict=True))),
            **of_ranks[0][1],
        }
        row = {"ranks": ranks, "sample rate": sample_rate, "measured": measured}
        if ranks:
            modelled = held(num_rows, num_classes, size, ranks, sample_rate, "SGD, momentum")
            row["modelled"] = modelled | {"exchanged": exchanged(num_rows, size, ranks)}
        found.append(row)
    return {"N, C, d": [num_rows, num_classes, size], "variants": found}


def main():
    from benchmarks.candidates import machine
    from tests.processes import Processes

    processes = Processes(2)
    try:
        cases = [case(processes, *sizes) for sizes in CASES]
    finally:
        processes.close()
    about = machine() | {"threads": 1, "python": platform.python_version(), "rounds": ROUNDS}
    RESULTS.write_text(json.dumps({"machine": about, "cases": cases}, indent=1) + "\n")
    print(
        tables(cases), capacity(FITS, (8, 64), SHOWN), capacity(PUBLISHED, (8,), SHOWN), sep="\n\n"
    )


def tables(cases):
    """Markdown: time; memory and bytes, measured and modelled."""
    times = ["| N, C, d | whole, CPU s | 1 rank | 2 ranks | 1 rank, 0.1 | 2 ranks, 0.1 |"]
    times.append("|---" * 6 + "|")
    sizes = [
        "| N, C, d | ranks | rate | held, MB: measured | modelled | error "
        "| exchanged, bytes: counted | modelled |",
        "|---" * 8 + "|",
    ]
    for found in cases:
        name = ", ".join(f"{number:,}" for number in found["N, C, d"])
        whole, *others = (row["measured"]["CPU seconds, all ranks"] for row in found["variants"])
        ratios = " | ".join(f"{seconds / whole:.2f}" for seconds in others)
        times.append(f"| {name} | {whole:.3f} | {ratios} |")
        for row in found["variants"][1:]:
            measured, modelled = most(row["measured"]), most(row["modelled"])
            counts = [sum(row[kind]["exchanged"].values()) for kind in ("measured", "modelled")]
            sizes.append(
                f"| {name} | {row['ranks']} | {row['sample rate']} | {measured / 1e6:.1f} "
                f"| {modelled / 1e6:.1f} | {modelled / measured - 1:+.1%} "
                f"| {counts[0]:,} | {counts[1]:,} |"
            )
    return "\n".join([*times, "", *sizes])


def capacity(classes, ranks, shown):
    """Markdown: GB that a rank holds, modelled; d = 512, 128 rows a rank, bfloat16 on a GPU."""
    names = " | ".join(f"{optimizer}, {rate}" for optimizer, rate in shown)
    lines = [f"| C | ranks | {names} |", "|---" * (2 + len(shown)) + "|"]
    for num_classes, num_ranks in itertools.product(classes, ranks):
        sizes = num_ranks * 128, num_classes, 512, num_ranks
        on_gpu = {"product_dtype": torch.bfloat16, "device": "cuda"}
        cells = (most(held(*sizes, rate, optimizer, **on_gpu)) for optimizer, rate in shown)
        text = " | ".join(f"{cell / 1e9:.1f}" for cell in cells)
        lines.append(f"| {num_classes:,} | {num_ranks} | {text} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

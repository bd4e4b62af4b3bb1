"""Train a network on more identities than one process should hold: they share the class centres.

    torchrun --nproc-per-node 2 benchmarks/sharded.py
    torchrun --nproc-per-node 2 benchmarks/sharded.py --sample-rate 0.1 --save checkpoints

The network is under DistributedDataParallel; the images are SYNTHETIC: the traits of an identity,
mixed with noise that is louder. On the CPU (gloo) it takes a minute or two; where CUDA is, it runs
there (NCCL).
"""

import argparse
import os
import platform
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_costs import Counted, bytes_of, exchanged, sent
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from angular_losses import ArcFaceLoss, parameter_groups
from angular_losses.distributed import load, save, shard, shard_optimizer

PIXELS, TRAITS, HELD_OUT = 128, 32, 1000


class Training(nn.Module):
    """What a checkpoint holds, beside the optimiser."""

    def __init__(self, backbone, loss):
        super().__init__()
        self.backbone, self.loss = backbone, loss
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, images, labels):
        return self.loss(self.backbone(images), labels)


class Images:
    """SYNTHETIC images (N, 128). The traits of an identity are a function of its number."""

    def __init__(self, device):
        generator = torch.Generator().manual_seed(0)  # the same world on every rank
        frequencies = 1000 * torch.rand(TRAITS, generator=generator, dtype=torch.float64)
        mixing, _ = torch.linalg.qr(torch.randn(PIXELS, PIXELS, generator=generator))
        self.frequencies, self.mixing = frequencies.to(device), mixing.to(device)

    def of(self, identities, generator):
        noise = torch.randn(len(identities), PIXELS, generator=generator, device=identities.device)
        images = 0.6 * noise
        images[:, :TRAITS] *= 0.1
        images[:, :TRAITS] += (identities[:, None] * self.frequencies).sin()
        return images @ self.mixing


def train(options, device):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,))
    torch.manual_seed(options.seed)
    backbone = nn.Sequential(nn.Linear(PIXELS, 256), nn.ReLU(), nn.Linear(256, options.size))
    loss = shard(
        ArcFaceLoss(options.classes, options.size, device="meta"),  # each rank draws its own part
        mesh,
        backbone="ddp",
        sample_rate=options.sample_rate,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    training = Training(DistributedDataParallel(backbone.to(device)), loss)
    optimizer = torch.optim.SGD(parameter_groups(backbone, loss, lr=0.1), momentum=0.9)
    shard_optimizer(optimizer, loss)
    if options.save and (options.save / "current").exists():
        load(options.save, training, optimizer)
        tell(f"goes on after step {training.step} of {options.save}")

    images, generator = Images(device), torch.Generator(device)
    first, started = int(training.step), time.perf_counter()
    for step in range(first, options.steps):
        generator.manual_seed(hash((options.seed, step, rank)))
        labels = some_identities(options, generator)
        value = training(images.of(labels, generator), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        training.step += 1
        if rank == 0 and (step % 20 == 0 or step + 1 == options.steps):
            seen = (step + 1 - first) * options.batch_size * ranks
            print(
                f"step {step:4}  loss {value.item():5.1f}  "
                f"{seen / (time.perf_counter() - started):6.0f} samples/s  "
                f"held-out identities found {retrieval(backbone, images, options.classes):6.1%}",
                flush=True,
            )
    seconds, steps = time.perf_counter() - started, options.steps - first
    if options.save:
        save(options.save, training, optimizer)
        tell(f"saved in {options.save}; with more --steps it goes on from there")
    optimizer.zero_grad()
    labels = some_identities(options, generator)
    with Counted() as counted:
        loss(backbone(images.of(labels, generator)), labels).backward()
    tell(
        f"\nSYNTHETIC images; {options.classes:,} classes, {ranks} ranks of "
        f"{options.batch_size} rows, {steps * options.batch_size * ranks / seconds:.0f} samples/s"
    )
    report(options, loss.weight, optimizer.state[loss.weight], counted.bytes)


def some_identities(options, generator):
    """Labels (N,); a few identities have many images, as in any collection."""
    chances = torch.rand(options.batch_size, generator=generator, device=generator.device)
    return (options.classes * chances**8).long()


@torch.no_grad()
def retrieval(backbone, images, classes):
    """How many of 1000 identities not trained on are nearest to another image of themselves."""
    device = images.mixing.device
    identities = classes + torch.arange(HELD_OUT, device=device)
    generator = torch.Generator(device).manual_seed(1)
    first, second = (backbone(images.of(identities, generator)) for _ in range(2))
    nearest = (F.normalize(first) @ F.normalize(second).T).argmax(1)
    return (nearest == identities - classes).float().mean().item()


def report(options, weight, state, tensors):
    """What each rank held and sent, beside what the model says of it."""
    ranks, device = dist.get_world_size(), weight.device
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in kB, but on macOS
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    kept = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
    own = [weight.nbytes, bytes_of(weight.grad), kept, peak]
    of_ranks = [torch.empty(len(own), device=device) for _ in range(ranks)]
    dist.all_gather(of_ranks, torch.tensor(own, device=device, dtype=torch.float32))

    for rank, sizes in enumerate(of_ranks):
        names = "weight", "gradient", "momentum", "peak of the process"
        megabytes = (f"{name} {size / 1e6:.1f}" for name, size in zip(names, sizes, strict=True))
        tell(f"rank {rank}, MB: {', '.join(megabytes)}")
    modelled = exchanged(ranks * options.batch_size, options.size, ranks)
    for name, size in tensors.items():
        tell(f"{name}: {size:,} bytes counted, {modelled[name]:,} modelled")
    tell(f"a rank sends {sum(sent(tensors, ranks).values()):,} bytes a step, round a ring")
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    tell(
        f"{where or platform.machine()}, {dist.get_backend()}, {torch.get_num_threads()} threads a "
        f"rank, torch {torch.__version__}, Python {platform.python_version()}"
    )


def tell(text):
    if dist.get_rank() == 0:
        print(text, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=64, help="of an embedding")
    parser.add_argument("--batch-size", type=int, default=128, help="of a rank")
    parser.add_argument("--steps", type=int, default=201, help="in all")
    parser.add_argument("--sample-rate", type=float, default=1.0)
    parser.add_argument("--save", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(f"start it with: torchrun --nproc-per-node 2 {sys.argv[0]}")
    device = torch.device(options.device)
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    try:
        train(options, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

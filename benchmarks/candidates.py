"""The implementations measured: one training step (forward and backward) of each.

Every builder takes the same embeddings (N, d), class centres (C, d), labels (N,) and whether the
products are in bfloat16, and returns the step as a function without arguments.
"""

import functools
import importlib
import math
import os
import time

import torch
from torch.nn import functional as F

import angular_losses as al

SCALE = 64.0
OURS = {
    "ArcFace": functools.partial(al.ArcFaceLoss, margin=0.5, scale=SCALE),
    "SphereFace": functools.partial(al.SphereFaceLoss, margin=4, scale=SCALE),
    "CosFace": functools.partial(al.CosFaceLoss, margin=0.35, scale=SCALE),
}
PML = {
    "ArcFace": {"margin": math.degrees(0.5), "scale": SCALE},
    "SphereFace": {"margin": 4, "scale": SCALE},
    "CosFace": {"margin": 0.35, "scale": SCALE},
}
# With these the memory of one step is used again by the next, as CUDA's allocator does it. By
# default each step gets pages that the system has to clear first, which costs all candidates time
# and depends on the machine more than on them.
ALLOCATOR = {"GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**40}"}


def products(embeddings, weight, labels, bfloat16):
    """The floor: the three matrix products of a step, nothing else, into memory kept for them."""
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    x, w = embeddings.detach().to(dtype), weight.detach().to(dtype)
    logits, dx, dw = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    def step():
        torch.mm(x, w.T, out=logits)
        torch.mm(logits, w, out=dx)
        torch.mm(logits.T, x, out=dw)

    return step


def with_backward(loss_of):
    """A builder from a function of the tensors that returns the loss."""

    @functools.wraps(loss_of)
    def build(embeddings, weight, labels, bfloat16):
        embeddings = embeddings.detach().requires_grad_()
        weight = weight.detach().requires_grad_()

        def step():
            with torch.autocast(weight.device.type, torch.bfloat16, bfloat16):
                loss = loss_of(embeddings, weight, labels)
            loss.backward()
            embeddings.grad = weight.grad = None

        return step

    return build


@with_backward
def naive(embeddings, weight, labels):
    logits = F.linear(F.normalize(embeddings), F.normalize(weight)) * SCALE
    return F.cross_entropy(logits, labels)


@with_backward
def linear_cross_entropy(embeddings, weight, labels):
    # Its chunks are not known to autocast.
    dtype = torch.bfloat16 if torch.is_autocast_enabled(weight.device.type) else torch.float32
    return F.linear_cross_entropy(
        (F.normalize(embeddings) * SCALE).to(dtype),
        F.normalize(weight).to(dtype),
        labels,
        options=torch.nn.LinearCrossEntropyOptions(),
    )


def of_module(make, parameter, wrapped=lambda loss: loss):
    """A builder from a function of C and d that makes a loss module, and its parameter's name."""

    def build(embeddings, weight, labels, bfloat16):
        loss = make(*weight.shape)
        setattr(
            loss,
            parameter,
            torch.nn.Parameter(weight.T.contiguous() if parameter == "W" else weight),
        )
        embeddings = embeddings.detach().requires_grad_()
        call = wrapped(loss)

        def step():
            with torch.autocast(weight.device.type, torch.bfloat16, bfloat16):
                value = call(embeddings, labels)
            value.backward()
            embeddings.grad = getattr(loss, parameter).grad = None

        return step

    return build


def of_pml(name):
    """A function of C and d that makes PML's loss; who does not measure PML does not need it."""

    def make(num_classes, size):
        losses = importlib.import_module("pytorch_metric_learning.losses")
        # With one class: it would draw all of them, for nothing.
        loss = getattr(losses, f"{name}Loss")(1, size, **PML[name])
        loss.num_classes = num_classes
        return loss

    return make


FLOOR = "three products"
NAIVE = "cross_entropy"
CANDIDATES = {
    FLOOR: products,
    NAIVE: naive,
    "linear_cross_entropy": linear_cross_entropy,
    **{f"PML {name}": of_module(of_pml(name), "W") for name in PML},
    **{
        f"{name}, {mode}": of_module(functools.partial(make, mode=mode, device="meta"), "weight")
        for name, make in OURS.items()
        for mode in ("auto", "stash", "recompute")
    },
}


def inputs(num_rows, num_classes, size, seed=0, device="cpu"):
    options = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    embeddings = torch.randn(num_rows, size, **options)
    weight = torch.randn(num_classes, size, **options)
    return embeddings, weight, torch.randint(num_classes, (num_rows,), **options)


def steps_of(names, num_rows, size, num_classes, bfloat16=False):
    """The step of each candidate, all on the same tensors."""
    tensors = inputs(num_rows, num_classes, size)
    return {name: CANDIDATES[name](*tensors, bfloat16) for name in names}


def process_seconds(step, least=0.02):
    """CPU seconds of the process for one step: as many steps as take ``least`` seconds or one."""
    steps, started = 0, time.process_time()
    while True:
        step()
        steps += 1
        spent = time.process_time() - started
        if spent >= least:
            return spent / steps


def machine():
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "allocator keeps its pages": all(
            os.environ.get(key) == ALLOCATOR[key] for key in ALLOCATOR
        ),
    }

"""Time of one training step of small batches, relative to a plain cross-entropy of the same run.

    python -m pytest benchmarks/test_small_batches.py --benchmark-enable -W default -s

prints the losses with a fixed margin, and pytorch-metric-learning's, on one thread, as
docs/benchmarks/speed.md has them.
"""

import statistics

import pytest
import torch
from pytorch_metric_learning import losses as pml
from torch.nn import functional as F

import angular_losses as al
from benchmarks.candidates import SCALE, machine, process_seconds

ROUNDS = 25
STEPS = {(64, 256, 3): 60, (256, 512, 1000): 5, (128, 192, 5000): 4}  # in a round
LOSSES = {
    "no margin": al.NormalizedSoftmaxLoss,
    "CosFace": al.CosFaceLoss,
    "ArcFace": al.ArcFaceLoss,
    "SphereFace": al.SphereFaceLoss,
    "SphereFace-R v1": al.SphereFaceRLoss,
    "SphereFace-R v2": lambda *sizes: al.SphereFaceRLoss(*sizes, kind="v2"),
    "combined": al.CombinedMarginLoss,
    "Li-ArcFace": al.LiArcFaceLoss,
    "X2-Softmax": al.X2SoftmaxLoss,
    "L-Softmax": al.LSoftmaxLoss,
    "Sub-center ArcFace": al.SubCenterArcFaceLoss,
    "P2SGrad": al.P2SGradLoss,
    "PML's ArcFace": pml.ArcFaceLoss,
    "PML's SphereFace": pml.SphereFaceLoss,
    "PML's L-Softmax": pml.LargeMarginSoftmaxLoss,
    "PML's Sub-center ArcFace": lambda num_classes, size: pml.SubCenterArcFaceLoss(
        num_classes=num_classes, embedding_size=size
    ),
    "PML's P2SGrad": lambda num_classes, size: pml.P2SGradLoss(size, num_classes),
}
PLAIN = "cross_entropy"


def steps_of(num_rows, size, num_classes):
    torch.manual_seed(0)
    embeddings = torch.randn(num_rows, size, requires_grad=True)
    labels = torch.randint(num_classes, (num_rows,))
    weight = torch.randn(num_classes, size, requires_grad=True)

    def plain(embeddings, labels):
        cosines = F.linear(F.normalize(embeddings), F.normalize(weight))
        return F.cross_entropy(cosines * SCALE, labels)

    def step_of(loss, parameters):
        def step():
            loss(embeddings, labels).backward()
            for variable in (embeddings, *parameters):
                variable.grad = None

        return step

    steps = {PLAIN: step_of(plain, [weight])}
    for name, build in LOSSES.items():
        loss = build(num_classes, size)
        steps[name] = step_of(loss, list(loss.parameters()))
    return steps


@pytest.mark.parametrize("sizes", STEPS, ids=str)
def test_small_batches(benchmark, sizes):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = steps_of(*sizes)
    seconds = {name: [] for name in steps}
    for step in steps.values():
        step()

    def one_round():
        for name, step in steps.items():
            seconds[name].append(process_seconds(lambda: [step() for _ in range(STEPS[sizes])]))  # noqa: B023

    benchmark.pedantic(one_round, rounds=ROUNDS)
    measured_on = machine()
    torch.set_num_threads(threads)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: median / medians[PLAIN] for name, median in medians.items()}
    benchmark.extra_info |= {"machine": measured_on, "N, d, C": sizes, "ratios": ratios}
    print(f"\n{measured_on}\n{sizes}")
    for name, ratio in ratios.items():
        print(f"{name:26} {ratio:.2f}")

"""Time of one training step of each loss, relative to its three matrix products.

    GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776 \
        python -m pytest benchmarks/test_family_speed.py --benchmark-enable -W default -s

prints the table of docs/benchmarks/speed.md. Rounds and ratios are those of test_speed.py.
"""

import statistics

import torch

import angular_losses as al
from benchmarks.candidates import FLOOR, machine, process_seconds, steps_of

SIZES, ROUNDS = (256, 512, 10_000), 9
COUNTS = torch.arange(1.0, SIZES[2] + 1)
LOSSES = {
    "ArcFace": al.ArcFaceLoss,
    "ArcFace, per-class margins": lambda *sizes, **options: al.ArcFaceLoss(
        *sizes, al.power_law_margins(COUNTS), **options
    ),
    "Sub-center ArcFace, three centres a class": al.SubCenterArcFaceLoss,
    "AdaFace": al.AdaFaceLoss,
    "AdaCos, dynamic": al.AdaCosLoss,
    "CurricularFace": al.CurricularFaceLoss,
    "MV-Softmax": al.MVSoftmaxLoss,
    "NPCFace": al.NPCFaceLoss,
    "Circle": al.CircleLoss,
    "Inter-top-k": al.InterTopKLoss,
    "Li-ArcFace": al.LiArcFaceLoss,
    "SphereFace2": al.SphereFace2Loss,
    "UniFace": al.UniFaceLoss,
    "P2SGrad": al.P2SGradLoss,
}


def step_of(build, mode):
    torch.manual_seed(0)
    num_rows, size, num_classes = SIZES
    loss = build(num_classes, size, mode=mode)
    embeddings = torch.randn(num_rows, size, requires_grad=True)
    labels = torch.randint(num_classes, (num_rows,))

    def step():
        loss(embeddings, labels).backward()
        embeddings.grad = None
        for parameter in loss.parameters():
            parameter.grad = None

    return step


def test_family(benchmark):
    steps = {FLOOR: steps_of([FLOOR], *SIZES, False)[FLOOR]}
    for name, build in LOSSES.items():
        for mode in ("stash", "recompute", "dense"):
            steps[f"{name}, {mode}"] = step_of(build, mode)
    seconds = {name: [] for name in steps}
    for step in steps.values():
        step()

    def one_round():
        for name, step in steps.items():
            seconds[name].append(process_seconds(step))

    benchmark.pedantic(one_round, rounds=ROUNDS)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: median / medians[FLOOR] for name, median in medians.items()}
    benchmark.extra_info |= {"machine": machine(), "N, d, C": SIZES, "ratios": ratios}
    print(f"\n{machine()}\n| loss | stash | recompute | dense |\n|---|---|---|---|")
    for name in LOSSES:
        cells = (f"{ratios[f'{name}, {mode}']:.2f}" for mode in ("stash", "recompute", "dense"))
        print(f"| {name} | {' | '.join(cells)} |")

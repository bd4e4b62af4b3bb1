"""The figures and numbers of troubleshooting.md: a good training and three that fail.

python docs/how_to/figures.py docs/images
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from angular_losses import ArcFaceLoss
from angular_losses.diagnostics import AngularMonitor, Snapshot
from angular_losses.diagnostics.plots import BLUE, GREEN, ORANGE

CLASSES, INPUTS, SIZE, BATCH = 100, 64, 8, 128
STEPS, WINDOW = 1000, 50

RUNS: dict[str, dict[str, Any]] = {
    "good": {},
    "fixed_centres": {"learn_centres": False},
    "large_learning_rate": {"rate": 2.0},
    "small_scale": {"scale": 2.0},
}
LINES = (
    ("nearest_median", "nearest other", ORANGE),
    ("target_median", "own class", BLUE),
    ("separation_min", "closest two centres", GREEN),
)
ROWS = (
    "loss",
    "target_median",
    "nearest_median",
    "separation_min",
    "separation_bound",
    "violation_rate",
    "error_rate",
)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Gaussian classes, all equally frequent."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, INPUTS, generator=generator)
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        yield means[labels] + torch.randn(BATCH, INPUTS, generator=generator), labels


def train(
    scale: float = 16.0, rate: float = 0.1, *, learn_centres: bool = True
) -> tuple[AngularMonitor, Snapshot, list[float]]:
    """A monitor with its history, the angles of the last window, and the loss of each step."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(INPUTS, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, SIZE)
    )
    loss = ArcFaceLoss(CLASSES, SIZE, margin=0.3, scale=scale)
    learnt = nn.ModuleList([network, loss] if learn_centres else [network])
    optimiser = torch.optim.SGD(learnt.parameters(), rate, momentum=0.9)
    monitor, losses = AngularMonitor(loss), []
    with monitor.attach():
        for step, (inputs, labels) in enumerate(batches(), 1):
            optimiser.zero_grad()
            value = loss(network(inputs), labels)
            value.backward()
            optimiser.step()
            losses.append(value.item())
            if step % WINDOW == 0:
                snapshot = monitor.snapshot()
                monitor.log(step, centres=True)
    return monitor, snapshot, losses


def figure(monitor: AngularMonitor, snapshot: Snapshot) -> Figure:
    """The angles over the training steps, and their histograms at the end."""
    drawing = Figure(figsize=(5.0, 2.4), layout="constrained")
    history, histogram = drawing.subplots(1, 2)
    steps = [numbers["step"] for numbers in monitor.history]
    for name, label, colour in LINES:
        angles = [math.degrees(numbers[name]) for numbers in monitor.history]
        history.plot(steps, angles, color=colour, label=label)
    history.set(xlabel="step", ylabel="angle (degrees)", ylim=(0, 90), yticks=range(0, 91, 30))
    history.legend(frameon=False, fontsize="small")
    for counts, colour in ((snapshot.nearest, ORANGE), (snapshot.target, BLUE)):
        shares = (100 * counts / counts.sum()).tolist()
        histogram.stairs(shares, range(len(counts) + 1), fill=True, color=colour, alpha=0.4)
    histogram.set(xlabel="angle at the end (degrees)", ylabel="rows (%)", xlim=(0, 90))
    histogram.set(xticks=range(0, 91, 30), ylim=(0, 25))
    for axes in (history, histogram):
        axes.spines[["top", "right"]].set_visible(False)
    return drawing


def main() -> None:
    """Train, plot, and print the table of the page."""
    torch.set_num_threads(1)  # for reproducible rounding
    numbers = {}
    for name, settings in RUNS.items():
        monitor, snapshot, losses = train(**settings)
        figure(monitor, snapshot).savefig(
            Path(sys.argv[1]) / f"troubleshooting_{name}.png", dpi=200
        )
        numbers[name] = {"loss": sum(losses[-WINDOW:]) / WINDOW, **monitor.history[-1]}
    print("| |", " | ".join(numbers), "|")
    for row in ROWS:
        print("|", row, "|", " | ".join(f"{run[row]:.3f}" for run in numbers.values()), "|")


if __name__ == "__main__":
    main()

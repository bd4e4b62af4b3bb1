"""The figures and numbers of docs/how_to/diagnostics.md: a good training and four others.

python -m benchmarks.diagnostics docs/images
"""

import sys
from pathlib import Path

import torch

import angular_losses as al
from angular_losses import diagnostics

CLASSES, INPUTS, SIZE, BATCH = 40, 64, 16, 128
# The frequency of each class relative to the one before.
RARITY = 0.93
DUPLICATES = (3, 17)  # in "duplicate_class" these two labels are one class


def batches(steps, *, duplicates=False, noise=0.5):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, INPUTS, generator=generator)
    if duplicates:
        means[DUPLICATES[1]] = means[DUPLICATES[0]]
    shares = RARITY ** torch.arange(CLASSES)
    for _ in range(steps):
        labels = torch.multinomial(shares, BATCH, replacement=True, generator=generator)
        noises = torch.randn(BATCH, INPUTS, generator=generator)
        yield means[labels] + noise * INPUTS**0.5 / 4 * noises, labels


def train(loss, *, steps=2000, window=100, **data):
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, 128), torch.nn.ReLU(), torch.nn.Linear(128, SIZE)
    )
    loss.reset_parameters()
    optimiser = torch.optim.Adam([*network.parameters(), *loss.parameters()], lr=1e-3)
    monitor = diagnostics.AngularMonitor(loss)
    with monitor.attach():
        for step, (inputs, labels) in enumerate(batches(steps, **data), 1):
            optimiser.zero_grad()
            loss(network(inputs), labels).backward()
            optimiser.step()
            if step % window == 0:
                snapshot = monitor.snapshot()
                monitor.log(step, centres=True)
    return monitor, snapshot


COLUMNS = ("target_median", "nearest_median", "violation_rate", "error_rate", "separation_min")


def arcface(margin=0.3, scale=16.0, **options):
    return al.ArcFaceLoss(CLASSES, SIZE, margin=margin, scale=scale, **options)


RUNS = {
    "good": (arcface(), {}),
    "small_scale": (arcface(scale=2.0), {}),
    "large_margin": (arcface(margin=1.4), {}),
    "warmed_up": (arcface(margin=1.4, schedule=al.MarginWarmup(1000)), {}),
    "duplicate_class": (arcface(), {"duplicates": True}),
}


def main():
    torch.set_num_threads(2)

    def save(figure, name):
        figure.savefig(Path(sys.argv[1]) / f"diagnostics_{name}.png", dpi=100)

    print("| run |", " | ".join(COLUMNS), "|")
    snapshots = {}
    for name, (loss, data) in RUNS.items():
        monitor, snapshots[name] = train(loss, **data)
        numbers = monitor.history[-1]
        print("|", name, "|", " | ".join(f"{numbers[column]:.3f}" for column in COLUMNS), "|")
        if name in ("good", "large_margin", "duplicate_class"):
            save(monitor.figures(snapshots[name])["angles"], f"angles_{name}")
        if name in ("good", "large_margin"):
            save(diagnostics.plot_history(monitor.history), f"history_{name}")
    good, duplicates = snapshots["good"], snapshots["duplicate_class"]
    save(diagnostics.plot_margin(lambda theta: al.arcface(theta, 0.3), good.target), "margin")
    save(
        diagnostics.plot_gradient_norms(duplicates.gradient_norm, duplicates.rows),
        "gradient_norms_duplicate_class",
    )
    separation = diagnostics.centre_separation(RUNS["duplicate_class"][0].weight)
    save(diagnostics.plot_separation(separation, margin=0.3), "separation_duplicate_class")
    collapsed = diagnostics.collapsed_classes(separation, angle=0.3)
    print("collapsed", collapsed.pairs.tolist(), collapsed.angles.rad2deg().tolist())
    print("violations", duplicates.violation_rate[list(DUPLICATES)].tolist())
    print(
        "gradients",
        duplicates.gradient_norm[list(DUPLICATES)].tolist(),
        duplicates.gradient_norm.median(),
    )


if __name__ == "__main__":
    main()

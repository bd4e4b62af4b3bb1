"""Where the bound on the separation of class centres limits a margin, for the docs.

    python -m benchmarks.margin_bound

ArcFace on 100 Gaussian classes, with margins as parts of the bound B. Prints the table of
docs/how_to/training.md. About two minutes on one core.
"""

import math
import statistics

import torch
from torch.nn.functional import normalize

import angular_losses as al
from angular_losses.diagnostics import batch_angles, centre_separation, separation_bound

CLASSES, NEW, INPUTS, SEEDS, STEPS = 100, 50, 64, 3, 600
SIZES = (3, 8, 32)
PARTS = (0.0, 1 / 3, 2 / 3, 1.0, 1.2)


def train(size, margin, seed):
    """Violations and errors on fresh rows, the separation of the centres, recall of new classes."""
    torch.manual_seed(seed)
    means = torch.randn(CLASSES + NEW, INPUTS)
    network = torch.nn.Sequential(
        torch.nn.Linear(INPUTS, 128), torch.nn.ReLU(), torch.nn.Linear(128, size)
    )
    schedule = al.MarginWarmup(STEPS // 2)
    loss = al.ArcFaceLoss(CLASSES, size, margin=margin, scale=32.0, schedule=schedule)
    optimiser = torch.optim.AdamW(al.parameter_groups(network, loss, lr=3e-3))

    def draw(labels):
        return means[labels] + 0.7 * torch.randn(len(labels), INPUTS)

    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (256,))
        optimiser.zero_grad()
        loss(network(draw(labels)), labels).backward()
        optimiser.step()
    with torch.no_grad():
        labels = torch.arange(CLASSES).repeat(20)
        gap = batch_angles(network(draw(labels)), loss.weight, labels).gap
        new = torch.arange(CLASSES, CLASSES + NEW).repeat(20)
        unit = normalize(network(draw(new)))
        nearest = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
        return (
            (gap < margin).float().mean().item(),
            (gap < 0).float().mean().item(),
            centre_separation(loss.weight).minimum.item(),
            (new[nearest] == new).float().mean().item(),
        )


def main():
    torch.set_num_threads(1)
    print("| d | bound B | margin | violate it | errors | closest centres | recall@1, new |")
    print("|---|---|---|---|---|---|---|")
    for size in SIZES:
        bound = separation_bound(CLASSES, size)
        for part in PARTS:
            found = [train(size, part * bound, seed) for seed in range(SEEDS)]
            violated, errors, closest, recall = map(statistics.mean, zip(*found, strict=True))
            margin = f"{part:.2g} B = {part * bound:.2f}"
            print(
                f"| {size} | {math.degrees(bound):.0f}° | {margin} | {violated:.0%} | {errors:.1%} "
                f"| {math.degrees(closest):.0f}° | {recall:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

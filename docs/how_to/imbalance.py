"""The table of imbalance.md: losses and weights on a synthetic long-tailed data set.

python docs/how_to/imbalance.py
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import angular_losses as al

CLASSES, INPUTS, SIZE, BATCH, STEPS, SEEDS = 20, 32, 16, 128, 600, 5
EPOCH = 50  # steps between calls of KappaFace's `update_margins`
TEST_ROWS, TAIL = 200, 7

COUNTS = (1000 * 0.75 ** torch.arange(CLASSES)).long().clamp(min=5)
WEIGHT = COUNTS.sum() / (CLASSES * COUNTS)
LOSSES: dict[str, Callable[[], al.MarginLoss]] = {
    "ArcFace, m 0.3": lambda: al.ArcFaceLoss(CLASSES, SIZE, 0.3, 16.0),
    "ArcFace, m 0.3, `class_weight`": lambda: al.ArcFaceLoss(
        CLASSES, SIZE, 0.3, 16.0, class_weight=WEIGHT
    ),
    "ArcFace, `power_law_margins`": lambda: al.ArcFaceLoss(
        CLASSES, SIZE, al.power_law_margins(COUNTS), 16.0
    ),
    "KappaFace, m 0.5": lambda: al.KappaFaceLoss(CLASSES, SIZE, COUNTS, 0.5, 16.0),
    "CosFace, m 0.35": lambda: al.CosFaceLoss(CLASSES, SIZE, 0.35, 16.0),
    "CosFace, `ldam_margins`": lambda: al.CosFaceLoss(CLASSES, SIZE, al.ldam_margins(COUNTS), 16.0),
    "CosFace, `ldam_margins` and `class_weight`": lambda: al.CosFaceLoss(
        CLASSES, SIZE, al.ldam_margins(COUNTS), 16.0, class_weight=WEIGHT
    ),
}


def recalls(make: Callable[[], al.MarginLoss], seed: int) -> Tensor:
    """The recall of each class (C,) on as many new rows of each."""
    torch.manual_seed(seed)
    means = torch.randn(CLASSES, INPUTS)

    def draw(labels: Tensor) -> Tensor:
        return means[labels] + 1.3 * torch.randn(len(labels), INPUTS)

    labels = torch.arange(CLASSES).repeat_interleave(COUNTS)
    inputs = draw(labels)
    new_labels = torch.arange(CLASSES).repeat_interleave(TEST_ROWS)
    new_inputs = draw(new_labels)
    network = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, SIZE))
    loss = make()
    optimiser = torch.optim.Adam([*network.parameters(), *loss.parameters()], lr=3e-3)
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(labels), (BATCH,))
        optimiser.zero_grad()
        loss(network(inputs[rows]), labels[rows]).backward()
        optimiser.step()
        if isinstance(loss, al.KappaFaceLoss) and step % EPOCH == 0:
            loss.update_margins()
    with torch.no_grad():
        is_right = loss.get_logits(network(new_inputs)).argmax(1) == new_labels
    return is_right.view(CLASSES, TEST_ROWS).float().mean(1)


def main() -> None:
    """Print the rows of the table: mean and standard deviation over the seeds, in per cent."""
    torch.set_num_threads(1)  # the order of the sums, and so the last digits
    for name, make in LOSSES.items():
        found = torch.stack([recalls(make, seed) for seed in range(SEEDS)])
        groups = (found, found[:, :TAIL], found[:, -TAIL:])
        seeds = [100 * group.mean(1) for group in groups]
        cells = " | ".join(f"{each.mean():.1f} ± {each.std():.1f}" for each in seeds)
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()

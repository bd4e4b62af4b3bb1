"""The README's picture: margins, and the gradient's error at small angles beside PML's.

python -m benchmarks.picture docs/images/margins.png
"""

import math
import sys

import matplotlib as mpl
import torch

import angular_losses as al
from benchmarks.accuracy import LOSSES, measure, ours, target_and_gradient, theirs
from tests import reference
from tests.strategies import pair_at

mpl.use("Agg")
from matplotlib import pyplot as plt

PAIRS, DIMENSIONS = 32, 512
ANGLES = [10.0**exponent for exponent in (-6, -5.5, -5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1)]
CURVES = [
    ("cosine, no margin", lambda theta: theta.cos(), "0.5", "-"),
    ("CosFace, m = 0.35", lambda theta: al.cosface(theta, 0.35), "C2", "-"),
    ("ArcFace, m = 0.5", lambda theta: al.arcface(theta, 0.5), "C0", "-"),
    ("   as cos(theta + m)", lambda theta: al.arcface(theta, 0.5, beyond="plain"), "C0", ":"),
    ("SphereFace, m = 1.7", lambda theta: al.sphereface(theta, 1.7), "C3", "-"),
    ("   as cos(m theta)", lambda theta: al.sphereface(theta, 1.7, beyond="plain"), "C3", ":"),
]


def draw_margins(axes):
    theta = torch.linspace(0, math.pi, 400, dtype=torch.float64)
    for name, margin, colour, style in CURVES:
        axes.plot(theta, margin(theta), style, color=colour, label=name)
    axes.set_xticks([0, math.pi / 2, math.pi], ["0", "π/2", "π"])
    axes.set(xlabel="target angle θ", ylabel="target logit before scaling", title="Margins")
    axes.legend(frameon=False, fontsize=8)


def draw_errors(axes):
    margin, expected, peer = LOSSES["ArcFace"]
    for name, target, colour in (
        ("angular_losses", ours(margin), "C0"),
        ("pytorch-metric-learning 2.9", theirs(peer), "C1"),
    ):
        medians = []
        for theta in ANGLES:
            errors, lost = errors_at(theta, target, expected)
            medians.append(float(torch.tensor(errors).median()) if errors else math.nan)
            if lost:
                axes.annotate(f"{lost:.0%}", (theta, 2.0), ha="center", fontsize=7, color=colour)
                axes.plot(theta, 1.3, "x", color=colour, markersize=4)
        axes.loglog(ANGLES, medians, "o-", markersize=3, color=colour, label=name)
    axes.set(
        xlabel="target angle θ",
        ylabel="relative error of the gradient (median)",
        title="ArcFace's gradient, float32 (x: NaN or zero)",
        ylim=(1e-9, 8),
    )
    axes.legend(frameon=False, fontsize=8, loc="center left")


def errors_at(theta, target, expected):
    """The errors of the gradients that are numbers and not zero, and the share of the others."""
    pairs = [pair_at(theta, DIMENSIONS, seed=seed) for seed in range(PAIRS)]
    embeddings, weight = map(torch.stack, zip(*pairs, strict=True))
    _, gradients = measure(target, embeddings, weight)
    usable = gradients.isfinite().all(1) & (gradients != 0).any(1)
    errors = [
        reference.relative_error(
            gradients[row], target_and_gradient(expected, *map(reference.exact, pairs[row]))[1]
        )
        for row in usable.nonzero()[:, 0].tolist()
    ]
    return errors, 1 - len(errors) / PAIRS


def main():
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    draw_margins(left)
    draw_errors(right)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(sys.argv[1], dpi=150)


if __name__ == "__main__":
    main()

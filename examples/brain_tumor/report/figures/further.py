"""Figures the paper lacks; each function writes a PNG and returns what it drew.

Accuracies, confidences and rates are shares from 0 to 1.
"""

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import auc, roc_curve

from ...data.slices import CLASS_NAMES
from .paper import (
    CLASS_STYLES,
    add_class_legend,
    add_legend,
    draw_score,
    make_rows,
    start_accuracy_axis,
)
from .run import COLOURS, draw_shares, make_panels, name_panels, saved, set_logarithmic

CORNER = 0.1  # side of the part of the ROC plane that is enlarged
LINE_STYLES = ("-", "--", "-.")
CROSS = {"marker": "x", "color": "black"}
BOUNDARY = {"color": "black", "linestyle": "--", "linewidth": 1.0}
MARGIN = {"color": COLOURS[3], "linestyle": "-.", "linewidth": 1.5}


class Angles(NamedTuple):
    """Where embeddings lie between the class centres, in radians."""

    target: np.ndarray  # (n,) angle to the centre of the own class
    other: np.ndarray  # (n,) angle to the nearest centre of another class
    labels: np.ndarray  # (n,) indices into `CLASS_NAMES`
    wrong: np.ndarray  # (n,) which are misclassified


@saved
def plot_roc(truth: np.ndarray, scores: np.ndarray) -> Figure:
    """Draw each class's ROC curve against the rest, and its upper left corner enlarged.

    Of labels (n,) and scores (n, 3), the higher the surer of that class.
    """
    figure, (whole, corner) = make_panels(2, 2, (4.2, 4.1))
    for label, name in enumerate(CLASS_NAMES):
        own = truth == label
        if own.all() or not own.any():
            whole.plot([], [], linestyle="", label=f"{name}: no curve, of one kind only")
            continue
        # Every threshold is kept: a curve thinned out is not what its area says.
        false, true, _ = roc_curve(own, scores[:, label], drop_intermediate=False)
        style = {"color": CLASS_STYLES[label]["color"], "linestyle": LINE_STYLES[label]}
        whole.plot(false, true, label=f"{name}, AUC {auc(false, true):.4f}", **style)
        corner.plot(false, true, **style)
    whole.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    whole.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    whole.legend(loc="lower right", fontsize=9, frameon=True)
    margin = 0.02 * CORNER
    corner.set(xlim=(-margin, CORNER), ylim=(1 - CORNER, 1 + margin))
    corner.set_title("upper left corner, enlarged")
    for axes in (whole, corner):
        axes.set(xlabel="false positive rate", ylabel="true positive rate", box_aspect=1)
    return figure


@saved
def plot_reliability(
    confidence: np.ndarray, accuracy: np.ndarray, count: np.ndarray, error: float
) -> Figure:
    """Draw accuracy against confidence, and how many slices are how sure; see `Reliability`."""
    figure, (upper, lower) = make_panels(2, 1, (5, 2.9))
    upper.get_gridspec().set_height_ratios([2.2, 1])
    x, y = confidence[count > 0], accuracy[count > 0]
    upper.plot([0, 1], [0, 1], **BOUNDARY, label="as sure as right")
    upper.vlines(x, np.minimum(x, y), np.maximum(x, y), color=COLOURS[1], linewidth=1.5)
    upper.plot(x, y, color=COLOURS[0], marker="o", label="slices")
    upper.set(xlim=(-0.02, 1.02), ylim=(-0.03, 1.03), ylabel="accuracy")
    upper.set_title(f"expected calibration error {100 * error:.2f} %")
    upper.legend(loc="upper left")
    edges = np.linspace(0, 1, len(count) + 1)
    lower.bar(edges[:-1], count, np.diff(edges), align="edge", color=COLOURS[5], edgecolor="black")
    # On a logarithmic scale, since nearly all slices are in the last bin.
    lower.set(xlim=(-0.02, 1.02), ylim=(0.5, 2 * max(count.max(), 1)))
    set_logarithmic(lower)
    lower.set(xlabel="confidence", ylabel="slices (log scale)")
    return figure


@saved
def plot_angles(
    test: Angles, train: Angles, boundary: Callable[[np.ndarray], np.ndarray]
) -> Figure:
    """Draw for each class the angle to its centre against that to the nearest other centre.

    Above the diagonal the own centre is the nearest. `boundary` is where the loss begins to call an
    embedding its own, for SphereFace at m times the target angle; beyond pi nothing is drawn.
    Training slices are faint, misclassified test slices crossed out.
    """
    figure, panels = name_panels(CLASS_NAMES, (3.3, 3.4))
    sides = [train, test]
    largest = max((angles.max() for side in sides for angles in side[:2] if angles.size), default=1)
    reach = min(1.05 * largest + 0.05, math.pi)
    line = np.linspace(0, reach, 500)
    for label, axes in enumerate(panels):
        for side in sides:
            own = side.labels == label
            faint = {"s": 8, "alpha": 0.2} if side is train else {"s": 20, "alpha": 0.8}
            style = CLASS_STYLES[label] | faint
            axes.scatter(side.target[own], side.other[own], linewidths=0, **style)
        wrong = (test.labels == label) & test.wrong
        axes.scatter(test.target[wrong], test.other[wrong], s=60, linewidths=1.2, **CROSS)
        axes.plot(line, line, **BOUNDARY)
        bound = np.asarray(boundary(line))
        axes.plot(line, np.where(bound <= math.pi, bound, np.nan), **MARGIN)
        axes.set(xlim=(0, reach), ylim=(0, reach), box_aspect=1)
    panels[0].set_ylabel("to nearest other centre (rad)")
    panels[1].set_xlabel("angle to own class centre (rad)")
    degrees = panels[-1].secondary_yaxis("right", functions=(np.degrees, np.radians))
    degrees.set_ylabel("degrees")
    marks = {"misclassified": CROSS, "equal angles": BOUNDARY, "with the margin": MARGIN}
    add_class_legend(figure, marks)
    return figure


@saved
def plot_slice_and_patient(
    losses: Mapping[str, Mapping[str, tuple[float, float, float]]],
) -> Figure:
    """Draw each loss's accuracies by slice and by patient, with their intervals, below each other.

    There are at most four ways to split and to count, which some losses may lack.
    """
    ways = list(dict.fromkeys(way for scores in losses.values() for way in scores))
    figure, axes = make_rows(list(losses), lines=len(ways))
    marks = zip(ways, COLOURS, ("o", "D", "s", "^"), strict=False)
    styles = {way: {"color": colour, "marker": marker} for way, colour, marker in marks}
    for row, scores in enumerate(losses.values()):
        for place, way in enumerate(ways):
            if way in scores:
                accuracy, *interval = scores[way]
                shift = (place - (len(ways) - 1) / 2) * 0.6 / len(ways)
                draw_score(axes, row + shift, accuracy, interval, styles[way])
        if row:
            axes.axhline(row - 0.5, color="0.8", linewidth=0.8)
    axes.grid(visible=False, axis="y")
    start_accuracy_axis(axes)
    add_legend(figure, styles)
    return figure


@saved
def plot_budget(runs: Mapping[float, Sequence[float]], budget: float, paper: float) -> Figure:
    """Draw the accuracies of seeds against the epochs of training, `budget` of which are usual."""
    figure, (axes,) = make_panels(1, 1, (6.5, 4.6))
    lengths = sorted(runs)
    means = [100 * float(np.mean(runs[length])) for length in lengths]
    x = [length for length in lengths for _ in runs[length]]
    y = [100 * accuracy for length in lengths for accuracy in runs[length]]
    axes.axhline(100 * paper, **BOUNDARY, label=f"the paper, {100 * paper:.2f} %")
    axes.plot(lengths, means, color=COLOURS[0], label="mean of the seeds")
    dots = {"markersize": 5, "markerfacecolor": "white", "color": COLOURS[0]}
    axes.plot(x, y, linestyle="", marker="o", **dots, label="one seed")
    star = {"marker": "*", "markersize": 15, "color": COLOURS[4], "markeredgecolor": "black"}
    mean = means[lengths.index(budget)]
    label = f"this budget: {budget:,} epochs, {mean:.2f} %"
    axes.plot(budget, mean, linestyle="", **star, label=label)
    axes.set_xlim(0, 1.05 * lengths[-1])
    axes.set_xlabel("epochs")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    start_accuracy_axis(axes, "y")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@saved
def plot_errors(confusions: Mapping[str, np.ndarray]) -> Figure:
    """Draw which errors there are, from counts (3, 3): how many of each kind, and their share."""
    kinds = [" → ".join(pair) for pair in itertools.permutations(CLASS_NAMES, 2)]
    beside = ~np.eye(len(CLASS_NAMES), dtype=bool)  # the diagonal, in the order of the kinds
    counts = np.stack([matrix[beside] for matrix in confusions.values()], axis=1)
    totals = counts.sum(0)
    shares = counts / np.maximum(totals, 1)
    columns = [
        f"{textwrap.fill(name, 20)}\n{total} wrong of {np.sum(matrix)}"
        for (name, matrix), total in zip(confusions.items(), totals, strict=True)
    ]
    lines = max(name.count("\n") + 1 for name in columns)
    size = (2.4 + 1.4 * len(columns), 3.6 + 0.15 * lines)
    figure, (axes,) = make_panels(1, 1, size, framed=True)

    def describe(cell: tuple[int, ...]) -> str:
        return f"{counts[cell]}  ({100 * shares[cell]:.0f} %)" if counts[cell] else "0"

    draw_shares(axes, shares, describe, aspect="auto")
    axes.spines[:].set_visible(False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xticks(range(len(columns)), columns, fontsize=9)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
    axes.set_xlabel("errors of each kind\n(share of all errors)", fontsize=9)
    return figure

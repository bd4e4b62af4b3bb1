"""The figures of a run, one function each; all take a title, which says SYNTHETIC for phantoms."""

import itertools
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from .files import replacing
from .slices import CLASS_NAMES

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SMOOTHING = 10  # steps; a single batch says little


def plot_loss(path: Path, epochs: list[dict[str, Any]], title: str) -> None:
    """Draw loss and training accuracy against the epoch.

    Args:
        path: The PNG file to write.
        epochs: The rows of a run's log.
        title: Stands above the figure.
    """
    figure, (loss, accuracy) = make_panels(title)
    x = [row["epoch"] for row in epochs]
    # One epoch alone has no line to draw, only a point.
    style = {"color": COLOURS[0], "marker": "o" if len(x) == 1 else ""}
    loss.plot(x, [row["loss"] for row in epochs], **style)
    loss.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    accuracy.plot(x, [100 * value for value in _column(epochs, "accuracy")], **style)
    accuracy.set(xlabel="epoch", ylabel="training accuracy (%)", ylim=(None, 101))
    save_figure(figure, path)


def plot_confusion(path: Path, confusion: list[list[int]], title: str) -> None:
    """Draw a confusion matrix: counts as text, the share of each true class as shade.

    Args:
        path: The PNG file to write.
        confusion: Counts, rows are the truth.
        title: Stands above the figure.
    """
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    picture = draw_confusion(axes, confusion)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
    figure.suptitle(title, fontsize=11)
    save_figure(figure, path)


def _column(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Return a log's column; what a loss without class centres cannot know is NaN, a gap."""
    return [math.nan if row[name] is None else row[name] for row in rows]


def draw_confusion(axes: Axes, confusion: list[list[int]]) -> AxesImage:
    """Draw a confusion matrix into axes; return the picture that a colour bar explains."""
    counts = np.asarray(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(CLASS_NAMES))
    axes.set_xticks(ticks, CLASS_NAMES)
    axes.set_yticks(ticks, CLASS_NAMES, rotation=90, va="center")
    axes.set(xlabel="predicted", ylabel="truth")
    for (row, column), share in np.ndenumerate(shares):
        text = f"{counts[row, column]}\n{100 * share:.1f} %"
        colour = "white" if share > 0.5 else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour)
    return picture


def plot_early(path: Path, runs: dict[str, list[dict[str, Any]]], title: str) -> None:
    """Draw target angle and gradient norm over the first steps, one line per run.

    Args:
        path: The PNG file to write.
        runs: For each run's name the rows of its step log.
        title: Stands above the figure.
    """
    figure, (angles, norms) = make_panels(title)
    for (name, steps), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
        angle = _column(steps, "mean_target_angle")
        norm = _column(steps, "gradient_norm")
        _plot_smoothed(angles, angle, colour, name)
        _plot_smoothed(norms, norm, colour, name)
    angles.axhline(math.pi / 2, color="grey", linewidth=0.8, linestyle=":")  # a right angle
    angles.set(xlabel="step", ylabel="mean target angle (radians)", ylim=(0, None))
    norms.set(xlabel="step", ylabel="gradient norm of the network", yscale="log")
    if len(runs) > 1:
        norms.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def make_panels(
    title: str, count: int = 2, columns: int = 2, size: tuple[float, float] = (4.5, 3.6)
) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side, in rows of at most `columns`.

    Args:
        title: Stands above the figure, on as many lines as it takes.
        count: Number of panels.
        columns: Number of panels in a full row.
        size: Width and height of one panel in inches.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    width = max(columns * size[0], 4.0)  # a title needs some room
    figure = Figure(figsize=(width, rows * size[1]), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.remove()
    for axes in panels[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    letters = int(12 * width)  # of 11 points to a line
    figure.suptitle(textwrap.fill(title, letters), fontsize=11)
    return figure, panels[:count]


def _plot_smoothed(axes: Axes, values: list[float], colour: str, label: str) -> None:
    """Draw the values faintly and the running mean of the last steps over them."""
    x = np.arange(1, len(values) + 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    window = np.minimum(x, SMOOTHING)
    axes.plot(x, values, color=colour, alpha=0.25, linewidth=0.7)
    axes.plot(x, (sums[x] - sums[x - window]) / window, color=colour, label=label)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)

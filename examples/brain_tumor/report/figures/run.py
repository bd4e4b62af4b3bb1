"""The figures of a run, and what all figures share.

What is `saved` takes first the path of the PNG file to write and a title, which says SYNTHETIC for
phantoms.
"""

import functools
import itertools
import math
import textwrap
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogFormatter

from ...data.slices import CLASS_NAMES
from ...files import replacing

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    "text.parse_math": False,  # no `$` in the name of a file, class or run begins a formula
    "figure.titlesize": 11,
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
SMOOTHING = 10  # steps; a single batch says little
LARGEST_DRAWN = 1024  # pixels a side; more cost memory and are not seen


def saved(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Let what draws a figure take first the PNG file that it is written to, and its title."""

    @functools.wraps(draw)
    def plot(path: Path, title: str, *arguments: object, **options: object) -> Figure:
        with warnings.catch_warnings(), rc_context(STYLE), replacing(path) as temporary:
            warnings.filterwarnings("ignore", "Glyph")  # of a name in letters that the font lacks
            figure = draw(*arguments, **options)
            figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())))
            figure.savefig(temporary, format="png", dpi=150)
        return figure

    return plot


@saved
def plot_loss(epochs: list[dict[str, Any]]) -> Figure:
    """Draw loss and training accuracy against the epoch, from the rows of a run's log."""
    figure, (loss, accuracy) = make_panels()
    draw_epochs(loss, [row["loss"] for row in epochs])
    loss.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    draw_epochs(accuracy, [100 * value for value in _column(epochs, "accuracy")])
    accuracy.set(xlabel="epoch", ylabel="training accuracy (%)", ylim=(None, 101))
    return figure


def draw_epochs(axes: Axes, values: Sequence[float]) -> None:
    """Draw a value of each epoch; one epoch alone has no line to draw, only a point."""
    marker = "o" if len(values) == 1 else ""
    axes.plot(range(1, len(values) + 1), values, color=COLOURS[0], marker=marker)


def _column(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Return a log's column; what a loss without class centres cannot know is NaN, a gap."""
    return [math.nan if row[name] is None else row[name] for row in rows]


@saved
def plot_confusion(confusion: list[list[int]], classes: Sequence[str] = CLASS_NAMES) -> Figure:
    """Draw a confusion matrix, rows are the truth: counts as text, shares of each row as shade."""
    figure, (axes,) = make_panels(1, 1, (5, 4.6), framed=True)
    picture = draw_confusion(axes, confusion, classes)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the true class")
    return figure


def draw_confusion(
    axes: Axes, confusion: list[list[int]], classes: Sequence[str] = CLASS_NAMES
) -> AxesImage:
    """Draw a confusion matrix into axes; return the picture that a colour bar explains."""
    counts = np.asarray(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes)
    axes.set_yticks(ticks, classes, rotation=90, va="center")
    axes.set(xlabel="predicted", ylabel="truth")
    return draw_shares(axes, shares, lambda cell: f"{counts[cell]}\n{100 * shares[cell]:.1f} %")


def draw_shares(
    axes: Axes, shares: np.ndarray, text: Callable[[tuple[int, ...]], str], **options: str
) -> AxesImage:
    """Draw shares (rows, columns) as shades of blue, with the text of each cell on it."""
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, **options)
    for cell, share in np.ndenumerate(shares):
        ink = "white" if share > 0.72 else "black"
        axes.text(*cell[::-1], text(cell), ha="center", va="center", color=ink)
    return picture


@saved
def plot_early(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw target angle and gradient norm over the first steps, from the rows of each run's log."""
    figure, (angles, norms) = make_panels()
    for (name, steps), colour in zip(runs.items(), itertools.cycle(COLOURS), strict=False):
        _plot_smoothed(angles, _column(steps, "mean_target_angle"), colour, name)
        _plot_smoothed(norms, _column(steps, "gradient_norm"), colour, name)
    angles.axhline(math.pi / 2, color="grey", linewidth=0.8, linestyle=":")  # a right angle
    angles.set(xlabel="step", ylabel="mean target angle (radians)", ylim=(0, None))
    norms.set(xlabel="step", ylabel="gradient norm of the network")
    set_logarithmic(norms)
    if len(runs) > 1:
        norms.legend(fontsize=8)
    return figure


def _plot_smoothed(axes: Axes, values: list[float], colour: str, label: str) -> None:
    """Draw the values faintly and the running mean of the last steps over them."""
    x = np.arange(1, len(values) + 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    window = np.minimum(x, SMOOTHING)
    axes.plot(x, values, color=colour, alpha=0.25, linewidth=0.7)
    axes.plot(x, (sums[x] - sums[x - window]) / window, color=colour, label=label)


def make_panels(
    count: int = 2, columns: int = 2, size: tuple[float, float] = (4.5, 3.6), framed: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels of a size in inches, in rows of at most `columns`.

    What is `framed` has all its spines, and no grid.
    """
    rows = math.ceil(count / columns)
    columns = math.ceil(count / rows)  # four in rows of three would leave one alone
    width = max(columns * size[0], 4.0)  # for the title
    figure = Figure(figsize=(width, rows * size[1]), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.remove()
    for axes in [] if framed else panels[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
    return figure, panels[:count]


def name_panels(
    names: Collection[str], size: tuple[float, float], framed: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return the same with a panel below each of the names, three in a row."""
    figure, panels = make_panels(len(names), 3, size, framed)
    for name, axes in zip(names, panels, strict=True):
        axes.set_title(textwrap.fill(name, 34))
    return figure, panels


def set_logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic; matplotlib's own labels of it are formulas, see `STYLE`."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))


@saved
def plot_prediction(
    image: np.ndarray,
    heat: np.ndarray,
    mask: np.ndarray | None,
    probabilities: Mapping[str, float],
    neighbours: Sequence[tuple[np.ndarray, str]],
    notes: str,
    meaning: str,
) -> Figure:
    """Draw a slice, what its class is drawn from, and the training slices nearest to it.

    Args:
        image: (h, w) the slice.
        heat: (h, w) its Grad-CAM, at least 0.
        mask: (h, w) the tumour, outlined on the heat, if known.
        probabilities: Of each class.
        neighbours: Pictures (size, size) in [0, 1] with what stands above each, two lines at most.
        notes: Lines below it.
        meaning: What the probabilities are, in a few words.
    """
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[3, 2.3])
    slice_axes, heat_axes, bars = upper.subplots(1, 3)
    step = math.ceil(max(image.shape) / LARGEST_DRAWN)
    image, heat = image[::step, ::step], heat[::step, ::step]
    slice_axes.imshow(image, cmap="gray")
    slice_axes.set_title("the slice")
    heat_axes.imshow(image, cmap="gray")
    share = heat / max(heat.max(), np.finfo(float).tiny)
    heat_axes.imshow(share, cmap="inferno", vmin=0, vmax=1, alpha=0.7 * share)
    described = "Grad-CAM" if heat.any() else "Grad-CAM: empty"
    if heat.any() and np.ptp(heat[heat > 0]) <= 1e-9 * heat.max():
        described = "Grad-CAM: the same everywhere"
    if mask is not None and mask[::step, ::step].any():
        # Padded, so that an outline closes at the edge too.
        outline = np.pad(mask[::step, ::step], 1)
        rows, columns = (np.arange(length) - 1 for length in outline.shape)
        limits = heat_axes.axis()
        heat_axes.contour(columns, rows, outline, [0.5], colors=COLOURS[5], linewidths=1.2)
        heat_axes.axis(limits)
        described += "; tumour mask outlined"
    heat_axes.set_title(described)
    names, values = list(probabilities), list(probabilities.values())
    colours = ["0.7"] * len(values)
    colours[np.argmax(values)] = COLOURS[0]
    drawn = bars.barh(names, values, color=colours)
    bars.bar_label(drawn, [f"{100 * value:.1f} %" for value in values], padding=3)
    bars.set(xlim=(0, 1.3), xticks=[0, 0.5, 1], xlabel=meaning)
    bars.set_title("probability")
    bars.invert_yaxis()
    bars.spines[["top", "right"]].set_visible(False)
    beside = list(np.ravel(lower.subplots(1, len(neighbours))))
    for axes, (picture, caption) in zip(beside, neighbours, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axes.set_title(caption, fontsize=9)
    for axes in (slice_axes, heat_axes, *beside):
        axes.set(xticks=[], yticks=[])
    lower.supxlabel(notes, fontsize=9)
    return figure

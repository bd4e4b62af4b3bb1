"""The paper's figures 1 and 3 to 7; each function writes a PNG and returns what it drew.

Figure 2 is in pipeline.py, and what the paper does not show in further.py.
Accuracies are shares from 0 to 1 and are drawn in percent.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize

from ...data.slices import CLASS_NAMES, PLANES
from ...errors import UserError
from .run import (
    COLOURS,
    draw_confusion,
    draw_epochs,
    make_panels,
    name_panels,
    saved,
)

# The paper's blue, orange and green; the shapes tell the classes apart without colour.
CLASS_STYLES = tuple(
    {"color": COLOURS[colour], "marker": marker}
    for colour, marker in ((0, "o"), (4, "^"), (2, "s"))
)
RING = {"marker": "o", "s": 90, "facecolors": "none", "edgecolors": "black", "linewidths": 1.0}
RING_IN_LEGEND = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "color": "black"}
PERPLEXITY = 30.0


class Embedded(NamedTuple):
    """One panel of t-SNE: points (n, 2), labels (n,) and which (n,) are misclassified."""

    points: np.ndarray
    labels: np.ndarray
    wrong: np.ndarray


@dataclass(frozen=True)
class Score:
    """One row of figure 7."""

    label: str  # the method and how it was tested
    accuracy: float  # from 0 to 1
    interval: tuple[float, float] | None = None  # its ends, from 0 to 1, if known
    source: str = "ours"  # a key of `SOURCES`
    verified: bool = True  # whether the number was read in its own source; drawn hollow if not


SOURCES = {
    "ours": {"color": COLOURS[0], "marker": "o"},
    "the paper": {"color": COLOURS[1], "marker": "s"},
    "cited": {"color": COLOURS[2], "marker": "D"},
}


@saved
def plot_samples(slices: Mapping[tuple[str, str], np.ndarray]) -> Figure:
    """Draw figure 1: a slice (h, w) in [0, 1] for each class (rows) and plane (columns).

    What is missing becomes a dash.
    """
    cells = [(name, plane) for name in CLASS_NAMES for plane in PLANES]
    figure, panels = make_panels(len(cells), len(PLANES), (2.3, 2.35), framed=True)
    for (name, plane), axes in zip(cells, panels, strict=True):
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[], box_aspect=1)
        if (name, plane) in slices:
            axes.imshow(slices[name, plane], cmap="gray", vmin=0, vmax=1)
        else:
            axes.text(0.5, 0.5, "—", transform=axes.transAxes, ha="center", fontsize=14)
        if name == CLASS_NAMES[0]:
            axes.set_title(plane)
        if plane == PLANES[0]:
            axes.set_ylabel(name)
    return figure


@saved
def plot_losses(runs: Mapping[str, Sequence[float]]) -> Figure:
    """Draw figure 3: the training loss of every run against the epoch.

    The losses are not of one kind, so each run has a panel with a scale of its own, from zero: a
    common scale would only compare what cannot be compared.
    """
    figure, panels = name_panels(runs, (3.2, 2.5))
    for losses, axes in zip(runs.values(), panels, strict=True):
        draw_epochs(axes, losses)
        axes.set_ylim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.supxlabel("epoch", fontsize=10)
    label = "training loss" if len(runs) == 1 else "training loss (each on its own scale)"
    figure.supylabel(label, fontsize=10)
    return figure


@saved
def plot_confusions(confusions: Mapping[str, np.ndarray]) -> Figure:
    """Draw figure 4: confusion matrices (3, 3) side by side, rows are the truth."""
    figure, panels = name_panels(confusions, (3.2, 3.3), framed=True)
    for confusion, axes in zip(confusions.values(), panels, strict=True):
        picture = draw_confusion(axes, confusion)
        axes.tick_params(labelsize=9)
    figure.colorbar(picture, ax=panels, shrink=0.8, label="share of the true class")
    return figure


def compute_tsne(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """Lay embeddings out in the plane with scikit-learn's t-SNE.

    Settings: cosine distance, perplexity 30 (a third of the neighbours where there are fewer than
    91 points), started from the first two principal components of the normalised embeddings, all
    else scikit-learn's defaults. t-SNE keeps neighbours together; the distances between groups
    and their sizes are not to be read as angles.

    Returns:
        (n, 2) points of embeddings (n, d) of any length, without units.

    Raises:
        UserError: There are too few embeddings, or some are not finite.
    """
    if embeddings.ndim != 2 or min(embeddings.shape) < 2:
        raise UserError(f"embeddings: t-SNE needs (n, d), at least 2 x 2, not {embeddings.shape}")
    if not np.isfinite(embeddings).all():
        raise UserError("embeddings: t-SNE needs finite numbers, but some are NaN or infinite")
    perplexity = min(PERPLEXITY, (len(embeddings) - 1) / 3)
    method = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
    return method.fit_transform(normalize(embeddings).astype(np.float32))


@saved
def plot_tsne(panels: Mapping[str, Embedded]) -> Figure:
    """Draw figures 5 and 6: t-SNE of the embeddings, one panel per loss or margin.

    Points that are misclassified are ringed. Distances are not to be read as angles: see
    `compute_tsne` and `plot_angles`.
    """
    figure, all_axes = name_panels(panels, (3.2, 3.2), framed=True)
    for (points, labels, wrong), axes in zip(panels.values(), all_axes, strict=True):
        for label, style in enumerate(CLASS_STYLES):
            x, y = points[labels == label].T
            axes.scatter(x, y, s=16, linewidths=0, alpha=0.8, **style)
        axes.scatter(*points[wrong].T, **RING)
        axes.set(xticks=[], yticks=[], box_aspect=1)
    add_class_legend(figure, {"misclassified": RING_IN_LEGEND})
    return figure


def add_class_legend(figure: Figure, further: Mapping[str, Mapping[str, object]]) -> None:
    """Explain the classes' marks, and further ones, in a row under the figure."""
    columns = max(1, int(figure.get_figwidth() / 1.6))
    add_legend(figure, dict(zip(CLASS_NAMES, CLASS_STYLES, strict=True)) | dict(further), columns)


def add_legend(
    figure: Figure, entries: Mapping[str, Mapping[str, object]], columns: int = 2
) -> None:
    """Explain under the figure what is drawn with the properties of a `Line2D`, by label.

    Without a linestyle it is a mark.
    """
    handles = [
        Line2D([], [], **({"linestyle": "", "label": label} | dict(style)))
        for label, style in entries.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


@saved
def plot_scores(scores: Sequence[Score]) -> Figure:
    """Draw figure 7: accuracies, from top to bottom, as points: their axis starts above zero."""
    figure, axes = make_rows([score.label for score in scores])
    for row, score in enumerate(scores):
        draw_score(axes, row, score.accuracy, score.interval, SOURCES[score.source], score.verified)
        text = f"{100 * score.accuracy:.1f}"
        if score.interval is not None:
            low, high = score.interval
            text += f" ({100 * low:.1f} to {100 * high:.1f})"
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    start_accuracy_axis(axes)
    present = {score.source for score in scores}
    entries = {source: style for source, style in SOURCES.items() if source in present}
    if not all(score.verified for score in scores):
        hollow = {"color": "grey", "marker": "D", "markerfacecolor": "white"}
        entries["hollow: from memory"] = hollow
    add_legend(figure, entries)
    return figure


def make_rows(labels: Sequence[str], lines: int = 1) -> tuple[Figure, Axes]:
    """Return axes with one labelled row for each label, the first on top, of so many lines each."""
    wrapped = [textwrap.fill(label, 38) for label in labels]
    lines = max([lines, *(label.count("\n") + 1 for label in wrapped)])
    height = 1.7 + len(labels) * (0.18 + 0.15 * lines)
    figure, (axes,) = make_panels(1, 1, (7.5, height))
    axes.set_yticks(range(len(labels)), wrapped, fontsize=9)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def draw_score(
    axes: Axes,
    row: float,
    accuracy: float,
    interval: Sequence[float] | None,
    style: Mapping[str, str],
    filled: bool = True,
) -> None:
    """Draw an accuracy from 0 to 1 as a point in percent, with its interval if known."""
    if interval is not None:
        ends = 100 * np.array(interval)
        axes.plot(ends, [row, row], color=style["color"], linewidth=1.5, marker="|", zorder=2)
    face = style["color"] if filled else "white"
    axes.plot(100 * accuracy, row, linestyle="", markersize=7, markerfacecolor=face, **style)


def start_accuracy_axis(axes: Axes, axis: str = "x") -> None:
    """Let an axis in percent start at a multiple of five below all that is drawn, and say so."""
    lowest, highest = getattr(axes.dataLim, f"interval{axis}")
    start = max(5 * math.floor((lowest - 0.5) / 5), 0)
    end = max(highest, 100) + 0.02 * (100 - start)  # a point on the edge would be cut in half
    label = "accuracy (%)" if start == 0 else f"accuracy (%), from {start} on"
    axes.set(**{f"{axis}lim": (start, end), f"{axis}label": label})

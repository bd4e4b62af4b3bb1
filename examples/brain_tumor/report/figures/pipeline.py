"""Figure 2 of the paper, drawn anew: what happens to a slice in training and in testing."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from ...settings import Settings
from .run import COLOURS, saved

# All lengths in inches, from the upper left corner.
WIDTH, TITLE = 9.2, 0.5
EDGE = 0.25  # between the figure's edge and the boxes
BOX_WIDTH, BOX_HEIGHT = 1.26, 0.85
HEAD = 0.36  # of a band, above its boxes
BAND = HEAD + BOX_HEIGHT + 0.14
GRADIENT = 0.22  # what the way of the gradients adds to the first band
GAP = 0.12  # between bands
FONT_SIZE = 8.5


@saved
def plot_pipeline(settings: Settings, pretrained: bool) -> Figure:
    """Draw the training phase, the network and the testing phase with the numbers of a run.

    `pretrained` is whether the backbone started from ImageNet weights.
    """
    image_size, network, loss = settings.data.image_size, settings.network, settings.loss
    channels, embedding_size = int(1024 * network.width), network.embedding_size
    side = math.ceil(image_size / 32)  # the backbone halves it five times, rounding up
    picture = f"{image_size} x {image_size} x 3\nin [0, 1]"
    embedding = f"embedding\n{embedding_size} numbers\nof length 1"
    weights = "ImageNet weights" if pretrained else "random weights"
    training = (
        f"training slice\n{picture}",
        "augmentation\nrotation, zoom,\nflips, brightness",
        "network",
        embedding,
        f"SphereFace loss\nm = {loss.margin:g}, s = {loss.scale:g}\nangles to the\nclass centres",
    )
    network = (
        f"MobileNet v1\n{weights}\n{channels} x {side} x {side}",
        f"global average\npooling\n{channels}",
        f"dense {embedding_size}, ReLU\ndropout {network.dropout:g}",
        f"dense {embedding_size}\nlinear, He\ninitialised",
        "BatchNorm",
        "L2-normalise\nonto the sphere",
    )
    testing = (
        f"test slice\n{picture}",
        "network\nas trained",
        embedding,
        "k-NN, k = 1\namong the\ntraining slices'\nembeddings",
        "class\nmeningioma,\nglioma or\npituitary",
    )
    bands = (
        ("Training phase", training, COLOURS[0], BAND + GRADIENT),
        ("The network", network, COLOURS[4], BAND),
        ("Testing phase", testing, COLOURS[2], BAND),
    )
    height = TITLE + sum(band[-1] + GAP for band in bands)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    top = TITLE
    for name, steps, colour, band_height in bands:
        ground = (0.1, top), WIDTH - 0.2, band_height
        axes.add_patch(Rectangle(*ground, color=colour, alpha=0.1, linewidth=0))
        axes.text(EDGE, top + 0.18, name, va="center", fontsize=10, weight="bold")
        _draw_steps(axes, top + HEAD, steps, colour)
        top += band_height + GAP
    _draw_gradient(axes, TITLE + HEAD + BOX_HEIGHT, *_lefts(training)[2:])
    return figure


def _lefts(steps: Sequence[str]) -> list[float]:
    """Return the left edges of a band's boxes, spread over the figure's width."""
    return np.linspace(EDGE, WIDTH - EDGE - BOX_WIDTH, len(steps)).tolist()


def _draw_steps(axes: Axes, top: float, steps: Sequence[str], colour: str) -> None:
    """Draw one row of boxes with arrows between them."""
    middle, lefts = top + BOX_HEIGHT / 2, _lefts(steps)
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": "white"}
    for left, step in zip(lefts, steps, strict=True):
        box = FancyBboxPatch((left, top), BOX_WIDTH, BOX_HEIGHT, edgecolor=colour, **style)
        axes.add_patch(box)
        centre = left + BOX_WIDTH / 2
        axes.text(centre, middle, step, ha="center", va="center", fontsize=FONT_SIZE)
    for left, following in itertools.pairwise(lefts):
        _draw_arrow(axes, (left + BOX_WIDTH, middle), (following, middle))


def _draw_gradient(axes: Axes, bottom: float, *lefts: float) -> None:
    """Draw how the loss trains the network, from below the last of the boxes to the first."""
    end, middle, start = (left + BOX_WIDTH / 2 for left in lefts)
    level = bottom + 0.2
    axes.plot([start, start, end], [bottom, level, level], color="0.3", linestyle="--", lw=1)
    _draw_arrow(axes, (end, level), (end, bottom), color="0.3")
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    place = {"ha": "center", "va": "center", "fontsize": FONT_SIZE}
    axes.text(middle, level, "gradients", bbox=ground, **place)


def _draw_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = "black"
) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=color, linewidth=1.2, **style))

"""The curves of the margin explorer, asked of the losses themselves when the site is built.

Written beside the pages: for each a script that assigns one global (a page opened from a disk may
not fetch), and `_static/explorer.svg`, which stands where no script runs.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

import angular_losses as al

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from torch import Tensor

DEGREES = 180
# The angles of the curves, in radians: each degree from 0 to pi.
THETA = torch.arange(DEGREES + 1, dtype=torch.float64) * (math.pi / DEGREES)
# A value is 24 bits, four characters of base64, in units of this: from -83 to 83.
UNIT = 1e-5


@dataclass(frozen=True)
class Family:
    """A loss on the page, and what its slider sets."""

    label: str
    loss: type[al.MarginLoss]
    # What the slider sets: an argument of the loss, or (None) the length of the embedding.
    argument: str | None
    symbol: str
    # The slider's first and last value and its step, and where it stands at first.
    grid: tuple[float, float, float]
    start: float
    is_angle: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    # The embedding's length as a + b value, where that is what the slider sets.
    length: tuple[float, float] = (0.0, 1.0)

    def values(self) -> list[float]:
        """The values that the slider takes."""
        first, last, step = self.grid
        return [round(first + i * step, 6) for i in range(round((last - first) / step) + 1)]

    def build(self, value: float) -> tuple[al.MarginLoss, float]:
        """The loss, in float64 and with centres of length 1, and the length of its embeddings."""
        given = self.settings if self.argument is None else {self.argument: value, **self.settings}
        loss = self.loss(2, 2, dtype=torch.float64, **given).eval()
        with torch.no_grad():
            loss.weight.copy_(torch.eye(2))
        start, slope = self.length
        return loss, 1.0 if self.argument else start + slope * value


def arcface_past_pi(beyond: str) -> Family:
    """ArcFace with one of its continuations past theta + m = pi."""
    return Family(
        f"ArcFace, beyond “{beyond}”",
        al.ArcFaceLoss,
        *("margin", "m", (0.0, 1.5, 0.1), 0.5),
        is_angle=True,
        settings={"beyond": beyond},
    )


MULTIPLE = ("margin", "m", (1.0, 5.0, 0.125))
ANGLE = ("margin", "m", (0.0, 1.5, 0.05))
# In the order of the list on the page, which also gives each its colour and dashes.
FAMILIES = {
    "softmax": Family(
        "Normalised softmax", al.NormalizedSoftmaxLoss, None, "", (1.0, 1.0, 1.0), 1.0
    ),
    "sphereface": Family("SphereFace", al.SphereFaceLoss, *MULTIPLE, 4.0),
    "cosface": Family("CosFace", al.CosFaceLoss, "margin", "m", (0.0, 1.0, 0.025), 0.35),
    "arcface": Family("ArcFace", al.ArcFaceLoss, *ANGLE, 0.5, is_angle=True),
    "combined": Family(
        "Combined (m₁ = 1, m₃ = 0.2)",
        al.CombinedMarginLoss,
        *("m2", "m₂", (0.0, 1.5, 0.05), 0.3),
        is_angle=True,
    ),
    "liarcface": Family("Li-ArcFace", al.LiArcFaceLoss, *ANGLE, 0.45, is_angle=True),
    "spherefacer-v1": Family("SphereFace-R v1", al.SphereFaceRLoss, *MULTIPLE, 1.5),
    "spherefacer-v2": Family(
        "SphereFace-R v2", al.SphereFaceRLoss, *MULTIPLE, 1.5, settings={"kind": "v2"}
    ),
    "lsoftmax": Family("L-Softmax (|w| = 1)", al.LSoftmaxLoss, *MULTIPLE, 4.0),
    "circle": Family("Circle", al.CircleLoss, "margin", "m", (0.05, 0.95, 0.05), 0.25),
    "magface": Family("MagFace", al.MagFaceLoss, None, "length |x|", (10.0, 110.0, 5.0), 60.0),
    "adaface": Family(
        "AdaFace (m = 0.4)",
        al.AdaFaceLoss,
        *(None, "quality ẑ", (-1.0, 1.0, 0.1), 0.0),
        # The quality is h (length - 20) / 100.001 before a batch is seen.
        settings={"h": 10.0},
        length=(20.0, 10.0001),
    ),
    **{
        f"arcface-{beyond}": arcface_past_pi(beyond)
        for beyond in ("plain", "linear", "shifted", "clamped", "cosine", "easy")
    },
}
SHOWN_AT_FIRST = ("softmax", "sphereface", "cosface", "arcface")
# The losses of each page that has an explorer.
PAGES = {"explorer": tuple(FAMILIES), "index": SHOWN_AT_FIRST}


class Curves(NamedTuple):
    """What a loss makes of each angle of ``THETA``, before scaling; float64 (181,) each."""

    psi: Tensor  # of the angle to the target's centre
    slope: Tensor  # d psi / d theta, by autograd
    eta: Tensor  # of the angle to another class's centre


def curves(family: Family, value: float) -> Curves:
    """The curves of a loss whose slider stands at a value."""
    loss, length = family.build(value)
    labels = torch.zeros(len(THETA), dtype=torch.int64)
    embeddings = THETA.new_tensor([[length, 0.0]]).expand(len(THETA), 2)
    theta = THETA.clone().requires_grad_()
    psi = loss.margin_function(embeddings, labels)(theta)
    (slope,) = torch.autograd.grad(psi.sum(), theta)
    negatives, eta = loss.negatives_function(embeddings, labels), THETA.cos()
    if negatives is not None:
        eta = negatives(eta[None], psi.detach())[0]
    return Curves(psi.detach(), slope, eta)


def packed(curve: Tensor) -> str:
    """A curve in base64: of each value, in units of ``UNIT``, three bytes, the lowest first."""
    counts = np.rint(curve.numpy() / UNIT).astype("<i4")
    if np.abs(counts).max() >= 2**23:
        raise ValueError(f"curve: expected values within {2**23 * UNIT:g}, got {curve.abs().max()}")
    return base64.b64encode(counts.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()).decode()


def data(names: Iterable[str]) -> dict[str, Any]:
    """All that a page is told: its losses, and the curves that they refer to by number."""
    numbers: dict[str, int] = {}

    def numbered(found: Curves) -> Iterator[int]:
        return (numbers.setdefault(packed(curve), len(numbers)) for curve in found)

    losses = []
    for name in names:
        family = FAMILIES[name]
        values = family.values()
        psi, slope, eta = zip(*(numbered(curves(family, value)) for value in values), strict=True)
        losses.append(
            {
                "id": name,
                "label": family.label,
                "symbol": family.symbol,
                "isAngle": family.is_angle,
                "values": values,
                "start": values.index(family.start),
                "shown": name in SHOWN_AT_FIRST,
                "psi": psi,
                "slope": slope,
                "eta": eta,
            }
        )
    return {"unit": UNIT, "losses": losses, "curves": list(numbers)}


def script(names: Iterable[str]) -> str:
    """The data as a script that assigns one global."""
    return f"window.marginExplorerData = {json.dumps(data(names), separators=(',', ':'))};\n"


def figure() -> Figure:
    """What stands where no script runs: the losses shown at first, and the slopes of their psi."""
    drawn = Figure(figsize=(4.8, 5.6), layout="constrained")
    for axes, title, part in zip(
        drawn.subplots(2, 1), ("Target logit / s: ψ(θ)", "Its slope: dψ / dθ"), (0, 1), strict=True
    ):
        for name, dashes in zip(SHOWN_AT_FIRST, ("-", "--", "-.", ":"), strict=True):
            family = FAMILIES[name]
            label = f"{family.label}, m = {family.start:g}" if family.argument else family.label
            found = curves(family, family.start)[part]
            axes.plot(THETA.numpy(), found.numpy(), dashes, linewidth=1.6, label=label)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("θ (radians)")
        axes.set_xticks([0, math.pi / 2, math.pi], ["0", "π/2", "π"])
        axes.grid(visible=True, alpha=0.3)
    drawn.axes[0].legend(fontsize=8)
    return drawn


def write(app: Sphinx) -> None:
    """Write scripts and figure, before the pages, which name them by their contents."""
    if app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    for page, names in PAGES.items():
        (static / f"{page}_curves.js").write_text(script(names), encoding="utf-8")
    with mpl.rc_context({"svg.hashsalt": "explorer", "svg.fonttype": "none"}):
        figure().savefig(static / "explorer.svg", metadata={"Date": None})


def load(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Load scripts and style on the pages with an explorer, and on no other."""
    if page in PAGES:
        app.add_css_file("explorer.css")
        app.add_js_file(f"{page}_curves.js")
        app.add_js_file("explorer.js")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", write)
    app.connect("html-page-context", load)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

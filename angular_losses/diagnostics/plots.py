"""The plots of :mod:`angular_losses.diagnostics`, one function per figure, in degrees and radians.

Each returns a ``matplotlib.figure.Figure`` independent of pyplot's global state:
``figure.savefig("angles.png")``, or display it as the last expression of a notebook cell. Without
matplotlib they raise ImportError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import validation
from ..margins import MarginFunction
from .measures import CentreSeparation, histogram_quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers.
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#666666", "#000000"
# From degrees, and back: of numpy's arrays, which torch's users may lack.
RADIANS = (lambda degrees: degrees * (math.pi / 180), lambda radians: radians * (180 / math.pi))


def plot_angles(target: Tensor, nearest: Tensor, *, margin: float | None = None) -> Figure:
    """Histograms of the angles to the own class and to the nearest other class.

    Args:
        target: (bins,) histogram of the target angles (:func:`angle_histogram`).
        nearest: (bins,) histogram of the angles to the nearest other class.
        margin: The effective margin in radians, such as the mean of :func:`effective_margin`: a
            line marks the median target angle plus the margin.

    Raises:
        TypeError: If the counts are not tensors.
        ValueError: If their shapes differ or one is empty.

    Example:
        >>> from angular_losses.diagnostics import angle_histogram, batch_angles
        >>> angles = batch_angles(torch.randn(64, 8), torch.randn(10, 8), torch.arange(64) % 10)
        >>> figure = plot_angles(angle_histogram(angles.target), angle_histogram(angles.nearest))
    """
    _check_counts("target", target)
    _check_counts("nearest", nearest, len(target))
    figure, axes = _figure()
    for counts, name, colour in ((target, "own class", BLUE), (nearest, "nearest other", ORANGE)):
        median = math.degrees(histogram_quantile(counts, 0.5))
        _fill(axes, counts, colour, f"{name}, median {median:.1f}°")
        axes.axvline(median, color=colour, linewidth=1.2)
    if margin is not None:
        effective = math.degrees(validation.finite("margin", margin))
        boundary = math.degrees(histogram_quantile(target, 0.5)) + effective
        label = f"own class + margin, {boundary:.1f}°"
        axes.axvline(boundary, color=GREY, linestyle=":", label=label)
    axes.set(ylabel="share of rows (%)", ylim=(0, None), title="Angles to the class centres")
    _angle_axis(axes, "angle between embedding and centre")
    axes.legend(frameon=False)
    return figure


def plot_margin(margin: MarginFunction, target: Tensor | None = None) -> Figure:
    """The margin function and its slope over the target angle, compared with the cosine.

    Args:
        margin: A function of theta that returns the target logit before scaling.
        target: (bins,) histogram of target angles (:func:`angle_histogram`), shown in the
            background.

    Raises:
        TypeError: If the counts are not a tensor.
        ValueError: If the histogram is empty, or the margin does not keep theta's shape.

    Example:
        >>> from angular_losses import arcface
        >>> figure = plot_margin(lambda theta: arcface(theta, 0.5))
    """
    theta = torch.linspace(0, math.pi, 721, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        logit = margin(theta)
        if logit.shape != theta.shape:
            raise ValueError(
                f"margin: expected a function of theta alone, of shape {tuple(theta.shape)} here, "
                f"got {tuple(logit.shape)}"
            )
        (slope,) = torch.autograd.grad(logit.sum(), theta)
    theta = theta.detach()
    figure, (upper, lower) = _figure(rows=2)
    degrees = theta.rad2deg().tolist()
    for axes, plain, with_margin in (
        (upper, theta.cos(), logit.detach()),
        (lower, theta.sin(), -slope),
    ):
        axes.plot(degrees, plain.tolist(), "--", color=GREY, label="no margin")
        axes.plot(degrees, with_margin.tolist(), color=BLACK, label="margin")
        if target is not None:
            _check_counts("target", target)
            behind = axes.twinx()
            _fill(behind, target, BLUE, "")
            behind.set(yticks=[], ylim=(0, None))
            behind.spines[:].set_visible(False)
            axes.fill_between([], [], color=BLUE, alpha=0.3, label="target angles")
            axes.set_zorder(behind.get_zorder() + 1)
            axes.patch.set_visible(False)
    upper.set(ylabel="target logit before scaling", title="Margin function")
    upper.legend(frameon=False)
    lower.set_ylabel("negative slope")
    _angle_axis(lower, "target angle θ", radians_on=upper)
    return figure


def plot_separation(separation: CentreSeparation, *, margin: float | None = None) -> Figure:
    """The sorted angles from each class centre to the nearest other, with their bound.

    Args:
        separation: The separation of the centres (:func:`centre_separation`).
        margin: The effective margin in radians, a line: classes below cannot satisfy it.

    Raises:
        ValueError: If no centre has a direction.

    Example:
        >>> from angular_losses.diagnostics import centre_separation
        >>> figure = plot_separation(centre_separation(torch.randn(100, 16)))
    """
    nearest = separation.nearest[~separation.nearest.isnan()].sort().values.rad2deg().tolist()
    if not nearest:
        raise ValueError("separation: expected at least one centre with a direction, got none")
    figure, axes = _figure()
    positions = range(1, len(nearest) + 1)
    axes.plot(positions, nearest, _line(nearest), color=BLUE, label="classes")
    bound = math.degrees(separation.bound)
    axes.axhline(bound, color=GREEN, linestyle="--", label=f"bound on the closest, {bound:.1f}°")
    if margin is not None:
        effective = math.degrees(validation.finite("margin", margin))
        axes.axhline(effective, color=ORANGE, linestyle=":", label=f"margin, {effective:.1f}°")
    axes.set(
        xlabel="class, closest first",
        ylabel="angle to the nearest other centre (degrees)",
        title=f"Class centres: the closest two are {nearest[0]:.1f}° apart",
        ylim=(0, 1.08 * max(bound, nearest[-1])),
    )
    axes.secondary_yaxis("right", functions=RADIANS).set_ylabel("radians")
    axes.legend(frameon=False, loc="center right")
    return figure


def plot_gradient_norms(norms: Tensor, rows: Tensor | None = None) -> Figure:
    """The gradient norm of each class: sorted, or over the number of rows.

    Classes without a gradient are omitted; the title has their number.

    Args:
        norms: (C,) gradient norms (:func:`gradient_norm_per_class`), floating point.
        rows: (C,) number of rows of each class.

    Raises:
        TypeError: If the norms are not floating-point.
        ValueError: If shapes differ, or no norm is above 0 and finite.

    Example:
        >>> figure = plot_gradient_norms(torch.rand(100))
    """
    validation.floating("norms", norms, "C")
    drawn = norms.isfinite() & (norms > 0)
    if not drawn.any():
        raise ValueError("norms: expected at least one above 0 and finite, got none")
    figure, axes = _figure()
    if rows is None:
        lengths = norms[drawn].sort(descending=True).values.tolist()
        axes.plot(range(1, len(lengths) + 1), lengths, _line(lengths), color=BLUE)
        axes.set(xlabel="class, largest first")
    else:
        if rows.shape != norms.shape:
            raise ValueError(f"rows: expected shape {tuple(norms.shape)}, got {tuple(rows.shape)}")
        axes.plot(rows[drawn].tolist(), norms[drawn].tolist(), ".", color=BLUE, alpha=0.6)
        axes.set(xlabel="rows of the class", xlim=(0, None))
    without = int((~drawn).sum())
    title = "Gradient of the class centres" + (f" ({without} without one)" if without else "")
    axes.set(yscale="log", ylabel="gradient norm of the class's centre", title=title)
    return figure


def plot_history(history: Sequence[dict[str, float]]) -> Figure:
    """Angles, violations and errors over the steps of a training run.

    Args:
        history: ``AngularMonitor.history``: a dict for each logged step.

    Raises:
        ValueError: If the history is empty.

    Example:
        >>> numbers = {"target_median": 1.2, "nearest_median": 1.4, "margin_mean": 0.5}
        >>> rates = {"violation_rate": 0.9, "error_rate": 0.1}
        >>> figure = plot_history([{"step": 0, **numbers, **rates}])
    """
    if not history:
        raise ValueError("history: expected at least one logged step, got none")
    figure, (upper, lower) = _figure(rows=2)
    steps = [numbers["step"] for numbers in history]

    def degrees(name: str) -> list[float]:
        return [math.degrees(numbers[name]) for numbers in history]

    target, margin = degrees("target_median"), degrees("margin_mean")
    beyond = [angle + extra for angle, extra in zip(target, margin, strict=True)]
    upper.plot(steps, degrees("nearest_median"), _line(steps), color=ORANGE, label="nearest other")
    upper.plot(steps, beyond, ":", color=GREY, label="own class + margin")
    upper.plot(steps, target, _line(steps), color=BLUE, label="own class")
    upper.set(ylabel="median angle (degrees)", ylim=(0, None), title="Angles over the training")
    upper.secondary_yaxis("right", functions=RADIANS).set_ylabel("radians")
    upper.legend(frameon=False, ncols=3)
    for name, label, colour in (
        ("violation_rate", "with the margin", BLUE),
        ("error_rate", "without", GREEN),
    ):
        rates = [100 * numbers[name] for numbers in history]
        lower.plot(steps, rates, _line(steps), color=colour, label=label)
    lower.set(xlabel="step", ylabel="misclassified rows (%)", ylim=(-2, 102))
    lower.legend(frameon=False)
    return figure


def _check_counts(name: str, counts: object, bins: int | None = None) -> None:
    if not isinstance(counts, Tensor):
        raise TypeError(f"{name}: expected counts as angle_histogram gives them, got {counts!r}")
    if counts.dim() != 1 or (bins is not None and len(counts) != bins):
        shape = "bins" if bins is None else bins
        raise ValueError(f"{name}: expected shape ({shape},), got {tuple(counts.shape)}")
    if not counts.sum() > 0:
        raise ValueError(f"{name}: expected at least one angle, counted none")


def _figure(rows: int = 1) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install angular-losses[plots]") from error
    figure = Figure(figsize=(6.4, 3.8 if rows == 1 else 5.6), layout="constrained")
    axes = figure.subplots(rows, sharex=True)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _angle_axis(axes: Axes, label: str, radians_on: Axes | None = None) -> None:
    """Degrees on the lower axis, radians on the upper one (of the upper panel if there are two)."""
    axes.set(xlabel=f"{label} (degrees)", xlim=(0, 180), xticks=range(0, 181, 30))
    above = (radians_on or axes).secondary_xaxis("top", functions=RADIANS)
    above.set_xticks([k * math.pi / 6 for k in range(7)])
    above.set_xticklabels(["0", "π/6", "π/3", "π/2", "2π/3", "5π/6", "π"])
    above.set_xlabel("radians")


def _fill(axes: Axes, counts: Tensor, colour: str, label: str) -> None:
    edges = [180 * k / len(counts) for k in range(len(counts) + 1)]
    shares = (100 * counts / counts.sum()).tolist()
    axes.stairs(shares, edges, fill=True, color=colour, alpha=0.3, label=label or None)


def _line(points: Sequence[object]) -> str:
    """The line style, with markers for few points (a single point has no line)."""
    return ".-" if len(points) <= 50 else "-"

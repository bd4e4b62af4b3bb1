"""Angular measures of batches and class centres: pure functions, in radians.

Those of a batch neither store an (N, C) matrix nor synchronise with an accelerator.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import validation
from ..engine.chunks import replaced
from ..geometry import directions, target_angle, without_autocast, working_dtype
from ..margins import MarginFunction
from ..separation import separation_bound

# The numbers of classes and of cosines computed at a time.
CLASSES_AT_ONCE, COSINES_AT_ONCE = 8192, 2**22
ROWS_AT_ONCE = COSINES_AT_ONCE // CLASSES_AT_ONCE


class BatchAngles(NamedTuple):
    """The angles of a batch, returned by :func:`batch_angles`.

    Attributes:
        target: (N,) angle to the centre of the target class, radians.
        nearest: (N,) angle to the nearest centre of another class, radians.
        nearest_class: (N,) the class of that centre, int64.
    """

    target: Tensor
    nearest: Tensor
    nearest_class: Tensor

    @property
    def gap(self) -> Tensor:
        """``nearest - target`` (N,), positive where the row is classified correctly."""
        return self.nearest - self.target


class CentreSeparation(NamedTuple):
    """The separation of the class centres, returned by :func:`centre_separation`.

    Attributes:
        nearest: (C,) angle from each class to the nearest other, radians; NaN for a class whose
            centre has no direction (its length is zero, or not finite).
        nearest_class: (C,) that other class, int64.
        bound: An upper bound of the minimum (:func:`separation_bound`).
    """

    nearest: Tensor
    nearest_class: Tensor
    bound: float

    @property
    def minimum(self) -> Tensor:
        """The angle of the two closest classes, a scalar; inf if no class has a direction."""
        return self.nearest.nan_to_num(nan=torch.inf).amin()


class CollapsedClasses(NamedTuple):
    """Indistinguishable classes, returned by :func:`collapsed_classes`.

    Attributes:
        pairs: (P, 2) pairs of classes closer than the threshold, closest first, int64.
        angles: (P,) the angle between the two, radians.
        without_direction: (E,) classes whose centre is zero or not finite, int64.
    """

    pairs: Tensor
    angles: Tensor
    without_direction: Tensor


@torch.no_grad()
def batch_angles(
    embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int = 1
) -> BatchAngles:
    r"""The angles of each embedding to its own class and to the nearest other class.

    .. math:: \theta_i = \angle(x_i, w_{y_i}), \qquad
        \theta_i^{\mathrm{nearest}} = \min_{j \ne y_i} \angle(x_i, w_j)

    For a class with several centres the nearest one is used. One matrix product (N, d) x (d, C), in
    chunks of classes, finds the nearest class by its cosine in float32 (float64 for float64 input);
    the angle is then computed exactly (:func:`angular_losses.target_angle`). If two classes are
    equal within the rounding of the product, 1e-7 in cosine, either may be returned. A centre that
    is zero or not finite is never the nearest; a row with a NaN has NaN angles.

    Args:
        embeddings: (N, d), floating point.
        weight: (C, d) class centres, floating point, or (C * sub_centers, d), with the centres of a
            class in consecutive rows.
        labels: (N,) integers in [0, C).
        sub_centers: The number of centres per class.

    Returns:
        :class:`BatchAngles`, float64 (float32 on devices without it), without an autograd graph.

    Raises:
        TypeError: If a dtype is not floating-point (embeddings, weight) or integer (labels).
        ValueError: If shapes or devices do not fit, a label is outside [0, C), or C < 2.

    Example:
        >>> angles = batch_angles(torch.tensor([[1.0, 1.0]]), torch.eye(2), torch.tensor([0]))
        >>> angles.target, angles.nearest, angles.nearest_class
        (tensor([0.7854], dtype=torch.float64), tensor([0.7854], dtype=torch.float64), tensor([1]))
    """
    _check_weight(weight, sub_centers)
    target = target_angle(embeddings, weight, labels, sub_centers)
    other = _nearest_other_class(embeddings, weight, labels.long(), sub_centers)
    return BatchAngles(target, target_angle(embeddings, weight, other, sub_centers), other)


def effective_margin(margin: MarginFunction, theta: Tensor) -> Tensor:
    r"""The effective margin: the angle in radians that a margin adds to the target angle.

    .. math:: \varphi(\theta) - \theta, \qquad \text{where}\quad
        \cos\varphi(\theta) = \mathrm{margin}(\theta)

    A row at theta has the target logit of a row without margin at phi; past pi, phi is that of the
    unrolled cosine (:mod:`angular_losses.margins`). For ArcFace it is m at every angle; for CosFace
    and SphereFace it depends on the angle. A row satisfies the margin exactly
    where its gap (:attr:`BatchAngles.gap`) is larger.

    Args:
        margin: A function of theta that returns the target logit before scaling.
        theta: Target angles in radians, in [0, pi], as ``margin`` takes them.

    Returns:
        Radians, in the shape and dtype of ``margin(theta)``, without an autograd graph; accurate to
        1e-8 in float64. A logit above 1 is treated as phi = 0.

    Example:
        >>> from angular_losses import arcface, cosface
        >>> theta = torch.tensor([0.5, 1.5])
        >>> effective_margin(lambda theta: arcface(theta, 0.3), theta)
        tensor([0.3000, 0.3000])
        >>> effective_margin(lambda theta: cosface(theta, 0.3), theta)
        tensor([0.4550, 0.3021])
    """
    with torch.no_grad():
        logit = margin(theta).clamp(max=1)
        # psi(phi) = (-1)^k cos(phi) - 2k falls from 1 - 2k to -1 - 2k between k pi and (k + 1) pi.
        k = ((1 - logit) / 2).floor()
        return k * math.pi + torch.acos((logit + 2 * k).clamp(-1, 1)) - theta


def margin_violations(angles: BatchAngles, margin: MarginFunction) -> Tensor:
    r"""The rows whose target logit, margin included, does not exceed all other logits.

    .. math:: \mathrm{margin}(\theta_i) \le \cos\theta_i^{\mathrm{nearest}}

    These are the rows misclassified by the softmax with the margin; without a margin, those
    misclassified by the nearest centre. Where a loss reweights negatives, their plain cosines are
    used here.

    Args:
        angles: The angles of a batch (:func:`batch_angles`).
        margin: A function of theta (N,) that returns the target logits before scaling.

    Returns:
        (N,) bool; its mean is the violation rate. Rows with a NaN are violations.

    Example:
        >>> from angular_losses import arcface
        >>> angles = batch_angles(torch.tensor([[1.0, 0.5]]), torch.eye(2), torch.tensor([0]))
        >>> [margin_violations(angles, lambda theta: arcface(theta, m)).item() for m in (0.5, 0.7)]
        [False, True]
    """
    with torch.no_grad():
        return ~(margin(angles.target) > angles.nearest.cos())


@torch.no_grad()
def centre_separation(weight: Tensor, sub_centers: int = 1) -> CentreSeparation:
    """The angle from each class centre to the nearest other, and the bound of the smallest.

    One (C, d) x (d, C) product in blocks, without a (C, C) matrix; for C = 100,000 and d = 512 it
    takes 10^13 multiplications. For a class with several centres the nearest one is used; centres
    of one class are not compared with each other.

    Args:
        weight: (C, d) class centres, floating point, or (C * sub_centers, d).
        sub_centers: The number of centres per class.

    Raises:
        TypeError: If the weight is not floating-point.
        ValueError: If its shape does not fit, or C < 2.

    Example:
        >>> separation = centre_separation(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1]]))
        >>> separation.nearest
        tensor([1.5708, 1.4711, 1.4711], dtype=torch.float64)
        >>> f"{separation.minimum:.4f} of at most {separation.bound:.4f}"
        '1.4711 of at most 2.0944'
    """
    num_classes = _check_weight(weight, sub_centers)
    classes = torch.arange(weight.shape[0], device=weight.device) // sub_centers
    nearest, other = [], []
    blocks = (torch.split(whole, ROWS_AT_ONCE) for whole in (weight, classes))
    for centres, own in zip(*blocks, strict=True):
        found = _nearest_other_class(centres, weight, own, sub_centers)
        angle = target_angle(centres, weight, found, sub_centers)
        nearest.append(angle.masked_fill(~_has_direction(directions(centres)), torch.inf))
        other.append(found)
    of_class, which = torch.cat(nearest).view(num_classes, sub_centers).min(1)
    found = torch.cat(other).view(num_classes, sub_centers).gather(1, which[:, None])[:, 0]
    return CentreSeparation(
        of_class.masked_fill(of_class == torch.inf, torch.nan),
        found,
        separation_bound(num_classes, weight.shape[1]),
    )


def collapsed_classes(
    separation: CentreSeparation, angle: float = math.radians(5)
) -> CollapsedClasses:
    """The classes whose centres are closer than an angle, or have no direction.

    Each class is compared with its nearest other only, so a cluster of k classes is reported as at
    least k / 2 pairs, not as all its pairs. A natural threshold is the margin
    (:func:`effective_margin`): the gap of a row is at most the angle between its class and the
    nearest other, so no row of two classes closer than the margin can satisfy it. This synchronises
    with the accelerator.

    Args:
        separation: The separation of the centres (:func:`centre_separation`).
        angle: The threshold in radians, in (0, pi).

    Raises:
        TypeError: If the angle is not a number.
        ValueError: If it is outside (0, pi), such as one in degrees.

    Example:
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.01, 1.0], [0.0, 0.0]])
        >>> collapsed = collapsed_classes(centre_separation(weight))
        >>> collapsed.pairs.tolist(), collapsed.without_direction.tolist()
        ([[1, 2]], [3])
    """
    validation.positive("angle", angle)
    validation.angular_margin("angle", angle)
    nearest, other = separation.nearest, separation.nearest_class
    close = (nearest < angle).nonzero()[:, 0]
    first, second = torch.minimum(close, other[close]), torch.maximum(close, other[close])
    numbers, inverse = torch.unique(first * len(other) + second, return_inverse=True)
    pairs = torch.stack([numbers // len(other), numbers % len(other)], 1)
    angles = nearest.new_full(pairs.shape[:1], torch.inf)
    angles = angles.scatter_reduce(0, inverse, nearest[close], "amin")
    order = angles.argsort(stable=True)
    return CollapsedClasses(pairs[order], angles[order], nearest.isnan().nonzero()[:, 0])


def gradient_norm_per_class(gradient: Tensor, sub_centers: int = 1) -> Tensor:
    """The gradient norm of the centres of each class (C,), float32 at least.

    Args:
        gradient: (C, d), floating point, such as ``loss.weight.grad``, or (C * sub_centers, d).
        sub_centers: The number of centres per class.

    Raises:
        TypeError: If the gradient is not a floating-point tensor: before the first backward pass,
            and after ``zero_grad``, it is None.
        ValueError: If its shape does not fit.

    Example:
        >>> gradient_norm_per_class(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([5., 0.])
    """
    validation.floating("gradient", gradient, "C", "d")
    num_classes = validation.classes_of("gradient", gradient, sub_centers)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(
        gradient.detach().reshape(num_classes, -1), dim=1, dtype=dtype
    )
    return norms


def angle_histogram(theta: Tensor, bins: int = 180) -> Tensor:
    """Histogram (bins,), int64, of angles over [0, pi], without synchronising with an accelerator.

    Args:
        theta: (N,) angles in radians, floating point; NaN is ignored.
        bins: The number of bins; by default one per degree.

    Raises:
        TypeError: If theta is not floating-point, or bins not an int.
        ValueError: If bins is below 1.

    Example:
        >>> angle_histogram(torch.tensor([0.1, 0.2, 3.0]), bins=4)
        tensor([2, 0, 0, 1])
    """
    validation.floating("theta", theta, "N")
    validation.positive_integer("bins", bins)
    theta = theta.detach()
    found = (theta.nan_to_num() * (bins / math.pi)).long().clamp(0, bins - 1)
    counts = torch.zeros(bins, dtype=torch.int64, device=theta.device)
    return counts.index_add_(0, found, (~theta.isnan()).long())


def histogram_quantile(counts: Tensor, share: float) -> float:
    """A quantile in radians, accurate to the width of a bin; NaN for an empty histogram.

    Args:
        counts: (bins,) counts over [0, pi] (:func:`angle_histogram`).
        share: In [0, 1].

    Raises:
        TypeError: If the share is not a number.
        ValueError: If it is outside [0, 1], such as a percentage.

    Example:
        >>> histogram_quantile(torch.tensor([0, 4]), 0.5) == 0.75 * math.pi
        True
    """
    counted: list[float] = counts.tolist()
    wanted, below = validation.share("share", share) * sum(counted), 0.0
    for position, count in enumerate(counted):
        if count and below + count >= wanted:
            return (position + (wanted - below) / count) * math.pi / len(counted)
        below += count
    return math.nan


def _nearest_other_class(rows: Tensor, weight: Tensor, classes: Tensor, sub_centers: int) -> Tensor:
    """The class, other than its own, whose centre has the largest cosine with each row: (N,)."""
    dtype = working_dtype(rows, weight)
    best = rows.new_full(rows.shape[:1], -torch.inf, dtype=dtype)
    found = torch.zeros_like(classes)
    at_once = min(CLASSES_AT_ONCE, COSINES_AT_ONCE // max(1, len(rows)))
    at_once = max(1, at_once // sub_centers)
    with without_autocast(rows.device):
        unit = directions(rows, dtype)
        for start in range(0, weight.shape[0] // sub_centers, at_once):
            chunk = weight[start * sub_centers : (start + at_once) * sub_centers]
            centres = directions(chunk, dtype)
            behind = torch.where(_has_direction(centres), 0.0, -3.0).to(dtype)
            cosines = F.linear(unit, centres.nan_to_num(0.0), behind)  # -3 without a direction
            if sub_centers > 1:
                cosines = cosines.view(len(rows), len(centres) // sub_centers, sub_centers).amax(2)
            largest, which = replaced(cosines.T, classes - start, -torch.inf).max(0)
            found = torch.where(largest > best, which + start, found)
            best = torch.maximum(best, largest)
    return found


def _has_direction(unit: Tensor) -> Tensor:
    """Whether a normalised vector is neither zero nor NaN."""
    return unit.square().sum(-1) > 0.5


def _check_weight(weight: Tensor, sub_centers: int) -> int:
    validation.floating("weight", weight, "C", "d")
    num_classes = validation.classes_of("weight", weight, sub_centers)
    if num_classes < 2 or weight.shape[1] == 0:
        raise ValueError(
            f"weight: expected at least two classes and one dimension, got {tuple(weight.shape)}"
        )
    return num_classes

"""Unit vectors and angles, with the numerical treatment of their singularities.

An angle computed as acos of a cosine has lost half of its digits before acos is called, and its
derivative, 1 / sin(theta), is unbounded at both ends. Here the angle is computed from the sum and
the difference of the unit vectors, u + v and u - v, which is accurate from 0 to pi, as are the
first and second derivatives by autograd.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import validation

# Up to this N x d x C the operators of a batch take longer than its products, in float64 too.
FEW_PRODUCTS = 2**20


def directions(vectors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Unit vectors along the last dimension, for vectors of any finite, not tiny length.

    A vector shorter than ``finfo(vectors.dtype).tiny ** (7 / 8)`` (6e-34 in float32 and bfloat16,
    2e-4 in float16, 3e-270 in float64) counts as zero: its direction is the zero vector and its
    gradient zero, because 1 / length would overflow the dtype of the gradient.

    Args:
        vectors: (..., d), floating point.
        dtype: The dtype of the computation and the result; that of ``vectors`` by default.

    Returns:
        (..., d) directions in ``dtype``.

    Example:
        >>> directions(torch.tensor([[3e30, 4e30], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    dtype = dtype or vectors.dtype
    smallest = max(_smallest(vectors.dtype), _smallest(dtype))
    vectors = vectors.to(dtype)
    # The direction does not depend on the length, so dividing by a constant first is exact, for
    # every derivative too, and no square can overflow or underflow.
    largest = _largest(vectors.detach())
    scaled = vectors / torch.threshold(largest, torch.finfo(dtype).tiny, 1.0)
    # An error in the length would scale every cosine of the row, so it is computed precisely.
    square = scaled.square().sum(-1, keepdim=True, dtype=precise_dtype(vectors.device))
    is_zero = square.detach().sqrt() * largest < smallest
    inverse = square.masked_fill(is_zero, 1).rsqrt().masked_fill(is_zero, 0).to(vectors.dtype)
    unit: Tensor = scaled * inverse
    return unit


def angle_between(first: Tensor, second: Tensor) -> Tensor:
    r"""The angle of each pair of vectors, exact to rounding from 0 to pi.

    .. math:: \theta = 2\,\mathrm{atan2}(|u - v|,\ |u + v|),
        \qquad u = x / |x|,\ v = w / |w|

    Computed in float64 (float32 on devices without it, such as Apple's MPS). The gradient
    is the unit tangent divided by the vector's length. First and second derivatives are finite
    everywhere, and zero where the pair is parallel or opposite to within the last digits of the
    working precision (1.8e-15 rad in float64), where theta is exactly 0 or pi. A zero vector has
    angle pi / 2 to everything, and no gradient.

    Args:
        first: (..., d), floating point.
        second: (..., d), floating point, the same shape.

    Returns:
        theta (...) in radians, float64.

    Example:
        >>> angle_between(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-8]]))
        tensor([1.0000e-08], dtype=torch.float64)

    References:
        Kahan, "How Futile are Mindless Assessments of Roundoff in Floating-Point
        Computation?", 2006, section 12.
    """
    dtype = precise_dtype(first.device)
    u, v = directions(first, dtype), directions(second, dtype)
    difference, total = _length(u - v), _length(u + v)
    both_zero = difference + total == 0
    return 2 * torch.atan2(difference.masked_fill(both_zero, 1), total.masked_fill(both_zero, 1))


class Pairs(NamedTuple):
    """Pairs of vectors, in float64 (float32 on MPS), without a graph.

    Attributes:
        theta: (N, 1) the angle.
        cos_sin: (2, N, 1) its cosine, exactly 0 with a zero vector, and its sine, the smallest
            number where the pair is parallel to rounding.
        tangent: (N, d) the unit tangent t at the first's direction, towards the second's; 0 where
            the pair is parallel to rounding.
        directions: (N + K, d) the directions u of the first, and those of the second.
        inverse: (N + K, 1) 1 / lengths of them, 0 for a zero vector.
    """

    theta: Tensor
    cos_sin: Tensor
    tangent: Tensor
    directions: Tensor
    inverse: Tensor


def pairs(first: Tensor, second: Tensor, own: Tensor | None = None) -> Pairs:
    r"""The angle of each pair of vectors and the terms of its gradients.

    .. math:: r = v - (u \cdot v)\,u, \qquad \theta = \mathrm{atan2}(|r|,\ u \cdot v), \qquad
        t = r / |r|, \\
        \frac{\partial\theta}{\partial x} = -\frac{t}{|x|}, \qquad
        \frac{\partial\theta}{\partial w} = \frac{t \cos\theta - u \sin\theta}{|w|}

    with u = x / |x| and v = w / |w|. As accurate as :func:`angle_between`, with the same treatment
    of parallel pairs and zero vectors, in fewer passes over (N, d).

    Args:
        first: x (N, d), floating point.
        second: w (N, d) likewise, or (K, d) if there is ``own``.
        own: (N,) for each row of the first, the row of the second that it is paired with.
    """
    units, inverse = unit_vectors(first, second)
    u, v = units.split_with_sizes((first.shape[0], second.shape[0]))
    v = v if own is None else v.index_select(0, own)
    cosine = (u * v).sum(1, keepdim=True)
    residual = torch.addcmul(v, cosine, u, value=-1)
    sine: Tensor = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
    rounding = _resolution(u)
    tangent = residual.div_(torch.threshold(sine, rounding, math.inf))
    # Not 0, so that a zero vector has pi / 2 to everything.
    sine = torch.threshold(sine, rounding, torch.finfo(sine.dtype).tiny)
    return Pairs(torch.atan2(sine, cosine), torch.stack([cosine, sine]), tangent, units, inverse)


def unit_vectors(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The directions of (N, d) and those of (K, d), and 1 / their lengths, 0 for a zero vector.

    Returns:
        (N + K, d) and (N + K, 1), in float64 (float32 on MPS), without a graph.
    """
    if first.dtype == second.dtype:
        return _normalized(torch.cat([first, second]))
    both = zip(_normalized(first), _normalized(second), strict=True)
    units, inverse = (torch.cat(each) for each in both)
    return units, inverse


def angle_of_units(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The angle theta (N,) of pairs of unit vectors (N, d), and its sine.

    That is infinite where they are parallel to rounding: divided by it theta's gradient is 0 there.
    """
    # Not by a matrix product, whose rounding increases with d: in the residual it would be a sine.
    cosine, rounding = (u * v).sum(1), _resolution(u)
    residual = torch.addcmul(v, cosine[:, None], u, value=-1)
    sine: Tensor = torch.linalg.vector_norm(residual, dim=1)
    # Not 0, so that a zero vector has pi / 2 to everything.
    theta = torch.atan2(torch.threshold(sine, rounding, torch.finfo(sine.dtype).tiny), cosine)
    return theta, torch.threshold(sine, rounding, math.inf)


def inverse_lengths(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / the lengths of vectors (N, d): (N, 1), 0 for a zero vector; no autograd graph.

    Args:
        vectors: (N, d), floating point.
        dtype: Of the computation and the result, no narrower than that of the vectors.
    """
    smallest = _smallest(vectors.dtype)
    if validation.is_readable(vectors):  # whether lengths may overflow or underflow
        length: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True, dtype=dtype)
        limits = torch.finfo(dtype)
        if torch.equal(length, length.clamp(max(limits.tiny**0.4, smallest), limits.max)):
            return length.reciprocal_()
    # In the dtype of the centres: in float64 a device would read and write three times as much.
    _, length, largest = _scaled(vectors.to(dtype), smallest)
    return length.reciprocal_().div_(largest)


def target_angle(
    embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int = 1
) -> Tensor:
    r"""The angle between each embedding and the centre of its class.

    .. math:: \theta_i = \angle(x_i, w_{y_i})

    Args:
        embeddings: (N, d), floating point; rows shorter than 6e-34 (2e-4 in float16, 3e-270 in
            float64) count as 0.
        weight: (C, d) class centres, floating point; with sub-centres (C * sub_centers, d).
        labels: (N,) integers in [0, C).
        sub_centers: The number of centres per class; the nearest one is used.

    Returns:
        theta (N,) in radians, in [0, pi], float64 (float32 on devices without float64); see
        :func:`angle_between` for its precision and derivatives.

    Raises:
        TypeError: If a dtype is not floating-point (embeddings, weight) or integer (labels).
        ValueError: If shapes or devices do not fit, or a label is outside [0, C).

    Example:
        >>> weight = torch.eye(2)
        >>> target_angle(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), weight, torch.tensor([0, 1]))
        tensor([0.0000, 0.7854], dtype=torch.float64)
    """
    validation.batch(embeddings, weight, labels, sub_centers=sub_centers)
    own = nearest_sub_centers(embeddings, weight, labels.long(), sub_centers)
    return angle_between(embeddings, weight.index_select(0, own))


def lengths(vectors: Tensor) -> Tensor:
    """The lengths of vectors (N, d): (N,) in float64 (float32 on MPS); at 0 their gradient is 0."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=1, dtype=precise_dtype(vectors.device))
    return length


def nearest_sub_centers(
    embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int
) -> Tensor:
    """The row of each target's nearest centre, where a class has several; no autograd graph.

    Args:
        embeddings: (N, d), floating point.
        weight: (C * sub_centers, d); sub-centre k of class c is row c * sub_centers + k.
        labels: (N,) int64 in [0, C), or -1 for a class of another shard.
        sub_centers: The number of centres per class.

    Returns:
        (N,) int64, rows of the weight, or -1.
    """
    if sub_centers == 1 or weight.shape[0] == 0:
        return labels
    first = labels.clamp(min=0) * sub_centers
    rows = first[:, None] + torch.arange(sub_centers, device=labels.device)
    # Whose length does not matter, and bounds the products with unit vectors.
    x, weight = embeddings.detach().to(precise_dtype(weight.device)), weight.detach()
    if x.numel() * weight.shape[0] <= FEW_PRODUCTS:
        products = torch.mm(x, _normalized(weight)[0].T).gather(1, rows)
    else:
        each, _ = _normalized(weight.index_select(0, rows.flatten()))
        products = torch.linalg.vecdot(x[:, None], each.view(*rows.shape, weight.shape[1]))
    return (first + products.argmax(1)).where(labels >= 0, -1)


def cosines(embeddings: Tensor, weight: Tensor) -> Tensor:
    """The cosine of every embedding with every class centre.

    Args:
        embeddings: (N, d), floating point; rows shorter than 6e-34 (2e-4 in float16, 3e-270 in
            float64) count as 0.
        weight: (C, d) class centres, floating point.

    Returns:
        (N, C), float32, or float64 when either input is float64.

    Example:
        >>> cosines(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([[1., 0.]])
    """
    dtype = working_dtype(embeddings, weight)
    return F.linear(directions(embeddings, dtype), directions(weight, dtype))


def _length(difference: Tensor) -> Tensor:
    """Euclidean length; where it is only rounding, all its derivatives are zero."""
    square = difference.square().sum(-1)
    is_rounding = square <= _resolution(difference) ** 2
    return square.masked_fill(is_rounding, 1).sqrt().masked_fill(is_rounding, 0)


def _largest(vectors: Tensor) -> Tensor:
    """The largest magnitude of a component (..., 1): the infinity norm."""
    if vectors.is_cuda:  # on the CPU torch's is slow
        largest: Tensor = torch.linalg.vector_norm(vectors, math.inf, -1, keepdim=True)
        return largest
    return torch.maximum(vectors.amax(-1, keepdim=True), -vectors.amin(-1, keepdim=True))


def _normalized(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vectors of (..., d) and 1 / their lengths (..., 1), in the widest dtype."""
    precise = vectors.to(precise_dtype(vectors.device))
    if vectors.dtype != precise.dtype:  # no overflow or underflow in the wider dtype
        length = torch.linalg.vector_norm(precise, dim=-1, keepdim=True)
        inverse = torch.threshold(length, _smallest(vectors.dtype), math.inf).reciprocal_()
        return precise.mul_(inverse), inverse
    scaled, length, largest = _scaled(precise, _smallest(vectors.dtype))
    return scaled / length, length.reciprocal() / largest


def _scaled(vectors: Tensor, smallest: float) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors (..., d) divided by their largest component, their lengths, that component (..., 1).

    No square overflows or underflows. The length of a vector that counts as zero is infinite.
    """
    largest = torch.threshold(_largest(vectors), torch.finfo(vectors.dtype).tiny, 1.0)
    scaled = vectors / largest
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)  # from 1 on, where not tiny
    return scaled, length.masked_fill(length * largest < smallest, math.inf), largest


def _smallest(dtype: torch.dtype) -> float:
    """The length below which a vector counts as zero."""
    tiny: float = torch.finfo(dtype).tiny
    return math.exp(7 / 8 * math.log(tiny))


def _resolution(vectors: Tensor) -> float:
    """The length up to which a difference of two unit vectors is only rounding."""
    return 8 * torch.finfo(vectors.dtype).eps


def precise_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: float64, but on Apple's MPS float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def working_dtype(embeddings: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of sums and of products in full precision: float32, or float64 if either is."""
    return torch.float64 if torch.float64 in (embeddings.dtype, weight.dtype) else torch.float32


def is_autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on; some devices (meta) have none."""
    kind = device.type
    # The compiler cannot always query what is available.
    is_available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return kind != "meta" and is_available and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast where it is on."""
    is_on = is_autocast_enabled(device)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()

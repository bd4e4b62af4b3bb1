"""Unit vectors and angles, with the numerical treatment of their singularities.

An angle computed as acos of a cosine has lost half of its digits before acos is called, and its
derivative, 1 / sin(theta), is unbounded at both ends. Here the angle is computed from the sum and
the difference of the unit vectors, u + v and u - v, which is accurate from 0 to pi, as are the
first and second derivatives by autograd.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from . import validation


def directions(vectors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Unit vectors along the last dimension, for vectors of any finite, not tiny length.

    A vector whose largest component is below ``finfo(vectors.dtype).tiny ** (7 / 8)`` (6e-34 in
    float32 and bfloat16, 2e-4 in float16, 3e-270 in float64) counts as zero: its direction is the
    zero vector and its gradient zero, because 1 / norm would overflow the dtype of the gradient.

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
    is_zero = largest < smallest
    scaled = vectors * (1 / largest).masked_fill(is_zero, 0)
    # An error in the length would scale every cosine of the row, so it is computed precisely.
    square = scaled.square().sum(-1, keepdim=True, dtype=precise_dtype(vectors.device))
    inverse = square.masked_fill(is_zero, 1).rsqrt().to(vectors.dtype)
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


def angle_and_tangent(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    r"""The angle of each pair of unit vectors and its gradient, for custom backward passes.

    .. math:: r = v - (u \cdot v)\,u, \qquad \theta = \mathrm{atan2}(|r|,\ u \cdot v), \qquad
        t = r / |r|, \qquad
        \frac{\partial\theta}{\partial u} = -t, \quad
        \frac{\partial\theta}{\partial v} = \cos\theta\; t - \sin\theta\; u

    As accurate as :func:`angle_between`, in fewer passes over (N, d), with the same treatment of
    parallel pairs and zero vectors; the result has no autograd graph.

    Args:
        u: (N, d) unit vectors in the working precision, or zero vectors.
        v: (N, d) likewise.

    Returns:
        theta (N,), and the unit tangent t (N, d) at u in the direction of v, zero where theta has
        no gradient.
    """
    cosine = torch.linalg.vecdot(u, v)
    tangent = torch.addcmul(v, u, cosine[:, None], value=-1)
    sine = torch.linalg.vector_norm(tangent, dim=1)
    is_rounding = sine <= _resolution(u)
    inverse = (1 / sine).masked_fill(is_rounding, 0)
    theta = torch.atan2(sine.masked_fill(is_rounding, 0), cosine)
    has_no_angle = is_rounding & (cosine == 0)
    return theta.masked_fill(has_no_angle, math.pi / 2), tangent * inverse[:, None]


def normalize(vectors: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
    """Write the :func:`directions` of vectors to ``out`` and return 1 / their length.

    Args:
        vectors: (N, d), floating point.
        scratch: (N, d) in the dtype of the computation; may be ``out``.
        out: (N, d).

    Returns:
        (N, 1) in the dtype of ``scratch``, 0 for a vector that counts as zero; no autograd graph.
    """
    # Elsewhere the test would synchronise with the device, or break the compiled graph.
    if validation.is_readable(vectors):
        length: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True, dtype=scratch.dtype)
        if _is_safe(length, vectors):
            torch.mul(vectors, length.reciprocal_(), out=out)
            return length
    largest = _largest(vectors).to(scratch.dtype)
    inverse = largest.reciprocal().masked_fill_(largest < _smallest(vectors.dtype), 0)
    torch.mul(vectors, inverse, out=scratch)
    # The largest component is 1 now, or all are 0.
    again = torch.linalg.vector_norm(scratch, dim=1, keepdim=True).clamp_(min=0.5).reciprocal_()
    torch.mul(scratch, again, out=out)
    return inverse.mul_(again)


def target_angle(
    embeddings: Tensor, weight: Tensor, labels: Tensor, sub_centers: int = 1
) -> Tensor:
    r"""The angle between each embedding and the centre of its class.

    .. math:: \theta_i = \angle(x_i, w_{y_i})

    Args:
        embeddings: (N, d), floating point; rows with no component above 6e-34 (2e-4 in float16,
            3e-270 in float64) count as 0.
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
    centres = weight.detach().index_select(0, rows.flatten()).view(*rows.shape, weight.shape[1])
    dtype = precise_dtype(embeddings.device)
    unit = directions(embeddings.detach(), dtype)[:, None]
    nearest: Tensor = torch.linalg.vecdot(unit, directions(centres, dtype)).argmax(1)
    return (first + nearest).where(labels >= 0, -1)


def cosines(embeddings: Tensor, weight: Tensor) -> Tensor:
    """The cosine of every embedding with every class centre.

    Args:
        embeddings: (N, d), floating point; rows with no component above 6e-34 (2e-4 in float16,
            3e-270 in float64) count as 0.
        weight: (C, d) class centres, floating point.

    Returns:
        (N, C), float32, or float64 when either input is float64.

    Example:
        >>> cosines(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        tensor([[1., 0.]])
    """
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, weight.dtype), torch.float32)
    return F.linear(directions(embeddings, dtype), directions(weight, dtype))


def _length(difference: Tensor) -> Tensor:
    """Euclidean length; where it is only rounding, all its derivatives are zero."""
    square = difference.square().sum(-1)
    is_rounding = square <= _resolution(difference) ** 2
    return square.masked_fill(is_rounding, 1).sqrt().masked_fill(is_rounding, 0)


def _largest(vectors: Tensor) -> Tensor:
    """The largest magnitude of a component (..., 1): the infinity norm, faster than torch's."""
    return torch.maximum(vectors.amax(-1, keepdim=True), -vectors.amin(-1, keepdim=True))


def _is_safe(lengths: Tensor, vectors: Tensor) -> bool:
    """Whether no vector counts as zero, and no square overflowed or underflowed."""
    if lengths.numel() == 0:
        return True
    shortest, longest = (extreme.item() for extreme in lengths.aminmax())
    limits = torch.finfo(lengths.dtype)
    zero = _smallest(vectors.dtype) * float(vectors.shape[1]) ** 0.5
    return bool(max(limits.tiny**0.4, zero) <= shortest and longest <= limits.max)


def _smallest(dtype: torch.dtype) -> float:
    """The largest component below which a vector counts as zero."""
    tiny: float = torch.finfo(dtype).tiny
    return math.exp(7 / 8 * math.log(tiny))


def _resolution(vectors: Tensor) -> float:
    """The length up to which a difference of two unit vectors is only rounding."""
    return 8 * torch.finfo(vectors.dtype).eps


def precise_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: float64, but on Apple's MPS float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Disable autocast; does nothing on devices without it (meta)."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    # Nothing to do where it is disabled; the compiler cannot always query that.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()

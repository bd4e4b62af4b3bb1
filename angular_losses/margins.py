r"""Margins: plain functions of the target angle that return the target logit before scaling.

Each takes theta in radians (any shape) and a margin (a float, or a tensor that broadcasts against
theta, for per-sample margins), and is differentiated by autograd. A custom function can be used
wherever one of these can.

An additive or multiplicative margin can take the angle past pi, where the cosine increases again,
so that the loss decreases as a sample moves away from its centre. By default the cosine is
*unrolled* there, as in SphereFace: continuously differentiable and decreasing on [0, pi]. The
behaviour of other implementations is available through the argument ``beyond``:

==============  ============================================  ==================================
``beyond``      past theta + m = pi                           used by
==============  ============================================  ==================================
"decreasing"    -cos(theta + m) - 2 (smooth, decreasing)      this library (default)
"plain"         cos(theta + m) (increasing)                   insightface, ElasticFace, AdaCos
"linear"        cos(theta) - m sin(m) (jump at pi - m)        pytorch-metric-learning, face.evoLVe
"shifted"       cos(theta) - (1 - cos(m)) (continuous)        wespeaker
"clamped"       -1 (theta + m clamped to pi; no gradient)     OpenSphere, AdaFace
"cosine"        cos(theta) (jump upwards)                     FaceX-Zoo
"easy"          the margin only where theta < pi / 2          ``easy_margin=True`` in many
==============  ============================================  ==================================
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

import torch
from torch import Tensor

from . import validation

MarginFunction: TypeAlias = Callable[[Tensor], Tensor]
Angle: TypeAlias = tuple[Tensor, float | Tensor]


def sphereface(theta: Tensor, m: float | Tensor, *, beyond: str = "decreasing") -> Tensor:
    r"""The psi of SphereFace, for any real m >= 1.

    .. math:: \psi(\theta) = (-1)^k \cos(m\theta) - 2k, \qquad
        k = \lfloor m\theta / \pi \rfloor \le \lceil m \rceil - 1

    Args:
        theta: Target angle in radians, in [0, pi].
        m: Multiplicative margin, m >= 1 (1: no margin), a float or a tensor.
        beyond: "decreasing" (the paper) or "plain": cos(m theta) without k, which is not
            monotone (module docstring).

    Returns:
        The target logit before scaling, in [1 - 2m, 1] (for integer m), shaped like theta.

    Raises:
        TypeError: If m is neither a number nor a tensor.
        ValueError: If m (a float) is below 1, or ``beyond`` is not one of the two.

    Example:
        >>> sphereface(torch.tensor([0.0, torch.pi / 4, torch.pi]), 4)
        tensor([ 1., -1., -7.])

    References:
        Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", CVPR 2017,
        arXiv:1704.08063, eq. (7); eq. (3) of HSADML.
    """
    _check(validation.multiplicative_margin, m=m)
    validation.choice("beyond", beyond, SPHEREFACE_BEYOND)
    return Combined(m1=m, beyond=beyond)(theta)


def cosface(theta: Tensor, m: float | Tensor) -> Tensor:
    r"""CosFace (AM-Softmax): :math:`\cos\theta - m`.

    Args:
        theta: Target angle in radians, in [0, pi].
        m: Additive margin on the cosine, in [0, 2), a float or a tensor.

    Returns:
        The target logit before scaling, shaped like theta.

    Raises:
        TypeError: If m is neither a number nor a tensor.
        ValueError: If m (a float) is outside [0, 2).

    Example:
        >>> cosface(torch.tensor([0.0]), 0.35)
        tensor([0.6500])

    References:
        Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018,
        arXiv:1801.09414, eq. (4).
    """
    _check(validation.cosine_margin, m=m)
    return torch.cos(theta) - m


def arcface(theta: Tensor, m: float | Tensor, *, beyond: str = "decreasing") -> Tensor:
    r"""ArcFace (AAM-Softmax): :math:`\cos(\theta + m)`, unrolled past pi.

    Args:
        theta: Target angle in radians, in [0, pi].
        m: Additive margin on the angle in radians, in [0, pi), a float or a tensor.
        beyond: The function past theta + m = pi; see the table in the module's docstring.

    Returns:
        The target logit before scaling, shaped like theta.

    Raises:
        TypeError: If m is neither a number nor a tensor.
        ValueError: If m (a float) is outside [0, pi), or ``beyond`` is not in the table.

    Example:
        >>> arcface(torch.tensor([0.0, torch.pi]), 0.5)
        tensor([ 0.8776, -1.1224])

    References:
        Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
        CVPR 2019, arXiv:1801.07698, eq. (3).
    """
    _check(validation.angular_margin, m=m)
    validation.choice("beyond", beyond, ARCFACE_BEYOND)
    return Combined(m2=m, beyond=beyond)(theta)


def combined(
    theta: Tensor,
    m1: float | Tensor,
    m2: float | Tensor,
    m3: float | Tensor,
    *,
    beyond: str = "decreasing",
) -> Tensor:
    r"""The combined margin: :math:`\cos(m_1\theta + m_2) - m_3`, unrolled past pi.

    (m, 0, 0) is :func:`sphereface`, (1, m, 0) :func:`arcface` and (1, 0, m) :func:`cosface`.

    Args:
        theta: Target angle in radians, in [0, pi].
        m1: Multiplicative margin, above 0, a float or a tensor.
        m2: Additive margin on the angle in radians, in [0, pi), a float or a tensor.
        m3: Additive margin on the cosine, in [0, 2), a float or a tensor.
        beyond: "decreasing" or "plain" (no unrolling, as insightface defines it).

    Returns:
        The target logit before scaling, shaped like theta.

    Raises:
        TypeError: If a margin is neither a number nor a tensor.
        ValueError: If a margin (a float) is out of its range, or ``beyond`` is not one of the two.

    Example:
        >>> combined(torch.tensor([0.5]), 1.0, 0.3, 0.2)
        tensor([0.4967])

    References:
        Deng et al., "ArcFace", CVPR 2019, arXiv:1801.07698, eq. (4).
    """
    _check(validation.positive, m1=m1)
    _check(validation.angular_margin, m2=m2)
    _check(validation.cosine_margin, m3=m3)
    validation.choice("beyond", beyond, SPHEREFACE_BEYOND)
    return Combined(m1, m2, m3, beyond)(theta)


def detached(margin: MarginFunction) -> MarginFunction:
    r"""The margin in the forward pass, the gradient of plain :math:`\cos\theta` in the backward.

    Used by insightface and OpenSphere: the margin changes the logit but is not differentiated.

    Args:
        margin: A function of theta.

    Returns:
        A function of theta with the values of ``margin`` and the derivative of the cosine.

    Example:
        >>> theta = torch.tensor(1.0, requires_grad=True)
        >>> detached(lambda theta: arcface(theta, 0.5))(theta).backward()
        >>> torch.allclose(theta.grad, -torch.sin(theta))
        True

    References:
        Liu et al., "SphereFace Revived: Unifying Hyperspherical Face Recognition", TPAMI 2022,
        arXiv:2109.05565, "characteristic gradient detachment".
    """
    return with_gradient_of(torch.cos, margin)


def with_gradient_of(plain: MarginFunction, margin: MarginFunction) -> MarginFunction:
    """The function of theta (N,) with the values of ``margin`` and the derivative of ``plain``."""

    def function(theta: Tensor) -> Tensor:
        value = plain(theta)
        return value + (margin(theta) - value).detach()

    return function


def linear_angle(theta: Tensor, m: float | Tensor) -> Tensor:
    r"""Li-ArcFace: a logit linear in the angle, :math:`(\pi - 2(\theta + m)) / \pi`.

    Args:
        theta: Target angle in radians, in [0, pi].
        m: Additive margin on the angle in radians, in [0, pi), a float or a tensor.

    Returns:
        The target logit before scaling, shaped like theta.

    Raises:
        TypeError: If m is neither a number nor a tensor.
        ValueError: If m (a float) is outside [0, pi).

    Example:
        >>> linear_angle(torch.tensor([0.0, torch.pi]), 0.0)
        tensor([ 1., -1.])

    References:
        Li et al., "AirFace: Lightweight and Efficient Model for Face Recognition", ICCV
        workshops 2019, arXiv:1907.12256.
    """
    _check(validation.angular_margin, m=m)
    return 1 - 2 / math.pi * (theta + m)


def x2_softmax(theta: Tensor, a: float | Tensor, h: float | Tensor, k: float | Tensor) -> Tensor:
    r"""X2-Softmax: a parabola in the angle, :math:`a(\theta - h)^2 + k`.

    Args:
        theta: Target angle in radians, in [0, pi].
        a: The curvature, below 0, a float or a tensor.
        h: The angle of the vertex in radians, a float or a tensor. Above 0 the logit increases from
            theta = 0 to h.
        k: The value at the vertex, a float or a tensor.

    Returns:
        The target logit before scaling, shaped like theta.

    Raises:
        TypeError: If a, h or k is neither a number nor a tensor.
        ValueError: If a (a float) is not below 0, or h or k is not finite.

    Example:
        >>> x2_softmax(torch.tensor([0.0, 1.0]), -0.9, 0.0, 0.65)
        tensor([ 0.6500, -0.2500])

    References:
        Xu et al., "X2-Softmax: Margin adaptive loss function for face recognition", Expert Systems
        with Applications 2024, arXiv:2312.05281.
    """
    _check(validation.negative, a=a)
    _check(validation.finite, h=h, k=k)
    return a * (theta - h) ** 2 + k


@dataclass(frozen=True)
class KnownDescent:
    """A margin with its derivative, which autograd then need not find.

    Args:
        function: The margin: a function of theta (N,), or of theta and the share in force.
        with_descent: A function of the same that returns the target logits before scaling, and
            minus their derivatives by theta, both (N,), without a graph.

    Example:
        >>> cosine = KnownDescent(torch.cos, lambda theta: (theta.cos(), theta.sin()))
        >>> cosine(torch.tensor([0.0]))
        tensor([1.])
    """

    function: Callable[..., Tensor]
    with_descent: Callable[..., tuple[Tensor, Tensor]]

    def __call__(self, theta: Tensor, *share: float | Tensor) -> Tensor:
        """The target logits before scaling."""
        return self.function(theta, *share)


@dataclass(frozen=True)
class Combined:
    """:func:`angular_losses.combined` as schedules take it: a function of theta and of a share.

    Attributes:
        m1: Multiplicative margin, a float or a tensor that broadcasts against theta, as all three.
        m2: Additive margin on the angle.
        m3: Additive margin on the cosine.
        beyond: What happens past theta + m = pi.

    Example:
        >>> margin = Combined(m2=0.5)
        >>> margin(torch.tensor([0.0]))
        tensor([0.8776])
        >>> margin(torch.tensor([0.0]), 0.5)  # half of it in force
        tensor([0.9689])
    """

    m1: float | Tensor = 1.0
    m2: float | Tensor = 0.0
    m3: float | Tensor = 0.0
    beyond: str = "decreasing"

    def __post_init__(self) -> None:
        validation.choice("beyond", self.beyond, ARCFACE_BEYOND)

    def __call__(self, theta: Tensor, share: float | Tensor = 1.0) -> Tensor:
        """The target logits before scaling with a share of the margin in force, in [0, 1]."""
        return _less(*self._angle(theta, share))

    def with_descent(self, theta: Tensor, share: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """The same and its descent, minus the derivative by theta, without a graph."""
        phi, offset = self._angle(theta, share)
        descent = torch.sin(phi)
        if not _is_number(self.m1, 1.0):
            descent = descent * (1 + share * (self.m1 - 1))
        return _less(phi, offset), descent

    def _angle(self, theta: Tensor, share: float | Tensor) -> Angle:
        """The angle with the margins in force, and what is subtracted from its cosine."""
        offset: float | Tensor = 0.0
        is_turned = not (_is_number(self.m1, 1.0) and _is_number(self.m2, 0.0))
        if not _is_number(self.m1, 1.0):
            theta = theta * (1 + share * (self.m1 - 1))
        if is_turned:  # which can take the angle past pi
            m2 = 0.0 if _is_number(self.m2, 0.0) else share * self.m2
            theta, offset = PAST_PI[self.beyond](theta, m2)
        return theta, offset if _is_number(self.m3, 0.0) else offset + share * self.m3


def has_descent(margin: object) -> TypeGuard[KnownDescent | Combined]:
    """Whether a margin provides its derivative by theta, and depends on nothing else trained."""
    if not isinstance(margin, Combined):
        return isinstance(margin, KnownDescent)
    of = margin.m1, margin.m2, margin.m3
    return not any(isinstance(each, Tensor) and each.requires_grad for each in of)


def _less(phi: Tensor, offset: float | Tensor) -> Tensor:
    """The cosine less the offset."""
    cosine = torch.cos(phi)
    return cosine if _is_number(offset, 0.0) else cosine - offset


def _is_number(margin: float | Tensor, number: float) -> bool:
    return not isinstance(margin, Tensor) and margin == number


def of_rows(margin: float | Tensor, labels: Tensor) -> float | Tensor:
    """The margin of each row (N,), from a single margin or per-class margins (C,)."""
    return margin.index_select(0, labels) if isinstance(margin, Tensor) else margin


def _sum(theta: Tensor, m: float | Tensor) -> Tensor:
    return theta if _is_number(m, 0.0) else theta + m


def _unrolled(theta: Tensor, m: float | Tensor) -> Angle:
    """Of (-1)^k cos(phi) - 2k with k = floor(phi / pi): the cosine made decreasing everywhere.

    Adjacent pieces have equal value and slope at each multiple of pi, so the rounding of k does not
    matter, and the paper's bound k <= ceil(m) - 1 holds in value at theta = pi.
    """
    phi = _sum(theta, m)
    k = torch.div(phi, math.pi, rounding_mode="floor")
    return torch.sub(phi, k, alpha=math.pi), 2 * k


def _back(drop: Callable[[float | Tensor], float | Tensor]) -> Callable[..., Angle]:
    """Without the margin past theta + m = pi, and with a drop of m there."""

    def angle(theta: Tensor, m: float | Tensor) -> Angle:
        phi, dropped = _sum(theta, m), drop(m)
        is_past = phi > math.pi
        offset = 0.0 if _is_number(dropped, 0.0) else dropped * is_past.to(phi.dtype)
        return torch.where(is_past, theta, phi), offset

    return angle


def _sin(m: float | Tensor) -> float | Tensor:
    return torch.sin(m) if isinstance(m, Tensor) else math.sin(m)


def _cos(m: float | Tensor) -> float | Tensor:
    return torch.cos(m) if isinstance(m, Tensor) else math.cos(m)


# From theta and an additive margin to the angle whose cosine is taken, and what is subtracted.
PAST_PI: dict[str, Callable[[Tensor, float | Tensor], Angle]] = {
    "decreasing": _unrolled,
    "plain": lambda theta, m: (_sum(theta, m), 0.0),
    "linear": _back(lambda m: m * _sin(m)),
    "shifted": _back(lambda m: 1 - _cos(m)),
    "clamped": lambda theta, m: (_sum(theta, m).clamp(max=math.pi), 0.0),
    "cosine": _back(lambda m: 0.0),
    "easy": lambda theta, m: (torch.where(theta < math.pi / 2, _sum(theta, m), theta), 0.0),
}

SPHEREFACE_BEYOND = ("decreasing", "plain")
ARCFACE_BEYOND = tuple(PAST_PI)


# The validation of a margin that is added to the angle or subtracted from the cosine.
ADDITIVE = {"arc": validation.angular_margin, "cos": validation.cosine_margin}


def additive(kind: str, m: float | Tensor) -> Combined:
    """The margin of one of these kinds."""
    return Combined(m2=m) if kind == "arc" else Combined(m3=m)


def _check(check: Callable[[str, object], float], **margin: float | Tensor) -> None:
    for name, value in margin.items():
        if not isinstance(value, Tensor):  # reading a tensor's values would synchronise
            check(name, value)

r"""Negatives: functions that reweight the cosines of the non-target classes.

Each takes a chunk of cosines (K classes, N rows) and the target logits before scaling (N,), and
returns the logits of the negatives before scaling (K, N). The functions are element-wise, so a loss
can be computed in chunks of classes. Every function has a finite derivative everywhere. A custom
function can be used wherever one of these can.

Three convert a cosine back to an angle (:func:`linear_angle`, :func:`divided_angle` and the angular
:func:`nearest_penalty`) and have the precision of float32 cosines near a *wrong* centre. For 64
rows (d = 128) at angles of 1e-2, 3e-3, 1e-3 and 3e-4 rad to one, the largest gradient error was
0.2, 3, 14 and 56 % in :class:`angular_losses.LiArcFaceLoss`, 0.02, 0.3, 1 and 4 % in
:class:`angular_losses.InterTopKLoss` and 0.01 % at most in "v2" of
:class:`angular_losses.SphereFaceRLoss`; at smaller angles the contribution of that class to
the gradient is lost: 71 and 6 % in the first two. In float64 all errors were below 2e-6 down to
1e-5 rad. For example::

    margin_softmax_loss(
        embeddings, weight, labels, scale=64.0,
        margin=lambda theta: arcface(theta, 0.5),
        negatives=lambda cosine, target: mv_softmax(cosine, target, 0.2),
    )

A negative is *hard* where its cosine exceeds the target logit, margin included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

NegativeFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class KnownSlope:
    """A function of the cosines alone, with its derivative, which autograd then need not find.

    Args:
        function: From cosines (K, N), float32 or float64, to the values that replace them, in
            [-1, 1] too.
        with_slope: From the same to these values and their derivatives, without a graph. Training
            steps over few classes have float64 for float32 embeddings too.

    Example:
        >>> halved = KnownSlope(lambda c: c / 2, lambda c: (c / 2, torch.full_like(c, 0.5)))
        >>> halved(torch.tensor([[0.5]]), torch.tensor([0.1]))
        tensor([[0.2500]])
    """

    function: Callable[[Tensor], Tensor]
    with_slope: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __call__(self, cosine: Tensor, target: Tensor) -> Tensor:
        """The values that replace the cosines."""
        return self.function(cosine)


def curricularface(cosine: Tensor, target: Tensor, t: float | Tensor) -> Tensor:
    r"""CurricularFace: a hard negative is weighted by its cosine, from easy to hard as t grows.

    .. math:: N(c) = c\,(t + c) \text{ where hard, else } c

    Args:
        cosine: (K, N).
        target: (N,) the target logits before scaling.
        t: The running mean of the target cosines, a float or a tensor.

    Example:
        >>> curricularface(torch.tensor([[0.2], [0.6]]), torch.tensor([0.4]), 0.1)
        tensor([[0.2000],
                [0.4200]])

    References:
        Huang et al., "CurricularFace", CVPR 2020, arXiv:2004.00288.
    """
    return torch.where(cosine > target, cosine * (t + cosine), cosine)


def mv_softmax(
    cosine: Tensor, target: Tensor, t: float | Tensor, *, adaptive: bool = True
) -> Tensor:
    r"""MV-Softmax: a mis-classified (hard) negative is emphasised.

    .. math:: c + t\,(c + 1) \text{ where hard (adaptive)}, \qquad
        c + t \text{ where hard (fixed)}

    Args:
        cosine: (K, N).
        target: (N,) the target logits before scaling.
        t: The emphasis t >= 0; 0 is none. FaceX-Zoo's ``mv_weight`` is 1 + t.
        adaptive: Whether the emphasis grows with the cosine.

    Example:
        >>> mv_softmax(torch.tensor([[0.2], [0.6]]), torch.tensor([0.4]), 0.5)
        tensor([[0.2000],
                [1.4000]])

    References:
        Wang et al., "Mis-classified Vector Guided Softmax Loss", AAAI 2020, arXiv:1912.00833.
    """
    emphasis = t * (cosine + 1) if adaptive else t
    return torch.where(cosine > target, cosine + emphasis, cosine)


def npcface(cosine: Tensor, target: Tensor, t: float = 1.1, a: float = 0.2) -> Tensor:
    r"""NPCFace: a hard negative is scaled and shifted.

    .. math:: t\,c + a \text{ where hard, else } c

    Args:
        cosine: (K, N).
        target: (N,) the target logits before scaling.
        t: The factor.
        a: The offset.

    Example:
        >>> npcface(torch.tensor([[0.2], [0.6]]), torch.tensor([0.4]))
        tensor([[0.2000],
                [0.8600]])

    References:
        Zeng et al., "NPCFace", 2020, arXiv:2007.10172.
    """
    return torch.where(cosine > target, t * cosine + a, cosine)


def circle(cosine: Tensor, m: float) -> Tensor:
    r"""Circle loss: each negative is weighted by its distance from its optimum.

    .. math:: [c + m]_+\,(c - m)

    with the first factor treated as a constant in the gradient, as in the paper.

    Args:
        cosine: (K, N).
        m: The relaxation m in (0, 1).

    Example:
        >>> circle(torch.tensor([[-0.5], [0.75]]), 0.25)
        tensor([[-0.0000],
                [0.5000]])

    References:
        Sun et al., "Circle Loss", CVPR 2020, arXiv:2002.10857, eq. (5)-(8).
    """
    return F.relu(cosine.detach() + m) * (cosine - m)


def circle_with_slope(cosine: Tensor, m: float) -> tuple[Tensor, Tensor]:
    """:func:`circle` and its derivative by the cosine, without a graph.

    Args:
        cosine: (K, N).
        m: The relaxation m in (0, 1).

    Returns:
        Both (K, N).

    Example:
        >>> circle_with_slope(torch.tensor([[0.75]]), 0.25)
        (tensor([[0.5000]]), tensor([[1.]]))
    """
    weight = F.relu(cosine + m)
    return weight * (cosine - m), weight


def nearest_penalty(cosine: Tensor, threshold: Tensor, m: float, *, angular: bool = True) -> Tensor:
    r"""Inter-top-k: a penalty increases the logits of the nearest negatives.

    .. math:: \cos(\theta - m) \text{ (angular) or } c + m,
        \quad \text{where } c \ge \text{threshold}

    Args:
        cosine: (K, N).
        threshold: (N,) the k-th largest cosine of a negative.
        m: The penalty: radians (angular), or on the cosine.
        angular: Whether it is subtracted from the angle.

    Example:
        >>> nearest_penalty(torch.tensor([[0.2], [0.6]]), torch.tensor([0.6]), 0.1, angular=False)
        tensor([[0.2000],
                [0.7000]])

    References:
        Zhao et al., "Inter-topK Penalty", ICASSP 2022, arXiv:2110.05042.
    """
    nearer = cosine + m
    if angular:
        inside, excess, slope = _inside(cosine)
        sine = torch.sub((1 - inside.square()).sqrt(), excess.abs(), alpha=slope)
        nearer = math.cos(m) * cosine + math.sin(m) * sine
    return torch.where(cosine >= threshold, nearer, cosine)


def interclass_filter(cosine: Tensor, target: Tensor, threshold: float) -> Tensor:
    r"""Interclass filtering: a class so near that it may be the same one has the logit 0.

    .. math:: N(c) = 0 \text{ where } c > \text{threshold, else } c

    Args:
        cosine: (K, N).
        target: (N,) the target logits before scaling, not used.
        threshold: The largest cosine at which a class counts as a different one.

    Example:
        >>> interclass_filter(torch.tensor([[0.2], [0.6]]), torch.tensor([0.4]), 0.4)
        tensor([[0.2000],
                [0.0000]])

    References:
        An et al., "Partial FC", CVPR 2022, arXiv:2203.15565; insightface's
        ``interclass_filtering_threshold``.
    """
    return torch.where(cosine > threshold, 0, cosine)


def linear_angle(cosine: Tensor) -> Tensor:
    r"""Li-ArcFace: a logit linear in the angle, :math:`(\pi - 2\theta) / \pi`.

    Args:
        cosine: (K, N).

    Example:
        >>> linear_angle(torch.tensor([[0.0], [0.5]]))
        tensor([[0.0000],
                [0.3333]])

    References:
        Li et al., "AirFace", ICCV workshops 2019, arXiv:1907.12256.
    """
    return 1 - 2 / math.pi * _angle(cosine)


def _linear_angle_with_slope(cosine: Tensor) -> tuple[Tensor, Tensor]:
    angle, descent = _angle_with_descent(cosine)
    return torch.rsub(angle, 1.0, alpha=2 / math.pi), descent.mul_(2 / math.pi)


LINEAR_ANGLE = KnownSlope(linear_angle, _linear_angle_with_slope)


def divided_angle(cosine: Tensor, m: float) -> Tensor:
    r"""SphereFace-R v2: the margin applied to the negatives, :math:`\cos(\theta / m)`.

    Args:
        cosine: (K, N).
        m: The margin m >= 1.

    Example:
        >>> divided_angle(torch.tensor([[0.0]]), 2.0)
        tensor([[0.7071]])

    References:
        Liu et al., "SphereFace Revived", TPAMI 2022, arXiv:2109.05565.
    """
    return torch.cos(_angle(cosine) / m)


def divided_angle_with_slope(cosine: Tensor, m: float) -> tuple[Tensor, Tensor]:
    """:func:`divided_angle` and its derivative by the cosine, without a graph.

    Args:
        cosine: (K, N).
        m: The margin m >= 1.

    Returns:
        Both (K, N).

    Example:
        >>> divided_angle_with_slope(torch.tensor([[0.0]]), 2.0)
        (tensor([[0.7071]]), tensor([[0.3536]]))
    """
    angle, descent = _angle_with_descent(cosine)
    angle /= m
    return torch.cos(angle), descent.mul_(torch.sin(angle)).div_(m)


def _angle(cosine: Tensor) -> Tensor:
    """acos, extended linearly where 1 - abs(cosine) is only rounding."""
    inside, excess, slope = _inside(cosine)
    return torch.sub(torch.acos(inside), excess, alpha=slope)


def _angle_with_descent(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_angle` and minus its derivative, without a graph."""
    inside, excess, slope = _inside(cosine)
    descent = torch.ones_like(cosine).addcmul_(inside, inside, value=-1).rsqrt_()
    return torch.acos(inside).sub_(excess, alpha=slope), descent


def _inside(cosine: Tensor) -> tuple[Tensor, Tensor, float]:
    """The cosine clamped to where acos has a finite derivative, what is beyond, and that slope.

    A clamped cosine alone would have derivative 0 there. (clamp itself has it at its bounds too,
    since torch 2.15.)
    """
    largest = 1 - 4 * torch.finfo(cosine.dtype).eps
    excess = F.softshrink(cosine, largest)
    return cosine - excess, excess, 1 / math.sqrt(1 - largest**2)

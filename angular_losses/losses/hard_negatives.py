"""Losses that reweight the other classes: each adds its rule for the negatives to a margin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import collectives, margins, negatives, validation
from ..engine import modes
from ..engine.nearest import nearest, sums_above
from ..geometry import working_dtype
from ..margins import KnownDescent
from ..negatives import KnownSlope, NegativeFunction
from .base import LossOptions, MarginLoss, Target

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CurricularFaceLoss(MarginLoss):
    r"""CurricularFace: ArcFace with hard negatives, weighted more as the target cosines increase.

    .. math:: f = s\cos(\theta_y + m), \qquad z_j = s\,c_j\,(t + c_j)
        \text{ where } c_j > \cos(\theta_y + m), \text{ else } s\,c_j

    t is the running mean of the target cosines: 0 at first, and updated by each training step
    before it is used.

    Args:
        margin: m in radians, in [0, pi).
        momentum: The share of the new batch in t. The paper prints 0.99; its author says that the
            code, with 0.01, is right. TFace has 0.1.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Example:
        >>> loss = CurricularFaceLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Huang et al., "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face
        Recognition", CVPR 2020, arXiv:2004.00288.
    """

    t: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        scale: float = 64.0,
        *,
        momentum: float = 0.01,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = validation.angular_margin("margin", margin)
        self.momentum = validation.share("momentum", momentum)
        self.register_statistic("t", 0.0)

    def observe(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        """Move t towards the mean cosine of the batch's targets."""
        theta = self.target_angles(embeddings, labels)
        found = collectives.mean(theta.cos(), weights).to(self.t.dtype)
        self.t.lerp_(torch.where(found.isnan(), self.t, found), self.momentum)

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """cos(theta + the share of the margin in force), unrolled."""
        return margins.Combined(m2=self.margin)

    def negatives_function(self, embeddings: Tensor, labels: Tensor) -> NegativeFunction:
        """The hard negatives weighted by their cosines and t."""
        t = self.t
        return lambda cosine, target: negatives.curricularface(cosine, target, t)


class MVSoftmaxLoss(MarginLoss):
    r"""MV-Softmax: ArcFace or CosFace with the mis-classified (hard) negatives emphasised.

    .. math:: z_j = s\,(c_j + t\,(c_j + 1)) \text{ (adaptive) or } s\,(c_j + t) \text{ (fixed)}
        \quad \text{where } s\,c_j > f, \text{ else } s\,c_j

    Args:
        margin: m: radians in [0, pi) for "arc", in [0, 2) for "cos".
        kind: "arc", f = s cos(theta + m), or "cos", f = s (cos(theta) - m), the paper's AM.
        adaptive: Whether the emphasis grows with the cosine.
        t: The emphasis t >= 0. The defaults are those of the authors' code, which leaves the margin
            out where the target's cosine is below 0; FaceX-Zoo's ``mv_weight`` 1.12 is t = 0.12.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Example:
        >>> loss = MVSoftmaxLoss(num_classes=10, embedding_size=64, kind="cos", adaptive=False)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Wang et al., "Mis-classified Vector Guided Softmax Loss for Face Recognition",
        AAAI 2020, arXiv:1912.00833.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.35,
        scale: float = 32.0,
        *,
        kind: str = "arc",
        adaptive: bool = True,
        t: float = 0.2,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        validation.choice("kind", kind, tuple(margins.ADDITIVE))
        self.kind, self.adaptive = kind, adaptive
        self.margin = margins.ADDITIVE[kind]("margin", margin)
        self.t = validation.number("t", t, 0.0)

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """The margin of the kind, with its share in force."""
        return margins.additive(self.kind, self.margin)

    def negatives_function(self, embeddings: Tensor, labels: Tensor) -> NegativeFunction:
        """The hard negatives emphasised."""
        t, adaptive = self.t, self.adaptive
        return lambda cosine, target: negatives.mv_softmax(cosine, target, t, adaptive=adaptive)


class NPCFaceLoss(MarginLoss):
    r"""NPCFace: hard negatives are emphasised, and enlarge the margin of their row's target.

    .. math:: f = s\cos(\theta_y + m + m_1\,\bar c), \qquad
        z_j = s\,(t\,c_j + a) \text{ where hard, else } s\,c_j

    with hard where c_j > cos(theta_y + mask_margin), and the mean cosine of a row's hard negatives,
    0 where there is none, taken as a constant.

    Args:
        margin: m, the paper's m0, in radians, in [0, pi).
        m1: How much the hard negatives add to the margin.
        t: The factor of hard negatives.
        a: The offset of hard negatives.
        mask_margin: The margin, in radians, that decides what is hard. All numbers are those of
            FaceX-Zoo, by one of the paper's authors; the paper's could not be checked.
        beyond: What happens past theta + m = pi; see :mod:`angular_losses.margins`. FaceX-Zoo has
            "easy": no margin where the target's cosine is 0 or less.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.
            Each forward pass takes one more matrix product.

    Example:
        >>> loss = NPCFaceLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Zeng et al., "NPCFace: Negative-Positive Collaborative Training for Large-scale Face
        Recognition", 2020, arXiv:2007.10172.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.4,
        scale: float = 64.0,
        *,
        m1: float = 0.2,
        t: float = 1.1,
        a: float = 0.2,
        mask_margin: float = 0.5,
        beyond: str = "decreasing",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = validation.angular_margin("margin", margin)
        self.m1 = validation.number("m1", m1, 0.0)
        self.t = validation.positive("t", t)
        self.a = validation.number("a", a, 0.0)
        self.mask_margin = validation.angular_margin("mask_margin", mask_margin)
        validation.choice("beyond", beyond, margins.ARCFACE_BEYOND)
        self.beyond = beyond

    @torch.no_grad()
    def _threshold(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The cosine above which a negative is hard, (N,)."""
        theta = self.target_angles(embeddings, labels)
        return torch.cos(theta + self.mask_margin).detach()  # from forward-mode derivatives too

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """ArcFace with the margin of each row, enlarged by its hard negatives."""
        threshold = self._threshold(embeddings, labels)
        weight, here = self._centres_here(labels)
        sums = sums_above(embeddings, weight, here, threshold, sub_centers=self.sub_centers)
        total, count = self.shard.total(sums).detach()
        margin = self.margin + self.m1 * total / count.clamp(min=1)
        return margins.Combined(m2=margin, beyond=self.beyond)

    def negatives_function(self, embeddings: Tensor, labels: Tensor) -> NegativeFunction:
        """The hard negatives scaled and shifted."""
        dtype = working_dtype(embeddings, self.weight)
        threshold = self._threshold(embeddings, labels).to(dtype)
        t, a = self.t, self.a
        return lambda cosine, target: negatives.npcface(cosine, threshold, t, a)


class CircleLoss(MarginLoss):
    r"""Circle loss with class labels: each cosine is weighted by how far it is from its optimum.

    .. math:: f = \gamma\,[1 + m - c_y]_+\,(c_y - (1 - m)), \qquad
        z_j = \gamma\,[c_j + m]_+\,(c_j - m)

    with the brackets taken as constants by the gradient, as in the paper.

    Args:
        margin: The relaxation m in (0, 1).
        scale: gamma > 0.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too;
            no ``schedule``: the weights change with the cosines.

    Example:
        >>> loss = CircleLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization",
        CVPR 2020, arXiv:2002.10857, eq. (5)-(8); the defaults are FaceX-Zoo's.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.25,
        scale: float = 256.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = validation.number("margin", margin, 0.0, 1.0)
        if self.schedule is not None:
            raise ValueError(f"schedule: expected None for the circle loss, got {self.schedule!r}")

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """The cosine less its optimum, weighted."""
        cosine = torch.cos(theta)
        return self._weight(cosine.detach()) * (cosine - (1 - self.margin))

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """The same with its descent."""
        return KnownDescent(
            self.target,
            lambda theta, share: (
                self.target(theta, share),
                self._weight(torch.cos(theta)) * torch.sin(theta),
            ),
        )

    def _weight(self, cosine: Tensor) -> Tensor:
        """How far the targets are from their optimum."""
        return (1 + self.margin - cosine).clamp(min=0)

    def negatives_function(self, embeddings: Tensor, labels: Tensor) -> NegativeFunction:
        """The cosines less their optimum, weighted."""
        margin = self.margin
        return KnownSlope(
            lambda cosine: negatives.circle(cosine, margin),
            lambda cosine: negatives.circle_with_slope(cosine, margin),
        )


class InterTopKLoss(MarginLoss):
    r"""Inter-top-k: ArcFace or CosFace with a penalty on the k nearest other classes.

    .. math:: z_j = s\cos(\theta_j - m') \text{ ("arc") or } s\,(c_j + m') \text{ ("cos")}
        \quad \text{for the k largest } c_j, \text{ else } s\,c_j

    With "arc" the angles of the k are computed from their cosines: in float32 the gradient has an
    error of 1 % at 1e-3 rad from a wrong centre, 6 % at most (:mod:`angular_losses.negatives`).

    Args:
        num_classes: The number of classes, C > k.
        margin: m: radians in [0, pi) for "arc", in [0, 2) for "cos".
        k: How many classes are penalised; classes that tie with the last are too.
        penalty: m': radians for "arc". The defaults are WeSpeaker's, which has 3 sub-centres.
        kind: "arc" or "cos".
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.
            Each forward pass takes one more matrix product.

    Example:
        >>> loss = InterTopKLoss(num_classes=10, embedding_size=64, sub_centers=3)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Zhao et al., "Multi-query Multi-head Attention Pooling and Inter-topK Penalty for Speaker
        Verification", ICASSP 2022, arXiv:2110.05042.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.2,
        scale: float = 32.0,
        *,
        k: int = 5,
        penalty: float = 0.06,
        kind: str = "arc",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        validation.choice("kind", kind, tuple(margins.ADDITIVE))
        self.kind = kind
        self.margin = margins.ADDITIVE[kind]("margin", margin)
        self.nearest_penalty = margins.ADDITIVE[kind]("penalty", penalty)
        self.k = validation.positive_integer("k", k)
        if k >= num_classes:
            raise ValueError(f"k: expected fewer than num_classes {num_classes}, got {k}")

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """The margin of the kind, with its share in force."""
        return margins.additive(self.kind, self.margin)

    def negatives_function(self, embeddings: Tensor, labels: Tensor) -> NegativeFunction:
        """The k nearest with the penalty."""
        weight, here = self._centres_here(labels)
        num_centres = self.shard.most_centres(weight, self.sub_centers)
        found = self.shard.nearest(
            nearest(
                embeddings,
                weight,
                here,
                self.k,
                sub_centers=self.sub_centers,
                product_dtype=modes.product_dtype(embeddings, weight, num_centres, self.mode),
            )
        )
        # The engine's sums may round differently.
        threshold = found[:, -1] - 8 * torch.finfo(found.dtype).eps
        m, angular = self.nearest_penalty, self.kind == "arc"
        return lambda cosine, target: negatives.nearest_penalty(
            cosine, threshold, m, angular=angular
        )

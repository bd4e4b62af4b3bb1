"""Losses whose target logit is a fixed function of the target angle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import margins, negatives, validation
from ..negatives import NegativeFunction
from .base import LossOptions, MarginLoss, Target

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NormalizedSoftmaxLoss(MarginLoss):
    r"""Softmax on scaled cosines, no margin (NormFace, "Modified SoftMax").

    .. math:: L_i = -\log\frac{e^{s\cos\theta_{y_i}}}{\sum_j e^{s\cos\theta_j}}

    Args:
        scale: The scale s > 0; the default is the paper's temperature 0.05 as 1 / 0.05.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Example:
        >>> loss = NormalizedSoftmaxLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Wang et al., "NormFace", ACM MM 2017, arXiv:1704.06369;
        Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning",
        BMVC 2019, arXiv:1811.12649.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 20.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """cos(theta)."""
        return margins.Combined()


class CosFaceLoss(MarginLoss):
    r"""CosFace (AM-Softmax): the margin subtracted from the target's cosine.

    .. math:: f = s\,(\cos\theta_{y} - m)

    Args:
        margin: m in [0, 2), or one for each class (C,), such as :func:`ldam_margins`.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Example:
        >>> loss = CosFaceLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Wang et al., "CosFace", CVPR 2018, arXiv:1801.09414, eq. (4).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor | Sequence[float] = 0.35,
        scale: float = 64.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = self._of_classes("margin", margin, validation.cosine_margin)

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """cos(theta) less the share of the margin in force."""
        return margins.Combined(m3=margins.of_rows(self.margin, labels))


class ArcFaceLoss(MarginLoss):
    r"""ArcFace (AAM-Softmax): the margin added to the target's angle.

    .. math:: f = s\cos(\theta_{y} + m)

    Args:
        margin: m in radians, in [0, pi), or one for each class (C,), such as
            :func:`power_law_margins`. One in degrees is an error.
        beyond: What happens past theta + m = pi; see :mod:`angular_losses.margins`.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Example:
        >>> loss = ArcFaceLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Deng et al., "ArcFace", CVPR 2019, arXiv:1801.07698, eq. (3).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor | Sequence[float] = 0.5,
        scale: float = 64.0,
        *,
        beyond: str = "decreasing",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        validation.choice("beyond", beyond, margins.ARCFACE_BEYOND)
        self.margin = self._of_classes("margin", margin, validation.angular_margin)
        self.beyond = beyond

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """cos(theta + the share of the margin in force), unrolled."""
        return margins.Combined(m2=margins.of_rows(self.margin, labels), beyond=self.beyond)


class SubCenterArcFaceLoss(ArcFaceLoss):
    r"""Sub-centre ArcFace: ArcFace with K centres a class, for noisy labels.

    .. math:: f = s\cos(\theta_{y} + m), \qquad \theta_j = \min_k \angle(x, w_{jk})

    The clean images of a class concentrate at one of its centres and the mislabelled ones at
    others. Any other loss takes ``sub_centers`` too.

    Args:
        sub_centers: The number of centres of a class, K.
        **options: See :class:`ArcFaceLoss`, for all other arguments, shapes and errors too.

    Example:
        >>> loss = SubCenterArcFaceLoss(num_classes=10, embedding_size=64)
        >>> loss.weight.shape
        torch.Size([30, 64])

    References:
        Deng et al., "Sub-center ArcFace: Boosting Face Recognition by Large-Scale Noisy Web
        Faces", ECCV 2020.
    """

    def __init__(  # type: ignore[misc]  # one of the options, with another default
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor | Sequence[float] = 0.5,
        scale: float = 64.0,
        *,
        beyond: str = "decreasing",
        sub_centers: int = 3,
        **options: Unpack[LossOptions],
    ) -> None:
        options["sub_centers"] = sub_centers
        super().__init__(num_classes, embedding_size, margin, scale, beyond=beyond, **options)


class LiArcFaceLoss(MarginLoss):
    r"""Li-ArcFace (AirFace): logits linear in the angle, the margin added to the target's.

    .. math:: f = s\,\frac{\pi - 2(\theta_y + m)}{\pi}, \qquad
        z_j = s\,\frac{\pi - 2\theta_j}{\pi}

    The other classes' angles are computed from their cosines. In float32 the gradient of an
    embedding that is 1e-3 rad from a wrong centre then has an error of 14 % at worst; nearer, the
    part of that class is lost, 71 % (:mod:`angular_losses.negatives`). In float64 it is not.

    Args:
        margin: m in radians, in [0, pi). The paper's value could not be checked; code that
            follows it has 0.40, 0.42 and 0.45.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Example:
        >>> loss = LiArcFaceLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Li et al., "AirFace: Lightweight and Efficient Model for Face Recognition", ICCV
        workshops 2019, arXiv:1907.12256.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.45,
        scale: float = 64.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = validation.angular_margin("margin", margin)

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """The line through the angle and the share of the margin in force."""
        return margins.linear_angle(theta, share * self.margin)

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """The same with its descent, a constant."""
        return margins.KnownDescent(
            self.target,
            lambda theta, share: (self.target(theta, share), torch.full_like(theta, 2 / math.pi)),
        )

    def negatives_function(self, embeddings: Tensor, labels: Tensor) -> NegativeFunction:
        """The same line, without a margin."""
        return negatives.LINEAR_ANGLE


class X2SoftmaxLoss(MarginLoss):
    r"""X2-Softmax: the target's logit is a parabola in its angle, so the margin grows with it.

    .. math:: f = s\,(a\,(\theta_y - h)^2 + k)

    Args:
        a: The curvature, below 0. The paper's a, h and k could not be checked; the defaults are
            those of a training command in the authors' code.
        h: The angle of the vertex in radians. Above 0 the logit increases from theta = 0 to h.
        k: The value at the vertex.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.
            The authors' code has the gradient of the cosine: ``gradient="detached"``.

    Example:
        >>> loss = X2SoftmaxLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Xu et al., "X2-Softmax: Margin adaptive loss function for face recognition", Expert Systems
        with Applications 2024, arXiv:2312.05281.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        a: float = -0.9,
        h: float = 0.0,
        k: float = 0.65,
        scale: float = 64.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.a = validation.negative("a", a)
        self.h = validation.finite("h", h)
        self.k = validation.finite("k", k)

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """From the cosine to the parabola, by the share of the margin in force."""
        cosine = torch.cos(theta)
        return cosine + share * (margins.x2_softmax(theta, self.a, self.h, self.k) - cosine)

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """The same with its descent."""

        def with_descent(theta: Tensor, share: float | Tensor) -> tuple[Tensor, Tensor]:
            sine = torch.sin(theta)
            descent = sine - share * (2 * self.a * (theta - self.h) + sine)
            return self.target(theta, share), descent

        return margins.KnownDescent(self.target, with_descent)


class CombinedMarginLoss(MarginLoss):
    r"""The combined margin cos(m1 theta + m2) - m3.

    .. math:: f = s\,(\cos(m_1\theta_{y} + m_2) - m_3)

    Args:
        m1: Multiplicative margin, above 0.
        m2: Additive margin on the angle in radians, in [0, pi).
        m3: Additive margin on the cosine, in [0, 2).
        beyond: See :func:`angular_losses.combined`.
        interclass_filtering_threshold: In [0, 1]: other classes with a larger cosine get the logit
            0 (:func:`angular_losses.negatives.interclass_filter`), as in insightface; 0: none do.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Example:
        >>> loss = CombinedMarginLoss(num_classes=10, embedding_size=64, m1=1.0, m2=0.3, m3=0.2)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Deng et al., "ArcFace", CVPR 2019, arXiv:1801.07698, eq. (4); the defaults are its CM1.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        m1: float = 1.0,
        m2: float = 0.3,
        m3: float = 0.2,
        scale: float = 64.0,
        *,
        beyond: str = "decreasing",
        interclass_filtering_threshold: float = 0.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        validation.choice("beyond", beyond, margins.SPHEREFACE_BEYOND)
        self.m1 = validation.positive("m1", m1)
        self.m2 = validation.angular_margin("m2", m2)
        self.m3 = validation.cosine_margin("m3", m3)
        self.beyond = beyond
        self.interclass_filtering_threshold = validation.share(
            "interclass_filtering_threshold", interclass_filtering_threshold
        )

    def negatives_function(self, embeddings: Tensor, labels: Tensor) -> NegativeFunction | None:
        """What filters the other classes, if there is a threshold."""
        threshold = self.interclass_filtering_threshold
        if threshold == 0:
            return None
        return lambda cosine, target: negatives.interclass_filter(cosine, target, threshold)

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """The combined margin with the share of each part that is in force."""
        return margins.Combined(self.m1, self.m2, self.m3, self.beyond)

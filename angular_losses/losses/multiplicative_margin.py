"""Losses with a margin that multiplies the angle: SphereFace and its variants."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import margins, negatives, validation
from ..geometry import lengths
from ..margins import MarginFunction
from ..negatives import KnownSlope, NegativeFunction
from .base import LossOptions, MarginLoss, Target

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SphereFaceLoss(MarginLoss):
    r"""SphereFace (A-Softmax) with normalised embeddings: the margin multiplies the target's angle.

    With a scale this is the form of HSADML, eq. (2)-(3), and of OpenSphere's hard feature
    normalisation. The first SphereFace kept each embedding's own length instead: ``scale=None``.

    .. math:: f = s\,\psi(\theta_{y}) \text{ or } |x|\,\psi(\theta_{y}), \qquad
        \psi(\theta) = (-1)^k \cos(m\theta) - 2k, \quad k = \lfloor m\theta / \pi \rfloor

    Args:
        margin: m >= 1, any real number; 1 is no margin.
        scale: The scale s > 0, or None for the length of each embedding.
        beyond: See :func:`angular_losses.sphereface`.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too. The
            paper trains with the margin annealed: ``schedule=LambdaAnnealing()``.

    Example:
        >>> loss = SphereFaceLoss(num_classes=10, embedding_size=64, margin=4)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Liu et al., "SphereFace", CVPR 2017, arXiv:1704.08063, eq. (7).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 4,
        scale: float | None = 30.0,
        *,
        beyond: str = "decreasing",
        **options: Unpack[LossOptions],
    ) -> None:
        self.keeps_lengths = scale is None
        self._scale_decides, self._looks_at_lengths = not self.keeps_lengths, self.keeps_lengths
        super().__init__(num_classes, embedding_size, 1.0 if scale is None else scale, **options)
        validation.choice("beyond", beyond, margins.SPHEREFACE_BEYOND)
        self.margin = validation.multiplicative_margin("margin", margin)
        self.beyond = beyond

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """psi(theta) of the share of the margin in force."""
        return margins.Combined(m1=self.margin, beyond=self.beyond)

    def row_scale(self, embeddings: Tensor) -> float | Tensor:
        """The scale, or the lengths of the embeddings (N,)."""
        return lengths(embeddings) if self.keeps_lengths else self.scale


class SphereFaceRLoss(MarginLoss):
    r"""SphereFace-R: a multiplicative margin, with hard or soft feature normalisation.

    .. math:: f = r\,\varphi(\theta_y), \quad z_j = r\,\eta(\theta_j), \qquad
        \text{v1: } \varphi = \cos(\min(m\theta, \pi)),\ \eta = \cos\theta, \qquad
        \text{v2: } \varphi = \cos\theta,\ \eta = \cos(\theta / m)

    Hard normalisation has r = s; soft has r = \|x\| and adds t \| \|x\| - s \| to the loss of each
    row. OpenSphere, the authors' code, has "v0" by default, detaches the margin
    (``gradient="detached"``) and multiplies the cross-entropy alone by lw / s: its t = 0.01, with
    lw 50 and s 30, is 0.006 here.

    Args:
        margin: m >= 1.
        scale: s > 0, the scale ("hard") or the length that embeddings are drawn to ("soft").
        kind: "v1", "v2", or "v0": SphereFace's psi.
        normalization: "hard" or "soft".
        t: The weight of the soft normalisation. Whether the paper's power of the difference is 1,
            as in OpenSphere, could not be checked.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too; for
            "v2" no ``schedule``.

    Example:
        >>> loss = SphereFaceRLoss(num_classes=10, embedding_size=64, normalization="soft")
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Liu et al., "SphereFace Revived: Unifying Hyperspherical Face Recognition", TPAMI 2022,
        arXiv:2109.05565.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 1.5,
        scale: float = 30.0,
        *,
        kind: str = "v1",
        normalization: str = "hard",
        t: float = 0.01,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        validation.choice("kind", kind, ("v0", "v1", "v2"))
        validation.choice("normalization", normalization, ("hard", "soft"))
        self.margin = validation.multiplicative_margin("margin", margin)
        self.kind, self.normalization = kind, normalization
        self._looks_at_lengths = normalization == "soft"
        if kind == "v2" and self.schedule is not None:
            raise ValueError(
                f"schedule: expected None for v2, whose margin is not the target's, "
                f"got {self.schedule!r}"
            )
        self.t = validation.number("t", t, 0.0)

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """The phi of the kind."""
        if self.kind == "v2":
            return margins.Combined()
        beyond = "decreasing" if self.kind == "v0" else "clamped"
        return margins.Combined(m1=self.margin, beyond=beyond)

    def negatives_function(self, embeddings: Tensor, labels: Tensor) -> NegativeFunction | None:
        """The eta of "v2"."""
        if self.kind != "v2":
            return None
        margin, is_detached = self.margin, self.gradient == "detached"

        def eta(cosine: Tensor) -> Tensor:
            value = negatives.divided_angle(cosine, margin)
            return cosine + (value - cosine).detach() if is_detached else value

        def with_slope(cosine: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = negatives.divided_angle_with_slope(cosine, margin)
            return value, torch.ones_like(slope) if is_detached else slope

        return KnownSlope(eta, with_slope)

    def row_scale(self, embeddings: Tensor) -> float | Tensor:
        """The scale, or the lengths of the embeddings (N,)."""
        return lengths(embeddings) if self.normalization == "soft" else self.scale

    def penalty(self, embeddings: Tensor) -> Tensor | None:
        """How far the lengths are from the scale, times t."""
        if self.normalization == "hard":
            return None
        return self.t * (lengths(embeddings) - self.scale).abs()


class LSoftmaxLoss(MarginLoss):
    r"""L-Softmax: SphereFace's psi with the lengths of embedding and centre kept.

    .. math:: f = |w_y|\,|x|\,\psi(\theta_y), \qquad z_j = w_j \cdot x

    Args:
        margin: m >= 1, any real number; the paper has 2, 3 and 4.
        scale: A factor of all logits; the paper has none.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too; no
            ``sub_centers``. The paper anneals: ``schedule=LambdaAnnealing()``.

    Example:
        >>> loss = LSoftmaxLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Liu et al., "Large-Margin Softmax Loss for Convolutional Neural Networks", ICML 2016,
        arXiv:1612.02295, eq. (6).
    """

    normalize_weight = False
    _scale_decides = False
    _looks_at_lengths = True

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 4,
        scale: float = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = validation.multiplicative_margin("margin", margin)
        if self.sub_centers > 1:
            raise ValueError(f"sub_centers: expected 1 for L-Softmax, got {self.sub_centers}")

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """The length of the target's centre times psi(theta)."""
        length = self.shard.of_targets(lengths, *self._centres_here(labels))

        def target(theta: Tensor, share: float | Tensor) -> Tensor:
            return length * margins.sphereface(theta, 1 + share * (self.margin - 1))

        return target

    def margin_function(self, embeddings: Tensor, labels: Tensor) -> MarginFunction:
        """The margin now in force; detached, it has the gradient of length times cosine."""
        margin = super().margin_function(embeddings, labels)
        if self.gradient == "exact":
            return margin
        target = self.row_target(embeddings, labels)
        return margins.with_gradient_of(lambda theta: target(theta, 0.0), margin)

    def row_scale(self, embeddings: Tensor) -> Tensor:
        """The scale times the lengths of the embeddings (N,)."""
        return self.scale * lengths(embeddings)

"""Losses whose margin or scale depends on the embeddings, or is drawn at random."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import collectives, margins, validation
from ..engine import modes
from ..engine.batch import of_rows
from ..engine.chunks import Others, Rule
from ..geometry import lengths
from .base import LossOptions, MarginLoss, Target

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AdaCosLoss(MarginLoss):
    r"""AdaCos: no margin, and a scale that needs no tuning.

    .. math:: s_0 = \sqrt 2\,\log(C - 1), \qquad
        s \leftarrow \frac{\log \frac1N \sum_i \sum_{j \ne y_i} e^{s\cos\theta_{ij}}}
        {\cos\min(\pi/4,\ \mathrm{median}_i\,\theta_{i y_i})}

    Fixed, the scale stays s0. Dynamic, each training step updates it before use;
    across processes the median is the mean of theirs. The scale is kept at 1 or more.

    Args:
        num_classes: The number of classes, C >= 3.
        dynamic: Whether each batch updates the scale, which takes one more matrix product.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Attributes:
        scale: The scale, a buffer.

    Example:
        >>> AdaCosLoss(num_classes=1001, embedding_size=64, dynamic=False).scale
        tensor(9.7690)

    References:
        Zhang et al., "AdaCos: Adaptively Scaling Cosine Logits for Effectively Learning Deep Face
        Representations", CVPR 2019, arXiv:1905.00292.
    """

    scale: Tensor
    _scale_decides = False  # the base class is given 1.0, which is replaced

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        dynamic: bool = True,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, 1.0, **options)
        if num_classes < 3:
            raise ValueError(f"num_classes: expected at least 3 for AdaCos, got {num_classes}")
        self.dynamic = dynamic
        del self.scale
        self.register_statistic("scale", _fixed_scale(num_classes))

    def _extend_buffers(self, num_new: int) -> None:
        """Set a fixed scale to that of all classes; training steps adapt a dynamic one."""
        super()._extend_buffers(num_new)
        self._first_values["scale"] = _fixed_scale(self.num_classes + num_new)
        if not self.dynamic:
            self.scale.fill_(self._first_values["scale"])

    def observe(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        """Make the scale that of this batch."""
        if not self.dynamic:
            return
        num_classes, sub_centers = self.num_classes, self.sub_centers
        batch = of_rows(embeddings, self.weight, labels, None, num_classes, sub_centers, self.shard)
        rule = Rule(sub_centers=sub_centers)
        chosen = modes.choose(batch, self.mode, self.memory_budget, rule)
        parts = modes.parts(batch, chosen, Others(rule), scale=self.scale)
        each = torch.ones_like(parts.theta) if weights is None else weights.to(parts.theta.dtype)
        angle, has_any = _median(parts.theta, each)
        # The largest is taken out of the exponentials, the same one in every process.
        exponents = parts.negatives.where(each > 0, -torch.inf)
        largest = collectives.largest(F.pad(exponents, (0, 1), value=-torch.inf).amax())
        sums = collectives.total(
            torch.stack(
                [
                    ((exponents - largest).exp() * each).where(each > 0, 0).sum(),
                    each.sum(),
                    angle.where(has_any, 0),
                    has_any.to(angle.dtype),
                ]
            )
        )
        log_mean = largest + (sums[0] / sums[1]).log()
        found = log_mean / (sums[2] / sums[3]).clamp(max=math.pi / 4).cos()
        found = found.clamp(min=1.0).to(self.scale.dtype)
        self.scale.copy_(torch.where(found.isfinite(), found, self.scale))

    def row_scale(self, embeddings: Tensor) -> Tensor:
        """The current scale."""
        return self.scale

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """cos(theta)."""
        return margins.Combined()


class AdaFaceLoss(MarginLoss):
    r"""AdaFace: the margin depends on the image's quality, estimated by the embedding's length.

    .. math:: f = s\,\bigl(\cos(\theta_y - m\hat z) - m\hat z - m\bigr), \qquad
        \hat z = \mathrm{clip}\Bigl(\frac{|x| - \mu}{\sigma / h},\ -1,\ 1\Bigr)

    The gradient treats the quality as a constant. mu and sigma are running statistics of the
    lengths, of all processes, updated by each training step before they are used. For theta below
    m z-hat the cosine is unrolled, so that it decreases there too, as in :func:`arcface` past pi.

    Args:
        embedding_size: The length of an embedding, d. Do not normalise embeddings before.
        margin: m in radians, in [0, pi / 2).
        h: The concentration h > 0.
        momentum: The share of the new batch in mu and sigma: 0.01 as in the authors' README. Their
            code's default is 1.0, and the paper prints 0.99.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Attributes:
        mean: mu, a buffer, 20 at first, as in the authors' code.
        deviation: sigma, a buffer, 100 at first. Like that code it is increased by 1e-3 where it
            divides, and lengths are clipped to [1e-3, 100].

    Example:
        >>> loss = AdaFaceLoss(num_classes=10, embedding_size=64)
        >>> loss(20 * torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Kim et al., "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022,
        arXiv:2204.00964, eq. (18), whose brackets its author corrected.
    """

    mean: Tensor
    deviation: Tensor
    _looks_at_lengths = True

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.4,
        scale: float = 64.0,
        *,
        h: float = 0.333,
        momentum: float = 0.01,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = validation.number("margin", margin, 0.0, math.pi / 2, "radians")
        self.h = validation.positive("h", h)
        self.momentum = validation.share("momentum", momentum)
        self.register_statistic("mean", 20.0)
        self.register_statistic("deviation", 100.0)

    def observe(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        """Move the statistics towards those of the batch."""
        found = collectives.mean_and_deviation(_clipped(embeddings), weights)
        for running, new in zip((self.mean, self.deviation), found, strict=True):
            new = new.to(running.dtype)  # not finite where the batch has too few rows
            running.lerp_(torch.where(new.isfinite(), new, running), self.momentum)

    def quality(self, embeddings: Tensor) -> Tensor:
        """The quality z-hat of each row (N,), in [-1, 1]."""
        length = _clipped(embeddings.detach())
        deviation = self.deviation.to(length.dtype) + 1e-3
        return ((length - self.mean) / deviation * self.h).clamp(-1, 1)

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """The margin of each row, from its quality."""
        turned = self.margin * self.quality(embeddings)
        return margins.Combined(m2=-turned, m3=turned + self.margin)


class MagFaceLoss(MarginLoss):
    r"""MagFace: the margin increases with the embedding's length, a learned measure of quality.

    .. math:: f = s\cos(\theta_y + m(a)), \quad
        m(a) = l_m + \frac{u_m - l_m}{u_a - l_a}(a - l_a), \quad
        a = \mathrm{clip}(|x|,\ l_a,\ u_a)

    To the loss of each row is added lambda_g (1 / a + a / u_a^2).

    Args:
        embedding_size: The length of an embedding, d. Do not normalise embeddings before.
        length_bounds: (l_a, u_a), the bounds of the length.
        margin_bounds: (l_m, u_m), the margins at those, in radians, in [0, pi).
        lambda_g: The weight of the regulariser, 35 as in the authors' runs (20 in their code). For
            a single optimum it has to be at least s (u_m - l_m) / (u_a - l_a) u_a^2 l_a^2 /
            (u_a^2 - l_a^2): 22.6 with the defaults.
        beyond: What happens past theta + m = pi; see :mod:`angular_losses.margins`. The authors'
            code has "easy" by default.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Example:
        >>> loss = MagFaceLoss(num_classes=10, embedding_size=64)
        >>> loss(20 * torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Meng et al., "MagFace: A Universal Representation for Face Recognition and Quality
        Assessment", CVPR 2021, arXiv:2103.06627.
    """

    _looks_at_lengths = True

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float = 64.0,
        *,
        length_bounds: tuple[float, float] = (10.0, 110.0),
        margin_bounds: tuple[float, float] = (0.45, 0.8),
        lambda_g: float = 35.0,
        beyond: str = "decreasing",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.length_bounds = validation.bounds("length_bounds", length_bounds, validation.positive)
        self.margin_bounds = validation.bounds(
            "margin_bounds", margin_bounds, validation.angular_margin
        )
        self.lambda_g = validation.number("lambda_g", lambda_g, 0.0)
        validation.choice("beyond", beyond, margins.ARCFACE_BEYOND)
        self.beyond = beyond

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """ArcFace with the margin of each row's length."""
        (shortest, longest), (least, most) = self.length_bounds, self.margin_bounds
        length = lengths(embeddings).clamp(shortest, longest)
        margin = least + (most - least) / (longest - shortest) * (length - shortest)
        return margins.Combined(m2=margin, beyond=self.beyond)

    def penalty(self, embeddings: Tensor) -> Tensor:
        """lambda_g times g of the lengths."""
        length = lengths(embeddings).clamp(*self.length_bounds)
        return self.lambda_g * (1 / length + length / self.length_bounds[1] ** 2)


class ElasticFaceLoss(MarginLoss):
    r"""ElasticFace: ArcFace or CosFace with a margin drawn for each row, at each forward pass.

    .. math:: f = s\cos(\theta_y + \epsilon) \text{ ("arc") or } s\,(\cos\theta_y - \epsilon)
        \text{ ("cos")}, \qquad \epsilon \sim \mathcal N(m, \sigma)

    With ``plus`` the rows furthest from their centres get the largest draws. (The authors' code
    applies the inverse of that order.) In eval mode the margin is m.

    Args:
        margin: m: radians in [0, pi) for "arc", by default 0.5; in [0, 2) for "cos", 0.35.
        kind: "arc" or "cos".
        plus: Whether draws are assigned by difficulty (ElasticFace+).
        deviation: sigma >= 0; by default that of the authors' settings: 0.05, but with ``plus``
            0.0175 for "arc" and 0.02 for "cos".
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Example:
        >>> loss = ElasticFaceLoss(num_classes=10, embedding_size=64, plus=True)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Boutros et al., "ElasticFace: Elastic Margin Loss for Deep Face Recognition",
        CVPR workshops 2022, arXiv:2109.09416.
    """

    is_random = True

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | None = None,
        scale: float = 64.0,
        *,
        kind: str = "arc",
        plus: bool = False,
        deviation: float | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        validation.choice("kind", kind, tuple(margins.ADDITIVE))
        if margin is None:
            margin = {"arc": 0.5, "cos": 0.35}[kind]
        if deviation is None:
            deviation = {"arc": 0.0175, "cos": 0.02}[kind] if plus else 0.05
        self.kind, self.plus = kind, plus
        self.margin = margins.ADDITIVE[kind]("margin", margin)
        self.deviation = validation.number("deviation", deviation, 0.0)

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """The margin of the kind, in training mode drawn anew for each row."""
        if not self.training:
            return margins.additive(self.kind, self.margin)
        drawn = torch.randn(len(labels), device=labels.device) * self.deviation + self.margin
        if not self.plus:
            return margins.additive(self.kind, drawn)
        kept = embeddings.detach().any(1)  # ignored rows, which are zero, come last
        ascending = drawn.where(kept, math.inf).sort().values

        def target(theta: Tensor, share: float | Tensor) -> Tensor:
            difficulty = theta.detach().where(kept, math.inf).argsort().argsort()
            of_rows = ascending[difficulty].where(kept, self.margin)
            return margins.additive(self.kind, of_rows)(theta, share)

        return target


def _fixed_scale(num_classes: int) -> float:
    return math.sqrt(2) * math.log(num_classes - 1)


def _median(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The median of values (N,), weighted, the lower of two; and whether any has a weight."""
    ordered, order = values.sort()
    reached = weights.index_select(0, order).cumsum(0)
    # Rows without a weight are not counted; where there is no other, nor any row, it is infinite.
    is_median = (2 * reached >= weights.sum()) & (reached > 0)
    median = F.pad(ordered.where(is_median, torch.inf), (0, 1), value=torch.inf).amin()
    return median, median.isfinite()


def _clipped(embeddings: Tensor) -> Tensor:
    """The lengths, clipped to the range of AdaFace's statistics."""
    return lengths(embeddings).clamp(1e-3, 100.0)

"""Per-class margins, from the number of samples of a class and the spread of its embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import collectives, margins, validation
from ..geometry import directions, lengths, precise_dtype
from .base import LossOptions, MarginLoss, Target

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


# What KappaFace accumulates in an epoch: saved with its state, but not buffers.
_GATHERED = ("direction_sums", "seen")


class KappaFaceLoss(MarginLoss):
    r"""KappaFace: larger margins for classes that are rare or whose embeddings scatter.

    .. math:: m_c = m\,(\gamma\,w^\kappa_c + (1 - \gamma)\,w^n_c), \quad w^\kappa
        = 1 - \sigma\Bigl(T\,\frac{\kappa_c - \bar\kappa}{\mathrm{std}\,\kappa}\Bigr), \quad
        w^n = \frac{1 + \cos(\pi n_c / K)}{2}, \quad
        \kappa = \frac{\bar r\,(d - \bar r^2)}{1 - \bar r^2}

    with n_c the images of a class, K = 1.05 max n as in the authors' code, and r-bar the length of
    the mean direction of its embeddings. Training steps accumulate those directions;
    call :meth:`update_margins` at the end of each epoch. In the first epoch the margin is m. The
    authors keep one direction per image, averaged with its earlier ones; here the directions are
    those of the epoch alone. A class with one image, or with one seen, has no concentration and
    gets the mean one; in the authors' code its r-bar of 1 is an outlier, with which all other
    classes have nearly the same w^kappa. A class of copies of one image has that effect here too.

    Args:
        class_counts: (C,) the number of training images of each class, n, a tensor or any other
            sequence of numbers.
        margin: m in radians, in [0, pi).
        temperature: T >= 0.
        gamma: The share of concentration against rarity, in [0, 1]. The defaults are those of the
            authors' settings; their code's own are 0.62, 0.55 and 0.7.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too.

    Attributes:
        margin: (C,) buffer, the margins in force.

    Example:
        >>> loss = KappaFaceLoss(3, 64, class_counts=torch.tensor([500, 20, 50]))
        >>> _ = loss(torch.randn(60, 64), torch.arange(60) % 3)
        >>> loss.update_margins()
        >>> bool(loss.margin[1] > loss.margin[0])
        True

    References:
        Oinar et al., "KappaFace: Adaptive Additive Angular Margin Loss for Deep Face Recognition",
        IEEE Access 2023, arXiv:2201.07394.
    """

    _class_rows = ("direction_sums",)
    margin: Tensor
    class_counts: Tensor
    direction_sums: Tensor
    seen: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        class_counts: Tensor | Sequence[float],
        margin: float = 0.8,
        scale: float = 64.0,
        *,
        temperature: float = 0.4,
        gamma: float = 0.7,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.base_margin = validation.angular_margin("margin", margin)
        self.temperature = validation.number("temperature", temperature, 0.0)
        self.gamma = validation.share("gamma", gamma)
        counts = validation.class_counts("class_counts", class_counts, num_classes)
        counts = counts.clone().to(self.weight.device)
        self.register_buffer("class_counts", counts)
        self.register_buffer("margin", torch.full_like(counts, margin))
        self.direction_sums = counts.new_zeros(self.num_classes, self.embedding_size)
        self.seen = torch.zeros_like(counts)
        self._first_values = {"margin": self.base_margin, **dict.fromkeys(_GATHERED, 0.0)}

    def observe(self, embeddings: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        """Add the directions of the batch to those of its classes."""
        unit = directions(embeddings, self.direction_sums.dtype)
        each = unit.new_ones(len(labels)) if weights is None else weights.to(unit.dtype)
        self.shard.add_of_rows(self.direction_sums, labels, unit * each[:, None])
        self.seen.index_add_(0, labels, each)

    def _extend_buffers(self, num_new: int) -> None:
        """New classes count as the rarest, with the largest margin, until the counts are set."""
        super()._extend_buffers(num_new)
        rarest = self.class_counts.min().expand(num_new)
        self.class_counts = torch.cat([self.class_counts, rarest])
        self.seen = torch.cat([self.seen, torch.zeros_like(rarest)])
        nothing = self.direction_sums.new_zeros(num_new, self.embedding_size)
        self.direction_sums = self.shard.appended(self.direction_sums, nothing, num_new)

    @contextmanager
    def _gathered_as_buffers(self) -> Iterator[None]:
        """Context in which they are buffers, which DDP would overwrite with those of rank 0."""
        for name in _GATHERED:
            self.register_buffer(name, vars(self).pop(name))
        try:
            yield
        finally:
            vars(self).update({name: self._buffers.pop(name) for name in _GATHERED})

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Store what is accumulated as tensors, float32 at least; transformers sets parameters."""
        if name in _GATHERED and isinstance(value, nn.Parameter):
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        super().__setattr__(name, value)

    def _apply(self, *arguments: Any, **options: Any) -> Self:  # noqa: ANN401
        with self._gathered_as_buffers():
            super()._apply(*arguments, **options)
        return self

    def _save_to_state_dict(self, *arguments: Any) -> None:  # noqa: ANN401
        with self._gathered_as_buffers():
            super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:  # noqa: ANN401
        with self._gathered_as_buffers():
            super()._load_from_state_dict(*arguments)

    @torch.no_grad()
    def update_margins(self) -> None:
        """Set the margins from the embeddings seen since the last call, by all processes."""
        with self.shard.reductions():
            sums, seen = collectives.total(self.direction_sums), collectives.total(self.seen)
        mean = self.shard.joined(lengths(sums)) / seen.clamp(min=1)
        kappa = mean * (self.embedding_size - mean**2) / (1 - mean**2).clamp(min=1e-6)
        scatters = (seen > 1) & (self.class_counts > 1)  # the mean of one direction has length 1
        kappa = kappa.where(scatters, torch.nan)
        centre = kappa.nanmean()
        square = (kappa - centre).square()
        deviation = (square.nansum() / (scatters.sum() - 1).clamp(min=1)).sqrt()
        # A class without a concentration gets the mean one.
        standard = ((kappa - centre) / deviation.clamp(min=1e-12)).nan_to_num(nan=0.0)
        hardness = 1 - torch.sigmoid(self.temperature * standard)
        rarity = (1 + torch.cos(math.pi * self.class_counts / (1.05 * self.class_counts.max()))) / 2
        weight = self.gamma * hardness + (1 - self.gamma) * rarity
        self.margin.copy_(self.base_margin * weight)
        self.direction_sums.zero_()
        self.seen.zero_()

    def row_target(self, embeddings: Tensor, labels: Tensor) -> Target:
        """ArcFace with the margin of each row's class."""
        margin = self.margin.index_select(0, labels)
        return margins.Combined(m2=margin)


def ldam_margins(class_counts: Tensor | Sequence[float], largest: float = 0.5) -> Tensor:
    r"""LDAM's margins: larger for rare classes, :math:`m_c \propto n_c^{-1/4}`.

    For :class:`CosFaceLoss`; LDAM is that loss with these margins and, in its authors' code, scale
    30. They later weight the classes too (deferred re-weighting): ``class_weight``.

    Args:
        class_counts: (C,) the number of training samples of each class, above 0.
        largest: The margin of the rarest class.

    Returns:
        (C,) margins.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a count is below 1, or ``largest`` outside [0, 2).

    Example:
        >>> ldam_margins(torch.tensor([16, 1, 256]))
        tensor([0.2500, 0.5000, 0.1250])

    References:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
        NeurIPS 2019, arXiv:1906.07413.
    """
    validation.cosine_margin("largest", largest)
    powers = _precise_counts(class_counts) ** -0.25
    return (largest * powers / powers.max()).float()


def power_law_margins(
    class_counts: Tensor | Sequence[float],
    bounds: tuple[float, float] = (0.05, 0.5),
    power: float = 0.25,
) -> Tensor:
    r"""Margins that decrease with the size of a class, :math:`m_c = a\,n_c^{-\lambda} + b`.

    For :class:`ArcFaceLoss`, with a and b such that the largest class has the lower bound and the
    smallest the upper. If all classes are of one size, all have the middle of the bounds.

    Args:
        class_counts: (C,) the number of training samples of each class, above 0.
        bounds: The least and the largest margin in radians.
        power: lambda > 0.

    Returns:
        (C,) margins in radians.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a count is below 1, or another argument is out of range.

    Example:
        >>> power_law_margins(torch.tensor([1, 16, 256]))
        tensor([0.5000, 0.2000, 0.0500])

    References:
        Ha et al., "Google Landmark Recognition 2020 Competition Third Place Solution", 2020,
        arXiv:2010.05350.
    """
    low, high = validation.bounds("bounds", bounds, validation.angular_margin)
    exponent = -validation.positive("power", power)
    powers = _precise_counts(class_counts) ** exponent
    span = powers.max() - powers.min()
    place = torch.where(span > 0, (powers - powers.min()) / span, 0.5)
    return (low + (high - low) * place).float()


def _precise_counts(class_counts: Tensor | Sequence[float]) -> Tensor:
    counts = validation.class_counts("class_counts", class_counts)
    return counts.to(precise_dtype(counts.device))

"""Losses: modules that own the class centres; each adds its defaults and its margin, no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from . import checks, margins
from .geometry import cosines
from .planner import MODES
from .schedules import Schedule
from .softmax import margin_softmax_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LossOptions(TypedDict, total=False):
    """The keyword arguments that every loss takes; :class:`MarginLoss` describes them."""

    schedule: Schedule | None
    gradient: str
    reduction: str
    class_weight: Tensor | None
    label_smoothing: float
    ignore_index: int
    mode: str
    memory_budget: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class MarginLoss(nn.Module, ABC):
    """What all margin losses share: class centres, a scale, and the margin softmax.

    A new loss derives from this class, keeps its margin in ``__init__`` and defines ``target``::

        class QuadraticMargin(MarginLoss):
            def target(self, theta, share):
                return torch.cos(theta) - 0.1 * share * theta**2

    Remember to give the loss's parameters to the optimiser, beside those of the network.

    Args:
        num_classes: The number of classes, C.
        embedding_size: The length of an embedding, d.
        scale: The scale s > 0 of the cosines.
        schedule: A :class:`LambdaAnnealing` or :class:`MarginWarmup`, advanced by each forward
            pass in training mode; by default the whole margin is in force from the start.
        gradient: "exact", or "detached": the margin moves the logit but is not differentiated
            (:func:`angular_losses.margins.detached`), as insightface and OpenSphere train.
        reduction: "mean", "sum" or "none".
        class_weight: (C,) weight of each class, as in ``nn.CrossEntropyLoss``; kept as a buffer.
        label_smoothing: In [0, 1), as in ``nn.CrossEntropyLoss``.
        ignore_index: Rows with this label have loss 0 and gradient 0.
        mode: "auto", "dense", "stash" or "recompute": how the softmax is computed
            (:func:`angular_losses.margin_softmax_loss`).
        memory_budget: Bytes that may be used beyond embeddings, weight and their gradients; by
            default as :func:`angular_losses.plan` says.
        device: Where to make ``weight``.
        dtype: The dtype of ``weight``.

    Attributes:
        weight: (C, d) parameter, the class centres; only their directions enter the loss. Drawn
            from a normal distribution with standard deviation d ** -0.5, so of length about 1.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range; the message starts with its name.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float,
        *,
        schedule: Schedule | None = None,
        gradient: str = "exact",
        reduction: str = "mean",
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        mode: str = "auto",
        memory_budget: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = checks.positive_integer("num_classes", num_classes)
        self.embedding_size = checks.positive_integer("embedding_size", embedding_size)
        self.scale = checks.positive("scale", scale)
        checks.choice("gradient", gradient, ("exact", "detached"))
        checks.choice("reduction", reduction, ("mean", "sum", "none"))
        checks.choice("mode", mode, MODES)
        if memory_budget is not None:
            checks.positive_integer("memory_budget", memory_budget)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a Schedule, got {schedule!r}")
        if class_weight is not None:
            checks.floating("class_weight", class_weight, num_classes)
            class_weight = class_weight.detach().to(device=device)
        self.schedule = schedule
        self.gradient = gradient
        self.reduction = reduction
        self.label_smoothing = checks.number("label_smoothing", label_smoothing, 0.0, 1.0)
        self.ignore_index = ignore_index
        self.mode = mode
        self.memory_budget = memory_budget
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight)
        self.weight = nn.Parameter(
            torch.empty(num_classes, embedding_size, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class centres anew."""
        nn.init.normal_(self.weight, std=self.embedding_size**-0.5)

    @abstractmethod
    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """The target logits before scaling.

        Args:
            theta: Target angles (N,) in radians, float64.
            share: How much of the margin is in force, in [0, 1]; 1 without a warm-up.

        Returns:
            (N,).
        """

    def forward(
        self, embeddings: Tensor, labels: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch; see :func:`angular_losses.margin_softmax_loss`.

        Args:
            embeddings: (N, d), floating point.
            labels: (N,) integers in [0, C), or ``ignore_index``.
            sample_weight: (N,) weight of each row, on top of that of its class.

        Returns:
            A scalar, or (N,) for reduction "none"; float32 at least.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape, a device or a label is out of place.
        """
        loss = margin_softmax_loss(
            embeddings,
            self.weight,
            labels,
            margin=self.margin_function(),
            scale=self.scale,
            reduction=self.reduction,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            mode=self.mode,
            memory_budget=self.memory_budget,
        )
        if self.training and self.schedule is not None:
            self.schedule.advance()
        return loss

    def margin_function(self) -> margins.MarginFunction:
        """The margin now in force, schedule and gradient mode included, as a function of theta."""

        def margin(theta: Tensor) -> Tensor:
            if self.schedule is None:
                return self.target(theta, 1.0)
            scheduled: Tensor = self.schedule(self.target, theta)
            return scheduled

        return margins.detached(margin) if self.gradient == "detached" else margin

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Scale times cosine for every class, without a margin: what to use for inference.

        Args:
            embeddings: (N, d), floating point.

        Returns:
            (N, C), float32 at least.

        Raises:
            TypeError: If the embeddings are not floating-point.
            ValueError: If their shape or device does not fit ``weight``.
        """
        checks.floating(
            "embeddings", embeddings, "N", self.embedding_size, device=self.weight.device
        )
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.scale * cosines(embeddings, self.weight)

    def extra_repr(self) -> str:
        """The settings, with options left at their defaults left out."""
        settings = (
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith("_")
            and name not in _SHOWN_FIRST
            and value != _DEFAULTS.get(name)
        )
        return ", ".join([str(self.num_classes), str(self.embedding_size), *settings])


_SHOWN_FIRST = ("training", "num_classes", "embedding_size")
_DEFAULTS = {
    "gradient": "exact",
    "reduction": "mean",
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "mode": "auto",
    "beyond": "decreasing",
}


class NormalizedSoftmaxLoss(MarginLoss):
    r"""Softmax on scaled cosines, no margin (NormFace, "Modified SoftMax").

    .. math:: L_i = -\log\frac{e^{s\cos\theta_{y_i}}}{\sum_j e^{s\cos\theta_j}}

    Args:
        num_classes: The number of classes, C.
        embedding_size: The length of an embedding, d.
        scale: The scale s > 0; the default is the paper's temperature 0.05 as 1 / 0.05.
        **options: See :class:`MarginLoss`.

    Shape:
        embeddings (N, d), floating point, and labels (N,), integers, give a scalar, or (N,) for
        reduction "none"; float32 at least.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size or the scale is out of range.

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

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """cos(theta)."""
        return torch.cos(theta)


class SphereFaceLoss(MarginLoss):
    r"""SphereFace (A-Softmax) with normalised embeddings: the margin multiplies the target's angle.

    This is the form of HSADML, eq. (2)-(3), and of OpenSphere's hard feature normalisation: the
    scale takes the place of the embedding's length, which the first SphereFace kept.

    .. math:: f = s\,\psi(\theta_{y}), \qquad
        \psi(\theta) = (-1)^k \cos(m\theta) - 2k, \quad k = \lfloor m\theta / \pi \rfloor

    Args:
        num_classes: The number of classes, C.
        embedding_size: The length of an embedding, d.
        margin: m >= 1, any real number; 1 is no margin.
        scale: The scale s > 0.
        beyond: See :func:`angular_losses.margins.sphereface`.
        **options: See :class:`MarginLoss`. The paper trains with the margin annealed:
            ``schedule=LambdaAnnealing()``.

    Shape:
        embeddings (N, d), floating point, and labels (N,), integers, give a scalar, or (N,) for
        reduction "none"; float32 at least.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the margin is below 1, or a size or the scale is out of range.

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
        scale: float = 30.0,
        *,
        beyond: str = "decreasing",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        checks.choice("beyond", beyond, margins.SPHEREFACE_BEYOND)
        self.margin = checks.multiplicative_margin("margin", margin)
        self.beyond = beyond

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """psi(theta) of the share of the margin in force."""
        return margins.sphereface(theta, 1 + share * (self.margin - 1), beyond=self.beyond)


class CosFaceLoss(MarginLoss):
    r"""CosFace (AM-Softmax): the margin taken off the target's cosine.

    .. math:: f = s\,(\cos\theta_{y} - m)

    Args:
        num_classes: The number of classes, C.
        embedding_size: The length of an embedding, d.
        margin: m in [0, 2).
        scale: The scale s > 0.
        **options: See :class:`MarginLoss`.

    Shape:
        embeddings (N, d), floating point, and labels (N,), integers, give a scalar, or (N,) for
        reduction "none"; float32 at least.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the margin is outside [0, 2), or a size or the scale is out of range.

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
        margin: float = 0.35,
        scale: float = 64.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = checks.cosine_margin("margin", margin)

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """cos(theta) less the share of the margin in force."""
        return margins.cosface(theta, share * self.margin)


class ArcFaceLoss(MarginLoss):
    r"""ArcFace (AAM-Softmax): the margin added to the target's angle.

    .. math:: f = s\cos(\theta_{y} + m)

    Args:
        num_classes: The number of classes, C.
        embedding_size: The length of an embedding, d.
        margin: m in radians, in [0, pi).
        scale: The scale s > 0.
        beyond: What happens past theta + m = pi; see :mod:`angular_losses.margins`.
        **options: See :class:`MarginLoss`.

    Shape:
        embeddings (N, d), floating point, and labels (N,), integers, give a scalar, or (N,) for
        reduction "none"; float32 at least.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the margin is outside [0, pi), as one in degrees is, or a size or the scale
            is out of range.

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
        margin: float = 0.5,
        scale: float = 64.0,
        *,
        beyond: str = "decreasing",
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        checks.choice("beyond", beyond, margins.ARCFACE_BEYOND)
        self.margin = checks.angular_margin("margin", margin)
        self.beyond = beyond

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """cos(theta + the share of the margin in force), unrolled."""
        return margins.arcface(theta, share * self.margin, beyond=self.beyond)


class CombinedMarginLoss(MarginLoss):
    r"""The combined margin cos(m1 theta + m2) - m3.

    .. math:: f = s\,(\cos(m_1\theta_{y} + m_2) - m_3)

    Args:
        num_classes: The number of classes, C.
        embedding_size: The length of an embedding, d.
        m1: Multiplicative margin, above 0.
        m2: Additive margin on the angle in radians, in [0, pi).
        m3: Additive margin on the cosine, in [0, 2).
        scale: The scale s > 0.
        beyond: See :func:`angular_losses.margins.combined`.
        **options: See :class:`MarginLoss`.

    Shape:
        embeddings (N, d), floating point, and labels (N,), integers, give a scalar, or (N,) for
        reduction "none"; float32 at least.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a margin, a size or the scale is out of range.

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
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        checks.choice("beyond", beyond, margins.SPHEREFACE_BEYOND)
        self.m1 = checks.positive("m1", m1)
        self.m2 = checks.angular_margin("m2", m2)
        self.m3 = checks.cosine_margin("m3", m3)
        self.beyond = beyond

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """The combined margin with the share of each part that is in force."""
        m1 = 1 + share * (self.m1 - 1)
        return margins.combined(theta, m1, share * self.m2, share * self.m3, beyond=self.beyond)

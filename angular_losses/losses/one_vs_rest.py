"""One-versus-rest losses: a sum over all classes, without a softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import validation
from ..engine.batch import Batch
from ..functional import Options, rest_loss
from ..margins import MarginFunction
from ..negatives import NegativeFunction
from .base import LossOptions, MarginLoss

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _OneVsRest(MarginLoss):
    """A sum over all classes; a learned bias, if any, is (1,), as FSDP shards no scalars."""

    _scale_decides = False
    bias: nn.Parameter

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        scale: float,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        if self.label_smoothing:
            raise ValueError(
                f"label_smoothing: expected 0, as {type(self).__name__} has no softmax, "
                f"got {self.label_smoothing}"
            )

    def _first_bias(self, num_classes: int) -> float:
        """The value that a learned bias has at first."""
        raise NotImplementedError

    def _register_bias(self) -> None:
        self._first_values["bias"] = self._first_bias(self.num_classes)
        self.bias = nn.Parameter(self.weight.new_full((1,), self._first_values["bias"]))

    def _extend_buffers(self, num_new: int) -> None:
        super()._extend_buffers(num_new)
        if "bias" in self._first_values:
            self._first_values["bias"] = self._first_bias(self.num_classes + num_new)

    def _functions(self, target: MarginFunction) -> tuple[MarginFunction, NegativeFunction]:
        """The loss of the target, a function of its angle, and of a negative: cosine and bias."""
        raise NotImplementedError

    def _batch_loss(self, batch: Batch, options: Options) -> Tensor:
        target = self.margin_function(batch.embeddings, batch.labels)
        positive, negative = self._functions(target)
        return rest_loss(batch, positive, negative, getattr(self, "bias", None), options)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        *others: Any,  # noqa: ANN401
    ) -> None:
        saved = state_dict.get(f"{prefix}bias")
        if isinstance(saved, Tensor) and saved.dim() == 0:  # of older versions
            state_dict[f"{prefix}bias"] = saved.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *others)


class SphereFace2Loss(_OneVsRest):
    r"""SphereFace2: C binary classifications with margins, in place of a softmax.

    .. math:: L = \frac{\lambda}{r}\log(1 + e^{-(r\,p + b)})
        + \frac{1 - \lambda}{r}\sum_{j \ne y}\log(1 + e^{r\,n_j + b}), \qquad
        g(z) = 2\Bigl(\frac{z + 1}{2}\Bigr)^t - 1

    with p = g(cos theta_y) - m and n = g(cos theta_j) + m ("C"), or p = g(cos(min(theta_y + m,
    pi))) and n = g(cos theta_j) ("A"). OpenSphere multiplies this by a constant, lw.

    Args:
        num_classes: The number of classes, C >= 2.
        margin: m: in [0, 2) for "C", radians in [0, pi) for "A", where OpenSphere has 0.5.
        scale: r > 0.
        kind: "C" or "A".
        t: The power t > 0 of the similarity adjustment.
        balance: lambda in (0, 1), the weight of the positive against the negatives.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too;
            no ``label_smoothing``. ``gradient="detached"`` is OpenSphere's: every class has the
            gradient of its cosine, without g and the margin.

    Attributes:
        bias: b, a parameter (1,). At its initial value its gradient is zero if every angle is
            pi / 2.

    Example:
        >>> loss = SphereFace2Loss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Wen et al., "SphereFace2: Binary Classification is All You Need for Deep Face Recognition",
        ICLR 2022, arXiv:2108.01513; the defaults are those of OpenSphere, its authors' code.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.4,
        scale: float = 40.0,
        *,
        kind: str = "C",
        t: float = 3.0,
        balance: float = 0.7,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        validation.choice("kind", kind, ("C", "A"))
        check = validation.cosine_margin if kind == "C" else validation.angular_margin
        self.kind, self.margin = kind, check("margin", margin)
        self.t = validation.positive("t", t)
        self.balance = validation.positive(
            "balance", validation.number("balance", balance, 0.0, 1.0)
        )
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        self._register_bias()

    def _first_bias(self, num_classes: int) -> float:
        """The bias for which positives and negatives weigh alike if every angle is pi / 2."""
        scale = float(self.scale)
        at = torch.tensor(math.pi / 2, dtype=torch.float64, device="cpu")
        positive = scale * self.target(at, 1.0).item()
        negative = scale * self._negative()(at.cos()).item()
        odds = self.balance / ((1 - self.balance) * (num_classes - 1))
        root = math.hypot(1 - odds, 2 * math.sqrt(odds) * math.exp((positive - negative) / 2))
        if odds > 1:  # where 1 - odds + root would cancel
            return math.log((odds - 1 + root) / 2) - positive
        return math.log(2 * odds) - negative - math.log(1 - odds + root)

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """p, with the share of the margin in force."""
        m = share * self.margin
        if self.kind == "C":
            return _adjusted(torch.cos(theta), self.t) - m
        return _adjusted(torch.cos((theta + m).clamp(max=math.pi)), self.t)

    def _negative(self) -> Callable[[Tensor], Tensor]:
        """The n of the formula, with the current settings."""
        t, m = self.t, self.margin if self.kind == "C" else 0.0
        is_detached = self.gradient == "detached"

        def negative(cosine: Tensor) -> Tensor:
            value = _adjusted(cosine, t) + m
            return cosine + (value - cosine).detach() if is_detached else value

        return negative

    def _functions(self, target: MarginFunction) -> tuple[MarginFunction, NegativeFunction]:
        n, bias = self._negative(), self.bias
        r, of_positive, of_negatives = self.scale, self.balance, 1 - self.balance
        return (
            lambda theta: of_positive / r * F.softplus(-(r * target(theta) + bias), threshold=50),
            lambda cosine, bias: of_negatives / r * F.softplus(r * n(cosine) + bias, threshold=50),
        )


class UniFaceLoss(_OneVsRest):
    r"""UniFace: one threshold, learned, that every positive is above and every negative below.

    .. math:: L = \log(1 + e^{-s(\cos\theta_y - m) + b})
        + \lambda\sum_{j \ne y}\log(1 + e^{s\cos\theta_j - b})

    Args:
        margin: m in [0, 2).
        balance: lambda > 0, the weight of the negatives.
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too;
            no ``label_smoothing``.

    Attributes:
        bias: b, a parameter (1,), log(10 C) at first, as in the authors' code. That code
            also clamps both exponents to [-s, s], where gradients vanish; here they do not.

    Example:
        >>> loss = UniFaceLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Zhou et al., "UniFace: Unified Cross-Entropy Loss for Deep Face Recognition", ICCV 2023.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.4,
        scale: float = 64.0,
        *,
        balance: float = 1.0,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, scale, **options)
        self.margin = validation.cosine_margin("margin", margin)
        self.balance = validation.positive("balance", balance)
        self._register_bias()

    def _first_bias(self, num_classes: int) -> float:
        """log(10 C)."""
        return math.log(10 * num_classes)

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """cos(theta) less the share of the margin in force."""
        return torch.cos(theta) - share * self.margin

    def _functions(self, target: MarginFunction) -> tuple[MarginFunction, NegativeFunction]:
        scale, balance, bias = self.scale, self.balance, self.bias
        return (
            lambda theta: F.softplus(bias - scale * target(theta), threshold=50),
            lambda cosine, bias: balance * F.softplus(scale * cosine - bias, threshold=50),
        )


class P2SGradLoss(_OneVsRest):
    r"""P2SGrad: the squared distance of the cosines from 1 and 0; no margin, no scale.

    .. math:: L = (1 - \cos\theta_y)^2 + \sum_{j \ne y}\cos^2\theta_j

    The paper gives a gradient, which is half of this one's. pytorch-metric-learning divides the sum
    by C.

    Args:
        **options: See :class:`MarginLoss`, for all other arguments, shapes and errors too;
            no ``label_smoothing``.

    Example:
        >>> loss = P2SGradLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Zhang et al., "P2SGrad: Refined Gradients for Optimizing Deep Face Models", CVPR 2019,
        arXiv:1905.02479, eq. (11).
    """

    def __init__(
        self, num_classes: int, embedding_size: int, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(num_classes, embedding_size, 1.0, **options)

    def target(self, theta: Tensor, share: float | Tensor) -> Tensor:
        """cos(theta)."""
        return torch.cos(theta)

    def _functions(self, target: MarginFunction) -> tuple[MarginFunction, NegativeFunction]:
        return (
            lambda theta: 4 * torch.sin(theta / 2) ** 4,  # (1 - cos theta)^2
            lambda cosine, bias: cosine.square(),
        )


def _adjusted(cosine: Tensor, t: float) -> Tensor:
    # Rounding may put a cosine below -1, where a fractional power is NaN.
    return 2 * ((cosine + 1) / 2).clamp(min=1e-7) ** t - 1

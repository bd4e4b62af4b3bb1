"""Drop-in losses with the interface of pytorch-metric-learning (PML) 2.9.

Replace ``from pytorch_metric_learning import losses`` by::

    from angular_losses.integrations import pytorch_metric_learning as losses

Class names, arguments, units and state are PML's; all other names of PML's ``losses`` are
re-exported. Reducers, miners, regularisers, trainers, testers and wrappers work unchanged, and
``state_dict`` is compatible in both directions. Values and gradients equal PML's to rounding where
PML is accurate, and are neither NaN nor zero elsewhere; the N x C logits are never stored.

Tested with PML 2.9. PML 3 has other units and layouts, close to those of :mod:`angular_losses`
itself; use that with it.

Intentional differences: the dtype of the embeddings does not lower the precision (losses and logits
are float32 at least, and autocast does not change ``W``); labels may have any integer dtype;
SphereFaceLoss and LargeMarginSoftmaxLoss accept margins that are not integers;
SubCenterArcFaceLoss accepts its sizes as positional arguments, and its ``get_outliers`` can return
only the outliers; second derivatives need ``mode="dense"``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

try:
    import pytorch_metric_learning

    if int(pytorch_metric_learning.__version__.partition(".")[0]) > 2:
        raise ImportError(
            "angular_losses.integrations is written for pytorch-metric-learning 2.9, found "
            f"{pytorch_metric_learning.__version__}: pip install angular-losses[pml], or use "
            "angular_losses itself"
        )
    from pytorch_metric_learning import losses as pml_losses
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
    from pytorch_metric_learning.losses import BaseMetricLossFunction
    from pytorch_metric_learning.utils import common_functions as c_f
except ModuleNotFoundError as error:
    raise ImportError(
        "angular_losses.integrations needs pytorch-metric-learning: pip install angular-losses[pml]"
    ) from error

from .. import margins, validation
from ..engine.batch import Batch
from ..geometry import directions, lengths, without_autocast
from ..losses.centres import ClassCentres, dominant_centres
from ..losses.options import show_options
from ..losses.usage_warnings import watch
from .pml_classification import BaseOptions, ClassificationLoss, ClassificationOptions, follow

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "ArcFaceLoss",
    "CosFaceLoss",
    "LargeMarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "P2SGradLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
]
__all__ += [name for name in vars(pml_losses) if name[0] != "_" and name not in __all__]


class ArcFaceLoss(ClassificationLoss):
    r"""PML's ArcFaceLoss: the margin, in degrees, is added to the target angle.

    .. math:: f = s\cos(\theta_y + m), \quad
        s\,(\cos\theta_y - m\sin m) \text{ past } \theta_y + m = \pi

    Args:
        num_classes: The number of classes, C.
        embedding_size: The dimension of the embeddings, d.
        margin: m in **degrees**, in [-180, 180); the attribute is in radians, as in PML.
        scale: The scale s > 0.
        **options: PML's ``weight_regularizer``, ``weight_reg_weight``, ``weight_init_func``,
            ``embedding_regularizer``, ``embedding_reg_weight``, ``reducer``, ``distance``,
            ``collect_stats``; and the ``mode`` and ``memory_budget`` of
            :func:`angular_losses.margin_softmax_loss`.

    Attributes:
        W: (d, C) parameter, the class centres as columns.

    Shape:
        embeddings (N, d), floating point, and labels (N,), integers, to the result of the reducer
        for (N,) losses, float32 at least.

    Raises:
        AssertionError: If the distance is not a plain CosineSimilarity.
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range, labels are missing, or references are given.

    Example:
        >>> loss = ArcFaceLoss(num_classes=10, embedding_size=64, margin=28.6)
        >>> f"{loss.margin:.2f}"
        '0.50'
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Deng et al., "ArcFace", CVPR 2019, arXiv:1801.07698, eq. (3); past pi - m its first version.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        **options: Unpack[ClassificationOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, {"margin": margin, "scale": scale}, **options)

    def init_margin(self) -> None:
        """From degrees to radians."""
        self.margin = math.radians(
            validation.number("margin", self.margin, -180.0, 180.0, "degrees")
        )

    def target(self, theta: Tensor, labels: Tensor) -> Tensor:
        """cos(theta + m), and PML's continuation past pi - m."""
        return margins.Combined(m2=self.margin, beyond="linear")(theta)


class SubCenterArcFaceLoss(ArcFaceLoss):
    """PML's SubCenterArcFaceLoss: ArcFace with K centres per class, for noisy labels.

    The angle to a class is that to its nearest centre.

    Args:
        sub_centers: The number of centres per class, K.
        **options: See :class:`ArcFaceLoss`, for all other arguments, shapes and errors too.

    Attributes:
        W: (d, C * K) parameter; sub-centre k of class c is column c * K + k.

    Example:
        >>> SubCenterArcFaceLoss(num_classes=10, embedding_size=64).W.shape
        torch.Size([64, 30])

    References:
        Deng et al., "Sub-center ArcFace", ECCV 2020.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float = 64,
        sub_centers: int = 3,
        **options: Unpack[ClassificationOptions],
    ) -> None:
        # Before the centres are created.
        self.sub_centers = validation.positive_integer("sub_centers", sub_centers)
        super().__init__(num_classes, embedding_size, margin, scale, **options)

    @torch.no_grad()
    def get_outliers(
        self,
        embeddings: Tensor,
        labels: Tensor,
        threshold: float = 75,
        return_dominant_centers: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The embeddings far from the dominant centre of their class (nearest to most of its rows).

        Args:
            embeddings: (N, d), floating point.
            labels: (N,) integers in [0, C).
            threshold: The smallest angle of an outlier, in **degrees**.
            return_dominant_centers: Whether to return the dominant centres too.

        Returns:
            The indices of the outliers, int64, sorted by class, and optionally the dominant centres
            (d, C) in the dtype of the embeddings; for a class without embeddings its first centre.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If shapes do not fit, or a label is out of range.
        """
        centres, labels = self.W.t().to(embeddings.device), labels.to(embeddings.device)
        rows, angles = dominant_centres([(embeddings, labels)], centres, self.sub_centers)
        by_class = labels.long().argsort(stable=True)
        outliers = by_class[angles[by_class] > math.radians(threshold)]
        if not return_dominant_centers:
            return outliers
        return outliers, centres[rows].t().to(embeddings).contiguous()


class CosFaceLoss(ClassificationLoss):
    r"""PML's CosFaceLoss: the margin is subtracted from the target cosine.

    .. math:: f = s\,(\cos\theta_y - m)

    Args:
        margin: m, any number.
        **options: See :class:`ArcFaceLoss`, for all other arguments, shapes and errors too.

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
        scale: float = 64,
        **options: Unpack[ClassificationOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, {"margin": margin, "scale": scale}, **options)

    def init_margin(self) -> None:
        """Any margin, also negative, as in PML."""
        self.margin = validation.finite("margin", self.margin)

    def target(self, theta: Tensor, labels: Tensor) -> Tensor:
        """cos(theta) - m."""
        return theta.cos() - self.margin


class LargeMarginSoftmaxLoss(ClassificationLoss):
    r"""PML's LargeMarginSoftmaxLoss (L-Softmax): embeddings and centres are not normalised.

    .. math:: f = s\,|w_y|\,|x|\,\psi(\theta_y), \quad z_j = s\,w_j \cdot x, \quad
        \psi(\theta) = (-1)^k \cos(m\theta) - 2k, \quad k = \lfloor m\theta / \pi \rfloor

    Args:
        margin: m >= 1, any real number; PML truncates it to an integer.
        **options: See :class:`ArcFaceLoss`, for all other arguments, shapes and errors too.

    Example:
        >>> loss = LargeMarginSoftmaxLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Liu et al., "Large-Margin Softmax Loss", ICML 2016, arXiv:1612.02295, eq. (6).
    """

    normalize_weight = False

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 4,
        scale: float = 1,
        **options: Unpack[ClassificationOptions],
    ) -> None:
        super().__init__(num_classes, embedding_size, {"margin": margin, "scale": scale}, **options)

    def init_margin(self) -> None:
        """A margin of at least 1."""
        self.margin = validation.multiplicative_margin("margin", self.margin)

    def target(self, theta: Tensor, labels: Tensor) -> Tensor:
        """psi(theta), times the length of the centre if it is not normalised."""
        psi = margins.sphereface(theta, self.margin)
        return psi if self.normalize_weight else psi * lengths(self.W.t().index_select(0, labels))

    def row_scale(self, embeddings: Tensor) -> Tensor:
        """The scale times the lengths of the embeddings, (N,)."""
        return lengths(embeddings) * self.scale


class SphereFaceLoss(LargeMarginSoftmaxLoss):
    r"""PML's SphereFaceLoss (A-Softmax): embeddings are not normalised.

    .. math:: f = s\,|x|\,\psi(\theta_y), \quad z_j = s\,|x|\cos\theta_j

    Arguments, attributes and errors are those of :class:`LargeMarginSoftmaxLoss`.

    Example:
        >>> loss = SphereFaceLoss(num_classes=10, embedding_size=64, margin=1.7)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Liu et al., "SphereFace", CVPR 2017, arXiv:1704.08063, eq. (7).
    """

    normalize_weight = True


class NormalizedSoftmaxLoss(ClassificationLoss):
    r"""PML's NormalizedSoftmaxLoss: softmax of cosines divided by a temperature, no margin.

    .. math:: z_j = \cos\theta_j / T

    Args:
        temperature: T > 0.
        **options: See :class:`ArcFaceLoss`, for all other arguments, shapes and errors too. A
            ``distance`` other than the dot product of normalised embeddings is computed by PML,
            with N x C logits.

    Example:
        >>> loss = NormalizedSoftmaxLoss(num_classes=10, embedding_size=64)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Zhai and Wu, "Classification is a Strong Baseline for Deep Metric Learning", BMVC 2019,
        arXiv:1811.12649.
    """

    temperature: float

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        temperature: float = 0.05,
        **options: Unpack[ClassificationOptions],
    ) -> None:
        settings = {"embedding_size": embedding_size, "temperature": temperature}
        super().__init__(num_classes, embedding_size, settings, **options)

    def get_default_distance(self) -> nn.Module:
        """DotProductSimilarity, of normalised embeddings."""
        return cast(nn.Module, DotProductSimilarity())

    def check_distance(self) -> None:
        """Any distance is allowed."""

    def init_margin(self) -> None:
        """A temperature above 0."""
        self.temperature = validation.positive("temperature", self.temperature)

    def row_scale(self, embeddings: Tensor) -> float | Tensor:
        """1 / T."""
        return 1 / self.temperature

    def target(self, theta: Tensor, labels: Tensor) -> Tensor:
        """cos(theta)."""
        return theta.cos()

    def row_losses(self, batch: Batch) -> Tensor:
        """The margin softmax, or PML's computation for other distances."""
        if self._is_cosine():
            return super().row_losses(batch)
        return F.cross_entropy(self.get_logits(batch.embeddings), batch.labels, reduction="none")

    def _similarities(self, embeddings: Tensor, weight: Tensor) -> Tensor:
        """Similarities, or negative distances, by PML."""
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        sign = 1 if self.distance.is_inverted else -1
        centres = self.distance.normalize(weight.to(dtype))
        similarities: Tensor = sign * self.distance(embeddings.to(dtype), centres)
        return similarities

    def _is_cosine(self) -> bool:
        distance = self.distance
        return (
            type(distance) in (CosineSimilarity, DotProductSimilarity)
            and bool(distance.normalize_embeddings)
            and (distance.p, distance.power) == (2, 1)
        )


class P2SGradLoss(ClassCentres, BaseMetricLossFunction):  # type: ignore[misc]
    r"""PML's P2SGradLoss: the mean squared error of the cosines.

    .. math:: L = \frac{1}{NC} \sum_{ij} (\cos\theta_{ij} - [j = y_i])^2

    As in PML, every forward pass normalises the centres in place, and the gradient is that of the
    dot product with them, with a component along the centre.

    Args:
        descriptors_dim: The dimension of the embeddings, d.
        num_classes: The number of classes, C.
        **options: As in :class:`ArcFaceLoss`, except ``weight_*``, ``mode`` and ``memory_budget``.

    Attributes:
        weight: (d, C) parameter, the class centres as columns.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a size is out of range, labels are missing, or references or a miner's
            indices are given.

    Example:
        >>> loss = P2SGradLoss(descriptors_dim=64, num_classes=10)
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])

    References:
        Zhang et al., "P2SGrad", CVPR 2019, arXiv:1905.02479, eq. (11).
    """

    scale, sub_centers = 1.0, 1
    _centres_are_columns = True

    def __init__(
        self, descriptors_dim: int, num_classes: int, **options: Unpack[BaseOptions]
    ) -> None:
        super().__init__(**options)
        self.descriptors_dim = validation.positive_integer("descriptors_dim", descriptors_dim)
        self.num_classes = validation.positive_integer("num_classes", num_classes)
        drawn = torch.empty(self.descriptors_dim, self.num_classes).uniform_(-1, 1)
        self.weight = nn.Parameter(directions(drawn.t()).t().contiguous())
        watch(self)

    def margin_function(self, embeddings: Tensor, labels: Tensor) -> margins.MarginFunction:
        """The cosine (no margin)."""
        return torch.cos

    def cast_types(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move the centres to the device and, outside autocast, the dtype of the embeddings."""
        follow(self.weight, dtype, device)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """The mean, already reduced."""
        c_f.labels_required(labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        c_f.indices_tuple_not_supported(indices_tuple)
        assert labels is not None
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        self.weight.data = directions(self.weight.data.t(), dtype).t().to(self.weight.dtype)
        self.cast_types(embeddings.dtype, embeddings.device)
        validation.batch(embeddings, self.weight.t(), labels)
        with without_autocast(embeddings.device):
            cosine = directions(embeddings, dtype) @ self.weight.to(dtype)
            one = cosine.new_ones(len(labels), 1)
            error = cosine.scatter_add(1, labels.long()[:, None], -one)
            loss = error.square().mean()
        return {"loss": {"losses": loss, "indices": None, "reduction_type": "already_reduced"}}


show_options(P2SGradLoss, BaseOptions)


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """PML's other losses, so that this module can replace its ``losses``."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(pml_losses, name)

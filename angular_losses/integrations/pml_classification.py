"""What PML's classification losses share: the centres W, the margin softmax, PML's interface."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction, WeightRegularizerMixin
from pytorch_metric_learning.reducers import ThresholdReducer
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
from torch import Tensor, nn

from .. import margins, validation
from ..engine.batch import Batch, checked
from ..functional import Options, Softmax, softmax_loss
from ..geometry import is_autocast_enabled, target_angle
from ..losses.centres import ClassCentres
from ..losses.options import show_options
from ..losses.usage_warnings import watch

if TYPE_CHECKING:
    from typing_extensions import Unpack

_HOOKS_OF_PML = {
    "get_angles",
    "get_cos_with_margin",
    "get_cosine",
    "get_target_mask",
    "modify_cosine_of_target_classes",
    "scale_logits",
}


class BaseOptions(TypedDict, total=False):
    """The keyword arguments of PML's base class."""

    embedding_regularizer: nn.Module | None
    embedding_reg_weight: float
    reducer: nn.Module | None
    distance: nn.Module | None
    collect_stats: bool | None


class PmlOptions(BaseOptions, total=False):
    """The keyword arguments of PML's classification losses."""

    weight_regularizer: nn.Module | None
    weight_reg_weight: float
    weight_init_func: Callable[[Tensor], object] | None


class ClassificationOptions(PmlOptions, total=False):
    """The same, and two more."""

    mode: str
    memory_budget: int | None


class ClassificationLoss(
    ClassCentres,
    WeightRegularizerMixin,  # type: ignore[misc]
    BaseMetricLossFunction,  # type: ignore[misc]
):
    """Base class: the centres W, the margin softmax, and PML's interface.

    A new loss defines ``target``, and optionally ``row_scale`` or ``init_margin``. PML's own hooks
    operate on the N x C cosines, which are never computed.
    """

    margin: float
    sub_centers = 1
    _centres_name = "W"
    _centres_are_columns = True

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        for name in _HOOKS_OF_PML & vars(cls).keys():
            raise TypeError(f"{name}: {cls.__name__} defines it, but only target would be called")
        show_options(cls, ClassificationOptions)

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        settings: dict[str, float],
        *,
        mode: str = "auto",
        memory_budget: int | None = None,
        **options: Unpack[PmlOptions],
    ) -> None:
        self.mode, self.memory_budget = mode, memory_budget
        super().__init__(**options)
        self.num_classes = validation.positive_integer("num_classes", num_classes)
        self.embedding_size = validation.positive_integer("embedding_size", embedding_size)
        self.check_distance()
        for name, value in settings.items():
            setattr(self, name, value)
        self.init_margin()
        self.add_to_recordable_attributes(list_of_names=["num_classes", *settings], is_stat=False)
        self.add_to_recordable_attributes(name="avg_angle", is_stat=True)
        self.W = nn.Parameter(torch.empty(self.embedding_size, self.num_classes * self.sub_centers))
        self.weight_init_func(self.W)
        watch(self)

    def get_default_distance(self) -> nn.Module:
        """CosineSimilarity."""
        return cast(nn.Module, CosineSimilarity())

    def check_distance(self) -> None:
        """Raise AssertionError, like PML, unless the distance is the cosine."""
        c_f.assert_distance_type(self, CosineSimilarity, p=2, power=1)

    def init_margin(self) -> None:
        """Validate ``margin`` and convert its unit."""

    def target(self, theta: Tensor, labels: Tensor) -> Tensor:
        """The target logits before scaling (N,) from the target angles (N,), in radians."""
        raise NotImplementedError(f"{type(self).__name__} does not define target")

    def margin_function(self, embeddings: Tensor, labels: Tensor) -> margins.MarginFunction:
        """The target logits before scaling (N,) as a function of the target angles only."""
        return lambda theta: self.target(theta, labels)

    def cast_types(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move W to the device and, outside autocast, the dtype of the embeddings."""
        follow(self.W, dtype, device)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: tuple[Tensor, ...] | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> dict[str, dict[str, Any]]:
        """The losses of the rows, in the format of PML's reducers."""
        c_f.labels_required(labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        assert labels is not None
        self.cast_types(embeddings.dtype, embeddings.device)
        # Centres as columns take up to 50 % longer. No label is ignored, not even -100.
        weight = self.W.t().contiguous()
        batch = checked(embeddings, weight, labels, sub_centers=self.sub_centers)
        self._record_statistics(embeddings, labels)
        losses = self.row_losses(batch)
        if any(isinstance(part, ThresholdReducer) for part in self.reducer.modules()):
            # Such a reducer excludes from its mean what PML's cross-entropy rounds to 0.
            losses = losses.where(losses > torch.finfo(losses.dtype).eps / 2, 0)
        loss_dict = {
            "loss": {
                "losses": losses * convert_to_weights(indices_tuple, labels, dtype=losses.dtype),
                "indices": c_f.torch_arange_from_size(embeddings),
                "reduction_type": "element",
            }
        }
        self.add_weight_regularization_to_loss_dict(loss_dict, self.W.t())
        return loss_dict

    def row_losses(self, batch: Batch) -> Tensor:
        """The margin softmax of each row, (N,)."""
        softmax = Softmax(
            self.margin_function(batch.embeddings, batch.labels),
            self.row_scale(batch.embeddings),
            normalize_weight=self.normalize_weight,
        )
        options = Options(reduction="none", mode=self.mode, memory_budget=self.memory_budget)
        return softmax_loss(batch, softmax, options)

    @torch.no_grad()
    def _record_statistics(self, embeddings: Tensor, labels: Tensor) -> None:
        """Record PML's statistics, if enabled; the only synchronisation with the device."""
        centres = self.W.t()
        if self.collect_stats:
            theta = target_angle(embeddings, centres, labels, self.sub_centers)
            self.avg_angle = math.degrees(theta.mean().item())
        if self.distance.collect_stats:
            vectors = (embeddings, centres)
            self.distance.set_default_stats(*vectors, *map(self.distance.maybe_normalize, vectors))


def follow(parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> None:
    """Bring a parameter where PML would, but leave its dtype alone under autocast."""
    if is_autocast_enabled(device):
        dtype = parameter.dtype
    parameter.data = parameter.data.to(device, dtype)

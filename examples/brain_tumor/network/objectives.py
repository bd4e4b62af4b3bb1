"""What is minimised: the paper's four losses, and others of the family beside them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from angular_losses import (
    ArcFaceLoss,
    CosFaceLoss,
    LambdaAnnealing,
    NormalizedSoftmaxLoss,
    SphereFaceLoss,
    SubCenterArcFaceLoss,
)

from ..data.slices import CLASS_NAMES
from ..errors import UserError
from ..settings import LossSettings


class SoftmaxLoss(nn.Module):
    """Equation (1): softmax and cross-entropy of plain products, lengths included, without bias."""

    schedule = None

    def __init__(self, num_classes: int, embedding_size: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.weight = nn.Parameter(torch.empty(num_classes, embedding_size))  # a row per class
        nn.init.xavier_uniform_(self.weight)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Map embeddings (N, d) to logits (N, C)."""
        return embeddings @ self.weight.T

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of embeddings (N, d) with labels (N,)."""
        logits = self.get_logits(embeddings)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


class TripletLoss(nn.Module):
    """FaceNet's triplet loss: semi-hard triplets of the batch, squared distances on the sphere.

    It has no class centres. A batch without a triplet that violates the margin has loss 0. The
    margin is by how much a stranger must be farther than a relative; FaceNet's is 0.2.

    Source: Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR
    2015.
    """

    schedule = None
    weight = None

    def __init__(self, margin: float) -> None:
        super().__init__()
        # Here because only this loss needs it, and it takes seconds.
        from pytorch_metric_learning.distances import LpDistance
        from pytorch_metric_learning.losses import TripletMarginLoss
        from pytorch_metric_learning.miners import TripletMarginMiner

        distance = LpDistance(normalize_embeddings=True, p=2, power=2)
        self.miner = TripletMarginMiner(margin, type_of_triplets="semihard", distance=distance)
        self.loss = TripletMarginLoss(margin, distance=distance)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of the batch's triplets; embeddings (N, d), labels (N,)."""
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


# name: the loss, the range of its margin, and what a user may expect it to be
MARGINS: dict[str, tuple[type[nn.Module], float, float, str]] = {
    "sphereface": (SphereFaceLoss, 1.0, 16.0, "a factor of the angle; the paper's is 5"),
    "arcface": (ArcFaceLoss, 0.0, 3.1, "an angle in radians; ArcFace's is 0.5"),
    "subcenter-arcface": (SubCenterArcFaceLoss, 0.0, 3.1, "an angle in radians; ArcFace's is 0.5"),
    "cosface": (CosFaceLoss, 0.0, 2.0, "a difference of cosines; CosFace's is 0.35"),
    "triplet": (TripletLoss, 0.0, 2.0, "a difference of squared distances; FaceNet's is 0.2"),
}


def make_loss(
    settings: LossSettings, embedding_size: int, num_classes: int = len(CLASS_NAMES)
) -> nn.Module:
    """Return the loss that the settings name, with its class centres if it has any.

    Raises:
        UserError: The margin does not suit the loss.
    """
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "embedding_size": embedding_size,
        "label_smoothing": settings.label_smoothing,
    }
    if settings.loss == "softmax":
        return SoftmaxLoss(**options)
    if settings.loss == "modified-softmax":
        return NormalizedSoftmaxLoss(**options, scale=settings.scale)
    loss, least, most, meaning = MARGINS[settings.loss]
    if not least <= settings.margin <= most:
        raise UserError(
            f"--margin {settings.margin}: the margin of --loss {settings.loss} is {meaning}; "
            f"expected {least} to {most}"
        )
    if loss is TripletLoss:
        if settings.label_smoothing:
            raise UserError("--label-smoothing: --loss triplet has no labels to smooth; expected 0")
        return TripletLoss(settings.margin)
    schedule = None
    if settings.annealing:
        schedule = LambdaAnnealing(
            base=settings.annealing_base,
            gamma=settings.annealing_gamma,
            power=settings.annealing_power,
            minimum=settings.annealing_minimum,
        )
    return loss(**options, margin=settings.margin, scale=settings.scale, schedule=schedule)


def class_centres(
    loss: nn.Module, embeddings: Tensor, labels: Tensor, num_classes: int = len(CLASS_NAMES)
) -> list[Tensor]:
    """Return the directions (k, d) that stand for each class; k is 1 except with sub-centres.

    For a loss without centres a class's is the mean direction of its embeddings, of those (n, d) of
    the training slices with their labels (n,).
    """
    weight: Any = loss.weight
    if weight is None:
        directions = F.normalize(embeddings)
        return [directions[labels == label].mean(0)[None] for label in range(num_classes)]
    return list(weight.detach().cpu().chunk(num_classes))

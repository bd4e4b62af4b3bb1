"""Numerically stable angular-margin losses for PyTorch.

A loss of this family is a margin (a function of the target angle), a scale, and a softmax::

    theta  = target_angle(embeddings, weight, labels)      # (N,) radians, exact from 0 to pi
    target = scale * margin(theta)                         # (N,) any differentiable function
    loss   = softplus(logsumexp_{j != y}(scale * cos_j) - target)

Shapes throughout: embeddings (N, d), class centres ``weight`` (C, d), labels (N,). Angles are in
radians.
"""

from .engine.planner import Plan, plan
from .functional import margin_softmax_loss, one_vs_rest_loss
from .geometry import angle_between, target_angle
from .losses.adaptive_margin import AdaCosLoss, AdaFaceLoss, ElasticFaceLoss, MagFaceLoss
from .losses.additive_margin import (
    ArcFaceLoss,
    CombinedMarginLoss,
    CosFaceLoss,
    LiArcFaceLoss,
    NormalizedSoftmaxLoss,
    SubCenterArcFaceLoss,
    X2SoftmaxLoss,
)
from .losses.base import MarginLoss
from .losses.catalogue import available
from .losses.class_margins import KappaFaceLoss, ldam_margins, power_law_margins
from .losses.hard_negatives import (
    CircleLoss,
    CurricularFaceLoss,
    InterTopKLoss,
    MVSoftmaxLoss,
    NPCFaceLoss,
)
from .losses.multiplicative_margin import LSoftmaxLoss, SphereFaceLoss, SphereFaceRLoss
from .losses.one_vs_rest import P2SGradLoss, SphereFace2Loss, UniFaceLoss
from .losses.options import LossOptions
from .margins import arcface, combined, cosface, detached, sphereface
from .sampling import sample_classes, sample_optimizer
from .schedules import LambdaAnnealing, MarginWarmup, Schedule
from .training import mean_directions, parameter_groups, suggest_margin, suggest_scale

__version__ = "0.1.0"

__all__ = [
    "AdaCosLoss",
    "AdaFaceLoss",
    "ArcFaceLoss",
    "CircleLoss",
    "CombinedMarginLoss",
    "CosFaceLoss",
    "CurricularFaceLoss",
    "ElasticFaceLoss",
    "InterTopKLoss",
    "KappaFaceLoss",
    "LSoftmaxLoss",
    "LambdaAnnealing",
    "LiArcFaceLoss",
    "LossOptions",
    "MVSoftmaxLoss",
    "MagFaceLoss",
    "MarginLoss",
    "MarginWarmup",
    "NPCFaceLoss",
    "NormalizedSoftmaxLoss",
    "P2SGradLoss",
    "Plan",
    "Schedule",
    "SphereFace2Loss",
    "SphereFaceLoss",
    "SphereFaceRLoss",
    "SubCenterArcFaceLoss",
    "UniFaceLoss",
    "X2SoftmaxLoss",
    "angle_between",
    "arcface",
    "available",
    "combined",
    "cosface",
    "detached",
    "ldam_margins",
    "margin_softmax_loss",
    "mean_directions",
    "one_vs_rest_loss",
    "parameter_groups",
    "plan",
    "power_law_margins",
    "sample_classes",
    "sample_optimizer",
    "sphereface",
    "suggest_margin",
    "suggest_scale",
    "target_angle",
]

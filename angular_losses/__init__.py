"""Numerically stable angular-margin losses for PyTorch.

A loss of this family is a margin (a function of the target angle), a scale, and a softmax::

    theta  = target_angle(embeddings, weight, labels)      # (N,) radians, exact from 0 to pi
    target = scale * margin(theta)                         # (N,) any differentiable function
    loss   = softplus(logsumexp_{j != y}(scale * cos_j) - target)

Shapes throughout: embeddings (N, d), class centres ``weight`` (C, d), labels (N,). Angles are in
radians.
"""

from .engine.planner import Plan as Plan
from .engine.planner import plan as plan
from .functional import margin_softmax_loss as margin_softmax_loss
from .functional import one_vs_rest_loss as one_vs_rest_loss
from .geometry import angle_between as angle_between
from .geometry import target_angle as target_angle
from .losses import AdaCosLoss as AdaCosLoss
from .losses import AdaFaceLoss as AdaFaceLoss
from .losses import ArcFaceLoss as ArcFaceLoss
from .losses import CircleLoss as CircleLoss
from .losses import CombinedMarginLoss as CombinedMarginLoss
from .losses import CosFaceLoss as CosFaceLoss
from .losses import CurricularFaceLoss as CurricularFaceLoss
from .losses import ElasticFaceLoss as ElasticFaceLoss
from .losses import InterTopKLoss as InterTopKLoss
from .losses import KappaFaceLoss as KappaFaceLoss
from .losses import LiArcFaceLoss as LiArcFaceLoss
from .losses import LSoftmaxLoss as LSoftmaxLoss
from .losses import MagFaceLoss as MagFaceLoss
from .losses import MarginLoss as MarginLoss
from .losses import MVSoftmaxLoss as MVSoftmaxLoss
from .losses import NormalizedSoftmaxLoss as NormalizedSoftmaxLoss
from .losses import NPCFaceLoss as NPCFaceLoss
from .losses import P2SGradLoss as P2SGradLoss
from .losses import SphereFace2Loss as SphereFace2Loss
from .losses import SphereFaceLoss as SphereFaceLoss
from .losses import SphereFaceRLoss as SphereFaceRLoss
from .losses import SubCenterArcFaceLoss as SubCenterArcFaceLoss
from .losses import UniFaceLoss as UniFaceLoss
from .losses import X2SoftmaxLoss as X2SoftmaxLoss
from .losses import available as available
from .losses import ldam_margins as ldam_margins
from .losses import power_law_margins as power_law_margins
from .margins import arcface as arcface
from .margins import combined as combined
from .margins import cosface as cosface
from .margins import detached as detached
from .margins import sphereface as sphereface
from .sampling import sample_classes as sample_classes
from .sampling import sample_optimizer as sample_optimizer
from .schedules import LambdaAnnealing as LambdaAnnealing
from .schedules import MarginWarmup as MarginWarmup
from .schedules import Schedule as Schedule
from .training import mean_directions as mean_directions
from .training import parameter_groups as parameter_groups
from .training import suggest_margin as suggest_margin
from .training import suggest_scale as suggest_scale

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

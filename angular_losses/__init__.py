"""Numerically stable angular-margin losses for PyTorch.

A loss of this family is a margin (a function of the target angle), a scale, and a softmax::

    theta  = target_angle(embeddings, weight, labels)      # (N,) radians, exact from 0 to pi
    target = scale * margin(theta)                         # (N,) any differentiable function
    loss   = softplus(logsumexp_{j != y}(scale * cos_j) - target)

Shapes throughout: embeddings (N, d), class centres ``weight`` (C, d), labels (N,). Angles are in
radians.
"""

from .adaptive import AdaCosLoss as AdaCosLoss
from .adaptive import AdaFaceLoss as AdaFaceLoss
from .adaptive import ElasticFaceLoss as ElasticFaceLoss
from .adaptive import KappaFaceLoss as KappaFaceLoss
from .adaptive import MagFaceLoss as MagFaceLoss
from .adaptive import ldam_margins as ldam_margins
from .adaptive import power_law_margins as power_law_margins
from .base import MarginLoss as MarginLoss
from .binary import P2SGradLoss as P2SGradLoss
from .binary import SphereFace2Loss as SphereFace2Loss
from .binary import UniFaceLoss as UniFaceLoss
from .catalogue import available as available
from .geometry import angle_between as angle_between
from .geometry import target_angle as target_angle
from .losses import ArcFaceLoss as ArcFaceLoss
from .losses import CombinedMarginLoss as CombinedMarginLoss
from .losses import CosFaceLoss as CosFaceLoss
from .losses import LiArcFaceLoss as LiArcFaceLoss
from .losses import NormalizedSoftmaxLoss as NormalizedSoftmaxLoss
from .losses import SubCenterArcFaceLoss as SubCenterArcFaceLoss
from .margins import arcface as arcface
from .margins import combined as combined
from .margins import cosface as cosface
from .margins import detached as detached
from .margins import sphereface as sphereface
from .mining import CircleLoss as CircleLoss
from .mining import CurricularFaceLoss as CurricularFaceLoss
from .mining import InterTopKLoss as InterTopKLoss
from .mining import MVSoftmaxLoss as MVSoftmaxLoss
from .mining import NPCFaceLoss as NPCFaceLoss
from .multiplicative import LSoftmaxLoss as LSoftmaxLoss
from .multiplicative import SphereFaceLoss as SphereFaceLoss
from .multiplicative import SphereFaceRLoss as SphereFaceRLoss
from .one_vs_rest import one_vs_rest_loss as one_vs_rest_loss
from .planner import Plan as Plan
from .planner import plan as plan
from .schedules import LambdaAnnealing as LambdaAnnealing
from .schedules import MarginWarmup as MarginWarmup
from .schedules import Schedule as Schedule
from .softmax import margin_softmax_loss as margin_softmax_loss
from .training import parameter_groups as parameter_groups
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
    "angle_between",
    "arcface",
    "available",
    "combined",
    "cosface",
    "detached",
    "ldam_margins",
    "margin_softmax_loss",
    "one_vs_rest_loss",
    "parameter_groups",
    "plan",
    "power_law_margins",
    "sphereface",
    "suggest_scale",
    "target_angle",
]

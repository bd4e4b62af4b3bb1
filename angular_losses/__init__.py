"""Numerically stable angular-margin losses for PyTorch.

A loss of this family is a margin (a function of the target angle), a scale, and a softmax::

    theta  = target_angle(embeddings, weight, labels)      # (N,) radians, exact from 0 to pi
    target = scale * margin(theta)                         # (N,) any differentiable function
    loss   = softplus(logsumexp_{j != y}(scale * cos_j) - target)

Shapes throughout: embeddings (N, d), class centres ``weight`` (C, d), labels (N,). Angles are in
radians.
"""

from .geometry import angle_between as angle_between
from .geometry import target_angle as target_angle
from .losses import ArcFaceLoss as ArcFaceLoss
from .losses import CombinedMarginLoss as CombinedMarginLoss
from .losses import CosFaceLoss as CosFaceLoss
from .losses import MarginLoss as MarginLoss
from .losses import NormalizedSoftmaxLoss as NormalizedSoftmaxLoss
from .losses import SphereFaceLoss as SphereFaceLoss
from .margins import arcface as arcface
from .margins import combined as combined
from .margins import cosface as cosface
from .margins import detached as detached
from .margins import sphereface as sphereface
from .planner import Plan as Plan
from .planner import plan as plan
from .schedules import LambdaAnnealing as LambdaAnnealing
from .schedules import MarginWarmup as MarginWarmup
from .schedules import Schedule as Schedule
from .softmax import margin_softmax_loss as margin_softmax_loss

__version__ = "0.1.0"

__all__ = [
    "ArcFaceLoss",
    "CombinedMarginLoss",
    "CosFaceLoss",
    "LambdaAnnealing",
    "MarginLoss",
    "MarginWarmup",
    "NormalizedSoftmaxLoss",
    "Plan",
    "Schedule",
    "SphereFaceLoss",
    "angle_between",
    "arcface",
    "combined",
    "cosface",
    "detached",
    "margin_softmax_loss",
    "plan",
    "sphereface",
    "target_angle",
]

"""Schedules: how much of the margin is in force as training goes on.

A loss takes a copy of the schedule that it is given, hands it the margin at each forward pass and
advances it by one with each training step: a forward pass in training mode with gradients enabled.
Its step is a buffer, so it is saved and restored with the loss's ``state_dict``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import validation


class Schedule(nn.Module, ABC):
    """What all schedules share: the number of training steps taken, as a buffer.

    Attributes:
        step: () int64.
        is_linear: Whether ``forward`` makes a weighted sum of what ``target`` returns, and so of
            its derivatives too.
    """

    step: Tensor
    is_linear = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def forward(self, target: Callable[[Tensor, float | Tensor], Tensor], theta: Tensor) -> Tensor:
        """The target logits before scaling at the present step.

        Args:
            target: A function of theta (N,) and of the share of the margin in force, in [0, 1].
            theta: Target angles (N,) in radians.
        """

    def advance(self) -> None:
        """Count one training step."""
        self.step += 1


class LambdaAnnealing(Schedule):
    r"""SphereFace's annealing: from the plain cosine towards the margin.

    .. math:: \frac{\lambda\cos\theta + \psi(\theta)}{1 + \lambda}, \qquad
        \lambda = \max\bigl(\lambda_{\min},\ \mathrm{base}\,(1 + \gamma t)^{-\mathrm{power}}\bigr)

    with t the number of training steps taken, 0 at the first. Works with any margin.

    Args:
        base: lambda at the first step.
        gamma: How fast lambda falls.
        power: Exponent of the fall.
        minimum: The lambda at which it stops; 0 leaves the pure margin in the end.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If one is negative.

    Example:
        >>> from angular_losses import SphereFaceLoss
        >>> loss = SphereFaceLoss(10, 64, margin=4, schedule=LambdaAnnealing())
        >>> _ = loss(torch.randn(8, 64), torch.arange(8))
        >>> loss.schedule.value()
        tensor(892.8571)

    References:
        Liu et al., "SphereFace", CVPR 2017, arXiv:1704.08063; the defaults are those of the
        authors' Caffe code, which counts its first step as 1.
    """

    is_linear = True

    def __init__(
        self, base: float = 1000.0, gamma: float = 0.12, power: float = 1.0, minimum: float = 5.0
    ) -> None:
        super().__init__()
        self.base = validation.number("base", base, 0.0)
        self.gamma = validation.number("gamma", gamma, 0.0)
        self.power = validation.number("power", power, 0.0)
        self.minimum = validation.number("minimum", minimum, 0.0)

    def value(self) -> Tensor:
        """The present lambda, a float32 scalar on the schedule's device."""
        return (self.base * (1 + self.gamma * self.step) ** -self.power).clamp(min=self.minimum)

    def forward(self, target: Callable[[Tensor, float | Tensor], Tensor], theta: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        share = 1 / (1 + self.value())
        plain = target(theta, 0.0)
        return plain + share * (target(theta, 1.0) - plain)

    def extra_repr(self) -> str:
        """The settings."""
        return f"base={self.base}, gamma={self.gamma}, power={self.power}, minimum={self.minimum}"


class MarginWarmup(Schedule):
    r"""Margin warm-up: the margin itself grows linearly, from none to the whole.

    At training step t = 0, 1, ... the share :math:`\min(1, t / \mathrm{steps})` of the margin is
    in force: m grows from 0 (from 1 for multiplicative margins) to its value.

    Args:
        steps: The number of training steps until the whole margin is in force.

    Raises:
        TypeError: If ``steps`` is not an int.
        ValueError: If it is below 1.

    Example:
        >>> from angular_losses import ArcFaceLoss
        >>> loss = ArcFaceLoss(10, 64, schedule=MarginWarmup(1000))
        >>> _ = loss(torch.randn(8, 64), torch.arange(8))
        >>> loss.schedule.value()
        tensor(0.0010)
    """

    is_linear = True

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = validation.positive_integer("steps", steps)

    def value(self) -> Tensor:
        """The present share of the margin in [0, 1], a float32 scalar on the schedule's device."""
        return (self.step / self.steps).clamp(max=1.0)

    def forward(self, target: Callable[[Tensor, float | Tensor], Tensor], theta: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        return target(theta, self.value())

    def extra_repr(self) -> str:
        """The settings."""
        return f"steps={self.steps}"

"""Schedules: the share of the margin in force during training.

A loss copies its schedule, applies it to the margin in each forward pass, and advances it by one in
each training step: a forward pass in training mode with gradients enabled. The step is a buffer,
saved and restored with the ``state_dict`` of the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import validation


class Schedule(nn.Module, ABC):
    """Base class of schedules, with the number of training steps as a buffer.

    Attributes:
        step: () int64.
        is_linear: Whether ``forward`` is a weighted sum of values of ``target``, and so of its
            derivatives.
    """

    step: Tensor
    is_linear = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @abstractmethod
    def forward(self, target: Callable[[Tensor, float | Tensor], Tensor], theta: Tensor) -> Tensor:
        """The target logits before scaling at the current step, and of no other state.

        Args:
            target: A function of theta (N,) and of the share of the margin in force, in [0, 1].
            theta: Target angles (N,) in radians.
        """

    def advance(self) -> None:
        """Count one training step."""
        self.step += 1

    def reset_parameters(self) -> None:
        """Go back to step 0."""
        self.step.zero_()

    def extra_repr(self) -> str:
        """The settings."""
        shown = {name: value for name, value in vars(self).items() if name[0] != "_"}
        return ", ".join(f"{name}={value}" for name, value in shown.items() if name != "training")


class LambdaAnnealing(Schedule):
    r"""SphereFace's annealing: from the plain cosine to the margin.

    .. math:: \frac{\lambda\cos\theta + \psi(\theta)}{1 + \lambda}, \qquad
        \lambda = \max\bigl(\lambda_{\min},\ \mathrm{base}\,(1 + \gamma t)^{-\mathrm{power}}\bigr)

    with t the number of training steps taken, 0 at the first. Works with any margin.

    Args:
        base: lambda at the first step.
        gamma: The rate at which lambda decreases.
        power: The exponent of the decrease.
        minimum: The lower bound of lambda; with 0 it approaches the full margin.

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
        """The current lambda, a float32 scalar on the schedule's device."""
        return (self.base * (1 + self.gamma * self.step) ** -self.power).clamp(min=self.minimum)

    def forward(self, target: Callable[[Tensor, float | Tensor], Tensor], theta: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        share = 1 / (1 + self.value())
        plain = target(theta, 0.0)
        return plain + share * (target(theta, 1.0) - plain)


class MarginWarmup(Schedule):
    r"""Margin warm-up: the margin increases linearly from zero to its full value.

    At training step t = 0, 1, ... the share :math:`\min(1, t / \mathrm{steps})` of the margin is
    in force: m increases from 0 (from 1 for multiplicative margins) to its value.

    Args:
        steps: The number of training steps until the full margin is in force.

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
        """The current share of the margin in [0, 1], a float32 scalar on the schedule's device."""
        return (self.step / self.steps).clamp(max=1.0)

    def forward(self, target: Callable[[Tensor, float | Tensor], Tensor], theta: Tensor) -> Tensor:
        """See :class:`Schedule`."""
        return target(theta, self.value())

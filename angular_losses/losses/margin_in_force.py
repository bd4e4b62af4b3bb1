"""The margin in force: that of a loss, with its schedule and its kind of gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .. import margins
from ..schedules import Schedule

Target: TypeAlias = Callable[[Tensor, "float | Tensor"], Tensor]


def in_force(target: Target, schedule: Schedule | None, gradient: str) -> margins.MarginFunction:
    """The target logits before scaling as a function of the target angles (N,), in radians.

    The schedule sets the share of the margin that ``target`` takes; without one it is 1.
    """

    def margin(theta: Tensor) -> Tensor:
        if schedule is None:
            return target(theta, 1.0)
        scheduled: Tensor = schedule(target, theta)
        return scheduled

    if gradient == "detached":
        return margins.KnownDescent(
            margins.detached(margin), lambda theta: (margin(theta).detach(), torch.sin(theta))
        )
    if not margins.has_descent(target) or not (schedule is None or schedule.is_linear):
        return margin

    def with_descent(theta: Tensor) -> tuple[Tensor, Tensor]:
        if schedule is None:
            return target.with_descent(theta, 1.0)
        value, descent = schedule(lambda *at: torch.stack(target.with_descent(*at)), theta)
        return value, descent

    return margins.KnownDescent(margin, with_descent)

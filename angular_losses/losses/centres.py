"""The class centres that a loss owns, and a warning where no optimiser moves them."""

from __future__ import annotations

import functools
import warnings
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..margins import MarginFunction

# Steps of an optimiser, after the first with a gradient, that leave the centres as they are.
FORGOTTEN_AFTER = 20


class ClassCentres:
    """What a loss, a ``nn.Module``, says of its class centres; PML's interface does so too."""

    _centres_name = "weight"
    _centres_are_columns = False
    num_classes: int
    sub_centers: int
    normalize_weight = True
    is_random = False
    training: bool
    ignore_index: int | None = None

    @property
    def _centres(self) -> nn.Parameter:
        """The parameter that the class centres are."""
        parameter: nn.Parameter = getattr(self, self._centres_name)
        return parameter

    def margin_function(self, embeddings: Tensor, labels: Tensor) -> MarginFunction:
        """The margin now in force for a batch, as a function of its target angles (N,)."""
        raise NotImplementedError

    def _by_centre(self, values: Tensor) -> Tensor:
        """What is laid out as the parameter of the centres, with a row for each of them."""
        return values.t() if self._centres_are_columns else values


@dataclass
class _Watch:
    """What the centres were when an optimiser stepped first, and the steps since."""

    version: int
    centre: Tensor
    gradient: Tensor
    steps: int = 0


_watched: weakref.WeakKeyDictionary[ClassCentres, _Watch | None] = weakref.WeakKeyDictionary()


def watch(loss: ClassCentres) -> None:
    """Warn, once, if optimisers step while gradients reach the centres and those stay as they are.

    In gradient accumulation no optimiser steps between the batches, so no batches are too many.
    """
    _watched[loss] = None
    _begin()


@functools.cache
def _begin() -> None:
    register_optimizer_step_post_hook(_look)


def _look(optimizer: torch.optim.Optimizer, *arguments: object) -> None:
    if torch.compiler.is_compiling():
        return
    for loss, seen in list(_watched.items()):
        centres = loss._centres
        gradient = centres.grad
        if gradient is None or not (loss.training and centres.requires_grad):
            continue
        if gradient.is_cuda and torch.cuda.is_current_stream_capturing():
            continue  # nothing can be read, and what is kept would be the graph's
        if seen is None:
            first = centres.detach()[:1].clone()
            _watched[loss] = _Watch(centres._version, first, gradient.detach().sum())
        elif centres._version != seen.version:
            del _watched[loss]
        else:
            seen.steps += 1
            if seen.steps == FORGOTTEN_AFTER:
                _warn(loss, seen, gradient)


def _warn(loss: ClassCentres, seen: _Watch, gradient: Tensor) -> None:
    del _watched[loss]
    # A change through .data has no version; and the steps may all be those of another model.
    is_same = torch.equal(seen.centre, loss._centres.detach()[:1])
    if is_same and not torch.equal(seen.gradient, gradient.detach().sum()):
        warnings.warn(
            f"{loss._centres_name}: the class centres of {type(loss).__name__} have not changed in "
            f"{FORGOTTEN_AFTER} steps of an optimiser; does it hold the loss's parameters? See "
            "parameter_groups",
            stacklevel=4,  # the call of step
        )

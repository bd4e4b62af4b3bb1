"""Warnings of likely mistakes: centres without optimiser, small scale, normalised embeddings."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..geometry import lengths
from .centres import ClassCentres

# Steps of an optimiser without a change of the centres, after the first with a gradient.
FORGOTTEN_AFTER = 20


@dataclass
class _Watch:
    """The centres at the first step of an optimiser, and the number of steps since."""

    version: int
    centre: Tensor
    gradient: Tensor
    steps: int = 0


_watched: weakref.WeakKeyDictionary[ClassCentres, _Watch | None] = weakref.WeakKeyDictionary()
_register_once = functools.cache(register_optimizer_step_post_hook)


def watch(loss: ClassCentres) -> None:
    """Warn once if optimisers step, and the centres have gradients but do not change.

    Only steps of optimisers are counted, so gradient accumulation over any number of batches is
    not warned of.
    """
    _watched[loss] = None
    _register_once(_look)


def _look(optimizer: torch.optim.Optimizer, *arguments: object) -> None:
    if torch.compiler.is_compiling():
        return
    for loss, seen in list(_watched.items()):
        centres = loss._centres
        gradient = centres.grad if centres.is_leaf else None  # not where it is parametrised
        if gradient is None or not (loss.training and centres.requires_grad):
            continue
        if gradient.is_cuda and torch.cuda.is_current_stream_capturing():
            continue  # nothing can be read, and a copy would be in the graph's memory
        if seen is None:
            first = centres.detach()[:1].clone()
            _watched[loss] = _Watch(centres._version, first, gradient.detach().sum())
            continue
        seen.steps += 1
        is_same = centres._version == seen.version
        if is_same and seen.steps < FORGOTTEN_AFTER:
            continue
        del _watched[loss]
        # A change through .data has no version; and the steps may all be those of another model.
        is_same = is_same and torch.equal(seen.centre, centres.detach()[:1])
        if is_same and not torch.equal(seen.gradient, gradient.detach().sum()):
            warnings.warn(
                f"{loss._centres_name}: the class centres of {type(loss).__name__} have not "
                f"changed in {FORGOTTEN_AFTER} steps of an optimiser; does it hold the loss's "
                "parameters? See parameter_groups",
                stacklevel=3,  # the call of step
            )


def warn_of_small_scale(scale: float, num_classes: int) -> None:
    """Warn if even embeddings equal to their centres would have a low probability."""
    if num_classes < 2:
        return
    # CosFace's bound: the smallest scale for probability 0.9 with the best of all centres.
    least = (num_classes - 1) / num_classes * math.log(9 * (num_classes - 1))
    if scale < least:
        warnings.warn(
            f"scale: {scale:g} is small for {num_classes} classes: with less than "
            f"{least:.1f} the loss stays large for perfect embeddings; see suggest_scale",
            stacklevel=4,
        )


def warn_of_unit_vectors(loss: object, embeddings: Tensor) -> None:
    """Warn if all embeddings have length 1, to the rounding of their dtype."""
    length = lengths(embeddings)
    rounding = max(8 * torch.finfo(embeddings.dtype).eps, 1e-6)
    if len(length) and bool((length - 1).abs().amax() < rounding):
        warnings.warn(
            f"embeddings: all have length 1, and {type(loss).__name__} learns from their "
            "lengths: do not normalise them before the loss",
            stacklevel=7,  # the call of the loss, through torch's Module
        )

"""The options that every loss takes: their types, and how signatures and ``repr`` show them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from ..engine.placement import WHOLE
from ..schedules import Schedule


class LossOptions(TypedDict, total=False):
    """The keyword arguments that every loss takes; :class:`MarginLoss` describes them."""

    schedule: Schedule | None
    gradient: str
    sub_centers: int
    reduction: str
    class_weight: Tensor | Sequence[float] | None
    label_smoothing: float
    ignore_index: int
    mode: str
    memory_budget: int | None
    device: torch.device | str | None
    dtype: torch.dtype | None


def with_options(init: Callable[..., None], base: Callable[..., None]) -> inspect.Signature:
    """The signature of an ``__init__``, with what its base takes for ``**options``."""
    signature = inspect.signature(init)
    shown = [each for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD]
    if len(shown) < len(signature.parameters):
        names = LossOptions.__optional_keys__ - signature.parameters.keys()
        of_base = inspect.signature(base).parameters
        shown += [each for name, each in of_base.items() if name in names]
    return signature.replace(parameters=shown)


_SHOWN_FIRST = ("training", "num_classes", "embedding_size")
_HIDDEN = {"beyond": "decreasing", "keeps_lengths": False, "shard": WHOLE}


def settings(loss: nn.Module, base: Callable[..., None]) -> list[str]:
    """The settings of a loss, with those left at the defaults of its base left out."""
    parameters = inspect.signature(base).parameters
    defaults = _HIDDEN | {name: each.default for name, each in parameters.items()}
    return [
        f"{name}={value!r}"
        for name, value in vars(loss).items()
        if not name.startswith("_")
        and name not in _SHOWN_FIRST
        and not isinstance(value, Tensor)
        and repr(value) != repr(defaults.get(name))
    ]

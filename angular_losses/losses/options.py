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
    """The types of the options that every loss takes; :class:`MarginLoss` describes them.

    For the ``**options`` of a loss of your own, with ``Unpack`` from ``typing`` (Python 3.11) or
    ``typing_extensions``.

    Example:
        >>> from typing_extensions import Unpack
        >>> from angular_losses import ArcFaceLoss
        >>> class Narrow(ArcFaceLoss):
        ...     def __init__(self, num_classes: int, **options: Unpack[LossOptions]) -> None:
        ...         super().__init__(num_classes, 64, **options)
        >>> Narrow(10, reduction="sum")
        Narrow(10, 64, scale=64.0, reduction='sum', margin=0.5)
    """

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


def show_options(cls: type[nn.Module], options: type) -> None:
    """Show in the signature of a class what its bases take of a ``TypedDict`` of ``**options``."""
    init = vars(cls).get("__init__")
    if init is None:
        return
    signature = inspect.signature(init)
    shown = {k: each for k, each in signature.parameters.items() if each.kind != each.VAR_KEYWORD}
    if len(shown) < len(signature.parameters):
        for base in cls.__mro__[1 : cls.__mro__.index(nn.Module)]:
            for name, each in inspect.signature(base).parameters.items():
                if name in options.__annotations__:
                    annotation = options.__annotations__[name].__forward_arg__
                    option = each.replace(kind=each.KEYWORD_ONLY, annotation=annotation)
                    shown.setdefault(name, option)
    init.__signature__ = signature.replace(parameters=list(shown.values()))


_NOT_LISTED = ("training", "num_classes", "embedding_size", "statistics")
_HIDDEN = {"beyond": "decreasing", "keeps_lengths": False, "shard": WHOLE}


def settings(loss: nn.Module, base: Callable[..., None]) -> list[str]:
    """The settings of a loss, with those left at the defaults of its base left out."""
    parameters = inspect.signature(base).parameters
    defaults = _HIDDEN | {name: each.default for name, each in parameters.items()}
    return [
        f"{name}={value!r}"
        for name, value in vars(loss).items()
        if not name.startswith("_")
        and name not in _NOT_LISTED
        and not isinstance(value, Tensor)
        and not repr(value).startswith("<")
        and repr(value) != repr(defaults.get(name))
    ]

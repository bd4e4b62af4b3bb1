"""Which losses there are."""

from __future__ import annotations

from . import (
    adaptive_margin,
    additive_margin,
    class_margins,
    hard_negatives,
    multiplicative_margin,
    one_vs_rest,
)
from .base import MarginLoss

_MODULES = (
    additive_margin,
    multiplicative_margin,
    class_margins,
    adaptive_margin,
    hard_negatives,
    one_vs_rest,
)


def available() -> dict[str, str]:
    """The losses of this package, by name in alphabetical order, with a line about each.

    Example:
        >>> from angular_losses import available
        >>> available()["ArcFaceLoss"]
        "ArcFace (AAM-Softmax): the margin added to the target's angle."
        >>> for name, line in available().items():
        ...     print(f"{name:22} {line}")  # doctest: +ELLIPSIS
        AdaCosLoss             AdaCos: no margin, and a scale that needs no tuning.
        ...
    """
    found = {
        name: (loss.__doc__ or "").partition("\n")[0]
        for module in _MODULES
        for name, loss in vars(module).items()
        if isinstance(loss, type) and issubclass(loss, MarginLoss) and name[0] != "_"
    }
    del found[MarginLoss.__name__]
    return dict(sorted(found.items()))

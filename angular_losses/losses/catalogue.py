"""Which losses there are: those that the package exports."""

from __future__ import annotations

import sys

from .base import MarginLoss


def available() -> dict[str, str]:
    """The losses of this package, by name, with a line about each.

    Returns:
        Class names and first lines of their documentation, in alphabetical order.

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
        for name, loss in vars(sys.modules["angular_losses"]).items()
        if isinstance(loss, type) and issubclass(loss, MarginLoss) and loss is not MarginLoss
    }
    return dict(sorted(found.items()))

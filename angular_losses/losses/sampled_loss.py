"""A loss that uses some of its classes in each training step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._compile import _disable_dynamo

from ..engine.placement import Sampled
from .base import MarginLoss

if TYPE_CHECKING:
    from typing_extensions import Self


class SampledLoss(MarginLoss):
    """A loss converted by :func:`angular_losses.sample_classes`.

    In evaluation mode it uses all classes.

    Attributes:
        sample_rate: The share of the classes used in a training step, in [0, 1).
    """

    shard: Sampled
    sample_rate: float

    def extend(self, num_new: int, init: Tensor | None = None) -> None:
        """Add classes, as :meth:`MarginLoss.extend`; call ``sample_optimizer`` again."""
        super().extend(num_new, init)
        self.shard = Sampled(self.num_classes)

    def _labels(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        labels, label_weight = super()._labels(*arguments)
        self.shard.sampled = None
        if self.training and isinstance(labels, Tensor):
            drawn = labels.long().flatten()
            drawn = drawn.where(drawn != self.ignore_index, 0)  # where ignored rows are looked up
            # One class at least, for an empty batch.
            self.shard.draw(drawn, max(self.sample_rate, 1 / self.num_classes))
        return labels, label_weight

    def train(self, mode: bool = True) -> Self:
        """Discard the last step's sample: evaluation uses all classes, also outside of a pass."""
        self.shard.sampled = None
        return super().train(mode)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the class by the one it is made from, as it has no importable name."""
        return _remade, (type(self).__mro__[2],), self.__dict__


def sampled_class(cls: type[MarginLoss]) -> type[SampledLoss]:
    """The class of a loss, with sampling."""
    # Compiled, a sample of another size each step would be another graph each step.
    forward = _disable_dynamo(cls.forward)
    return type(f"Sampled{cls.__name__}", (SampledLoss, cls), {"forward": forward})


def _remade(cls: type[MarginLoss]) -> MarginLoss:
    made = sampled_class(cls)
    return made.__new__(made)

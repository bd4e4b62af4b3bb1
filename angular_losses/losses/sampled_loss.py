"""A loss that uses some of its classes in each training step."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes

from ..engine.placement import Sampled
from .base import MarginLoss
from .state import kept_passes, recomputed_pass


class SampledLoss(MarginLoss):
    """A loss converted by :func:`angular_losses.sample_classes`.

    In evaluation mode it uses all classes.

    Attributes:
        sample_rate: The share of the classes used in a training step, in [0, 1).
    """

    shard: Sampled
    sample_rate: float
    _last: Tensor | None = None  # the classes of the last step

    def extend(self, num_new: int, init: Tensor | None = None) -> None:
        """Add classes, as :meth:`MarginLoss.extend`; call ``sample_optimizer`` again."""
        super().extend(num_new, init)
        self.shard = Sampled(self.num_classes)

    def _labels(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
        labels, label_weight = super()._labels(*arguments)
        is_trained = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        if is_trained and averaging_wrapper(self.weight)[0] is not None:
            raise RuntimeError(
                "DistributedDataParallel: expected it without sampled classes, whose gradients are "
                "sparse; use angular_losses.distributed.shard(loss, mesh, sample_rate=...)"
            )
        if self.training and isinstance(labels, Tensor):
            drawn = labels.long().flatten()
            drawn = drawn.where(drawn != self.ignore_index, 0)  # where ignored rows are looked up
            # One class at least, for an empty batch.
            self._draw(drawn, max(self.sample_rate, 1 / self.num_classes))
        return labels, label_weight

    def _draw(self, labels: Tensor, rate: float) -> None:
        """Choose the classes of a pass: for a recomputed one those that it had."""
        again, repeats = recomputed_pass(self), self._repeats_a_step()
        before = self._last if repeats and again is None else None
        # With the random numbers of then, which checkpointing restores, it draws the same; not if
        # it had those of its step.
        drawn = self.shard.draw(labels, rate, before=before)
        if not repeats and torch.is_grad_enabled():
            self._last = drawn
        if again is None:
            return
        with _disable_current_modes():  # those of selective checkpointing know each operator
            is_kept = any(torch.equal(drawn, each.drawn) for each in kept_passes(self))
            if not is_kept and torch.isin(labels, again.drawn).all():  # not one without a graph
                self.shard.sampled = again.drawn

    @property
    def _drawn(self) -> Tensor | None:
        return self.shard.sampled

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the class by the one it is made from, as it has no importable name."""
        return _remade, (type(self).__mro__[2],), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, whose optimiser has to be prepared too."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        refuse_unprepared_optimizers(self)


def sampled_class(cls: type[MarginLoss]) -> type[SampledLoss]:
    """The class of a loss, with sampling."""

    @functools.wraps(cls.forward)
    def forward(self: SampledLoss, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        try:
            return cls.forward(self, *arguments, **options)
        finally:  # outside of a pass all classes take part
            self.shard.sampled = None

    # Compiled, a sample of another size each step would be another graph each step.
    methods = {"forward": _disable_dynamo(forward)}
    return type(f"Sampled{cls.__name__}", (SampledLoss, cls), methods)


def _remade(cls: type[MarginLoss]) -> MarginLoss:
    made = sampled_class(cls)
    return made.__new__(made)


def averaging_wrapper(weight: nn.Parameter) -> tuple[DistributedDataParallel | None, str]:
    """What averages the gradient of a weight after this forward pass, and its name in there."""
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is not None:
        for name, each in wrapper.module.named_parameters():
            if each is weight and name not in wrapper.parameters_to_ignore:
                return wrapper, name
    return None, ""


_sampled: weakref.WeakSet[MarginLoss] = weakref.WeakSet()
_register_once = functools.cache(register_optimizer_step_pre_hook)


def refuse_unprepared_optimizers(loss: MarginLoss) -> None:
    """Make each step with the sparse gradient of a loss raise.

    Optimisers prepared by ``sample_optimizer`` or ``shard_optimizer`` step with a dense one.
    """
    _sampled.add(loss)
    _register_once(_refuse)


def _refuse(optimizer: torch.optim.Optimizer, *_: object) -> None:
    held = held_by(optimizer)
    for loss in _sampled:
        gradient = loss.weight.grad
        if gradient is not None and gradient.is_sparse and id(loss.weight) in held:
            preparing = "sample_optimizer" if isinstance(loss, SampledLoss) else "shard_optimizer"
            raise RuntimeError(
                "optimizer: expected it to be prepared for sampled classes by "
                f"{preparing}(optimizer, loss)"
            )


def held_by(optimizer: torch.optim.Optimizer) -> list[int]:
    """The identities of the parameters of an optimiser."""
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]

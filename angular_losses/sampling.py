"""Sampled classes: losses that use some of them per step, optimisers that update their rows."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn

from . import validation
from .engine.placement import WHOLE, Sampled
from .losses.base import MarginLoss
from .losses.sampled_loss import SampledLoss, held_by, sampled_class
from .losses.sampled_loss import refuse_unprepared_optimizers as refuse_unprepared_optimizers

_Loss = TypeVar("_Loss", bound=MarginLoss)


def sample_classes(loss: _Loss, sample_rate: float) -> _Loss:
    """Use some of the classes in each training step, in place: those of the labels, and others.

    With very many classes a step then takes the time and memory of a few: its products, the
    gradient of the weight, which is sparse, and the optimiser's step, which
    :func:`sample_optimizer` prepares. The classes are drawn from torch's generator, and in
    evaluation mode all are used. Classes shared by several processes are sampled by
    :func:`angular_losses.distributed.shard`.

    Args:
        loss: A softmax loss of this package, unsharded.
        sample_rate: The share of the classes used in a training step, in [0, 1], as in Partial FC:
            those of the labels, however many, and random others up to this share. 1 ends sampling.
            Counting the classes synchronises with a GPU once in each step.

    Returns:
        The loss, still of its class.

    Raises:
        TypeError: If the loss is not of this package, or sharded.
        ValueError: If the rate is out of range, or the loss is a sum or a mean over all classes:
            without a softmax, or with label smoothing.

    Example:
        >>> from angular_losses import ArcFaceLoss
        >>> loss = sample_classes(ArcFaceLoss(100_000, 64), 0.01)
        >>> optimiser = torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9)
        >>> sample_optimizer(optimiser, loss)
        >>> loss(torch.randn(8, 64), torch.arange(8)).backward()
        >>> loss.weight.grad.coalesce().values().shape
        torch.Size([1000, 64])

    References:
        An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face
        Recognition CNNs by Partial FC", CVPR 2022, arXiv:2203.15565.
    """
    if not isinstance(loss, MarginLoss):
        raise TypeError(f"loss: expected a loss of this package, got {loss!r}")
    if loss.shard != WHOLE and not isinstance(loss, SampledLoss):
        raise TypeError("loss: expected an unsharded loss, got a sharded one")
    validation.share("sample_rate", sample_rate)
    if isinstance(loss, SampledLoss):
        del loss.sample_rate
        vars(loss).pop("_last", None)
        loss.__class__ = type(loss).__mro__[2]
        cast(MarginLoss, loss).shard = WHOLE
    if sample_rate < 1:
        check_may_sample(loss)
        sampled = cast(SampledLoss, loss)
        sampled.__class__ = sampled_class(type(loss))
        sampled.shard, sampled.sample_rate = Sampled(loss.num_classes), float(sample_rate)
        refuse_unprepared_optimizers(loss)
    return loss


def check_may_sample(loss: MarginLoss) -> None:
    """Raise ValueError if a loss needs all classes."""
    if type(loss)._batch_loss is not MarginLoss._batch_loss:
        raise ValueError(
            f"sample_rate: expected 1 for {type(loss).__name__}, which is a sum over all classes"
        )
    if loss.label_smoothing:
        raise ValueError(
            "sample_rate: expected 1 with label smoothing, which is a mean over all classes"
        )


def sample_optimizer(optimizer: torch.optim.Optimizer, loss: MarginLoss) -> None:
    """Make an optimiser update only the rows of sampled classes.

    Momentum, moments and weight decay then change no row that was not sampled since the last step;
    the momentum of a row is that of its own steps. A step that raises, or is interrupted, leaves
    weight and state of the loss as they were before. As in ``torch.optim.SparseAdam``, a count of
    steps is that of the whole weight: the bias correction of a row sampled for the first time late
    in training is that of the other rows.

    Args:
        optimizer: An element-wise optimiser of ``torch.optim``, such as SGD or AdamW; not Rprop,
            whose state does not begin with zeros.
        loss: One of :func:`sample_classes`, whose weight the optimiser holds.

    Raises:
        TypeError: If the loss is not sampled, or the optimiser cannot step rows.
        ValueError: If the optimiser does not hold its weight.

    Example:
        >>> from angular_losses import ArcFaceLoss, parameter_groups
        >>> network, loss = torch.nn.Linear(8, 64), sample_classes(ArcFaceLoss(1000, 64), 0.1)
        >>> optimiser = torch.optim.AdamW(parameter_groups(network, loss, lr=1e-3))
        >>> sample_optimizer(optimiser, loss)
    """
    if not isinstance(loss, SampledLoss):
        raise TypeError(f"loss: expected a sampled one, got {type(loss).__name__}")
    place_of_weight(optimizer, loss)
    step_rows(optimizer, loss.weight)


def place_of_weight(optimizer: torch.optim.Optimizer, loss: MarginLoss) -> int:
    """Which of the parameters of an optimiser is the weight of a loss; ValueError if none is."""
    held = held_by(optimizer)
    if id(loss.weight) not in held:
        raise ValueError("optimizer: expected it to hold the weight of the loss")
    return held.index(id(loss.weight))


# Those whose state of a row does not begin with zeros, or mixes rows.
NOT_BY_ROWS = tuple(
    getattr(torch.optim, name)
    for name in ("Rprop", "LBFGS", "Adafactor", "Muon", "SparseAdam")
    if hasattr(torch.optim, name)
)


def step_rows(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> None:
    """Make each step of an optimiser update only the rows of a weight's sparse gradient."""
    if isinstance(optimizer, NOT_BY_ROWS):
        raise TypeError(
            "optimizer: expected one that can begin with a row at any step, such as SGD or "
            f"AdamW, got {type(optimizer).__name__}"
        )
    whole_step: Callable[..., object] = optimizer.step

    @functools.wraps(whole_step)
    def step(
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], object] | None = None,
        **options: object,
    ) -> object:
        value: object = None
        if closure is not None:  # a forward pass, which needs the whole weight
            with torch.enable_grad():
                value = closure()
        with _sampled_rows(optimizer, weight):
            found = whole_step(**options)
        return found if closure is None else value

    # Not a subclass: a scheduler may have replaced the method of this optimiser already.
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]


@contextmanager
def _sampled_rows(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Iterator[None]:
    """Context in which weight, gradient and state are their sampled rows alone."""
    gradient = weight.grad
    if gradient is None or not gradient.is_sparse:
        yield
        return
    gradient, whole = gradient.coalesce(), weight.data
    rows, before = gradient.indices()[0], optimizer.state.get(weight, {})
    kept = {
        name: value
        for name, value in before.items()
        if is_of_rows(value) and len(value) == len(whole)
    }
    try:
        if before:
            optimizer.state[weight] = {
                name: value.index_select(0, rows) if name in kept else copy.deepcopy(value)
                for name, value in before.items()
            }
        _set(weight, whole.index_select(0, rows), gradient.values())
        yield
        stepped, state = weight.data, optimizer.state[weight]
    finally:
        optimizer.state.pop(weight, None)
        if before:
            optimizer.state[weight] = before
        _set(weight, whole, gradient)
    with torch.no_grad():
        weight.index_copy_(0, rows, stepped)
    for name, value in state.items():
        if is_of_rows(value) and len(value) == len(rows):
            if name not in kept:  # the optimiser's first step
                kept[name] = value.new_zeros(len(whole), *value.shape[1:])
            before[name] = kept[name].index_copy_(0, rows, value)
        else:
            before[name] = value
    optimizer.state[weight] = before


def _set(weight: nn.Parameter, values: Tensor, gradient: Tensor) -> None:
    """Set weight and gradient, which may have another shape than before."""
    weight.grad = None
    weight.data = values
    weight.grad = gradient


def is_of_rows(value: object) -> TypeGuard[Tensor]:
    """Whether a state has one row per row of the weight; scalars, such as Adam's step, do not."""
    return isinstance(value, Tensor) and value.dim() > 0

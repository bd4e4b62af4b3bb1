"""The norm of gradients of which ranks hold different parts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import validation
from ..geometry import precise_dtype
from .sharded_loss import sharded_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Tensor | Iterable[nn.Module | Tensor], max_norm: float
) -> Tensor:
    """Clip the norm of all gradients together, as that of a training without shards.

    ``torch.nn.utils.clip_grad_norm_`` sees a part of the class centres on each rank, another norm
    on each, and scales the replicas of the network differently. This norm has every parameter
    once: those of replicated modules, the weights of sharded losses (also with sampled classes),
    and distributed tensors, such as those of ``fully_shard``.

    Args:
        parameters: Modules or parameters, on one device; one that occurs twice counts once. Every
            rank has to call this with the same ones.
        max_norm: The largest 2-norm, above 0; with infinity nothing is clipped.

    Returns:
        The norm before clipping, a scalar, the same on every rank.

    Raises:
        TypeError: If something is neither a module nor a tensor, or ``max_norm`` not a number.
        ValueError: If ``max_norm`` is not above 0, or there is no parameter.

    Example:
        >>> network = torch.nn.Linear(2, 1, bias=False)
        >>> network(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> clip_grad_norm_(network, 1.0)
        tensor(5.)
        >>> network.weight.grad
        tensor([[0.6000, 0.8000]])
    """
    max_norm = max_norm if max_norm == math.inf else validation.positive("max_norm", max_norm)
    # Sums of squares of this rank's parts, by the groups whose ranks hold the other parts.
    squares: dict[tuple[ProcessGroup, ...], Tensor] = {}
    gradients, weights = [], sharded_weights()
    for parameter in _each_once(parameters):
        groups = (weights[parameter].group,) if parameter in weights else _groups(parameter)
        dtype = precise_dtype(parameter.device)
        if groups not in squares:  # on a rank without gradients too
            squares[groups] = torch.zeros((), dtype=dtype, device=parameter.device)
        if parameter.grad is None:
            continue
        values = parameter.grad
        if values.is_sparse:
            parameter.grad = values.coalesce()
            values = parameter.grad.values()
        elif hasattr(values, "to_local"):  # a DTensor
            values = values.to_local()
        gradients.append(values)
        squares[groups] += torch.linalg.vector_norm(values, dtype=dtype).square()
    if not squares:
        raise ValueError("parameters: expected some, got none")
    for groups, square in squares.items():
        for group in groups:
            dist.all_reduce(square, group=group)
    total = torch.stack([*squares.values()]).sum().sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1)
    for values in gradients if max_norm < math.inf else ():  # an infinite norm would make NaN
        values.mul_(factor.to(values.dtype))
    return total if torch.float64 in {values.dtype for values in gradients} else total.float()


def _each_once(parameters: nn.Module | Tensor | Iterable[nn.Module | Tensor]) -> list[Tensor]:
    given = [parameters] if isinstance(parameters, (nn.Module, Tensor)) else list(parameters)
    found: list[Tensor] = []
    for each in given:
        if not isinstance(each, (nn.Module, Tensor)):
            raise TypeError(f"parameters: expected modules or tensors, got {each!r}")
        found += each.parameters() if isinstance(each, nn.Module) else [each]
    return list(dict.fromkeys(found))


def _groups(parameter: Tensor) -> tuple[ProcessGroup, ...]:
    """The groups over which a distributed tensor is split; none if it is an ordinary one."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return ()
    return tuple(
        parameter.device_mesh.get_group(dimension)
        for dimension, placement in enumerate(parameter.placements)
        if not placement.is_replicate()
    )

"""Sharding and unsharding of losses."""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import validation
from ..engine.placement import WHOLE
from ..engine.shard import Shard
from ..losses.base import MarginLoss
from ..losses.sampled_loss import SampledLoss
from ..losses.usage_warnings import watch
from ..sampling import check_may_sample, refuse_unprepared_optimizers
from .gathering import Gathering
from .sharded_loss import ShardedLoss, mixed

BACKBONES = ("exact", "ddp")
_Loss = TypeVar("_Loss", bound=MarginLoss)


def shard(
    loss: _Loss,
    mesh: DeviceMesh,
    *,
    backbone: str = "exact",
    sample_rate: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
) -> _Loss:
    """Shard the class centres of a loss over the processes of a device mesh, in place.

    The loss becomes a :class:`ShardedLoss`, and is returned. Call this on every rank before
    constructing the optimiser. Rank r keeps the rows of
    ``loss.weight`` of the ceil(C / R) classes from r * ceil(C / R) on; the last ranks may have
    fewer, or none.

    Args:
        loss: Any loss of this package. If its weight is on the meta device, each rank initialises
            its own shard, and the whole weight is never allocated.
        mesh: One dimension, on the device of the loss: ``init_device_mesh("cuda", (R,))``, or
            ``mesh["classes"]`` of one that has more.
        backbone: "exact": the gradients of the embeddings, and of weights of rows, are those of the
            returned loss. "ddp": they are multiplied by R, because DistributedDataParallel and
            fully_shard divide by R when they average gradients over the ranks.
        sample_rate: The share of a rank's classes used in a training step, in [0, 1], as in
            :func:`angular_losses.sample_classes`; below 1 :func:`shard_optimizer` is needed.
        seed: The seed of random numbers, such as those of class sampling and of centres initialised
            here, the same on all ranks.
        batch_size: The largest number of rows of any rank. Without it the ranks exchange their
            numbers in each step, which synchronises with a GPU once. With it batches are padded to
            that number without synchronisation, and if a rank on a GPU rejects its batch, the
            others raise an error only at the timeout of the process group.

    Raises:
        TypeError: If the loss is not of this package, or already sharded.
        ValueError: If the mesh has not one dimension, or an argument is out of range.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from angular_losses import ArcFaceLoss
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> loss = shard(ArcFaceLoss(1000, 64), init_device_mesh("cpu", (1,)))
        >>> loss(torch.randn(8, 64), torch.arange(8)).shape
        torch.Size([])
        >>> loss.shard
        0:1000 of 1000 classes
        >>> dist.destroy_process_group()

    References:
        An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face
        Recognition CNNs by Partial FC", CVPR 2022, arXiv:2203.15565.
    """
    if not isinstance(loss, MarginLoss):
        raise TypeError(f"loss: expected a loss of this package, got {loss!r}")
    if isinstance(loss, ShardedLoss):
        raise TypeError("loss: expected an unsharded loss, got a sharded one")
    if isinstance(loss, SampledLoss):
        raise TypeError("loss: expected one of all classes, use sample_classes(loss, 1)")
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        raise ValueError(
            f"mesh: expected a DeviceMesh of one dimension, such as mesh['classes'], got {mesh!r}"
        )
    validation.choice("backbone", backbone, BACKBONES)
    validation.share("sample_rate", sample_rate)
    validation.integer("seed", seed)
    if batch_size is not None:
        validation.positive_integer("batch_size", batch_size)
    if sample_rate < 1:
        check_may_sample(loss)
    for name, tensor in (*loss.named_buffers(), *loss.named_parameters()):
        if tensor.is_meta and name != "weight":
            raise ValueError(f"loss: its {name} has values, and cannot be on the meta device")
    place = Shard(mesh, loss.num_classes)
    weight = _own_centres(loss, place, seed)
    vars(loss).update({k: place.undistributed(vars(loss)[k], 1).clone() for k in loss._class_rows})
    sharded = cast(ShardedLoss, loss)
    cls = type(loss)
    sharded.__class__ = type(f"Sharded{cls.__name__}", (ShardedLoss, cls), {})
    sharded.shard, sharded.seed = place, seed
    sharded.sample_rate = float(sample_rate)
    factor = float(place.size) if backbone == "ddp" else 1.0
    gathering = Gathering(place, loss.ignore_index, batch_size, factor)
    sharded.gatherings = gathering, copy.copy(gathering)
    sharded.weight, sharded.own_weight = weight, weakref.ref(weight)
    sharded.is_random = loss.is_random or sample_rate < 1
    sharded.batches = 0
    watch(sharded)
    if sample_rate < 1:
        refuse_unprepared_optimizers(sharded)
    return loss


def unshard(loss: MarginLoss) -> MarginLoss:
    """A new loss of the original class with the centres of all ranks; the shards are unchanged.

    Args:
        loss: A :class:`ShardedLoss`. Every rank has to call this.

    Raises:
        TypeError: If the loss is not sharded.
    """
    if not isinstance(loss, ShardedLoss):
        raise TypeError(f"loss: expected a sharded one, got {type(loss).__name__}")
    cls = next(base for base in type(loss).__mro__ if not issubclass(base, ShardedLoss))
    whole = cast(MarginLoss, cls.__new__(cls))
    of_shards = {*inspect.get_annotations(ShardedLoss), "is_random"}
    # Copies, for both losses go on: one has its own hooks.
    for name, value in vars(loss).items():
        if name not in of_shards:
            vars(whole)[name] = value.clone() if isinstance(value, Tensor) else copy.copy(value)
    for name in ("_parameters", "_buffers", "_modules"):
        vars(whole)[name] = copy.deepcopy(vars(loss)[name])
    whole.shard = WHOLE
    for name, each in loss.rows_of_a_class().items():
        joined = loss.shard.joined(getattr(loss, name), each).clone()
        if name == "weight":
            joined = nn.Parameter(joined, requires_grad=loss.weight.requires_grad)
        setattr(whole, name, joined)
    watch(whole)
    return whole


def _own_centres(loss: MarginLoss, place: Shard, seed: int) -> nn.Parameter:
    weight = loss.weight
    own = place.undistributed(weight.detach(), loss.sub_centers)
    if not weight.is_meta:
        own = own.clone()
    else:
        device = place.device
        generator = torch.Generator(device).manual_seed(mixed(seed, place.rank))
        own = torch.empty_like(own, device=device)
        nn.init.normal_(own, std=loss.embedding_size**-0.5, generator=generator)
    return nn.Parameter(own, requires_grad=weight.requires_grad)

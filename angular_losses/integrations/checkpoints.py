"""Conversion of class centres from and to the checkpoints of other libraries.

Here the centres are the rows of ``weight`` (C, d). pytorch-metric-learning (PML) 2 has them as the
columns of ``W`` (d, C), and insightface's PartialFC_V2 as the rows of one ``weight`` per rank.
PML 3 documents rows of ``weight`` as here: its state needs no conversion. Sub-centre k of class c
is row c * K + k here and column c * K + k in PML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import validation


def from_pml(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of a PML 2 loss to that of the loss of the same name here.

    PML's P2SGradLoss has ``weight`` (d, C) in place of ``W``: pass ``{"W": state_dict["weight"]}``.

    Args:
        state_dict: Has exactly one key ``W``, (d, C), floating point; prefixes such as ``module.``
            or ``loss.`` and other keys are allowed.

    Returns:
        A dict of ``weight`` (C, d), a copy, for ``load_state_dict``. A loss with buffers, such as
        those of a schedule, needs ``strict=False``.

    Raises:
        TypeError: If ``W`` is not a floating-point tensor.
        ValueError: If there is not exactly one ``W``, or it is not a matrix.

    Example:
        >>> from angular_losses import ArcFaceLoss
        >>> loss = ArcFaceLoss(num_classes=10, embedding_size=4)
        >>> loss.load_state_dict(from_pml({"module.W": torch.randn(4, 10)}))
        <All keys matched successfully>
    """
    return {"weight": _transposed(_only("W", "state_dict", state_dict, ("d", "C")))}


def to_pml(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state of a loss to that of PML 2's; the inverse of :func:`from_pml`.

    PML's P2SGradLoss loads ``{"weight": to_pml(state_dict)["W"]}``.

    Args:
        state_dict: Has exactly one key ``weight``, (C, d), floating point; a prefix is allowed.

    Returns:
        A dict of ``W`` (d, C), a copy.

    Raises:
        TypeError: If ``weight`` is not a floating-point tensor.
        ValueError: If there is not exactly one ``weight``, or it is not a matrix.

    Example:
        >>> to_pml({"weight": torch.randn(10, 4)})["W"].shape
        torch.Size([4, 10])
    """
    return {"W": _transposed(_only("weight", "state_dict", state_dict, ("C", "d")))}


def from_insightface(state_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Convert the states of insightface's PartialFC_V2, one per rank, to that of a loss here.

    Args:
        state_dicts: In the order of the ranks, each with one key ``weight``, (num_local, d): the
            entry ``state_dict_softmax_fc`` of ``checkpoint_gpu_{rank}.pt``.

    Returns:
        A dict of ``weight`` (C, d), a copy on the device of rank 0.

    Raises:
        TypeError: If a ``weight`` is not a floating-point tensor.
        ValueError: If one has no ``weight`` or several, or their shapes are not those of the ranks
            of one PartialFC_V2, in order.

    Example:
        >>> ranks = [{"weight": torch.zeros(4, 8)}, {"weight": torch.ones(3, 8)}]
        >>> from_insightface(ranks)["weight"].shape
        torch.Size([7, 8])
    """
    if isinstance(state_dicts, Mapping) or not state_dicts:
        raise ValueError(
            f"state_dicts: expected a list with one state dict per rank, got {type(state_dicts)}"
            f"{'' if state_dicts else ' without any'}"
        )
    shards: list[Tensor] = []
    for rank, state_dict in enumerate(state_dicts):
        size = shards[0].shape[1] if shards else "d"
        shards.append(_only("weight", f"state_dicts[{rank}]", state_dict, ("num_local", size)))
    sizes = [shard.shape[0] for shard in shards]
    expected = _local_sizes(sum(sizes), len(sizes))
    if sizes != expected:
        raise ValueError(
            f"state_dicts: expected the ranks in order, with {expected} classes each, got {sizes}"
        )
    return {"weight": torch.cat([shard.detach().to(shards[0].device) for shard in shards])}


def to_insightface(state_dict: Mapping[str, Tensor], num_ranks: int) -> list[dict[str, Tensor]]:
    """Convert a state to those of PartialFC_V2; the inverse of :func:`from_insightface`.

    Args:
        state_dict: Has exactly one key ``weight``, (C, d), floating point; a prefix is allowed.
        num_ranks: The number of ranks, up to C.

    Returns:
        For each rank a dict of ``weight`` (num_local, d), copies, split like PartialFC_V2:
        C // num_ranks classes per rank, and one more on the first C % num_ranks ranks.

    Raises:
        TypeError: If ``weight`` is not a floating-point tensor, or ``num_ranks`` not an int.
        ValueError: If there is not exactly one ``weight``, it is not a matrix, or has fewer rows
            than there are ranks.

    Example:
        >>> [rank["weight"].shape[0] for rank in to_insightface({"weight": torch.randn(7, 8)}, 3)]
        [3, 2, 2]
    """
    weight = _only("weight", "state_dict", state_dict, ("C", "d"))
    if validation.positive_integer("num_ranks", num_ranks) > weight.shape[0]:
        raise ValueError(
            f"num_ranks: expected at most {weight.shape[0]}, one class each, got {num_ranks}"
        )
    sizes = _local_sizes(weight.shape[0], num_ranks)
    return [{"weight": shard.clone()} for shard in torch.split(weight.detach(), sizes)]


def _local_sizes(num_classes: int, num_ranks: int) -> list[int]:
    """The number of classes of each rank in PartialFC_V2."""
    each, more = divmod(num_classes, num_ranks)
    return [each + (rank < more) for rank in range(num_ranks)]


def _only(
    name: str, argument: str, state_dict: Mapping[str, Tensor], shape: tuple[int | str, ...]
) -> Tensor:
    """The only entry of that name, with any prefix."""
    keys = [key for key in state_dict if key.rpartition(".")[2] == name]
    if len(keys) != 1:
        hint = ", which is 'weight' in PML's P2SGradLoss" if name == "W" and not keys else ""
        raise ValueError(
            f"{argument}: expected exactly one key {name!r}, with or without a prefix"
            f"{hint}, got {keys or list(state_dict)}"
        )
    validation.floating(f"{argument}[{keys[0]!r}]", state_dict[keys[0]], *shape)
    return state_dict[keys[0]]


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.detach().t().clone(memory_format=torch.contiguous_format)

"""Utilities for setting up training: scale, margin, first centres, an optimiser's groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import validation
from .geometry import directions, precise_dtype, without_autocast
from .losses.centres import ClassCentres
from .margins import ADDITIVE
from .separation import separation_bound

# Of k-means, which usually converges earlier.
MOST_ROUNDS = 50


def suggest_scale(num_classes: int, target_probability: float = 0.5) -> float:
    r"""The scale, at least 1, at which an embedding half-way to its centre has probability p.

    .. math:: s = \frac{1}{\cos(\pi/4)}\,\log\frac{(C - 1)\,p}{1 - p}

    With all other classes orthogonal, a target at 45 degrees then has probability p. For p = 1/2
    this is AdaCos's fixed scale, :math:`\sqrt 2\,\log(C - 1)`. A margin decreases the target
    logit, so usual scales (30 to 64) are larger.

    Args:
        num_classes: The number of classes, C >= 3.
        target_probability: p in (0, 1).

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If one is out of range.

    Example:
        >>> round(suggest_scale(1000), 2), round(suggest_scale(1_000_000, 0.9), 2)
        (9.77, 22.65)

    References:
        Zhang et al., "AdaCos", CVPR 2019, arXiv:1905.00292.
    """
    validation.positive_integer("num_classes", num_classes)
    if num_classes < 3:
        raise ValueError(f"num_classes: expected at least 3, got {num_classes}")
    probability = validation.positive(
        "target_probability", validation.number("target_probability", target_probability, 0.0, 1.0)
    )
    odds = probability / (1 - probability)
    return max(1.0, math.sqrt(2) * math.log((num_classes - 1) * odds))


def suggest_margin(num_classes: int, embedding_size: int, *, kind: str = "arc") -> float:
    r"""The margin that is a third of the largest angle between class centres.

    .. math:: m = \frac B3 \text{ ("arc")}, \qquad
        m = \cos\frac B3 - \cos\frac{2B}3 \text{ ("cos")}

    B is the angle that the two closest of C centres in d dimensions cannot exceed
    (:func:`angular_losses.diagnostics.separation_bound`). An embedding at an angle r from its
    centre may be as near as B - r to another, so it satisfies ArcFace's margin if r + m <= B - r.
    With m above B no embedding does, not even one at its centre; with a third, all up to r = B / 3
    do, and so they do for CosFace's. In many dimensions B is near 90 degrees, and these are the
    usual margins: 0.52 and 0.37.

    Args:
        num_classes: The number of classes, C >= 2.
        embedding_size: The dimension of the embeddings, d.
        kind: "arc" for a margin added to the angle, in radians; "cos" for one subtracted from the
            cosine.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If there are fewer than two classes, d < 1, or the kind is unknown.

    Example:
        >>> round(suggest_margin(100_000, 512), 2), round(suggest_margin(100, 8), 2)
        (0.51, 0.39)
        >>> round(suggest_margin(100_000, 512, kind="cos"), 2)
        0.35
    """
    validation.choice("kind", kind, tuple(ADDITIVE))
    third = separation_bound(num_classes, embedding_size) / 3
    return third if kind == "arc" else math.cos(third) - math.cos(2 * third)


@torch.no_grad()
def mean_directions(
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    sub_centers: int = 1,
    ignore_index: int = -100,
) -> Tensor:
    r"""The mean direction of each class's embeddings, for class centres to start from.

    .. math:: \mu_c = \frac{\sum_{i:\,y_i = c} u_i}{|\sum_{i:\,y_i = c} u_i|}, \qquad
        u_i = x_i / |x_i|

    Pass them to :meth:`MarginLoss.reset_parameters` or :meth:`MarginLoss.extend`.

    Args:
        batches: Embeddings (N, d) and labels (N,), batch by batch, such as a generator over a data
            loader; it runs without gradients.
        num_classes: The number of classes, C.
        sub_centers: The number of directions of a class, K: with several, those of spherical
            k-means of its embeddings, all of whose directions are then kept in memory.
        ignore_index: Rows with this label do not count.

    Returns:
        (C * sub_centers, d) unit vectors, float32, sub-centre k of class c in row
        c * sub_centers + k; zero for a class without samples, of which there is a warning, and for
        a sub-centre without.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If there are no batches, or a shape, a device or a label is out of place.

    Example:
        >>> from angular_losses import ArcFaceLoss
        >>> network, loss = torch.nn.Linear(32, 64), ArcFaceLoss(10, 64)
        >>> loader = [(torch.randn(20, 32), torch.arange(20) % 10)]  # a DataLoader
        >>> batches = ((network(images), labels) for images, labels in loader)
        >>> loss.reset_parameters(mean_directions(batches, 10))
    """
    num_classes = validation.positive_integer("num_classes", num_classes)
    sub_centers = validation.positive_integer("sub_centers", sub_centers)
    sums: Tensor | None = None
    counts: Tensor | None = None
    seen: list[tuple[Tensor, Tensor]] = []
    for embeddings, labels in batches:
        validation.floating("embeddings", embeddings, "N", "d")
        size = embeddings.shape[1] if sums is None else sums.shape[1]
        centres = embeddings.new_empty(1, size).expand(num_classes, -1)
        kept = validation.batch(embeddings, centres, labels, ignore_index)
        if kept is not None:
            embeddings, labels = embeddings[kept], labels[kept]
        unit, labels = directions(embeddings, precise_dtype(embeddings.device)), labels.long()
        if sums is None or counts is None:
            sums, counts = unit.new_zeros(num_classes, unit.shape[1]), labels.new_zeros(num_classes)
        sums.index_add_(0, labels, unit)
        counts += labels.bincount(minlength=num_classes)
        if sub_centers > 1:
            seen.append((unit.float(), labels))
    if sums is None or counts is None:
        raise ValueError("batches: expected at least one, got none")
    without = (counts == 0).nonzero()[:, 0].tolist()
    if without:
        some = ", ".join(map(str, without[:10])) + (", ..." if len(without) > 10 else "")
        warnings.warn(
            f"batches: no samples of {len(without)} of {num_classes} classes ({some}); their "
            "directions are zero",
            stacklevel=3,  # the caller of what no_grad wraps
        )
    means = directions(sums).float()
    if sub_centers == 1:
        return means
    unit, labels = (torch.cat(each) for each in zip(*seen, strict=True))
    if not len(unit):
        return means.repeat_interleave(sub_centers, 0)
    with without_autocast(unit.device):
        return _clusters(unit, labels, means, sub_centers).flatten(0, 1)


def _clusters(unit: Tensor, labels: Tensor, means: Tensor, sub_centers: int) -> Tensor:
    """Spherical k-means within each class, for all classes at once, from the farthest rows.

    Directions (N, d) and the mean of each class (C, d) to those of clusters (C, K, d), zero for a
    cluster without rows.
    """
    num_classes, rows = len(means), torch.arange(len(labels), device=labels.device)

    def cosines(centres: Tensor) -> Tensor:
        """(N, K), of each row with the centres of its class."""
        of_each = [torch.linalg.vecdot(unit, centre[labels]) for centre in centres.unbind(1)]
        return torch.stack(of_each, 1)

    centres = means[:, None]
    for _ in range(sub_centers - 1):
        nearest = cosines(centres).amax(1)
        least = nearest.new_full((num_classes,), 2.0).scatter_reduce(0, labels, nearest, "amin")
        is_farthest = nearest == least[labels]
        farthest = labels.new_zeros(num_classes)
        farthest = farthest.scatter_reduce(0, labels, rows.where(is_farthest, 0), "amax")
        centres = torch.cat([centres, unit[farthest][:, None]], 1)
    found = centres
    for _ in range(MOST_ROUNDS):
        place = labels * sub_centers + cosines(centres).argmax(1)
        sums = torch.zeros_like(centres).flatten(0, 1).index_add_(0, place, unit)
        found, before = directions(sums).view_as(centres), centres
        centres = found.where(found.any(2, keepdim=True), before)
        if torch.equal(centres, before):
            break
    return found


def parameter_groups(
    *modules: nn.Module, lr: float, weight_decay: float = 0.0, lr_of_losses: float | None = None
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimiser: the network's, and those of the losses.

    Centres that are not in the optimiser are not trained, and the network is fitted to random
    directions. Weight decay does not change their directions but shrinks their lengths, so that
    every further step rotates them more: the group of the losses has none.

    Args:
        *modules: The network and the loss or losses, in any order; a loss may be a submodule.
            A parameter of several modules is included once.
        lr: The learning rate.
        weight_decay: The weight decay of the network.
        lr_of_losses: The learning rate of centres and biases; ``lr`` by default.

    Raises:
        TypeError: If an argument is not a module.
        ValueError: If none of them has a loss of this package, or a number is negative.

    Example:
        >>> from angular_losses import ArcFaceLoss
        >>> network, loss = torch.nn.Linear(8, 4), ArcFaceLoss(10, 4)
        >>> optimiser = torch.optim.SGD(
        ...     parameter_groups(network, loss, lr=0.1, weight_decay=5e-4), momentum=0.9
        ... )
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimiser.param_groups]
        [(2, 0.0005), (1, 0.0)]
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules: expected torch.nn.Modules, got {module!r}")
    validation.number("lr", lr, 0.0)
    validation.number("weight_decay", weight_decay, 0.0)
    if lr_of_losses is not None:
        validation.number("lr_of_losses", lr_of_losses, 0.0)
    parts = [part for module in modules for part in module.modules()]
    losses = nn.ModuleList(part for part in parts if isinstance(part, ClassCentres))
    if not losses:
        raise ValueError("modules: expected a loss of this package among them, got none")
    of_losses = dict.fromkeys(losses.parameters())
    others = [each for each in nn.ModuleList(modules).parameters() if each not in of_losses]
    lr_of_losses = lr if lr_of_losses is None else lr_of_losses
    return [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": list(of_losses), "lr": lr_of_losses, "weight_decay": 0.0},
    ]

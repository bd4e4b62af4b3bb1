"""Grad-CAM: where in a slice lies what the network's answer is drawn from, and is it the tumour."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.crop import WHOLE, Box
from ..evaluation.evaluate import VIEWS
from ..network.mobilenet import EmbeddingNetwork


@dataclass(frozen=True)
class Overlap:
    """How much of a heat map lies on a tumour."""

    # share of the map's heat inside the mask, from 0 to 1: the energy-based pointing game
    # (Wang et al., Score-CAM, 2020, arXiv:1910.01279)
    heat_inside: float
    # share of the slice's area that the mask takes, which is what chance would give
    area_inside: float
    # whether the hottest point lies in the mask: the pointing game (Zhang et al., Top-down
    # Neural Attention by Excitation Backprop, 2016, arXiv:1608.00507); None without such a point
    hottest_inside: bool | None


def grad_cam(
    network: EmbeddingNetwork,
    image: Tensor,
    direction: Tensor,
    shape: tuple[int, int],
    views: int = 1,
) -> np.ndarray:
    """Return the Grad-CAM (Selvaraju et al., 2017, arXiv:1610.02391) of an embedding's direction.

    The score is the dot product of the L2-normalised embedding with `direction`. The last
    convolutional features, weighted by the mean gradient of the score in each channel, are summed,
    and negative sums are set to zero: if all are negative, the map is empty. It is as coarse as the
    features, 32 pixels a cell, and the receptive field of a cell is much larger than the cell. Maps
    of so many `VIEWS` are mirrored back and averaged.

    The network, in eval mode, takes the image (1, 1, size, size) in [0, 1]; the direction is (d,).
    The map has the `shape` asked for and is at least 0, without a scale of its own.
    """
    maps = [_cells(network, image.flip(axes), direction).flip(axes) for axes in VIEWS[:views]]
    cells = torch.stack(maps).mean(0)
    return F.interpolate(cells, shape, mode="bilinear")[0, 0].cpu().numpy()


def _cells(network: EmbeddingNetwork, image: Tensor, direction: Tensor) -> Tensor:
    """Return the map (1, 1, h, w) at the features' own size."""
    device = next(network.parameters()).device
    kept: list[Tensor] = []
    with network.backbone.register_forward_hook(lambda *call: kept.append(call[-1])):
        embedding = F.normalize(network(image.to(device)))
    (features,) = kept
    score = embedding[0] @ direction.to(device)
    (gradient,) = torch.autograd.grad(score, features)
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * features.detach()).sum(1, keepdim=True).relu().double()


def measure_overlap(heat: np.ndarray, mask: np.ndarray, box: Box = WHOLE) -> Overlap | None:
    """Return how much of a heat map (h, w) lies in a mask (h, w); None if either is empty.

    The network saw what is in the box: a map that is the same all over it has no hottest point.
    """
    if not (heat.any() and mask.any()):
        return None
    # At the edges the map is level, so that its peak may be a line or a patch: take the middle.
    row, column = np.argwhere(heat == heat.max()).mean(0).round().astype(int)
    level = np.isclose(heat[box].min(), heat.max(), rtol=1e-9, atol=0)
    return Overlap(
        heat_inside=float(heat[mask].sum() / heat.sum()),
        area_inside=float(mask.mean()),
        hottest_inside=None if level else bool(mask[row, column]),
    )

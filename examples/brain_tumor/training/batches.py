"""The batches of an epoch, and their augmentation, on the device where they lie."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..settings import AugmentationSettings


def batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """Return where each batch starts and stops; BatchNorm cannot learn from a batch of one."""
    bounds = [(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    bounds = [(start, stop) for start, stop in bounds if stop - start > 1]
    if not bounds:
        raise UserError(f"split: {count} training slices are too few to train on")
    return bounds


def augment(images: Tensor, settings: AugmentationSettings, generator: torch.Generator) -> Tensor:
    """Rotate, zoom into, flip and brighten each image of a batch at random.

    The random numbers are drawn on the CPU, so that a seed means the same on every device. Images
    are (n, 1, size, size) in [0, 1], of any floating-point type, and become float32; what a
    rotation brings in from outside is 0.
    """
    angles, zooms, flips_x, flips_y, brightness = torch.rand(5, len(images), generator=generator)
    maps = affine_maps(
        angles=math.radians(settings.rotation_degrees) * (2 * angles - 1),
        zooms=1 + (settings.zoom - 1) * zooms,
        flips_x=(flips_x < 0.5) & settings.flip_left_right,
        flips_y=(flips_y < 0.5) & settings.flip_up_down,
    )
    grid = F.affine_grid(maps.to(images.device), list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="zeros", align_corners=False)
    factors = 1 + settings.brightness * (2 * brightness - 1)
    return moved.mul_(factors.to(images.device)[:, None, None, None]).clamp_(0, 1)


def affine_maps(angles: Tensor, zooms: Tensor, flips_x: Tensor, flips_y: Tensor) -> Tensor:
    """Return the (n, 2, 3) maps from a pixel's place in the result to its place in the image.

    Of angles (n,) in radians, zooms (n,) of at least 1, and where (n,) sides are exchanged.
    """
    cosines, sines = angles.cos() / zooms, angles.sin() / zooms
    signs_x, signs_y = 1 - 2.0 * flips_x, 1 - 2.0 * flips_y
    maps = torch.zeros(len(angles), 2, 3)
    maps[:, 0, 0], maps[:, 0, 1] = signs_x * cosines, -signs_x * sines
    maps[:, 1, 0], maps[:, 1, 1] = signs_y * sines, signs_y * cosines
    return maps

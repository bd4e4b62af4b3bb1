"""Cutting the head out of a slice, so that no pixel of the network's input goes to the background.

How much background a slice has differs; cut out, all heads are of one size, and as large as can be.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

THRESHOLD = 0.12  # of the brightest pixel: above it is head, below it background
WINDOW = 9  # pixels; a pixel is the head's if most of the window around it is
SPARE = 0.04  # of the head's larger side is added to it
LEAST = 64  # pixels; a smaller head is no head
BRIGHT = 0.995  # the share of pixels that are darker than the "brightest": marks may be brighter


class Box(NamedTuple):
    """A part of an image in the image's own pixels: rows from `top`, columns from `left`."""

    top: int
    left: int
    height: int
    width: int


def find_box(image: np.ndarray, crop: str) -> Box:
    """Return the part of a slice (h, w) that `crop` keeps: "none" all, "head" the head."""
    return head_box(image) if crop == "head" else Box(0, 0, *image.shape)


def cut(image: np.ndarray, box: Box) -> np.ndarray:
    """Return the part of an image (h, w) that lies in a box."""
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


def put_back(part: np.ndarray, box: Box, shape: tuple[int, int]) -> np.ndarray:
    """Return an image (h, w) of `shape` that holds `part` in its box and 0 around it."""
    image = np.zeros(shape, part.dtype)
    cut(image, box)[:] = part
    return image


def head_box(image: np.ndarray) -> Box:
    """Return the square around the head in a slice, or the whole slice where there is none.

    Pixels above a threshold, smoothed, make regions; the largest is the head. Intensities (h, w)
    are of any range that starts near the background's.
    """
    height, width = image.shape
    whole = Box(0, 0, height, width)
    least = float(image.min())
    bright = image > least + THRESHOLD * (np.quantile(image, BRIGHT) - least)
    solid = ndimage.uniform_filter(bright.astype(np.float32), WINDOW, mode="constant") > 0.5
    regions, count = ndimage.label(solid)
    if not count:
        return whole
    largest = np.bincount(regions.ravel())[1:].argmax()
    rows, columns = ndimage.find_objects(regions)[largest]
    tall, wide = rows.stop - rows.start, columns.stop - columns.start
    side = round(max(tall, wide) * (1 + SPARE))
    if not LEAST <= side <= min(height, width):
        return whole
    top = round((rows.start + rows.stop - side) / 2)
    left = round((columns.start + columns.stop - side) / 2)
    return Box(min(max(top, 0), height - side), min(max(left, 0), width - side), side, side)

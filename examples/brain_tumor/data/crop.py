"""Cutting the head out of a slice, so that no pixel of the network's input goes to the background.

How much background a slice has differs; cut out, all heads are of one size, and as large as can be.
"""

import numpy as np
from scipy import ndimage

THRESHOLD = 0.12  # of the brightest pixel: above it is head, below it background
WINDOW = 9  # pixels; a pixel is the head's if most of the window around it is
SPARE = 0.04  # of the head's larger side is added to it
LEAST = 64  # pixels; a smaller head is no head
BRIGHT = 0.995  # the share of pixels that are darker than the "brightest": marks may be brighter

Box = tuple[slice, slice]  # rows and columns of a part of an image: image[box] is the part
WHOLE: Box = np.s_[:, :]


def find_box(image: np.ndarray, crop: str) -> Box:
    """Return the part of a slice (h, w) that `crop` keeps: "none" all, "head" the head."""
    return head_box(image) if crop == "head" else WHOLE


def head_box(image: np.ndarray) -> Box:
    """Return the square around the head in a slice, or the whole slice where there is none.

    Pixels above a threshold, smoothed, make regions; the largest is the head. Intensities (h, w)
    are of any range that starts near the background's.
    """
    height, width = image.shape
    bright = above_background(image).astype(np.float32)
    head = largest_region(ndimage.uniform_filter(bright, WINDOW, mode="constant") > 0.5)
    if not head.any():
        return WHOLE
    rows, columns = ndimage.find_objects(head.astype(np.uint8))[0]
    side = round(max(rows.stop - rows.start, columns.stop - columns.start) * (1 + SPARE))
    if not LEAST <= side <= min(height, width):
        return WHOLE
    top = min(max(round((rows.start + rows.stop - side) / 2), 0), height - side)
    left = min(max(round((columns.start + columns.stop - side) / 2), 0), width - side)
    return np.s_[top : top + side, left : left + side]


def above_background(image: np.ndarray) -> np.ndarray:
    """Return a mask (h, w) of the pixels of a slice that are not background."""
    least = float(image.min())
    return image > least + THRESHOLD * (np.quantile(image, BRIGHT) - least)


def largest_region(mask: np.ndarray) -> np.ndarray:
    """Return a mask (h, w) of the largest connected region in a mask (h, w)."""
    regions, _ = ndimage.label(mask)
    return regions == np.bincount(regions.ravel(), minlength=2)[1:].argmax() + 1

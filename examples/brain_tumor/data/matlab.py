"""Reading the archive's MATLAB files, which may come from anywhere.

The archive (Figshare 1512427) holds 1.mat ... 3064.mat and cvind.mat in MATLAB's format v7.3, which
is HDF5. Nothing in them is trusted: a process apart reads them (see reader.py), and what it finds
is checked here.
"""

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from .hdf5 import LARGEST_SIDE
from .reader import READER

ARCHIVE_SIZE = 3064  # slices
CLASS_NAMES = ("meningioma", "glioma", "pituitary")  # labels 0, 1, 2; the archive's 1, 2, 3
FOLDS = 5
LARGEST_FILE = 1 << 28  # bytes; the archive's have less than a million
MOST_PIXELS = LARGEST_SIDE**2
FIELDS = {  # of a slice, and the most numbers that each may hold
    **{"image": MOST_PIXELS, "label": LARGEST_SIDE, "PID": LARGEST_SIDE},
    **{"tumorBorder": LARGEST_SIDE, "tumorMask": MOST_PIXELS},
}


@dataclass(frozen=True)
class Slice:
    """One file of the archive."""

    image: np.ndarray  # (h, w) float32, the stored intensities
    label: int  # 0 meningioma, 1 glioma, 2 pituitary tumour
    patient: str  # the patient's id
    border: np.ndarray  # (k, 2) x and y in pixels from 0 of points around the tumour
    mask: np.ndarray  # (h, w) booleans, true inside the tumour


def read_slice(path: Path) -> Slice:
    """Read one slice of the archive."""
    found = _read(path, FIELDS)
    border = found["tumorBorder"]
    if border.size % 2 or min(border.shape) != 1 or not np.isfinite(border).all():
        raise UserError(f"{path}: tumorBorder is not a row of finite x1 y1 x2 y2 ...")
    return Slice(
        image=check_image(path, found["image"].T),  # MATLAB stores columns first
        label=_label(path, found["label"]),
        patient=decode_text(path, found["PID"]),
        border=border.reshape(-1, 2).astype(np.float64) - 1,  # MATLAB counts pixels from 1
        mask=_mask(path, found["tumorMask"].T, found["image"].T),
    )


def read_unlabelled(path: Path) -> tuple[np.ndarray, np.ndarray | None, int | None]:
    """Read a new patient's slice: of all fields it needs `image` alone.

    Return the image (h, w) float32 and, where the file has them, tumour mask (h, w) and label.
    """
    names = ("image", "tumorMask", "label")
    found = _read(path, {name: FIELDS[name] for name in names}, optional=names[1:])
    image = found["image"].T
    return (
        check_image(path, image),
        _mask(path, found["tumorMask"].T, image) if "tumorMask" in found else None,
        _label(path, found["label"]) if "label" in found else None,
    )


def check_image(path: Path, image: np.ndarray) -> np.ndarray:
    """Return an image (h, w) as float32, unless no slice looks like it."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, and is refused
        image = np.ascontiguousarray(image, dtype=np.float32)
    if not np.isfinite(image).all():
        raise UserError(f"{path}: image holds NaN or infinite pixels")
    if image.min() == image.max():
        raise UserError(f"{path}: is of one grey value throughout, expected a slice")
    return image


def _read(
    path: Path, fields: dict[str, int], optional: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    check_file(path)
    return READER.read(path, "hdf5", "cjdata", fields, optional)


def _label(path: Path, label: np.ndarray) -> int:
    if label.size != 1 or label.item() not in (1, 2, 3):
        found = label.item() if label.size == 1 else f"of shape {label.shape}"
        raise UserError(f"{path}: label is {found}, expected 1, 2 or 3")
    return int(label.item()) - 1


def _mask(path: Path, mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    if mask.shape != image.shape:
        raise UserError(f"{path}: tumorMask is {mask.shape}, but image is {image.shape}")
    return np.ascontiguousarray(mask != 0)


def read_folds(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """Read the archive's cvind.mat: the folds, 1 to 5, of slices by their numbers, ascending."""
    check_file(path)
    folds = READER.read(path, "hdf5", "", {"cvind": LARGEST_SIDE})["cvind"].ravel()
    if len(folds) != ARCHIVE_SIZE:
        raise UserError(f"{path}: holds {len(folds)} folds, expected {ARCHIVE_SIZE}")
    if not np.isin(folds, range(1, FOLDS + 1)).all():
        raise UserError(f"{path}: holds a fold that is not a whole number from 1 to {FOLDS}")
    if numbers[-1] > ARCHIVE_SIZE:
        raise UserError(f"{path}: has no fold for {numbers[-1]}.mat")
    return folds[np.array(numbers) - 1].astype(np.int64)


def check_file(path: Path) -> None:
    """Refuse what no process needs to open."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:  # a circle of links, a name that is too long
        raise UserError(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: is not a file")
    if found.st_size == 0:
        raise UserError(f"{path}: the file is empty")
    if found.st_size > LARGEST_FILE:
        raise UserError(f"{path}: exceeds {LARGEST_FILE >> 20} MiB, which no slice needs")


def decode_text(path: Path, codes: np.ndarray) -> str:
    """Decode a patient's id: a column of character codes, letters among them."""
    if codes.dtype.kind in "iu" and codes.min() >= 0 and codes.max() <= 0xFFFF:
        text = "".join(map(chr, codes.ravel())).strip()
        if text.isprintable() and 0 < len(text) <= 64:
            return no_formula(text)
    raise UserError(f"{path}: PID is not a short printable text")


def no_formula(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula when it meets it in a CSV file."""
    return "'" + text if text.startswith(tuple("=+-@\t\r")) else text

"""Reading the archive's MATLAB files, which may come from anywhere.

The archive (Figshare 1512427) holds 1.mat ... 3064.mat and cvind.mat in MATLAB's format v7.3, which
is HDF5. Nothing in them is trusted: sizes are checked before anything is read, and no link is
followed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from .errors import UserError

ARCHIVE_SIZE = 3064  # slices
FOLDS = 5
LARGEST_SIDE = 4096  # of any matrix in a file; the archive's images have 512


@dataclass(frozen=True)
class Slice:
    """One file of the archive.

    Attributes:
        image: (h, w) float32, the stored intensities.
        label: 0 meningioma, 1 glioma, 2 pituitary tumour.
        patient: The patient's id.
        border: (k, 2) x and y in pixels from 0 of points around the tumour.
        mask: (h, w) booleans, true inside the tumour.
    """

    image: np.ndarray
    label: int
    patient: str
    border: np.ndarray
    mask: np.ndarray


def read_slice(path: Path) -> Slice:
    """Read one slice of the archive.

    Raises:
        UserError: The file is missing, damaged or not a slice.
    """
    with open_mat(path) as file:
        fields = member(path, file, "cjdata", h5py.Group)
        image = read_array(path, fields, "image").T  # MATLAB stores columns first
        label = read_array(path, fields, "label")
        patient = read_array(path, fields, "PID")
        border = read_array(path, fields, "tumorBorder")
        mask = read_array(path, fields, "tumorMask").T
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, and is refused
        image = np.ascontiguousarray(image, dtype=np.float32)
    if not np.isfinite(image).all():
        raise UserError(f"{path}: image holds NaN or infinite pixels")
    if label.size != 1 or label.item() not in (1, 2, 3):
        found = label.item() if label.size == 1 else f"of shape {label.shape}"
        raise UserError(f"{path}: label is {found}, expected 1, 2 or 3")
    if border.size % 2 or min(border.shape) != 1 or not np.isfinite(border).all():
        raise UserError(f"{path}: tumorBorder is not a row of finite x1 y1 x2 y2 ...")
    if mask.shape != image.shape:
        raise UserError(f"{path}: tumorMask is {mask.shape}, but image is {image.shape}")
    return Slice(
        image=image,
        label=int(label.item()) - 1,
        patient=decode_text(path, patient),
        border=border.reshape(-1, 2).astype(np.float64) - 1,  # MATLAB counts pixels from 1
        mask=np.ascontiguousarray(mask != 0),
    )


def read_folds(path: Path) -> np.ndarray:
    """Read the archive's cvind.mat: the fold, 1 to 5, of each slice from 1 to 3064.

    Raises:
        UserError: The file is missing, damaged or not the archive's.
    """
    with open_mat(path) as file:
        folds = read_array(path, file, "cvind").ravel()
    if len(folds) != ARCHIVE_SIZE:
        raise UserError(f"{path}: holds {len(folds)} folds, expected {ARCHIVE_SIZE}")
    if not np.isin(folds, range(1, FOLDS + 1)).all():
        raise UserError(f"{path}: holds a fold that is not a whole number from 1 to {FOLDS}")
    return folds.astype(np.int64)


@contextmanager
def open_mat(path: Path) -> Iterator[h5py.File]:
    """Open a MATLAB v7.3 file; whatever h5py raises meanwhile becomes one UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        if not h5py.is_hdf5(path):
            raise UserError(f"{path}: not a MATLAB v7.3 (HDF5) file")
        with h5py.File(path, "r") as file:
            yield file
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it") from error
    # h5py reports damage through any of these, according to where it meets it.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, MemoryError) as error:
        raise UserError(f"{path}: truncated or damaged HDF5 file") from error


def member(path: Path, group: h5py.Group, name: str, kind: type) -> h5py.Group | h5py.Dataset:
    """Return a group's own member; a link could lead to any other file of the machine."""
    link = group.get(name, getlink=True)
    if link is None:
        raise UserError(f"{path}: holds no {name}")
    if not isinstance(link, h5py.HardLink):
        raise UserError(f"{path}: {name} is a link, which is not followed")
    found = group[name]
    if not isinstance(found, kind):
        raise UserError(f"{path}: {name} is not an HDF5 {kind.__name__.lower()}")
    return found


def read_array(path: Path, group: h5py.Group, name: str) -> np.ndarray:
    """Read a matrix of real numbers, having looked at what its header promises."""
    dataset = member(path, group, name, h5py.Dataset)
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{path}: {name} lies in another file, which is not read")
    if dataset.dtype.kind not in "biuf":
        raise UserError(f"{path}: {name} does not hold numbers")
    shape = dataset.shape
    if shape is None or len(shape) != 2 or 0 in shape:
        raise UserError(f"{path}: {name} is not a matrix")
    if max(*shape, *(dataset.chunks or ())) > LARGEST_SIDE:
        raise UserError(f"{path}: {name} or a chunk of it exceeds {LARGEST_SIDE} on a side")
    return dataset[()]


def decode_text(path: Path, codes: np.ndarray) -> str:
    """Decode a patient's id: a column of character codes, letters among them."""
    if codes.dtype.kind in "iu" and codes.min() >= 0 and codes.max() <= 0xFFFF:
        text = "".join(map(chr, codes.ravel())).strip()
        if text.isprintable() and 0 < len(text) <= 64:
            return text
    raise UserError(f"{path}: PID is not a short printable text")

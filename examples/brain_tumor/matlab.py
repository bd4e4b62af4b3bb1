"""Reading the archive's MATLAB files, which may come from anywhere.

The archive (Figshare 1512427) holds 1.mat ... 3064.mat and cvind.mat in MATLAB's format v7.3, which
is HDF5. Nothing in them is trusted: sizes are checked before anything is read, no link is followed,
and what libhdf5 takes on trust (how far a chunk unpacks, how a number's bits lie) is checked first.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path

import h5py
import numpy as np

from .errors import UserError

ARCHIVE_SIZE = 3064  # slices
FOLDS = 5
LARGEST_SIDE = 4096  # of any matrix in a file; the archive's images have 512
LARGEST_FILE = 1 << 28  # bytes; the archive's have less than a million
MOST_PIXELS = LARGEST_SIDE**2
MOST_CHUNKS = 4096  # that a matrix is stored in
NODE = b"TREE\x01"  # starts a node of an index of chunks; its level comes next
PACKINGS = ((), (h5py.h5z.FILTER_DEFLATE,), (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE))


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
        image = read_array(path, fields, "image", MOST_PIXELS).T  # MATLAB stores columns first
        label = read_array(path, fields, "label")
        patient = read_array(path, fields, "PID")
        border = read_array(path, fields, "tumorBorder")
        mask = read_array(path, fields, "tumorMask", MOST_PIXELS).T
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
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path}: exceeds {LARGEST_FILE >> 20} MiB, which no slice needs")
        if not h5py.is_hdf5(path):
            raise UserError(f"{path}: not a MATLAB v7.3 (HDF5) file")
        with h5py.File(path, "r") as file:
            check_indexes(path, file)
            yield file
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it") from error
    # h5py reports damage through any of these, according to where it meets it.
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        MemoryError,
        struct.error,
        zlib.error,
    ) as error:
        raise UserError(f"{path}: truncated or damaged HDF5 file") from error


def check_indexes(path: Path, file: h5py.File) -> None:
    """Refuse an index of chunks that leads in circles: libhdf5 would follow it until it crashed.

    The index of a matrix is a tree. A node has a level and, from level 1, the addresses of nodes
    one level lower.
    """
    damaged = UserError(f"{path}: the index of its chunks is damaged")
    if file.id.get_create_plist().get_sizes() != (8, 8):  # bytes of an address and of a length
        raise damaged
    with path.open("rb") as raw, mmap(raw.fileno(), 0, access=ACCESS_READ) as content:
        place = content.find(NODE)
        while place >= 0:
            level, count = struct.unpack_from("<BH", content, place + len(NODE))
            if not count:
                raise damaged
            for child in range(count if level else 0):
                (address,) = struct.unpack_from("<Q", content, place + 56 + 40 * child)
                start = file.userblock_size + address
                if content[start : start + len(NODE) + 1] != NODE + bytes([level - 1]):
                    raise damaged
            place = content.find(NODE, place + 1)


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


def read_array(path: Path, group: h5py.Group, name: str, most: int = LARGEST_SIDE) -> np.ndarray:
    """Read a matrix of at most `most` real numbers, having looked at what its header promises."""
    dataset = member(path, group, name, h5py.Dataset)
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{path}: {name} lies in another file, which is not read")
    if dataset.dtype.kind not in "biuf" or dataset.dtype.itemsize > 8:
        raise UserError(f"{path}: {name} does not hold numbers")
    if h5py.h5t.py_create(dataset.dtype, logical=True) != dataset.id.get_type():
        raise UserError(f"{path}: {name} holds numbers of an unusual format")
    shape = dataset.shape
    if shape is None or len(shape) != 2 or 0 in shape:
        raise UserError(f"{path}: {name} is not a matrix")
    if max(*shape, *(dataset.chunks or ())) > LARGEST_SIDE:
        raise UserError(f"{path}: {name} or a chunk of it exceeds {LARGEST_SIDE} on a side")
    if dataset.size > most:
        raise UserError(f"{path}: {name} holds {dataset.size} numbers, expected {most} at most")
    if dataset.chunks:
        check_chunks(path, name, dataset)
    return dataset[()]


def check_chunks(path: Path, name: str, dataset: h5py.Dataset) -> None:
    """Refuse chunks that do not unpack to their own size: libhdf5 itself would unpack any bomb."""
    properties = dataset.id.get_create_plist()
    packing = tuple(properties.get_filter(i)[0] for i in range(properties.get_nfilters()))
    if packing not in PACKINGS:
        raise UserError(f"{path}: {name} is packed in a way that MATLAB does not use")
    if math.prod(map(math.ceil, np.divide(dataset.shape, dataset.chunks))) > MOST_CHUNKS:
        raise UserError(f"{path}: {name} is cut into more than {MOST_CHUNKS} chunks")
    chunks: list[h5py.h5d.StoreInfo] = []
    # Whatever it returns, unless None, ends the iteration: a forged index may go on for ever.
    dataset.id.chunk_iter(lambda chunk: chunks.append(chunk) or len(chunks) > MOST_CHUNKS or None)
    whole = math.prod(dataset.chunks) * dataset.dtype.itemsize
    for chunk in chunks:
        size = chunk.size
        packed = packing and not chunk.filter_mask >> len(packing) - 1 & 1
        if packed and size < 2 * whole + 1024:  # packing lengthens nothing by as much
            _, stored = dataset.id.read_direct_chunk(chunk.chunk_offset)
            size = len(zlib.decompressobj().decompress(stored, whole + 1))
        if size != whole:
            raise UserError(f"{path}: {name} holds a chunk that does not unpack to its size")


def decode_text(path: Path, codes: np.ndarray) -> str:
    """Decode a patient's id: a column of character codes, letters among them."""
    if codes.dtype.kind in "iu" and codes.min() >= 0 and codes.max() <= 0xFFFF:
        text = "".join(map(chr, codes.ravel())).strip()
        if text.isprintable() and 0 < len(text) <= 64:
            return text
    raise UserError(f"{path}: PID is not a short printable text")

"""Reading matrices out of HDF5 files that may come from anywhere; run in a process of its own.

libhdf5 takes much on trust: on a forged file it may crash, loop for ever or fill the memory. So no
other process opens one (see reader.py), and that one has limits. What libhdf5 would read without
a murmur is refused here: a link out of the file, numbers of a crooked format, a chunk of another
size than its matrix needs.
"""

import math
import zlib
from collections.abc import Sequence

import h5py
import numpy as np

from ..errors import FormatError

LARGEST_SIDE = 4096  # of any matrix in a file; the archive's images have 512
MOST_CHUNKS = 4096  # that a matrix is stored in
PACKINGS = ((), (h5py.h5z.FILTER_DEFLATE,), (h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE))


def read_matrices(
    path: str, group: str, limits: dict[str, int], optional: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Read the named matrices of a group of a file, each of at most so many numbers."""
    try:
        if not h5py.is_hdf5(path):
            raise FormatError("not a MATLAB v7.3 (HDF5) file")
        with h5py.File(path, "r") as file:
            members = member(file, group, h5py.Group) if group else file
            return {
                name: read_matrix(members, name, most)
                for name, most in limits.items()
                if name not in optional or members.get(name, getlink=True) is not None
            }
    except PermissionError as error:
        raise FormatError("no permission to read it") from error
    # h5py reports damage through any of these, according to where it meets it.
    except (
        *(OSError, RuntimeError, ValueError, TypeError, KeyError, OverflowError, MemoryError),
        zlib.error,
    ) as error:
        raise FormatError("truncated or damaged HDF5 file") from error


def member(group: h5py.Group, name: str, kind: type) -> h5py.Group | h5py.Dataset:
    """Return a group's own member; a link could lead to any other file of the machine."""
    link = group.get(name, getlink=True)
    if link is None:
        raise FormatError(f"holds no {name}")
    if not isinstance(link, h5py.HardLink):
        raise FormatError(f"{name} is a link, which is not followed")
    found = group[name]
    if not isinstance(found, kind):
        raise FormatError(f"{name} is not an HDF5 {kind.__name__.lower()}")
    return found


def read_matrix(group: h5py.Group, name: str, most: int) -> np.ndarray:
    """Read a matrix of at most `most` real numbers, having looked at what its header promises."""
    dataset = member(group, name, h5py.Dataset)
    if dataset.external or dataset.is_virtual:
        raise FormatError(f"{name} lies in another file, which is not read")
    if dataset.dtype.kind not in "biuf" or dataset.dtype.itemsize > 8:
        raise FormatError(f"{name} does not hold numbers")
    if h5py.h5t.py_create(dataset.dtype, logical=True) != dataset.id.get_type():
        raise FormatError(f"{name} holds numbers of an unusual format")
    shape = dataset.shape
    if shape is None or len(shape) != 2 or 0 in shape:
        raise FormatError(f"{name} is not a matrix")
    if max(*shape, *(dataset.chunks or ())) > LARGEST_SIDE:
        raise FormatError(f"{name} or a chunk of it exceeds {LARGEST_SIDE} on a side")
    if dataset.size > most:
        raise FormatError(f"{name} holds {dataset.size} numbers, expected {most} at most")
    return read_chunks(name, dataset) if dataset.chunks else dataset[()]


def read_chunks(name: str, dataset: h5py.Dataset) -> np.ndarray:
    """Read a matrix that is stored in chunks.

    libhdf5 itself would unpack any bomb, take any length for the right one, and zeros for a chunk
    that is missing.
    """
    properties = dataset.id.get_create_plist()
    packing = tuple(properties.get_filter(i)[0] for i in range(properties.get_nfilters()))
    if packing not in PACKINGS:
        raise FormatError(f"{name} is packed in a way that MATLAB does not use")
    sides = dataset.chunks
    if math.prod(np.ceil(np.divide(dataset.shape, sides))) > MOST_CHUNKS:
        raise FormatError(f"{name} is cut into more than {MOST_CHUNKS} chunks")
    matrix = np.empty(dataset.shape, dataset.dtype)
    size = math.prod(sides) * matrix.itemsize
    for place in dataset.iter_chunks():
        skipped, chunk = dataset.id.read_direct_chunk(tuple(side.start for side in place))
        used = [kind for i, kind in enumerate(packing) if not skipped >> i & 1]
        if h5py.h5z.FILTER_DEFLATE in used:
            chunk = zlib.decompressobj().decompress(chunk, size + 1)
        if len(chunk) != size:
            raise FormatError(f"{name} holds a chunk that does not unpack to its size")
        if h5py.h5z.FILTER_SHUFFLE in used:
            chunk = np.frombuffer(chunk, np.uint8).reshape(matrix.itemsize, -1).T.tobytes()
        height, width = matrix[place].shape
        matrix[place] = np.frombuffer(chunk, matrix.dtype).reshape(sides)[:height, :width]
    return matrix

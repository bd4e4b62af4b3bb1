"""Hostile .mat files: valid slices, each spoiled in one way that chance decides.

Some are damaged as a disk or a cut-off download would, some are what an attacker would write. None
holds more than a few megabytes; some would unpack to far more.
"""

import re
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
from numpy.random import Generator

from examples.brain_tumor.data.matlab import ARCHIVE_SIZE
from examples.brain_tumor.data.phantoms import _write as write_slice

Mutation = Callable[[Path, Generator], None]

FIELDS = ("PID", "image", "label", "tumorBorder", "tumorMask")
SIDES = (48, 72)  # pixels; the writer compresses only the larger
BYTES_SHARE = 0.6  # of the files are damaged byte by byte, the others by their structure
OUTSIDE = "outside.h5"  # a sound slice beside the spoiled ones, which some point to
METADATA_END = 4096  # bytes from the start; what lies here decides how the rest is read


def write_valid(path: Path, generator: Generator) -> None:
    """Write a slice without a fault: noise, with a square tumour."""
    side = int(generator.choice(SIDES))
    picture = generator.integers(0, 1000, (side, side), dtype=np.int16)
    low, high = side // 4, side // 2
    border = np.array([[low, low], [high, low], [high, high], [low, high]], float)
    write_slice(path, int(generator.integers(3)), "P1", picture, border)


def mutate(path: Path, generator: Generator) -> str:
    """Spoil a valid slice in one way, and return the way's name."""
    mutations = BYTES if generator.random() < BYTES_SHARE else STRUCTURE
    mutation = mutations[generator.integers(len(mutations))]
    mutation(path, generator)
    return mutation.__name__.strip("_").replace("_", " ")


@lru_cache
def zlib_zeros(blocks: int) -> bytes:
    """Return a zlib stream of `blocks` times 16 MiB of zeros: a thousandth of that in length."""
    size = 1 << 24
    compressor = zlib.compressobj(9)
    block = compressor.compress(bytes(size)) + compressor.flush(zlib.Z_FULL_FLUSH)
    header, repeated = block[:2], block[2:]  # after a full flush a block stands on its own
    checksum = (blocks * size % 65521) << 16 | 1
    return header + repeated * blocks + b"\x03\x00" + checksum.to_bytes(4, "big")


# ------------------------------------------------------------------------------- bytes


def _flipped_bits(path: Path, generator: Generator) -> None:
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    end = min(METADATA_END, len(content)) if generator.random() < 0.7 else len(content)
    places = generator.integers(512, end, generator.integers(1, 65))
    content[places] ^= (1 << generator.integers(0, 8, len(places))).astype(np.uint8)
    path.write_bytes(content.tobytes())


def _changed_bytes(path: Path, generator: Generator) -> None:
    """Bytes that are often taken for lengths, signs and undefined addresses."""
    content = bytearray(path.read_bytes())
    for place in generator.integers(512, METADATA_END, generator.integers(1, 9)):
        content[place] = generator.choice([0, 1, 0x7F, 0x80, 0xFF])
    path.write_bytes(content)


def _truncated(path: Path, generator: Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: generator.integers(len(content))])


def _block(path: Path, generator: Generator, change: Callable[[bytes], bytes]) -> None:
    content = path.read_bytes()
    start = int(generator.integers(len(content)))
    stop = start + int(generator.integers(1, 513))
    path.write_bytes(content[:start] + change(content[start:stop]) + content[stop:])


def _zeroed_block(path: Path, generator: Generator) -> None:
    _block(path, generator, lambda block: bytes(len(block)))


def _lost_block(path: Path, generator: Generator) -> None:
    _block(path, generator, lambda block: b"")


def _doubled_block(path: Path, generator: Generator) -> None:
    _block(path, generator, lambda block: 2 * block)


def _shuffled_block(path: Path, generator: Generator) -> None:
    _block(path, generator, lambda block: bytes(generator.permutation(list(block)).tolist()))


def _another_format(path: Path, generator: Generator) -> None:
    starts = (
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"PK\x03\x04",
        b"MATLAB 5.0 MAT-file",
        b"\x89HDF\r\n\x1a\n",
    )
    start = starts[generator.integers(len(starts))]
    path.write_bytes(start + generator.bytes(generator.integers(1000)) if start else b"")


# --------------------------------------------------------------------------- structure


def _any_field(generator: Generator) -> str:
    return FIELDS[generator.integers(len(FIELDS))]


def _replace(path: Path, name: str, create: Callable[[h5py.Group], object]) -> None:
    """Let `create` put something else where a field was."""
    with h5py.File(path, "r+") as file:
        del file["cjdata"][name]
        create(file["cjdata"])


def _replace_values(path: Path, name: str, values: object) -> None:
    _replace(path, name, lambda group: group.create_dataset(name, data=values))


def _missing_field(path: Path, generator: Generator) -> None:
    _replace(path, _any_field(generator), lambda group: None)


def _renamed_field(path: Path, generator: Generator) -> None:
    name = _any_field(generator)
    with h5py.File(path, "r+") as file:
        file["cjdata"].move(name, generator.choice([name.swapcase(), name + " ", "é\n", "../x"]))


def _swapped_fields(path: Path, generator: Generator) -> None:
    one, other = generator.choice(FIELDS, 2, replace=False)
    with h5py.File(path, "r+") as file:
        group = file["cjdata"]
        group.move(one, "aside")
        group.move(other, one)
        group.move("aside", other)


def _renamed_struct(path: Path, generator: Generator) -> None:
    with h5py.File(path, "r+") as file:
        file.move("cjdata", generator.choice(["CJDATA", "cjdata2", "data"]))


def _folds_in_place_of_a_slice(path: Path, generator: Generator) -> None:
    with h5py.File(path, "w", userblock_size=512) as file:
        file["cvind"] = generator.integers(1, 6, (1, ARCHIVE_SIZE)).astype(float)


def _huge_shape(path: Path, generator: Generator) -> None:
    """No element of it is ever written."""
    name = _any_field(generator)
    shape = ((2**16, 2**16), (2**35, 2**20), (1, 2**31), (2**58, 1), (4096, 4096))
    chunks = ({}, {"chunks": (64, 64)}, {"chunks": (1, 1)}, {"chunks": (2**10, 2**15)})
    options = {"shape": shape[generator.integers(5)], **chunks[generator.integers(4)]}
    if "chunks" in options:
        options["maxshape"] = (None, None)
    _replace(path, name, lambda group: group.create_dataset(name, dtype="f8", **options))


def _much_in_little(path: Path, generator: Generator) -> None:
    """Zeros that are stored in a thousandth of what they unpack to."""
    name = _any_field(generator)
    packing = {"chunks": (1024, 1024), "compression": "gzip", "compression_opts": 1}
    zeros = np.zeros((2048, 4096), np.longdouble if generator.random() < 0.1 else "u1")
    _replace(path, name, lambda group: group.create_dataset(name, data=zeros, **packing))


def _chunk_bomb(path: Path, generator: Generator) -> None:
    """A chunk that promises a few kilobytes and unpacks to 2 GiB."""
    name = _any_field(generator)

    def create(group: h5py.Group) -> None:
        dataset = group.create_dataset(name, (48, 48), "u2", chunks=(48, 48), compression="gzip")
        dataset.id.write_direct_chunk((0, 0), zlib_zeros(128))

    _replace(path, name, create)


def _circular_index(path: Path, generator: Generator) -> None:
    """An index of chunks that holds itself."""
    name = _any_field(generator)
    values = np.ones((48, 48))
    _replace(path, name, lambda group: group.create_dataset(name, data=values, chunks=(24, 24)))
    content = bytearray(path.read_bytes())
    node = content.rfind(b"TREE\x01")
    content[node + 5] = generator.integers(1, 256)  # its level
    content[node + 56 : node + 64] = (node - 512).to_bytes(8, "little")  # its first child
    path.write_bytes(content)


def _swapped_addresses(path: Path, generator: Generator) -> None:
    """Where one structure's address was, or what looks like an address, stands another's."""
    content = bytearray(path.read_bytes())
    structures = [found.start() - 512 for found in re.finditer(b"TREE|SNOD|HEAP", content)]
    words = np.frombuffer(content[:METADATA_END], "<u8")
    places = 8 * np.flatnonzero((words > 0) & (words < len(content)))
    for place in generator.choice(places, generator.integers(1, 4)):
        struct.pack_into("<Q", content, place, generator.choice(structures))
    path.write_bytes(content)


def _forged_checksum(path: Path, generator: Generator) -> None:
    """A newer format, whose headers have checksums: one is changed, and its checksum made right."""
    with h5py.File(path, "r") as file:
        values = {name: file["cjdata"][name][()] for name in FIELDS}
    with h5py.File(path, "w", libver="latest", userblock_size=512) as file:
        file.create_group("cjdata").update(values)
    content = bytearray(path.read_bytes())
    start, stop = (headers := header_extents(content))[generator.integers(len(headers))]
    for place in generator.integers(start + 4, stop, generator.integers(1, 5)):
        content[place] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.integers(256)])
    struct.pack_into("<I", content, stop, checksum(content[start:stop]))
    path.write_bytes(content)


def header_extents(content: bytes) -> list[tuple[int, int]]:
    """Return where the headers of the newer formats begin, and where the checksum of each lies."""
    extents = []
    for found in re.finditer(b"OHDR\2", content):
        flags = content[found.end()]
        place = found.end() + 1 + 16 * (flags >> 5 & 1) + 4 * (flags >> 4 & 1)  # times, limits
        width = 1 << (flags & 3)
        size = int.from_bytes(content[place : place + width], "little")
        extents.append((found.start(), place + width + size))
    return extents


def checksum(content: bytes) -> int:
    """Return HDF5's checksum: hashlittle of Bob Jenkins's lookup3, from 0."""
    a = b = c = 0xDEADBEEF + len(content)
    *blocks, last = struct.iter_unpack("<3I", content + bytes(-len(content) % 12))
    for block in blocks:
        a, b, c = a + block[0], b + block[1], c + block[2]
        for shift in (4, 6, 8, 16, 19, 4):
            a, b, c = b, b + c, a - c ^ _rotated(c, shift)
    a, b, c = a + last[0], b + last[1], c + last[2]
    for shift in (14, 11, 25, 16, 4, 14, 24):
        a, b, c = b, (c ^ b) - _rotated(b, shift), a
    return b & 0xFFFFFFFF


def _rotated(value: int, shift: int) -> int:
    value &= 0xFFFFFFFF
    return value << shift | value >> 32 - shift


def _rare_filters(path: Path, generator: Generator) -> None:
    name = _any_field(generator)
    pipelines = (
        lambda plist: [plist.set_deflate(9) for _ in range(3)],
        lambda plist: plist.set_shuffle() or plist.set_fletcher32(),
        lambda plist: plist.set_filter(h5py.h5z.FILTER_LZF, h5py.h5z.FLAG_OPTIONAL),
        lambda plist: plist.set_scaleoffset(h5py.h5z.SO_INT, 0),
        lambda plist: plist.set_filter(32000, h5py.h5z.FLAG_OPTIONAL, (4, 1, 99)),
    )
    pipeline = pipelines[generator.integers(len(pipelines))]

    def create(group: h5py.Group) -> None:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((24, 24))
        pipeline(plist)
        space = h5py.h5s.create_simple((48, 48))
        made = h5py.h5d.create(group.id, name.encode(), h5py.h5t.NATIVE_INT16, space, plist)
        h5py.Dataset(made)[...] = 7

    _replace(path, name, create)


def _wrong_type(path: Path, generator: Generator) -> None:
    name = _any_field(generator)
    types = (
        *(np.dtype("S9"), h5py.string_dtype(), h5py.vlen_dtype(np.int32), h5py.ref_dtype),
        *(h5py.regionref_dtype, np.dtype([("real", "f8"), ("x", "S3")]), np.dtype("c16")),
        *(
            np.dtype("V7"),
            np.dtype(("f8", (3,))),
            h5py.enum_dtype({"A": 1, "B": 2}),
            np.dtype(bool),
        ),
        *(np.dtype(">f2"), np.dtype("u8"), np.dtype(np.longdouble), np.dtype(">i4")),
    )
    chosen = types[generator.integers(len(types))]
    _replace(path, name, lambda group: group.create_dataset(name, (48, 48), chosen))


def _crooked_number(path: Path, generator: Generator) -> None:
    """Numbers whose bits lie as on no machine."""
    name = _any_field(generator)
    if generator.random() < 0.5:
        kind, precision = h5py.h5t.STD_I32LE.copy(), int(generator.integers(16, 33))
        kind.set_precision(precision)
        kind.set_offset(int(generator.integers(0, 33 - precision)))
    else:
        kind, exponent = h5py.h5t.IEEE_F64LE.copy(), int(generator.integers(33, 63))
        kind.set_fields(63, exponent, 63 - exponent, 0, int(generator.integers(32, exponent)))
        kind.set_ebias(int(generator.integers(1 << 20)))

    def create(group: h5py.Group) -> None:
        h5py.h5d.create(group.id, name.encode(), kind, h5py.h5s.create_simple((48, 48)))

    _replace(path, name, create)


def _link(path: Path, generator: Generator) -> None:
    name = generator.choice([*FIELDS, "cjdata"])
    outside = str(path.with_name(OUTSIDE))
    links = (
        *(h5py.SoftLink("/cjdata/label"), h5py.SoftLink("/nowhere"), h5py.SoftLink("/link/link")),
        *(h5py.SoftLink(f"/cjdata/{name}"), h5py.SoftLink("/"), h5py.ExternalLink(outside, "/")),
        *(h5py.ExternalLink(outside, "/cjdata/image"), h5py.ExternalLink("/etc/passwd", "/")),
        h5py.ExternalLink(str(path), "/cjdata/image"),
    )
    with h5py.File(path, "r+") as file:
        group = file if name == "cjdata" else file["cjdata"]
        del group[name]
        group[name] = links[generator.integers(len(links))]


def _cycle(path: Path, generator: Generator) -> None:
    with h5py.File(path, "r+") as file:
        group, name = file["cjdata"], generator.choice([*FIELDS, "cjdata"])
        parent = file if name == "cjdata" else group
        kept = group["image"]
        del parent[name]
        parent[name] = (file["/"], group, kept)[generator.integers(3)]


def _not_a_dataset(path: Path, generator: Generator) -> None:
    name = _any_field(generator)
    made = (
        lambda group: group.create_group(name),
        lambda group: group.update({name: np.dtype("f8")}),
    )
    _replace(path, name, made[generator.integers(2)])


def _stored_elsewhere(path: Path, generator: Generator) -> None:
    name = _any_field(generator)
    outside = str(generator.choice([path.with_name(OUTSIDE), path, "/dev/zero", "/etc/passwd"]))
    storage = [(outside, 0, 48 * 48 * 2)]
    _replace(path, name, lambda group: group.create_dataset(name, (48, 48), "i2", external=storage))


def _virtual(path: Path, generator: Generator) -> None:
    """A data set that is made of others: outside, absent, or itself."""
    name = _any_field(generator)
    sources = (
        *((str(path.with_name(OUTSIDE)), "cjdata/image"), (".", f"cjdata/{name}")),
        *((str(path), f"cjdata/{name}"), ("part.h5", "image"), (".", "cjdata/nothing")),
    )
    layout = h5py.VirtualLayout((48, 48), "i2")
    layout[:] = h5py.VirtualSource(*sources[generator.integers(len(sources))], shape=(48, 48))
    _replace(path, name, lambda group: group.create_virtual_dataset(name, layout))


def _not_finite(path: Path, generator: Generator) -> None:
    name = _any_field(generator)
    with h5py.File(path, "r") as file:
        values = file["cjdata"][name][()].astype(float)
    place = generator.integers(values.size)
    values.flat[place] = generator.choice([np.nan, np.inf, -np.inf, 1e300])
    _replace_values(path, name, values)


def _wrong_shape(path: Path, generator: Generator) -> None:
    name = _any_field(generator)
    shapes = ((), (0, 48), (48, 0), (0,), (48,), (1, 1), (4, 5, 6), (1,) * 32, (47, 48), (1, 4096))
    shape = shapes[generator.integers(len(shapes))]
    empty = h5py.Empty("f8")
    _replace_values(path, name, empty if generator.random() < 0.1 else np.ones(shape))


def _wrong_value(path: Path, generator: Generator) -> None:
    values = {
        "label": [0, 4, -1, 1.5, 1e300, 2**63, np.nan],
        "PID": [10, 0, -1, 0xD800, 0x202E, 0x10FFFF, 2**40, 65.5, np.nan],
    }
    name = generator.choice(list(values))
    value = values[name][generator.integers(len(values[name]))]
    _replace_values(path, name, np.full((1, 1 + (name == "PID")), value))


BYTES: tuple[Mutation, ...] = (
    *(_flipped_bits, _flipped_bits, _flipped_bits, _changed_bytes, _changed_bytes, _truncated),
    *(_zeroed_block, _shuffled_block, _lost_block, _doubled_block, _another_format),
)
STRUCTURE: tuple[Mutation, ...] = (
    *(_missing_field, _renamed_field, _swapped_fields, _renamed_struct),
    *(_folds_in_place_of_a_slice, _huge_shape, _much_in_little, _chunk_bomb, _rare_filters),
    *(_circular_index, _swapped_addresses, _forged_checksum),
    *(_wrong_type, _crooked_number, _link, _cycle, _not_a_dataset, _stored_elsewhere, _virtual),
    *(_not_finite, _wrong_shape, _wrong_value),
)

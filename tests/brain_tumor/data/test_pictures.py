"""Reading PNG and JPEG: what is read, and that nothing hostile gets further than one line."""

import errno
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.brain_tumor.data import matlab
from examples.brain_tumor.data.matlab import LARGEST_SIDE
from examples.brain_tumor.data.pictures import MOST_SCANS, read_picture
from examples.brain_tumor.errors import UserError

GREY = (np.arange(20 * 30).reshape(20, 30) * 7 % 256).astype(np.uint8)
SMOOTH = np.linspace(0, 255, 40 * 48).reshape(40, 48).astype(np.uint8)  # what JPEG keeps well


def encode(picture, form="PNG", **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def read(folder, content, name="picture"):
    path = folder / name
    path.write_bytes(content)
    return read_picture(path)


def of(pixels, mode=None):
    picture = Image.fromarray(pixels)
    return picture if mode is None else picture.convert(mode)


LOSSLESS = {
    "grey": of(GREY),
    "colours, all grey": of(GREY, "RGB"),
    "opaque": of(GREY, "RGBA"),
    "transparent": Image.merge("LA", (of(GREY), of(GREY[::-1].copy()))),
    "transparent colours": Image.merge("RGBA", (*of(GREY, "RGB").split(), of(255 - GREY))),
    "palette": of(GREY, "P"),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_grey_values_are_kept_whatever_they_are_stored_as(tmp_path, kind):
    found = read(tmp_path, encode(LOSSLESS[kind]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, GREY)


def test_sixteen_bits_are_kept(tmp_path):
    deep = GREY.astype(np.uint16) * 257 - np.arange(30, dtype=np.uint16) % 3
    np.testing.assert_array_equal(read(tmp_path, encode(Image.fromarray(deep))), deep)


def test_black_and_white(tmp_path):
    found = read(tmp_path, encode(Image.fromarray(GREY > 100)))
    np.testing.assert_array_equal(found > 0, GREY > 100)


def test_colours_become_their_luminance(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    found = read(tmp_path, encode(Image.fromarray(colours)))
    np.testing.assert_allclose(found, colours @ (0.299, 0.587, 0.114), atol=1)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(tmp_path, mode, progressive):
    content = encode(of(SMOOTH, mode), "JPEG", quality=95, progressive=progressive)
    np.testing.assert_allclose(read(tmp_path, content), SMOOTH, atol=8)


def test_a_picture_is_turned_as_its_exif_data_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    found = read(tmp_path, encode(of(GREY), exif=exif))
    np.testing.assert_array_equal(found, np.rot90(GREY, -1))


def test_of_an_animation_the_first_picture_is_read(tmp_path):
    further = [of(255 - GREY), of(GREY[::-1].copy())]
    content = encode(of(GREY), save_all=True, append_images=further)
    np.testing.assert_array_equal(read(tmp_path, content), GREY)


# ---------------------------------------------------------------------------------- hostile files


def promise(width, height):
    """A PNG of almost no bytes that promises a size."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def many_scans(count):
    """A progressive JPEG whose last scan comes over and over; decoders do each of them."""
    content = encode(of(SMOOTH), "JPEG", progressive=True)
    usual = content.count(b"\xff\xda")
    last = content[content.rfind(b"\xff\xda") : -2]
    return content[:-2] + last * (count - usual) + content[-2:]


HOSTILE = {
    "one side too long": (promise(LARGEST_SIDE + 1, 1), "4097 x 1 pixels, expected at most 4096"),
    "other side too long": (promise(1, LARGEST_SIDE + 1), "1 x 4097 pixels"),
    "Pillow warns": (promise(10_000, 10_000), "10000 x 10000 pixels"),
    "Pillow refuses": (promise(60_000, 60_000), "larger than 4096 pixels"),
    "too many scans": (many_scans(MOST_SCANS + 1), "101 scans, expected at most 100"),
    "no pixels": (promise(100, 100), "damaged"),
    "empty": (b"", "the file is empty"),
    "text": (b"12.png", "not readable"),
    "GIF": (encode(of(GREY), "GIF"), "not readable"),
    "TIFF of two": (
        encode(of(GREY), "TIFF", save_all=True, append_images=[of(GREY)]),
        "2 pictures",
    ),
    "TIFF of a JPEG": (encode(of(GREY), "TIFF", compression="jpeg"), "is packed as jpeg"),
    "TIFF cut off": (encode(of(GREY), "TIFF")[:-200], "damaged"),
    "BMP cut off": (encode(of(GREY), "BMP")[:-200], "damaged"),
    "EPS": (encode(of(GREY), "EPS"), "not readable"),
    "PNG cut off": (encode(of(GREY))[:-50], "damaged"),
    "JPEG cut off": (encode(of(SMOOTH), "JPEG")[:-100], "damaged"),
}


def assert_refused(path, fault):
    with pytest.raises(UserError) as caught:
        read_picture(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert fault in message
    assert "\n" not in message


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_refused(tmp_path, name):
    content, fault = HOSTILE[name]
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    assert_refused(path, fault)


def test_the_largest_and_the_most_scans_are_read(tmp_path):
    wide = np.tile(GREY[:1, :16], (1, LARGEST_SIDE // 16))
    np.testing.assert_array_equal(read(tmp_path, encode(of(wide))), wide)
    assert read(tmp_path, many_scans(MOST_SCANS)).shape == SMOOTH.shape


def test_sizes_are_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(promise(LARGEST_SIDE + 1, 4096))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert_refused(path, "4097 x 4096")


def test_what_the_system_refuses_is_explained(tmp_path, monkeypatch):
    assert_refused(tmp_path / f"{'a' * 300}.png", "")  # newer Pythons only say it is not there
    path = tmp_path / "secret.png"
    path.write_bytes(encode(of(GREY)))

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    assert_refused(path, f"cannot be read: {os.strerror(errno.EACCES)}")


def test_missing_folders_and_huge_files_are_refused(tmp_path, monkeypatch):
    assert_refused(tmp_path / "none.png", "no such file")
    assert_refused(tmp_path, "is not a file")
    path = tmp_path / "huge.png"
    path.write_bytes(encode(of(GREY)))
    monkeypatch.setattr(matlab, "LARGEST_FILE", path.stat().st_size - 1)
    assert_refused(path, "which no slice needs")


def mutate(content, generator):
    """Change some bytes, cut off the end, or leave out or repeat a piece."""
    changed = bytearray(content)
    kind = generator.integers(4)
    if kind == 0:
        for place in generator.integers(0, len(changed), generator.integers(1, 9)):
            changed[place] = generator.integers(256)
    elif kind == 1:
        del changed[generator.integers(1, len(changed)) :]
    else:
        start, stop = sorted(generator.integers(0, len(changed), 2))
        piece = changed[start:stop]
        changed[start:stop] = b"" if kind == 2 else piece + piece
    return bytes(changed)


def repair_sums(content):
    """Set the checksums of a PNG's chunks right, so that damage gets past them."""
    fixed, place = bytearray(content), 8
    while place + 12 <= len(fixed):
        (length,) = struct.unpack_from(">I", fixed, place)
        end = place + 8 + length
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[place + 4 : end]))
        place = end + 4
    return bytes(fixed)


def test_mutated_pictures_are_read_or_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    animated = {"save_all": True, "append_images": [of(255 - GREY)]}
    seeds = [
        encode(of(GREY), exif=exif),
        encode(LOSSLESS["palette"], transparency=3),
        encode(Image.fromarray(GREY.astype(np.uint16) * 200)),
        encode(of(GREY), **animated),
        encode(of(SMOOTH), "JPEG", exif=exif),
        encode(of(SMOOTH, "RGB"), "JPEG", progressive=True),
    ]
    generator = np.random.default_rng(0)
    path = tmp_path / "picture"
    read, refused = 0, []
    for turn in range(600):
        content = mutate(seeds[turn % len(seeds)], generator)
        path.write_bytes(repair_sums(content) if content[1:4] == b"PNG" else content)
        try:
            found = read_picture(path)
        except UserError as error:
            refused.append(str(error))
        else:
            read += 1
            assert found.ndim == 2
            assert found.dtype == np.float32
            assert max(found.shape) <= LARGEST_SIDE
            assert np.isfinite(found).all()
    assert all(one.startswith(f"{path}: ") and "\n" not in one for one in refused)
    assert min(read, len(refused)) > 50  # the mutations are neither harmless nor hopeless


# ----------------------------------------------------------------------------- TIFF, BMP and DICOM


@pytest.mark.parametrize("packing", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff(tmp_path, packing):
    content = encode(of(GREY), "TIFF", compression=packing)
    np.testing.assert_array_equal(read(tmp_path, content), GREY)


def test_tiff_of_16_bits_and_its_negative(tmp_path):
    deep = GREY.astype(np.uint16) * 257
    np.testing.assert_array_equal(read(tmp_path, encode(Image.fromarray(deep), "TIFF")), deep)
    negative = encode(Image.fromarray(deep), "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(read(tmp_path, negative), deep.max() - deep.astype(float))


def test_bmp(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, encode(of(GREY), "BMP")), GREY)


def dicom(pixels, **changes):
    """A file of DICOM, as bytes."""
    pydicom = pytest.importorskip("pydicom", reason="reads DICOM, an extra")
    syntax = changes.pop("syntax", pydicom.uid.ExplicitVRLittleEndian)
    dataset = pydicom.dataset.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelData = pixels.astype("<u2").tobytes()
    for name, value in changes.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def test_dicom_is_rescaled_windowed_and_turned_positive(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, dicom(GREY)), GREY)
    rescaled = read(tmp_path, dicom(GREY, RescaleSlope=2, RescaleIntercept=-5))
    np.testing.assert_array_equal(rescaled, 2.0 * GREY - 5)
    windowed = read(tmp_path, dicom(GREY, WindowCenter=100, WindowWidth=51))
    inside = (GREY > 75) & (GREY <= 124)  # PS3.3 C.11.2.1.2.1
    assert len(np.unique(windowed[GREY <= 74])) == len(np.unique(windowed[GREY > 125])) == 1
    assert np.corrcoef(windowed[inside], GREY[inside])[0, 1] > 0.999
    negative = read(tmp_path, dicom(GREY, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(negative, GREY.max() - GREY.astype(float))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"NumberOfFrames": 2}, "holds 2 frames, expected one slice"),
        ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "is RGB"),
        ({"Rows": 5000}, "5000 pixels, expected at most 4096"),
        ({"Rows": 1000}, "not readable as DICOM, or damaged"),
        ({"syntax": "1.2.840.10008.1.2.1.99"}, "is packed as Deflated"),
    ],
)
def test_dicom_that_is_no_plain_slice_is_refused(tmp_path, changes, fault):
    path = tmp_path / "picture.dcm"
    path.write_bytes(dicom(GREY, **changes))
    assert_refused(path, fault)


def test_damaged_dicom_is_refused_or_read(tmp_path):
    whole, path = dicom(GREY), tmp_path / "picture.dcm"
    generator, refused = np.random.default_rng(0), 0
    for _ in range(100):
        content = bytearray(whole)
        content[generator.integers(0, 400)] ^= 1 << generator.integers(8)
        path.write_bytes(content)
        try:
            read_picture(path)
        except UserError:
            refused += 1
    assert refused > 10


def test_dicom_that_takes_too_long_is_refused(tmp_path, serving):
    whole = dicom(GREY, syntax="1.2.840.10008.1.2")
    serving("import pydicom.pixels; reader.PATIENCE = 0.5")
    element = struct.pack("<HHI", 0x7FE1, 0x1000, 0)  # without content
    (tmp_path / "hostile").write_bytes(whole + 2_000_000 * element)
    np.testing.assert_array_equal(read(tmp_path, whole), GREY)
    assert_refused(tmp_path / "hostile", "damaged: reading it crashes or never ends")
    np.testing.assert_array_equal(read(tmp_path, whole), GREY)


def test_without_pydicom_dicom_is_refused(tmp_path, serving):
    path = tmp_path / "picture"
    path.write_bytes(bytes(128) + b"DICM")
    serving("sys.modules['pydicom'] = None")
    assert_refused(path, "DICOM files need pydicom")

"""Reading PNG, JPEG, TIFF, BMP and DICOM pictures, which may come from anywhere, as slices.

Nothing in them is trusted: what a header promises is checked before anything is decoded.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError
from .matlab import LARGEST_SIDE, check_file, check_image
from .reader import READER

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")  # what their names end in
# Of a TIFF: what Pillow or zlib unpacks, never more than the picture's size.
PACKINGS = ("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate")
MOST_SCANS = 100  # of a JPEG: each takes as long as a whole picture and few bytes; usual are 10
START_OF_SCAN = b"\xff\xda"
GREY_MODES = ("1", "L", "I", "I;16", "I;16B", "F")  # of Pillow; a pixel is one number
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a TIFF's tag and its value


def read_picture(path: Path) -> np.ndarray:
    """Read a picture as grey intensities (h, w), float32, upright as its EXIF data says.

    Colours become their luminance, which is exact where all are grey; transparency is left out.
    Of an animation the first picture is read. 16 bits a pixel are kept where the picture is grey.

    Raises:
        UserError: The file is missing, damaged, too large, of another format or of one grey value.
    """
    check_file(path)
    try:
        content = path.read_bytes()
    except OSError as error:  # no permission, a disk at fault
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if content[128:132] == b"DICM":
        return check_image(path, READER.read(path, "dicom")["image"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF data, and of sizes refused here anyway
            with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
                _check_promises(path, picture, content)
                return check_image(path, _intensities(picture))
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{path}: is larger than {LARGEST_SIDE} pixels on a side") from None
    except Exception as error:  # a damaged picture fails in as many ways as it has bytes
        raise UserError(
            f"{path}: not readable as {', '.join(FORMATS)} or DICOM, or damaged"
        ) from error


def _check_promises(path: Path, picture: Image.Image, content: bytes) -> None:
    """Raise a UserError if decoding would take too much memory or time."""
    width, height = picture.size
    if max(width, height) > LARGEST_SIDE:
        raise UserError(
            f"{path}: is {width} x {height} pixels, expected at most {LARGEST_SIDE} on a side"
        )
    scans = content.count(START_OF_SCAN)
    if picture.format == "JPEG" and scans > MOST_SCANS:
        raise UserError(f"{path}: has {scans} scans, expected at most {MOST_SCANS}")
    if picture.format == "TIFF":
        packing = picture.info.get("compression", "raw")
        if packing not in PACKINGS:
            raise UserError(f"{path}: is packed as {packing}, expected {', '.join(PACKINGS)}")
        if picture.n_frames > 1:
            raise UserError(f"{path}: holds {picture.n_frames} pictures, expected one slice")


def _intensities(picture: Image.Image) -> np.ndarray:
    """Return a picture's grey values (h, w), float32."""
    # Pillow turns a negative of 8 bits only.
    negative = picture.format == "TIFF" and picture.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
    picture = ImageOps.exif_transpose(picture)
    if picture.mode not in GREY_MODES:
        picture = picture.convert("L")
    values = np.asarray(picture).astype(np.float32)
    return values.max() - values if negative and picture.mode not in ("1", "L") else values

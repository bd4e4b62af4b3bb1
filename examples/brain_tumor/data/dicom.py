"""Reading DICOM files, which may come from anywhere, as slices; needs pydicom."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .matlab import LARGEST_SIDE

# Those without compression: what unpacks could take any time and memory.
TRANSFER_SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
PREAMBLE, MARK = 128, b"DICM"


def is_dicom(content: bytes) -> bool:
    """Return whether a file's bytes begin as DICOM files do."""
    return content[PREAMBLE : PREAMBLE + len(MARK)] == MARK


def read_dicom(path: Path, content: bytes) -> np.ndarray:
    """Read a slice as its window shows it: (h, w), the brighter the larger.

    The stored values are rescaled and cut off at the file's first window, if it has one;
    MONOCHROME1, whose least value is white, is turned into MONOCHROME2.

    Args:
        path: The file, for messages.
        content: Its bytes.

    Raises:
        UserError: The file is damaged, holds more than one slice or no grey one, is packed, or
            pydicom is missing.
    """
    try:
        import pydicom  # here because it is an extra
        from pydicom.filereader import read_file_meta_info
        from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
    except ImportError:
        raise UserError(f"{path}: DICOM files need pydicom: pip install pydicom") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that the standard does not allow
            # The head alone: what follows might have to be unpacked.
            packing = read_file_meta_info(path).TransferSyntaxUID
            if packing not in TRANSFER_SYNTAXES:
                raise UserError(f"{path}: is packed as {packing.name}, expected plain pixels")
            dataset = pydicom.dcmread(io.BytesIO(content))
            _check_promises(path, dataset)
            values = apply_modality_lut(pixel_array(dataset), dataset)
            values = np.asarray(apply_voi_lut(values, dataset), np.float64)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise UserError(f"{path}: not readable as DICOM, or damaged") from error
    negative = dataset.PhotometricInterpretation == "MONOCHROME1"
    return values.max() - values if negative else values


def _check_promises(path: Path, dataset: Any) -> None:  # noqa: ANN401
    """Raise a UserError if the pixels are not those of one slice of a slice's size."""
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise UserError(f"{path}: holds {frames} frames, expected one slice")
    kind = dataset.PhotometricInterpretation
    if dataset.SamplesPerPixel != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(f"{path}: is {kind}, expected MONOCHROME1 or MONOCHROME2")
    if max(dataset.Rows, dataset.Columns) > LARGEST_SIDE:
        raise UserError(
            f"{path}: is {dataset.Columns} x {dataset.Rows} pixels, expected at most "
            f"{LARGEST_SIDE} on a side"
        )

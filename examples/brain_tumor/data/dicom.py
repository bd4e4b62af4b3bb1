"""Reading DICOM files, which may come from anywhere, as slices; needs pydicom.

pydicom reads as many elements as a file says it has, however deep: a process apart does it, with
limits (see reader.py).
"""

import warnings
from typing import Any

import numpy as np

from ..errors import FormatError
from .hdf5 import LARGEST_SIDE

# Those without compression: what unpacks could take any time and memory.
TRANSFER_SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")


def read_dicom(path: str) -> dict[str, np.ndarray]:
    """Read a slice as its window shows it: "image" (h, w), the brighter the larger.

    The stored values are rescaled and cut off at the file's first window, if it has one;
    MONOCHROME1, whose least value is white, is turned into MONOCHROME2.

    Raises:
        FormatError: The file is damaged, holds more than one slice or no grey one, is packed, or
            pydicom is missing.
    """
    try:
        import pydicom  # here because it is an extra
        from pydicom.filereader import read_file_meta_info
        from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
    except ImportError:
        raise FormatError("DICOM files need pydicom: pip install pydicom") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that the standard does not allow
            # The head alone: what follows might have to be unpacked.
            packing = read_file_meta_info(path).TransferSyntaxUID
            if packing not in TRANSFER_SYNTAXES:
                raise FormatError(f"is packed as {packing.name}, expected plain pixels")
            dataset = pydicom.dcmread(path)
            _check_promises(dataset)
            values = apply_modality_lut(pixel_array(dataset), dataset)
            values = np.asarray(apply_voi_lut(values, dataset), np.float64)
    except FormatError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise FormatError("not readable as DICOM, or damaged") from error
    negative = dataset.PhotometricInterpretation == "MONOCHROME1"
    return {"image": np.ascontiguousarray(values.max() - values if negative else values)}


def _check_promises(dataset: Any) -> None:  # noqa: ANN401
    """Raise a FormatError if the pixels are not those of one slice of a slice's size."""
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise FormatError(f"holds {frames} frames, expected one slice")
    kind = dataset.PhotometricInterpretation
    if dataset.SamplesPerPixel != 1 or kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise FormatError(f"is {kind}, expected MONOCHROME1 or MONOCHROME2")
    if max(dataset.Rows, dataset.Columns) > LARGEST_SIDE:
        raise FormatError(
            f"is {dataset.Columns} x {dataset.Rows} pixels, expected at most {LARGEST_SIDE} on a "
            "side"
        )

"""Downloading the slices and the ImageNet weights: cut off, the same command continues.

No server vouches for what it sends: the sums are written down here or, of the weights, in a commit
whose own hash is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.folders import MARKER_NAME
from ..errors import UserError
from ..files import checksum, explained, locked, write_text
from ..network.mobilenet import MobileNetV1, load_imagenet_weights
from .archives import unpack
from .commits import sum_in_commit
from .transfer import LONGEST_HEAD, check_safe, fetch

# figshare.com/ndownloader, the same files under another name, answers programs with a riddle.
FIGSHARE = "https://ndownloader.figshare.com/files"
WEIGHTS = "https://huggingface.co/timm/mobilenetv1_100.ra4_e3600_r224_in1k"
WEIGHTS_COMMIT = "dda9ab42e23f3061aa191630817df76e8fe9cace"
WEIGHTS_NAME = "model.safetensors"
UNPACKED = 3  # a slice takes 0.28 MB in an archive, and at most 0.8 MB out of it


@dataclass(frozen=True)
class FigshareFile:
    """A file of the data set: its name, its id at Figshare, its md5 sum and its bytes."""

    name: str
    identifier: int
    md5: str
    size: int


# Figshare's article 1512427, "brain tumor dataset", by Jun Cheng, CC BY 4.0.
FILES = (
    FigshareFile("cvind.mat", 7005344, "5ea82eb3212c9fcb84290ccf0beb486d", 5_736),
    *(
        FigshareFile(f"brainTumorDataPublic_{name}.zip", identifier, md5, size)
        for name, identifier, md5, size in (
            ("1-766", 3381290, "74b949ad33f042e6e103523091cd1428", 214_401_279),
            ("767-1532", 3381296, "7e8a875500d2c8a346f270538e29890e", 217_848_429),
            ("1533-2298", 3381293, "8227bf6080cb71f15a88be8d25c79ae7", 215_563_856),
            ("2299-3064", 3381302, "b378a80d6174e5317d59eb28430c6652", 231_679_762),
        )
    ),
)


def download_slices(
    folder: Path, base_url: str = FIGSHARE, files: Sequence[FigshareFile] = FILES
) -> None:
    """Download the data set's archives and unpack them: 1.mat to 3064.mat, and cvind.mat.

    What a former call left behind is used: whole files, parts of files, unpacked archives. Files
    that end in .zip are unpacked and removed.

    Raises:
        UserError: The folder is not fit for it or the disk is too full, the server refuses or
            cannot be reached, or a file is not the one expected.
    """
    if (folder / MARKER_NAME).exists():
        raise UserError(f"{folder}: holds synthetic slices; download into another folder")
    with locked(folder), explained(folder):
        missing = [file for file in files if not _is_unpacked(folder, file)]
        for index, file in enumerate(missing):
            path = folder / file.name
            room = sum(UNPACKED * other.size for other in missing[index:])
            known = f"md5:{file.md5}"
            fetch(f"{base_url}/{file.identifier}", path, file.size, known, room)
            if path.suffix == ".zip":
                names = unpack(path, folder)
                write_text(_record(folder, file), "\n".join([file.md5, *names]))
                path.unlink()


def download_weights(path: Path, repository: str = WEIGHTS, commit: str = WEIGHTS_COMMIT) -> str:
    """Download timm's ImageNet weights of MobileNet v1, for a network of the layout "timm".

    The file's SHA-256, which is returned, is what the commit says, see `sum_in_commit`; besides,
    its tensors are checked for names, shapes and finite values. If the file is there, its tensors
    are checked, no more.

    Raises:
        UserError: The file cannot be downloaded or written, or is not what it should be.
    """
    with locked(path.parent, f".{path.name}.lock"), explained(path):
        if not path.exists():
            check_safe(repository)
            known, size = sum_in_commit(repository, commit, WEIGHTS_NAME, LONGEST_HEAD)
            url = f"{repository}/resolve/{commit}/{WEIGHTS_NAME}"
            fetch(url, path, size, known)
        load_imagenet_weights(MobileNetV1(layout="timm"), path)
        return checksum(path)


def _record(folder: Path, file: FigshareFile) -> Path:
    """Return the file that says what an archive was unpacked to: its md5 sum, then the names."""
    return folder / f".{file.name}.unpacked"


def _is_unpacked(folder: Path, file: FigshareFile) -> bool:
    record = _record(folder, file)
    if not record.is_file():
        return False
    md5, *names = record.read_text("utf-8", "replace").split("\n")
    return md5 == file.md5 and all((folder / name).is_file() for name in names)

"""The slices of a folder: loaded once, kept decoded, and split into training and test sides."""

import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..files import replacing
from .crop import cut, find_box
from .matlab import read_folds, read_slice

CLASS_NAMES = ("meningioma", "glioma", "pituitary")  # labels 0, 1, 2; the archive's 1, 2, 3
PLANES = ("axial", "sagittal", "coronal")
# One clear slice of the archive for each cell of figure 1, chosen by eye.
SAMPLE_NUMBERS = {
    ("meningioma", "axial"): 10,
    ("meningioma", "sagittal"): 515,
    ("meningioma", "coronal"): 300,
    ("glioma", "axial"): 2344,
    ("glioma", "sagittal"): 2850,
    ("glioma", "coronal"): 2441,
    ("pituitary", "axial"): 935,
    ("pituitary", "sagittal"): 1832,
    ("pituitary", "coronal"): 1092,
}
CACHE_FORMAT = 2  # to be raised whenever decoding changes


@dataclass(frozen=True)
class SliceSet:
    """All slices of a folder, decoded."""

    images: Tensor  # (n, 1, size, size) float16, each image scaled to [0, 1]
    labels: Tensor  # (n,) indices into `CLASS_NAMES`
    numbers: list[int]  # the slices' numbers, ascending: 12 for 12.mat
    patients: list[str]  # the patients' ids
    folds: Tensor | None  # (n,) folds 1 to 5 of cvind.mat, or None where there is no such file
    synthetic: bool  # true for phantoms
    # SHA-256 of the images as they were read, whatever they were cut and resized to
    digest: str = ""


def load_slices(
    folder: Path,
    image_size: int,
    cache_folder: Path | None = None,
    progress: bool = True,
    crop: str = "none",
) -> SliceSet:
    """Load every slice of a folder: 1.mat, 2.mat, ..., and cvind.mat if it is there.

    Decoding takes a minute or two for the whole archive, so its result is kept, in one file for
    each image size and crop. That file is rebuilt when a slice's name, size or time of change
    differs, and when it is damaged.

    Args:
        folder: Where the slices lie.
        image_size: Side in pixels to which the images are resized.
        cache_folder: Where the decoded images are kept; by default `.cache` in the folder or,
            if that cannot be written, a folder of its own in `~/.cache/angular_losses`.
        progress: Whether to show a progress bar while decoding.
        crop: What is cut out of each slice before that, see `find_box`.

    Raises:
        UserError: The folder is missing or holds no slices, or a file is faulty.
    """
    paths = slice_paths(folder)
    numbers = [int(path.stem) for path in paths]
    cache = (cache_folder or default_cache_folder(folder)) / f"slices-{image_size}-{crop}.npz"
    key = cache_key(paths, image_size, crop)
    decoded = read_cache(cache, key, (len(paths), 1, image_size, image_size))
    if decoded is None:
        decoded = decode_slices(paths, image_size, crop, progress)
        write_cache(cache, key, decoded)
    return SliceSet(
        images=torch.from_numpy(decoded["images"]),
        labels=torch.from_numpy(decoded["labels"]),
        numbers=numbers,
        patients=decoded["patients"].tolist(),
        folds=load_folds(folder / "cvind.mat", numbers),
        synthetic=(folder / "SYNTHETIC.txt").is_file(),
        digest=str(decoded["digest"]),
    )


def load_folds(path: Path, numbers: list[int]) -> Tensor | None:
    """Return the folds of the slices with the given numbers, or None without a cvind.mat."""
    if not path.exists():
        return None
    folds = read_folds(path)
    if numbers[-1] > len(folds):
        raise UserError(f"{path}: has no fold for {numbers[-1]}.mat")
    return torch.from_numpy(folds[np.array(numbers) - 1])


def slice_paths(folder: Path) -> list[Path]:
    """Return the slices of a folder in the order 1, 2, 10."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    paths = [path for path in folder.iterdir() if re.fullmatch(r"[1-9][0-9]{0,8}\.mat", path.name)]
    if not paths:
        raise UserError(f"{folder}: holds no slices (1.mat, 2.mat, ...)")
    return sorted(paths, key=lambda path: int(path.stem))


def decode_slices(
    paths: list[Path], image_size: int, crop: str, progress: bool
) -> dict[str, np.ndarray]:
    """Read slices, cut and resize their images."""
    images = np.empty((len(paths), 1, image_size, image_size), np.float16)
    labels, patients, digest = [], [], hashlib.sha256()
    for index, path in enumerate(tqdm(paths, "decoding", unit="slice", disable=not progress)):
        found = read_slice(path)
        images[index] = resize(cut(found.image, find_box(found.image, crop)), image_size)
        digest.update(repr((path.name, found.image.shape, str(found.image.dtype))).encode())
        digest.update(np.ascontiguousarray(found.image))
        labels.append(found.label)
        patients.append(found.patient)
    return {
        "images": images,
        "labels": np.array(labels),
        "patients": np.array(patients),
        "digest": np.array(digest.hexdigest()),
    }


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize an image to (size, size) and scale its intensities to [0, 1]; a constant gives 0."""
    if image.min() == image.max():  # without this, rounding errors would be scaled up to [0, 1]
        return np.zeros((size, size))
    pixels = torch.from_numpy(image).double()[None, None]
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0, 0].numpy()
    pixels -= pixels.min()
    return pixels / max(pixels.max(), np.finfo(np.float64).tiny)


def default_cache_folder(folder: Path) -> Path:
    """Return `.cache` in a folder or, if that cannot be written, a place of the user's."""
    if os.access(folder, os.W_OK):
        return folder / ".cache"
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return Path.home() / ".cache" / "angular_losses" / name


def cache_key(paths: list[Path], image_size: int, crop: str) -> str:
    """Return a digest of everything that the decoded slices depend on."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr((CACHE_FORMAT, image_size, crop, stats)).encode()).hexdigest()


def read_cache(path: Path, key: str, shape: tuple[int, ...]) -> dict[str, np.ndarray] | None:
    """Return what `write_cache` kept under a key, or None if it is absent, stale or damaged."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            cached = {name: file[name] for name in ("images", "labels", "patients", "digest")}
    except Exception:  # a zip file checks its own sums, and damage to it shows in a dozen ways
        return None
    images, labels, patients, digest = cached.values()
    sound = images.shape == shape and images.dtype == np.float16
    sound &= labels.shape == shape[:1] and labels.dtype == np.int64
    sound &= bool(np.isin(labels, range(len(CLASS_NAMES))).all())
    sound &= patients.shape == shape[:1] and patients.dtype.kind == "U"
    sound &= digest.dtype.kind == "U" and digest.shape == ()
    return cached if sound else None


def write_cache(path: Path, key: str, decoded: dict[str, np.ndarray]) -> None:
    """Keep decoded slices; a full or read-only disk is only mentioned, for a cache saves time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, key=np.array(key), **decoded)
    except UserError as error:
        print(f"{error}; the slices will be decoded again", file=sys.stderr)
    except OSError as error:
        print(f"{path}: {error.strerror}; the slices will be decoded again", file=sys.stderr)

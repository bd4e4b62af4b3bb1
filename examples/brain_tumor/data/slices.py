"""The slices of a folder: loaded once, kept decoded, and split into training and test sides."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..files import read_cache, write_cache
from .crop import find_box
from .folders import (
    MARKER_NAME,
    ONE_CLASS,
    PLANES_NAME,
    Source,
    count_listed,
    find_slices,
    is_phantom,
    shortened,
    tell_left_out,
)
from .matlab import CLASS_NAMES, no_formula, read_folds, read_slice
from .pictures import read_picture

PLANES = ("axial", "sagittal", "coronal")
# One clear slice of the archive for each class and plane of figure 1, chosen by eye.
SAMPLES = (10, 515, 300), (2344, 2850, 2441), (935, 1832, 1092)
SAMPLE_NUMBERS = dict(zip(product(CLASS_NAMES, PLANES), chain(*SAMPLES), strict=True))
CACHE_FORMAT = 2  # to be raised whenever decoding changes
KEPT = ("images", "labels", "patients", "numbers", "faults", "digest")


@dataclass(frozen=True)
class SliceSet:
    """All slices of a folder, decoded."""

    images: Tensor  # (n, 1, size, size) float16, each image scaled to [0, 1]
    labels: Tensor  # (n,) indices into `classes`
    numbers: list[int]  # the slices' numbers, ascending: 12 for 12.mat
    patients: list[str]  # the patients' ids or, where they are unknown, the files' names
    folds: Tensor | None  # (n,) folds 1 to 5 of cvind.mat, or None where there is no such file
    synthetic: bool  # true for phantoms
    # SHA-256 of the images as they were read, whatever they were cut and resized to
    digest: str = ""
    classes: tuple[str, ...] = CLASS_NAMES
    patients_known: bool = True


def load_slices(
    folder: Path,
    image_size: int,
    cache_folder: Path | None = None,
    progress: bool = True,
    crop: str = "none",
) -> SliceSet:
    """Load every slice of a folder, see `find_slices`, and cvind.mat if it is there.

    Decoding takes a minute or two for the whole archive, so its result is kept, in one file for
    each image size and crop. That file is rebuilt when a slice's name, size or time of change
    differs, and when it is damaged. By default it lies in `.cache` in the folder or, if that cannot
    be written, in a folder of its own in `~/.cache/angular_losses`. `crop` is what is cut out of
    each slice, see `find_box`, before it is resized to `image_size` pixels a side.

    Raises:
        UserError: The folder is missing or holds no slices, or slices of the archive are faulty:
            all of them are named. Faulty pictures are left out, and named on standard error, and so
            are classes without another; one class alone is refused.
    """
    found = find_slices(folder)
    marked = (folder / MARKER_NAME).is_file()
    count = len(found.sources)
    if marked and (listed := count_listed(folder)) != count:
        raise UserError(
            f"{folder}: holds {count} phantoms, but {PLANES_NAME} lists {listed}: their making was "
            "cut off, make them again"
        )
    cache = (cache_folder or default_cache_folder(folder)) / f"slices-{image_size}-{crop}.npz"
    key = cache_key(found.sources, image_size, crop)
    decoded = read_cache(cache, key)
    if decoded is None or not _is_sound(decoded, image_size, len(found.classes)):
        decoded = decode_slices(folder, found.sources, image_size, crop, progress)
        write_cache(cache, key, decoded, "the slices will be decoded again")
    classes, labels = found.classes, decoded["labels"]
    are_pictures = found.sources[0].label is not None
    if are_pictures:
        kept, labels = np.unique(labels, return_inverse=True)
        classes = tuple(found.classes[label] for label in kept)
    emptied = [name for name in found.classes if name not in classes]
    emptied = [f"{name}: is a class without a picture that can be read" for name in emptied]
    tell_left_out(folder, [*found.left_out, *emptied, *decoded["faults"].tolist()])
    if len(classes) == 1:
        raise UserError(ONE_CLASS.format(folder, classes[0]))
    numbers = decoded["numbers"].tolist()
    return SliceSet(
        images=torch.from_numpy(decoded["images"]),
        labels=torch.from_numpy(labels),
        numbers=numbers,
        patients=decoded["patients"].tolist(),
        folds=None if found.folds is None else torch.from_numpy(read_folds(found.folds, numbers)),
        synthetic=marked or any(is_phantom(source.path) for source in found.sources),
        digest=str(decoded["digest"]),
        classes=classes,
        patients_known=not are_pictures,
    )


def decode_slices(
    folder: Path, sources: Sequence[Source], image_size: int, crop: str, progress: bool
) -> dict[str, np.ndarray]:
    """Read slices, cut and resize their images.

    Raises:
        UserError: Slices of the archive are faulty, or all pictures are; their faults, one a line.
    """
    images = np.empty((len(sources), 1, image_size, image_size), np.float16)
    kept, labels, patients, faults = [], [], [], []
    digest = hashlib.sha256()
    for source in tqdm(sources, "decoding", unit="slice", disable=not progress):
        try:
            if source.label is None:
                found = read_slice(source.path)
                image, label, patient = found.image, found.label, found.patient
            else:  # of whom a picture is, nothing says
                image, label = read_picture(source.path), source.label
                patient = no_formula(source.name)
        except UserError as error:
            faults.append(str(error))
            continue
        images[len(kept)] = resize(image[find_box(image, crop)], image_size)
        digest.update(repr((source.name, image.shape, str(image.dtype))).encode())
        digest.update(np.ascontiguousarray(image))
        kept.append(source.number)
        labels.append(label)
        patients.append(patient)
    if faults and (not kept or sources[0].label is None):
        head = [f"{folder}: {len(faults)} of {len(sources)} slices are at fault:"]
        raise UserError("\n".join(head + shortened(faults) if len(faults) > 1 else faults))
    return {
        "images": images[: len(kept)],
        "labels": np.array(labels),
        "patients": np.array(patients),
        "numbers": np.array(kept),
        "faults": np.array(faults, dtype=str),
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
    if not os.access(folder, os.W_OK):
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        with suppress(RuntimeError):  # a user without a home, as in a container
            return Path.home() / ".cache" / "angular_losses" / name
    return folder / ".cache"


def cache_key(sources: Sequence[Source], image_size: int, crop: str) -> str:
    """Return a digest of everything that the decoded slices depend on."""
    stats = []
    for source in sources:
        with suppress(OSError):  # whoever reads the file says what is wrong with it
            stat = source.path.stat()
            stats.append((source.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr((CACHE_FORMAT, image_size, crop, stats)).encode()).hexdigest()


def _is_sound(decoded: dict[str, np.ndarray], side: int, classes: int) -> bool:
    """Return whether what was in the cache is what `decode_slices` makes."""
    if decoded.keys() != set(KEPT):
        return False
    images, labels, patients, numbers, faults, digest = map(decoded.get, KEPT)
    sound = images.shape == (len(labels), 1, side, side) and images.dtype == np.float16
    sound &= labels.dtype == np.int64 and bool(np.isin(labels, range(classes)).all())
    sound &= patients.shape == numbers.shape == labels.shape and numbers.dtype == np.int64
    sound &= all(one.dtype.kind == "U" for one in (patients, faults, digest))
    return sound

"""A run's folder: the files of a training.

Training fills it, evaluation and the report read it, and nothing else has to be remembered.
"""

import hashlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.slices import SliceSet
from ..data.splits import Split
from ..errors import UserError
from ..files import LOCK, PARTIAL, read_json, write_json, write_sums, write_text
from ..settings import Settings, differences, read_settings, write_settings

SETTINGS = "settings.toml"
SPLIT = "split.json"
ENVIRONMENT = "environment.json"
EPOCHS = "log.jsonl"
STEPS = "steps.jsonl"
CHECKPOINT = "checkpoint.pt"
EMBEDDINGS = "embeddings.npy"
ANGLES = "angles.npy"
PREDICTIONS = "predictions.csv"
VIEW_PREDICTIONS = "predictions_views{}.csv"  # as PREDICTIONS, with so many views averaged
METRICS = "metrics.json"
CALIBRATION = "calibration.npz"
LIMIT = "limit.npz"  # where there is none: what `predict` fits on the training slices
POINTING = "pointing.csv"
NEIGHBOURS = "neighbours.csv"  # of wrong slices, where there are no embeddings
STRANGE = "strange.json"
CLASSES, IMAGES = "classes", "images_sha256"  # in SPLIT
FIXED = (SPLIT, SETTINGS)  # what a training that goes on leaves as it is
RECORDS = (*FIXED, ENVIRONMENT, EPOCHS, STEPS)  # and what one that has ended does


def refuse_existing(folder: Path) -> None:
    """Raise a UserError if a new run's folder holds anything already.

    A split file alone does not count: settings are written last, and until then no run began.
    """
    unborn = {LOCK, SPLIT, SPLIT + PARTIAL, SETTINGS + PARTIAL}
    if folder.exists() and (
        not folder.is_dir() or any(path.name not in unborn for path in folder.iterdir())
    ):
        raise UserError(f"{folder}: already exists; continue it with --resume or name another")


def start_run(folder: Path, settings: Settings, slices: SliceSet, split: Split) -> None:
    """Make the folder of a new run."""
    refuse_existing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SPLIT, _describe_split(slices, split))
    write_text(folder / SETTINGS, write_settings(settings))
    write_sums(folder, FIXED)  # of the other files, which grow, `evaluate` keeps them


def check_resumable(folder: Path, settings: Settings, slices: SliceSet, split: Split) -> None:
    """Raise a UserError unless `folder` holds a run of these settings and this split."""
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: holds no run to resume ({SETTINGS} is missing)")
    changed = differences(read_settings(folder / SETTINGS), settings)
    if changed:
        raise UserError(
            f"{folder / SETTINGS}: {min(changed)} differs; a run resumes with its own settings"
        )
    _check_split(folder / SPLIT, slices, split)


def examined(folder: Path) -> list[str]:
    """Return the names of the files in which a run's folder keeps what `examine` found."""
    return [name for name in (POINTING, STRANGE) if (folder / name).is_file()]


def read_split(folder: Path, slices: SliceSet) -> Split:
    """Return the split the run was trained with, as indices into `slices`."""
    path = folder / SPLIT
    stored = read_json(path)
    index = {number: i for i, number in enumerate(slices.numbers)}
    try:
        train, test, calibration = (
            torch.tensor([index[number] for number in side], dtype=torch.int64)
            for side in (stored["train"], stored["test"], stored.get("calibration", []))
        )
        split = Split(train, test, stored["name"], stored["description"], calibration)
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path}: does not belong to these slices") from None
    _check_split(path, slices, split)
    return split


def _check_split(path: Path, slices: SliceSet, split: Split) -> None:
    """Raise a UserError if a run was made with other images, slices or another split."""
    stored, given = read_json(path), _describe_split(slices, split)
    for key in (CLASSES, IMAGES):
        if key not in stored:  # of a version that did not keep it
            del given[key]
    if "description" in stored:  # another version may have put the same split in other words
        given["description"] = stored["description"]
    if stored == given:
        return
    if {**stored, IMAGES: slices.digest} == given:
        raise UserError(
            f"{path}: the run was made with other images under the same numbers: their SHA-256 is "
            f"{slices.digest[:16]}..., not {str(stored[IMAGES])[:16]}..."
        )
    raise UserError(f"{path}: the run was made with other slices or another split")


def read_precision(folder: Path) -> torch.dtype:
    """Return the data type of the arithmetic that a run was trained in."""
    path = folder / ENVIRONMENT
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    try:
        return names[read_json(path)["precision"]]
    except (KeyError, TypeError):
        raise UserError(f"{path}: no precision in it, expected {' or '.join(names)}") from None


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the data type of the network's arithmetic for a value of `precision`."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


def describe_environment(device: torch.device, precision: torch.dtype) -> dict[str, str | int]:
    """Return what a result depends on besides settings and slices."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": _commit(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "precision": str(precision).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": version("scikit-learn"),
    }


def _commit() -> str:
    """Return the commit of this program, marked "-dirty" with changes, or "unknown"."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _describe_split(slices: SliceSet, split: Split) -> dict[str, Any]:
    sides = {"train": split.train.tolist(), "test": split.test.tolist()}
    if len(split.calibration):
        sides["calibration"] = split.calibration.tolist()
    # Phantoms and archive share their numbers; label and patient tell the two apart.
    lines = [
        f"{side} {slices.numbers[i]} {slices.classes[slices.labels[i]]} {slices.patients[i]}\n"
        for side, indices in sides.items()
        for i in indices
    ]
    return {
        "name": split.name,
        "description": split.description,
        "synthetic": slices.synthetic,
        CLASSES: list(slices.classes),
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
        IMAGES: slices.digest,
        **{side: [slices.numbers[i] for i in indices] for side, indices in sides.items()},
    }

"""The settings of a run: what they are, which values they take, and how presets and flags set them.

A preset is a TOML file with one table per class below; a run folder keeps its own copy in the same
form, so the file that says how a run was made can make it again.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from .errors import UserError
from .files import readable

PRESETS_FOLDER = Path(__file__).parent / "presets"
PRESETS = ("quick", "standard", "paper")
LOSSES = (
    *("sphereface", "softmax", "modified-softmax", "triplet"),  # the paper's
    *("cosface", "arcface", "subcenter-arcface"),
)


def _field(default: bool | float | str, limits: tuple[Any, ...] | None, text: str) -> Any:  # noqa: ANN401
    """Return a field; its limits are the least and the most of a number, or a text's choices."""
    return dataclasses.field(default=default, metadata={"help": text, "limits": limits})


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which slices are trained on, and at what size."""

    image_size: int = _field(224, (32, 1024), "side of the square images, in pixels")
    crop: str = _field(
        "none", ("none", "head"), "head: cut a square around the head out of each slice"
    )
    split: str = _field(
        "paper",
        ("paper", "paper-swapped", "patient", "patient-swapped", "validation"),
        "paper: 70-30 by slice; patient: no patient on both sides, tested on one fold of five; "
        "-swapped: the sides exchanged; validation: tested on a tenth of the training "
        "side of paper, to choose settings by",
    )
    fold: int = _field(1, (1, 5), "the fold of patients held out by the patient split")
    split_seed: int = _field(0, (0, 2**32 - 1), "seed of the split")
    calibration: float = _field(
        0.0,
        (0.0, 0.5),
        "share of the training side held out to calibrate answers on, to the nearest of 1/2, 1/3, "
        "1/4, ...: of its patients in a split by patient, of its slices in others; 0: none, and "
        "answers are not calibrated",
    )


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """MobileNet v1 and the output network on top of it."""

    width: float = _field(1.0, (0.05, 2.0), "width multiplier of MobileNet v1")
    embedding_size: int = _field(256, (2, 4096), "length of an embedding")
    dropout: float = _field(0.2, (0.0, 0.9), "dropout in the output network")
    input_range: str = _field(
        "imagenet",
        ("imagenet", "unit"),
        "what the network is fed: imagenet is [-1, 1], as its weights expect; unit is [0, 1]",
    )
    weights: str = _field(
        "", None, "safetensors file of ImageNet weights; empty: start from scratch"
    )
    layout: str = _field(
        "slim",
        ("slim", "timm"),
        "whose ImageNet weights MobileNet is built for: TF-slim's or timm's",
    )


@dataclasses.dataclass(frozen=True)
class AugmentationSettings:
    """How training images are varied; the paper gives the kinds but no ranges."""

    rotation_degrees: float = _field(15.0, (0.0, 180.0), "rotate by up to this, either way")
    brightness: float = _field(0.2, (0.0, 0.9), "scale intensities by 1 plus or minus up to this")
    zoom: float = _field(1.25, (1.0, 4.0), "zoom in by up to this factor")
    flip_left_right: bool = _field(True, None, "exchange left and right with probability one half")
    flip_up_down: bool = _field(True, None, "exchange top and bottom with probability one half")


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The loss, and its annealing: lambda = max(minimum, base (1 + gamma t)^-power)."""

    loss: str = _field("sphereface", LOSSES, "what is minimised")
    margin: float = _field(
        5.0,
        (0.0, 16.0),
        "m: a factor of the target angle (sphereface), radians (arcface), a cosine (cosface) or a "
        "squared distance (triplet)",
    )
    scale: float = _field(30.0, (0.1, 1000.0), "s, the scale of the cosines")
    annealing: bool = _field(True, None, "blend the margin in: (lambda cos + psi) / (1 + lambda)")
    annealing_base: float = _field(1000.0, (0.0, 1e9), "lambda at the first step")
    annealing_gamma: float = _field(0.12, (0.0, 1e6), "how fast lambda falls with the step t")
    annealing_power: float = _field(1.0, (0.0, 100.0), "exponent of the fall of lambda")
    annealing_minimum: float = _field(5.0, (0.0, 1e9), "where lambda stops falling")
    label_smoothing: float = _field(0.0, (0.0, 0.9), "share of a label spread over all classes")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """The optimiser's loop."""

    epochs: int = _field(275, (1, 100_000), "passes over the training slices")
    batch_size: int = _field(32, (2, 65_536), "slices in a step")
    optimiser: str = _field(
        "adam", ("adam", "adamw"), "adam: as in the paper; adamw: decays weights"
    )
    learning_rate: float = _field(1e-4, (1e-9, 10.0), "the optimiser's learning rate at the start")
    backbone_rate: float = _field(1.0, (0.0, 1.0), "MobileNet's share of the learning rate")
    weight_decay: float = _field(0.0, (0.0, 1.0), "AdamW's; adam has none")
    schedule: str = _field(
        "paper",
        ("paper", "cosine"),
        "paper: a tenth after 125 of 275 epochs, a hundredth after 175, the same shares of fewer; "
        "cosine: to zero at the last step",
    )
    ema: float = _field(
        0.0,
        (0.0, 0.99999),
        "decay of an exponential moving average of the weights, which then answers; 0: none",
    )
    precision: str = _field(
        "auto",
        ("auto", "float32", "bfloat16"),
        "of the network's arithmetic; auto: bfloat16 where the hardware multiplies it natively",
    )
    compile: bool = _field(
        False, None, "compile the network with torch.compile: slow to start, meant for a GPU"
    )
    seed: int = _field(0, (0, 2**32 - 1), "seed of initialisation, order, augmentation and dropout")


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How a trained network answers."""

    views: int = _field(
        1,
        (1, 3),
        "average a slice's embedding over this many views: the slice; its left-right mirror image; "
        "the slice upside down",
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything a run depends on besides the slices."""

    data: DataSettings = DataSettings()
    network: NetworkSettings = NetworkSettings()
    augmentation: AugmentationSettings = AugmentationSettings()
    loss: LossSettings = LossSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()


def setting_fields() -> Iterator[tuple[str, dataclasses.Field]]:
    """Yield the table's name and the field, for each setting; field names are unique."""
    for table in dataclasses.fields(Settings):
        for field in dataclasses.fields(table.type):
            yield table.name, field


def load_settings(preset: str, overrides: Mapping[str, object] | None = None) -> Settings:
    """Read a preset by name and let `overrides`, keyed by field name, replace its values."""
    return override_settings(read_settings(PRESETS_FOLDER / f"{preset}.toml"), overrides or {})


def override_settings(settings: Settings, overrides: Mapping[str, object]) -> Settings:
    """Return `settings` with the fields named in `overrides` replaced, checked like a preset."""
    for table, field in setting_fields():
        if field.name in overrides:
            value = _checked(field, overrides[field.name], "--" + field.name.replace("_", "-"))
            changed = dataclasses.replace(getattr(settings, table), **{field.name: value})
            settings = dataclasses.replace(settings, **{table: changed})
    return settings


def read_settings(path: Path) -> Settings:
    """Read a TOML file of settings; keys it leaves out keep their defaults (the paper's)."""
    with readable(path, "settings"):
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    known = {table.name: table.type for table in dataclasses.fields(Settings)}
    settings = {}
    for name, table in tables.items():
        if name not in known:
            raise UserError(f"{path}: unknown table {name!r}; the tables are {', '.join(known)}")
        if not isinstance(table, dict):
            raise UserError(f"{path}: {name} must be a table, not {table!r}")
        fields = {field.name: field for field in dataclasses.fields(known[name])}
        for key in table:
            if key not in fields:
                raise UserError(f"{path}: unknown key {name}.{key}; there are {', '.join(fields)}")
        values = {key: _checked(fields[key], table[key], f"{path}: {name}.{key}") for key in table}
        settings[name] = known[name](**values)
    return Settings(**settings)


def write_settings(settings: Settings) -> str:
    """Return `settings` as TOML that `read_settings` reads back to an equal value."""
    lines = []
    for name, table in dataclasses.asdict(settings).items():
        lines += ["", f"[{name}]"]
        # JSON's spelling of a bool, a finite number or a string is TOML's too.
        for key, value in table.items():
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines[1:]) + "\n"


def differences(settings: Settings, other: Settings) -> dict[str, tuple[object, object]]:
    """Return both values of each setting that differs, by `table.key`."""
    ours, theirs = dataclasses.asdict(settings), dataclasses.asdict(other)
    return {
        f"{table}.{key}": (value, theirs[table][key])
        for table, values in ours.items()
        for key, value in values.items()
        if value != theirs[table][key]
    }


def _checked(field: dataclasses.Field, value: object, where: str) -> object:
    """Return `value` as the field's type, or raises a UserError that starts with `where`."""
    # bool is a subclass of int, and True is nobody's number of epochs.
    accepted = (int, float) if field.type is float else (field.type,)
    if type(value) not in accepted:
        raise UserError(f"{where}: must be {field.type.__name__}, not {value!r}")
    limits = field.metadata["limits"]
    if limits and field.type is str and value not in limits:
        raise UserError(f"{where}: must be one of {limits}, not {value!r}")
    if limits and field.type is not str and not limits[0] <= value <= limits[1]:  # NaN is not
        raise UserError(f"{where}: must be from {limits[0]} to {limits[1]}, not {value!r}")
    return field.type(value)

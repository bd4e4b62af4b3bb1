"""What a reproduction trains: which runs, in which order, with which settings."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..data.matlab import FOLDS
from ..settings import Settings, load_settings, override_settings

Trainings = Mapping[str, Mapping[str, object]]  # names, and the settings that make each
# What the tables call a training, and the settings that make it. The paper's six losses first;
# triplet's margin is FaceNet's, for the paper gives none.
PAPER_LOSSES: Trainings = {
    "sphereface-m5": {"loss": "sphereface", "margin": 5.0},
    "softmax": {"loss": "softmax"},
    "modified-softmax": {"loss": "modified-softmax"},
    "triplet": {"loss": "triplet", "margin": 0.2},
    "sphereface-m4": {"loss": "sphereface", "margin": 4.0},
    "sphereface-m6": {"loss": "sphereface", "margin": 6.0},
}
PROPOSED = "sphereface-m5"
SWAPPED = f"{PROPOSED}-swapped"  # the seventh training: the same split, its sides exchanged
BEYOND: Trainings = {
    "sphereface-m5-bare": {"loss": "sphereface", "margin": 5.0, "annealing": False},
    "cosface": {"loss": "cosface", "margin": 0.35},
    "cosface-bare": {"loss": "cosface", "margin": 0.35, "annealing": False},
    "arcface": {"loss": "arcface", "margin": 0.5},
    "arcface-bare": {"loss": "arcface", "margin": 0.5, "annealing": False},
    "subcenter-arcface": {"loss": "subcenter-arcface", "margin": 0.5},
    "subcenter-arcface-bare": {"loss": "subcenter-arcface", "margin": 0.5, "annealing": False},
}
# What may help on unknown patients; each differs from the proposed training in this alone.
STRONGER = {"rotation_degrees": 30.0, "brightness": 0.4, "zoom": 1.5}
VARIANTS: Trainings = {
    "whole-margin": {"annealing_minimum": 0.0},
    "stronger-augmentation": STRONGER,
    "no-upside-down": {"flip_up_down": False},
}
# What the recipe of `standard` was chosen from, on validation slices alone: by slice on a tenth of
# the paper split's training side, by patient on fold 5. Each differs from the recipe in this alone,
# and all are shorter and smaller, or the search would take longer than what it is for.
SEARCH_PACE = {"image_size": 112, "epochs": 8, "annealing_gamma": 0.85, "ema": 0.983}
SEARCH: Trainings = {
    "as-chosen": {},
    "whole-slice": {"crop": "none"},
    "dropout-0.5": {"dropout": 0.5},
    "label-smoothing-0.1": {"label_smoothing": 0.1},
    "backbone-rate-0.1": {"backbone_rate": 0.1},
    "weight-decay-0.1": {"weight_decay": 0.1},
    "learning-rate-1e-3": {"learning_rate": 1e-3},
    "adam": {"optimiser": "adam", "weight_decay": 0.0},
    "milder-augmentation": {"rotation_degrees": 8.0, "brightness": 0.1, "zoom": 1.1},
    "margin-4": {"margin": 4.0},
    "scale-45": {"scale": 45.0},
    "128-pixels": {"image_size": 128},  # to 112 pixels as 256 to 224
    "144-pixels": {"image_size": 144},  # as 288
}
DEVELOPMENT_FOLD = 5  # of patients: settings were chosen on it, so its figure is marked


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is spent on a reproduction, and on what."""

    name: str  # what the command line calls it
    preset: str  # the settings of each training
    changes: Mapping[str, object]  # settings in place of the preset's
    seeds: int  # of the proposed training by slice; each seed draws its own split
    swapped_seeds: int  # of the same with the sides exchanged, 30-70
    other_seeds: int  # of the other losses by slice
    folds: int  # on which folds of patients what goes beyond the paper is tried
    larger_size: int  # the size of the variant with larger images
    lengths: tuple[float, ...]  # multiples of the epochs for the curve of accuracy against length
    # also train by the paper's own recipe, as many epochs as the others, and all that the
    # settings were chosen from
    comparisons: bool = False

    def settings(self, weights: Path | None) -> Settings:
        """Return what all trainings start from, with ImageNet weights or from scratch."""
        from ..network.mobilenet import weights_layout  # torch takes seconds, --help needs none

        layout = weights_layout(weights) if weights else "slim"
        own = {"weights": str(weights or ""), "layout": layout}
        # Calibrated on what other seeds and folds hold out, so that all can be trained on.
        return load_settings(self.preset, {"calibration": 0.0, **self.changes, **own})


# SphereFace's own pace of annealing, gamma = 0.12, has lambda at its minimum after 1658 steps. A
# training that is over by then would hardly have had a margin, so shorter ones need a faster pace:
# about half of their steps.
QUICKLY = {
    **{"image_size": 128, "epochs": 4, "learning_rate": 1e-3, "schedule": "cosine"},
    "annealing_gamma": 1.5,
}
BUDGETS = {
    "standard": Budget("standard", "standard", {}, 5, 3, 3, 1, 288, (0.5,), comparisons=True),
    "small": Budget("small", "paper", QUICKLY, 5, 5, 2, 1, 192, (0.5, 2.0, 4.0)),
    "paper": Budget("paper", "paper", {}, 5, 5, 5, FOLDS, 320, (0.05, 0.1, 0.25, 0.5)),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A training of the plan."""

    name: str  # of its folder
    # "slice", "patient", "beyond-slice", "beyond-patient", "variant", "length",
    # "paper-slice", "paper-patient", "search-slice" or "search-patient"
    group: str
    training: str  # what the tables call it
    settings: Settings  # its settings


def plan_runs(budget: Budget, weights: Path | None) -> list[Run]:
    """Return the runs of a reproduction, those first that say most."""
    base, every, tried = budget.settings(weights), range(1, FOLDS + 1), range(1, budget.folds + 1)
    others = dict(PAPER_LOSSES)
    proposed = {PROPOSED: others.pop(PROPOSED)}
    swapped, swapped_patients = (
        {SWAPPED: {**PAPER_LOSSES[PROPOSED], "split": f"{split}-swapped"}}
        for split in ("paper", "patient")
    )
    larger = {f"{budget.larger_size}-pixels": {"image_size": budget.larger_size}}
    return [
        *_by_slice("slice", proposed, base, range(budget.seeds)),
        *_by_patient("patient", proposed, base, every),
        *_by_slice("slice", others, base, [0]),
        *_by_slice("slice", swapped, base, range(budget.swapped_seeds)),
        *(_papers_own(base, tried) if budget.comparisons else ()),
        *_by_patient("patient", {**others, **swapped_patients}, base, every),
        *_by_slice("slice", others, base, range(1, budget.other_seeds)),
        *_by_slice("beyond-slice", BEYOND, base, [0]),
        *_by_patient("beyond-patient", BEYOND, base, tried),
        *_by_patient("variant", {**VARIANTS, **larger}, base, tried),
        *_by_slice("length", dict(_length(base, share) for share in budget.lengths), base, [0]),
        *(_search(base) if budget.comparisons else ()),
    ]


def _papers_own(base: Settings, folds: Iterable[int]) -> Iterator[Run]:
    """The paper's own recipe, its learning rate's steps at the same shares of fewer epochs."""
    own = load_settings("paper", {"epochs": base.training.epochs, "annealing": False})
    own = dataclasses.replace(own, network=base.network)
    yield from _by_slice("paper-slice", {"papers-own": {}}, own, [0])
    yield from _by_patient("paper-patient", {"papers-own": {}}, own, folds)


def _length(base: Settings, share: float) -> tuple[str, Mapping[str, object]]:
    """A training of another length: its name, and the settings that make it."""
    epochs = max(1, round(share * base.training.epochs))
    # The paper's pace of annealing belongs to 275 epochs; a shorter run needs its own.
    gamma = base.loss.annealing_gamma * base.training.epochs / epochs
    return f"{epochs}-epochs", {"epochs": epochs, "schedule": "cosine", "annealing_gamma": gamma}


def _search(base: Settings) -> Iterator[Run]:
    for training, changes in SEARCH.items():
        trained = {f"search-{training}": {**SEARCH_PACE, **changes}}
        validated = override_settings(base, {"split": "validation"})
        yield from _by_slice("search-slice", trained, validated, [0])
        yield from _by_patient("search-patient", trained, base, [DEVELOPMENT_FOLD])


def _by_slice(
    group: str, trainings: Trainings, base: Settings, seeds: Iterable[int]
) -> Iterator[Run]:
    for seed in seeds:
        for training, changes in trainings.items():
            settings = override_settings(base, {"seed": seed, "split_seed": seed, **changes})
            yield Run(f"slice-{training}-seed{seed}", group, training, settings)


def _by_patient(
    group: str, trainings: Trainings, base: Settings, folds: Iterable[int]
) -> Iterator[Run]:
    for training, changes in trainings.items():
        for fold in folds:
            settings = override_settings(base, {"split": "patient", "fold": fold, **changes})
            yield Run(f"patient-{training}-fold{fold}", group, training, settings)

"""What a reproduction trains: which runs, in which order, with which settings."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from .matlab import FOLDS
from .mobilenet import weights_layout
from .settings import Settings, load_settings, override_settings

# What the tables call a training, and the settings that make it. The paper's six losses first;
# triplet's margin is FaceNet's, for the paper gives none.
PAPER_LOSSES: Mapping[str, Mapping[str, object]] = {
    "sphereface-m5": {"loss": "sphereface", "margin": 5.0},
    "softmax": {"loss": "softmax"},
    "modified-softmax": {"loss": "modified-softmax"},
    "triplet": {"loss": "triplet", "margin": 0.2},
    "sphereface-m4": {"loss": "sphereface", "margin": 4.0},
    "sphereface-m6": {"loss": "sphereface", "margin": 6.0},
}
PROPOSED = "sphereface-m5"
SWAPPED = f"{PROPOSED}-swapped"  # the seventh training: the same split, its sides exchanged
BEYOND: Mapping[str, Mapping[str, object]] = {
    "sphereface-m5-bare": {"loss": "sphereface", "margin": 5.0, "annealing": False},
    "cosface": {"loss": "cosface", "margin": 0.35},
    "cosface-bare": {"loss": "cosface", "margin": 0.35, "annealing": False},
    "arcface": {"loss": "arcface", "margin": 0.5},
    "arcface-bare": {"loss": "arcface", "margin": 0.5, "annealing": False},
    "subcenter-arcface": {"loss": "subcenter-arcface", "margin": 0.5},
    "subcenter-arcface-bare": {
        "loss": "subcenter-arcface",
        "margin": 0.5,
        "annealing": False,
    },
}
# What may help on unknown patients; each differs from the proposed training in this alone.
STRONGER = {"rotation_degrees": 30.0, "brightness": 0.4, "zoom": 1.5}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "whole-margin": {"annealing_minimum": 0.0},
    "stronger-augmentation": STRONGER,
    "no-upside-down": {"flip_up_down": False},
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much is spent on a reproduction.

    Attributes:
        name: What the command line calls it.
        image_size: Side of the images in pixels.
        epochs: Of each training.
        learning_rate: At the start.
        schedule: Of the learning rate.
        annealing_gamma: How fast the margin comes in: 0.12 is SphereFace's own, at which lambda is
            at its minimum after 1658 steps. A training that is over by then would hardly have
            had a margin, so a short one needs a faster pace: about half of its steps.
        seeds: Of the proposed training by slice, 70-30 and 30-70; each seed draws its own split.
        other_seeds: Of the other losses by slice.
        folds: On which folds of patients what goes beyond the paper is tried.
        larger_size: The size of the variant with larger images.
        lengths: Multiples of `epochs` for the curve of accuracy against length.
    """

    name: str
    image_size: int
    epochs: int
    learning_rate: float
    schedule: str
    annealing_gamma: float
    seeds: int
    other_seeds: int
    folds: int
    larger_size: int
    lengths: tuple[float, ...]


BUDGETS = {
    "small": Budget("small", 128, 4, 1e-3, "cosine", 1.5, 5, 2, 1, 192, (0.5, 2.0, 4.0)),
    "paper": Budget(
        "paper", 224, 275, 1e-4, "paper", 0.12, 5, 5, FOLDS, 320, (0.05, 0.1, 0.25, 0.5)
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A training of the plan.

    Attributes:
        name: Of its folder.
        group: "slice", "patient", "beyond-slice", "beyond-patient", "variant" or "length".
        training: What the tables call it.
        settings: Its settings.
    """

    name: str
    group: str
    training: str
    settings: Settings


def plan_runs(budget: Budget, weights: Path | None) -> list[Run]:
    """Return the runs of a reproduction, those the paper's tables need first.

    Args:
        budget: How much is spent.
        weights: ImageNet weights, or None to train from scratch.
    """
    base = load_settings(
        "paper",
        {
            "image_size": budget.image_size,
            "epochs": budget.epochs,
            "learning_rate": budget.learning_rate,
            "schedule": budget.schedule,
            "annealing_gamma": budget.annealing_gamma,
            "weights": str(weights or ""),
            "layout": weights_layout(weights) if weights else "slim",
        },
    )
    by_slice, by_patient = _by_slice_as_in_the_paper(budget, base), _by_patient_too(base)
    return [*by_slice, *by_patient, *_beyond_the_paper(budget, base), *_lengths(budget, base)]


def _by_slice_as_in_the_paper(budget: Budget, base: Settings) -> Iterator[Run]:
    for seed in range(max(budget.seeds, budget.other_seeds)):
        for training, changes in PAPER_LOSSES.items():
            if seed < (budget.seeds if training == PROPOSED else budget.other_seeds):
                yield _by_slice("slice", training, base, changes, seed)
        if seed < budget.seeds:
            swapped = {**PAPER_LOSSES[PROPOSED], "split": "paper-swapped"}
            yield _by_slice("slice", SWAPPED, base, swapped, seed)


def _by_patient_too(base: Settings) -> Iterator[Run]:
    for fold in range(1, FOLDS + 1):
        for training, changes in PAPER_LOSSES.items():
            yield _by_patient("patient", training, base, changes, fold)
        swapped = {**PAPER_LOSSES[PROPOSED], "split": "patient-swapped"}
        yield _by_patient("patient", SWAPPED, base, swapped, fold)


def _beyond_the_paper(budget: Budget, base: Settings) -> Iterator[Run]:
    larger = {f"{budget.larger_size}-pixels": {"image_size": budget.larger_size}}
    for training, changes in BEYOND.items():
        yield _by_slice("beyond-slice", training, base, changes, seed=0)
    for group, trainings in ("beyond-patient", BEYOND), ("variant", {**VARIANTS, **larger}):
        for training, changes in trainings.items():
            for fold in range(1, budget.folds + 1):
                yield _by_patient(group, training, base, changes, fold)


def _lengths(budget: Budget, base: Settings) -> Iterator[Run]:
    for length in budget.lengths:
        epochs = max(1, round(length * budget.epochs))
        # The paper's steps of the learning rate belong to 275 epochs; a shorter run needs its own.
        pace = {"annealing_gamma": budget.annealing_gamma * budget.epochs / epochs}
        changes = {"epochs": epochs, "schedule": "cosine", **pace}
        yield _by_slice("length", f"{epochs}-epochs", base, changes, seed=0)


def _by_slice(
    group: str, training: str, base: Settings, changes: Mapping[str, object], seed: int
) -> Run:
    settings = override_settings(base, {"seed": seed, "split_seed": seed, **changes})
    return Run(f"slice-{training}-seed{seed}", group, training, settings)


def _by_patient(
    group: str, training: str, base: Settings, changes: Mapping[str, object], fold: int
) -> Run:
    settings = override_settings(base, {"split": "patient", "fold": fold, **changes})
    return Run(f"patient-{training}-fold{fold}", group, training, settings)

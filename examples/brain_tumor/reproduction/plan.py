"""What a reproduction trains: which runs, in which order, with which settings."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..data.matlab import FOLDS
from ..settings import Settings, load_settings, override_settings, tomllib

Trainings = Mapping[str, Mapping[str, object]]  # names, and the settings that make each
_PLAN = tomllib.loads((Path(__file__).parent / "plan.toml").read_text(encoding="utf-8"))
PAPER_LOSSES, BEYOND, VARIANTS, SEARCH = (
    _PLAN[name] for name in ("paper_losses", "beyond", "variants", "search")
)
SEARCH_PACE, TITLES = _PLAN["search_pace"], _PLAN["titles"]
PROPOSED = "sphereface-m5"
SWAPPED = f"{PROPOSED}-swapped"  # the seventh training: the same split, its sides exchanged
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

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Budget":
        """Return what TOML or JSON keeps of a budget, where a tuple is a list."""
        return cls(**{**stored, "lengths": tuple(stored["lengths"])})

    def settings(self, weights: Path | None) -> Settings:
        """Return what all trainings start from, with ImageNet weights or from scratch."""
        from ..network.mobilenet import weights_layout  # torch takes seconds, --help needs none

        layout = weights_layout(weights) if weights else "slim"
        own = {"weights": str(weights or ""), "layout": layout}
        # Calibrated on what other seeds and folds hold out, so that all can be trained on.
        return load_settings(self.preset, {"calibration": 0.0, **self.changes, **own})


BUDGETS = {name: Budget.of({"name": name, **own}) for name, own in _PLAN["budgets"].items()}


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

"""Reading back a reproduction's finished runs, and what several of them say together.

A reproduction's folder holds all that its report is made of:

    reproduction.json   budget, data and weights (with their sums), versions
    slices.csv          number, class, patient and fold of every slice
    samples.npz         the slices of figure 1
    sessions.jsonl      when it ran, on what, what failed: a line at the start, one at the end
    speed.json          how fast a training step is
    runs/NAME/          a run's folder, see run_folder.py
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..data.slices import CLASS_NAMES
from ..evaluation.calibration import calibrated, fit_exponent
from ..evaluation.classifiers import nearest_rows
from ..evaluation.evaluate import Predictions, read_predictions
from ..evaluation.metrics import Metrics, reliability
from ..files import column, read_array, read_json, read_rows, read_table, readable
from ..settings import read_settings
from ..training import run_folder
from .plan import PROPOSED, Budget, Run, plan_runs

REPRODUCTION = "reproduction.json"
SLICES = "slices.csv"
SAMPLES = "samples.npz"
SESSIONS = "sessions.jsonl"
SPEED = "speed.json"
RUNS = "runs"
FIGURES = "figures"
SHOWN_NEIGHBOURS = 5  # of a wrong slice


@dataclasses.dataclass(frozen=True)
class SliceTable:
    """What is known of every slice, in the order of the runs' embeddings."""

    numbers: np.ndarray  # (n,) ascending
    labels: np.ndarray  # (n,)
    patients: np.ndarray  # (n,) their ids

    @property
    def patients_unknown(self) -> bool:
        """Whether runs of neighbouring slices stand in for patients."""
        return any(one.startswith("fold") and "-run" in one for one in self.patients)

    def sides(self, split: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of a split file's training and test slices."""
        stored = read_json(split)
        train, test = (np.searchsorted(self.numbers, stored[side]) for side in ("train", "test"))
        return train, test


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run of a plan."""

    run: Run  # as it was trained
    folder: Path  # where it lies

    @cached_property
    def predictions(self) -> Predictions:
        """The answers of 1-NN."""
        return read_predictions(self.folder / run_folder.PREDICTIONS)

    @cached_property
    def metrics(self) -> Metrics:
        """What the answers are worth."""
        return self.predictions.metrics

    def by_views(self, views: int) -> Predictions | None:
        """Return the answers with so many views of each slice; a merged run may lack them."""
        if views == self.run.settings.evaluation.views:
            return self.predictions
        path = self.folder / run_folder.VIEW_PREDICTIONS.format(views)
        return read_predictions(path) if path.is_file() else None

    @property
    def has_embeddings(self) -> bool:
        """Whether its embeddings are there; a merged run may lack them."""
        return (self.folder / run_folder.EMBEDDINGS).is_file()

    def embeddings(self) -> np.ndarray:
        """Return the L2-normalised embeddings (n, d) of all slices, those on neither side 0."""
        return read_array(self.folder / run_folder.EMBEDDINGS).astype(np.float32)

    def keeps(self, name: str) -> bool:
        """Return whether a file made from the embeddings is there, and not older than they are."""
        made, embeddings = self.folder / name, self.folder / run_folder.EMBEDDINGS
        return made.is_file() and made.stat().st_mtime >= embeddings.stat().st_mtime

    def neighbours(self, slices: SliceTable) -> dict[int, list[int]]:
        """Return the nearest training slices of each wrong slice by number, the nearest first.

        There are five, but one of a merged run that was collected without them.
        """
        path, wrong = self.folder / run_folder.NEIGHBOURS, ~self.predictions.right
        if path.is_file():
            found: dict[int, list[int]] = {}
            with readable(path, "a table of neighbours"):
                for row in read_table(path):
                    found.setdefault(int(row["slice"]), []).append(int(row["training_slice"]))
            return found
        nearest = self.predictions.nearest[wrong, None]
        if self.has_embeddings:
            embeddings = self.embeddings()
            train, test = slices.sides(self.folder / run_folder.SPLIT)
            rows = nearest_rows(embeddings[train], embeddings[test[wrong]], SHOWN_NEIGHBOURS)
            nearest = slices.numbers[train[rows]]
        return dict(zip(self.predictions.numbers[wrong].tolist(), nearest.tolist(), strict=True))

    @property
    def hours(self) -> float:
        """How long the training took."""
        return sum(row["seconds"] for row in read_rows(self.folder / run_folder.EPOCHS)) / 3600


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """All that a reproduction's folder holds."""

    folder: Path  # where it lies
    description: dict[str, Any]  # what it was made from: budget, data, weights
    results: Sequence[Result]  # of the runs that are finished, in the plan's order
    missing: Sequence[str]  # names of those that are not

    @property
    def budget(self) -> Budget:
        """How much was to be spent."""
        return Budget.of(self.description["budget"])

    @property
    def synthetic(self) -> bool:
        """Whether the slices are phantoms."""
        return self.description["synthetic"]

    def figure(self, name: str, title: str) -> tuple[Path, str]:
        """Return where a figure goes, and its title, which says if it is of phantoms."""
        return self.folder / FIGURES / f"{name}.png", f"{self.mark}{title}"

    @property
    def mark(self) -> str:
        """What stands before titles and headings."""
        return "SYNTHETIC: " if self.synthetic else ""

    @cached_property
    def slices(self) -> SliceTable:
        """What is known of every slice."""
        return read_slice_table(self.folder)

    @cached_property
    def proposed(self) -> Result | None:
        """The proposed training's run by slice of seed 0, if it is finished."""
        return self.first(PROPOSED)

    def select(self, group: str, training: str) -> list[Result]:
        """Return the finished runs of a group (see `Run`) and a training: its seeds or folds."""
        return [
            result
            for result in self.results
            if result.run.group == group and result.run.training == training
        ]

    def first(self, training: str, group: str = "slice") -> Result | None:
        """Return a training's run of a group of seed 0 or, by patient, of fold 1, if finished."""
        firsts = ("-seed0", "-fold1")
        every = self.select(group, training)
        return next((one for one in every if one.run.name.endswith(firsts)), None)

    def with_embeddings(self, group: str) -> list[Result]:
        """Return the proposed training's finished runs of a group whose embeddings are there."""
        return [one for one in self.select(group, PROPOSED) if one.has_embeddings]


def is_finished(folder: Path, run: Run) -> bool:
    """Return whether a run was trained to its end and evaluated."""
    path = folder / run_folder.METRICS
    return path.is_file() and read_json(path)["epoch"] == run.settings.training.epochs


def read_reproduction(folder: Path) -> Reproduction:
    """Read a reproduction's folder."""
    path = folder / REPRODUCTION
    description = read_json(path)
    with readable(path, "a reproduction of this version"):
        budget = Reproduction(folder, description, [], []).budget
    results, missing = [], []
    for run in plan_runs(budget, None):
        own = folder / RUNS / run.name
        if is_finished(own, run):
            # As it was trained; the plan made here knows nothing of the weights.
            settings = read_settings(own / run_folder.SETTINGS)
            results.append(Result(dataclasses.replace(run, settings=settings), own))
        else:
            missing.append(run.name)
    return Reproduction(folder, description, results, missing)


def read_slice_table(folder: Path) -> SliceTable:
    """Read the slices.csv of a reproduction's folder."""
    path = folder / SLICES
    with readable(path, "the table of slices"):
        rows = read_table(path)
        return SliceTable(
            numbers=column(rows, "slice", int),
            labels=column(rows, "class", CLASS_NAMES.index),
            patients=column(rows, "patient", str),
        )


def pooled(parts: Iterable[Predictions]) -> Predictions:
    """Put the answers for several disjoint test sides together: those of the folds of patients."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Predictions(*map(np.concatenate, columns))


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """How sure a run's answers are, calibrated on what other runs of its kind held out."""

    exponent: float  # see `fit_exponent`
    slices: int  # how many answers of other runs it was fitted on
    confidence: np.ndarray  # (n,) in [0, 1]
    error: float  # the expected calibration error


def calibrate(reproduction: Reproduction, result: Result) -> Calibrated | None:
    """Return how sure a run's answers are; None where no other run of its kind held out slices.

    The others are of other seeds or folds, and the search's run of the same recipe: their test
    slices, but for the run's own, are slices of its training side that networks like its own have
    not seen.
    """
    group, own = result.run.group, result.predictions
    others = [one for one in reproduction.select(group, PROPOSED) if one is not result]
    others += reproduction.select(f"search-{group}", "search-as-chosen")
    scores, truth = [], []
    for other in others:
        held = ~np.isin(other.predictions.numbers, own.numbers)
        scores.append(other.predictions.scores[held])
        truth.append(other.predictions.truth[held])
    count = sum(map(len, truth))
    if not count:
        return None
    exponent = fit_exponent(np.concatenate(scores), np.concatenate(truth))
    confidence = calibrated(own.scores, exponent).max(1)
    error = reliability(confidence, own.right).error
    return Calibrated(exponent, count, confidence, error)

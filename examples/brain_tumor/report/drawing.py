"""Draws a reproduction's figures; what could not be drawn returns nothing, for the template."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.matlab import FOLDS
from ..evaluation.evaluate import Predictions, probabilities
from ..evaluation.metrics import patient_bootstrap, reliability, seed_interval, wilson_interval
from ..files import read_array, read_rows, write_array
from ..reproduction.plan import PAPER_LOSSES, PROPOSED
from ..reproduction.results import SAMPLES, Reproduction, Result, calibrate, pooled
from ..training.run_folder import ANGLES, EPOCHS, SPLIT
from . import paper, tables
from .figures.further import (
    Angles,
    plot_angles,
    plot_budget,
    plot_errors,
    plot_reliability,
    plot_roc,
    plot_slice_and_patient,
)
from .figures.paper import (
    Embedded,
    Score,
    compute_tsne,
    plot_confusions,
    plot_losses,
    plot_samples,
    plot_scores,
    plot_tsne,
)
from .figures.pipeline import plot_pipeline

TSNE = "tsne.npy"


def samples(reproduction: Reproduction) -> bool:
    """Figure 1."""
    path = reproduction.folder / SAMPLES
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            pictures = {tuple(key.split()): stored[key] for key in stored.files}
        plot_samples(*reproduction.figure("figure1", "slices by class and plane"), pictures)
    return path.is_file()


def pipeline(reproduction: Reproduction) -> bool:
    """Figure 2."""
    if reproduction.proposed:
        drawn = reproduction.figure("figure2", "HSADML, as it was run")
        # A run that was merged no longer says where its weights lay.
        pretrained = bool(reproduction.description.get("weights"))
        plot_pipeline(*drawn, reproduction.proposed.run.settings, pretrained)
    return reproduction.proposed is not None


def curves(reproduction: Reproduction) -> bool:
    """Figures 3 and 4."""
    firsts = _firsts(reproduction, tables.TRAININGS)
    if firsts:
        losses = {
            title: [row["loss"] for row in read_rows(first.folder / EPOCHS)]
            for title, first in firsts.items()
        }
        confusions = {title: np.array(one.metrics.confusion) for title, one in firsts.items()}
        plot_losses(*reproduction.figure("figure3", "training loss, seed 0"), losses)
        title = "test slices by slice, seed 0, 1-NN"
        plot_confusions(*reproduction.figure("figure4", title), confusions)
    return bool(firsts)


def _firsts(reproduction: Reproduction, trainings: Iterable[str]) -> dict[str, Result]:
    """Return by title the run of seed 0 of each training that has one."""
    found = {tables.TITLES[name]: reproduction.first(name) for name in trainings}
    return {title: first for title, first in found.items() if first}


def tsne(reproduction: Reproduction, name: str) -> bool:
    """Figure 5 or 6: by loss or by margin."""
    trainings = {"figure5": tables.LOSSES, "figure6": tables.MARGINS}[name]
    panels = {}
    for title, first in _firsts(reproduction, trainings).items():
        if first.has_embeddings:
            if not first.keeps(TSNE):
                _, test = reproduction.slices.sides(first.folder / SPLIT)
                write_array(first.folder / TSNE, compute_tsne(first.embeddings()[test], seed=0))
            points, answers = read_array(first.folder / TSNE), first.predictions
            panels[title] = Embedded(points, answers.truth, ~answers.right)
    if panels:
        plot_tsne(*reproduction.figure(name, "t-SNE, test slices"), panels)
    return bool(panels)


def angles(reproduction: Reproduction) -> bool:
    """The proposed training's embeddings by angle."""
    proposed = reproduction.proposed
    if proposed is None or not proposed.has_embeddings:
        return False
    sides = reproduction.slices.sides(proposed.folder / SPLIT)
    train, test = (_angles(reproduction, proposed, side) for side in sides)
    margin = proposed.run.settings.loss.margin
    title = f"angles to the class centres, {tables.TITLES[PROPOSED]}, seed 0"
    drawn = reproduction.figure("angles", title)
    plot_angles(*drawn, test, train=train, boundary=lambda theta: margin * theta)
    return True


def _angles(reproduction: Reproduction, result: Result, side: np.ndarray) -> Angles:
    angles = read_array(result.folder / ANGLES)[side]
    labels, rows = reproduction.slices.labels[side], np.arange(len(side))
    target = angles[rows, labels]
    angles[rows, labels] = np.inf
    wrong = result.predictions.numbers[~result.predictions.right]
    wrong = np.isin(reproduction.slices.numbers[side], wrong)
    return Angles(target=target, other=angles.min(1), labels=labels, wrong=wrong)


def scores(reproduction: Reproduction, scale: float) -> list[dict[str, Any]]:
    """ROC and reliability of the proposed training: name, file and calibration error of each."""
    folds = reproduction.select("patient", PROPOSED)
    sides = {"slice": ("by slice, seed 0", [reproduction.proposed])}
    if folds:
        sides["patient"] = (_of_folds(folds), folds)
    drawn = []
    for file, (name, results) in sides.items():
        predictions = pooled(one.predictions for one in results)
        title = f"{tables.TITLES[PROPOSED]}, {name}"
        sure = probabilities(predictions.scores, scale)
        plot_roc(*reproduction.figure(f"roc-{file}", title), predictions.truth, sure)
        where = reproduction.figure(f"reliability-{file}", title)
        error = _plot_bins(*where, sure.max(1), predictions.right)
        drawn.append({"file": file, "name": name, "error": error})
        parts = [calibrate(reproduction, one) for one in results]
        if None not in parts:
            sure = np.concatenate([one.confidence for one in parts])
            where = reproduction.figure(f"calibrated-{file}", f"calibrated: {title}")
            drawn[-1]["calibrated"] = {
                "error": _plot_bins(*where, sure, predictions.right),
                "exponents": [one.exponent for one in parts],
                "slices": [one.slices for one in parts],
            }
    return drawn


def _plot_bins(path: Path, title: str, confidence: np.ndarray, right: np.ndarray) -> float:
    """Draw how often answers of each confidence are right; return the calibration error."""
    bins = reliability(confidence, right)
    plot_reliability(path, title, *bins)
    return bins.error


def by_patient(reproduction: Reproduction) -> dict[str, Any]:
    """By slice and by patient, and the kinds of errors; where they lie, if that is known."""
    losses = {}
    for training in PAPER_LOSSES:
        folds, first = reproduction.select("patient", training), reproduction.first(training)
        if folds:
            title = tables.TITLES[training]  # and of how many folds, where some are not run yet
            title += f", {len(folds)} of {FOLDS} folds" if len(folds) < FOLDS else ""
            losses[title] = _ways(first, folds)
    if not losses:
        return {}
    drawn = reproduction.figure("slice-and-patient", "by slice and by patient, 1-NN")
    plot_slice_and_patient(*drawn, losses)
    folds = reproduction.select("patient", PROPOSED)
    if not reproduction.proposed or not folds:
        return {"errors": None}
    together = pooled(one.predictions for one in folds)
    confusions = {
        "by slice, seed 0": np.array(reproduction.proposed.metrics.confusion),
        _of_folds(folds): np.array(together.metrics.confusion),
    }
    title = f"kinds of errors, {tables.TITLES[PROPOSED]}"
    plot_errors(*reproduction.figure("errors", title), confusions)
    return {"errors": _clusters(together)}


def _of_folds(folds: Sequence[Result]) -> str:
    return f"by patient, {len(folds)} of {FOLDS} folds"


def _ways(first: Result | None, folds: Sequence[Result]) -> dict[str, tuple[float, float, float]]:
    """Return accuracies of a training with their intervals, by how it was split and counted."""
    ways = {}
    if first:
        ways["by slice"] = (first.metrics.accuracy, *first.metrics.accuracy_interval)
    together = pooled(one.predictions for one in folds)
    drawn = patient_bootstrap(together.right, together.patients)
    ways["by patient, slices"] = (together.right.mean(), *drawn)
    hits, total = tables.votes(folds)
    ways["by patient, votes"] = (hits / total, *wilson_interval(hits, total))
    return ways


def _clusters(predictions: Predictions) -> dict[str, float]:
    """Return how many slices are wrong, of how many patients, and the worst tenth's share.

    And that share if as many of the slices, drawn at random, were wrong.
    """
    wrong = ~predictions.right
    _, group = np.unique(predictions.patients, return_inverse=True)
    every = group.max() + 1

    def worst(mask: np.ndarray) -> float:
        counts = np.sort(np.bincount(group[mask], minlength=every))
        return 100 * counts[-math.ceil(0.1 * every) :].sum() / max(mask.sum(), 1)

    random = np.random.default_rng(0)
    chance = np.mean([worst(random.permutation(wrong)) for _ in range(200)])
    patients = len(np.unique(group[wrong]))
    return {
        **{"slices": wrong.sum(), "patients": patients, "of": every},
        **{"share": worst(wrong), "chance": chance},
    }


def lengths(reproduction: Reproduction) -> dict[float, Sequence[float]]:
    """Accuracy against the length of training; return the accuracies by epochs."""
    runs: dict[float, list[float]] = {}
    for one in reproduction.results:
        if one.run.group == "length" or (one.run.group, one.run.training) == ("slice", PROPOSED):
            epochs = one.run.settings.training.epochs
            runs.setdefault(epochs, []).append(one.metrics.accuracy)
    own = reproduction.budget.settings(None).training.epochs
    if own not in runs or reproduction.synthetic:
        return {}
    runs = dict(sorted(runs.items()))
    drawn = reproduction.figure("length", "accuracy by slice against the length of training")
    plot_budget(*drawn, runs, own, paper.ACCURACY)
    return runs


def bars(reproduction: Reproduction) -> None:
    """Figure 7."""
    scores = []
    by_slice, folds = (reproduction.select(group, PROPOSED) for group in ("slice", "patient"))
    for name, results in (("by slice, 70-30", by_slice), (_of_folds(folds), folds)):
        if results:
            mean, interval = seed_interval([one.metrics.accuracy for one in results])
            shown = None if np.isnan(interval[0]) else tuple(np.clip(interval, 0, 1))
            scores.append(Score(f"ours, {name}", mean, shown))
    counts = np.array(paper.CONFUSIONS[PROPOSED])
    own = wilson_interval(counts.trace(), counts.sum())
    scores.append(Score("HSADML, by slice, 70-30", paper.ACCURACY, own, "the paper"))
    for cited in paper.CITED:
        label = f"{cited['name']}, {cited['protocol']}"
        scores.append(Score(label, cited["accuracy"], None, "cited", cited["verified"]))
    title = "accuracies on this data set: ours, and as published"
    plot_scores(*reproduction.figure("figure7", title), scores)

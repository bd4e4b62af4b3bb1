"""The sections of the report that the paper has not: by patient, what helps, speed, faults."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.classifiers import nearest_labels
from ..evaluation.evaluate import probabilities
from ..evaluation.metrics import reliability, wilson_interval
from ..reproduction.plan import PAPER_LOSSES, PROPOSED
from ..reproduction.results import Result, metrics_of, pooled
from ..reproduction.running import SPEED
from ..training.run_folder import (
    EPOCHS,
    SPLIT,
    read_json,
    read_rows,
)
from . import paper, tables
from .document import (
    Block,
    Paragraph,
    Table,
)
from .further_figures import (
    plot_budget,
    plot_errors,
    plot_reliability,
    plot_roc,
    plot_slice_and_patient,
)
from .reporting import Report, classifications

# Networks whose embeddings answer together, each on the split of the proposed training.
DRILLS = Path(__file__).parents[1] / "results" / "drills.json"
TOGETHER = {
    "together: m = 4, 5 and 6": (PROPOSED, "sphereface-m4", "sphereface-m6"),
    "together: the paper's six losses": tuple(PAPER_LOSSES),
}


def scores(report: Report) -> list[Block]:
    """ROC and reliability."""
    proposed = report.first(PROPOSED)
    if not proposed:
        return []
    blocks: list[Block] = [report.heading("ROC and calibration")]
    folds = report.reproduction.select("patient", PROPOSED)
    sides = {"by slice, seed 0": ("slice", proposed.predictions)}
    if folds:
        sides["by patient, all folds"] = ("patient", pooled(one.predictions for one in folds))
    scale = proposed.run.settings.loss.scale
    for name, (file, predictions) in sides.items():
        title = f"{report.mark}{tables.TITLES[PROPOSED]}, {name}"
        sure = probabilities(predictions.scores, scale)
        plot_roc(report.figure_path(f"roc-{file}"), predictions.truth, sure, title)
        blocks.append(report.figure(f"roc-{file}", f"ROC, each class against the rest, {name}."))
        bins = reliability(sure.max(1), tables.right(predictions))
        path = report.figure_path(f"reliability-{file}")
        plot_reliability(path, bins.confidence, bins.accuracy, bins.count, bins.error, title)
        text = (
            f"Reliability {name}: the confidence is softmax(s x cosine to the nearest training "
            f"slice of each class), s = {scale:g}, without any calibration; expected calibration "
            f"error {100 * bins.error:.1f} %."
        )
        blocks.append(report.figure(f"reliability-{file}", text))
    return blocks


def patients(report: Report) -> list[Block]:
    """The seven trainings by patient."""
    reproduction = report.reproduction
    names = [name for name in PAPER_LOSSES if reproduction.select("patient", name)]
    if not names:
        return []
    blocks: list[Block] = [
        report.heading("By patient"),
        Paragraph(
            "The same seven trainings with no patient in both training and test set, by the data "
            "set author's five folds."
        ),
    ]
    if any(patient.startswith("fold") and "-run" in patient for patient in report.slices.patients):
        text = (
            "These slices have no patient identifiers: the folds are the author's, but in votes "
            "and bootstraps a patient is approximated by a run of neighbouring slices of one class "
            "and fold. There are more runs than patients, so bootstrap intervals are too narrow."
        )
        blocks.append(Paragraph(text))
    blocks += [tables.patient_table(reproduction), tables.fold_table(reproduction)]
    losses = {tables.TITLES[name]: _ways(report, name) for name in names}
    title = f"{report.mark}by slice and by patient, 1-NN"
    plot_slice_and_patient(report.figure_path("slice-and-patient"), losses, title)
    text = "By slice (Wilson, seed 0), by patient (bootstrap of patients), by vote (Wilson)."
    blocks.append(report.figure("slice-and-patient", text))
    proposed = report.first(PROPOSED)
    folds = reproduction.select("patient", PROPOSED)
    if proposed and folds:
        by_patient = pooled(one.predictions for one in folds)
        confusions = {
            "by slice, seed 0": np.array(proposed.metrics.confusion),
            "by patient, all folds": np.array(metrics_of(by_patient).confusion),
        }
        title = f"{report.mark}kinds of errors, {tables.TITLES[PROPOSED]}"
        plot_errors(report.figure_path("errors"), confusions, title)
        blocks.append(report.figure("errors", "Which errors there are, as shares of all errors."))
        blocks.append(_worst_patients(by_patient))
    return blocks


def _ways(report: Report, training: str) -> dict[str, tuple[float, float, float]]:
    ways = {}
    first = report.first(training)
    if first:
        ways["by slice"] = (first.metrics.accuracy, *first.metrics.accuracy_interval)
    folds = report.reproduction.select("patient", training)
    together = pooled(one.predictions for one in folds)
    accuracy = float(tables.right(together).mean())
    ways["by patient, slices"] = (accuracy, *tables.patient_interval(together))
    hits, total = tables.votes(folds)
    ways["by patient, votes"] = (hits / total, *wilson_interval(hits, total))
    return ways


def _worst_patients(predictions: Any) -> Paragraph:  # noqa: ANN401
    wrong = ~tables.right(predictions)
    patients, counts = np.unique(predictions.patients[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    most = int(np.ceil(0.1 * len(np.unique(predictions.patients))))
    share = counts[order][:most].sum() / max(wrong.sum(), 1)
    return Paragraph(
        f"Errors come in clusters: {wrong.sum()} wrong slices lie with {len(patients)} of "
        f"{len(np.unique(predictions.patients))} patients, and the worst tenth of all patients "
        f"has {100 * share:.0f} % of them. The intervals that draw patients anew allow for that; "
        "Wilson's do not."
    )


def beyond(report: Report) -> list[Block]:
    """Other losses, and what helps."""
    blocks: list[Block] = [
        report.heading("Beyond the paper: other losses, with and without annealing"),
        tables.beyond_table(report.reproduction),
        report.heading("Ablations"),
        tables.variant_table(report.reproduction),
    ]
    folds, seeds = report.with_embeddings("patient"), report.with_embeddings("slice")[:1]
    for group, results, text in (
        ("patient", folds, f"By patient, on {len(folds)} of 5 folds, from networks trained above."),
        ("slice", seeds, "By slice, seed 0, from networks trained above."),
    ):
        if results:
            every = [classifications(report, one) for one in results]
            caption = (
                f"{text} Together: 1-NN on the embeddings of several networks side by side. What "
                "was chosen after seeing these rows would have to be tested on other slices."
            )
            together = {
                name: np.concatenate(own)
                for name, trainings in TOGETHER.items()
                if (own := _together(report, group, results, trainings))
            }
            blocks.append(tables.answer_table(results, every, together, caption))
    return blocks


def _together(
    report: Report, group: str, results: list[Result], trainings: Sequence[str]
) -> list[np.ndarray]:
    """Return, for each result, what several trainings get right together; [] if one lacks."""
    answers = []
    for result in results:
        # The partners on the same split: the name but for the training.
        folders = [
            result.folder.with_name(result.folder.name.replace(PROPOSED, one)) for one in trainings
        ]
        finished = {
            one.folder: one
            for one in report.reproduction.results
            if one.run.group == group and one.has_embeddings
        }
        if not set(folders) <= set(finished):
            return []
        embeddings = np.concatenate([finished[one].embeddings() for one in folders], axis=1)
        train, test = report.slices.sides(result.folder / SPLIT)
        labels = report.slices.labels
        predicted = nearest_labels(embeddings[train], labels[train], embeddings[test])[:, 0]
        answers.append(predicted == labels[test])
    return answers


def length(report: Report) -> list[Block]:
    """Accuracy against the length of training."""
    reproduction = report.reproduction
    runs: dict[float, list[float]] = {}
    for one in [*reproduction.select("slice", PROPOSED), *reproduction.results]:
        if one.run.group == "length" or (one.run.group, one.run.training) == ("slice", PROPOSED):
            runs.setdefault(one.run.settings.training.epochs, []).append(one.metrics.accuracy)
    own = reproduction.budget.settings(None).training.epochs
    runs[own] = [one.metrics.accuracy for one in reproduction.select("slice", PROPOSED)]
    runs = {epochs: values for epochs, values in sorted(runs.items()) if values}
    if own not in runs or reproduction.synthetic:
        return []
    title = "accuracy by slice against the length of training"
    plot_budget(report.figure_path("length"), runs, own, paper.ACCURACY, paper.ACCURACY, title)
    return [
        report.heading("Number of epochs"),
        report.figure(
            "length",
            "Accuracy by slice (70-30) against the epochs of training, otherwise the same; the "
            "budget's own length with all its seeds, the others with seed 0.",
        ),
        Table(
            ["epochs", "accuracy of each seed"],
            [
                [f"{epochs:g}", " ".join(map(tables.percent, values))]
                for epochs, values in runs.items()
            ],
        ),
    ]


def speed(report: Report) -> list[Block]:
    """How fast a step is."""
    path = report.folder / SPEED
    if not path.is_file():
        return []
    speed = read_json(path)
    size, step, floor, batch = (speed[key] for key in ("batch_size", "step", "floor", "batch"))
    results = report.reproduction.results
    seconds = sum(row["seconds"] for one in results for row in read_rows(one.folder / EPOCHS))
    return [
        report.heading("Speed"),
        Paragraph(
            f"On {speed['device']} ({speed['threads']} thread(s), {speed['precision']}, "
            f"{speed['image_size']} pixels, batches of {size}): a training step {size / step:.0f} "
            f"images/s, the network's forward and backward pass alone {size / floor:.0f} images/s, "
            f"a ratio of {step / floor:.3f}; making the batch takes "
            f"{100 * batch / step:.1f} % of a step. Medians of interleaved rounds"
            f"{', process CPU time' if speed['device'] == 'cpu' else ''}. Wall-clock "
            f"time of all trainings in total: {seconds / 3600:.2f} hours."
        ),
    ]


def faults(report: Report) -> list[Block]:
    """What the drills of the tests counted."""
    drills = read_json(DRILLS)
    columns = list(dict.fromkeys(key for counts in drills.values() for key in counts))
    rows = [
        [name, *(str(counts.get(column, "-")) for column in columns)]
        for name, counts in drills.items()
    ]
    return [
        report.heading("Fault injection"),
        Paragraph("Faults injected by `python -m tests.brain_tumor.faults`, and their outcomes."),
        Table(["drill", *columns], rows),
    ]

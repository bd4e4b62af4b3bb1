"""A run's report.md, made from what its folder holds and from nothing else."""

from pathlib import Path
from typing import Any

import numpy as np

from ..data.matlab import ARCHIVE_SIZE
from ..data.slices import CLASS_NAMES
from ..evaluation.calibration import calibrated
from ..evaluation.evaluate import read_predictions
from ..evaluation.metrics import COLUMNS, metrics_row, reliability
from ..files import printable, read_json, read_rows, write_text
from ..settings import read_settings
from ..training import run_folder
from .examination_tables import pointing_table, strange_table
from .figures.further import plot_reliability
from .figures.run import plot_confusion, plot_early, plot_loss
from .page import Table, to_markdown
from .paper import BY_TRAINING

REPORT = "report.md"
# Table 1 of the paper, by the split it belongs to.
PAPER_ROWS = {
    "paper": ("70-30", "sphereface-m5"),
    "paper-swapped": ("30-70", "sphereface-m5-swapped"),
}
EARLY_STEPS = (1, 10, 50, 100, 200, 500)


def write_report(run: Path) -> Path:
    """Draw an evaluated run's figures, write its report and return the report's path."""
    split, metrics = read_json(run / run_folder.SPLIT), read_json(run / run_folder.METRICS)
    epochs, steps = read_rows(run / run_folder.EPOCHS), read_rows(run / run_folder.STEPS)
    mark = "SYNTHETIC: " if split["synthetic"] else ""
    name = printable(run.absolute().name)
    plot_loss(run / "loss.png", f"{mark}training of {name}", epochs)
    title = f"{mark}test slices of {name}"
    plot_confusion(run / "confusion.png", title, metrics["confusion"], classes_of(split))
    plot_early(run / "early.png", f"{mark}first steps of {name}", {name: steps})
    text = to_markdown(
        "run.md.j2",
        mark=mark,
        run=name,
        result=describe_result(run),
        split=split,
        early=_early_table(steps),
        calibration=_plot_calibration(run, f"{mark}calibrated, {name}"),
        examination=describe_examination(run),
        environment=_environment(run, epochs),
        settings=(run / run_folder.SETTINGS).read_text(encoding="utf-8").strip(),
    )
    write_text(run / REPORT, text)
    return run / REPORT


def describe_result(run: Path) -> str:
    """Return an evaluated run's accuracy in a sentence and its metrics as a table."""
    split, metrics = read_json(run / run_folder.SPLIT), read_json(run / run_folder.METRICS)
    settings = read_settings(run / run_folder.SETTINGS)
    ours, columns = metrics_row(metrics), COLUMNS
    if (classes := classes_of(split)) != CLASS_NAMES:
        recalls, f1 = ([f"{kind} {name}" for name in classes] for kind in ("recall", "F1"))
        columns = (*recalls, "accuracy", *f1, "macro", "micro", "MCC")
    rows = [["this run", *ours]]
    proposed = (settings.loss.loss, settings.loss.margin) == ("sphereface", 5.0)
    whole = len(split["train"]) + len(split["test"]) == ARCHIVE_SIZE and not split["synthetic"]
    if proposed and whole and settings.data.split in PAPER_ROWS:
        name, training = PAPER_ROWS[settings.data.split]
        rows.append([f"the paper, Table 1, {name}", *BY_TRAINING[training]])
    low, high = (100 * bound for bound in metrics["accuracy_interval"])
    sentence = (
        f"{'SYNTHETIC slices, not patients. ' if split['synthetic'] else ''}"
        f"1-NN on {len(split['test'])} held-out slices after {metrics['epoch']} of "
        f"{settings.training.epochs} epochs: accuracy {ours[columns.index('accuracy')]} % "
        f"(Wilson 95 % interval {low:.1f} to {high:.1f})."
    )
    best = np.sort(read_predictions(run / run_folder.PREDICTIONS).scores, axis=1)
    if ties := int((best[:, -1] == best[:, -2]).sum()):
        sentence += f" {ties} of them are as near to another class; the first training slice wins."
    return f"{sentence}\n\n{Table(['', *columns], rows)}"


def classes_of(split: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of a run's classes; an older run's are the archive's."""
    return tuple(split.get(run_folder.CLASSES, CLASS_NAMES))


def _plot_calibration(run: Path, title: str) -> dict[str, Any] | None:
    """Draw how often answers of each confidence are right; return how the calibration does."""
    found = read_json(run / run_folder.METRICS).get("calibration")
    if found is not None:
        predictions = read_predictions(run / run_folder.PREDICTIONS)
        sure = calibrated(predictions.scores, found["exponent"]).max(1)
        plot_reliability(run / "reliability.png", title, *reliability(sure, predictions.right))
    return found


def describe_examination(run: Path) -> str:
    """Return what `examine` found of a run, as tables; nothing if it never was examined."""
    tables = []
    if (run / run_folder.STRANGE).is_file():
        tables.append(strange_table(read_json(run / run_folder.STRANGE)))
    if (run / run_folder.POINTING).is_file():
        tables.append(pointing_table({"this run": [run / run_folder.POINTING]}))
    return "\n\n".join(map(str, tables))


def _early_table(steps: list[dict[str, Any]]) -> Table:
    rows = []
    for step in EARLY_STEPS:
        if step <= len(steps):
            row = steps[step - 1]
            angle = _unless_none(row["mean_target_angle"], ".3f")
            norm, annealing = f"{row['gradient_norm']:.3g}", _unless_none(row["lambda"], ".1f")
            rows.append([step, f"{row['loss']:.3f}", angle, norm, annealing])
    return Table(["step", "loss", "mean target angle", "gradient norm", "lambda"], rows)


def _unless_none(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _environment(run: Path, epochs: list[dict[str, Any]]) -> Table:
    seconds = sum(row["seconds"] for row in epochs)
    speed = sum(row["images_per_second"] * row["seconds"] for row in epochs) / seconds
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    trained = f"{time}, {len(epochs)} epochs, {speed:.0f} images/s"
    facts = {"trained for": trained, **read_json(run / run_folder.ENVIRONMENT)}
    return Table(["", ""], facts.items())

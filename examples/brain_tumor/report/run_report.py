"""A run's report.md, made from what its folder holds and from nothing else."""

from pathlib import Path
from typing import Any

from ..evaluation.metrics import COLUMNS, metrics_row
from ..settings import read_settings
from ..training.run_folder import (
    ENVIRONMENT,
    EPOCHS,
    METRICS,
    SETTINGS,
    SPLIT,
    STEPS,
    read_json,
    read_rows,
    write_text,
)
from .document import markdown_table
from .figures import plot_confusion, plot_early, plot_loss
from .paper import BY_TRAINING

REPORT = "report.md"
# Table 1 of the paper, by the split it belongs to.
PAPER_ROWS = {
    "paper": ("70-30", "sphereface-m5"),
    "paper-swapped": ("30-70", "sphereface-m5-swapped"),
}
ARCHIVE_SIZE = 3064  # the paper's rows stand beside results on the whole archive only
EARLY_STEPS = (1, 10, 50, 100, 200, 500)


def write_report(run: Path) -> Path:
    """Draw an evaluated run's figures and write its report.

    Args:
        run: The run's folder.

    Returns:
        The report's path.
    """
    split, metrics = read_json(run / SPLIT), read_json(run / METRICS)
    epochs, steps = read_rows(run / EPOCHS), read_rows(run / STEPS)
    mark = "SYNTHETIC: " if split["synthetic"] else ""
    plot_loss(run / "loss.png", epochs, f"{mark}training of {run.name}")
    plot_confusion(run / "confusion.png", metrics["confusion"], f"{mark}test slices of {run.name}")
    plot_early(run / "early.png", {run.name: steps}, f"{mark}first steps of {run.name}")
    sections = [
        f"# {mark}HSADML, run {run.name}",
        "Not a medical device: for research and teaching, never for diagnosis.",
        f"## {mark}Result",
        describe_result(run),
        "Recall (the paper's accuracy per class) and accuracy in percent. Like the paper's, the "
        "numbers are cut off after the last digit, not rounded.",
        "![confusion matrix](confusion.png)",
        f"## {mark}The split",
        f"{split['description']} {len(split['train'])} slices trained on, {len(split['test'])} "
        f"tested. SHA-256 of the split: `{split['sha256']}`.",
        f"## {mark}Training",
        "![loss and training accuracy](loss.png)",
        "The first steps: mean angle between embeddings and their class centres (radians; chance "
        "is 1.57), gradient norm of the network, and lambda where the margin is annealed.",
        _early_table(steps),
        "![target angle and gradient norm of the first steps](early.png)",
        "## Limits",
        _limits(split["synthetic"]),
        "## What was run",
        _environment(run, epochs),
        f"```toml\n{(run / SETTINGS).read_text(encoding='utf-8').strip()}\n```",
    ]
    write_text(run / REPORT, "\n\n".join(sections) + "\n")
    return run / REPORT


def describe_result(run: Path) -> str:
    """Return an evaluated run's accuracy in a sentence and its metrics as a table."""
    split, metrics = read_json(run / SPLIT), read_json(run / METRICS)
    settings = read_settings(run / SETTINGS)
    low, high = (100 * bound for bound in metrics["accuracy_interval"])
    ours = metrics_row(metrics)
    rows = [["this run", *ours]]
    count = len(split["train"]) + len(split["test"])
    comparable = settings.loss.loss == "sphereface" and count == ARCHIVE_SIZE
    if comparable and not split["synthetic"] and settings.data.split in PAPER_ROWS:
        name, training = PAPER_ROWS[settings.data.split]
        rows.append([f"the paper, Table 1, {name}", *BY_TRAINING[training]])
    sentence = (
        f"{'SYNTHETIC slices, not patients. ' if split['synthetic'] else ''}"
        f"1-NN on {len(split['test'])} held-out slices after {metrics['epoch']} of "
        f"{settings.training.epochs} epochs: accuracy {ours[COLUMNS.index('accuracy')]} % "
        f"(Wilson 95 % interval {low:.1f} to {high:.1f})."
    )
    return f"{sentence}\n\n{markdown_table(['', *COLUMNS], rows)}"


def _early_table(steps: list[dict[str, Any]]) -> str:
    rows = []
    for step in (step for step in EARLY_STEPS if step <= len(steps)):
        row = steps[step - 1]
        annealing = "none" if row["lambda"] is None else f"{row['lambda']:.1f}"
        angle = row["mean_target_angle"]
        angle, norm = "none" if angle is None else f"{angle:.3f}", f"{row['gradient_norm']:.3g}"
        rows.append([str(step), f"{row['loss']:.3f}", angle, norm, annealing])
    return markdown_table(["step", "loss", "mean target angle", "gradient norm", "lambda"], rows)


def _limits(synthetic: bool) -> str:
    limits = [
        "One seed of one split. Differences of a few slices are not significant: compare "
        "intervals, several seeds and folds before ranking anything.",
        "The interval assumes independent slices. Slices of one patient are correlated, so the "
        "true uncertainty is larger.",
        "With a split by slice, the accuracy is that on new slices of the same patients. On new "
        "patients it is lower: see the split by patient.",
    ]
    if synthetic:
        limits.insert(
            0,
            "The slices are phantoms, drawn by a program from one averaged brain. They test "
            "that the method runs and learns; they say nothing about real tumours.",
        )
    return "\n".join(f"- {limit}" for limit in limits)


def _environment(run: Path, epochs: list[dict[str, Any]]) -> str:
    seconds = sum(row["seconds"] for row in epochs)
    speed = sum(row["images_per_second"] * row["seconds"] for row in epochs) / seconds
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    facts = {
        "trained for": f"{time}, {len(epochs)} epochs, {speed:.0f} images/s",
        **{name: str(value) for name, value in read_json(run / ENVIRONMENT).items()},
    }
    return markdown_table(["", ""], [[name, value] for name, value in facts.items()])

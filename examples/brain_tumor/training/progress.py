"""The record of a training: its logs, its line on the terminal, and when it is saved."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from angular_losses import target_angle

from ..errors import UserError
from ..files import append_rows, keep_rows
from .checkpoint import TrainingState
from .run_folder import CHECKPOINT, EPOCHS, STEPS

LOGGED_STEPS = 500  # enough to show how the angles settle, with and without annealing
BAR_INTERVAL = 20  # steps; reading a number waits for the device, so it is done rarely
SAVING_SHARE = 0.1  # of the time at most goes into checkpoints: an epoch may take half a second
MEASURES = ("loss", "accuracy", "mean_target_angle", "gradient_norm", "lambda")


def beside_centres(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share that the class centres classify, without a margin, and the mean angle."""
    if loss.weight is None:
        return embeddings.new_tensor(math.nan), embeddings.new_tensor(math.nan)
    accuracy = (loss.get_logits(embeddings).argmax(1) == labels).float().mean()
    sub_centers = getattr(loss, "sub_centers", 1)
    return accuracy, target_angle(embeddings, loss.weight, labels, sub_centers=sub_centers).mean()


def restore(state: TrainingState, out: Path, steps_per_epoch: int) -> None:
    """Go back to the last checkpoint, with logs that end where it was written."""
    if (out / CHECKPOINT).exists():  # else the first epoch was interrupted: start it again
        state.restore(out)
    keep_rows(out / EPOCHS, state.epoch)
    keep_rows(out / STEPS, min(state.epoch * steps_per_epoch, LOGGED_STEPS))


class Saver:
    """Saves after the first epoch, after the last, and between them as SAVING_SHARE allows."""

    def __init__(self, state: TrainingState, out: Path) -> None:
        self.state = state
        self.out = out
        self.due = -math.inf

    def __call__(self, last: bool) -> None:
        """Save, if it is the last epoch or a save is due."""
        started = time.monotonic()
        if last or started >= self.due:
            self.state.save(self.out)
            ended = time.monotonic()
            self.due = ended + (ended - started) / SAVING_SHARE


def finish_epoch(
    state: TrainingState, steps: Tensor, out: Path, seconds: float, images_per_second: float
) -> dict[str, Any]:
    """Log the epoch and return the log's line."""
    measured = [MEASURES.index(name) for name in ("loss", "gradient_norm")]
    if not steps[:, measured].isfinite().all():  # the others are NaN where a loss has none
        raise UserError(
            f"{out}: the loss diverged in epoch {state.epoch + 1}; "
            "use a lower --learning-rate or turn on --annealing"
        )
    summary = {
        "epoch": state.epoch + 1,
        **_named(torch.cat([steps[:, :-1].mean(0), steps[-1, -1:]])),
        "learning_rate": state.optimiser.param_groups[-1]["lr"],
        "seconds": round(seconds, 3),
        "images_per_second": round(images_per_second, 1),
    }
    logged = min(state.epoch * len(steps), LOGGED_STEPS)
    state.epoch += 1
    # The logs come first: resuming drops a line too many, but could not invent one.
    append_rows(out / STEPS, [_named(step) for step in steps[: LOGGED_STEPS - logged]])
    append_rows(out / EPOCHS, [summary])
    return summary


def _named(measures: Tensor) -> dict[str, float | None]:
    values = (None if math.isnan(value) else value for value in measures.tolist())
    return dict(zip(MEASURES, values, strict=True))


def show_step(bar: tqdm, steps: Sequence[Tensor], epoch: int, epochs: int) -> None:
    """Move the terminal's bar by a step; of an epoch's steps till now, show the last ones' loss."""
    bar.update()
    if len(steps) % BAR_INTERVAL == 1 and not bar.disable:
        loss = torch.stack(steps[-BAR_INTERVAL:]).mean(0)[0].item()
        bar.set_description(f"epoch {epoch}/{epochs}")
        bar.set_postfix(loss=f"{loss:.3f}")


def progress_line(summary: dict[str, Any], epochs: int) -> str:
    """Return what the terminal shows of an epoch."""
    left = (epochs - summary["epoch"]) * summary["seconds"]
    accuracy = "" if summary["accuracy"] is None else f"  accuracy {summary['accuracy']:.3f}"
    return (
        f"epoch {summary['epoch']}/{epochs}  loss {summary['loss']:.3f}{accuracy}  "
        f"{summary['images_per_second']:.0f} images/s  "
        f"about {left / 60:.1f} min left"
    )

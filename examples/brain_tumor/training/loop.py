"""The training loop: the network and the loss's class centres, a checkpoint an epoch.

A checkpoint holds all that changes, random states included, so a resumed run ends where an
uninterrupted one does (bit for bit on a CPU, with as many threads).
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from angular_losses import target_angle

from ..data.slices import SliceSet, Split, paper_split, patient_split, validation_split
from ..errors import UserError
from ..settings import DataSettings, Settings, TrainingSettings
from .augment import augment
from .checkpoint import TrainingState
from .run_folder import (
    CHECKPOINT,
    ENVIRONMENT,
    EPOCHS,
    STEPS,
    append_rows,
    check_resumable,
    describe_environment,
    keep_rows,
    locked,
    start_run,
    write_json,
)

PAPER_EPOCHS = 275  # to which the paper's steps of the learning rate belong
LOGGED_STEPS = 500  # enough to show how the angles settle, with and without annealing
BAR_INTERVAL = 20  # steps; reading a number waits for the device, so it is done rarely
SAVING_SHARE = 0.1  # of the time at most goes into checkpoints: an epoch may take half a second
MEASURES = ("loss", "accuracy", "mean_target_angle", "gradient_norm", "lambda")


def train(
    settings: Settings, slices: SliceSet, split: Split, out: Path, resume: bool = False
) -> None:
    """Train on one side of a split and leave the run in a folder.

    Args:
        settings: What to train and how.
        slices: Images and labels.
        split: The two sides; only its training side is looked at.
        out: The run's folder, new unless `resume`.
        resume: Continue the run in `out`, which must have the same settings and split.

    Raises:
        UserError: The folder holds another run, a file does not fit, or the loss diverged.
    """
    with locked(out):
        _train(settings, slices, split, out, resume)


def _train(settings: Settings, slices: SliceSet, split: Split, out: Path, resume: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(settings.training.precision, device)
    images, labels = slices.images[split.train].to(device), slices.labels[split.train].to(device)
    batches = batch_bounds(len(labels), settings.training.batch_size)
    state = TrainingState.start(settings, device)
    if resume:
        check_resumable(out, settings, slices, split)
        _restore(state, out, len(batches))
    else:
        start_run(out, settings, slices, split)
    write_json(out / ENVIRONMENT, describe_environment(device, precision))

    if settings.training.compile:
        state.network.compile()
    epochs = settings.training.epochs
    save = _Saver(state, out)
    with tqdm(
        total=epochs * len(batches),
        initial=state.epoch * len(batches),
        unit="step",
        disable=not sys.stderr.isatty(),
    ) as bar:
        while state.epoch < epochs:
            started = time.perf_counter()
            shuffled = _shuffled(images, labels, batches)
            steps = _train_epoch(state, settings, shuffled, len(batches), precision, bar)
            seconds = time.perf_counter() - started
            summary = _finish_epoch(state, steps, out, seconds, batches[-1][1] / seconds)
            save(last=state.epoch == epochs)
            if bar.disable:
                print(_progress_line(summary, epochs), file=sys.stderr, flush=True)


def make_split(settings: DataSettings, slices: SliceSet) -> Split:
    """Return the split that the settings ask for."""
    if settings.split == "validation":
        return validation_split(slices, settings.split_seed)
    name, _, swapped = settings.split.partition("-")
    if name == "patient":
        return patient_split(slices, settings.fold, settings.split_seed, swap=bool(swapped))
    return paper_split(slices, settings.split_seed, swap=bool(swapped))


def learning_rate(settings: TrainingSettings, epoch: float) -> float:
    """Return the learning rate `epoch` passes into the training, which may lie within one."""
    if settings.schedule == "cosine":
        return settings.learning_rate * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
    epoch = epoch * PAPER_EPOCHS / settings.epochs
    return settings.learning_rate * (1.0 if epoch < 125 else 0.1 if epoch < 175 else 0.01)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the data type of the network's arithmetic for a value of `precision`."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if native else torch.float32


def batch_bounds(count: int, batch_size: int) -> list[tuple[int, int]]:
    """Return where each batch starts and stops; BatchNorm cannot learn from a batch of one."""
    bounds = [(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    bounds = [(start, stop) for start, stop in bounds if stop - start > 1]
    if not bounds:
        raise UserError(f"split: {count} training slices are too few to train on")
    return bounds


def _restore(state: TrainingState, out: Path, steps_per_epoch: int) -> None:
    if (out / CHECKPOINT).exists():  # else the first epoch was interrupted: start it again
        state.restore(out)
    keep_rows(out / EPOCHS, state.epoch)
    keep_rows(out / STEPS, min(state.epoch * steps_per_epoch, LOGGED_STEPS))


class _Saver:
    """Saves after the first epoch, after the last, and between them as SAVING_SHARE allows."""

    def __init__(self, state: TrainingState, out: Path) -> None:
        self.state = state
        self.out = out
        self.due = -math.inf

    def __call__(self, last: bool) -> None:
        started = time.monotonic()
        if last or started >= self.due:
            self.state.save(self.out)
            ended = time.monotonic()
            self.due = ended + (ended - started) / SAVING_SHARE


def _shuffled(
    images: Tensor, labels: Tensor, batches: list[tuple[int, int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch, in a new order."""
    order = torch.randperm(len(labels)).to(labels.device)
    for start, stop in batches:
        chosen = order[start:stop]
        yield images[chosen].float(), labels[chosen]


def _train_epoch(
    state: TrainingState,
    settings: Settings,
    batches: Iterator[tuple[Tensor, Tensor]],
    count: int,
    precision: torch.dtype,
    bar: tqdm,
) -> Tensor:
    """Return the MEASURES of each of the epoch's `count` steps, (count, 5)."""
    state.network.train()
    state.loss.train()
    steps = []
    for step, (images, labels) in enumerate(batches):
        state.set_learning_rate(learning_rate(settings.training, state.epoch + step / count))
        images = augment(images, settings.augmentation, state.generator)
        steps.append(take_step(state, images, labels, precision))
        bar.update()
        if step % BAR_INTERVAL == 0 and not bar.disable:
            loss = torch.stack(steps[-BAR_INTERVAL:]).mean(0)[0].item()
            bar.set_description(f"epoch {state.epoch + 1}/{settings.training.epochs}")
            bar.set_postfix(loss=f"{loss:.3f}")
    return torch.stack(steps).cpu()


def take_step(
    state: TrainingState, images: Tensor, labels: Tensor, precision: torch.dtype
) -> Tensor:
    """Take one step and return its MEASURES, (5,), still on the device."""
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        embeddings = state.network(images)
    embeddings = embeddings.float()
    schedule = state.loss.schedule
    annealing = embeddings.new_tensor(math.nan) if schedule is None else schedule.value()
    loss = state.loss(embeddings, labels)
    state.optimiser.zero_grad()
    loss.backward()
    with torch.no_grad():
        accuracy, angle = _beside_centres(state.loss, embeddings, labels)
    norm = torch.nn.utils.get_total_norm([p.grad for p in state.network.parameters()])
    state.optimiser.step()
    if state.average is not None:
        state.average.update_parameters(state.network)
    return torch.stack([x.detach().double() for x in (loss, accuracy, angle, norm, annealing)])


def _beside_centres(loss: nn.Module, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share that the class centres classify, without a margin, and the mean angle."""
    if loss.weight is None:
        return embeddings.new_tensor(math.nan), embeddings.new_tensor(math.nan)
    accuracy = (loss.get_logits(embeddings).argmax(1) == labels).float().mean()
    sub_centers = getattr(loss, "sub_centers", 1)
    return accuracy, target_angle(embeddings, loss.weight, labels, sub_centers=sub_centers).mean()


def _finish_epoch(
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


def _progress_line(summary: dict[str, Any], epochs: int) -> str:
    left = (epochs - summary["epoch"]) * summary["seconds"]
    accuracy = "" if summary["accuracy"] is None else f"  accuracy {summary['accuracy']:.3f}"
    return (
        f"epoch {summary['epoch']}/{epochs}  loss {summary['loss']:.3f}{accuracy}  "
        f"{summary['images_per_second']:.0f} images/s  "
        f"about {left / 60:.1f} min left"
    )

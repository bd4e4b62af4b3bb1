"""How to train a network with an angular-margin loss: what it takes, and the loop.

The loss has parameters of its own, the class centres: they go to the optimiser with the network's,
and into the checkpoint. The network may compute in bfloat16, the loss always in float32. Everything
else of a training is in the files beside this one; a resumed run ends where an uninterrupted one
does (bit for bit on a CPU, with as many threads).
"""

import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..data.slices import CLASS_NAMES, SliceSet
from ..data.splits import Split
from ..errors import UserError
from ..files import locked, printable, write_json
from ..network.mobilenet import EmbeddingNetwork, load_imagenet_weights
from ..network.objectives import make_loss
from ..settings import Settings, TrainingSettings
from . import run_folder
from .batches import augment, batch_bounds
from .checkpoint import TrainingState
from .progress import Saver, beside_centres, finish_epoch, progress_line, restore, show_step

PAPER_EPOCHS = 275  # to which the paper's steps of the learning rate belong


def train(
    settings: Settings, slices: SliceSet, split: Split, out: Path, resume: bool = False
) -> None:
    """Train on one side of a split and leave the run in a folder, or go on with the run in it.

    Raises:
        UserError: The folder holds another run, a file does not fit, or the loss diverged.
    """
    with locked(out):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = run_folder.choose_precision(settings.training.precision, device)
        images = slices.images[split.train].to(device)
        labels = slices.labels[split.train].to(device)
        batches = batch_bounds(len(labels), settings.training.batch_size)
        begun = resume and (out / run_folder.CHECKPOINT).is_file()
        state = start(settings, device, len(slices.classes), pretrained=not begun)
        if resume:
            run_folder.check_resumable(out, settings, slices, split)
            restore(state, out, len(batches))
        else:
            run_folder.start_run(out, settings, slices, split)
        counts = slices.labels.bincount(minlength=len(slices.classes)).tolist()
        found = ", ".join(map("{} {}".format, slices.classes, counts))
        print(printable(f"{out}: of {sum(counts)} slices: {found}"), flush=True)
        epochs, save = settings.training.epochs, Saver(state, out)
        if state.epoch < epochs:  # else it says what the last epoch was trained on
            environment = run_folder.describe_environment(device, precision)
            write_json(out / run_folder.ENVIRONMENT, environment)

        if settings.training.compile:
            state.network.compile()
        done, steps_in_all = state.epoch * len(batches), epochs * len(batches)
        hidden = not sys.stderr.isatty()
        with tqdm(total=steps_in_all, initial=done, unit="step", disable=hidden) as bar:
            while state.epoch < epochs:
                started = time.perf_counter()
                steps = _train_epoch(state, settings, images, labels, batches, precision, bar)
                seconds = time.perf_counter() - started
                summary = finish_epoch(state, steps, out, seconds, batches[-1][1] / seconds)
                save(last=state.epoch == epochs)
                if hidden:
                    print(progress_line(summary, epochs), file=sys.stderr, flush=True)


def start(
    settings: Settings,
    device: torch.device,
    num_classes: int = len(CLASS_NAMES),
    pretrained: bool = True,
) -> TrainingState:
    """Return the state before the first step: network, loss and optimiser.

    ImageNet weights are left out unless `pretrained`: those of a checkpoint will replace them.
    """
    training = settings.training
    torch.manual_seed(training.seed)
    network = EmbeddingNetwork(settings.network)
    if settings.network.weights and pretrained:
        load_imagenet_weights(network.backbone, Path(settings.network.weights))
    network = network.to(device, memory_format=torch.channels_last)
    loss = make_loss(settings.loss, settings.network.embedding_size, num_classes).to(device)
    groups = [
        {"params": list(network.backbone.parameters())},
        # The class centres are the loss's own parameters: left out, they would never move.
        {"params": [*network.output.parameters(), *loss.parameters()]},
    ]
    optimiser: torch.optim.Optimizer
    if training.optimiser == "adamw":
        optimiser = torch.optim.AdamW(groups, weight_decay=training.weight_decay, fused=True)
    elif training.weight_decay:
        raise UserError("--weight-decay: the paper's Adam has none; set --optimiser adamw")
    else:
        optimiser = torch.optim.Adam(groups, fused=True)
    average = None
    if training.ema:
        blend = get_ema_multi_avg_fn(training.ema)
        average = AveragedModel(network, multi_avg_fn=blend, use_buffers=True)
    generator = torch.Generator().manual_seed(training.seed)
    return TrainingState(network, loss, optimiser, training.backbone_rate, average, generator)


def learning_rate(settings: TrainingSettings, epoch: float) -> float:
    """Return the learning rate `epoch` passes into the training, which may lie within one."""
    if settings.schedule == "cosine":
        return settings.learning_rate * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
    epoch = epoch * PAPER_EPOCHS / settings.epochs
    return settings.learning_rate * (1.0 if epoch < 125 else 0.1 if epoch < 175 else 0.01)


def _train_epoch(
    state: TrainingState,
    settings: Settings,
    images: Tensor,
    labels: Tensor,
    batches: list[tuple[int, int]],
    precision: torch.dtype,
    bar: tqdm,
) -> Tensor:
    """Return the MEASURES of each of the epoch's steps, (steps, 5)."""
    state.network.train()
    state.loss.train()
    order, steps = torch.randperm(len(labels)).to(labels.device), []
    for step, (first, end) in enumerate(batches):
        chosen, epoch = order[first:end], state.epoch + step / len(batches)
        state.set_learning_rate(learning_rate(settings.training, epoch))
        augmented = augment(images[chosen].float(), settings.augmentation, state.generator)
        steps.append(take_step(state, augmented, labels[chosen], precision))
        show_step(bar, steps, state.epoch + 1, settings.training.epochs)
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
        accuracy, angle = beside_centres(state.loss, embeddings, labels)
    norm = torch.nn.utils.get_total_norm([p.grad for p in state.network.parameters()])
    state.optimiser.step()
    if state.average is not None:
        state.average.update_parameters(state.network)
    return torch.stack([x.detach().double() for x in (loss, accuracy, angle, norm, annealing)])

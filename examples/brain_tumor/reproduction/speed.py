"""How fast a training step is beside the network's own forward and backward pass.

Three things are timed in turn, so that whatever else the machine does falls on all of them: the
whole step, the network's forward and backward pass alone (the floor), and the making of a batch
alone (picking the slices and augmenting them). On a CPU the process's own time counts.
"""

import statistics
import time

import torch

from ..data.slices import SliceSet
from ..settings import Settings
from ..training.batches import augment
from ..training.loop import start, take_step
from ..training.run_folder import choose_precision

ROUNDS = 15
WARM_UP = 3


def measure_speed(settings: Settings, slices: SliceSet) -> dict[str, str | int | float]:
    """Measure the training that the settings describe, without leaving a trace of it.

    Return the medians in seconds: of a whole `step` (batch, network, loss, optimiser, measures),
    of the `floor` and of making a `batch`; and what they were measured with.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(settings.training.precision, device)
    random = torch.get_rng_state()
    state = start(settings, device)
    images, labels = slices.images.to(device), slices.labels.to(device)
    size = min(settings.training.batch_size, len(labels))
    still = images[:size].float()

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.randint(len(labels), (size,), generator=state.generator).to(device)
        augmented = augment(images[chosen].float(), settings.augmentation, state.generator)
        return augmented, labels[chosen]

    def floor() -> None:
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            embeddings = state.network(still)
        state.optimiser.zero_grad()
        embeddings.float().square().mean().backward()

    parts = {
        "step": lambda: take_step(state, *batch(), precision),
        "floor": floor,
        "batch": batch,
    }
    taken: dict[str, list[float]] = {name: [] for name in parts}
    state.network.train()
    state.loss.train()
    for name in [*parts] * (WARM_UP + ROUNDS):
        started = _now(device)
        parts[name]()
        taken[name].append(_now(device) - started)
    torch.set_rng_state(random)
    return {
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "precision": str(precision).removeprefix("torch."),
        "image_size": settings.data.image_size,
        "batch_size": size,
        **{name: statistics.median(seconds[WARM_UP:]) for name, seconds in taken.items()},
    }


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        # Of all threads, so on two cores a second of the clock may count twice; the ratios hold.
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()

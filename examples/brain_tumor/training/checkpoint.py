"""What changes while training, how it starts, and how it is written to disk and read back."""

import dataclasses
import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..data.slices import CLASS_NAMES
from ..errors import UserError, one_line
from ..files import replacing
from ..network.mobilenet import EmbeddingNetwork
from ..network.objectives import make_loss
from ..settings import NetworkSettings, Settings
from .run_folder import CHECKPOINT


@dataclasses.dataclass
class TrainingState:
    """All that changes while training, which is all that a checkpoint holds."""

    network: EmbeddingNetwork  # the embedding network
    loss: nn.Module  # the loss, with its class centres and its annealing, if it has them
    # Adam or AdamW on the parameters of both: first MobileNet's, then the others
    optimiser: torch.optim.Optimizer
    backbone_rate: float  # mobileNet's share of the learning rate
    # the moving average of the network, BatchNorm's statistics included, or None
    average: AveragedModel | None
    generator: torch.Generator  # on the CPU, for augmentation; order and dropout use torch's own
    epoch: int = 0  # how many are done

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the next step."""
        backbone, others = self.optimiser.param_groups
        backbone["lr"], others["lr"] = self.backbone_rate * rate, rate

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.network.parameters()).device

    def save(self, folder: Path) -> None:
        """Write the checkpoint, or leave the last one as it was."""
        device = self.device
        contents = {
            "epoch": self.epoch,
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "loss": self.loss.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }
        with replacing(folder / CHECKPOINT) as temporary:
            # torch's own writer does not say that a disk is full, only that something went wrong.
            buffer = io.BytesIO()
            torch.save(contents, buffer)
            temporary.write_bytes(buffer.getbuffer())

    def restore(self, folder: Path) -> None:
        """Go back to the last checkpoint."""
        with _read(folder, "this run") as contents:
            self.network.load_state_dict(contents["network"])
            if self.average is not None:
                self.average.load_state_dict(contents["average"])
            self.loss.load_state_dict(contents["loss"])
            self.optimiser.load_state_dict(contents["optimiser"])
            for parameter, moments in self.optimiser.state.items():
                if moments["exp_avg"].shape != parameter.shape:  # torch itself does not look
                    raise ValueError("the optimiser's state has the shapes of another network")
            self.generator.set_state(contents["generator"])
            torch.set_rng_state(contents["random"])
            device = self.device
            if device.type == "cuda" and contents["device_random"] is not None:
                torch.cuda.set_rng_state(contents["device_random"], device)
            self.epoch = contents["epoch"]


def load_network(
    folder: Path, settings: NetworkSettings, averaged: bool = True
) -> tuple[EmbeddingNetwork, int]:
    """Return a run's network, in eval mode, and how many epochs it was trained for.

    Where there is a moving average of the weights they are those, if `averaged`.
    """
    network = EmbeddingNetwork(settings)
    with _read(folder, "the network") as contents:
        average = contents.get("average") if averaged else None
        if average is None:
            network.load_state_dict(contents["network"])
        else:
            holder = AveragedModel(network)
            holder.load_state_dict(average)
            network = holder.module
    return network.eval(), contents["epoch"]


def load_loss(folder: Path, settings: Settings, num_classes: int = len(CLASS_NAMES)) -> nn.Module:
    """Return a run's loss, with the class centres it was trained to."""
    loss = make_loss(settings.loss, settings.network.embedding_size, num_classes)
    with _read(folder, "the loss") as contents:
        loss.load_state_dict(contents["loss"])
    return loss.eval()


@contextmanager
def _read(folder: Path, target: str) -> Iterator[dict[str, Any]]:
    """Yield a run's checkpoint; that it does not fit its target becomes a UserError."""
    path = folder / CHECKPOINT
    contents = read_checkpoint(path)
    try:
        yield contents
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path}: does not fit {target}: {one_line(error)}") from None


def epochs_done(folder: Path) -> int:
    """Return how many epochs a run has finished."""
    path = folder / CHECKPOINT
    return read_checkpoint(path)["epoch"] if path.exists() else 0


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running anything that it might contain."""
    if not path.is_file():
        raise UserError(f"{path}: no checkpoint: the first epoch was never finished")
    try:
        with zipfile.ZipFile(path) as archive:  # torch would unpack any bomb before it looks
            if any(member.compress_type for member in archive.infolist()):
                raise ValueError("it is packed, which torch does not do")
            if (damaged := archive.testzip()) is not None:  # torch does not look at the sums
                raise ValueError(f"it is damaged: {damaged} differs from its sum")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as it has bytes
        raise UserError(f"{path}: not readable as a checkpoint: {one_line(error)}") from None
    if not isinstance(contents, dict) or type(contents.get("epoch")) is not int:
        raise UserError(f"{path}: not a checkpoint of this program")
    return contents

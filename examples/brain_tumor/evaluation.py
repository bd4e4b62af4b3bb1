"""From a trained network to answers: embeddings, the nearest neighbour's class, scores, angles."""

import csv
import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from angular_losses import angle_between

from .checkpoint import load_loss, load_network
from .errors import UserError
from .files import replacing
from .metrics import Metrics, compute_metrics, confusion_matrix
from .mobilenet import EmbeddingNetwork
from .objectives import class_centres
from .run_folder import (
    ANGLES,
    EMBEDDINGS,
    METRICS,
    MIRRORED_PREDICTIONS,
    PREDICTIONS,
    SETTINGS,
    read_precision,
    read_split,
    write_json,
    write_text,
)
from .settings import read_settings
from .slices import CLASS_NAMES, SliceSet, Split

EMBEDDING_BATCH = 32  # slices; small enough for the caches, and changes no number


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The answers for the test slices, ascending by number.

    Attributes:
        numbers: (n,) the slices' numbers.
        patients: (n,) the patients' ids.
        truth: (n,) labels.
        predicted: (n,) labels: the class of the nearest training slice.
        scores: (n, C) for each class the cosine to its nearest training slice; the largest wins.
    """

    numbers: np.ndarray
    patients: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    scores: np.ndarray


def evaluate(run: Path, slices: SliceSet) -> Metrics:
    """Classify a run's test slices by their nearest training slice; write the results beside it.

    Twice: as the paper does, and with each embedding averaged over the slice and its mirror image.

    Args:
        run: A run's folder, finished or not.
        slices: The slices it was trained on and held out, at its image size.

    Returns:
        The metrics, which `run` then holds too, with predictions, embeddings and angles.
    """
    settings = read_settings(run / SETTINGS)
    split = read_split(run, slices)
    network, epoch = load_network(run, settings.network)
    precision = read_precision(run)
    plain = embed(network, slices.images, precision)
    mirrored = F.normalize(plain + embed(network, slices.images.flip(3), precision))
    centres = class_centres(
        load_loss(run, settings), plain[split.train], slices.labels[split.train]
    )
    _write_array(run / EMBEDDINGS, plain)
    _write_array(run / ANGLES, class_angles(plain, centres))
    metrics = _classify(run / PREDICTIONS, slices, split, plain)
    averaged = _classify(run / MIRRORED_PREDICTIONS, slices, split, mirrored)
    results = {"epoch": epoch, **dataclasses.asdict(metrics)}
    write_json(run / METRICS, {**results, "mirrored": dataclasses.asdict(averaged)})
    return metrics


def embed(
    network: EmbeddingNetwork, images: Tensor, precision: torch.dtype = torch.float32
) -> Tensor:
    """Return the L2-normalised embeddings (n, d) of images (n, 1, size, size), on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device, memory_format=torch.channels_last).eval()
    low = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    with torch.inference_mode(), low:
        batches = [network(batch.to(device).float()) for batch in images.split(EMBEDDING_BATCH)]
    return F.normalize(torch.cat(batches).float()).cpu()


def class_angles(embeddings: Tensor, centres: list[Tensor]) -> Tensor:
    """Return the angle (n, C) in radians to the nearest of each class's centres.

    Args:
        embeddings: (n, d).
        centres: For each class (k, d).
    """
    angles = [
        torch.stack([angle_between(embeddings, one.expand_as(embeddings)) for one in own]).amin(0)
        for own in centres
    ]
    return torch.stack(angles, dim=1)


def class_scores(train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Return the cosine (n, num_classes) of each embedding to the nearest training one of a class.

    The class of the largest is the answer of 1-NN. A class without training slices scores -1.

    Args:
        train: (k, d) L2-normalised.
        train_labels: (k,).
        test: (n, d) L2-normalised.
        num_classes: C.
    """
    cosine = test @ train.T
    scores = [
        cosine[:, train_labels == label].amax(1)
        if (train_labels == label).any()
        else -torch.ones(len(test))
        for label in range(num_classes)
    ]
    return torch.stack(scores, dim=1)


def probabilities(scores: np.ndarray, scale: float) -> np.ndarray:
    """Return softmax(scale * scores): the classes' scores (n, C) read as logits of cosines."""
    logits = scale * (scores - scores.max(1, keepdims=True))
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def nearest_neighbour(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each test embedding, the index of the nearest in `train`, and the cosine.

    Between unit vectors the largest cosine is the smallest Euclidean distance.
    """
    cosine, nearest = (test @ train.T).max(dim=1)
    return nearest, cosine


def read_predictions(path: Path) -> Predictions:
    """Read back a file of predictions.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        truth, predicted = (
            np.array([CLASS_NAMES.index(row[column]) for row in rows], np.int64)
            for column in ("truth", "predicted")
        )
        scores = [[float(row[f"score_{name}"]) for name in CLASS_NAMES] for row in rows]
        numbers = [int(row["slice"]) for row in rows]
        patients = [row["patient"] for row in rows]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not readable as predictions: {error}") from None
    return Predictions(
        np.array(numbers), np.array(patients), truth, predicted, np.array(scores).reshape(-1, 3)
    )


def _classify(path: Path, slices: SliceSet, split: Split, embeddings: Tensor) -> Metrics:
    """Write the answers for the test slices and return what they are worth."""
    train, test, labels = embeddings[split.train], embeddings[split.test], slices.labels
    nearest, cosine = nearest_neighbour(train, test)
    predicted = labels[split.train][nearest]
    scores = class_scores(train, labels[split.train], test, len(CLASS_NAMES))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    columns = ["slice", "patient", "fold", "truth", "predicted", "nearest_training_slice", "cosine"]
    writer.writerow([*columns, *(f"score_{name}" for name in CLASS_NAMES)])
    for row, index in enumerate(split.test.tolist()):
        writer.writerow(
            [
                slices.numbers[index],
                slices.patients[index],
                "" if slices.folds is None else int(slices.folds[index]),
                CLASS_NAMES[labels[index]],
                CLASS_NAMES[predicted[row]],
                slices.numbers[split.train[nearest[row]]],
                f"{cosine[row]:.6f}",
                *(f"{score:.9g}" for score in scores[row]),
            ]
        )
    write_text(path, table.getvalue())
    return compute_metrics(
        confusion_matrix(labels[split.test].numpy(), predicted.numpy(), len(CLASS_NAMES))
    )


def _write_array(path: Path, values: Tensor) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, values.float().numpy(), allow_pickle=False)

"""From embeddings to numbers: the nearest neighbour's class, and what a confusion matrix says."""

import csv
import dataclasses
import io
import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, matthews_corrcoef, precision_recall_fscore_support
from torch import Tensor

from .checkpoint import load_network
from .files import replacing
from .mobilenet import EmbeddingNetwork
from .run_folder import (
    EMBEDDINGS,
    METRICS,
    PREDICTIONS,
    SETTINGS,
    read_split,
    write_json,
    write_text,
)
from .settings import read_settings
from .slices import CLASS_NAMES, SliceSet, Split

EMBEDDING_BATCH = 32  # slices; small enough for the caches, and changes no number


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a confusion matrix says; the order of the classes is that of CLASS_NAMES.

    Attributes:
        confusion: Counts, rows are the truth and columns the prediction.
        accuracy: The share of slices classified correctly, in [0, 1].
        accuracy_interval: Its Wilson 95 % interval, which takes the slices for independent.
        recall: Per class; what the paper calls a class's accuracy.
        precision: Per class.
        f1: Per class.
        f1_macro: The mean of the classes' F1.
        f1_micro: F1 of the pooled counts, which is the accuracy when every slice has one class.
        mcc: Matthews' correlation for many classes (R_K).
    """

    confusion: list[list[int]]
    accuracy: float
    accuracy_interval: tuple[float, float]
    recall: list[float]
    precision: list[float]
    f1: list[float]
    f1_macro: float
    f1_micro: float
    mcc: float


def evaluate(run: Path, slices: SliceSet) -> Metrics:
    """Classify a run's test slices by their nearest training slice; write the results beside it.

    Args:
        run: A run's folder, finished or not.
        slices: The slices it was trained on and held out, at its image size.

    Returns:
        The metrics, which `run` then holds too, with predictions and embeddings.
    """
    settings = read_settings(run / SETTINGS)
    split = read_split(run, slices)
    network, epoch = load_network(run, settings.network)
    embeddings = embed(network, slices.images)
    labels = slices.labels
    nearest, cosine = nearest_neighbour(embeddings[split.train], embeddings[split.test])
    predicted = labels[split.train][nearest]
    metrics = compute_metrics(confusion_matrix(labels[split.test], predicted, len(CLASS_NAMES)))

    with replacing(run / EMBEDDINGS) as temporary, temporary.open("wb") as file:
        np.save(file, embeddings.numpy(), allow_pickle=False)
    write_text(run / PREDICTIONS, _predictions(slices, split, predicted, nearest, cosine))
    write_json(run / METRICS, {"epoch": epoch, **dataclasses.asdict(metrics)})
    return metrics


def embed(network: EmbeddingNetwork, images: Tensor) -> Tensor:
    """Return the L2-normalised embeddings (n, d) of images (n, 1, size, size), on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device, memory_format=torch.channels_last).eval()
    with torch.inference_mode():
        batches = [network(batch.to(device).float()) for batch in images.split(EMBEDDING_BATCH)]
    return F.normalize(torch.cat(batches).float()).cpu()


def nearest_neighbour(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each test embedding, the index of the nearest in `train`, and the cosine.

    Between unit vectors the largest cosine is the smallest Euclidean distance.
    """
    cosine, nearest = (test @ train.T).max(dim=1)
    return nearest, cosine


def confusion_matrix(truth: Tensor, predicted: Tensor, num_classes: int) -> np.ndarray:
    """Return counts (num_classes, num_classes); rows are the truth."""
    pairs = truth * num_classes + predicted
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, -1).numpy()


def compute_metrics(confusion: np.ndarray) -> Metrics:
    """Return everything that follows from the counts; a ratio without cases counts as 0."""
    truth, predicted = (
        np.repeat(label.ravel(), confusion.ravel()) for label in np.indices(confusion.shape)
    )
    classes = range(len(confusion))
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, labels=classes, zero_division=0
    )
    hits, total = int(confusion.trace()), int(confusion.sum())
    return Metrics(
        confusion=confusion.tolist(),
        accuracy=hits / total,
        accuracy_interval=wilson_interval(hits, total),
        recall=recall.tolist(),
        precision=precision.tolist(),
        f1=f1.tolist(),
        f1_macro=float(f1.mean()),
        f1_micro=float(f1_score(truth, predicted, labels=classes, average="micro")),
        mcc=float(matthews_corrcoef(truth, predicted)),
    )


def wilson_interval(hits: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the score interval of a proportion, which behaves near 0 and 1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = hits / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    reach = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _predictions(
    slices: SliceSet, split: Split, predicted: Tensor, nearest: Tensor, cosine: Tensor
) -> str:
    """Return a CSV table with a row per test slice."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(
        ["slice", "patient", "fold", "truth", "predicted", "nearest_training_slice", "cosine"]
    )
    for row, index in enumerate(split.test.tolist()):
        writer.writerow(
            [
                slices.numbers[index],
                slices.patients[index],
                "" if slices.folds is None else int(slices.folds[index]),
                CLASS_NAMES[slices.labels[index]],
                CLASS_NAMES[predicted[row]],
                slices.numbers[split.train[nearest[row]]],
                f"{cosine[row]:.6f}",
            ]
        )
    return table.getvalue()

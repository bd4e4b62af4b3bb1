"""From a trained network to answers: embeddings, the nearest neighbour's class, scores, angles."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor

from angular_losses import angle_between

from ..data.slices import SliceSet
from ..data.splits import Split
from ..files import (
    as_csv,
    check_sum,
    column,
    locked,
    read_json,
    read_table,
    readable,
    write_array,
    write_json,
    write_sums,
    write_text,
)
from ..network.mobilenet import EmbeddingNetwork
from ..network.objectives import class_centres
from ..settings import Settings, read_settings
from ..training import run_folder
from ..training.checkpoint import load_loss, load_network
from .calibration import BLOCKS, Calibration, calibrated, fit_exponent, fit_familiarity, fit_limit
from .metrics import Metrics, measure, reliability

EVALUATING = ".evaluation.lock"  # apart from a training's, which may go on meanwhile
EMBEDDING_BATCH = 32  # slices; small enough for the caches, and changes no number
VIEWS = ((), (3,), (2,))  # the axes along which a view of (n, 1, size, size) is mirrored


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The answers for the test slices, ascending by number."""

    numbers: np.ndarray  # (n,) the slices' numbers
    patients: np.ndarray  # (n,) the patients' ids
    truth: np.ndarray  # (n,) labels
    predicted: np.ndarray  # (n,) labels: the class of the nearest training slice
    nearest: np.ndarray  # (n,) the number of that slice
    # (n, C) for each class the cosine to its nearest training slice; the largest wins
    scores: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """Which answers (n,) are right."""
        return self.predicted == self.truth

    @property
    def metrics(self) -> Metrics:
        """What the answers are worth, slice by slice."""
        return measure(self.truth, self.predicted, self.scores.shape[1])


def evaluate(run: Path, slices: SliceSet) -> Metrics:
    """Classify a run's test slices by their nearest training slice; write the results beside it.

    The run's own number of views decides; beside it stand the answers of fewer views, of two at
    least and, where the weights were averaged, of the weights as they were. Return the metrics,
    which the run's folder then holds too, with predictions, embeddings and angles. The embeddings
    of slices on neither side are 0. With slices held out to calibrate on it holds the calibration.
    """
    settings = read_settings(run / run_folder.SETTINGS)
    with locked(run, EVALUATING):
        split = run_folder.read_split(run, slices)
        for name in (*run_folder.RECORDS, *run_folder.examined(run)):
            check_sum(run / name)
        write_sums(run, run_folder.FIXED)  # what follows replaces the others' files
        return _evaluate(run, settings, slices, split)


def _evaluate(run: Path, settings: Settings, slices: SliceSet, split: Split) -> Metrics:
    # All at once, for a training that goes on replaces the checkpoint.
    network, epoch = load_network(run, settings.network)
    loss = load_loss(run, settings, len(slices.classes))
    last = load_network(run, settings.network, averaged=False)[0] if settings.training.ema else None
    stored = run / run_folder.METRICS
    if not stored.is_file() or read_json(stored)["epoch"] != epoch:
        for name in run_folder.examined(run):  # what `examine` found of another network
            (run / name).unlink()
    own = settings.evaluation.views
    embeddings = _embed_views(run, network, slices, split, max(own, 2))
    train = embeddings[own][split.train], slices.labels[split.train]
    centres = class_centres(loss, *train, len(slices.classes))
    write_array(run / run_folder.EMBEDDINGS, embeddings[own].float().numpy())
    write_array(run / run_folder.ANGLES, class_angles(embeddings[own], centres).float().numpy())
    answers = {views: _classify(slices, split, rows) for views, rows in embeddings.items()}
    tables = {views: run_folder.VIEW_PREDICTIONS.format(views) for views in answers}
    tables[own] = run_folder.PREDICTIONS
    for views, name in tables.items():
        write_text(run / name, _as_table(answers[views], slices, split))
    metrics = answers[own].metrics
    results = {
        "epoch": epoch,
        **dataclasses.asdict(metrics),
        "accuracy_by_views": {views: one.metrics.accuracy for views, one in answers.items()},
    }
    if last is not None:
        results["accuracy_by_views_without_ema"] = {
            views: _classify(slices, split, rows).metrics.accuracy
            for views, rows in _embed_views(run, last, slices, split, max(own, 2)).items()
        }
    ended = epoch == settings.training.epochs
    kept = [*(run_folder.RECORDS if ended else run_folder.FIXED), *run_folder.examined(run)]
    kept += [run_folder.EMBEDDINGS, run_folder.ANGLES, run_folder.METRICS, *tables.values()]
    if len(split.calibration):
        fitted = _calibrate(network, epoch, slices, split, embeddings[own])
        calibration, results["calibration"] = fitted
        calibration.write(run / run_folder.CALIBRATION)
        kept.append(run_folder.CALIBRATION)
    write_json(stored, results)
    write_sums(run, kept)
    return metrics


def _calibrate(
    network: EmbeddingNetwork, epoch: int, slices: SliceSet, split: Split, embeddings: Tensor
) -> tuple[Calibration, dict[str, float]]:
    """Fit a calibration on the slices held out for it; return how it does on the test slices."""
    train, labels = embeddings[split.train], slices.labels
    held, test = (
        class_scores(train, labels[split.train], embeddings[side], len(slices.classes)).numpy()
        for side in (split.calibration, split.test)
    )
    features, held_features, test_features = (
        early_features(network, slices.images[side]).numpy()
        for side in (split.train, split.calibration, split.test)
    )
    familiarity = fit_familiarity(features)
    calibration = Calibration(
        exponent=fit_exponent(held, labels[split.calibration].numpy()),
        familiarity=familiarity,
        limit=fit_limit(familiarity.distances(held_features)),
        epoch=epoch,
    )
    nearest, _ = nearest_neighbour(train, embeddings[split.test])
    right = (labels[split.train][nearest] == labels[split.test]).numpy()
    return calibration, {
        "exponent": calibration.exponent,
        "slices": len(split.calibration),
        "error": reliability(calibrated(test, calibration.exponent).max(1), right).error,
        "false_alarms": float(calibration.unlike(test_features).mean()),
    }


def embed(
    network: EmbeddingNetwork,
    images: Tensor,
    precision: torch.dtype = torch.float32,
    views: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """Return embeddings (n, d) of images (n, 1, size, size), on the CPU; see `normalised`.

    Without a `device` a GPU computes, if there is one.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(device, memory_format=torch.channels_last).eval()
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        return _in_batches(network, images, device, views)


def early_features(network: EmbeddingNetwork, images: Tensor) -> Tensor:
    """Return MobileNet's features (n, channels) of images (n, 1, size, size) after `BLOCKS` blocks.

    They are averaged over each image and L2-normalised, and computed in float32 on the CPU whatever
    the run's precision, as the exported model computes them: in bfloat16, which rounds more than
    slices differ in some directions, the distances of `Familiarity` are others.
    """
    device = next(network.parameters()).device
    answer = partial(network.to("cpu").eval().pooled, blocks=BLOCKS)
    features = _in_batches(answer, images, torch.device("cpu"), views=1)
    network.to(device)
    return features


@torch.inference_mode()
def _in_batches(
    answer: Callable[[Tensor], Tensor], images: Tensor, device: torch.device, views: int
) -> Tensor:
    batches = images.split(EMBEDDING_BATCH)
    return torch.cat([normalised(answer, one.to(device).float(), views) for one in batches]).cpu()


def normalised(network: Callable[[Tensor], Tensor], images: Tensor, views: int) -> Tensor:
    """Return L2-normalised embeddings (n, d) of images (n, 1, size, size).

    They are averaged over so many `VIEWS`, each L2-normalised before.
    """
    embeddings = [F.normalize(network(images.flip(axes)).float()) for axes in VIEWS[:views]]
    return embeddings[0] if views == 1 else F.normalize(torch.stack(embeddings).sum(0))


def class_angles(embeddings: Tensor, centres: list[Tensor]) -> Tensor:
    """Return the angle (n, C) in radians from embeddings (n, d) to each class's nearest centre."""
    angles = [
        torch.stack([angle_between(embeddings, one.expand_as(embeddings)) for one in own]).amin(0)
        for own in centres
    ]
    return torch.stack(angles, dim=1)


def class_scores(train: Tensor, train_labels: Tensor, test: Tensor, num_classes: int) -> Tensor:
    """Return the cosine (n, num_classes) of each embedding to the nearest training one of a class.

    All embeddings, (k, d) and (n, d), are L2-normalised. The class of the largest is the answer of
    1-NN. A class without training slices scores -1.
    """
    cosine = cosines(test, train)
    scores = [
        cosine[:, train_labels == label].amax(1)
        if (train_labels == label).any()
        else cosine.new_full((len(test),), -1.0)
        for label in range(num_classes)
    ]
    return torch.stack(scores, dim=1)


def probabilities(scores: np.ndarray, scale: float) -> np.ndarray:
    """Return softmax(scale * scores): the classes' scores (n, C) read as logits of cosines."""
    return softmax(scale * scores, axis=1)


def cosines(test: Tensor, train: Tensor) -> Tensor:
    """Return the cosines (n, k), float64, between embeddings (n, d) and (k, d).

    In float32 the lengths and the sums are too coarse to order slices that are much alike. And a
    matrix product rounds by n and k, so that equally near slices would differ: pairs do not.
    """
    test, train = (F.normalize(each.double()) for each in (test, train))
    return 1 - torch.cdist(test, train, compute_mode="donot_use_mm_for_euclid_dist").square() / 2


def nearest_neighbour(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each test embedding, the index of the nearest in `train`, and the cosine.

    Between unit vectors the largest cosine is the smallest Euclidean distance. Of equally near
    ones it is the first.
    """
    cosine, nearest = cosines(test, train).max(dim=1)
    return nearest, cosine


def read_predictions(path: Path) -> Predictions:
    """Read back a file of predictions."""
    with readable(path, "predictions"):
        rows = read_table(path)
        scores = [name for name in rows[0] if name.startswith("score_")]
        classes = [name.removeprefix("score_") for name in scores]
        return Predictions(
            numbers=column(rows, "slice", int),
            patients=column(rows, "patient", str),
            truth=column(rows, "truth", classes.index),
            predicted=column(rows, "predicted", classes.index),
            nearest=column(rows, "nearest_training_slice", int),
            scores=np.stack([column(rows, name, float) for name in scores], axis=1),
        )


def _embed_views(
    run: Path, network: EmbeddingNetwork, slices: SliceSet, split: Split, most: int
) -> dict[int, Tensor]:
    """Return all sides' embeddings (n, d) for 1 to `most` views, 0 for other slices."""
    precision = run_folder.read_precision(run)
    sides = torch.cat([split.train, split.test, split.calibration])
    images = slices.images[sides]
    embeddings, total = {}, torch.zeros(())
    for views, axes in enumerate(VIEWS[:most], start=1):
        total = total + embed(network, images.flip(axes), precision)
        rows = total if views == 1 else F.normalize(total)
        embeddings[views] = rows.new_zeros(len(slices.labels), rows.shape[1])
        embeddings[views][sides] = rows
    return embeddings


def _classify(slices: SliceSet, split: Split, embeddings: Tensor) -> Predictions:
    """Return the answers for the test slices, given the embeddings (n, d) of all slices."""
    train, test = embeddings[split.train], embeddings[split.test]
    labels, numbers = slices.labels[split.train], np.array(slices.numbers)
    nearest, _ = nearest_neighbour(train, test)
    rows = split.test.numpy()
    return Predictions(
        numbers=numbers[rows],
        patients=np.array(slices.patients)[rows],
        truth=slices.labels.numpy()[rows],
        predicted=labels[nearest].numpy(),
        nearest=numbers[split.train[nearest].numpy()],
        scores=class_scores(train, labels, test, len(slices.classes)).numpy(),
    )


def _as_table(answers: Predictions, slices: SliceSet, split: Split) -> str:
    """Return answers as `read_predictions` takes them, with two columns more for people."""
    folds = np.full(len(answers.truth), "") if slices.folds is None else slices.folds[split.test]
    names = np.array(slices.classes)
    columns = {
        "slice": answers.numbers,
        "patient": answers.patients,
        "fold": folds.tolist(),
        "truth": names[answers.truth],
        "predicted": names[answers.predicted],
        "nearest_training_slice": answers.nearest,
        "cosine": [f"{cosine:.6f}" for cosine in answers.scores.max(1)],
    }
    for name, scores in zip(slices.classes, answers.scores.T, strict=True):
        columns[f"score_{name}"] = [f"{score:.17g}" for score in scores]
    return as_csv([list(columns), *zip(*columns.values(), strict=True)])

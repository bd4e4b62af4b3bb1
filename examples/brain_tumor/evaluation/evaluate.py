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
from ..training.checkpoint import load_loss, load_network
from ..training.run_folder import (
    ANGLES,
    CALIBRATION,
    EMBEDDINGS,
    FIXED,
    METRICS,
    POINTING,
    PREDICTIONS,
    RECORDS,
    SETTINGS,
    STRANGE,
    VIEW_PREDICTIONS,
    examined,
    read_precision,
    read_split,
)
from .calibration import (
    BLOCKS,
    Calibration,
    calibrated,
    fit_exponent,
    fit_familiarity,
    fit_limit,
)
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
        return measure(self.truth, self.predicted)


def evaluate(run: Path, slices: SliceSet) -> Metrics:
    """Classify a run's test slices by their nearest training slice; write the results beside it.

    The run's own number of views decides; beside it stand the answers of fewer views, of two at
    least and, where the weights were averaged, of the weights as they were. Return the metrics,
    which the run's folder then holds too, with predictions, embeddings and angles. The embeddings
    of slices on neither side are 0. With slices held out to calibrate on it holds the calibration.
    """
    settings = read_settings(run / SETTINGS)
    with locked(run, EVALUATING):
        split = read_split(run, slices)
        for name in (*RECORDS, *examined(run)):
            check_sum(run / name)
        write_sums(run, FIXED)  # what follows replaces the others' files
        return _evaluate(run, settings, slices, split)


def _evaluate(run: Path, settings: Settings, slices: SliceSet, split: Split) -> Metrics:
    # All at once, for a training that goes on replaces the checkpoint.
    network, epoch = load_network(run, settings.network)
    loss = load_loss(run, settings, len(slices.classes))
    last = load_network(run, settings.network, averaged=False)[0] if settings.training.ema else None
    if not (run / METRICS).is_file() or read_json(run / METRICS)["epoch"] != epoch:
        for name in (POINTING, STRANGE):  # what `examine` found of another network
            (run / name).unlink(missing_ok=True)
    own = settings.evaluation.views
    embeddings = _embed_views(run, network, slices, split, max(own, 2))
    train = embeddings[own][split.train], slices.labels[split.train]
    centres = class_centres(loss, *train, len(slices.classes))
    write_array(run / EMBEDDINGS, embeddings[own].float().numpy())
    write_array(run / ANGLES, class_angles(embeddings[own], centres).float().numpy())
    by_views = {}
    for views, averaged in embeddings.items():
        table, by_views[views] = _classify(slices, split, averaged)
        write_text(run / (PREDICTIONS if views == own else VIEW_PREDICTIONS.format(views)), table)
    results = {
        "epoch": epoch,
        **dataclasses.asdict(by_views[own]),
        "accuracy_by_views": {views: metrics.accuracy for views, metrics in by_views.items()},
    }
    if last is not None:
        results["accuracy_by_views_without_ema"] = {
            views: _classify(slices, split, averaged)[1].accuracy
            for views, averaged in _embed_views(run, last, slices, split, max(own, 2)).items()
        }
    if len(split.calibration):
        results["calibration"] = _calibrate(run, network, epoch, slices, split, embeddings[own])
    write_json(run / METRICS, results)
    kept = [*(RECORDS if epoch == settings.training.epochs else FIXED), EMBEDDINGS, ANGLES]
    kept += [PREDICTIONS, METRICS, *examined(run)]
    kept += [VIEW_PREDICTIONS.format(views) for views in embeddings if views != own]
    kept += [CALIBRATION] if len(split.calibration) else []
    write_sums(run, kept)
    return by_views[own]


def _calibrate(
    run: Path,
    network: EmbeddingNetwork,
    epoch: int,
    slices: SliceSet,
    split: Split,
    embeddings: Tensor,
) -> dict[str, float]:
    """Fit a calibration on the slices held out for it, keep it; return how it does on the test."""
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
    calibration.write(run / CALIBRATION)
    correct = test.argmax(1) == labels[split.test].numpy()
    return {
        "exponent": calibration.exponent,
        "slices": len(split.calibration),
        "error": reliability(calibrated(test, calibration.exponent).max(1), correct).error,
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
    low = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    with torch.inference_mode(), low:
        batches = [
            normalised(network, batch.to(device).float(), views)
            for batch in images.split(EMBEDDING_BATCH)
        ]
    return torch.cat(batches).cpu()


def early_features(network: EmbeddingNetwork, images: Tensor) -> Tensor:
    """Return MobileNet's features (n, channels) of images (n, 1, size, size) after `BLOCKS` blocks.

    They are averaged over each image and L2-normalised, and computed in float32 on the CPU whatever
    the run's precision, as the exported model computes them: in bfloat16, which rounds more than
    slices differ in some directions, the distances of `Familiarity` are others.
    """
    device = next(network.parameters()).device
    answer = partial(network.to("cpu").eval().pooled, blocks=BLOCKS)
    with torch.inference_mode():
        batches = [
            normalised(answer, batch.float(), views=1) for batch in images.split(EMBEDDING_BATCH)
        ]
    network.to(device)
    return torch.cat(batches)


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
    return softmax(scale * scores, axis=1)


def nearest_neighbour(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each test embedding, the index of the nearest in `train`, and the cosine.

    Between unit vectors the largest cosine is the smallest Euclidean distance.
    """
    cosine, nearest = (test @ train.T).max(dim=1)
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
    precision = read_precision(run)
    sides = torch.cat([split.train, split.test, split.calibration])
    images = slices.images[sides]
    embeddings, total = {}, torch.zeros(())
    for views, axes in enumerate(VIEWS[:most], start=1):
        total = total + embed(network, images.flip(axes), precision)
        rows = total if views == 1 else F.normalize(total)
        embeddings[views] = rows.new_zeros(len(slices.labels), rows.shape[1])
        embeddings[views][sides] = rows
    return embeddings


def _classify(slices: SliceSet, split: Split, embeddings: Tensor) -> tuple[str, Metrics]:
    """Return the answers for the test slices as a table, and what they are worth."""
    train, test, labels = embeddings[split.train], embeddings[split.test], slices.labels
    nearest, cosine = nearest_neighbour(train, test)
    predicted = labels[split.train][nearest]
    scores = class_scores(train, labels[split.train], test, len(slices.classes))
    columns = ["slice", "patient", "fold", "truth", "predicted", "nearest_training_slice", "cosine"]
    rows = [[*columns, *(f"score_{name}" for name in slices.classes)]]
    for row, index in enumerate(split.test.tolist()):
        rows.append(
            [
                slices.numbers[index],
                slices.patients[index],
                "" if slices.folds is None else int(slices.folds[index]),
                slices.classes[labels[index]],
                slices.classes[predicted[row]],
                slices.numbers[split.train[nearest[row]]],
                f"{cosine[row]:.6f}",
                *(f"{score:.9g}" for score in scores[row]),
            ]
        )
    truth = labels[split.test].numpy()
    return as_csv(rows), measure(truth, predicted.numpy(), len(slices.classes))

"""What a trained network says of single files, and which training slices it says it from."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.crop import find_box
from ..data.folders import FOLDS_NAME, tell_left_out, visible_files
from ..data.matlab import read_unlabelled
from ..data.pictures import PICTURES, read_picture
from ..data.slices import CLASS_NAMES, SliceSet, resize
from ..errors import UserError
from ..evaluation.calibration import (
    BLOCKS,
    FALSE_ALARMS,
    PARTS,
    Calibration,
    Familiarity,
    calibrated,
    cross_fit,
    read_calibration,
)
from ..evaluation.evaluate import (
    class_scores,
    cosines,
    early_features,
    embed,
    nearest_neighbour,
    probabilities,
)
from ..files import (
    checksum,
    locked,
    printable,
    read_array,
    read_cache,
    read_json,
    write_cache,
    write_json,
)
from ..network.mobilenet import EmbeddingNetwork
from ..report.figures.run import plot_prediction
from ..settings import read_settings
from ..training import run_folder
from ..training.checkpoint import load_network
from .gradcam import Overlap, grad_cam, measure_overlap

NOTICE = "Not a medical device: for research and teaching, never for diagnosis."
ANSWERS = "predictions.json"
UNCALIBRATED = "softmax of the scaled cosines,\nnot calibrated"
NEIGHBOURS = 5
SAME = 1 / 255  # intensity: what rounding to 8 bits may change; other slices differ by far more
LONGEST_NAME = 50  # letters of a file's name, of 4 bytes at most, that its picture's name keeps
READABLE = (".mat", *PICTURES, ".dcm", ".ima", "")  # DICOM files often have no extension


@dataclasses.dataclass(frozen=True)
class Reference:
    """A run's network and the training slices that its answers come from."""

    name: str  # the run's
    network: EmbeddingNetwork  # in eval mode
    epoch: int  # how many it was trained for
    precision: torch.dtype  # of the network's arithmetic
    scale: float  # the loss's, which turns cosines into logits
    calibration: Calibration  # without an exponent if the run held out no slices to calibrate on
    crop: str  # what is cut out of a slice
    views: int  # how many views of a slice are averaged
    slices: SliceSet  # all of them
    train: Tensor  # (k,) indices of the training slices
    test: Tensor  # those of the test slices
    embeddings: Tensor  # (k, d) theirs, L2-normalised
    labels: Tensor  # (k,) theirs

    def embed(self, images: Tensor) -> Tensor:
        """Return embeddings (n, d) of images (n, 1, size, size) as the run itself makes them."""
        return embed(self.network, images, self.precision, self.views)

    def answers(self, embeddings: Tensor) -> Tensor:
        """Return the classes (n,) of the training slices nearest to embeddings (n, d)."""
        return self.labels[nearest_neighbour(self.embeddings, embeddings)[0]]

    def shares(self, scores: np.ndarray) -> np.ndarray:
        """Return the probability (n, C) of each class from cosines (n, C), see `class_scores`."""
        if self.calibration.exponent is None:
            return probabilities(scores, self.scale)
        return calibrated(scores, self.calibration.exponent)

    def unknown(self, images: Tensor) -> np.ndarray:
        """Return which images (n,) are unlike all training slices."""
        return self.calibration.unlike(early_features(self.network, images).numpy())


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """A training slice near a file's slice: its number, class, and the cosine between the two."""

    number: int
    label: str
    cosine: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for one file."""

    file: str  # as it was named
    synthetic: bool  # whether the training slices are phantoms
    predicted: str  # the class of the nearest training slice
    # of each class; without a calibration softmax(scale * cosine to its nearest training slice),
    # which says little
    probabilities: dict[str, float]
    calibrated: bool  # whether the run held out slices on which the probabilities were calibrated
    unknown: bool  # whether it is unlike all training slices
    truth: str | None  # the class that the file itself states, if it does
    itself: int | None  # the number of the training slice that the file is, if it is one
    neighbours: list[Neighbour]  # the nearest training slices, the nearest first
    empty_map: bool  # whether the Grad-CAM is empty: negative everywhere before its ReLU
    # how much of the Grad-CAM lies in the tumour mask, where both are there
    overlap: Overlap | None
    picture: str  # the file name of the figure


def predict(
    run: Path,
    files: Sequence[Path],
    slices: SliceSet,
    out: Path,
    tell: Callable[[Prediction], object] = lambda answer: None,
) -> tuple[list[Prediction], list[str]]:
    """Classify files by their nearest training slice; write a figure of each, and the answers.

    The files are slices of the archive's format (.mat), of which the image is enough, PNG, JPEG,
    TIFF, BMP or DICOM pictures, or folders of them. The answers are written, and given to `tell`,
    as they come: an interrupted call leaves those that it has. Return the answers, and for each
    file without one the fault, in a line that names the file.

    Raises:
        UserError: The run is at fault, or `out` is.
    """
    reference = read_reference(run, slices)
    predictions: list[Prediction] = []
    faults: list[str] = []
    with locked(out):
        for position, file in enumerate(expand(files, out), start=1):
            picture = out / f"{position}-{printable(file.stem)[:LONGEST_NAME]}.png"
            try:
                predictions.append(_predict_file(reference, file, picture))
                tell(predictions[-1])
            except UserError as error:
                faults.append(printable(str(error)))
            answers = {
                "notice": NOTICE,
                "synthetic": slices.synthetic,
                "run": reference.name,
                "epoch": reference.epoch,
                "predictions": [dataclasses.asdict(prediction) for prediction in predictions],
                "faults": faults,
            }
            write_json(out / ANSWERS, answers)
    return predictions, faults


def expand(paths: Sequence[Path], out: Path) -> list[Path]:
    """Return the files named, and those in the folders named that may be slices.

    What else is in the folders is named on standard error. A folder of answers, `out`, inside of
    one is passed over: it holds the figures of another call.
    """
    files, answers = [], out.resolve()
    for path in paths:
        if not os.path.isdir(path):  # noqa: PTH112 - unlike Path's, it never raises
            files.append(path)
            continue
        inside = list(visible_files(path))
        if path.resolve() in answers.parents:
            inside = [one for one in inside if answers not in one.resolve().parents]
        slices = [one for one in inside if one.suffix.lower() in READABLE]
        slices = [one for one in slices if one.name.lower() != FOLDS_NAME]
        tell_left_out(path, [f"{one}: no slice by its name" for one in inside if one not in slices])
        files += slices or [path]
    return files


def describe_prediction(prediction: Prediction) -> str:
    """Return an answer as one line."""
    shares = sorted(prediction.probabilities.items(), key=lambda item: -item[1])
    parts = [", ".join(f"{label} {100 * share:.1f} %" for label, share in shares)]
    if not prediction.calibrated:
        parts[0] = f"not calibrated: {parts[0]}"
    if prediction.truth is not None:
        parts.append(f"the file says {prediction.truth}")
    if prediction.itself is not None:
        parts.append(f"it is training slice {prediction.itself} itself")
    near = (f"{one.number} {one.label} {one.cosine:.3f}" for one in prediction.neighbours)
    parts.append(f"nearest: {', '.join(near)}")
    if prediction.empty_map:
        parts.append("Grad-CAM: empty")
    if prediction.overlap is not None:
        parts.append(_describe_overlap(prediction.overlap))
    mark = "SYNTHETIC: " if prediction.synthetic else ""
    answer = f"{_answer(prediction)} ({'; '.join(parts)}); see {prediction.picture}"
    return printable(f"{mark}{prediction.file}: {answer}")


def read_reference(run: Path, slices: SliceSet) -> Reference:
    """Return what a run answers from.

    The embeddings that its evaluation kept are used if they belong to its last checkpoint.

    Raises:
        UserError: A file of the run is missing or damaged, or the slices are not its own.
    """
    settings = read_settings(run / run_folder.SETTINGS)
    split = run_folder.read_split(run, slices)
    network, epoch = load_network(run, settings.network)
    precision = run_folder.read_precision(run)
    views = settings.evaluation.views
    shape = (len(slices.labels), settings.network.embedding_size)
    embeddings = _stored_embeddings(run, epoch, shape, split.train)
    if embeddings is None:
        embeddings = embed(network, slices.images[split.train], precision, views)
    check_finite(run, embeddings)
    return Reference(
        name=run.absolute().name,
        network=network,
        epoch=epoch,
        precision=precision,
        scale=settings.loss.scale,
        calibration=_calibration(run, epoch, network, slices, split.train),
        crop=settings.data.crop,
        views=views,
        slices=slices,
        train=split.train,
        test=split.test,
        embeddings=embeddings,
        labels=slices.labels[split.train],
    )


def check_finite(source: Path, answers: Tensor) -> None:
    """Raise a UserError that names the source of the answers if one is NaN or infinite."""
    if not answers.isfinite().all():
        raise UserError(
            f"{source}: the network answers with NaN or infinite numbers: its weights are at fault"
        )


def _stored_embeddings(
    run: Path, epoch: int, shape: tuple[int, int], train: Tensor
) -> Tensor | None:
    """Return what evaluation kept of the training slices, or None if absent, damaged or older."""
    try:
        stored = read_array(run / run_folder.EMBEDDINGS)
        fits = read_json(run / run_folder.METRICS)["epoch"] == epoch
    except Exception:  # it only saves time, and damage shows in a dozen ways
        return None
    if not (fits and stored.shape == shape and stored.dtype == np.float32):
        return None
    embeddings = torch.from_numpy(stored)[train]
    return embeddings if ((embeddings.norm(dim=1) - 1).abs() < 1e-3).all() else None


def _calibration(
    run: Path, epoch: int, network: EmbeddingNetwork, slices: SliceSet, train: Tensor
) -> Calibration:
    """Return what evaluation kept of a network or, if it kept nothing, a cross-fitted limit.

    Raises:
        UserError: The file is damaged, or belongs to another network.
    """
    calibration = read_calibration(run / run_folder.CALIBRATION)
    if calibration is None:
        patients = [slices.patients[index] for index in train]
        return _cross_fitted(run, epoch, network, slices.images[train], patients)
    channels = network.backbone.blocks[:BLOCKS][-1].pointwise.conv.out_channels
    if (calibration.epoch, len(calibration.familiarity.mean)) != (epoch, channels):
        raise UserError(
            f"{run / run_folder.CALIBRATION}: belongs to epoch {calibration.epoch}, but the "
            f"network is of epoch {epoch}; evaluate the run again"
        )
    return calibration


def _cross_fitted(
    run: Path, epoch: int, network: EmbeddingNetwork, images: Tensor, patients: Sequence[str]
) -> Calibration:
    """Return a cross-fitted limit, kept in the run's folder under a sum of all it depends on."""
    rule = (BLOCKS, PARTS, FALSE_ALARMS, checksum(run / run_folder.SETTINGS), patients)
    key = hashlib.sha256(repr(rule).encode())
    for tensor in (*network.backbone.state_dict().values(), images):
        key.update(tensor.cpu().contiguous().numpy())
    path = run / run_folder.LIMIT
    kept = read_cache(path, key.hexdigest()) or {}
    channels = network.backbone.blocks[:BLOCKS][-1].pointwise.conv.out_channels
    shapes = {name: one.shape for name, one in kept.items() if one.dtype == np.float64}
    if shapes == {"mean": (channels,), "precision": (channels, channels), "limit": ()}:
        familiarity = Familiarity(kept["mean"], kept["precision"])
        return Calibration(None, familiarity, kept["limit"].item(), epoch)
    features = early_features(network, images)
    check_finite(run, features)
    made = cross_fit(features.numpy(), patients, epoch)
    arrays = {**vars(made.familiarity), "limit": np.array(made.limit)}
    write_cache(path, key.hexdigest(), arrays, "what is unknown will be told from all slices again")
    return made


def _predict_file(reference: Reference, file: Path, picture: Path) -> Prediction:
    image, mask, truth = _read_file(file)
    images = reference.slices.images
    box = find_box(image, reference.crop)
    part = image[box]
    pixels = torch.from_numpy(resize(part, images.shape[-1])).to(images)[None, None]
    embedding = reference.embed(pixels)
    check_finite(file, embedding)
    near = cosines(embedding, reference.embeddings)[0]
    nearest = near.sort(descending=True, stable=True).indices[:NEIGHBOURS]  # as the run's own
    classes = reference.slices.classes
    scores = class_scores(reference.embeddings, reference.labels, embedding, len(classes))
    shares = reference.shares(scores.numpy())[0].tolist()
    heat = explain(reference, image, pixels, near)
    check_finite(file, torch.from_numpy(heat))
    prediction = Prediction(
        file=str(file),
        synthetic=reference.slices.synthetic,
        predicted=classes[reference.labels[nearest[0]]],
        probabilities=dict(zip(classes, shares, strict=True)),
        calibrated=reference.calibration.exponent is not None,
        unknown=bool(reference.unknown(pixels)[0]),
        truth=truth,
        itself=_find_itself(reference, pixels),
        neighbours=[
            Neighbour(
                reference.slices.numbers[reference.train[row]],
                classes[reference.labels[row]],
                near[row].item(),
            )
            for row in nearest.tolist()
        ],
        empty_map=not heat.any(),
        overlap=None if mask is None else measure_overlap(heat, mask, box),
        picture=picture.name,
    )
    beside = images[reference.train[nearest], 0].float().numpy()
    _plot(prediction, picture, image, heat, mask, beside)
    return prediction


def _read_file(path: Path) -> tuple[np.ndarray, np.ndarray | None, str | None]:
    """Return image (h, w), and of a .mat file that has them tumour mask (h, w) and class."""
    if os.path.isdir(path):  # noqa: PTH112 - as above
        raise UserError(f"{path}: a folder without slices ({' '.join(READABLE).strip()})")
    if path.suffix.lower() != ".mat":
        return read_picture(path), None, None
    image, mask, label = read_unlabelled(path)
    return image, mask, None if label is None else CLASS_NAMES[label]


def explain(reference: Reference, image: np.ndarray, pixels: Tensor, cosines: Tensor) -> np.ndarray:
    """Return the Grad-CAM (h, w) of the answer for a slice (h, w), 0 where it was cut off.

    The network was given `pixels`, and the slice's cosines to the training slices are (k,).
    """
    direction = contrast(reference, cosines, cosines.argmax())
    heat = np.zeros(image.shape)
    part = heat[find_box(image, reference.crop)]
    part[:] = grad_cam(reference.network, pixels.float(), direction, part.shape, reference.views)
    return heat


def contrast(reference: Reference, cosines: Tensor, nearest: Tensor) -> Tensor:
    """Return the direction (d,) in which an answer becomes surer: the score of the Grad-CAM.

    It leads from the nearest training slice of another class to the nearest of all. The cosine to
    the latter alone would also show what all classes have in common, the skull for one.
    """
    others = reference.labels != reference.labels[nearest]
    if not others.any():
        return reference.embeddings[nearest]
    rival = cosines.masked_fill(~others, -torch.inf).argmax()
    return reference.embeddings[nearest] - reference.embeddings[rival]


def _find_itself(reference: Reference, pixels: Tensor) -> int | None:
    """Return the number of the training slice that has these pixels, if one has."""
    for part in reference.train.split(128):
        differing = (reference.slices.images[part] - pixels).abs().amax((1, 2, 3))
        for index in part[differing <= SAME].tolist():
            return reference.slices.numbers[index]
    return None


def _plot(
    prediction: Prediction,
    path: Path,
    image: np.ndarray,
    heat: np.ndarray,
    mask: np.ndarray | None,
    neighbours: np.ndarray,
) -> None:
    mark = "SYNTHETIC: " if prediction.synthetic else ""
    name = printable(Path(prediction.file).name)
    truth = "" if prediction.truth is None else f" (the file says {prediction.truth})"
    captions = []
    for one in prediction.neighbours:
        origin = "this file: slice" if one.number == prediction.itself else "training slice"
        captions.append(f"{origin} {one.number}\n{one.label}, cosine {one.cosine:.3f}")
    notes = []
    if prediction.itself is not None:
        notes.append(f"This file is training slice {prediction.itself}: its answer is no test.")
    if prediction.overlap is not None:
        notes.append(_describe_overlap(prediction.overlap))
    plot_prediction(
        path,
        f"{mark}{name}: {_answer(prediction)}{truth}",
        image,
        heat,
        mask,
        prediction.probabilities,
        list(zip(neighbours, captions, strict=True)),
        notes="\n".join([*notes, NOTICE]),
        meaning="calibrated" if prediction.calibrated else UNCALIBRATED,
    )


def _answer(prediction: Prediction) -> str:
    if prediction.unknown:
        return f"unknown, unlike the slices trained on; the nearest class is {prediction.predicted}"
    return prediction.predicted


def _describe_overlap(overlap: Overlap) -> str:
    if overlap.hottest_inside is None:
        return "Grad-CAM: the same everywhere"
    where = "inside" if overlap.hottest_inside else "outside"
    return (
        f"Grad-CAM: {100 * overlap.heat_inside:.0f} % in the tumour mask, which is "
        f"{100 * overlap.area_inside:.1f} % of the slice; its hottest point lies {where}"
    )

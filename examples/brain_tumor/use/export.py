"""Exporting a run's network so that it classifies without this program: torch.export and ONNX.

The model computes in float32, whatever the run was trained and evaluated in: few programs that run
ONNX know bfloat16, and no two round alike in it. The training embeddings inside are therefore made
anew. Where two classes are almost as near, the model may answer otherwise than the run; how often
on the held-out slices, model.json says.
"""

import dataclasses
import hashlib
import importlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.slices import SliceSet
from ..errors import UserError
from ..evaluation.calibration import BLOCKS, FLOOR
from ..evaluation.evaluate import EMBEDDING_BATCH, class_scores, early_features, embed, normalised
from ..files import locked, read_json, replacing
from ..training.run_folder import SETTINGS, SPLIT
from .prediction import NOTICE, Reference, check_finite, read_reference

TORCH_FILE = "model.pt2"
ONNX_FILE = "model.onnx"
DESCRIPTION = "model.json"
OLDEST_TORCH = "2.8"  # whose exporters take the network; 2.6 fails on it
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INPUT = "images"
TOLERANCE = 1e-4  # of each output, relative where it is above 1; float32 itself makes some 1e-6
FEATURE_TOLERANCE = 1e-5  # of the features of length 1 that the distance is made of
CPU = torch.device("cpu")  # a GPU's float32 may be rounded to ten bits
CROPS = {"none": "", "head": "a square around the head is cut out (crop.py has the rule); "}


class Classifier(nn.Module):
    """A network, the training slices that it answers from and its calibration, as one module."""

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.network = reference.network
        self.scale = reference.scale
        self.views = reference.views
        self.classes = len(reference.slices.classes)
        for label, name in enumerate(reference.slices.classes):
            own = reference.embeddings[reference.labels == label]
            if not len(own):
                raise UserError(f"{reference.name}: no training slice is of class {name}")
            self.register_buffer(f"class_{label}", own)
        calibration, familiarity = reference.calibration, reference.calibration.familiarity
        self.exponent = calibration.exponent
        # The distance as a squared length, 1 at the limit.
        factor = np.linalg.cholesky(familiarity.precision) / calibration.limit**0.5
        self.register_buffer("mean", torch.from_numpy(familiarity.mean).float())
        self.register_buffer("factor", torch.from_numpy(factor).float())

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (n, 1, size, size) in [0, 1] to embeddings (n, d) and probabilities (n, C).

        And to the distance (n,) from the training slices, over its limit.
        """
        embedding = normalised(self.network, images, self.views)
        own = [getattr(self, f"class_{label}") for label in range(self.classes)]
        nearest = [each.index_select(0, (embedding @ each.T).argmax(1)) for each in own]
        # 1 - cosine to the nearest of each class, precise where that is nearly 0.
        gaps = torch.stack([(embedding - each).square().sum(1) / 2 for each in nearest], dim=1)
        logits = -self.scale * gaps
        if self.exponent is not None:
            logits = -self.exponent * (gaps + FLOOR).log()
        features = normalised(partial(self.network.pooled, blocks=BLOCKS), images, views=1)
        distance = ((features - self.mean) @ self.factor).square().sum(1)
        return embedding, logits.softmax(1), distance


def export(run: Path, slices: SliceSet, out: Path) -> dict[str, Any]:
    """Write a run's network, with its training embeddings, as model.pt2 and model.onnx.

    Both map `images` (n, 1, size, size), float32 in [0, 1], any n, to `embedding` (n, d),
    L2-normalised, `probabilities` (n, C) of the classes, calibrated if the run is, and `distance`
    (n,), above 1 for what is unknown. On the held-out slices they are compared with the network
    before anything is written; model.json describes them and holds their SHA-256, and is returned.
    None of the three takes its place before all are stored, and model.json is the last: only a loss
    of power, or a folder of such a name, can leave a new file beside an old one, and the SHA-256
    then tell.

    Raises:
        UserError: The run is at fault, a package is missing, or an exported file answers otherwise
            than the network.
    """
    for name in ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            needed = " ".join(ONNX_PACKAGES)
            raise UserError(
                f"{name}: cannot be imported, but export needs it: pip install {needed}"
            ) from error
    reference = read_reference(run, slices)
    images, truth = slices.images[reference.test], slices.labels[reference.test]
    of_run = reference.answers(reference.embed(images))
    description = _describe(run, reference)
    # As the exported model embeds the training slices.
    train = slices.images[reference.train]
    embeddings = embed(reference.network, train, views=reference.views, device=CPU)
    check_finite(run, embeddings)
    reference = dataclasses.replace(reference, precision=torch.float32, embeddings=embeddings)
    expected, tolerances = _expected(reference, images)
    with _quiet():
        program = _trace(Classifier(reference), slices.images.shape[-1])
        files = {
            TORCH_FILE: _torch_bytes(program, description),
            ONNX_FILE: _onnx_bytes(program, description),
        }
        readers = {TORCH_FILE: _run_torch, ONNX_FILE: _run_onnx}
        found = {
            name: _run(readers[name](content), images, expected) for name, content in files.items()
        }
    description["largest_difference"] = {
        name: _largest_difference(name, answers, expected, tolerances)
        for name, answers in found.items()
    }
    # Of the two files the one that is worse: where slices are much alike, rounding may decide.
    of_files = [answers["probabilities"].argmax(1) for answers in found.values()]
    description["held_out"] = {
        "slices": len(truth),
        "right": {
            "model": min(int((each == truth).sum()) for each in of_files),
            "run": int((of_run == truth).sum()),
        },
        "answered_otherwise": max(int((each != of_run).sum()) for each in of_files),
        "called_unknown": {
            "model": max(int((answers["distance"] > 1).sum()) for answers in found.values()),
            "run": int(reference.unknown(images).sum()),
        },
    }
    description["sha256"] = {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items()
    }
    files[DESCRIPTION] = (json.dumps(description, indent=2) + "\n").encode()
    with locked(out), ExitStack() as stack:
        for name, content in reversed(files.items()):  # a stack: the first in is the last renamed
            with stack.enter_context(replacing(out / name)).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    return description


def describe_export(description: dict[str, Any]) -> str:
    """Return as one line what model.json says of the run's answers and the model's."""
    precision, held_out = description["precision"], description["held_out"]
    unknown = held_out["called_unknown"]
    mark = "SYNTHETIC: " if description["synthetic"] else ""
    return (
        f"{mark}the model computes in {precision['model']}, the run in {precision['run']}: of "
        f"{held_out['slices']} held-out slices {held_out['answered_otherwise']} get another answer;"
        f" {held_out['right']['model']} answers are right, the run's {held_out['right']['run']}; "
        f"{unknown['model']} are called unknown, by the run {unknown['run']}"
    )


def _describe(run: Path, reference: Reference) -> dict[str, Any]:
    size, exponent = reference.slices.images.shape[-1], reference.calibration.exponent
    if exponent is None:
        probabilities = (
            f"softmax of {reference.scale:g} times the cosine to each class's nearest training "
            "slice, not calibrated"
        )
    else:
        probabilities = (
            f"proportional to (1 - cosine + {FLOOR:g}) ** -{exponent:.4g}, of the "
            "cosine to each class's nearest training slice: calibrated on held-out slices"
        )
    return {
        "notice": NOTICE,
        "synthetic": reference.slices.synthetic,
        "run": reference.name,
        "epoch": reference.epoch,
        "settings_sha256": hashlib.sha256((run / SETTINGS).read_bytes()).hexdigest(),
        "split_sha256": read_json(run / SPLIT)["sha256"],
        "training_slices": len(reference.labels),
        "precision": {"model": "float32", "run": str(reference.precision).removeprefix("torch.")},
        "input": {
            "name": INPUT,
            "shape": ["n", 1, size, size],
            "type": "float32",
            "range": [0, 1],
            "preparation": f"{CROPS[reference.crop]}a grey slice is resized bilinearly with "
            "antialiasing, then scaled so that its own least intensity is 0 and its largest 1",
        },
        "outputs": {
            "embedding": {
                "shape": ["n", reference.embeddings.shape[1]],
                "meaning": "L2-normalised",
            },
            "probabilities": {
                "shape": ["n", len(reference.slices.classes)],
                "classes": reference.slices.classes,
                "meaning": probabilities,
            },
            "distance": {
                "shape": ["n"],
                "meaning": "squared Mahalanobis distance of early features from the training "
                "slices, over its limit: above 1 a picture is unlike them, and its class means "
                "nothing",
            },
        },
        "versions": {
            name: importlib.import_module(name).__version__ for name in ("torch", *ONNX_PACKAGES)
        },
    }


def _expected(reference: Reference, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what the exported model is to answer, and by how much it may differ, by its outputs.

    Slices of few patients hardly differ in most directions, so that a rounding of the features in
    one of them changes the distance far more.
    """
    network, calibration = reference.network, reference.calibration
    embeddings = embed(network, images, views=reference.views, device=CPU)
    train, test = (F.normalize(each.double()) for each in (reference.embeddings, embeddings))
    scores = class_scores(train, reference.labels, test, len(reference.slices.classes)).numpy()
    shares = torch.from_numpy(reference.shares(scores))
    features = early_features(network, images).numpy()
    familiarity, limit = calibration.familiarity, calibration.limit
    distances = torch.from_numpy(familiarity.distances(features) / limit)
    slopes = 2 / limit * (features - familiarity.mean) @ familiarity.precision
    slopes = torch.from_numpy(np.linalg.norm(slopes, axis=1))
    expected = {"embedding": embeddings, "probabilities": shares, "distance": distances}
    tolerances = dict.fromkeys(expected, torch.tensor(TOLERANCE))
    return expected, tolerances | {"distance": TOLERANCE + FEATURE_TOLERANCE * slopes}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which warn of packages and shortcuts that are of no concern here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _trace(classifier: Classifier, size: int) -> torch.export.ExportedProgram:
    if torch.torch_version.TorchVersion(torch.__version__) < OLDEST_TORCH:
        raise UserError(
            f"torch {torch.__version__}: its exporters fail on the network; export needs torch "
            f"{OLDEST_TORCH} or newer"
        )
    example = torch.zeros(2, 1, size, size)  # of one, export would take the batch for constant
    with torch.no_grad():
        return torch.export.export(
            classifier.eval(), (example,), dynamic_shapes={INPUT: {0: torch.export.Dim("n")}}
        )


def _torch_bytes(program: torch.export.ExportedProgram, description: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(description)})
    return file.getvalue()


def _onnx_bytes(program: torch.export.ExportedProgram, description: dict[str, Any]) -> bytes:
    exported = torch.onnx.export(
        program,
        dynamo=True,
        input_names=[INPUT],
        output_names=list(description["outputs"]),
        verbose=False,
    )
    exported.model.metadata_props[DESCRIPTION] = json.dumps(description)
    return exported.model_proto.SerializeToString()


Answerer = Callable[[Tensor], tuple[Tensor, ...]]


def _run_torch(content: bytes) -> Answerer:
    return torch.export.load(io.BytesIO(content)).module()


def _run_onnx(content: bytes) -> Answerer:
    import onnxruntime  # here because only this command needs it

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: tuple(
        torch.from_numpy(answer) for answer in session.run(None, {INPUT: images.numpy()})
    )


def _run(answer: Answerer, images: Tensor, outputs: Iterable[str]) -> dict[str, Tensor]:
    """Return the outputs of an exported model for images (n, 1, size, size), by their names."""
    parts = [images[:1], *images[1:].split(EMBEDDING_BATCH)]  # one alone, then in batches
    with torch.no_grad():
        found = zip(*(answer(part.float()) for part in parts if len(part)), strict=True)
        return dict(zip(outputs, map(torch.cat, found), strict=True))


def _largest_difference(
    name: str,
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    tolerances: dict[str, Tensor],
) -> dict[str, float]:
    """Return the largest difference of each output from what is expected.

    It is relative where above 1 is expected, as distances may be by any factor.

    Raises:
        UserError: It exceeds the tolerance.
    """
    largest = {}
    for output, own in expected.items():
        differences = (own - found[output]).abs() / own.abs().clamp(min=1)
        largest[output] = differences.max().item()
        if not (differences <= tolerances[output]).all():  # false for NaN too
            raise UserError(
                f"{name}: its {output} differs from the network's by {largest[output]:.2g}, more "
                "than rounding explains; nothing was written"
            )
    return largest

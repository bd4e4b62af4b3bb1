"""Exporting a run's network so that it classifies without this program: torch.export and ONNX."""

import hashlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .evaluation import class_scores, probabilities
from .files import replacing
from .prediction import NOTICE, Reference, make_folder, read_reference
from .run_folder import SETTINGS, SPLIT, read_json, write_json
from .slices import CLASS_NAMES, SliceSet

TORCH_FILE = "model.pt2"
ONNX_FILE = "model.onnx"
DESCRIPTION = "model.json"
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INPUT = "images"
OUTPUTS = ("embedding", "probabilities")
TOLERANCE = 1e-4  # of either output; float32 itself makes some 1e-6
CHECKED_BATCHES = (1, 3)


class Classifier(nn.Module):
    """A network and the training slices that it answers from, as one module.

    Args:
        reference: The run's.

    Raises:
        UserError: A class has no training slice.
    """

    def __init__(self, reference: Reference) -> None:
        super().__init__()
        self.network = reference.network
        self.scale = reference.scale
        for label, name in enumerate(CLASS_NAMES):
            own = reference.embeddings[reference.labels == label]
            if not len(own):
                raise UserError(f"{reference.name}: no training slice is of class {name}")
            self.register_buffer(name, own)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (n, 1, size, size) in [0, 1] to embeddings (n, d) and probabilities (n, C)."""
        embedding = F.normalize(self.network(images))
        nearest = [(embedding @ self.get_buffer(name).T).amax(1) for name in CLASS_NAMES]
        return embedding, (self.scale * torch.stack(nearest, dim=1)).softmax(1)


def export(run: Path, slices: SliceSet, out: Path) -> dict[str, Any]:
    """Write a run's network, with its training embeddings, as model.pt2 and model.onnx.

    Both map `images` (n, 1, size, size), float32 in [0, 1], any n, to `embedding` (n, d),
    L2-normalised, and `probabilities` (n, C) of the classes. They are compared with the network
    before anything is written; model.json, written last, describes them and holds their SHA-256.

    Args:
        run: A run's folder, finished or not.
        slices: The slices that the run was trained on and held out, at its image size.
        out: The folder for the three files; made if missing.

    Returns:
        What model.json holds.

    Raises:
        UserError: The run is at fault, a package is missing, or an exported file answers otherwise
            than the network.
    """
    _require_packages()
    reference = read_reference(run, slices)
    reference.network.cpu()
    description = _describe(run, reference)
    with _quiet():
        program = _trace(Classifier(reference), slices.images.shape[-1])
        files = {
            TORCH_FILE: _torch_bytes(program, description),
            ONNX_FILE: _onnx_bytes(program, description),
        }
        answerers = {TORCH_FILE: _run_torch, ONNX_FILE: _run_onnx}
        description["largest_difference"] = {
            name: _largest_difference(name, answerers[name](content), reference)
            for name, content in files.items()
        }
    description["sha256"] = {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items()
    }
    make_folder(out)
    for name, content in files.items():
        with replacing(out / name) as temporary:
            temporary.write_bytes(content)
    write_json(out / DESCRIPTION, description)
    return description


def _require_packages() -> None:
    for name in ONNX_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"{name}: cannot be imported, but export needs it: "
                f"pip install {' '.join(ONNX_PACKAGES)}"
            ) from error


def _describe(run: Path, reference: Reference) -> dict[str, Any]:
    size = reference.slices.images.shape[-1]
    return {
        "notice": NOTICE,
        "synthetic": reference.slices.synthetic,
        "run": reference.name,
        "epoch": reference.epoch,
        "settings_sha256": hashlib.sha256((run / SETTINGS).read_bytes()).hexdigest(),
        "split_sha256": read_json(run / SPLIT)["sha256"],
        "training_slices": len(reference.labels),
        "input": {
            "name": INPUT,
            "shape": ["n", 1, size, size],
            "type": "float32",
            "range": [0, 1],
            "preparation": "a grey slice is resized bilinearly with antialiasing, then scaled so "
            "that its own least intensity is 0 and its largest 1",
        },
        "outputs": {
            "embedding": {
                "shape": ["n", reference.embeddings.shape[1]],
                "meaning": "L2-normalised",
            },
            "probabilities": {
                "shape": ["n", len(CLASS_NAMES)],
                "classes": CLASS_NAMES,
                "meaning": f"softmax of {reference.scale:g} times the cosine to each class's "
                "nearest training slice",
            },
        },
        "versions": {
            name: importlib.import_module(name).__version__ for name in ("torch", *ONNX_PACKAGES)
        },
    }


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
        program, dynamo=True, input_names=[INPUT], output_names=OUTPUTS, verbose=False
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
        torch.from_numpy(answer) for answer in session.run(OUTPUTS, {INPUT: images.numpy()})
    )


def _largest_difference(name: str, answer: Answerer, reference: Reference) -> dict[str, float]:
    """Return the largest difference of each output from the network's own, on random images.

    Raises:
        UserError: It exceeds the tolerance.
    """
    generator = torch.Generator().manual_seed(0)
    size = reference.slices.images.shape[-1]
    largest = dict.fromkeys(OUTPUTS, 0.0)
    for count in CHECKED_BATCHES:
        images = torch.rand(count, 1, size, size, generator=generator)
        with torch.no_grad():
            expected = _expected(reference, images)
            found = answer(images)
        for output, own, other in zip(OUTPUTS, expected, found, strict=True):
            difference = (own - other).abs().max().item()
            if not difference <= TOLERANCE:  # false for NaN too
                raise UserError(
                    f"{name}: its {output} differs from the network's by {difference:.2g}, "
                    f"expected at most {TOLERANCE:g}; nothing was written"
                )
            largest[output] = max(largest[output], difference)
    return largest


def _expected(reference: Reference, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return embeddings and probabilities the way that evaluation finds them."""
    embedding = F.normalize(reference.network(images))
    scores = class_scores(reference.embeddings, reference.labels, embedding, len(CLASS_NAMES))
    return embedding, torch.from_numpy(probabilities(scores.numpy(), reference.scale))

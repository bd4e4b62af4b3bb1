"""The exported models answer as the evaluation does, and are left out where they do not."""

import dataclasses
import hashlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from examples.brain_tumor import export as export_module
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation import evaluate, read_predictions
from examples.brain_tumor.export import Classifier, export
from examples.brain_tumor.prediction import NOTICE, read_reference
from examples.brain_tumor.settings import override_settings
from examples.brain_tumor.slices import CLASS_NAMES
from examples.brain_tumor.training import train

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What the tests of this module share: one run and, once it is asked for, its export."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def run(shared, blobs, blob_split, tiny_settings):
    if not (shared / "run").exists():
        settings = override_settings(
            tiny_settings, {"precision": "float32", "epochs": 30, "scale": 7.0}
        )
        train(settings, blobs, blob_split, shared / "run")
        evaluate(shared / "run", blobs)
    return shared / "run"


@pytest.fixture
def exported(shared, run, blobs):
    """The folder of the exported run; exporting takes seconds."""
    if not (shared / "exported").exists():
        returned = export(run, blobs, shared / "exported")
        (shared / "returned.json").write_text(json.dumps(returned))
    return shared / "exported"


def run_torch(path):
    module = torch.export.load(path).module()
    return lambda images: [answer.detach().numpy() for answer in module(images)]


def run_onnx(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = ["embedding", "probabilities"]
    return lambda images: session.run(names, {"images": images.numpy()})


@pytest.mark.parametrize(
    ("name", "load"), [("model.pt2", run_torch), ("model.onnx", run_onnx)], ids=["pt2", "onnx"]
)
def test_exported_models_answer_as_the_evaluation(exported, run, blobs, name, load):
    answer = load(exported / name)
    parts = [answer(part) for part in blobs.images[15:].float().split([1, 2, 6])]
    embeddings, shares = (np.concatenate(one) for one in zip(*parts, strict=True))
    np.testing.assert_allclose(embeddings, np.load(run / "embeddings.npy")[15:], atol=1e-4)
    known = read_predictions(run / "predictions.csv")
    weights = np.exp(7 * known.scores)
    np.testing.assert_allclose(shares, weights / weights.sum(1, keepdims=True), atol=1e-4)
    np.testing.assert_allclose(shares[range(9), known.predicted], shares.max(1), atol=1e-4)
    assert np.ptp(shares, axis=0).min() > 0.1  # so that it matters whose share is whose


def test_the_description_tells_what_the_files_are(exported, run, shared):
    assert {path.name for path in exported.iterdir()} == {"model.pt2", "model.onnx", "model.json"}
    described = json.loads((exported / "model.json").read_text())
    assert described == json.loads((shared / "returned.json").read_text())
    for name in ("model.pt2", "model.onnx"):
        digest = hashlib.sha256((exported / name).read_bytes()).hexdigest()
        assert described["sha256"][name] == digest
        for output in ("embedding", "probabilities"):
            assert 0 <= described["largest_difference"][name][output] < 1e-4
    assert described["notice"] == NOTICE
    assert described["synthetic"] is True
    assert (described["run"], described["epoch"], described["training_slices"]) == ("run", 30, 15)
    settings = (run / "settings.toml").read_bytes()
    assert described["settings_sha256"] == hashlib.sha256(settings).hexdigest()
    assert described["split_sha256"] == json.loads((run / "split.json").read_text())["sha256"]
    assert described["input"]["shape"] == ["n", 1, 32, 32]
    assert described["input"]["range"] == [0, 1]
    assert described["outputs"]["embedding"]["shape"] == ["n", 16]
    assert described["outputs"]["probabilities"]["classes"] == list(CLASS_NAMES)
    assert described["versions"]["torch"] == torch.__version__


def test_each_file_carries_its_description(exported):
    model = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    inside = {entry.key: entry.value for entry in model.metadata_props}
    extra = {"model.json": ""}
    torch.export.load(exported / "model.pt2", extra_files=extra)
    for text in (inside["model.json"], extra["model.json"]):
        described = json.loads(text)
        assert described["notice"] == NOTICE
        assert described["synthetic"] is True
    (given,) = model.graph.input
    assert given.name == "images"
    batch, *fixed = given.type.tensor_type.shape.dim
    assert batch.dim_param
    assert [one.dim_value for one in fixed] == [1, 32, 32]


# ------------------------------------------------------------------------------ what is left out


@pytest.fixture
def untraced(monkeypatch):
    """Exporters that take no time; what the files answer is the test's own affair."""
    monkeypatch.setattr(export_module, "_trace", lambda classifier, size: classifier)
    for name in ("_torch_bytes", "_onnx_bytes"):
        monkeypatch.setattr(export_module, name, lambda classifier, description: classifier)


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("error", [2e-4, -2e-4, np.nan])
def test_a_model_that_answers_otherwise_is_not_written(
    tmp_path, run, blobs, untraced, monkeypatch, kind, output, count, error
):
    def wrong(classifier):
        def answer(images):
            answers = list(classifier(images))
            if len(images) == count:
                answers[output] = answers[output].clone()
                answers[output][-1, -1] += error
            return answers

        return answer

    monkeypatch.setattr(export_module, "_run_torch", lambda classifier: classifier)
    monkeypatch.setattr(export_module, "_run_onnx", lambda classifier: classifier)
    monkeypatch.setattr(export_module, f"_run_{kind}", wrong)
    name = ("embedding", "probabilities")[output]
    file = {"torch": "model.pt2", "onnx": "model.onnx"}[kind]
    with pytest.raises(UserError, match=f"{file}: its {name} differs .* nothing was written"):
        export(run, blobs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_packages_are_named(tmp_path, run, blobs, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"^{package}: .*pip install onnx onnxruntime onnxscript$"):
        export(run, blobs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_without_training_slices_is_refused(run, blobs):
    reference = read_reference(run, blobs)
    labels = torch.where(reference.labels == 2, 0, reference.labels)
    with pytest.raises(UserError, match="run: no training slice is of class pituitary"):
        Classifier(dataclasses.replace(reference, labels=labels))


def test_faults_of_the_run_and_the_folder(tmp_path, run, blobs, monkeypatch):
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"checkpoint.pt: not readable"):
        export(broken, blobs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    monkeypatch.setattr(export_module, "_trace", lambda classifier, size: classifier)
    for name in ("torch", "onnx"):
        monkeypatch.setattr(export_module, f"_{name}_bytes", lambda *_: b"")
        monkeypatch.setattr(export_module, f"_run_{name}", lambda _: Classifier(reference))
    reference = read_reference(run, blobs)
    with pytest.raises(UserError, match="file: cannot be made a folder"):
        export(run, blobs, tmp_path / "file")

"""The exported models answer as the evaluation does, and are left out where they do not."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from examples.brain_tumor.data.slices import CLASS_NAMES
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation.calibration import FLOOR, fit_familiarity, read_calibration
from examples.brain_tumor.evaluation.evaluate import (
    early_features,
    evaluate,
    read_predictions,
)
from examples.brain_tumor.network import mobilenet
from examples.brain_tumor.settings import override_settings
from examples.brain_tumor.training.loop import train
from examples.brain_tumor.use import export as export_module
from examples.brain_tumor.use import prediction
from examples.brain_tumor.use.export import Classifier, describe_export, export
from examples.brain_tumor.use.prediction import NOTICE, read_reference

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """A short network: each block is traced and translated as the others are."""
    monkeypatch.setattr(mobilenet, "BLOCKS", mobilenet.BLOCKS[:4])


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
    if TorchVersion(torch.__version__) < export_module.OLDEST_TORCH:
        pytest.skip(f"export needs torch {export_module.OLDEST_TORCH}")
    if not (shared / "exported").exists():
        returned = export(run, blobs, shared / "exported")
        (shared / "returned.json").write_text(json.dumps(returned))
    return shared / "exported"


def run_torch(path):
    module = torch.export.load(path).module()
    return lambda images: [answer.detach().numpy() for answer in module(images)]


def run_onnx(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


BOTH = pytest.mark.parametrize(
    ("name", "load"), [("model.pt2", run_torch), ("model.onnx", run_onnx)], ids=["pt2", "onnx"]
)


@BOTH
def test_exported_models_answer_as_the_evaluation(exported, run, blobs, name, load):
    answer = load(exported / name)
    parts = [answer(part) for part in blobs.images[15:].float().split([1, 2, 6])]
    embeddings, shares, distances = (np.concatenate(one) for one in zip(*parts, strict=True))
    np.testing.assert_allclose(embeddings, np.load(run / "embeddings.npy")[15:], atol=1e-4)
    known = read_predictions(run / "predictions.csv")
    weights = np.exp(7 * known.scores)
    np.testing.assert_allclose(shares, weights / weights.sum(1, keepdims=True), atol=1e-4)
    np.testing.assert_allclose(shares[range(9), known.predicted], shares.max(1), atol=1e-4)
    assert np.ptp(shares, axis=0).min() > 0.1  # so that it matters whose share is whose
    unknown = read_reference(run, blobs).unknown(blobs.images[15:])
    np.testing.assert_array_equal(distances > 1, unknown)


@pytest.fixture
def calibrated_run(shared, scaled, tiny_settings, held_split):
    if not (shared / "calibrated").exists():
        settings = override_settings(tiny_settings, {"epochs": 30})
        train(settings, scaled, held_split, shared / "calibrated")
        evaluate(shared / "calibrated", scaled)
    return shared / "calibrated"


@pytest.fixture
def exported_calibrated(shared, exported, calibrated_run, scaled):
    if not (shared / "exported-calibrated").exists():
        export(calibrated_run, scaled, shared / "exported-calibrated")
    return shared / "exported-calibrated"


@BOTH
def test_a_calibrated_run_is_calibrated_outside_too(
    exported_calibrated, calibrated_run, scaled, name, load
):
    noise = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.cat([scaled.images[15:].float(), noise])
    embeddings, shares, distances = load(exported_calibrated / name)(images)
    assert embeddings.shape == (13, 16)
    calibration = read_calibration(calibrated_run / "calibration.npz")
    gaps = 1 - read_predictions(calibrated_run / "predictions.csv").scores + FLOOR
    weights = gaps**-calibration.exponent
    np.testing.assert_allclose(shares[:9], weights / weights.sum(1, keepdims=True), atol=1e-3)
    assert np.ptp(shares, axis=0).min() > 0.1
    network = read_reference(calibrated_run, scaled).network
    features = early_features(network, images).numpy()
    expected = calibration.familiarity.distances(features) / calibration.limit
    np.testing.assert_allclose(distances, expected, rtol=1e-4)
    assert (distances[9:] > 1).all()


def test_the_description_says_what_a_calibrated_model_calls_unknown(
    exported_calibrated, calibrated_run
):
    described = json.loads((exported_calibrated / "model.json").read_text())
    stored = json.loads((calibrated_run / "metrics.json").read_text())["calibration"]
    unknown = round(9 * stored["false_alarms"])
    assert described["held_out"]["called_unknown"] == {"model": unknown, "run": unknown}
    meaning = described["outputs"]["probabilities"]["meaning"]
    assert f"** -{stored['exponent']:.4g}, " in meaning
    assert described["outputs"]["distance"]["shape"] == ["n"]
    assert f"; {unknown} are called unknown, by the run {unknown}" in describe_export(described)


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
    assert described["precision"] == {"model": "float32", "run": "float32"}
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


@pytest.mark.parametrize("kind", ["torch", "onnx"])
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("error", [2e-4, -2e-4, np.nan])
def test_a_model_that_answers_otherwise_is_not_written(
    tmp_path, run, blobs, traced, monkeypatch, kind, output, count, error
):
    def wrong(content):
        def answer(images):
            answers = list(traced[-1](images))
            if len(images) == count:
                answers[output] = answers[output].clone()
                answers[output][-1, -1] += error
            return answers

        return answer

    monkeypatch.setattr(export_module, f"_run_{kind}", wrong)
    name = ("embedding", "probabilities")[output]
    file = {"torch": "model.pt2", "onnx": "model.onnx"}[kind]
    with pytest.raises(UserError, match=f"{file}: its {name} differs .* nothing was written"):
        export(run, blobs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_largest_difference_is_that_of_all_batches():
    errors = {1: (1e-5, 2e-5), 32: (8e-5, 1e-5), 3: (3e-5, 7e-5)}  # by the batch's size
    images = torch.zeros(36, 1, 2, 2)
    expected = {"embedding": torch.zeros(36, 4), "probabilities": torch.zeros(36, 3)}

    def answer(images):
        first, second = errors[len(images)]
        return torch.full((len(images), 4), -first), torch.full((len(images), 3), second)

    tolerances = dict.fromkeys(expected, torch.tensor(1e-4))
    found = export_module._run(answer, images, expected)
    largest = export_module._largest_difference("model.onnx", found, expected, tolerances)
    assert largest == pytest.approx({"embedding": 8e-5, "probabilities": 7e-5})


@pytest.mark.parametrize(("length", "is_rounding"), [(5e-6, True), (1e-3, False)])
def test_distances_differ_as_rounded_features_make_them(run, blobs, length, is_rounding):
    reference = read_reference(run, blobs)
    images, calibration = blobs.images[reference.test], reference.calibration
    expected, tolerances = export_module._expected(reference, images)
    features = early_features(reference.network, images).numpy()
    worst = (features - calibration.familiarity.mean) @ calibration.familiarity.precision
    worst *= length / np.linalg.norm(worst, axis=1, keepdims=True)
    moved = calibration.familiarity.distances(features + worst) / calibration.limit
    differences = (torch.from_numpy(moved) - expected["distance"]).abs()
    assert bool((differences <= tolerances["distance"]).all()) is is_rounding


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_packages_are_named(tmp_path, run, blobs, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"^{package}: .*pip install onnx onnxruntime onnxscript$"):
        export(run, blobs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_torch_whose_exporters_fail_is_named(tmp_path, run, blobs, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.7.1")
    with pytest.raises(UserError, match=r"^torch 2\.7\.1: .* export needs torch 2\.8 or newer$"):
        export(run, blobs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_class_without_training_slices_is_refused(run, blobs):
    reference = read_reference(run, blobs)
    labels = torch.where(reference.labels == 2, 0, reference.labels)
    with pytest.raises(UserError, match="run: no training slice is of class pituitary"):
        Classifier(dataclasses.replace(reference, labels=labels))


def test_a_network_that_answers_with_nan_is_named(tmp_path, run, blobs):
    broken = shutil.copytree(run, tmp_path / "broken")  # its stored embeddings are still sound
    contents = torch.load(broken / "checkpoint.pt", weights_only=True)
    contents["network"]["output.0.weight"].fill_(torch.nan)
    torch.save(contents, broken / "checkpoint.pt")
    with pytest.raises(UserError, match=f"^{broken}: the network answers with NaN"):
        export(broken, blobs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_faults_of_the_run_and_the_folder(tmp_path, run, blobs, traced):
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"checkpoint.pt: not readable"):
        export(broken, blobs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is not a folder"):
        export(run, blobs, tmp_path / "file")


# ------------------------------------------------------------------------------------- precision


@pytest.fixture
def half_run(tmp_path, run):
    """A run that is evaluated in bfloat16, with some training embeddings in each other's place."""
    folder = shutil.copytree(run, tmp_path / "half")
    environment = folder / "environment.json"
    environment.write_text(environment.read_text().replace("float32", "bfloat16"))
    own = np.load(folder / "embeddings.npy")
    own[:7] = np.roll(own[:7], 1, axis=0)
    np.save(folder / "embeddings.npy", own)
    (folder / "SHA256SUMS").unlink()
    return folder


@pytest.fixture
def half_calibrated(tmp_path, scaled, tiny_settings, held_split):
    """A run that is trained, evaluated and calibrated in bfloat16."""
    settings = override_settings(tiny_settings, {"precision": "bfloat16"})
    train(settings, scaled, held_split, tmp_path / "half")
    evaluate(tmp_path / "half", scaled)
    return tmp_path / "half"


def test_what_is_unknown_is_the_same_in_any_precision(tmp_path, half_calibrated, scaled, traced):
    described = export(half_calibrated, scaled, tmp_path / "out")
    assert described["precision"]["run"] == "bfloat16"
    unknown = described["held_out"]["called_unknown"]
    assert unknown["model"] == unknown["run"]
    reference = read_reference(half_calibrated, scaled)
    with torch.no_grad():
        blocks = reference.network.pooled(scaled.images.float(), 5)
    own = torch.nn.functional.normalize(blocks).numpy()
    calibration = reference.calibration
    np.testing.assert_allclose(
        calibration.familiarity.distances(own), fit_familiarity(own[:12]).distances(own), rtol=1e-3
    )
    limit = np.quantile(calibration.familiarity.distances(own[12:15]), 0.95)
    assert calibration.limit == pytest.approx(limit, rel=1e-3)
    alarms = calibration.familiarity.distances(own[15:]) > calibration.limit
    assert unknown["run"] == alarms.sum()
    stored = json.loads((half_calibrated / "metrics.json").read_text())["calibration"]
    assert stored["false_alarms"] == alarms.mean()


def test_the_training_embeddings_are_made_by_the_model(tmp_path, half_run, run, blobs, traced):
    export(half_run, blobs, tmp_path / "out")
    own, labels = np.load(run / "embeddings.npy")[:15], blobs.labels[:15].numpy()
    for label in range(len(CLASS_NAMES)):
        found = traced[0].get_buffer(f"class_{label}")
        np.testing.assert_allclose(found, own[labels == label], atol=1e-5)


def test_what_the_precision_changes_is_counted(tmp_path, half_run, run, blobs, traced, monkeypatch):
    known, reference = read_predictions(run / "predictions.csv"), read_reference(half_run, blobs)

    def counts(of_run):
        right = [int((each == known.truth).sum()) for each in (known.predicted, of_run)]
        return {"right": dict(zip(("model", "run"), right, strict=True))} | {
            "answered_otherwise": int((of_run != known.predicted).sum())
        }

    # Other answers of the run to as many slices as make the three counts differ.
    for changed in range(1, 10):
        of_run = known.predicted.copy()
        of_run[:changed] = (of_run[:changed] + 1) % 3
        expected = counts(of_run)
        if len({expected["answered_otherwise"], *expected["right"].values()}) == 3:
            break
    else:
        pytest.fail("no answers tell the counts apart")
    places = [int((reference.labels == label).nonzero()[0]) for label in of_run]
    asked = []

    def of_precision(network, images, precision, views):
        asked.append(precision)
        return reference.embeddings[places]

    monkeypatch.setattr(prediction, "embed", of_precision)
    described = export(half_run, blobs, tmp_path / "out")
    assert asked == [torch.bfloat16]
    assert described["precision"] == {"model": "float32", "run": "bfloat16"}
    unknown = described["held_out"].pop("called_unknown")
    assert unknown["model"] == unknown["run"] == reference.unknown(blobs.images[15:]).sum()
    assert described["held_out"] == {"slices": 9, **expected}


def test_the_answers_counted_are_those_of_the_files(run, blobs, tmp_path, monkeypatch):
    """Of the worse one: its probabilities may differ by little, and be those of another class."""
    original = export_module._run_onnx

    def other(content):
        answer = original(content)

        def answers(images):
            embedding, probabilities, distance = answer(images)
            return embedding, 1 - probabilities, distance

        return answers

    monkeypatch.setattr(export_module, "_run_onnx", other)
    monkeypatch.setattr(export_module, "_largest_difference", lambda *_: {})
    known = read_predictions(run / "predictions.csv")
    held_out = export(run, blobs, tmp_path / "out")["held_out"]
    assert held_out["answered_otherwise"] == len(known.truth) == held_out["slices"]
    assert held_out["right"]["run"] == (known.predicted == known.truth).sum()
    assert held_out["right"]["model"] < held_out["right"]["run"]


def test_what_the_precision_changes_is_said_in_a_line():
    description = {
        "synthetic": False,
        "precision": {"model": "float32", "run": "bfloat16"},
        "held_out": {
            "slices": 50,
            "right": {"model": 41, "run": 43},
            "answered_otherwise": 7,
            "called_unknown": {"model": 3, "run": 2},
        },
    }
    expected = (
        "the model computes in float32, the run in bfloat16: of 50 held-out slices 7 get another "
        "answer; 41 answers are right, the run's 43; 3 are called unknown, by the run 2"
    )
    assert describe_export(description) == expected
    assert describe_export({**description, "synthetic": True}) == f"SYNTHETIC: {expected}"


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (2, [1, 1]), (33, [1, 32]), (70, [1, 32, 32, 5])]
)
def test_files_are_checked_on_one_slice_and_on_several(count, sizes):
    images = torch.rand(count, 1, 2, 2).half()
    asked = []
    answer = lambda part: (asked.append(part) or part,)  # noqa: E731
    found = export_module._run(answer, images, ["out"])
    assert [len(part) for part in asked] == sizes
    torch.testing.assert_close(torch.cat(asked), images.float(), rtol=0, atol=0)
    assert torch.equal(found["out"], images.float())


@pytest.mark.parametrize(("expected", "refused"), [(0.9, True), (30.0, False)])
def test_large_distances_may_differ_by_more(expected, refused):
    outputs = {"distance": torch.full((3,), expected)}
    tolerances = {"distance": torch.tensor(1e-3)}
    found = {"distance": outputs["distance"] + 3e-3}
    with pytest.raises(UserError, match="its distance differs") if refused else nullcontext():
        export_module._largest_difference("model", found, outputs, tolerances)


# ------------------------------------------------------------------------- all three files or none

NAMES = ["model.pt2", "model.onnx", "model.json"]


@pytest.fixture
def before(tmp_path):
    """A folder with the files of an earlier export."""
    for name in NAMES:
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("before")
    return tmp_path / "out"


def assert_unchanged(folder):
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
        NAMES, "before"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="has /dev/full")
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_fills_changes_no_file(before, run, blobs, traced, name):
    (before / f"{name}.partial").symlink_to("/dev/full")
    fault = f"{name}: cannot be written: {os.strerror(errno.ENOSPC)}$"
    with pytest.raises(UserError, match=fault):
        export(run, blobs, before)
    assert_unchanged(before)


@pytest.mark.parametrize("stored", [0, 1, 2])
def test_a_disk_that_fills_late_changes_no_file(before, run, blobs, traced, monkeypatch, stored):
    calls = []

    def refuse(descriptor):
        calls.append(descriptor)
        if len(calls) > stored:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=f"{NAMES[2 - stored]}: cannot be written"):
        export(run, blobs, before)
    assert_unchanged(before)


def test_the_description_is_renamed_last(before, run, blobs, traced, monkeypatch):
    renamed, replace = [], Path.replace

    def spy(path, target):
        assert all((before / f"{name}.partial").exists() for name in NAMES[len(renamed) :])
        renamed.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", spy)
    export(run, blobs, before)
    assert logging.getLogger().isEnabledFor(logging.WARNING)  # the exporters' alone are silenced
    assert renamed == NAMES
    assert (before / "model.pt2").read_bytes() == b"torch"
    assert (before / "model.onnx").read_bytes() == b"onnx"
    assert json.loads((before / "model.json").read_text())["run"] == "run"
    assert sorted(path.name for path in before.iterdir()) == sorted(NAMES)

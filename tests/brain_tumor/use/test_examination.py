"""Calibrated answers for files, strange pictures, and the pointing game, on blobs."""

import csv
import dataclasses
import io
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from examples.brain_tumor.__main__ import main
from examples.brain_tumor.data.matlab import Slice
from examples.brain_tumor.data.phantoms import make_phantoms
from examples.brain_tumor.data.slices import load_slices
from examples.brain_tumor.data.splits import make_split
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation.calibration import calibrated, cross_fit, read_calibration
from examples.brain_tumor.evaluation.evaluate import early_features, evaluate, read_predictions
from examples.brain_tumor.evaluation.metrics import reliability
from examples.brain_tumor.files import read_json
from examples.brain_tumor.report.examination_tables import pointing_table, strange_table
from examples.brain_tumor.report.run_report import write_report
from examples.brain_tumor.settings import load_settings, override_settings
from examples.brain_tumor.training.loop import train
from examples.brain_tumor.use import examination, prediction
from examples.brain_tumor.use.examination import (
    SHIPPED,
    examine,
    judge_strange,
    point,
    strange_pictures,
)
from examples.brain_tumor.use.prediction import describe_prediction, predict, read_reference


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("calibrated") / "run"


@pytest.fixture
def run(made, scaled, tiny_settings, held_split):
    """A run that held three slices out, evaluated."""
    if not made.exists():
        train(override_settings(tiny_settings, {"epochs": 30}), scaled, held_split, made)
        evaluate(made, scaled)
    return made


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr(prediction, "plot_prediction", lambda *given, **words: None)


def files_of(monkeypatch, scaled, tmp_path):
    """Files that read as the blobs do, and one of noise."""
    pictures = {
        f"{n}.mat": scaled.images[i, 0].float().numpy() for i, n in enumerate(scaled.numbers)
    }
    pictures["noise.mat"] = np.random.default_rng(0).random((32, 32))
    monkeypatch.setattr(prediction, "_read_file", lambda path: (pictures[path.name], None, None))
    return {name: tmp_path / name for name in pictures}


def test_evaluation_keeps_a_calibration_and_says_how_it_does(run, scaled):
    stored, predictions = read_json(run / "metrics.json"), read_predictions(run / "predictions.csv")
    calibration = read_calibration(run / "calibration.npz")
    assert calibration.epoch == 30
    assert stored["calibration"]["slices"] == 3
    assert stored["calibration"]["exponent"] == calibration.exponent
    sure = calibrated(predictions.scores, calibration.exponent).max(1)
    bins = reliability(sure, predictions.truth == predictions.predicted)
    assert stored["calibration"]["error"] == pytest.approx(bins.error, abs=1e-4)
    near = {int(row) for row in column(run / "predictions.csv", "nearest_training_slice")}
    assert near <= set(range(1, 13))  # not those held out
    report = write_report(run).read_text()
    assert "## SYNTHETIC: Calibration" in report
    assert "by a limit set for 5 % of the held-out ones" in report  # of three, 5 % cannot be
    assert "So few held-out slices are no calibration to rely on." in report


def column(path, name):
    with path.open(newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def test_answers_are_calibrated_and_noise_is_unknown_first(
    run, scaled, tmp_path, monkeypatch, undrawn
):
    files = files_of(monkeypatch, scaled, tmp_path)
    (known, strange), _ = predict(
        run, [files["20.mat"], files["noise.mat"]], scaled, tmp_path / "out"
    )
    scores = read_predictions(run / "predictions.csv").scores
    exponent = read_json(run / "metrics.json")["calibration"]["exponent"]
    expected = calibrated(scores[[4]], exponent)[0]
    assert list(known.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-3)
    assert known.calibrated
    assert "not calibrated" not in describe_prediction(known)
    assert strange.unknown
    line = describe_prediction(strange)
    answer = f"unknown, unlike the slices trained on; the nearest class is {strange.predicted} ("
    assert line.startswith(f"SYNTHETIC: {tmp_path}/noise.mat: {answer}")


def test_the_limit_decides_what_is_unknown(run, scaled, tmp_path, monkeypatch, undrawn):
    files = files_of(monkeypatch, scaled, tmp_path)
    reference = read_reference(run, scaled)
    for limit, unknown in ((-1.0, True), (np.inf, False)):
        moved = dataclasses.replace(reference.calibration, limit=limit)
        given = dataclasses.replace(reference, calibration=moved)
        monkeypatch.setattr(prediction, "read_reference", lambda *_, given=given: given)
        (answer,), _ = predict(run, [files["20.mat"]], scaled, tmp_path / "out")
        assert answer.unknown is unknown
        assert describe_prediction(answer).count("unknown") == unknown


def test_a_calibration_of_another_epoch_is_refused(run, scaled, monkeypatch):
    old = dataclasses.replace(read_calibration(run / "calibration.npz"), epoch=29)
    monkeypatch.setattr(prediction, "read_calibration", lambda path: old)
    with pytest.raises(UserError, match=r"calibration\.npz: belongs to epoch 29"):
        read_reference(run, scaled)


def test_strange_pictures_are_of_each_kind_and_their_scores_sklearns(run, scaled, monkeypatch):
    pytest.importorskip("pydicom", reason="an extra, with pictures of its own")
    monkeypatch.setattr(examination, "MADE", 3)
    reference = read_reference(run, scaled)
    kinds = dict(strange_pictures(reference))
    assert list(kinds) == [
        *("noise", "smooth noise", "photographs", "text", *SHIPPED),
        *("slices, inverted", "slices, turned by 90 degrees", "slices, patches shuffled"),
        *("slices, gamma 0.4", "slices, gamma 2.5"),
    ]
    for name, pictures in kinds.items():
        assert pictures.shape[1:] == (1, 32, 32), name
        assert 0 <= pictures.min() < pictures.max() <= 1, name
    slices = scaled.images[reference.test[np.random.default_rng(0).permutation(9)]]
    assert sorted(map(float, kinds["slices, inverted"].sum((1, 2, 3)))) == pytest.approx(
        sorted(1024 - float(one.float().sum()) for one in slices), rel=1e-2
    )
    for gamma in (0.4, 2.5):
        darker = kinds[f"slices, gamma {gamma}"].float() ** (1 / gamma)
        torch.testing.assert_close(darker, 1 - kinds["slices, inverted"].float(), atol=0.01, rtol=0)
    shuffled = kinds["slices, patches shuffled"]
    turned = kinds["slices, turned by 90 degrees"].rot90(-1, (2, 3))
    assert not torch.equal(shuffled, turned)
    assert torch.equal(shuffled.flatten(1).sort().values, turned.flatten(1).sort().values)

    found = judge_strange(reference)
    assert (found["limit"], found["test_slices"]) == ("held-out slices", 9)
    familiarity = reference.calibration.familiarity
    features = [
        familiarity.distances(early_features(reference.network, pictures).numpy())
        for pictures in (scaled.images[reference.test], kinds["noise"])
    ]
    truth = np.repeat([0, 1], [9, 3])
    noise = found["kinds"]["noise"]
    assert noise["auroc"]["Mahalanobis, early features"] == pytest.approx(
        roc_auc_score(truth, np.concatenate(features))
    )
    assert noise["flagged"] == (features[1] > reference.calibration.limit).mean()
    assert found["false_alarms"] == (features[0] > reference.calibration.limit).mean()
    table = strange_table(found)
    assert [row[0] for row in table.rows] == ["test slices", *kinds]
    assert table.rows[0][1:3] == ["9", f"{100 * found['false_alarms']:.1f} %"]
    assert "that of 5 % of the held-out slices" in table.caption


def test_without_held_out_slices_the_limit_is_not_set_on_the_test_side(
    tmp_path, tiny_settings, scaled, blob_split, monkeypatch
):
    monkeypatch.setattr(examination, "MADE", 3)
    monkeypatch.setattr(examination, "SHIPPED", {})
    train(tiny_settings, scaled, blob_split, tmp_path / "run")
    reference = read_reference(tmp_path / "run", scaled)
    features = early_features(reference.network, scaled.images).numpy()
    expected = cross_fit(features[:15], scaled.patients[:15], epoch=2)
    found = judge_strange(reference)
    assert (found["limit"], found["test_slices"]) == ("cross-fitted", 9)
    assert found["false_alarms"] == expected.unlike(features[15:]).mean()
    noise = early_features(reference.network, dict(strange_pictures(reference))["noise"]).numpy()
    assert found["kinds"]["noise"]["flagged"] == expected.unlike(noise).mean()
    few = dataclasses.replace(reference, test=reference.test[:3])
    assert judge_strange(few)["kinds"]["noise"]["flagged"] == found["kinds"]["noise"]["flagged"]
    table = strange_table(found)
    assert "5 % of the training slices, each by a fit to four fifths" in table.caption
    assert "of the test slices themselves" not in table.caption


@pytest.mark.parametrize(
    ("calibrated", "words"), [(True, "of the held-out slices"), (False, "of the test slices them")]
)
def test_what_an_older_version_found_is_told_as_it_was(calibrated, words):
    kind = {"pictures": 60, "flagged": 0.99, "auroc": {"nearest": 0.5}}
    found = {"calibrated": calibrated, "false_alarms": 0.05, "kinds": {"noise": kind}}
    table = strange_table(found)
    assert table.rows == [["noise", "60", "99 %", "0.500"]]
    assert f"5 % {words}" in table.caption


def test_pictures_that_packages_ship_are_upright_heads_and_other_parts():
    pytest.importorskip("pydicom", reason="an extra")
    sizes = {kind: [one.shape for one in read()] for kind, read in SHIPPED.items()}
    assert [len(shapes) for shapes in sizes.values()] == [1, 1, 1, 30, 60]
    brain = SHIPPED["healthy brain without contrast agent (MNI T1, no skull)"]()
    axial = brain[-5]
    rows, columns = np.nonzero(axial > 0.2)
    assert np.ptp(rows) > 1.1 * np.ptp(columns)  # the face is up
    widths = (brain[14] > 0.2).sum(1)  # coronal, through the brain stem, which is below
    inside = widths[widths > 0]
    assert inside[10] > 1.5 * inside[-10]


def no_sample(name):
    raise FileNotFoundError(f"no {name}")


@pytest.mark.parametrize(("package", "word"), [("pydicom", "pydicom"), ("nilearn", "MNI")])
def test_kinds_of_missing_packages_are_left_out_in_a_line(
    run, scaled, monkeypatch, capsys, package, word
):
    pytest.importorskip("pydicom", reason="an extra")
    monkeypatch.setattr(examination, "MADE", 1)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(examination.cbook, "get_sample_data", no_sample)
    kinds = [kind for kind, _ in strange_pictures(read_reference(run, scaled))]
    left_out = ["head MRI of Matplotlib", *(kind for kind in SHIPPED if word in kind)]
    assert set(SHIPPED) - set(kinds) == set(left_out)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": left out: ")[0] for line in lines] == left_out


def test_what_is_no_slice_is_unknown_to_a_run_on_phantoms(tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(examination, "MADE", 10)
    make_phantoms(tmp_path / "data", 90, seed=0, size=64, progress=False)
    small = {"image_size": 48, "width": 0.25, "embedding_size": 16, "batch_size": 16, "epochs": 2}
    settings = load_settings("quick", {**small, "precision": "float32", "calibration": 0.2})
    slices = load_slices(tmp_path / "data", 48, progress=False)
    run = tmp_path / "run"
    train(settings, slices, make_split(settings.data, slices), run)
    evaluate(run, slices)
    reference = read_reference(run, slices)
    kinds = dict(strange_pictures(reference))
    pictures = {
        **{name: kinds[name] for name in ("noise", "text", "slices, inverted")},
        "black": torch.zeros(1, 1, 48, 48),
        "shuffled": kinds["slices, patches shuffled"],
        "slices": slices.images[reference.test],
    }
    distances = {
        name: reference.calibration.familiarity.distances(
            early_features(reference.network, one).numpy()
        )
        for name, one in pictures.items()
    }
    own = distances["slices"]
    for one in (found for name, found in distances.items() if name != "slices"):
        truth = np.repeat([0, 1], [len(own), len(one)])
        assert roc_auc_score(truth, np.concatenate([own, one])) > 0.85
    flagged = {name: one > reference.calibration.limit for name, one in distances.items()}
    shares = {name: one.mean() for name, one in flagged.items()}
    assert min(shares[one] for one in ("text", "slices, inverted")) == 1
    assert shares["slices"] < 0.2
    if torch.__version__.startswith("2.6"):
        pytest.skip("torch 2.6: so short a training rounds to one that flags 9 of 10 of noise")
    assert min(shares[one] for one in ("noise", "black")) == 1
    assert shares["shuffled"] > 0.5
    Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64), dtype=np.uint8)).save(
        tmp_path / "noise.png"
    )
    (answer,), _ = predict(run, [tmp_path / "noise.png"], slices, tmp_path / "out")
    assert describe_prediction(answer).startswith(f"SYNTHETIC: {tmp_path}/noise.png: unknown, ")


def test_hottest_points_are_counted_against_the_outline(run, scaled, tmp_path, monkeypatch):
    reference = read_reference(run, scaled)
    heat = np.zeros((32, 32))
    heat[8, 8] = 1.0  # within the blobs of the first class alone
    monkeypatch.setattr(prediction, "grad_cam", lambda *given: heat)
    for number in scaled.numbers:
        (tmp_path / f"{number}.mat").touch()

    def read(path):
        index = int(path.stem) - 1
        image = scaled.images[index, 0].float().numpy()
        return Slice(image, int(scaled.labels[index]), "p", np.zeros((0, 2)), image > 0.6)

    monkeypatch.setattr(examination, "read_slice", read)
    text = point(reference, tmp_path)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [int(row["slice"]) for row in rows] == list(range(16, 25))
    for row in rows:
        index = int(row["slice"]) - 1
        assert row["inside"] == str(int(scaled.labels[index] == 0))
        assert int(row["tumour_area"]) == int((scaled.images[index, 0].float() > 0.6).sum())
        assert int(row["tumour_area"]) <= int(row["head_area"]) <= 32 * 32
    (tmp_path / "pointing.csv").write_text(text)
    table = pointing_table({"m": [tmp_path / "pointing.csv"]})
    assert table.rows[0][:4] == ["m", "all", "9", "33.3 %"]
    heat[:] = 0.3  # the same everywhere
    rows = list(csv.DictReader(io.StringIO(point(reference, tmp_path))))
    assert {row["inside"] for row in rows} == {""}


def test_pointing_by_size_of_tumour_and_chance(tmp_path):
    path = tmp_path / "pointing.csv"
    lines = ["slice,truth,predicted,tumour_area,head_area,inside"]
    lines += [
        f"{n},glioma,glioma,{10 * n},1000,{'' if n == 1 else int(n > 4)}" for n in range(1, 7)
    ]
    path.write_text("\n".join(lines) + "\n")
    rows = pointing_table({"m": [path]}).rows
    assert [row[1:4] for row in rows] == [
        ["all", "6", "33.3 %"],
        ["small", "2", "0.0 %"],
        ["medium", "2", "0.0 %"],
        ["large", "2", "100.0 %"],
    ]
    assert [row[5] for row in rows] == ["3.5 %", "1.5 %", "3.5 %", "5.5 %"]
    path.write_text("slice\n1\n")
    with pytest.raises(UserError, match=r"pointing\.csv"):
        pointing_table({"m": [path]})


def test_what_cannot_be_reported_is_refused_at_once(run, scaled, tmp_path, monkeypatch):
    monkeypatch.setattr(examination, "judge_strange", lambda reference: pytest.fail("minutes"))
    own = shutil.copytree(run, tmp_path / "run")
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8)
    for name in ("glioma", "meningioma"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "data" / name / "1.png")
    with pytest.raises(UserError, match="pictures have no outlines"):
        examine(own, scaled, tmp_path / "data")
    (own / "metrics.json").unlink()
    with pytest.raises(UserError, match="is not evaluated yet"):
        examine(own, scaled, tmp_path / "data")
    assert not (own / "strange.json").exists()


def test_refusals_come_one_a_line(capsys, monkeypatch, tmp_path, run, scaled):
    monkeypatch.setattr("examples.brain_tumor.__main__._load", lambda folder, settings: scaled)
    names = ["a.png", "b.mat", "c.jpg"]
    arguments = ["predict", run, *(tmp_path / name for name in names), "--data", tmp_path]
    code = main([*map(str, arguments), "--out", str(tmp_path / "out")])
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"error: {tmp_path / name}: ")
        assert ";" not in line

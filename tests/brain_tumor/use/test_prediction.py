"""Answers for single files, what they rest on, Grad-CAM, and the figure."""

import csv
import dataclasses
import json
import pickle
import shutil
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from examples.brain_tumor.data.slices import CLASS_NAMES
from examples.brain_tumor.data.splits import Split
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation import evaluate as evaluation_module
from examples.brain_tumor.evaluation.calibration import cross_fit
from examples.brain_tumor.evaluation.evaluate import early_features, embed, evaluate
from examples.brain_tumor.network.mobilenet import EmbeddingNetwork
from examples.brain_tumor.report.figures.run import plot_prediction
from examples.brain_tumor.settings import NetworkSettings, override_settings
from examples.brain_tumor.training.loop import train
from examples.brain_tumor.use import prediction as prediction_module
from examples.brain_tumor.use.gradcam import Overlap, grad_cam, measure_overlap
from examples.brain_tumor.use.prediction import NOTICE, describe_prediction, predict, read_reference


@pytest.fixture(scope="module")
def trained():
    """Where the one run of this module lies, once it is trained."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


@pytest.fixture
def run(tmp_path, trained, scaled, blob_split, tiny_settings):
    """A run of one's own to break, evaluated."""
    if not trained.exists():
        settings = override_settings(tiny_settings, {"precision": "float32", "epochs": 30})
        train(settings, scaled, blob_split, trained)
        evaluate(trained, scaled)
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def drawn(monkeypatch):
    """What would be drawn, for it takes long: the arguments of each figure."""
    figures = []
    monkeypatch.setattr(
        prediction_module, "plot_prediction", lambda *given, **words: figures.append((given, words))
    )
    return figures


def write_mat(folder, slices, index, mask=None):
    """A slice as a file of the archive."""
    image = slices.images[index, 0].float().numpy()
    mask = image > 0.6 if mask is None else mask
    path = folder / f"{slices.numbers[index]}.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        group = file.create_group("cjdata")
        group["image"] = image.T
        group["label"] = np.array([[slices.labels[index].item() + 1.0]])
        group["PID"] = np.array([[ord("7")]], np.uint16)
        group["tumorBorder"] = np.ones((1, 8))
        group["tumorMask"] = mask.T.astype(np.uint8)
    return path


def write_png(path, slices, index):
    pixels = slices.images[index, 0].float().numpy()
    Image.fromarray((255 * pixels).round().astype(np.uint8)).save(path, "PNG")
    return path


def test_answers_are_those_of_the_evaluation(tmp_path, run, scaled, drawn):
    files = [write_mat(tmp_path, scaled, index) for index in range(15, 24)]
    answers, faults = predict(run, files, scaled, tmp_path / "out")
    assert faults == []
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(answers) == len(rows) == 9
    for answer, row in zip(answers, rows, strict=True):
        assert answer.predicted == row["predicted"]
        assert answer.truth == row["truth"]
        assert answer.itself is None
        assert answer.neighbours[0].number == int(row["nearest_training_slice"])
        assert answer.neighbours[0].cosine == pytest.approx(float(row["cosine"]), abs=1e-4)
        weights = np.exp([30 * float(row[f"score_{name}"]) for name in CLASS_NAMES])
        shares = dict(zip(CLASS_NAMES, weights / weights.sum(), strict=True))
        assert answer.probabilities == pytest.approx(shares, abs=1e-4)


def test_equally_near_slices_answer_as_in_the_evaluation(tmp_path, run, scaled, drawn, monkeypatch):
    unit = F.normalize(torch.arange(1.0, 17)[None])
    for module in (evaluation_module, prediction_module):
        monkeypatch.setattr(
            module, "embed", lambda network, images, *_: unit.repeat(len(images), 1)
        )
    evaluate(run, scaled)
    with (run / "predictions.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    (answer,), _ = predict(run, [write_mat(tmp_path, scaled, 15)], scaled, tmp_path / "out")
    assert [one.number for one in answer.neighbours] == [1, 2, 3, 4, 5]
    assert (row["nearest_training_slice"], row["predicted"]) == ("1", answer.predicted)


def test_the_neighbours_are_sklearns(tmp_path, run, scaled, drawn):
    answers, _ = predict(run, [write_mat(tmp_path, scaled, 20)], scaled, tmp_path / "out")
    embeddings = np.load(run / "embeddings.npy")
    labels = scaled.labels.numpy()
    search = KNeighborsClassifier(n_neighbors=5).fit(embeddings[:15], labels[:15])
    distances, rows = search.kneighbors(embeddings[20:21])
    found = answers[0].neighbours
    assert [one.number for one in found] == (rows[0] + 1).tolist()
    assert [one.label for one in found] == [CLASS_NAMES[labels[row]] for row in rows[0]]
    cosines = [one.cosine for one in found]
    assert cosines == pytest.approx((1 - distances[0] ** 2 / 2).tolist(), abs=1e-4)


def test_a_training_slice_is_told_from_all_others(tmp_path, run, scaled, drawn):
    files = [
        write_mat(tmp_path, scaled, 2),
        write_png(tmp_path / "eight bits", scaled, 2),
        write_mat(tmp_path, scaled, 17),
        write_png(tmp_path / "changed", scaled, 2),
    ]
    with Image.open(files[3]) as picture:
        pixels = np.asarray(picture).copy()
    pixels[5, 5] ^= 2  # 8-bit levels; rounding moves one by half at most
    Image.fromarray(pixels).save(files[3], "PNG")
    answers, _ = predict(run, files, scaled, tmp_path / "out")
    assert [answer.itself for answer in answers] == [3, 3, None, None]
    assert answers[0].neighbours[0].number == 3
    assert answers[0].neighbours[0].cosine == pytest.approx(1, abs=1e-5)
    assert "it is training slice 3 itself" in describe_prediction(answers[0])
    assert "itself" not in describe_prediction(answers[2])
    assert [answer.truth for answer in answers] == ["pituitary", None, "pituitary", None]


def test_a_training_slice_is_found_among_many(run, scaled):
    images = torch.rand(300, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    many = dataclasses.replace(scaled, images=images, numbers=list(range(1000, 1300)))
    reference = dataclasses.replace(
        read_reference(run, scaled), slices=many, train=torch.arange(0, 300, 2)
    )
    found = [prediction_module._find_itself(reference, images[i : i + 1]) for i in (0, 1, 256, 298)]
    assert found == [1000, None, 1256, 1298]


def test_one_bad_file_does_not_stop_the_others(tmp_path, run, scaled):
    refused = [tmp_path / f"{'a' * 300}.{kind}" for kind in ("png", "mat")]
    refused += [tmp_path / f"folder.{kind}" for kind in ("png", "mat")]
    for folder in refused[2:]:
        folder.mkdir()
    strange = tmp_path / "a$\\frac{\n\x1b\udcff$é脑.png"
    flat = tmp_path / "flat.png"
    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(flat)
    files = [
        tmp_path / "missing.mat",
        write_png(strange, scaled, 20),
        write_png(tmp_path / f"{'b' * 250}.png", scaled, 21),
        flat,
        *refused,
        write_mat(tmp_path, scaled, 16),
        tmp_path / "none\n\x1b.png",
    ]
    answers, faults = predict(run, files, scaled, tmp_path / "new" / "out")
    assert faults[:2] == [
        f"{files[0]}: no such file",
        f"{flat}: is of one grey value throughout, expected a slice",
    ]
    for fault, file in zip(faults[2:-1], refused, strict=True):
        assert fault.startswith(f"{file}: ")
    assert faults[-1] == f"{tmp_path / 'none__.png'}: no such file"
    assert [answer.file for answer in answers] == [str(files[i]) for i in (1, 2, -2)]
    assert all(fault.isprintable() for fault in faults)
    stored = json.loads((tmp_path / "new" / "out" / "predictions.json").read_text())
    assert stored["notice"] == NOTICE
    assert (stored["synthetic"], stored["run"], stored["epoch"]) == (True, "run", 30)
    assert stored["faults"] == faults
    assert stored["predictions"] == json.loads(json.dumps(list(map(dataclasses.asdict, answers))))
    assert stored["predictions"][0]["overlap"] is None  # a PNG has no mask
    for answer in answers:
        assert (tmp_path / "new" / "out" / answer.picture).read_bytes().startswith(b"\x89PNG")
        line = describe_prediction(answer)
        assert line.isprintable()
        assert line.startswith("SYNTHETIC: ")
        assert f": {answer.predicted} (" in line
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {
        "predictions.json",
        answers[0].picture,
        f"3-{'b' * 50}.png",
        "9-17.png",
    }


def test_slices_of_patients_are_not_called_synthetic(
    tmp_path, scaled, blob_split, tiny_settings, drawn
):
    real = dataclasses.replace(scaled, synthetic=False)
    train(tiny_settings, real, blob_split, tmp_path / "run")
    answers, _ = predict(tmp_path / "run", [write_mat(tmp_path, real, 16)], real, tmp_path / "out")
    ((_, title, *_), words), answer = drawn[0], answers[0]
    assert title == f"17.mat: {answer.predicted} (the file says glioma)"
    assert NOTICE in words["notes"]
    assert "SYNTHETIC" not in describe_prediction(answer)


def test_a_file_is_shown_with_its_mark(tmp_path, run, scaled, drawn):
    file = write_mat(tmp_path, scaled, 2)
    answer = predict(run, [file], scaled, tmp_path / "out")[0][0]
    (_, title, image, heat, mask, shares, neighbours), words = drawn[0]
    pixels = scaled.images[2, 0].float().numpy()
    np.testing.assert_array_equal(image, pixels)
    np.testing.assert_array_equal(mask, pixels > 0.6)
    assert heat.shape == image.shape
    assert shares == answer.probabilities
    assert title.startswith("SYNTHETIC: 3.mat: ")
    assert "This file is training slice 3" in words["notes"]
    assert NOTICE in words["notes"]
    np.testing.assert_array_equal(neighbours[0][0], pixels)
    assert neighbours[0][1].startswith("this file: slice 3\npituitary, cosine 1.000")
    for (picture, caption), one in zip(neighbours[1:], answer.neighbours[1:], strict=True):
        np.testing.assert_array_equal(picture, scaled.images[one.number - 1, 0].float())
        assert caption == f"training slice {one.number}\n{one.label}, cosine {one.cosine:.3f}"


@pytest.mark.parametrize("shape", [(1, 40), (90, 17)])
def test_pictures_of_any_shape_are_answered(tmp_path, run, scaled, drawn, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "odd.png")
    answers, faults = predict(run, [tmp_path / "odd.png"], scaled, tmp_path / "out")
    assert faults == []
    assert sum(answers[0].probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["all", "nothing"])
def test_a_mask_of_all_or_nothing(tmp_path, run, scaled, drawn, kind):
    file = write_mat(tmp_path, scaled, 16, np.full((32, 32), kind == "all"))
    answer = predict(run, [file], scaled, tmp_path / "out")[0][0]
    assert answer.overlap in (None, Overlap(1.0, 1.0, None))  # 32 pixels are one cell
    assert kind == "all" or answer.overlap is None


def test_an_empty_map_is_told_from_a_missing_mask(tmp_path, run, scaled, drawn, monkeypatch):
    files = [write_mat(tmp_path, scaled, 16), write_png(tmp_path / "17.png", scaled, 16)]
    for heat in (np.zeros((32, 32)), np.ones((32, 32))):
        monkeypatch.setattr(prediction_module, "grad_cam", lambda *given, heat=heat: heat)
        answers, _ = predict(run, files, scaled, tmp_path / "out")
        stored = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
        empty = not heat.any()
        assert [one["empty_map"] for one in stored] == [empty, empty]
        assert [one["overlap"] is None for one in stored] == [empty, True]
        assert ["Grad-CAM: empty" in describe_prediction(one) for one in answers] == [empty] * 2
        level = "Grad-CAM: the same everywhere" in describe_prediction(answers[0])
        assert level is not empty


# ---------------------------------------------------------------------------- what answers rest on


def spoil(embeddings):
    embeddings[7, 3] = np.nan
    return embeddings


FAULTS = {
    "shape": lambda embeddings: embeddings[:, :8],
    "slices": lambda embeddings: embeddings[:20],
    "type": lambda embeddings: embeddings.astype(np.float64),
    "longer than 1": lambda embeddings: 2 * embeddings,
    "shorter than 1": lambda embeddings: embeddings / 2,
    "NaN": spoil,
    "pickle": lambda embeddings: embeddings.astype(object),
}


@pytest.fixture
def turned(run):
    """The run's embeddings; those stored are turned, so that it shows where they are taken."""
    own = np.load(run / "embeddings.npy")
    np.save(run / "embeddings.npy", np.roll(own, 1, axis=1))
    (run / "SHA256SUMS").unlink()
    return own


def test_stored_embeddings_are_taken(turned, run, scaled):
    taken = read_reference(run, scaled).embeddings
    np.testing.assert_array_equal(taken, np.roll(turned[:15], 1, axis=1))


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_embeddings_are_made_again(turned, run, scaled, fault):
    path = run / "embeddings.npy"
    np.save(path, FAULTS[fault](np.load(path)), allow_pickle=True)
    np.testing.assert_allclose(read_reference(run, scaled).embeddings, turned[:15], atol=1e-5)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("fault", ["missing", "cut off", "bare pickle", "no metrics", "epoch"])
def test_damaged_and_old_embeddings_are_made_again(turned, run, scaled, fault):
    path, metrics = run / "embeddings.npy", run / "metrics.json"
    if fault == "missing":
        path.unlink()
    elif fault == "cut off":
        path.write_bytes(path.read_bytes()[:-5])
    elif fault == "bare pickle":
        path.write_bytes(pickle.dumps(Touch(run / "unpickled")))
    elif fault == "no metrics":
        metrics.unlink()
    else:
        metrics.write_text(metrics.read_text().replace('"epoch": 30', '"epoch": 29'))
    np.testing.assert_allclose(read_reference(run, scaled).embeddings, turned[:15], atol=1e-5)
    assert not (run / "unpickled").exists()


def test_a_reference_holds_the_training_side_only(run, scaled, blob_split):
    reference = read_reference(run, scaled)
    assert reference.train.tolist() == blob_split.train.tolist()
    assert reference.labels.tolist() == scaled.labels[:15].tolist()
    assert (reference.epoch, reference.scale, reference.name) == (30, 30.0, "run")
    assert reference.embeddings.shape == (15, 16)


def test_slices_are_known_by_their_numbers_not_their_places(tmp_path, scaled, tiny_settings, drawn):
    order = torch.from_numpy(np.random.default_rng(0).permutation(24))
    split = Split(train=order[:15], test=order[15:], name="mixed", description="By chance.")
    slices = dataclasses.replace(scaled, numbers=[100 + 7 * index for index in range(24)])
    settings = override_settings(tiny_settings, {"precision": "float32", "epochs": 30, "scale": 7})
    train(settings, slices, split, tmp_path / "run")
    made = read_reference(tmp_path / "run", slices).embeddings
    evaluate(tmp_path / "run", slices)
    reference = read_reference(tmp_path / "run", slices)
    assert reference.train.tolist() == order[:15].tolist()
    assert reference.labels.tolist() == slices.labels[order[:15]].tolist()
    assert reference.scale == 7.0
    own = embed(reference.network, slices.images[order[:15]])
    np.testing.assert_allclose(reference.embeddings, own, atol=1e-5)
    np.testing.assert_allclose(made, own, atol=1e-5)
    files = [write_mat(tmp_path, slices, index) for index in order[:3].tolist()]
    answers, _ = predict(tmp_path / "run", files, slices, tmp_path / "out")
    numbers = [slices.numbers[index] for index in order[:3].tolist()]
    assert [answer.itself for answer in answers] == numbers
    assert [answer.neighbours[0].number for answer in answers] == numbers


def test_everything_is_embedded_in_the_runs_precision(tmp_path, run, scaled, drawn, monkeypatch):
    environment = run / "environment.json"
    environment.write_text(environment.read_text().replace("float32", "bfloat16"))
    (run / "SHA256SUMS").unlink()
    (run / "embeddings.npy").unlink()
    asked = []

    def spy(network, images, precision=torch.float32, views=1):
        asked.append((len(images), precision))
        return embed(network, images, precision, views)

    monkeypatch.setattr(prediction_module, "embed", spy)
    predict(run, [write_mat(tmp_path, scaled, 16)], scaled, tmp_path / "out")
    assert asked == [(15, torch.bfloat16), (1, torch.bfloat16)]


def test_faults_of_the_run_and_the_folder_stop_everything(tmp_path, run, scaled):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is not a folder"):
        predict(run, [], scaled, tmp_path / "file")
    (run / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint.pt"):
        predict(run, [], scaled, tmp_path / "out")
    assert not (tmp_path / "out").exists()


ASTRAY = "the network answers with NaN or infinite numbers: its weights are at fault"


def ruin(run, value):
    """Put a value into every weight of a run's first dense layer."""
    contents = torch.load(run / "checkpoint.pt", weights_only=True)
    contents["network"]["output.0.weight"].fill_(value)
    torch.save(contents, run / "checkpoint.pt")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("stored", [True, False])
def test_a_network_that_answers_with_nan_is_named(tmp_path, run, scaled, drawn, value, stored):
    ruin(run, value)
    file = write_mat(tmp_path, scaled, 16)
    if stored:  # and finite, as of another checkpoint of the same epoch
        answers, faults = predict(run, [file], scaled, tmp_path / "out")
        assert answers == drawn == []
        assert faults == [f"{file}: {ASTRAY}"]
    else:
        (run / "embeddings.npy").unlink()
        with pytest.raises(UserError, match=f"^{run}: {ASTRAY}$"):
            predict(run, [file], scaled, tmp_path / "out")


@pytest.mark.parametrize(
    ("step", "value"),
    [("grad_cam", np.full((32, 32), np.inf)), ("embed", torch.full((1, 16), np.nan))],
)
def test_a_step_that_overflows_is_refused(tmp_path, run, scaled, drawn, monkeypatch, step, value):
    monkeypatch.setattr(prediction_module, step, lambda *given, **named: value)
    file = write_mat(tmp_path, scaled, 16)
    answers, faults = predict(run, [file], scaled, tmp_path / "out")
    assert answers == drawn == []
    assert faults == [f"{file}: {ASTRAY}"]


def test_grad_cam_is_of_the_answer_against_the_nearest_of_another_class(
    tmp_path, run, scaled, drawn, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        prediction_module,
        "grad_cam",
        lambda network, image, direction, shape, views: asked.append(direction) or np.ones(shape),
    )
    predict(run, [write_mat(tmp_path, scaled, 20)], scaled, tmp_path / "out")
    embeddings, labels = np.load(run / "embeddings.npy"), scaled.labels.numpy()[:15]
    cosines = embeddings[:15] @ embeddings[20]
    own = cosines.argmax()
    rival = max((i for i in range(15) if labels[i] != labels[own]), key=lambda i: cosines[i])
    np.testing.assert_allclose(asked[0], embeddings[own] - embeddings[rival], atol=1e-6)


def test_faults_alone_are_written_too(tmp_path, run, scaled):
    answers, faults = predict(run, [tmp_path / "none.mat"], scaled, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert stored["predictions"] == answers == []
    assert stored["faults"] == faults == [f"{tmp_path / 'none.mat'}: no such file"]


def test_few_training_slices_are_few_neighbours(tmp_path, run, scaled, drawn, monkeypatch):
    whole = read_reference(run, scaled)
    few = {name: getattr(whole, name)[:3] for name in ("train", "embeddings", "labels")}
    reference = dataclasses.replace(whole, **few)
    monkeypatch.setattr(prediction_module, "read_reference", lambda run, slices: reference)
    file = write_mat(tmp_path, scaled, 16)
    (answer,), _ = predict(run, [file], scaled, tmp_path / "out")
    assert sorted(one.number for one in answer.neighbours) == [1, 2, 3]
    cosines = [one.cosine for one in answer.neighbours]
    assert cosines == sorted(cosines, reverse=True)
    shares = sorted(answer.probabilities.items(), key=lambda item: item[1], reverse=True)
    listed = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares)
    assert f": {answer.predicted} (not calibrated: {listed}; " in describe_prediction(answer)


def test_an_answer_without_a_rival_is_its_own_contrast(run, scaled):
    reference = read_reference(run, scaled)
    alone = dataclasses.replace(reference, labels=torch.zeros_like(reference.labels))
    cosines = reference.embeddings @ reference.embeddings[4]
    direction = prediction_module.contrast(alone, cosines, torch.tensor(4))
    assert torch.equal(direction, reference.embeddings[4])


# ---------------------------------------------------------------------------------------- Grad-CAM


def small_network():
    torch.manual_seed(0)
    network = EmbeddingNetwork(NetworkSettings(width=0.1, embedding_size=6)).double().eval()
    for module in network.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.02, 0.2)
    return network


def test_grad_cam_against_finite_differences():
    network = small_network()
    image = torch.rand(1, 1, 96, 96, dtype=torch.float64)
    direction = torch.randn(6, dtype=torch.float64)
    with torch.no_grad():
        features = network.backbone((2 * image - 1).expand(1, 3, 96, 96))

        def score(changed):
            return (F.normalize(network.output(changed.mean((2, 3))))[0] @ direction).item()

        expected, step = torch.zeros(3, 3, dtype=torch.float64), 1e-6
        for channel in range(features.shape[1]):
            moved = torch.zeros_like(features)
            moved[:, channel] = step
            # All nine cells at once: a ninth of it is the mean of the nine gradients.
            slope = (score(features + moved) - score(features - moved)) / (2 * step) / 9
            expected += slope * features[0, channel]
    heat = grad_cam(network, image, direction, (3, 3))
    assert (expected > 0).any()
    assert (expected < 0).any()  # so that cutting off shows
    np.testing.assert_allclose(heat, expected.clamp(min=0), atol=1e-7 * expected.abs().max().item())


def test_grad_cam_is_spread_over_the_slice_linearly_between_the_cells_middles():
    network = small_network()
    image = torch.rand(1, 1, 96, 96, dtype=torch.float64)
    direction = torch.randn(6, dtype=torch.float64)
    cells = grad_cam(network, image, direction, (3, 3))
    heat = grad_cam(network, image, direction, (60, 90))
    down, across = (
        np.stack(
            [np.interp((np.arange(n) + 0.5) / n, (np.arange(3) + 0.5) / 3, u) for u in np.eye(3)]
        )
        for n in (60, 90)
    )
    np.testing.assert_allclose(heat, down.T @ cells @ across, atol=1e-12 * heat.max())


class Mosaic(torch.nn.Module):
    """Features known by hand: the mean brightness of 4 x 4 cells, and a constant."""

    def forward(self, images, blocks=None):
        bright = F.avg_pool2d(images[:, :1], images.shape[-1] // 4)
        return torch.cat([bright, torch.ones_like(bright)], dim=1)


def test_grad_cam_finds_the_cell_that_speaks_for_the_direction():
    settings = NetworkSettings(width=0.1, embedding_size=6, input_range="unit")
    network = EmbeddingNetwork(settings).eval()
    network.backbone, network.output = Mosaic(), torch.nn.Linear(2, 2)
    torch.nn.init.eye_(network.output.weight)
    torch.nn.init.zeros_(network.output.bias)
    image = torch.zeros(1, 1, 32, 32)
    image[..., 8:16, 16:24] = 1
    image.requires_grad_()  # as a backbone's parameters do
    heat = grad_cam(network, image, torch.tensor([1.0, 0.0]), (32, 32))
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert 8 <= row < 16
    assert 16 <= column < 24
    assert heat[:4].max() == heat[20:].max() == heat[:, :12].max() == heat[:, 28:].max() == 0
    against = grad_cam(network, image, torch.tensor([-1.0, 0.0]), (32, 32))
    assert against[12, 20] < against[0, 0] / 4
    mask = image[0, 0].detach().bool().numpy()
    overlap = measure_overlap(heat, mask)
    # Two ramps of eight pixels each way: the inner halves hold three quarters of each.
    assert overlap == Overlap(pytest.approx(0.75**2), pytest.approx(1 / 16), True)
    assert not measure_overlap(against, mask).hottest_inside


def test_grad_cam_leaves_no_trace():
    network = small_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    grad_cam(network, torch.rand(1, 1, 32, 32).double(), torch.ones(6).double(), (8, 8))
    assert not network.backbone._forward_hooks
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_overlap_by_hand():
    heat = np.array([[0.0, 1.0], [2.0, 5.0]])
    mask = np.array([[False, False], [True, False]])
    assert measure_overlap(heat, mask) == Overlap(0.25, 0.25, False)
    assert measure_overlap(heat, ~mask) == Overlap(0.75, 0.75, True)
    assert measure_overlap(np.zeros((2, 2)), mask) is None
    assert measure_overlap(heat, np.zeros((2, 2), bool)) is None
    patch = np.zeros((9, 9))
    patch[:5, :3] = 1  # as hot everywhere: its middle counts
    middle = np.zeros((9, 9), bool)
    middle[2, 1] = True
    assert measure_overlap(patch, middle) == Overlap(1 / 15, 1 / 81, True)
    box = np.s_[:5, :3]  # as hot in all that the network saw: no point is hotter
    assert measure_overlap(patch, middle, box) == Overlap(1 / 15, 1 / 81, None)
    assert measure_overlap(np.full((9, 9), 0.25), middle) == Overlap(1 / 81, 1 / 81, None)


def test_maps_of_one_cell_have_no_hottest_point(run, scaled):
    reference = read_reference(run, scaled)
    mask = np.zeros((77, 90), bool)
    mask[30:50, 30:60] = True  # the middle, where the hottest point would be
    found = []
    for index in reference.test.tolist():
        direction = prediction_module.contrast(
            reference, reference.embeddings @ reference.embed(scaled.images[[index]])[0], 0
        )
        for each in (direction, -direction):  # one of which has a map above 0
            heat = grad_cam(reference.network, scaled.images[[index]].float(), each, mask.shape)
            found.append(measure_overlap(heat, mask))
    assert {one.hottest_inside for one in found if one} == {None}


# -------------------------------------------------------------------------------------- the figure


@pytest.mark.parametrize(
    ("heat", "title"),
    [(0.0, "Grad-CAM: empty"), (0.3, "Grad-CAM: the same everywhere"), (None, "Grad-CAM")],
)
def test_the_figure_says_what_its_map_is(tmp_path, heat, title):
    figure = draw(tmp_path / "figure.png", with_mask=False, heat=heat)
    assert title in [one.get_text() for one in figure.findobj(Text)]


def draw(path, shape=(32, 40), with_mask=True, count=5, heat=None):
    generator = np.random.default_rng(0)
    image, drawn = generator.random((2, *shape))
    heat = drawn if heat is None else np.pad(np.full((20, 30), heat), 6)[:32, :40]
    mask = np.zeros(shape, bool)
    mask[: (shape[0] + 1) // 2, : shape[1] // 2] = True
    return plot_prediction(
        path,
        "SYNTHETIC: $\\frac{ " + "a long name of a file " * 8,
        image,
        heat,
        mask if with_mask else None,
        {"meningioma": 0.2, "glioma": 0.7, "pituitary": 0.1},
        [(image, f"this file: slice 306{i}\nmeningioma, cosine -0.123") for i in range(count)],
        f"This file is training slice 3064: its answer is no test.\n{'o' * 100}\n{NOTICE}",
        prediction_module.UNCALIBRATED,
    )


@pytest.mark.parametrize(
    ("shape", "with_mask", "count"),
    [((32, 40), True, 5), ((1, 64), False, 3), ((1500, 1100), True, 1)],
)
def test_texts_of_the_figure_are_inside_and_apart(tmp_path, shape, with_mask, count):
    path = tmp_path / "figure.png"
    figure = draw(path, shape, with_mask, count)
    with Image.open(path) as picture:
        width, height = picture.size
    figure.set_dpi(150)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    texts = [one for one in figure.findobj(Text) if one.get_visible() and one.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
    for index, (text, box) in enumerate(boxes):
        assert box.x0 >= -0.5, text
        assert box.y0 >= -0.5, text
        assert box.x1 <= width + 0.5, text
        assert box.y1 <= height + 0.5, text
        for other, further in boxes[index + 1 :]:
            assert not box.padded(-1).overlaps(further.padded(-1)), (text, other)
    shown = "\n".join(text for text, _ in boxes)
    for part in (NOTICE, "SYNTHETIC: $", "70.0 %", "this file: slice 3060"):
        assert part in shown
    assert ("tumour mask outlined" in shown) == with_mask


def test_the_mask_is_outlined_where_it_is(tmp_path):
    figure = draw(tmp_path / "figure.png", (32, 40))
    heat_axes = next(axes for axes in figure.findobj() if "outlined" in title_of(axes))
    (outline,) = (path for one in heat_axes.collections for path in one.get_paths())
    low, high = outline.vertices.min(0), outline.vertices.max(0)
    np.testing.assert_allclose([*low, *high], [-0.5, -0.5, 19.5, 15.5])
    assert heat_axes.get_xlim() == (-0.5, 39.5)


def title_of(artist):
    return artist.get_title() if hasattr(artist, "get_title") else ""


def test_an_empty_map_is_called_so(tmp_path):
    image, empty = np.random.default_rng(0).random((8, 8)), np.zeros((8, 8))
    figure = plot_prediction(
        *(tmp_path / "figure.png", "t", image, empty, None, {"glioma": 1.0}),
        *([(image, "one")], "n", "calibrated"),
    )
    assert any(title_of(axes) == "Grad-CAM: empty" for axes in figure.findobj())


# --------------------------------------------------------------- unlike the slices trained on


def test_without_held_out_slices_noise_is_unknown_too(tmp_path, run, scaled, drawn, monkeypatch):
    asked = []

    def spy(network, images):
        asked.append(len(images))
        return early_features(network, images)

    monkeypatch.setattr(prediction_module, "early_features", spy)
    files = [write_mat(tmp_path, scaled, index) for index in range(15, 24)]
    noise = np.random.default_rng(0).integers(256, size=(32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    answers, _ = predict(run, [*files, tmp_path / "noise.png"], scaled, tmp_path / "out")
    assert asked == [15, *[1] * 10]  # those trained on once, not for each file
    assert not any(answer.calibrated for answer in answers)
    assert answers[-1].unknown
    line = describe_prediction(answers[-1])
    assert "noise.png: unknown, unlike the slices trained on; the nearest class is " in line
    assert "(not calibrated: " in line
    features = early_features(read_reference(run, scaled).network, scaled.images).numpy()
    expected = cross_fit(features[:15], scaled.patients[:15], epoch=30).unlike(features[15:])
    assert [answer.unknown for answer in answers[:-1]] == expected.tolist()
    assert expected.sum() < 9


def test_the_limit_is_fitted_once_for_the_same_weights_and_slices(run, scaled, monkeypatch):
    passes = []

    def spy(network, images):
        passes.append(len(images))
        return early_features(network, images)

    monkeypatch.setattr(prediction_module, "early_features", spy)
    first, again = (read_reference(run, scaled).calibration for _ in range(2))
    assert passes == [15]
    assert again.limit == first.limit
    features = early_features(read_reference(run, scaled).network, scaled.images).numpy()
    np.testing.assert_array_equal(again.unlike(features), first.unlike(features))

    content = (run / "limit.npz").read_bytes()
    (run / "limit.npz").write_bytes(content[:-100])  # damaged
    assert read_reference(run, scaled).calibration.limit == first.limit
    assert (passes, (run / "limit.npz").read_bytes()) == ([15] * 2, content)

    images = scaled.images.clone()
    images[0, 0, 0, 0] += 0.5
    changed = read_reference(run, dataclasses.replace(scaled, images=images)).calibration
    assert (len(passes), changed.limit == first.limit) == (3, False)
    patients = [f"{name}{index}" for index, name in enumerate(scaled.patients)]
    monkeypatch.setattr(prediction_module.run_folder, "_check_split", lambda *given: None)
    read_reference(run, dataclasses.replace(scaled, patients=patients))
    assert len(passes) == 4
    contents = torch.load(run / "checkpoint.pt", weights_only=True)
    contents["network"]["backbone.stem.bn.bias"] += 0.1
    torch.save(contents, run / "checkpoint.pt")
    for _ in range(2):
        assert read_reference(run, scaled).calibration.limit != first.limit
    assert len(passes) == 5


def test_a_limit_that_cannot_be_kept_is_used_all_the_same(run, scaled, capsys):
    (run / "limit.npz").mkdir()
    assert read_reference(run, scaled).calibration.limit > 0
    assert capsys.readouterr().err == (
        f"{run / 'limit.npz'}: cannot be written: Is a directory; "
        "what is unknown will be told from all slices again\n"
    )


def test_early_features_that_are_nan_are_named(run, scaled):
    contents = torch.load(run / "checkpoint.pt", weights_only=True)
    name = next(name for name in contents["network"] if name.startswith("backbone"))
    contents["network"][name].fill_(torch.nan)
    torch.save(contents, run / "checkpoint.pt")
    with pytest.raises(UserError, match=f"^{run}: the network answers with NaN"):
        read_reference(run, scaled)  # whose stored embeddings are sound


# ------------------------------------------------------------------- a new patient's files


def test_the_image_alone_is_enough(tmp_path, run, scaled, drawn):
    path = write_mat(tmp_path, scaled, 20)
    (whole,), _ = predict(run, [path], scaled, tmp_path / "out")
    for name in ("tumorMask", "tumorBorder", "PID", "label"):
        with h5py.File(path, "r+") as file:
            del file["cjdata"][name]
    (bare,), faults = predict(run, [path], scaled, tmp_path / "out")
    assert faults == []
    assert (bare.predicted, bare.neighbours) == (whole.predicted, whole.neighbours)
    assert (bare.truth, bare.overlap) == (None, None)


def test_a_folder_is_its_slices(tmp_path, run, scaled, drawn, capsys):
    folder = tmp_path / "patient"
    (folder / "deeper").mkdir(parents=True)
    paths = [write_mat(folder, scaled, 20), write_png(folder / "deeper" / "a.PNG", scaled, 21)]
    (folder / "notes.txt").touch()
    answers, faults = predict(run, [folder], scaled, tmp_path / "out")
    assert faults == []
    assert {answer.file for answer in answers} == set(map(str, paths))
    assert "notes.txt: no slice by its name" in capsys.readouterr().err


def test_answers_are_not_classified_the_next_time(tmp_path, run, scaled):
    folder = tmp_path / "patient"
    folder.mkdir()
    path = write_mat(folder, scaled, 20)
    for _ in range(2):
        answers, _ = predict(run, [folder], scaled, folder / "answers")
        assert [answer.file for answer in answers] == [str(path)]


def test_names_keep_their_letters(tmp_path, run, scaled):
    (answer,), _ = predict(run, [write_png(tmp_path / "é脑$x.png", scaled, 20)], scaled, tmp_path)
    assert answer.picture == "1-é脑$x.png"
    assert (tmp_path / answer.picture).is_file()


def test_an_interrupted_call_leaves_the_answers_it_has(tmp_path, run, scaled, monkeypatch):
    drawn = []

    def stop(*given, **words):
        drawn.append(given)
        if len(drawn) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(prediction_module, "plot_prediction", stop)
    files = [write_mat(tmp_path, scaled, index) for index in range(15, 20)]
    with pytest.raises(KeyboardInterrupt):
        predict(run, files, scaled, tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [one["file"] for one in stored["predictions"]] == list(map(str, files[:2]))

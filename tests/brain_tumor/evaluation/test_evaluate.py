"""Evaluation: what answers a trained network gives, and what a run keeps of them."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation import evaluate as evaluation_module
from examples.brain_tumor.evaluation.calibration import read_calibration
from examples.brain_tumor.evaluation.classifiers import nearest_rows
from examples.brain_tumor.evaluation.evaluate import (
    class_angles,
    class_scores,
    cosines,
    embed,
    evaluate,
    nearest_neighbour,
    probabilities,
    read_predictions,
)
from examples.brain_tumor.network.mobilenet import EmbeddingNetwork
from examples.brain_tumor.report.run_report import describe_result, write_report
from examples.brain_tumor.settings import override_settings
from examples.brain_tumor.training.checkpoint import load_network
from examples.brain_tumor.training.loop import train


def test_nearest_neighbour_is_sklearns():
    generator = torch.Generator().manual_seed(0)
    train_embeddings, test_embeddings = (
        torch.nn.functional.normalize(torch.randn(n, 16, generator=generator)) for n in (60, 25)
    )
    labels = torch.randint(3, (60,), generator=generator)
    nearest, cosine = nearest_neighbour(train_embeddings, test_embeddings)
    classifier = KNeighborsClassifier(n_neighbors=1).fit(train_embeddings.numpy(), labels.numpy())
    assert labels[nearest].tolist() == classifier.predict(test_embeddings.numpy()).tolist()
    distance, index = classifier.kneighbors(test_embeddings.numpy())
    assert nearest.tolist() == index[:, 0].tolist()
    assert cosine.numpy() == pytest.approx(1 - distance[:, 0] ** 2 / 2, abs=1e-6)


@pytest.mark.parametrize("count", [5, 13, 63, 257, 1001])
def test_of_equally_near_slices_the_first_is_the_nearest(count):
    generator = torch.Generator().manual_seed(count)
    for width in (16, 64, 256):
        one = torch.nn.functional.normalize(torch.randn(1, width, generator=generator))
        same = one.repeat(count, 1)
        assert len(cosines(same, same).unique()) == 1
        for number in (1, 2, 27):
            nearest, _ = nearest_neighbour(same, same[:number])
            assert nearest.tolist() == [0] * len(same[:number])


def test_what_is_much_alike_is_ordered_as_in_double_precision():
    generator = torch.Generator().manual_seed(0)
    apart = 3e-4 * torch.randn(90, 64, generator=generator)
    rows = torch.nn.functional.normalize(torch.randn(64, generator=generator) + apart)
    exact = torch.nn.functional.normalize(rows.double()).numpy()
    expected = (exact[60:] @ exact[:60].T).argsort(axis=1)[:, ::-1]
    assert nearest_neighbour(rows[:60], rows[60:])[0].tolist() == expected[:, 0].tolist()
    found = nearest_rows(rows[:60].numpy(), rows[60:].numpy(), 30)
    assert found.tolist() == expected[:, :30].tolist()


def test_where_all_slices_are_equally_near_one_answers_and_the_report_says_so(
    tmp_path, blobs, held_split, tiny_settings, monkeypatch
):
    """The first class, of which three of seven test slices are, is not the first slice's."""
    split = dataclasses.replace(held_split, train=held_split.train[1:], test=held_split.test[:7])
    run = tmp_path / "run"
    train(override_settings(tiny_settings, {"epochs": 1}), blobs, split, run)
    unit = torch.nn.functional.normalize(torch.arange(1.0, 17)[None])
    monkeypatch.setattr(evaluation_module, "embed", lambda network, x, *_: unit.repeat(len(x), 1))
    assert evaluate(run, blobs).accuracy == pytest.approx(2 / 7)
    predictions = read_predictions(run / "predictions.csv")
    assert set(predictions.nearest) == {2}
    assert set(predictions.predicted) == {1}
    stored = json.loads((run / "metrics.json").read_text())["calibration"]
    assert stored["error"] == pytest.approx(1 / 3 - 2 / 7)
    assert " 7 of them are as near to another class" in describe_result(run)


def test_embeddings_are_unit_vectors_and_do_not_depend_on_the_batch(blobs, tiny_settings):
    torch.manual_seed(0)
    network = EmbeddingNetwork(tiny_settings.network).train()
    together = embed(network, blobs.images)
    alone = torch.cat([embed(network, image[None]) for image in blobs.images])
    assert together.norm(dim=1).numpy() == pytest.approx(np.ones(24), abs=1e-6)
    assert (together - alone).abs().max() < 1e-5


def test_evaluation_and_report_of_a_run(trained, blobs):
    metrics = evaluate(trained, blobs)
    stored = json.loads((trained / "metrics.json").read_text())
    assert stored["confusion"] == metrics.confusion
    assert stored["epoch"] == 2
    assert np.sum(metrics.confusion) == 9
    embeddings = np.load(trained / "embeddings.npy")
    assert (embeddings.shape, embeddings.dtype) == ((24, 16), np.float32)

    with (trained / "predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["slice"]) for row in table] == list(range(16, 25))
    hits = sum(row["truth"] == row["predicted"] for row in table)
    assert hits / 9 == pytest.approx(metrics.accuracy)
    names = ["meningioma", "glioma", "pituitary"]
    for row in table:
        near = int(row["nearest_training_slice"])
        assert near in range(1, 16)
        assert row["predicted"] == names[(near - 1) % 3]  # the class of that slice
        one, other = embeddings[int(row["slice"]) - 1], embeddings[near - 1]
        assert float(row["cosine"]) == pytest.approx(float(one @ other), abs=1e-5)

    report = write_report(trained).read_text()
    for name in ("loss.png", "confusion.png", "early.png"):
        assert f"]({name})" in report
        assert (trained / name).read_bytes().startswith(b"\x89PNG")
    assert "Not a medical device" in report
    assert "By number. 15 slices trained on, 9 tested." in report
    assert report.startswith("# SYNTHETIC: ")


def test_papers_numbers_stand_beside_the_whole_archive_on_its_split_only(trained, blobs):
    evaluate(trained, blobs)
    (trained / "SHA256SUMS").unlink()  # of what is changed here
    split = json.loads((trained / "split.json").read_text())
    settings = (trained / "settings.toml").read_text()
    assert "98.69" not in describe_result(trained)

    def with_paper_row(synthetic, kind, tested):
        described = {**split, "synthetic": synthetic, "test": [0] * tested, "train": [0] * 2144}
        (trained / "split.json").write_text(json.dumps(described))
        (trained / "settings.toml").write_text(settings.replace('"patient"', f'"{kind}"'))
        return describe_result(trained)

    assert "98.69" in with_paper_row(False, "paper", 920)
    assert "95.47" in with_paper_row(False, "paper-swapped", 920)
    settings = settings.replace("margin = 5.0", "margin = 4.0")
    assert "the paper" not in with_paper_row(False, "paper", 920)  # whose table 1 is of m = 5
    settings = settings.replace("margin = 4.0", "margin = 5.0")
    for arguments in ((True, "paper", 920), (False, "patient", 920), (False, "paper", 60)):
        assert "the paper" not in with_paper_row(*arguments)


def test_other_slices_are_refused(trained, blobs):
    blobs.labels[20] = (blobs.labels[20] + 1) % 3
    with pytest.raises(UserError, match=r"split.json: the run was made with other slices"):
        evaluate(trained, blobs)
    blobs.numbers[20] = 100
    with pytest.raises(UserError, match=r"split.json: does not belong to these slices"):
        evaluate(trained, blobs)


@pytest.mark.parametrize("name", ["settings.toml", "split.json", "checkpoint.pt"])
def test_missing_files_of_a_run_are_named(trained, blobs, name):
    (trained / name).unlink()
    with pytest.raises(UserError, match=name):
        evaluate(trained, blobs)


def test_another_networks_checkpoint_is_refused(trained, blobs):
    path = trained / "settings.toml"
    path.write_text(path.read_text().replace("width = 0.25", "width = 0.5"))
    (trained / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"checkpoint.pt: does not fit the network"):
        evaluate(trained, blobs)
    assert not (trained / "metrics.json").exists()


def test_scores_are_cosines_to_the_nearest_of_each_class():
    train = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    test = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    scores = class_scores(train, torch.tensor([0, 0, 1]), test, 3)
    root = 0.5**0.5
    assert scores.numpy() == pytest.approx(np.array([[1, root, -1], [0.8, 1.4 * root, -1]]))


def test_the_largest_score_is_the_nearest_neighbours_class(trained, blobs):
    evaluate(trained, blobs)
    predictions = read_predictions(trained / "predictions.csv")
    own = predictions.scores[np.arange(9), predictions.predicted]
    assert (own == predictions.scores.max(1)).all()
    assert predictions.numbers.tolist() == list(range(16, 25))
    assert predictions.patients.tolist() == [blobs.patients[i] for i in range(15, 24)]
    assert predictions.truth.tolist() == blobs.labels[15:].tolist()


def test_probabilities_by_hand():
    values = probabilities(np.array([[0.9, 0.5, -1.0], [1.0, 1.0, 1.0]]), scale=10.0)
    weights = np.exp([9.0, 5.0, -10.0])
    assert values == pytest.approx(np.array([weights / weights.sum(), [1 / 3] * 3]))


def test_angles_to_the_nearest_of_a_classs_centres():
    centres = [torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[-1.0, 0.0]])]
    angles = class_angles(torch.tensor([[1.0, 0.0], [0.0, -5.0], [1.0, 1.0]]), centres)
    quarter = np.pi / 2
    expected = [[0, 2 * quarter], [quarter, quarter], [quarter / 2, 1.5 * quarter]]
    assert angles.numpy() == pytest.approx(np.array(expected), abs=1e-12)


def test_mirror_images_count_the_same(trained, blobs, tiny_settings):
    """Averaged over both, a slice and its mirror image cannot differ."""
    evaluate(trained, blobs)
    once = read_predictions(trained / "predictions_views2.csv")
    mirrored = blobs.images.flip(3)
    network, _ = load_network(trained, tiny_settings.network)
    assert not torch.equal(embed(network, blobs.images), embed(network, mirrored))
    blobs.images[:] = mirrored
    evaluate(trained, blobs)
    again = read_predictions(trained / "predictions_views2.csv")
    assert again.scores == pytest.approx(once.scores, abs=2e-6)


@pytest.mark.parametrize("loss", ["softmax", "triplet", "subcenter-arcface"])
def test_every_loss_is_evaluated_and_reported(
    tmp_path, blobs, blob_split, tiny_settings, blank_figures, loss
):
    changed = {"loss": loss, "margin": 0.2, "epochs": 20}  # fewer leave BatchNorm no statistics
    train(override_settings(tiny_settings, changed), blobs, blob_split, tmp_path / "run")
    evaluate(tmp_path / "run", blobs)
    angles = np.load(tmp_path / "run" / "angles.npy")
    assert angles.shape == (24, 3)
    assert ((angles > 0) & (angles < np.pi)).all()
    assert "98.69" not in write_report(tmp_path / "run").read_text()


def test_damaged_predictions_are_one_line(trained, blobs):
    evaluate(trained, blobs)
    path = trained / "predictions.csv"
    text = path.read_text()
    damaged = {
        "truncated": text[: len(text) - 12],
        "column": text.replace("score_glioma", "score"),
        "class": text.replace("meningioma,", "meningoma,"),
        "number": text.replace("\n16,", "\nsixteen,"),
        "missing": None,
    }
    for content in damaged.values():
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(UserError, match=r"predictions\.csv: ") as error:
            read_predictions(path)
        assert "\n" not in str(error.value)


def test_a_cell_longer_than_csv_takes_is_one_line(trained, blobs):
    evaluate(trained, blobs)
    (trained / "SHA256SUMS").unlink()  # as of an older version, which kept none
    with (trained / "predictions.csv").open("a") as file:
        file.write('"' + 200_000 * "x")
    with pytest.raises(UserError, match=r"predictions\.csv: not readable as predictions: field"):
        read_predictions(trained / "predictions.csv")


def test_a_training_that_goes_on_meanwhile_changes_nothing(trained, blobs, monkeypatch):
    evaluate(trained, blobs)
    angles = np.load(trained / "angles.npy")
    original = evaluation_module.embed
    contents = torch.load(trained / "checkpoint.pt", weights_only=True)
    later = {**contents, "epoch": 3, "loss": {key: -one for key, one in contents["loss"].items()}}

    def embed_while_training(*arguments, **options):
        torch.save(later, trained / "checkpoint.pt")
        return original(*arguments, **options)

    monkeypatch.setattr(evaluation_module, "embed", embed_while_training)
    evaluate(trained, blobs)
    np.testing.assert_array_equal(np.load(trained / "angles.npy"), angles)


def test_what_was_found_of_a_network_trained_on_since_is_removed(trained, blobs):
    evaluate(trained, blobs)
    for name in ("strange.json", "pointing.csv"):
        (trained / name).touch()
    evaluate(trained, blobs)
    assert (trained / "strange.json").exists()
    (trained / "SHA256SUMS").unlink()  # of what is changed here
    path = trained / "metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "epoch": 1}))
    evaluate(trained, blobs)
    assert not (trained / "strange.json").exists()
    assert not (trained / "pointing.csv").exists()


def test_an_edited_calibration_is_refused(tmp_path, tiny_settings, blobs, held_split):
    run = tmp_path / "run"
    train(tiny_settings, blobs, held_split, run)
    evaluate(run, blobs)
    path = run / "calibration.npz"
    dataclasses.replace(read_calibration(path), limit=1e9).write(path)
    with pytest.raises(UserError, match=r"calibration\.npz: is damaged: it differs from its sum"):
        read_calibration(path)


@pytest.mark.parametrize("text", ["{}", "[]", '{"precision": "float8"}'])
def test_a_run_without_its_precision_is_one_line(trained, blobs, text):
    (trained / "environment.json").write_text(text)
    with pytest.raises(UserError, match=r"environment\.json: no precision"):
        evaluate(trained, blobs)

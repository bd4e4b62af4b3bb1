"""Evaluation: the paper's own confusion matrices must give the paper's own tables."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation import (
    compute_metrics,
    confusion_matrix,
    embed,
    evaluate,
    nearest_neighbour,
    wilson_interval,
)
from examples.brain_tumor.report import describe_result, metrics_row, write_report
from examples.brain_tumor.training import train

# Confusion matrix, and the row of the paper's Table 3 or 5 that it stands behind. All numbers there
# are truncated but one: the glioma F1 of m = 4, .991696, is printed as .9917, and is cut off here.
PAPER_TABLES = {
    "SphereFace, m = 5": (
        [[208, 2, 7], [1, 421, 0], [2, 0, 279]],
        "95.85 99.76 99.28 98.69 .9719 .9964 .9841 .9841 .9869 .9796",
    ),
    "SoftMax": (
        [[207, 1, 9], [3, 418, 1], [0, 0, 281]],
        "95.39 99.05 100.00 98.47 .9695 .9940 .9825 .9820 .9847 .9763",
    ),
    "m = 4": (
        [[208, 3, 6], [4, 418, 0], [1, 0, 280]],
        "95.85 99.05 99.64 98.47 .9674 .9916 .9876 .9822 .9847 .9762",
    ),
    "m = 6": (
        [[204, 2, 11], [2, 420, 0], [1, 0, 280]],
        "94.00 99.52 99.64 98.26 .9622 .9952 .9790 .9788 .9826 .9730",
    ),
}


@pytest.mark.parametrize("name", PAPER_TABLES)
def test_the_papers_matrices_give_the_papers_rows(name):
    confusion, row = PAPER_TABLES[name]
    metrics = compute_metrics(np.array(confusion))
    assert metrics_row(vars(metrics)) == row.split()


def test_metrics_of_a_small_matrix_by_hand():
    metrics = compute_metrics(np.array([[3, 1, 0], [0, 2, 0], [1, 0, 3]]))
    assert metrics.confusion == [[3, 1, 0], [0, 2, 0], [1, 0, 3]]
    assert metrics.accuracy == metrics.f1_micro == pytest.approx(8 / 10)
    assert metrics.recall == pytest.approx([3 / 4, 2 / 2, 3 / 4])
    assert metrics.precision == pytest.approx([3 / 4, 2 / 3, 3 / 3])
    assert metrics.f1 == pytest.approx([6 / 8, 4 / 5, 6 / 7])
    assert metrics.f1_macro == pytest.approx((6 / 8 + 4 / 5 + 6 / 7) / 3)
    # R_K (Gorodkin 2004): (8 x 10 - 4 x 4 - 2 x 3 - 4 x 3) / sqrt((100 - 36) (100 - 34))
    assert metrics.mcc == pytest.approx(46 / (64 * 66) ** 0.5)


def test_absent_classes_count_as_nothing():
    metrics = compute_metrics(np.array([[5, 0, 0], [0, 4, 0], [0, 0, 0]]))
    assert metrics.recall == [1.0, 1.0, 0.0]
    assert metrics.f1 == [1.0, 1.0, 0.0]
    assert (metrics.accuracy, metrics.mcc) == (1.0, 1.0)


def test_wilson_interval_of_the_papers_counts():
    low, high = wilson_interval(908, 920)
    assert (round(100 * low, 2), round(100 * high, 2)) == (97.73, 99.25)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10)[1] == 1.0


def test_confusion_matrix_has_the_truth_in_its_rows():
    counts = confusion_matrix(torch.tensor([0, 0, 2]), torch.tensor([1, 1, 2]), 3)
    assert counts.tolist() == [[0, 2, 0], [0, 0, 0], [0, 0, 1]]


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


def test_embeddings_are_unit_vectors_and_do_not_depend_on_the_batch(blobs, tiny_settings):
    from examples.brain_tumor.checkpoint import make_network

    torch.manual_seed(0)
    network = make_network(tiny_settings.network).train()
    together = embed(network, blobs.images)
    alone = torch.cat([embed(network, image[None]) for image in blobs.images])
    assert together.norm(dim=1).numpy() == pytest.approx(np.ones(24), abs=1e-6)
    assert (together - alone).abs().max() < 1e-5


@pytest.fixture
def trained(tmp_path, blobs, blob_split, tiny_settings):
    out = tmp_path / "blob-run"
    train(tiny_settings, blobs, blob_split, out)
    return out


def test_evaluation_and_report_of_a_run(trained, blobs, blob_split):
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
    for arguments in ((True, "paper", 920), (False, "patient", 920), (False, "paper", 60)):
        assert "the paper" not in with_paper_row(*arguments)


def test_other_slices_are_refused(trained, blobs):
    blobs.labels[20] = (blobs.labels[20] + 1) % 3
    with pytest.raises(UserError, match=r"split.json: the slices are not those"):
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
    with pytest.raises(UserError, match=r"checkpoint.pt: does not fit the network"):
        evaluate(trained, blobs)
    assert not (trained / "metrics.json").exists()

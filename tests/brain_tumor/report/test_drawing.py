"""What the report's sections draw and state, from made-up answers; nothing is drawn here."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from examples.brain_tumor.evaluation.classifiers import Classification
from examples.brain_tumor.report import drawing, paper, records, reproduction_report, tables
from examples.brain_tumor.report.reproduction_report import write_reproduction_report
from examples.brain_tumor.report.tables import TITLES
from examples.brain_tumor.reproduction.plan import PAPER_LOSSES, PROPOSED, SWAPPED
from examples.brain_tumor.reproduction.results import read_reproduction
from tests.brain_tumor.report.made_results import (
    FOLDS,
    LABELS,
    NUMBERS,
    read_answers,
    sides,
    write_reproduction,
)

PROPOSED_FOLDS = [f"patient-{PROPOSED}-fold{fold}" for fold in range(1, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_reproduction(tmp_path_factory.mktemp("made") / "out")


@pytest.fixture
def report(folder):
    return read_reproduction(folder)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return read_reproduction(
        write_reproduction(tmp_path_factory.mktemp("made") / "out", synthetic=True)
    )


@pytest.fixture
def drawn(monkeypatch):
    """What each figure's function was called with, without the path, by the figure's name."""
    calls = {}

    def recorder(path, *arguments, **options):
        calls[path.stem] = (*arguments, *options.values())

    for name in [name for name in vars(drawing) if name.startswith("plot_")]:
        monkeypatch.setattr(drawing, name, recorder)
    return calls


@pytest.fixture
def written(drawn, monkeypatch, few_trees):
    """Writes the report of a folder without drawing anything, and returns its Markdown."""
    monkeypatch.setattr(drawing, "compute_tsne", lambda embeddings, seed: embeddings[:, :2])
    monkeypatch.setattr(reproduction_report, "to_html", lambda title, text, folder: "")

    def write(folder):
        write_reproduction_report(folder)
        return (folder / reproduction_report.REPORT).read_text()

    return write


def headings(text):
    return [line for line in text.splitlines() if line.startswith("#")]


def confusion(folder, names):
    counts = np.zeros((3, 3), int)
    for name in names:
        truth, predicted, *_ = read_answers(folder, name)
        np.add.at(counts, (truth, predicted), 1)
    return counts.tolist()


def wrong_of(folder, name):
    truth, predicted, *_ = read_answers(folder, name)
    return truth != predicted


def sides_of(report, training):
    return sides(report.first(training).run.settings.data)


def test_pictures_come_from_the_file_of_samples(tmp_path, drawn):
    folder = write_reproduction(tmp_path / "out", synthetic=True)
    assert not drawing.samples(read_reproduction(folder))
    np.savez(folder / "samples.npz", **{"glioma axial": np.full((2, 2), 0.5)})
    assert drawing.samples(read_reproduction(folder))
    assert drawing.pipeline(read_reproduction(folder))
    title, pictures = drawn["figure1"]
    assert list(pictures) == [("glioma", "axial")]
    assert title.startswith("SYNTHETIC: ")
    title, settings, pretrained = drawn["figure2"]
    assert (title, pretrained) == ("SYNTHETIC: HSADML, as it was run", False)
    assert (settings.data.image_size, settings.loss.margin) == (32, 5.0)


def test_sections_about_the_paper_are_left_out_for_phantoms(phantoms, drawn, written):
    text = written(phantoms.folder)
    for absent in ("Validation of the metrics", "Figure 7", "Number of epochs", "Contradictions"):
        assert absent not in text
    assert all(one.split(" ", 1)[1].startswith("SYNTHETIC: ") for one in headings(text))
    assert not {"figure7", "length"} & set(drawn)


def test_the_report_of_real_slices_holds_every_section(folder, drawn, written):
    text = written(folder)
    assert [row[1] for row in tables.golden_table(paper.golden_check()).rows] == [
        " ".join(one[1]) for one in paper.golden_check()
    ]
    assert str(tables.golden_table(paper.golden_check())) in text
    for one in (*paper.DEVIATIONS, *paper.CONTRADICTIONS):
        assert f"\n- {one}\n" in text
    assert (
        "\n- Ismael and Abdel-Qader 2018, statistical features: 91.90 %, tumour region given; "
        "abstract, doi:10.1109/EIT.2018.8500308\n"
    ) in text
    assert set(drawn) == {
        one.split("](figures/")[1].split(".png)")[0]
        for one in text.splitlines()
        if "](figures/" in one
    }
    assert "no patient identifiers" not in text
    differences = tables.mcnemar_table(read_reproduction(folder)).rows
    assert f"With {len(differences)} comparisons some p below .05" in text
    for file in ("slice", "patient"):
        error = drawn[f"reliability-{file}"][-1]
        plain, calibrated = re.findall(rf"^Reliability by {file}.*", text, re.MULTILINE)
        assert f"calibration error {100 * error:.1f} %" in plain
        assert "s = 30," in plain
        error = drawn[f"calibrated-{file}"][-1]
        assert f"calibrated: expected calibration error {100 * error:.1f} %" in calibrated


def test_each_of_the_papers_tables_has_its_rows(report):
    made = [
        tables.paper_table(report, tables.SPLITS),
        tables.paper_table(report, tables.LOSSES),
        tables.auc_table(report, tables.LOSSES),
        tables.paper_table(report, tables.MARGINS),
        tables.auc_table(report, tables.MARGINS),
    ]
    names = [[row[0] for row in table.rows[::2]] for table in made]
    by_loss = [TITLES[one] for one in ("softmax", "modified-softmax", "triplet", PROPOSED)]
    by_margin = [TITLES[one] for one in ("sphereface-m4", "sphereface-m6", PROPOSED)]
    expected = [[TITLES[PROPOSED], TITLES[SWAPPED]], by_loss, by_loss, by_margin, by_margin]
    assert names == expected
    assert all(row[0] == "the paper" for table in made for row in table.rows[1::2])


def test_classifiers_of_every_seed_are_averaged(report, written, monkeypatch):
    asked = []

    def classify(report, results):
        every = []
        for result in results:
            asked.append(result.run.name)
            note = "Too good." if len(asked) == 1 else "another seed's"
            answers = result.predictions.truth
            every.append([Classification("ours", f"k = {len(asked)}", answers, note)])
        return every

    monkeypatch.setattr(reproduction_report, "classified", classify)
    text = written(report.folder)
    assert asked[:3] == [f"slice-{PROPOSED}-seed{seed}" for seed in range(3)]
    (row,) = re.findall(r"^\| ours (?:.*\|){14}$", text, re.MULTILINE)
    assert row.split("|")[12].strip() == "3"
    assert "\n- ours: k = 1. Too good.\n\n" in text


@pytest.mark.parametrize("split", ["slice", "patient"])
def test_answers_of_classifiers_are_made_once_and_from_the_runs_sides(
    report, monkeypatch, tmp_path, split
):
    calls = []

    def classify(*arguments, **options):
        calls.append((arguments, options))
        return [Classification("one", "set so", arguments[3], "a note")]

    monkeypatch.setattr(reproduction_report, "classify", classify)
    result = report.first(PROPOSED, split)
    kept = result.folder / reproduction_report.CLASSIFICATIONS
    kept.unlink(missing_ok=True)
    (first,), (again,) = (reproduction_report.classified(report, [result]) for _ in range(2))
    (((train, labels, test, truth), options),) = calls
    own, held = sides(result.run.settings.data)
    embeddings = np.load(result.folder / "embeddings.npy")
    np.testing.assert_array_equal(train, embeddings[own])
    np.testing.assert_array_equal(test, embeddings[held])
    assert (labels.tolist(), truth.tolist()) == (LABELS[own].tolist(), LABELS[held].tolist())
    if split == "slice":
        assert options["groups"] is None
    else:
        assert options["groups"].tolist() == report.slices.patients[own].tolist()
    assert first[0].predicted.tolist() == again[0].predicted.tolist() == truth.tolist()
    assert (again[0].name, again[0].settings, again[0].note) == ("one", "set so", "a note")
    kept.unlink()


def test_curves_and_matrices_are_those_of_seed_0(report, folder, drawn):
    drawing.curves(report)
    trainings = [*PAPER_LOSSES, SWAPPED]
    losses, matrices = drawn["figure3"][1], drawn["figure4"][1]
    assert list(losses) == list(matrices) == [TITLES[one] for one in trainings]
    for training in trainings:
        name = f"slice-{training}-seed0"
        log = (folder / "runs" / name / "log.jsonl").read_text().splitlines()
        assert losses[TITLES[training]] == [json.loads(line)["loss"] for line in log]
        assert matrices[TITLES[training]].tolist() == confusion(folder, [name])


def test_embeddings_of_the_test_slices_are_shown_with_their_errors(
    report, folder, drawn, monkeypatch
):
    monkeypatch.setattr(drawing, "compute_tsne", lambda embeddings, seed: 2 * embeddings[:, :2])
    for kept in folder.glob("runs/*/tsne.npy"):
        kept.unlink()
    assert all(drawing.tsne(report, name) for name in ("figure5", "figure6"))
    monkeypatch.delattr(drawing, "compute_tsne")  # the second time they are read back
    assert all(drawing.tsne(report, name) for name in ("figure5", "figure6"))
    assert list(drawn["figure5"][1]) == [
        TITLES[one] for one in ("softmax", "modified-softmax", "triplet", PROPOSED)
    ]
    assert list(drawn["figure6"][1]) == [
        TITLES[one] for one in ("sphereface-m4", "sphereface-m6", PROPOSED)
    ]
    _, test = sides_of(report, "triplet")
    points, labels, wrong = drawn["figure5"][1][TITLES["triplet"]]
    own = np.load(folder / "runs/slice-triplet-seed0/embeddings.npy")[test]
    np.testing.assert_array_equal(points, 2 * own[:, :2])
    assert labels.tolist() == LABELS[test].tolist()
    assert wrong.tolist() == wrong_of(folder, "slice-triplet-seed0").tolist()


def test_an_interrupted_t_sne_is_computed_again(report, folder, drawn, monkeypatch):
    for kept in folder.glob("runs/*/tsne.npy"):
        kept.unlink()
    monkeypatch.setattr(drawing, "compute_tsne", lambda embeddings, seed: embeddings[:, :2])

    def cut_off(file, *arguments, **options):
        path = file if isinstance(file, Path) else Path(file.name)
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", cut_off)
        with pytest.raises(KeyboardInterrupt):
            drawing.tsne(report, "figure5")
    assert drawing.tsne(report, "figure5")


def test_angles_to_the_own_centre_and_to_the_nearest_other(report, folder, drawn):
    drawing.angles(report)
    _, shown, shown_train, boundary = drawn["angles"]
    every = np.load(folder / f"runs/slice-{PROPOSED}-seed0/angles.npy")
    train, test = sides_of(report, PROPOSED)
    for one, indices in ((shown, test), (shown_train, train)):
        rows = [(every[i][LABELS[i]], min(np.delete(every[i], LABELS[i]))) for i in indices]
        np.testing.assert_array_equal(np.stack([one.target, one.other], 1), rows)
        assert one.labels.tolist() == LABELS[indices].tolist()
    assert shown.wrong.tolist() == wrong_of(folder, f"slice-{PROPOSED}-seed0").tolist()
    assert not shown_train.wrong.any()
    assert boundary(0.1) == pytest.approx(0.5)


def test_bars_are_means_with_their_intervals(report, folder, drawn):
    drawing.bars(report)
    by_slice, by_patient, theirs, *cited = drawn["figure7"][1]
    names = [f"slice-{PROPOSED}-seed{seed}" for seed in range(3)]
    for score, runs in ((by_slice, names), (by_patient, PROPOSED_FOLDS)):
        shares = [1 - wrong_of(folder, name).mean() for name in runs]
        assert score.accuracy == pytest.approx(np.mean(shares))
        error = stats.sem(shares)
        ends = stats.t.interval(0.95, len(shares) - 1, loc=np.mean(shares), scale=error)
        assert score.interval == pytest.approx(np.clip(ends, 0, 1))
    wilson = stats.binomtest(908, 920).proportion_ci(method="wilson")
    assert theirs.interval == pytest.approx(tuple(wilson))
    assert (theirs.accuracy, theirs.source) == (0.9869, "the paper")
    assert [(one.accuracy, one.verified) for one in cited] == [
        (one["accuracy"], one["verified"]) for one in paper.CITED
    ]
    assert {one.source for one in cited} == {"cited"}
    assert not all(one.verified for one in cited)  # Afshar's is hollow


def test_how_sure_answers_are_is_softmax_at_the_trainings_scale(report, folder, drawn):
    drawing.scores(report, 30.0)
    for file, names in (("slice", [f"slice-{PROPOSED}-seed0"]), ("patient", PROPOSED_FOLDS)):
        every = [read_answers(folder, name) for name in names]
        truth, predicted, scores = (
            np.concatenate(part) for part in list(zip(*every, strict=True))[:3]
        )
        sure = np.exp(30 * scores) / np.exp(30 * scores).sum(1, keepdims=True)
        np.testing.assert_array_equal(drawn[f"roc-{file}"][-2], truth)
        np.testing.assert_allclose(drawn[f"roc-{file}"][-1], sure)
        _, confidence, accuracy, count, _ = drawn[f"reliability-{file}"]
        assert count.sum() == len(truth)
        assert np.nansum(confidence * count) == pytest.approx(sure.max(1).sum())
        assert np.nansum(accuracy * count) == pytest.approx((truth == predicted).sum())


def test_by_patient_every_way_has_its_own_counts(report, folder, drawn):
    errors = drawing.by_patient(report)["errors"]
    ways = drawn["slice-and-patient"][1][TITLES[PROPOSED]]
    shares = [1 - wrong_of(folder, f"slice-{PROPOSED}-seed0").mean()]
    wrong = np.concatenate([wrong_of(folder, name) for name in PROPOSED_FOLDS])
    assert [ways[name][0] for name in ("by slice", "by patient, slices")] == pytest.approx(
        [*shares, 1 - wrong.mean()]
    )
    hits, total = tables.votes(report.select("patient", PROPOSED))
    wilson = stats.binomtest(hits, total).proportion_ci(method="wilson")
    assert ways["by patient, votes"] == pytest.approx((hits / total, *wilson))
    wilson = stats.binomtest(int(30 * shares[0] + 0.5), 30).proportion_ci(method="wilson")
    assert ways["by slice"][1:] == pytest.approx(tuple(wilson))
    matrices = drawn["errors"][1]
    assert matrices["by slice, seed 0"].tolist() == confusion(folder, [f"slice-{PROPOSED}-seed0"])
    assert matrices["by patient, 5 of 5 folds"].tolist() == confusion(folder, PROPOSED_FOLDS)

    patients = np.concatenate([read_answers(folder, name)[3] for name in PROPOSED_FOLDS])
    found, counts = np.unique(patients[wrong], return_counts=True)
    worst = np.sort(counts)[::-1][:3].sum()  # of 30 patients
    assert (errors["slices"], errors["patients"], errors["of"]) == (wrong.sum(), len(found), 30)
    assert errors["share"] == pytest.approx(100 * worst / wrong.sum())


def test_a_loss_says_where_folds_of_it_are_not_run(tmp_path, drawn):
    lacking = ("patient-softmax-fold3", "patient-softmax-fold4")
    drawing.by_patient(read_reproduction(write_reproduction(tmp_path / "out", unfinished=lacking)))
    names = list(drawn["slice-and-patient"][1])
    assert TITLES[PROPOSED] in names
    assert f"{TITLES['softmax']}, 3 of 5 folds" in names


def test_slices_without_patient_ids_are_reported(tmp_path, written):
    folder = write_reproduction(tmp_path / "out")
    path = folder / "slices.csv"
    path.write_text(path.read_text().replace("P00", "fold1-run001"))
    assert "no patient identifiers" in written(folder)


def test_networks_together_answer_by_the_nearest_in_all_their_embeddings(report, folder):
    joined = reproduction_report.together(report, "patient", report.with_embeddings("patient"))
    losses = {
        "together: m = 4, 5 and 6": ("sphereface-m4", PROPOSED, "sphereface-m6"),
        "together: the paper's six losses": tuple(PAPER_LOSSES),
    }
    assert list(joined) == list(losses)
    for name, trainings in losses.items():
        hits = 0
        for fold in range(1, 6):
            every = [
                np.load(folder / f"runs/patient-{one}-fold{fold}/embeddings.npy").astype(float)
                for one in trainings
            ]
            squares = sum(((one[:, None] - one) ** 2).sum(2) for one in every)
            train, test = np.flatnonzero(fold != FOLDS), np.flatnonzero(fold == FOLDS)
            nearest = train[squares[np.ix_(test, train)].argmin(1)]
            hits += (LABELS[nearest] == LABELS[test]).sum()
        assert (joined[name].sum(), len(joined[name])) == (hits, len(NUMBERS))


def test_networks_answer_together_only_where_all_of_them_are_finished(tmp_path):
    lacking = "patient-sphereface-m4-fold3"
    report = read_reproduction(write_reproduction(tmp_path / "out", unfinished=(lacking,)))
    assert reproduction_report.together(report, "patient", report.with_embeddings("patient")) == {}
    assert (
        len(reproduction_report.together(report, "slice", report.with_embeddings("slice")[:1])) == 2
    )


def test_lengths_are_of_seed_0_and_the_own_one_of_all_seeds(report, folder, drawn):
    found = drawing.lengths(report)
    share = {
        name: 1 - wrong_of(folder, name).mean()
        for name in ("slice-2-epochs-seed0", "slice-8-epochs-seed0")
    }
    seeds = [1 - wrong_of(folder, f"slice-{PROPOSED}-seed{seed}").mean() for seed in range(3)]
    _, runs, own, *_ = drawn["length"]
    expected = {2: [share["slice-2-epochs-seed0"]], 4: seeds, 8: [share["slice-8-epochs-seed0"]]}
    assert list(runs) == [2, 4, 8]
    assert own == 4
    for epochs, shares in expected.items():
        assert runs[epochs] == pytest.approx(shares)
    assert records.length_table(found).rows[1] == [
        "4",
        " ".join(f"{100 * one:.2f}" for one in seeds),
    ]


def test_speed_is_in_images_and_faults_in_a_table(tmp_path, written, monkeypatch):
    folder = write_reproduction(tmp_path / "out")
    assert "images/s" not in written(folder)
    measured = {"step": 0.5, "floor": 0.4, "batch": 0.05, "batch_size": 20, "image_size": 32}
    where = {"device": "cpu", "threads": 1, "precision": "float32"}
    (folder / "speed.json").write_text(json.dumps({**measured, **where}))
    counts = tmp_path / "drills.json"
    counts.write_text(json.dumps({"a": {"tried": 7}, "b": {"lost": 0}}))
    monkeypatch.setattr(records, "DRILLS", counts)
    text = written(folder)
    assert "a training step 40 images/s" in text
    assert "alone 50 images/s, a ratio of 1.250" in text
    assert "takes 10.0 % of a step" in text
    results = read_reproduction(folder).results
    epochs = sum(one.run.settings.training.epochs for one in results)
    assert f"{1.5 * epochs / 3600:.2f} hours" in text
    table = records.drill_table()
    assert table.header == ["drill", "tried", "lost"]
    assert table.rows == [["a", "7", "-"], ["b", "-", "0"]]
    assert str(table) in text


@pytest.mark.parametrize(
    ("interval", "shown"), [((0.6, 1.2), (0.6, 1.0)), ((np.nan, np.nan), None)]
)
def test_bars_end_where_accuracies_do(report, drawn, monkeypatch, interval, shown):
    monkeypatch.setattr(drawing, "seed_interval", lambda accuracies: (0.9, interval))
    drawing.bars(report)
    assert drawn["figure7"][1][0].interval == shown

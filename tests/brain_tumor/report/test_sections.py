"""What the report's sections draw and state, from made-up answers; nothing is drawn here."""

import json

import numpy as np
import pytest
from scipy import stats

from examples.brain_tumor.evaluation.classifiers import Classification
from examples.brain_tumor.report import further_sections, paper, paper_sections, reporting
from examples.brain_tumor.report.document import Figure, Heading, Items, Paragraph, Table
from examples.brain_tumor.report.reporting import Report
from examples.brain_tumor.report.tables import TITLES
from examples.brain_tumor.reproduction.plan import PAPER_LOSSES, PROPOSED, SWAPPED
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
    return Report(folder)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return Report(write_reproduction(tmp_path_factory.mktemp("made") / "out", synthetic=True))


@pytest.fixture
def drawn(monkeypatch):
    """What each figure's function was called with, without the path, by the figure's name."""
    calls = {}

    def recorder(path, *arguments, **options):
        calls[path.stem] = (*arguments, *options.values())

    for module in (paper_sections, further_sections):
        for name in [name for name in vars(module) if name.startswith("plot_")]:
            monkeypatch.setattr(module, name, recorder)
    return calls


def texts(blocks, kind=Paragraph):
    return [block.text for block in blocks if isinstance(block, kind)]


def tables_of(blocks):
    return [block for block in blocks if isinstance(block, Table)]


def captions(blocks):
    return {block.path.stem: block.caption for block in blocks if isinstance(block, Figure)}


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
    assert "figure1" not in captions(paper_sections.samples_and_pipeline(Report(folder)))
    np.savez(folder / "samples.npz", **{"glioma axial": np.full((2, 2), 0.5)})
    blocks = paper_sections.samples_and_pipeline(Report(folder))
    pictures, title = drawn["figure1"]
    assert list(pictures) == [("glioma", "axial")]
    assert title.startswith("SYNTHETIC: ")
    assert drawn["figure2"] == ("SYNTHETIC: HSADML, as it was run", 32, False, 5.0, 30.0)
    assert list(captions(blocks)) == ["figure1", "figure2"]


def test_sections_about_the_paper_are_left_out_for_phantoms(phantoms, drawn):
    assert paper_sections.golden(phantoms) == []
    assert paper_sections.bars(phantoms) == []
    assert further_sections.length(phantoms) == []
    assert len(texts(paper_sections.deviations(phantoms), Heading)) == 1
    assert drawn == {}


def test_the_golden_check_and_the_contradictions_are_printed_whole(report):
    (table,) = tables_of(paper_sections.golden(report))
    assert [row[1] for row in table.rows] == [" ".join(one[1]) for one in paper.golden_check()]
    lists = [block for block in paper_sections.deviations(report) if isinstance(block, Items)]
    assert [one.texts for one in lists] == [paper.DEVIATIONS, paper.CONTRADICTIONS]


def test_each_of_the_papers_tables_has_its_rows(report):
    made = tables_of(paper_sections.paper_tables(report))
    names = [[row[0] for row in table.rows[::2]] for table in made]
    by_loss = [TITLES[one] for one in ("softmax", "modified-softmax", "triplet", PROPOSED)]
    by_margin = [TITLES[one] for one in ("sphereface-m4", "sphereface-m6", PROPOSED)]
    expected = [[TITLES[PROPOSED], TITLES[SWAPPED]], by_loss, by_loss, by_margin, by_margin]
    assert names[:5] == expected
    assert all(row[0] == "the paper" for table in made[:5] for row in table.rows[1::2])
    assert made[5].header[0] == "against"


def test_classifiers_of_every_seed_are_averaged(report, monkeypatch):
    asked = []

    def classify(report, result):
        asked.append(result.run.name)
        truth = result.predictions.truth
        note = "Too good." if len(asked) == 1 else "another seed's"
        return [Classification("ours", f"k = {len(asked)}", truth, note)]

    monkeypatch.setattr(paper_sections, "classifications", classify)
    blocks = paper_sections.classifiers(report)
    assert asked == [f"slice-{PROPOSED}-seed{seed}" for seed in range(3)]
    assert tables_of(blocks)[0].rows[0][11] == "3"
    assert blocks[-1] == Items(["ours: k = 1. Too good."])


@pytest.mark.parametrize("split", ["slice", "patient"])
def test_answers_of_classifiers_are_made_once_and_from_the_runs_sides(
    report, monkeypatch, tmp_path, split
):
    calls = []

    def classify(*arguments, **options):
        calls.append((arguments, options))
        return [Classification("one", "set so", arguments[3], "a note")]

    monkeypatch.setattr(reporting, "classify", classify)
    result = report.first(PROPOSED, split)
    kept = result.folder / reporting.CLASSIFICATIONS
    kept.unlink(missing_ok=True)
    first, again = (reporting.classifications(report, result) for _ in range(2))
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
    paper_sections.curves(report)
    trainings = [*PAPER_LOSSES, SWAPPED]
    losses, matrices = drawn["figure3"][0], drawn["figure4"][0]
    assert list(losses) == list(matrices) == [TITLES[one] for one in trainings]
    for training in trainings:
        name = f"slice-{training}-seed0"
        log = (folder / "runs" / name / "log.jsonl").read_text().splitlines()
        assert losses[TITLES[training]] == [json.loads(line)["loss"] for line in log]
        assert matrices[TITLES[training]].tolist() == confusion(folder, [name])


def test_embeddings_of_the_test_slices_are_shown_with_their_errors(
    report, folder, drawn, monkeypatch
):
    monkeypatch.setattr(
        paper_sections, "compute_tsne", lambda embeddings, seed: 2 * embeddings[:, :2]
    )
    for kept in folder.glob("runs/*/tsne.npy"):
        kept.unlink()
    paper_sections.embeddings(report)
    monkeypatch.delattr(paper_sections, "compute_tsne")  # the second time they are read back
    paper_sections.embeddings(report)
    assert list(drawn["figure5"][0]) == [
        TITLES[one] for one in ("softmax", "modified-softmax", "triplet", PROPOSED)
    ]
    assert list(drawn["figure6"][0]) == [
        TITLES[one] for one in ("sphereface-m4", "sphereface-m6", PROPOSED)
    ]
    _, test = sides_of(report, "triplet")
    points, labels, wrong = drawn["figure5"][0][TITLES["triplet"]]
    own = np.load(folder / "runs/slice-triplet-seed0/embeddings.npy")[test]
    np.testing.assert_array_equal(points, 2 * own[:, :2])
    assert labels.tolist() == LABELS[test].tolist()
    assert wrong.tolist() == wrong_of(folder, "slice-triplet-seed0").tolist()


def test_angles_to_the_own_centre_and_to_the_nearest_other(report, folder, drawn, monkeypatch):
    monkeypatch.setattr(paper_sections, "compute_tsne", lambda embeddings, seed: embeddings[:, :2])
    paper_sections.embeddings(report)
    shown, _, shown_train, boundary = drawn["angles"]
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
    blocks = paper_sections.bars(report)
    by_slice, by_patient, theirs, *cited = drawn["figure7"][0]
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
        (one.accuracy, one.verified) for one in paper.CITED
    ]
    assert {one.source for one in cited} == {"cited"}
    assert not all(one.verified for one in cited)  # Afshar's is hollow
    (items,) = (block for block in blocks if isinstance(block, Items))
    assert items.texts[1] == (
        "Ismael and Abdel-Qader 2018, statistical features: 91.90 %, tumour region given; "
        "abstract, doi:10.1109/EIT.2018.8500308"
    )


def test_how_sure_answers_are_is_softmax_at_the_trainings_scale(report, folder, drawn):
    blocks = further_sections.scores(report)
    for file, names in (("slice", [f"slice-{PROPOSED}-seed0"]), ("patient", PROPOSED_FOLDS)):
        every = [read_answers(folder, name) for name in names]
        truth, predicted, scores = (
            np.concatenate(part) for part in list(zip(*every, strict=True))[:3]
        )
        sure = np.exp(30 * scores) / np.exp(30 * scores).sum(1, keepdims=True)
        np.testing.assert_array_equal(drawn[f"roc-{file}"][0], truth)
        np.testing.assert_allclose(drawn[f"roc-{file}"][1], sure)
        confidence, accuracy, count, error, _ = drawn[f"reliability-{file}"]
        assert count.sum() == len(truth)
        assert np.nansum(confidence * count) == pytest.approx(sure.max(1).sum())
        assert np.nansum(accuracy * count) == pytest.approx((truth == predicted).sum())
        assert f"calibration error {100 * error:.1f} %" in captions(blocks)[f"reliability-{file}"]
        assert "s = 30," in captions(blocks)[f"reliability-{file}"]


def test_by_patient_every_way_has_its_own_counts(report, folder, drawn):
    blocks = further_sections.patients(report)
    ways = drawn["slice-and-patient"][0][TITLES[PROPOSED]]
    shares = [1 - wrong_of(folder, f"slice-{PROPOSED}-seed0").mean()]
    wrong = np.concatenate([wrong_of(folder, name) for name in PROPOSED_FOLDS])
    assert [ways[name][0] for name in ("by slice", "by patient, slices")] == pytest.approx(
        [*shares, 1 - wrong.mean()]
    )
    hits, total = further_sections.tables.votes(report.reproduction.select("patient", PROPOSED))
    wilson = stats.binomtest(hits, total).proportion_ci(method="wilson")
    assert ways["by patient, votes"] == pytest.approx((hits / total, *wilson))
    wilson = stats.binomtest(int(30 * shares[0] + 0.5), 30).proportion_ci(method="wilson")
    assert ways["by slice"][1:] == pytest.approx(tuple(wilson))
    matrices = drawn["errors"][0]
    assert matrices["by slice, seed 0"].tolist() == confusion(folder, [f"slice-{PROPOSED}-seed0"])
    assert matrices["by patient, all folds"].tolist() == confusion(folder, PROPOSED_FOLDS)
    assert not any("no patient identifiers" in text for text in texts(blocks))

    patients = np.concatenate([read_answers(folder, name)[3] for name in PROPOSED_FOLDS])
    found, counts = np.unique(patients[wrong], return_counts=True)
    worst = np.sort(counts)[::-1][:3].sum()  # of 30 patients
    assert texts(blocks)[-1].startswith(
        f"Errors come in clusters: {wrong.sum()} wrong slices lie with {len(found)} of 30 "
        f"patients, and the worst tenth of all patients has {100 * worst / wrong.sum():.0f} % "
    )


def test_slices_without_patient_ids_are_reported(tmp_path, drawn):
    folder = write_reproduction(tmp_path / "out")
    path = folder / "slices.csv"
    path.write_text(path.read_text().replace("P00", "fold1-run001"))
    assert any(
        "no patient identifiers" in text
        for text in texts(further_sections.patients(Report(folder)))
    )


def test_networks_together_answer_by_the_nearest_in_all_their_embeddings(
    report, folder, monkeypatch
):
    monkeypatch.setattr(further_sections, "classifications", lambda report, one: [None])
    made = tables_of(further_sections.beyond(report))
    joined = {row[0]: row[1] for row in made[2].rows if row[0].startswith("together")}
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
        assert joined[name] == f"{100 * hits / len(NUMBERS):.2f}"
    assert made[2].caption.startswith("By patient, on 5 of 5 folds")
    assert made[3].caption.startswith("By slice, seed 0")


def test_networks_answer_together_only_where_all_of_them_are_finished(tmp_path, monkeypatch):
    lacking = "patient-sphereface-m4-fold3"
    report = Report(write_reproduction(tmp_path / "out", unfinished=(lacking,)))
    monkeypatch.setattr(further_sections, "classifications", lambda report, one: [None])
    by_patient, by_slice = tables_of(further_sections.beyond(report))[2:]
    assert not any(row[0].startswith("together") for row in by_patient.rows)
    assert sum(row[0].startswith("together") for row in by_slice.rows) == 2


def test_lengths_are_of_seed_0_and_the_own_one_of_all_seeds(report, folder, drawn):
    blocks = further_sections.length(report)
    share = {
        name: 1 - wrong_of(folder, name).mean()
        for name in ("slice-2-epochs-seed0", "slice-8-epochs-seed0")
    }
    seeds = [1 - wrong_of(folder, f"slice-{PROPOSED}-seed{seed}").mean() for seed in range(3)]
    runs, own, *_ = drawn["length"]
    expected = {2: [share["slice-2-epochs-seed0"]], 4: seeds, 8: [share["slice-8-epochs-seed0"]]}
    assert list(runs) == [2, 4, 8]
    assert own == 4
    for epochs, shares in expected.items():
        assert runs[epochs] == pytest.approx(shares)
    assert tables_of(blocks)[0].rows[1] == ["4", " ".join(f"{100 * one:.2f}" for one in seeds)]


def test_speed_is_in_images_and_faults_in_a_table(tmp_path, monkeypatch):
    folder = write_reproduction(tmp_path / "out")
    report = Report(folder)
    assert further_sections.speed(report) == []
    measured = {"step": 0.5, "floor": 0.4, "batch": 0.05, "batch_size": 20, "image_size": 32}
    where = {"device": "cpu", "threads": 1, "precision": "float32"}
    (folder / "speed.json").write_text(json.dumps({**measured, **where}))
    counts = tmp_path / "drills.json"
    counts.write_text(json.dumps({"a": {"tried": 7}, "b": {"lost": 0}}))
    monkeypatch.setattr(further_sections, "DRILLS", counts)
    (text,) = texts(further_sections.speed(report))
    assert "a training step 40 images/s" in text
    assert "alone 50 images/s, a ratio of 1.250" in text
    assert "takes 10.0 % of a step" in text
    epochs = sum(one.run.settings.training.epochs for one in report.reproduction.results)
    assert f"{1.5 * epochs / 3600:.2f} hours" in text
    (table,) = tables_of(further_sections.faults(report))
    assert table.header == ["drill", "tried", "lost"]
    assert table.rows == [["a", "7", "-"], ["b", "-", "0"]]


@pytest.mark.parametrize(
    ("interval", "shown"), [((0.6, 1.2), (0.6, 1.0)), ((np.nan, np.nan), None)]
)
def test_bars_end_where_accuracies_do(report, drawn, monkeypatch, interval, shown):
    monkeypatch.setattr(paper_sections, "seed_interval", lambda accuracies: (0.9, interval))
    paper_sections.bars(report)
    assert drawn["figure7"][0][0].interval == shown

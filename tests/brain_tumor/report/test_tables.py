"""The report's tables against scikit-learn and SciPy, from made-up answers read by other code."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef, recall_score, roc_auc_score

from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation.classifiers import Classification
from examples.brain_tumor.evaluation.metrics import patient_bootstrap
from examples.brain_tumor.report import paper, tables
from examples.brain_tumor.report.page import bounds
from examples.brain_tumor.reproduction.plan import BEYOND, PAPER_LOSSES, PROPOSED, SWAPPED
from examples.brain_tumor.reproduction.results import (
    pooled,
    read_reproduction,
    read_slice_table,
)
from tests.brain_tumor.report.made_results import (
    LABELS,
    NUMBERS,
    PATIENTS,
    read_answers,
    write_reproduction,
)

MISSING = ("slice-triplet-seed1", "patient-whole-margin-fold2", "slice-cosface-seed0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_reproduction(tmp_path_factory.mktemp("made") / "out", unfinished=MISSING)


@pytest.fixture(scope="module")
def reproduction(folder):
    return read_reproduction(folder)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    made = tmp_path_factory.mktemp("made") / "out"
    return read_reproduction(write_reproduction(made, synthetic=True))


def rights(folder, names, file="predictions.csv"):
    every = [read_answers(folder, name, file)[:2] for name in names]
    return np.concatenate([truth == predicted for truth, predicted in every])


def row_of(truth, predicted):
    """The ten numbers of the paper's columns, in their units."""
    recalls, f1 = (
        score(truth, predicted, labels=[0, 1, 2], average=None, zero_division=0)
        for score in (recall_score, f1_score)
    )
    accuracy = (truth == predicted).mean()
    rest = [f1.mean(), accuracy, matthews_corrcoef(truth, predicted)]
    return np.array([*(100 * recalls), 100 * accuracy, *f1, *rest])


def as_numbers(cells):
    return [float(cell) for cell in cells]


def t_text(shares):
    """Student's interval in percent, no further than an accuracy goes."""
    error = stats.sem(shares)
    ends = stats.t.interval(0.95, len(shares) - 1, loc=np.mean(shares), scale=error)
    low, high = np.clip(ends, 0, 1)
    return f"{100 * low:.2f} to {100 * high:.2f}"


def wilson_text(hits):
    interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return f"{100 * interval.low:.2f} to {100 * interval.high:.2f}"


def p_of(first, second):
    only = [int((first & ~second).sum()), int((second & ~first).sum())]
    return only, stats.binomtest(only[0], sum(only)).pvalue if sum(only) else 1.0


def test_what_is_finished_and_what_is_not(reproduction, folder):
    assert set(reproduction.missing) == set(MISSING)
    for one in reproduction.results:
        assert one.folder == folder / "runs" / one.run.name
    seeds = [one.run.name for one in reproduction.select("slice", PROPOSED)]
    assert seeds == [f"slice-{PROPOSED}-seed{seed}" for seed in range(3)]
    folds = [one.run.name for one in reproduction.select("patient", "softmax")]
    assert folds == [f"patient-softmax-fold{fold}" for fold in range(1, 6)]
    assert reproduction.budget.lengths == (0.5, 2.0)


def test_a_run_short_of_its_epochs_is_not_finished(tmp_path):
    made = write_reproduction(tmp_path / "out")
    name = f"slice-{PROPOSED}-seed1"
    (made / "runs" / name / "metrics.json").write_text(json.dumps({"epoch": 3}))
    assert read_reproduction(made).missing == [name]


@pytest.mark.parametrize("change", [{"lengths": None}, {"a later version's": 1}])
def test_a_reproduction_of_another_version_is_one_line(tmp_path, change):
    path = write_reproduction(tmp_path / "out") / "reproduction.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps({"budget": {**description["budget"], **change}}))
    with pytest.raises(UserError, match=r"reproduction\.json: not readable as a reproduction of"):
        read_reproduction(tmp_path / "out")


def test_a_run_is_read_with_the_settings_it_was_trained_with(tmp_path):
    made = write_reproduction(tmp_path / "out")
    path = made / "runs" / f"slice-{PROPOSED}-seed0" / "settings.toml"
    path.write_text(path.read_text().replace("scale = 30.0", "scale = 3.0"))
    first, second, _ = read_reproduction(made).select("slice", PROPOSED)
    assert (first.run.settings.loss.scale, second.run.settings.loss.scale) == (3.0, 30.0)


def test_the_table_of_slices_and_the_sides_of_a_split(folder, tmp_path):
    table = read_slice_table(folder)
    assert table.numbers.tolist() == NUMBERS.tolist()
    assert table.labels.tolist() == LABELS.tolist()
    assert table.patients.tolist() == [f"P{patient:02}" for patient in PATIENTS]
    path = folder / "runs" / f"slice-{PROPOSED}-seed0" / "split.json"
    train, test = table.sides(path)
    assert NUMBERS[train].tolist() == json.loads(path.read_text())["train"]
    assert NUMBERS[test].tolist() == json.loads(path.read_text())["test"]
    for text in ("slice,class\n1,glioma\n", "slice,class,patient\n1,lymphoma,a\n"):
        (tmp_path / "slices.csv").write_text(text)
        with pytest.raises(UserError, match=r"slices\.csv: not readable as the table of slices"):
            read_slice_table(tmp_path)


@pytest.mark.parametrize("training", [PROPOSED, "softmax"])
def test_rows_of_the_papers_form_are_means_over_the_seeds(reproduction, folder, training):
    names = [f"slice-{training}-seed{seed}" for seed in range(3 if training == PROPOSED else 2)]
    every = [read_answers(folder, name)[:2] for name in names]
    expected = np.mean([row_of(*one) for one in every], axis=0)
    table = tables.paper_table(reproduction, ("triplet", training))
    name, *cells = table.rows[2]
    assert name == tables.TITLES[training]
    np.testing.assert_allclose(as_numbers(cells[:4]), expected[:4], rtol=0, atol=0.01)
    np.testing.assert_allclose(as_numbers(cells[4:10]), expected[4:], rtol=0, atol=1e-4)
    truth, predicted, _, patients = read_answers(folder, names[0])
    first = truth == predicted
    low, high = patient_bootstrap(first, patients, seed=0)
    assert cells[10:] == [
        str(len(names)),
        t_text([(truth == predicted).mean() for truth, predicted in every]),
        wilson_text(first),
        f"{100 * low:.2f} to {100 * high:.2f}",
    ]
    assert table.rows[3] == ["the paper", *paper.BY_TRAINING[training], "1", "-", "-", "-"]
    assert table.rows[0][11:13] == ["1", "-"]  # one seed of Triplet alone is finished
    assert len(table.header) == 15


def test_the_papers_numbers_do_not_stand_beside_phantoms(phantoms):
    every = [
        [Classification("random forest", "", one.predictions.predicted)]
        for one in phantoms.select("slice", PROPOSED)
    ]
    made = (
        tables.paper_table(phantoms, tables.LOSSES),
        tables.auc_table(phantoms, tables.LOSSES),
        tables.classifier_table(phantoms.select("slice", PROPOSED), every, synthetic=True),
    )
    for table in made:
        assert table.rows
        assert "the paper" not in [row[0] for row in table.rows]


def test_aucs_of_answers_and_of_scores(reproduction, folder):
    hard, score = np.zeros((2, 3, 3))
    for seed in range(3):
        truth, predicted, scores, _ = read_answers(folder, f"slice-{PROPOSED}-seed{seed}")
        sure = np.exp(30 * scores) / np.exp(30 * scores).sum(1, keepdims=True)
        for label in range(3):
            hard[seed, label] = roc_auc_score(truth == label, predicted == label)
            score[seed, label] = roc_auc_score(truth == label, sure[:, label])
    ours, papers = tables.auc_table(reproduction, (PROPOSED,)).rows
    expected = [*hard.mean(0), hard.mean(), *score.mean(0), score.mean()]
    np.testing.assert_allclose(as_numbers(ours[1:9]), np.array(expected) - 5e-5, atol=5e-5 + 1e-9)
    assert (ours[0], ours[9]) == (tables.TITLES[PROPOSED], "3")
    assert papers == ["the paper", ".9771", ".9968", ".9909", ".9882", *["-"] * 4, "1"]


def test_mcnemar_pairs_runs_of_one_seed(reproduction, folder):
    rows = tables.mcnemar_table(reproduction).rows
    assert len(rows) == 2 * 5 - 1  # one is not finished
    for name, seed, *cells in rows:
        training = next(key for key, title in tables.TITLES.items() if title == name)
        ours, theirs = (rights(folder, [f"slice-{one}-seed{seed}"]) for one in (PROPOSED, training))
        only, p = p_of(ours, theirs)
        assert cells == [*map(str, only), tables.p_text(p)]


@pytest.mark.parametrize(
    ("p", "text"),
    [(1.0, "1.000"), (0.05, ".050"), (0.001, ".001"), (0.000999, "<.001"), (0.0, "<.001")],
)
def test_p_is_never_printed_as_nothing(p, text):
    assert tables.p_text(p) == text


def test_bounds_stay_where_accuracies_are():
    assert bounds((0.81481, 1.07)) == "81.48 to 100.00"
    assert bounds((-0.1, 0.5)) == "0.00 to 50.00"
    assert bounds((np.nan, np.nan)) == "-"


def test_classifiers_are_held_against_their_own_seeds_truth(reproduction, folder):
    generator = np.random.default_rng(0)
    truths = [read_answers(folder, f"slice-{PROPOSED}-seed{seed}")[0] for seed in range(3)]
    answers = [np.where(generator.random(30) < 0.7, truth, 1) for truth in truths]
    every = [
        [Classification("ours", "", truth), Classification("random forest", "", answer)]
        for truth, answer in zip(truths, answers, strict=True)
    ]
    results = reproduction.select("slice", PROPOSED)
    perfect, forest, papers = tables.classifier_table(results, every, synthetic=False).rows
    assert perfect[:5] == ["ours", *["100.00"] * 4]
    expected = np.mean([row_of(*one) for one in zip(truths, answers, strict=True)], axis=0)
    np.testing.assert_allclose(as_numbers(forest[1:5]), expected[:4], rtol=0, atol=0.01)
    np.testing.assert_allclose(as_numbers(forest[5:11]), expected[4:], rtol=0, atol=1e-4)
    hits = [truth == answer for truth, answer in zip(truths, answers, strict=True)]
    assert forest[11:] == ["3", t_text([one.mean() for one in hits]), wilson_text(hits[0])]
    assert papers == ["the paper", *paper.CLASSIFIERS["random forest"], "1", "-", "-"]


def majority_hits(folder, names):
    """Patients right by vote; a tie is won by the larger sum of scores."""
    hits = patients = 0
    for name in names:
        truth, predicted, scores, ids = read_answers(folder, name)
        for patient in sorted(set(ids)):
            own = ids == patient
            votes = np.bincount(predicted[own], minlength=3)
            leading = [label for label in range(3) if votes[label] == votes.max()]
            best = max(leading, key=lambda label: scores[own][:, label].sum())
            hits += best == truth[own][0]
            patients += 1
    return hits, patients


@pytest.mark.parametrize("training", [PROPOSED, "triplet", SWAPPED])
def test_by_slice_and_by_patient_side_by_side(reproduction, folder, training):
    found = {row[0]: row[1:] for row in tables.patient_table(reproduction).rows}
    assert list(found) == [tables.TITLES[one] for one in [*PAPER_LOSSES, SWAPPED]]
    seeds = [one.run.name for one in reproduction.select("slice", training)]
    folds = [f"patient-{training}-fold{fold}" for fold in range(1, 6)]
    each = [rights(folder, [name]).mean() for name in folds]
    mirrored = [rights(folder, [name], "predictions_views2.csv").mean() for name in folds]
    together = rights(folder, folds)
    patients = np.concatenate([read_answers(folder, name)[3] for name in folds])
    low, high = patient_bootstrap(together, patients, seed=0)
    hits, count = majority_hits(folder, folds)
    assert count == (120 if training == SWAPPED else 30)
    assert found[tables.TITLES[training]] == [
        f"{100 * np.mean([rights(folder, [name]).mean() for name in seeds]):.2f}",
        str(len(seeds)),
        f"{100 * np.mean(each):.2f}",
        "5",
        t_text(each),
        f"{100 * together.mean():.2f}",
        f"{100 * low:.2f} to {100 * high:.2f}",
        f"{100 * np.mean(mirrored):.2f}",
        f"{100 * hits / count:.2f} ({hits} of {count})",
        wilson_text(np.arange(count) < hits),
    ]


def test_fold_by_fold(reproduction, folder):
    rows = tables.fold_table(reproduction).rows
    assert [row[0] for row in rows] == [tables.TITLES[one] for one in [*PAPER_LOSSES, SWAPPED]]
    names = [f"patient-{PROPOSED}-fold{fold}" for fold in range(1, 6)]
    every = [read_answers(folder, name)[:2] for name in names]
    expected = row_of(*(np.concatenate(part) for part in zip(*every, strict=True)))
    np.testing.assert_allclose(as_numbers(rows[0][1:5]), expected[:4], rtol=0, atol=0.01)
    np.testing.assert_allclose(as_numbers(rows[0][5:11]), expected[4:], rtol=0, atol=1e-4)
    each = [rights(folder, [name]).mean() for name in names]
    assert rows[0][11] == " ".join(f"{100 * one:.2f}" for one in each)


def test_losses_beyond_the_paper_are_compared_on_the_same_splits(reproduction, folder):
    """One seed and the budget's two folds, of the proposed training too, which has more."""
    rows = {row[0]: row[1:] for row in tables.beyond_table(reproduction).rows}
    assert list(rows) == [tables.TITLES[one] for one in (PROPOSED, *BEYOND)]
    for training in (PROPOSED, "arcface"):
        by_slice = rights(folder, [f"slice-{training}-seed0"])
        by_patient = rights(folder, [f"patient-{training}-fold{fold}" for fold in (1, 2)])
        assert rows[tables.TITLES[training]] == [
            f"{100 * by_slice.mean():.2f}",
            wilson_text(by_slice),
            f"{100 * by_patient.mean():.2f}",
            wilson_text(by_patient),
        ]
    assert rows[tables.TITLES["cosface"]][:2] == ["-", "-"]  # not finished


def test_variants_are_compared_on_the_same_folds(reproduction, folder):
    rows = {row[0]: row[1:] for row in tables.variant_table(reproduction).rows}
    # Without its second fold a variant would be held against other slices.
    assert list(rows) == ["as proposed", "stronger-augmentation", "no-upside-down", "48-pixels"]
    proposed, other = (
        rights(folder, [f"patient-{training}-fold{fold}" for fold in (1, 2)])
        for training in (PROPOSED, "no-upside-down")
    )
    assert rows["as proposed"] == [f"{100 * proposed.mean():.2f}", wilson_text(proposed), "-"]
    _, p = p_of(other, proposed)
    own = [f"{100 * other.mean():.2f}", wilson_text(other), tables.p_text(p)]
    assert rows["no-upside-down"] == own


def test_what_is_called_seed_0_is_seed_0(tmp_path):
    made = write_reproduction(tmp_path / "out", unfinished=(f"slice-{PROPOSED}-seed0",))
    reproduction = read_reproduction(made)
    assert reproduction.proposed is None
    (row, *_) = tables.paper_table(reproduction, (PROPOSED,)).rows
    assert row[-4] == "2"
    assert row[-2:] == ["-", "-"]  # Wilson's interval and the bootstrap of seed 0
    rows = {row[0]: row[1:] for row in tables.beyond_table(reproduction).rows}
    assert rows[tables.TITLES[PROPOSED]][:2] == ["-", "-"]
    assert rows[tables.TITLES["arcface"]][0] != "-"


def test_other_folds_than_those_tried_are_not_compared(tmp_path):
    """As many folds of other slices would have other answers, or as many answers by accident."""
    unfinished = (f"patient-{PROPOSED}-fold1", "patient-no-upside-down-fold2")
    made = write_reproduction(tmp_path / "out", unfinished=unfinished)
    reproduction = read_reproduction(made)
    assert tables.variant_table(reproduction).rows == []
    rows = {row[0]: row[1:] for row in tables.beyond_table(reproduction).rows}
    assert rows[tables.TITLES[PROPOSED]][2:] == ["-", "-"]


def test_other_answers_from_the_same_networks(reproduction, folder):
    results = reproduction.select("patient", PROPOSED)
    names = [one.run.name for one in results]
    truths = [read_answers(folder, name)[0] for name in names]
    answers = [np.where(np.arange(len(truth)) % 4, truth, 2) for truth in truths]
    every = [
        [Classification("k-NN, k = 1", "", truth), Classification("forest", "", answer)]
        for truth, answer in zip(truths, answers, strict=True)
    ]
    joined = np.arange(90) % 5 > 0
    table = tables.answer_table(results, every, {"together": joined})
    reference = rights(folder, names)
    others = {
        "k-NN, k = 1, mirror images averaged": rights(folder, names, "predictions_views2.csv"),
        "forest": np.concatenate(answers) == np.concatenate(truths),
        "together": joined,
    }
    first = [f"{100 * reference.mean():.2f}", wilson_text(reference), "-"]
    assert table.rows == [
        ["k-NN, k = 1, as proposed", *first],
        *(
            [
                name,
                f"{100 * own.mean():.2f}",
                wilson_text(own),
                tables.p_text(p_of(own, reference)[1]),
            ]
            for name, own in others.items()
        ),
    ]


def test_answers_of_folds_are_pooled_in_order_and_patients_vote(reproduction, folder):
    results = reproduction.select("patient", "softmax")
    together = pooled(one.predictions for one in results)
    splits = [json.loads((one.folder / "split.json").read_text()) for one in results]
    numbers = np.concatenate([split["test"] for split in splits])
    assert together.numbers.tolist() == numbers.tolist()
    assert together.truth.tolist() == LABELS[(numbers - 10) // 7].tolist()
    assert together.scores.shape == (90, 3)
    assert tables.votes(results[:1]) == (majority_hits(folder, [results[0].run.name])[0], 3)


def test_the_golden_table_shows_what_differs_and_why():
    rows = [
        paper.Golden("a", [".1", ".2"], [".1", ".2"], ""),
        paper.Golden("softmax, AUC", [".1", ".2", ".3"], [".1", ".4", ".5"], "a misprint"),
    ]
    assert tables.golden_table(rows).rows == [
        ["a", ".1 .2", ".1 .2", "alike", ""],
        ["SoftMax, AUC", ".1 .2 .3", ".1 .4 .5", ".2 / .4; .3 / .5", "a misprint"],
    ]

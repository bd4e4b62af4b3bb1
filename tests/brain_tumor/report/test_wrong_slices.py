"""Slices that stay wrong, and targets, against counts made anew from the runs' files."""

import numpy as np
import pytest
from scipy.stats import chi2

from examples.brain_tumor.data.slices import CLASS_NAMES, SAMPLE_NUMBERS
from examples.brain_tumor.evaluation.calibration import calibrated, fit_exponent
from examples.brain_tumor.report import records
from examples.brain_tumor.report.wrong_slices import common, kinds_table, plane_of, wrong_table
from examples.brain_tumor.reproduction.plan import PROPOSED
from examples.brain_tumor.reproduction.results import read_reproduction
from examples.brain_tumor.settings import load_settings
from tests.brain_tumor.report.made_results import (
    LABELS,
    NUMBERS,
    read_answers,
    sides,
    write_reproduction,
    write_rows,
)

SEEDS = [f"slice-{PROPOSED}-seed{seed}" for seed in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_reproduction(tmp_path_factory.mktemp("made") / "out")
    rows = [
        {"slice": number, "tumour_area": 100 + i, "head_area": 9999, "inside": 0}
        for i, number in enumerate(NUMBERS[:60])
    ]
    write_rows(folder / "runs" / SEEDS[0] / "pointing.csv", rows)
    return folder


def test_planes_are_those_of_the_slices_chosen_by_eye():
    assert all(plane_of(number) == plane for (_, plane), number in SAMPLE_NUMBERS.items())
    assert plane_of(3064) == "coronal"


def test_slices_are_listed_that_every_run_which_tested_them_gets_wrong(folder):
    right, tested = set(), set()
    for seed in range(3):
        _, test = sides(load_settings("paper", {"split_seed": seed}).data)
        truth, answers, _, _ = read_answers(folder, SEEDS[seed])
        tested |= set(NUMBERS[test].tolist())
        right |= set(NUMBERS[test][answers == truth].tolist())
    table = wrong_table(read_reproduction(folder), "slice")
    assert [int(row[0]) for row in table.rows] == sorted(tested - right)
    for number, patient, plane, area, truth, answers, near in table.rows:
        index = int(np.flatnonzero(int(number) == NUMBERS)[0])
        assert (patient, plane) == (f"P{index // 3:02}", plane_of(int(number)))
        assert area == (str(100 + index) if index < 60 else "-")
        assert truth == CLASS_NAMES[LABELS[index]]
        assert truth not in answers
        runs = near.split("; ")
        assert answers.count("(") <= len(runs) <= 3
        for one in runs:
            nearest = [group.split() for group in one.split(", ")]
            assert sum(len(numbers) for *numbers, _ in nearest) == 5
            for *numbers, name in nearest:
                for neighbour in numbers:
                    assert name == CLASS_NAMES[LABELS[np.flatnonzero(int(neighbour) == NUMBERS)[0]]]


def test_neighbours_are_those_of_the_smallest_distance_or_the_one_that_is_kept(folder):
    reproduction = read_reproduction(folder)
    one = reproduction.first(PROPOSED)
    embeddings = np.load(one.folder / "embeddings.npy")
    train, test = sides(one.run.settings.data)
    found = one.neighbours(reproduction.slices)
    wrong = dict(
        zip(NUMBERS[test], one.predictions.predicted != one.predictions.truth, strict=True)
    )
    assert list(found) == [number for number in NUMBERS[test] if wrong[number]]
    for number, neighbours in found.items():
        offsets = embeddings[train] - embeddings[np.flatnonzero(number == NUMBERS)[0]]
        order = np.linalg.norm(offsets, axis=1).argsort()
        assert neighbours == NUMBERS[train[order[:5]]].tolist()
    (one.folder / "embeddings.npy").rename(one.folder / "elsewhere.npy")
    nearest = dict(zip(one.predictions.numbers, one.predictions.nearest, strict=True))
    alone = {number: [nearest[number]] for number in found}
    try:
        assert one.neighbours(reproduction.slices) == alone
    finally:
        (one.folder / "elsewhere.npy").rename(one.folder / "embeddings.npy")


def test_each_answer_is_counted_once_in_each_kind(folder):
    table = kinds_table(read_reproduction(folder))
    for group, title in (("slice", "by slice"), ("patient", "by patient")):
        runs = read_reproduction(folder).select(group, PROPOSED)
        answers = sum(len(one.predictions.truth) for one in runs)
        wrong = sum((one.predictions.truth != one.predictions.predicted).sum() for one in runs)
        for kind in ("class", "plane"):
            counted = [row for row in table.rows if row[:2] == [title, kind]]
            assert sum(int(row[3]) for row in counted) == answers
            assert sum(int(row[4]) for row in counted) == wrong


def test_a_target_says_of_how_many_runs_it_is_made(tmp_path):
    gone = (*SEEDS[1:], *(f"slice-{PROPOSED}-swapped-seed{seed}" for seed in range(3)))
    reproduction = read_reproduction(write_reproduction(tmp_path / "out", unfinished=gone))
    first, swapped, patient, *_ = records.aims_table(reproduction).rows
    one = reproduction.first(PROPOSED, "slice")
    low, high = one.metrics.accuracy_interval
    assert first[1:4] == [
        *("1 of 3", f"{100 * one.metrics.accuracy:.2f}"),
        f"{100 * low:.2f} to {100 * high:.2f}",
    ]
    assert first[-1] == "missed so far"
    assert swapped[1:] == ["0 of 3", "-", "-", "-", "95.47", "not run yet"]
    assert patient[1] == "5 of 5"
    assert patient[-2:] == ["96.00, then 98.00", "missed"]


def answers_of(folder, name):
    """Numbers, truth, answers, scores and patients of a run; see `read_answers`."""
    numbers = [
        int(line.split(",", 1)[0])
        for line in (folder / "runs" / name / "predictions.csv").read_text().splitlines()[1:]
    ]
    return np.array(numbers), *read_answers(folder, name)


def calibration_error(folder, name, others):
    """The error of 15 bins, calibrated on what the others answered to no test slices of the run."""
    numbers, truth, answers, scores, _ = answers_of(folder, name)
    known = [[], []]
    for other in others:
        theirs, their_truth, _, their_scores, _ = answers_of(folder, other)
        kept = ~np.isin(theirs, numbers)
        known[0].extend(their_scores[kept])
        known[1].extend(their_truth[kept])
    exponent = fit_exponent(np.array(known[0]), np.array(known[1]))
    sure = calibrated(scores, exponent).max(1)
    error = 0
    for low in np.arange(15) / 15:
        own = (sure >= low) & (sure < low + 1 / 15)
        if own.any():
            error += own.mean() * abs(sure[own].mean() - (truth == answers)[own].mean())
    return error


def test_calibration_errors_beside_their_targets(folder, monkeypatch):
    reproduction = read_reproduction(folder)
    folds = [f"patient-{PROPOSED}-fold{fold}" for fold in range(1, 6)]
    every = []
    for group, names in (("slice", SEEDS), ("patient", folds)):
        search = [
            one.run.name for one in reproduction.select(f"search-{group}", "search-as-chosen")
        ]
        for name in names:
            others = [*set(names) - {name}, *(one.run.name for one in search)]
            every.append(100 * calibration_error(folder, name, others))
    by_fold = every[3:]
    aim = (sorted(by_fold)[-2] + max(by_fold)) / 200  # which the worst fold alone misses
    monkeypatch.setattr(records, "PATIENT_CALIBRATION_AIM", aim)
    monkeypatch.setattr(records, "SLICE_CALIBRATION_AIM", 0.0)
    rows = records.aims_table(reproduction).rows[3:]
    assert [row[1] for row in rows] == ["3 of 3"] * 2 + ["5 of 5"] * 2
    expected = [np.mean(every[:3]), max(every[:3]), np.mean(by_fold), max(by_fold)]
    np.testing.assert_allclose([float(row[2]) for row in rows], expected, rtol=0, atol=0.006)
    np.testing.assert_allclose([float(one) for one in rows[2][4].split()], by_fold, atol=0.006)
    assert [row[-1] for row in rows] == [
        *("missed", "missed by seed 0, seed 1, seed 2"),
        *("reached", f"missed by fold {1 + int(np.argmax(by_fold))}"),
    ]
    assert rows[3][-2] == f"at most {100 * aim:.2f}"


@pytest.mark.parametrize(
    ("group", "names"),
    [("slice", SEEDS), ("patient", [f"patient-{PROPOSED}-fold{fold}" for fold in range(1, 6)])],
)
def test_what_wrong_answers_have_in_common(folder, group, names):
    numbers, truth, answers, _, patients = (
        np.concatenate(part)
        for part in zip(*(answers_of(folder, name) for name in names), strict=True)
    )
    wrong = truth != answers
    found = common(read_reproduction(folder), group)
    assert (found.wrong, found.answers) == (wrong.sum(), len(wrong))
    label = CLASS_NAMES.index(found.name)
    assert all((wrong & (truth == label)).sum() >= (wrong & (truth == i)).sum() for i in range(3))
    shares = [(truth[wrong] == label).mean(), (truth == label).mean()]
    np.testing.assert_allclose(found.of_class, 100 * np.array(shares))
    small = np.isin(numbers, NUMBERS[:20])  # a third of those measured
    np.testing.assert_allclose(found.of_small, [100 * small[wrong].mean(), 100 * small.mean()])
    assert found.lowest.run.name == min(names, key=lambda name: accuracy_of(folder, name))
    assert found.patients == len(set(patients[wrong]))
    assert found.all_patients == len(set(patients))
    always = [one for one in set(numbers) if wrong[numbers == one].all()]
    assert (found.always, found.slices) == (len(always), len(set(numbers)))
    assert found.always_again == sum((numbers == one).sum() > 1 for one in always)
    planes = np.array([plane_of(number) for number in numbers])
    squares = 0.0
    for plane in set(planes):
        for kind in (wrong, ~wrong):
            expected = (planes == plane).sum() * kind.mean()
            squares += ((kind & (planes == plane)).sum() - expected) ** 2 / expected
    assert found.planes_p == pytest.approx(chi2.sf(squares, len(set(planes)) - 1))


def accuracy_of(folder, name):
    truth, answers, _, _ = read_answers(folder, name)
    return (truth == answers).mean()


def test_nothing_is_in_common_where_nothing_is_wrong_or_run(tmp_path):
    gone = tuple(SEEDS)
    made = write_reproduction(tmp_path / "out", unfinished=gone)
    for path in made.glob(f"runs/patient-{PROPOSED}-fold*/predictions.csv"):
        rows = [line.split(",") for line in path.read_text().splitlines()]
        right = [[*row[:3], row[2] if i else row[3], *row[4:]] for i, row in enumerate(rows)]
        path.write_text("".join(",".join(row) + "\n" for row in right))
    reproduction = read_reproduction(made)
    assert common(reproduction, "slice") is None
    assert common(reproduction, "patient") is None

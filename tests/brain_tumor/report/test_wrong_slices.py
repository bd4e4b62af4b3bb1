"""Slices that stay wrong, and targets, against counts made anew from the runs' files."""

import numpy as np
import pytest

from examples.brain_tumor.data.slices import CLASS_NAMES, SAMPLE_NUMBERS
from examples.brain_tumor.report import records
from examples.brain_tumor.report.wrong_slices import kinds_table, plane_of, wrong_table
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
    first, swapped, patient = records.aims_table(reproduction).rows
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

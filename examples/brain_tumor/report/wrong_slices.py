"""The slices that a training gets wrong in every run, and whether plane, size or class tell why."""

from bisect import bisect_right
from collections import Counter
from itertools import groupby
from types import SimpleNamespace

import numpy as np
from scipy.stats import chi2_contingency

from ..data.slices import CLASS_NAMES, PLANES
from ..evaluation.evaluate import Predictions
from ..reproduction.plan import PROPOSED
from ..reproduction.results import Reproduction, pooled
from ..training.run_folder import POINTING
from .examination_tables import SIZES, rate, read_pointing
from .page import Table

GROUPS = {"slice": "by slice", "patient": "by patient"}
# The archive's slices come plane by plane: the number of the first slice of each part. Found by a
# classifier from 240 slices looked at, and corrected by eye where it changes or was unsure.
FIRST = (
    *(1, 59, 60, 211, 442, 709, 747, 779, 781, 818, 918, 922, 1034),
    *(1166, 1283, 1456, 1640, 1841, 2242, 2344, 2403, 2540, 2546, 2731, 3063, 3064),
)
OF_FIRST = "acacsacscscacsacsacacscsac"


def plane_of(number: int) -> str:
    """Return in which plane a slice of the archive is, by its number."""
    letter = OF_FIRST[bisect_right(FIRST, number) - 1]
    return next(plane for plane in PLANES if plane[0] == letter)


def wrong_table(reproduction: Reproduction, group: str) -> Table:
    """Return the slices that every run of the proposed training which tested them misses."""
    results = reproduction.select(group, PROPOSED)
    every = pooled(one.predictions for one in results)
    slices, areas, rows = reproduction.slices, _areas(reproduction), []
    names = dict(zip(slices.numbers, np.array(CLASS_NAMES)[slices.labels], strict=True))
    found = [one.neighbours(slices) for one in results]
    for number in _always_wrong(every):
        own = every.numbers == number
        given = Counter(CLASS_NAMES[label] for label in every.predicted[own])
        rows.append(
            [
                *(number, every.patients[own][0], plane_of(number), areas.get(number)),
                names[number],
                ", ".join(f"{name} ({count})" for name, count in given.items()),
                "; ".join(_by_class(near[number], names) for near in found if number in near),
            ]
        )
    return Table(
        ["slice", "patient", "plane", "tumour", "truth", "answers (runs)", "nearest in each run"],
        rows,
    )


def _always_wrong(every: Predictions) -> list[int]:
    """Return the numbers of the slices that no answer gets right, ascending."""
    return np.setdiff1d(every.numbers, every.numbers[every.right]).tolist()


def _by_class(numbers: list[int], names: dict[int, str]) -> str:
    """Return the numbers of slices, the name of their class after each group of one."""
    groups = groupby(numbers, names.get)
    return ", ".join(f"{' '.join(map(str, members))} {name}" for name, members in groups)


def kinds_table(reproduction: Reproduction) -> Table:
    """Return how many answers are wrong for each class, plane and size of tumour."""
    rows = []
    for group, title in GROUPS.items():
        results = reproduction.select(group, PROPOSED)
        if not results:
            continue
        every = pooled(one.predictions for one in results)
        for kind, chosen in _kinds(reproduction, every).items():
            wrong = ~every.right[chosen]
            rows.append([title, *kind, len(wrong), wrong.sum(), *rate(wrong)])
    return Table(["split", "", "", "answers", "wrong", "share", "Wilson 95 %"], rows)


def _kinds(reproduction: Reproduction, every: Predictions) -> dict[tuple[str, str], np.ndarray]:
    """Return which answers (n,) are to slices of each class, plane and size, of which there are."""
    areas = _areas(reproduction)
    limits = np.quantile(list(areas.values()), [1 / 3, 2 / 3]) if areas else []
    planes = np.array([plane_of(number) for number in every.numbers])
    area = np.array([areas.get(number, -1) for number in every.numbers])
    third = np.where(area < 0, -1, np.searchsorted(limits, area))
    kinds = {
        **{("class", name): every.truth == i for i, name in enumerate(CLASS_NAMES)},
        **{("plane", name): planes == name for name in PLANES},
        **{("tumour", name): third == i for i, name in enumerate(SIZES)},
    }
    return {kind: chosen for kind, chosen in kinds.items() if chosen.any()}


def common(reproduction: Reproduction, group: str) -> SimpleNamespace | None:
    """Return what the wrong answers of the proposed training have in common, if there are any."""
    results = reproduction.select(group, PROPOSED)
    if all(one.predictions.right.all() for one in results):
        return None
    every = pooled(one.predictions for one in results)
    wrong, kinds = ~every.right, _kinds(reproduction, every)
    planes = [chosen for (kind, _), chosen in kinds.items() if kind == "plane"]
    counts = np.array([[every.right[one].sum(), wrong[one].sum()] for one in planes])
    label = int(np.bincount(every.truth[wrong]).argmax())
    small = kinds.get(("tumour", SIZES[0]))  # where they were measured
    always = np.isin(every.numbers, _always_wrong(every))
    _, tested = np.unique(every.numbers[always], return_counts=True)
    return SimpleNamespace(
        wrong=wrong.sum(),
        answers=len(wrong),
        name=CLASS_NAMES[label],  # of the class with the most of them
        of_class=_shares(every.truth == label, wrong),
        of_small=None if small is None else _shares(small, wrong),
        planes_p=chi2_contingency(counts[:, counts.any(0)]).pvalue,
        lowest=min(results, key=lambda one: one.metrics.accuracy),
        patients=len(np.unique(every.patients[wrong])),  # who have wrong answers
        all_patients=len(np.unique(every.patients)),
        always=len(tested),  # slices with wrong answers alone
        always_again=(tested > 1).sum(),  # those of them that several runs answered
        slices=len(np.unique(every.numbers)),
    )


def _shares(chosen: np.ndarray, wrong: np.ndarray) -> tuple[float, float]:
    """Return in per cent how many of the wrong answers, and of all, are the chosen ones."""
    return 100 * chosen[wrong].mean(), 100 * chosen.mean()


def _areas(reproduction: Reproduction) -> dict[int, int]:
    """Return the areas of tumours, in pixels, by the slices' numbers, as far as runs have them."""
    areas: dict[int, int] = {}
    for one in reproduction.results:
        path = one.folder / POINTING
        if path.is_file():
            numbers, area, *_ = read_pointing(path)
            areas |= zip(numbers.tolist(), area.tolist(), strict=True)
    return areas

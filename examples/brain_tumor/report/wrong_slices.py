"""The slices that a training gets wrong in every run, and whether plane, size or class tell why."""

import csv
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..data.slices import CLASS_NAMES, PLANES
from ..evaluation.metrics import wilson_interval
from ..files import check_sum
from ..reproduction.plan import PROPOSED
from ..reproduction.results import Reproduction, Result, read_slice_table
from ..training.run_folder import POINTING, PREDICTIONS
from .examination_tables import SIZES, read_pointing
from .page import Table

GROUPS = {"slice": "by slice", "patient": "by patient"}
# The archive's slices come plane by plane: the number of the first slice of each part. Found by a
# classifier from 240 slices looked at, and corrected by eye where it changes or was unsure.
FIRST = (
    *(1, 59, 60, 211, 442, 709, 747, 779, 781, 818, 918, 922, 1034),
    *(1166, 1283, 1456, 1640, 1841, 2242, 2344, 2403, 2540, 2546, 2731, 3063, 3064),
)
OF_FIRST = "acacsacscscacsacsacacscsac"

Row = Mapping[str, str]


def plane_of(number: int) -> str:
    """Return in which plane a slice of the archive is, by its number."""
    letter = OF_FIRST[bisect_right(FIRST, number) - 1]
    return next(plane for plane in PLANES if plane[0] == letter)


def wrong_table(reproduction: Reproduction, group: str) -> Table:
    """Return the slices that every finished run of the proposed training which tested them misses.

    Args:
        reproduction: The finished runs.
        group: "slice" or "patient".
    """
    results = reproduction.select(group, PROPOSED)
    table = read_slice_table(reproduction.folder)
    truth = dict(zip(table.numbers.tolist(), table.labels.tolist(), strict=True))
    areas = _areas(reproduction)
    rows = []
    for number, answers in sorted(_answers(results).items()):
        if not any(_right(one) for one in answers):
            given = Counter(one["predicted"] for one in answers)
            near = (int(one["nearest_training_slice"]) for one in answers)
            rows.append(
                [
                    *(str(number), answers[0]["patient"], plane_of(number)),
                    *(str(areas.get(number, "-")), answers[0]["truth"]),
                    ", ".join(f"{name} ({count})" for name, count in given.items()),
                    ", ".join(f"{one} {CLASS_NAMES[truth[one]]}" for one in near),
                ]
            )
    return Table(
        ["slice", "patient", "plane", "tumour", "truth", "answers (runs)", "nearest in each run"],
        rows,
        f"From {len(results)} finished runs. Tumour: its area in pixels, where `examine` measured "
        "it.",
    )


def kinds_table(reproduction: Reproduction) -> Table:
    """Return how many answers are wrong for each class, plane and size of tumour."""
    areas = _areas(reproduction)
    limits = np.quantile(list(areas.values()), [1 / 3, 2 / 3]) if areas else []
    rows = []
    for group, title in GROUPS.items():
        every = _answers(reproduction.select(group, PROPOSED))
        kinds: dict[str, dict[str, list[bool]]] = {
            "class": {name: [] for name in CLASS_NAMES},
            "plane": {name: [] for name in PLANES},
            "tumour": {name: [] for name in SIZES},
        }
        for number, answers in every.items():
            wrong = [not _right(one) for one in answers]
            kinds["class"][answers[0]["truth"]] += wrong
            kinds["plane"][plane_of(number)] += wrong
            if number in areas:
                kinds["tumour"][SIZES[np.searchsorted(limits, areas[number])]] += wrong
        rows += [
            [title, kind, name, *_rate(wrong)]
            for kind, parts in kinds.items()
            for name, wrong in parts.items()
            if wrong
        ]
    return Table(
        ["split", "", "", "answers", "wrong", "share", "Wilson 95 %"],
        rows,
        "All finished runs of the proposed training. Tumours by thirds of their area, where "
        "`examine` measured it. Slices of one patient are correlated, so the intervals are too "
        "narrow.",
    )


def _rate(wrong: Sequence[bool]) -> list[str]:
    low, high = (100 * bound for bound in wilson_interval(sum(wrong), len(wrong)))
    share = f"{100 * sum(wrong) / len(wrong):.1f} %"
    return [str(len(wrong)), str(sum(wrong)), share, f"{low:.1f} to {high:.1f}"]


def _right(row: Row) -> bool:
    return row["predicted"] == row["truth"]


def _answers(results: Iterable[Result]) -> dict[int, list[Row]]:
    """Return by the slices' numbers their rows in the predictions of the runs that tested them."""
    found = defaultdict(list)
    for result in results:
        path = result.folder / PREDICTIONS
        check_sum(path)
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found[int(row["slice"])].append(row)
    return found


def _areas(reproduction: Reproduction) -> dict[int, int]:
    """Return the areas of tumours, in pixels, by the slices' numbers, as far as runs have them."""
    areas: dict[int, int] = {}
    for one in reproduction.results:
        path = one.folder / POINTING
        if path.is_file():
            numbers, area, _, _ = read_pointing(path)
            areas |= zip(numbers.tolist(), area.tolist(), strict=True)
    return areas

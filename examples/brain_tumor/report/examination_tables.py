"""Tables of what `examine` finds: strange pictures, and where Grad-CAM points."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.metrics import wilson_interval
from ..files import column, read_table, readable
from .page import Table

HELD_OUT, CROSS_FITTED, TEST_SLICES = "held-out slices", "cross-fitted", "test slices"
LIMITS = {  # by the rule that made a file of `examine`; TEST_SLICES is that of older versions
    HELD_OUT: "the limit is that of 5 % of the held-out slices of the training side",
    CROSS_FITTED: "the run held out no slices, so the limit is that of 5 % of the training slices, "
    "each by a fit to four fifths of the patients, not its own among them",
    TEST_SLICES: "the run held out no slices, so the limit is that of 5 % of the test slices "
    "themselves",
}
SIZES = ("small", "medium", "large")  # thirds of the test slices by the area of the tumour


def strange_table(found: Mapping[str, Any]) -> Table:
    """Return for each kind of strange pictures how well scores tell them from test slices."""
    alarms, rows = f"{100 * found['false_alarms']:.1f} %", []
    if "limit" in found:
        limit, number = found["limit"], found["test_slices"]
        rows.append({"pictures": "test slices", "number": number, "flagged": alarms})
    else:  # of an older version
        limit = HELD_OUT if found["calibrated"] else TEST_SLICES
    rows += [
        {
            "pictures": kind,
            "number": one["pictures"],
            "flagged": f"{100 * one['flagged']:.0f} %",
            **{f"AUROC: {score}": f"{area:.3f}" for score, area in one["auroc"].items()},
        }
        for kind, one in found["kinds"].items()
    ]
    return Table.of(
        rows,
        "Flagged: called unlike the slices trained on, by the first of the scores; "
        f"{LIMITS[limit]}, and {alarms} of the test slices are flagged too. Pictures of one grey "
        "value are refused before any of this.",
    )


def pointing_table(runs: Mapping[str, Sequence[Path]]) -> Table:
    """Return how often the hottest point lies in the tumour, by name of the files' training."""
    rows = []
    for name, paths in runs.items():
        parts = [read_pointing(path) for path in paths]
        _, area, head, inside = (np.concatenate(column) for column in zip(*parts, strict=True))
        third = np.searchsorted(np.quantile(area, [1 / 3, 2 / 3]), area)
        sizes = {"all": third >= 0} | {size: third == i for i, size in enumerate(SIZES)}
        for size, chosen in sizes.items():
            if chosen.any():
                chance = f"{100 * (area / head)[chosen].mean():.1f} %"
                rows.append([name, size, chosen.sum(), *rate(inside[chosen]), chance])
    return Table(
        ["training", "tumour", "test slices", "hottest point inside", "Wilson 95 %", "by chance"],
        rows,
        "The pointing game: how often the hottest point of the Grad-CAM lies in the tumour's "
        "outline, by thirds of the tumour's area. By chance: the tumour's share of the head's "
        "area; the middle, where tumours are more frequent, hits more. A map without heat, or the "
        "same everywhere, counts as a miss.",
    )


def rate(hits: np.ndarray) -> list[str]:
    """Return the share of what is true (n,), and Wilson's interval, in per cent."""
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return [f"{100 * hits.mean():.1f} %", f"{100 * low:.1f} to {100 * high:.1f}"]


def read_pointing(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return numbers (n,), areas of tumour and head (n,), whether the hottest point lies inside."""
    with readable(path, "a table of hottest points"):
        rows = read_table(path)
        areas = (column(rows, name, int) for name in ("slice", "tumour_area", "head_area"))
        return *areas, column(rows, "inside", lambda text: text == "1")  # empty: no heat

"""The sections of the report about the recipe: what of it is the paper's, and how it was chosen."""

from ..evaluation.metrics import wilson_interval
from ..reproduction.plan import DEVELOPMENT_FOLD, PROPOSED, SEARCH, SEARCH_PACE
from ..reproduction.results import Result
from ..settings import load_settings, setting_fields
from ..training.run_folder import METRICS, read_json
from .document import Block, Paragraph, Table
from .reporting import Report
from .tables import bounds, percent

ELSEWHERE = ("weights", "layout", "split", "fold", "split_seed", "seed")  # no part of a recipe


def recipe(report: Report) -> list[Block]:
    """Which settings are the paper's, and the paper's own recipe beside them."""
    settings, papers = report.reproduction.budget.settings(None), load_settings("paper")
    rows = [
        [f"{table}.{field.name}", f"{ours}", f"{theirs}"]
        for table, field in setting_fields()
        for ours, theirs in [
            [getattr(getattr(one, table), field.name) for one in (settings, papers)]
        ]
        if ours != theirs and field.name not in ELSEWHERE
    ]
    if not rows:
        return []
    blocks: list[Block] = [
        report.heading("The recipe, and the paper's own"),
        Paragraph(
            "These settings are not the paper's. All others are, or are left open there (see the "
            "deviations below)."
        ),
        Table(["setting", "here", "the paper's"], rows),
    ]
    compared = [
        (name, where, report.first(training, group))
        for where, groups in (
            ("by slice, seed 0", ("slice", "paper-slice")),
            ("by patient, fold 1", ("patient", "paper-patient")),
        )
        for name, training, group in (
            ("this recipe", PROPOSED, groups[0]),
            ("the paper's recipe, without annealing", "papers-own", groups[1]),
        )
    ]
    rows = [[name, where, *_accuracy(result)] for name, where, result in compared if result]
    if any(name != "this recipe" for name, *_ in rows):
        text = (
            "The paper's recipe was run for as many epochs as the others, its steps of the "
            "learning rate at the same shares of the training; the paper has 275 epochs. One run "
            "each."
        )
        header = ["SphereFace, m = 5, 1-NN", "", "epochs", "accuracy", "Wilson 95 %"]
        blocks.append(Table(header, rows, text))
    return blocks


def search(report: Report) -> list[Block]:
    """What the settings were chosen from."""
    rows = []
    for name in SEARCH:
        pair = [report.first(f"search-{name}", f"search-{side}") for side in ("slice", "patient")]
        if any(pair):
            rows.append([name, *(cell for result in pair for cell in _by_views(result))])
    if not rows:
        return []
    changes = ", ".join(f"{key} {value}" for key, value in SEARCH_PACE.items())
    views = ["1 view", "2", "3", "3, no EMA"]
    return [
        report.heading("How the settings were chosen"),
        Paragraph(
            "On validation slices alone: by slice on a tenth of the training side of the paper's "
            f"split (seed 0), by patient on fold {DEVELOPMENT_FOLD}, whose figures elsewhere are "
            "therefore those of a development fold. No test slice of the paper's split was looked "
            f"at. All were shorter and smaller than the recipe ({changes}); each row differs from "
            "the first in what it says alone. One run each: a slice more or less is 0.5 % by slice "
            "and 0.2 % by patient."
        ),
        Table(
            ["", *(f"by slice: {one}" for one in views), *(f"by patient: {one}" for one in views)],
            rows,
        ),
    ]


def _accuracy(result: Result) -> list[str]:
    metrics = result.metrics
    count = int(sum(map(sum, metrics.confusion)))
    interval = wilson_interval(round(metrics.accuracy * count), count)
    return [str(result.run.settings.training.epochs), percent(metrics.accuracy), bounds(interval)]


def _by_views(result: Result | None) -> list[str]:
    if result is None:
        return ["-"] * 4
    stored = read_json(result.folder / METRICS)
    averaged, last = (
        stored.get(key, {}) for key in ("accuracy_by_views", "accuracy_by_views_without_ema")
    )
    found = [averaged.get(views) for views in "123"] + [last.get("3")]
    return ["-" if one is None else percent(one) for one in found]

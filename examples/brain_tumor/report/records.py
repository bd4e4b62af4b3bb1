"""The tables of a report that say how it came about: aims, recipe, search, faults, runs."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.matlab import FOLDS
from ..evaluation.metrics import seed_interval
from ..files import read_json, read_rows
from ..reproduction.plan import DEVELOPMENT_FOLD, PROPOSED, SEARCH, SWAPPED, Budget
from ..reproduction.results import SESSIONS, Reproduction, Result, calibrate
from ..settings import differences, load_settings, override_settings, write_settings
from ..training.run_folder import ENVIRONMENT, METRICS, POINTING, SPLIT, STRANGE
from . import paper
from .examination_tables import pointing_table, strange_table
from .page import Table, percent
from .tables import TITLES, accuracy

SWAPPED_AIM, PATIENT_AIMS = 0.9547, (0.96, 0.98)  # by slice, 70-30, it is the paper's accuracy
SLICE_CALIBRATION_AIM, PATIENT_CALIBRATION_AIM = 0.03, 0.05  # expected calibration errors
AIMS_TITLE = "SphereFace, m = 5, 1-NN"
DRILLS = Path(__file__).parents[1] / "results" / "drills.json"
ELSEWHERE = ("weights", "layout", "split", "fold", "split_seed", "seed")  # no part of a recipe


def aims_table(reproduction: Reproduction) -> Table:
    """Return the proposed training's accuracies and calibration errors beside their targets."""
    rows = [*_accuracy_aims(reproduction), *_calibration_aims(reproduction)]
    left_out = ("target", "result") if reproduction.synthetic else ()
    return Table.of([{key: row[key] for key in row if key not in left_out} for row in rows])


def _accuracy_aims(reproduction: Reproduction) -> Iterator[dict[str, object]]:
    mark = f" (settings were chosen on fold {DEVELOPMENT_FOLD})"
    mark = mark if reproduction.budget.comparisons else ""
    budget, seeds = reproduction.budget, "mean over the seeds"
    for group, training, name, planned, *aims in (
        ("slice", PROPOSED, f"by slice, 70-30, {seeds}", budget.seeds, paper.ACCURACY),
        ("slice", SWAPPED, f"by slice, 30-70, {seeds}", budget.swapped_seeds, SWAPPED_AIM),
        ("patient", PROPOSED, f"by patient, mean over the folds{mark}", FOLDS, *PATIENT_AIMS),
    ):
        results = reproduction.select(group, training)
        accuracies = [one.metrics.accuracy for one in results]
        met = [percent(aim) for aim in aims if results and np.mean(accuracies) >= aim]
        result = f"{', '.join(met)} reached" if met else "missed"
        target = ", then ".join(map(percent, aims))
        row = _aim(f"accuracy {name}", accuracies, planned, target, result)
        if len(results) == 1:
            row["95 %"] = results[0].metrics.accuracy_interval
        yield row


def _calibration_aims(reproduction: Reproduction) -> Iterator[dict[str, object]]:
    for group, name, of, planned, aim in (
        ("slice", "by slice, 70-30", "seed", reproduction.budget.seeds, SLICE_CALIBRATION_AIM),
        ("patient", "by patient", "fold", FOLDS, PATIENT_CALIBRATION_AIM),
    ):
        errors = {
            one.run.name.rpartition(of)[2]: part.error
            for one in reproduction.select(group, PROPOSED)
            if (part := calibrate(reproduction, one))
        }
        values = list(errors.values())
        given = {"values": values, "planned": planned, "target": f"at most {percent(aim)}"}
        met = values and np.mean(values) <= aim
        name = f"calibration error {name}"
        yield _aim(f"{name}, mean over the {of}s", result="reached" if met else "missed", **given)
        above = ", ".join(f"{of} {number}" for number, error in errors.items() if error > aim)
        result = f"missed by {above}" if above else "reached"
        largest = {"per cent": max(values, default=None), "95 %": None, "each": None}
        yield _aim(f"{name}, the largest of the {of}s", result=result, **given) | largest


def _aim(
    name: str, values: Sequence[float], planned: int, target: str, result: str
) -> dict[str, object]:
    """Return a row; its result is one so far, or none yet, where runs are not finished."""
    mean, interval = seed_interval(values) if values else (None, None)
    result = result if len(values) == planned else f"{result} so far"
    return {
        AIMS_TITLE: name,
        "runs": f"{len(values)} of {planned}",
        "per cent": mean,
        "95 %": interval,
        "each": " ".join(map(percent, values)) or None,
        "target": target,
        "result": result if values else "not run yet",
    }


def recipe_table(budget: Budget) -> Table:
    """Return the settings that are not the paper's."""
    changed = differences(budget.settings(None), load_settings("paper"))
    rows = [
        {"setting": key, "here": str(ours), "the paper's": str(theirs)}
        for key, (ours, theirs) in changed.items()
        if key.split(".")[1] not in ELSEWHERE
    ]
    return Table.of(rows)


def own_recipe_table(reproduction: Reproduction) -> Table:
    """Return the paper's own recipe beside this one."""
    rows = []
    for where, group in ("by slice, seed 0", "slice"), ("by patient, fold 1", "patient"):
        ours = reproduction.first(PROPOSED, group)
        theirs = reproduction.first("papers-own", f"paper-{group}")
        named = {"this recipe": ours, "the paper's recipe, without annealing": theirs}
        for name, result in named.items():
            epochs = result.run.settings.training.epochs if result else "not run yet"
            rows.append([name, where, epochs, *accuracy([result] if result else [])])
    return Table([AIMS_TITLE, "", "epochs", "accuracy", "Wilson 95 %"], rows)


def search_table(reproduction: Reproduction) -> Table:
    """Return what the settings were chosen from, by the number of views."""
    rows = []
    for name in SEARCH:
        groups = [f"search-{side}" for side in ("slice", "patient")]
        pair = [reproduction.select(group, f"search-{name}") for group in groups]
        cells: list[float | None] = []
        for results in pair:
            stored = read_json(results[0].folder / METRICS) if results else {}
            averaged = stored.get("accuracy_by_views", {})
            last = stored.get("accuracy_by_views_without_ema", {})
            cells += [*(averaged.get(views) for views in "123"), last.get("3")]
        if any(pair):
            rows.append([name, *cells])
    views = ("1 view", "2", "3", "3, no EMA")
    header = [f"{side}: {one}" for side in ("by slice", "by patient") for one in views]
    return Table(["", *header], rows)


def examined(reproduction: Reproduction) -> list[tuple[str, Table]]:
    """Return name and table of the proposed training's runs that met strange pictures."""
    return [
        (one.run.name, strange_table(read_json(one.folder / STRANGE)))
        for group in ("slice", "patient")
        for one in reproduction.select(group, PROPOSED)
        if (one.folder / STRANGE).is_file()
    ]


def pointing(reproduction: Reproduction) -> Table:
    """Return where the Grad-CAM of each training points, by slice and by patient."""
    runs: dict[str, list[Path]] = {}
    for one in reproduction.results:
        if (one.folder / POINTING).is_file():
            name = f"{TITLES.get(one.run.training, one.run.training)}, {one.run.group}"
            runs.setdefault(name, []).append(one.folder / POINTING)
    return pointing_table(runs)


def length_table(runs: Mapping[float, Sequence[float]]) -> Table:
    """Return the accuracies for each number of epochs."""
    rows = [[f"{epochs:g}", " ".join(map(percent, values))] for epochs, values in runs.items()]
    return Table(["epochs", "accuracy of each seed"], rows)


def drill_table() -> Table:
    """Return what the drills of the tests counted."""
    return Table.of([{"drill": name, **counts} for name, counts in read_json(DRILLS).items()])


def facts_table(reproduction: Reproduction) -> Table:
    """Return what a reproduction was made from."""
    facts = {key: value for key, value in reproduction.description.items() if key != "budget"}
    budget = reproduction.description["budget"]
    facts |= {f"budget: {key}": value for key, value in budget.items()}
    facts["report written with"] = f"Python {platform.python_version()}"
    return Table(["", ""], facts.items())


def sessions_table(reproduction: Reproduction) -> Table:
    """Return when and on what it was run."""
    path = reproduction.folder / SESSIONS
    return Table.of(read_rows(path) if path.is_file() else [])


def settings_text(result: Result) -> str:
    """Return a run's settings, but for where the weights lay: that is nobody's."""
    settings = result.run.settings
    name = Path(settings.network.weights).name
    return write_settings(override_settings(settings, {"weights": name})).strip()


def run_table(reproduction: Reproduction) -> Table:
    """Return each run with its split, the commit that trained it, and its time."""
    rows = []
    for one in reproduction.results:
        split, made = read_json(one.folder / SPLIT), one.folder / ENVIRONMENT
        sides = f"{len(split['train'])} / {len(split['test'])}"
        commit = read_json(made).get("commit") if made.is_file() else None
        rows.append([one.run.name, sides, split["sha256"][:16], commit, f"{one.hours:.2f}"])
    return Table(["run", "train / test", "SHA-256 of the split", "commit", "hours"], rows)

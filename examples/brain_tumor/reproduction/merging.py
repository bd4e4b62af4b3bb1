"""Taking finished runs out of a reproduction, small enough to be committed, and into another.

What is left behind is what no table needs: checkpoints, logs of single steps, and the embeddings of
most runs.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import (
    PARTIAL,
    SUMS,
    as_csv,
    check_sum,
    read_array,
    read_json,
    write_array,
    write_sums,
    write_text,
)
from ..settings import Settings, differences, override_settings, read_settings, write_settings
from ..training import run_folder
from .plan import PROPOSED, SWAPPED, Run
from .results import (
    REPRODUCTION,
    RUNS,
    SESSIONS,
    SLICES,
    SPEED,
    Result,
    SliceTable,
    is_finished,
    read_reproduction,
)

SAME = ("synthetic", "slices_sha256", "images_sha256", "weights_sha256")  # or nothing is comparable


def collect(out: Path, folder: Path) -> list[str]:
    """Copy the results of finished runs, without checkpoints, out of a reproduction into a folder.

    Runs that are there are left as they are, but for the neighbours of wrong slices that older ones
    lack. Return the names of those that were copied.

    Raises:
        UserError: The folder holds results of other data or weights, or cannot be written.
    """
    reproduction = read_reproduction(out)
    if (folder / REPRODUCTION).is_file():
        _check_same(folder, out)
    (folder / RUNS).mkdir(parents=True, exist_ok=True)
    copied = []
    for result in reproduction.results:
        target = folder / RUNS / result.run.name
        if not target.exists():
            _copy_run(result, target)
            copied.append(result.run.name)
        if result.run.training == PROPOSED and result.has_embeddings:
            _keep_neighbours(result, reproduction.slices, target)
    for name in (SLICES, SESSIONS, SPEED, REPRODUCTION):
        if (out / name).is_file():
            write_text(folder / name, (out / name).read_text(encoding="utf-8"))
    return copied


def merge(folder: Path, out: Path, runs: Sequence[Run]) -> list[str]:
    """Take the planned runs that another folder holds finished into a reproduction.

    Runs that the reproduction has finished are left as they are. Return the names of those taken.

    Raises:
        UserError: The other folder is of other data or weights, or a run has other settings.
    """
    _check_same(folder, out)
    taken = []
    for run in runs:
        source, target = folder / RUNS / run.name, out / RUNS / run.name
        if not is_finished(source, run) or is_finished(target, run):
            continue
        path = source / run_folder.SETTINGS
        changed = differences(_placeless(read_settings(path)), _placeless(run.settings))
        if changed:
            raise UserError(f"{path}: {min(changed)} differs from the plan's; was it another's?")
        with _replacing_folder(target) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True)
        taken.append(run.name)
    return taken


def _check_same(folder: Path, out: Path) -> None:
    theirs, ours = read_json(folder / REPRODUCTION), read_json(out / REPRODUCTION)
    for key in SAME:
        if theirs.get(key) != ours[key]:
            raise UserError(
                f"{folder / REPRODUCTION}: {key} is {theirs.get(key)!r} there and {ours[key]!r} in "
                f"{out}; only runs of the same data and weights can stand side by side"
            )


def _placeless(settings: Settings) -> Settings:
    """Return settings without where the weights lie, whose sum is checked instead."""
    return override_settings(settings, {"weights": ""})


def _keep_neighbours(result: Result, slices: SliceTable, target: Path) -> None:
    own, answers = (one / run_folder.PREDICTIONS for one in (result.folder, target))
    if (target / run_folder.NEIGHBOURS).is_file() or own.read_bytes() != answers.read_bytes():
        return
    kept = sorted(path for path in target.iterdir() if path.name != SUMS)
    for path in kept:
        check_sum(path)
    found = result.neighbours(slices)
    rows = [(number, one) for number, nearest in found.items() for one in nearest]
    write_text(target / run_folder.NEIGHBOURS, as_csv([("slice", "training_slice"), *rows]))
    write_sums(target, [run_folder.NEIGHBOURS, *(path.name for path in kept)])


def _copy_run(result: Result, target: Path) -> None:
    names = [
        *(run_folder.SPLIT, run_folder.ENVIRONMENT, run_folder.EPOCHS),
        *(run_folder.PREDICTIONS, run_folder.METRICS, run_folder.POINTING, run_folder.STRANGE),
    ]
    if result.run.training == PROPOSED:
        names += [run_folder.VIEW_PREDICTIONS.format(views) for views in (1, 2, 3)]
    arrays = ()
    group, seed = result.run.group, result.run.settings.training.seed
    if (group, seed) == ("slice", 0) and result.run.training != SWAPPED:  # t-SNE, angles
        arrays = (run_folder.EMBEDDINGS, run_folder.ANGLES)
    with _replacing_folder(target) as partial:
        for name in names:
            if (result.folder / name).is_file():
                check_sum(result.folder / name)
                shutil.copyfile(result.folder / name, partial / name)
        write_text(partial / run_folder.SETTINGS, write_settings(_placeless(result.run.settings)))
        for name in arrays:
            write_array(partial / name, read_array(result.folder / name).astype(np.float16))
        write_sums(partial, sorted(path.name for path in partial.iterdir()))


@contextmanager
def _replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `target` if the block succeeds."""
    partial = target.with_name(target.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    yield partial
    shutil.rmtree(target, ignore_errors=True)  # of a run begun here, finished there
    partial.rename(target)

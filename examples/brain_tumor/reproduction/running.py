"""Running a plan: each run in its own folder, several side by side, going on where it was cut off.

What the folder of a reproduction holds is in results.py.
"""

import dataclasses
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.folders import PLANES_NAME
from ..data.matlab import ARCHIVE_SIZE
from ..data.slices import CLASS_NAMES, PLANES, SAMPLE_NUMBERS, SliceSet, load_slices
from ..data.splits import make_split
from ..errors import UserError
from ..evaluation.evaluate import evaluate
from ..files import (
    LOCK,
    PARTIAL,
    append_rows,
    as_csv,
    locked,
    read_json,
    read_table,
    replacing,
    write_json,
    write_text,
)
from ..settings import Settings
from ..training.checkpoint import epochs_done
from ..training.loop import train
from ..training.run_folder import SETTINGS, choose_precision, describe_environment
from .merging import merge
from .plan import Budget, Run, plan_runs
from .results import REPRODUCTION, RUNS, SAMPLES, SESSIONS, SLICES, SPEED, is_finished
from .speed import measure_speed


def run_plan(
    data: Path,
    weights: Path | None,
    out: Path,
    budget: Budget,
    jobs: int,
    chosen: str = "*",
    merged: Path | None = None,
    minutes: float | None = None,
) -> list[str]:
    """Train and evaluate what a reproduction lacks; return a line for each run that failed.

    Finished runs are left as they are. Each of the `jobs` runs side by side has its share of the
    cores or, if there are GPUs, one of them. Only runs with names like `chosen`, as file names are
    matched, are trained. The finished runs of another folder, `merged`, are taken in before. After
    so many `minutes` of training the others are left as they are then, for the same command.

    Raises:
        UserError: The folder holds another reproduction, no run has such a name, or the data are at
            fault.
    """
    with locked(out):
        runs = plan_runs(budget, weights)  # first: faulty weights are to begin no folder
        if runs and not any(fnmatch(run.name, chosen) for run in runs):
            raise UserError(f"--only {chosen}: no run has such a name, unlike {runs[0].name}")
        slices = load(data, budget.settings(None))
        _begin(out, _describe(slices, weights, budget), slices)
        if merged is not None:
            taken = merge(merged, out, runs)
            print(f"{merged}: {len(taken)} finished runs taken in", flush=True)
        unfinished = [run for run in runs if not is_finished(out / RUNS / run.name, run)]
        left = [run for run in unfinished if fnmatch(run.name, chosen)]
        done = len(runs) - len(unfinished)
        print(f"{out}: {len(runs)} runs, {done} of them finished, {len(left)} to do", flush=True)
        for run in {decoded_as(run.settings): run for run in left}.values():
            load(data, run.settings)  # once, not in every process
        failures: list[str] = []
        append_rows(out / SESSIONS, [_session(jobs, len(left))])
        try:
            failures.extend(_work(data, out, left, jobs, minutes))
        finally:  # what is killed leaves the first line alone
            done = sum(is_finished(out / RUNS / run.name, run) for run in left)
            append_rows(out / SESSIONS, [{"ended": _now(), "finished": done, "failed": failures}])
    return failures


def measure(data: Path, weights: Path | None, out: Path, budget: Budget) -> None:
    """Write what else the report needs, once: sample slices and the speed."""
    slices = load(data, budget.settings(None))
    if not (out / SAMPLES).is_file():
        pictures = {
            " ".join(cell): slices.images[slices.numbers.index(number), 0].numpy()
            for cell, number in _sample_numbers(data, slices).items()
        }
        with replacing(out / SAMPLES) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **pictures)
    if not (out / SPEED).is_file():
        print(f"{out}: measuring the speed of a training step", flush=True)
        settings = plan_runs(budget, weights)[0].settings
        write_json(out / SPEED, measure_speed(settings, slices))


def complete_run(folder: Path, settings: Settings, slices: SliceSet) -> float:
    """Train a run, or go on with it, evaluate it, and return its accuracy."""
    begun = (folder / SETTINGS).is_file()
    if not begun or epochs_done(folder) < settings.training.epochs:
        train(settings, slices, make_split(settings.data, slices), folder, resume=begun)
    return evaluate(folder, slices).accuracy


def default_jobs() -> int:
    """Return the number of GPUs or, without one, of cores: one thread each wastes none."""
    return torch.cuda.device_count() or torch.get_num_threads()


def _work(
    data: Path, out: Path, runs: Sequence[Run], jobs: int, minutes: float | None
) -> Iterator[str]:
    """Complete the runs that the minutes allow, and yield a line for each that fails."""
    started, seconds = time.monotonic(), None if minutes is None else 60 * minutes
    try:
        with _pool(jobs, out) as pool:
            tasks = {pool.submit(_task, data, out / RUNS / run.name, run): run for run in runs}
            for done, task in enumerate(as_completed(tasks, seconds), 1):
                left = (time.monotonic() - started) / done * (len(runs) - done)
                line = f"{tasks[task].name}: "
                try:
                    accuracy, taken = task.result()
                    line += f"{100 * accuracy:.2f} % in {taken / 60:.1f} min"
                except UserError as error:
                    line += str(error)
                    yield line
                print(f"[{done}/{len(runs)}] {line}; about {left / 60:.0f} min left", flush=True)
    except TimeoutError:
        print(f"{out}: {minutes:g} min are over; the same command goes on", flush=True)


@contextmanager
def _pool(jobs: int, out: Path) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool whose processes end at once when the block fails, or this process dies."""
    context = get_context("spawn")
    stop, places = context.Event(), context.SimpleQueue()
    for place in range(jobs):
        places.put(place)
    logs = out / "logs"
    logs.mkdir(exist_ok=True)
    threads = max(1, torch.get_num_threads() // jobs)
    arguments = (stop, places, threads, os.getpid(), logs)
    pool = ProcessPoolExecutor(jobs, context, initializer=_start_process, initargs=arguments)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            f"{out}: a process died, perhaps for want of memory; the same command goes on, and "
            "with a smaller --jobs needs less"
        ) from None
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_process(stop: Any, places: Any, threads: int, parent: int, logs: Path) -> None:  # noqa: ANN401
    place = places.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent decides
    threading.Thread(target=_watch, args=(stop, parent), daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    else:
        torch.set_num_threads(threads)
    sys.stderr = (logs / f"{place}.log").open("a", buffering=1, encoding="utf-8")


def _watch(stop: Any, parent: int) -> None:  # noqa: ANN401
    while not stop.wait(1.0):
        if os.getppid() != parent:
            break
    os._exit(1)


def _task(data: Path, folder: Path, run: Run) -> tuple[float, float]:
    started = time.monotonic()
    image_size, crop = decoded_as(run.settings)
    slices = _load_once(data, image_size, progress=False, crop=crop)
    return complete_run(folder, run.settings, slices), time.monotonic() - started


def decoded_as(settings: Settings) -> tuple[int, str]:
    """Return what of the settings changes how slices are decoded: size and crop."""
    return settings.data.image_size, settings.data.crop


def load(data: Path, settings: Settings) -> SliceSet:
    """Load slices as the settings want them."""
    image_size, crop = decoded_as(settings)
    return load_slices(data, image_size, progress=sys.stderr.isatty(), crop=crop)


_load_once = lru_cache(maxsize=2)(load_slices)


def _sample_numbers(data: Path, slices: SliceSet) -> dict[tuple[str, str], int]:
    """Return the slice of each class and plane that figure 1 shows, as far as they are known."""
    if not slices.synthetic:
        return SAMPLE_NUMBERS if len(slices.numbers) == ARCHIVE_SIZE else {}
    try:
        planes = {int(row["slice"]): row["plane"] for row in read_table(data / PLANES_NAME)}
    except (OSError, KeyError, ValueError):
        return {}  # phantoms of an older version: figure 1 is left out
    cells: dict[tuple[str, str], int] = {}
    for number, label in zip(slices.numbers, slices.labels.tolist(), strict=True):
        if planes.get(number) in PLANES:
            cells.setdefault((CLASS_NAMES[label], planes[number]), number)
    return cells


def _begin(out: Path, description: dict[str, Any], slices: SliceSet) -> None:
    """Write what a new folder is for, or check that it is for the same."""
    path = out / REPRODUCTION
    if path.is_file():
        stored = read_json(path)
        for key, value in description.items():
            if stored.get(key) != value:
                raise UserError(
                    f"{path}: {key} is {stored.get(key)!r} there and {value!r} now; "
                    "a reproduction goes on with its own data, weights and budget"
                )
        return
    unborn = {LOCK, RUNS, SLICES, SLICES + PARTIAL, REPRODUCTION + PARTIAL}
    if out.exists() and any(entry.name not in unborn for entry in out.iterdir()):
        raise UserError(f"{out}: holds something else; name an empty folder")
    (out / RUNS).mkdir(parents=True, exist_ok=True)
    write_text(out / SLICES, _slice_table(slices))
    write_json(path, description)


def _describe(slices: SliceSet, weights: Path | None, budget: Budget) -> dict[str, Any]:
    if slices.classes != CLASS_NAMES or not slices.patients_known:
        raise UserError("--data: reproduce needs the archive's slices, for it splits by patient")
    return {
        # Through JSON and back, a tuple is a list.
        "budget": {**dataclasses.asdict(budget), "lengths": list(budget.lengths)},
        "synthetic": slices.synthetic,
        "slices": len(slices.numbers),
        "slices_sha256": hashlib.sha256(_slice_table(slices).encode()).hexdigest(),
        "images_sha256": slices.digest,
        "weights": weights.name if weights else "",
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights else "",
    }


def _slice_table(slices: SliceSet) -> str:
    folds = [""] * len(slices.numbers) if slices.folds is None else slices.folds.tolist()
    names = [CLASS_NAMES[label] for label in slices.labels.tolist()]
    rows = zip(slices.numbers, names, slices.patients, folds, strict=True)
    return as_csv([("slice", "class", "patient", "fold"), *rows])


def _session(jobs: int, left: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    environment = describe_environment(device, choose_precision("auto", device))
    own = {"started": _now(), "runs left": left, "jobs": jobs, "cores": os.cpu_count()}
    return own | environment


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())

"""Faults that a reproduction survives: brought about on this machine, and counted for the report.

Each drill writes into a folder of its own, needs no special rights, and counts what became of each
fault. What may crash or be killed runs in a process of its own.
"""

import errno
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from multiprocessing import get_context
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # on Windows
    resource = None

import numpy as np
import torch

from examples.brain_tumor.data.slices import SliceSet
from examples.brain_tumor.data.splits import Split
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.evaluation.evaluate import evaluate
from examples.brain_tumor.files import PARTIAL, append_rows, read_rows, write_cache, write_text
from examples.brain_tumor.settings import load_settings
from examples.brain_tumor.training.checkpoint import read_checkpoint
from examples.brain_tumor.training.loop import start, train
from examples.brain_tumor.training.run_folder import (
    ANGLES,
    CHECKPOINT,
    EMBEDDINGS,
    EPOCHS,
    METRICS,
    PREDICTIONS,
    SETTINGS,
)

from .hostile_files import (
    Counts,
    in_another_process,
    malicious_archives,
    mutated_mats,
    poisoned_checkpoints,
)

SIDE = 32  # pixels of the slices that are trained on
TINY = load_settings(
    "quick",
    {
        **{"image_size": SIDE, "width": 0.1, "embedding_size": 8, "layout": "slim"},
        **{"batch_size": 5, "epochs": 12, "precision": "float32", "views": 1},
    },
)
TINY_SPLIT = Split(
    train=torch.arange(10), test=torch.arange(10, 15), name="drill", description="By number."
)
LONGEST_RUN = 120.0  # seconds, of a training that takes one or two
RESULTS = (METRICS, PREDICTIONS, EMBEDDINGS, ANGLES)


def run_drills(folder: Path) -> dict[str, Counts]:
    """Run every drill in an empty folder, which takes about a minute.

    Args:
        folder: Where the drills write; what they leave is of no further use.

    Returns:
        For each drill what was tried and what became of it; what "failed" is a fault of ours.
    """
    drills: dict[str, Callable[[Path], Counts]] = {
        "damaged and hostile .mat files": mutated_mats,
        "trainings killed and resumed": killed_runs,
        "full disks": full_disk,
        "poisoned checkpoints": poisoned_checkpoints,
        "malicious archives": malicious_archives,
    }
    counts = {}
    for number, (name, drill) in enumerate(drills.items()):
        own = folder / str(number)
        own.mkdir()
        counts[name] = drill(own)
    return counts


# ------------------------------------------------------------------------ killed and resumed


def killed_runs(folder: Path, kills: int = 20, seed: int = 0) -> Counts:
    """Kill short trainings at random moments and resume each until it ends.

    Args:
        folder: Where they are left, one folder each.
        kills: How many SIGKILLs.
        seed: Decides when they come, evenly over the time that an undisturbed training takes.

    Returns:
        tried: the kills; survived: those after which the training ended with the weights, the
        optimiser's state, the log and the results of an undisturbed one, bit for bit; failed: the
        others; runs: how many trainings it took. Nothing is tried where processes cannot fork.
    """
    if not hasattr(os, "fork"):
        return {"tried": 0}
    return in_another_process(_kill_runs, folder, kills, seed)


def _kill_runs(folder: Path, kills: int, seed: int) -> Counts:
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-identity is promised on the CPU
    start(TINY, torch.device("cpu"))  # what torch imports late, forks then have
    started = time.perf_counter()
    if not _run_ends(folder / "straight", LONGEST_RUN):
        raise RuntimeError("an undisturbed training does not end")
    duration = time.perf_counter() - started
    generator = np.random.default_rng(seed)
    done = survived = runs = 0
    while done < kills:
        out, own, ended = folder / str(runs), 0, False
        while not ended and done + own < kills:
            ended = _run_ends(out, generator.uniform(0, duration))
            own += not ended
        ended = ended or _run_ends(out, LONGEST_RUN)
        if ended and is_same_run(folder / "straight", out):
            survived += own
        done += own
        runs += 1
    return {"tried": kills, "survived": survived, "failed": kills - survived, "runs": runs}


def _run_ends(out: Path, patience: float) -> bool:
    """Begin or resume a training, kill it after `patience` seconds, return whether it was done."""
    process = get_context("fork").Process(target=_run, args=(out,))  # begins at once
    process.start()
    process.join(patience)
    process.kill()
    process.join()
    return process.exitcode == 0


def _run(out: Path) -> None:
    slices = _tiny_slices()
    with redirect_stderr(io.StringIO()):
        train(TINY, slices, TINY_SPLIT, out, resume=(out / SETTINGS).is_file())
        evaluate(out, slices)


def is_same_run(one: Path, other: Path) -> bool:
    """Return whether two runs' folders hold the same to the last bit, their times aside."""
    checkpoints = (read_checkpoint(folder / CHECKPOINT) for folder in (one, other))
    logs = ([_without_times(row) for row in read_rows(folder / EPOCHS)] for folder in (one, other))
    return (
        _is_same(*checkpoints)
        and _is_same(*logs)
        and all((one / name).read_bytes() == (other / name).read_bytes() for name in RESULTS)
    )


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in row if key not in ("seconds", "images_per_second")}


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return one == other


def _tiny_slices() -> SliceSet:
    """Return 15 slices of noise, of three classes that differ in brightness."""
    labels = torch.arange(15) % 3
    noise = torch.rand(15, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return SliceSet(
        images=(noise / 2 + labels[:, None, None, None] / 4).half(),
        labels=labels,
        numbers=list(range(1, 16)),
        patients=[f"P{number}" for number in range(1, 16)],
        folds=None,
        synthetic=True,
    )


# ------------------------------------------------------------------------------- full disks


def full_disk(folder: Path) -> Counts:
    """Let the disk be full while a checkpoint, a cache, a report and a log are written.

    Where it ends is set by the system's limit on a file's size, and for the first byte also by
    /dev/full: whoever writes meets the same refusals as on a full disk.

    Returns:
        tried; survived: the file was as before, nothing lay beside it, and one line named the file
        and the reason; failed. Nothing is tried where the system sets no such limit.
    """
    return {"tried": 0} if resource is None else in_another_process(_fill_disk, folder)


def _fill_disk(folder: Path) -> Counts:
    torch.set_num_threads(1)
    state = start(TINY, torch.device("cpu"))
    decoded = {"images": _tiny_slices().images.numpy()}
    writers: dict[str, Callable[[Path], None]] = {
        CHECKPOINT: lambda path: state.save(path.parent),
        "slices.npz": lambda path: write_cache(path, "key", decoded, "lost"),
        "report.html": lambda path: write_text(path, "<p>Text.</p>\n" * 5000),
        EPOCHS: lambda path: append_rows(path, [{"epoch": 1, "loss": 0.5}] * 50),
    }
    outcomes = []
    for name, write in writers.items():
        path = folder / name
        write(path)
        size = path.stat().st_size
        first = size if name == EPOCHS else 0  # a log is added to, the others are replaced
        limits = (first + int(share * (size - 1)) for share in (0, 0.01, 0.5, 1))
        outcomes += [_survives(path, write, _limited_files(limit)) for limit in limits]
        if first == 0 and Path("/dev/full").exists():
            outcomes.append(_survives(path, write, _full_device(path)))
    survived = sum(outcomes)
    return {"tried": len(outcomes), "survived": survived, "failed": len(outcomes) - survived}


def _survives(
    path: Path, write: Callable[[Path], None], full: AbstractContextManager[None]
) -> bool:
    before, neighbours = path.read_bytes(), set(path.parent.iterdir())
    printed = io.StringIO()  # a cache that is not kept ends no program
    with full, redirect_stderr(printed):
        try:
            write(path)
        except UserError as error:
            print(error, file=printed)
        except Exception as error:
            print(repr(error), file=printed)
    message = printed.getvalue()
    survived = (
        path.read_bytes() == before
        and set(path.parent.iterdir()) == neighbours
        and message.startswith(f"{path}: ")
        and len(message.splitlines()) == 1
        and any(os.strerror(code) in message for code in (errno.ENOSPC, errno.EFBIG))
    )
    if not survived:
        print(f"full disk, {path.name}: {message}", file=sys.stderr)
    return survived


@contextmanager
def _limited_files(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def _full_device(path: Path) -> Iterator[None]:
    """Lead what is written in place of `path` to a device without space."""
    path.with_name(path.name + PARTIAL).symlink_to("/dev/full")
    yield

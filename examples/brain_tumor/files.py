"""Reading files and finding damage; writing them whole or not at all, by one process at a time."""

import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

from .errors import UserError

PARTIAL = ".partial"  # what a name ends in while its file is being written
LOCK = ".lock"
DAMAGE = OSError, EOFError, LookupError, RecursionError, TypeError, ValueError, csv.Error
SUMS = "SHA256SUMS"  # of a folder's files, in the form that `sha256sum --check` takes


@contextmanager
def locked(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Make a folder and keep other processes from the lock of this name in it meanwhile.

    The lock lies in the folder, so that no other name of it leads around the lock; a killed
    process lets go of it.

    Raises:
        UserError: Another process has it, or the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is not a folder")
    made = not folder.exists()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        # Windows has no such locks, and would not remove a file that is open.
        with nullcontext() if fcntl is None else _lock(folder, folder / name):
            yield
    finally:
        if made:
            with suppress(OSError):  # it holds something, as it should
                folder.rmdir()


@contextmanager
def _lock(folder: Path, path: Path) -> Iterator[None]:
    with explained(folder):
        file = path.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError  # the last one removed it while this one came
        except OSError:
            raise UserError(f"{folder}: another process is at work in this folder") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which takes its place if the block succeeds.

    Raises:
        UserError: The system refused to write the file: a full disk, no permission.
    """
    temporary = path.with_name(path.name + PARTIAL)
    with explained(path):
        try:
            yield temporary
            # A machine that loses its power may have renamed the file, but not stored its bytes.
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def printable(text: str) -> str:
    """Replace what a terminal may take amiss: line breaks, control characters, what is no text."""
    return "".join(letter if letter.isprintable() else "_" for letter in text)


def write_text(path: Path, text: str) -> None:
    """Write all of `text`, or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON; NaN is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Read a JSON file."""
    with readable(path, "JSON"):
        return json.loads(path.read_text(encoding="utf-8"))


def read_array(path: Path) -> np.ndarray:
    """Read a .npy file."""
    with readable(path, "an array"):
        return np.load(path, allow_pickle=False)


def write_array(path: Path, values: np.ndarray) -> None:
    """Write a .npy file, all of it or nothing."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def read_cache(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Return what `write_cache` kept under a key, or None if it is absent, stale or damaged."""
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if str(file["key"]) == key:
                return {name: file[name] for name in file.files if name != "key"}
    except Exception:  # a zip file checks its own sums, and damage to it shows in a dozen ways
        pass
    return None


def write_cache(path: Path, key: str, arrays: Mapping[str, np.ndarray], otherwise: str) -> None:
    """Keep arrays; that a disk is full or read-only is only mentioned, with what then follows."""
    try:
        with (
            locked(path.parent, f".{path.name}.lock"),
            replacing(path) as temporary,
            temporary.open("wb") as file,
        ):
            np.savez(file, key=np.array(key), **arrays)
    except UserError as error:
        print(f"{error}; {otherwise}", file=sys.stderr)


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append one JSON line per row, all of them or none, to a file that need not exist yet."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    size = path.stat().st_size if path.exists() else 0
    with explained(path):
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # or a checkpoint may outlive the log's lines
        except OSError:
            if path.exists():
                os.truncate(path, size)
            raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the JSON lines of a log."""
    with readable(path, "JSON lines"):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header; the caller says what it is if that fails."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(
    rows: Sequence[Mapping[str, str]], name: str, make: Callable[[str], object]
) -> np.ndarray:
    """Return a column (n,) of what `read_table` read, each value made of its text."""
    return np.array([make(row[name]) for row in rows])


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    """Return rows, the header first, as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def keep_rows(path: Path, count: int) -> None:
    """Drop the lines after the first `count`: what an interrupted epoch left in a log."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if len(lines) < count:
        raise UserError(f"{path}: holds {len(lines)} lines where the checkpoint needs {count}")
    write_text(path, "".join(lines[:count]))


def checksum(path: Path, algorithm: str = "sha256") -> str:
    """Return a file's sum, in hexadecimal digits."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 18):
            digest.update(block)
    return digest.hexdigest()


def write_sums(folder: Path, names: Sequence[str], add: bool = False) -> None:
    """Write down the SHA-256 of a folder's files, by which `check_sum` knows them again.

    Those of other files are forgotten, unless the new ones `add` to them.
    """
    sums = _read_sums(folder / SUMS) if add else {}
    sums |= {name: checksum(folder / name) for name in names}
    write_text(folder / SUMS, "".join(f"{own}  {name}\n" for name, own in sums.items()))


def check_sum(path: Path) -> None:
    """Raise a UserError unless a file is what `write_sums` found; what it did not see passes."""
    sums = path.with_name(SUMS)
    try:
        expected = _read_sums(sums).get(path.name)
        if expected and checksum(path) != expected:
            raise UserError(f"{path}: is damaged: it differs from its sum in {SUMS}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable, or {sums} is not: {error}") from None


def _read_sums(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}  # of a version that kept none
    return dict(line.split("  ")[::-1] for line in path.read_text("ascii").splitlines())


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Check a file's sum; a fault met in reading it becomes a UserError that says `what` it is."""
    check_sum(path)
    try:
        yield
    except DAMAGE as error:
        raise UserError(f"{path}: not readable as {what}: {error}") from None


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` into a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        code = _system_code(error)
        if code is None:
            raise
        raise UserError(f"{path}: cannot be written: {os.strerror(code)}") from error


def _system_code(error: BaseException | None) -> int | None:
    """Return the system's error number; h5py and torch wrap its refusals in errors of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        error = error.__cause__ or error.__context__
    return None

"""Writing files whole or not at all, and saying why where that is impossible."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

PARTIAL = ".partial"  # what a name ends in while its file is being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, which takes its place if the block succeeds.

    Raises:
        UserError: The system refused to write the file: a full disk, no permission.
    """
    temporary = path.with_name(path.name + PARTIAL)
    with _explained(path):
        try:
            yield temporary
            # A machine that loses its power may have renamed the file, but not stored its bytes.
            with temporary.open("r+b") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Append all of `text` to a file, which need not exist yet, or nothing.

    Raises:
        UserError: The system refused to write the file: a full disk, no permission.
    """
    size = path.stat().st_size if path.exists() else 0
    with _explained(path):
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            if path.exists():
                os.truncate(path, size)
            raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
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

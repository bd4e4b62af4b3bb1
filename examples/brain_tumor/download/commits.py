"""The checksum of a large file in a git repository, which the hash of a commit vouches for."""

import os
import re
import subprocess
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

try:
    import resource
except ImportError:  # on Windows, which therefore sets no limit to what git receives
    resource = None

from ..errors import UserError, one_line

MAX_BYTES = 8_000_000  # of a repository without its large files, which git leaves alone
SLOWEST = "1000"  # bytes a second
POINTER = re.compile(  # what git itself holds of a large file
    r"version https://git-lfs\.github\.com/spec/v1\noid (sha256:[0-9a-f]{64})\nsize ([0-9]{1,18})\n"
)


def sum_in_commit(repository: str, commit: str, name: str, seconds: float) -> tuple[str, int]:
    """Return the checksum of a large file, "sha256:...", and its bytes, as a commit has them.

    In place of the file git holds a pointer, its sum; a commit's hash is a hash of all it holds.
    git computes it from what it receives, so that the server is not taken at its word. The
    repository's URL is of a scheme that is trusted; git may take so many seconds.

    Raises:
        UserError: git is missing, the repository cannot be had or does not hold the commit, or the
            commit holds no pointer of that name.
    """
    with TemporaryDirectory() as folder:
        _git(repository, seconds, "clone", "--bare", "--quiet", repository, folder)
        held = _git(
            repository, seconds, "--git-dir", folder, "cat-file", "blob", f"{commit}:{name}"
        )
    pointer = POINTER.fullmatch(held)
    if pointer is None:
        raise UserError(f"{repository}: {name} of commit {commit} is no pointer to a large file")
    return pointer[1], int(pointer[2])


def _git(repository: str, seconds: float, *arguments: str) -> str:
    """Return what git prints, having allowed it nothing but to ask the repository's server."""
    environment = {
        "GIT_ALLOW_PROTOCOL": urlsplit(repository).scheme,
        "GIT_HTTP_LOW_SPEED_LIMIT": SLOWEST,
        "GIT_HTTP_LOW_SPEED_TIME": str(round(seconds)),
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_TERMINAL_PROMPT": "0",
    }
    try:
        return subprocess.run(
            ["git", *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            preexec_fn=_limit_files if resource else None,
            check=True,
        ).stdout
    except FileNotFoundError:
        raise UserError("git: not found; it is needed to know the sum of the weights") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{repository}: git takes more than {seconds:g} s") from None
    except subprocess.CalledProcessError as error:
        raise UserError(f"{repository}: git failed: {one_line(error.stderr)}") from None


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_BYTES, MAX_BYTES))

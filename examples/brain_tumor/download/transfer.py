"""Fetching one file: what was cut off goes on, and nothing is trusted before its sum is right.

A file has its own name only then; until then it is called NAME.partial.
"""

import hashlib
import ipaddress
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, HTTPResponse, responses
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from ..errors import UserError, one_line
from ..files import PARTIAL

BLOCK_BYTES = 1 << 18
SLOWEST = 1000  # bytes a second, on the average of a connection
LONGEST_HEAD = 4  # times the timeout, which counts from byte to byte, for an answer to begin
USER_AGENT = "angular_losses-examples.brain_tumor"
NETWORK_ERRORS = (OSError, HTTPException, ValueError)  # the last for a malformed URL or number


@dataclass(frozen=True)
class Patience:
    """How long a download waits and how often it tries."""

    timeout: float = 30.0  # seconds without a byte after which a connection is given up
    attempts: int = 5  # connections in all
    pause: float = 2.0  # seconds before the second one, doubled before each further one


PATIENCE = Patience()


def fetch(
    url: str,
    path: Path,
    limit: int,
    known: str,
    room: int = 0,
    patience: Patience = PATIENCE,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Download a file, going on with a part that is there already; do nothing if it is whole.

    The URL is of https, or of http on this machine. `limit` is how many bytes the file has at most,
    `known` its checksum, "md5:..." or "sha256:...", and `room` how many bytes are to be free on the
    disk besides. `check` is called with the finished file before it gets its name.

    Raises:
        UserError: The server refuses or cannot be reached, or the file is not the one expected.
        OSError: The file cannot be written.
    """
    algorithm, _, expected = known.partition(":")
    if path.is_file() and checksum(path, algorithm) == expected:
        return
    partial = path.with_name(path.name + PARTIAL)
    # What was stopped between its last byte and its name is whole, and no server would go on.
    if not (partial.is_file() and checksum(partial, algorithm) == expected):
        _receive(url, partial, limit, room, patience)
    try:
        found = checksum(partial, algorithm)
        if found != expected:
            raise UserError(f"{url}: what came has {algorithm} {found}, expected {expected}")
        if check is not None:
            check(partial)
    except UserError:
        partial.unlink()  # going on with it would not make it right
        raise
    partial.replace(path)


class _BrokenError(Exception):
    """A transfer failed in a way that another attempt may mend."""


def _receive(url: str, partial: Path, limit: int, room: int, patience: Patience) -> None:
    """Try to get the rest of a file until it is whole."""
    fault = None
    for attempt in range(patience.attempts):
        if attempt:
            time.sleep(patience.pause * 2 ** (attempt - 1))
        try:
            _transfer(url, partial, limit, room, patience.timeout)
            return
        except _BrokenError as error:
            fault = error
    raise UserError(
        f"{url}: {fault} (attempt {patience.attempts} of {patience.attempts}); "
        f"the same command goes on from the {_in_words(_size(partial))} that are here"
    )


def _transfer(url: str, partial: Path, limit: int, room: int, timeout: float) -> None:
    """Get the rest of a file over one connection."""
    with _open(url, partial, timeout) as response:
        offset, total = _extent(response, partial)
        if total is not None and total > limit:
            raise UserError(f"{url}: {total} bytes are announced, expected at most {limit}")
        _check_room(partial.parent, (limit if total is None else total) - offset + room)
        offset = _append(response, partial, offset, total, limit, timeout)
        if offset > limit:
            partial.unlink()
            raise UserError(f"{url}: sends more than the {limit} bytes expected")
        if total is not None and offset < total:
            raise _BrokenError(f"the connection was cut at {offset} of {total} bytes")


def _append(
    response: HTTPResponse,
    partial: Path,
    offset: int,
    total: int | None,
    limit: int,
    timeout: float,
) -> int:
    """Write what comes behind the first `offset` bytes, and return how many there are then."""
    end = limit + 1 if total is None else total
    begun, started = offset, time.monotonic()
    with (
        partial.open("ab" if offset else "wb") as file,
        tqdm(
            desc=partial.name.removesuffix(PARTIAL),
            total=total,
            initial=offset,
            unit="B",
            unit_scale=True,
            disable=None,  # unless on a terminal
        ) as bar,
    ):
        while offset < end:
            try:
                block = response.read1(min(BLOCK_BYTES, end - offset))
            except NETWORK_ERRORS as error:
                raise _broken(error) from None
            if not block:
                break
            file.write(block)
            offset += len(block)
            bar.update(len(block))
            seconds = time.monotonic() - started
            if seconds > timeout and offset - begun < SLOWEST * seconds:
                raise _BrokenError(f"the server sends less than {SLOWEST} bytes a second")
    return offset


def _open(url: str, partial: Path, timeout: float) -> HTTPResponse:
    """Ask for the rest of a file and return the answer, which is all of it or a part."""
    try:
        if not is_safe(url, url):
            raise UserError(f"{url}: not a URL of https")
        request = Request(url, headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
        if offset := _size(partial):  # parts of two versions would not have the sum
            request.add_header("Range", f"bytes={offset}-")
        opener = build_opener(_CarefulRedirects())
        response = _in_time(lambda: opener.open(request, timeout=timeout), LONGEST_HEAD * timeout)
    except HTTPError as error:
        error.close()
        raise _refusal(url, error, partial) from None
    except NETWORK_ERRORS as error:
        raise _broken(error) from None
    if response.status not in (200, 206):
        response.close()
        raise UserError(f"{url}: {_answer(response.status)}, expected the file")
    return response


def _in_time(call: Callable[[], HTTPResponse], seconds: float) -> HTTPResponse:
    """Return what a call returns, or leave it to itself: an answer's head may come byte by byte."""
    future: Future[HTTPResponse] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    try:
        return future.result(seconds)
    except FutureTimeout:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _refusal(url: str, error: HTTPError, partial: Path) -> Exception:
    """Return what to raise for an answer that is neither the file nor a redirect to it."""
    if 300 <= error.code < 400:
        target = error.headers.get("Location", "")[:200]
        return UserError(f"{url}: a redirect to {target!r} is not followed: https, 10 at most")
    if error.code == 416:  # there is nothing behind what we have, so it is not a part of the file
        partial.unlink(missing_ok=True)
    if error.code in (408, 416, 429) or error.code >= 500:
        return _BrokenError(_answer(error.code))
    return UserError(f"{url}: {_answer(error.code)}, expected the file")


def _extent(response: HTTPResponse, partial: Path) -> tuple[int, int | None]:
    """Return which byte an answer starts with and how many the whole file has, if it says so."""
    if response.status == 200:
        return 0, response.length
    found = re.fullmatch(
        r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", response.headers.get("Content-Range", "")
    )
    if found is None or int(found[1]) != _size(partial):
        partial.unlink(missing_ok=True)
        raise _BrokenError("the server sent another part than it was asked for")
    return int(found[1]), int(found[2])


class _CarefulRedirects(HTTPRedirectHandler):
    """Follows redirects to safe URLs only."""

    def http_error_302(
        self, req: Request, fp: HTTPResponse, code: int, msg: str, headers: Message
    ) -> HTTPResponse | None:
        """Follow a redirect; one that is refused ends in an HTTPError of its code."""
        fp.close()  # urllib would read it to an end that need not come
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: Request, fp: HTTPResponse, code: int, msg: str, headers: Message, newurl: str
    ) -> Request | None:
        """Return the request to follow with, or None."""
        if not is_safe(newurl, req.full_url):
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_safe(url: str, origin: str) -> bool:
    """Tell whether a URL is https, or http on this machine as the one that led to it."""
    return urlsplit(url).scheme == "https" or (_is_local(url) and _is_local(origin))


def _is_local(url: str) -> bool:
    parts = urlsplit(url)
    try:
        return parts.scheme == "http" and ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:  # a name
        return False


def checksum(path: Path, algorithm: str) -> str:
    """Return a file's sum, in hexadecimal digits."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {_in_words(needed)} are needed, {_in_words(free)} are free")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _answer(code: int) -> str:
    return f"the server answered {code} {responses.get(code, '')}".rstrip()


def _broken(error: Exception) -> _BrokenError:
    reason = getattr(error, "reason", error)  # what urllib wraps
    return _BrokenError(one_line(reason) or type(error).__name__)

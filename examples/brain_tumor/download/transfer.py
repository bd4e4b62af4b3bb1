"""Fetching one file: what was cut off goes on, and nothing is trusted before its sum is right.

A file has its own name only then; until then it is called NAME.partial.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from email.message import Message
from http.client import HTTPException, HTTPResponse, responses
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from ..errors import UserError, one_line
from ..files import PARTIAL, checksum

TIMEOUT = 30.0  # seconds without a byte after which a connection is given up
LONGEST_HEAD = 4 * TIMEOUT  # seconds for an answer to begin, of which each byte may come late
SLOWEST = 1000  # bytes a second, on the average of a connection
ATTEMPTS = 5  # connections in all
PAUSE = 2.0  # seconds before the second one, doubled before each further one
BLOCK_BYTES = 1 << 18
USER_AGENT = "angular_losses-examples.brain_tumor"
NETWORK_ERRORS = (OSError, HTTPException, ValueError)  # the last for a malformed URL or number


def fetch(url: str, path: Path, size: int, known: str, room: int = 0) -> None:
    """Download a file, going on with a part that is there already; do nothing if it is whole.

    The URL is of https. `size` is how many bytes the file has, `known` its checksum, "md5:..." or
    "sha256:...", and `room` how many bytes are to be free on the disk besides.

    Raises:
        UserError: The server refuses or cannot be reached, or the file is not the one expected.
        OSError: The file cannot be written.
    """
    algorithm, _, expected = known.partition(":")
    partial = path.with_name(path.name + PARTIAL)

    def is_whole(file: Path) -> bool:
        return file.is_file() and checksum(file, algorithm) == expected

    if is_whole(path):
        return
    # What was stopped between its last byte and its name is whole, and no server would go on.
    if not is_whole(partial):
        _receive(url, partial, size, room)
        found = checksum(partial, algorithm)
        if found != expected:
            partial.unlink()  # going on with it would not make it right
            raise UserError(f"{url}: what came has {algorithm} {found}, expected {expected}")
    partial.replace(path)


class _BrokenError(Exception):
    """A transfer failed in a way that another attempt may mend."""


def _receive(url: str, partial: Path, size: int, room: int) -> None:
    """Try to get the rest of a file until it is whole."""
    fault = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return _transfer(url, partial, size, room)
        except _BrokenError as error:
            fault = error
    raise UserError(
        f"{url}: {fault} (attempt {ATTEMPTS} of {ATTEMPTS}); "
        f"the same command goes on from the {_in_words(_size(partial))} that are here"
    )


def _transfer(url: str, partial: Path, size: int, room: int) -> None:
    """Get the rest of a file over one connection."""
    response, offset = _open(url, partial)
    with response:
        if response.length not in (None, size - offset):
            total = offset + response.length
            raise UserError(f"{url}: {total} bytes are announced, expected {size}")
        needed, free = size - offset + room, shutil.disk_usage(partial.parent).free
        if free < needed:
            raise UserError(
                f"{partial.parent}: {_in_words(needed)} are needed, {_in_words(free)} are free"
            )
        name = partial.name.removesuffix(PARTIAL)
        with (
            partial.open("ab" if offset else "wb") as file,
            # disable=None: unless on a terminal
            tqdm(None, name, size, initial=offset, unit="B", unit_scale=True, disable=None) as bar,
        ):
            for block in _blocks(response, size + 1 - offset):
                file.write(block)
                bar.update(len(block))
    here = _size(partial)
    if here > size:
        partial.unlink()
        raise UserError(f"{url}: sends more than the {size} bytes expected")
    if here < size:
        raise _BrokenError(f"the connection was cut at {here} of {size} bytes")


def _blocks(response: HTTPResponse, most: int) -> Iterator[bytes]:
    """Yield what comes, at most so many bytes, unless it comes too slowly."""
    came, started = 0, time.monotonic()
    while came < most:
        try:
            block = response.read1(min(BLOCK_BYTES, most - came))
        except NETWORK_ERRORS as error:
            raise _broken(error) from None
        if not block:
            return
        yield block
        came += len(block)
        seconds = time.monotonic() - started
        if seconds > TIMEOUT and came < SLOWEST * seconds:
            raise _BrokenError(f"the server sends less than {SLOWEST} bytes a second")


def _open(url: str, partial: Path) -> tuple[HTTPResponse, int]:
    """Ask for the rest of a file; return the answer and which byte of the file it starts with."""
    offset = _size(partial)
    try:
        check_safe(url)
        request = Request(url, headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
        if offset:  # parts of two versions would not have the sum
            request.add_header("Range", f"bytes={offset}-")
        opener = build_opener(_CarefulRedirects())
        response = _in_time(lambda: opener.open(request, timeout=TIMEOUT), LONGEST_HEAD)
    except HTTPError as error:
        response = error  # an answer too, but neither the file nor a redirect to it
    except NETWORK_ERRORS as error:
        raise _broken(error) from None
    if response.status == 200:
        return response, 0
    part = response.headers.get("Content-Range", "")
    if response.status == 206 and part.startswith(f"bytes {offset}-"):
        return response, offset
    response.close()
    raise _refusal(url, response, partial)


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


def _refusal(url: str, response: HTTPResponse | HTTPError, partial: Path) -> Exception:
    """Return what to raise for an answer that is not the file."""
    code = response.status
    answer = f"the server answered {code} {responses.get(code, '')}".rstrip()
    if 300 <= code < 400:
        target = response.headers.get("Location", "")[:200]
        return UserError(f"{url}: a redirect to {target!r} is not followed: https, 10 at most")
    if code in (206, 416):  # with 416 nothing is behind what we have: it is no part of the file
        partial.unlink(missing_ok=True)
    if code == 206:
        return _BrokenError("the server sent another part than it was asked for")
    if code in (408, 416, 429) or code >= 500:
        return _BrokenError(answer)
    return UserError(f"{url}: {answer}, expected the file")


class _CarefulRedirects(HTTPRedirectHandler):
    """Follows redirects to URLs of https only."""

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
        follow = super().redirect_request
        return follow(req, fp, code, msg, headers, newurl) if is_safe(newurl) else None


def check_safe(url: str) -> None:
    """Raise a UserError unless a URL is of https."""
    if not is_safe(url):
        raise UserError(f"{url}: not a URL of https")


def is_safe(url: str) -> bool:
    """Return whether a URL is of https."""
    return urlsplit(url).scheme == "https"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _in_words(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _broken(error: Exception) -> _BrokenError:
    reason = getattr(error, "reason", error)  # what urllib wraps
    return _BrokenError(one_line(reason) or type(error).__name__)

"""Downloads from a server on this machine that fails in every way, and hostile archives."""

import hashlib
import io
import random
import re
import select
import shutil
import socket
import stat
import subprocess
import threading
import zipfile
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request

import pytest
import torch
from safetensors.torch import save, save_file

from examples.brain_tumor.download import sources, transfer
from examples.brain_tumor.download.archives import unpack
from examples.brain_tumor.download.sources import (
    FILES,
    FigshareFile,
    download_slices,
    download_weights,
)
from examples.brain_tumor.download.transfer import fetch
from examples.brain_tumor.errors import UserError
from examples.brain_tumor.files import locked
from examples.brain_tumor.network.mobilenet import MobileNetV1, timm_name

CONTENT = random.Random(0).randbytes(1_000_000)
CUT = 300_000
HASTE = {"TIMEOUT": 60, "LONGEST_HEAD": 240, "ATTEMPTS": 2, "PAUSE": 0}


@pytest.fixture(autouse=True)
def haste(monkeypatch):
    for name, value in HASTE.items():
        monkeypatch.setattr(transfer, name, value)


def md5_of(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers the requests one after another as the test says, the last answer ever again."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requests.append(self)
        answers = server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.close_connection = True
        try:
            answer(self)
        except (BrokenPipeError, ConnectionResetError):
            server.hung_up.set()

    def head(self, code, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def hold(self):
        """Say nothing until the test is over; the client's patience ends now."""
        self.server.lines[-1].is_silent.set()
        self.server.over.wait(60)

    def log_message(self, *arguments):
        pass


class Line(socket.socket):
    """A client's connection, which times out as soon as the server holds it, not by the clock."""

    def __init__(self, connection):
        timeout = connection.gettimeout()
        super().__init__(fileno=connection.detach())
        self.settimeout(timeout)
        self.is_silent = threading.Event()

    def recv_into(self, *arguments):
        while not select.select([self], [], [], 0.01)[0]:
            if self.is_silent.is_set():
                assert self.gettimeout() == HASTE["TIMEOUT"]
                raise TimeoutError("timed out")
        return super().recv_into(*arguments)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self):
        return [request.headers["Range"] for request in self.requests]


def trust(server, monkeypatch):
    """Let this server, which has no https, be as good as one that has."""
    monkeypatch.setattr(transfer, "is_safe", lambda url: url.startswith(("https:", server.url)))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    connect = socket.create_connection
    with Server(("127.0.0.1", 0), Handler) as server:
        server.requests, server.answers, server.sent, server.lines = [], [], 0, []

        def follow(*arguments):
            server.lines.append(Line(connect(*arguments)))
            return server.lines[-1]

        monkeypatch.setattr(socket, "create_connection", follow)
        trust(server, monkeypatch)
        server.hung_up, server.over = threading.Event(), threading.Event()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def whole(content=CONTENT, stop=None, pause=False, length=None):
    """Answer as a good server does; `stop` cuts the body off there, `pause` then holds the line."""

    def answer(request):
        wanted = request.headers["Range"]
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if start >= len(content):
            request.head(416, Content_Range=f"bytes */{len(content)}")
            return
        headers = {"Content_Length": length or len(content) - start}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        request.head(206 if start else 200, **headers)
        request.wfile.write(content[start:stop])
        if pause:
            request.hold()

    return answer


def ignoring_range(request):
    request.head(200, Content_Length=len(CONTENT))
    request.wfile.write(CONTENT)


def without_length(request):
    request.head(200)
    request.wfile.write(CONTENT)


def chunked(request):
    request.head(200, Transfer_Encoding="chunked")
    for start in range(0, len(CONTENT), 70_000):
        block = CONTENT[start : start + 70_000]
        request.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
    request.wfile.write(b"0\r\n\r\n")


def chunked_and_cut(request):
    request.head(200, Transfer_Encoding="chunked")
    request.wfile.write(b"%x\r\n%s" % (len(CONTENT), CONTENT[:CUT]))


def endless(request):
    request.head(200)
    while not request.server.over.is_set():
        request.wfile.write(bytes(100_000))
        request.server.sent += 100_000


def another_part(request):
    request.head(206, Content_Range=f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}", Content_Length=9)
    request.wfile.write(bytes(9))


def silent(request):
    request.hold()


def garbage(request):
    request.wfile.write(b"220 this is no web server\r\n")


def status(code, **headers):
    return lambda request: request.head(code, Content_Length=0, **headers)


def redirect(target, code=302, **headers):
    return status(code, Location=target, **headers)


def get(server, path, *answers, content=CONTENT, **arguments):
    """Fetch a file of which the md5 sum is known from a server with these answers."""
    server.answers[:] = answers
    known = f"md5:{md5_of(content)}"
    arguments = {"size": len(CONTENT), "known": known, **arguments}
    fetch(f"{server.url}/file", path, **arguments)


def refused(function, *arguments, **keywords):
    """The one line that a refusal says."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------ a file arrives


@pytest.mark.parametrize("answer", [whole(), ignoring_range, without_length, chunked])
def test_a_file_arrives_and_is_not_fetched_again(server, tmp_path, answer):
    path = tmp_path / "file"
    for _ in range(2):
        get(server, path, answer)
        assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["file"]
    assert server.ranges() == [None]


def test_a_file_of_other_content_is_replaced(server, tmp_path):
    (tmp_path / "file").write_bytes(b"something else")
    get(server, tmp_path / "file", whole())
    assert (tmp_path / "file").read_bytes() == CONTENT


# --------------------------------------------------------------------------------- it continues


FAULTS = {
    "cut": (whole(stop=CUT), f"bytes={CUT}-"),
    "cut in a chunk": (chunked_and_cut, f"bytes={CUT}-"),
    "stalled": (whole(stop=CUT, pause=True), f"bytes={CUT}-"),
    "silent": (silent, None),
    "no http": (garbage, None),
    "500": (status(500), None),
    "503": (status(503), None),
    "429": (status(429), None),
    "another part": (another_part, None),
    "malformed redirect": (redirect("http://[nowhere/"), None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_mended_by_another_attempt(server, tmp_path, fault):
    answer, asked = FAULTS[fault]
    get(server, tmp_path / "file", answer, whole())
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges() == [None, asked]
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lasting_fault_says_how_to_go_on_and_keeps_what_came(server, tmp_path, fault):
    answer, _ = FAULTS[fault]
    message = refused(get, server, tmp_path / "file", answer)
    assert message.startswith(f"{server.url}/file: ")
    assert "the same command goes on" in message
    assert len(server.requests) == HASTE["ATTEMPTS"]
    assert not (tmp_path / "file").exists()
    here = (tmp_path / "file.partial").stat().st_size if "partial" in str(names(tmp_path)) else 0
    assert f"{here / 1e6:.1f} MB" in message
    server.requests.clear()
    get(server, tmp_path / "file", whole())
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges() == [f"bytes={here}-" if here else None]


def test_parts_of_two_versions_do_not_make_a_file(server, tmp_path):
    path, changed = tmp_path / "file", CONTENT[::-1]
    message = refused(get, server, path, whole(stop=CUT), whole(changed), content=changed)
    assert f"expected {md5_of(changed)}" in message
    assert names(tmp_path) == []
    get(server, path, whole(changed), content=changed)
    assert path.read_bytes() == changed


def test_a_server_that_ignores_the_range_starts_again(server, tmp_path):
    get(server, tmp_path / "file", whole(stop=CUT), ignoring_range)
    assert server.ranges() == [None, f"bytes={CUT}-"]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_part_longer_than_the_file_starts_again(server, tmp_path):
    (tmp_path / "file.partial").write_bytes(bytes(len(CONTENT)))
    get(server, tmp_path / "file", whole())
    assert server.ranges() == [f"bytes={len(CONTENT)}-", None]
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_part_that_is_whole_needs_no_server(server, tmp_path):
    (tmp_path / "file.partial").write_bytes(CONTENT)
    get(server, tmp_path / "file", status(500))
    assert server.requests == []
    assert names(tmp_path) == ["file"]


def test_an_interrupted_download_keeps_what_came(server, tmp_path, monkeypatch):
    def interrupt(bar, count):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer.tqdm, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            get(server, tmp_path / "file", whole())
    here = (tmp_path / "file.partial").stat().st_size
    assert 0 < here < len(CONTENT)
    get(server, tmp_path / "file", whole())
    assert server.ranges()[1] == f"bytes={here}-"
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_attempts_are_spaced_ever_wider(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(transfer.time, "sleep", pauses.append)
    monkeypatch.setattr(transfer, "ATTEMPTS", 4)
    monkeypatch.setattr(transfer, "PAUSE", 2.0)
    refused(get, server, tmp_path / "file", status(503))
    assert pauses == [2, 4, 8]


def test_an_unreachable_server(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with Server(("127.0.0.1", 0), Handler) as closed:
        url = closed.url
    trust(closed, monkeypatch)
    message = refused(fetch, f"{url}/file", tmp_path / "file", 10, "md5:")
    assert "Connection refused" in message


# ----------------------------------------------------------------------------------- it is refused


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (status(404), "404 Not Found"),
        (status(403), "403 Forbidden"),
        (status(202), "202 Accepted"),
        (status(204), "204 No Content"),
        (whole(CONTENT + b"1"), f"{len(CONTENT) + 1} bytes are announced"),
        (redirect("/file"), "redirect to '/file'"),
        (redirect("file:///etc/passwd"), "redirect to 'file:///etc/passwd'"),
        (redirect("ftp://127.0.0.1/file"), "redirect to 'ftp://127.0.0.1/file'"),
        (redirect("http://192.0.2.1/file"), "redirect to 'http://192.0.2.1/file'"),
        (redirect("http://localhost.evil.example/"), "redirect to 'http://localhost.evil"),
        (status(304), "redirect to ''"),
    ],
)
def test_an_answer_that_no_attempt_mends(server, tmp_path, answer, fault):
    message = refused(get, server, tmp_path / "file", answer)
    assert message.startswith(f"{server.url}/file: ")
    assert fault in message
    assert len(server.requests) <= 11
    assert names(tmp_path) == []


def test_a_redirect_that_stays_safe_is_followed_with_its_range(server, tmp_path):
    get(server, tmp_path / "f", redirect("/a"), whole(stop=CUT), redirect("b", 307), whole())
    assert [request.path for request in server.requests] == ["/file", "/a", "/file", "/b"]
    assert server.ranges() == [None, None, f"bytes={CUT}-", f"bytes={CUT}-"]
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_long_chain_of_redirects_ends(server, tmp_path):
    hops = [redirect(f"/{number}") for number in range(50)]
    assert "10 at most" in refused(get, server, tmp_path / "file", *hops)
    assert len(server.requests) == 11


def test_the_body_of_a_redirect_is_not_read(server, tmp_path):
    def answer(request):
        request.head(302, Location="/next")
        while not request.server.over.is_set():
            request.wfile.write(bytes(100_000))

    get(server, tmp_path / "file", answer, whole())
    assert server.hung_up.wait(60)


@pytest.mark.parametrize("target", ["http://example.org/", "http://127.0.0.1/", "ftp://a.b/"])
def test_https_is_not_left(target):
    redirects = transfer._CarefulRedirects()
    origin = Request("https://example.org/file")
    assert redirects.redirect_request(origin, io.BytesIO(), 302, "", {}, target) is None
    followed = redirects.redirect_request(origin, io.BytesIO(), 302, "", {}, "https://a.b/")
    assert followed.full_url == "https://a.b/"


@pytest.mark.parametrize("url", ["http://127.0.0.1/a", "file:///etc/passwd", "ftp://127.0.0.1/a"])
def test_only_https_is_asked(tmp_path, url):
    assert "not a URL of https" in refused(fetch, url, tmp_path / "file", 10, "md5:")


def test_a_wrong_sum_names_both_and_leaves_nothing(server, tmp_path):
    corrupt = b"x" + CONTENT[1:]
    message = refused(get, server, tmp_path / "file", whole(corrupt))
    assert f"md5 {md5_of(corrupt)}, expected {md5_of(CONTENT)}" in message
    assert names(tmp_path) == []
    assert len(server.requests) == 1


def test_a_length_too_large_is_a_cut_and_one_too_small_is_refused(server, tmp_path):
    short = whole(CONTENT[:-1], length=len(CONTENT))
    message = refused(get, server, tmp_path / "file", short, status(503))
    assert "answered 503" in message
    assert (tmp_path / "file.partial").read_bytes() == CONTENT[:-1]
    message = refused(get, server, tmp_path / "new", whole(length=len(CONTENT) - 1))
    assert f"{len(CONTENT) - 1} bytes are announced, expected {len(CONTENT)}" in message
    assert not (tmp_path / "new.partial").exists()


def test_an_endless_body_is_bounded(server, tmp_path):
    message = refused(get, server, tmp_path / "file", endless)
    assert f"more than the {len(CONTENT)} bytes" in message
    assert not (tmp_path / "file.partial").exists()
    assert server.hung_up.wait(60)
    assert server.sent < 50 * len(CONTENT)  # some of it stands in the sockets' buffers


def test_the_disk_is_looked_at_before_the_first_byte(server, tmp_path, monkeypatch):
    free = shutil._ntuple_diskusage(10**10, 0, 2_000_000_000)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda folder: free)
    message = refused(get, server, tmp_path / "file", whole(), room=2_600_000_000)
    assert message == f"{tmp_path}: 2.6 GB are needed, 2.0 GB are free"
    assert names(tmp_path) == []
    room = free.free - len(CONTENT)
    (tmp_path / "file.partial").write_bytes(CONTENT[:5])
    assert "needed" in refused(get, server, tmp_path / "file", whole(), room=room + 6)
    get(server, tmp_path / "file", whole(), room=room + 5)


# ---------------------------------------------------------------------------- the slices


def zipped(members, **arguments):
    """A zip archive of these (name, content) pairs."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, **arguments) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


SLICES = {f"{number}.mat": CONTENT[:number] for number in (1, 2, 766)}
MORE = {f"{number}.mat": CONTENT[:number] for number in (767, 3064)}
PARTS = {
    11: ("cvind.mat", b"folds"),
    12: ("a.zip", zipped((f"a/{name}", content) for name, content in SLICES.items())),
    13: ("b.zip", zipped([*MORE.items(), ("README.txt", b"text"), ("4000.mat", b"")])),
}
PART_FILES = tuple(
    FigshareFile(name, identifier, md5_of(content), len(content))
    for identifier, (name, content) in PARTS.items()
)


def serve_parts(request):
    _, content = PARTS[int(request.path.rpartition("/")[2])]
    whole(content)(request)


def get_slices(server, folder, answer=serve_parts):
    server.answers[:] = [answer]
    server.requests.clear()
    download_slices(folder, f"{server.url}/files", PART_FILES)
    return [request.path for request in server.requests]


def assert_slices(folder):
    expected = {"cvind.mat": b"folds", **SLICES, **MORE}
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    assert {path.name: path.read_bytes() for path in visible} == expected


def test_slices_are_downloaded_unpacked_and_not_fetched_again(server, tmp_path):
    folder = tmp_path / "new" / "slices"
    assert get_slices(server, folder) == ["/files/11", "/files/12", "/files/13"]
    assert_slices(folder)
    assert get_slices(server, folder) == []
    (folder / "2.mat").unlink()
    assert get_slices(server, folder) == ["/files/12"]
    assert_slices(folder)


def test_a_record_that_is_damaged_or_of_another_archive_does_not_count(server, tmp_path):
    get_slices(server, tmp_path)
    for content in (b"", b"\xff\0", b"0" * 32, b"0" * 32 + b"\n1.mat"):
        (tmp_path / ".a.zip.unpacked").write_bytes(content)
        assert get_slices(server, tmp_path) == ["/files/12"]


def test_slices_go_on_where_the_connection_was_lost(server, tmp_path):
    def lose(request):
        _, content = PARTS[int(request.path.rpartition("/")[2])]
        whole(content, stop=100)(request)

    assert "goes on" in refused(get_slices, server, tmp_path, lose)
    assert (tmp_path / "cvind.mat").exists()
    assert get_slices(server, tmp_path) == ["/files/12", "/files/13"]
    assert server.ranges() == ["bytes=100-", None]
    assert_slices(tmp_path)


def test_an_archive_that_is_there_is_only_unpacked(server, tmp_path):
    (tmp_path / "a.zip").write_bytes(PARTS[12][1])
    assert get_slices(server, tmp_path) == ["/files/11", "/files/13"]
    assert_slices(tmp_path)


def test_the_disk_must_hold_what_all_archives_unpack_to(server, tmp_path, monkeypatch):
    needed = 3 * sum(file.size for file in PART_FILES) + PART_FILES[0].size
    first = PART_FILES[:1]
    for free in (needed - 1, needed):
        usage = shutil._ntuple_diskusage(10**10, 0, free)
        monkeypatch.setattr(transfer.shutil, "disk_usage", lambda folder, usage=usage: usage)
        message = refused(get_slices, server, tmp_path)
        assert "are free" in message
        # What suffices for the first file does not for the next, which is larger.
        assert names(tmp_path) == [file.name for file in first if free == needed]


def test_a_full_disk_is_one_line(server, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", "/disk/a.partial")

    monkeypatch.setattr(transfer, "_blocks", full)
    message = refused(get_slices, server, tmp_path)
    assert message == f"{tmp_path}: cannot be written: No space left on device"


def test_folders_unfit_for_slices(server, tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refused(get_slices, server, tmp_path / "file")
    (tmp_path / "SYNTHETIC.txt").touch()
    assert "holds synthetic slices" in refused(get_slices, server, tmp_path)
    assert server.requests == []


def test_figshare_files():
    assert len({file.identifier for file in FILES}) == len({file.md5 for file in FILES}) == 5
    assert all(re.fullmatch("[0-9a-f]{32}", file.md5) for file in FILES)
    # Figshare offers the whole article, with a README of 3303 bytes, as 838.77 MB.
    assert (sum(file.size for file in FILES) + 3303) / 2**20 == pytest.approx(838.77, abs=0.02)


def test_figshare_files_are_those_of_the_design():
    design = Path(__file__).parents[4] / "shared/design/hsadml.md"
    if not design.is_file():
        pytest.skip("../shared, which holds the published sums, is absent")
    text = design.read_text(encoding="utf-8")
    sums = re.findall(r"\b[0-9a-f]{32}\b", text)
    identifiers = re.findall(r"\b33812[0-9]{2}|3381302\b", text)
    archives = FILES[1:]
    assert [file.md5 for file in archives] == sums
    assert [str(file.identifier) for file in archives] == identifiers
    ranges = re.search(r"md5 of the zips ([-0-9, ]+):", text)[1].split(", ")
    assert [file.name for file in archives] == [f"brainTumorDataPublic_{r}.zip" for r in ranges]


# --------------------------------------------------------------------------- hostile archives


def link(name="1.mat"):
    member = zipfile.ZipInfo(name)
    member.create_system = 3
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


def patched(archive, old, new, count=-1):
    assert archive.count(old) >= 1
    assert len(old) == len(new)
    return archive.replace(old, new, count)


def wrong_crc():
    archive = bytearray(zipped([("1.mat", b"good"), ("2.mat", CONTENT[:1000])]))
    archive[archive.index(CONTENT[500:520])] ^= 1  # incompressible, so deflate stores it as it is
    return bytes(archive)


def encrypted():
    archive = zipped([("1.mat", b"secret")])
    local, central = archive.index(b"PK\3\4"), archive.index(b"PK\1\2")
    changed = bytearray(archive)
    changed[local + 6] |= 1
    changed[central + 8] |= 1
    return bytes(changed)


def understated():
    """A member of 100 kB that says it has 10 bytes."""
    size, false = (100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")
    return patched(zipped([("1.mat", bytes(100_000))]), size, false)


def with_method(method):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("1.mat", bytes(1000))
    return file.getvalue()


def twice():
    with pytest.warns(UserWarning, match="Duplicate name"):
        return zipped([("1.mat", b"one"), ("1.mat", b"two")])


GOOD = ("2.mat", b"good")
HOSTILE = {
    "a parent folder": (lambda: zipped([GOOD, ("../1.mat", b"")]), "out of the folder"),
    "a parent folder inside": (lambda: zipped([GOOD, ("a/../../1.mat", b"")]), "out of the folder"),
    "an absolute path": (lambda: zipped([GOOD, ("/tmp/1.mat", b"")]), "out of the folder"),
    "a drive": (lambda: zipped([GOOD, ("C:/1.mat", b"")]), "out of the folder"),
    "a backslash": (lambda: zipped([GOOD, ("..\\1.mat", b"")]), "out of the folder"),
    "another file elsewhere": (lambda: zipped([GOOD, ("../.bashrc", b"")]), "out of the folder"),
    "a NUL": (lambda: patched(zipped([GOOD, ("1.mat?", b"")]), b"?", b"\0"), "out of the folder"),
    "a link": (lambda: zipped([GOOD, (link(), "/etc/passwd")]), "is a symbolic link"),
    "a link to a folder": (lambda: zipped([GOOD, (link("x"), "/etc")]), "is a symbolic link"),
    "encrypted": (encrypted, "is encrypted"),
    "bzip2": (lambda: with_method(zipfile.ZIP_BZIP2), "unknown compression"),
    "lzma": (lambda: with_method(zipfile.ZIP_LZMA), "unknown compression"),
    "a name twice": (twice, "holds 1.mat twice"),
    "a name in two folders": (lambda: zipped([("a/1.mat", b""), ("b/1.mat", b"")]), "1.mat twice"),
    "a bomb": (lambda: zipped([GOOD, ("1.mat", bytes(100_000_000))]), "unpacks to 100000000 bytes"),
    "an understated bomb": (understated, "not a readable zip archive"),
    "a wrong checksum": (wrong_crc, "Bad CRC-32"),
    "no zip": (lambda: b"<html>not found</html>", "not a readable zip archive"),
    "nothing": (lambda: b"", "not a readable zip archive"),
    "a truncated zip": (lambda: PARTS[12][1][:-30], "not a readable zip archive"),
    "no slices": (
        lambda: zipped([("README.txt", b""), ("01.mat", b""), ("3065.mat", b"")]),
        "no s",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_refused_whole(tmp_path, kind):
    make, fault = HOSTILE[kind]
    folder = tmp_path / "inner"
    folder.mkdir()
    path = tmp_path / "hostile.zip"
    path.write_bytes(make())
    message = refused(unpack, path, folder)
    assert message.startswith(f"{path}: ")
    assert fault in message
    assert names(folder) == []
    assert names(tmp_path) == ["hostile.zip", "inner"]


def test_many_members_are_a_bomb_together(tmp_path, monkeypatch):
    monkeypatch.setattr("examples.brain_tumor.download.archives.MAX_TOTAL_BYTES", 3_000)
    path = tmp_path / "a.zip"
    path.write_bytes(zipped((f"{number}.mat", bytes(1_000)) for number in (1, 2, 3)))
    assert unpack(path, tmp_path) == ["1.mat", "2.mat", "3.mat"]
    path.write_bytes(zipped((f"{number}.mat", bytes(1_001)) for number in (1, 2, 3)))
    assert "would unpack to more than" in refused(unpack, path, tmp_path)


def test_mutated_archives_are_refused_or_right(tmp_path):
    contents = {"1.mat": CONTENT[:300], "2.mat": b"2" * 300}
    good = zipped(contents.items())
    random_numbers = random.Random(1)
    outcomes = set()
    for number in range(120):
        changed = bytearray(good)
        for _ in range(random_numbers.randint(1, 3)):
            changed[random_numbers.randrange(len(good))] ^= 1 << random_numbers.randrange(8)
        folder = tmp_path / str(number)
        folder.mkdir()
        path = tmp_path / "changed.zip"
        path.write_bytes(changed)
        try:
            written = unpack(path, folder)
        except UserError:
            written = []
        assert names(folder) == sorted(written)
        for name in written:  # a flipped bit may rename a member, but never change its content
            assert (folder / name).read_bytes() in contents.values()
        outcomes.add(len(written))
    assert outcomes >= {0, 2}


# ------------------------------------------------------------------------------- the weights


def git(folder, *arguments):
    """What git prints."""
    names = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *names, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def pointer_to(content):
    return (
        "version https://git-lfs.github.com/spec/v1\n"
        f"oid sha256:{hashlib.sha256(content).hexdigest()}\nsize {len(content)}\n"
    )


class Hub:
    """A repository as at Hugging Face: git holds a pointer, and the file is somewhere else."""

    def __init__(self, server, folder, content, pointer=None):
        self.url, self.folder = f"{server.url}/repository", folder
        git(folder.parent, "init", "--quiet", str(folder))
        self.commit = self.write(pointer or pointer_to(content))
        self.whole = whole(content)
        server.answers[:] = [self.answer]

    def write(self, pointer):
        """Commit another pointer."""
        (self.folder / "model.safetensors").write_text(pointer)
        git(self.folder, "add", ".")
        git(self.folder, "commit", "--quiet", "-m", "Add model")
        git(self.folder, "update-server-info")
        return git(self.folder, "rev-parse", "HEAD")

    def answer(self, request):
        path = request.path.partition("?")[0]
        if path == f"/repository/resolve/{self.commit}/model.safetensors":
            request.head(302, Location="/cdn", Content_Length=0)
        elif path == "/cdn":
            self.whole(request)
        else:
            file = self.folder / ".git" / path.removeprefix("/repository/")
            content = file.read_bytes() if file.is_file() else b""
            request.head(200 if content else 404, Content_Length=len(content))
            request.wfile.write(content)

    def download(self, path):
        return download_weights(path, self.url, self.commit)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    state = MobileNetV1(layout="timm").state_dict()
    return {timm_name(name): tensor for name, tensor in state.items()}


def test_weights_are_compared_with_the_sum_in_their_commit(server, tmp_path, weights, monkeypatch):
    content, path = save(weights), tmp_path / "new" / "weights.safetensors"
    hub = Hub(server, tmp_path / "hub", content)
    hub.write(pointer_to(b"of another version"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # as in a hook of git's
    sha256 = hub.download(path)
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert path.read_bytes() == content
    assert names(path.parent) == ["weights.safetensors"]
    server.requests.clear()
    assert hub.download(path) == sha256
    assert server.requests == []


def test_other_weights_than_the_commits_are_refused(server, tmp_path):
    hub, path = Hub(server, tmp_path / "hub", CONTENT), tmp_path / "new" / "weights"
    hub.whole = whole(CONTENT[::-1])
    expected, found = (hashlib.sha256(c).hexdigest() for c in (CONTENT, CONTENT[::-1]))
    assert f"has sha256 {found}, expected {expected}" in refused(hub.download, path)
    assert not path.parent.exists()


def test_a_server_that_invents_what_a_commit_holds_is_refused(server, tmp_path):
    """Of git's own check: an object of another content than its name says."""
    hub, path = Hub(server, tmp_path / "hub", CONTENT), tmp_path / "new" / "weights"
    other = Hub(server, tmp_path / "other", CONTENT[::-1])
    hub.whole, server.answers[:] = other.whole, [hub.answer]
    places = (git(one.folder, "rev-parse", "HEAD:model.safetensors") for one in (hub, other))
    own, others = (Path(".git/objects") / place[:2] / place[2:] for place in places)
    (hub.folder / own).chmod(0o600)
    (hub.folder / own).write_bytes((other.folder / others).read_bytes())
    assert "git failed" in refused(hub.download, path)
    asked = [request.path for request in server.requests]
    assert any(place.endswith(own.name) for place in asked)
    assert "/cdn" not in asked
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("pointer", "fault"),
    [("no pointer\n", "is no pointer to a large file"), (pointer_to(b"") + "x", "is no pointer")],
)
def test_a_commit_without_a_pointer_is_refused(server, tmp_path, pointer, fault):
    hub = Hub(server, tmp_path / "hub", CONTENT, pointer)
    assert fault in refused(hub.download, tmp_path / "new" / "weights")
    hub.commit = "0" * 40
    assert "git failed: " in refused(hub.download, tmp_path / "new" / "weights")


def test_weights_of_a_repository_that_is_not_there_are_refused(server, tmp_path, monkeypatch):
    path = tmp_path / "weights"
    server.answers[:] = [status(404)]
    assert "git failed: " in refused(download_weights, path, server.url, "0" * 40)
    for url in (f"file://{tmp_path}", "ext::true", "http://192.0.2.1/a"):
        assert "not a URL of https" in refused(download_weights, path, url, "0" * 40)
    monkeypatch.setenv("PATH", "")
    assert "git: not found" in refused(download_weights, path, server.url, "0" * 40)
    assert names(tmp_path) == []


def test_weights_of_another_network_are_refused(server, tmp_path, weights):
    missing = {name: tensor for name, tensor in weights.items() if name != "bn1.bias"}
    for number, (content, fault) in enumerate(
        (
            (
                save({**weights, "bn1.bias": torch.zeros(3)}),
                "bn1.bias has shape [3], expected [32]",
            ),
            (save(missing), "no tensor named bn1.bias"),
            (CONTENT, "not a readable safetensors file"),
        )
    ):
        hub = Hub(server, tmp_path / str(number), content)
        for _ in range(2):
            assert fault in refused(hub.download, tmp_path / f"{number}.safetensors")


def test_a_file_that_is_not_timms_weights_is_left_alone(server, tmp_path):
    path = tmp_path / "slim.safetensors"
    save_file(MobileNetV1().state_dict(), path)
    before = path.read_bytes()
    assert "these weights have slim's layout" in refused(download_weights, path, server.url)
    assert path.read_bytes() == before


def test_too_many_weights_are_refused(server, tmp_path):
    def huge(request):
        request.head(200, Content_Length=10**9)

    hub = Hub(server, tmp_path / "hub", CONTENT)
    hub.whole = huge
    assert "announced" in refused(hub.download, tmp_path / "new" / "weights")


def test_published_addresses_are_https():
    for url in (sources.FIGSHARE, sources.WEIGHTS):
        assert url.startswith("https://")


# --------------------------------------------------------------------------------- slow servers


def a_byte_at_a_time(request):
    request.head(200, Content_Length=len(CONTENT))
    while not request.server.over.is_set():
        request.wfile.write(b"x")


def test_a_server_that_sends_a_byte_at_a_time_is_given_up(server, tmp_path, monkeypatch):
    now = iter(range(10**9))
    monkeypatch.setattr(transfer.time, "monotonic", lambda: next(now) * 1000.0)  # seconds
    message = refused(get, server, tmp_path / "file", a_byte_at_a_time)
    assert "sends less than 1000 bytes a second" in message


def test_a_head_that_comes_byte_by_byte_is_given_up(server, tmp_path, monkeypatch):
    begun = threading.Event()

    def slow(request):
        while not request.server.over.is_set():
            request.wfile.write(b"H")  # a line without an end
            begun.set()
            request.server.over.wait(0.01)

    class Impatient(Future):
        def result(self, timeout):
            assert begun.wait(timeout)
            return super().result(0)

    monkeypatch.setattr(transfer, "Future", Impatient)
    message = refused(get, server, tmp_path / "file", slow)
    assert "no answer within 240 s" in message


def test_two_downloads_to_one_folder_do_not_meet(tmp_path):
    with locked(tmp_path):
        assert "another process" in refused(download_slices, tmp_path)

"""Start KaTeX's server again where it was called before it listened, as on busy machines."""

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinxcontrib.katex import KaTeXServer

TRIES = 10
_start = KaTeXServer.start_server_process.__func__


def start(cls: type[KaTeXServer], rundir: Path, timeout: float) -> Any:  # noqa: ANN401
    """Start it in a folder of its own for each try."""
    for number in range(TRIES):
        folder = rundir / str(number)
        folder.mkdir()
        try:
            return _start(cls, folder, timeout)
        except ConnectionRefusedError:
            if number == TRIES - 1:
                raise
    raise AssertionError("not reached")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    KaTeXServer.start_server_process = classmethod(start)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The process that reads files, changed before it serves."""

import pytest

from examples.brain_tumor.data import reader
from examples.brain_tumor.data.reader import READER

SERVE = """
import os, sys
sys.path[:] = sys.argv[1:]
from examples.brain_tumor.data import reader
{change}
reader.serve()
"""


@pytest.fixture
def serving(monkeypatch):
    """Let the process that reads change something before it serves."""

    def start(change):
        READER.stop()
        monkeypatch.setattr(reader, "PROGRAM", SERVE.format(change=change))

    yield start
    READER.stop()

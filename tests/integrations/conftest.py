"""Processes that several tests of this folder share: each imports torch and the tools once."""

import pytest

from tests.processes import Processes


@pytest.fixture(scope="session")
def processes():
    members = Processes(2)
    yield members
    members.close()

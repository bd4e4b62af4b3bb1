"""The processes that the tests of this folder share."""

import pytest

from tests.processes import Processes


@pytest.fixture(scope="session")
def processes():
    members = Processes(4)
    yield members
    members.close()

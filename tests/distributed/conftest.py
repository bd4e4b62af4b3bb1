"""The processes that the tests of this folder share."""

import pytest
import torch

from tests.processes import Processes


@pytest.fixture(scope="session")
def processes():
    members = Processes(4)
    yield members
    members.close()


@pytest.fixture(autouse=True)
def able_torch(request):
    is_of_fully_shard = any(
        part in request.node.name for part in ("fsdp", "fully_shard", "two_dimensions[True]")
    )
    if is_of_fully_shard and torch.__version__.startswith("2.6"):
        pytest.skip("fully_shard of torch 2.6 needs a GPU")

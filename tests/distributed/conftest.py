"""The processes that the tests of this folder share."""

import pytest
import torch

from tests.processes import Processes


@pytest.fixture(scope="session")
def processes():
    members = Processes(4)
    yield members
    members.close()


# Parts of the names of tests, and why torch 2.6 cannot pass them.
LACKING = {
    "fsdp": "fully_shard of torch 2.6 needs a GPU",
    "fully_shard": "fully_shard of torch 2.6 needs a GPU",
    "two_dimensions[True]": "fully_shard of torch 2.6 needs a GPU",
    "one_process[3-dtype1]": "products of torch 2.6 round by the number of rows, up to 1.7e-6",
}


@pytest.fixture(autouse=True)
def able_torch(request):
    for part, reason in LACKING.items():
        if torch.__version__.startswith("2.6") and part in request.node.name:
            pytest.skip(reason)

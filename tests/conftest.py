"""The option ``--device``, which the tests of tests/device run on."""

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", type=torch.device, help="where tests/device runs (default cpu)"
    )


@pytest.fixture(scope="session")
def device(pytestconfig):
    return pytestconfig.getoption("device")

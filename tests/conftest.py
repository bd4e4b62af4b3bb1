"""The option ``--device``, which the tests of tests/device run on, and what old torch lacks."""

import pytest


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests/device runs (default cpu)")


@pytest.fixture(scope="session")
def device(pytestconfig):
    import torch  # here, for pytest-xdist's first process needs only the option

    return torch.device(pytestconfig.getoption("device"))


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """Skip what compiles where the compiler breaks at the losses, or crashes."""
    import torch

    if torch.torch_version.TorchVersion(torch.__version__) < (2, 11):
        reason = "torch.compile of the losses needs torch 2.11"
        monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.skip(reason))

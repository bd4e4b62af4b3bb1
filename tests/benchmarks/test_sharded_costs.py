"""The bytes and the memory in docs/benchmarks/distributed_training.md are those of a step."""

import pytest

from benchmarks.sharded_costs import Candidate, exchanged, held, most
from tests.processes import Processes

SIZES = 96, 12_000, 64  # N, C, d


@pytest.fixture(scope="module")
def processes():
    members = Processes(3)
    yield members
    members.close()


def sizes(mesh, sample_rate):
    candidate = Candidate(mesh, sample_rate, *SIZES)
    candidate.step()  # the optimiser's state is there, and the ranks know their batches
    return candidate.sizes()


@pytest.mark.parametrize("sample_rate", [1.0, 0.1])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_model_is_what_is_measured(processes, ranks, sample_rate):
    modelled = held(*SIZES, ranks, sample_rate, "SGD, momentum")
    for found in processes.run(sizes, ranks, sample_rate):
        assert found["exchanged"] == exchanged(SIZES[0], SIZES[2], ranks)
        for lasting in ("weight", "gradient", "optimizer"):
            assert found[lasting] == modelled[lasting]
        assert most(found) == pytest.approx(most(modelled), rel=0.1)

"""Classes shared between processes give the loss and the gradients of one process."""

import pytest
import torch

from tests import sharding
from tests.processes import Processes


@pytest.fixture(scope="module")
def processes():
    members = Processes()
    yield members
    members.close()


MODES = ["dense", "stash", "recompute"]
SIZES = {1: (12,), 2: (9, 3), 3: (5, 0, 7)}


def too_large(answers, tolerance):
    return {
        (rank, *case, name): error
        for rank, answer in enumerate(answers)
        for case, errors in answer.items()
        for name, error in errors.items()
        if not error <= tolerance
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("world", SIZES)
def test_every_loss_is_that_of_one_process(processes, world, dtype):
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-6}[dtype]
    answers = processes.run(
        sharding.errors_of_family, world, list(sharding.ROWS), dtype, MODES, SIZES[world]
    )
    assert not too_large(answers, tolerance)


def test_more_ranks_than_classes(processes):
    names = ["ArcFace", "SubCenterArcFace", "L-Softmax", "SphereFace", "MV-arc", "SphereFace2"]
    names = [name for name in names if name in sharding.ROWS]
    answers = processes.run(
        sharding.errors_of_family, 4, names, torch.float64, MODES, (3, 3, 3, 3), 2
    )
    assert not too_large(answers, 1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"reduction": "sum"},
        {"label_smoothing": 0.1},
        {"class_weight": torch.linspace(0.2, 2.0, 7)},
        {"ignore_index": 3},
        {"ignore_index": 3, "reduction": "none", "label_smoothing": 0.2},
        {"gradient": "detached"},
        {"memory_budget": 50_000},
    ],
    ids=str,
)
def test_options_are_those_of_one_process(processes, options):
    names = ["ArcFace", "SubCenterArcFace", "MV-Softmax-arc"]
    names = [name for name in sharding.ROWS if name in names or name.startswith("MV")]
    answers = processes.run(
        sharding.errors_of_family, 3, names, torch.float64, MODES, (5, 0, 7), **options
    )
    assert not too_large(answers, 1e-10)


def test_training_mode_is_that_of_one_process(processes):
    """Running statistics too, of all rows; ElasticFace alone draws at random."""
    names = [name for name in sharding.ROWS if not name.startswith("Elastic")]
    answers = processes.run(
        sharding.errors_of_family, 4, names, torch.float64, ["auto"], (5, 0, 4, 3), train=True
    )
    assert not too_large(answers, 1e-6)  # statistics are kept in float32

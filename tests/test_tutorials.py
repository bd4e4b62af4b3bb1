"""The tutorials run as printed, and what their text says of the outcome is so."""

import runpy
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt

TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"


@pytest.fixture
def run():
    mpl.use("Agg")
    threads = torch.get_num_threads()  # which the tutorials set
    yield lambda name: runpy.run_path(str(TUTORIALS / name))
    plt.close("all")
    torch.set_num_threads(threads)


def test_angles_are_smaller_with_the_margin_for_each_seed(run):
    found = run("plot_1_first_embedding.py")
    angle = {key: found["angle_to_centre"](*trained) for key, trained in found["runs"].items()}
    assert all(angle[0.2, seed] < angle[0.0, seed] for seed in range(3))


def test_larger_margins_tighten_and_the_largest_that_is_met_is_chosen(run):
    found = run("plot_2_backbone.py")
    looks = {margin: seen.numbers for margin, seen in found["looks"].items()}
    medians = [numbers["target_median"] for numbers in looks.values()]
    assert medians == sorted(medians, reverse=True)
    larger = [margin for margin in looks if margin > found["chosen"]]
    assert looks[found["chosen"]]["violation_rate"] <= 0.02
    assert all(looks[margin]["violation_rate"] > 0.02 for margin in larger)

"""The tutorials run as printed, and what their text says of the outcome is so."""

import runpy
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt

import angular_losses as al

TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"


@pytest.fixture
def run():
    mpl.use("Agg")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small work, which several threads on a busy machine do slowly
    yield lambda name: runpy.run_path(str(TUTORIALS / name))
    plt.close("all")
    torch.set_num_threads(threads)


def test_the_margin_tightens_the_classes(run, capsys):
    found = run("plot_1_first_embedding.py")
    angles = [
        al.target_angle(found[f"{name}_test"], found[name].weight.detach(), found["test_labels"])
        for name in ("plain", "arcface")
    ]
    assert angles[1].median() < 0.8 * angles[0].median()
    assert capsys.readouterr().out.count("nearest neighbour right for") == 2


def test_larger_margins_tighten_what_is_trained_and_not_what_is_new(run):
    found = run("plot_2_backbone.py")
    medians = [monitor.history[-1]["target_median"] for _, _, monitor in found["runs"].values()]
    assert medians == sorted(medians, reverse=True)
    recalls = {margin: found["open_set"](run[0])[0] for margin, run in found["runs"].items()}
    assert recalls[1.2] < recalls[0.3]

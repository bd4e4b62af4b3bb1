import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import angular_losses as al
from angular_losses import diagnostics
from tests.diagnostics.brute_force import batch


def figures():
    embeddings, weight, labels = batch(200, 60, 8)
    angles = diagnostics.batch_angles(embeddings, weight, labels)
    counts = [diagnostics.angle_histogram(each) for each in (angles.target, angles.nearest)]
    separation = diagnostics.centre_separation(weight)
    norms, rows = torch.arange(60.0), torch.arange(60)
    keys = ("target_median", "nearest_median", "margin_mean", "violation_rate", "error_rate")
    yield "angles", diagnostics.plot_angles(*counts), True
    yield "angles and margin", diagnostics.plot_angles(*counts, margin=0.5), True
    yield "margin", diagnostics.plot_margin(lambda theta: al.cosface(theta, 0.3)), True
    yield "margin of a batch", diagnostics.plot_margin(torch.cos, counts[0]), True
    yield "separation", diagnostics.plot_separation(separation, margin=0.5), True
    yield "few centres", diagnostics.plot_separation(separation._replace(bound=2.0)), True
    yield "gradients", diagnostics.plot_gradient_norms(norms), False
    yield "gradients by rows", diagnostics.plot_gradient_norms(norms, rows), False
    history = [{"step": float(step), **dict.fromkeys(keys, 0.5)} for step in range(3)]
    yield "history", diagnostics.plot_history(history), True
    yield "one step", diagnostics.plot_history(history[:1]), True


def test_figures_are_labelled_in_degrees_and_radians(tmp_path):
    for name, figure, has_angles in figures():
        figure.savefig(tmp_path / "figure.png", dpi=40)
        assert figure.axes[0].get_title(), name
        every = [*figure.axes, *(child for a in figure.axes for child in a.child_axes)]
        labels = " ".join(f"{a.get_xlabel()} {a.get_ylabel()}" for a in every)
        assert ("(degrees)" in labels and "radians" in labels) == has_angles, name
        assert all(a.get_ylabel() or a.get_yticks().size == 0 for a in figure.axes), name


def lines_of(axes):
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.get_lines()}


def test_what_the_figures_show():
    target, nearest = torch.zeros(180), torch.zeros(180)
    target[30], nearest[90] = 4, 4
    axes = diagnostics.plot_angles(target, nearest, margin=math.radians(20)).axes[0]
    assert lines_of(axes)["own class + margin, 50.5°"][0] == pytest.approx([50.5, 50.5])
    assert axes.get_legend_handles_labels()[1][:2] == [
        "own class, median 30.5°",
        "nearest other, median 90.5°",
    ]
    upper, lower = diagnostics.plot_margin(lambda theta: al.arcface(theta, 0.5)).axes[:2]
    theta = np.radians(lines_of(upper)["margin"][0])
    inside = theta < math.pi - 0.5
    for axes, expected in ((upper, np.cos(theta + 0.5)), (lower, np.sin(theta + 0.5))):
        np.testing.assert_allclose(
            np.array(lines_of(axes)["margin"][1])[inside], expected[inside], atol=1e-9
        )
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    axes = diagnostics.plot_separation(diagnostics.centre_separation(weight)).axes[0]
    assert lines_of(axes)["classes"][1] == pytest.approx([90, 90, 90])
    assert lines_of(axes)["bound on the closest, 90.0°"][1] == pytest.approx([90, 90])
    axes = diagnostics.plot_gradient_norms(torch.tensor([1.0, 0.0, 3.0, torch.nan])).axes[0]
    assert axes.get_lines()[0].get_ydata().tolist() == [3.0, 1.0]
    assert "(2 without one)" in axes.get_title()


def test_plots_without_matplotlib_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install angular-losses\[plots\]"):
        diagnostics.plot_margin(torch.cos)


def test_plots_leave_pyplot_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it fails
    place = Path(diagnostics.__file__).with_name("plots.py")
    name = f"{diagnostics.__name__}.a_second_time"
    spec = importlib.util.spec_from_file_location(name, place)
    plots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plots)
    plots.plot_margin(torch.cos)


ONES, LABELS = torch.ones(2, 3), torch.zeros(2).long()
COUNTS = torch.ones(4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: diagnostics.plot_angles([1], COUNTS), TypeError, "target:"),
        (lambda: diagnostics.plot_angles(COUNTS, COUNTS[:2]), ValueError, "nearest: .*4"),
        (lambda: diagnostics.plot_angles(0 * COUNTS, COUNTS), ValueError, "target: .*none"),
        (lambda: diagnostics.plot_angles(COUNTS, COUNTS, margin="1"), TypeError, "margin:"),
        (lambda: diagnostics.plot_margin(lambda theta: theta.sum()), ValueError, "margin:"),
        (lambda: diagnostics.plot_gradient_norms(0 * COUNTS), ValueError, "norms:"),
        (lambda: diagnostics.plot_gradient_norms(COUNTS, LABELS), ValueError, "rows:"),
        (lambda: diagnostics.plot_history([]), ValueError, "history:"),
        (
            lambda: diagnostics.plot_separation(diagnostics.centre_separation(0 * ONES)),
            ValueError,
            "separation:",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()

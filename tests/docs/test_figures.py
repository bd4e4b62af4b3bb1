"""The figures of the explanations are drawn from what the library computes."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

import angular_losses as al
from angular_losses import margins

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def figures():
    place = DOCS / "explanation" / "figures.py"
    spec = importlib.util.spec_from_file_location("explanation_figures", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


THETA = torch.tensor([0.05, 0.7, 1.9, 2.9], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        ("NormalizedSoftmaxLoss", torch.cos(THETA), -torch.sin(THETA)),
        ("CosFaceLoss", torch.cos(THETA) - 0.35, -torch.sin(THETA)),
        ("SphereFaceLoss", margins.sphereface(THETA, 4), -4 * (4 * THETA).sin().abs()),
        ("LSoftmaxLoss", margins.sphereface(THETA, 2), -2 * (2 * THETA).sin().abs()),
        ("LiArcFaceLoss", 1 - 2 * (THETA + 0.45) / math.pi, torch.full((4,), -2 / math.pi)),
        ("AdaFaceLoss", torch.cos(THETA) - 0.4, -torch.sin(THETA)),
    ],
)
def test_curves_are_the_margins(figures, name, value, slope):
    found = figures.curve(name, THETA)
    torch.testing.assert_close(found[0], value.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1], slope.double(), atol=1e-6, rtol=0)


def test_the_error_of_acos_is_what_the_page_says(figures):
    errors = figures.angle_errors()
    for theta, by_acos, ours in zip(*errors.values(), strict=True):
        assert ours < 1e-9
        if theta < 3e-4:
            assert by_acos > 0.5
        if theta > 0.1:
            assert by_acos < 1e-4


def test_the_committed_figures_are_those_that_the_script_draws(figures, tmp_path):
    drawn = {path.name for path in figures.draw(tmp_path)}
    assert drawn == {path.name for path in (DOCS / "images").glob("explanation_*.png")}
    assert all(name.removesuffix("Loss") and hasattr(al, name) for name in figures.MARGINS)

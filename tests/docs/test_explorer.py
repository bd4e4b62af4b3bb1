"""The margin explorer's data are the losses' own numbers."""

import base64
import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from angular_losses import available
from tests.docs.site.explorer import CASES, expected

PATH = Path(__file__).parents[2] / "docs" / "_ext" / "explorer_data.py"
SPEC = importlib.util.spec_from_file_location("explorer_data", PATH)
explorer_data = importlib.util.module_from_spec(SPEC)
sys.modules["explorer_data"] = explorer_data
SPEC.loader.exec_module(explorer_data)

FAMILIES = explorer_data.FAMILIES


@pytest.fixture(scope="module")
def data():
    return explorer_data.data(FAMILIES)


def unpacked(text):
    """The 181 values of a curve; as explorer.js reads them."""
    raw = base64.b64decode(text)
    steps = range(0, len(raw), 3)
    return [int.from_bytes(raw[i : i + 3], "little", signed=True) * 1e-5 for i in steps]


def test_every_loss_is_one_of_the_package_and_is_tried():
    assert {family.loss.__name__ for family in FAMILIES.values()} <= available().keys()
    assert {name for name, _, _ in CASES} == FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_slider_starts_at_the_default_of_the_loss(name):
    family = FAMILIES[name]
    if family.argument is not None:
        loss = family.loss(2, 2, **family.settings)
        assert getattr(loss, family.argument) == family.start
    assert family.start in family.values()


def test_the_data_are_what_the_losses_compute(data):
    losses = {loss["id"]: loss for loss in data["losses"]}

    for row in expected():
        loss = losses[row["loss"]]
        at = loss["values"].index(row["value"])
        curves = {k: unpacked(data["curves"][loss[k][at]]) for k in ("psi", "slope", "eta")}
        psi, slope, eta = (curves[k][row["theta"]] for k in ("psi", "slope", "eta"))
        s, others = row["s"], row["C"] - 1
        rounding = 0.51e-5 * s

        assert psi * s == pytest.approx(row["logit"], abs=rounding)
        assert slope * s == pytest.approx(row["gradient"], abs=rounding)
        ratio = others * math.exp(s * (curves["eta"][row["other"]] - psi))
        assert 1 / (1 + ratio) == pytest.approx(row["probability"], rel=2.1 * rounding)
        assert eta == pytest.approx(eta_of(row), abs=1e-5)


def eta_of(row):
    """What the page's three losses with logits of their own make of an angle; else the cosine."""
    theta = math.radians(row["theta"])
    c = math.cos(theta)
    return {
        "liarcface": 1 - 2 * theta / math.pi,
        "spherefacer-v2": math.cos(theta / row["value"]),
        "circle": max(c + row["value"], 0) * (c - row["value"]),
    }.get(row["loss"], c)


# The gradient of the circle loss takes a part of the curve as constant.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"circle"}))
def test_the_slope_is_that_of_the_curve(name):
    family = FAMILIES[name]
    for value in family.values()[:: max(1, len(family.values()) // 4)]:
        psi, slope, _ = explorer_data.curves(family, value)
        step = explorer_data.THETA[1]
        difference = (psi[2:] - psi[:-2]) / (2 * step)
        apart = (difference - slope[1:-1]).abs() > 0.01
        # A curve may jump or bend at one angle.
        assert apart.sum() <= 4


def test_a_curve_is_kept_to_half_a_unit():
    drawn = torch.rand(181, dtype=torch.float64, generator=torch.manual_seed(0)) * 160 - 80
    kept = torch.tensor(unpacked(explorer_data.packed(drawn)), dtype=torch.float64)
    assert (kept - drawn).abs().max() <= 0.5e-5 * (1 + 1e-9)


def test_a_curve_out_of_range_is_rejected():
    with pytest.raises(ValueError, match=r"curve: expected values within 83\.8861, got 84"):
        explorer_data.packed(torch.full((181,), 84.0, dtype=torch.float64))


@pytest.mark.parametrize(("page", "limit"), [("explorer", 500_000), ("index", 200_000)])
def test_the_script_assigns_one_global_and_is_small(page, limit):
    script = explorer_data.script(explorer_data.PAGES[page])
    assert re.match(r'window\.marginExplorerData = \{"unit":1e-05,', script)
    assert script.count(";") == 1
    assert len(script) < limit


def test_every_curve_is_used_and_complete(data):
    parts = ("psi", "slope", "eta")
    used = {number for loss in data["losses"] for part in parts for number in loss[part]}
    assert used == set(range(len(data["curves"])))
    assert {len(unpacked(curve)) for curve in data["curves"]} == {181}

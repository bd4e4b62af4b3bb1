"""The walls of the house: which module may import which, and what the package exports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import angular_losses

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "angular_losses"
# Data flows one way: a room may import those named here and no other room of the house.
ROOMS = {
    "checks": set(),
    "geometry": {"checks"},
    "margins": {"checks"},
    "kernels": {"triton"},  # of the world outside, and fetched only when used
    "chunks": {"geometry", "kernels"},
    "engine": {"chunks", "geometry"},
    "operators": {"chunks", "engine", "geometry"},
    "planner": {"checks"},
    "shards": set(),
    "modes": {"checks", "chunks", "engine", "geometry", "operators", "planner", "shards"},
    "reductions": {"checks"},
    "state": set(),
    "softmax": {
        *("checks", "chunks", "engine", "geometry", "margins", "modes", "reductions", "shards"),
    },
    "one_vs_rest": {
        *("checks", "chunks", "engine", "geometry", "margins", "modes", "reductions", "shards"),
    },
    "negatives": {"chunks", "geometry"},
    "schedules": {"checks"},
    "ranks": set(),
    "centres": {"margins"},
    "base": {
        *("centres", "checks", "geometry", "margins", "planner", "reductions", "schedules"),
        *("shards", "softmax", "state"),
    },
    "losses": {"base", "checks", "margins", "negatives", "softmax"},
    "multiplicative": {"base", "checks", "geometry", "margins", "negatives", "softmax"},
    "adaptive": {"base", "checks", "chunks", "geometry", "margins", "modes", "ranks"},
    "mining": {"base", "checks", "geometry", "margins", "modes", "negatives", "ranks", "softmax"},
    "binary": {"base", "checks", "one_vs_rest"},
    "catalogue": {"base", "adaptive", "binary", "losses", "mining", "multiplicative"},
    "training": {"centres", "checks"},
    "gathering": {"shards"},
    "sharding": {"base", "checks", "gathering", "ranks", "shards"},
    "optimizers": {"base", "sharding"},
    "saving": {"base", "sharding"},
    "sharded": {
        *("base", "centres", "checks", "gathering", "optimizers", "saving", "sharding", "shards"),
    },
    "packing": {"checks"},
    "measures": {"checks", "geometry", "margins", "packing"},
    "plots": {"checks", "margins", "measures", "matplotlib"},
    "diagnostics": {
        *("centres", "checks", "geometry", "measures", "packing", "plots", "ranks", "shards"),
        "matplotlib",
    },
    "checkpoints": {"checks"},
    "metric_learning": {
        *("centres", "checks", "geometry", "margins", "softmax", "pytorch_metric_learning"),
    },
}
OUTSIDE = {"torch", "typing_extensions", *sys.stdlib_module_names}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield from [node.module] if node.module else [f".{name.name}" for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)


def test_every_module_has_its_row():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {*ROOMS, "__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_calls_upstairs(room):
    imported = {name.lstrip(".") for name in imports(PACKAGE / f"{room}.py")}
    assert imported - OUTSIDE <= ROOMS[room]


def test_all_is_what_the_package_exports():
    assert angular_losses.__all__ == sorted(angular_losses.__all__)
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    exported = {
        name.asname
        for node in source.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert exported == set(angular_losses.__all__)


@pytest.mark.parametrize("name", angular_losses.__all__)
def test_every_public_name_is_documented_with_an_example(name):
    documented = getattr(angular_losses, name).__doc__
    assert documented
    if name not in ("MarginLoss", "Schedule"):  # abstract: their example is a subclass
        assert ">>>" in documented


def test_importing_the_package_imports_torch_alone():
    """Not even more of torch or of Python: the package's own modules take 0.03 s."""
    code = (
        "import sys, torch; before = set(sys.modules); import angular_losses; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["angular_losses"]


def test_changelog_has_this_version():
    assert f"## [{angular_losses.__version__}]" in (ROOT / "CHANGELOG.md").read_text()

"""Which module may import which, and what the package exports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import angular_losses

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "angular_losses"
EXAMPLE = ROOT / "examples" / "brain_tumor"
# Dependencies point one way: a module imports its own folder and those of earlier lines.
LAYERS = (
    ("validation", "collectives"),
    ("geometry", "margins", "negatives", "schedules", "separation"),
    ("engine",),
    ("functional",),
    ("losses",),
    ("training", "sampling"),
    ("distributed", "diagnostics", "integrations"),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")
)
OPTIONAL = {  # imported where they are used
    "engine/kernels": {"triton"},
    "diagnostics/monitor": {"matplotlib"},
    "diagnostics/plots": {"matplotlib"},
    "integrations/pml_classification": {"pytorch_metric_learning"},
    "integrations/pytorch_metric_learning": {"pytorch_metric_learning"},
}
OUTSIDE = {"torch", "typing_extensions", *sys.stdlib_module_names}


def imports(module):
    """What a module imports: paths inside the package ("engine/chunks"), and other packages."""
    folders = module.split("/")[:-1]
    inside, outside = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folders[: len(folders) - node.level + 1]
            base += node.module.split(".") if node.module else []
            names = [[*base, name.name] for name in node.names]
            inside |= {"/".join(path if "/".join(path) in MODULES else base) for path in names}
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            outside |= {name.name.split(".")[0] for name in node.names}
    return inside, outside


def test_every_module_has_its_layer():
    assert {module.split("/")[0] for module in MODULES} == {*LEVELS, "__init__"}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "__init__"])
def test_imports_point_one_way(module):
    own, (inside, outside) = module.split("/")[0], imports(module)
    assert outside - OUTSIDE <= OPTIONAL.get(module, set())
    above = {
        path
        for path in inside
        if path.split("/")[0] != own and LEVELS[path.split("/")[0]] >= LEVELS[own]
    }
    assert not above


def test_there_are_no_cycles():
    left = {module: {p for p in imports(module)[0] if p in MODULES} for module in MODULES}
    while left:
        free = {module for module, needed in left.items() if not needed & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {module: needed for module, needed in left.items() if module not in free}


def test_no_folder_of_the_example_holds_more_than_a_dozen_modules():
    modules = {path.parent: [] for path in EXAMPLE.rglob("*.py")}
    for path in EXAMPLE.rglob("*.py"):
        modules[path.parent] += [] if path.name == "__init__.py" else [path.name]
    assert {folder.name: len(names) for folder, names in modules.items() if len(names) > 12} == {}


def test_all_is_what_the_package_exports():
    assert angular_losses.__all__ == sorted(angular_losses.__all__)
    source = ast.parse((PACKAGE / "__init__.py").read_text())
    exported = {
        name.name for node in source.body if isinstance(node, ast.ImportFrom) for name in node.names
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

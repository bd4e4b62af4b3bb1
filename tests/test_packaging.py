"""What is published: the wheel, the source distribution, and README as PyPI shows it."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from angular_losses import __version__

ROOT = Path(__file__).parent.parent
NAME = f"angular_losses-{__version__}"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the source distribution and of the wheel that is built from it."""
    for package in ("build", "hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(wheel):
    return message_from_bytes(wheel[f"{NAME}.dist-info/METADATA"])


def test_the_wheel_is_the_package(wheel):
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "angular_losses").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert "angular_losses/py.typed" in package
    of_wheel = {"METADATA", "WHEEL", "RECORD", "licenses/LICENSE"}
    assert set(wheel) == package | {f"{NAME}.dist-info/{name}" for name in of_wheel}


def test_the_library_needs_torch_alone(metadata):
    needed = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert [re.match(r"[\w-]+", need)[0] for need in needed] == ["torch"]


def test_the_source_distribution_has_what_is_tracked(built):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: what is tracked is not known")
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        found = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    missing = {name for name in tracked if (ROOT / name).exists()} - found
    assert all(name.startswith((".github/", ".pre-commit")) for name in missing), missing


def test_readme_renders_without_the_repository(metadata):
    markdown = pytest.importorskip(
        "readme_renderer.markdown", reason="readme_renderer is not installed"
    )
    text = metadata.get_payload(decode=True).decode()
    assert metadata["Description-Content-Type"] == "text/markdown"
    page = markdown.render(text)
    assert page
    assert not re.findall(r'(?:src|href)="(?!https?://|#)[^"]*"', page)
    for kept in (r"```.*?```", r"^#.*?$", r"^\|.*?\|$"):  # code, headings and rows of tables
        of_readme = re.findall(kept, (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
        assert len(of_readme) == len(re.findall(kept, text, re.DOTALL | re.MULTILINE))

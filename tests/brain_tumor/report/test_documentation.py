"""The documentation's report and tables are those of the example's kept results."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from examples.brain_tumor.report import drawing, records
from examples.brain_tumor.report.reproduction_report import report_text
from examples.brain_tumor.reproduction.results import read_reproduction

PAGES = Path(__file__).parents[3] / "docs" / "brain_tumor"


@pytest.fixture(scope="module")
def update():
    spec = importlib.util.spec_from_file_location("brain_tumor_update", PAGES / "update.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(text):
    """All lines but the random forest's, whose answers differ with scikit-learn's version."""
    return [line for line in text.splitlines() if "random forest" not in line]


def test_the_report_is_that_of_the_results(update, tmp_path, monkeypatch, few_trees):
    """Nothing is drawn here, and the Python that wrote the page may be another."""
    page = (PAGES / "report.md").read_text()
    for name in [name for name in vars(drawing) if name.startswith("plot_")]:
        monkeypatch.setattr(drawing, name, lambda *arguments, **options: None)
    monkeypatch.setattr(drawing, "compute_tsne", lambda embeddings, seed: embeddings[:, :2])
    (version,) = re.findall(r"report written with +\| Python (\S+)", page)
    monkeypatch.setattr(records.platform, "python_version", lambda: version)
    folder = shutil.copytree(update.RESULTS, tmp_path / "results")
    text = update.report_page(report_text(read_reproduction(folder)))
    assert lines(text) == lines(page)
    figures = re.findall(r"\]\((.+?\.png)\)", page)
    assert {(PAGES / one).resolve() for one in figures} == set(update.IMAGES.iterdir())


def test_the_tables_of_the_index_are_those_of_the_results(update):
    index = (PAGES / "index.md").read_text()
    reproduction = read_reproduction(update.RESULTS)
    assert update.index_page(index, reproduction) == index
    damaged = index.replace("| 95.57 ", "| 96.57 ").replace("| 1426 ", "| 1427 ")
    assert damaged != index
    assert update.index_page(damaged, reproduction) == index

"""The code in README and docs runs as printed."""

import re
from pathlib import Path

import pytest

import angular_losses
from angular_losses import available, sharded

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
DOCUMENTS = [ROOT / "README.md", *PAGES]
BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(block):
    exec(compile(block, "document", "exec"), {})


def test_every_loss_has_a_row_in_the_table():
    table = (DOCS / "losses.md").read_text()
    for name in available():
        assert f"| `{name}` |" in table


def test_papers_are_those_of_the_docstrings():
    docstrings = "".join(path.read_text() for path in (ROOT / "angular_losses").glob("*.py"))
    links = re.findall(
        r"\[([^\]]+)\]\(https://arxiv\.org/abs/([^)]*)\)", (DOCS / "losses.md").read_text()
    )
    assert len(links) > 20
    for text, number in links:
        assert text == number
        assert re.fullmatch(r"\d{4}\.\d{5}", number)
        assert f"arXiv:{number}" in docstrings


@pytest.mark.parametrize("name", [*angular_losses.__all__, *sharded.__all__])
def test_every_public_name_has_its_page_in_the_reference(name):
    assert f"   {name}\n" in (DOCS / "reference.md").read_text()


def test_there_is_code_to_run():
    assert len(BLOCKS) >= 20

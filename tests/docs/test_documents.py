"""The code in README and docs runs as printed."""

import importlib
import re
import warnings
from pathlib import Path

import pytest
import torch

import angular_losses
from angular_losses import available, distributed

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
DOCUMENTS = [ROOT / "README.md", *PAGES]
# What the extra `integrations` brings: a block that needs one of them is skipped without it, and
# what the tools warn of is theirs.
TOOLS = (
    r"(accelerate|datasets|faiss|hydra|lightning|omegaconf|sentence_transformers|sklearn|skorch"
    r"|tensorboard|torchmetrics|transformers)\b"
)
USES_A_TOOL = re.compile(rf"^(from|import) (torch\.utils\.)?{TOOLS}", re.MULTILINE)
BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(block):
    if "fully_shard(" in block and torch.__version__.startswith("2.6"):
        pytest.skip("torch 2.6: fully_shard needs a GPU")
    with warnings.catch_warnings():
        if USES_A_TOOL.search(block):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "(weight|scale):")
        try:
            exec(compile(block, "document", "exec"), {})
        except ModuleNotFoundError as error:
            if not re.match(TOOLS, error.name or ""):
                raise
            pytest.skip(f"{error.name} is missing (extra integrations)")


def test_every_loss_has_a_row_in_the_table_and_a_place_in_the_choice():
    table = (DOCS / "reference" / "losses.md").read_text()
    choice = (DOCS / "how_to" / "choose_a_loss.md").read_text()
    for name in available():
        assert f"| `{name}` |" in table
        assert f"`{name}" in choice


def test_the_table_cites_what_the_docstrings_cite():
    rows = re.findall(
        r"^\| (`\w+`.*?) \|.*arxiv\.org/abs/(.*?)\)",
        (DOCS / "reference" / "losses.md").read_text(),
        re.M,
    )
    assert len(rows) >= 20
    for cell, number in rows:
        names = re.findall(r"`(\w+)`", cell)
        assert any(f"arXiv:{number}" in getattr(angular_losses, name).__doc__ for name in names)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_papers_have_their_whole_number(path):
    for text, number in re.findall(
        r"\[([^]]*)\]\(https://arxiv\.org/abs/([^)]*)\)", path.read_text()
    ):
        assert re.fullmatch(r"\d{4}\.\d{5}", number)
        assert text == number


def with_includes(path):
    """The text of a page, with the parts of other files that it includes."""

    def included(match):
        text = (path.parent / match[1]).read_text()
        start, end = re.findall(r'^:(?:start-after|end-before): "(.*)"$', match[2], re.M) or (
            "",
            "",
        )
        return text.split(start, 1)[-1].split(end, 1)[0] if start else text

    return re.sub(r"```\{include\} (\S+)\n(.*?)```", included, path.read_text(), flags=re.S)


def measured(text):
    """Each statement that a page calls measured, with the table below it."""
    blocks = text.split("\n\n")
    for block, after in zip(blocks, [*blocks[1:], ""], strict=True):
        for part in re.split(r"\n(?=[|-] )", block):
            if "**measured**" in part:
                yield part + (f"\n\n{after}" if part.endswith(":") else "")


def figures_and_pages():
    """The figures of the pages that compare, and the page that each is taken from."""
    for name in ("how_to/choose_a_loss.md", "explanation/comparison.md"):
        page = DOCS / name
        text = page.read_text()
        statements = [*measured(text), *re.findall(r"\[[^]]*\d[^]]*\]\([\w/.]+\.md.*?\)", text)]
        for statement in statements:
            links = re.findall(r"\]\(([\w/.]+\.md)", statement)
            words = re.sub(r"\]\(.*?\)|`.*?`", "", statement)
            for figure in re.findall(r"\d+\.\d+|\d+e-\d+|\d+(?= %| MB)", words):
                yield pytest.param(figure, page, links, id=f"{name}-{figure}")


@pytest.mark.parametrize(("figure", "page", "links"), list(figures_and_pages()))
def test_a_figure_stands_on_the_page_that_is_linked(figure, page, links):
    sources = [with_includes(page.parent / link) for link in links]
    assert any(re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", text) for text in sources)


EXPONENTS = {"⁸": "08", "³": "03"}


@pytest.mark.parametrize("path", [DOCS / "index.md", ROOT / "README.md"], ids=["home", "README"])
def test_figures_of_the_home_page_and_readme_are_those_of_the_benchmarks(path):
    home = " ".join(path.read_text().split())
    home = re.sub(
        r"(\d) \N{MULTIPLICATION SIGN} 10⁻(.)", lambda m: f"{m[1]}e-{EXPONENTS[m[2]]}", home
    )
    small = "| ArcFace | 0.01 | 0%, 0%, 7e-17, 4e-08 |"
    rows = {
        f"| float32 {small} 0%, 0%, 2e-05, 4e-03 |": ("4e-08", "4e-03"),
        f"| float32, bfloat16 autocast {small} 100%, 0%, -, - |": ("NaN under bfloat16 autocast",),
        "| ArcFace, recompute | 1.56 | 8 MB |": (
            "8 MB beyond the gradient",
            "14 % longer than PML",
        ),
        "| ArcFace, stash | 1.09 | 207 MB |": ("1.09 times", "f 207 MB are allowed"),
        "| PML ArcFace | 1.37 | 875 MB |": ("with 875 MB", "PML: 1.37 times"),
    }
    pages = DOCS / "benchmarks" / "accuracy.md", DOCS / "benchmarks" / "speed.md"
    sources = "".join(map(with_includes, pages))
    for row, sentences in rows.items():
        assert row in sources
        assert all(sentence in home for sentence in sentences)


def test_the_comparison_lists_what_exists():
    text = (DOCS / "explanation" / "comparison.md").read_text()
    assert f"| losses of this family | [{len(available())}](../reference/losses.md) | 7 |" in text

    pml = pytest.importorskip("pytorch_metric_learning")
    modules = ("distances", "losses", "miners", "reducers", "regularizers", "samplers")
    theirs = {n for m in modules for n in dir(importlib.import_module(f"{pml.__name__}.{m}"))}
    theirs.add(
        importlib.import_module(
            f"{pml.__name__}.utils.accuracy_calculator"
        ).AccuracyCalculator.__name__
    )
    section = re.search(r"## Only in pytorch-metric-learning\n.*?(?=\n## )", text, re.S)[0]
    names = set(re.findall(r"`(\w+)`", section))
    assert len(names) >= 10
    assert names <= theirs
    assert not names & set(angular_losses.__all__)


def test_papers_are_those_of_the_docstrings():
    docstrings = "".join(path.read_text() for path in (ROOT / "angular_losses").rglob("*.py"))
    links = re.findall(
        r"\[([^\]]+)\]\(https://arxiv\.org/abs/([^)]*)\)",
        (DOCS / "reference" / "losses.md").read_text(),
    )
    assert len(links) > 20
    for text, number in links:
        assert text == number
        assert re.fullmatch(r"\d{4}\.\d{5}", number)
        assert f"arXiv:{number}" in docstrings


@pytest.mark.parametrize("name", [*angular_losses.__all__, *distributed.__all__])
def test_every_public_name_is_in_the_reference(name):
    pages = (path.read_text() for path in (DOCS / "reference").glob("*.md"))
    assert any(re.search(rf"^(   |\.\. auto\w+:: ){name}$", page, re.M) for page in pages)


@pytest.mark.parametrize("section", ["how_to", "explanation", "reference", "benchmarks"])
def test_an_index_describes_each_of_its_pages(section):
    text = (DOCS / section / "index.md").read_text()
    entries = re.search(r"```\{toctree\}\n:hidden:\n\n(.*?)```", text, re.DOTALL)[1].split()
    listed = re.findall(r"^- \[.*\]\((\S*)\.md\): .", text, re.MULTILINE)
    assert sorted(listed) == sorted(entries)


def test_there_is_code_to_run():
    assert len(BLOCKS) >= 20

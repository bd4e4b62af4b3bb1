"""The code in README and docs runs as printed."""

import re
import warnings
from pathlib import Path

import pytest

import angular_losses
from angular_losses import available, sharded

ROOT = Path(__file__).parent.parent
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


def test_every_loss_has_a_row_in_the_table():
    table = (DOCS / "losses.md").read_text()
    for name in available():
        assert f"| `{name}` |" in table


@pytest.mark.parametrize("name", [*angular_losses.__all__, *sharded.__all__])
def test_every_public_name_has_its_page_in_the_reference(name):
    assert f"   {name}\n" in (DOCS / "reference.md").read_text()


def test_there_is_code_to_run():
    assert len(BLOCKS) >= 20

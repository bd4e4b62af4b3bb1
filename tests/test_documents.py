"""The code in README and docs runs as printed."""

import re
from pathlib import Path

import pytest

from angular_losses import available

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_block_runs(block):
    exec(compile(block, "document", "exec"), {})


def test_every_loss_has_a_row_in_the_table_and_a_place_in_the_reference():
    table, reference = (
        (ROOT / "docs" / name).read_text() for name in ("losses.md", "reference.md")
    )
    for name in available():
        assert f"| `{name}` |" in table
        assert f".. autoclass:: {name}\n" in reference


def test_there_is_code_to_run():
    assert len(BLOCKS) >= 3

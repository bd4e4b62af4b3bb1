"""The report, its figures and the tables of index.md, from the example's kept results.

python -m docs.brain_tumor.update  # about a minute
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from examples.brain_tumor.report.records import aims_table
from examples.brain_tumor.report.reproduction_report import REPORT, write_reproduction_report
from examples.brain_tumor.report.wrong_slices import kinds_table
from examples.brain_tumor.reproduction.results import FIGURES, Reproduction, read_reproduction

PAGES = Path(__file__).parent
IMAGES = PAGES.parent / "images" / PAGES.name
RESULTS = PAGES.parents[1] / "examples" / "brain_tumor" / "results"
TABLES = {"aims": aims_table, "kinds": kinds_table}  # of index.md, by the comments around them


def report_page(text: str) -> str:
    """Return a report with its figures where the documentation has them."""
    return text.replace(f"]({FIGURES}/", f"](../images/{IMAGES.name}/")


def index_page(text: str, reproduction: Reproduction) -> str:
    """Return index.md with its tables anew."""
    for name, table in TABLES.items():
        before, rest = text.split(f"<!-- {name} -->")
        _, after = rest.split("<!-- end -->", 1)
        text = f"{before}<!-- {name} -->\n\n{table(reproduction)}\n\n<!-- end -->{after}"
    return text


def main() -> None:
    """Write the pages and the figures; a copy of the results keeps what is computed on the way."""
    with TemporaryDirectory() as temporary:
        folder = shutil.copytree(RESULTS, Path(temporary) / RESULTS.name)
        write_reproduction_report(folder)
        shutil.copytree(folder / FIGURES, IMAGES, dirs_exist_ok=True)
        (PAGES / REPORT).write_text(report_page((folder / REPORT).read_text()))
    index = PAGES / "index.md"
    index.write_text(index_page(index.read_text(), read_reproduction(RESULTS)))


if __name__ == "__main__":
    main()

"""Reports: Markdown from a template, and the same as one HTML page that needs no other file."""

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt

from ..files import printable

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8"),
    undefined=StrictUndefined,
    autoescape=lambda name: name is not None and name.endswith(".html.j2"),
    trim_blocks=True,
    lstrip_blocks=True,
)
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")  # no text becomes markup
FIGURE = re.compile(r'<p><img src="([^"]+)" alt="([^"]*)" /></p>\n<p>(.*?)</p>')
HEADING = re.compile(r"<h([1-6])>(.*?)</h\1>")
WRAPPERS = {  # what HTML has for the style sheet beyond what Markdown says
    "<p><strong>": '<p class="warning"><strong>',
    "<table>": '<div class="wide"><table>',
    "</table>": "</table></div>",
    "<tr>\n<td>the paper": '<tr class="cited">\n<td>the paper',
}


def percent(share: float) -> str:
    """Return a share in per cent, two digits."""
    return f"{100 * share:.2f}"


def bounds(interval: tuple[float, float]) -> str:
    """Return an interval of shares in per cent, or a dash where there is none.

    Student's interval of two seeds may leave what a share can be; it is cut off there.
    """
    low, high = np.clip(interval, 0, 1)
    return "-" if np.isnan(low) else f"{percent(low)} to {percent(high)}"


def cell_text(value: object) -> str:
    """Return what a cell shows: floats are shares, pairs intervals of them, and None is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return percent(value)
    return bounds(value) if isinstance(value, tuple) else str(value)


class Table:
    """A table; its text is Markdown, padded so that it reads well as plain text too.

    The cells of its rows are those of `cell_text`; what a row lacks at its end is None.
    """

    def __init__(
        self, header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = ""
    ) -> None:
        self.header, self.caption = list(header), caption
        self.rows = [
            [cell_text(value) for value in (*row, *[None] * (len(self.header) - len(row)))]
            for row in rows
        ]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, object]], caption: str = "") -> "Table":
        """Return a table of rows given by column; what a row lacks is None."""
        header = list(dict.fromkeys(column for row in rows for column in row))
        return cls(header, [[row.get(one) for one in header] for row in rows], caption)

    def __str__(self) -> str:
        if not self.header:
            return ""
        # What stays within its cell, whatever a class or a run is called.
        lines = [
            [printable(text).replace("|", r"\|") for text in row]
            for row in (self.header, *self.rows)
        ]
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        text = "\n".join(
            f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
            for line in lines
        )
        return f"{text}\n\n{self.caption}" if self.caption else text


def to_markdown(template: str, **values: object) -> str:
    """Return a template's text, its parts apart by one empty line each."""
    text = TEMPLATES.get_template(template).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def to_html(title: str, markdown: str, folder: Path) -> str:
    """Return Markdown as a page with its contents listed, and with the pictures of `folder`."""
    body = MARKDOWN.render(markdown)
    for plain, wrapped in WRAPPERS.items():
        body = body.replace(plain, wrapped)
    body = FIGURE.sub(lambda found: _figure(folder / found[1], found[2], found[3]), body)
    contents = [(_anchor(text), text) for text in re.findall(r"<h2>(.*?)</h2>", body)]
    body = HEADING.sub(lambda one: f'<h{one[1]} id="{_anchor(one[2])}">{one[2]}</h{one[1]}>', body)
    first, rest = body.split("</h1>", 1)
    page = TEMPLATES.get_template("page.html.j2")
    return page.render(title=title, first=f"{first}</h1>", rest=rest, contents=contents)


def _figure(path: Path, alternative: str, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    picture = f'<img alt="{alternative}" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _anchor(text: str) -> str:
    text = re.sub(r"&\w+;|</?code>", " ", text.lower())
    return "-".join("".join(c if c.isalnum() else " " for c in text).split())

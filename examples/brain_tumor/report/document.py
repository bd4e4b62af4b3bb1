"""A report's building blocks, and how they are written as Markdown and as one HTML file."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid #ddd; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; }
th { background: #f4f4f4; }
tr.cited td { font-style: italic; background: #faf6ea; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #444; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: .85rem; }
.warning { border-left: 4px solid #D55E00; padding: .5rem 1rem; background: #fff5ef; }
nav ol { columns: 2; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e6e6; background: #16181c; } th, pre { background: #24272d; }
  th, td, h2 { border-color: #3a3e46; } tr.cited td { background: #2b281e; }
  .warning { background: #33231b; } figcaption { color: #b5b5b5; } a { color: #7ab7ff; }
  img { background: #fff; }
}"""


@dataclass(frozen=True)
class Heading:
    """A section's title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `warning` makes it stand out."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table; rows whose first cell starts with "the paper" are set apart as cited."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture in the report's folder, what it shows, and the same for those who cannot see it."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Code:
    """Text that is to be read letter by letter."""

    text: str


Block = Heading | Paragraph | Items | Table | Figure | Code


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, padded so that it reads well as plain text too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * max(width, 3) for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """Return the blocks as Markdown; pictures are linked relative to `folder`."""
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Return the blocks as one HTML page that needs no other file and no network."""
    headings = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    contents = "".join(
        f'<li><a href="#{_anchor(heading.text)}">{_inline(heading.text)}</a></li>'
        for heading in headings
    )
    nav = f'<nav aria-label="Contents"><ol>{contents}</ol></nav>'
    body = [_html(block) for block in blocks]
    first = next((i + 1 for i, b in enumerate(blocks) if isinstance(b, Heading)), 0)
    body.insert(first, nav)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n"
        "<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text, warning):
            return f"**{text}**" if warning else text
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
        case Table(header, rows, caption):
            table = markdown_table(header, rows)
            return f"{table}\n\n{caption}" if caption else table
        case Figure(path, caption):
            return f"![{caption}]({path.relative_to(folder).as_posix()})\n\n{caption}"
        case Code(text):
            return f"```\n{text}\n```"


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f'<h{level} id="{_anchor(text)}">{_inline(text)}</h{level}>'
        case Paragraph(text, warning):
            opening = '<p class="warning">' if warning else "<p>"
            return f"{opening}{_inline(text)}</p>"
        case Items(texts):
            return f"<ul>{''.join(f'<li>{_inline(text)}</li>' for text in texts)}</ul>"
        case Table():
            return _html_table(block)
        case Figure(path, caption):
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            return (
                f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{_inline(caption)}</figcaption></figure>"
            )
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in table.header)
    rows = [
        ('<tr class="cited">' if row[0].startswith("the paper") else "<tr>")
        + "".join(f"<td>{_inline(cell)}</td>" for cell in row)
        + "</tr>"
        for row in table.rows
    ]
    caption = f"<p>{_inline(table.caption)}</p>" if table.caption else ""
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{caption}"
    )


def _inline(text: str) -> str:
    """Escape a text; what stands between backticks becomes code."""
    pieces = html.escape(text, quote=False).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def _anchor(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())

"""Reports: Markdown, and the same as a page; nothing in it can become markup."""

from html.parser import HTMLParser

import pytest

from examples.brain_tumor.report.page import Table, to_html, to_markdown

PNG = bytes.fromhex("89504e470d0a1a0a")
TABLE = Table(["", "accuracy"], [["ours", "97"], ["the paper", "98.69"]], "A caption.")
MARKDOWN = f"""# A report

**Beware & <script>alert(1)</script>**

## Part <one> & `two`

- `m < 5`
- second

{TABLE}

![A "quoted" picture](figures/one.png)

A "quoted" picture

```
x < 1
```
"""


@pytest.fixture
def page(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "one.png").write_bytes(PNG)
    return Page(to_html("A report", MARKDOWN, tmp_path))


class Page(HTMLParser):
    """Collects a page's tags and text, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "img", "link", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_loads_nothing(page):
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert "link" not in names
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert sources == ["data:image/png;base64,iVBORw0KGgo="]
    assert "Beware & <script>alert(1)</script>" in "".join(page.text)
    assert ("img", 'A "quoted" picture') in [(t, a.get("alt")) for t, a in page.tags]
    assert names.count("figcaption") == names.count("table") == 1


def test_contents_lead_to_the_sections(page):
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["#part-one-two"]
    assert {link.removeprefix("#") for link in links} <= anchors


def test_warnings_and_cited_rows_are_set_apart(page):
    rows = [attributes.get("class") for tag, attributes in page.tags if tag == "tr"]
    assert rows == [None, None, "cited"]
    paragraphs = [attributes.get("class") for tag, attributes in page.tags if tag == "p"]
    assert paragraphs[0] == "warning"
    assert set(paragraphs[1:]) == {None}


def test_a_tables_text_is_padded():
    assert str(TABLE).splitlines()[0] == "|           | accuracy |"
    assert str(TABLE).endswith("|\n\nA caption.")


def test_parts_of_a_template_are_one_empty_line_apart(monkeypatch):
    from jinja2 import DictLoader

    from examples.brain_tumor.report import page

    source = "# {{ a }}\n\n{% if no %}\nb\n{% endif %}\n\n\nc <d>\n\n"
    monkeypatch.setattr(page.TEMPLATES, "loader", DictLoader({"x.md.j2": source}))
    assert to_markdown("x.md.j2", a="A & B", no=False) == "# A & B\n\nc <d>\n"

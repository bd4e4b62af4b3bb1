"""Reports: one description, two forms; nothing in it can become markup."""

from html.parser import HTMLParser

import pytest

from examples.brain_tumor.report.document import (
    Code,
    Figure,
    Heading,
    Items,
    Paragraph,
    Table,
    to_html,
    to_markdown,
)

PNG = bytes.fromhex("89504e470d0a1a0a")


@pytest.fixture
def blocks(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "one.png").write_bytes(PNG)
    return [
        Heading("A report", 1),
        Paragraph("Beware & <script>alert(1)</script>", warning=True),
        Heading("Part <one>"),
        Items(["`m < 5`", "second"]),
        Table(["", "accuracy"], [["ours", "97"], ["the paper", "98.69"]], "A caption."),
        Figure(tmp_path / "figures" / "one.png", 'A "quoted" picture'),
        Code("x < 1"),
    ]


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


def test_the_page_is_whole_and_loads_nothing(blocks):
    page = Page(to_html("A report", blocks))
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert "link" not in names
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert sources == ["data:image/png;base64,iVBORw0KGgo="]
    assert "Beware & <script>alert(1)</script>" in "".join(page.text)
    assert ("img", 'A "quoted" picture') in [(t, a.get("alt")) for t, a in page.tags]


def test_contents_lead_to_the_sections(blocks):
    page = Page(to_html("A report", blocks))
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["#part-one"]
    assert {link.removeprefix("#") for link in links} <= anchors


def test_cited_rows_are_set_apart(blocks):
    page = Page(to_html("A report", blocks))
    rows = [attributes.get("class") for tag, attributes in page.tags if tag == "tr"]
    assert rows == [None, None, "cited"]


def test_markdown(blocks, tmp_path):
    text = to_markdown(blocks, tmp_path)
    assert text.startswith("# A report\n\n**Beware")
    assert "## Part <one>" in text
    assert "|           | accuracy |" in text
    assert "](figures/one.png)" in text
    assert "- `m < 5`\n- second" in text
    assert "A caption." in text
    assert "```\nx < 1\n```" in text

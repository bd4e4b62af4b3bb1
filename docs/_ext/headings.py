"""Say of what level the captions of the menus are: Sphinx makes them headings without one."""

from typing import Any

from sphinx.application import Sphinx


def complete(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Add the level where a caption is printed: in the menu, and on the front page."""
    for part in ("furo_navigation_tree", "body"):
        if context.get(part):
            context[part] = context[part].replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx, after the theme has made its menu."""
    app.connect("html-page-context", complete, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

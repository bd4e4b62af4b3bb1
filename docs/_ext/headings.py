"""What Sphinx and its gallery leave out of their HTML for those who do not see the page."""

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

THUMBNAIL = re.compile(
    r'(sphx-glr-thumbcontainer"[^>]*><img alt=")("[^>]*>\s*<p><a )(.*?<span[^>]*>([^<]*)</span>)'
)


def complete(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Give captions in menus their level, and the gallery's pictures and links their names."""
    for part in ("furo_navigation_tree", "body"):
        if context.get(part):
            context[part] = context[part].replace('role="heading"', 'role="heading" aria-level="2"')
    if context.get("body"):
        if 'alt="plot ' in context["body"]:
            raise ExtensionError(f"{page}: a figure without a title has no alternative text")
        context["body"] = THUMBNAIL.sub(r'\1A figure of \4\2aria-label="\4" \3', context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx, after the theme has made its menu."""
    app.connect("html-page-context", complete, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""A tutorial that warns fails, as a test that warns does."""

import warnings
from contextlib import ExitStack
from typing import Any

STACK = ExitStack()


def reset(gallery_conf: dict[str, Any], name: str, when: str) -> None:
    """Make warnings errors while a tutorial runs."""
    STACK.close()
    if when == "before":
        STACK.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")

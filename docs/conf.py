"""Sphinx configuration of the site: `make docs`."""

import angular_losses

project = "angular_losses"
author = "The angular_losses developers"
copyright = f"2026, {author}"
release = angular_losses.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes, ranges, units
nitpicky = False
html_theme = "furo"
html_title = f"angular_losses {release}"
exclude_patterns = ["_build", "engine_results.md"]

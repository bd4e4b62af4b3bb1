"""Sphinx configuration of the site: `make docs`."""

import shutil
import sys
from pathlib import Path

import angular_losses

HERE = Path(__file__).parent
sys.path += [str(HERE / "_ext"), str(HERE.parent / "examples")]

project = "angular_losses"
author = "The angular_losses developers"
copyright = f"2026, {author}"
release = angular_losses.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.katex",
    "explorer_data",
    "headings",
    "llms_txt",
    "patient_katex",
]
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = [
    "_build",
    "_templates",
    "benchmarks/engine_results.md",
    "**/GALLERY_HEADER.rst",
    "sg_execution_times.rst",
]
nitpicky = True
nitpick_ignore_regex = [  # other projects (no inventory is fetched), and private names
    ("py:.*", r"(torch|nn|abc|numpy|pytorch_metric_learning)\b.*"),
    ("py:class", r"angular_losses\..*\.(Shard|ClassCentres|_OneVsRest)"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more: shapes, ranges, units
maximum_signature_line_length = 88  # longer ones have a line for each parameter
autosummary_generate = True
templates_path = ["_templates"]

# Finished when the page is built: a reader's browser needs no script for it, and no network. Where
# there is no node, the script that comes with the extension does it in the browser.
katex_prerender = shutil.which("node") is not None
katex_css_path = "katex/katex.min.css"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "tutorial",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 1e9,
    "abort_on_example_error": True,
    "reset_modules": ("matplotlib", "strict_gallery.reset"),
    "reset_modules_order": "both",
}

html_theme = "furo"
html_title = f"angular_losses {release}"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_js_files = ["site.js", "losses_table.js"]

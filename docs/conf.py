"""Sphinx builds the documentation site: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import list_messages

project = "ray_zerocopy"
author = "the ray_zerocopy contributors"
copyright = "the ray_zerocopy contributors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "ray_zerocopy"
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# The docstrings are Google's form in plain text: single backticks are code.
default_role = "code"


def setup(app):
    """Have the list of all messages written before Sphinx reads the pages."""
    app.connect("builder-inited", list_messages.write)

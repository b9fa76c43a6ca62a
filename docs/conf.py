"""Sphinx configuration: `sphinx-build -W -b html docs <folder>`."""

import sys
from pathlib import Path

# Build from a checkout without installing it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lightning_altmin.__about__ import __version__

project = "lightning-altmin"
author = "the lightning-altmin authors"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# `Name` in a docstring links to that object where it is documented.
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"lightning-altmin {release}"

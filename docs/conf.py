"""Sphinx's configuration of the documentation site; see BUILD.md."""

import fgrad

project = "fgrad"
author = "the authors of fgrad"
version = release = fgrad.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
default_role = "py:obj"  # `name` in a docstring is a link where there is a target
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"fgrad {version}"

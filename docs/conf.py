"""Sphinx's configuration of the documentation site; see BUILD.md."""

import os
import pathlib
import sys

import jax
import optax
from sphinx.util.nodes import make_refnode

import fgrad

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for the extension mathml

project = "fgrad"
author = "the authors of fgrad"
version = release = fgrad.__version__
extensions = [
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
default_role = "py:obj"  # `name` in a docstring is a link where there is a target
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
napoleon_use_ivar = True

# Where else names are documented. The inventory of each site is read from the network.
# Without one, or with FGRAD_DOCS_OFFLINE=1, the few names in inventories/ have links.
_SITES = {
    "flax": "https://flax.readthedocs.io/en/latest/",
    "jax": "https://docs.jax.dev/en/latest/",
    "numpy": "https://numpy.org/doc/stable/",
    "optax": "https://optax.readthedocs.io/en/latest/",
    "python": "https://docs.python.org/3/",
}
_OFFLINE = os.environ.get("FGRAD_DOCS_OFFLINE", "0") != "0"
intersphinx_mapping = {
    name: (site, (*(() if _OFFLINE else (None,)), f"inventories/{name}.txt"))
    for name, site in _SITES.items()
}
intersphinx_timeout = 5
# In signatures these are called by the names that users import.
for _class in (optax.GradientTransformation, optax.GradientTransformationExtraArgs):
    _class.__module__ = "optax"
jax.Array.__qualname__ = "Array"

html_theme = "furo"
html_title = f"fgrad {version}"


def _by_last_name(app, env, node, contnode):
    """Links ``Site`` or ``estimators.spsa`` if one object of fgrad is called so."""
    if node.get("refdomain") != "py":
        return None
    found = {
        (place.docname, place.node_id): name
        for name, place in env.domains.python_domain.objects.items()
        if name.endswith("." + node["reftarget"])
    }
    if len(found) != 1:
        return None
    ((docname, node_id), name), *_ = found.items()
    return make_refnode(app.builder, node["refdoc"], docname, node_id, contnode, name)


def setup(app):
    """Links the short names of docstrings."""
    app.connect("missing-reference", _by_last_name)

"""Sphinx extension: equations as MathML, which browsers draw without a script."""

import re

from docutils import nodes
from latex2mathml import converter
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

_LOGGER = logging.getLogger(__name__)

# Such as clip or sign, which is no product of four letters; not \command or {text}.
_WORD = re.compile(r"(?<![\\A-Za-z{_^])([A-Za-z]{3,})")

# An equation ends at an empty line or at a line break of LaTeX.
_END = re.compile(r"\n\s*\n|\\\\")


def to_mathml(latex: str, display: str) -> str:
    """The ``<math>`` element of an equation; ``display`` is "inline" or "block".

    Raises:
      ValueError: for LaTeX that the converter does not know, and would print as it is.
    """
    mathml = converter.convert(_WORD.sub(r"\\operatorname{\1}", latex), display=display)
    visible = mathml.replace("&#x0005C;", "\\")
    if "\\" in visible:
        raise ValueError(f"no MathML for {latex!r}; it would read {visible!r}.")
    return mathml


def _convert(node: nodes.Node, latex: str, display: str) -> str:
    try:
        return to_mathml(latex, display)
    except Exception as error:
        _LOGGER.warning("cannot convert %r: %s", latex, error, location=node)
        return ""


def _visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(_convert(node, node.astext(), "inline"))
    raise nodes.SkipNode


def _visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append('<div class="math">')
    for equation in _END.split(node.astext()):
        if equation.strip():
            translator.body.append(_convert(node, equation, "block"))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

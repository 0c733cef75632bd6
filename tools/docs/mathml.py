"""Equations as MathML, made while the book is built: browsers draw it by themselves, so nothing is fetched or run.

The converter is that of docutils. It lacks a few commands, which are written in others that it has.
"""

import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError
from sphinx.util import logging

logger = logging.getLogger(__name__)
IN_OTHER_WORDS = (
    (r"\\dots(?![a-zA-Z])", r"\\ldots"),
    (r"\\texttt(?![a-zA-Z])", r"\\text"),
    (r"\\([tdc])frac\s*(\d)\s*(\d|\\[a-zA-Z]+|[a-zA-Z])", r"\\\1frac{\2}{\3}"),  # \tfrac12
    (r"\\([tdc]?)frac(\d)\{", r"\\\1frac{\2}{"),
    (r"\\([bB]igg?)([lrm]?)(?![a-zA-Z])\s*", r"\\\1l "),  # \big( as \bigl(; the size is what counts
)


def to_mathml(tex: str, block: bool) -> str:
    "MathML of an equation in LaTeX; ValueError that quotes an equation which the converter does not know."
    for pattern, other in IN_OTHER_WORDS:
        tex = re.sub(pattern, other, tex)
    try:
        return tex2mathml(tex.strip(), as_block=block)
    except Exception as error:  # MathError, and what else it stumbles over
        raise ValueError(f"{error} in: {tex.strip()}") from error


def _visit(block: bool):
    def visit(self, node: nodes.Element) -> None:
        try:
            made = to_mathml(node.astext(), block)
        except ValueError as error:
            logger.warning("equation is shown as LaTeX: %s", error, location=node)
            made = f"<code>{self.encode(node.astext())}</code>"
        self.body.append(f'<div class="math">{made}</div>\n' if block else made)
        raise nodes.SkipNode

    return visit


def setup(app) -> dict:
    try:
        app.add_html_math_renderer("mathml", (_visit(False), None), (_visit(True), None))
    except ExtensionError:  # already there
        raise
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}

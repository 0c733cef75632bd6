"""The book's extension of Sphinx: anchors as Jupyter makes them, equations as MathML, and docstrings in Markdown."""

import ast
import inspect
import io
import re
import textwrap
import tokenize

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

# commands that the converter of docutils lacks, in others that it has
IN_OTHER_WORDS = (
    (r"\\dots(?![a-zA-Z])", r"\\ldots"),
    (r"\\texttt(?![a-zA-Z])", r"\\text"),
    (r"\\([tdc])frac\s*(\d)\s*(\d|\\[a-zA-Z]+|[a-zA-Z])", r"\\\1frac{\2}{\3}"),  # \tfrac12
    (r"\\([tdc]?)frac(\d)\{", r"\\\1frac{\2}{"),
    (r"\\([bB]igg?)([lrm]?)(?![a-zA-Z])\s*", r"\\\1l "),  # \big( as \bigl(; the size is what counts
)


def jupyter_slug(title: str) -> str:
    "The anchor of a heading, as Jupyter and GitHub's view of notebooks make it: `Where to go` is `Where-to-go`."
    return re.sub(r"[`*]", "", title).strip().replace(" ", "-")


def to_mathml(tex: str, block: bool) -> str:
    "MathML of an equation in LaTeX: browsers draw it by themselves, so nothing is fetched or run."
    for pattern, other in IN_OTHER_WORDS:
        tex = re.sub(pattern, other, tex)
    return tex2mathml(tex.strip(), as_block=block)


def visit_math(self, node: nodes.Element) -> None:
    "Writes an equation; a warning, which stops the build, for one that the converter does not know."
    block = isinstance(node, nodes.math_block)
    try:
        made = to_mathml(node.astext(), block)
    except Exception as error:  # MathError, and what else the converter stumbles over
        logging.getLogger(__name__).warning("%s in the equation %s", error, node.astext(), location=node)
        made = f"<code>{self.encode(node.astext())}</code>"
    self.body.append(f'<div class="math">{made}</div>\n' if block else made)
    raise nodes.SkipNode


def to_rst(line: str) -> str:
    "A line of a docstring: code spans stay code, everything else is text."
    parts = re.split(r"`([^`]+)`", line)
    parts[::2] = [re.sub(r"([*_|\\])", r"\\\1", text) for text in parts[::2]]
    parts[1::2] = [rf"``{code.strip()}``\ " for code in parts[1::2]]  # RST wants a space after code: `x`s
    return "".join(parts)


def beside_arguments(thing: object) -> dict[str, str]:
    "Comments beside the arguments of a function, or the fields of a dataclass: name -> text."
    code = textwrap.dedent(inspect.getsource(thing))
    defined = ast.parse(code).body[0]
    last = defined.body[0].lineno if isinstance(defined, ast.FunctionDef) else len(code.splitlines()) + 1
    first, found = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        row = token.start[0]
        if token.type == tokenize.NAME:
            first.setdefault(row, token.string)
        elif token.type == tokenize.COMMENT and row < last and first.get(row) in inspect.signature(thing).parameters:
            found.setdefault(first[row], token.string.lstrip("# "))
    return found


def process_docstring(app, what: str, name: str, thing: object, options, lines: list[str]) -> None:
    "Docstrings are Markdown, and arguments are described in comments beside them; Sphinx reads RST."
    lines[:] = [to_rst(line) for line in lines]
    if what in ("function", "method") or (what == "class" and "__dataclass_fields__" in vars(thing)):
        lines += ["", *(f":param {name}: {to_rst(text)}" for name, text in beside_arguments(thing).items()), ""]


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.config.html_math_renderer = "mathml"
    app.connect("autodoc-process-docstring", process_docstring)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

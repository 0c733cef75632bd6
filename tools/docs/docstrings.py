"""Docstrings for the API pages: they are written in Markdown, arguments in comments beside them; Sphinx reads RST."""

import inspect
import re

from fastcore.docments import docments

SPECIAL = re.compile(r"([*_|\\])")


def to_rst(line: str) -> str:
    "A line of a docstring: code spans stay code, everything else is text."
    parts = re.split(r"`([^`]+)`", line)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"``{part.strip()}``"
        else:
            parts[i] = SPECIAL.sub(r"\\\1", part)
    text = ""
    for i, part in enumerate(parts):  # RST wants space or punctuation around code: `x`s
        if i and part and text and (text[-1].isalnum() or (i % 2 == 0 and part[0].isalnum())):
            text += "\\ "
        text += part
    return text


def arguments(thing: object) -> list[str]:
    "The comments beside the arguments of a function or the fields of a dataclass, as a field list."
    try:
        told = docments(thing)
    except Exception:  # no source, e.g. of what is made at run time
        return []
    return [
        f":param {name}: {to_rst(' '.join(str(text).split()))}"
        for name, text in told.items()
        if text and name != "return"
    ]


def process(app, what: str, name: str, thing: object, options, lines: list[str]) -> None:
    "The hook of autodoc: changes the lines in place."
    lines[:] = [to_rst(line) for line in lines]
    if what in ("function", "method", "class") and (inspect.isfunction(thing) or inspect.isclass(thing)):
        if inspect.isclass(thing) and "__dataclass_fields__" not in vars(thing):
            return
        if told := arguments(thing):
            lines += ["", *told, ""]


def setup(app) -> dict:
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""What the book holds, and in which order: read from the notebooks, so that a new one needs no line here.

The order of chapters and the groups of notebooks at the top are those of nbs/index.ipynb (the README). Within a chapter
a notebook stands after those that it imports.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import nbformat

ROOT = Path(__file__).resolve().parent.parent.parent
NBS = ROOT / "nbs"
PAGES = ROOT / "tools" / "docs" / "pages"
PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<=\]\()([^()\s#]*)(#[^()\s]*)?(?=(?:\s\"[^\"]*\")?\))")
CODE = re.compile(r"(```.*?```|~~~.*?~~~|``[^`]+``|`[^`\n]+`)", re.S)


@dataclass(frozen=True)
class Notebook:
    "A notebook as a page: its name below nbs/ (`core/files`), title, subtitle, and what it is."

    path: Path

    @cached_property
    def cells(self) -> list:
        return nbformat.read(self.path, 4).cells

    @property
    def name(self) -> str:
        return self.path.relative_to(NBS).with_suffix("").as_posix()

    @cached_property
    def first(self) -> str:
        "The text of the first cell that is text: title, subtitle, and often what one learns."
        return next((c.source for c in self.cells if c.cell_type == "markdown"), "")

    @property
    def title(self) -> str:
        found = re.match(r"# (.+)", self.first)
        return found[1].strip() if found else self.path.stem

    @property
    def subtitle(self) -> str:
        "The line that begins with `>`."
        found = re.search(r"^> (.+)", self.first, re.M)
        return found[1].strip() if found else ""

    @property
    def tells_what_one_learns(self) -> bool:
        "Whether the text before the second heading says what one can do at the end."
        opening = []
        for c in self.cells:
            if c.cell_type == "markdown":
                opening.append(re.split(r"^## ", c.source, maxsplit=1, flags=re.M)[0])
                if "\n## " in f"\n{c.source}":
                    break
        return "at the end you " in " ".join(" ".join(opening).split()).lower()

    @cached_property
    def next(self) -> str:
        "Where the notebook itself says to go on, a line `**Next:** ...` or a section at the end; empty if it does not."
        lines = [x for c in self.cells[-2:] if c.cell_type == "markdown" for x in c.source.splitlines()]
        return next((x for x in lines if x.startswith(("**Next:**", "## Where to go next"))), "")

    @cached_property
    def module(self) -> str:
        "The module that it exports, e.g. `physrep.core.files`; empty for a notebook that exports none."
        found = (re.search(r"^#\| default_exp (\S+)", c.source, re.M) for c in self.cells if c.cell_type == "code")
        return next((f"physrep.{f[1]}" for f in found if f), "")

    @cached_property
    def has_parameters(self) -> bool:
        "Whether it is a stage or an experiment, which papermill runs."
        return any("parameters" in c.metadata.get("tags", []) for c in self.cells)

    @cached_property
    def imports(self) -> set[str]:
        "The modules of physrep that its exported cells import."
        code = "\n".join(c.source for c in self.cells if c.cell_type == "code" and "#| export" in c.source)
        found = re.findall(r"^from (physrep[\w.]*) import (\([^)]*\)|.+)$", code, re.M)
        return {name for place, names in found for n in re.findall(r"\w+", names) for name in (place, f"{place}.{n}")}


def in_order(notebooks: list[Notebook], begin_with: list[str]) -> list[Notebook]:
    "Every notebook after those that it imports; where that decides nothing, those to begin with first, then by name."
    place = {name: i for i, name in enumerate(begin_with)}
    left, done = sorted(notebooks, key=lambda n: (place.get(n.name, len(place)), n.name)), []
    while left:
        names = {n.module for n in left}
        free = [
            n for n in left if not (n.imports - {n.module}) & names
        ] or left  # a circle cannot be: Python refuses it
        done.append(free[0])
        left.remove(free[0])
    return done


@dataclass(frozen=True)
class Chapter:
    "A package: the folder of its notebooks, what it holds, and its notebooks in reading order."

    name: str
    description: str
    notebooks: tuple[Notebook, ...]


@dataclass(frozen=True)
class Group:
    "Notebooks at the top that belong together, e.g. `Stages`."

    title: str
    notebooks: tuple[Notebook, ...]


class Book:
    "All pages, found and put in order."

    def __init__(self, nbs: Path = NBS):
        paths = sorted(p for p in nbs.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
        self.notebooks = [Notebook(p) for p in paths]
        self.by_name = {n.name: n for n in self.notebooks}
        self.index, self.glossary = self.by_name["index"], self.by_name["glossary"]
        self.front = "\n\n".join(c.source for c in self.index.cells if c.cell_type == "markdown")
        self.guides = sorted(PAGES.glob("*.md"), key=lambda p: (guide_order(p), p.name))

    @cached_property
    def chapters(self) -> list[Chapter]:
        "Packages in the order of the table in the index; those that it does not have yet at the end."
        rows = re.findall(r"^\| (\w+) \| ([^|]+) \|(.*)", self.front, re.M)
        told = {name: text for name, text, _ in rows}
        first = [m[1].removesuffix(".ipynb") for *_, links in rows for m in LINK.finditer(links)]
        folders = {n.name.partition("/")[0] for n in self.notebooks if "/" in n.name}
        order = [name for name in told if name in folders] + sorted(folders - set(told))
        return [Chapter(n, told.get(n, "").strip(), tuple(in_order(self._below(n), first))) for n in order]

    def _below(self, folder: str) -> list[Notebook]:
        return [n for n in self.notebooks if n.name.startswith(f"{folder}/")]

    @cached_property
    def groups(self) -> list[Group]:
        "Notebooks at the top, as the index lists them (`- **Stages:** ...`); those that it does not list under `More`."
        left = {n.name: n for n in self.notebooks if "/" not in n.name and n not in (self.index, self.glossary)}
        groups = []
        for title, text in re.findall(r"^- \*\*([^*:]+):\*\* (.+)$", self.front, re.M):
            names = [m[1].removesuffix(".ipynb") for m in LINK.finditer(text) if m[1].endswith(".ipynb")]
            if found := [left.pop(name) for name in names if name in left]:
                groups.append(Group(title, tuple(found)))
        return groups + ([Group("More", tuple(left.values()))] if left else [])

    @cached_property
    def reading_order(self) -> list[Notebook]:
        "From the first stage to the last module, then the glossary."
        top = [n for g in self.groups for n in g.notebooks]
        return [*top, *(n for c in self.chapters for n in c.notebooks), self.glossary]


def guide_order(path: Path) -> int:
    "The number in the first line of a page, `<!-- order: 3 -->`; pages without one come last."
    found = re.match(r"<!-- order: (\d+) -->", path.read_text(encoding="utf-8"))
    return int(found[1]) if found else 99


def heading(path: Path) -> str:
    "The title of a Markdown page."
    return re.search(r"^# (.+)", path.read_text(encoding="utf-8"), re.M)[1]


def lead(path: Path) -> str:
    "The subtitle of a Markdown page, the first line with `>`."
    return re.search(r"^> (.+)", path.read_text(encoding="utf-8"), re.M)[1]


def text_links(text: str) -> list[tuple[str, str]]:
    "Targets and anchors of the links and images in Markdown, code left out."
    parts = CODE.split(text)[::2]
    return [(m[1], (m[2] or "")[1:]) for part in parts for m in LINK.finditer(part)]


def is_relative(target: str) -> bool:
    return not re.match(r"[a-z][a-z0-9+.-]*:|//|#|/", target)


def docname(path: Path) -> str | None:
    "The page of the book that shows a file of the repository; None for files that no page shows."
    if path.suffix == ".ipynb" and path.is_relative_to(NBS):
        return path.relative_to(NBS).with_suffix("").as_posix()
    if path == ROOT / "README.md":
        return "index"
    if path.parent == PAGES and path.suffix == ".md":
        return f"guides/{path.stem}"
    return f"project/{path.stem.lower()}" if path.parent == ROOT and path.name in PROJECT else None


def relative(target: str, page: str) -> str:
    "A path of the book as a link from a page: `figures/a.png` on `guides/x` is `../figures/a.png`."
    up = len(PurePosixPath(page).parts) - 1
    return "../" * up + target


def jupyter_slug(title: str) -> str:
    "The anchor of a heading, as Jupyter and GitHub's view of notebooks make it: `Where to go` is `Where-to-go`."
    return re.sub(r"[`*]", "", title).strip().replace(" ", "-")

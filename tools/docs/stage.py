"""Fills a folder with the source of the book: notebooks, guides, a page for each chapter, API pages, figures.

The notebooks of nbs/ stay as they are. Their copies lose what only nbdev reads, and get links: to the API, to the
notebook on GitHub and on Colab.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from configparser import ConfigParser
from pathlib import Path

import nbformat
from contents import (
    CODE,
    LINK,
    PROJECT,
    ROOT,
    Book,
    Chapter,
    Notebook,
    docname,
    heading,
    is_relative,
    lead,
    relative,
)
from tables import TABLES

WIDGET = "application/vnd.jupyter.widget-view+json"
COLAB = "https://colab.research.google.com/github"


def repository() -> tuple[str, str]:
    "Address of the repository and its branch, from settings.ini."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]["git_url"], parser["DEFAULT"]["branch"]


def github(path: Path) -> str:
    "Where GitHub shows a file or folder of the repository."
    url, branch = repository()
    return f"{url}/{'tree' if path.is_dir() else 'blob'}/{branch}/{path.relative_to(ROOT).as_posix()}"


def screenshots() -> list[Path]:
    "Pictures that stand beside notebooks."
    return sorted((ROOT / "nbs").rglob("*.png"))


def with_links(text: str, source: Path, page: str, staged: set[str]) -> str:
    """Markdown of a file of the repository for a page of the book: relative links lead to pages of the book and to its
    figures, and to GitHub for everything else."""

    def moved(match: re.Match) -> str:
        target, anchor = match[1], match[2] or ""
        if not target or not is_relative(target):
            return match[0]
        path = (source.parent / target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]  # no link: a test of every link says so
        name = docname(path)
        if name in staged:
            return relative(name + (path.suffix if name != "index" else ".ipynb"), page) + anchor
        if path.is_file() and (path.is_relative_to(ROOT / "figures") or path in screenshots()):
            return relative(path.relative_to(ROOT).as_posix(), page)
        return github(path)

    parts = CODE.split(text)
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)


def without_directives(source: str) -> str:
    "Code without the lines that only nbdev reads, `#| export` and the like."
    return re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")


def is_hidden(cell) -> bool:
    "Whether a page leaves a cell out: front matter, plumbing, and cells of directives alone."
    if cell.cell_type == "raw":
        return True
    if cell.cell_type != "code":
        return not cell.source.strip()
    if re.search(r"^#\|\s*(hide|include:\s*false)\s*$", cell.source, re.M):
        return True
    return not without_directives(cell.source).strip() and not cell.outputs


def has_widgets(notebook: Notebook) -> bool:
    "Whether a notebook shows widgets. They need ipywidgets 8, which Colab does not support (colabtools issue 4525)."
    if any("from physrep.explore.page import" in c.source for c in notebook.cells if c.cell_type == "code"):
        return True
    return any(WIDGET in o.get("data", {}) for c in notebook.cells for o in c.get("outputs", []))


def for_colab(notebook: Notebook) -> str:
    "A link that opens a stage on Colab, and the cell to run there first."
    url, branch = repository()
    where = f"{COLAB}/{url.removeprefix('https://github.com/')}/blob/{branch}/nbs/{notebook.name}.ipynb"
    name = url.rpartition("/")[2]
    return (
        f"```{{admonition}} Run it\n:class: tip\n\n"
        f"[Open in Colab]({where}), and run this in a first cell of its own: it clones the repository, installs "
        f"what the package needs, and goes on in the clone. On your own machine `make setup` in a clone is all.\n\n"
        f"    !git clone --depth 1 {url}\n    %cd {name}\n    %pip install --quiet --editable .\n```"
    )


def origin(notebook: Notebook, page: str) -> str:
    "The line below the title: the module with its API, the notebook on GitHub."
    parts = []
    if notebook.module:
        parts.append(f"`{notebook.module}` · [API]({relative(f'api/{notebook.module}.rst', page)})")
    parts.append(f"[notebook on GitHub]({github(notebook.path)})")
    return " · ".join(parts)


def page_of(notebook: Notebook, book: Book, staged: set[str]) -> nbformat.NotebookNode:
    "The notebook as a page of the book."
    made = nbformat.read(notebook.path, 4)
    made.cells = [c for c in made.cells if not is_hidden(c)]
    for c in made.cells:
        if c.cell_type == "markdown":
            local = re.sub(r"^\[!\[.*\n?", "", c.source, flags=re.M)  # badges are pictures from the network
            c.source = with_links(local, notebook.path, notebook.name, staged)
        else:
            c.source = without_directives(c.source)
            for output in c.outputs:
                output.get("data", {}).pop(WIDGET, None)
    under = [origin(notebook, notebook.name)]
    if notebook.has_parameters and not has_widgets(notebook):
        under.append(for_colab(notebook))
    if has_widgets(notebook):
        under.append(
            "```{note}\nThis notebook has sliders, which need a running kernel: `make explore` opens it. The page "
            "shows the pictures that were saved with it.\n```"
        )
    if notebook is not book.index:
        at = next((i for i, c in enumerate(made.cells) if c.cell_type == "markdown"), 0)
        made.cells.insert(at + 1, nbformat.v4.new_markdown_cell("\n\n".join(under)))
    made.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    for i, c in enumerate(made.cells):
        c["id"] = f"c{i}"
    return made


def toctree(entries: Iterable[str], *options: str) -> str:
    return "\n".join(["```{toctree}", *(f":{o}" if ":" in o else f":{o}:" for o in options), "", *entries, "```"])


def listed(notebooks: Iterable[Notebook], page: str) -> str:
    "Notebooks as a list: title and subtitle."
    return "\n".join(f"- [{n.title}]({relative(f'{n.name}.ipynb', page)}): {n.subtitle}" for n in notebooks)


def chapter_page(chapter: Chapter) -> str:
    page = f"{chapter.name}/index"
    return "\n\n".join(
        [
            f"# {chapter.name}",
            f"> {chapter.description[:1].upper()}{chapter.description[1:]}" if chapter.description else "",
            "The notebooks of this chapter, each after those that it builds on. "
            f"The [API of `physrep.{chapter.name}`](../api/{chapter.name}.md) has its functions and classes alone.",
            listed(chapter.notebooks, page),
            toctree((f"/{n.name}" for n in chapter.notebooks), "hidden", "maxdepth: 1"),
        ]
    )


def library_page(chapters: list[Chapter]) -> str:
    rows = "\n".join(f"| [{c.name}](../{c.name}/index.md) | {c.description} | {len(c.notebooks)} |" for c in chapters)
    return "\n\n".join(
        [
            "# Library",
            "> Every module is a notebook that explains it, shows it and tests it. A folder of notebooks is a package "
            "and a chapter.",
            "A module imports only from its own chapter and from those above it in this table, so the chapters can be "
            "read from the top.",
            f"| chapter | what it holds | notebooks |\n|---|---|---|\n{rows}",
            toctree((f"/{c.name}/index" for c in chapters), "hidden", "maxdepth: 2"),
        ]
    )


def stages_page(book: Book) -> str:
    parts = [
        "# Stages and experiments",
        "> The notebooks that one runs: stages and experiments, each with a cell of parameters, and tutorials.",
        "`make reproduce` runs them in the right order. One of them is run by `papermill`, or, for a stage, by the "
        "command `physrep` ([experiments.command](../experiments/command.ipynb)).",
    ]
    if "experiments/command" not in book.by_name:
        parts.pop()
    for group in book.groups:
        parts += [f"## {group.title}", listed(group.notebooks, "stages/index")]
    parts += [toctree((f"/{n.name}" for n in g.notebooks), "hidden", f"caption: {g.title}") for g in book.groups]
    return "\n\n".join(parts)


def api_pages(chapters: list[Chapter], public: dict[str, str]) -> dict[str, str]:
    "A page for each module, one for each package, and the first one."
    pages = {}
    for chapter in chapters:
        modules = [n for n in chapter.notebooks if n.module]
        for n in modules:
            pages[f"api/{n.module}.rst"] = (
                f"{n.module.removeprefix('physrep.')}\n{'=' * 60}\n\n"
                f"Explained, shown and tested in :doc:`{n.title.replace('`', '')} </{n.name}>`.\n\n"
                f".. automodule:: {n.module}\n"
            )
        lines = "\n".join(f"- [{n.module}]({n.module}.rst): {n.subtitle}" for n in modules)
        listing = toctree((f"/api/{n.module}" for n in modules), "hidden", "maxdepth: 1")
        pages[f"api/{chapter.name}.md"] = (
            f"# physrep.{chapter.name}\n\n> {chapter.description}\n\n{lines}\n\n{listing}\n"
        )
    short = "\n".join(f"| `physrep.{name}` | {{py:obj}}`physrep.{module}.{name}` |" for name, module in public.items())
    tree = toctree((f"/api/{c.name}" for c in chapters), "hidden", "maxdepth: 1")
    packages = "\n".join(f"- [physrep.{c.name}]({c.name}.md): {c.description}" for c in chapters)
    pages["api/index.md"] = (
        "# API\n\n> Functions and classes with their docstrings: shapes, units, errors and sources.\n\n"
        f"What most users need can be imported from `physrep` itself:\n\n| name | where it is |\n|---|---|\n{short}\n\n"
        f"Everything else is in a module of one of these packages:\n\n{packages}\n\n{tree}\n"
    )
    return pages


def figures_page(book: Book, staged: set[str]) -> str:
    "Every committed figure with its data, in the order of the notebooks that draw them."
    figures = []
    for picture in sorted((ROOT / "figures").rglob("*.png")):
        record = picture.with_suffix(".json")
        told = json.loads(record.read_text("utf-8")) if record.is_file() else {}
        figures.append((book.by_name.get(told.get("notebook", "")), told.get("preset", ""), picture))
    order = [n.name for n in book.reading_order]
    figures.sort(key=lambda f: (order.index(f[0].name) if f[0] and f[0].name in order else len(order), str(f[2])))
    parts = [
        "# Figures",
        "> Every committed figure: the picture, its numbers, and the record of what made them.",
        "`make verify` recomputes the record of each, and says which figures today's code would not make.",
    ]
    for notebook, preset, picture in figures:
        name = picture.relative_to(ROOT).with_suffix("").as_posix()
        kinds = {"csv": "numbers", "json": "record", "svg": "SVG"}
        files = [f"[{word}]({name}.{e})" for e, word in kinds.items() if picture.with_suffix(f".{e}").is_file()]
        told = (
            [
                f"{notebook.subtitle} Drawn by "
                + (f"[{notebook.name}]({notebook.name}.ipynb)" if notebook.name in staged else f"`{notebook.name}`")
                + (f" at preset `{preset}`." if preset else ".")
            ]
            if notebook
            else []
        )
        parts += [f"## {picture.stem}", f"![{picture.stem}]({name}.png)", " ".join([*told, *[" · ".join(files)]])]
    return "\n\n".join(parts)


def guides_page(guides: list[Path]) -> str:
    lines = "\n".join(f"- [{heading(p)}]({p.name}): {lead(p)}" for p in guides)
    tree = toctree((f"/guides/{p.stem}" for p in guides), "hidden", "maxdepth: 1")
    return f"# Guides\n\n> Pages for a purpose: what to type, in which order, and what it costs.\n\n{lines}\n\n{tree}\n"


def filled(text: str) -> str:
    "A page with its tables: `<!-- table: name -->` is replaced by what `tables.TABLES[name]` returns."

    def made(match: re.Match) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"no table {match[1]!r}; valid: {', '.join(TABLES)}")
        return TABLES[match[1]]()

    return re.sub(r"<!-- table: ([\w-]+) -->", made, text)


def public_names() -> dict[str, str]:
    "What `import physrep` gives: name -> module."
    import physrep

    return dict(physrep._PUBLIC)


def stage(folder: Path, keep: Callable[[Notebook], bool] = lambda notebook: True) -> Book:
    """Writes the source of the book to a folder, anew. `keep` chooses notebooks for a smaller book, whose other links
    lead to GitHub."""
    book = Book()
    kept = [n for n in book.notebooks if keep(n) or n in (book.index, book.glossary)]
    book.notebooks = kept
    book.by_name = {n.name: n for n in kept}
    staged = {n.name for n in kept}
    staged |= {docname(p) for p in (*book.guides, *(ROOT / name for name in PROJECT))}
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "figures", folder / "figures", ignore=shutil.ignore_patterns("smoke"))
    for picture in screenshots():
        target = folder / picture.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)

    def write(name: str, text: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    top = ["guides/index", "stages/index", "library/index", "api/index", "figures", "glossary", "project/index"]
    for n in kept:
        page = page_of(n, book, staged)
        if n is book.index:
            page.cells.append(nbformat.v4.new_markdown_cell(toctree(top, "hidden", "maxdepth: 2")))
        write(f"{n.name}.ipynb", nbformat.writes(page))
    for path in (*book.guides, *(ROOT / name for name in PROJECT)):
        name = docname(path)
        write(f"{name}.md", with_links(filled(path.read_text(encoding="utf-8")), path, name, staged))
    write("guides/index.md", guides_page(book.guides))
    write("stages/index.md", stages_page(book))
    write("library/index.md", library_page(book.chapters))
    for chapter in book.chapters:
        write(f"{chapter.name}/index.md", chapter_page(chapter))
    for name, text in api_pages(book.chapters, public_names()).items():
        write(name, text)
    write("figures.md", figures_page(book, staged))
    project = [docname(ROOT / name) for name in PROJECT]
    write("project/index.md", "# Project\n\n" + toctree((f"/{name}" for name in project), "maxdepth: 1") + "\n")
    return book

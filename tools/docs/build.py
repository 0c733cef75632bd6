"""Builds the book from the committed notebooks, as `make docs` does: static pages, no network, nothing executed.

    python tools/docs/build.py                    all pages, in _docs/html
    python tools/docs/build.py --only core        the notebooks whose name begins with `core`, for a quick look

The source of the book is a copy of nbs/, tools/docs/pages and figures/ at the same relative places, so that their links
hold, and pages of contents. Copies of notebooks lose what only nbdev reads, and link to the API, GitHub and Colab.
"""

import argparse
import json
import os
import re
import shutil
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent.parent
NBS = ROOT / "nbs"
PAGES = ROOT / "tools" / "docs" / "pages"
CONTENTS = PAGES / "contents.md"  # what the book holds, in its order
PROJECT = ("CONTRIBUTING", "CHANGELOG")
MARK = ".made-by-make-docs"


def listed(pattern: str) -> list:
    "What a pattern finds in the page of contents, in its order."
    return re.findall(pattern, CONTENTS.read_text(encoding="utf-8"), re.M)


def notebooks() -> dict[str, list[str]]:
    "Names (`physics/oracle`) of all notebooks in reading order, by folder; the empty name is for those at the top."
    found: dict[str, list[str]] = {"": ["index"]}
    for name in listed(r"/nbs/([\w/]+)\.ipynb"):
        found.setdefault(name.rpartition("/")[0], []).append(name)
    return found


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NBS / f"{name}.ipynb", 4)


def heading(path: Path) -> tuple[str, str]:
    "Title and subtitle (the line that begins with `>`) of a notebook or a page."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join(c.source for c in nbformat.reads(text, 4).cells if c.cell_type == "markdown")
    return tuple(m[1].strip() if (m := re.search(rf"^{mark} (.+)", text, re.M)) else "" for mark in "#>")


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def origin(name: str, notebook: nbformat.NotebookNode) -> str:
    "What stands below the title: the module with its API, the notebook on GitHub, and how to run a stage on Colab."
    url, branch = settings()["git_url"], settings()["branch"]
    place = f"blob/{branch}/nbs/{name}.ipynb"
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    text = f"[notebook on GitHub]({url}/{place})"
    if found := re.search(r"^#\| default_exp (\S+)", code, re.M):
        text = f"`physrep.{found[1]}` · [API](/api/physrep.{found[1]}.rst) · {text}"
    tagged = any("parameters" in c.metadata.get("tags", []) for c in notebook.cells)
    if tagged and "from physrep.explore.page import" not in code:  # Colab has no ipywidgets 8 (colabtools issue 4525)
        text += (
            f"\n\n```{{admonition}} Run it\n:class: tip\n\n[Open in Colab](https://colab.research.google.com/github/"
            f"{url.removeprefix('https://github.com/')}/{place}), and run this in a first cell of its own. On your own "
            f"machine `make setup` in a clone is all.\n\n    !git clone --depth 1 {url}\n    %cd {Path(url).name}\n"
            "    %pip install --quiet --editable .\n```"
        )
    return text


def page_of(name: str) -> nbformat.NotebookNode:
    "A notebook as a page of the book: without hidden cells, lines that only nbdev reads, badges and widgets."
    notebook, cells = read(name), []
    below_title = origin(name, notebook)
    for cell in notebook.cells:
        hidden = re.search(r"^#\|\s*(hide|include:\s*false)\s*$", cell.source, re.M)
        if cell.cell_type == "code":
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
            for output in cell.outputs:
                output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        else:
            cell.source = re.sub(r"^\[!\[.*\n?", "", cell.source, flags=re.M)
        if cell.cell_type != "raw" and not hidden and (cell.source.strip() or cell.get("outputs")):
            cells.append(cell)
    notebook.cells = [cells[0], nbformat.v4.new_markdown_cell(below_title), *cells[1:]]
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return notebook


def toctree(entries: list[str]) -> str:
    "A hidden table of contents; entries are pages by their place in the book."
    return "\n".join(["```{toctree}", ":hidden:", ":maxdepth: 2", "", *entries, "```"])


def contents(title: str, subtitle: str, entries: list[str], lines: str = "") -> str:
    "A page of contents."
    return f"# {title}\n\n> {subtitle}\n\n{lines}\n\n{toctree([f'/{e}' for e in entries])}\n"


def listing(paths: list[Path]) -> str:
    "Notebooks or pages with their subtitles."
    lines = [(*heading(p), p.relative_to(ROOT).as_posix()) for p in paths]
    return "\n".join(f"- [{title}](/{place}): {subtitle}" for title, subtitle, place in lines)


def figures_page(kept: list[str]) -> str:
    "Every committed figure, the notebook that draws it, its numbers and its record."
    parts = ["# Figures\n\n> Every committed figure: the picture, its numbers, and the record of what made them."]
    for picture in sorted((ROOT / "figures").glob("*.png")):
        record = picture.with_suffix(".json")
        name = json.loads(record.read_text("utf-8")).get("notebook") if record.is_file() else None
        links = [f"[{name}](nbs/{name}.ipynb)"] if name in kept else []
        files = [picture.with_suffix(end) for end in (".csv", ".json", ".svg")]
        links += [f"[{file.name}](figures/{file.name})" for file in files if file.is_file()]
        parts.append(f"## {picture.stem}\n\n![{picture.stem}](figures/{picture.name})\n\n{' · '.join(links)}")
    return "\n\n".join(parts)


def stage(folder: Path, only: tuple[str, ...] = ("",)) -> list[str]:
    "Writes the source of the book to a folder, anew; `only`: beginnings of names of notebooks. Returns their names."
    if folder.exists() and not (folder / MARK).is_file():
        raise SystemExit(f"{folder} was not made by this script, which writes it anew; name another --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()

    def write(name: str, text: str) -> None:
        "A page, and the pictures and files that it links."
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            file = ((ROOT / name).parent / target).resolve()
            if file.is_file() and file.is_relative_to(ROOT) and file.suffix not in (".md", ".ipynb"):
                (folder / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder / file.relative_to(ROOT))

    chosen = (*only, "glossary")
    found = {f: [n for n in names if n.startswith(chosen) and n != "index"] for f, names in notebooks().items()}
    kept = [n for names in found.values() for n in names]
    for name in kept:
        write(f"nbs/{name}.ipynb", nbformat.writes(page_of(name)))
    guides = [f"tools/docs/pages/{g}" for g in ("contents", *listed(r"\((\w+)\.md\)"))]
    for name in (*guides, *PROJECT):
        write(f"{name}.md", (ROOT / f"{name}.md").read_text(encoding="utf-8").replace("README.md", "index.md"))
    stages = [n for n in found.pop("") if n != "glossary"]
    paths = {n: NBS / f"{n}.ipynb" for n in kept}
    told = {c: about for c, about in listed(r"^\| (\w+) \| (.+?) \| \[") if found.get(c)}
    for c, about in told.items():
        entries = [f"nbs/{n}" for n in found[c]]
        write(f"nbs/{c}/index.md", contents(c, about, entries, listing([paths[n] for n in found[c]])))
    lines = "\n".join(f"- [{c}](/nbs/{c}/index.md): {about}" for c, about in told.items())
    about = "Every module is a notebook that explains it, shows it and tests it. A chapter builds on those above it."
    write("library.md", contents("Library", about, [f"nbs/{c}/index" for c in told], lines))
    about = "The notebooks that one runs: each has a cell of parameters, for `papermill` or the command `physrep`."
    lines = listing([paths[n] for n in stages])
    write("stages.md", contents("Stages and experiments", about, [f"nbs/{n}" for n in stages], lines))
    about = "Pages for a purpose: what to type, in which order, and what it costs."
    write("guides.md", contents("Guides", about, guides, listing([ROOT / f"{g}.md" for g in guides])))
    write("project.md", contents("Project", "How to take part, and what has changed.", list(PROJECT)))
    write("figures.md", figures_page(kept))
    top = ["guides", "stages", "library", "API <api/physrep>", "figures", "nbs/glossary", "project"]
    front = re.sub(r"^\[!\[.*\n?", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    write("index.md", f"{front}\n{toctree(top)}\n")
    return kept


if __name__ == "__main__":
    from sphinx.cmd.build import main as sphinx

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the book [_docs]")
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of names of notebooks, e.g. core 03_")
    asked = parser.parse_args()
    os.environ["BOOK_ONLY"] = " ".join(asked.only)  # see conf.py
    out = asked.out.resolve()
    if (out / "html").exists() and not (out / "source" / MARK).is_file():
        raise SystemExit(f"{out / 'html'} was not made by this script, which writes into it; name another --out")
    stage(out / "source", tuple(asked.only))
    options = ["-b", "html", "-c", str(Path(__file__).parent), "-d", str(out / "doctrees")]
    code = sphinx([*options, "--quiet", "--fail-on-warning", str(out / "source"), str(out / "html")])
    if code == 0:
        page = out / "html" / "index.html"
        print(f"the book: {page}\nopen it in a browser, or serve it: python3 -m http.server -d {page.parent} 8000")
    sys.exit(code)

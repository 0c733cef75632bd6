"""The book: every link of notebooks and pages leads somewhere, every page has one place, and the site builds."""

import importlib
import itertools
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools" / "docs"))
build = importlib.import_module("build")
book = importlib.import_module("book")

NOTEBOOKS = [ROOT / "nbs" / f"{name}.ipynb" for names in build.notebooks().values() for name in names]
GUIDES = [*sorted(build.PAGES.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
LINK = re.compile(r"\]\(([^()\s#]*)#?([^()\s]*)(?:\s\"[^\"]*\")?\)")
CODE = re.compile(r"```.*?```|~~~.*?~~~|``[^`]+``|`[^`\n]+`", re.S)


def texts(path: Path) -> list[str]:
    "The Markdown of a notebook or page, piece by piece."
    if path.suffix == ".ipynb":
        return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    return [path.read_text(encoding="utf-8")]


def anchors(path: Path) -> set[str]:
    "The anchors of the headings of a notebook or page."
    headings = [h for text in texts(path) for h in re.findall(r"^#+ (.+)$", text, re.M)]
    if path.suffix == ".ipynb":
        return {book.jupyter_slug(h) for h in headings}
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(path: Path) -> list[str]:
    "Relative links and images of a notebook or page that lead nowhere, and anchors that are not there."
    broken = []
    for target, anchor in (m for text in texts(path) for m in LINK.findall(CODE.sub("", text))):
        if re.match(r"[a-z][a-z0-9+.-]*:|//|/", target):
            continue
        place = (path.parent / target).resolve() if target else path
        there = place.exists() and place.is_relative_to(ROOT)
        if not there or (anchor and (place.suffix not in (".ipynb", ".md") or anchor not in anchors(place))):
            broken.append(f"{target}#{anchor}" if anchor else target)
    return broken


@pytest.mark.parametrize("path", [*NOTEBOOKS, *GUIDES, ROOT / "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert not broken_links(path)


def test_numbers_of_readme_and_findings_are_those_of_the_figures():
    done = subprocess.run([sys.executable, "tools/readme_numbers.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_contents_list_every_notebook_and_guide_once():
    listed = [name for names in build.notebooks().values() for name in names]
    there = (p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    assert sorted(listed) == sorted(p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in there)
    assert sorted([*build.listed(r"\((\w+)\.md\)"), "contents"]) == sorted(p.stem for p in build.PAGES.glob("*.md"))


def test_a_folder_of_others_is_not_written_anew(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="was not made by this script"):
        build.stage(tmp_path / "source")
    assert (tmp_path / "source" / "thesis.tex").exists()
    (tmp_path / "site" / "html").mkdir(parents=True)
    command = [sys.executable, str(ROOT / "tools" / "docs" / "build.py"), "--out", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "html was not made by this script" in done.stderr


def test_the_check_of_links_sees_broken_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "a.md"
    page.write_text("# One\n[x](b.md) ![y](c.png) [z](#one) [w](#two) [v](a.md#two) `[u](d.md)` [t](https://e.org/f)")
    assert broken_links(page) == ["b.md", "c.png", "#two", "a.md#two"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=build.heading)
def test_notebook_opens_with_what_one_learns(path):
    title, subtitle = build.heading(path)
    assert title and subtitle
    assert path.stem == "index" or "at the end you " in " ".join(" ".join(texts(path)).split()).lower()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    "The source of the whole book."
    folder = tmp_path_factory.mktemp("book") / "source"
    build.stage(folder)
    return folder


def test_toctrees_hold_every_page_once(source):
    pages = {p.relative_to(source).with_suffix("").as_posix(): p for p in source.rglob("*.*")}
    pages = {name: p for name, p in pages.items() if p.suffix in (".md", ".ipynb")}
    trees = [t for p in pages.values() for text in texts(p) for t in re.findall(r"```\{toctree\}(.*?)```", text, re.S)]
    entries = Counter(e.strip("/") for tree in trees for e in tree.split("\n\n")[1].split("\n") if e)
    assert entries.pop("API <api/physrep>") == 1
    assert set(entries) == pages.keys() - {"index"} and max(entries.values()) == 1


def test_pages_lose_what_only_nbdev_reads_and_stages_have_a_link_to_colab(source):
    cells = nbformat.read(source / "nbs" / "03_pretrain.ipynb", 4).cells
    assert "colab.research.google.com/github/physrep/physrep/blob/main/nbs/03_pretrain.ipynb" in cells[1].source
    assert not [c for c in cells if c.source.startswith("#|") or c.cell_type == "raw"]
    assert "colab" not in (source / "nbs" / "09_explore.ipynb").read_text().lower(), "Colab cannot show its widgets"


def test_every_figure_is_in_the_book(source):
    page = (source / "figures.md").read_text(encoding="utf-8")
    for picture in (ROOT / "figures").glob("*.png"):
        assert f"(figures/{picture.name})" in page and (source / "figures" / picture.name).is_file()


def test_all_equations_become_mathml():
    equation = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$]+)\$(?!\$)", re.S)
    found = [m for path in NOTEBOOKS for text in texts(path) for m in equation.findall(CODE.sub("", text))]
    assert len(found) > 500
    assert all(book.to_mathml(block or inline, bool(block)).startswith("<math") for block, inline in found)


def test_docstrings_become_rst():
    assert book.to_rst("tokens `(b, n, d)`, *not* a_b") == r"tokens ``(b, n, d)``\ , \*not\* a\_b"


def code_of(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("path", [p for p in GUIDES[:-2] if code_of(p, "python")], ids=lambda p: p.stem)
def test_code_of_a_guide_runs(path):
    names: dict = {}
    for code in code_of(path, "python"):
        exec(compile(code, str(path), "exec"), names)


def test_tests_that_a_guide_names_are_there():
    named = [t for p in GUIDES for t in re.findall(r"(tests/\w+\.py)::(\w+)", p.read_text(encoding="utf-8"))]
    assert named and not [t for t in named if f"def {t[1]}(" not in (ROOT / t[0]).read_text(encoding="utf-8")]


def test_commands_of_the_guides_are_there():
    "Targets and variables of make, commands of physrep."
    from physrep.experiments.command import COMMANDS

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z-]+):.*##", makefile, re.M)) | set(re.findall(r"^([A-Z]+) [?:]?=", makefile, re.M))
    lines = [line for p in GUIDES for block in code_of(p, "bash") for line in block.splitlines() if line.strip()]
    for line in lines:
        first, *words = itertools.dropwhile(lambda w: re.fullmatch(r"[A-Z_]+=.*", w), shlex.split(line, comments=True))
        if first == "make":
            assert {w.partition("=")[0] for w in words} <= known, line
        elif first == "physrep":
            assert words[0] in COMMANDS, line


def check_site(html: Path, whole: bool) -> None:
    "Nothing is fetched from elsewhere to show a page; links lead to a page of the site, if it is whole, and an anchor."
    pages = {p: p.read_text(encoding="utf-8") for p in html.rglob("*.html") if "_static" not in p.parts}
    assert len(pages) > 20, f"{html} is no site"
    ids = {p: set(re.findall(r'\bid="([^"]+)"', text)) for p, text in pages.items()}
    for page, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link\b[^>]*\bhref=\"([^\"]+)\"", text)
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page
        for url in {*loaded, *re.findall(r"<a\b[^>]*\bhref=\"([^\"]+)\"", text)} if whole else ():
            parts = urlsplit(url.replace("&amp;", "&"))
            if parts.scheme or parts.netloc or (page.name in ("search.html", "genindex.html") and url == "#"):
                continue
            place = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert place.exists(), f"{page.relative_to(html)}: {url}"
            anchor = unquote(parts.fragment)
            assert not anchor or place not in ids or anchor in ids[place], f"{page.relative_to(html)}: {url}"


@pytest.mark.parametrize("only", [("--only", "core/fi", "03_"), pytest.param((), marks=pytest.mark.long)])
def test_the_book_builds_without_a_warning(tmp_path, only):
    command = [sys.executable, str(ROOT / "tools" / "docs" / "build.py"), "--out", str(tmp_path), *only]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    check_site(html := tmp_path / "html", whole=not only)
    index = (html / "searchindex.js").read_text(encoding="utf-8")
    assert "core/files" in index and "collaps" in index, "search is a file of the site"
    assert "project_root" in (html / "api" / "physrep.core.files.html").read_text(encoding="utf-8")

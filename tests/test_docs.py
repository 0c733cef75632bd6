"""The book: every link of notebooks and pages leads somewhere, every notebook has one place, and the site builds."""

import csv
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
DOCS = ROOT / "tools" / "docs"
sys.path.insert(0, str(DOCS))
contents = importlib.import_module("contents")
stage = importlib.import_module("stage")
tables = importlib.import_module("tables")

BOOK = contents.Book()
TEXTS = [ROOT / "README.md", *(ROOT / name for name in contents.PROJECT), *BOOK.guides]
SMALL = ("core/pa", "03_", "physics/sys")  # notebooks of the small book: a module, a stage, equations


def cells_of(path: Path) -> list[str]:
    "The Markdown of a notebook or page, piece by piece."
    if path.suffix == ".ipynb":
        return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    return [path.read_text(encoding="utf-8")]


def anchors_of(path: Path) -> set[str]:
    "The anchors of the headings of a notebook or page."
    headings = [h for text in cells_of(path) for h in re.findall(r"^#+ (.+)$", text, re.M)]
    slugs = {contents.jupyter_slug(h) for h in headings}
    return (
        slugs if path.suffix == ".ipynb" else {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    )


def broken_links(path: Path) -> list[str]:
    "Relative links and images of a notebook or page that lead nowhere, and anchors that are not there."
    broken = []
    for text in cells_of(path):
        for target, anchor in contents.text_links(text):
            if target and not contents.is_relative(target):
                continue
            place = (path.parent / target).resolve() if target else path
            if not place.exists() or not place.is_relative_to(ROOT):
                broken.append(target)
            elif anchor and (place.suffix not in (".ipynb", ".md") or anchor not in anchors_of(place)):
                broken.append(f"{target}#{anchor}")
    return broken


@pytest.mark.parametrize("path", [*(n.path for n in BOOK.notebooks), *TEXTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert not broken_links(path)


def test_the_check_of_links_sees_broken_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "a.md"
    page.write_text("# One\n[x](b.md) ![y](c.png) [z](#one) [w](#two) [v](a.md#two) `[u](d.md)` [t](https://e.org/f)")
    assert broken_links(page) == ["b.md", "c.png", "#two", "a.md#two"]


@pytest.mark.parametrize("notebook", BOOK.notebooks, ids=lambda n: n.name)
def test_notebook_opens_with_what_one_learns(notebook):
    assert re.match(r"# .+\n+> .+", notebook.first), "a title and a subtitle"
    assert notebook is BOOK.index or notebook.tells_what_one_learns


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    "The source of the whole book."
    folder = tmp_path_factory.mktemp("book") / "source"
    stage.stage(folder)
    return folder


def toctree_entries(path: Path) -> list[str]:
    "Pages that the toctrees of a page name."
    found = []
    for text in cells_of(path):
        for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.S):
            lines = [line for line in block.splitlines() if line and not line.startswith(":")]
            found += [line.removeprefix("/") if line.startswith("/") else line for line in lines]
    return found


def test_toctrees_hold_every_page_once(source):
    pages = {
        p.relative_to(source).with_suffix("").as_posix(): p
        for p in source.rglob("*.*")
        if p.suffix in (".md", ".ipynb", ".rst")
    }
    entries = Counter(e for p in pages.values() if p.suffix != ".rst" for e in toctree_entries(p))
    assert {n.name for n in BOOK.notebooks} <= pages.keys()
    assert set(entries) == pages.keys() - {"index"}, set(entries) ^ pages.keys()
    assert max(entries.values()) == 1, [name for name, n in entries.items() if n > 1]


def test_every_page_of_a_notebook_ends_with_where_to_go(source):
    for notebook in BOOK.notebooks:
        last = cells_of(source / f"{notebook.name}.ipynb")[-1]
        assert notebook is BOOK.index or "**Next:** [" in last or "Where to go next" in last, notebook.name


def test_stages_have_a_link_to_colab(source):
    stages = [n for n in BOOK.notebooks if n.has_parameters and not stage.has_widgets(n)]
    assert {"00_simulate", "03_pretrain", "04_probe"} <= {n.name for n in stages}
    url, branch = stage.repository()
    for n in stages:
        text = "\n".join(cells_of(source / f"{n.name}.ipynb"))
        assert f"https://colab.research.google.com/github/physrep/physrep/blob/{branch}/nbs/{n.name}.ipynb" in text
        assert f"!git clone --depth 1 {url}\n" in text


def test_the_notebook_of_widgets_has_no_link_to_colab_which_cannot_show_them(source):
    text = "\n".join(cells_of(source / "09_explore.ipynb"))
    assert "colab" not in text.lower() and "`make explore` opens it" in text


def test_every_figure_is_in_the_book(source):
    page = (source / "figures.md").read_text(encoding="utf-8")
    for picture in (ROOT / "figures").glob("*.png"):
        assert f"(figures/{picture.name})" in page and (source / "figures" / picture.name).is_file()


def test_chapters_are_in_order():
    "Every chapter after those that it imports, every notebook after those of its chapter that it imports."
    modules = [n.module for c in BOOK.chapters for n in c.notebooks]
    known = set(modules)
    for chapter in BOOK.chapters:
        for n in chapter.notebooks:
            later = set(modules[modules.index(n.module) + 1 :])
            assert not n.imports & known & later, f"{n.name} stands before what it imports"


def test_all_equations_become_mathml():
    from mathml import to_mathml

    count = 0
    for notebook in BOOK.notebooks:
        for cell in notebook.cells:
            text = "".join(contents.CODE.split(cell.source)[::2]) if cell.cell_type == "markdown" else ""
            for block, inline in re.findall(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$]+)\$(?!\$)", text, re.S):
                assert to_mathml(block or inline, bool(block)).startswith("<math"), notebook.name
                count += 1
    assert count > 500
    with pytest.raises(ValueError, match="nonsense"):
        to_mathml(r"\nonsense{a}", False)


def test_docstrings_become_rst():
    from docstrings import to_rst

    assert to_rst("tokens `(b, n, d)`, *not* a_b") == r"tokens ``(b, n, d)``, \*not\* a\_b"
    assert to_rst("two `x`s") == r"two ``x``\ s"


def code_of(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("path", [p for p in BOOK.guides if code_of(p, "python")], ids=lambda p: p.stem)
def test_code_of_a_guide_runs(path, capsys):
    names: dict = {}
    for code in code_of(path, "python"):
        exec(compile(code, str(path), "exec"), names)


GUIDES = [*BOOK.guides, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def options_of(command: str, capsys) -> set[str]:
    "The options of a command of physrep, with underscores."
    from physrep.experiments.command import STAGES, main, notebook_parameters, stage_path

    if command in STAGES:
        return {p.name for p in notebook_parameters(stage_path(STAGES[command]))}
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return {name.replace("-", "_") for name in re.findall(r"--([a-z-]+)", capsys.readouterr().out)}


def test_commands_of_the_guides_are_there(capsys):
    "Targets and variables of make, commands of physrep and their options."
    from physrep.experiments.command import COMMANDS

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, re.M))
    variables = set(re.findall(r"^([A-Z]+) [?:]?=", makefile, re.M))
    lines = [line for p in GUIDES for block in code_of(p, "bash") for line in block.splitlines() if line.strip()]
    checked = []
    for line in lines:
        first, *words = itertools.dropwhile(lambda w: re.fullmatch(r"[A-Z_]+=.*", w), shlex.split(line, comments=True))
        if first == "make":
            assert {w for w in words if "=" not in w} <= targets, line
            assert {w.partition("=")[0] for w in words if "=" in w} <= variables, line
        elif first == "physrep":
            assert words[0] in COMMANDS, line
            asked = {w.removeprefix("--").partition("=")[0].replace("-", "_") for w in words if w.startswith("--")}
            assert asked <= options_of(words[0], capsys), line
        else:
            continue
        checked.append(words[0])
    assert len(checked) > 20 and {"report", "download"} <= set(checked)


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.stem)
def test_commands_of_the_environment_are_found(path):
    "A page that calls what is installed into .venv says before that it is to be activated."
    code = "\n".join(code_of(path, "bash"))
    if called := re.search(r"^(?:physrep|papermill|jupytext|python) ", code, re.M):
        activated = "source .venv/bin/activate" in code[: called.start()]
        assert activated, f"{called[0].strip()} is not on the PATH of a new terminal"


def test_what_docs_needs_is_in_dev():
    from configparser import ConfigParser

    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    settings = parser["DEFAULT"]
    assert set(settings["docs_requirements"].split()) <= set(settings["dev_requirements"].split())
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {re.split("[<>=]", r)[0].lower() for r in settings["docs_requirements"].split()} <= pinned


def test_tables_follow_the_figures(tmp_path):
    "The table of a guide names the lowest row of a CSV, not that of today."
    columns = "system,objective,encoder,probe,split,label,metric,value,low,high".split(",")
    rows = [("mae", 0.4), ("forecast", 0.2), ("random", 0.3), ("random.circular", 0.15), ("supervised", 0.1)]
    with (tmp_path / "table1.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for name, value in rows:
            table.writerow(["shear_flow", name, "vit", "linear", "test", "mean", "mse", value, value / 2, 2 * value])
    line = tables.best_encoders(tmp_path).splitlines()[-1]
    assert line.split("|")[3:6] == [
        " forecast on vit: 0.200 [0.100, 0.400] ",
        " random.circular on vit: 0.150 [0.075, 0.300] ",
        " supervised on vit: 0.100 [0.050, 0.200] ",
    ]


def test_counts_ask_for_the_interval_and_every_seed():
    rows = [("-0.2", "-0.1", "-0.3 -0.1"), ("-0.2", "-0.1", "-0.3 0.1"), ("0.1", "0.2", "0.1 0.2"), ("-1", "1", "1 1")]
    found = [tables.verdict(dict(zip(("low", "high", "by_seed"), row))) for row in rows]
    assert found == ["better", "undecided", "worse", "undecided"]


def test_size_of_the_published_sets():
    assert "233.6 MB" in tables.disk() and "| 225 | 53 GB |" in tables.disk(), "as The Well says: 51 to 53 GB"
    assert tables.PUBLISHED.keys() <= set(tables.titles())


def test_hours_of_a_gpu_add_up():
    *rows, whole = (line.split(" | ") for line in tables.gpu_hours().splitlines()[2:])
    petaflops = [float(row[3].removesuffix(" PFLOP")) for row in rows]
    assert "JEPA ConvNeXt" in rows[0][0] and petaflops[0] == pytest.approx(0.580239e12 * 903 * 256 / 1e15, abs=0.5)
    systems = (205 + 903 + 1411) / 903  # updates
    assert float(whole[3].removesuffix(" PFLOP")) == pytest.approx(systems * sum(petaflops), abs=3 * len(rows) / 2)


def test_the_paper_trains_for_six_epochs():
    from physrep.physics.systems import SYSTEMS
    from physrep.training.presets import get_preset
    from physrep.training.run import stride_of

    preset = get_preset("paper")
    for name, system in SYSTEMS.items():
        recipe = preset.recipe("jepa", "convnext", name)
        windows = tables.windows_of(system, 32, 0, stride_of(system, preset.train_stride))
        assert recipe.steps == round(6 * windows / recipe.batch_size), name
        assert {preset.recipe(row, "vit", name).steps for row in ("mae", "forecast", "supervised")} == {recipe.steps}


def build(out: Path, *options: str) -> Path:
    command = [sys.executable, str(DOCS / "build.py"), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return out / "html"


def check_site(html: Path) -> None:
    "Links of every page lead to a page and an anchor of the site; nothing is fetched from elsewhere to show a page."
    pages = {p: p.read_text(encoding="utf-8") for p in html.rglob("*.html") if "_static" not in p.parts}
    assert len(pages) > 20, f"{html} is no site"
    ids = {p: set(re.findall(r'\bid="([^"]+)"', text)) for p, text in pages.items()}
    for page, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link\b[^>]*\bhref=\"([^\"]+)\"", text)
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page
        for url in {*loaded, *re.findall(r"<a\b[^>]*\bhref=\"([^\"]+)\"", text)}:
            parts = urlsplit(url.replace("&amp;", "&"))
            if parts.scheme or parts.netloc or (page.name in ("search.html", "genindex.html") and url == "#"):
                continue
            place = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert place.exists(), f"{page.relative_to(html)}: {url}"
            anchor = unquote(parts.fragment)
            assert not anchor or place not in ids or anchor in ids[place], f"{page.relative_to(html)}: {url}"


def test_a_small_book_builds_without_a_warning(tmp_path):
    html = build(tmp_path, "--only", *SMALL)
    check_site(html)
    index = (html / "searchindex.js").read_text(encoding="utf-8")
    assert "core/files" in index and "collaps" in index, "search is a file of the site"
    assert "<math" in (html / "physics" / "systems.html").read_text(encoding="utf-8")
    assert "project_root" in (html / "api" / "physrep.core.files.html").read_text(encoding="utf-8")


@pytest.mark.long
def test_the_book_builds_without_a_warning(tmp_path):
    html = build(tmp_path)
    check_site(html)
    assert {n.name for n in BOOK.notebooks} <= {
        p.relative_to(html).with_suffix("").as_posix() for p in html.rglob("*.html")
    }

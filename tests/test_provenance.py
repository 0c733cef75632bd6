"""What makes a digest of code another one, and what does not."""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import physrep.core.provenance
from physrep.core.files import project_root, read_json, write_json
from physrep.core.provenance import (
    RECORDED,
    TABLES,
    code_digest,
    definitions,
    modules_used,
    notebook_digest,
    provenance,
)
from physrep.physics.systems import SYSTEMS

LOSSES = '''"""Losses."""
import math
from dataclasses import dataclass

from .tables import OBJECTIVES

__all__ = ["Loss", "loss", "scaled"]
WEIGHT = 0.5


@dataclass
class Loss:
    "A loss."
    name: str
    weight: float = 2.0


def loss(x: float, power: int = 2) -> float:
    "x to a power."
    return WEIGHT * 25.0 * x**power  # as in the paper


def scaled(x):
    return math.sqrt(loss(x))


if __name__ == "__main__":
    print(loss(1.0))
'''
TABLES_FILE = 'OBJECTIVES: dict[str, str] = {"one": "shapes.losses:loss", "two": "shapes.losses:scaled"}\n'
TRAIN = "from shapes import losses\n\n\ndef train(x):\n    from . import lazy\n\n    return lazy.late(losses.loss(x))\n"
FILES = {
    "__init__": "",
    "losses": LOSSES,
    "tables": TABLES_FILE,
    "train": TRAIN,
    "lazy": "from .train import train\n\n\ndef late(x):\n    return x + 1\n",
    "unrelated": "def unrelated():\n    return 1\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    "A package `shapes` of one's own, beside physrep."
    folder = tmp_path / "shapes"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(physrep.core.provenance, "TABLES_OF", {"physrep", "shapes"})  # it stands for physrep
    importlib.invalidate_caches()
    return folder


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    "A copy of physrep's sources, in which digests are taken."
    source, folder = physrep.core.provenance._PACKAGE, tmp_path / "copy" / "physrep"
    shutil.copytree(source, folder, ignore=lambda _, names: [n for n in names if n == "weights" or "__pycache__" in n])
    monkeypatch.setattr(physrep.core.provenance, "_PACKAGE", folder)
    return folder


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)


def digest(**options) -> str:
    return code_digest("shapes.train", **options)


@pytest.mark.parametrize(
    "old, new",
    [
        ('"x to a power."', '"The power of x."'),
        ('    "x to a power."\n', ""),
        ('"""Losses."""\n', ""),
        ("  # as in the paper", "  # as in no paper"),
        ("x: float, power: int = 2) -> float", "x, power=2)"),
        ("def scaled(x)", "def scaled(x: list[int]) -> str | None"),
        ("weight: float", "weight: int"),
        ("WEIGHT = 0.5", "WEIGHT: float = 0.5"),
        ("WEIGHT = 0.5", "WEIGHT = (\n    0.50\n)"),
        ('["Loss", "loss", "scaled"]', '["loss"]'),
        ("print(loss(1.0))", "print(loss(2.0))"),
        ("import math", "import json\nimport math"),
        (
            "import math\n",
            "import math\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import unrelated\n",
        ),
    ],
)
def test_words_do_not_matter(package, old, new):
    before, named = digest(), definitions("shapes.train")
    edit(package / "losses.py", (old, new))
    assert digest() == before and definitions("shapes.train") == named


@pytest.mark.parametrize(
    "old, new, name",
    [
        ("25.0", "26.0", "loss"),
        ("power: int = 2", "power: int = 3", "loss"),
        ("weight: float = 2.0", "weight: float = 3.0", "Loss"),
        ("weight: float = 2.0", "weight = 2.0", "Loss"),
        ("name: str\n", "name: str\n    unit: str\n", "Loss"),
        ("@dataclass\n", "", "Loss"),
        ("WEIGHT = 0.5", "WEIGHT = 1 / 2", "WEIGHT"),
        ("def scaled(x)", "def scaled(*, x)", "scaled"),
    ],
)
def test_what_acts_matters_and_is_named(package, old, new, name):
    before, named = digest(), definitions("shapes.train")
    edit(package / "losses.py", (old, new))
    now = definitions("shapes.train")
    assert digest() != before and now.keys() == named.keys() and [n for n in now if now[n] != named[n]] == [name]


def test_a_definition_that_comes_or_goes(package):
    before, named = digest(), definitions("shapes.train")
    edit(package / "losses.py", ("\n\ndef scaled(x):\n    return math.sqrt(loss(x))\n", ""))
    assert digest() != before and named.keys() - definitions("shapes.train").keys() == {"scaled"}
    (package / "losses.py").write_text(LOSSES + "\n\nprint(1)\n")
    assert digest() != before and definitions("shapes.train").keys() - named.keys() == {"(other statements)"}


def test_a_definition_that_moves(package):
    before, named = digest(), definitions("shapes.train")
    function = "def scaled(x):\n    return math.sqrt(loss(x))\n"
    edit(package / "losses.py", (function, ""))
    edit(package / "lazy.py", ("def late", f"import math\nfrom .losses import loss\n\n\n{function}\n\ndef late"))
    assert digest() == before and definitions("shapes.train") == named


def test_a_file_that_is_split_renamed_or_put_in_another_order(package):
    before = digest()
    statements = LOSSES.split("\n\n\n")
    (package / "losses.py").write_text("from .more import *\n\n\n" + "\n\n\n".join(statements[:1] + statements[:2:-1]))
    (package / "more").mkdir()
    (package / "more" / "__init__.py").write_text("from .deep import Loss, loss\n")
    (package / "more" / "deep.py").write_text("from ..tables import OBJECTIVES\n\n" + "\n\n\n".join(statements[1:3]))
    assert digest() == before and {"shapes.more", "shapes.more.deep"} <= set(modules_used("shapes.train"))
    (package / "losses.py").rename(package / "terms.py")
    edit(package / "train.py", ("from shapes import losses", "import shapes.terms as losses"))
    assert digest() == before and "shapes.terms" in modules_used("shapes.train")


def test_the_same_name_in_several_modules(package):
    assert len(definitions("shapes.train", "shapes.unrelated")) == len(definitions("shapes.train")) + 1
    (package / "unrelated.py").write_text("WEIGHT = 7\n")
    both = definitions("shapes.unrelated", "shapes.train")
    assert both == definitions("shapes.train", "shapes.unrelated") and both.keys() == definitions("shapes.train").keys()
    assert both["WEIGHT"] not in (definitions("shapes.train")["WEIGHT"], definitions("shapes.unrelated")["WEIGHT"])
    (package / "unrelated.py").write_text("WEIGHT = 0.5\n")
    assert definitions("shapes.unrelated", "shapes.train") == definitions("shapes.train")


def test_a_table_counts_by_the_entries_that_are_named(package):
    assert "OBJECTIVES" in TABLES
    none, one, every = digest(), digest(entries=["one"]), digest(entries=None)
    assert len({none, one, every, digest(entries=["two"])}) == 4 and digest(entries=["one", "two", "x"]) == every
    edit(package / "tables.py", ('{"one"', '{"three": "shapes.unrelated:unrelated", "one"'))
    assert (digest(), digest(entries=["one"])) == (none, one) and digest(entries=None) != every
    assert definitions("shapes.train", entries=["three"]).keys() - definitions("shapes.train").keys() == {
        "OBJECTIVES['three']"
    }
    edit(package / "tables.py", ("losses:scaled", "losses:loss"))
    assert (digest(), digest(entries=["one"])) == (none, one)
    edit(package / "tables.py", ('"one": "shapes.losses:loss"', '"one": "shapes.losses:scaled"'))
    assert digest() == none and digest(entries=["one"]) != one


def test_a_table_that_is_computed_or_of_another_name_is_taken_whole(package):
    before = digest()
    (package / "tables.py").write_text(TABLES_FILE + "WIDTHS = {'a': 1}\n")
    longer = digest()
    (package / "tables.py").write_text(TABLES_FILE + "WIDTHS = {'a': 1, 'b': 2}\n")
    assert len({before, longer, digest()}) == 3
    (package / "tables.py").write_text("OBJECTIVES = {n: n for n in ('one',)}\n")
    computed = digest()
    (package / "tables.py").write_text("OBJECTIVES = {n: n for n in ('one', 'two')}\n")
    assert len({before, computed, digest()}) == 3


def test_modules_that_are_not_used_do_not_matter(package):
    before = digest()
    edit(package / "unrelated.py", ("1", "2"))
    (package / "brand_new.py").write_text("x = 1\n")
    assert digest() == before
    assert modules_used("shapes.train") == [f"shapes.{m}" for m in ("lazy", "losses", "tables", "train")]


def test_modules_outside_of_physrep(package, tmp_path):
    (tmp_path / "alone.py").write_text("import pandas\nfrom physrep.core import files\n\nX = 1\n")
    assert modules_used("alone") == ["alone", "core.files"], "imports of a third package are not followed"
    before = code_digest("alone")
    (tmp_path / "alone.py").write_text("from physrep.core import files\n\nX = 2\n")
    assert code_digest("alone") != before and code_digest("alone", "shapes.train") != code_digest("alone")
    (tmp_path / "alone.py").write_text("import beside\n\nX = 2\n")
    (tmp_path / "beside.py").write_text("Y = 1\n")
    before = code_digest("alone")
    (tmp_path / "beside.py").write_text("Y = 2\n")
    assert modules_used("alone") == ["alone", "beside"] and code_digest("alone") != before, "files of one folder"
    (package / "__init__.py").write_text("from .unrelated import unrelated\n")
    (tmp_path / "alone.py").write_text("X = 1\n")
    assert modules_used("shapes") == ["shapes", "shapes.unrelated"]


@pytest.mark.parametrize(
    "name", ["gone", "shapes.gone", "shapes.gone.too", "physrep.gone", "core.gone", "json", "", "..", "a b"]
)
def test_a_module_that_does_not_exist(package, name):
    for function in (modules_used, definitions, code_digest, provenance):
        with pytest.raises(ValueError, match="no module '.*', neither in physrep nor outside of it"):
            function(name)


def test_a_module_that_was_made_by_hand_has_no_source(monkeypatch):
    monkeypatch.setitem(sys.modules, "by_hand", types.ModuleType("by_hand"))
    with pytest.raises(ValueError, match="no module 'by_hand'"):
        modules_used("by_hand")


def test_a_module_that_is_no_python(package):
    edit(package / "lazy.py", ("return x", "return ("))
    with pytest.raises(ValueError, match=r"lazy\.py is no Python code"):
        digest()


def test_no_code_is_run(package):
    (package / "__init__.py").write_text("raise RuntimeError\n")
    (package / "train.py").write_text("raise RuntimeError\n")
    assert modules_used("shapes.train") == ["shapes.train"] and len(digest()) == 16


def test_physrep_with_and_without_its_name():
    assert modules_used("core.provenance") == modules_used("physrep.core.provenance")
    assert "core.files" in modules_used("core.provenance") and code_digest("core.files") != code_digest(
        "core.provenance"
    )
    assert code_digest() == code_digest(*modules_used()) and "_modidx" not in modules_used()
    assert provenance("core.files", entries=["x"], data="0")["code"] == code_digest("core.files")


def test_an_edit_in_physrep(copied):
    before = code_digest("core.provenance")
    path = copied / "core" / "files.py"
    path.write_text("# a comment\n" + path.read_text())
    assert code_digest("core.provenance") == before
    edit(path, ("indent=1", "indent=2"))
    assert code_digest("core.provenance") != before


def test_the_commit_is_that_of_the_checkout_and_of_no_other_project(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        about = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *about, *words], check=True, capture_output=True)

    package = tmp_path / "physrep"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(physrep.core.provenance, "_PACKAGE", package)
    assert physrep.core.provenance._commit() == (None, None), "no repository"
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = physrep.core.provenance._commit()
    assert len(commit) == 40 and dirty is False
    (tmp_path / "notes.txt").write_text("no code")
    assert physrep.core.provenance._commit() == (commit, False)
    (package / "a.py").write_text("x = 2\n")
    assert physrep.core.provenance._commit() == (commit, True)
    installed = tmp_path / ".venv" / "lib" / "physrep"
    installed.mkdir(parents=True)
    monkeypatch.setattr(physrep.core.provenance, "_PACKAGE", installed)
    assert physrep.core.provenance._commit() == (None, None), "the repository is that of the environment"


def test_decisions_that_are_recorded_are_not_followed(copied):
    for name in RECORDED:
        file = copied.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(exist_ok=True)
        file.write_text("X = 1\n")
    lines = [f"from physrep.{'.'.join(n.split('.')[:-1])} import {n.split('.')[-1]}\n" for n in RECORDED]
    (copied / "core" / "new.py").write_text("".join(lines) + "from ..training.presets import X\n")
    assert modules_used("core.new") == ["core.new"] and modules_used(*RECORDED) == sorted(RECORDED)


def write_notebook(path: Path, *cells: str | dict) -> str:
    plain = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    write_json(path, {"cells": [plain | ({"source": c} if isinstance(c, str) else c) for c in cells]})
    return notebook_digest(path)


def test_words_of_a_notebook_do_not_matter(tmp_path):
    def of(*cells):
        return write_notebook(tmp_path / "a.ipynb", *cells)

    before = of("import a\nx = 1", "def f(x: int):\n    'Says.'\n    return x", "f(x)")
    markdown = {"cell_type": "markdown", "source": ["# A sentence\n", "more"]}
    assert before == of(
        "x = 1  # one", markdown, "def f(x):\n    return x\n\nf(x)", {"cell_type": "raw", "source": "y"}
    )
    tagged = {"source": ["import a\n", "x = 1"], "metadata": {"tags": ["parameters"]}, "outputs": [{"text": "1"}]}
    assert before == of(tagged, "", "# a comment\n\ndef f(x): return x", "%matplotlib inline", "!ls\nf?\nf(x)")
    for other in (
        ["x = 2", "def f(x): return x", "f(x)"],
        ["x = 1", "def f(x): return x"],
        ["def f(x): return x", "x = 1", "f(x)"],
    ):
        assert of(*other) != before


def test_cells_of_a_notebook_that_are_no_python(tmp_path):
    first, second = (write_notebook(tmp_path / "a.ipynb", f"%%bash\nls -l {name}") for name in "ab")
    assert first != second != write_notebook(tmp_path / "a.ipynb", "%%bash")
    timed = write_notebook(tmp_path / "a.ipynb", "%%time\nx = (7\n     )")
    assert timed == write_notebook(tmp_path / "a.ipynb", "x = 7")
    assert write_notebook(tmp_path / "a.ipynb", "x = (7\n     %y)") != timed
    (tmp_path / "a.ipynb").write_text("[1]")
    with pytest.raises(ValueError, match="is no notebook"):
        notebook_digest(tmp_path / "a.ipynb")


def test_a_changed_plot_is_no_changed_run(package):
    "Functions that return a Figure or are given Axes draw; they decide no number."
    before = digest()
    with open(package / "train.py", "a") as f:
        f.write("\n\ndef show(x) -> Figure:\n    return draw(x)\n\n\ndef _panel(ax: Axes, x):\n    ax.plot(x)\n")
    assert digest() == before
    with open(package / "train.py", "a") as f:
        f.write("\n\ndef scale(x):\n    return 2 * x\n")
    assert digest() != before


def test_a_plot_counts_where_drawing_is_the_work():
    assert "plot_table1" in definitions("results.panels") and "plot_metrics" not in definitions("training.pretrain")
    assert "pretrain" in definitions("training.pretrain")


def test_a_table_of_ones_own_counts_whole(package, monkeypatch):
    monkeypatch.setattr(physrep.core.provenance, "TABLES_OF", {"physrep"})
    assert digest() == digest(entries=["one"]), "a dictionary of that name may hold anything"


def test_rows_tables_and_figures_are_in_no_digest_of_a_run():
    "A new row of the table, another title or colour: no run and no probe depends on them."
    from physrep.training.run import resolve

    for objective, encoder in (("jepa", "convnext"), ("mae", "vit"), ("supervised", "vit"), ("random", "vit")):
        run = resolve("shear_flow", objective, encoder, "laptop")
        used = modules_used(*run.modules, "probing.evaluate", "probing.baselines")
        assert "training.loop" in used and not any(m.startswith(("results", "experiments")) for m in used)
        found = definitions(*run.modules, entries=run.entries)
        assert not any("PRESETS" in name or "plot_" in name for name in found)
        others = {"jepa", "mae", "supervised"} - {objective}
        assert not any(f"['{other}']" in name for other in others for name in found), "entries of other objectives"


def test_a_change_that_was_shown_to_change_no_number_keeps_the_digest(monkeypatch):
    used = physrep.core.provenance._used(("core.files",), ())
    name, (digest,) = next((name, digests) for name, digests in used.items() if len(digests) == 1)
    before = code_digest("core.files")
    monkeypatch.setattr(physrep.core.provenance, "_same", lambda: {(name, digest): "0123456789abcdef"})
    changed = code_digest("core.files")
    assert changed != before and definitions("core.files")[name] == "0123456789ab"
    monkeypatch.setattr(
        physrep.core.provenance, "_same", lambda: {(name, "0123456789abcdef"): digest, (name, digest): ""}
    )
    assert name not in definitions("core.files"), "added without changing a number"


def test_only_what_differs_is_declared_equal():
    path = project_root() / "tools" / "same_numbers.py"
    spec = importlib.util.spec_from_file_location("same_numbers", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    old = {"update": ["a"], "train": ["b", "c"], "kept": ["k"]}
    new = {"update": ["x"], "train": ["b", "y"], "kept": ["k"], "helper": ["h"]}
    assert tool.differing(old, new) == {"update": [("a", "x")], "train": [("c", "y")], "helper": [("", "h")]}
    with pytest.raises(ValueError, match="kept gone; keep the definition, or train again"):
        tool.differing(old, {name: new[name] for name in ("update", "train")})
    with pytest.raises(ValueError, match="a definition of train is gone"):
        tool.differing(old, {**new, "train": ["b"]})


def test_every_change_says_what_was_compared():
    path = Path(physrep.core.provenance.__file__).with_name("same_numbers.json")
    for change in read_json(path)["changes"] if path.is_file() else []:
        assert change["why"] and len(change["against"]) == 40
        tables = {f"{system}, {name}" for system in SYSTEMS for name in ("errors", "differences")}  # of --tables
        assert len(change["compared"]) > 50 or tables <= set(change["compared"])
        assert all(new and old != new for pairs in change["definitions"].values() for old, new in pairs)
        redrawn = tuple(f", {kind}" for kind in change.get("redrawn", ()))  # pictures that may differ are not compared
        assert not redrawn or not [name for name in change["compared"] if name.endswith(redrawn)]


def test_rounding_is_told_from_another_number(tmp_path):
    path = project_root() / "tools" / "same_numbers.py"
    spec = importlib.util.spec_from_file_location("same_numbers", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    weights = np.arange(1.0, 9.0, dtype="f4")
    folders = {name: tmp_path / name for name in ("old", "new")}
    for folder, factor in zip(folders.values(), (1.0, 1.001)):
        folder.mkdir()
        save_file({"w": weights * np.float32(factor)}, folder / "e.safetensors")
    old = {"mae, e.safetensors": {"file": "e.safetensors", "sha256": "a"}, "mae, data": "f"}
    row = {"probe": "linear", "metric": "mse", "value": 0.31, "low": 0.21, "high": 0.41}
    old["mae, result.json"] = [row]
    new = {**old, "mae, e.safetensors": {"file": "e.safetensors", "sha256": "b"}}
    new["mae, result.json"] = [{**row, "value": 0.32, "low": 0.22, "high": 0.42}]
    largest, other = tool.rounding(old, new, folders)
    assert largest == {"weights": pytest.approx(1e-3, rel=1e-2), "errors": pytest.approx(0.05)} and not other
    worse = {**new, "mae, result.json": [{**row, "value": 0.35, "low": 0.25, "high": 0.45}]}
    assert tool.rounding(old, worse, folders)[1] == ["mae, result.json by 0.2"]
    alone = [{"probe": "linear", "value": 0.5, "low": None, "high": None}]
    assert tool.errors_differ(alone, alone) == 0 and tool.errors_differ(alone, [row]) == math.inf
    assert tool.errors_differ(alone, [{**alone[0], "value": 0.75}]) == 0.25, "without an interval"
    assert tool.rounding(old, {**new, "mae, data": "g"}, folders)[1] == ["mae, data"]
    renamed = {**new, "mae, result.json": [{**row, "probe": "kernel"}]}
    assert tool.rounding(old, renamed, folders)[1] == ["mae, result.json by inf"]
    save_file({"w": weights * np.float32(1.1)}, folders["new"] / "e.safetensors")
    assert "e.safetensors by 0.1" in tool.rounding(old, new, folders)[1][0]


def test_records_are_of_the_code_that_runs_even_if_it_is_edited_meanwhile(tmp_path):
    source, folder = physrep.core.provenance._PACKAGE, tmp_path / "physrep"
    shutil.copytree(source, folder, ignore=lambda _, names: [n for n in names if n == "weights" or "__pycache__" in n])
    code = f"""
import pathlib
from physrep.core.provenance import code_digest
before, file = code_digest("core.files"), pathlib.Path({str(folder / "core" / "files.py")!r})
file.write_text(file.read_text() + "\\nNEW = 1\\n")
assert code_digest("core.files") == before
print(before)
"""
    command = [sys.executable, "-c", code]
    options = dict(cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    first, second = (subprocess.run(command, **options) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert first.stdout != second.stdout, "a process that starts later runs the other code"

"""The notebooks: what papermill and nbdev need, parameters, links, and the stages through papermill at preset smoke."""

import ast
import hashlib
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from helpers import ROOT, papermill

from physrep.experiments.command import notebook_parameters

ALL = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
# the top of nbs/ is what a reader runs: stages and experiments have parameters, index, glossary and tutorials have none
OTHERS = ("index", "glossary", "11_tutorial_row", "11_tutorial_objective", "11_tutorial_system")
STAGES = [p.stem for p in ALL if p.parent.name == "nbs" and p.stem not in OTHERS]


def read(name: str):
    return nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)


@pytest.mark.parametrize("name", STAGES)
def test_stage_has_one_parameters_cell_and_is_skipped_by_nbdev(name):
    cells = read(name).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, "papermill would run with the defaults"
    lines = [line for line in tagged[0].source.splitlines() if line.strip()]
    assert all(": " in line.split("=")[0] for line in lines), "every parameter has a type"
    assert any(c.cell_type == "raw" and "skip_exec: true" in c.source for c in cells)
    assert not any("#| export" in c.source for c in cells), "stages hold no logic"


@pytest.mark.parametrize("name", STAGES)
def test_stage_defines_nothing(name):
    "Parameters, calls into the library, pictures, words."
    for cell in read(name).cells:
        if cell.cell_type == "code":
            code = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith("%"))
            defined = [n.name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
            assert not defined, f"{', '.join(defined)} belongs in the library"


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_exported_cells_have_one_idea(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and cell.source.startswith("#| export"):
            tree = ast.parse(cell.source)
            defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
            assert len(defined) <= 3, f"a cell defines {', '.join(defined)}"
            lines = len(cell.source.splitlines())
            limit = 75 if short_methods(tree) else 60
            assert lines <= limit, f"a cell of {lines} lines: {defined}"


def short_methods(tree):
    "Whether a cell is one class of at least eight methods, none longer than ten lines."
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.ClassDef):
        return False
    lengths = [n.end_lineno - n.lineno + 1 for n in tree.body[0].body if isinstance(n, ast.FunctionDef)]
    return len(lengths) >= 8 and max(lengths) <= 10


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_links_between_notebooks_lead_somewhere(path):
    for cell in nbformat.read(path, 4).cells:
        for target in re.findall(r"\]\(([^)#:]+\.ipynb)(?:#[^)]*)?\)", cell.source):
            assert (path.parent / target).resolve().is_file(), f"{target} is not there"


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_is_clean(path):
    text = path.read_text(encoding="utf-8")
    assert "injected-parameters" not in text and '"output_type": "error"' not in text
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text
    assert "widgets" not in nbformat.reads(text, 4).metadata, "states of widgets; make notebooks drops them"
    first = next(cell for cell in nbformat.reads(text, 4).cells if cell.cell_type == "markdown")
    assert not re.search(r"^- ", first.source, re.M), "nbdev reads such a list below the title as YAML: begin it with *"
    for cell in nbformat.reads(text, 4).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", "warnings and progress bars are no documentation"
            data = output.get("data", {})
            shown = "image/png" in data or not str(data.get("text/plain", "")).startswith("<Figure size")
            assert shown, "a figure is not drawn: `%matplotlib inline` is missing"
            for image in [v for k, v in data.items() if k == "image/png"]:
                assert len(image) * 3 // 4 < 200_000, "a picture is over 200 KB"


def test_modules_that_notebooks_write_have_names_of_their_own():
    "nbdev_test runs several notebooks in one process, where a module that was imported stays."
    written = [name for path in ALL for name in re.findall(r'\(folder / \\"(\w+\.py)\\"\)', path.read_text("utf-8"))]
    assert len(written) >= 4 and len(set(written)) == len(written), sorted(written)


def test_help_lists_every_parameter():
    done = papermill(str(ROOT / "nbs" / "03_pretrain.ipynb"), "--help-notebook")
    names = [parameter.name for parameter in notebook_parameters(ROOT / "nbs" / "03_pretrain.ipynb")]
    assert len(names) > 15 and {"system", "objective", "coefficients", "minutes"} <= set(names)
    for name in names:
        assert f"  {name}: " in done.stdout
    assert done.returncode == 0 and "Unknown" not in done.stdout


def test_pretrain_with_an_output_path(smoke_data, tmp_path):
    source = (ROOT / "nbs" / "03_pretrain.ipynb").read_bytes()
    out = tmp_path / "mae.ipynb"
    done = papermill(
        "nbs/03_pretrain.ipynb",
        str(out),
        "-p",
        "objective",
        "mae",
        "-p",
        "preset",
        "smoke",
        "-p",
        "data_dir",
        str(smoke_data),
        "-p",
        "run_dir",
        str(tmp_path / "runs"),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "runs").rglob("mae-vit-*/seed0/encoder.safetensors"))) == 1
    pictures = [
        o for c in nbformat.read(out, 4).cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    assert len(pictures) >= 2, "loss curves and a picture of what is predicted"
    assert (ROOT / "nbs" / "03_pretrain.ipynb").read_bytes() == source, "the source notebook stays as it is"


def test_pretrain_piped_makes_missing_data(tmp_path):
    """`papermill nbs/03_pretrain.ipynb -p objective ... | cat`: the executed notebook on standard output, data made on
    the way."""
    source = (ROOT / "nbs" / "03_pretrain.ipynb").read_bytes()
    done = papermill(
        "nbs/03_pretrain.ipynb",
        "-p",
        "objective",
        "mae",
        "-p",
        "preset",
        "smoke",
        "-p",
        "data_dir",
        str(tmp_path / "data"),
        "-p",
        "run_dir",
        str(tmp_path / "runs"),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert nbformat.reads(done.stdout, 4).cells
    assert (tmp_path / "data" / "shear_flow" / "stats.yaml").is_file()
    assert len(list((tmp_path / "runs").rglob("mae-vit-*/seed0/encoder.safetensors"))) == 1
    assert (ROOT / "nbs" / "03_pretrain.ipynb").read_bytes() == source


@pytest.mark.parametrize(
    "parameters,message",
    [
        (("-p", "objectiv", "mae"), "unknown parameter objectiv; this notebook has: system, objective"),
        (
            ("-p", "objective", "mea"),
            "unknown objective 'mea'; valid: jepa, jepa_ema, jepa_sigreg, mae, forecast, next_frame, ",
        ),
    ],
)
def test_pretrain_refuses_what_it_does_not_know(parameters, message, tmp_path):
    done = papermill(
        "nbs/03_pretrain.ipynb",
        str(tmp_path / "x.ipynb"),
        *parameters,
        "-p",
        "run_dir",
        str(tmp_path / "runs"),
        cwd=ROOT,
    )
    assert done.returncode != 0 and message in done.stderr
    assert not (tmp_path / "runs").exists(), "before any work"


def test_probe_and_table_from_smoke_runs(smoke_data, tmp_path):
    "Three rows of Table 1 at preset smoke, one seed of one row missing, through the library; then the notebooks."
    from physrep.probing.evaluate import BASELINES, score_baseline, score_run
    from physrep.results.rows import chosen_rows, run_of
    from physrep.training.presets import get_preset
    from physrep.training.pretrain import pretrain

    runs, only = tmp_path / "runs", "jepa-vit,supervised-vit,random-vit"
    for row in chosen_rows(only):
        for seed in get_preset("smoke").seeds if row.kind != "baseline" else ():
            run = run_of(row, "shear_flow", "smoke", seed)
            pretrain(run, smoke_data, runs, progress=False, say=lambda text: None)
            if (row.objective, seed) != ("supervised", 1):
                score_run(run, smoke_data, runs, progress=False)
    for name in BASELINES:
        score_baseline(name, run, smoke_data, runs)
    common = ("-p", "preset", "smoke", "-p", "run_dir", str(runs), "-p", "only", only)
    table = papermill(
        "nbs/05_table1.ipynb", str(tmp_path / "t.ipynb"), *common, "-p", "systems", "shear_flow", cwd=ROOT
    )
    assert table.returncode != 0 and "no results yet of supervised-vit" in table.stderr
    missing = ("-p", "objective", "supervised", "-p", "encoder", "vit", "-p", "seeds", "0 1")
    missing += ("-p", "data_dir", str(smoke_data))
    probe = papermill("nbs/04_probe.ipynb", str(tmp_path / "p.ipynb"), *common[:6], *missing, cwd=ROOT)
    assert probe.returncode == 0, probe.stderr[-3000:]
    table = papermill(
        "nbs/05_table1.ipynb", str(tmp_path / "t.ipynb"), *common, "-p", "systems", "shear_flow", cwd=ROOT
    )
    assert table.returncode == 0, table.stderr[-3000:]
    differences = (f"table1_differences{reference}" for reference in ("", "_statistics", "_spectra"))
    names = ["overview", "table1", "curves", "table1_shear_flow", *differences]
    figures = {f.name for f in (runs / "smoke" / "figures").iterdir()}
    assert figures == {f"{n}.{e}" for n in names for e in ("png", "svg", "csv", "json")}
    # the same runs stand for those on splits without leaks
    again = ("-p", "leak_free_dir", str(runs))
    leakage = papermill("nbs/05d_leakage.ipynb", str(tmp_path / "l.ipynb"), *common, *again, cwd=ROOT)
    assert leakage.returncode == 0, leakage.stderr[-3000:]
    table = pd.read_csv(runs / "smoke" / "figures" / "leakage.csv")
    both = table.pivot(index=["objective", "encoder", "probe"], columns="splits", values="value")
    assert len(both) > 10 and (both["published"] == both["leak-free"]).all()
    further = ("-p", "seen", "64", "-p", "systems", "shear_flow", "-p", "data_dir", str(smoke_data))
    tuned = papermill("nbs/05e_fine_tuned.ipynb", str(tmp_path / "f.ipynb"), *common, *further, cwd=ROOT)
    assert tuned.returncode == 0, tuned.stderr[-3000:]
    table = pd.read_csv(runs / "smoke" / "figures" / "fine_tuned.csv")
    rows = table[table.probe == "finetune"].groupby(["objective", "encoder"]).seed.nunique()
    assert dict(rows) == {("jepa", "vit"): 2, ("random", "vit"): 2}, "a supervised row is not fine-tuned"


def test_tuning_notebook_goes_on_where_it_was_stopped(smoke_data, tmp_path):
    "Two configurations of one row at preset smoke, then three: the first two are not run again."
    about = {"preset": "smoke", "run_dir": tmp_path / "runs", "data_dir": smoke_data, "rows": "random-vit"}
    common = [word for name, value in about.items() for word in ("-p", name, str(value))]
    trials = tmp_path / "runs" / "tuning" / "smoke" / "shear_flow"
    for number in (2, 3):
        before = {path: path.stat().st_mtime_ns for path in trials.glob("*/*/result.json")}
        assert len(before) == (0 if number == 2 else 2 + 2 * 2), "two configurations, and each with two more seeds"
        out = tmp_path / f"{number}.ipynb"
        done = papermill("nbs/08a_tuning.ipynb", str(out), *common, "-p", "configurations", str(number), cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert len(list(trials.glob("random-vit-*/seed100/result.json"))) == 3
    table = pd.read_csv(tmp_path / "runs" / "smoke" / "figures" / "tuning.csv")
    assert set(table.number[table.seed == 100]) == {0, 1, 2} and (table.groupby("number").size() == 3).sum() >= 2


@pytest.mark.parametrize("stage", ["03_pretrain", "04_probe"])
def test_a_stage_refuses_to_stand_beside_results_of_other_flows(stage, smoke_data, tmp_path):
    folder = tmp_path / "runs" / "smoke" / "shear_flow" / "mae-vit-00000000" / "seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"rows": [], "data": {"test": "0123456789abcdef"}}')
    (folder / ".unpacked").write_text(hashlib.sha256((folder / "result.json").read_bytes()).hexdigest()[:16])
    given = {"preset": "smoke", "data_dir": smoke_data, "run_dir": tmp_path / "runs", "objective": "random"}
    words = [word for name, value in given.items() for word in ("-p", name, str(value))]
    done = papermill(f"nbs/{stage}.ipynb", str(tmp_path / "out.ipynb"), *words, "-p", "encoder", "vit", cwd=ROOT)
    assert done.returncode != 0 and "was scored on other flows of split 'test'" in done.stderr, done.stderr[-2000:]

"""The notebooks: what papermill and nbdev need, parameters, and the stages one after the other at preset smoke."""

import ast
import hashlib
import re
from pathlib import Path

import nbformat
import pytest
from helpers import ROOT, papermill

from physrep.experiments.command import notebook_parameters

ALL = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
STAGES = [p for p in ALL if re.search(r'skip_exec: true|"parameters"\n', p.read_text(encoding="utf-8"))]
PRETRAIN = ROOT / "nbs" / "03_pretrain.ipynb"


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_stage_has_one_cell_of_parameters_and_defines_nothing(path):
    "Parameters, calls into the library, pictures, words; nbdev skips it. It stands at the top of nbs/."
    assert path.parent.name == "nbs"
    cells = nbformat.read(path, 4).cells
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1, "papermill would run with the defaults"
    assert all(": " in line.split("=")[0] for line in tagged[0].source.splitlines() if line.strip()), "each has a type"
    assert any(c.cell_type == "raw" and "skip_exec: true" in c.source for c in cells)
    for cell in cells:
        if cell.cell_type == "code":
            assert "#| export" not in cell.source, "stages hold no logic"
            code = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith("%"))
            defined = [n.name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
            assert not defined, f"{', '.join(defined)} belongs in the library"


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_is_clean(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, 4)
    assert "injected-parameters" not in text and '"output_type": "error"' not in text
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text, "a path of this machine"
    assert "widgets" not in notebook.metadata, "states of widgets; tools/notebooks.py drops them"
    first = next(cell for cell in notebook.cells if cell.cell_type == "markdown")
    assert not re.search(r"^- ", first.source, re.M), "nbdev reads such a list below the title as YAML: begin it with *"
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        assert output.get("name") != "stderr", "warnings and progress bars are no documentation"
        data = output.get("data", {})
        assert "image/png" in data or not str(data.get("text/plain", "")).startswith("<Figure size"), "not drawn"
        assert len(data.get("image/png", "")) * 3 // 4 < 200_000, "a picture is over 200 KB"


def test_modules_that_notebooks_write_have_names_of_their_own():
    "nbdev_test runs several notebooks in one process, where a module that was imported stays."
    written = [name for path in ALL for name in re.findall(r'\(folder / \\"(\w+\.py)\\"\)', path.read_text("utf-8"))]
    assert len(set(written)) == len(written), sorted(written)


def test_help_lists_every_parameter():
    done = papermill(str(PRETRAIN), "--help-notebook")
    names = [parameter.name for parameter in notebook_parameters(PRETRAIN)]
    assert {"system", "objective", "encoder", "preset", "seed"} <= set(names)
    assert done.returncode == 0 and all(f"  {name}: " in done.stdout for name in names)
    assert "Unknown" not in done.stdout


@pytest.mark.long  # the workflow runs the same stages
def test_stages_one_after_the_other(tmp_path):
    "Piped, papermill writes to standard output; data are made on the way; the table names what is missing."
    source, runs = PRETRAIN.read_bytes(), tmp_path / "runs"
    common = ("-p", "preset", "smoke", "-p", "run_dir", str(runs))
    own = ("-p", "objective", "mae", "-p", "data_dir", str(tmp_path / "data"))
    done = papermill("nbs/03_pretrain.ipynb", *common, *own, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    outputs = [o for c in nbformat.reads(done.stdout, 4).cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2, "curves and a picture of what is predicted"
    assert (tmp_path / "data" / "shear_flow" / "stats.yaml").is_file()
    assert len(list(runs.rglob("mae-vit-*/seed0/encoder.safetensors"))) == 2, "of its length, and of a quarter of it"
    assert PRETRAIN.read_bytes() == source, "the source notebook stays as it is"
    done = papermill("nbs/04_probe.ipynb", str(tmp_path / "p.ipynb"), *common, *own, "-p", "encoder", "vit", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(runs.rglob("mae-vit-*/seed0/result.json"))) == 1
    asked = ("-p", "only", "mae-vit,random-vit", "-p", "systems", "shear_flow")
    done = papermill("nbs/05_table1.ipynb", str(tmp_path / "t.ipynb"), *common, *asked, cwd=ROOT)
    assert done.returncode != 0 and "shear_flow/statistics" in done.stderr, "names what is missing"


def test_pretrain_refuses_a_parameter_that_it_does_not_have_before_any_work(tmp_path):
    own = ("-p", "objectiv", "mae", "-p", "run_dir", str(tmp_path / "runs"))
    done = papermill("nbs/03_pretrain.ipynb", str(tmp_path / "x.ipynb"), *own, cwd=ROOT)
    assert done.returncode != 0 and "unknown parameter objectiv; this notebook has: system, objective" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_stage_refuses_to_stand_beside_results_of_other_flows(smoke_data, tmp_path):
    folder = tmp_path / "smoke" / "shear_flow" / "mae-vit-00000000" / "seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"rows": [], "data": {"test": "0123456789abcdef"}}')
    (folder / ".unpacked").write_text(hashlib.sha256((folder / "result.json").read_bytes()).hexdigest()[:16])
    given = {"preset": "smoke", "data_dir": smoke_data, "run_dir": tmp_path, "objective": "random", "encoder": "vit"}
    words = [word for name, value in given.items() for word in ("-p", name, str(value))]
    done = papermill("nbs/03_pretrain.ipynb", str(tmp_path / "out.ipynb"), *words, cwd=ROOT)
    assert done.returncode != 0 and "was scored on other flows of 'test'" in done.stderr, done.stderr[-2000:]

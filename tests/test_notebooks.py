"""The notebooks: metadata that papermill and nbdev need, parameters, and the stages through papermill at preset smoke."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = [
    "00g_simulate",
    "00h_leak_free",
    "03_pretrain",
    "04_probe",
    "05_table1",
    "05b_resolution",
    "05c_machines",
    "05d_leakage",
    "08a_tuning",
    "08b_ablations",
    "08c_across_systems",
    "08d_regimes",
]
ALL = sorted((ROOT / "nbs").glob("*.ipynb"))


def papermill(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "papermill", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, timeout=300, **options
    )


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


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    text = path.read_text(encoding="utf-8")
    assert "injected-parameters" not in text and '"output_type": "error"' not in text
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text
    for cell in nbformat.reads(text, 4).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", "warnings and progress bars are no documentation"
            for image in [v for k, v in output.get("data", {}).items() if k == "image/png"]:
                assert len(image) * 3 // 4 < 200_000, "a picture is over 200 KB"


def test_help_lists_every_parameter():
    done = papermill(str(ROOT / "nbs" / "03_pretrain.ipynb"), "--help-notebook")
    for name in "system objective encoder preset seed data_dir run_dir device steps batch_size lr resume tag".split():
        assert f"  {name}: " in done.stdout
    assert "what is predicted" not in done.stderr and "Unknown" not in done.stdout


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
    "`papermill nbs/03_pretrain.ipynb -p objective ... | cat`: the executed notebook on standard output, data made on the way."
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
        (("-p", "objective", "mea"), "unknown objective 'mea'; valid: jepa, mae, supervised, random"),
        (("-p", "steps", "many"), "parameter steps must be int"),
        (("-p", "system", "acoustics"), "unknown system 'acoustics'; valid: "),
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
    "All rows of Table 1 at preset smoke, one seed of one row missing, through the library; then the notebooks."
    from physrep.probing.evaluate import score_baseline, score_run
    from physrep.probing.evaluate import BASELINES, ROWS
    from physrep.training.presets import get_preset
    from physrep.training.pretrain import pretrain
    from physrep.training.run import resolve

    runs, quiet = tmp_path / "runs", dict(progress=False)
    for objective, encoder in ROWS:
        for seed in get_preset("smoke").seeds:
            config = resolve("shear_flow", objective, encoder, "smoke", seed=seed)
            pretrain(config, smoke_data, runs, say=lambda text: None, **quiet)
            if (objective, encoder, seed) != ("supervised", "vit", 1):
                score_run(config, smoke_data, runs, **quiet)
    for name in BASELINES:
        score_baseline(name, config, smoke_data, runs)
    common, one = ("-p", "preset", "smoke", "-p", "run_dir", str(runs)), ("-p", "systems", "shear_flow")
    table = papermill("nbs/05_table1.ipynb", str(tmp_path / "t.ipynb"), *common, *one, cwd=ROOT)
    assert table.returncode != 0 and "no results yet of supervised-vit" in table.stderr
    missing = (
        "-p",
        "objective",
        "supervised",
        "-p",
        "encoder",
        "vit",
        "-p",
        "seeds",
        "0 1",
        "-p",
        "data_dir",
        str(smoke_data),
    )
    probe = papermill("nbs/04_probe.ipynb", str(tmp_path / "p.ipynb"), *common, *missing, cwd=ROOT)
    assert probe.returncode == 0, probe.stderr[-3000:]
    table = papermill("nbs/05_table1.ipynb", str(tmp_path / "t.ipynb"), *common, *one, cwd=ROOT)
    assert table.returncode == 0, table.stderr[-3000:]
    names = ("table1", "table1_shear_flow", "table1_differences", "table1_differences_statistics")
    assert {f.name for f in (runs / "smoke" / "figures").iterdir()} == {
        f"{n}.{e}" for n in names for e in ("png", "svg", "csv", "json")
    }
    # the same runs stand for those on splits without leaks
    leakage = papermill(
        "nbs/05d_leakage.ipynb", str(tmp_path / "l.ipynb"), *common, "-p", "leak_free_dir", str(runs), cwd=ROOT
    )
    assert leakage.returncode == 0, leakage.stderr[-3000:]
    both = pd.read_csv(runs / "smoke" / "figures" / "leakage.csv").pivot(
        index=["objective", "encoder", "probe"], columns="splits", values="value"
    )
    assert len(both) > 15 and (both["published"] == both["leak-free"]).all()


def test_tuning_notebook_runs_a_walk_and_goes_on(smoke_data, tmp_path):
    "Two changes of one walk at preset smoke; the second call finds them in the log."
    common = (
        "-p",
        "preset",
        "smoke",
        "-p",
        "run_dir",
        str(tmp_path / "runs"),
        "-p",
        "data_dir",
        str(smoke_data),
        "-p",
        "rows",
        "mae-vit",
    )
    for changes, word in (("1", "mae-vit  0 base"), ("2", "mae-vit  2 ")):
        out = tmp_path / f"{changes}.ipynb"
        done = papermill("nbs/08a_tuning.ipynb", str(out), *common, "-p", "changes", changes, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        text = "".join(
            o.text for c in nbformat.read(out, 4).cells for o in c.get("outputs", []) if o.output_type == "stream"
        )
        assert word in text
    assert "mae-vit  0 base" not in text, "what is in the log is not run again"
    assert (tmp_path / "runs" / "smoke" / "figures" / "tuning.csv").is_file()

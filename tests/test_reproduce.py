"""The whole smoke preset twice, as `make reproduce` runs it: the same numbers, to the byte."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def snakemake(folder: Path, *targets: str) -> str:
    "Runs the workflow at preset smoke in `folder`; what it said."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command = [
        sys.executable,
        "-m",
        "snakemake",
        *targets,
        "--cores",
        str(cores),
        "--nolock",
        "--quiet",
        "rules",
        "host",
        "--config",
        "preset=smoke",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("PHYSREP_ROOT", None)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def reproduce(folder: Path) -> Path:
    "Runs the workflow at preset smoke in a copy of what it needs; returns the folder of its runs."
    folder.mkdir()
    for name in ("nbs", "Snakefile", "settings.ini"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    snakemake(folder)
    return folder / "runs"


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("reproduce")
    return reproduce(folder / "first"), reproduce(folder / "second")


def test_tables_and_metrics_are_the_same_to_the_byte(twice):
    first, second = ({p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*.csv"))} for root in twice)
    assert {"table1.csv", "table1_differences.csv", "resolution.csv", "across.csv", "regimes.csv"} <= {
        p.name for p in first
    }
    assert sum(p.name == "metrics.csv" for p in first) == 38, (
        "three systems, six rows, two seeds; and one encoder for all systems, two seeds"
    )
    assert first.keys() == second.keys()
    assert [str(p) for p in first if first[p] != second[p]] == []


def test_encoders_and_predictions_are_the_same_to_the_byte(twice):
    for name in ("encoder.safetensors", "predictions.safetensors", "probe-attentive.safetensors"):
        first, second = ({p.relative_to(root): p.read_bytes() for p in sorted(root.rglob(name))} for root in twice)
        assert len(first) >= 36 and first == second, name


def test_figures_are_the_same_to_the_byte(twice):
    first, second = (
        {p.name: p.read_bytes() for p in sorted((root / "smoke" / "figures").glob("*.png"))} for root in twice
    )
    assert len(first) >= 9 and first == second


def test_a_job_that_runs_again_does_not_cost_the_encoder(twice):
    "The stage has changed: Snakemake runs it again, and training finds what it needs. Snakemake deletes declared outputs before a job."
    root = twice[1].parent
    stamp = root / "runs" / "smoke" / "finished" / "shear_flow-mae-vit"
    encoders = {
        p: (p.stat().st_mtime_ns, p.read_bytes())
        for p in stamp.parents[1].glob("shear_flow/mae-vit-*/seed*/encoder.safetensors")
    }
    before, notebook = stamp.stat().st_mtime_ns, root / "nbs" / "03_pretrain.ipynb"
    notebook.write_text(
        notebook.read_text(encoding="utf-8").replace(
            "check_parameters(In)", 'check_parameters(In)\\n",\n    "changed = True'
        ),
        encoding="utf-8",
    )
    snakemake(root, str(stamp))
    assert len(encoders) == 2 and stamp.stat().st_mtime_ns > before, "it ran"
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in encoders} == encoders

"""What several test files need: a row of results, a short training, papermill, and what Snakemake would do."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

from physrep.core.files import project_root

ROOT = project_root()


def readme_lines() -> str:
    "The Python of the README, with fewer flows and seconds in place of minutes."
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    shorter = code.replace('"shear_flow", 100', '"shear_flow", 15').replace("minutes=2", "minutes=0.02")
    assert shorter.count("15)") == shorter.count("0.02") == 1
    return shorter


def row(**changes: object) -> dict:
    "A row of a results table, with some of its values changed."
    base = {
        "system": "shear_flow",
        "objective": "jepa",
        "encoder": "convnext",
        "probe": "linear",
        "split": "test",
        "label": "mean",
        "seed": 0,
        "labelled_flows": 256,
        "draw": 0,
        "metric": "mse",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n": 100,
        "run": "jepa-convnext/seed0",
    }
    return base | changes


def gappy() -> pd.DataFrame:
    "Rows with gaps, as a table has them while runs are missing."
    rows = [
        row(),
        row(label="Reynolds", value=0.3),
        row(probe="attentive", value=0.2, low=math.nan, high=math.nan),
        row(split="valid", value=0.45),
        row(objective="mine", encoder="own", probe="knn", value=2.5, low=1.5, high=3.0),
        row(objective="mae", encoder="vit", labelled_flows=25),
        row(objective="constant", encoder="none", probe="constant", value=1.0, low=0.9, high=1.1),
        row(system="active_matter", value=0.01, low=0.0),
    ]
    return pd.DataFrame(rows)


def papermill(*arguments: str, **options) -> subprocess.CompletedProcess:
    "papermill with these arguments, from no pipe and on one thread."
    command = [sys.executable, "-m", "papermill", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, timeout=300, **options
    )


def copied(folder: Path) -> Path:
    "A folder with a copy of what the workflow needs."
    folder.mkdir()
    for name in ("nbs", "Snakefile", "settings.ini"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    return folder


def started(folder: Path, *options: str, quiet: tuple[str, ...] = ("rules", "host"), **config: str) -> subprocess.Popen:
    "Starts the workflow at preset smoke (or that of `config`) in such a folder."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = [f"{k}={v}" for k, v in {"preset": "smoke", **config}.items()]
    options = (*options, "--cores", str(cores), "--nolock", "--rerun-incomplete", "--rerun-triggers", "mtime")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{ROOT}"}
    environment.pop("PHYSREP_ROOT", None)
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", *options, "--quiet", *quiet, "--config", *given],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def snakemake(folder: Path, *options: str, quiet: tuple[str, ...] = ("rules", "host"), **config: str) -> str:
    "Runs the workflow in such a folder; what it said."
    process = started(folder, *options, quiet=quiet, **config)
    try:
        said, _ = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == 0, said[-5000:]
    return said


def same_files(roots: tuple[Path, Path], pattern: str) -> list[Path]:
    "The files of that name below the second, after checking that they are the same to the byte below the first."
    first, second = ({p.relative_to(root): p.read_bytes() for p in sorted(root.rglob(pattern))} for root in roots)
    assert second.keys() <= first.keys()
    assert [str(p) for p in second if first[p] != second[p]] == []
    return list(second)


def jobs_of(said: str) -> set[str]:
    "The jobs that the workflow lists, without `all`."
    return set(re.findall(r"^(\w+) +\d+$", said, re.M)) - {"all", "total"}


def dry_run(*options: str, **config: str) -> str:
    "What the workflow would do in this folder."
    return snakemake(ROOT, "--dry-run", *options, **config)


def losses_in_training(objective: torch.nn.Module, batches, steps: int = 12) -> list[float]:
    "The loss on the first batch after each of some updates."
    first = next(batches(0))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        objective(next(batches(step)))["loss"].backward()
        optimizer.step()
        objective.after_step(step + 1, steps)
        losses.append(float(objective(first)["loss"].detach()))
    return losses

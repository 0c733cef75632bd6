"""What several test files need: a row of results, a short training, papermill, and what Snakemake would do."""

import math
import os
import subprocess
import sys

import pandas as pd
import torch

from physrep.core.files import project_root

ROOT = project_root()


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


def dry_run(*options: str, preset: str, data: str, **config: str) -> subprocess.CompletedProcess:
    "What `make reproduce PRESET=preset DATA=data` would run; `options` are Snakemake's, `config` is of the Snakefile."
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", "--nolock", *options]
    command += ["--quiet", "host", "--config", f"preset={preset}", f"data={data}"]
    command += [f"{name}={value}" for name, value in config.items()]
    return subprocess.run(command, cwd=project_root(), capture_output=True, text=True, stdin=subprocess.DEVNULL)


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

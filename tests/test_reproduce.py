"""The smoke preset twice, as `make reproduce` runs it: the same to the byte. Few rows; the whole in `make test-all`."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import psutil
import pytest
from helpers import dry_run

from physrep.experiments.table1 import table_rows
from physrep.results.archive import pack, unpack
from physrep.training.presets import get_preset

ROOT = Path(__file__).resolve().parent.parent
# an encoder and an objective of a user's own package
OWN_PACKAGE = """
import torch


class Bands(torch.nn.Module):
    "Mean energy of each field in each frame: a token a frame."

    def forward(self, x):
        return torch.cat([x.mean((3, 4)), x.square().mean((3, 4))], 1).transpose(1, 2)


def make_bands():
    return Bands()


class MeanField(torch.nn.Module):
    "Predicts the mean of each field from the first half of the clip."

    def __init__(self, encoder, *, system, shape, scale=1.0):
        super().__init__()
        self.encoder, self.scale = encoder, scale
        self.head = torch.nn.Linear(encoder.dim, system.n_channels)

    def forward(self, batch):
        x = batch["fields"]
        prediction = self.head(self.encoder(x).mean(1))
        return {"loss": self.scale * (prediction - x.mean((2, 3, 4))).square().mean()}
"""
OWN_ROWS = """
rows:
  - {objective: frozen, encoder: "own_package:make_bands", title: bands}
  - {objective: "own_package:MeanField", encoder: vit, coefficients: {scale: 2.0}, recipe: {lr: 0.002}, color:
  "#E69F00"}
"""


# a preset of a user's own: one seed, and a recipe that was tuned, with a rate that JSON would write 5e-05
FEW_SEEDS = "base: smoke\nseeds: [0]\ntuned: {forecast-vit: {recipe: {lr: 0.00005}}}\n"


def started(folder: Path, *targets: str, quiet: tuple[str, ...] = ("rules", "host"), **config: str) -> subprocess.Popen:
    "Starts the workflow at preset smoke in `folder`."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = [f"{k}={v}" for k, v in {"preset": "smoke", **config}.items()]
    options = ["--cores", str(cores), "--nolock", "--rerun-incomplete", "--quiet", *quiet, "--config", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{ROOT}"}
    environment.pop("PHYSREP_ROOT", None)
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", *targets, *options],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def snakemake(folder: Path, *targets: str, quiet: tuple[str, ...] = ("rules", "host"), **config: str) -> str:
    "Runs the workflow at preset smoke in `folder`; what it said."
    process = started(folder, *targets, quiet=quiet, **config)
    try:
        said, _ = process.communicate(timeout=1200)
    finally:
        process.kill()
    assert process.returncode == 0, said[-5000:]
    return said


def copied(folder: Path) -> Path:
    "A folder with a copy of what the workflow needs, and rows and a preset of a user's own."
    folder.mkdir()
    for name in ("nbs", "Snakefile", "settings.ini"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    (folder / "own_package.py").write_text(OWN_PACKAGE)
    (folder / "rows.yaml").write_text(OWN_ROWS)
    (folder / "few.yaml").write_text(FEW_SEEDS)
    return folder


def reproduce(folder: Path, *targets: str, **config: str) -> Path:
    "Runs the workflow (or these rules of it) at preset smoke in such a folder; the folder of its runs."
    snakemake(copied(folder), *targets, **config)
    return folder / "runs"


def same_files(roots: tuple[Path, Path], pattern: str) -> list[Path]:
    "The files of that name below the second, after checking that they are the same to the byte below the first."
    first, second = ({p.relative_to(root): p.read_bytes() for p in sorted(root.rglob(pattern))} for root in roots)
    assert second.keys() <= first.keys()
    assert [str(p) for p in second if first[p] != second[p]] == []
    return list(second)


FEW = {"preset": "few.yaml", "systems": "shear_flow", "only": "forecast-vit,random-vit", "rows": "rows.yaml"}


@pytest.fixture(scope="module")
def few_rows_twice(tmp_path_factory) -> tuple[Path, Path]:
    "One system and seed, two rows of the table and two of a user's own; the second time up to Table 1."
    folder = tmp_path_factory.mktemp("few")
    return reproduce(folder / "first", **FEW), reproduce(folder / "second", "table1", **FEW)


def test_few_rows_are_the_same_to_the_byte(few_rows_twice):
    tables = {p.name for p in same_files(few_rows_twice, "*.csv")}
    assert {"table1.csv", "table1_shear_flow.csv", "table1_differences.csv", "metrics.csv"} <= tables
    assert len(same_files(few_rows_twice, "encoder.safetensors")) == 3, "all rows but bands, which has no weights"
    for name in ("predictions.safetensors", "probe-attentive.safetensors", "*.png"):
        assert len(same_files(few_rows_twice, name)) >= 4, name


@pytest.mark.long
def test_a_workflow_that_is_killed_is_finished_as_if_nothing_was(few_rows_twice, tmp_path):
    "SIGKILL for the workflow, its stages and their kernels, again and again."
    folder, deaths = copied(tmp_path / "killed"), 0
    for seconds in (10, 15, 20, 30):
        process = started(folder, "table1", **FEW)
        try:
            said, _ = process.communicate(timeout=seconds)
            assert process.returncode == 0, said[-5000:]
            break
        except subprocess.TimeoutExpired:
            for one in (process, *psutil.Process(process.pid).children(recursive=True)):  # it first: it starts no more
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended just now
                    one.kill()
            process.communicate()
            deaths += 1
    assert deaths >= 2
    snakemake(folder, "table1", **FEW)
    assert "table1.csv" in {p.name for p in same_files((few_rows_twice[0], folder / "runs"), "*.csv")}
    for name in ("encoder.safetensors", "predictions.safetensors", "probe-attentive.safetensors"):
        assert len(same_files((few_rows_twice[0], folder / "runs"), name)) >= 3, name


def test_rows_of_ones_own_stand_in_the_table(few_rows_twice):
    table = pd.read_csv(few_rows_twice[0] / "few" / "figures" / "table1.csv")
    own = table[table.split == "test"].groupby(["objective", "encoder"]).probe.agg(set)
    assert own["frozen", "make_bands"] == {"linear", "knn", "kernel", "attentive"}
    assert own["MeanField", "vit"] == {"linear", "knn", "kernel", "attentive"}
    assert {("forecast", "vit"), ("random", "vit"), ("statistics", "none")} <= set(own.index)
    pictures = (few_rows_twice[0] / "few" / "figures" / "table1.svg").read_text()
    assert "#e69f00" in pictures, "the colour that the file asks for"


def test_a_job_that_runs_again_does_not_cost_the_encoder(few_rows_twice):
    """Snakemake deletes declared outputs before a job: the encoder is none of them, and training finds it."""
    root = few_rows_twice[1].parent
    stamp = root / "runs" / "few" / "finished" / "shear_flow-forecast.tuned-vit"
    encoders = {
        p: (p.stat().st_mtime_ns, p.read_bytes())
        for p in stamp.parents[1].glob("shear_flow/forecast.tuned-vit-*/seed*/encoder.safetensors")
    }
    stamp.unlink()
    snakemake(root, str(stamp), **FEW)
    assert len(encoders) == 1 and stamp.is_file(), "it ran"
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in encoders} == encoders


def test_what_a_change_makes_run_again(few_rows_twice):
    "A picture of a stage nothing, a colour of a row the table, fine-tuning of a row its probe, other flows all."
    root = few_rows_twice[0].parent
    pretrain = root / "nbs" / "03_pretrain.ipynb"
    text = pretrain.read_text(encoding="utf-8")
    assert "display(plot_metrics(folders))" in text
    pretrain.write_text(text.replace("display(plot_metrics(folders))", "plot_metrics(folders)"), encoding="utf-8")
    assert "Nothing to be done" in snakemake(root, "--dry-run", **FEW)
    rows = root / "rows.yaml"
    rows.write_text(OWN_ROWS.replace("#E69F00", "#E69F01"))
    said = snakemake(root, "--dry-run", **FEW)
    assert "table1" in said and "probe" not in said
    rows.write_text(OWN_ROWS.replace("recipe:", "finetuned: true, recipe:"))
    said = snakemake(root, "--dry-run", **FEW)
    assert "probe_shear_flow_MeanField_vit" in said and "pretrain" not in said and "forecast" not in said
    rows.write_text(OWN_ROWS)
    pretrain.write_text(text, encoding="utf-8")
    usual, flows = (root / "few.yaml").read_text(), asdict(get_preset("smoke").sim("shear_flow"))
    flows["draws"]["test"] = (6, 2)
    (root / "few.yaml").write_text(usual + json.dumps({"sims": {"shear_flow": flows}})[1:-1] + "\n")
    said = made_by(snakemake(root, "--dry-run", **FEW))
    assert {"simulate_shear_flow", "probe_shear_flow_baselines", "probe_shear_flow_random_vit"} <= said, "other flows"
    (root / "few.yaml").write_text(usual)


def made_by(plan: str) -> set[str]:
    "The jobs of a dry run that simulate, train or probe."
    return {line.split()[0] for line in plan.splitlines() if line.startswith(("pretrain", "probe", "simulate"))}


def test_a_table_is_drawn_from_unpacked_results_and_only_what_is_new_is_trained(few_rows_twice, tmp_path):
    "On a machine with archives, without encoders and data: the figures of before, and jobs for a further seed."
    first, folder = few_rows_twice[0].parent, tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "nbs").symlink_to(first / "nbs")
    for file in (ROOT / "Snakefile", ROOT / "settings.ini", first / "own_package.py"):
        shutil.copy(file, folder)
    place = Path("runs") / "few" / "shear_flow"
    pack(first / place, tmp_path / "archives")
    assert set(unpack(tmp_path / "archives", folder / place).values()) == {"written"}
    table = {"preset": str(first / "few.yaml"), "systems": "shear_flow", "only": "forecast-vit,random-vit"}
    said = snakemake(folder, "--dry-run", seeds="3", **table)
    tuned = ("pretrain_shear_flow_forecast.tuned_vit", "probe_shear_flow_forecast.tuned_vit")
    new = (*tuned, "probe_shear_flow_random_vit")
    assert made_by(said) == {"simulate_shear_flow", *(f"{job}_seed3" for job in new)}
    said = snakemake(folder, "--dry-run", rows=str(first / "rows.yaml"), **table)
    new = ("pretrain_shear_flow_MeanField_vit", "probe_shear_flow_MeanField_vit", "probe_shear_flow_frozen_make_bands")
    assert made_by(said) == {"simulate_shear_flow", *new}
    assert made_by(snakemake(folder, "box", "--dry-run", **table)) == set()
    said = snakemake(folder, "box", "--dry-run", encoders="yes", **table)
    assert made_by(said) == {"simulate_shear_flow", *tuned, "probe_shear_flow_random_vit"}, "a box asks encoders"
    snakemake(folder, **table)
    assert not (folder / "data").exists() and not list((folder / "runs").rglob("encoder.safetensors"))
    for name in ("table1.csv", "data_efficiency.csv", "learning_curves.csv"):
        drawn, before = (pd.read_csv(root / "runs" / "few" / "figures" / name) for root in (folder, first))
        rows = before[before.encoder.isin(["vit", "none"]) & ~before.objective.isin(["frozen", "MeanField"])]
        pd.testing.assert_frame_equal(drawn, rows.reset_index(drop=True))


def test_a_tuned_row_is_compared_with_its_recipe_by_hand_when_that_is_asked_for(few_rows_twice):
    root = few_rows_twice[0].parent
    by_hand = {"pretrain_shear_flow_forecast_vit", "probe_shear_flow_forecast_vit"}
    further = {f"{job}_seed3" for job in (*by_hand, *(job.replace("cast", "cast.tuned") for job in by_hand))}
    said = made_by(snakemake(root, "tuned", "--dry-run", **FEW | {"seeds": "3", "only": "forecast-vit"}))
    assert by_hand | further <= said and "pretrain_shear_flow_forecast.tuned_vit" not in said


def test_a_system_takes_the_recipe_by_hand_where_the_preset_says_so(few_rows_twice):
    "Then the table waits for that one, and `make tuned` for both."
    root = few_rows_twice[1].parent
    usual = (root / "few.yaml").read_text()
    (root / "few.yaml").write_text(usual.replace("}}}", "}, by_hand: [active_matter, shear_flow]}}"))
    by_hand = {"pretrain_shear_flow_forecast_vit", "probe_shear_flow_forecast_vit"}
    assert made_by(snakemake(root, "table1", "--dry-run", **FEW)) == by_hand
    said = made_by(snakemake(root, "tuned", "--dry-run", **FEW | {"seeds": "3", "only": "forecast-vit"}))
    assert {job.replace("cast", f"cast{tag}") + "_seed3" for job in by_hand for tag in ("", ".tuned")} <= said
    (root / "few.yaml").write_text(usual)


def test_a_tag_that_looks_like_a_number_stays_text(few_rows_twice):
    root = few_rows_twice[0].parent
    (root / "two.yaml").write_text('rows: [{objective: jepa, encoder: vit, tag: "2"}]')
    said = snakemake(root, "--dry-run", "--printshellcmds", quiet=("host",), **FEW | {"rows": "two.yaml"})
    assert "-r tag 2" in said


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("reproduce")
    return reproduce(folder / "first"), reproduce(folder / "second")


@pytest.mark.long
def test_tables_and_metrics_are_the_same_to_the_byte(twice):
    tables = same_files(twice, "*.csv")
    wanted = {"table1.csv", "table1_differences.csv", "resolution.csv", "across.csv", "regimes.csv"}
    assert wanted <= {p.name for p in tables}
    metrics = sum(p.name == "metrics.csv" for p in tables)
    rows = [row for row in table_rows(get_preset("smoke"), "shear_flow") if row.kind in ("trained", "random")]
    assert metrics == 3 * 2 * len(rows) + 2, "three systems, two seeds; and one encoder for all systems, two seeds"


@pytest.mark.long
def test_encoders_and_predictions_are_the_same_to_the_byte(twice):
    for name in ("encoder.safetensors", "predictions.safetensors", "probe-attentive.safetensors"):
        assert len(same_files(twice, name)) >= 36, name


@pytest.mark.long
def test_figures_are_the_same_to_the_byte(twice):
    assert len(same_files(twice, "*.png")) >= 9


@pytest.mark.long
def test_the_workflow_of_preset_gpu_can_be_planned():
    "Its tokens are longer than what some cells of `make matters` hide: those cells are left out."
    done = dry_run(preset="gpu", data="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

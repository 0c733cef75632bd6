"""Doors: the command `physrep`, and systems, objectives, encoders, presets and predictions of one's own through it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, copied, jobs_of, snakemake

from physrep.data.scaling import LabelScaler
from physrep.data.write import write_stats, write_well
from physrep.experiments.command import main, notebook_parameters, stage_path
from physrep.physics.systems import Field, Label, System, get_system
from physrep.probing.evaluate import score_run
from physrep.probing.features import probe_splits
from physrep.training.presets import PRESETS
from physrep.training.pretrain import pretrain
from physrep.training.run import resolve

OWN = """
import torch

from physrep.physics.systems import Field, Label, System

WAVES = System(
    name="waves",
    title="Waves",
    fields=(Field("height", 0, "h"), Field("velocity", 1, "u")),
    labels=(Label("speed", log=True, paper_log=True, latex="c"),),
)


def make_bands(system, shape):
    "A token a frame; wants physical fields, does its own preprocessing."

    def bands(x):
        assert x.shape[1:] == (system.n_channels, *shape)
        return torch.cat([x.mean((3, 4)), x.square().mean((3, 4)).add(1e-9).log()], 1).transpose(1, 2).repeat(1, 1, 4)

    bands.normalised = False
    return bands


class MeanField(torch.nn.Module):
    "Predicts the mean of each field."

    def __init__(self, encoder, *, system, shape):
        super().__init__()
        self.encoder, self.head = encoder, torch.nn.Linear(encoder.dim, system.n_channels)

    def forward(self, batch):
        prediction = self.head(self.encoder(batch["fields"]).mean(1))
        return {"loss": (prediction - batch["fields"].mean((2, 3, 4))).square().mean()}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    "A folder with a module of the user's own and data of its system: waves on a grid of 64x48, 3 channels, one label."
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_waves.py").write_text(OWN)
    system = System("waves", "Waves", (Field("height"), Field("velocity", 1)), (Label("speed", True, True),))
    x, y = np.meshgrid(np.arange(64) / 64, np.arange(48) / 64, indexing="ij")
    time = np.arange(24) * 0.1
    for split, n in {"train": 3, "valid": 2, "test": 2}.items():
        for speed in (0.5, 1.0, 2.0):
            rng = np.random.default_rng([int(10 * speed), n])
            phase = rng.uniform(0, 2 * np.pi, (n, 1, 1, 1)) - 2 * np.pi * speed * time[:, None, None]
            height = np.sin(2 * np.pi * x + phase) + 0.1 * rng.normal(size=(n, 1, 64, 48))
            velocity = np.stack([speed * height, 0.1 * np.cos(2 * np.pi * y + phase)], -1)
            path = folder / "data" / "waves" / "data" / split / f"waves_speed_{speed}.hdf5"
            path.parent.mkdir(parents=True, exist_ok=True)
            fields = {"height": height.astype(np.float32), "velocity": velocity.astype(np.float32)}
            write_well(path, system, fields, {"speed": speed}, time=time, box=(1.0, 0.75))
    write_stats(folder / "data" / "waves", system)
    return folder


@pytest.fixture
def importable(own, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(own))
    return own


def physrep(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    "Runs the command in a folder whose modules can be imported."
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{ROOT}", "PHYSREP_ROOT": str(ROOT)}
    command = [sys.executable, "-m", "physrep.experiments.command", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_system_of_ones_own_is_read_at_every_preset(preset, importable, tmp_path):
    small = dict(encoder_config={"dim": 16, "depth": 1, "heads": 2}, steps=1, batch_size=2, recipe={"accumulate": 1})
    small["recipe"]["precision"] = "float32"
    data = importable / "data"
    places = dict(data_dir=data, run_dir=tmp_path)
    run = resolve("own_waves:WAVES", "mae", "vit", preset, **places, **small)
    assert run.clip_shape == (16, 64, 48) and run.crop is None and not run.simulated
    assert resolve(get_system("own_waves:WAVES"), "mae", "vit", preset, **places, **small).hash == run.hash
    pretrain(run, progress=False)
    windows = probe_splits(run)
    assert set(windows) == {"train", "valid", "test"} and windows["train"].shape == (3, 16, 64, 48)
    if preset == "smoke":
        scored = score_run(run, progress=False)
        assert {row["label"] for row in scored.rows} == {"speed", "mean"}
        assert {row["system"] for row in scored.rows} == {"waves"}


def test_what_a_system_of_ones_own_lacks_is_said(importable, tmp_path):
    with pytest.raises(ValueError, match="preset laptop does not simulate waves: pass data_dir"):
        resolve("own_waves:WAVES", "mae", "vit", "laptop")
    with pytest.raises(ValueError, match="system 'own_waves:MeanField' is a type"):
        get_system("own_waves:MeanField")
    labels = np.full((4, 1), 2.0)
    with pytest.raises(ValueError, match="all labels? speed of waves in .*here are equal"):
        LabelScaler.fit(get_system("own_waves:WAVES"), labels, source=tmp_path / "here")


def test_a_preset_and_an_objective_of_ones_own_by_command(own, importable, monkeypatch, capsys):
    (own / "short.yaml").write_text("base: smoke\nseeds: [0]\ntrain:\n  mae: {steps: 2, batch_size: 4, lr: 0.001}\n")
    where = ("--data-dir", "data", "--run-dir", "runs", "--preset", "short.yaml", "--system", "own_waves:WAVES")
    done = physrep(own, "pretrain", "--objective", "own_waves:MeanField", *where)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (folder,) = (own / "runs" / "short" / "waves").glob("MeanField-vit-*-2/seed0")
    assert len(pd.read_csv(folder / "metrics.csv")) == 2
    assert "executed notebook: runs/short/notebooks/pretrain-WAVES-MeanField.ipynb" in done.stdout
    monkeypatch.chdir(own)
    asked = {}
    monkeypatch.setattr("physrep.experiments.command.run_stage", lambda command, values, output: asked.update(values))
    main(["probe", "own_waves:make_bands", *where])
    run = resolve(**asked)
    score_run(run, progress=False)
    reference = ("--reference", str(run.folder))
    assert main(["compare-predictions", "theirs.csv", "--template", *reference]) == 0
    lines = (own / "theirs.csv").read_text().splitlines()
    assert lines[0].startswith("# physrep benchmark ") and "system waves split test" in lines[0]
    filled = [line.replace(",speed,,", ",speed,1.0,") for line in lines]
    (own / "theirs.csv").write_text("\n".join(filled) + "\n")
    capsys.readouterr()
    assert main(["compare-predictions", "theirs.csv", *reference]) == 0
    assert "difference from ours" in capsys.readouterr().out
    (own / "theirs.csv").write_text("\n".join(["# physrep benchmark 0000 system waves split test", *filled[1:]]) + "\n")
    assert main(["compare-predictions", "theirs.csv", *reference]) == 1
    assert "is of data 0000" in capsys.readouterr().err


@pytest.mark.long
def test_a_system_of_ones_own_gets_through_the_workflow(own, tmp_path, monkeypatch):
    folder = copied(tmp_path / "clone")
    (folder / "short.yaml").write_text("base: smoke\nseeds: [0]\n")
    shutil.copy(own / "own_waves.py", folder)
    config = dict(
        preset="short.yaml", systems="own_waves:WAVES", data=str(own / "data"), only="forecast-vit,random-vit"
    )
    snakemake(folder, **config)
    table = pd.read_csv(folder / "runs" / "short" / "selection" / "figures" / "table1.csv")
    rows = {("forecast", "vit"), ("random", "vit"), *((b, "none") for b in ("statistics", "spectra", "constant"))}
    assert set(zip(table.objective, table.encoder)) == rows, "no equations are known"
    assert set(table.system) == {"waves"} and jobs_of(snakemake(folder, "--dry-run", **config)) == set()
    changed = (own / "own_waves.py").read_text().replace('latex="c"', 'latex="v"')
    (folder / "own_waves.py").write_text(changed)
    assert "waves_forecast_vit_pretrain" in snakemake(folder, "--dry-run", **config), "the system is another one"


def test_a_stage_without_a_clone_says_what_it_needs(tmp_path, monkeypatch, capsys):
    "As after `pip install` of the library alone: neither folders nor a variable would help."

    def no_clone():
        raise FileNotFoundError("no checkout of physrep at or above: pass data_dir and run_dir")

    monkeypatch.setattr("physrep.experiments.command.project_root", no_clone)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="03_pretrain is a notebook, and runs in a clone .* there is none at"):
        stage_path("03_pretrain")
    monkeypatch.setattr("physrep.experiments.command.project_root", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="no notebook .*03_pretrain.ipynb: the stage .* runs in a clone"):
        stage_path("03_pretrain")


def test_help_shows_the_parameters_of_the_notebook(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help"])
    text = capsys.readouterr().out
    for parameter in notebook_parameters(stage_path("03_pretrain")):
        assert f"--{parameter.name}" in text, parameter.name
    assert main([]) == 0 and main(["pretain"]) == 2
    assert "unknown command 'pretain'; valid: simulate, pretrain, probe, compare" in capsys.readouterr().err


def test_errors_of_a_stage_are_shown_and_end_with_1_before_any_work(tmp_path, capsys):
    assert main(["pretrain", "--objective", "mea", "--preset", "smoke", "--run-dir", str(tmp_path / "runs")]) == 1
    assert "unknown objective 'mea'; valid: jepa" in capsys.readouterr().err
    assert [folder.name for folder in (tmp_path / "runs" / "smoke").iterdir()] == ["notebooks"]

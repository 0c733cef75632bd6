"""The workflow as `make` runs it: the same to the byte twice, only what is missing, killed and finished."""

import contextlib
import os
import random
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import filelock
import pandas as pd
import psutil
import pytest
from helpers import ROOT, copied, jobs_of, same_files, snakemake, started

from physrep.core.files import open_tensors
from physrep.experiments.plan import plan_jobs, read_experiments
from physrep.probing.features import main_split
from physrep.results.archive import pack, unpack
from physrep.results.rows import make_study
from physrep.training.presets import get_preset, read_preset

# a preset of a user's own with one seed, and rows of which one has a rate that JSON would write 5e-05
FEW_SEEDS = "base: smoke\nseeds: [0]\n"
FEW = {"preset": "few.yaml", "systems": "shear_flow", "only": "random-vit", "rows": "rows.yaml", "target": "05_table1"}
OWN_ROWS = """
rows:
  - {objective: frozen, encoder: "own_package:make_bands", title: bands}
  - {objective: "own_package:MeanField", encoder: vit, coefficients: {scale: 2.0}, recipe: {lr: 0.00005}, color: red}
"""
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


def own_folder(folder: Path) -> Path:
    "What the workflow needs, and rows, a package and a preset of a user's own."
    copied(folder)
    for name, text in {"own_package.py": OWN_PACKAGE, "rows.yaml": OWN_ROWS, "few.yaml": FEW_SEEDS}.items():
        (folder / name).write_text(text)
    return folder


def with_make(folder: Path) -> Path:
    "A clone, with an environment in which another clone is installed."
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "tools").mkdir()
    tools = ("tools/weights.py", "tools/workflow.py", "tools/compare_figures.py")
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt", *tools):
        shutil.copy(ROOT / name, folder / name)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (folder / ".venv" / ".ready").touch()
    return folder


def without_make() -> dict[str, str]:
    "The environment without what a make that runs these tests has put there."
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "VENV", "PRESET")}


def planned(folder: Path, monkeypatch, target: str, preset: str, **asked: str) -> set[str]:
    "The jobs that the workflow in such a folder would do, without a process of its own."
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return {job.name for job in plan_jobs(make_study(preset, **asked), target)}


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    "The runs of one system and seed, a row of the table and two of a user's own."
    folder = own_folder(tmp_path_factory.mktemp("few") / "first")
    snakemake(folder, **FEW)
    return folder / "runs"


@pytest.mark.long
def test_few_rows_are_the_same_to_the_byte(once, tmp_path):
    snakemake(own_folder(tmp_path / "second"), **FEW)
    twice = once, tmp_path / "second" / "runs"
    assert {"table1.csv", "over_random.csv", "metrics.csv"} <= {p.name for p in same_files(twice, "*.csv")}
    assert len(same_files(twice, "encoder.safetensors")) == 3, "of two rows, one on its way; bands has none"
    for name in ("predictions.safetensors", "probe-attentive.safetensors", "*.png"):
        assert len(same_files(twice, name)) >= 3, name


def test_rows_of_ones_own_stand_in_the_table(once):
    table = pd.read_csv(once / "few" / "selection" / "figures" / "table1.csv")
    probes = table[table.split == main_split(set(table.split))].groupby(["objective", "encoder"]).probe.agg(set)
    assert probes["frozen", "make_bands"] == probes["MeanField", "vit"] == {"linear", "knn", "kernel", "attentive"}
    assert {("random", "vit"), ("statistics", "none")} <= set(probes.index)
    picture = (once / "few" / "selection" / "figures" / "table1.svg").read_text()
    assert "#ff0000" in picture, "the colour that the file asks for"


def test_only_what_is_missing_is_made(once, monkeypatch):
    "Nothing the second time; a further seed its own jobs; another recipe its row."
    root = once.parent
    assert jobs_of(snakemake(root, "--dry-run", **FEW)) == set()
    more = planned(root, monkeypatch, seeds="3", **FEW) - {FEW["target"]}
    assert {"shear_flow-MeanField-vit-seed3-pretrain", "shear_flow-random-vit-seed3-probe"} <= more
    assert all("seed3" in job for job in more)
    rows = root / "rows.yaml"
    rows.write_text(OWN_ROWS.replace("0.00005", "0.00006"))
    jobs = {"shear_flow-MeanField-vit-pretrain", "shear_flow-MeanField-vit-probe", FEW["target"]}
    assert planned(root, monkeypatch, **FEW) == jobs
    rows.write_text(OWN_ROWS)
    executed = once / "few" / "selection" / "notebooks" / f"{FEW['target']}.ipynb"
    whole = executed.read_text()
    executed.write_text(whole[: len(whole) // 2])  # papermill was killed while it wrote
    assert planned(root, monkeypatch, **FEW) == {FEW["target"]}
    executed.write_text(whole)


def test_a_job_of_a_cluster_is_found_in_the_plan_of_its_call_though_all_is_done_meanwhile(once):
    job = ("--target-jobs", "print_shear_flow:", "--allowed-rules", "print_shear_flow", "--force")
    assert "summary statistics" in snakemake(once.parent, *job, "--mode", "subprocess", quiet=("host",), **FEW)


def test_a_table_is_drawn_from_unpacked_results_and_only_what_is_new_is_trained(once, tmp_path, monkeypatch):
    "On a machine with archives, without encoders and data: the figures of before."
    first, folder = once.parent, own_folder(tmp_path / "elsewhere")
    place, preset = Path("runs") / "few" / "shear_flow", read_preset(first / "few.yaml")
    pack(first / place, tmp_path / "archives", preset)
    assert set(unpack(tmp_path / "archives", folder / place, preset).values()) == {"written"}
    jobs = planned(folder, monkeypatch, seeds="3", **FEW) - {FEW["target"], "shear_flow-simulate"}
    assert "shear_flow-MeanField-vit-seed3-pretrain" in jobs and all("seed3" in job for job in jobs)
    jobs = planned(folder, monkeypatch, **FEW | {"target": "12_other_flows"})
    assert "shear_flow-simulate" in jobs, "encoders are asked for by the parts of the experiment"
    snakemake(folder, **FEW)
    assert not (folder / "data").exists() and not list((folder / "runs").rglob("encoder.safetensors"))
    for name in ("table1.csv", "over_random.csv"):
        drawn, before = (
            pd.read_csv(root / "runs" / "few" / "selection" / "figures" / name) for root in (folder, first)
        )
        pd.testing.assert_frame_equal(drawn, before)


def test_commands_take_text_that_looks_like_a_number_and_folders_with_spaces(tmp_path):
    folder = copied(tmp_path / "my folder")
    (folder / "two.yaml").write_text('rows: [{objective: jepa, encoder: vit, tag: "2"}]')
    said = snakemake(folder, "--dry-run", "--printshellcmds", quiet=("host",), systems="shear_flow", rows="two.yaml")
    assert "-r tag 2" in said and '-p workers "$SIMULATING"' in said
    assert f"-r figure_dir '{folder}/runs/smoke/selection/figures'" in said, "of two.yaml and one system"
    command = next(line for line in said.splitlines() if "03_pretrain.ipynb" in line)
    words = subprocess.run(["bash", "-c", f"set -- {command.partition('papermill ')[2].partition(' <')[0]}; echo $1"],
                           capture_output=True, text=True).stdout  # fmt: skip
    assert words.strip() == str(folder / "nbs" / "03_pretrain.ipynb")


def test_every_target_of_every_preset_can_be_planned(tmp_path, monkeypatch):
    monkeypatch.setattr("physrep.training.cost._count", lambda run, size: (1, 1.0))  # takes minutes
    monkeypatch.setattr("physrep.training.cost._COUNTED", {})
    every = ("simulate", "reproduce", "study", *read_experiments())
    for preset, targets in {"smoke": every, "laptop": every[:2], "gpu": every[:2]}.items():
        study = make_study(preset, data_dir=tmp_path, run_dir=tmp_path)
        for target in targets:
            names = [job.name for job in plan_jobs(study, target)]
            assert names and len(names) == len(set(names)), f"{target} at {preset}"
    with pytest.raises(ValueError, match="unknown target 'tabel'; valid: simulate, reproduce, study, 05_table1"):
        plan_jobs(study, "tabel")
    waits = {job.name: job.after for job in plan_jobs(replace(study, preset=get_preset("smoke")), "reproduce")}
    assert "shear_flow-mae-vit-pretrain" in waits["shear_flow-mae-vit-probe"]
    assert waits["shear_flow-mae-vit-pretrain"] == ("shear_flow-simulate",)
    simulated = {f"{system}-simulate" for system in study.systems}
    assert set(waits) - simulated - {"05_table1"} <= {*waits["05_table1"], "06_few_labels"}


def alive(folder: Path) -> list[psutil.Process]:
    "The processes that the workflow of a folder has started."
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended just now, or is another user's
            if str(folder) in process.environ().get("PYTHONPATH", "").split(":"):
                found.append(process)
    return found


@pytest.mark.long
def test_make_that_is_killed_at_20_random_moments_is_finished_as_if_nothing_was(once, tmp_path):
    "SIGKILL for all that `make reproduce` has started: no process, file or half of one is left, results are the same."
    folder, moments, deaths = with_make(own_folder(tmp_path / "killed")), random.Random("moments"), 0
    rows = ["PRESET=few.yaml", "SYSTEM=shear_flow", "ONLY=random-vit", "ROWS=rows.yaml"]
    command, own = ["make", "reproduce", "VENV=.venv", *rows], without_make() | {"PYTHONPATH": str(ROOT)}
    about = dict(cwd=folder, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(20):
        process = subprocess.Popen(command, **about, start_new_session=True)
        try:
            said, _ = process.communicate(timeout=moments.uniform(2, 9))
            assert process.returncode == 0, said[-5000:]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            deaths += 1
        for _ in range(100):  # kernels see once a second that they are alone
            if not alive(folder):
                break
            time.sleep(0.1)
        assert not alive(folder)
        for leftover in folder.rglob(".*.tmp"):
            os.utime(leftover, (0, 0))  # as if the next call came an hour later
        for file in folder.glob("runs/**/*.safetensors"):
            open_tensors(file)
    assert deaths > 5
    done = subprocess.run(command, **about)
    assert done.returncode == 0, done.stdout[-5000:]
    assert not [p for place in ("data", "runs") for p in (folder / place).rglob(".*.tmp")]
    for name in ("encoder.safetensors", "predictions.safetensors", "probe-attentive.safetensors", "table1.csv"):
        assert same_files((once, folder / "runs"), name), name


@pytest.mark.long
def test_a_workflow_on_a_disk_that_is_full_says_so_and_goes_on_when_there_is_room(once, disk):
    def grow(share: float) -> None:
        size = sum(-(-p.stat().st_size // 4096) * 4 for p in once.parent.rglob("*") if p.is_file())
        subprocess.run(["mount", "-o", f"remount,size={10_000 + int(share * (size - 10_000))}k", disk], check=True)

    grow(0)
    folder, failed = own_folder(disk / "few"), 0
    for share in (0.02, 0.4, 0.7, 0.8, 0.85, 0.9, 0.95):  # of all that is written, that there is room for
        grow(share)
        process = started(folder, **FEW)
        said, _ = process.communicate(timeout=600)
        assert not process.returncode or "No space left on device" in said, said[-5000:]
        assert not list(folder.rglob("runs/**/.*.tmp"))
        failed += process.returncode != 0
    assert failed > 4
    grow(3)
    snakemake(folder, **FEW)
    for name in ("encoder.safetensors", "predictions.safetensors", "probe-attentive.safetensors", "table1.csv"):
        assert same_files((once, folder / "runs"), name), name


@pytest.mark.long
def test_the_whole_smoke_preset_is_reproduced(tmp_path):
    snakemake(copied(tmp_path / "whole"))
    table = pd.read_csv(tmp_path / "whole" / "runs" / "smoke" / "figures" / "table1.csv")
    study = make_study("smoke")
    assert set(table.system) == set(study.systems)
    assert {row.key for row in study.rows} == set(zip(table.objective, table.encoder))


CODE = """
import sys
from pathlib import Path
from workflow import main
sys.exit(main("few", "--version", root=Path(sys.argv[1])))
"""
HOLD = "import sys, time, filelock; filelock.FileLock(sys.argv[1]).acquire(); print('held', flush=True); time.sleep(60)"


def start(root: Path, stdin: int | None = None) -> subprocess.Popen:
    "A workflow of preset `few` that prints the version of snakemake, on runs below `root`."
    command, pipe = [sys.executable, "-c", CODE, str(root)], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT / "tools", stdin=stdin, stdout=pipe, stderr=pipe, text=True)


def test_a_second_workflow_waits_for_the_first(tmp_path):
    lock = filelock.FileLock(tmp_path / "runs" / "few" / ".workflow.lock")
    Path(lock.lock_file).parent.mkdir(parents=True)
    with lock:
        second = start(tmp_path)
        assert second.stdout.readline() == "== another make works on runs/few; waiting until it is done\n"
        time.sleep(1)
        assert second.poll() is None
    assert second.communicate(timeout=60)[0].count(".") == 2 and second.returncode == 0


def test_a_killed_workflow_keeps_nobody_waiting(tmp_path):
    (tmp_path / "runs" / "few").mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "runs" / "few" / ".workflow.lock")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert "waiting" not in start(tmp_path).communicate(timeout=60)[0]


def test_snakemake_keeps_the_lock_when_what_started_it_is_killed(tmp_path):
    (tmp_path / "snakemake.py").write_text("import sys; print('begun', flush=True); sys.stdin.read()")
    first = start(tmp_path, stdin=subprocess.PIPE)
    assert first.stdout.readline() == "begun\n"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    lock = filelock.FileLock(tmp_path / "runs" / "few" / ".workflow.lock")
    with pytest.raises(filelock.Timeout):
        lock.acquire(timeout=0)
    first.stdin.close()  # now it ends
    lock.acquire(timeout=30)


@pytest.fixture
def clone(tmp_path) -> Path:
    return with_make(tmp_path / "clone")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=folder, env=without_make(), capture_output=True, text=True)


def test_a_clone_runs_its_own_code_and_writes_its_own_weights(clone):
    assert runpy.run_path(str(clone / "tools" / "weights.py"))["WEIGHTS"] == clone / "physrep" / "weights"
    (clone / "physrep").mkdir()
    (clone / "physrep" / "__init__.py").touch()
    (clone / "tools" / "weights.py").write_text("import physrep; print(physrep.__file__)")
    assert make(clone, "weights").stdout.strip() == str(clone / "physrep" / "__init__.py")


def test_figures_of_a_selection_are_not_copied_over_the_committed_ones(clone):
    for place in ("runs/laptop/figures", "runs/laptop/selection/figures"):
        (clone / place).mkdir(parents=True)
        (clone / place / "table1.png").write_text(place)
    for selection in ("SYSTEM=shear_flow", "ONLY=mae-vit", "ROWS=rows.yaml"):
        done = make(clone, "figures", selection)
        assert done.returncode and "stay in runs/laptop/selection/figures/" in done.stdout
    assert not (clone / "figures").exists()
    assert make(clone, "figures").returncode == 0
    assert (clone / "figures" / "table1.png").read_text() == "runs/laptop/figures"


def test_a_preset_whose_name_has_a_space_is_refused_at_once(clone):
    done = make(clone, "reproduce", "PRESET=my preset.yaml")
    assert done.returncode and 'PRESET="my preset.yaml" has a space' in done.stderr and not (clone / "runs").exists()

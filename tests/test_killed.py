"""Stages that are killed, find no room, or run twice at once: a rerun is as if nothing had been.

A stage runs in a fork of this process. A hook kills it (SIGKILL) when it opens a file for writing, renames or deletes
one for the k-th time: every state that it leaves on the disk is between two of these moments."""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from safetensors import safe_open

from physrep.core.files import read_json
from physrep.probing.evaluate import score_run
from physrep.results.figures import save_figure
from physrep.training.presets import get_preset
from physrep.training.pretrain import pretrain
from physrep.training.run import Run, ensure_data, resolve

if not hasattr(os, "fork"):
    pytest.skip("there is no fork on this system", allow_module_level=True)


def train(run: Run, **options: object) -> None:
    pretrain(run, progress=False, **{"say": lambda text: None, **options})


def draw(run: Run) -> None:
    fig = Figure(figsize=(1, 1))
    fig.subplots().plot([0, 1])
    save_figure(fig, run.folder, "line", pd.DataFrame({"x": [0, 1]}), {})


STAGES: dict[str, Callable[[Run], object]] = {
    "simulate": lambda run: ensure_data(run, workers=1, progress=False),
    "pretrain": train,
    "probe": lambda run: score_run(run, probes=("linear", "knn"), progress=False),
    "figure": draw,
}


def forked(action: Callable[[], object], watched: Path, kill_at: int = 0, seconds: float = 0.0) -> tuple[int, int]:
    """Runs `action` in a fork of this process, which kills itself at the k-th event below `watched` (0: never), or is
    killed after some seconds. Returns its wait status and the number of events, counted in a file beside `watched`."""
    counter = watched.with_suffix(".events")
    pid = os.fork()
    if pid:
        if seconds:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        return status, int(counter.read_text()) if counter.is_file() else 0
    code, count = 1, 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and str(arguments[0]).startswith(f"{watched}/"):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        torch.set_num_threads(1)
        sys.addaudithook(hook)
        action()
        counter.write_text(str(count))
        code = 0
    finally:
        os._exit(code)


def contents(folder: Path) -> dict[str, object]:
    "What a folder holds: bytes of files by name, JSON without times. Locks and leftovers of the killed are no result."
    found: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if path.suffix == ".safetensors":  # what has its final name can be read to its end
            with safe_open(path, "pt") as f:
                assert all(f.get_tensor(k) is not None for k in f.keys())
        name = str(path.relative_to(folder))
        found[name] = path.read_bytes()
        if path.suffix == ".json":
            found[name] = {
                k: v for k, v in json.loads(path.read_text()).items() if k not in ("seconds", "commit", "dirty")
            }
    return found


def in_folder(run: Run, root: Path) -> Run:
    return replace(run, data_dir=root / "data", run_dir=root / "runs")


@pytest.fixture(scope="module")
def run() -> Run:
    "A run of a second that branches twice."
    smoke = get_preset("smoke")
    draws = dict(draws={"train": (4, 1), "valid": (2, 1), "test": (2, 1)}, families={})
    sim = replace(smoke.sim("shear_flow"), grid=16, store_grid=8, n_frames=8, dt=0.05, **draws)
    tiny = replace(smoke, name="tiny", sims={"shear_flow": sim}, frames=4, probe_stride=4)
    options = dict(recipe={"checkpoint_seconds": 0.0, "evaluations": 2}, steps=16, batch_size=2)
    options |= dict(coefficients={"decoder_width": 8, "patch": (2, 4, 4)})
    options |= dict(encoder_config={"dim": 8, "depth": 1, "tubelet": (2, 4, 4)})
    return resolve("shear_flow", "mae", "vit", tiny, **options)


@pytest.fixture(scope="module")
def before(run, tmp_path_factory) -> dict[str, Path]:
    "Stage -> a folder as it is before the stage, undisturbed; `done`: after all of them."
    root = tmp_path_factory.mktemp("undisturbed")
    found = {"done": root / "work"}
    found["done"].mkdir()
    for name, stage in STAGES.items():
        found[name] = shutil.copytree(found["done"], root / name)
        stage(in_folder(run, found["done"]))
    return found


def after(before: dict[str, Path], name: str) -> dict[str, object]:
    "The contents of the undisturbed folder after a stage."
    names = [*STAGES, "done"]
    return contents(before[names[names.index(name) + 1]])


def kill_and_finish(name: str, run: Run, before: dict[str, Path], folder: Path, points: int) -> None:
    "Kills a stage at random points of its work, each in a fresh folder, and finishes it."
    stage, expected = STAGES[name], after(before, name)
    whole = shutil.copytree(before[name], folder / "whole")
    status, total = forked(lambda: stage(in_folder(run, whole)), whole)
    assert status == 0 and total > 0 and contents(whole) == expected, "a fork does the same"
    for moment in random.Random(name).sample(range(1, total + 1), min(points, total)):
        work = shutil.copytree(before[name], folder / f"killed{moment}")
        status, _ = forked(lambda: stage(in_folder(run, work)), work, moment)  # noqa: B023
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"killed at {moment} of {total}"
        contents(work)
        stage(in_folder(run, work))
        assert contents(work) == expected, f"killed at event {moment} of {total}"


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_is_finished_as_if_nothing_was(name, run, before, tmp_path):
    kill_and_finish(name, run, before, tmp_path, points=3)


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_killed_anywhere_is_finished_as_if_nothing_was(name, run, before, tmp_path):
    kill_and_finish(name, run, before, tmp_path, points=25)


@pytest.mark.long
def test_a_training_that_is_killed_at_20_random_moments_is_one_that_was_left_alone(run, before, tmp_path):
    run, moments, begun = run.at(400), random.Random("moments"), time.monotonic()
    alone, work = (shutil.copytree(before["pretrain"], tmp_path / name) for name in ("alone", "killed"))
    assert forked(lambda: train(in_folder(run, alone)), alone)[0] == 0
    longest = (time.monotonic() - begun) / 12
    for _ in range(20):
        status, _ = forked(lambda: train(in_folder(run, work)), work, seconds=moments.uniform(0, longest))
        assert os.WIFSIGNALED(status)
        contents(work)
    assert list(work.rglob("last.safetensors")), "it had come some way"
    train(in_folder(run, work))
    assert contents(work) == contents(alone) and not list(work.rglob(".*.tmp"))


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])  # of what the stage writes, that there is room for
def test_a_stage_on_a_disk_that_is_full_names_the_file_and_goes_on_when_there_is_room(share, name, run, before, disk):
    def size(folder: Path) -> int:
        return sum(-(-p.stat().st_size // 4096) * 4096 for p in folder.rglob("*") if p.is_file())

    names, work, told = [*STAGES, "done"], shutil.copytree(before[name], disk / "work"), disk.parent / "told"
    needed = size(before[names[names.index(name) + 1]]) - size(before[name])
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - int(share * needed)))

    def fails() -> None:
        with pytest.raises(OSError, match=str(disk)) as caught:
            STAGES[name](in_folder(run, work))
        told.write_text(f"{caught.value.errno}")

    # a fork: HDF5 cannot close a file without room, and a process with such a file ends badly
    assert forked(fails, disk.parent / "unwatched")[0] == 0 and int(told.read_text()) == errno.ENOSPC
    contents(work)
    assert not list(work.rglob(".*.tmp"))
    (disk / "ballast").unlink()
    STAGES[name](in_folder(run, work))
    assert contents(work) == after(before, name)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("writes", [0, 2])
def test_a_full_disk_is_said_and_leaves_nothing_half(writes, name, run, before, tmp_path, monkeypatch):
    work, original, calls = shutil.copytree(before[name], tmp_path / "work"), os.fsync, [0]

    def full(fd: int) -> None:
        calls[0] += 1
        if calls[0] > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            STAGES[name](in_folder(run, work))
    contents(work)
    assert not list(work.rglob("*.tmp"))
    STAGES[name](in_folder(run, work))
    assert contents(work) == after(before, name)


def test_of_two_trainings_at_once_one_waits_and_finds_the_other_finished(run, before, tmp_path):
    root, children = shutil.copytree(before["pretrain"], tmp_path / "work"), []
    work = in_folder(run, root)
    for k in range(2):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                torch.set_num_threads(1)
                trained: list = []
                said: list = []
                train(work, on_metrics=trained.append, say=said.append)
                (tmp_path / f"{k}.json").write_text(json.dumps({"trained": len(trained), "said": said}))
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    first, second = sorted((read_json(tmp_path / f"{k}.json") for k in range(2)), key=lambda told: told["trained"])
    assert second["trained"] and not first["trained"] and [t.endswith("is finished") for t in first["said"]] == [True]
    assert contents(root) == after(before, "pretrain")

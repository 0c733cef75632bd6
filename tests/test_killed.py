"""Stages that are killed, find no room or no permission, or run twice at once: a rerun is as if nothing had been.

A stage runs in a fork of this process. A hook kills it (SIGKILL) when it opens a file for writing, renames or deletes
one for the k-th time: every state that it leaves on the disk is between two of these moments."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
import torch
from broken import tiny_preset
from safetensors import safe_open

from physrep.core.files import read_json
from physrep.data.generate import make_dataset
from physrep.models.pretrained import load_encoder
from physrep.probing.evaluate import score_run
from physrep.probing.features import features_of, probe_splits
from physrep.results.figures import save_figure
from physrep.training.presets import get_preset
from physrep.training.pretrain import pretrain
from physrep.training.run import Run, label_scaler, resolve

if not hasattr(os, "fork"):
    pytest.skip("there is no fork on this system", allow_module_level=True)
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")
TIMES = {"seconds"}  # what differs between two runs by right


def quiet(_: object) -> None:
    "Says nothing."


def run_in(folder: Path) -> Run:
    places = dict(data_dir=folder / "data", run_dir=folder / "runs")
    often = {"checkpoint_seconds": 0}
    return resolve("shear_flow", "mae", "vit", tiny_preset(folder), recipe=often, **places)


def simulate(folder: Path) -> None:
    sim = get_preset(tiny_preset(folder)).sim("shear_flow")
    make_dataset("shear_flow", sim, folder / "data", workers=1, progress=False)


def train(folder: Path, **options: object) -> None:
    run = run_in(folder)
    options = dict(progress=False, say=quiet) | options
    pretrain(run, **options)


def extract(folder: Path) -> None:
    run = run_in(folder)
    windows = probe_splits(run)
    options = dict(cache=run.folder / "features", progress=False)
    for part in windows.values():
        features_of(load_encoder(run.folder), part, label_scaler(run, windows["train"]), **options)


def probe(folder: Path) -> None:
    score_run(run_in(folder), probes=("linear", "knn"), progress=False)


def figure(folder: Path) -> None:
    import pandas as pd
    from matplotlib.figure import Figure

    fig = Figure(figsize=(1, 1))
    fig.subplots().plot([0, 1])
    save_figure(fig, folder / "figures", "line", pd.DataFrame({"x": [0, 1]}), {"code": "0"})


STAGES: dict[str, Callable[[Path], None]] = {
    "simulate": simulate,
    "pretrain": train,
    "extract": extract,
    "probe": probe,
    "figure": figure,
}


def forked(
    action: Callable[[], object], watched: Path | None = None, kill_at: int = 0, largest: int = 0
) -> tuple[int, int]:
    """Runs `action` in a fork of this process, which kills itself at the k-th event below `watched` (0: never), or is
    killed by the system in the middle of a write that would make a file longer than `largest` bytes (0: never).

    Returns its wait status and the number of events, counted in a file beside `watched`."""
    counter = (watched or Path(tempfile.gettempdir())).with_suffix(".events")
    pid = os.fork()
    if pid:
        status = os.waitpid(pid, 0)[1]
        return status, int(counter.read_text()) if counter.is_file() else 0
    code = 1
    try:
        torch.set_num_threads(1)
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal count
            if event not in EVENTS or watched is None:
                return
            writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
            if writes and str(arguments[0]).startswith(f"{watched}/"):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        if largest:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        action()
        watched_before, watched = watched, None  # not its own file
        if watched_before:
            counter.write_text(str(count))
        code = 0
    except BaseException as error:  # the parent sees the code
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def without_times(value: object) -> object:
    "JSON without what is a time."
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, object]:
    "What a folder holds: bytes of files by name, JSON without times. Locks and leftovers of the killed are no result."
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix in (".tmp", ".lock") or path.name in (".lock", "tiny.yaml") or path.name.startswith(".tmp"):
            continue  # safetensors calls its unfinished files .tmp and six letters
        text = json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()
        found[str(path.relative_to(folder))] = without_times(text)
    return found


def check_whole(folder: Path) -> None:
    "Every file that has its final name can be read to its end."
    for path in (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:
                assert all(f.get_tensor(k) is not None for k in f.keys())
        elif path.suffix == ".hdf5":
            with h5py.File(path) as f:
                f.visititems(lambda _, item: item[()] if isinstance(item, h5py.Dataset) else None)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            assert path.read_text().endswith("\n")


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> dict[str, Path]:
    "Stage -> a folder as it is before the stage, undisturbed; `done`: after all of them."
    root, found = tmp_path_factory.mktemp("undisturbed"), {}
    folder = root / "work"
    folder.mkdir()
    for name, stage in STAGES.items():
        found[name] = shutil.copytree(folder, root / name)
        stage(folder)
    return found | {"done": folder}


def after(before: dict[str, Path], name: str) -> Path:
    "The undisturbed folder after a stage."
    names = [*STAGES, "done"]
    return before[names[names.index(name) + 1]]


def kill_and_finish(name: str, before: dict[str, Path], folder: Path, points: int) -> None:
    "Kills a stage at random points of its work, each in a fresh folder, and finishes it."
    expected = contents(after(before, name))
    whole = shutil.copytree(before[name], folder / "whole")
    status, total = forked(lambda: STAGES[name](whole), whole)
    assert status == 0 and total > 0 and contents(whole) == expected, "a fork does the same"
    moments = random.Random(name).sample(range(1, total + 1), min(points, total))
    for moment in moments:
        work = shutil.copytree(before[name], folder / f"killed{moment}")
        status, _ = forked(lambda: STAGES[name](work), work, moment)  # noqa: B023
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"killed at {moment} of {total}"
        check_whole(work)
        STAGES[name](work)
        found = contents(work)
        different = [path for path in expected.keys() | found.keys() if found.get(path) != expected.get(path)]
        assert different == [], f"killed at event {moment} of {total}"


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_is_finished_as_if_nothing_was(name, before, tmp_path):
    kill_and_finish(name, before, tmp_path, points=2)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_killed_in_the_middle_of_a_write_is_finished_as_if_nothing_was(name, before, tmp_path):
    expected = contents(after(before, name))
    sizes = sorted(len(v) for k, v in expected.items() if isinstance(v, bytes) and k not in contents(before[name]))
    for largest in (sizes[0] // 2, sizes[-1] - 1):  # in the smallest file that it writes, and in the largest
        work = shutil.copytree(before[name], tmp_path / str(largest))
        status, _ = forked(lambda: STAGES[name](work), work, largest=largest)  # noqa: B023
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ
        check_whole(work)
        STAGES[name](work)
        assert contents(work) == expected


@pytest.mark.parametrize("years", [-40, 40])
def test_a_clock_that_jumped_makes_nothing_again(years, before, tmp_path):
    folder = shutil.copytree(before["done"], tmp_path / "work")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for number, path in enumerate(files):  # some before and some after the files that they were made of
        moment = path.stat().st_mtime + (years * 365 * 86400 if number % 2 else 0)
        os.utime(path, (moment, moment))
    times = {path: path.stat().st_mtime_ns for path in files if path.name in ("encoder.safetensors", "stats.yaml")}
    for stage in STAGES.values():
        stage(folder)
    assert contents(folder) == contents(before["done"])
    assert {path: path.stat().st_mtime_ns for path in times} == times and len(times) == 2, "neither is made again"


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_is_killed_anywhere_is_finished_as_if_nothing_was(name, before, tmp_path):
    kill_and_finish(name, before, tmp_path, points=25)


@pytest.mark.long
@pytest.mark.parametrize("name", ["pretrain", "probe"])
def test_a_stage_that_is_killed_again_and_again_gets_to_its_end(name, before, tmp_path):
    work = shutil.copytree(before[name], tmp_path / "work")
    deaths = 0
    for moment in range(3, 200, 7):
        status, _ = forked(lambda: STAGES[name](work), work, moment)  # noqa: B023
        if not os.WIFSIGNALED(status):
            break
        deaths += 1
    assert status == 0 and deaths >= 2
    assert contents(work) == contents(after(before, name))


# --- no room


def full(after_writes: int) -> Callable[[int], None]:
    "An `os.fsync` that says after so many calls that the disk is full."
    original, calls = os.fsync, [0]

    def fsync(fd: int) -> None:
        calls[0] += 1
        if calls[0] > after_writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(fd)

    return fsync


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("writes", [0, 2])
def test_a_full_disk_is_said_and_leaves_nothing_half(name, writes, before, tmp_path, monkeypatch):
    work = shutil.copytree(before[name], tmp_path / "work")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full(writes))
        with pytest.raises(OSError, match="No space left"):
            STAGES[name](work)
    check_whole(work)
    assert not list(work.rglob("*.tmp"))
    STAGES[name](work)
    assert contents(work) == contents(after(before, name))


@pytest.mark.long
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("room", [16, 40])  # KiB beyond what is there already
def test_a_small_disk_is_said_and_leaves_nothing_half(name, room, before, tmp_path, capfd):
    """The same with a real file system of that size, in a process of its own: HDF5 cannot close a file that it could
    not write, and may end a process by it."""
    used = sum(-(-p.stat().st_size // 4096) * 4 for p in before[name].rglob("*") if p.is_file())
    used += 4 * sum(1 for p in before[name].rglob("*") if p.is_dir())
    disk = tmp_path / "disk"
    disk.mkdir()
    size = f"size={used + room}k"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted, which only root on Linux may: {done.stderr.strip()}")
    try:
        work = shutil.copytree(before[name], disk / "work")
        status, _ = forked(lambda: STAGES[name](work))
        said = capfd.readouterr().err
        assert status == 0 or "No space left" in said or "errno = 28" in said, said
        check_whole(work)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        STAGES[name](work)
        assert contents(work) == contents(after(before, name))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- no permission


@pytest.mark.parametrize("name", STAGES)
def test_a_folder_that_may_not_be_written_is_named(name, before, capfd):
    "As a user who is not root: root may write anywhere."
    root = Path(tempfile.mkdtemp(prefix="physrep-"))
    try:
        work = shutil.copytree(before[name], root / "work")
        for path in [root, work, *work.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)

        def as_nobody() -> None:
            if os.geteuid() == 0:
                os.setuid(65534)
            STAGES[name](work)

        status, _ = forked(as_nobody)
        assert os.waitstatus_to_exitcode(status) == 1
        said = capfd.readouterr().err
        assert ("PermissionError" in said or "Permission denied" in said) and str(work) in said
        assert contents(work) == contents(before[name])
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(root)


# --- twice at once


def test_of_two_trainings_at_once_one_waits_and_finds_the_other_finished(before, tmp_path):
    work = shutil.copytree(before["pretrain"], tmp_path / "work")
    children = []
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
    told = [read_json(tmp_path / f"{k}.json") for k in range(2)]
    assert sorted(bool(t["trained"]) for t in told) == [False, True]
    (waited,) = (t for t in told if not t["trained"])
    assert len(waited["said"]) == 1 and waited["said"][0].endswith("/seed0 is finished")
    assert contents(work) == contents(after(before, "pretrain"))

"""Two processes train as one: gradients, a whole run, who writes, who dies. The processes are forks of this one."""

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from physrep.core.files import read_json
from physrep.experiments.command import notebook_parameters, stage_path
from physrep.objectives.methods import OBJECTIVES
from physrep.training import distributed, processes
from physrep.training.distributed import OPTIONS, follow, lead, parsed, pretrain_together
from physrep.training.loop import TimeUp
from physrep.training.memory import check_memory
from physrep.training.pretrain import Session, pretrain, training_batches, training_windows
from physrep.training.processes import Group, ProcessLost, Rank, SharedBatches, connected, mean_over_samples
from physrep.training.run import build, resolve

ROOT = Path(__file__).resolve().parent.parent
CELL = "physrep.objectives.cells:Cell"
quiet = dict(progress=False, say=lambda text: None)
# name -> objective and what is changed of preset smoke: all objectives that are trained, and what couples samples
CASES: dict[str, tuple[str, dict]] = {
    name: (name, {}) for name in sorted(set(OBJECTIVES) - {"random", "frozen", "disco", "disco_film"})
} | {
    "accumulated": ("jepa", {"recipe": {"accumulate": 2}, "coefficients": {"noise": 0.5}}),
    "average": ("jepa", {"coefficients": {"target": "ema", "chunks": 2, "centre": False}}),
    "blocks": ("jepa_ema", {"coefficients": {"mask": "blocks"}}),
    "whitened": ("forecast", {"coefficients": {"target": "whitened"}}),
    "means of places": (CELL, {"encoder": "vit", "coefficients": {"task": "tube", "target": "shared"}}),
}
ENCODING = {"blocks", "whitened", "means of places"}  # of these the processes share no samples


def forked(work: Callable[[Group], None], processes: int = 2, seconds: float = 60.0) -> list[int]:
    "The exit codes of forks that each do some work in a group, as torchrun would start them."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                torch.set_num_threads(1)
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
                os.environ.update({k: str(v) for k, v in numbers.items()}, MASTER_ADDR="127.0.0.1")
                with connected("cpu", seconds=seconds) as group:
                    work(group)
                code = 0
            except Exception as error:  # noqa: BLE001  a fork has no one to hand it to
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def in_double(batch: dict) -> dict:
    views = {"views": tuple(x.double() for x in batch["views"])} if "views" in batch else {}
    return batch | {k: batch[k].double() for k in ("fields", "labels") if k in batch} | views


def gradients(case: str, data: Path, group: Group | None = None, precision: type = torch.float64) -> dict:
    "Gradients of update 1, buffers and parts of the loss after it, by name."
    name, changes = CASES.get(case, (case, {}))
    run = resolve("shear_flow", name, preset="smoke", **changes)
    objective = build(run).to(precision)
    batches = training_batches(run, training_windows(run, data))["train"]
    shared = SharedBatches(batches, objective, group) if group else batches
    sums: dict[str, float] = {}
    for batch in shared(1):
        parts = objective(in_double(batch) if precision == torch.float64 else batch)
        (parts["loss"] / run.recipe.accumulate).backward()
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
    objective.after_step(1, 10) if hasattr(objective, "after_step") else None
    return {
        "gradients": {k: p.grad for k, p in objective.named_parameters() if p.grad is not None},
        "buffers": dict(objective.named_buffers()),
        "parts": sums,
        "shares": shared.shares if group else None,
    }


def distance(one: dict, two: dict) -> float:
    "Relative difference of all gradients together."
    assert one["gradients"].keys() == two["gradients"].keys() and one["gradients"]
    apart = sum((two["gradients"][k] - g).square().sum() for k, g in one["gradients"].items())
    return float((apart / sum(g.square().sum() for g in one["gradients"].values())).sqrt())


RUN = resolve("shear_flow", "jepa", preset="smoke", steps=16)


@pytest.fixture(scope="module")
def one(smoke_data, tmp_path_factory) -> Path:
    "The run by one process. It comes first: what torch imports for it the forks have then, too."
    return pretrain(RUN, smoke_data, tmp_path_factory.mktemp("one"), **quiet)


@pytest.fixture(scope="module")
def two(smoke_data, one, tmp_path_factory) -> Path:
    "A folder with what two processes found: gradients by rank, and the run."
    folder = tmp_path_factory.mktemp("two")

    def work(group: Group) -> None:
        found = {case: gradients(case, smoke_data, group) for case in CASES}
        found |= {name: gradients(name, smoke_data, group, torch.float32) for name in ("disco", "disco_film")}
        torch.save(found, folder / f"gradients{group.rank}.pt")
        torch.save(trained(smoke_data, folder, group), folder / f"state{group.rank}.pt")
        hook_writes(folder.parent, folder / f"written{group.rank}")  # with the data
        pretrain_together(RUN, smoke_data, folder / "runs", group=group, **quiet)

    assert forked(work) == [0, 0]
    return folder


def trained(data: Path, folder: Path, group: Group) -> dict:
    "Weights, buffers and the moving average of the encoder after three updates."
    run = resolve("shear_flow", "jepa", preset="smoke", steps=3, coefficients={"target": "ema", "momentum": 0.5})
    objective = build(run)
    batches = training_batches(run, training_windows(run, data))
    shared = SharedBatches(batches["train"], objective, group)
    session = Session(progress=False)
    if group.rank:
        follow(objective, run.recipe, shared, folder / "state", session, curve=False)
    else:
        lead(objective, run.recipe, {**batches, "train": shared}, folder / "state", session)
    return objective.state_dict()


def hook_writes(folder: Path, note: Path) -> None:
    "From now on this process notes what it writes in a folder: files opened, renamed, deleted, and new folders."
    busy = []

    def hook(event: str, args: tuple) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not busy and (opened or event in ("os.rename", "os.remove", "os.mkdir")) and str(folder) in str(args[0]):
            busy.append(True)
            with open(note, "a") as f:
                f.write(f"{event} {args[0]}\n")
            busy.clear()

    sys.addaudithook(hook)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_two_processes_are_those_of_one(case, two, smoke_data):
    """In float64, so that what remains (1e-15) is the order of sums: a wrong factor of one term would be seen. Both
    processes have the same bits, as weights must stay equal."""
    one = gradients(case, smoke_data)
    found = [torch.load(two / f"gradients{rank}.pt")[case] for rank in range(2)]
    assert distance(one, found[0]) < 1e-12
    assert found[0]["shares"] == (case not in ENCODING)
    for kind in ("gradients", "buffers"):
        assert all(torch.equal(found[0][kind][k], found[1][kind][k]) for k in found[0][kind])
    for k, buffer in one["buffers"].items():
        assert torch.allclose(buffer.double(), found[0]["buffers"][k].double(), rtol=1e-10, atol=1e-12), k
    assert found[0]["parts"] == found[1]["parts"]
    for k, value in found[0]["parts"].items():
        assert value == pytest.approx(one["parts"][k], rel=1e-6), k
    assert set(one["parts"]) - set(found[0]["parts"]) == (
        {"relative"} & set(one["parts"]) if found[0]["shares"] else set()
    )


@pytest.mark.parametrize("name", ["disco", "disco_film"])
def test_operators_are_shared_by_their_encoding(name, two, smoke_data):
    "In float32, which their integrator computes in: sums in another order differ by 1e-5."
    found = torch.load(two / "gradients0.pt")[name]
    assert not found["shares"] and distance(gradients(name, smoke_data, precision=torch.float32), found) < 1e-4


def test_statistics_of_each_process_alone_would_be_another_gradient(two, smoke_data):
    "What the tests above can see: two micro-batches, each with statistics of its own, are far from one batch."
    CASES["halves"] = ("jepa", {"recipe": {"accumulate": 2}})
    try:
        assert distance(gradients("jepa", smoke_data), gradients("halves", smoke_data)) > 0.01
    finally:
        del CASES["halves"]


def test_a_run_of_two_processes_is_that_of_one(one, two, smoke_data):
    "The same folder, hash, files and metadata; numbers to the rounding of float32, which 16 updates let grow to 1e-5."
    other = RUN.folder(two / "runs")
    files = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (one, other)]
    assert files[0] == files[1] and "encoder.safetensors" in files[0]
    assert read_json(one / "config.json") == read_json(other / "config.json")
    for name in ("metrics.csv", "curve.csv"):
        a, b = pd.read_csv(one / name), pd.read_csv(other / name)
        assert set(a) - set(b) <= {"relative"} and set(b) <= set(a)
        assert np.allclose(a[b.columns], b, rtol=1e-4, atol=1e-5, equal_nan=True), name
    for name in ("encoder.safetensors", "curve/4.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a)
    header = [
        re.search(rb'"__metadata__":\{.*?\}(?=,")', (f / "encoder.safetensors").read_bytes()) for f in (one, other)
    ]
    assert header[0][0] == header[1][0]
    records = [read_json(f / "provenance.json") for f in (one, other)]
    assert records[1].pop("processes") == 2 and records[0].keys() == records[1].keys()
    assert all(records[0][k] == records[1][k] for k in ("code", "data", "modules", "entries", "parameters"))
    said: list = []
    pretrain(RUN, smoke_data, two / "runs", progress=False, say=said.append)
    assert said[0].endswith("is finished"), "one process finds the run of two finished"


def test_all_processes_hold_the_same_bits(two):
    first, second = (torch.load(two / f"state{rank}.pt") for rank in range(2))
    average = [k for k in first if k.startswith("target.average.")]
    assert average and all(
        not torch.equal(first[k], first[k.replace("target.average", "encoder")]) for k in average[:1]
    )
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_only_rank_0_writes(two):
    assert not (two / "written1").exists(), (two / "written1").read_text()
    assert "encoder.safetensors" in (two / "written0").read_text(), "what is noted"


def test_every_epoch_is_shared_and_covered(smoke_data):
    run = resolve("shear_flow", "mae", preset="smoke", recipe={"accumulate": 2}, batch_size=12)
    windows = training_windows(run, smoke_data)
    batches = training_batches(run, windows)["train"]
    n = len(windows["train"])
    for world in (2, 3):
        shares = [SharedBatches(batches, build(run), Group(Rank(r, world), "cpu")) for r in range(world)]
        order = []
        for step in range(n):  # as many epochs as a batch has windows
            parts = [share.samples(step) for share in shares]
            assert all(len(i) == 6 // world for part in parts for i, _ in part)
            micro = [np.stack([part[k][0] for part in parts], 1).ravel() for k in range(2)]
            order += [*micro[0], *micro[1]]
        epochs = np.reshape(order, (12, n))
        assert (np.sort(epochs, axis=1) == np.arange(n)).all(), "every window once an epoch"
        assert not (epochs[0] == epochs[1]).all(), "in another order"
        assert (epochs[0] == batches.order(0)).all(), "that of one process"


def test_a_killed_process_ends_the_others_and_the_next_call_resumes(two, smoke_data, tmp_path, capfd):
    run = resolve("shear_flow", "jepa", preset="smoke", steps=16, recipe={"checkpoint_seconds": 0})

    def train(group: Group, kill: bool = False) -> None:
        agree = processes.agree

        def agree_or_die(group: Group, step: int) -> None:
            agree(group, step)
            if step == 7 and group.rank == 1 and kill:
                os.kill(os.getpid(), signal.SIGKILL)

        processes.agree = agree_or_die
        pretrain_together(run, smoke_data, tmp_path, group=group, **quiet)

    start = time.monotonic()
    assert forked(lambda group: train(group, kill=True)) == [1, -signal.SIGKILL]
    assert time.monotonic() - start < 30, "without waiting"
    assert "rank 0 of 2 lost rank 1 in update 7. The last checkpoint is kept" in capfd.readouterr().err
    folder = run.folder(tmp_path)
    assert (folder / "checkpoint" / "last.safetensors").is_file() and not (folder / "encoder.safetensors").exists()
    alone = shutil.copytree(tmp_path, tmp_path.with_name("alone"))
    assert forked(train) == [0, 0]
    undisturbed = run.folder(two / "runs")
    a, b = (load_file(f / "encoder.safetensors") for f in (folder, undisturbed))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for name in ("metrics.csv", "curve.csv"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    c = load_file(pretrain(run, smoke_data, alone, **quiet) / "encoder.safetensors")
    assert all(torch.allclose(c[k], b[k], rtol=1e-3, atol=1e-5) for k in b), "a single process goes on with it, too"


def test_what_goes_wrong_in_one_process_is_told_by_the_others(smoke_data, tmp_path, capfd):
    def fails(group: Group) -> None:
        if group.rank:
            raise OSError("the disk is gone")
        group.tell()
        group.total(torch.ones(3))

    assert forked(fails) == [1, 1]
    assert "rank 0 of 2 lost rank 1 in update 0 (rank 1: OSError: the disk is gone)" in capfd.readouterr().err

    def hangs(group: Group) -> None:
        if group.rank:
            deadline = time.monotonic() + 60
            while not (tmp_path / "noticed").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            return
        with pytest.raises(ProcessLost, match="rank 0 of 2 lost rank 1"):
            group.total(torch.ones(3))
        (tmp_path / "noticed").touch()
        os._exit(3)

    start = time.monotonic()
    assert forked(hangs, seconds=1) == [3, 0] and time.monotonic() - start < 30


def test_time_is_up_for_all(smoke_data, tmp_path):
    run = resolve("shear_flow", "supervised", preset="smoke", steps=3)

    def train(group: Group) -> None:
        with pytest.raises(TimeUp, match="at update 1 of 3; the checkpoint is saved"):
            pretrain_together(run, smoke_data, tmp_path, group=group, minutes=1e-9, **quiet)

    assert forked(train) == [0, 0]
    assert forked(lambda group: pretrain_together(run, smoke_data, tmp_path, group=group, **quiet) and None) == [0, 0]
    assert (run.folder(tmp_path) / "encoder.safetensors").is_file()


class Own(torch.nn.Module):
    "An objective from outside the package."

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder


def test_what_may_be_shared():
    run = resolve("shear_flow", "jepa", preset="smoke")
    encoder = build(run).encoder
    assert not mean_over_samples(Own(encoder)), "nothing is known of its loss"
    own = Own(encoder)
    own.mean_over_samples = True
    assert mean_over_samples(own)
    with pytest.raises(ValueError, match="encoder.norm is a batch norm"):
        encoder.norm = torch.nn.BatchNorm1d(4)
        mean_over_samples(own)
    mae = resolve("shear_flow", "mae", preset="smoke", batch_size=9)
    with pytest.raises(ValueError, match="9 is no multiple of 2"):
        SharedBatches(Batches9(), build(mae), Group(Rank(0, 2), "cpu"))


class Batches9:
    batch_size, accumulate = 9, 1


@pytest.mark.parametrize(
    "variables,message",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, "must be integers"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK=2 and WORLD_SIZE=2"),
    ],
)
def test_the_environment_is_checked(variables, message, monkeypatch):
    if len(variables) > 1:
        variables = variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Rank.from_environment()


def test_the_command_has_the_options_of_the_stage(capsys):
    stage = {p.name: p.default for p in notebook_parameters(stage_path("03_pretrain"))}
    assert {name: default for name, (default, _) in OPTIONS.items() if name != "patience"} == stage
    asked = parsed(["--no-resume", "--coefficients", "{variance: 40}", "--batch-size", "4"])
    assert asked.resume is False and asked.coefficients == {"variance": 40} and asked.batch_size == 4
    with pytest.raises(SystemExit):
        parsed(["--recipe", "40"])
    assert "must be a mapping" in capsys.readouterr().err
    with pytest.raises(argparse.ArgumentTypeError):
        distributed.mapping("{a: ")


def test_one_process_needs_no_launcher_and_leaves_no_result_of_another_encoder(smoke_data, tmp_path, capsys):
    names = ["--objective", "random", "--encoder", "vit", "--preset", "smoke"]
    folder = resolve("shear_flow", "random", "vit", "smoke").folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "curve").mkdir(exist_ok=True)
    for name in ("result.json", "result_finetuned.json", "curve/11.json", ".unpacked"):
        (folder / name).write_text("{}")  # as `make unpack` leaves them
    names += ["--system", "shear_flow", "--data-dir", str(smoke_data), "--run-dir", str(tmp_path)]
    assert distributed.main(names) == 0
    assert (Path(capsys.readouterr().out.strip().splitlines()[-1]) / "encoder.safetensors").is_file()
    assert not [p for p in folder.rglob("*") if "result" in p.name or p.suffix == ".json" and p.parent.name == "curve"]
    assert not (folder / ".unpacked").exists()


KILLED = """
import os, signal, sys
from physrep.experiments.command import main
from physrep.training import processes
agree = processes.agree
def agree_or_die(group, step):
    agree(group, step)
    if step == 4 and group.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
processes.agree = agree_or_die
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_torchrun_in_front_of_the_command(smoke_data, tmp_path):
    """The same command twice: killed, with torchrun's report of the rank; killed again, and restarted by torchrun,
    which brings it to its end."""
    script = tmp_path / "command.py"
    script.write_text(KILLED)
    options = ["--objective", "mae", "--preset", "smoke", "--recipe", "{checkpoint_seconds: 0}"]
    places = ["--data-dir", str(smoke_data), "--run-dir", str(tmp_path / "runs")]

    def call(*more: str) -> subprocess.CompletedProcess:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *more]
        return subprocess.run(
            [*launcher, str(script), "pretrain", *options, *places],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )

    killed = call()
    assert killed.returncode and re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", killed.stderr), killed.stderr
    done = call("--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b4/6 \[00:00<\?", done.stderr), "it begins at the checkpoint"
    assert (Path(done.stdout.strip().splitlines()[-1]) / "encoder.safetensors").is_file()
    assert not list((tmp_path / "runs").rglob("*.ipynb")), "several processes execute no notebook"


def test_a_part_of_a_batch_that_does_not_fit_is_refused_before_any_work(monkeypatch):
    run = resolve("shear_flow", "mae", "vit", "smoke")
    free = check_memory(run, available=10**12).total + 10**6
    monkeypatch.setattr(distributed, "memory_available", lambda device: free)
    distributed.check_share(run, "cpu", 1)
    with pytest.raises(ValueError, match="needs about .* are free on cpu. What helps: recipe accumulate"):
        distributed.check_share(run, "cpu", 16)  # of the machine each has a sixteenth, and weights are not shared
    distributed.check_share(resolve("shear_flow", "random", "vit", "smoke"), "cpu", 10**6)  # trains nothing


def test_an_objective_that_shares_its_encoding_alone_needs_a_whole_batch_in_every_process(monkeypatch):
    run = resolve("shear_flow", "disco", "vit_code", "smoke")
    assert not mean_over_samples(build(run))
    monkeypatch.setattr(distributed, "memory_available", lambda device: check_memory(run, available=10**12).total - 1)
    with pytest.raises(ValueError, match="needs about .* for 8 windows at a time"):
        distributed.check_share(run, "cuda", 8)
    shares = resolve("shear_flow", "mae", "vit", "smoke")
    free = check_memory(replace(shares, recipe=replace(shares.recipe, batch_size=1)), available=10**12).total
    monkeypatch.setattr(distributed, "memory_available", lambda device: free)
    distributed.check_share(shares, "cuda", 8)


@pytest.mark.parametrize("option", ["--recipe={lr: 1e-3}", "--coefficients={deep: {weight: 5e-5}}"])
def test_a_text_that_was_meant_as_a_number_is_named(option, capsys):
    with pytest.raises(SystemExit):
        distributed.parsed([option])
    assert "is the text" in capsys.readouterr().err


def test_processes_of_other_machines_take_no_memory_here(monkeypatch):
    run = resolve("shear_flow", "mae", "vit", "smoke")
    free = check_memory(run, available=10**12).total + 10**6
    monkeypatch.setattr(distributed, "memory_available", lambda device: free)
    with pytest.raises(ValueError, match="are free on cpu"):
        distributed.check_share(run, "cpu", 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    distributed.check_share(run, "cpu", 16)

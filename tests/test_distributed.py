"""Two processes train as one: gradients, a whole run, who writes, who dies. The processes are forks of this one."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from physrep.core.files import read_json
from physrep.training import distributed, loop
from physrep.training.cost import memory_needed
from physrep.training.distributed import OPTIONS, Group, SharedBatches, connected, mean_over_samples, parsed
from physrep.training.loop import ALONE, Alone, TimeUp
from physrep.training.presets import PRESETS
from physrep.training.pretrain import pretrain, training_batches, training_windows
from physrep.training.run import Run, build, resolve

ROOT = Path(__file__).resolve().parent.parent
quiet = dict(progress=False, say=lambda text: None)
OPERATORS = {"disco"}  # its integrator computes in float32
# name -> objective and what is changed of preset smoke: all objectives that are trained, and what couples samples
CASES: dict[str, tuple[str, dict]] = {name: (name, {}) for name in PRESETS["smoke"].train} | {
    "accumulated": ("jepa", {"recipe": {"accumulate": 2}, "coefficients": {"noise": 0.5}}),
    "average": ("jepa", {"coefficients": {"target": "ema", "chunks": 2, "centre": False}}),
    "blocks": ("masked_jepa", {"coefficients": {"mask": "blocks"}}),
    "whitened": ("forecast", {"coefficients": {"target": "whitened"}}),
    "means of places": (
        "physrep.objectives.cells:Cell",
        {"encoder": "vit", "coefficients": {"task": "tube", "target": "shared"}},
    ),
}
ENCODING = {"blocks", "whitened", "means of places", *OPERATORS}  # of these the processes share no samples


def run_of(objective: str, **changes) -> Run:
    return resolve("shear_flow", objective, preset="smoke", **changes)


def forked(work: Callable[[Alone], object]) -> list[int]:
    "The exit codes of two forks that each do some work in a group, as torchrun would start them."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                torch.set_num_threads(1)
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
                os.environ.update({k: str(v) for k, v in numbers.items()}, MASTER_ADDR="127.0.0.1")
                with connected("cpu", patience=60) as group:
                    work(group)
                code = 0
            except Exception as error:  # noqa: BLE001  a fork has no one to hand it to
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def gradients(case: str, data: Path, group: Alone = ALONE) -> dict:
    "Gradients of update 1, buffers and parts of the loss after it, by name."
    name, changes = CASES[case]
    run = run_of(name, data_dir=data, **changes)
    kind = torch.float32 if case in OPERATORS else torch.float64
    objective = build(run).to(kind)
    batches = group.share(training_batches(run, training_windows(run))["train"], objective)
    wrapped = group.wrap(objective)
    sums: dict[str, float] = {}
    for batch in batches(1):
        batch |= {k: batch[k].to(kind) for k in ("fields", "labels") if k in batch}
        batch |= {"views": tuple(x.to(kind) for x in batch["views"])} if "views" in batch else {}
        parts = wrapped(batch)
        (parts["loss"] / run.recipe.accumulate).backward()
        for key, value in parts.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
    objective.after_step(1, 10) if hasattr(objective, "after_step") else None
    return {
        "gradients": {k: p.grad for k, p in objective.named_parameters() if p.grad is not None},
        "buffers": dict(objective.named_buffers()),
        "parts": group.mean(sums),
        "shares": getattr(group, "shares", None),
    }


@pytest.fixture(scope="module")
def run(smoke_data) -> Run:
    return run_of("jepa", steps=16, data_dir=smoke_data)


@pytest.fixture(scope="module")
def one(run, tmp_path_factory) -> Path:
    "The run by one process. It comes first: what torch imports for it the forks have then, too."
    return pretrain(replace(run, run_dir=tmp_path_factory.mktemp("one")), **quiet)


@pytest.fixture(scope="module")
def two(run, one, smoke_data, tmp_path_factory) -> Path:
    "A folder with what two processes found: gradients by rank, and the run."
    folder = tmp_path_factory.mktemp("two")

    def work(group: Alone) -> None:
        rank = 0 if group.leads else 1
        torch.save({case: gradients(case, smoke_data, group) for case in CASES}, folder / f"gradients{rank}.pt")
        if not group.leads:  # rank 0 alone writes: what fails here fails the fixture
            os.replace = os.mkdir = None
        pretrain(replace(run, run_dir=folder), group=group, **quiet)

    assert forked(work) == [0, 0]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_two_processes_are_those_of_one(case, two, smoke_data):
    """In float64, so that what remains (1e-15) is the order of sums: a wrong factor of one term would be seen. Both
    processes have the same bits, as weights must stay equal."""
    one = gradients(case, smoke_data)
    first, second = (torch.load(two / f"gradients{rank}.pt")[case] for rank in range(2))
    assert one["gradients"].keys() == first["gradients"].keys() and one["gradients"]
    apart = sum((first["gradients"][k] - g).square().sum() for k, g in one["gradients"].items())
    size = sum(g.square().sum() for g in one["gradients"].values())
    assert (apart / size).sqrt() < (1e-4 if case in OPERATORS else 1e-12)
    assert first["shares"] == (case not in ENCODING)
    for kind in ("gradients", "buffers"):
        assert all(torch.equal(first[kind][k], second[kind][k]) for k in first[kind])
    for k, buffer in one["buffers"].items():
        assert torch.allclose(buffer.double(), first["buffers"][k].double(), rtol=1e-10, atol=1e-12), k
    assert first["parts"] == second["parts"]
    for k, value in first["parts"].items():
        assert value == pytest.approx(one["parts"][k], rel=1e-4 if case in OPERATORS else 1e-6), k
    assert set(one["parts"]) - set(first["parts"]) == ({"relative"} & set(one["parts"]) if first["shares"] else set())


def test_a_run_of_two_processes_is_that_of_one(run, one, two):
    "The same folder, hash, files and metadata; numbers to the rounding of float32, which 16 updates let grow to 1e-5."
    double = replace(run, run_dir=two)
    other = double.folder
    files = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (one, other)]
    assert files[0] == files[1] and "encoder.safetensors" in files[0]
    assert read_json(one / "config.json") == read_json(other / "config.json")
    for name in ("metrics.csv", "curve.csv"):
        a, b = pd.read_csv(one / name), pd.read_csv(other / name)
        assert set(a) - set(b) <= {"relative"} and set(b) <= set(a)
        assert np.allclose(a[b.columns], b, rtol=1e-4, atol=1e-5, equal_nan=True), name
    single = replace(run, run_dir=one.parents[3])
    for length in (16, 4):
        a, b = (load_file(each.at(length).folder / "encoder.safetensors") for each in (single, double))
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a)


def test_every_epoch_is_shared_and_covered(smoke_data):
    run = run_of("mae", recipe={"accumulate": 2}, batch_size=12, data_dir=smoke_data)
    windows = training_windows(run)
    batches = training_batches(run, windows)["train"]
    n = len(windows["train"])
    for world in (2, 3):
        shares = [SharedBatches(batches, rank, world) for rank in range(world)]
        order = []
        for step in range(n):  # as many epochs as a batch has windows
            parts = [share.samples(step) for share in shares]
            assert all(len(i) == 6 // world for part in parts for i, _ in part)
            for k in range(2):
                order += [*np.stack([part[k][0] for part in parts], 1).ravel()]
        epochs = np.reshape(order, (12, n))
        assert (np.sort(epochs, axis=1) == np.arange(n)).all(), "every window once an epoch"
        assert (epochs[0] == batches.order(0)).all(), "in the order of one process"


def test_a_killed_process_ends_the_others_and_the_next_call_resumes(run, two, tmp_path):
    run = replace(run, recipe=replace(run.recipe, checkpoint_seconds=0.0), run_dir=tmp_path / "together")

    def dies(group: Alone) -> None:
        update = loop.update

        def update_or_die(*args, step: int, **options) -> dict:
            if step == 7 and not group.leads:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(*args, step=step, **options)

        loop.update = update_or_die
        pretrain(run, group=group, **quiet)

    start = time.monotonic()
    assert forked(dies) == [1, -signal.SIGKILL]
    assert time.monotonic() - start < 50, "without waiting for the patience of 60 seconds"
    assert (run.trunk / "checkpoint" / "last.safetensors").is_file()
    assert not (run.folder / "encoder.safetensors").exists()
    shutil.copytree(tmp_path / "together", tmp_path / "alone")
    assert forked(lambda group: pretrain(run, group=group, **quiet)) == [0, 0]
    undisturbed = replace(run, run_dir=two).folder
    a, b = (load_file(f / "encoder.safetensors") for f in (run.folder, undisturbed))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for name in ("metrics.csv", "curve.csv"):
        assert (run.folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    c = load_file(pretrain(replace(run, run_dir=tmp_path / "alone"), **quiet) / "encoder.safetensors")
    assert all(torch.allclose(c[k], b[k], rtol=1e-3, atol=1e-5) for k in b), "a single process goes on with it, too"


def test_time_is_up_for_all(smoke_data, tmp_path):
    run = run_of("supervised", steps=3, data_dir=smoke_data, run_dir=tmp_path)

    def stopped(group: Alone) -> None:
        with pytest.raises(TimeUp, match="at update 1 of 3; the checkpoint is saved"):
            pretrain(run, group=group, minutes=1e-9 if group.leads else 99, **quiet)

    assert forked(stopped) == [0, 0]
    assert forked(lambda group: pretrain(run, group=group, **quiet)) == [0, 0]
    assert (run.folder / "encoder.safetensors").is_file()


def test_what_may_be_shared(smoke_data):
    encoder = build(run_of("jepa")).encoder
    own = torch.nn.ModuleDict({"encoder": encoder})  # an objective from outside the package
    assert not mean_over_samples(own), "nothing is known of its loss"
    own.mean_over_samples = True
    assert mean_over_samples(own)
    encoder.norm = torch.nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match="encoder.norm is a batch norm"):
        mean_over_samples(own)
    odd = run_of("mae", batch_size=9, data_dir=smoke_data)
    with pytest.raises(ValueError, match="2 processes cannot share 9 windows equally"):
        Group(0, 2).share(training_batches(odd, training_windows(odd))["train"], build(odd))


def test_the_command_has_the_options_of_the_stage():
    from physrep.experiments.command import notebook_parameters, stage_path

    stage = {p.name: p.default for p in notebook_parameters(stage_path("03_pretrain"))}
    assert {name: default for name, (default, _) in OPTIONS.items() if name != "patience"} == stage
    asked = parsed(["--no-resume", "--coefficients", "{variance: 40}", "--batch-size", "4"])
    assert asked.resume is False and asked.coefficients == {"variance": 40} and asked.batch_size == 4


@pytest.mark.parametrize("option, message", [("40", "must be a mapping"), ("{deep: {weight: 5e-5}}", "is the text")])
def test_wrong_options_are_named(option, message, capsys):
    with pytest.raises(SystemExit):
        parsed([f"--recipe={option}"])
    assert message in capsys.readouterr().err


def test_one_process_needs_no_launcher_and_leaves_no_result_of_another_encoder(smoke_data, tmp_path, capsys):
    folder = resolve("shear_flow", "random", "vit", "smoke", run_dir=tmp_path).folder
    folder.mkdir(parents=True)
    for name in ("result.json", "result_finetuned.json", "result-kernel.json", ".unpacked"):
        (folder / name).write_text("{}")  # as `make unpack` leaves them
    names = ["--system", "shear_flow", "--objective", "random", "--encoder", "vit", "--preset", "smoke"]
    assert distributed.main([*names, "--data-dir", str(smoke_data), "--run-dir", str(tmp_path)]) == 0
    assert (Path(capsys.readouterr().out.strip().splitlines()[-1]) / "encoder.safetensors").is_file()
    assert {p.name for p in folder.rglob("*.json")} == {"config.json", "provenance.json"}
    assert not (folder / ".unpacked").exists()


KILLED = """
import os, signal, sys
from physrep.training import loop
from physrep.training.distributed import main
update = loop.update
def update_or_die(*args, step, **options):
    if step == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args, step=step, **options)
loop.update = update_or_die
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_torchrun_in_front_of_the_command(smoke_data, tmp_path):
    "Killed, and restarted by torchrun, which brings it to its end from the checkpoint."
    script = tmp_path / "command.py"
    script.write_text(KILLED)
    options = ["--objective", "mae", "--preset", "smoke", "--recipe", "{checkpoint_seconds: 0}"]
    options += ["--data-dir", str(smoke_data), "--run-dir", str(tmp_path / "runs")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    about = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    done = subprocess.run([*launcher, str(script), *options], env=os.environ | {"PYTHONPATH": str(ROOT)}, **about)
    assert done.returncode == 0, done.stderr
    assert re.search(r"exitcode: -9.* local_rank: 1", done.stderr), "torchrun names the one that was killed"
    again = done.stderr.rpartition("exitcode: -9")[2]
    assert "5/6" in again and "1/6" not in again, "it begins at the checkpoint"
    assert (Path(done.stdout.strip().splitlines()[-1]) / "encoder.safetensors").is_file()


@pytest.mark.parametrize(
    "objective, free, device, world, fits",
    [
        ("mae", 8, "cpu", 1, True),
        ("mae", 8, "cpu", 16, False),  # each has a sixteenth of the machine, and all weights
        ("mae", 1, "cuda", 8, True),
        ("disco", 7, "cuda", 8, False),  # it shares its encoding alone: each process reads all 8 windows
    ],
)
def test_a_part_of_a_batch_that_does_not_fit_is_refused(objective, free, device, world, fits, monkeypatch):
    "`free`: of which number of windows the memory is there."
    run = run_of(objective)
    there = memory_needed(replace(run, recipe=replace(run.recipe, batch_size=free)))
    monkeypatch.setattr(distributed, "memory_available", lambda device: there)
    refused = pytest.raises(ValueError, match="needs about .* are free on .*. What helps: recipe accumulate")
    with nullcontext() if fits else refused:
        distributed.check_share(run, Group(0, world, device))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # processes of other machines take no memory here
    if device == "cpu":
        distributed.check_share(run, Group(0, world, device))

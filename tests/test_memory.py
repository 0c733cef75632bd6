"""What a training and its probes need is told before they start, and close to what they take."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from physrep.core.devices import memory_available
from physrep.probing import reading
from physrep.probing.memory import check_probing_memory, peak_bytes, probing_steps
from physrep.probing.reading import windows_at_once
from physrep.training import cost
from physrep.training.memory import check_memory, memory_needed, saved_bytes
from physrep.training.presets import get_preset
from physrep.training.run import resolve

MEASURE = """
import sys, torch
from physrep.training.cost import example_batch
from physrep.training.loop import make_optimizer
from physrep.training.run import build, resolve
torch.set_num_threads(1)
run = resolve("shear_flow", sys.argv[1], sys.argv[2], "laptop", batch_size=64)
module = build(run).train()
optimizer, batch = make_optimizer(module, run.recipe), example_batch(run, module, 64)


def peak():  # of this program; what getrusage says may be that of the process that started it
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


before = peak()
for _ in range(2):
    optimizer.zero_grad()
    module(batch)["loss"].backward()
    optimizer.step()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is there on Linux")
@pytest.mark.parametrize("row", [("mae", "vit"), ("jepa", "convnext")])
def test_a_training_takes_about_what_was_said(row):
    measured = int(subprocess.run([sys.executable, "-c", MEASURE, *row], check=True, capture_output=True).stdout)
    assert 0.6 < memory_needed(resolve("shear_flow", *row, "laptop", batch_size=64)).total / measured < 1.6


def test_what_a_backward_pass_waits_for_is_counted_without_being_kept():
    alive = []

    class Chain(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> dict:
            made = []
            for _ in range(5):
                x = super().forward(x).exp()  # whose result the backward pass needs
                made.append(StorageWeakRef(x.untyped_storage()))
            alive.append(sum(not memory.expired() for memory in made))
            return {"loss": x.sum()}

    saved, largest = saved_bytes(Chain(8, 8), torch.randn(100, 8))
    assert alive == [1], "the last one, which is still in use"
    assert (saved, largest) == (6 * 100 * 8 * 4, 100 * 8 * 4), "the input and five results"


def test_micro_batches_need_less():
    whole = memory_needed(resolve("shear_flow", "mae", "vit", "laptop", batch_size=64))
    parts = memory_needed(resolve("shear_flow", "mae", "vit", "laptop", batch_size=64, recipe={"accumulate": 4}))
    assert parts.weights == whole.weights and 0.2 < parts.saved / whole.saved < 0.3


def test_half_the_precision_needs_less_and_a_convnext_on_a_gpu_more():
    mae = [resolve("shear_flow", "mae", "vit", "laptop", recipe={"precision": p}) for p in ("float32", "bfloat16")]
    single, half = (memory_needed(run).saved for run in mae)
    assert 0.4 < half / single < 0.9
    with pytest.raises(ValueError, match="smaller batch_size, or precision bfloat16 on a GPU$"):
        check_memory(mae[0], available=10**6)
    with pytest.raises(ValueError, match="smaller batch_size$"):
        check_memory(mae[1], available=10**6)
    jepa = resolve("shear_flow", "jepa", "convnext", "laptop")
    assert memory_needed(jepa, "cuda").saved > 1.3 * memory_needed(jepa).saved, "norm and scale are not folded there"


@pytest.mark.parametrize("row", [("jepa", "convnext"), ("invariance", "vit"), ("mae", "vit")])
def test_operations_of_large_batches_are_counted_on_a_few_windows(row, monkeypatch):
    run = resolve("shear_flow", *row, "smoke")
    whole = cost.cost(run)
    seen, make = [], cost.example_batch
    monkeypatch.setattr(cost, "example_batch", lambda *args: seen.append(args[2]) or make(*args))
    monkeypatch.setattr(cost, "_MANY", 0)
    monkeypatch.setattr(cost, "_COUNTED", {})
    few = cost.cost(run)
    assert max(seen) < run.recipe.batch_size and few["encode"] == whole["encode"]
    assert few["train"] == pytest.approx(whole["train"], rel=1e-3)


def test_what_does_not_fit_is_refused_with_what_would_help():
    run = resolve("shear_flow", "mae", "vit", "laptop")
    assert check_memory(run, available=10**11).total < 10**9
    with pytest.raises(ValueError, match=r"mae-vit-.* needs about 0\.\d GB for 8 windows at a time; 0\.0 GB are free"):
        check_memory(run, available=10**7)


def test_what_is_free_is_less_than_there_is():
    free = memory_available()
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free is None or 0 < free < 0.99 * there, "this program and others have some of it"


def test_a_branch_that_is_trained_beside_the_run_needs_as_much_again():
    whole, cosine = (
        memory_needed(resolve("shear_flow", "mae", "vit", "laptop", recipe={"schedule": schedule}))
        for schedule in ("constant", "cosine")
    )
    assert whole.weights == 2 * cosine.weights and whole.saved == cosine.saved


READ = """
import sys, numpy as np, sklearn.kernel_approximation, torch
from physrep.data.scaling import LabelScaler
from physrep.physics.systems import get_system
from physrep.probing.features import Features, extract
from physrep.probing.frozen import fit_probe
from physrep.training.run import build, resolve
torch.set_num_threads(1)
run, windows = resolve("shear_flow", "random", sys.argv[1], "laptop"), int(sys.argv[3])
encoder = build(run).encoder.eval()
labels = 10 ** np.random.default_rng(0).uniform(0, 1, (windows, 2))
scaler = LabelScaler.fit(get_system("shear_flow"), labels)
tokens = extract(encoder, [{"fields": torch.randn(1, 4, *run.clip_shape)}], progress=False)
few = Features(tokens.expand(16, -1, -1), labels[:16], np.arange(16))
fit_probe("kernel", few, few, scaler)


def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


before = status("VmHWM:") if sys.argv[2] == "features" else status("VmRSS:")
if sys.argv[2] == "features":
    batches = ({"fields": torch.randn(64, 4, *run.clip_shape)} for _ in range(windows // 64))
    extract(encoder, batches, progress=False)
else:
    all_of = Features(tokens.expand(windows, -1, -1), labels, np.arange(windows))
    fit_probe("kernel", all_of, few, scaler)
print(status("VmHWM:") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is there on Linux")
@pytest.mark.parametrize(("encoder", "step", "windows"), [("vit", "features", 512), ("convnext", "kernel", 1024)])
def test_probing_takes_about_what_was_said(encoder, step, windows):
    call = [sys.executable, "-c", READ, encoder, step, str(windows)]
    measured = int(
        subprocess.run(call, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
    )
    run = resolve("shear_flow", "random", encoder, "laptop")
    steps = {s.name: s.need for s in probing_steps(run, {"train": range(windows), "valid": range(16)})}
    assert 0.6 < steps[step] / measured < 1.6


def test_probes_that_do_not_fit_are_refused_before_the_training():
    run, windows = resolve("shear_flow", "mae", "vit", "laptop"), {"train": range(10**6), "valid": range(100)}
    largest = check_probing_memory(run, windows, available=10**12)
    assert largest.name == "kernel" and largest.need > 50e9
    with pytest.raises(
        ValueError, match=r"mae-vit-.*step kernel\) needs about 58\.. GB; 40\.0 GB.*larger probe_stride"
    ):
        check_probing_memory(run, windows, available=40 * 10**9)
    with pytest.raises(ValueError, match="step features.* clips of fewer frames"):
        check_probing_memory(run, windows, available=10**7)
    few = {split: range(100) for split in windows}
    need = {step.name: step.need for step in probing_steps(run, few, ("attentive",))}
    with pytest.raises(
        ValueError, match="step attentive.* smaller probe_tokens in the preset, or a smaller probe_batch$"
    ):
        check_probing_memory(run, few, ("attentive",), "cuda", available=need["attentive"] - 1)


def test_a_gpu_needs_room_for_one_window_and_the_cpu_for_the_tokens():
    run, windows = resolve("shear_flow", "jepa", "convnext", "laptop"), {"train": range(10**5), "valid": range(100)}
    on_gpu = {step.name: step for step in probing_steps(run, windows, ("attentive",), "cuda")}
    assert {name: step.device for name, step in on_gpu.items()} == {
        "features": "cuda",
        "tokens": "cpu",
        "attentive": "cuda",
    }
    assert on_gpu["tokens"].need == 2**31, "what is more is in a file"
    assert on_gpu["features"].need < probing_steps(run, windows, ())[0].need - on_gpu["tokens"].need


def test_fine_tuning_needs_less_in_parts():
    whole, parts = (
        resolve("shear_flow", "mae", "vit", replace(get_preset("laptop"), finetune_accumulate=n, finetune_epochs=1))
        for n in (1, 4)
    )
    windows = {split: range(100) for split in ("train", "valid")}
    need = [{s.name: s.need for s in probing_steps(run, windows, ("finetune",))}["finetune"] for run in (whole, parts)]
    assert 0.2 < need[1] / need[0] < 0.5


def test_a_cpu_reads_as_many_windows_at_once_as_its_memory_holds(monkeypatch):
    numbers = 4 * 16 * 64 * 64
    monkeypatch.setattr(reading, "memory_available", lambda: 10 * 200 * numbers)
    assert windows_at_once(numbers) == 10 and windows_at_once(numbers, "cuda") == 64
    monkeypatch.setattr(reading, "memory_available", lambda: None)  # where the machine does not say
    assert windows_at_once(numbers) == 64 and windows_at_once(2**30) == 1


def test_the_peak_of_a_call_counts_what_is_there_at_once():
    x = torch.randn(100, 100)
    assert peak_bytes(lambda: [x + 1 for _ in range(5)]) == 5 * x.nbytes
    assert peak_bytes(lambda: [(x + 1).sum() for _ in range(5)]) < 1.1 * x.nbytes
    assert peak_bytes(lambda: x.view(-1)[10:]) == 0

"""What a training needs is told before it starts, and close to what it takes."""

import subprocess
import sys

import pytest

from physrep.training import cost
from physrep.training.memory import check_memory, memory_available, memory_needed
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
    assert free is None or 0 < free < 2**50


def test_a_branch_that_is_trained_beside_the_run_needs_as_much_again():
    whole, cosine = (
        memory_needed(resolve("shear_flow", "mae", "vit", "laptop", recipe={"schedule": schedule}))
        for schedule in ("constant", "cosine")
    )
    assert whole.weights == 2 * cosine.weights and whole.saved == cosine.saved

"""Benchmarks: shares, counts, and ratios by a clock that the test turns; never how long something takes."""

import subprocess
import sys
from dataclasses import dataclass, field

import pandas as pd
import pytest
import torch
from torch import nn

from physrep.core.files import project_root
from physrep.experiments.benchmarks import (
    PIECES,
    Case,
    Stopwatch,
    benchmark_runs,
    main,
    make_cases,
    plainly,
    plot_pieces,
    summary,
    time_pieces,
)
from physrep.experiments.scaling import FACTORS
from physrep.results.panels import WIDTH
from physrep.training.loop import Recipe, make_optimizer

ROOT = project_root()


@dataclass
class Clock:
    "A clock that goes on when something says how long it takes."

    now: float = 0.0
    visits: list = field(default_factory=list)

    def __call__(self) -> float:
        return self.now


class Slow(nn.Module):
    "An objective whose forward and backward pass take as long as they say."

    def __init__(self, clock: Clock, name: str, *, forward: float, backward: float):
        super().__init__()
        self.clock, self.name, self.takes = clock, name, forward
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.weight.register_hook(lambda _: setattr(clock, "now", clock.now + backward))

    def forward(self, batch):
        self.clock.now += self.takes
        self.clock.visits.append(self.name)
        return {"loss": self.weight.square().sum()}


class SlowBatches:
    "Batches that take as long as they say."

    def __init__(self, clock: Clock, size: int, *, reading: float, symmetries: float):
        self.clock, self.size, self.reading, self.symmetries = clock, size, reading, symmetries

    def samples(self, step):
        return list(range(self.size)), torch.arange(self.size)

    def make(self, indices, seeds, *, plain=False):
        self.clock.now += self.reading + (0 if plain else self.symmetries)
        return {"fields": torch.zeros(len(indices), 1), "seeds": seeds}


def slow_case(clock, name="slow", size=4, *, flops=6e9, plain=False, symmetries=2.0, forward=3.0, backward=6.0):
    module = Slow(clock, name, forward=forward, backward=backward)
    recipe = Recipe(steps=100, lr=1e-3, batch_size=size)
    batches = SlowBatches(clock, size, reading=1.0, symmetries=symmetries)
    optimizer = make_optimizer(module, recipe)
    optimizer.register_step_post_hook(lambda *_: setattr(clock, "now", clock.now + 4.0))
    counted = {"forward": flops / 3, "backward": 2 * flops / 3}
    return Case(name, "vit", recipe, module, optimizer, batches, torch.device("cpu"), counted, plain)


def test_every_piece_gets_the_time_that_it_took():
    clock = Clock()
    table = time_pieces([slow_case(clock)], repeats=3, clock=clock).set_index("piece")
    assert table.seconds[list(PIECES)].tolist() == [1.0, 2.0, 3.0, 6.0, 4.0]
    assert table.seconds["update"] == 16.0 and table.share["backward"] == 6 / 16
    assert table.share[list(PIECES)].sum() == 1 == table.share["update"]
    assert table.windows_per_second["update"] == 4 / 16 and table.windows_per_second["reading"] == 4
    assert table.gflops["forward"] == pytest.approx(2 / 3) and table.gflops["update"] == pytest.approx(6 / 16)
    assert table.gflops[["reading", "symmetries", "optimiser"]].isna().all()


def test_ratios_are_to_the_same_objective_in_plain_pytorch():
    clock = Clock()
    cases = [
        slow_case(clock, "twice", size=4),
        slow_case(clock, "twice", size=4, plain=True, forward=6.0, backward=12.0),
        slow_case(clock, "twice", size=8),
        slow_case(clock, "twice", size=8, plain=True, forward=4.5, backward=9.0),
        slow_case(clock, "alone", size=4),
    ]
    table = time_pieces(cases, repeats=1, clock=clock)
    assert len(table) == 3 * (len(PIECES) + 1), "the plain formulation has no rows of its own"
    ratio = table.set_index(["objective", "batch_size", "piece"]).against_plain
    for size, times in ((4, 2.0), (8, 1.5)):
        assert ratio["twice", size, "forward"] == ratio["twice", size, "backward"] == pytest.approx(times)
        assert ratio["twice", size, "optimiser"] == 1.0
    assert ratio["twice", 4, "update"] == pytest.approx(25 / 16)
    assert ratio[:, :, "reading"].isna().all() and ratio["alone"].isna().all(), "nothing to compare with"


def test_cases_are_visited_in_turn_and_the_first_round_is_left_out():
    clock = Clock()
    cases = [slow_case(clock, name) for name in "abc"]
    time_pieces(cases, repeats=2, clock=clock)
    assert "".join(clock.visits) == "cba" + "abc" + "cba"


def test_the_median_passes_over_a_slow_round():
    clock = Clock()
    case = slow_case(clock)
    forward = case.module.forward

    def sometimes(batch):
        clock.now += 100.0 if len(clock.visits) == 2 else 0.0
        return forward(batch)

    case.module.forward = sometimes
    assert time_pieces([case], repeats=3, clock=clock).set_index("piece").seconds["forward"] == 3.0


def test_a_batch_that_is_faster_with_symmetries_has_no_negative_share():
    clock = Clock()
    table = time_pieces([slow_case(clock, symmetries=-0.5)], repeats=1, clock=clock).set_index("piece")
    assert table.share["symmetries"] == 0 and table.seconds["reading"] == 0.5
    assert table.share[list(PIECES)].sum() == pytest.approx(1)


def test_hooks_go_even_if_the_update_fails():
    clock = Clock()
    case = slow_case(clock)
    case.module.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="the loss is nan"):
        time_pieces([case], repeats=1, clock=clock)
    assert not case.module._forward_hooks and not case.module._forward_pre_hooks


def test_real_objectives_are_timed(smoke_data):
    runs = benchmark_runs("shear_flow", "smoke", ["mae", "jepa-convnext"])
    assert [run.row for run in runs] == [("mae", "vit"), ("jepa", "convnext")]
    cases = make_cases(runs, smoke_data, [2, 4])
    assert [case.plain for case in cases] == [False, True, False, True, False, False]
    assert cases[0].module is cases[2].module, "sizes of a run share its weights"
    assert cases[2].flops["forward"] == 2 * cases[0].flops["forward"]
    table = time_pieces(cases, repeats=1)
    pieces = table[table.piece != "update"].groupby(["objective", "batch_size"])
    assert pieces.share.sum().tolist() == pytest.approx([1] * 4) and (pieces.size() == len(PIECES)).all()
    assert (table.seconds >= 0).all() and (table[table.piece == "update"].seconds > 0).all()
    text = summary(table)
    assert len(text) == 4 and float(text.loc[("mae", "vit", 4), "of plain"]) > 0
    fig = plot_pieces(table)
    left, right = fig.axes
    assert len(left.patches) == 2 * len(PIECES) and [len(line.get_xdata()) for line in right.lines] == [2, 2]
    assert fig.get_figwidth() == WIDTH and right.texts[0].get_text().endswith("x")


@pytest.mark.parametrize("objective", ["mae", "jepa_ema", "invariance"])
def test_the_plain_formulation_computes_the_same(objective, smoke_data):
    case = make_cases(benchmark_runs("shear_flow", "smoke", [objective]), smoke_data, [4])[0]
    batch = case.batches.make(*case.batches.samples(0))
    ours = float(case.module(batch)["loss"])
    with plainly():
        assert float(case.module(batch)["loss"]) == pytest.approx(ours, rel=1e-5)
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_bfloat16_is_what_is_trained(smoke_data):
    case = make_cases(benchmark_runs("shear_flow", "smoke", ["mae"]), smoke_data, [2], precision="bfloat16")[0]
    seen = []
    case.module.encoder.embed.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    time_pieces([case], repeats=1)
    assert set(seen) == {torch.bfloat16}


def test_all_objectives_that_train_by_default():
    runs = benchmark_runs("shear_flow", "laptop")
    names = ["-".join(run.row) for run in runs]
    assert {"jepa-vit", "mae-vit", "supervised-vit", "jepa-convnext"} <= set(names)
    assert not any(name.startswith(("random", "frozen")) for name in names)


def test_wrong_values_are_refused(smoke_data):
    with pytest.raises(ValueError, match="unknown objective 'mea'; valid: "):
        benchmark_runs("shear_flow", "smoke", ["mea"])
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        time_pieces([], repeats=0)
    with pytest.raises(ValueError, match="at least one batch size"):
        make_cases(benchmark_runs("shear_flow", "smoke", ["mae"]), smoke_data, [])


def test_a_stopwatch_of_a_process_does_not_count_sleep():
    import time

    watch = Stopwatch(torch.device("cpu"))
    started = time.perf_counter()
    time.sleep(0.3)
    watch.mark("asleep")
    assert watch.seconds["asleep"] < 0.5 * (time.perf_counter() - started)


def test_the_stage_draws_the_figure_and_the_command_prints_its_table(smoke_data, tmp_path, capsys):
    options = ["-p", "preset", "smoke", "-p", "objectives", "mae", "-p", "batch_sizes", "2,4", "-p", "repeats", "1"]
    options += ["-p", "data_dir", str(smoke_data), "-p", "run_dir", str(tmp_path)]
    command = [sys.executable, "-m", "papermill", "nbs/10_benchmarks.ipynb", str(tmp_path / "b.ipynb"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = tmp_path / "smoke" / "figures"
    assert {p.name for p in figures.iterdir()} == {f"benchmarks.{e}" for e in ("png", "svg", "csv", "json")}
    assert len(pd.read_csv(figures / "benchmarks.csv")) == 2 * (len(PIECES) + 1)
    assert main([str(figures / "benchmarks.csv")]) == 0
    assert "windows/s" in capsys.readouterr().out


@pytest.mark.long
def test_the_stage_of_scaling_draws_both_figures(tmp_path):
    options = ["-p", "preset", "smoke", "-p", "rows", "mae-vit", "-p", "repeats", "1", "-p", "run_dir", str(tmp_path)]
    options += ["-r", "solver_threads", "1"]  # two threads would wait for each other with OMP_NUM_THREADS=1
    command = [sys.executable, "-m", "papermill", "nbs/10a_scaling.ipynb", str(tmp_path / "s.ipynb"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = tmp_path / "smoke" / "figures"
    drawn = {f"{name}.{e}" for name in ("scaling", "scaling_sources") for e in ("png", "svg", "csv", "json")}
    assert {p.name for p in figures.iterdir()} == drawn
    growth = pd.read_csv(figures / "scaling.csv")
    assert growth.groupby("factor").size().to_dict() == {name: len(values) for name, values in FACTORS.items()}
    sources = pd.read_csv(figures / "scaling_sources.csv")
    speed = sources.dropna(subset=["reader"]).set_index("reader").windows_per_second
    assert speed["copy"] > speed["the_well"], "no file is read faster than memory"

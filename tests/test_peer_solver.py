"""The solver beside Dedalus: the table with ways of one's own, no Dedalus, and the real thing."""

import sys

import numpy as np
import pandas as pd
import pytest
from broken import stage
from helpers import ROOT, papermill

from physrep.experiments.peer_solver import (
    WAYS,
    Way,
    common_errors,
    import_dedalus,
    make_problem,
    plot_peers,
    seconds_at,
    solve_ours,
    time_peers,
)
from physrep.physics.spectral import SimulationBlewUp
from physrep.training.presets import get_preset

SIM = get_preset("smoke").sim("shear_flow")


@pytest.fixture(scope="module")
def problem():
    return make_problem(SIM, frames=1, dt=SIM.dt / 8)


def test_an_error_is_the_distance_from_the_reference(problem):
    longer = problem.end.copy()
    longer[:2] *= 1.01
    longer[2] *= 0.9
    assert problem.errors(longer) == pytest.approx({"velocity": 0.01, "tracer": 0.1})


def test_our_solver_starts_from_the_fields_of_the_problem(problem):
    alone, seconds = solve_ours(problem, SIM.dt)
    assert seconds > 0 and np.abs(alone - problem.start).max() > 1e-3
    together, _ = solve_ours(problem, SIM.dt, batch=3)
    assert np.array_equal(together, alone), "a flow does not depend on those beside it"
    assert max(problem.errors(alone).values()) < 1e-4


def test_the_table_has_the_median_time_of_a_whole_flow_and_the_error_of_every_step(problem):
    calls = []

    def solve(problem, dt):
        calls.append(dt)
        return problem.end * (1 + dt), 2.0 + (len(calls) > 2)  # the first round is not counted

    ways = {"a way": Way(solve, (0.5, 1), "black")}
    table = time_peers(problem, ways, 0.05, whole=4 * problem.duration, repeats=1)
    assert calls == [0.05, 0.025, 0.025, 0.05] and table.seconds.tolist() == pytest.approx([12.0, 12.0])
    assert table.velocity.tolist() == pytest.approx([0.025, 0.05]) == table.tracer.tolist()
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        time_peers(problem, ways, 0.1, whole=1.0, repeats=0)


def test_a_step_that_is_too_long_has_no_error(problem):
    def solve(problem, dt):
        if dt > 3:
            raise SimulationBlewUp("it grew", 0.1)
        return problem.end * {1: 1.01, 2: 1e30, 3: np.nan}[dt], 1.0

    table = time_peers(problem, {"a way": Way(solve, (1, 2, 3, 4), "black")}, 1, whole=problem.duration, repeats=1)
    assert table.velocity.notna().tolist() == [True, False, False, False] == table.tracer.notna().tolist()


def test_the_same_error_is_read_between_points_and_not_beyond_them():
    about = {"solver": "a", "dt": [1, 2, 4], "seconds": [16.0, 4.0, 1.0]}
    table = pd.DataFrame(about | {"velocity": [1e-4, 1e-2, np.nan]})
    assert seconds_at(table, 1e-3)["a"] == pytest.approx(8.0)
    assert seconds_at(table, 2e-2).isna().all() and seconds_at(table, 1e-5).isna().all()
    rounding = pd.DataFrame(about | {"velocity": [1e-3, 1e-4, 1e-2]})  # the shortest step is no better than the middle
    assert seconds_at(rounding, 1e-3)["a"] == pytest.approx(2.0)


def test_errors_are_those_that_all_solvers_have():
    table = pd.DataFrame({"solver": list("aabb"), "velocity": [1e-6, 1e-2, 1e-4, 1.0]})
    assert common_errors(table, 1) == [1e-3]


def test_without_dedalus_the_stage_says_how_to_install_it_before_anything_is_solved(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "dedalus", None)
    with pytest.raises(ModuleNotFoundError, match="FFTW_PATH=/usr MPI_PATH=<folder of MPI> pip install dedalus"):
        import_dedalus()
    with pytest.raises(ModuleNotFoundError, match="Dedalus, which is not installed"):
        stage("10b_peer_solver", 3, preset="smoke", run_dir=str(tmp_path))


@pytest.mark.long
def test_dedalus_agrees_and_the_stage_draws_both(problem, tmp_path):
    pytest.importorskip("dedalus")
    theirs = {name: Way(way.solve, (1, 0.5), way.color) for name, way in WAYS.items() if name.startswith("Dedalus")}
    table = time_peers(problem, theirs, SIM.dt, whole=1.0, repeats=1).set_index(["solver", "dt"])
    assert table.loc[("Dedalus RK443", SIM.dt / 2), ["velocity", "tracer"]].max() < 1e-4
    falls = table.velocity.unstack().pipe(lambda t: t[SIM.dt] / t[SIM.dt / 2])
    assert falls["Dedalus RK222"] == pytest.approx(4, rel=0.2), "of order 2"
    assert falls["Dedalus RK443"] == pytest.approx(8, rel=0.2), "of order 3"
    options = ["-p", "preset", "smoke", "-p", "frames", "1", "-p", "repeats", "1", "-p", "run_dir", str(tmp_path)]
    done = papermill("nbs/10b_peer_solver.ipynb", str(tmp_path / "p.ipynb"), *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = tmp_path / "smoke" / "figures"
    assert {p.name for p in figures.iterdir()} == {f"peer_solver.{e}" for e in ("png", "svg", "csv", "json")}
    drawn = pd.read_csv(figures / "peer_solver.csv")
    assert set(drawn.solver) == set(WAYS)
    assert len(plot_peers(drawn).axes[0].lines) == len(WAYS)

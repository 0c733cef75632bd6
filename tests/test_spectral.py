"""What the solvers share, where its notebook does not look: errors, schedules, batches, imports."""

import ast
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from physrep.physics import active_matter, rayleigh_benard, shear_flow, spectral
from physrep.physics.spectral import SimulationBlewUp, check_numbers, run_names, save_frames, schedule

SOLVERS = (shear_flow, rayleigh_benard, active_matter)


@pytest.mark.parametrize("module", (*SOLVERS, spectral), ids=lambda m: m.__name__)
def test_solvers_share_spectral_and_nothing_private(module):
    tree = ast.parse(Path(module.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    own = [node for node in imports if node.level or node.module.startswith("physrep")]
    names = {node.module.split(".")[-1] for node in own if node.module}
    names |= {alias.name for node in own if not node.module for alias in node.names}
    shared = {"randomness", "spectral"} if module in SOLVERS else set()
    own_grid = {"layer"} if module is rayleigh_benard else set()
    assert names == shared | own_grid
    assert not [alias.name for node in own for alias in node.names if alias.name.startswith("_")]


def frames_of(rows, n_frames=3, dead=-1):
    "Frames that hold the numbers of their trajectory and moment; trajectory `dead` dies in frame 1."
    for t in range(n_frames):
        numbers = torch.arange(rows.start, rows.stop)
        frame = (10.0 * numbers + t)[:, None, None, None].expand(-1, 2, 4, 6)
        yield frame, (numbers != dead) | (t < 1), 30.0


def saved(n=5, batch=2, dead=-1, progress=None):
    return save_frames(
        lambda rows: frames_of(rows, dead=dead),
        run_names(list(range(n)), Re=np.linspace(100, 500, n)),
        schedule(0.5, 0.1, 3),
        (2, 4, 6),
        dtype=torch.float32,
        batch=batch,
        blew_up="it grew at t = {moment} with dt = {dt} for {runs}: try {shorter}",
        progress=progress,
    )


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_every_frame_is_where_it_belongs_whatever_the_batch(batch):
    calls = []
    out = saved(batch=batch, progress=lambda done, total: calls.append((done, total)))
    assert out.shape == (5, 3, 2, 4, 6) and out.dtype == np.float32
    assert np.array_equal(out[:, :, 0, 0, 0], 10.0 * np.arange(5)[:, None] + np.arange(3))
    assert calls[-1] == (15, 15) and [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_a_dead_trajectory_is_named_with_a_step_for_the_rate_before():
    with pytest.raises(SimulationBlewUp) as caught:
        saved(dead=3)
    assert str(caught.value) == "it grew at t = 0.5 with dt = 0.1 for Re 400, seed 3: try 0.05"
    assert caught.value.dt == 0.05  # 30 * 0.05 <= 2


def test_at_most_three_dead_trajectories_are_listed():
    alive = torch.zeros(5, dtype=torch.bool)
    with pytest.raises(SimulationBlewUp, match="^a; b; c and 2 more$"):
        spectral.check_alive(alive, "{runs}", runs=list("abcde"), moment=0.0, dt=0.1, rate=0.0)


@pytest.mark.parametrize(
    ("values", "rule", "message"),
    [
        (0.0, "positive and finite", r"Re must be positive and finite, got 0\.0"),
        ([1.0, -0.5], "finite and not negative", r"Re must be finite and not negative, got -0\.5"),
        ([1.0, np.inf], "finite", "Re must be finite, got inf"),
        ([[1.0, 2.0]], "finite", r"one number or one per seed, got shape \(1, 2\) for 2 seeds"),
    ],
)
def test_numbers_that_are_refused(values, rule, message):
    with pytest.raises(ValueError, match=message):
        check_numbers("Re", values, 2, rule)


def test_a_schedule_without_a_pause_starts_at_zero():
    frames = schedule(0.2, 0.05, 3)
    assert frames.skip == 0 and [frames.steps_before(t) for t in range(3)] == [0, 4, 4]
    assert np.array_equal(frames.times, 0.2 * np.arange(3))
    for arguments, message in (
        ((0.2, 0.05, 3, 0.03), "skip must be a multiple of dt"),
        ((0.2, 0.3, 3), "multiple of dt, got 0.2 and 0.3"),
        ((0.2, 0.05, 0), "n_frames must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            schedule(*arguments)


def test_a_worker_can_send_that_a_simulation_blew_up():
    found = pickle.loads(pickle.dumps(SimulationBlewUp("energy grew", 0.0125)))
    assert type(found) is SimulationBlewUp and str(found) == "energy grew" and found.dt == 0.0125

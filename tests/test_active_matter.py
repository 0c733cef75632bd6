"""The active-matter solver where its notebook does not look: arguments, refusal, blow-up, precision, storage, CUDA."""

import numpy as np
import pytest
import torch

from physrep.physics.active_matter import (
    closure,
    core_size,
    growth_rate,
    initial_condition,
    matter_grid,
    simulate,
    smallest_grid,
)
from physrep.physics.spectral import SimulationBlewUp, to_field, to_spectrum

FIELDS = ("concentration", "velocity", "D", "E")
SMALL = {"grid": 32, "n_frames": 3}


def isotropic(n, grid=32):
    "Concentration 1, no order."
    return np.ones((n, grid, grid)), np.broadcast_to(np.eye(2) / 2, (n, grid, grid, 2, 2)).copy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": [-1.0, float("nan")]}, "alpha must be finite, got nan"),
        ({"zeta": -0.5}, r"zeta must be finite and not negative, got -0\.5"),
        ({"zeta": [1.0, float("inf")]}, "zeta must be finite and not negative, got inf"),
        ({"alpha": [1.0, 2.0, 3.0]}, r"alpha must be one number or one per seed, got shape \(3,\) for 2 seeds"),
        ({"seeds": []}, "seeds is empty"),
        ({"grid": 33}, "grid must have even sizes of at least 4, got 33 x 33"),
        ({"grid": 32.5}, "grid must be one int or a pair"),
        ({"store_grid": (16, 15)}, "store_grid must have even sizes"),
        ({"store_grid": 64}, r"store_grid \(64, 64\) is finer than the grid \(32, 32\)"),
        ({"box": (5.0, 0.0)}, r"box must have positive lengths, got \(5\.0, 0\.0\)"),
        ({"dt": 0.06}, r"frame_dt must be a multiple of dt, got 0\.25 and 0\.06; the next dt that fits is 0\.05"),
        ({"dt": -0.1}, r"frame_dt and dt must be positive, got 0\.25 and -0\.1"),
        ({"n_frames": 0}, "n_frames must be at least 1, got 0"),
        ({"skip": 0.03}, r"skip must be a multiple of dt and not negative, got 0\.03 and 0\.05"),
        ({"skip": -0.5}, r"skip must be a multiple of dt and not negative, got -0\.5"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64, got torch.float16"),
        (
            {"initial": isotropic(1)},
            r"initial must be \(concentration, D\) of shapes \(2, 32, 32\) and .*, got \(1, 32, 32\)",
        ),
        (
            {"initial": (np.full((2, 32, 32), 1.5), isotropic(2)[1])},
            r"symmetric D with trace c, got differences up to 0\.0e\+00 and 5\.0e-01",
        ),
        (
            {"initial": (isotropic(2)[0], isotropic(2)[1] + [[0, 0.1], [0, 0]])},
            r"symmetric D with trace c, got differences up to 1\.0e-01",
        ),
        (
            {"initial": (isotropic(2)[0], isotropic(2)[1] + [[0.6, 0], [0, -0.6]])},
            r"c > 0 and \|f\| <= c at every point, got c = 1 and \|f\| / c = 1\.2",
        ),
        ({"initial": (-isotropic(2)[0], -isotropic(2)[1])}, r"c > 0 .* got c = -1"),
    ],
)
def test_bad_arguments_name_the_value(change, message):
    arguments = {"alpha": [-1.0, -2.0], "zeta": 1.0, "seeds": [0, 1], **SMALL, **change}
    with pytest.raises(ValueError, match=message):
        simulate(**arguments)


@pytest.mark.parametrize(
    ("alpha", "zeta", "grid", "length", "accepted"),
    [
        (-1, 5, 64, 5, True),
        (-5, 5, 64, 5, True),
        (-5, 5, 48, 5, True),
        (-1, 3, 64, 10, False),
        (-5, 3, 64, 10, False),
        (-1, 1, 64, 10, True),
        (-5, 17, 256, 10, True),
        (-5, 17, 48, 5, False),
    ],
)
def test_what_a_grid_cannot_resolve_is_refused(alpha, zeta, grid, length, accepted):
    run = {"alpha": alpha, "zeta": zeta, "seeds": [0], "grid": grid, "box": (length, length), "n_frames": 1}
    if accepted:
        simulate(**run)
    else:
        needed = smallest_grid(alpha, zeta, length)
        with pytest.raises(
            ValueError,
            match=f"alpha {alpha}, zeta {zeta} is refused on {grid} x {grid} points .* "
            f"Take a grid of {needed}, or a smaller box",
        ):
            simulate(**run)
        simulate(**{**run, "grid": needed})


def test_a_refusal_comes_before_any_work_and_names_the_pair():
    with pytest.raises(ValueError, match="alpha -2, zeta 40 is refused"):
        simulate([-1.0] * 10**5 + [-2.0], [1.0] * 10**5 + [40.0], range(10**5 + 1))


def test_the_coarser_direction_decides():
    simulate(-1.0, 1.0, [0], grid=(32, 48), n_frames=1)
    with pytest.raises(ValueError, match="is refused on 16 x 48 points"):
        simulate(-1.0, 1.0, [0], grid=(16, 48), n_frames=1)


def test_disorder_that_is_stable_needs_no_grid():
    assert growth_rate(5.0, 0.1) < 0 and core_size(5.0, 0.1) > 1e100
    out = simulate(5.0, 0.1, [0], grid=16, n_frames=9)
    assert np.abs(out["D"][:, -1, ..., 0, 1]).max() < 0.3 * np.abs(out["D"][:, 0, ..., 0, 1]).max()


def test_blow_up_names_run_time_and_a_step_that_works():
    run = {"alpha": [-1.0, -40.0], "zeta": [1.0, 0.5], "seeds": [3, 71], "frame_dt": 0.5, "n_frames": 8}
    with pytest.raises(
        SimulationBlewUp, match=r"t = \d.* with dt = 0\.25 for .*alpha -40, zeta 0\.5, seed 71"
    ) as caught:
        simulate(**run, dt=0.25, grid=64)
    assert f"try dt = {caught.value.dt:g}" in str(caught.value)
    assert 0.25 / caught.value.dt == 2 ** round(np.log2(0.25 / caught.value.dt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_shapes_and_first_frame(dtype):
    out = simulate([-1.0, -2.0], 2.0, [0, 1], grid=(48, 32), box=(5.0, 4.0), n_frames=2, dtype=dtype)
    assert all(out[name].dtype == np.dtype(str(dtype).removeprefix("torch.")) for name in FIELDS)
    assert out["concentration"].shape == (2, 2, 48, 32) and out["velocity"].shape == (2, 2, 48, 32, 2)
    assert out["D"].shape == out["E"].shape == (2, 2, 48, 32, 2, 2)
    assert np.allclose(out["time"], [0, 0.25])
    c, a, b = (
        to_field(initial_condition([0, 1], matter_grid((48, 32), (5.0, 4.0))), (48, 32)).numpy().transpose(1, 0, 2, 3)
    )
    assert np.allclose(out["concentration"][:, 0], c, atol=1e-6)
    assert np.allclose(out["D"][:, 0, ..., 0, 0] - out["D"][:, 0, ..., 1, 1], a, atol=1e-6) and np.allclose(
        2 * out["D"][:, 0, ..., 0, 1], b, atol=1e-6
    )


def test_closure_is_monotone_and_ends_where_it_must():
    g, torque = closure(torch.linspace(0, 1, 5001, dtype=torch.float64))
    assert (g.diff() > 0).all() and (torque.diff() < 0).all() and g[-1] == 1 and torque[-1] == 0


def test_isotropic_rods_stay_isotropic_and_aligned_rods_relax_to_the_uniform_order():
    out = simulate(-2.0, 2.0, [0], initial=isotropic(1), **SMALL)
    assert np.allclose(out["D"], np.eye(2) / 2) and not out["velocity"].any()
    c, d = isotropic(1)
    finish = []
    for start in (0.2, 0.98):
        out = simulate(
            -2.0,
            2.0,
            [0],
            initial=(c, d + np.diag([start, -start]) / 2),
            grid=32,
            n_frames=2,
            frame_dt=5.0,
            dtype=torch.float64,
        )
        assert np.ptp(out["D"], axis=(2, 3)).max() < 1e-10 and np.abs(out["velocity"]).max() < 1e-10
        finish.append(out["D"][0, 1, 0, 0, 0, 0] - out["D"][0, 1, 0, 0, 1, 1])
    # zeta (1 - q g) = 4 d_R
    assert abs(finish[0] - finish[1]) < 1e-9
    assert abs(2.0 * float(closure(torch.tensor(finish[0] ** 2).double())[1]) - 0.2) < 1e-5


def test_skip_moves_the_first_frame():
    run = {"alpha": -3.0, "zeta": 1.0, "seeds": [4], "grid": 32}
    whole, late = simulate(**run, n_frames=5), simulate(**run, n_frames=3, skip=0.5)
    assert np.allclose(late["time"], whole["time"][2:])
    assert all(np.array_equal(late[name], whole[name][:, 2:]) for name in FIELDS)


def test_a_frame_does_not_depend_on_the_frames_before_it():
    run = {"alpha": -3.0, "zeta": 1.0, "seeds": [4], "grid": 32}
    often, seldom = simulate(**run, n_frames=5), simulate(**run, n_frames=2, frame_dt=1.0)
    assert all(np.array_equal(often[name][:, 4], seldom[name][:, 1]) for name in FIELDS)


def test_store_grid_is_a_low_pass_filter():
    run = {"alpha": [-4.0], "zeta": [1.0], "seeds": [5], "n_frames": 3, "grid": 48, "dtype": torch.float64}
    full, stored = simulate(**run), simulate(**run, store_grid=(16, 24))
    waves = np.abs(np.fft.fftfreq(48, 1 / 48))[:, None] < 7.5, np.fft.rfftfreq(48, 1 / 48)[None, :] < 11.5
    low = torch.from_numpy(waves[0] & waves[1])
    for name in FIELDS:
        components = np.moveaxis(full[name].reshape(1, 3, 48, 48, -1), -1, 0).copy()
        expected = to_field(to_spectrum(torch.from_numpy(components)) * low, (48, 48)).numpy()[..., ::3, ::2]
        assert np.allclose(np.moveaxis(stored[name].reshape(1, 3, 16, 24, -1), -1, 0), expected, atol=1e-13)


def test_what_is_stored_is_the_second_moment_of_rods():
    out = simulate(-5.0, 5.0, [100, 101], n_frames=3, skip=1.5, store_grid=32)
    assert np.linalg.eigvalsh(out["D"]).min() > 0
    assert np.allclose(np.trace(out["D"], axis1=-2, axis2=-1), out["concentration"], atol=1e-6)


@pytest.mark.parametrize("grid", [32, (36, 40), (48, 64)])
def test_batches_do_not_change_a_bit(grid):
    run = {"alpha": [-1.0, -2.0, -5.0, -3.0, 0.0], "zeta": [1.0, 1.5, 0.5, 1.2, 1.0], "seeds": [5, 6, 7, 8, 9]}
    settings = {"grid": grid, "n_frames": 2, "store_grid": 16}
    whole = simulate(**run, **settings, batch=5)
    order = [3, 1, 4, 0, 2]
    shuffled = simulate(**{name: [values[i] for i in order] for name, values in run.items()}, **settings, batch=2)
    for name in FIELDS:
        assert np.array_equal(shuffled[name], whole[name][order])


def test_threads_do_not_change_a_bit():
    run = {"alpha": -3.0, "zeta": 2.0, "seeds": range(8), "n_frames": 2, "frame_dt": 0.1}
    one = simulate(**run)
    torch.set_num_threads(2)
    assert all(np.array_equal(one[name], values) for name, values in simulate(**run).items())


def test_progress_counts_every_frame():
    seen = []
    simulate(-1.0, 1.0, range(3), **SMALL, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
def test_cuda_agrees_with_cpu(dtype, tolerance):
    run = {"alpha": [-1.0, -5.0], "zeta": [1.0, 3.5], "seeds": [0, 1], "n_frames": 6, "dtype": dtype}
    cpu, cuda = simulate(**run), simulate(**run, device="cuda")
    for name in FIELDS:
        assert np.abs(cpu[name] - cuda[name]).max() < tolerance

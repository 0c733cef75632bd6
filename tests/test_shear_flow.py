"""The shear-flow solver where its notebook does not look: arguments, blow-up, precision, storage, batches, CUDA."""

import numpy as np
import pytest
import torch

from physrep.physics.shear_flow import simulate
from physrep.physics.spectral import SimulationBlewUp, spectral_grid, suggest_dt, to_field, to_spectrum

FIELDS = ("tracer", "pressure", "velocity")
SMALL = {"grid": 32, "n_frames": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reynolds": 0.0}, r"reynolds must be positive and finite, got 0\.0"),
        ({"schmidt": [1.0, -2.0]}, r"schmidt must be positive and finite, got -2\.0"),
        ({"schmidt": [1.0, float("nan")]}, "schmidt must be positive and finite, got nan"),
        ({"reynolds": [1.0, 2.0, 3.0]}, r"reynolds must be one number or one per seed, got shape \(3,\) for 2 seeds"),
        ({"seeds": []}, "seeds is empty"),
        ({"grid": 33}, "grid must have even sizes of at least 4, got 33 x 33"),
        ({"grid": (32, 2)}, "grid must have even sizes of at least 4, got 32 x 2"),
        ({"grid": 32.5}, "grid must be one int or a pair"),
        ({"store_grid": (16, 15)}, "store_grid must have even sizes"),
        ({"store_grid": 64}, r"store_grid \(64, 64\) is finer than the grid \(32, 32\)"),
        ({"box": (1.0, 0.0)}, r"box must have positive lengths, got \(1\.0, 0\.0\)"),
        ({"dt": 0.03}, r"frame_dt must be a multiple of dt, got 0\.2 and 0\.03; the next dt that fits is 0\.0285714"),
        ({"dt": 0.4}, "frame_dt must be a multiple of dt"),
        ({"dt": -0.1}, r"frame_dt and dt must be positive, got 0\.2 and -0\.1"),
        ({"n_frames": 0}, "n_frames must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64, got torch.float16"),
        (
            {"initial": (np.zeros((2, 32, 32)), np.zeros((1, 32, 32)))},
            r"initial must be .* shape \(2, 32, 32\) each, got .*\(1, 32, 32\)",
        ),
        (
            {"initial": (np.zeros((2, 32, 32)), np.stack([np.zeros((32, 32)), np.full((32, 32), np.nan)]))},
            "initial must be finite, .* of trajectory 1 is not",
        ),
    ],
)
def test_bad_arguments_name_the_value(change, message):
    arguments = {"reynolds": [400.0, 800.0], "schmidt": 1.0, "seeds": [0, 1], **SMALL, **change}
    with pytest.raises(ValueError, match=message):
        simulate(**arguments)


def test_blow_up_names_run_time_and_a_step_that_works():
    run = {"reynolds": [100.0, 50000.0], "schmidt": [1.0, 0.7], "seeds": [3, 71], "frame_dt": 0.4, "n_frames": 12}
    with pytest.raises(
        SimulationBlewUp, match=r"t = \d.* with dt = 0\.2 for .*Reynolds 50000, Schmidt 0\.7, seed 71"
    ) as caught:
        simulate(**run, dt=0.2)
    assert f"try dt = {caught.value.dt:g}" in str(caught.value)
    assert 0.2 / caught.value.dt == 2 ** round(np.log2(0.2 / caught.value.dt))
    assert np.isfinite(simulate(**run, dt=caught.value.dt)["pressure"]).all()


def test_suggested_step_is_the_longest_below_the_limit():
    for dt, rate in ((0.1, 100.0), (0.1, 1000.0), (0.025, 10.0)):
        shorter = suggest_dt(dt, rate)
        assert shorter * rate <= 2
        assert shorter == dt / 2 or 2 * shorter * rate > 2
    assert suggest_dt(0.1, 0.0) == 0.05


def test_a_fluid_at_rest_and_a_uniform_tracer_are_no_blow_up():
    out = simulate(1000.0, 1.0, [0], initial=(np.zeros((1, 32, 32)), np.full((1, 32, 32), 3.0)), **SMALL)
    assert np.allclose(out["tracer"], 3.0) and not out["velocity"].any() and not out["pressure"].any()
    shear = np.broadcast_to(np.sin(2 * np.pi * np.arange(32) / 32), (1, 32, 32)).copy()
    assert np.allclose(
        simulate(1000.0, 1.0, [0], initial=(shear, np.ones_like(shear)), **SMALL)["tracer"], 1.0, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_shapes_and_first_frame(dtype):
    out = simulate([400.0, 800.0], 2.0, [0, 1], grid=(32, 48), box=(1.0, 2.0), n_frames=2, dtype=dtype)
    assert all(out[name].dtype == np.dtype(str(dtype).removeprefix("torch.")) for name in FIELDS)
    assert out["tracer"].shape == out["pressure"].shape == (2, 2, 32, 48) and out["velocity"].shape == (2, 2, 32, 48, 2)
    assert np.allclose(out["time"], [0, 0.2])
    assert np.allclose(out["tracer"][:, 0], out["velocity"][:, 0, ..., 0], atol=1e-6)  # the tracer starts as u


def test_a_layer_without_waves_only_diffuses():
    y = 2 * np.arange(48) / 48
    wave = np.broadcast_to(np.cos(np.pi * 3 * y), (1, 32, 48)).copy()
    out = simulate(50.0, 0.5, [0], grid=(32, 48), box=(1.0, 2.0), initial=(wave, wave), n_frames=4, dtype=torch.float64)
    decay = np.exp(-((np.pi * 3) ** 2) * out["time"] / 25)
    assert np.allclose(out["tracer"][0], decay[:, None, None] * wave, atol=1e-13)


def test_store_grid_is_a_low_pass_filter():
    run = {"reynolds": [400.0], "schmidt": [1.0], "seeds": [5], "n_frames": 4, "grid": 64, "dtype": torch.float64}
    full, stored = simulate(**run), simulate(**run, store_grid=(16, 32))
    g = spectral_grid(64)
    low = (g.kx.abs() < 2 * np.pi * 7.5) & (g.ky < 2 * np.pi * 15.5)
    for name in ("tracer", "pressure"):
        expected = to_field(to_spectrum(torch.from_numpy(full[name])) * low, (64, 64)).numpy()[..., ::4, ::2]
        assert np.allclose(stored[name], expected, atol=1e-13)
    for c in range(2):
        spectrum = to_spectrum(torch.from_numpy(full["velocity"][..., c].copy()))
        assert np.allclose(
            stored["velocity"][..., c], to_field(spectrum * low, (64, 64)).numpy()[..., ::4, ::2], atol=1e-13
        )


@pytest.mark.parametrize("grid", [32, (20, 28), (48, 64)])
def test_batches_do_not_change_a_bit(grid):
    run = {
        "reynolds": [300.0, 900.0, 2000.0, 500.0, 700.0],
        "schmidt": [1.0, 2.0, 0.3, 4.0, 1.0],
        "seeds": [5, 6, 7, 8, 9],
    }
    settings = {"grid": grid, "n_frames": 2, "store_grid": 16}
    whole = simulate(**run, **settings, batch=5)
    order = [3, 1, 4, 0, 2]
    shuffled = simulate(**{name: [values[i] for i in order] for name, values in run.items()}, **settings, batch=2)
    for name in FIELDS:
        assert np.array_equal(shuffled[name], whole[name][order])


def test_threads_change_rounding_only():
    "Some FFT libraries split their work by threads: with another number of them the last bits may differ."
    run = {"reynolds": 1000.0, "schmidt": 1.0, "seeds": range(8), "grid": 64, "n_frames": 3}
    one = simulate(**run)
    torch.set_num_threads(2)
    two, again = simulate(**run), simulate(**run)
    for name in FIELDS:
        assert np.array_equal(two[name], again[name])
        assert np.abs(two[name] - one[name]).max() < 2e-6, name


def test_progress_counts_every_frame():
    seen = []
    simulate(1000.0, 1.0, range(3), **SMALL, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
def test_cuda_agrees_with_cpu(dtype, tolerance):
    run = {
        "reynolds": [400.0, 1600.0],
        "schmidt": [1.0, 0.5],
        "seeds": [0, 1],
        "grid": 64,
        "n_frames": 6,
        "dtype": dtype,
    }
    cpu, cuda = simulate(**run), simulate(**run, device="cuda")
    for name in FIELDS:
        assert np.abs(cpu[name] - cuda[name]).max() < tolerance

"""The convection solver where its notebook does not look: arguments, blow-up, precision, storage, batches, CUDA."""

import numpy as np
import pytest
import torch

from physrep.physics.layer import interpolation, layer_grid, legendre_nodes, vertical_points
from physrep.physics.rayleigh_benard import simulate
from physrep.physics.spectral import SimulationBlewUp
from physrep.physics.systems import SYSTEMS

FIELDS = ("buoyancy", "pressure", "velocity")
SMALL = {"grid": (32, 24), "n_frames": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rayleigh": 0.0}, r"rayleigh must be positive and finite, got 0\.0"),
        ({"prandtl": [1.0, -2.0]}, r"prandtl must be positive and finite, got -2\.0"),
        ({"prandtl": [1.0, float("nan")]}, "prandtl must be positive and finite, got nan"),
        ({"rayleigh": [1.0, 2.0, 3.0]}, r"rayleigh must be one number or one per seed, got shape \(3,\) for 2 seeds"),
        ({"seeds": []}, "seeds is empty"),
        (
            {"rayleigh": [1e4, 1e7]},
            r"grid 32 x 24 is too coarse for Rayleigh 1e\+07, Prandtl 1: .* use \d.* times as many points",
        ),
        ({"rayleigh": 1e5, "prandtl": 0.01}, r"grid 32 x 24 is too coarse for Rayleigh 100000, Prandtl 0\.01"),
        ({"grid": (32, 23)}, "grid must have even sizes of at least 4, got 32 x 23"),
        ({"grid": (32, 2)}, "grid must have even sizes of at least 4, got 32 x 2"),
        ({"grid": 32.5}, "grid must be one int or a pair"),
        ({"store_grid": (16, 15)}, "store_grid must have even sizes"),
        ({"store_grid": 32}, r"store_grid \(32, 32\) is finer than the grid \(32, 24\)"),
        ({"store_nodes": "lobatto"}, "store_nodes must be uniform, chebyshev or legendre, got 'lobatto'"),
        ({"box": (0.0, 1.0)}, r"box must be \(Lx, 1\.0\) with Lx > 0, .* got \(0\.0, 1\.0\)"),
        ({"box": (2.0, 2.0)}, r"box must be .* because the height is the unit of length, got \(2\.0, 2\.0\)"),
        ({"dt": 0.03}, r"frame_dt must be a multiple of dt, got 0\.5 and 0\.03"),
        ({"dt": -0.1}, r"frame_dt and dt must be positive, got 0\.5 and -0\.1"),
        ({"n_frames": 0}, "n_frames must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64, got torch.float16"),
        (
            {"initial": (np.zeros((2, 32, 24)), np.zeros((1, 32, 24)))},
            r"initial must be .* shape \(2, 32, 24\) each, got .*\(1, 32, 24\)",
        ),
    ],
)
def test_bad_arguments_name_the_value(change, message):
    arguments = {"rayleigh": [1e4, 2e4], "prandtl": 1.0, "seeds": [0, 1], **SMALL, **change}
    with pytest.raises(ValueError, match=message):
        simulate(**arguments)


def test_blow_up_names_run_time_and_a_step_that_works():
    run = {
        "rayleigh": [1e4, 1e6],
        "prandtl": [1.0, 0.7],
        "seeds": [3, 71],
        "grid": (64, 40),
        "n_frames": 7,
        "store_grid": 32,
    }
    with pytest.raises(
        SimulationBlewUp, match=r"t = \d.* with dt = 0\.1 for Rayleigh 1e\+06, Prandtl 0\.7, seed 71\. It cannot"
    ) as caught:
        simulate(**run, dt=0.1)
    assert f"try dt = {caught.value.dt:g}" in str(caught.value)
    assert 0.1 / caught.value.dt == 2 ** round(np.log2(0.1 / caught.value.dt))
    dt = caught.value.dt
    for _ in range(
        3
    ):  # the suggestion is from the flow until the last healthy frame: a run that speeds up may need another halving
        try:
            out = simulate(**run, dt=dt)
            break
        except SimulationBlewUp as again:
            assert again.dt < dt
            dt = again.dt
    assert np.isfinite(out["pressure"]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_dtype_and_contract(dtype):
    out = simulate([1e4, 2e4], 2.0, [0, 1], **SMALL, store_grid=(16, 20), dtype=dtype)
    assert [f.name for f in SYSTEMS["rayleigh_benard"].fields] == list(FIELDS) and list(out) == [*FIELDS, "time"]
    assert all(out[name].dtype == np.dtype(str(dtype).removeprefix("torch.")) for name in FIELDS)
    assert out["buoyancy"].shape == out["pressure"].shape == (2, 2, 16, 20) and out["velocity"].shape == (
        2,
        2,
        16,
        20,
        2,
    )
    assert np.allclose(out["time"], [0, 0.5])
    assert not out["velocity"][:, 0].any() and out["velocity"][:, 1].any()
    assert (
        out["buoyancy"][:, 0, :, 0].mean() > 0.9 and out["buoyancy"][:, 0, :, -1].mean() < 0.1
    )  # warm below: y is the last axis


def test_conduction_stays_at_rest_with_its_pressure():
    y = legendre_nodes(24)[0]
    still = np.zeros((1, 32, 24))
    out = simulate(1e5, 1.0, [0], initial=(still, still + 1 - y), dtype=torch.float64, store_nodes="legendre", **SMALL)
    assert np.abs(out["velocity"]).max() < 1e-12
    assert np.allclose(out["buoyancy"], 1 - y, atol=1e-13)
    assert np.allclose(out["pressure"], y - y**2 / 2 - 1 / 3, atol=1e-12)


def test_a_mean_flow_decays_as_it_must():
    "Two channel modes at once: u = sin(pi y) + sin(2 pi y), no heat but conduction; the second has no flux."
    y = legendre_nodes(24)[0]
    nu = (1e3 / 4.0) ** -0.5
    vorticity = np.broadcast_to(-np.pi * np.cos(np.pi * y) - 2 * np.pi * np.cos(2 * np.pi * y), (1, 32, 24)).copy()
    out = simulate(
        1e3,
        4.0,
        [0],
        initial=(vorticity, 0 * vorticity + 1 - y),
        grid=(32, 24),
        n_frames=4,
        dtype=torch.float64,
        store_nodes="legendre",
    )
    expected = [
        np.sin(np.pi * y) * np.exp(-nu * np.pi**2 * t) + np.sin(2 * np.pi * y) * np.exp(-4 * nu * np.pi**2 * t)
        for t in out["time"]
    ]
    assert np.abs(out["velocity"][0, ..., 0] - np.array(expected)[:, None]).max() < 1e-4
    assert np.abs(out["velocity"][0, ..., 1]).max() < 1e-12


def test_stored_points_are_those_of_one_solution():
    "A coarser x is a truncated sum of waves; other heights are values of the same polynomial."
    run = {"rayleigh": [2e4], "prandtl": [1.0], "seeds": [5], "n_frames": 3, "grid": (32, 24), "dtype": torch.float64}
    full = simulate(**run, store_nodes="legendre")
    low = torch.arange(17)[:, None] < 8
    for kind, shape in (("uniform", (16, 12)), ("chebyshev", (16, 24)), ("legendre", (16, 10))):
        out = simulate(**run, store_grid=shape, store_nodes=kind)
        matrix = interpolation(legendre_nodes(24)[0], vertical_points(shape[1], kind)).T
        pairs = [(full[name], out[name]) for name in ("buoyancy", "pressure")]
        pairs += [(full["velocity"][..., c], out["velocity"][..., c]) for c in range(2)]
        for whole, stored in pairs:
            spectrum = torch.fft.rfft(torch.from_numpy(whole.copy()), dim=2) * low
            assert np.allclose(stored, torch.fft.irfft(spectrum, n=32, dim=2).numpy()[:, :, ::2] @ matrix, atol=1e-12)


def test_the_initial_condition_does_not_depend_on_the_grid():
    run = {"rayleigh": 1e4, "prandtl": 1.0, "seeds": [1, 2], "n_frames": 1, "store_grid": 24, "dtype": torch.float64}
    coarse, fine = simulate(**run, grid=(32, 24)), simulate(**run, grid=(64, 40))
    assert np.abs(coarse["buoyancy"] - fine["buoyancy"]).max() < 1e-12
    assert np.abs(coarse["pressure"] - fine["pressure"]).max() < 1e-10


@pytest.mark.parametrize("grid", [(32, 24), (40, 28), (48, 64), (72, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_do_not_change_a_bit(grid, dtype):
    run = {"rayleigh": [3e3, 9e3, 2e4, 5e4, 7e3], "prandtl": [1.0, 2.0, 0.7, 4.0, 1.0], "seeds": [5, 6, 7, 8, 9]}
    settings = {"grid": grid, "n_frames": 2, "store_grid": 16, "frame_dt": 0.2, "dtype": dtype}
    whole = simulate(**run, **settings, batch=5)
    order = [3, 1, 4, 0, 2]
    for batch in (1, 2):
        shuffled = simulate(
            **{name: [values[i] for i in order] for name, values in run.items()}, **settings, batch=batch
        )
        for name in FIELDS:
            assert np.array_equal(shuffled[name], whole[name][order])


def test_threads_change_only_rounding():
    run = {
        "rayleigh": 1e5,
        "prandtl": 1.0,
        "seeds": range(16),
        "frame_dt": 0.0125,
        "n_frames": 2,
        "dtype": torch.float64,
    }
    one = simulate(**run)
    torch.set_num_threads(2)
    assert all(np.abs(one[name] - values).max() < 1e-13 for name, values in simulate(**run).items())


def test_progress_counts_every_frame():
    seen = []
    simulate(
        1e4,
        1.0,
        range(3),
        grid=(32, 24),
        n_frames=3,
        dt=0.05,
        batch=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 9), (4, 9), (6, 9), (7, 9), (8, 9), (9, 9)]


def test_many_nodes_stay_accurate():
    y, weight, D = legendre_nodes(128)
    assert abs(weight.sum() - 1) < 1e-13 and np.abs(y + y[::-1] - 1).max() < 1e-15
    assert np.abs(D @ np.sin(9 * y) - 9 * np.cos(9 * y)).max() < 1e-9
    assert (
        np.abs(
            interpolation(y, vertical_points(100, "uniform")) @ np.sin(9 * y)
            - np.sin(9 * vertical_points(100, "uniform"))
        ).max()
        < 1e-12
    )
    g = layer_grid((32, 128))
    assert np.abs(g.eigenvalues[:60] / (np.pi * np.arange(1, 61)) ** 2 - 1).max() < 1e-8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
def test_cuda_agrees_with_cpu(dtype, tolerance):
    run = {"rayleigh": [1e4, 1e5], "prandtl": [1.0, 0.5], "seeds": [0, 1], "n_frames": 5, "dtype": dtype}
    cpu, cuda = simulate(**run), simulate(**run, device="cuda")
    for name in FIELDS:
        assert np.abs(cpu[name] - cuda[name]).max() < tolerance

"""The three solvers where their notebooks do not look: arguments, blow-up, precision, storage, odd grids."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from physrep.physics import active_matter, rayleigh_benard, shear_flow
from physrep.physics.active_matter import closure, matter_grid, smallest_grid
from physrep.physics.layer import interpolation, layer_grid, legendre_nodes, vertical_points
from physrep.physics.spectral import SimulationBlewUp, run_names, save_frames, schedule, spectral_grid
from physrep.physics.systems import SYSTEMS


@dataclass(frozen=True)
class Solver:
    "A solver, and a small run of it."

    simulate: Callable[..., dict[str, np.ndarray]]
    names: tuple[str, str]  # of the parameters
    values: tuple[float, float]  # that a small grid resolves
    grid: tuple[int, int]
    odd: tuple[int, int]  # a grid whose sizes are no powers of two

    def run(self, n: int = 2, **options) -> dict[str, np.ndarray]:
        given = dict(zip(self.names, self.values)) | dict(seeds=range(n), grid=self.grid, n_frames=3)
        return self.simulate(**given | options)


SOLVERS = {
    "shear_flow": Solver(shear_flow.simulate, ("reynolds", "schmidt"), (400.0, 2.0), (32, 32), (20, 28)),
    "rayleigh_benard": Solver(rayleigh_benard.simulate, ("rayleigh", "prandtl"), (1e4, 1.0), (32, 24), (40, 28)),
    "active_matter": Solver(active_matter.simulate, ("alpha", "zeta"), (-2.0, 1.0), (32, 32), (36, 40)),
}
each = pytest.mark.parametrize("name", SOLVERS)
NAN, ONE = float("nan"), np.ones((1, 32, 32))
ISOTROPIC = ONE[..., None, None] * np.eye(2) / 2


def fields(out: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [values for name, values in out.items() if name != "time"]


@each
@pytest.mark.parametrize(
    "change, message",
    [
        ({"seeds": []}, "seeds is empty"),
        ({"grid": (33, 32)}, "grid must have even sizes of at least 4, got 33 x 32"),
        ({"grid": 32.5}, "grid must be one int or a pair"),
        ({"store_grid": (16, 15)}, "store_grid must have even sizes"),
        ({"store_grid": 64}, "store_grid (64, 64) is finer than the grid"),
        ({"box": (0.0, 1.0)}, "box must"),
        ({"dt": 0.3}, "frame_dt must be a multiple of dt"),
        ({"dt": -0.1}, "frame_dt and dt must be positive"),
        ({"n_frames": 0}, "n_frames must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"dtype": torch.float16}, "dtype must be torch.float32 or torch.float64"),
        ({"family": "shiftd"}, "unknown family of initial conditions 'shiftd'; valid: standard, shifted"),
        ({"initial": (np.zeros((2, 8, 8)), np.zeros((1, 8, 8)))}, "initial must be"),
    ],
)
def test_bad_arguments_name_the_value(name, change, message):
    with pytest.raises(ValueError) as caught:
        SOLVERS[name].run(**change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("shear_flow", {"reynolds": 0.0}, "reynolds must be positive and finite, got 0.0"),
        ("shear_flow", {"schmidt": [1.0, NAN]}, "schmidt must be positive and finite, got nan"),
        ("shear_flow", {"reynolds": [1.0, 2.0, 3.0]}, "one number or one per seed, got shape (3,) for 2 seeds"),
        ("shear_flow", {"seeds": [0], "initial": (ONE, NAN * ONE)}, "tracer of trajectory 0 is not"),
        ("rayleigh_benard", {"rayleigh": [1e4, 1e7]}, "grid 32 x 24 is too coarse for Rayleigh 1e+07, Prandtl 1"),
        ("rayleigh_benard", {"store_nodes": "lobatto"}, "store_nodes must be uniform, chebyshev or legendre"),
        ("rayleigh_benard", {"box": (2.0, 2.0)}, "the height is the unit of length"),
        ("active_matter", {"zeta": -0.5}, "zeta must be finite and not negative, got -0.5"),
        ("active_matter", {"skip": 0.03}, "skip must be a multiple of dt and not negative, got 0.03"),
        ("active_matter", {"seeds": [0], "initial": (1.5 * ONE, ISOTROPIC)}, "symmetric D with trace c"),
        ("active_matter", {"seeds": [0], "initial": (-ONE, -ISOTROPIC)}, "c > 0 and |f| <= c, got c = -1"),
        ("active_matter", {"zeta": [1.0, 40.0]}, "alpha -2, zeta 40 is refused on 32 x 32 points"),
        ("active_matter", {"grid": (16, 48)}, "is refused on 16 x 48 points"),
    ],
)
def test_bad_arguments_of_one_solver(name, change, message):
    with pytest.raises(ValueError) as caught:
        SOLVERS[name].run(**change)
    assert message in str(caught.value)


def test_the_grid_that_a_refusal_names_is_accepted():
    run = dict(alpha=-5.0, zeta=17.0, box=(5.0, 5.0), n_frames=1)
    with pytest.raises(ValueError, match=f"Take a grid of {smallest_grid(-5.0, 17.0, 5.0)},"):
        SOLVERS["active_matter"].run(**run, grid=48)
    SOLVERS["active_matter"].run(**run, grid=smallest_grid(-5.0, 17.0, 5.0))
    assert SOLVERS["active_matter"].run(alpha=5.0, zeta=0.1, grid=16), "disorder that is stable needs no grid"


@pytest.mark.parametrize(
    "name, run, dt, named",
    [
        ("shear_flow", dict(reynolds=[100.0, 50000.0], frame_dt=0.4), 0.2, "Reynolds 50000, Schmidt 2, seed 71"),
        ("rayleigh_benard", dict(rayleigh=[1e4, 1e6], frame_dt=0.5), 0.1, r"Rayleigh 1e\+06, Prandtl 1, seed 71"),
        ("active_matter", dict(alpha=[-1.0, -5.0], zeta=[1.0, 4.0]), 0.25, "alpha -5, zeta 4, seed 71"),
    ],
)
def test_blow_up_names_run_time_and_a_step_that_works(name, run, dt, named):
    run = run | dict(seeds=[3, 71], grid=64, n_frames=12)
    with pytest.raises(SimulationBlewUp, match=rf"t = \d.* with dt = {dt:g} for .*{named}.*try dt = ") as caught:
        SOLVERS[name].run(**run, dt=dt)
    shorter = caught.value.dt
    assert f"try dt = {shorter:g}" in str(caught.value) and dt / shorter == 2 ** round(np.log2(dt / shorter))
    try:
        SOLVERS[name].run(**run, dt=shorter)
    except SimulationBlewUp as again:  # a flow that speeds up after its last healthy frame needs another halving
        SOLVERS[name].run(**run, dt=again.dt)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_dtypes_and_times(name, dtype):
    out = SOLVERS[name].run(dtype=dtype, store_grid=(16, 20), frame_dt=0.5)
    assert list(out) == [*(f.name for f in SYSTEMS[name].fields), "time"]
    assert np.allclose(out["time"], [0, 0.5, 1.0])
    for field, values in zip(SYSTEMS[name].fields, fields(out)):
        assert values.shape == (2, 3, 16, 20) + (2,) * field.rank
        assert values.dtype == np.dtype(str(dtype).removeprefix("torch."))


@each
def test_batches_do_not_change_a_bit(name):
    "Nor does the place of a trajectory in a batch, on grids for which FFT and matrix products have odd sizes."
    solver, order = SOLVERS[name], [3, 1, 4, 0, 2]
    values = [[v * (1 + 0.1 * i) for i in range(5)] for v in solver.values]
    settings = dict(grid=solver.odd, n_frames=2, store_grid=16, frame_dt=0.2)
    whole = solver.run(**dict(zip(solver.names, values)), seeds=range(5), batch=5, **settings)
    mixed = {a: [v[i] for i in order] for a, v in zip(solver.names, values)}
    for batch in (1, 2):
        parts = solver.run(**mixed, seeds=order, batch=batch, **settings)
        assert all(np.array_equal(a, b[order]) for a, b in zip(fields(parts), fields(whole)))


@each
def test_threads_change_rounding_only(name):
    one = SOLVERS[name].run(8, grid=64, n_frames=2)
    torch.set_num_threads(2)
    two, again = (SOLVERS[name].run(8, grid=64, n_frames=2) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(fields(two), fields(again)))
    assert all(np.abs(a - b).max() < 2e-6 * max(1, np.abs(a).max()) for a, b in zip(fields(one), fields(two)))


@pytest.mark.parametrize("name", ["shear_flow", "active_matter"])
def test_store_grid_is_a_low_pass_filter(name):
    run = dict(grid=48, dtype=torch.float64)
    full, stored = SOLVERS[name].run(1, **run), SOLVERS[name].run(1, store_grid=(16, 24), **run)
    kept = (np.abs(np.fft.fftfreq(48, 1 / 48)) < 7.5)[:, None] & (np.fft.rfftfreq(48, 1 / 48) < 11.5)
    for a, b in zip(fields(full), fields(stored)):
        a, b = (np.moveaxis(f.reshape(*f.shape[:4], -1), -1, 2) for f in (a, b))
        assert np.allclose(np.fft.irfft2(np.fft.rfft2(a) * kept, (48, 48))[..., ::3, ::2], b, atol=1e-13)


def test_stored_points_of_a_layer_are_those_of_one_solution():
    "A coarser x is a truncated sum of waves; other heights are values of the same polynomial."
    full = SOLVERS["rayleigh_benard"].run(1, dtype=torch.float64, store_nodes="legendre")
    low = (np.arange(17) < 8)[:, None]
    for kind, shape in (("uniform", (16, 12)), ("chebyshev", (16, 24)), ("legendre", (16, 10))):
        out = SOLVERS["rayleigh_benard"].run(1, dtype=torch.float64, store_grid=shape, store_nodes=kind)
        matrix = interpolation(legendre_nodes(24)[0], vertical_points(shape[1], kind)).T
        for a, b in zip(fields(full), fields(out)):
            a, b = (np.moveaxis(f.reshape(*f.shape[:4], -1), -1, 2) for f in (a, b))
            kept = np.fft.irfft(np.fft.rfft(a, axis=3) * low, 32, axis=3)[:, :, :, ::2]
            assert np.allclose(kept @ matrix, b, atol=1e-12)


def test_an_initial_condition_of_a_layer_is_the_same_on_every_grid():
    run = dict(n_frames=1, store_grid=24, dtype=torch.float64)
    coarse, fine = (SOLVERS["rayleigh_benard"].run(**run, grid=grid) for grid in ((32, 24), (64, 40)))
    assert all(np.abs(a - b).max() < 1e-10 for a, b in zip(fields(coarse), fields(fine)))


def test_many_nodes_stay_accurate():
    y, weight, D = legendre_nodes(128)
    assert abs(weight.sum() - 1) < 1e-13 and np.abs(D @ np.sin(9 * y) - 9 * np.cos(9 * y)).max() < 1e-9
    eigenvalues = layer_grid((32, 128)).eigenvalues
    assert np.abs(eigenvalues[:60] / (np.pi * np.arange(1, 61)) ** 2 - 1).max() < 1e-8


# ---- solutions that are known


def test_a_fluid_at_rest_and_a_uniform_tracer_are_no_blow_up():
    out = SOLVERS["shear_flow"].run(1, initial=(0 * ONE, 3 * ONE))
    assert np.allclose(out["tracer"], 3.0) and not out["velocity"].any() and not out["pressure"].any()
    shear = np.sin(2 * np.pi * np.arange(32) / 32) * ONE
    assert np.allclose(SOLVERS["shear_flow"].run(1, initial=(shear, ONE))["tracer"], 1.0, atol=1e-5)


def test_a_layer_without_waves_only_diffuses():
    wave = np.cos(np.pi * 3 * 2 * np.arange(48) / 48) * np.ones((1, 32, 1))
    run = dict(reynolds=50.0, schmidt=0.5, grid=(32, 48), box=(1.0, 2.0), initial=(wave, wave), dtype=torch.float64)
    out = SOLVERS["shear_flow"].run(1, **run)
    decay = np.exp(-((np.pi * 3) ** 2) * out["time"] / 25)
    assert np.allclose(out["tracer"][0], decay[:, None, None] * wave, atol=1e-13)


def test_conduction_stays_at_rest_with_its_pressure():
    y, still = legendre_nodes(24)[0], np.zeros((1, 32, 24))
    run = dict(initial=(still, still + 1 - y), dtype=torch.float64, store_nodes="legendre")
    out = SOLVERS["rayleigh_benard"].run(1, **run)
    assert np.abs(out["velocity"]).max() < 1e-12 and np.allclose(out["buoyancy"], 1 - y, atol=1e-13)
    assert np.allclose(out["pressure"], y - y**2 / 2 - 1 / 3, atol=1e-12)


def test_a_mean_flow_between_walls_decays_as_it_must():
    "Two channel modes at once, no heat but conduction: u = sin(pi y) + sin(2 pi y)."
    y, still = legendre_nodes(24)[0], np.zeros((1, 32, 24))
    vorticity = still - np.pi * np.cos(np.pi * y) - 2 * np.pi * np.cos(2 * np.pi * y)
    run = dict(rayleigh=1e3, prandtl=4.0, initial=(vorticity, still + 1 - y), dtype=torch.float64)
    out = SOLVERS["rayleigh_benard"].run(1, **run, store_nodes="legendre")
    rate = np.pi**2 * (1e3 / 4.0) ** -0.5 * out["time"][:, None]
    expected = np.sin(np.pi * y) * np.exp(-rate) + np.sin(2 * np.pi * y) * np.exp(-4 * rate)
    assert np.abs(out["velocity"][0, ..., 0] - expected[:, None]).max() < 1e-4
    assert np.abs(out["velocity"][0, ..., 1]).max() < 1e-12


def test_rods_stay_isotropic_or_relax_to_the_order_where_alignment_balances_diffusion():
    run = dict(zeta=2.0, n_frames=2, frame_dt=5.0, dtype=torch.float64)
    out = SOLVERS["active_matter"].run(1, initial=(ONE, ISOTROPIC), **run)
    assert np.allclose(out["D"], np.eye(2) / 2) and not out["velocity"].any()
    finish = []
    for start in (0.2, 0.98):
        out = SOLVERS["active_matter"].run(1, initial=(ONE, ISOTROPIC + np.diag([start, -start]) / 2), **run)
        assert np.ptp(out["D"], axis=(2, 3)).max() < 1e-10 and np.abs(out["velocity"]).max() < 1e-10
        finish.append(out["D"][0, 1, 0, 0, 0, 0] - out["D"][0, 1, 0, 0, 1, 1])
    assert abs(finish[0] - finish[1]) < 1e-9
    assert abs(2.0 * float(closure(torch.tensor(finish[0] ** 2).double())[1]) - 0.2) < 1e-5  # zeta (1 - q g) = 4 d_R


def test_a_frame_depends_neither_on_the_frames_before_it_nor_on_a_skip():
    whole = SOLVERS["active_matter"].run(n_frames=5)
    seldom, late = SOLVERS["active_matter"].run(n_frames=2, frame_dt=1.0), SOLVERS["active_matter"].run(skip=0.5)
    assert np.allclose(late["time"], whole["time"][2:])
    for a, b, c in zip(fields(whole), fields(seldom), fields(late)):
        assert np.array_equal(a[:, 4], b[:, 1]) and np.array_equal(a[:, 2:], c)


# ---- the loop that they share


def saved(n: int = 5, batch: int = 2, dead: tuple[int, ...] = (), progress: Callable | None = None) -> np.ndarray:
    "Frames that hold the numbers of their trajectory and moment; trajectories of `dead` die in frame 1."

    def integrate(rows: slice):
        numbers = torch.arange(rows.start, rows.stop)
        for t in range(3):
            frame = (10.0 * numbers + t)[:, None, None, None].expand(-1, 2, 4, 6)
            yield frame, ~torch.isin(numbers, torch.tensor(dead)) | (t < 1), 30.0

    names = run_names(list(range(n)), Re=np.linspace(100, 500, n))
    options = dict(dtype=torch.float32, batch=batch, blew_up="t = {moment}, {dt}: {runs}: try {shorter}")
    return save_frames(integrate, names, schedule(0.5, 0.1, 3), (2, 4, 6), progress=progress, **options)


@pytest.mark.parametrize("batch", [1, 2, 5, 9])
def test_every_frame_is_where_it_belongs_whatever_the_batch(batch):
    calls = []
    out = saved(batch=batch, progress=lambda done, total: calls.append((done, total)))
    assert out.shape == (5, 3, 2, 4, 6) and out.dtype == np.float32
    assert np.array_equal(out[:, :, 0, 0, 0], 10.0 * np.arange(5)[:, None] + np.arange(3))
    assert calls[-1] == (15, 15) and [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_dead_trajectories_are_named_with_a_step_for_the_rate_before():
    with pytest.raises(SimulationBlewUp) as caught:
        saved(dead=(3,))
    assert str(caught.value) == "t = 0.5, 0.1: Re 400, seed 3: try 0.05"
    sent = pickle.loads(pickle.dumps(caught.value))  # by a worker
    assert (str(sent), sent.dt) == (str(caught.value), 0.05)
    with pytest.raises(SimulationBlewUp, match="Re 300, seed 2 and 2 more: try"):
        saved(batch=5, dead=(0, 1, 2, 3, 4))


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
def test_steps_are_counted_in_any_unit_of_time(scale):
    found = schedule(0.3 * scale, 0.1 * scale, 2, skip=0.2 * scale)
    assert (found.steps, found.skip) == (3, 2)
    for wrong in (dict(frame_dt=0.25 * scale), dict(frame_dt=0.3 * scale, skip=0.25 * scale)):
        with pytest.raises(ValueError, match="must be a multiple of dt"):
            schedule(**wrong, dt=0.1 * scale, n_frames=2)


@pytest.mark.parametrize("points", [(20, 28), (24, 36)])
@pytest.mark.parametrize("make", [spectral_grid, matter_grid])
def test_k_max_is_the_largest_kept_wavenumber_of_an_axis(make, points):
    g = make(points, (1.0, 3.0))
    assert g.k_max == pytest.approx([float((k.abs() * g.keep).max()) for k in (g.kx, g.ky)])


def test_k_max_of_a_layer_is_that_of_its_kept_waves():
    for nx in (20, 32, 48):
        assert layer_grid((nx, 24), (3.0, 1.0)).k.max() == pytest.approx(2 * np.pi / 3 * ((nx - 1) // 3))


@pytest.mark.parametrize("field", [0, 1])
def test_given_fields_that_are_not_finite_are_named(field):
    given = [np.ones((3, 32, 32)) for _ in range(2)]
    given[field][1, 4, 5] = np.nan
    with pytest.raises(ValueError, match=f"{('vorticity', 'tracer')[field]} of trajectory 1 is not"):
        shear_flow.simulate(400.0, 1.0, range(3), grid=32, initial=tuple(given))


def test_what_is_drawn_of_a_shear_flow_lies_in_its_range():
    drawn = shear_flow.draw_start(range(300), (1.0, 3.0))
    assert {name: sorted(set(drawn[name].tolist())) for name in ("n_shear", "n_blobs", "tilt")} == {
        "n_shear": [2, 4],
        "n_blobs": [1, 2, 3],
        "tilt": [-1, 1],
    }
    ranges = dict(
        y0=(0, 3), phase_1=(0, 2 * np.pi), phase_2=(0, 2 * np.pi), amplitude=(0.05, 0.15), thickness=(0.03, 0.06)
    )
    for name, (low, high) in ranges.items():
        ends = np.array([drawn[name].min(), drawn[name].max()])
        assert (low <= ends).all() and (ends <= high).all() and np.allclose(ends, (low, high), atol=0.05 * (high - low))

"""Oracles that are right on exact solutions, and refuse what they cannot do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from physrep.physics import active_matter, rayleigh_benard
from physrep.physics.oracle import (
    ACTIVITIES,
    ALIGNMENTS,
    ASSUMPTIONS,
    DIFFUSIVITIES,
    METHODS,
    ORACLES,
    _bump_matrices,
    _derivative_matrix,
    _integration_matrix,
    _least_squares,
    assumptions,
    equation_oracle,
)
from physrep.physics.shear_flow import simulate
from physrep.physics.statistics import summary_statistics
from physrep.physics.systems import SYSTEMS, get_system

SHEAR, LAYER, MATTER = get_system("shear_flow"), get_system("rayleigh_benard"), get_system("active_matter")
DT, N = 0.2, 32
UNITS = dict(dt=DT, spacing=(1 / N, 1 / N))
LAYER_UNITS = dict(system=LAYER, dt=0.5, spacing=(2 / N, 1 / N))
MATTER_UNITS = dict(system=MATTER, dt=0.25, spacing=(5 / N, 3.75 / 24))
HEIGHTS = {kind: rayleigh_benard.vertical_points(N, kind) for kind in ("uniform", "chebyshev")}


@pytest.fixture(scope="module")
def flows() -> tuple[np.ndarray, np.ndarray]:
    "Simulated clips `(8, 4, 16, 32, 32)`, stored coarser than they were solved, and labels `(8, 2)`."
    labels = np.array([(re, sc) for re in (400.0, 1131.0, 2000.0, 3200.0) for sc in (0.3, 2.0)])
    out = simulate(*labels.T, list(range(8)), n_frames=24, frame_dt=DT, store_grid=N)
    fields = np.stack([out["tracer"], out["pressure"], out["velocity"][..., 0], out["velocity"][..., 1]], axis=1)
    return fields[:, :, 8:], labels


def stacked(out: dict[str, np.ndarray], system) -> np.ndarray:
    "Channels `(n, c, t, h, w)` of a simulation in the system's order."
    parts = [out[f.name].reshape(*out[f.name].shape[:4], -1) for f in system.fields]
    return np.moveaxis(np.concatenate(parts, axis=-1), -1, 1)


@pytest.fixture(scope="module", params=HEIGHTS)
def layers(request) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "Convection `(4, 4, 16, 32, 32)`, labels `(4, 2)` (Prandtl, Rayleigh) and heights `(32,)`."
    labels = np.array([(pr, ra) for ra in (1e4, 2e5) for pr in (0.7, 3.0)])
    out = rayleigh_benard.simulate(
        labels[:, 1],
        labels[:, 0],
        list(range(4)),
        grid=(64, 40),
        n_frames=22,
        frame_dt=0.5,
        dt=0.0125,
        store_grid=N,
        store_nodes=request.param,
    )
    return stacked(out, LAYER)[:, :, 6:], labels, HEIGHTS[request.param]


@pytest.fixture(scope="module")
def matter() -> tuple[np.ndarray, np.ndarray]:
    "Active matter in a box that is no square, `(4, 11, 16, 32, 24)`, and labels `(4, 2)`."
    labels = np.array([(alpha, zeta) for alpha in (-1.0, -4.0) for zeta in (1.0, 2.5)])
    out = active_matter.simulate(
        *labels.T,
        list(range(4)),
        grid=(48, 36),
        box=(5.0, 3.75),
        n_frames=24,
        frame_dt=0.25,
        dt=0.05,
        store_grid=(N, 24),
    )
    return stacked(out, MATTER)[:, :, 8:], labels


def elevator(rayleigh, prandtl, *, slope, wind=0.0, y=HEIGHTS["uniform"]) -> np.ndarray:
    "Exact solution `(1, 4, 16, h, w)`: warm and cold columns that slide past each other, in a wind."
    kappa, nu, k = (rayleigh * prandtl) ** -0.5, (rayleigh / prandtl) ** -0.5, 2 * np.pi
    t = 0.5 * torch.arange(16, dtype=torch.float64)
    matrix = torch.tensor([[-kappa * k**2, slope], [1.0, -nu * k**2]], dtype=torch.float64)
    theta, speed = (
        (torch.linalg.matrix_exp(t[:, None, None] * matrix) @ torch.tensor([0.3, 0.1], dtype=torch.float64))
        .numpy()
        .T[:, :, None, None]
    )
    wave = np.cos(k * (2 * np.arange(N)[:, None] / N - wind * t.numpy()[:, None, None])) + 0 * y
    return np.stack([theta * wave - slope * y, 0 * wave, 0 * wave + wind, speed * wave])[None]


def taylor_green(reynolds, schmidt, *, wind=(0.0, 0.0), shape=(N, N), box=(1.0, 1.0), frames=16) -> np.ndarray:
    "Exact solution `(1, 4, t, h, w)`: a decaying vortex and tracer in a uniform wind and a rectangular box."
    t = DT * np.arange(frames)[:, None, None]
    kx, ky = 2 * np.pi / np.array(box)
    x, y = np.meshgrid(*(length * np.arange(n) / n for n, length in zip(shape, box)), indexing="ij")
    a, b = kx * (x - wind[0] * t), ky * (y - wind[1] * t)
    k2 = kx**2 + ky**2
    decay, fading = np.exp(-k2 * t / reynolds), np.exp(-k2 * t / (reynolds * schmidt))
    u, v = (
        -ky * np.cos(a) * np.sin(b) * decay / kx + wind[0],
        np.sin(a) * np.cos(b) * decay + wind[1],
    )  # psi = cos a cos b / kx
    return np.stack([np.cos(a) * np.cos(b) * fading, 0 * u, u, v])[None]


# ---- the parts of the oracle


def test_integration_is_exact_for_polynomials_of_degree_five():
    t = 0.3 * np.arange(11)
    for degree in range(6):
        assert np.allclose(
            _integration_matrix(11, 0.3) @ t**degree, t ** (degree + 1) / (degree + 1), rtol=1e-11, atol=1e-12
        )
    assert np.allclose(_integration_matrix(3, 0.3) @ t[:3] ** 2, t[:3] ** 3 / 3)


def test_derivatives_of_the_bump_integrate_by_parts():
    n, step = 40, 0.1
    x = step * np.arange(n)
    bump = _bump_matrices(x, 13.0)
    f, slope, bend = np.sin(1.7 * x), 1.7 * np.cos(1.7 * x), -(1.7**2) * np.sin(1.7 * x)
    assert np.allclose(bump[1] @ f, -bump[0] @ slope, atol=1e-4)
    assert np.allclose(bump[2] @ f, bump[0] @ bend, atol=1e-3)
    assert bump.shape == (4, 8, n)
    assert np.allclose(bump[1:].sum(-1), 0, atol=1e-3), "cut at an edge, a derivative would not sum to zero"
    assert all(np.allclose(row, np.roll(bump[0, 0], 2 * i)) for i, row in enumerate(bump[0])), (
        "every place has the whole bump"
    )


def test_bumps_on_chebyshev_heights_integrate_as_well():
    n = 64
    y = (1 - np.cos(np.pi * (np.arange(n) + 0.5) / n)) / 2
    bump = _bump_matrices(y, 24.0)
    assert np.allclose(bump[1] @ np.sin(4 * y), -bump[0] @ (4 * np.cos(4 * y)), rtol=1e-5)
    assert np.allclose(bump[2] @ np.sin(4 * y), bump[0] @ (-16 * np.sin(4 * y)), rtol=1e-4)


def test_differences_are_exact_for_polynomials_of_degree_eight():
    x = 0.1 * np.arange(12)
    assert np.allclose(_derivative_matrix(12, 0.1) @ x**8, 8 * x**7, atol=1e-8)
    assert np.allclose(_derivative_matrix(5, 0.1) @ x[:5] ** 4, 4 * x[:5] ** 3)


def test_weights_take_out_bad_equations_and_leave_good_ones_alone():
    rng = np.random.default_rng(0)
    right = rng.normal(size=(2, 60))
    left = 0.3 * right + 1e-4 * rng.normal(size=right.shape)
    left[1, :6] += 5.0
    plain, weighted = _least_squares(left, right), _least_squares(left, right, 10)
    assert abs(plain[1] / 0.3 - 1) > 0.01 and np.abs(weighted / 0.3 - 1).max() < 1e-3
    assert np.allclose(_least_squares((2.5 + 0j) * np.exp(1j * right), np.exp(1j * right), 3), 2.5)
    assert not _least_squares(np.zeros((2, 5)), np.zeros((2, 5)), 3).any()


# ---- the oracle


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wind", [(0.0, 0.0), (0.31, -0.17)])
def test_every_method_is_right_on_a_taylor_green_vortex(method, wind):
    fields = np.concatenate([taylor_green(800, 0.5, wind=wind), taylor_green(3000, 2.0, wind=wind)])
    found = equation_oracle(fields, system=SHEAR, method=method, **UNITS)
    assert np.allclose(found, [[800, 0.5], [3000, 2.0]], rtol=1e-4 if method == "weak" else 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_spacing_and_shape_of_a_rectangular_box(method):
    fields = taylor_green(500, 1.5, wind=(0.1, 0.2), shape=(24, 36), box=(1.0, 2.0))
    found = equation_oracle(
        torch.from_numpy(fields), system="shear_flow", dt=DT, spacing=(1 / 24, 2 / 36), method=method
    )
    assert np.allclose(found, [[500, 1.5]], rtol=1e-3)


@pytest.mark.parametrize("method,limit", [("weak", 0.002), ("resolved_budget", 0.005), ("budget", 0.2)])
def test_simulated_flows_at_the_stored_resolution(flows, method, limit):
    fields, labels = flows
    assert np.abs(equation_oracle(fields, system=SHEAR, method=method, **UNITS) / labels - 1).max() < limit


def test_weak_form_works_on_a_crop_where_budgets_refuse(flows):
    fields, labels = flows
    crop = fields[..., 3:27, 5:29]
    assert np.abs(equation_oracle(crop, system=SHEAR, periodic=False, **UNITS) / labels - 1).max() < 0.02
    for method in ("budget", "resolved_budget"):
        with pytest.raises(ValueError, match=f"method '{method}' needs a whole periodic box"):
            equation_oracle(crop, system=SHEAR, periodic=False, method=method, **UNITS)
    assert {m: ASSUMPTIONS[m].crop for m in METHODS} == {"weak": True, "resolved_budget": False, "budget": False}


@pytest.mark.parametrize("method", METHODS)
def test_windows_do_not_influence_each_other(flows, method):
    fields, _ = flows
    whole = equation_oracle(fields, system=SHEAR, method=method, chunk=3, **UNITS)
    one = equation_oracle(fields[5:6], system=SHEAR, method=method, **UNITS)
    assert np.allclose(whole[5:6], one, rtol=1e-9)
    assert equation_oracle(fields[:0], system=SHEAR, method=method, **UNITS).shape == (0, 2)


@pytest.mark.parametrize("method", METHODS)
def test_pressure_gauge_and_mean_of_the_tracer_do_not_matter(flows, method):
    fields, _ = flows
    other = fields.astype(np.float64)
    other[:, 1] += 5.0
    other[:, 0] += 2.0
    a, b = (equation_oracle(f, system=SHEAR, method=method, **UNITS) for f in (fields, other))
    assert np.allclose(a, b, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_failed_estimate_is_finite_positive_and_at_the_edge(method):
    backwards = taylor_green(800, 0.5)[:, :, ::-1]  # grows: viscosity below zero
    still = np.zeros_like(backwards)
    found = equation_oracle(np.concatenate([backwards, still]), system=SHEAR, method=method, **UNITS)
    assert np.allclose(found[:, 0], 1 / DIFFUSIVITIES[0]) and np.allclose(found[:, 1], 1.0)
    assert np.isfinite(SHEAR.labels[1].transform(found[:, 1])).all()


def test_errors_say_what_is_wrong(flows):
    fields, _ = flows
    for function in (summary_statistics, equation_oracle):
        with pytest.raises(
            ValueError, match=r"fields of shear_flow must be \(b, 4, t, h, w\), got \(8, 3, 16, 32, 32\)"
        ):
            function(fields[:, :3], system=SHEAR, **UNITS)
        with pytest.raises(ValueError, match="must be .b, 4, t, h, w."):
            function(fields[0], system=SHEAR, **UNITS)
        with pytest.raises(ValueError, match="dt must be a positive number and spacing a pair"):
            function(fields, system=SHEAR, dt=DT, spacing=1 / N)
        with pytest.raises(ValueError, match="dt must be a positive number"):
            function(fields, system=SHEAR, dt=0.0, spacing=UNITS["spacing"])
        broken = fields.copy()
        broken[3, 2, 1, 4, 4] = np.nan
        with pytest.raises(ValueError, match="fields of 1 of 8 windows are not finite, first of window 3"):
            function(broken, system=SHEAR, **UNITS)
        with pytest.raises(ValueError, match="unknown system 'shear'"):
            function(fields, system="shear", **UNITS)
    with pytest.raises(ValueError, match="at least 5 frames, got 4"):
        summary_statistics(fields[:, :, :4], system=SHEAR, **UNITS)
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        summary_statistics(fields, system=SHEAR, frames=0, **UNITS)
    with pytest.raises(ValueError, match="at least 8 frames, got 6"):
        equation_oracle(fields[:, :, :6], system=SHEAR, **UNITS)
    with pytest.raises(ValueError, match="at least 8 points along both axes, got 32 x 6"):
        equation_oracle(fields[..., :6], system=SHEAR, **UNITS)
    with pytest.raises(ValueError, match="unknown method 'strong'; valid: weak, resolved_budget, budget"):
        equation_oracle(fields, system=SHEAR, method="strong", **UNITS)
    with pytest.raises(
        ValueError, match="no equation oracle for smoke; there is one for shear_flow, rayleigh_benard, active_matter"
    ):
        equation_oracle(fields, system=replace(SHEAR, name="smoke"), **UNITS)
    for function in (summary_statistics, equation_oracle):
        with pytest.raises(ValueError, match="shear_flow has no walls: its points are evenly spaced"):
            function(fields, system=SHEAR, heights=HEIGHTS["uniform"], **UNITS)
        for heights in (HEIGHTS["uniform"][::-1], HEIGHTS["uniform"][1:], np.full(N, np.nan)):
            with pytest.raises(
                ValueError, match="heights must be 32 increasing numbers, one for each point along y, got shape"
            ):
                function(fields, system=LAYER, heights=heights, **UNITS)
        with pytest.raises(ValueError, match="dt must be a positive number and spacing a pair .* give `heights`"):
            function(fields, system=LAYER, dt=DT, spacing=(1 / N, np.nan))


@pytest.mark.parametrize("method", METHODS[1:])
def test_budgets_are_for_shear_flow_only(method):
    for system in (LAYER, MATTER):
        fields = np.zeros((1, system.n_channels, 8, 8, 8))
        with pytest.raises(
            ValueError, match=f"method '{method}' is for shear_flow only, not for {system.name}; use 'weak'"
        ):
            equation_oracle(fields, system=system, method=method, **UNITS)


def test_every_method_and_oracle_is_described():
    assert set(ASSUMPTIONS) == {*METHODS, "statistics"} and set(ORACLES) == set(SYSTEMS)
    assert len({assumptions(name).equation for name in SYSTEMS}) == 3 and all(
        assumptions(name).crop for name in SYSTEMS
    )
    assert assumptions("shear_flow", "budget") is ASSUMPTIONS["budget"] and assumptions(SHEAR) is ASSUMPTIONS["weak"]
    assert all(assumptions(name, "statistics") is ASSUMPTIONS["statistics"] for name in SYSTEMS)
    with pytest.raises(ValueError, match="unknown method 'strong'; valid: weak"):
        assumptions(MATTER, "strong")


# ---- convection and active matter


@pytest.mark.parametrize("wind", [0.0, 0.3])
@pytest.mark.parametrize("y", HEIGHTS.values(), ids=HEIGHTS)
def test_convection_on_elevator_modes(wind, y):
    fields = np.concatenate(
        [elevator(1e4, 0.5, slope=-0.2, wind=wind, y=y), elevator(1e6, 4.0, slope=0.01, wind=wind, y=y)]
    )
    found = equation_oracle(torch.from_numpy(fields), heights=y, **LAYER_UNITS)
    assert np.allclose(found, [[0.5, 1e4], [4.0, 1e6]], rtol=0.005)


def test_convection_from_simulations_and_crops_of_them(layers):
    fields, labels, y = layers
    assert np.abs(equation_oracle(fields, heights=y, **LAYER_UNITS) / labels - 1).max() < 0.005
    crop = equation_oracle(fields[:, :, 2:, 3:27, 2:30], heights=y[2:30], periodic=False, **LAYER_UNITS)
    assert np.abs(crop / labels - 1).max() < 0.03
    if np.allclose(np.diff(y), 1 / N):
        assert np.allclose(
            equation_oracle(fields, **LAYER_UNITS), equation_oracle(fields, heights=y + 7, **LAYER_UNITS), rtol=1e-6
        )


def test_active_matter_from_simulations_and_crops_of_them(matter):
    fields, labels = matter
    assert np.abs(equation_oracle(fields, **MATTER_UNITS) / labels - 1).max() < 0.005
    crop = equation_oracle(fields[:, :, :12, 3:29, 2:22], periodic=False, **MATTER_UNITS)
    assert np.abs(crop / labels - 1).max() < 0.02


def test_uniform_rods_that_align_tell_zeta():
    zeta, t = 1.5, 0.25 * np.arange(16)
    size, small = 0.1, 0.25 / 50
    sizes = []
    for i in range(16 * 50):  # d f / d t = zeta f (1 - q g) - 4 d_R f, by Heun's method
        if i % 50 == 0:
            sizes.append(size)

        def rate(f: float) -> float:
            return (
                zeta * f * active_matter.closure(torch.tensor([f * f]).double())[1].item() - 4 * active_matter.D_R * f
            )

        size += small * (rate(size) + rate(size + small * rate(size))) / 2
    fields = np.zeros((1, 11, len(t), N, 24))
    a, b = (part * np.array(sizes)[:, None, None] for part in (0.6, 0.8))  # f = size * (0.6 + 0.8i)
    fields[0, 0] = 1.0
    fields[0, 3], fields[0, 6] = (1 + a) / 2, (1 - a) / 2
    fields[0, 4] = fields[0, 5] = b / 2
    assert equation_oracle(fields, **MATTER_UNITS)[0, 1] == pytest.approx(zeta, rel=1e-3)


def test_estimates_of_every_system_are_finite_and_each_window_its_own(matter):
    layer = np.concatenate(
        [elevator(1e5, 2.0, slope=-0.1), elevator(1e5, 2.0, slope=-0.1)[:, :, ::-1], np.zeros((1, 4, 16, N, N))]
    )
    found = equation_oracle(layer, chunk=2, **LAYER_UNITS)
    assert np.isfinite(found).all() and np.allclose(found[2], [1.0, DIFFUSIVITIES[0] ** -2])
    assert np.allclose(found[:1], equation_oracle(layer[:1], **LAYER_UNITS), rtol=1e-9)
    rods = np.concatenate(
        [matter[0][:2], np.zeros_like(matter[0][:1]), np.random.default_rng(0).normal(size=matter[0][:1].shape)]
    )
    found = equation_oracle(rods, chunk=3, **MATTER_UNITS)
    assert np.isfinite(found).all() and not found[2].any()
    for values, (low, high) in zip(found.T, (ACTIVITIES, ALIGNMENTS)):
        assert (low <= values).all() and (values <= high).all()
    assert np.allclose(found[1:2], equation_oracle(rods[1:2], **MATTER_UNITS), rtol=1e-9)
    assert equation_oracle(rods[:0], **MATTER_UNITS).shape == equation_oracle(layer[:0], **LAYER_UNITS).shape == (0, 2)

"""Oracles that are right on exact solutions, crops and boxes that are no squares, and refuse what they cannot do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from physrep.physics import active_matter, rayleigh_benard, shear_flow
from physrep.physics.layer import vertical_points
from physrep.physics.oracle import (
    ACTIVITIES,
    ALIGNMENTS,
    ASSUMPTIONS,
    DIFFUSIVITIES,
    ORACLES,
    _bump_matrices,
    assumptions,
    equation_oracle,
)
from physrep.physics.statistics import summary_statistics
from physrep.physics.systems import SYSTEMS, get_system

SHEAR, LAYER, MATTER = get_system("shear_flow"), get_system("rayleigh_benard"), get_system("active_matter")
METHODS = tuple(ASSUMPTIONS["shear_flow"])
DT, N = 0.2, 32
UNITS = dict(dt=DT, spacing=(1 / N, 1 / N))
LAYER_UNITS = dict(system=LAYER, dt=0.5, spacing=(2 / N, 1 / N))
MATTER_UNITS = dict(system=MATTER, dt=0.25, spacing=(5 / N, 3.75 / 24))
CHEBYSHEV = vertical_points(N, "chebyshev")
each_method = pytest.mark.parametrize("method", METHODS)


def stacked(out: dict[str, np.ndarray], system) -> np.ndarray:
    "Channels `(n, c, t, h, w)` of a simulation in the system's order."
    parts = [out[f.name].reshape(*out[f.name].shape[:4], -1) for f in system.fields]
    return np.moveaxis(np.concatenate(parts, axis=-1), -1, 1)


@pytest.fixture(scope="module")
def flows() -> tuple[np.ndarray, np.ndarray]:
    "Simulated clips `(8, 4, 16, 32, 32)`, stored coarser than they were solved, and labels `(8, 2)`."
    labels = np.array([(re, sc) for re in (400.0, 1131.0, 2000.0, 3200.0) for sc in (0.3, 2.0)])
    out = shear_flow.simulate(*labels.T, list(range(8)), n_frames=24, frame_dt=DT, store_grid=N)
    return stacked(out, SHEAR)[:, :, 8:], labels


@pytest.fixture(scope="module")
def matter() -> tuple[np.ndarray, np.ndarray]:
    "Active matter in a box that is no square, `(4, 11, 16, 32, 24)`, and labels `(4, 2)`."
    labels = np.array([(alpha, zeta) for alpha in (-1.0, -4.0) for zeta in (1.0, 2.5)])
    options = dict(grid=(48, 36), box=(5.0, 3.75), n_frames=24, store_grid=(N, 24))
    return stacked(active_matter.simulate(*labels.T, list(range(4)), **options), MATTER)[:, :, 8:], labels


def taylor_green(reynolds, schmidt, *, wind=(0.0, 0.0), shape=(N, N), box=(1.0, 1.0), frames=16) -> np.ndarray:
    "Exact solution `(1, 4, t, h, w)`: a decaying vortex and tracer in a uniform wind; psi = cos a cos b / kx."
    t = DT * np.arange(frames)[:, None, None]
    kx, ky = 2 * np.pi / np.array(box)
    x, y = np.meshgrid(*(length * np.arange(n) / n for n, length in zip(shape, box)), indexing="ij")
    a, b, k2 = kx * (x - wind[0] * t), ky * (y - wind[1] * t), kx**2 + ky**2
    decay, fading = np.exp(-k2 * t / reynolds), np.exp(-k2 * t / (reynolds * schmidt))
    u, v = -ky * np.cos(a) * np.sin(b) * decay / kx + wind[0], np.sin(a) * np.cos(b) * decay + wind[1]
    return np.stack([np.cos(a) * np.cos(b) * fading, 0 * u, u, v])[None]


@pytest.mark.parametrize("points, radius", [(0.1 * np.arange(40), 13.0), (vertical_points(64, "chebyshev"), 24.0)])
def test_derivatives_of_the_bump_integrate_by_parts(points, radius):
    "Cut at an edge of the data they would not."
    bump, k = _bump_matrices(points, radius), 4.0 if radius > 20 else 1.7
    for order, derivative in ((1, -k * np.cos(k * points)), (2, -(k**2) * np.sin(k * points))):
        assert np.allclose(bump[order] @ np.sin(k * points), bump[0] @ derivative, rtol=1e-4, atol=1e-3)


@each_method
@pytest.mark.parametrize("wind", [(0.0, 0.0), (0.31, -0.17)])
def test_every_method_is_right_on_a_taylor_green_vortex(method, wind):
    fields = np.concatenate([taylor_green(800, 0.5, wind=wind), taylor_green(3000, 2.0, wind=wind)])
    found = equation_oracle(fields, system=SHEAR, method=method, **UNITS)
    assert np.allclose(found, [[800, 0.5], [3000, 2.0]], rtol=1e-4 if method == "weak" else 1e-6)
    fields = torch.from_numpy(taylor_green(500, 1.5, wind=wind, shape=(24, 36), box=(1.0, 2.0)))
    found = equation_oracle(fields, system="shear_flow", dt=DT, spacing=(1 / 24, 2 / 36), method=method)
    assert np.allclose(found, [[500, 1.5]], rtol=1e-3)


@pytest.mark.parametrize("method, limit", [("weak", 0.002), ("resolved_budget", 0.005), ("budget", 0.2)])
def test_simulated_shear_flows(flows, method, limit):
    "At the stored resolution, whatever the gauge of the pressure and the tracer's mean, each window by itself."
    fields, labels = flows
    found = equation_oracle(fields, system=SHEAR, method=method, chunk=3, **UNITS)
    assert np.abs(found / labels - 1).max() < limit
    assert np.allclose(found[5:6], equation_oracle(fields[5:6], system=SHEAR, method=method, **UNITS), rtol=1e-9)
    other = fields + np.array([2.0, 5.0, 0.0, 0.0])[:, None, None, None]
    assert np.allclose(found, equation_oracle(other, system=SHEAR, method=method, **UNITS), rtol=1e-3)
    assert equation_oracle(fields[:0], system=SHEAR, method=method, **UNITS).shape == (0, 2)
    crop = fields[..., 3:27, 5:29]
    assert assumptions(SHEAR, method).crop == (method == "weak")
    if assumptions(SHEAR, method).crop:
        assert np.abs(equation_oracle(crop, system=SHEAR, periodic=False, **UNITS) / labels - 1).max() < 0.02
    else:
        with pytest.raises(ValueError, match=f"method '{method}' needs a whole periodic box"):
            equation_oracle(crop, system=SHEAR, periodic=False, method=method, **UNITS)


def test_layers_on_chebyshev_heights_and_crops_of_them():
    labels = np.array([(pr, ra) for ra in (1e4, 2e5) for pr in (0.7, 3.0)])
    options = dict(n_frames=22, frame_dt=0.5, dt=0.0125, store_grid=N, store_nodes="chebyshev")
    out = rayleigh_benard.simulate(labels[:, 1], labels[:, 0], list(range(4)), **options)
    fields = stacked(out, LAYER)[:, :, 6:]
    found = equation_oracle(fields, heights=CHEBYSHEV, **LAYER_UNITS)
    assert np.abs(found / labels - 1).max() < 0.005
    assert np.allclose(found, equation_oracle(fields, heights=CHEBYSHEV + 7, **LAYER_UNITS), rtol=1e-6)
    crop = dict(heights=CHEBYSHEV[2:30], periodic=False)
    assert np.abs(equation_oracle(fields[:, :, 2:, 3:27, 2:30], **crop, **LAYER_UNITS) / labels - 1).max() < 0.03


def test_active_matter_and_crops_of_it(matter):
    fields, labels = matter
    assert np.abs(equation_oracle(fields, **MATTER_UNITS) / labels - 1).max() < 0.005
    crop = equation_oracle(fields[:, :, :12, 3:29, 2:22], periodic=False, **MATTER_UNITS)
    assert np.abs(crop / labels - 1).max() < 0.02


@each_method
def test_a_failed_estimate_is_finite_and_at_the_edge(method):
    backwards = taylor_green(800, 0.5)[:, :, ::-1]  # grows: viscosity below zero
    found = equation_oracle(np.concatenate([backwards, 0 * backwards]), system=SHEAR, method=method, **UNITS)
    assert np.allclose(found, [1 / DIFFUSIVITIES[0], 1.0])


def test_failed_estimates_of_the_other_systems_are_finite(matter):
    assert np.allclose(equation_oracle(np.zeros((1, 4, 16, N, N)), **LAYER_UNITS), [[1.0, DIFFUSIVITIES[0] ** -2]])
    nothing, noise = np.zeros((1, 11, 16, N, 24)), np.random.default_rng(0).normal(size=(1, 11, 16, N, 24))
    found = equation_oracle(np.concatenate([matter[0][:1], nothing, noise]), chunk=2, **MATTER_UNITS)
    assert np.isfinite(found).all() and not found[1].any()
    assert (ACTIVITIES[0] <= found[2, 0] <= ACTIVITIES[1]) and (ALIGNMENTS[0] <= found[2, 1] <= ALIGNMENTS[1])
    assert np.allclose(found[:1], equation_oracle(matter[0][:1], **MATTER_UNITS), rtol=1e-9)


BAD = np.zeros((8, 4, 16, N, N))
BROKEN = BAD.copy()
BROKEN[3, 2, 1, 4, 4] = np.nan
EVEN = vertical_points(N, "uniform")


@pytest.mark.parametrize("measure", [summary_statistics, equation_oracle])
@pytest.mark.parametrize(
    "fields, change, message",
    [
        (BAD[:, :3], {}, r"fields of shear_flow must be \(b, 4, t, h, w\), got \(8, 3, 16, 32, 32\)"),
        (BAD[0], {}, r"must be \(b, 4, t, h, w\)"),
        (BAD[:, :, :4], {}, r"at least \d frames, got 4"),
        (BROKEN, {}, "1 of 8 windows are not finite, the first is 3"),
        (BAD, {"spacing": 1 / N}, "dt must be positive, spacing a positive pair"),
        (BAD, {"dt": 0.0}, "dt must be positive"),
        (BAD, {"dt": np.inf}, "dt must be positive"),
        (BAD, {"system": "shear"}, "unknown system 'shear'"),
        (BAD, {"heights": EVEN}, "shear_flow has no walls: its points are evenly spaced"),
        (BAD, {"system": LAYER, "heights": EVEN[::-1]}, "heights must be 32 increasing numbers"),
        (BAD, {"system": LAYER, "heights": EVEN[1:]}, "heights must be 32 increasing numbers"),
        (BAD, {"system": LAYER, "spacing": (1 / N, np.nan)}, "give `heights`"),
        (BAD, {"system": LAYER, "periodic": True}, "rayleigh_benard is not periodic along both axes"),
    ],
)
def test_fields_and_units_that_make_no_sense(measure, fields, change, message):
    with pytest.raises(ValueError, match=message):
        measure(fields, **dict(system=SHEAR) | UNITS | change)


@pytest.mark.parametrize(
    "fields, change, message",
    [
        (BAD[..., :6], {}, "needs 8 points along both axes, got 32 x 6"),
        (BAD, {"method": "strong"}, "has no method 'strong'; valid: weak, resolved_budget, budget"),
        (
            BAD,
            {"system": LAYER, "method": "budget"},
            "the oracle of rayleigh_benard has no method 'budget'; valid: weak",
        ),
        (BAD, {"system": replace(SHEAR, name="smoke")}, "no equation oracle for smoke; there is one for shear_flow, "),
    ],
)
def test_what_an_oracle_cannot_do(fields, change, message):
    with pytest.raises(ValueError, match=message):
        equation_oracle(fields, **dict(system=SHEAR) | UNITS | change)


def test_every_system_has_an_oracle_that_says_what_it_assumes():
    assert set(ASSUMPTIONS) == set(ORACLES) == set(SYSTEMS)
    assert assumptions("active_matter", "statistics").equation == "nothing"
    with pytest.raises(ValueError, match="active_matter has no method 'strong'; valid: weak, statistics"):
        assumptions(MATTER, "strong")

"""Summary statistics with known values and symmetries."""

import numpy as np
import pytest
import torch

from physrep.data.batches import apply_symmetry
from physrep.physics.layer import vertical_points
from physrep.physics.shear_flow import simulate
from physrep.physics.statistics import SMALLEST, STATISTICS, statistics_names, summary_statistics
from physrep.physics.systems import SYSTEMS, get_system

SHEAR, LAYER = get_system("shear_flow"), get_system("rayleigh_benard")
DT, N = 0.2, 32
UNITS = dict(dt=DT, spacing=(1 / N, 1 / N))


@pytest.fixture(scope="module")
def flows() -> np.ndarray:
    "Simulated clips `(4, 4, 16, 32, 32)`, stored coarser than they were solved."
    out = simulate([400.0, 1131.0, 2000.0, 3200.0], 0.3, range(4), n_frames=16, frame_dt=DT, store_grid=N)
    return np.stack([out["tracer"], out["pressure"], out["velocity"][..., 0], out["velocity"][..., 1]], axis=1)


def test_statistics_of_a_travelling_sine_are_the_formulas():
    k, c = 2 * np.pi * 3, 0.05
    t, x = DT * np.arange(9)[:, None, None], np.arange(N)[:, None] / N
    wave = np.broadcast_to(2.5 * np.sin(k * (x - c * t)), (9, N, N))
    fields = np.zeros((1, 4, 9, N, N))
    fields[0, 0], fields[0, 1] = wave + 7, 3.0
    got = dict(zip(statistics_names(SHEAR), np.exp(summary_statistics(fields, system=SHEAR, **UNITS)[0])))
    rms = 2.5 / np.sqrt(2)
    for frame in range(1, 5):
        assert got[f"std tracer {frame}"] == pytest.approx(rms)
        assert got[f"gradient tracer {frame}"] == pytest.approx(rms * 2 * N * np.sin(k / N / 2))
        assert got[f"rate tracer {frame}"] == pytest.approx(rms * 2 / DT * np.sin(k * c * DT / 2))
        assert got[f"gradient pressure {frame}"] == got[f"rate velocity_x {frame}"] == pytest.approx(SMALLEST)


@pytest.mark.parametrize("name", SYSTEMS)
def test_statistics_of_every_system_and_their_names(name):
    system = get_system(name)
    fields = torch.randn(3, system.n_channels, 7, 12, 10, generator=torch.Generator().manual_seed(0))
    values = summary_statistics(fields, system=name, dt=0.5, spacing=(0.1, 0.2), frames=3)
    assert values.shape == (3, len(statistics_names(name, 3))) == (3, len(STATISTICS) * system.n_channels * 3)
    assert values.dtype == np.float64 and np.isfinite(values).all()
    assert np.array_equal(
        values, summary_statistics(fields.numpy(), system=system, dt=0.5, spacing=(0.1, 0.2), frames=3, chunk=2)
    )
    first = statistics_names(name, 3).index(f"rate {system.channels[-1]} 1")
    assert values[0, first] == pytest.approx(
        np.log((fields[0, -1, 1] - fields[0, -1, 0]).std(correction=0).item() / 0.5), abs=1e-5
    )


def test_statistics_do_not_change_under_the_exact_symmetries(flows):
    b = len(flows)
    rng = np.random.default_rng(0)
    shifts, mirrors = rng.integers(0, N, (b, 2)), rng.random((b, 2)) < 0.5
    moved = apply_symmetry(torch.from_numpy(flows), shifts, mirrors, SHEAR)
    before, after = (summary_statistics(f, system=SHEAR, **UNITS) for f in (flows, moved))
    assert np.allclose(before, after, atol=1e-5)


def test_walls_and_crops_have_no_neighbour_across_the_edge():
    system = get_system("rayleigh_benard")
    z = np.broadcast_to(np.arange(N) / N, (1, 4, 6, N, N))  # linear from plate to plate
    names = statistics_names(system)
    gradient = summary_statistics(z, system=system, **UNITS)[0, names.index("gradient buoyancy 1")]
    assert gradient == pytest.approx(0.0, abs=1e-9), "a jump back to the lower plate would be seen as a gradient"
    assert summary_statistics(z, system=SHEAR, **UNITS)[0, names.index("gradient buoyancy 1")] > 1
    assert summary_statistics(z, system=SHEAR, periodic=False, **UNITS)[
        0, names.index("gradient buoyancy 1")
    ] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="rayleigh_benard is not periodic along y"):
        summary_statistics(z, system=system, periodic=True, **UNITS)


def test_gradients_use_the_heights():
    y = vertical_points(N, "chebyshev")
    fields = np.broadcast_to(3 * y, (1, 4, 6, N, N))  # a slope of 3
    names = statistics_names(LAYER)
    values = np.exp(summary_statistics(fields, system=LAYER, dt=DT, spacing=(1 / N, np.nan), heights=y)[0])
    assert values[names.index("gradient buoyancy 1")] == pytest.approx(3.0)
    even = [summary_statistics(fields, system=LAYER, heights=h, **UNITS) for h in (None, vertical_points(N, "uniform"))]
    assert np.allclose(*even)

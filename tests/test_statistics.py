"""Summary statistics and spectra with known values, on periodic axes, between walls and on crops."""

import numpy as np
import pytest
import torch

from physrep.physics.layer import vertical_points
from physrep.physics.statistics import (
    FRAMES,
    SHELLS,
    SMALLEST,
    SMALLEST_POWER,
    SPECTRA,
    spectra,
    spectra_names,
    statistics_names,
    summary_statistics,
    wave_power,
    wave_shells,
    wavenumbers,
)
from physrep.physics.systems import SYSTEMS, get_system

SHEAR, LAYER = get_system("shear_flow"), get_system("rayleigh_benard")
DT, N = 0.2, 32
UNITS = dict(dt=DT, spacing=(1 / N, 1 / N))
MEASURES = {summary_statistics: statistics_names, spectra: spectra_names}


def measured(measure, fields, system=SHEAR, **options) -> dict[str, float]:
    "What is measured of one clip, not as logarithms."
    return dict(zip(MEASURES[measure](system), np.exp(measure(fields, system=system, **UNITS | options)[0])))


def noise(system, frames: int = 7) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, system.n_channels, frames, N, N)).astype(np.float32)


def test_a_travelling_sine_has_the_statistics_and_the_shell_of_the_formulas():
    k, speed = 2 * np.pi * 3, 0.05
    t, x = DT * np.arange(9)[:, None, None], np.arange(N)[:, None] / N
    fields = np.zeros((1, 4, 9, N, N))
    fields[0, 0], fields[0, 1] = 2.5 * np.sin(k * (x - speed * t)) + 7, 3.0
    got, rms, change = measured(summary_statistics, fields), 2.5 / np.sqrt(2), 2 / DT * np.sin(k * speed * DT / 2)
    for frame in range(1, FRAMES + 1):
        assert got[f"std tracer {frame}"] == pytest.approx(rms)
        assert got[f"gradient tracer {frame}"] == pytest.approx(rms * 2 * N * np.sin(k / N / 2))
        assert got[f"rate tracer {frame}"] == pytest.approx(rms * change)
        assert got[f"gradient pressure {frame}"] == got[f"rate velocity_x {frame}"] == pytest.approx(SMALLEST)
    got = measured(spectra, fields)
    [shell] = [s for s in range(1, SHELLS + 1) if got[f"power tracer {s}"] > 1e-6]
    assert got[f"power tracer {shell}"] == pytest.approx(rms**2)
    assert got[f"change tracer {shell}"] == pytest.approx(rms**2 * change**2)
    assert got["power pressure 1"] == pytest.approx(SMALLEST_POWER)


def test_wavenumbers_are_those_of_the_waves():
    x, y = np.arange(N) / N, (np.arange(N) + 0.5) / (2 * N)  # a box of length 1 and height 1/2
    field = np.cos(2 * np.pi * 5 * x)[:, None] * np.cos(np.pi * 6 * y)  # three half-waves between the walls
    power, k = wave_power(field, (True, False)), wavenumbers((N, N), (1 / N, 1 / (2 * N)), (True, False))
    assert power.sum() == pytest.approx(0.25) and np.count_nonzero(power > 1e-12) == 2
    assert k[power > 1e-12] == pytest.approx(np.hypot(2 * np.pi * 5, np.pi * 6))


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("measure", MEASURES)
def test_columns_have_names_and_windows_do_not_influence_each_other(name, measure):
    fields = noise(get_system(name))
    values = measure(fields, system=name, **UNITS)
    assert values.shape == (3, len(MEASURES[measure](name))) and values.dtype == np.float64
    learnt = torch.from_numpy(fields).requires_grad_()
    assert np.array_equal(values, measure(learnt, system=get_system(name), chunk=2, **UNITS))


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("periodic", [None, False], ids=["whole", "crop"])
def test_powers_add_up_to_the_variance(name, periodic):
    fields = noise(get_system(name)).astype(np.float64)
    powers = np.exp(spectra(fields, system=name, periodic=periodic, **UNITS))
    powers = powers.reshape(3, len(SPECTRA), -1, SHELLS).sum(-1)
    assert powers[:, 0] == pytest.approx(fields.var((-2, -1)).mean(2))
    assert powers[:, 1] == pytest.approx((np.diff(fields, axis=2) / DT).var((-2, -1)).mean(2))


def test_walls_and_crops_have_no_neighbour_across_the_edge():
    "A jump back to the lower plate would be seen as a gradient, and as power of the shortest waves."
    ramp = np.broadcast_to((np.arange(N) + 0.5) / N, (1, 4, 6, N, N))
    cases = {"walls": dict(system=LAYER), "crop": dict(periodic=False), "wrapped": {}}
    gradient = {k: measured(summary_statistics, ramp, **o) for k, o in cases.items()}
    gradient = {k: v.get("gradient buoyancy 1", v.get("gradient tracer 1")) for k, v in gradient.items()}
    assert gradient["walls"] == pytest.approx(1) and gradient["crop"] == pytest.approx(1) and gradient["wrapped"] > 2
    power = {k: measured(spectra, ramp, **o) for k, o in cases.items()}
    power = {k: v.get(f"power buoyancy {SHELLS}", v.get(f"power tracer {SHELLS}")) for k, v in power.items()}
    assert max(power["walls"], power["crop"]) < 0.01 * power["wrapped"]


def test_points_of_a_layer_need_not_be_evenly_spaced():
    y = vertical_points(N, "chebyshev")
    options = dict(system=LAYER, heights=y, spacing=(1 / N, np.nan))
    even = options | dict(heights=vertical_points(N, "uniform"))
    assert np.array_equal(spectra(noise(LAYER), dt=DT, **even), spectra(noise(LAYER), system=LAYER, **UNITS))
    slope = np.broadcast_to(3 * y, (1, 4, 6, N, N))
    assert measured(summary_statistics, slope, **options)["gradient buoyancy 1"] == pytest.approx(3.0)
    wave = measured(spectra, np.broadcast_to(np.cos(np.pi * 2 * y), (1, 4, 6, N, N)), **options)
    power = [wave[f"power buoyancy {shell}"] for shell in range(1, SHELLS + 1)]
    assert max(power) == pytest.approx(0.5, rel=0.03) and max(power) > 0.98 * sum(power)


def test_shells_without_a_wave_are_left_out_and_the_mean_is_in_none():
    index = wave_shells(wavenumbers((4, 4), (1 / 4, 1 / 4), (True, True)), np.pi * 4)
    assert index[0, 0] == -1 and sorted(set(index.ravel())) == [-1, 0, 1, 2], "1, sqrt 2, and 2 and more"
    assert spectra(np.zeros((1, 4, 2, 4, 4)), system=SHEAR, **UNITS).shape == (1, 2 * 4 * 3)

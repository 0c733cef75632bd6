"""Spectra with known values, on periodic and on walled axes."""

import numpy as np
import pytest
import torch

from physrep.data.batches import apply_symmetry
from physrep.physics.statistics import (
    SHELLS,
    SMALLEST_POWER,
    SPECTRA,
    spectra,
    spectra_names,
    wave_power,
    wave_shells,
    wavenumbers,
)
from physrep.physics.systems import SYSTEMS, get_system

SHEAR, LAYER = get_system("shear_flow"), get_system("rayleigh_benard")
DT, N = 0.2, 32
UNITS = dict(dt=DT, spacing=(1 / N, 1 / N))


def noise(system, frames: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, system.n_channels, frames, N, N)).astype(np.float32)


def test_a_travelling_sine_is_in_one_shell_and_changes_as_fast_as_its_phase():
    k, speed = 2 * np.pi * 3, 0.05
    t, x = DT * np.arange(9)[:, None, None], np.arange(N)[:, None] / N
    fields = np.zeros((1, 4, 9, N, N))
    fields[0, 0] = 2.5 * np.sin(k * (x - speed * t)) + 7
    got = dict(zip(spectra_names(SHEAR), np.exp(spectra(fields, system=SHEAR, **UNITS)[0])))
    [shell] = [s for s in range(1, SHELLS + 1) if got[f"power tracer {s}"] > 1e-6]
    assert got[f"power tracer {shell}"] == pytest.approx(2.5**2 / 2)
    assert got[f"change tracer {shell}"] == pytest.approx(2.5**2 / 2 * (2 / DT * np.sin(k * speed * DT / 2)) ** 2)
    assert got["power pressure 1"] == pytest.approx(SMALLEST_POWER)


def test_wavenumbers_are_those_of_the_waves():
    x, y = np.arange(N) / N, (np.arange(N) + 0.5) / (2 * N)  # a box of length 1 and height 1/2
    steps = (1 / N, 1 / (2 * N))
    field = np.cos(2 * np.pi * 5 * x)[:, None] * np.cos(np.pi * 6 * y)  # three half-waves between the walls
    power, k = wave_power(field, (True, False)), wavenumbers((N, N), steps, (True, False))
    assert power.sum() == pytest.approx(0.25) and np.count_nonzero(power > 1e-12) == 2
    assert k[power > 1e-12] == pytest.approx(np.hypot(2 * np.pi * 5, np.pi * 6))


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("periodic", [None, False], ids=["whole", "crop"])
def test_powers_add_up_to_the_variance(name, periodic):
    system = get_system(name)
    fields = noise(system)
    values = spectra(fields, system=name, periodic=periodic, **UNITS)
    assert values.shape == (3, len(spectra_names(name))) and values.dtype == np.float64
    powers = np.exp(values).reshape(3, len(SPECTRA), system.n_channels, SHELLS).sum(-1)
    change = np.diff(fields.astype(np.float64), axis=2) / DT
    assert powers[:, 0] == pytest.approx(fields.astype(np.float64).var((-2, -1)).mean(2))
    assert powers[:, 1] == pytest.approx(change.var((-2, -1)).mean(2))
    part = spectra(torch.from_numpy(fields), system=system, periodic=periodic, chunk=2, **UNITS)
    assert np.array_equal(values, part)


def test_spectra_do_not_change_under_the_exact_symmetries():
    fields = noise(SHEAR)
    rng = np.random.default_rng(0)
    moved = apply_symmetry(torch.from_numpy(fields), rng.integers(0, N, (3, 2)), rng.random((3, 2)) < 0.5, SHEAR)
    assert np.allclose(*(spectra(f, system=SHEAR, **UNITS) for f in (fields, moved)), atol=1e-4)


def test_walls_and_crops_have_no_jump_at_the_edge():
    ramp = np.broadcast_to((np.arange(N) + 0.5) / N, (1, 4, 3, N, N))  # linear from plate to plate
    last = spectra_names(LAYER).index(f"power buoyancy {SHELLS}")
    walled, wrapped, crop = (
        np.exp(spectra(ramp, system=system, periodic=periodic, **UNITS)[0, last])
        for system, periodic in ((LAYER, None), (SHEAR, None), (SHEAR, False))
    )
    assert walled < 0.01 * wrapped and crop < 0.01 * wrapped


def test_uneven_points_are_interpolated_and_heights_are_checked():
    y = 0.5 * (1 - np.cos(np.pi * (np.arange(N) + 0.5) / N))
    fields = np.broadcast_to(np.cos(np.pi * 2 * y), (1, 4, 3, N, N))
    names = spectra_names(LAYER)
    values = np.exp(spectra(fields, system=LAYER, dt=DT, spacing=(1 / N, np.nan), heights=y)[0, : len(names) // 2])
    channel = values[: SHELLS * 4].reshape(4, SHELLS)[0]
    assert channel.max() == pytest.approx(0.5, rel=0.03) and channel.max() > 0.98 * channel.sum()
    with pytest.raises(ValueError, match="heights must be 32 increasing numbers"):
        spectra(fields, system=LAYER, dt=DT, spacing=(1 / N, 1 / N), heights=y[::-1])


def test_shells_without_a_wave_are_left_out_and_the_mean_is_in_none():
    k = wavenumbers((4, 4), (1 / 4, 1 / 4), (True, True))
    index = wave_shells(k, np.pi * 4)
    assert index[0, 0] == -1 and sorted(set(index.ravel())) == [-1, 0, 1, 2], "1, sqrt 2, and 2 and more"
    assert spectra(np.zeros((1, 4, 2, 4, 4)), system=SHEAR, **UNITS).shape == (1, 2 * 4 * 3)
    with pytest.raises(ValueError, match="shells must be at least 1, got 0"):
        wave_shells(k, np.pi * 4, 0)
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        spectra(np.zeros((1, 4, 1, 4, 4)), system=SHEAR, **UNITS)

"""Measures of flows where their notebook does not look: The Well's metrics, mirror images, input that does not fit."""

import numpy as np
import pytest
import torch
from the_well.benchmark.metrics import VRMSE, binned_spectral_mse
from the_well.data.datasets import WellMetadata

from physrep.physics.measures import (
    _mean,
    defect_charges,
    defect_count,
    energy_enstrophy,
    shell_spectrum,
    spectral_errors,
    vrmse,
    wall_nusselt,
    wave_energy,
)
from physrep.physics.systems import SYSTEMS, get_system

MEASURES = {"shear_flow": wave_energy, "rayleigh_benard": wall_nusselt, "active_matter": defect_count}


def meta(shape):
    return WellMetadata("x", 2, shape, [], [], {0: ["a"], 1: [], 2: []}, {0: [], 1: [], 2: []}, [], 1, [1], [1])


def theirs(metric, predicted, true, **options):
    x, y = (torch.from_numpy(z)[..., None] for z in (predicted, true))
    return metric()(x, y, meta(true.shape[-2:]), **options)


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (16, 64)])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_metrics_are_those_of_the_well(shape, size):
    "With their default eps, which their own VRMSE takes whatever it is given; 1e-4: it decides the number."
    predicted, true = size * np.random.default_rng(0).normal(size=(2, 3, 2, *shape))
    assert np.allclose(vrmse(predicted, true), theirs(VRMSE, predicted, true)[..., 0], rtol=1e-6)
    found = theirs(binned_spectral_mse, predicted, true)
    for values, name in zip(spectral_errors(predicted, true), ("mse", "nmse")):
        for b in range(3):
            expected = found[f"spectral_error_{name}_per_bin_{b}"][..., 0].numpy()
            assert np.allclose(values[..., b], expected, rtol=1e-5)


def test_vrmse_is_the_formula_with_any_eps_and_floor():
    predicted, true = np.random.default_rng(1).normal(size=(2, 4, 12, 10))
    error = ((predicted - true) ** 2).sum((1, 2)) / 120
    variance = ((true - true.mean((1, 2), keepdims=True)) ** 2).sum((1, 2)) / 119
    for eps, floor in ((0.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.5, np.array([0.0, 1.0, 2.0, 3.0]))):
        assert np.allclose(
            vrmse(predicted, true, eps=eps, floor=floor), np.sqrt(error / np.maximum(variance + eps, floor))
        )
    assert np.array_equal(*(theirs(VRMSE, predicted, true, eps=eps) for eps in (0.5, 1e-7))), "theirs leaves it out"
    flat = np.zeros((12, 10))
    assert vrmse(flat, flat, eps=0.0) == 0 and np.isinf(vrmse(flat + 1, flat, eps=0.0)), "a perfect answer is perfect"


def test_spectrum_and_energy_do_not_move_with_the_flow():
    x = np.random.default_rng(2).normal(size=(2, 16, 24))
    points = np.arange(16) / 16, np.arange(24) / 12
    moved = np.roll(x, (3, 5), axis=(1, 2))
    assert np.allclose(energy_enstrophy(x, points, (True, True)), energy_enstrophy(moved, points, (True, True)))
    far = points[0] + 3, points[1] - 1
    assert np.allclose(energy_enstrophy(x, points, (True, True)), energy_enstrophy(x, far, (True, True)))
    k, power = shell_spectrum(x, (1 / 16, 1 / 12), (True, True))
    assert np.allclose(power, shell_spectrum(moved, (1 / 16, 1 / 12), (True, True))[1])
    assert np.allclose(k / (2 * np.pi), np.arange(1, len(k) + 1) / 2), "the longer side is 2"


def test_a_mean_over_the_box_counts_crowded_points_less_and_a_single_point_once():
    x, walls = np.arange(12.0).reshape(1, 3, 4), np.array([0.0, 0.5, 2.0])
    share = np.array([0.5, 1.0, 1.5]) / 3  # half of the distance of the neighbours, as far as there are any
    assert _mean(x, (walls, np.arange(4)), (False, True)) == pytest.approx(x[0].mean(1) @ share)
    assert _mean(x[:, :1], (walls[:1], np.arange(4)), (False, True)) == pytest.approx(1.5)


def noise(system, b=2, t=3, grid=(12, 16), seed=0):
    return np.random.default_rng(seed).normal(size=(b, get_system(system).n_channels, t, *grid))


def mirrored(fields, system, axis):
    s = get_system(system)
    image = np.flip(fields, axis + 3) * s.mirror_signs(axis)[:, None, None, None]
    n = fields.shape[axis + 3]
    return image + s.mirror_shift(axis, (np.arange(n) + 0.5) / n).reshape((-1, 1, n, 1) if axis == 0 else (-1, 1, 1, n))


@pytest.mark.parametrize("system, axis", [(name, a) for name, s in SYSTEMS.items() for a in s.mirror_axes])
def test_a_mirror_image_has_the_same_number(system, axis):
    x, s = noise(system), get_system(system)
    image = mirrored(x, system, axis)
    np.testing.assert_allclose(MEASURES[system](image, s), MEASURES[system](x, s), rtol=1e-12)


def test_convection_upside_down_carries_the_same_heat():
    s, x = get_system("rayleigh_benard"), noise("rayleigh_benard")
    turned = np.flip(x, 4).copy()
    turned[:, 0] = 1 - turned[:, 0]
    np.testing.assert_allclose(wall_nusselt(turned, s), wall_nusselt(x, s), rtol=1e-12)


def test_a_parallel_flow_with_cross_flow_is_a_wave():
    s, x = get_system("shear_flow"), np.zeros((1, 4, 1, 8, 8))
    x[0, 2] = 1.0
    assert wave_energy(x, s)[0] == 0
    x[0, 3] = 1.0
    assert wave_energy(x, s)[0] == pytest.approx(0.5), "v counts as a wave even where it is uniform"


def test_mirrors_turn_the_sign_of_no_defect():
    "A defect of +1/2 seen in a mirror is one of +1/2: head and tail are mirrored, too."
    s, x = get_system("active_matter"), noise("active_matter")
    here, there = (np.sort(defect_charges(f, s).reshape(2, -1)) for f in (x, mirrored(x, "active_matter", 0)))
    assert np.array_equal(here, there) and defect_count(x, s).min() > 0


@pytest.mark.parametrize("heights", [np.linspace(0, 1, 7), np.linspace(1, 0, 16), np.linspace(0, 2, 16)])
def test_heights_that_are_none(heights):
    with pytest.raises(ValueError, match="heights must be 16 increasing numbers between 0 and 1"):
        wall_nusselt(noise("rayleigh_benard"), get_system("rayleigh_benard"), heights)

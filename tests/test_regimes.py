"""Regimes where their notebook does not look: symmetries, edges, input that does not fit."""

import numpy as np
import pytest

from physrep.data.scaling import LabelScaler
from physrep.data.windows import Windows
from physrep.experiments.regimes import (
    REGIMES,
    later,
    probe_regime,
    regime_difference,
    regime_labels,
    regime_rows,
    regime_targets,
    state_now,
    state_parameters,
    state_statistics,
)
from physrep.physics.measures import defect_charges, defect_count, wall_nusselt, wave_energy
from physrep.physics.systems import SYSTEMS, get_system
from physrep.probing.features import Features


def noise(system, b=2, t=3, grid=(12, 16), seed=0):
    return np.random.default_rng(seed).normal(size=(b, get_system(system).n_channels, t, *grid))


def mirrored(fields, system, axis):
    s = get_system(system)
    image = np.flip(fields, axis + 3) * s.mirror_signs(axis)[:, None, None, None]
    n = fields.shape[axis + 3]
    return image + s.mirror_shift(axis, (np.arange(n) + 0.5) / n).reshape((-1, 1, n, 1) if axis == 0 else (-1, 1, 1, n))


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_only_the_last_frame_counts_and_the_batch_does_not(system):
    x = noise(system)
    value, above = regime_labels(x, system)
    alone = [regime_labels(x[i : i + 1, :, -1:], system)[0][0] for i in range(2)]
    np.testing.assert_allclose(value, alone)
    assert (above == (value > REGIMES[system].threshold)).all()


@pytest.mark.parametrize("system, axis", [(name, a) for name, s in SYSTEMS.items() for a in s.mirror_axes])
def test_a_mirror_image_is_in_the_same_regime(system, axis):
    x = noise(system)
    np.testing.assert_allclose(
        regime_labels(mirrored(x, system, axis), system)[0], regime_labels(x, system)[0], rtol=1e-12
    )


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


def test_bad_fields():
    with pytest.raises(ValueError, match=r"must be \(b, 4, t, h, w\), got \(2, 11, 3, 12, 16\)"):
        regime_labels(noise("active_matter"), "shear_flow")
    x = noise("shear_flow")
    x[0, 0, 0] = np.nan
    regime_labels(x, "shear_flow")  # not in the last frame
    x[0, 0, -1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="last frame of the fields has values that are not finite"):
        regime_labels(x, "shear_flow")


def test_later_pairs_each_window_with_the_one_after_it(smoke_data):
    w = Windows(smoke_data, "shear_flow", "test", frames=16, stride=8)
    now, then = later(w)
    assert (w.index[now, 0] == w.index[then, 0]).all() and (w.index[then, 1] - w.index[now, 1] == 16).all()
    assert len(now) == sum(tuple(i) in set(map(tuple, w.index)) for i in w.index + [0, 16])
    with pytest.raises(ValueError, match="no window of 'test' is followed by another 30 frames later"):
        later(Windows(smoke_data, "shear_flow", "test", frames=30, stride=30))


def test_features_of_noise_score_about_one_and_seeds_are_kept(smoke_data):
    windows = {s: Windows(smoke_data, "shear_flow", s, frames=8, stride=4) for s in ("train", "valid", "test")}
    targets = {s: regime_targets(w) for s, w in windows.items()}
    assert np.allclose(
        targets["test"], regime_labels(windows["test"].read(np.arange(len(windows["test"]))).numpy(), "shear_flow")[0]
    )
    assert np.array_equal(
        targets["test"],
        regime_targets(Windows(smoke_data, "shear_flow", "test", frames=8, stride=4, in_memory=False), memory=2**16),
    ), "from files, and in parts"

    known = (
        [{s: state_now(w, targets[s]) for s, w in windows.items()}],
        [{s: state_statistics(w) for s, w in windows.items()}],
    )
    now = [
        r["value"]
        for f in known
        for r in regime_rows(probe_regime(f, windows, targets, probes=["linear"]))
        if r["metric"] == "mse" and r["when"] == "now"
    ]
    assert now[0] < 1e-6 < now[1] < 0.5, "the number itself is exact, much of it can be read from statistics"
    scaler = LabelScaler.fit(get_system("shear_flow"), windows["train"].labels)
    assert state_parameters(windows["test"], scaler).tokens.shape == (len(windows["test"]), 1, 3 + 6)

    def blind(seed):
        rng = np.random.default_rng(seed)
        return {
            s: Features(rng.normal(size=(len(w), 1, 2)).astype(np.float32), w.labels[w.index[:, 0]], w.window_groups())
            for s, w in windows.items()
        }

    answers = probe_regime([blind(0), blind(1)], windows, targets, probes=["linear"])
    rows = regime_rows(answers)
    assert {(r["when"], r["split"]) for r in rows} == {("now", "test"), ("later", "test")}
    for r in (r for r in rows if r["metric"] == "mse"):
        assert (
            0.5 < r["value"] < 1.6
            and len(r["by_seed"]) == 2
            and r["low"] <= r["value"] <= r["high"]
            and 0 <= r["above"] <= 1
        )
    with pytest.raises(ValueError, match="answers to different questions"):
        regime_difference(answers["now", "linear", "test"], answers["later", "linear", "test"])
    against = probe_regime(known[0], windows, targets, probes=["linear"])
    difference, low, high = regime_difference(answers["now", "linear", "test"], against["now", "linear", "test"])
    value = {r["when"]: r["value"] for r in rows if r["metric"] == "mse"}
    assert difference == pytest.approx(value["now"], abs=1e-5) and 0 < low <= difference <= high, (
        "the other one makes no errors"
    )

"""What a probe knows of the clips that it was fitted on: others are named, and probes without it keep working."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import physrep
from physrep.data.scaling import LabelScaler
from physrep.data.windows import Windows
from physrep.physics.systems import get_system
from physrep.probing.features import Features
from physrep.probing.frozen import load_probe, probe_encoder
from physrep.probing.unlike import UNLIKE, distance, seen_clips, unlikeness, widening
from physrep.training.presets import get_preset


@pytest.fixture(scope="module")
def probed(smoke_data):
    "An encoder, its probe of some flows, and clips `(8, c, t, h, w)` of the same kind."
    encoder = physrep.load_encoder("shear_flow")
    windows = {s: Windows(smoke_data, "shear_flow", s, frames=16, stride=16) for s in ("train", "valid")}
    scaler = LabelScaler.fit(encoder.system, windows["train"].labels)
    found = probe_encoder(encoder, windows, scaler, get_preset("smoke"), probes=["kernel"], progress=False)
    return encoder, found.probes["kernel"], windows["train"].read(np.arange(8)).numpy()


def test_clips_unlike_those_of_training_are_named(probed, tmp_path):
    encoder, probe, clips = probed
    probe.save(tmp_path / "p.safetensors")
    loaded = load_probe(tmp_path / "p.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = loaded.predict_fields(encoder, clips, 0.2)
    faster = clips.copy()
    faster[:3, 2:] *= 4
    with pytest.warns(
        UserWarning, match="^3 of 8 clips are unlike those .*velocity_.*; of them it does not know$"
    ) as told:
        faster_values = loaded.predict_fields(encoder, faster, 0.2)
    assert np.allclose(faster_values[3:], values[3:]) and told[0].filename == __file__, "where it was asked"
    table = loaded.unlike(encoder, faster, 0.2)
    far = distance(table)
    assert table["std velocity_x"][3:].max() < 1.2 < table["std velocity_x"][:3].min(), "1 is usual"
    assert len(table) == 8 and far[:3].min() > UNLIKE > far[3:].max()
    assert {"features", "statistics", "std tracer", "gradient velocity_x", "rate pressure"} < set(table)
    ends = loaded.scaler.inverse(loaded.scaler.clip(np.array([[-99.0, -99.0], [99.0, 99.0]])))
    low, high = loaded.interval(faster_values, unlike=table)
    assert np.allclose(low[:3], ends[0]) and np.allclose(high[:3], ends[1]), "it does not know"
    plain = loaded.interval(faster_values)
    assert (low <= plain[0]).all() and (high >= plain[1]).all() and np.allclose(low[far < 1], plain[0][far < 1])


def test_intervals_widen_with_the_square_of_the_distance():
    table = pd.DataFrame({"features": [0.2, 1.2, 0.3, 0.1], "statistics": [0.9, 0.4, 1.6, 0.1], "std tracer": 9.0})
    assert np.allclose(widening(table), [1, 1.44, np.inf, 1])
    assert np.allclose(widening(table[["features"]]), [1, 1.44, 1, 1]), "nothing is known of the fields"


def test_other_flows_are_near_whatever_their_density_and_a_gap_between_them_is_far():
    "Two clusters, one ten times as dense: new points of both are near, those between them are not."
    draw = np.random.default_rng(0).standard_normal
    clusters = lambda n: np.concatenate([draw((n, 3)), 0.1 * draw((n, 3)) + [9, 0, 0]])  # noqa: E731
    nothing = lambda n: dict(labels=np.ones((n, 1)), groups=np.arange(n))  # noqa: E731
    seen = seen_clips(Features(clusters(60)[:, None].astype(np.float32), **nothing(120)))
    new = np.concatenate([clusters(50), 0.1 * draw((50, 3)) + [5, 0, 0]])
    system = get_system("shear_flow")
    far = distance(unlikeness(seen, Features(new[:, None].astype(np.float32), **nothing(150)), None, system))
    assert (far[:100] > UNLIKE).mean() < 0.1 and (far[100:] > UNLIKE).all() and far.shape == (150,)
    assert 0.7 < (far[:100] < 1).mean(), "9 of 10 of those of training are"
    assert seen_clips(Features(clusters(2)[:, None].astype(np.float32), **nothing(4))) == {}, "too few"


def test_a_probe_without_it_works_and_says_that_it_does_not_know(probed):
    encoder, probe, clips = probed
    plain = replace(probe, arrays={k: v for k, v in probe.arrays.items() if not k.startswith("seen.")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(plain.predict_fields(encoder, 9 * clips, 0.2)[:1].shape, (1, 2))
    with pytest.raises(ValueError, match="does not know what its training clips looked like"):
        plain.unlike(encoder, clips, 0.2)
    shipped = physrep.load_probe("shear_flow", "linear")
    assert shipped.predict_fields(encoder, clips, 0.2).shape == (8, 2)

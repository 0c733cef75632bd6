"""What a probe knows of the clips that it was fitted on: others are named, and probes without it keep working."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

import physrep
from physrep.data.scaling import LabelScaler
from physrep.data.windows import Windows
from physrep.probing.frozen import load_probe, probe_encoder
from physrep.training.presets import get_preset


@pytest.fixture(scope="module")
def probed(smoke_data):
    "An encoder, its probe of some flows, and clips `(8, c, t, h, w)` of the same kind."
    encoder = physrep.load_encoder("shear_flow-forecast-vit")
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
    with pytest.warns(UserWarning, match="^[34] of 8 clips are unlike those .*velocity_.* its intervals may not hold$"):
        assert np.allclose(loaded.predict_fields(encoder, faster, 0.2)[3:], values[3:])
    table = loaded.unlike(encoder, faster, 0.2)
    assert len(table) == 8 and table["features"][:3].min() > 1.5 > table["features"][3:].max()
    assert {"std tracer", "gradient velocity_x", "rate pressure"} < set(table)


def test_a_probe_without_it_works_and_says_that_it_does_not_know(probed):
    encoder, probe, clips = probed
    plain = replace(probe, arrays={k: v for k, v in probe.arrays.items() if not k.startswith("seen.")})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(plain.predict_fields(encoder, 9 * clips, 0.2)[:1].shape, (1, 2))
    with pytest.raises(ValueError, match="does not know what its training clips looked like"):
        plain.unlike(encoder, clips, 0.2)
    shipped = physrep.load_probe("shear_flow-forecast-vit", "linear")
    assert shipped.predict_fields(encoder, clips, 0.2).shape == (8, 2)

"""The encoders and probes that come with the package: they load by name, know something, and the README's lines work as they stand."""

import re
from pathlib import Path

import numpy as np
import pytest

import physrep
from physrep.models.pretrained import SHIPPED
from physrep.training.run import build, resolve
from physrep.physics import shear_flow
from physrep.physics.systems import get_system

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(p.name for p in SHIPPED.iterdir())
PAIRS = [(400.0, 0.5), (800.0, 2.0), (1600.0, 0.25), (3200.0, 1.0)]


@pytest.fixture(scope="module")
def flows() -> tuple[np.ndarray, np.ndarray]:
    "Clips `(b, 4, 16, 32, 32)` of flows that no data set holds, and their labels `(b, 2)`."
    fields, labels = [], []
    for reynolds, schmidt in PAIRS:
        flow = shear_flow.simulate(
            reynolds, schmidt, list(range(900, 904)), grid=64, store_grid=32, n_frames=32, frame_dt=0.2, dt=0.025
        )
        x = np.stack([flow["tracer"], flow["pressure"], flow["velocity"][..., 0], flow["velocity"][..., 1]], axis=1)
        fields += [x[:, :, :16], x[:, :, 16:]]
        labels += [(reynolds, schmidt)] * 8
    return np.concatenate(fields).astype(np.float32), np.array(labels)


def test_three_encoders_come_with_the_package():
    assert NAMES == ["shear_flow-jepa-convnext", "shear_flow-mae-vit", "shear_flow-supervised-vit"]
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*.safetensors")) < 8e6


@pytest.mark.parametrize("name", NAMES)
def test_they_are_of_the_laptop_preset(name):
    system, objective, encoder = name.split("-")
    encoder, config = physrep.load_encoder(name), resolve(system, objective, encoder, "laptop")
    assert (encoder.info["objective"], encoder.info["preset"], encoder.info["seed"]) == (objective, "laptop", 0)
    fresh = build(config, tuple(encoder.info["shape"]), get_system(system).n_channels).encoder
    assert {k: v.shape for k, v in encoder.encoder.state_dict().items()} == {
        k: v.shape for k, v in fresh.state_dict().items()
    }
    assert fresh.config == encoder.encoder.config


@pytest.mark.parametrize("probe", ["linear", "attentive"])
@pytest.mark.parametrize("name", NAMES)
def test_they_know_something(name, probe, flows):
    fields, labels = flows
    encoder, reader = physrep.load_encoder(name), physrep.load_probe(name, probe)
    z = reader.scaler.transform(reader.predict_fields(encoder, fields, dt=0.2))
    error = ((z - reader.scaler.transform(labels)) ** 2).mean(0)
    assert error[0] < 0.6 and error.mean() < 0.75, "a constant scores about 1"


def test_another_encoder_is_refused(flows):
    with pytest.raises(ValueError, match="fitted on features of the encoder with digest"):
        physrep.load_probe(NAMES[0], "linear").predict_fields(physrep.load_encoder(NAMES[1]), flows[0][:1], dt=0.2)
    with pytest.raises(FileNotFoundError, match="shear_flow-jepa-convnext"):
        physrep.load_encoder("shear_flow-jeppa-convnext")


def test_lines_of_the_readme(flows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("my_flow.npy", flows[0][:3])
    code = next(
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "load_encoder" in b
    )
    names: dict = {}
    exec(code, names)
    assert names["features"].shape == (3, 96) and names["numbers"].shape == (3, 2)
    assert (names["low"] <= names["numbers"]).all() and (names["numbers"] <= names["high"]).all()


def test_importing_the_package_is_cheap_and_says_what_there_is():
    assert "load_encoder" in dir(physrep)
    with pytest.raises(AttributeError, match="has no attribute 'load_encodre'; it has load_encoder"):
        physrep.load_encodre  # noqa: B018

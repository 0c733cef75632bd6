"""Saved encoders: what `embed` takes and refuses, and the encoders and probes that come with the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import readme_lines

import physrep
from physrep.data.scaling import Normaliser
from physrep.models.encoders import build_encoder
from physrep.models.pretrained import SHIPPED, load_encoder, read_encoder, save_encoder
from physrep.physics import shear_flow
from physrep.physics.systems import SYSTEMS, get_system
from physrep.training.presets import get_preset

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(folder.name for folder in SHIPPED.iterdir())
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
    assert [name.partition("-")[0] for name in NAMES] == sorted(SYSTEMS)
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*.safetensors")) < 8e6


@pytest.mark.parametrize("name", NAMES)
def test_they_are_of_the_laptop_preset(name):
    system, objective, encoder_name = name.split("-")
    encoder = physrep.load_encoder(name)
    assert (encoder.info["objective"], encoder.info["preset"], encoder.info["seed"]) == (objective, "laptop", 0)
    channels = get_system(system).n_channels
    fresh = build_encoder(encoder_name, in_channels=channels, **get_preset("laptop").encoders[encoder_name])
    fresh.load_state_dict(encoder.encoder.state_dict())
    assert fresh.config == encoder.encoder.config
    clip = np.random.default_rng(0).normal(size=(1, channels, *encoder.info["shape"]))
    for probe in ("linear", "attentive"):
        found = physrep.load_probe(name, probe).predict_fields(encoder, clip, dt=encoder.info["dt"])
        assert found.shape == (1, 2) and np.isfinite(found).all()


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_labels_can_be_read_from_them(probe, flows):
    fields, labels = flows
    encoder, reader = physrep.load_encoder("shear_flow"), physrep.load_probe("shear_flow", probe)
    z = reader.scaler.transform(reader.predict_fields(encoder, fields, dt=0.2))
    error = ((z - reader.scaler.transform(labels)) ** 2).mean(0)
    assert error[0] < 0.5 and error.mean() < 0.7, "a constant scores about 1"


def test_another_encoder_is_refused(flows):
    with pytest.raises(ValueError, match="fitted on features of the encoder with digest"):
        other = physrep.load_encoder("shear_flow")
        physrep.load_probe("rayleigh_benard", "linear").predict_fields(other, flows[0][:1], dt=0.2)
    with pytest.raises(FileNotFoundError, match=f"no encoder at shear.* {NAMES[-1]}"):
        physrep.load_encoder("shear")


def test_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(readme_lines(), names)
    predicted = names["probe"].predict_fields(names["encoder"], names["flows"].memory[:, :, :16], names["flows"].dt)
    assert np.corrcoef(np.log(predicted[:, 0]), np.log(names["flows"].labels[:, 0]))[0, 1] > 0.5
    assert {"mine", "random weights of mine", "equations"} <= set(
        capsys.readouterr().out.replace("  ", "\n").split("\n")
    )


# saving and loading

MEAN, STD = torch.tensor([0.0, 0.5, -3.0, 1e-3]), torch.tensor([0.1, 1e-4, 2.0, 7.0])
FACTS = {"system": "shear_flow", "shape": (4, 8, 8), "dt": 0.2}


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.manual_seed(0)
    vit = build_encoder("vit", in_channels=4, dim=12, depth=1, heads=2, tubelet=(2, 4, 4))
    save_encoder(tmp_path / "encoder.safetensors", vit, "vit", mean=MEAN, std=STD, **FACTS, note="a test")
    return tmp_path


def clips(n: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, 4, 4, 8, 8))


def test_the_normalisation_is_that_of_batches_and_moves_with_the_encoder(saved):
    encoder, x = load_encoder(saved), torch.randn(2, 4, 5)
    assert torch.equal(encoder.normalise(x), Normaliser(MEAN, STD)(x)), "to the bit"
    assert torch.equal(encoder.mean, MEAN) and encoder.info["mean"] == MEAN.tolist() and encoder.info["note"]
    assert not {"mean", "std"} & encoder.state_dict().keys() and encoder.to("meta").mean.device.type == "meta"
    assert not any(p.requires_grad for p in encoder.parameters())


def test_what_does_not_fit_is_neither_written_nor_read(saved):
    network, _ = read_encoder(saved)
    with pytest.raises(ValueError, match="mean must have one number for each of the 4 channels of shear_flow"):
        save_encoder(saved / "e.safetensors", network, "vit", mean=MEAN[:3], std=STD, **FACTS)
    assert not (saved / "e.safetensors").exists()
    network = build_encoder("vit", in_channels=4, dim=12, depth=2, heads=2, tubelet=(2, 4, 4))
    network.config = network.config | {"depth": 1}
    save_encoder(saved / "odd.safetensors", network, "vit", mean=MEAN, std=STD, **FACTS)
    with pytest.raises(ValueError, match="weights in .*odd.safetensors do not fit"):
        load_encoder(saved / "odd.safetensors")


class Mean(torch.nn.Module):
    def __init__(self, in_channels, dim=8):
        super().__init__()
        self.dim, self.linear = dim, torch.nn.Linear(in_channels, dim)

    def grid(self, shape):
        return (1, 1, 1)

    def forward(self, x):
        return self.linear(x.mean((2, 3, 4)))[:, None]


def test_an_encoder_of_another_package_is_saved_and_loaded(tmp_path):
    encoder = build_encoder(f"{__name__}:Mean", in_channels=4, dim=5)
    save_encoder(tmp_path / "encoder.safetensors", encoder, f"{__name__}:Mean", mean=MEAN, std=STD, **FACTS)
    assert load_encoder(tmp_path).embed(clips(), 0.2).shape == (3, 5)


# what `embed` takes


def ways() -> dict[str, object]:
    x = clips()
    read_only = x.astype(np.float32)
    read_only.setflags(write=False)
    return {
        "big-endian": x.astype(">f4"),
        "long double": x.astype(np.longdouble),
        "read-only": read_only,
        "negative strides": x[::-1][::-1],
        "nested lists": x.tolist(),
        "tensor with gradient": torch.tensor(x, requires_grad=True),
        "tuple of both": (x[0], torch.tensor(x[1]), x[2].astype(np.float32)),
        "masked array without a mask": np.ma.array(x),
    }


@pytest.mark.parametrize("way", ways())
@pytest.mark.filterwarnings("error")
def test_embed_takes_fields_as_they_come(saved, way):
    encoder, fields = load_encoder(saved), ways()[way]
    assert np.array_equal(encoder.embed(fields, 0.2), encoder.embed(clips().astype(np.float32), 0.2))


@pytest.mark.parametrize("dtype", [np.int16, np.uint32, np.float16, torch.bfloat16, torch.int32])
def test_embed_takes_other_real_types(saved, dtype):
    whole = np.round(10 * np.abs(clips()))  # exact in all of them
    fields = torch.tensor(whole).to(dtype) if isinstance(dtype, torch.dtype) else whole.astype(dtype)
    encoder = load_encoder(saved)
    assert np.array_equal(encoder.embed(fields, 0.2), encoder.embed(whole, 0.2))


@pytest.mark.parametrize("pool, shape", [(True, (0, 12)), (False, (0, 8, 12))])
def test_no_clips_have_no_features(saved, pool, shape):
    features = load_encoder(saved).embed(clips(0), 0.2, pool=pool)
    assert features.shape == shape and features.dtype == np.float32


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x + 1j, "dtype complex128; real numbers are wanted: float32"),
        (lambda x: [torch.tensor(x[0] + 1j)], "dtype torch.complex128; real numbers"),
        (lambda x: torch.tensor(x > 0), "dtype torch.bool; real numbers"),
        (lambda x: "a path.npy", "dtype <U.*; real numbers"),
        (lambda x: x.astype("datetime64[s]"), "dtype datetime64.*; real numbers"),
        (lambda x: [x[0], x[1, :3]], "every clip must have the same shape"),
        (lambda x: np.ma.masked_less(x, 0), "masked values"),
        (lambda x: x[0], r"fields must be \(b, 4, 4, h, w\)"),
        (lambda x: x[:, :3], "with channels tracer, pressure, velocity_x, velocity_y; got shape"),
        (lambda x: x[..., :4], "trained on grids of 8x8, got 8x4"),
        (lambda x: x * 1e300, "not finite"),
    ],
)
def test_embed_refuses(saved, change, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(saved).embed(change(clips()), 0.2)


def test_embed_refuses_another_time_step_and_reads_in_batches(saved):
    encoder = load_encoder(saved)
    with pytest.raises(ValueError, match="frames 0.2 apart, got dt=0.4"):
        encoder.embed(clips(), 0.4)
    assert np.allclose(encoder.embed(clips(), 0.2, batch_size=2), encoder.embed(clips(), 0.2), atol=1e-6)

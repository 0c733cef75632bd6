"""Saved encoders: what `embed` takes and refuses, and the encoders and probes that come with the package."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import physrep
from physrep.data.scaling import Normaliser
from physrep.models.encoders import build_encoder
from physrep.models.pretrained import SHIPPED, LoadedEncoder, load_encoder, read_encoder, save_encoder
from physrep.physics import shear_flow
from physrep.physics.systems import get_system
from physrep.training.presets import get_preset

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
    assert NAMES == ["active_matter-mae-vit", "rayleigh_benard-invariance-vit", "shear_flow-forecast-vit"]
    assert sum(p.stat().st_size for p in SHIPPED.rglob("*.safetensors")) < 8e6


@pytest.mark.parametrize("name", NAMES)
def test_they_are_of_the_laptop_preset(name):
    system, objective, encoder_name = name.split("-")
    encoder = physrep.load_encoder(name)
    assert (encoder.info["objective"], encoder.info["preset"], encoder.info["seed"]) == (objective, "laptop", 0)
    channels = get_system(system).n_channels
    fresh = build_encoder(encoder_name, in_channels=channels, **get_preset("laptop").encoders[encoder_name])
    shapes = {k: v.shape for k, v in encoder.encoder.state_dict().items()}
    assert shapes == {k: v.shape for k, v in fresh.state_dict().items()}
    assert fresh.config == encoder.encoder.config
    clip = np.random.default_rng(0).normal(size=(1, channels, *encoder.info["shape"]))
    for probe in ("linear", "attentive"):
        found = physrep.load_probe(name, probe).predict_fields(encoder, clip, dt=encoder.info["dt"])
        assert found.shape == (1, 2) and np.isfinite(found).all()


@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_labels_can_be_read_from_them(probe, flows):
    fields, labels = flows
    name = "shear_flow-forecast-vit"
    encoder, reader = physrep.load_encoder(name), physrep.load_probe(name, probe)
    z = reader.scaler.transform(reader.predict_fields(encoder, fields, dt=0.2))
    error = ((z - reader.scaler.transform(labels)) ** 2).mean(0)
    assert error[0] < 0.5 and error.mean() < 0.7, "a constant scores about 1"


def test_another_encoder_is_refused(flows):
    with pytest.raises(ValueError, match="fitted on features of the encoder with digest"):
        other = physrep.load_encoder("shear_flow-forecast-vit")
        physrep.load_probe("rayleigh_benard-invariance-vit", "linear").predict_fields(other, flows[0][:1], dt=0.2)
    with pytest.raises(FileNotFoundError, match="shear_flow-forecast-vit"):
        physrep.load_encoder("shear_flow-forcast-vit")


def test_lines_of_the_readme(flows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("my_flow.npy", flows[0][:3])
    code = next(
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "load_encoder" in b
    )
    names: dict = {}
    exec(code, names)
    assert names["features"].shape == (3, 64) and names["numbers"].shape == (3, 2)
    assert (names["low"] <= names["numbers"]).all() and (names["numbers"] <= names["high"]).all()


def test_importing_the_package_is_cheap_and_says_what_there_is():
    assert "load_encoder" in dir(physrep)
    with pytest.raises(AttributeError, match="has no attribute 'load_encodre'; it has load_encoder"):
        physrep.load_encodre  # noqa: B018


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


@pytest.mark.parametrize("shape", [(3, 4, 4, 8, 8), (2, 4), (2, 4, 5)])
def test_normalise_is_to_the_bit_what_batches_do(saved, shape):
    encoder, x = load_encoder(saved), torch.randn(shape)
    assert torch.equal(encoder.normalise(x), Normaliser(MEAN, STD)(x))
    assert torch.equal(encoder.mean, MEAN) and torch.equal(encoder.std, STD)


def test_the_normalisation_is_metadata_and_moves_with_the_encoder(saved):
    encoder = load_encoder(saved)
    assert {"mean", "std"} <= dict(encoder.named_buffers()).keys()
    assert not {"mean", "std"} & encoder.state_dict().keys()
    assert encoder.to("meta").mean.device.type == "meta"
    assert encoder.info["note"] == "a test" and encoder.info["mean"] == MEAN.tolist()
    assert not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("wrong", [MEAN[:3], MEAN[None], 1.0])
def test_a_normalisation_that_does_not_fit_is_refused(saved, wrong):
    network, _ = read_encoder(saved)
    with pytest.raises(ValueError, match="mean must have one number for each of the 4 channels of shear_flow"):
        save_encoder(saved / "e.safetensors", network, "vit", mean=wrong, std=STD, **FACTS)
    assert not (saved / "e.safetensors").exists()


def test_weights_that_do_not_fit_their_configuration_are_named(saved):
    network = build_encoder("vit", in_channels=4, dim=12, depth=2, heads=2, tubelet=(2, 4, 4))
    network.config = network.config | {"depth": 1}
    save_encoder(saved / "odd.safetensors", network, "vit", mean=MEAN, std=STD, **FACTS)
    with pytest.raises(ValueError, match="weights in .*odd.safetensors do not fit"):
        load_encoder(saved / "odd.safetensors")


def test_an_encoder_of_another_package_is_saved_and_loaded(tmp_path, monkeypatch):
    (tmp_path / "their_encoders.py").write_text(
        "from torch import nn\n\n\nclass Mean(nn.Module):\n"
        "    def __init__(self, in_channels, dim=8):\n"
        "        super().__init__()\n"
        "        self.dim, self.linear = dim, nn.Linear(in_channels, dim)\n\n"
        "    def grid(self, shape):\n        return (1, 1, 1)\n\n"
        "    def forward(self, x):\n        return self.linear(x.mean((2, 3, 4)))[:, None]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    encoder = build_encoder("their_encoders:Mean", in_channels=4, dim=5)
    save_encoder(tmp_path / "encoder.safetensors", encoder, "their_encoders:Mean", mean=MEAN, std=STD, **FACTS)
    assert load_encoder(tmp_path).embed(clips(), 0.2).shape == (3, 5)


# what `embed` takes


def awkward() -> dict[str, object]:
    x = clips()
    read_only = x.astype(np.float32)
    read_only.setflags(write=False)
    return {
        "float64": x,
        "big-endian": x.astype(">f4"),
        "long double": x.astype(np.longdouble),
        "read-only": read_only,
        "Fortran order": np.asfortranarray(x),
        "negative strides": x[::-1][::-1],
        "list of arrays": list(x),
        "nested lists": x.tolist(),
        "tensor": torch.tensor(x),
        "tensor with gradient": torch.tensor(x, requires_grad=True),
        "list of tensors": [torch.tensor(clip, requires_grad=True) for clip in x],
        "tuple of both": (x[0], torch.tensor(x[1]), x[2].astype(np.float32)),
        "masked array without a mask": np.ma.array(x),
    }


@pytest.mark.parametrize("way", awkward())
@pytest.mark.filterwarnings("error")
def test_embed_takes_fields_as_they_come(saved, way):
    encoder, fields = load_encoder(saved), awkward()[way]
    assert np.array_equal(encoder.embed(fields, 0.2), encoder.embed(clips().astype(np.float32), 0.2))


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.uint32, np.int64, np.float16, torch.bfloat16, torch.int32])
def test_embed_takes_other_real_types(saved, dtype):
    whole = np.round(10 * np.abs(clips()))  # exact in all of them
    fields = torch.tensor(whole).to(dtype) if isinstance(dtype, torch.dtype) else whole.astype(dtype)
    encoder = load_encoder(saved)
    assert np.array_equal(encoder.embed(fields, 0.2), encoder.embed(whole, 0.2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_embed_takes_tensors_on_another_device(saved):
    x, plain = torch.tensor(clips()), load_encoder(saved).embed(clips(), 0.2)
    for fields, device in ((x.cuda(), "cpu"), (x, "cuda"), (x.cuda(), "cuda"), (list(x.cuda()), "cuda")):
        assert np.allclose(load_encoder(saved, device).embed(fields, 0.2), plain, atol=1e-4)


@pytest.mark.parametrize("pool, shape", [(True, (0, 12)), (False, (0, 8, 12))])
@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_no_clips_have_no_features(saved, name, pool, shape):
    encoder = load_encoder(saved)
    if name == "convnext":
        stem = {"stem_kernel": (2, 4, 4), "stem_stride": (2, 4, 4)}
        network = build_encoder("convnext", in_channels=4, widths=(12,), depths=(1,), **stem)
        encoder = LoadedEncoder(network, encoder.info)
    for empty in (clips(0), torch.tensor(clips(0))):
        features = encoder.embed(empty, 0.2, pool=pool)
        assert features.shape == shape and features.dtype == np.float32
    with pytest.raises(ValueError, match="got shape"):
        encoder.embed([], 0.2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x + 1j, "dtype complex128; real numbers are wanted: float32"),
        (lambda x: torch.tensor(x + 1j), "dtype torch.complex128; real numbers"),
        (lambda x: [torch.tensor(x[0] + 1j)], "dtype torch.complex128; real numbers"),
        (lambda x: x > 0, "dtype bool; real numbers"),
        (lambda x: torch.tensor(x > 0), "dtype torch.bool; real numbers"),
        (lambda x: x.astype(str), "dtype <U.*; real numbers"),
        (lambda x: "a path.npy", "dtype <U.*; real numbers"),
        (lambda x: x.astype(object), "dtype object; real numbers"),
        (lambda x: None, "dtype object; real numbers"),
        (lambda x: x.astype("datetime64[s]"), "dtype datetime64.*; real numbers"),
        (lambda x: [x[0], x[1, :3]], "every clip must have the same shape"),
        (lambda x: np.ma.masked_less(x, 0), "masked values"),
        (lambda x: x[0], r"fields must be \(b, 4, 4, h, w\)"),
        (lambda x: x[:, :3], "with channels tracer, pressure, velocity_x, velocity_y; got shape"),
        (lambda x: x[:, :, :2], "got shape"),
        (lambda x: x[..., :4], "trained on grids of 8x8, got 8x4"),
        (lambda x: x * 1e300, "not finite"),
        (lambda x: np.where(x > 2, np.nan, x), "not finite"),
    ],
)
def test_embed_refuses(saved, change, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(saved).embed(change(clips()), 0.2)


def test_embed_refuses_another_time_step_and_no_batches(saved):
    encoder = load_encoder(saved)
    with pytest.raises(ValueError, match="frames 0.2 apart, got dt=0.4"):
        encoder.embed(clips(), 0.4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encoder.embed(clips(), 0.2, batch_size=0)
    assert np.allclose(encoder.embed(clips(), 0.2, batch_size=2), encoder.embed(clips(), 0.2), atol=1e-6)


def test_an_encoder_without_weights_gives_features(tmp_path):
    class Energy(torch.nn.Module):
        def forward(self, x):
            return x.square().mean((3, 4)).transpose(1, 2)

    loaded = load_encoder("shear_flow-forecast-vit")
    loaded.encoder = Energy()
    clip = np.random.default_rng(0).normal(size=(2, 4, *loaded.info["shape"]))
    assert loaded.embed(clip, dt=loaded.info["dt"]).shape == (2, 4)

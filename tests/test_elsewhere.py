"""Published weights: what is read, what is refused, and the same numbers as the published layers written out."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from physrep.models.elsewhere import load_conv_predictor, load_convnext, load_videomae, read_weights
from physrep.models.pretrained import load_encoder, save_encoder
from physrep.models.vit import ViT
from physrep.probing.evaluate import own_encoder, score_run
from physrep.probing.features import normaliser_for, probe_splits
from physrep.training.run import resolve

DIMS, DEPTHS = (4, 6, 8), (1, 2, 1)


def block(dim: int, axes: int) -> dict[str, tuple]:
    return {
        "conv.weight": (dim, 1, *(7,) * axes),
        **{f"{name}.weight": shape for name, shape in (("pwconv1", (4 * dim, dim)), ("pwconv2", (dim, 4 * dim)))},
        **dict.fromkeys(("conv.bias", "norm.weight", "norm.bias", "pwconv2.bias", "gamma"), (dim,)),
        "pwconv1.bias": (4 * dim,),
    }


def filled(shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def convnext_file(channels: int = 3, dims=DIMS, depths=DEPTHS) -> dict[str, torch.Tensor]:
    "Names and shapes as the authors' encoder of 16 frames has them."
    shapes = {"downsample_layers.0.0.weight": (dims[0], channels, 1, 4, 4), "downsample_layers.0.0.bias": (dims[0],)}
    shapes |= {f"downsample_layers.0.1.{kind}": (dims[0],) for kind in ("weight", "bias")}
    for i in range(1, len(dims)):
        shapes |= {f"downsample_layers.{i}.0.{kind}": (dims[i - 1],) for kind in ("weight", "bias")}
        shapes |= {f"downsample_layers.{i}.1.weight": (dims[i], dims[i - 1], 2, 2, 2)}
        shapes |= {f"downsample_layers.{i}.1.bias": (dims[i],)}
    for i, depth in enumerate(depths):
        for j in range(depth):
            layers = block(dims[i], 3 if i < len(dims) - 1 else 2)
            shapes |= {f"res_blocks.{i}.{j}.{name}": shape for name, shape in layers.items()}
    return filled(shapes)


def channel_norm(x: torch.Tensor, state: dict, name: str) -> torch.Tensor:
    y = F.layer_norm(x.movedim(1, -1), (x.shape[1],), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)
    return y.movedim(-1, 1)


def run_block(x: torch.Tensor, state: dict, name: str) -> torch.Tensor:
    weight = state[f"{name}.conv.weight"]
    convolve = F.conv3d if weight.ndim == 5 else F.conv2d
    y = channel_norm(
        convolve(x, weight, state[f"{name}.conv.bias"], padding=3, groups=len(weight)), state, f"{name}.norm"
    )
    y = F.gelu(F.linear(y.movedim(1, -1), state[f"{name}.pwconv1.weight"], state[f"{name}.pwconv1.bias"]))
    y = state[f"{name}.gamma"] * F.linear(y, state[f"{name}.pwconv2.weight"], state[f"{name}.pwconv2.bias"])
    return x + y.movedim(-1, 1)


def test_convnext_computes_what_the_published_layers_compute(tmp_path):
    state = convnext_file()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "encoder.pth")
    x = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    y = F.conv3d(F.pad(x, (1, 2, 1, 2)), state["downsample_layers.0.0.weight"], state["downsample_layers.0.0.bias"])
    y = channel_norm(y, state, "downsample_layers.0.1")
    for i, depth in enumerate(DEPTHS):
        if i:
            name = f"downsample_layers.{i}.1"
            y = channel_norm(y, state, f"downsample_layers.{i}.0")
            y = F.conv3d(y, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)
        y = y[:, :, 0] if i == 2 else y  # one frame is left
        for j in range(depth):
            y = run_block(y, state, f"res_blocks.{i}.{j}")
    with torch.no_grad():
        tokens = load_convnext(tmp_path / "encoder.pth")(x)
    torch.testing.assert_close(tokens, y.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_predictor_computes_what_the_published_layers_compute(tmp_path):
    shapes = {f"conv.1.{name}": shape for name, shape in block(12, 2).items()}
    shapes |= {
        "conv.0.weight": (12, 6, 2, 2),
        "conv.0.bias": (12,),
        "conv.2.weight": (6, 12, 2, 2),
        "conv.2.bias": (6,),
    }
    state = filled(shapes)
    save_file(state, tmp_path / "predictor.safetensors")
    maps = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(1))
    y = run_block(F.conv2d(maps, state["conv.0.weight"], state["conv.0.bias"], padding=1), state, "conv.1")
    y = F.conv2d(y, state["conv.2.weight"], state["conv.2.bias"])
    with torch.no_grad():
        tokens = load_conv_predictor(tmp_path / "predictor.safetensors")(maps.flatten(2).transpose(1, 2), (1, 3, 4))
    torch.testing.assert_close(tokens, y.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    state["conv.0.weight"] = torch.zeros(12, 6, 2, 2, 2)  # it mixes frames
    save_file(state, tmp_path / "3d.safetensors")
    with pytest.raises(ValueError, match=r"3d.safetensors does not fit.*conv.0.weight is \(12, 6, 2, 2, 2\)"):
        load_conv_predictor(tmp_path / "3d.safetensors")


class RunsCode:
    "Writes a file when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_code_is_not_run(tmp_path):
    torch.save(convnext_file() | {"code": RunsCode(tmp_path / "ran")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="code.pth holds more than weights"):
        load_convnext(tmp_path / "code.pth")
    assert not (tmp_path / "ran").exists()


def videomae_file(dim: int = 12, depth: int = 2) -> dict[str, torch.Tensor]:
    "Names and shapes of VideoMAE's encoder, on tubelets of 2x4x4."
    shapes = {"patch_embed.proj.weight": (dim, 3, 2, 4, 4), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (24, dim), "mlp.fc2": (dim, 24)}
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in layers.items()}
        shapes |= {f"blocks.{i}.{name}.bias": layers[name][:1] for name in layers if name != "attn.qkv"}
        shapes |= {f"blocks.{i}.attn.{which}_bias": (dim,) for which in "qv"}
        shapes |= {f"blocks.{i}.norm{k}.{kind}": (dim,) for k in (1, 2) for kind in ("weight", "bias")}
    return filled(shapes | {"norm.weight": (dim,), "norm.bias": (dim,)})


def test_videomae_of_pretraining_and_fine_tuned_are_the_same_encoder(tmp_path):
    state = videomae_file()
    decoder = {"mask_token": torch.zeros(1, 1, 6), "encoder_to_decoder.weight": torch.ones(6, 12)}
    model = {f"encoder.{name}": value for name, value in state.items()} | decoder
    torch.save({"model": model, "args": argparse.Namespace(lr=1e-3), "epoch": 1}, tmp_path / "pretraining.pth")
    classifier = {"head.weight": torch.ones(5, 12), "head.bias": torch.ones(5)}
    torch.save({"module": state | classifier}, tmp_path / "tuned.pth")
    mean = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: v for name, v in state.items()}
    torch.save({"model": mean | classifier}, tmp_path / "mean.pth")
    names = ("pretraining", "tuned", "mean")
    pretraining, tuned, before_norm = (load_videomae(tmp_path / f"{name}.pth", heads=3) for name in names)
    x = torch.randn(2, 3, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    keep = torch.tensor([[0, 5, 7], [1, 2, 11]])
    with torch.no_grad():
        assert torch.equal(pretraining(x), tuned(x))
        normed = F.layer_norm(before_norm(x), (12,), state["norm.weight"], state["norm.bias"], 1e-6)
        torch.testing.assert_close(normed, tuned(x))
        assert pretraining(x, keep=keep).shape == (2, 3, 12)
    bias = pretraining.blocks[1].qkv.bias.chunk(3)
    assert torch.equal(bias[0], state["blocks.1.attn.q_bias"]) and torch.equal(bias[2], state["blocks.1.attn.v_bias"])
    assert not bias[1].any(), "keys have no bias"


def test_channels_of_a_file_are_found_in_its_order(tmp_path):
    torch.save(convnext_file(), tmp_path / "encoder.pth")
    usual, ours = load_convnext(tmp_path / "encoder.pth"), load_convnext(tmp_path / "encoder.pth", fields=[2, 0, 1])
    x = torch.randn(1, 3, 16, 64, 64, generator=torch.Generator().manual_seed(0))
    in_the_file = torch.stack([x[:, 1], x[:, 2], x[:, 0]], dim=1)  # our channel 0 is its 2, and so on
    with torch.no_grad():
        assert torch.allclose(ours(x), usual(in_the_file), atol=1e-5) and not torch.allclose(
            ours(x), usual(x), atol=1e-3
        )
    with pytest.raises(
        ValueError, match=r"encoder.pth has channels 0 to 2, each is needed once; got fields \[0, 0, 1\]"
    ):
        load_convnext(tmp_path / "encoder.pth", fields=[0, 0, 1])


def test_they_are_encoders_of_this_package(tmp_path):
    "Saved and loaded, and probed as an encoder of one's own."
    torch.save(videomae_file(), tmp_path / "a.pth")
    encoder = load_videomae(tmp_path / "a.pth", in_channels=4, heads=3)
    x = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    facts = dict(system="shear_flow", mean=torch.zeros(4), std=torch.ones(4), shape=(4, 8, 8), dt=0.2)
    save_encoder(tmp_path / "encoder.safetensors", encoder, "physrep.models.elsewhere:VideoMAEViT", **facts)
    reader = {"path": str(tmp_path / "a.pth"), "heads": 3}
    run = resolve("shear_flow", "frozen", "physrep.models.elsewhere:load_videomae", "smoke", encoder_config=reader)
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path / "encoder.safetensors")(x), encoder(x))
        assert torch.equal(own_encoder(run)(x), encoder(x))


def a_saved_encoder(path: str):
    "What a function of one's own returns that reads an encoder of this package."
    return load_encoder(path)


def test_an_encoder_of_this_package_that_is_only_probed_keeps_its_normalisation(smoke_data, tmp_path):
    def run_of(**facts):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        vit = ViT(4, dim=8, depth=1, heads=2, tubelet=(4, 8, 8))
        usual = dict(
            system="shear_flow",
            mean=torch.full((4,), 3.0),
            std=torch.full((4,), 2.0),
            shape=resolve("shear_flow", "mae", "vit", "smoke").clip_shape,
            dt=0.2,
        )
        save_encoder(file, vit, "vit", **usual | facts)
        own = dict(encoder_config={"path": str(file)}, data_dir=smoke_data, run_dir=tmp_path / "runs")
        return resolve("shear_flow", "frozen", f"{__name__}:a_saved_encoder", "smoke", **own)

    run = run_of()
    encoder = own_encoder(run)
    windows = probe_splits(run)
    assert torch.equal(normaliser_for(encoder, windows["train"]).mean, torch.full((4,), 3.0)), "not that of the data"
    assert score_run(run, probes=["knn"], windows=windows, progress=False).rows
    for wrong, said in (
        (dict(dt=0.5), "was trained on frames 0.5 apart, got dt=0.2"),
        (dict(shape=(16, 8, 8)), "was trained on grids of 8x8"),
    ):
        with pytest.raises(ValueError, match=said):
            score_run(run_of(**wrong), probes=["knn"], windows=windows, progress=False)


def test_what_does_not_fit_is_refused(tmp_path):
    broken = convnext_file()
    del broken["res_blocks.1.1.gamma"], broken["downsample_layers.1.1.weight"]
    broken |= {"head.weight": torch.zeros(2, 8), "res_blocks.0.0.pwconv1.bias": torch.zeros(5)}
    (tmp_path / "torn.pth").write_bytes(b"no weights")
    video = videomae_file()
    short = {name: value for name, value in video.items() if name != "blocks.0.attn.q_bias"}
    for load, state, words in (
        (load_convnext, broken, r"does not fit. 2 missing: .*downsample_layers.1.1.weight \(6, 4, 2, 2, 2\).*"),
        (load_convnext, broken, r"1 unexpected: head.weight \(2, 8\); 1 of another shape: .* should be \(16,\)"),
        (read_weights, [torch.ones(1)], "holds list, not tensors by name"),
        (read_weights, {"a": torch.ones(1), "lr": 1e-3}, r"no tensors: lr \(float\)"),
        (read_weights, {"module.a": torch.ones(1), "b": torch.ones(1)}, "1 of 2 names begin with 'module.'"),
        (load_videomae, video, "heads of width 12 are not known"),
        (load_videomae, convnext_file(), "has no patch_embed.proj.weight"),
        (lambda path: load_videomae(path, heads=3), short, "1 missing: blocks.0.attn.q_bias"),
    ):
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=f"a.pth.*{words}"):
            load(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="torn.pth.*is damaged"):
        read_weights(tmp_path / "torn.pth")

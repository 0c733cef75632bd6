"Encoders: the fast depthwise convolution against Conv3d in many shapes, precision, errors, configurations, names."

import json
import sys
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from physrep.core.names import short_name, split_name
from physrep.models.convnext import Block, ConvNeXt, DepthwiseConv3d, pad_space
from physrep.models.encoders import ENCODERS, build_encoder, encoder_module
from physrep.models.vit import ViT, patchify, sincos_positions, token_grid, unpatchify

LAPTOP = dict(
    widths=(16, 32), depths=(1, 1), stem_kernel=(2, 4, 4), stem_stride=(2, 4, 4), strides=[(2, 1, 1)], layer_scale=1.0
)
SMALL_VIT = dict(dim=24, depth=2, heads=2, tubelet=(2, 4, 4))


@pytest.fixture(autouse=True)
def _fixed():
    torch.manual_seed(0)


def gradients(function, parameters, x):
    "Output, then gradients of the input and the parameters, for a fixed upstream gradient."
    x = x.clone().requires_grad_()
    y = function(x)
    upstream = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], upstream)]


def close(a, b, tolerance):
    return all(
        (p.double() - q.double()).norm() <= tolerance * max(1e-12, p.double().norm()) for p, q in zip(a, b, strict=True)
    )


def pair(channels, kernel, dtype):
    slow = nn.Conv3d(channels, channels, kernel, padding="same", groups=channels).to(dtype)
    fast = DepthwiseConv3d(channels, kernel).to(dtype)
    fast.load_state_dict(slow.state_dict())
    return slow, fast


@pytest.mark.parametrize("kernel", [7, 3, 1, (1, 7, 7), (3, 5, 7), (9, 3, 1)])
@pytest.mark.parametrize("shape", [(1, 9, 8), (2, 5, 6), (3, 8, 8), (4, 3, 2), (8, 7, 9), (11, 4, 4)])
def test_depthwise_equals_conv3d(kernel, shape):
    slow, fast = pair(3, kernel, torch.float64)
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    assert close(gradients(slow, slow.parameters(), x), gradients(fast, fast.parameters(), x), 1e-10)
    fast.method = "direct"
    assert close(gradients(slow, slow.parameters(), x), gradients(fast, fast.parameters(), x), 1e-10)


@pytest.mark.parametrize(
    "channels, shape", [(16, (16, 24, 24)), (32, (8, 16, 16)), (64, (4, 16, 16)), (128, (2, 8, 8)), (128, (1, 4, 4))]
)
def test_depthwise_float32(channels, shape):
    slow, fast = pair(channels, 7, torch.float32)
    x = torch.randn(2, channels, *shape)
    assert close(gradients(slow, slow.parameters(), x), gradients(fast, fast.parameters(), x), 1e-4)


def test_depthwise_takes_any_memory_layout():
    slow, fast = pair(4, 3, torch.float64)
    x = torch.randn(2, 5, 6, 3, 4, dtype=torch.float64).permute(0, 4, 3, 1, 2)
    assert close(gradients(slow, slow.parameters(), x), gradients(fast, fast.parameters(), x), 1e-10)


def test_depthwise_gradcheck():
    conv = DepthwiseConv3d(2, 3, padding_mode=("circular", "zeros")).double()
    x = torch.randn(1, 2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(conv, {"weight": w, "bias": b}, x), (x, conv.weight, conv.bias)
    )


@pytest.mark.parametrize("mode", ["circular", ("circular", "zeros"), ("zeros", "circular")])
def test_padding_modes_against_explicit_padding(mode):
    h, w = (mode, mode) if isinstance(mode, str) else mode
    x = torch.randn(2, 3, 4, 6, 7, dtype=torch.float64)
    conv = DepthwiseConv3d(3, (3, 5, 7), padding_mode=mode).double()
    padded = F.pad(x.flatten(1, 2), (3, 3, 0, 0), mode="circular" if w == "circular" else "constant")
    padded = F.pad(padded, (0, 0, 2, 2), mode="circular" if h == "circular" else "constant").unflatten(1, (3, 4))
    assert torch.allclose(conv(x), F.conv3d(padded, conv.weight, conv.bias, padding=(1, 0, 0), groups=3))
    assert torch.equal(pad_space(x, (2, 3), (2, 3), mode), padded)


@pytest.mark.parametrize("shape, kernel", [((4, 24, 20), 7), ((1, 3, 3), 7), ((3, 40, 40), (1, 3, 3)), ((16, 9, 9), 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_blocked_block_equals_plain(shape, kernel, dtype, tolerance):
    block = Block(16, kernel, layer_scale=0.5)
    for p in (block.norm.weight, block.norm.bias, block.scale, block.fc1.bias, block.fc2.bias):
        nn.init.normal_(p, std=0.5)
    block, x = block.to(dtype), torch.randn(3, 16, *shape, dtype=dtype)
    assert close(
        gradients(block.plain, block.parameters(), x), gradients(block.blocked, block.parameters(), x), tolerance
    )
    assert close(gradients(block, block.parameters(), x), gradients(block.blocked, block.parameters(), x), 1e-6)


@pytest.mark.parametrize(
    "encoder", [lambda: ConvNeXt(4, **LAPTOP), lambda: ViT(4, **SMALL_VIT)], ids=["convnext", "vit"]
)
def test_autocast(encoder):
    encoder, x = encoder(), torch.randn(2, 4, 8, 16, 16)

    def half(x):
        with torch.autocast("cpu", torch.bfloat16):
            return encoder(x).float()

    full, low = (gradients(f, encoder.parameters(), x) for f in (encoder, half))
    assert close(full[:1], low[:1], 0.03)
    assert close([torch.cat([g.flatten() for g in full[2:]])], [torch.cat([g.flatten() for g in low[2:]])], 0.05)
    assert all(g.dtype == torch.float32 for g in low)


@pytest.mark.parametrize(
    "encoder", [ConvNeXt(4, **LAPTOP), ConvNeXt(2, widths=(8, 16), depths=(1, 1)), ViT(4, **SMALL_VIT)]
)
def test_config_round_trip(encoder):
    again = type(encoder)(**json.loads(json.dumps(encoder.config)))
    again.load_state_dict(encoder.state_dict())
    x = torch.randn(1, encoder.in_channels, 8, 16, 16)
    tokens = encoder(x)
    assert torch.equal(tokens, again(x)) and again.config == encoder.config
    t, h, w = encoder.grid((8, 16, 16))
    assert tokens.shape == (1, t * h * w, encoder.dim)


def test_paper_encoder():
    encoder = ConvNeXt(4)
    assert sum(p.numel() for p in encoder.parameters()) == 2_466_928
    assert encoder.grid((16, 224, 224)) == (1, 14, 14)
    tokens = encoder(torch.randn(1, 4, 16, 32, 16))
    assert tokens.shape == (1, 2, 128)
    tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_token_order_is_row_major():
    encoder = ConvNeXt(1, widths=(6,), depths=(0,), stem_kernel=(2, 4, 4), stem_stride=(2, 4, 4))
    x = torch.zeros(1, 1, 6, 16, 20)
    blank = encoder(x)
    x[0, 0, 2:4, 8:12, 16:20] = torch.randn(2, 4, 4)
    assert (encoder(x) != blank).any(-1)[0].nonzero().tolist() == [[(1 * 4 + 2) * 5 + 4]]


@pytest.mark.parametrize("encoder, fits", [(ConvNeXt(4, **LAPTOP), (4, 4, 4)), (ViT(4, **SMALL_VIT), (2, 4, 4))])
def test_grid_errors(encoder, fits):
    t, h, w = fits
    for shape in ((t + 1, h, w), (t, h - 1, w), (t, h, 2 * w + 1), (0, h, w), (t, h)):
        with pytest.raises(ValueError, match=rf"{t}, h of {h} and w of {w}"):
            encoder.grid(shape)
    with pytest.raises(ValueError, match=r"\(1, 4, 5, 8, 8\)|\(5, 8, 8\)"):
        encoder(torch.zeros(1, 4, 5, 8, 8))
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 8, 8\)"):
        encoder(torch.zeros(1, 3, 4, 8, 8))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(widths=(8, 16), depths=(1,)), "one entry per stage"),
        (dict(widths=(8, 16), depths=(1, 1), strides=[2, 2]), "1 strides"),
        (dict(kernel_size=4), "odd"),
        (dict(padding_mode="periodic"), "zeros, circular"),
        (dict(method="fft"), "banded"),
        (dict(stem_kernel=(1, 2, 2), stem_stride=(1, 4, 4)), "skipped"),
        (dict(stem_stride=(1, 4)), "three of them"),
        (dict(init="xavier"), "unknown init 'xavier'; valid: trunc_normal, fan_in, torch"),
        (dict(stem_norm="layer"), "unknown stem_norm 'layer'; valid: patch, group, none"),
        (dict(down_norm=None), "unknown down_norm None; valid: patch, group, none"),
    ],
)
def test_convnext_rejects(wrong, message):
    with pytest.raises(ValueError, match=message):
        ConvNeXt(4, **wrong)


def test_patches_and_positions():
    x = torch.randn(2, 3, 4, 8, 12)
    patches, grid = patchify(x, (2, 4, 2)), token_grid((4, 8, 12), (2, 4, 2))
    assert torch.equal(unpatchify(patches, (2, 4, 2), 3, grid), x)
    assert torch.equal(patches[1, (1 * 2 + 0) * 6 + 5].view(2, 4, 2, 3), x[1, :, 2:4, 0:4, 10:12].permute(1, 2, 3, 0))
    assert sincos_positions((2, 3, 4), 10).shape == (24, 10)
    assert torch.unique(sincos_positions((3, 5, 7), 30), dim=0).shape[0] == 105
    with pytest.raises(ValueError, match="even width"):
        sincos_positions((1, 1, 1), 9)


def test_vit_sees_kept_tokens_only():
    encoder, x = ViT(4, **SMALL_VIT), torch.randn(2, 4, 4, 8, 8)
    keep = torch.tensor([[5, 0, 3], [1, 7, 6]])
    hidden = torch.ones(2, 8, dtype=torch.bool).scatter(1, keep, False)
    changed = unpatchify(patchify(x, (2, 4, 4)).masked_fill(hidden[..., None], 9.0), (2, 4, 4), 4, (2, 2, 2))
    assert torch.equal(encoder(x, keep=keep), encoder(changed, keep=keep))
    order = torch.tensor([[2, 0, 1], [2, 0, 1]])
    assert torch.allclose(encoder(x, keep=keep.gather(1, order)), encoder(x, keep=keep)[:, order[0]], atol=1e-5)
    for wrong in (keep[:1], keep.int(), keep[0]):
        with pytest.raises(ValueError, match="keep must be"):
            encoder(x, keep=wrong)


def weigh(sizes: list, tensor: torch.Tensor) -> torch.Tensor:
    sizes.append(tensor.nbytes)
    return tensor


def test_recomputing_blocks_keeps_less_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(Block, "forward", Block.plain)  # as on a GPU
    encoder, x = ConvNeXt(4, widths=(8, 16), depths=(3, 3), strides=2), torch.randn(2, 4, 8, 16, 16)
    found, kept = [], []
    for encoder.recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(partial(weigh, sizes), lambda t: t):
            y = encoder(x)
        kept.append(sum(sizes))
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(encoder.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*found)) and kept[1] < kept[0] / 3
    assert "recompute" not in encoder.config, "what it computes does not depend on it"


# names

OUTSIDE = """
from torch import nn


class Mean(nn.Module):
    def __init__(self, in_channels, *, dim=8):
        super().__init__()
        self.dim, self.linear = dim, nn.Linear(in_channels, dim)

    def grid(self, shape):
        return (1, 1, 1)

    def forward(self, x):
        return self.linear(x.mean((2, 3, 4)))[:, None]


def wide(in_channels, **config):
    return Mean(in_channels, dim=32, **config)


class Factory:
    make = staticmethod(wide)


def no_module(in_channels):
    return in_channels


def no_grid(in_channels):
    return nn.Linear(in_channels, 2)


number = 3
"""


@pytest.fixture
def outside(tmp_path, monkeypatch) -> str:
    "A package of its own, `lab.nets`, on the path; gives its name."
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "nets.py").write_text(OUTSIDE)
    (tmp_path / "lab" / "broken.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "lab"]:
        monkeypatch.delitem(sys.modules, name)
    return "lab.nets"


def test_encoders_of_another_package(outside):
    x = torch.randn(2, 3, 4, 8, 8)
    for name, config, dim in (("Mean", {"dim": 5}, 5), ("wide", {}, 32), ("Factory.make", {}, 32)):
        encoder = build_encoder(f"{outside}:{name}", in_channels=3, **config)
        assert encoder.dim == dim and encoder(x).shape == (2, 1, dim)
        assert encoder.in_channels == 3 and encoder.config == {"in_channels": 3, **config}
        json.dumps(encoder.config)
    assert encoder_module(f"{outside}:Mean") == "lab.nets"
    with pytest.raises(TypeError, match="depth"):
        build_encoder(f"{outside}:Mean", in_channels=3, depth=1)


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet", "unknown encoder 'resnet'; valid: convnext, vit, axial, vit_code, convnext_code, or "),
        ("lab/nets.py:Mean", "'lab/nets.py' is no dotted name"),
        ("lab.nets:", "'' is no dotted name"),
        ("lab.nets:Mean()", "is no dotted name"),
        ("lab.missing:Mean", "module lab.missing cannot be imported.*PYTHONPATH"),
        ("lab.broken:Mean", "module lab.broken cannot be imported.*a_package_that_is_not_installed"),
        ("lab.nets:Maen", "lab.nets has no 'Maen'; it has: .*Mean, wide"),
        ("lab.nets:Factory.mke", "has no 'Factory.mke'; it has: make"),
        ("lab.nets:number", "is a int; a class or a function was expected"),
        ("lab.nets:no_module", "made int, not a torch.nn.Module"),
        ("lab.nets:no_grid", "made Linear without .dim .* and .grid"),
    ],
)
def test_names_that_are_no_encoder(outside, name, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, in_channels=3)


def test_short_names_fit_into_folder_names():
    assert [short_name(n) for n in ("vit", "a.b:Class", "a:Class.make")] == ["vit", "Class", "Class.make"]
    for wrong in ("a/b", "../x", ":", "a b", "", "..", "a-b"):
        with pytest.raises(ValueError, match="use letters, digits"):
            short_name(wrong)


def test_names_of_the_package():
    modules = {name: f"models.{name}" for name in ("convnext", "vit", "axial")}
    modules |= {"vit_code": "models.code", "convnext_code": "models.code"}
    assert {name: encoder_module(name) for name in ENCODERS} == modules
    assert split_name("vit", ENCODERS) == ("physrep.models.vit", "ViT")


# the start of a narrow encoder

NARROW = dict(widths=(48, 96), depths=(2, 2), stem_kernel=(4, 4, 4), stem_stride=(4, 4, 4), strides=((2, 1, 1),))


def narrow(**options) -> ConvNeXt:
    torch.manual_seed(0)
    return ConvNeXt(4, **NARROW, **options)


def test_the_defaults_are_the_papers():
    plain, named = narrow(), narrow(init="trunc_normal", stem_norm="patch", down_norm="patch")
    assert all(torch.equal(p, named.state_dict()[k]) for k, p in plain.state_dict().items())
    assert all(m.weight.std() < 0.03 for m in plain.modules() if isinstance(m, nn.Linear | nn.Conv3d))


def test_fan_in_keeps_the_size_of_what_passes():
    for module in narrow(init="fan_in").modules():
        if isinstance(module, nn.Linear | nn.Conv3d | DepthwiseConv3d):
            inputs = module.weight[0].numel()
            assert abs(module.weight.std() * inputs**0.5 - 1) < 0.05 and not module.bias.any()
            assert module.weight.abs().max() * inputs**0.5 <= 2 / 0.8796
    layer = narrow(init="fan_in").stages[0][0].fc1
    assert abs(layer(torch.randn(5000, 48)).std() - 1) < 0.1


@pytest.mark.parametrize(
    "init, scale, low, high",
    [("trunc_normal", 0.1, 0, 0.03), ("fan_in", 1.0, 0.3, 1.0), ("torch", 1.0, 0.1, 0.6)],
)
def test_share_of_the_stream_that_a_block_changes(init, scale, low, high):
    encoder = narrow(init=init, layer_scale=scale)
    with torch.no_grad():
        x = encoder.stem(torch.randn(2, 4, 16, 32, 32))
        for i, stage in enumerate(encoder.stages):
            for block in stage:
                y = block(x)
                assert low < (y - x).std() / x.std() < high
                x = y
            x = encoder.downs[i](x) if i < len(encoder.downs) else x


def amplitude_change(**norms) -> float:
    "Relative change of a token when the input of its own patch is doubled."
    encoder, x = narrow(init="fan_in", layer_scale=1.0, **norms), torch.randn(2, 4, 16, 32, 32)
    twice = x.clone()
    twice[:, :, 8:16, 8:12, 8:12] *= 2
    with torch.no_grad():
        a, b = (encoder(clip)[:, (8 + 2) * 8 + 2] for clip in (x, twice))
    return float((b - a).norm() / a.norm())


def test_amplitude_of_a_patch_reaches_its_token():
    assert amplitude_change() < 1e-3, "the paper's norm hides it"
    for stem_norm in ("none", "group"):
        assert 0.05 < amplitude_change(stem_norm=stem_norm) < amplitude_change(stem_norm=stem_norm, down_norm="none")


@pytest.mark.parametrize("norm", ["patch", "group", "none"])
def test_norms_round_trip(norm):
    encoder = narrow(init="fan_in", stem_norm=norm, down_norm=norm)
    again = ConvNeXt(**json.loads(json.dumps(encoder.config)))
    again.load_state_dict(encoder.state_dict())
    x = torch.randn(1, 4, 16, 16, 16)
    assert again.config == encoder.config and torch.equal(again(x), encoder(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert (encoder(x).float() - again(x)).norm() < 0.1 * again(x).norm()


def test_an_encoder_that_cannot_be_called_is_told_how_it_is(monkeypatch):
    module = types.ModuleType("own_encoders")
    module.make = lambda: nn.Identity()
    monkeypatch.setitem(sys.modules, "own_encoders", module)
    with pytest.raises(TypeError, match=r"encoder 'own_encoders:make' is called as make\(in_channels, width=8\)"):
        build_encoder("own_encoders:make", in_channels=4, width=8)

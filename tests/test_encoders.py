"Encoders: the fast depthwise convolution against Conv3d, precision, configurations, heads, names, and what is refused."

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from physrep.core.names import short_name
from physrep.models.convnext import ConvNeXt, ConvNeXtBlock, DepthwiseConv3d, pad_space
from physrep.models.encoders import build_encoder
from physrep.models.heads import AttentiveHead, ConvDecoder, ConvPredictor, LinearHead, MLPHead, TransformerDecoder
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


# the convolution and the block


@pytest.mark.parametrize("kernel", [7, 1, (1, 7, 7), (3, 5, 7), (9, 3, 1)])
@pytest.mark.parametrize("shape", [(1, 9, 8), (2, 5, 6), (4, 3, 2), (8, 7, 9), (11, 4, 4)])
def test_depthwise_equals_conv3d(kernel, shape):
    slow, fast = pair(3, kernel, torch.float64)
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    expected = gradients(slow, slow.parameters(), x)
    assert close(expected, gradients(fast, fast.parameters(), x), 1e-10)
    turned = x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)  # another layout in memory
    assert close(expected, gradients(fast, fast.parameters(), turned), 1e-10)
    fast.method = "direct"
    assert close(expected, gradients(fast, fast.parameters(), x), 1e-10)


@pytest.mark.parametrize("mode", ["circular", ("circular", "zeros"), ("zeros", "circular")])
def test_padding_modes_against_explicit_padding(mode):
    h, w = (mode, mode) if isinstance(mode, str) else mode
    x = torch.randn(2, 3, 4, 6, 7, dtype=torch.float64)
    conv = DepthwiseConv3d(3, (3, 5, 7), padding_mode=mode).double()
    padded = F.pad(x.flatten(1, 2), (3, 3, 0, 0), mode="circular" if w == "circular" else "constant")
    padded = F.pad(padded, (0, 0, 2, 2), mode="circular" if h == "circular" else "constant").unflatten(1, (3, 4))
    assert torch.allclose(conv(x), F.conv3d(padded, conv.weight, conv.bias, padding=(1, 0, 0), groups=3))
    assert torch.equal(pad_space(x, (2, 3), (2, 3), mode), padded)


@pytest.mark.parametrize("shape, kernel", [((4, 24, 20), 7), ((1, 3, 3), 7), ((3, 40, 40), (1, 3, 3))])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_blocked_block_equals_plain(shape, kernel, dtype, tolerance):
    block = ConvNeXtBlock(16, kernel, layer_scale=0.5)
    for p in (block.norm.weight, block.norm.bias, block.scale, block.fc1.bias, block.fc2.bias):
        nn.init.normal_(p, std=0.5)
    block, x = block.to(dtype), torch.randn(3, 16, *shape, dtype=dtype)
    both = (gradients(way, block.parameters(), x) for way in (block.plain, block.blocked))
    assert close(*both, tolerance)


def weigh(sizes: list, tensor: torch.Tensor) -> torch.Tensor:
    sizes.append(tensor.nbytes)
    return tensor


def test_recomputing_blocks_keeps_less_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(ConvNeXtBlock, "forward", ConvNeXtBlock.plain)  # as on a GPU
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


# encoders

BUILT = {
    "convnext": lambda: ConvNeXt(4, **LAPTOP),
    "norms": lambda: ConvNeXt(4, **LAPTOP, init="fan_in", stem_norm="group", down_norm="none"),
    "vit": lambda: ViT(4, **SMALL_VIT),
}


@pytest.mark.parametrize("name", BUILT)
def test_configuration_and_precision(name):
    encoder, x = BUILT[name](), torch.randn(2, 4, 8, 16, 16)
    again = type(encoder)(**json.loads(json.dumps(encoder.config)))
    again.load_state_dict(encoder.state_dict())
    tokens = encoder(x)
    assert torch.equal(tokens, again(x)) and again.config == encoder.config
    t, h, w = encoder.grid((8, 16, 16))
    assert tokens.shape == (2, t * h * w, encoder.dim)

    def half(x):
        with torch.autocast("cpu", torch.bfloat16):
            return encoder(x).float()

    full, low = (gradients(f, encoder.parameters(), x) for f in (encoder, half))
    assert close(full[:1], low[:1], 0.05)
    assert close([torch.cat([g.flatten() for g in full[2:]])], [torch.cat([g.flatten() for g in low[2:]])], 0.1)


def test_the_papers_encoder_and_its_predictor():
    encoder = ConvNeXt(4)
    assert sum(p.numel() for p in encoder.parameters()) == 2_466_928
    assert encoder.grid((16, 224, 224)) == (1, 14, 14)
    encoder(torch.randn(1, 4, 16, 32, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert sum(p.numel() for p in ConvPredictor(128).parameters()) == 801_664


def test_token_order_is_row_major():
    encoder = ConvNeXt(1, widths=(6,), depths=(0,), stem_kernel=(2, 4, 4), stem_stride=(2, 4, 4))
    x = torch.zeros(1, 1, 6, 16, 20)
    blank = encoder(x)
    x[0, 0, 2:4, 8:12, 16:20] = torch.randn(2, 4, 4)
    assert (encoder(x) != blank).any(-1)[0].nonzero().tolist() == [[(1 * 4 + 2) * 5 + 4]]


def test_patches_and_positions():
    x = torch.randn(2, 3, 4, 8, 12)
    patches, grid = patchify(x, (2, 4, 2)), token_grid((4, 8, 12), (2, 4, 2))
    assert torch.equal(unpatchify(patches, (2, 4, 2), 3, grid), x)
    assert torch.equal(patches[1, (1 * 2 + 0) * 6 + 5].view(2, 4, 2, 3), x[1, :, 2:4, 0:4, 10:12].permute(1, 2, 3, 0))
    assert torch.unique(sincos_positions((3, 5, 7), 30), dim=0).shape[0] == 105


def test_vit_sees_kept_tokens_only():
    encoder, x = ViT(4, **SMALL_VIT), torch.randn(2, 4, 4, 8, 8)
    keep = torch.tensor([[5, 0, 3], [1, 7, 6]])
    hidden = torch.ones(2, 8, dtype=torch.bool).scatter(1, keep, False)
    changed = unpatchify(patchify(x, (2, 4, 4)).masked_fill(hidden[..., None], 9.0), (2, 4, 4), 4, (2, 2, 2))
    assert torch.equal(encoder(x, keep=keep), encoder(changed, keep=keep))
    order = torch.tensor([[2, 0, 1], [2, 0, 1]])
    assert torch.allclose(encoder(x, keep=keep.gather(1, order)), encoder(x, keep=keep)[:, order[0]], atol=1e-5)


# heads


@pytest.mark.parametrize("head", [LinearHead, MLPHead, AttentiveHead])
def test_heads_read_any_number_of_tokens_in_any_order(head):
    head, z = head(16, 3), torch.randn(2, 7, 16)
    assert head(z[:, :1]).shape == (2, 3) and torch.allclose(head(z), head(z.flip(1)), atol=1e-5)


def test_attention_weights_are_those_that_the_head_uses():
    head, z = AttentiveHead(16, 2, heads=2), torch.randn(3, 9, 16)
    weights = head.attention(z)
    assert weights.shape == (3, 2, 9) and torch.allclose(weights.sum(-1), torch.ones(3, 2))
    values = head.to_keys_values(head.norm_tokens(z))[..., 16:].reshape(3, 9, 2, 8)
    a = head.query + head.proj(torch.einsum("bhn,bnhd->bhd", weights, values).flatten(1))
    assert torch.allclose(head(z), head.out(head.norm_out(a + head.mlp(head.norm_mlp(a)))), atol=1e-5)


def test_decoders_put_tokens_where_they_belong():
    decoder, grid = ConvDecoder(8, 3, (2, 4, 4)), (2, 3, 3)
    a = torch.randn(1, 18, 8)
    b = a.clone()
    b[0, 9] += 1.0  # second token frame, corner
    changed = (decoder(b, grid) - decoder(a, grid)).abs().amax(dim=(0, 1)) > 1e-6
    assert changed.shape == (4, 12, 12) and not changed[:2].any() and changed[2:, :8, :8].any()
    assert not changed[2:, 8:].any() and not changed[2:, :, 8:].any()
    out = TransformerDecoder(16, n_out=5)(torch.randn(1, 3, 16), torch.tensor([[3, 0, 7]]), (2, 2, 2))
    assert len({tuple(row.tolist()) for row in out[0]}) == 8, "positions set even the hidden ones apart"
    predictor, z = ConvPredictor(8), torch.randn(2, 3 * 4 * 5, 8)
    frames = [predictor(f, (1, 4, 5)) for f in z.split(20, dim=1)]
    assert torch.allclose(predictor(z, (3, 4, 5)), torch.cat(frames, dim=1), atol=1e-5), "frames are treated alike"


# names, and what is refused

NAMES = [
    ("resnet", "unknown encoder 'resnet'; valid: convnext, vit, axial, vit_code, convnext_code, or "),
    ("lab/nets.py:Mean", "'lab/nets.py' is no dotted name"),
    ("lab.nets:", "'' is no dotted name"),
    ("no_such_package:Mean", "module no_such_package cannot be imported.*PYTHONPATH"),
    ("torch.nn:Lineer", "torch.nn has no 'Lineer'; it has: .*Linear"),
    ("math:pi", "is a float; a class or a function was expected"),
    ("builtins:int", "made int without being a torch.nn.Module"),
    ("torch.nn:Identity", "made Identity without .dim .* and .grid"),
]


@pytest.mark.parametrize("name, message", NAMES)
def test_names_that_are_no_encoder(name, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, in_channels=3)


def test_short_names_fit_into_folder_names():
    assert [short_name(n) for n in ("vit", "a.b:Class", "a:Class.make")] == ["vit", "Class", "Class.make"]
    for wrong in ("a/b", "../x", ":", "a b", "", "..", "a-b"):
        with pytest.raises(ValueError, match="use letters, digits"):
            short_name(wrong)


WRONG = [
    (lambda: ConvNeXt(4, widths=(8, 16), depths=(1,)), "one entry per stage"),
    (lambda: ConvNeXt(4, widths=(8, 16), depths=(1, 1), strides=[2, 2]), "1 strides"),
    (lambda: ConvNeXt(4, kernel_size=4), "odd"),
    (lambda: ConvNeXt(4, padding_mode="periodic"), "zeros, circular"),
    (lambda: ConvNeXt(4, method="fft"), "banded"),
    (lambda: ConvNeXt(4, stem_kernel=(1, 2, 2), stem_stride=(1, 4, 4)), "skipped"),
    (lambda: ConvNeXt(4, stem_stride=(1, 4)), "three of them"),
    (lambda: ConvNeXt(4, init="xavier"), "unknown init 'xavier'; valid: trunc_normal, fan_in, torch"),
    (lambda: ConvNeXt(4, down_norm=None), "unknown down_norm None; valid: patch, group, none"),
    (lambda: ConvNeXt(4, **LAPTOP).grid((5, 4, 4)), "t must be a multiple of 4, h of 4 and w of 4"),
    (lambda: ViT(4, **SMALL_VIT).grid((4, 4)), "t must be a multiple of 2, h of 4 and w of 4"),
    (lambda: ViT(4, **SMALL_VIT)(torch.zeros(1, 3, 4, 8, 8)), r"expected a clip \(b, 4, t, h, w\)"),
    (lambda: ViT(4, **SMALL_VIT)(torch.zeros(1, 4, 4, 8, 8), keep=torch.ones(1, 8).bool()), "keep must be int64"),
    (lambda: ViT(4, dim=25, heads=5), "even width"),
    (lambda: ViT(4, tubelet=(16, 16)), "three positive ints"),
    (lambda: ConvPredictor(8, time_kernel=2), "odd"),
    (lambda: AttentiveHead(10, 2, heads=4), "do not divide the width 10; these do: 1, 2, 5, 10"),
]


@pytest.mark.parametrize("attempt, message", WRONG, ids=[message[:30] for _, message in WRONG])
def test_what_is_no_encoder_is_refused(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()

"""The axial encoder: wraps, attention, saving, and what is refused."""

import json

import pytest
import torch
from torch import nn

from physrep.models.axial import Axial, AxisAttention
from physrep.models.pretrained import read_encoder, save_encoder
from physrep.objectives.emulators import NextFrame
from physrep.physics.systems import get_system

SHEAR, CONVECTION = get_system("shear_flow"), get_system("rayleigh_benard")
SHAPE = (8, 16, 16)


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def axial(channels: int = 4, **options) -> Axial:
    "A small encoder with open blocks and biases that matter."
    encoder = Axial(channels, **dict(dim=16, depth=2, heads=2, strides=(2, 2), layer_scale=0.5) | options)
    for name, p in encoder.named_parameters():
        if name.endswith("table"):
            nn.init.normal_(p)
    return encoder


@pytest.mark.parametrize("shape", [(3, 16, 20), (2, 12, 28), (1, 4, 8)], ids=str)
@pytest.mark.parametrize("periodic", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@torch.no_grad()
def test_a_shift_by_a_patch_shifts_the_tokens_of_a_periodic_axis_alone(periodic, shape):
    encoder, x = axial(periodic=periodic), torch.randn(1, 4, *shape)
    grid = encoder.grid(shape)
    tokens = encoder(x).view(*grid, -1)
    for axis in (1, 2):
        shifted = encoder(x.roll(4, axis + 2)).view(*grid, -1)
        same = torch.allclose(shifted.roll(-1, axis), tokens, atol=1e-5)
        assert same == (periodic[axis - 1] or grid[axis] == 1), axis
    if grid[0] > 1:
        assert not torch.allclose(encoder(x.roll(1, 2)).view(*grid, -1).roll(-1, 0), tokens, atol=1e-3), "never in time"


@pytest.mark.parametrize("axes", [(1,), (2, 3)])
def test_attention_is_the_formula_with_its_gradients(axes):
    layer = AxisAttention(8, 2, axes, layer_scale=0.7).double()
    nn.init.normal_(layer.bias.table)
    x = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = (layer.qkv(layer.norm(x))[..., 8 * i : 8 * i + 8].unflatten(-1, (2, 4)) for i in range(3))
    q, k = layer.norm_q(q), layer.norm_k(k)
    total = 0
    for axis in axes:
        n, wraps = x.shape[axis], axis == 2
        logits = torch.einsum("...nad,...mad->...anm", *(z.movedim(axis, -3) for z in (q, k))) / 2
        rows = []
        for i in range(n):
            distances = [(j - i + n // 2) % n - n // 2 if wraps else j - i for j in range(n)]
            rows.append(torch.stack([layer.bias.table[abs(d) + 16 * (d > 0)] for d in distances], dim=1))
        weights = (logits + torch.stack(rows, dim=1)).softmax(-1)
        total = total + torch.einsum("...anm,...mad->...nad", weights, v.movedim(axis, -3)).movedim(-3, axis)
    written = x + layer.scale * layer.proj((total / len(axes)).flatten(-2))
    found = layer(x, periodic=(True, False))
    assert torch.allclose(found, written)
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (found, written))):
        assert torch.allclose(a, b) and b.abs().sum() > 0


def test_what_is_no_encoder_is_refused():
    for attempt, message in (
        (lambda: axial(heads=3), "width 16 is not divisible by 3"),
        (lambda: axial(strides=()), "strides must be positive ints"),
        (lambda: axial(periodic=(1, 0)), "periodic must be two bools"),
        (lambda: axial(statistics=True), "'sample', which statistics needs"),
        (lambda: axial(normalise="clip"), "not 'clip'"),
        (lambda: axial(buckets=6), "buckets must be a multiple of 4"),
        (lambda: axial().grid((3, 17, 16)), "h of 4 and w of 4"),
        (lambda: axial()(torch.randn(1, 3, *SHAPE)), r"expected a clip \(b, 4, t, h, w\)"),
        (lambda: axial(periodic=(True, True)).wrap_for(CONVECTION), "wraps across a wall: rayleigh_benard"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_the_system_decides_the_wrap_once_and_it_is_saved_with_the_weights(tmp_path):
    encoder = axial(normalise="sample", statistics=True)
    assert encoder.config["periodic"] is None
    NextFrame(encoder, system=CONVECTION, shape=SHAPE)
    NextFrame(encoder, system=SHEAR, shape=SHAPE)
    assert encoder.periodic == (True, False), "no other system changes it"
    walls = axial(periodic=(False, False))
    walls.wrap_for(SHEAR)
    assert walls.periodic == (False, False), "who builds it may leave a wrap out"
    facts = dict(system=CONVECTION, shape=SHAPE, dt=0.2, mean=torch.zeros(4), std=torch.ones(4))
    save_encoder(tmp_path / "encoder.safetensors", encoder, "axial", **facts)
    again, info = read_encoder(tmp_path)
    x = torch.randn(1, 4, *SHAPE)
    assert again.periodic == (True, False) and torch.equal(again(x), encoder(x))
    assert json.loads(json.dumps(encoder.config)) == info["config"] == encoder.config
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(x).float()
    assert 0 < (half - again(x)).norm() < 0.1 * again(x).norm()

"""The axial encoder: wraps, biases, amplitudes, saving, every objective; and the next frame, relative to its size."""

import json
import math

import pytest
import torch
from helpers import losses_in_training
from torch import nn
from torch.nn import functional as F

from physrep.core.randomness import sample_seeds
from physrep.data.batches import Batches
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.windows import Windows
from physrep.models.axial import Axial, AxisAttention, RelativeBias, position_buckets, relative_positions, standardised
from physrep.models.encoders import build_encoder
from physrep.models.pretrained import LoadedEncoder, read_encoder, save_encoder
from physrep.objectives.composite import Composite
from physrep.objectives.next_frame import NextFrame, NormalisedPixels, normalised_error
from physrep.objectives.tasks import Blocks, Future, Next, Nothing, Pair, Tube, Window
from physrep.physics.systems import get_system
from physrep.probing.features import features_of
from physrep.probing.finetune import fit_finetune
from physrep.probing.frozen import AttentiveRecipe, fit_probe
from physrep.training.cost import cost
from physrep.training.run import build, resolve

SHEAR, CONVECTION = get_system("shear_flow"), get_system("rayleigh_benard")
SHAPE = (8, 16, 16)
FIT = dict(system=SHEAR, shape=SHAPE)


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


# the wrap


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


def test_distances_and_buckets_by_hand():
    assert relative_positions(5, periodic=True)[0].tolist() == [0, 1, 2, -2, -1]
    assert relative_positions(4, periodic=True)[0].tolist() == [0, 1, -2, -1]
    assert relative_positions(4)[3].tolist() == [-3, -2, -1, 0]
    for d in range(-70, 71):
        size, exact = abs(d), 8
        if (
            size >= exact
        ):  # Raffel et al.: logarithmic up to the largest distance, which shares its bucket with the rest
            size = min(15, exact + math.floor(exact * math.log(size / exact) / math.log(64 / exact) + 1e-9))
        expected = size + 16 * (d > 0)
        assert position_buckets(torch.tensor([d]), max_distance=64).item() == expected, d
    for wrong in (dict(buckets=6), dict(buckets=0), dict(max_distance=8)):
        with pytest.raises(ValueError, match="multiple of 4 and max_distance above"):
            RelativeBias(2, **wrong)


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


# amplitudes


@torch.no_grad()
def test_standardised_samples_hide_the_amplitude_and_statistics_give_it_back():
    x = torch.randn(2, 4, *SHAPE)
    changed = 3 * x + torch.tensor([0.0, 1.0, 2.0, -1.0])[:, None, None, None]
    kept, hidden = axial(), axial(normalise="sample")
    assert (kept(changed) - kept(x)).norm() > 0.1 * kept(x).norm()
    assert torch.allclose(hidden(changed), hidden(x), atol=1e-3)
    told = axial(normalise="sample", statistics=True)
    clean, (first, second) = told(changed) - told(x), (standardised(z)[1] for z in (x, changed))
    assert torch.allclose(clean, ((second - first) @ told.statistics.weight.T)[:, None].expand_as(clean), atol=1e-3)
    assert torch.allclose(second[:, :4], changed.mean(dim=(2, 3, 4)), atol=1e-5)
    assert torch.allclose(second[:, 4:] - first[:, 4:], torch.full((2, 4), math.log(3)), atol=1e-4)
    assert torch.isfinite(told(torch.zeros_like(x))).all(), "a constant field has no std"


def test_statistics_need_what_they_hand_back():
    with pytest.raises(ValueError, match="'set' takes nothing away"):
        axial(statistics=True)
    with pytest.raises(ValueError, match="unknown normalise 'clip'; valid: set, sample"):
        axial(normalise="clip")


# the encoder


@pytest.mark.parametrize("strides, patch", [((2, 2), 4), ((4, 2, 2), 16), ((3, 2), 6), ((5,), 5)])
def test_the_patch_is_the_product_of_the_strides(strides, patch):
    encoder = axial(strides=strides)
    assert encoder.grid((3, 2 * patch, patch)) == (3, 2, 1) and encoder.patch == patch
    x = torch.randn(1, 4, 3, 2 * patch, patch)
    y = encoder(x)
    assert y.shape == (1, 6, 16) and torch.isfinite(y).all(), "also with one token along an axis"
    with pytest.raises(ValueError, match=f"h of {patch} and w of {patch}"):
        encoder.grid((3, patch + 1, patch))
    y.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_what_is_no_encoder_is_refused():
    for options, message in (
        (dict(heads=3), "width 16 is not divisible by 3"),
        (dict(dim=18), "18 is not divisible by 4"),
        (dict(strides=(2, 0)), "strides must be positive ints"),
        (dict(strides=()), "strides must be positive ints"),
        (dict(periodic="yes"), "periodic must be two bools"),
        (dict(periodic=(1, 0)), "periodic must be two bools"),
    ):
        with pytest.raises(ValueError, match=message):
            axial(**options)
    for x in (torch.randn(1, 3, *SHAPE), torch.randn(4, *SHAPE)):
        with pytest.raises(ValueError, match=r"expected a clip \(b, 4, t, h, w\)"):
            axial()(x)


def test_the_system_decides_the_wrap_once():
    encoder = axial()
    assert encoder.periodic is None and encoder.config["periodic"] is None
    NextFrame(encoder, system=CONVECTION, shape=SHAPE)
    assert encoder.periodic == (True, False) and encoder.config["periodic"] == [True, False]
    NextFrame(encoder, **FIT)
    assert encoder.periodic == (True, False), "no other system changes it"
    walls = axial(periodic=(False, False))
    walls.wrap_for(SHEAR)
    assert walls.periodic == (False, False), "who builds it may leave a wrap out"
    with pytest.raises(ValueError, match=r"periodic=\(True, True\) wraps across a wall: rayleigh_benard"):
        axial(periodic=(True, True)).wrap_for(CONVECTION)


def test_the_wrap_is_saved_with_the_weights(tmp_path):
    encoder = axial(normalise="sample", statistics=True)
    encoder.wrap_for(SHEAR)
    facts = dict(system=SHEAR, shape=SHAPE, dt=0.2, mean=torch.zeros(4), std=torch.ones(4))
    save_encoder(tmp_path / "encoder.safetensors", encoder, "axial", **facts)
    again, info = read_encoder(tmp_path)
    x = torch.randn(1, 4, *SHAPE)
    assert again.periodic == (True, True) and torch.equal(again(x), encoder(x))
    assert json.loads(json.dumps(encoder.config)) == info["config"] == encoder.config
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(x).float()
    assert 0 < (half - again(x)).norm() < 0.1 * again(x).norm()


# every task

PARTS = [
    (Tube(), "values", "none"),
    (Blocks(2, 0.2), "ema", "none"),
    (Future(4), "change", "none"),
    (Next(2), "values", "none"),
    (Nothing(), "values", "none"),
    (Window(4), "shared", {"name": "vicreg", "invariance": 0}),
    (Window(4), "ema", "none"),
    (Pair(), "shared", "sigreg"),
]


@pytest.mark.parametrize("task, target, regulariser", PARTS, ids=str)
def test_every_task_takes_a_step(task, target, regulariser):
    objective = Composite(axial(), task=task, target=target, regulariser=regulariser, **FIT)
    views = tuple(torch.randn(4, 4, v.frames, 16, 16) for v in objective.views)
    batch = {"fields": views[0], "views": views, "seeds": sample_seeds(0, 0, 0, [0, 1, 2, 3])}
    optimizer = torch.optim.SGD(objective.encoder.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in objective.encoder.parameters()]
    loss = objective(batch)["loss"]
    loss.backward()
    optimizer.step()
    objective.after_step(1, 2)
    assert torch.isfinite(loss)
    moved = [not torch.equal(a, b) for a, b in zip(before, objective.encoder.parameters()) if b.ndim > 1]
    assert all(moved)


# the next frame


def test_the_error_of_a_sample_and_channel_is_relative_to_its_size():
    true, guess = torch.randn(2, 3, 5, 8)
    found = normalised_error(guess, true, channels=4, floor=0.2)
    for b in range(3):
        for c in range(4):
            y, z = true[b, :, c::4].flatten(), guess[b, :, c::4].flatten()
            assert torch.isclose(found[b, c], F.mse_loss(z, y) / (0.2 + y.square().mean()))
    target = NormalisedPixels(patch=(1, 2, 1), channels=4, floor=0.2)
    score = target.score(guess, true, trivial=torch.zeros_like(true))
    assert torch.isclose(score["loss"], found.mean())
    assert torch.isclose(
        score["relative"], found.mean() / normalised_error(0 * true, true, channels=4, floor=0.2).mean()
    )
    with pytest.raises(ValueError, match="multiple of 3 channels"):
        normalised_error(guess, true, channels=3)
    with pytest.raises(ValueError, match="there is no mask"):
        target.score(guess, true, torch.ones(3, 5, dtype=torch.bool))


def test_the_floor_keeps_fields_without_strength_from_ruling():
    quiet = torch.zeros(1, 4, 8)
    assert normalised_error(quiet + 0.01, quiet, channels=4).max() == pytest.approx(0.1)
    assert normalised_error(quiet + 0.01, quiet, channels=4, floor=1e-7).min() == pytest.approx(1e3)
    for floor in (0, -1e-3, math.nan):
        with pytest.raises(ValueError, match="floor must be positive"):
            NextFrame(axial(), floor=floor, **FIT)
    with pytest.raises(ValueError, match="unknown target 'whitened'; valid: values, change"):
        NextFrame(axial(), target="whitened", **FIT)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("target", ["values", "change"])
def test_gate_and_loss_are_in_the_same_units(target, frames):
    objective = NextFrame(axial(), target=target, frames=frames, **FIT)
    x = torch.randn(3, 4, 8 + frames, 16, 16)
    batch = {"fields": x, "seeds": torch.arange(3)}
    found, parts = objective.gate(batch), objective(batch)
    y, last = x[:, :, 8:], x[:, :, 7:8]
    asked = y - last if target == "change" else y
    size = 1e-3 + asked.square().mean(dim=(2, 3, 4))
    assert found["persistence"] == pytest.approx(
        float(((y - last).square().mean(dim=(2, 3, 4)) / size).mean()), rel=1e-4
    )
    assert found["mean"] == pytest.approx(
        float(((asked - asked.mean()).square().mean((2, 3, 4)) / size).mean()), rel=1e-4
    )
    assert found["own"] == pytest.approx(parts["loss"].item(), rel=1e-5) and objective.training
    assert parts["relative"].item() == pytest.approx(found["own"] / found["persistence"], rel=1e-4)


def test_the_presets_train_it_and_count_its_operations():
    run = resolve("rayleigh_benard", "next_frame", preset="smoke")
    assert (run.encoder, run.window_frames, run.views) == ("axial", 17, ())
    objective = build(run)
    assert objective.encoder.periodic == (True, False)
    counted = cost(run)
    n, (t, h, w), d = 16 * 64, (16, 8, 8), 32
    blocks = 2 * n * (3 * d * d + d * d) * 2 + 2 * n * 8 * d * d + 4 * n * d * (t + h + w)
    stem = 2 * 16 * (256 * 4 * 4 * d // 4 + 64 * 4 * d // 4 * d)
    assert counted["encode"] == blocks + stem
    assert 2.5 * counted["encode"] < counted["train"] < 4 * counted["encode"]
    sizes = {
        name: build_encoder("axial", in_channels=4, **resolve("shear_flow", "next_frame", preset=name).encoder_config)
        for name in ("laptop", "paper")
    }
    weights = {name: sum(p.numel() for p in encoder.parameters()) for name, encoder in sizes.items()}
    assert 0.25e6 < weights["laptop"] < 0.3e6 and 7e6 < weights["paper"] < 7.4e6


def test_it_trains_from_files_and_is_finetuned(smoke_data):
    objective = NextFrame(axial(dim=8, depth=1, strides=(4, 2)), system=SHEAR, shape=(8, 32, 32), target="change")
    scaling = dict(normaliser=Normaliser.load(smoke_data, SHEAR))
    windows = Windows(smoke_data, SHEAR, "train", frames=9, stride=4)
    scaling["scaler"] = LabelScaler.fit(SHEAR, windows.labels)
    batches = Batches(windows, batch_size=8, augment=True, **scaling)
    losses = losses_in_training(objective, batches)
    assert losses[-1] < losses[0]
    normaliser = scaling["normaliser"]
    facts = dict(system=SHEAR.name, channels=SHEAR.channels, shape=[8, 32, 32], dt=None, name="axial")
    info = facts | dict(mean=normaliser.mean.tolist(), std=normaliser.std.tolist(), config=objective.encoder.config)
    loaded = LoadedEncoder(objective.encoder, info)
    clips = {s: Windows(smoke_data, SHEAR, s, frames=8, stride=28) for s in ("train", "valid")}
    features = [features_of(loaded, w, scaling["scaler"], progress=False) for w in clips.values()]
    start = fit_probe("attentive", *features, scaling["scaler"], recipe=AttentiveRecipe(epochs=1, head={"heads": 2}))
    batches = (Batches(w, batch_size=8, **scaling) for w in clips.values())
    tuned = fit_finetune(loaded, *batches, start=start, epochs=1)
    changed = [not torch.equal(a, b) for a, b in zip(tuned.network.encoder.parameters(), loaded.encoder.parameters())]
    assert len(tuned.trials) == 2 and (all(changed) or tuned.chosen["epoch"] == 0)

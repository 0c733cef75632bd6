"""Targets: round trips, formulas, trivial answers, moving average, gradients, resuming, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from physrep.core.randomness import sample_seeds
from physrep.models.convnext import ConvNeXt
from physrep.models.vit import ViT, patchify, unpatchify
from physrep.objectives.targets import (
    KINDS,
    LOSSES,
    FeatureTarget,
    PixelTarget,
    Whitening,
    hidden_mean,
    momentum_at,
    move_average,
    patch_statistics,
    scale_modes,
    scored,
    shell_amplitudes,
    shells,
    token_loss,
    with_floor,
)
from physrep.objectives.tasks import pixel_mask, tube_mask
from physrep.physics.systems import get_system

SYSTEM, SHAPE, PATCH = get_system("shear_flow"), (4, 16, 16), (2, 4, 4)


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def smooth(b: int = 3, c: int = 4, t: int = 4, h: int = 16, w: int = 16) -> torch.Tensor:
    "Fields with a steep spectrum."
    factors = 1 / (1 + torch.arange(int(shells((h, w)).max()) + 1).float()) ** 3
    return scale_modes(torch.randn(b, c, t, h, w), 20 * factors.expand(c, -1))


def pixel_target(kind: str, whitening: Whitening | None = None, **options) -> PixelTarget:
    whitening = (whitening or Whitening()) if kind == "whitened" else None
    return PixelTarget(kind, patch=PATCH, whitening=whitening, **options)


# pixels


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind):
    x, last = smooth(), smooth(t=1)[:, :, 0]
    target = pixel_target(kind)
    tokens = target(x, last)
    assert tokens.shape == (3, 2 * 4 * 4, 4 * 32) and tokens.dtype == torch.float32
    assert torch.allclose(target.pictures(tokens, x, last), x, atol=1e-4)


def test_formulas():
    x, last = smooth(), smooth(t=1)[:, :, 0]
    assert torch.equal(pixel_target("values")(x), patchify(x, PATCH))
    assert torch.equal(pixel_target("change")(x, last), patchify(x - last[:, :, None], PATCH))
    mean, std = patch_statistics(x, PATCH)
    assert torch.equal(pixel_target("patch")(x), patchify((x - mean) / std, PATCH))
    values = pixel_target("patch")(100 * x + 5).view(3, 32, 32, 4)  # (b, n, pixels, c)
    assert torch.allclose(values.mean(2), torch.zeros(()), atol=1e-3)
    assert torch.allclose(values.var(2, unbiased=False), torch.ones(()), atol=1e-2)


@pytest.mark.parametrize("size", [(16, 16), (8, 16), (16, 6), (7, 9)])
def test_whitening_by_hand(size):
    x = smooth(2, 3, 2, *size)
    h, w = size
    white = Whitening()(x)
    spectrum = torch.fft.fft2(x.double(), norm="ortho")
    for c in range(3):
        amplitude = {}
        for i in range(h):
            for j in range(w):
                k = min(h, w) * math.hypot(min(i, h - i) / h, min(j, w - j) / w)
                amplitude.setdefault(round(k), []).append((i, j))
        rms = {
            s: math.sqrt(sum(float(spectrum[:, c, :, i, j].abs().square().mean()) for i, j in modes) / len(modes))
            for s, modes in amplitude.items()
        }
        expected = spectrum[:, c].clone()
        for s, modes in amplitude.items():
            for i, j in modes:
                expected[:, :, i, j] /= max(rms[s], 1e-3 * max(rms.values()))
        assert torch.allclose(torch.fft.fft2(white[:, c].double(), norm="ortho"), expected, atol=1e-3)


def test_whitened_spectrum_is_flat_and_variance_is_one():
    white = Whitening(4, (16, 16), floor=1e-6).fit(x := smooth())(x)
    assert torch.allclose(shell_amplitudes(white), torch.ones(()), atol=1e-3)
    assert torch.allclose(white.square().mean(dim=(0, 2, 3, 4)), torch.ones(4), atol=1e-3)


def test_fitted_whitening_is_one_linear_map_and_in_the_state_dict():
    fitted = Whitening(4, (16, 16)).fit(smooth(8))
    x = smooth()
    assert torch.allclose(fitted(x)[:1], fitted(x[:1]), atol=1e-5)  # whatever else is in the batch
    assert torch.allclose(fitted(3 * x), 3 * fitted(x), atol=1e-4)  # amplitudes of a flow stay
    assert not torch.allclose(Whitening()(x)[:1], Whitening()(x[:1]), atol=1e-2)
    loaded = pixel_target("whitened", Whitening(4, (16, 16)))
    assert not loaded.whitening.fitted
    loaded.load_state_dict(pixel_target("whitened", fitted).state_dict())
    assert torch.equal(loaded(x), pixel_target("whitened", fitted)(x))


def test_floor_keeps_rounding_errors_small():
    x = smooth()
    x = scale_modes(x, (torch.arange(12) < 5).float().expand(4, -1))  # nothing above shell 4 but rounding
    amplitudes = shell_amplitudes(x)
    assert amplitudes[:, 5:].max() < 1e-5 and with_floor(amplitudes, 1e-3).min() >= 1e-3 * amplitudes.max(1)[0].min()
    assert shell_amplitudes(Whitening()(x))[:, 5:].max() < 1e-2
    constant = torch.zeros(2, 4, 4, 16, 16)
    assert torch.equal(Whitening()(constant), constant)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_into_pixel_targets_and_no_autocast(kind):
    x, last = smooth().requires_grad_(), smooth(t=1)[:, :, 0]
    target = pixel_target(kind)
    tokens = target(x, last)
    assert not tokens.requires_grad and not list(target.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(target(x, last), tokens)
    assert target(x.detach().bfloat16(), last).dtype == torch.float32


def test_persistence():
    x, last = smooth(), smooth(t=1)[:, :, 0]
    repeated = last[:, :, None].expand_as(x)
    assert torch.equal(pixel_target("values").persistence(x, last), patchify(repeated, PATCH))
    assert torch.equal(pixel_target("change").persistence(x, last), torch.zeros(3, 32, 128))
    whitening = Whitening(4, (16, 16)).fit(x)
    persistent = pixel_target("whitened", whitening).persistence(x, last)
    assert torch.equal(persistent, patchify(whitening(repeated), PATCH))
    for kind in KINDS:  # in fields, it is the last frame whatever the kind
        target = pixel_target(kind)
        assert torch.allclose(target.pictures(target.persistence(x, last), x, last), repeated, atol=1e-3)


@pytest.mark.parametrize("kind", ["values", "patch"])
def test_score_in_pixels(kind):
    "Mean squared error over the hidden pixels, and over that of their mean."
    x, guess = smooth(), torch.randn(3, 4, *SHAPE)
    mask = tube_mask(sample_seeds(0, 0, 0, [0, 1, 2]), (2, 4, 4), 0.75)
    hidden = pixel_mask(mask, (2, 4, 4), PATCH).expand_as(x)
    mean, std = patch_statistics(x, PATCH)
    y = (x if kind == "values" else (x - mean) / std)[hidden]
    loss = (guess[hidden] - y).square().mean()
    found = pixel_target(kind).score(patchify(guess, PATCH), pixel_target(kind)(x), mask)
    assert torch.allclose(found["loss"], loss, rtol=1e-5)
    assert torch.allclose(found["relative"], loss / (y - y.mean()).square().mean(), rtol=1e-4)


def test_score_of_changes_is_relative_to_persistence():
    x, last = smooth(), smooth(t=1)[:, :, 0]
    target = pixel_target("change")
    true = target(x, last)
    parts = target.score(torch.zeros_like(true), true)
    assert parts["relative"] == 1 and torch.allclose(parts["loss"], (x - last[:, :, None]).square().mean())
    values = pixel_target("values")
    parts = values.score(patchify(x, PATCH), values(x), trivial=values.persistence(x, last))
    assert parts["relative"] == 0


def test_pixel_target_refuses():
    x = smooth()
    cases = {
        "unknown kind 'edges'; valid: values, patch, change, whitened": lambda: pixel_target("edges"),
        "unknown loss 'huber'; valid: mse, smooth_l1, l1": lambda: pixel_target("values", loss="huber"),
        "needs a whitening": lambda: PixelTarget("whitened", patch=PATCH),
        "takes no whitening": lambda: PixelTarget("values", patch=PATCH, whitening=Whitening()),
        "needs the last seen frame": lambda: pixel_target("change")(x),
        r"must be \(3, 4, 16, 16\)": lambda: pixel_target("change")(x, x[:, :, :1]),
        "not fitted": lambda: Whitening(4, (16, 16))(x),
        "takes those of each batch": lambda: Whitening().fit(x),
        "give both channels and size": lambda: Whitening(4),
        r"floor must lie in \(0, 1\], got 0": lambda: Whitening(floor=0),
        "a multiple of": lambda: pixel_target("values")(x[:, :, :3]),
    }
    for message, attempt in cases.items():
        with pytest.raises(ValueError, match=message):
            attempt()


def test_operations_of_pixel_targets():
    numbers = 4 * 4 * 16 * 16
    found = {kind: pixel_target(kind).operations(4, SHAPE) for kind in KINDS}
    assert found == {"values": 0, "patch": 6 * numbers, "change": numbers, "whitened": 42 * numbers}


# losses


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_by_hand(kind):
    prediction, target = 2 * torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[True, False, True, False, False], [False, True, True, True, False]])
    error = (prediction - target)[mask].flatten().tolist()
    each = {
        "mse": lambda e: e * e,
        "l1": abs,
        "smooth_l1": lambda e: e * e / 2 if abs(e) < 1 else abs(e) - 0.5,
    }[kind]
    assert token_loss(prediction, target, mask, kind=kind) == pytest.approx(
        sum(map(each, error)) / len(error), rel=1e-5
    )
    everywhere = torch.ones(2, 5, dtype=torch.bool)
    assert torch.allclose(
        token_loss(prediction, target, kind=kind), token_loss(prediction, target, everywhere, kind=kind)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_loss(prediction, target, mask, kind=kind)
    assert torch.equal(inside, token_loss(prediction, target, mask, kind=kind))
    assert token_loss(prediction.bfloat16(), target, kind=kind).dtype == torch.float32


@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_in_float64_are_those_of_hidden_tokens_only(kind):
    prediction, target = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 3, 2, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: token_loss(p, target, mask, kind=kind), prediction)
    token_loss(prediction, target, mask, kind=kind).backward()
    assert (prediction.grad[~mask] == 0).all() and (prediction.grad[mask] != 0).all()


def test_hidden_mean_is_the_best_constant():
    target, mask = torch.randn(3, 7, 4) + 1, torch.rand(3, 7) < 0.5
    assert torch.allclose(hidden_mean(target, mask).squeeze(), target[mask].mean())
    assert torch.allclose(hidden_mean(target, mask, each=True).squeeze(), target[mask].mean(0))
    assert torch.allclose(hidden_mean(target).squeeze(), target.mean())
    best = hidden_mean(target, mask)
    loss = [token_loss((best + d).expand_as(target), target, mask) for d in (0.0, 0.1, -0.1)]
    assert loss[0] < loss[1] and loss[0] < loss[2]
    parts = scored(best.expand_as(target), target, mask, trivial=best)
    assert parts["relative"] == 1 and not parts["relative"].requires_grad


def test_losses_refuse():
    z = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match="differ in shape"):
        token_loss(z, z[:, :4])
    with pytest.raises(ValueError, match="hides no token"):
        token_loss(z, z, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must be bool of shape \(2, 5\), got torch.float32"):
        token_loss(z, z, torch.ones(2, 5))


# features


def encoder(name: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        return ViT(4, tubelet=PATCH, dim=12, depth=1, heads=2)
    return ConvNeXt(
        4, widths=(8, 12), depths=(1, 1), strides=((2, 1, 1),), kernel_size=3, stem_kernel=PATCH, stem_stride=PATCH
    )


def feature_target(kind: str, of: nn.Module, **options) -> FeatureTarget:
    return FeatureTarget(kind, of if kind == "ema" else None, **options)


@pytest.mark.parametrize("name", ["vit", "convnext"])
@pytest.mark.parametrize("kind", ["shared", "stopgrad", "ema"])
def test_gradients_of_feature_targets(kind, name):
    student = encoder(name)
    target = feature_target(kind, student, normalise=True)
    true = target(student, smooth())
    assert true.requires_grad == (kind == "shared")
    prediction = torch.randn_like(true, requires_grad=True)
    target.score(prediction, true)["loss"].backward()
    assert prediction.grad is not None
    assert any(p.grad is not None for p in student.parameters()) == (kind == "shared")
    assert all(p.grad is None for p in target.parameters())
    assert not [p for p in target.parameters() if p.requires_grad]
    with torch.no_grad():
        assert not target(student, smooth()).requires_grad


def test_layer_norm_without_weights():
    student, x = encoder(), smooth()
    plain, normalised = (FeatureTarget("stopgrad", normalise=n)(student, x) for n in (False, True))
    expected = (plain - plain.mean(-1, keepdim=True)) / (plain.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(normalised, expected, atol=1e-5)
    assert torch.equal(normalised, F.layer_norm(plain, (12,)))
    target = FeatureTarget("stopgrad", normalise=True)
    assert target.prepared(plain.bfloat16()).dtype == torch.float32 and not list(target.parameters())


def test_moving_average_is_the_written_recurrence():
    student = encoder("convnext")
    target = FeatureTarget("ema", student, momentum=0.9)
    by_hand = [p.detach().clone() for p in student.parameters()]
    for step in range(1, 9):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.1 * torch.randn_like(p))
        target.after_step(student, step, 8)
        m = 1 - 0.1 * (1 + math.cos(math.pi * step / 8)) / 2
        by_hand = [m * mean + (1 - m) * p.detach() for mean, p in zip(by_hand, student.parameters())]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(target.average.parameters(), by_hand))
    assert not torch.allclose(next(target.average.parameters()), next(student.parameters()))
    for kind in ("shared", "stopgrad"):
        FeatureTarget(kind).after_step(student, 1, 8)  # nothing to move


def test_momentum_depends_on_the_step_only():
    assert momentum_at(10, 10, 0.9) == 1 and momentum_at(5, 10, 0.9) == pytest.approx(0.95)
    assert [momentum_at(k, 10, 0.996, 0.996) for k in (1, 5, 10)] == [0.996] * 3
    for step in (0, 11):
        with pytest.raises(ValueError, match="from 1 to 10"):
            momentum_at(step, 10, 0.9)


def test_a_run_that_goes_on_is_the_same_run():
    def steps(student: nn.Module, target: FeatureTarget, first: int, last: int) -> None:
        for step in range(first, last + 1):
            g = torch.Generator().manual_seed(step)
            with torch.no_grad():
                for p in student.parameters():
                    p.add_(0.1 * torch.randn(p.shape, generator=g))
            target.after_step(student, step, 8)

    student = encoder()
    target = FeatureTarget("ema", student, momentum=0.5)
    steps(student, target, 1, 3)
    saved = copy.deepcopy((student.state_dict(), target.state_dict()))
    steps(student, target, 4, 8)
    again = encoder()
    goes_on = FeatureTarget("ema", again, momentum=0.5)
    again.load_state_dict(saved[0])
    goes_on.load_state_dict(saved[1])
    steps(again, goes_on, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(target.average.parameters(), goes_on.average.parameters()))


def test_buffers_are_copied():
    norm = nn.BatchNorm1d(3)
    average = copy.deepcopy(norm)
    norm(torch.randn(8, 3) + 4)
    move_average(average, norm, 0.9)
    assert torch.equal(average.running_mean, norm.running_mean) and int(average.num_batches_tracked) == 1


def test_the_encoder_is_not_in_the_state_dict_twice():
    student = encoder()
    assert not FeatureTarget("shared").state_dict()
    names = set(FeatureTarget("ema", student).state_dict())
    assert names == {f"average.{name}" for name in student.state_dict()}


def test_feature_score_is_relative_to_the_mean_or_to_the_context():
    target = FeatureTarget("stopgrad")
    true, mask = torch.randn(3, 7, 4) + torch.arange(4), torch.rand(3, 7) < 0.5
    mean = true[mask].mean(0).expand_as(true)
    assert torch.allclose(target.score(mean, true, mask)["relative"], torch.ones(()))
    context = true + 0.5
    parts = target.score(true + 0.25, true, mask, trivial=context)
    assert torch.allclose(parts["relative"], torch.tensor(0.25)) and torch.allclose(parts["loss"], torch.tensor(0.0625))


def test_feature_target_refuses():
    cases = {
        "kind='ema' needs an encoder": lambda: FeatureTarget("ema"),
        "kind='shared' keeps no encoder": lambda: FeatureTarget("shared", encoder()),
        "unknown kind 'teacher'; valid: shared, stopgrad, ema": lambda: FeatureTarget("teacher"),
        "unknown loss 'huber'": lambda: FeatureTarget(loss="huber"),
        "must hold, got 0.9 and 0.5": lambda: FeatureTarget(momentum=0.9, momentum_end=0.5),
    }
    for message, attempt in cases.items():
        with pytest.raises(ValueError, match=message):
            attempt()


def test_operations_of_feature_targets():
    found = [feature_target(kind, encoder()).operations(100, 7) for kind in ("shared", "stopgrad", "ema")]
    assert found == [300, 100, 121]


def test_tokens_fit_the_decoders_order():
    x = smooth()
    assert torch.equal(unpatchify(pixel_target("values")(x), PATCH, 4, (2, 4, 4)), x)

"""Targets: round trips, formulas, trivial answers, moving average, gradients, and what is refused."""

import math

import pytest
import torch
from torch import nn

from physrep.models.convnext import ConvNeXt
from physrep.models.vit import patchify
from physrep.objectives.targets import (
    KINDS,
    LOSSES,
    FeatureTarget,
    PixelTarget,
    Whitening,
    patch_statistics,
    scale_modes,
    shell_amplitudes,
    shells,
    token_loss,
)

SHAPE, PATCH = (4, 16, 16), (2, 4, 4)


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def smooth(b: int = 3, c: int = 4, t: int = 4, h: int = 16, w: int = 16) -> torch.Tensor:
    "Fields with a steep spectrum."
    factors = 1 / (1 + torch.arange(int(shells((h, w)).max()) + 1).float()) ** 3
    return scale_modes(torch.randn(b, c, t, h, w), 20 * factors.expand(c, -1))


def pixel_target(kind: str, fitted_on: torch.Tensor | None = None, **options) -> PixelTarget:
    target = PixelTarget(kind, patch=PATCH, channels=4, size=(16, 16), **options)
    if target.whitening is not None and fitted_on is not None:
        target.whitening.fit(fitted_on)
    return target


# pixels


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_without_gradient_in_float32(kind):
    x, last = smooth().requires_grad_(), smooth(t=1)[:, :, 0]
    target = pixel_target(kind, x.detach())
    tokens = target(x, last)
    assert tokens.shape == (3, 2 * 4 * 4, 4 * 32) and not tokens.requires_grad and not list(target.parameters())
    assert torch.allclose(target.pictures(tokens, x, last), x, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(target(x, last), tokens)
    assert target(x.detach().bfloat16(), last).dtype == torch.float32


def test_formulas():
    x, last = smooth(), smooth(t=1)[:, :, 0]
    assert torch.equal(pixel_target("values")(x), patchify(x, PATCH))
    assert torch.equal(pixel_target("change")(x, last), patchify(x - last[:, :, None], PATCH))
    assert torch.equal(patch_statistics(torch.ones(1, 4, 4, 4, 4), PATCH)[1], torch.full((1, 4, 4, 4, 4), 1e-3))
    mean, std = patch_statistics(x, PATCH)
    assert torch.equal(pixel_target("patch")(x), patchify((x - mean) / std, PATCH))
    values = pixel_target("patch")(100 * x + 5).view(3, 32, 32, 4)  # (b, n, pixels, c)
    assert torch.allclose(values.mean(2), torch.zeros(()), atol=1e-3)
    assert torch.allclose(values.var(2, unbiased=False), torch.ones(()), atol=1e-2)


@pytest.mark.parametrize("size", [(16, 16), (8, 16), (16, 6), (7, 9)])
def test_whitening_by_hand(size):
    x = smooth(2, 3, 2, *size)
    h, w = size
    white = Whitening(3, size).fit(x)(x)
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


def test_whitening_is_one_linear_map_with_a_flat_spectrum_and_in_the_state_dict():
    fitted = pixel_target("whitened", smooth(8))
    x = smooth()
    assert torch.allclose(fitted.whitening(3 * x)[:1], 3 * fitted.whitening(x[:1]), atol=1e-4)
    loaded = pixel_target("whitened")
    assert not loaded.whitening.fitted
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(loaded(x), fitted(x))
    white = Whitening(4, (16, 16), floor=1e-6).fit(x)(x)
    assert torch.allclose(shell_amplitudes(white), torch.ones(()), atol=1e-3)
    x = scale_modes(x, (torch.arange(12) < 5).float().expand(4, -1))  # nothing above shell 4 but rounding
    assert shell_amplitudes(Whitening(4, (16, 16)).fit(x)(x))[:, 5:].max() < 1e-2, "the floor keeps it small"


def test_persistence_is_the_last_frame_in_units_of_the_target():
    x, last = smooth(), smooth(t=1)[:, :, 0]
    repeated = last[:, :, None].expand_as(x)
    assert torch.equal(pixel_target("change").persistence(x, last), torch.zeros(3, 32, 128))
    for kind in KINDS:
        target = pixel_target(kind, x)
        assert torch.allclose(target.pictures(target.persistence(x, last), x, last), repeated, atol=1e-3)


def test_what_is_refused():
    x, z = smooth(), torch.randn(2, 5, 3)
    for attempt, message in (
        (lambda: pixel_target("edges"), "unknown kind 'edges'; valid: values, patch, change, whitened"),
        (lambda: pixel_target("values", loss="huber"), "unknown loss 'huber'; valid: mse, smooth_l1, l1"),
        (lambda: pixel_target("values", floor=0.1), "floor is for kind 'whitened'"),
        (lambda: pixel_target("whitened", floor=0.0), r"floor must lie in \(0, 1\], got 0"),
        (lambda: pixel_target("change")(x), "needs the last frame seen"),
        (lambda: pixel_target("whitened")(x), "not fitted"),
        (lambda: pixel_target("values")(x[:, :, :3]), "a multiple of"),
        (lambda: token_loss(z, z[:, :4]), "differ in shape"),
        (lambda: token_loss(z, z, torch.zeros(2, 5, dtype=torch.bool)), "hides no token"),
        (lambda: FeatureTarget("ema"), "needs an encoder to start from"),
        (lambda: FeatureTarget(momentum=1.5), r"momentum must lie in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


# losses


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_by_hand_and_their_gradients(kind):
    prediction, target = 2 * torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[True, False, True, False, False], [False, True, True, True, False]])
    error = (prediction - target)[mask].flatten().tolist()
    each = {
        "mse": lambda e: e * e,
        "l1": abs,
        "smooth_l1": lambda e: e * e / 2 if abs(e) < 1 else abs(e) - 0.5,
    }[kind]
    found = token_loss(prediction, target, mask, kind=kind)
    assert found == pytest.approx(sum(map(each, error)) / len(error), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(token_loss(prediction, target, mask, kind=kind), found)
    prediction, target = prediction.double().requires_grad_(), target.double()
    assert torch.autograd.gradcheck(lambda p: token_loss(p, target, mask, kind=kind), prediction)
    token_loss(prediction, target, mask, kind=kind).backward()
    assert (prediction.grad[~mask] == 0).all() and (prediction.grad[mask] != 0).all()


def test_the_mean_is_the_best_constant():
    true, mask = torch.randn(3, 7, 4) + torch.arange(4), torch.rand(3, 7) < 0.5
    for target in (PixelTarget(patch=PATCH), FeatureTarget()):
        best = target.mean(true, mask)
        assert best.shape == ((1, 1, 1) if isinstance(target, PixelTarget) else (1, 1, 4))
        errors = [float(target.error(best + d, true, mask)) for d in (0.0, 0.1, -0.1)]
        assert errors[0] < errors[1] and errors[0] < errors[2]
        assert target.score(best.expand_as(true), true, mask)["relative"] == pytest.approx(1)
    context = target.score(true + 0.25, true, mask, trivial=true + 0.5)
    assert torch.allclose(context["relative"], torch.tensor(0.25))


# features


def encoder() -> nn.Module:
    torch.manual_seed(0)
    stem = dict(stem_kernel=PATCH, stem_stride=PATCH, strides=((2, 1, 1),))
    return ConvNeXt(4, widths=(8, 12), depths=(1, 1), kernel_size=3, **stem)


def test_moving_average_is_the_written_recurrence():
    student = encoder()
    target = FeatureTarget("ema", encoder=student, momentum=0.9)
    by_hand = [p.detach().clone() for p in student.parameters()]
    for step in range(1, 9):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(0.1 * torch.randn_like(p))
        target.after_step(student, step, 8)  # of 8 or of many: a short run is the beginning of a long one
        by_hand = [0.9 * mean + 0.1 * p.detach() for mean, p in zip(by_hand, student.parameters())]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(target.average.parameters(), by_hand))
    norm = nn.BatchNorm1d(3)
    average = FeatureTarget("ema", encoder=norm)
    norm(torch.randn(8, 3) + 4)
    average.after_step(norm, 1, 8)
    assert torch.equal(average.average.running_mean, norm.running_mean), "buffers are copied"

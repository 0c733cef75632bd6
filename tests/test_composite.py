"""Objectives from parts: what is seen and asked for, the losses written out, gradients, noise, pairs, resuming."""

import copy
import math

import pytest
import torch
from torch import nn

from physrep.core.randomness import randn_samples, sample_seeds
from physrep.data.batches import Batches, ViewBatches
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.windows import Windows
from physrep.models.axial import Axial
from physrep.models.convnext import ConvNeXt
from physrep.models.heads import cell_of
from physrep.models.vit import ViT, patchify
from physrep.objectives.composite import Composite
from physrep.objectives.emulators import Forecast, NextFrame
from physrep.objectives.invariance import Invariance
from physrep.objectives.jepa import JEPA, JEPASig, MaskedJEPA, VICRegOnly
from physrep.objectives.mae import MAE, AutoEncoder
from physrep.objectives.methods import kept_encoder
from physrep.objectives.predictors import positions_of
from physrep.objectives.supervised import Supervised
from physrep.objectives.tasks import Blocks, Future, Next, Tube, Window, pixel_mask, tube_mask
from physrep.physics.systems import get_system
from physrep.training.distributed import mean_over_samples
from physrep.training.loop import Recipe, TimeUp, train

SYSTEM, SHAPE, PATCH = get_system("shear_flow"), (8, 16, 16), (2, 4, 4)
FIT = dict(system=SYSTEM, shape=SHAPE)
POOLED = {"name": "pooled_vicreg", "invariance": 0.0}


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def encoder(name: str = "vit") -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        return ViT(4, dim=24, depth=2, heads=2, tubelet=PATCH)
    if name == "axial":
        return Axial(4, dim=24, depth=1, heads=2, strides=(2, 2), layer_scale=0.1)
    stem = (1, 2, 2) if name == "fine" else PATCH
    stride = {"fine": 1, "coarse": 2}.get(name, (2, 1, 1))  # token cells of 1x2x2, 4x8x8, and 4x4x4
    layers = dict(stem_kernel=stem, stem_stride=stem, strides=(stride,), kernel_size=3)
    return ConvNeXt(4, widths=(12, 24), depths=(1, 1), layer_scale=0.1, **layers)


def clips(frames: int = 8, b: int = 4) -> dict:
    return {"fields": torch.randn(b, 4, frames, 16, 16), "seeds": sample_seeds(0, 0, 0, list(range(b)))}


def pairs(b: int = 4) -> dict:
    views = tuple(torch.randn(b, 4, *SHAPE) for _ in range(2))
    return {"fields": views[0], "views": views, "seeds": sample_seeds(0, 0, 0, list(range(b)))}


# what is seen


@pytest.mark.parametrize("name", ["vit", "convnext"])
@pytest.mark.parametrize("target", ["values", "ema"])
@pytest.mark.parametrize("task", [Tube(), Blocks(2, 0.2), Future(4)], ids=str)
def test_prediction_sees_nothing_that_is_not_shown_and_loss_only_what_is_hidden(task, target, name):
    objective = Composite(encoder(name), task=task, target=target, **FIT)
    batch = clips()
    hidden, shown = objective.masks(batch)
    predictor = objective.predictor
    noise = torch.randn_like(batch["fields"])
    outside = pixel_mask(~shown, predictor.patch_grid, predictor.patch)
    other = batch | {"fields": torch.where(outside, noise, batch["fields"])}
    assert torch.equal(objective.answer(batch)[0].predicted, objective.answer(other)[0].predicted)
    if target == "values":
        left = pixel_mask(~hidden, predictor.patch_grid, predictor.patch) & outside  # neither shown nor asked for
        assert left.any() == isinstance(task, Blocks)
        other = batch | {"fields": torch.where(left, noise, batch["fields"])}
        assert torch.equal(objective(batch)["loss"], objective(other)["loss"])


@pytest.mark.parametrize("target, regulariser", [("ema", "none"), ("stopgrad", "sigreg"), ("shared", "sigreg")])
@pytest.mark.parametrize("task", [Tube(), Blocks(2, 0.2), Future(4), Window(4)], ids=str)
def test_sides_and_gradients_of_features(task, target, regulariser):
    objective = Composite(encoder(), task=task, target=target, regulariser=regulariser, **FIT)
    batch = clips(objective.frames)
    found, sides = objective.answer(batch)
    assert found.true.requires_grad == (target == "shared") and found.predicted.requires_grad
    if target == "shared":
        assert torch.equal(sides[0], found.asked()[0]) and sides[1].shape == sides[0].shape
    else:
        assert sides[0] is found.encoded and sides[1] is None
    objective(batch)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.target.parameters())


# the losses, written out


@pytest.mark.parametrize("target_norm", ["none", "patch"])
@pytest.mark.parametrize("name", ["vit", "convnext", "fine", "coarse"])
def test_mae_is_the_mean_error_of_hidden_patches(name, target_norm):
    model, data = MAE(encoder(name), ratio=0.5, target_norm=target_norm, **FIT), clips()
    if name != "vit":
        assert model.predictor.decoder.cell == cell_of(SHAPE, model.predictor.grid) and model.predictor.patch == PATCH
    mask = tube_mask(data["seeds"], (4, 4, 4), 0.5)
    with torch.no_grad():
        y, y_hat = patchify(data["fields"], PATCH), model.predictor(model.encoder, data["fields"], ~mask)[1]
        errors = []
        for b, n in mask.nonzero().tolist():
            pixels, predicted = y[b, n].view(-1, 4), y_hat[b, n].view(-1, 4)  # the pixels of a patch, its channels
            if target_norm == "patch":
                pixels = (pixels - pixels.mean(dim=0)) / (pixels.var(dim=0, unbiased=False) + 1e-6).sqrt()
            errors.append((pixels - predicted).square().mean())
        assert torch.allclose(model(data)["loss"], torch.stack(errors).mean(), rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "convnext"])
@pytest.mark.parametrize("target", ["shared", "stopgrad", "ema"])
def test_jepa_is_vicreg_on_two_windows(name, target):
    model = JEPA(encoder(name), target=target, horizon=3, invariance=2.0, variance=40.0, covariance=2.0, **FIT)
    batch = clips(11)
    assert model.frames == 11
    parts = model(batch)
    assert set(parts) == {"loss", "invariance", "variance", "covariance", "relative"}
    weights = {"invariance": 2, "variance": 40, "covariance": 2}
    assert parts["loss"].item() == pytest.approx(sum(w * parts[k].item() for k, w in weights.items()), rel=1e-5)
    c, z = model.encoder(batch["fields"][:, :, :8]), model.encoder(batch["fields"][:, :, 3:])
    c, p, z = (tokens.flatten(0, 1) for tokens in (c, model.predictor.map(c, model.predictor.grid), z))
    assert torch.allclose(parts["relative"], (p - z).square().mean() / (c - z).square().mean(), rtol=1e-4)
    loss, off = 2 * (p - z).square().mean(), ~torch.eye(24, dtype=bool)
    for side in (p, z) if target == "shared" else (c,):  # the written formula
        loss = loss + 40 * torch.relu(1 - (side.var(0) + 1e-4).sqrt()).mean() / 2
        loss = loss + 2 * torch.cov(side.T)[off].square().sum() / 24
    assert torch.allclose(parts["loss"], loss, rtol=1e-5)


class Places(nn.Module):
    "Tells the place of each token and nothing about the clip."

    in_channels, dim = 4, 4

    def __init__(self):
        super().__init__()
        self.code = nn.Parameter(2 * torch.randn(64, self.dim))

    def grid(self, shape):
        return (4, 4, 4)

    def forward(self, x):
        return self.code.expand(len(x), -1, -1)


def test_a_code_of_positions_satisfies_vicreg_but_not_its_centred_form():
    plain, centred = (JEPA(Places(), centre=centre, **FIT)(clips(16)) for centre in (False, True))
    assert plain["variance"] < 0.25 * centred["variance"], "tokens differ from each other, as if they told clips apart"
    assert centred["variance"] == pytest.approx(2 * 0.5 * (1 - math.sqrt(1e-4))), "both sides are constant at a place"


def test_whitening_is_fitted_once_on_the_first_training_batch():
    objective = Composite(encoder(), task="none", target={"name": "whitened", "floor": 0.01}, **FIT)
    batch = clips()
    with pytest.raises(ValueError, match="not fitted"):
        objective.eval()(batch)
    with pytest.raises(ValueError, match="not fitted"):
        objective.train().show(batch)  # a picture is no training batch
    objective(batch)
    amplitudes = objective.state_dict()["target.whitening.amplitudes"].clone()
    objective({**batch, "fields": 3 * batch["fields"]})
    assert amplitudes.any() and torch.equal(objective.target.whitening.amplitudes, amplitudes)
    assert objective.target.whitening.floor == 0.01


def test_a_dense_encoder_may_have_patches_of_its_own():
    objective = Composite(encoder("convnext"), task="tube", predictor={"patch": [4, 8, 8]}, **FIT)
    assert objective.predictor.patch_grid == (2, 2, 2) and objective.target.patch == (4, 8, 8)
    with pytest.raises(ValueError, match="same number of positions"):
        positions_of(torch.tensor([[True, False], [True, True]]))


# views and noise


def test_views_in_a_batch_are_those_of_a_contiguous_clip():
    objective = Composite(encoder(), task=Window(4), target="ema", **FIT)
    batch = clips(12)
    x = batch["fields"]
    views = batch | {"fields": x[:, :, :8], "views": (x[:, :, :8], x[:, :, 4:])}
    assert torch.equal(objective(batch)["loss"], objective(views)["loss"])
    with pytest.raises(ValueError, match="ViewBatches"):
        Invariance(encoder(), **FIT)(clips())


@pytest.mark.parametrize("parts", [dict(task="tube"), dict(task=Window(4), target="ema"), dict(task=Next(2))], ids=str)
def test_noise_is_on_every_clip_in_training_mode_alone(parts):
    plain, noisy = Composite(encoder(), **parts, **FIT), Composite(encoder(), noise=0.3, **parts, **FIT)
    noisy.load_state_dict(plain.state_dict())
    batch = clips(plain.frames)
    by_hand = []
    for i, x in enumerate(plain.clips(batch)):
        by_hand.append(x + 0.3 * randn_samples(batch["seeds"], x.shape[1:], name=f"noise of view {i}"))
    expected = plain(batch | {"views": tuple(by_hand), "clean": plain.clips(batch)})
    assert torch.equal(noisy(batch)["loss"], expected["loss"])
    assert torch.equal(noisy.answer(batch)[0].predicted, plain.answer(batch)[0].predicted), "what is drawn has no noise"
    assert torch.equal(noisy.eval()(batch)["loss"], plain(batch)["loss"])


ASKED_IN_PIXELS = [
    (MAE, {}),
    (MAE, {"target_norm": "patch"}),
    (Forecast, {"frames": 4, "target": "change"}),
    (NextFrame, {"target": "change"}),
    (AutoEncoder, {"target": "whitened"}),
]


@pytest.mark.parametrize("cls, options", ASKED_IN_PIXELS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_noise_is_seen_but_not_asked_for_in_pixels(cls, options):
    objective = cls(encoder(), **options, **FIT)
    clean = clips(objective.frames)
    noisy = clean | {"fields": clean["fields"] + torch.randn_like(clean["fields"]), "clean": clean["fields"]}
    objective(noisy)  # fits a spectrum
    found, plain, other = (objective.answer(batch)[0] for batch in (noisy, clean, noisy | {"clean": noisy["fields"]}))
    assert torch.equal(found.true, plain.true) and torch.equal(found.predicted, other.predicted)
    assert not torch.equal(found.predicted, plain.predicted) and not torch.equal(found.true, other.true)
    views = {"views": objective.clips(noisy), "clean": objective.clips(clean)}  # as `ViewBatches` has them
    assert torch.equal(objective(clean | views)["loss"], objective(noisy)["loss"])


# one thing changed in a JEPA


def covariance(z):
    return torch.cov(z.T)[~torch.eye(24, dtype=bool)].square().sum() / 24


def vicreg_of(z, variance=25.0, weight=1.0):
    return variance * torch.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2 + weight * covariance(z)


@pytest.mark.parametrize("target", ["shared", "ema"])
@pytest.mark.parametrize("centre", [True, False])
def test_clips_differ_by_a_term_on_their_mean_tokens(target, centre):
    fixed = dict(target=target, centre=centre, **FIT)
    spread = dict(pooled_variance=80.0, pooled_std=0.6, pooled_covariance=4.0)
    plain, model = JEPA(encoder(), **fixed), JEPA(encoder(), **spread, **fixed)
    model.load_state_dict(plain.state_dict())
    batch = clips(16, b=6)
    first, second = (model.encoder(x) for x in model.clips(batch))
    rows = [z.mean(dim=1) for z in ((first, second) if target == "shared" else (first,))]
    written = sum(80 * torch.relu(0.6 - (z.var(0) + 1e-4).sqrt()).mean() + 4 * covariance(z) for z in rows) / len(rows)
    parts = model(batch)
    torch.testing.assert_close(parts["loss"], plain(batch)["loss"] + written)
    assert {"pooled_variance", "pooled_covariance"} <= set(parts) and not mean_over_samples(model)


def test_vicreg_may_hold_the_target_alone():
    model, batch = JEPA(encoder(), sides="target", **FIT), clips(16)
    found, sides = model.answer(batch)
    assert sides == (found.true, None) and found.true.requires_grad
    error = (found.predicted - found.true).square().mean()
    torch.testing.assert_close(model(batch)["loss"], 25 * error + vicreg_of(found.true.flatten(0, 1)))


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_vicreg_without_prediction_is_that_of_both_encodings(name):
    models = VICRegOnly(encoder(name), **FIT), JEPA(encoder(name), invariance=0.0, **FIT)
    batch = clips(16)
    for model in models:
        first, second = (model.encoder(x).flatten(0, 1) for x in model.clips(batch))
        parts = model(batch)
        torch.testing.assert_close(parts["loss"], vicreg_of(first) + vicreg_of(second))
        torch.testing.assert_close(parts["invariance"], (first - second).square().mean())
        parts["loss"].backward()
        assert all(p.grad is None for p in model.predictor.parameters())
        assert all(p.grad is not None for p in model.encoder.parameters())


@pytest.mark.parametrize("target", ["shared", "ema"])
def test_mean_tokens_are_predicted_under_other_symmetries(target):
    model = JEPA(encoder(), pooled=True, target=target, horizon=4, **FIT)
    assert model.frames == 12 and [(v.start, v.own_symmetry) for v in model.views] == [(0, False), (4, True)]
    with pytest.raises(ValueError, match="ViewBatches"):
        model(clips(12))
    batch = pairs()
    first, second = batch["views"]
    context, asked = model.encoder(first), model.target(model.encoder, second)
    error = (model.predictor.map(context, model.predictor.grid).mean(dim=1) - asked.mean(dim=1)).square().mean()
    sides = (context, asked) if target == "shared" else (context,)
    expected = 25 * error + sum(vicreg_of(z.flatten(0, 1)) for z in sides)
    torch.testing.assert_close(model(batch)["loss"], expected)
    answers, true, hidden = model.features(batch)
    assert answers["r2"].shape == answers["copy"].shape == true.shape == (4, 1, 24) and hidden is None
    assert model.show(batch).axes


@pytest.mark.parametrize("kind", ["shared", "stopgrad"])
def test_features_behind_a_projector_cannot_shrink(kind):
    "The projector has a batch norm: only a target of a fixed size makes an error that smaller features do not lower."
    target = {"name": kind, "normalise": True}
    model = Composite(encoder(), task="window", target=target, regulariser=POOLED, **FIT)
    batch = clips(16)
    before = model.answer(batch)[0].true
    with torch.no_grad():
        model.encoder.norm.weight.mul_(1e-2)
        model.encoder.norm.bias.mul_(1e-2)
    torch.testing.assert_close(model.answer(batch)[0].true, before, atol=0.2, rtol=0.1)


# what is kept


def test_the_moving_average_is_kept():
    for model in (MaskedJEPA(encoder(), **FIT), JEPA(encoder(), target="ema", **FIT)):
        assert kept_encoder(model) is model.target.average
    for model in (JEPA(encoder(), **FIT), MAE(encoder(), **FIT), Supervised(encoder(), **FIT)):
        assert kept_encoder(model) is model.encoder


# pairs


@pytest.mark.parametrize("regulariser", [{"name": "pooled_vicreg", "dims": [16, 8]}, "sigreg"])
def test_pair(regulariser):
    options = {"predictor": {"dims": (16, 8)}} if regulariser == "sigreg" else {}
    objective = Composite(encoder(), task="pair", target="shared", regulariser=regulariser, **options, **FIT)
    batch = pairs()
    parts = objective(batch)
    if regulariser == "sigreg":
        torch.testing.assert_close(parts["loss"], parts["error"] + parts["sigreg"])
    else:
        weights = objective.regulariser.weights
        torch.testing.assert_close(parts["loss"], sum(weight * parts[k] for k, weight in weights.items()))
    rolled = batch | {"views": (batch["views"][1].roll(1, 0), batch["views"][1])}
    assert abs(objective(rolled)["relative"] - 1) < 1e-4, "a sample's partner is no closer than that of another"
    same = objective(batch | {"views": (batch["views"][0],) * 2})
    assert same["error"] < 1e-12 and same["relative"] < 1e-6


class Counting(ViT):
    "A ViT that notes which tokens it was asked for."

    def forward(self, x, keep=None):
        self.asked = [*getattr(self, "asked", []), keep]
        return super().forward(x, keep)


def counting(**options) -> Invariance:
    vit = Counting(4, dim=24, depth=1, heads=2, tubelet=PATCH)
    return Invariance(vit, dims=(16, 8), norm="layer", **options, **FIT)


@pytest.mark.parametrize("shown, k", [(0.5, 32), (0.3, 19), (0.001, 1)])
def test_a_share_of_the_tokens_of_each_view_is_computed_by_its_seeds(shown, k):
    objective, batch = counting(shown=shown), pairs()
    objective(batch)
    first, second = objective.encoder.asked
    assert first.shape == second.shape == (4, k)
    for keep in (first, second):
        assert all(len(set(row)) == k for row in keep.tolist()) and keep.min() >= 0 and keep.max() < 64
    if k > 1:
        assert not torch.equal(first, second), "each view has its own subset"
        assert len({tuple(row) for row in first.tolist()}) == 4, "each sample has its own subset"
    one = {"fields": batch["fields"][2:3], "seeds": batch["seeds"][2:3]}
    assert torch.equal(objective.positions(one)[1], second[2:3]), "a sample's subset does not depend on its neighbours"


def test_every_token_is_computed_in_evaluation_mode_and_without_tubelets():
    half, whole, batch = counting(shown=0.5), counting(), pairs()
    whole.load_state_dict(half.state_dict())
    assert not torch.equal(half(batch)["loss"], whole(batch)["loss"])
    assert torch.equal(half.eval()(batch)["loss"], whole.eval()(batch)["loss"])
    assert half.encoder.asked[2:] == [None, None]
    assert Invariance(encoder("convnext"), shown=0.5, **FIT).positions(batch) == (None, None)


# training


def source(cls, data, batch_size=8, **options):
    "A named method on a tiny ViT, and its batches of smoke shear flow."
    options |= {"frames": 4} if cls is Forecast else {"dims": (32, 32)} if cls is Invariance else {}
    torch.manual_seed(0)
    vit = ViT(4, dim=24, depth=1, heads=2, tubelet=(4, 8, 8), temperature=30.0)
    objective = cls(vit, system=SYSTEM, shape=(8, 32, 32), **options)
    windows = Windows(data, SYSTEM, "train", frames=objective.frames, stride=2)
    scaling = dict(normaliser=Normaliser.load(data, SYSTEM), scaler=LabelScaler.fit(SYSTEM, windows.labels))
    if cls is Invariance:
        return objective, ViewBatches(windows, objective.views, batch_size=batch_size, augment=True, **scaling)
    return objective, Batches(windows, batch_size=batch_size, **scaling)


@pytest.mark.parametrize("cls", [MAE, JEPA, Forecast, NextFrame, MaskedJEPA, JEPASig, AutoEncoder, Invariance])
def test_loss_falls(cls, smoke_data, tmp_path):
    # pairs are pushed apart within a batch: eight of them are few for a loss that falls within 20 updates
    options = {JEPA: {"variance": 5.0}, Invariance: {"batch_size": 16}}.get(cls, {})
    objective, batches = source(cls, smoke_data, **options)
    first = next(batches(0))
    with torch.no_grad():
        before = float(objective(first)["loss"])
    train(objective, batches, Recipe(steps=20, lr=3e-3, batch_size=8), tmp_path, progress=False)
    with torch.no_grad():
        assert float(objective(first)["loss"]) < before


RESUMED = [
    (JEPA, {"target": "ema", "momentum": 0.5, "noise": 0.1}),
    (MaskedJEPA, {}),
    (JEPASig, {}),
    (Invariance, {}),
    (AutoEncoder, {"target": "whitened"}),
]


@pytest.mark.parametrize("cls, options", RESUMED, ids=lambda x: getattr(x, "__name__", ""))
def test_training_in_pieces_is_the_same_training(cls, options, smoke_data, tmp_path):
    recipe = Recipe(steps=3, lr=3e-3, batch_size=8)
    whole, batches = source(cls, smoke_data, **options)
    start = copy.deepcopy(whole.state_dict())
    rows = train(whole, batches, recipe, tmp_path / "whole", progress=False)
    for _ in range(recipe.steps):
        pieces, batches = source(cls, smoke_data, **options)
        pieces.load_state_dict(start)
        try:
            again = train(pieces, batches, recipe, tmp_path / "pieces", progress=False, minutes=0)
        except TimeUp:
            continue
    assert rows.equals(again)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, pieces.state_dict()[name]), name
    assert int(whole.regulariser.updates) == 3

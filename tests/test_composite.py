"""Objectives from parts: MAE and JEPA are combinations, gradients, noise, resuming, learning, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from physrep.core.randomness import randn_samples, sample_seeds
from physrep.data.batches import Batches, ViewBatches
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.windows import Windows
from physrep.models.convnext import ConvNeXt
from physrep.models.vit import ViT, patchify
from physrep.objectives.autoencoder import AutoEncoder
from physrep.objectives.combinations import REGULARISERS
from physrep.objectives.composite import Composite
from physrep.objectives.forecast import Forecast
from physrep.objectives.invariance import Invariance
from physrep.objectives.jepa import JEPA
from physrep.objectives.jepa_sigreg import JEPASig
from physrep.objectives.mae import MAE
from physrep.objectives.masked_jepa import MaskedJEPA
from physrep.objectives.methods import build_objective, check_pair
from physrep.objectives.predictors import MaskedPixels, NextPixels, places_of
from physrep.objectives.regularisers import NoRegulariser, PooledVICReg, SIGReg, VICReg
from physrep.objectives.targets import FeatureTarget, PixelTarget
from physrep.objectives.tasks import Blocks, Future, Next, Nothing, Pair, Tube, Window, pixel_mask
from physrep.physics.systems import get_system
from physrep.training.loop import Recipe, TimeUp, train
from physrep.training.pretrain import pretrain
from physrep.training.run import build, resolve

SYSTEM, SHAPE, PATCH = get_system("shear_flow"), (8, 16, 16), (2, 4, 4)
FIT = dict(system=SYSTEM, shape=SHAPE)
NAMED = (Forecast, MaskedJEPA, JEPASig, AutoEncoder, Invariance)


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def encoder(name: str = "vit") -> nn.Module:
    if name == "vit":
        return ViT(4, dim=24, depth=2, heads=2, tubelet=PATCH)
    stem = dict(stem_kernel=(2, 4, 4), stem_stride=(2, 4, 4))
    return ConvNeXt(4, widths=(12, 24), depths=(1, 1), strides=((2, 1, 1),), layer_scale=0.1, **stem)


def clips(frames: int = 8, b: int = 4) -> dict:
    return {"fields": torch.randn(b, 4, frames, 16, 16), "seeds": sample_seeds(0, 0, 0, list(range(b)))}


def pairs(b: int = 4) -> dict:
    views = tuple(torch.randn(b, 4, *SHAPE) for _ in range(2))
    return {"fields": views[0], "views": views, "seeds": sample_seeds(0, 0, 0, list(range(b)))}


def gradients(objective: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    objective(batch)["loss"].backward()
    return {name: p.grad for name, p in objective.encoder.named_parameters() if p.grad is not None}


# the named ones that have notebooks of their own


def assert_equal(new: Composite, old: nn.Module, batch: dict):
    a, b = new(batch), old(batch)
    torch.testing.assert_close(a["loss"], b["loss"], rtol=2e-6, atol=1e-7)
    if "relative" in b:
        torch.testing.assert_close(a["relative"], b["relative"], rtol=2e-6, atol=1e-7)
    found, expected = gradients(new, batch), gradients(old, batch)
    assert found.keys() == expected.keys() and len(found) > 5
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm, kind", [("none", "values"), ("patch", "patch")])
@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_tube_and_pixels_is_mae(name, norm, kind):
    old = MAE(encoder(name), ratio=0.75, target_norm=norm, **FIT)
    target = PixelTarget(kind, patch=PATCH)
    new = Composite(copy.deepcopy(old.encoder), task=Tube(0.75), target=target, regulariser=NoRegulariser(), **FIT)
    if name == "convnext":
        with torch.no_grad():
            old.predictor.mask_token += torch.randn_like(old.predictor.mask_token)
    new.predictor.load_state_dict(old.predictor.state_dict())
    assert_equal(new, old, clips())


@pytest.mark.parametrize("target", ["shared", "stopgrad", "ema"])
@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_window_and_features_with_vicreg_is_jepa(name, target):
    weights = dict(variance=20.0, covariance=2.0)
    old = JEPA(encoder(name), target=target, invariance=10.0, horizon=4, predictor_scale=0.1, **weights, **FIT)
    new = Composite(
        copy.deepcopy(old.encoder), task=Window(4), target=target, regulariser=VICReg(**weights), weight=10.0,
        predictor={"layer_scale": 0.1}, **FIT,
    )  # fmt: skip
    new.predictor.load_state_dict(old.predictor.state_dict())
    assert new.frames == old.frames == 12
    assert_equal(new, old, clips(12))


def test_moving_average_is_that_of_jepa():
    old = JEPA(encoder(), target="ema", momentum=0.5, **FIT)
    new = Composite(copy.deepcopy(old.encoder), task="window", target={"name": "ema", "momentum": 0.5}, **FIT)
    for objective in (old, new):
        with torch.no_grad():
            objective.encoder.embed.weight += 1
        objective.after_step(3, 10)
    assert torch.equal(old.target.average.embed.weight, new.target.average.embed.weight)
    assert int(new.regulariser.updates) == 3


# what is seen, asked for and pushed

PIXEL_TASKS = [Tube(), Blocks(2, 0.2), Future(4), Next(1), Next(4), Nothing()]


@pytest.mark.parametrize("name", ["vit", "convnext"])
@pytest.mark.parametrize("task", PIXEL_TASKS, ids=str)
def test_pixels(task, name):
    for target in ("values", "whitened", *(["change"] if isinstance(task, Future | Next) else [])):
        objective = Composite(encoder(name), task=task, target=target, **FIT).train()
        batch = clips(objective.frames)
        parts = objective(batch)
        assert set(parts) == {"loss", "error", "relative"} and torch.isfinite(parts["loss"])
        assert all(g.abs().sum() > 0 for n, g in gradients(objective, batch).items() if n.endswith("weight"))
        found, _ = objective.answer(batch)
        assert found.predicted.shape == found.true.shape
        objective.show(batch)


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
        if isinstance(task, Blocks):
            assert not (hidden | shown).all(), "this case is here for what is neither shown nor hidden"
        left = pixel_mask(~hidden, predictor.patch_grid, predictor.patch) & outside  # neither shown nor asked for
        other = batch | {"fields": torch.where(left, noise, batch["fields"])}
        assert torch.equal(objective(batch)["loss"], objective(other)["loss"])


@pytest.mark.parametrize("name", ["vit", "convnext"])
@pytest.mark.parametrize("task", [Tube(), Blocks(2, 0.2), Future(4), Window(4)], ids=str)
def test_features_and_their_gradient(task, name):
    for target, regulariser in (("ema", "none"), ("stopgrad", "sigreg"), ("shared", "sigreg")):
        objective = Composite(encoder(name), task=task, target=target, regulariser=regulariser, **FIT)
        batch = clips(objective.frames)
        found, sides = objective.answer(batch)
        assert found.true.requires_grad == (target == "shared") and found.predicted.requires_grad
        assert (sides[1] is None) == (target != "shared")
        assert gradients(objective, batch)
        if target == "ema":
            assert all(p.grad is None and not p.requires_grad for p in objective.target.parameters())
            assert len(list(objective.target.parameters())) == len(list(objective.encoder.parameters()))
        objective.show(batch)


def test_regulariser_on_pixels_sees_the_encoded_tokens():
    objective = Composite(encoder(), task="tube", regulariser={"name": "sigreg", "weight": 0.1}, **FIT)
    batch = clips()
    found, sides = objective.answer(batch)
    assert sides[0] is found.encoded and sides[1] is None
    parts = objective(batch)
    torch.testing.assert_close(parts["loss"], parts["error"] + 0.1 * parts["sigreg"])


def test_next_frames_and_their_trivial_answer():
    objective = Composite(encoder(), task=Next(3), **FIT)
    assert objective.frames == 11 and objective.predictor.patch == (1, 4, 4)
    batch = clips(11)
    batch["fields"][:, :, 8:] = batch["fields"][:, :, 7:8] + 0.5
    found, _ = objective.answer(batch)
    assert torch.equal(found.true, patchify(batch["fields"][:, :, 8:], (1, 4, 4)))
    torch.testing.assert_close(found.trivial, found.true - 0.5)
    loss = objective(batch)
    torch.testing.assert_close(loss["relative"], loss["loss"] / 0.25)
    tokens, n = found.encoded, found.encoded.shape[1]
    longer = objective.predictor.decoder(tokens, torch.arange(n).expand(4, -1), (4 + 3, 4, 4))
    assert torch.equal(found.predicted, longer[:, n:]), "the places after the clip are those of the next frames"
    batch["fields"][:, :, 8:] = torch.nan
    assert torch.isfinite(objective.answer(batch)[0].predicted).all(), "the next frames are not seen"


def test_relative_is_one_for_the_trivial_answer():
    for task, target in ((Future(4), "values"), (Future(4), "change"), (Window(4), "ema")):
        objective = Composite(encoder(), task=task, target=target, **FIT)
        found, _ = objective.answer(clips(objective.frames))
        score = objective.target.score(found.trivial, found.true, found.hidden, found.trivial)
        assert abs(score["relative"] - 1) < 1e-6


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


# pairs


@pytest.mark.parametrize("regulariser", [{"name": "pooled_vicreg", "dims": [16, 8]}, "sigreg"])
def test_pair(regulariser):
    options = {"predictor": {"dims": (16, 8)}} if regulariser == "sigreg" else {}
    objective = Composite(encoder(), task="pair", target="shared", regulariser=regulariser, **options, **FIT)
    batch = pairs()
    parts = objective(batch)
    regular = objective.regulariser
    if regulariser == "sigreg":
        torch.testing.assert_close(parts["loss"], parts["error"] + parts["sigreg"])
    else:
        found = sum(regular.weights[k] * parts[k] for k in ("invariance", "variance", "covariance"))
        torch.testing.assert_close(parts["loss"], found)
    assert gradients(objective, batch)
    rolled = batch | {"views": (batch["views"][1].roll(1, 0), batch["views"][1])}
    assert abs(objective(rolled)["relative"] - 1) < 1e-4, "a sample's partner is no closer than that of another"
    same = batch | {"views": (batch["views"][0],) * 2}
    assert objective(same)["error"] < 1e-12 and objective(same)["relative"] < 1e-6
    objective.show(batch)


def test_pair_needs_views():
    objective = Invariance(encoder(), **FIT)
    assert objective.frames == 8 and [v.offset for v in objective.views] == [0, None]
    with pytest.raises(ValueError, match="ViewBatches"):
        objective(clips())
    with pytest.raises(ValueError, match="2 view"):
        objective(pairs() | {"views": pairs()["views"][:1]})
    with pytest.raises(ValueError, match="b, 4, 8, 16, 16"):
        objective(pairs() | {"views": (torch.randn(4, 4, 8, 16, 16), torch.randn(4, 4, 4, 16, 16))})


def test_views_in_a_batch_are_those_of_a_contiguous_clip():
    objective = Composite(encoder(), task=Window(4), target="ema", **FIT)
    batch = clips(12)
    x = batch["fields"]
    views = batch | {"fields": x[:, :, :8], "views": (x[:, :, :8], x[:, :, 4:])}
    assert torch.equal(objective(batch)["loss"], objective(views)["loss"])


# noise


@pytest.mark.parametrize("parts", [dict(task="tube"), dict(task=Window(4), target="ema"), dict(task=Next(2))], ids=str)
def test_noise_is_on_every_clip_in_training_mode_alone(parts):
    plain, noisy = Composite(encoder(), **parts, **FIT), Composite(encoder(), noise=0.3, **parts, **FIT)
    noisy.load_state_dict(plain.state_dict())
    batch = clips(plain.frames)
    by_hand = []
    for i, x in enumerate(plain.clips(batch)):
        by_hand.append(x + 0.3 * randn_samples(batch["seeds"], x.shape[1:], name=f"noise of view {i}"))
    expected = plain(batch | {"views": tuple(by_hand)})
    assert torch.equal(noisy(batch)["loss"], expected["loss"])
    assert torch.equal(noisy(batch | {"views": plain.clips(batch)})["loss"], expected["loss"])
    assert not torch.equal(noisy(batch | {"seeds": batch["seeds"] + 1})["loss"], expected["loss"])
    assert torch.equal(noisy.answer(batch)[0].predicted, plain.answer(batch)[0].predicted), "what is drawn has no noise"
    assert torch.equal(noisy.eval()(batch)["loss"], plain(batch)["loss"])


# refused

WRONG = [
    ("tube", "change", "none", "last seen frame"),
    ("none", "change", "none", "last seen frame"),
    ("tube", "shared", "none", "collapse"),
    ("window", "shared", "none", "collapse"),
    ("pair", "shared", "none", "collapse"),
    ("window", "values", "none", "'next'"),
    ("next", "ema", "none", "'window'"),
    ("none", "ema", "none", "ask for pixels"),
    ("pair", "values", "none", "do not follow"),
    ("pair", "ema", "sigreg", "by one encoder"),
    ("pair", "shared", "vicreg", "same places"),
    ("pair", "shared", {"name": "pooled_vicreg", "invariance": 0.0}, "invariance must not be 0"),
    ("window", "shared", "pooled_vicreg", "invariance must be 0"),
    ("pair", {"name": "shared", "normalise": True}, "sigreg", "normalise"),
    ("tubes", "values", "none", "valid: tube"),
    ("tube", "pixels", "none", "valid: values"),
    ("tube", "values", "vic", "valid: none"),
    ({"name": "tube", "rate": 1}, "values", "none", "it has: ratio"),
    ({"ratio": 0.5}, "values", "none", "mapping"),
    ("tube", {"name": "values", "momentum": 1}, "none", "it has: loss"),
    ("window", {"name": "ema", "patch": PATCH}, "none", "it has: normalise"),
    ("tube", "values", {"name": "sigreg", "lam": 1}, "it has: slices"),
    (Future(8), "values", "none", "at least one must be shown"),
    (Future(3), "values", "none", "multiple of the 2 frames"),
    (Tube(0.01), "values", "none", "no patch"),
    ("tube", PixelTarget(patch=(1, 4, 4)), "none", "must be the same"),
]


@pytest.mark.parametrize("task, target, regulariser, message", WRONG)
def test_senseless_combinations_say_why(task, target, regulariser, message):
    with pytest.raises(ValueError, match=message):
        Composite(encoder(), task=task, target=target, regulariser=regulariser, **FIT)


def test_predictor_options_are_checked():
    for parts, message in (
        (dict(task="tube", predictor={"layer_scale": 1}), "it has: patch, width, depth, heads"),
        (dict(task="window", target="ema", predictor={"kind": "mlp"}), "conv, transformer"),
        (dict(task="pair", target="shared", regulariser="pooled_vicreg", predictor={"dims": (8,)}), "of its own"),
        (dict(task="pair", target="shared", regulariser="sigreg", predictor={"width": 8}), "it has: dims"),
        (dict(task="tube", weight=-1.0), "weight"),
        (dict(task="tube", noise=-1.0), "noise must be finite and not negative"),
        (dict(task="pair", target="shared", regulariser="pooled_vicreg", weight=2.0), "weight=2.0"),
        (dict(task="tube", predictor={"patch": (4, 4, 4)}), "tubelet"),
    ):
        with pytest.raises(ValueError, match=message):
            Composite(encoder(), **parts, **FIT)
    with pytest.raises(ValueError, match="2 seeds for 4"):
        Composite(encoder(), **FIT)(clips() | {"seeds": torch.arange(2)})
    with pytest.raises(ValueError, match="same number"):
        places_of(torch.tensor([[True, False], [True, True]]))


def test_a_dense_encoder_may_have_patches_of_its_own():
    objective = Composite(encoder("convnext"), task="tube", predictor={"patch": (4, 8, 8)}, **FIT)
    assert objective.predictor.patch_grid == (2, 2, 2) and objective.target.patch == (4, 8, 8)
    assert isinstance(objective.predictor, MaskedPixels)
    transformer = Composite(encoder(), task="window", target="ema", predictor={"kind": "transformer"}, **FIT)
    assert torch.isfinite(transformer(clips(16))["loss"])
    assert isinstance(Composite(encoder(), task="next", **FIT).predictor, NextPixels)


# cost


def test_stated_operations_are_the_sums_of_the_parts():
    window = Composite(encoder(), task="window", target="shared", regulariser=VICReg(), **FIT)
    assert window.operations(4, 100) == 3 * VICReg().operations(4 * 64, 24, 2) + 3 * 4 * 100
    tube = Composite(encoder(), task="tube", target="ema", regulariser="sigreg", **FIT)
    size = sum(p.numel() for p in tube.encoder.parameters())
    assert tube.operations(4, 100) == 3 * SIGReg().operations(4 * 16, 24) + 4 * 100 + 3 * size
    assert Composite(encoder(), task="next", target="change", **FIT).operations(4) == 4 * 4 * 16 * 16
    pair = Invariance(encoder(), dims=(16, 8), **FIT)
    assert pair.operations(4, 7) == 3 * PooledVICReg(24, (16, 8)).operations(4, 24, 2) + 3 * 4 * 7
    for task, target in (("pair", "shared"), ("tube", "values")):
        assert Composite(encoder(), task=task, target=target, regulariser="sigreg", **FIT).operations(4) > 0
    assert set(REGULARISERS) == {"none", "vicreg", "pooled_vicreg", "sigreg"}
    assert FeatureTarget("stopgrad").operations(5) == 5


# named methods


def source(cls, data, batch_size=8):
    "A named method on a tiny ViT, and its batches of smoke shear flow."
    options = {"frames": 4} if cls is Forecast else {"dims": (32, 32)} if cls is Invariance else {}
    vit = ViT(4, dim=24, depth=1, heads=2, tubelet=(4, 8, 8), temperature=30.0)
    objective = cls(vit, system=SYSTEM, shape=(8, 32, 32), **options)
    windows = Windows(data, SYSTEM, "train", frames=objective.frames, stride=2)
    options = dict(normaliser=Normaliser.load(data, SYSTEM), scaler=LabelScaler.fit(SYSTEM, windows.labels))
    if cls is Invariance:
        return objective, ViewBatches(windows, objective.views, batch_size=batch_size, **options)
    return objective, Batches(windows, batch_size=batch_size, **options)


@pytest.mark.parametrize("cls", NAMED)
def test_loss_falls(cls, smoke_data, tmp_path):
    objective, batches = source(cls, smoke_data)
    first = next(batches(0))
    with torch.no_grad():
        before = float(objective(first)["loss"])
    train(objective, batches, Recipe(steps=20, lr=3e-3, batch_size=8), tmp_path, progress=False)
    with torch.no_grad():
        assert float(objective(first)["loss"]) < before


@pytest.mark.parametrize("cls", [MaskedJEPA, JEPASig, Invariance])
def test_training_in_pieces_is_the_same_training(cls, smoke_data, tmp_path):
    recipe = Recipe(steps=4, lr=3e-3, batch_size=8)
    whole, batches = source(cls, smoke_data)
    start = copy.deepcopy(whole.state_dict())
    rows = train(whole, batches, recipe, tmp_path / "whole", progress=False)
    for _ in range(recipe.steps):
        pieces, batches = source(cls, smoke_data)
        pieces.load_state_dict(start)
        try:
            again = train(pieces, batches, recipe, tmp_path / "pieces", progress=False, minutes=0)
        except TimeUp:
            continue
    assert rows.equals(again)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, pieces.state_dict()[name]), name
    assert int(whole.regulariser.updates) == 4


def test_whitening_survives_a_resume(smoke_data, tmp_path):
    recipe = Recipe(steps=2, lr=1e-3, batch_size=4)

    def new():
        torch.manual_seed(0)
        vit = ViT(4, dim=24, depth=1, heads=2, tubelet=(4, 8, 8))
        return AutoEncoder(vit, system=SYSTEM, shape=(8, 32, 32), target="whitened")

    _, batches = source(AutoEncoder, smoke_data, 4)
    whole = new()
    train(whole, batches, recipe, tmp_path / "whole", progress=False)
    with pytest.raises(TimeUp):
        train(new(), batches, recipe, tmp_path / "pieces", progress=False, minutes=0)
    pieces = new()
    train(pieces, batches, recipe, tmp_path / "pieces", progress=False)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, pieces.state_dict()[name]), name


@pytest.mark.parametrize("cls", NAMED)
@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_named_methods_go_through_the_door(cls, name):
    place = f"{cls.__module__}:{cls.__name__}"
    assert check_pair(place, name) == name
    run = resolve("shear_flow", place, name, preset="smoke")
    objective = build(run)
    assert isinstance(objective, cls) and run.row == (cls.__name__, name) and run.recipe.steps == 6
    assert run.window_frames == objective.frames == (20 if cls is JEPASig else 16)
    assert cls.__module__.removeprefix("physrep.") in run.modules
    with pytest.raises(ValueError, match="no coefficient speed; it has"):
        build_objective(place, encoder(), speed=1, **FIT)


def test_pretrain_serves_contiguous_methods_and_pairs(smoke_data, tmp_path):
    quiet = dict(progress=False, say=lambda line: None)
    run = resolve("shear_flow", "physrep.objectives.masked_jepa:MaskedJEPA", preset="smoke", steps=1, batch_size=2)
    assert (pretrain(run, smoke_data, tmp_path, **quiet) / "encoder.safetensors").is_file()
    run = resolve("shear_flow", "physrep.objectives.invariance:Invariance", preset="smoke", steps=1, batch_size=2)
    folder = pretrain(run, smoke_data, tmp_path, **quiet)
    assert (folder / "encoder.safetensors").is_file() and len(run.views) == 2


def test_composite_itself_goes_through_the_door_as_data():
    parts = {"task": {"name": "blocks", "count": 2}, "target": {"name": "ema", "loss": "smooth_l1"}}
    run = resolve("shear_flow", "physrep.objectives.composite:Composite", preset="smoke", coefficients=parts)
    objective = build(run)
    assert objective.task == Blocks(2) and objective.target.loss == "smooth_l1"
    assert isinstance(objective.regulariser, NoRegulariser)


def test_forecast_takes_the_last_frame_before_what_is_hidden():
    objective = Forecast(encoder(), frames=4, target="change", **FIT)
    batch = clips()
    x = batch["fields"]
    found, _ = objective.answer(batch)
    assert torch.equal(found.true, patchify(x - x[:, :, 3:4], PATCH))
    assert not found.trivial.any() and torch.equal(found.hidden.view(4, 4, 16)[:, 2:].all(), torch.tensor(True))
    assert Pair().views(SHAPE)[1].own_symmetry

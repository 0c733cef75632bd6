"""MAE beyond its notebook: gradients, precision, other cell sizes, what a mask may and may not be."""

import pytest
import torch

from physrep.models.convnext import ConvNeXt
from physrep.models.heads import cell_of
from physrep.models.vit import ViT, patchify, unpatchify
from physrep.objectives.mae import MAE
from physrep.objectives.methods import build_objective
from physrep.objectives.targets import patch_statistics
from physrep.objectives.tasks import pixel_mask, tube_mask
from physrep.physics.systems import get_system

SHEAR, SHAPE = get_system("shear_flow"), (4, 16, 16)
torch.set_num_threads(1)


def encoder(name: str, channels: int = 4):
    torch.manual_seed(0)
    if name == "vit":
        return ViT(channels, dim=24, depth=1, heads=2, tubelet=(2, 4, 4))
    stem = dict(fine=(1, 2, 2), even=(2, 4, 4), coarse=(2, 4, 4))[name]
    strides = dict(fine=(1, 1, 1), even=(1, 1, 1), coarse=(2, 2, 2))[name]  # token cells 1x2x2, 2x4x4, 4x8x8
    return ConvNeXt(
        channels, widths=(8, 16), depths=(1, 1), stem_kernel=stem, stem_stride=stem, strides=(strides,), kernel_size=3
    )


def batch(b: int = 4, shape=SHAPE, channels: int = 4) -> dict:
    torch.manual_seed(1)
    return {"fields": torch.randn(b, channels, *shape), "labels": torch.zeros(b, 2), "seeds": torch.arange(10, 10 + b)}


NAMES = ("vit", "fine", "even", "coarse")


def predict(model: MAE, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    "Predicted fields `(b, c, t, h, w)` of clips of which the patches of `mask (b, n)` are hidden."
    predictor = model.predictor
    patches = predictor(model.encoder, x, ~mask)[1]
    return unpatchify(patches, predictor.patch, x.shape[1], predictor.patch_grid)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.9])
def test_ratio_is_exact_and_tubes_are_tubes(ratio):
    mask = tube_mask(torch.arange(20), (3, 5, 7), ratio).view(20, 3, 35)
    assert (mask.sum(dim=2) == round(ratio * 35)).all() and (mask == mask[:, :1]).all()
    share = mask[:, 0].float().mean(dim=0)
    assert tube_mask(torch.arange(400), (1, 5, 7), ratio).float().mean(dim=0).sub(ratio).abs().max() < 0.12, (
        share
    )  # no preferred place


def test_mask_of_pixels_and_patches_agree():
    mask = tube_mask(torch.arange(3), (2, 4, 4), 0.5)
    pixels = pixel_mask(mask, (2, 4, 4), (2, 4, 4))
    assert torch.equal(patchify(pixels.float(), (2, 4, 4)).amin(dim=2).bool(), mask)
    assert torch.equal(patchify(pixels.float(), (2, 4, 4)).amax(dim=2).bool(), mask)


@pytest.mark.parametrize("target_norm", ["none", "patch"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_is_the_mean_over_masked_patches(name, target_norm):
    model, data = MAE(encoder(name), system=SHEAR, shape=SHAPE, ratio=0.5, target_norm=target_norm), batch()
    mask = tube_mask(data["seeds"], (2, 4, 4), 0.5)
    with torch.no_grad():
        y, y_hat = patchify(data["fields"], (2, 4, 4)), patchify(predict(model, data["fields"], mask), (2, 4, 4))
        errors = []
        for b, n in mask.nonzero().tolist():
            pixels, predicted = y[b, n].view(-1, 4), y_hat[b, n].view(-1, 4)  # the pixels of a patch, its channels
            if target_norm == "patch":
                pixels = (pixels - pixels.mean(dim=0)) / (pixels.var(dim=0, unbiased=False) + 1e-6).sqrt()
            errors.append((pixels - predicted).square().mean())
        assert torch.allclose(model(data)["loss"], torch.stack(errors).mean(), rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_and_micro_batches_add_up(name):
    model, data = MAE(encoder(name), system=SHEAR, shape=SHAPE, ratio=0.5), batch()
    model(data)["loss"].backward()
    whole = {k: p.grad.clone() for k, p in model.named_parameters()}
    assert all(g.abs().sum() > 0 for g in whole.values()), [k for k, g in whole.items() if not g.abs().sum() > 0]
    model.zero_grad()
    for i in (0, 2):
        (model({k: v[i : i + 2] for k, v in data.items()})["loss"] / 2).backward()
    for k, p in model.named_parameters():
        assert torch.allclose(p.grad, whole[k], rtol=1e-3, atol=1e-6), k


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_from_behind_the_mask(name):
    model, data = MAE(encoder(name), system=SHEAR, shape=SHAPE, ratio=0.5), batch()
    mask = tube_mask(data["seeds"], (2, 4, 4), 0.5)
    hidden = pixel_mask(mask, (2, 4, 4), (2, 4, 4))
    with torch.no_grad():
        seen = predict(model, data["fields"], mask)
        assert torch.equal(seen, predict(model, torch.where(hidden, torch.nan, data["fields"]), mask))
        assert not torch.equal(seen, predict(model, torch.where(hidden, data["fields"], 0.0), mask))
    visible = data["fields"].clone().requires_grad_()
    torch.where(hidden, predict(model, visible, mask), 0.0).sum().backward()
    assert (visible.grad.abs() * hidden).max() == 0 and visible.grad.abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_global_generator_is_left_alone(name):
    model, data = MAE(encoder(name), system=SHEAR, shape=SHAPE, ratio=0.5), batch()
    torch.manual_seed(5)
    state, first = torch.get_rng_state(), model(data)["loss"]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(first, model(data)["loss"])


@pytest.mark.parametrize("target_norm", ["none", "patch"])
@pytest.mark.parametrize("name", ["vit", "coarse"])
def test_bfloat16(name, target_norm):
    model, data = MAE(encoder(name), system=SHEAR, shape=SHAPE, target_norm=target_norm), batch()
    exact = model(data)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(data)["loss"]
    assert loss.dtype == torch.float32 and abs(loss / exact - 1) < 0.02
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("target_norm", ["none", "patch"])
@pytest.mark.parametrize("name", ["vit", "coarse"])
def test_show(name, target_norm):
    model, data = MAE(encoder(name), system=SHEAR, shape=SHAPE, target_norm=target_norm), batch()
    fig = model.show(data, channel=3, sample=1, n_frames=3)
    axes = [ax for ax in fig.axes if ax.images]
    rows = [axes[i : i + 3] for i in range(0, 12, 3)]
    assert fig.get_suptitle() == "velocity_y" and [row[0].get_ylabel() for row in rows] == [
        "truth",
        "shown",
        "prediction",
        "error",
    ]
    shown, masked, filled, error = (torch.tensor(row[2].images[0].get_array().filled(torch.nan)).T for row in rows)
    truth = data["fields"][1, 3, 3]
    hidden = masked.isnan()
    assert torch.equal(shown, truth) and hidden.float().mean() == 0.75 and torch.equal(filled[~hidden], truth[~hidden])
    assert torch.equal(error.isnan(), ~hidden) and torch.allclose(error[hidden], (filled - truth)[hidden], atol=1e-5)


def test_patch_targets_are_blind_to_offset_and_scale():
    x = batch()["fields"]
    mean, std = patch_statistics(x, (2, 4, 4))
    mean2, std2 = patch_statistics(5 - 3 * x, (2, 4, 4))
    assert torch.allclose((5 - 3 * x - mean2) / std2, -(x - mean) / std, atol=1e-3)
    flat = torch.ones(1, 1, 2, 4, 4)
    assert (
        (flat - patch_statistics(flat, (2, 4, 4))[0]) / patch_statistics(flat, (2, 4, 4))[1]
    ).abs().max() == 0  # not a division by 0


def test_cells_and_patch_of_a_convnext():
    for name, cell in (("fine", (1, 2, 2)), ("even", (2, 4, 4)), ("coarse", (4, 8, 8))):
        model = MAE(encoder(name), system=SHEAR, shape=SHAPE)
        assert (
            model.predictor.decoder.cell == cell == cell_of(SHAPE, model.predictor.grid)
            and model.predictor.patch == (2, 4, 4)
            and model.frames == 4
        )
    assert MAE(encoder("even"), system=SHEAR, shape=SHAPE, patch=[1, 8, 8]).predictor.patch_grid == (
        4,
        2,
        2,
    )  # a list, as YAML has it
    assert isinstance(build_objective("mae", encoder("vit"), system=SHEAR, shape=SHAPE, ratio=0.5), MAE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(patch=(2, 8, 8)), "tubelet of the encoder"),
        (dict(patch=(4, 4)), "three positive ints"),
        (dict(ratio=0.0), "must lie between 0 and 1, got 0.0"),
        (dict(ratio=1.0), "must lie between 0 and 1, got 1.0"),
        (dict(ratio=0.99), "hides every patch.*choose a ratio from 0.0625 to 0.938"),
        (dict(target_norm="layer"), "valid: none, patch"),
        (dict(shape=(3, 16, 16)), "t must be a multiple of 2"),
        (dict(system=get_system("active_matter")), "takes 4 channels"),
        (dict(decoder_width=5), "even width"),
        (dict(decoder_heads=5), "not divisible by 5 heads"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MAE(encoder("vit"), **(dict(system=SHEAR, shape=SHAPE) | arguments))


def test_wrong_arguments_of_a_convnext():
    with pytest.raises(ValueError, match="h of 5"):
        MAE(encoder("even"), system=SHEAR, shape=SHAPE, patch=(2, 5, 4))
    with pytest.raises(ValueError, match="smaller patches"):
        MAE(encoder("even"), system=SHEAR, shape=SHAPE, patch=(2, 16, 16))


def test_wrong_batches():
    model, data = MAE(encoder("vit"), system=SHEAR, shape=SHAPE), batch()
    with pytest.raises(ValueError, match="1 seeds for 4 samples"):
        model(data | {"seeds": data["seeds"][:1]})
    with pytest.raises(ValueError, match="this objective takes"):
        model(data | {"fields": data["fields"][:, :, :2]})
    uneven = torch.zeros(4, 32, dtype=torch.bool)
    uneven[0, :2] = True
    with pytest.raises(ValueError, match="same number of places"):
        predict(model, data["fields"], uneven)

"""What every objective must do on every encoder, in small; the formulas of each are tested in its notebook."""

import sys

import pytest
import torch

from physrep.core.names import short_name
from physrep.core.randomness import sample_seeds
from physrep.models.convnext import ConvNeXt
from physrep.models.encoders import ENCODERS
from physrep.models.heads import AttentiveHead, ConvDecoder, ConvPredictor, LinearHead, MLPHead, TransformerDecoder
from physrep.models.vit import ViT
from physrep.objectives.jepa import JEPA
from physrep.objectives.mae import MAE
from physrep.objectives.methods import (
    OBJECTIVES,
    build_objective,
    check_pair,
    objective_class,
    objective_module,
)
from physrep.objectives.supervised import RandomEncoder, Supervised
from physrep.physics.systems import get_system

SHEAR, SHAPE = get_system("shear_flow"), (8, 16, 16)
TRAINED = {"jepa": JEPA, "mae": MAE, "supervised": Supervised}
PAIRS = [(objective, encoder) for objective in TRAINED for encoder in ("convnext", "vit")]


def make_encoder(name: str, in_channels: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        return ViT(in_channels, dim=24, depth=1, heads=2, tubelet=(2, 4, 4))
    return ConvNeXt(
        in_channels,
        widths=(8, 16),
        depths=(1, 1),
        stem_kernel=(2, 4, 4),
        stem_stride=(2, 4, 4),
        strides=((2, 1, 1),),
        layer_scale=0.1,
    )


def make(objective: str, encoder: str, **coefficients) -> torch.nn.Module:
    return TRAINED[objective](make_encoder(encoder), system=SHEAR, shape=SHAPE, **coefficients)


def make_batch(frames: int, n: int = 4) -> dict:
    seeds = sample_seeds(0, 0, 0, list(range(n)))
    draw = torch.Generator().manual_seed(1)
    return {
        "fields": torch.randn(n, 4, frames, *SHAPE[1:], generator=draw),
        "labels": torch.randn(n, 2, generator=draw),
        "seeds": seeds,
    }


@pytest.mark.parametrize("name, encoder", PAIRS)
def test_loss_is_a_scalar_whose_gradient_reaches_every_weight_of_the_encoder(name, encoder):
    objective = make(name, encoder)
    fits = getattr(objective, "encoders", None) or ENCODERS
    assert encoder in fits and objective.default_encoder in fits and objective.trains
    assert objective.frames == (16 if name == "jepa" else 8)
    parts = objective(make_batch(objective.frames))
    assert parts["loss"].shape == () and parts["loss"].isfinite() and parts["loss"].requires_grad
    assert len(parts) > 1 and all(v.shape == () and not v.requires_grad for k, v in parts.items() if k != "loss")
    parts["loss"].backward()
    for key, p in objective.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
    assert all(p.grad.abs().sum() > 0 for p in objective.encoder.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name, encoder", PAIRS)
def test_randomness_comes_from_the_seeds_only(name, encoder):
    objective = make(name, encoder, **({"noise": 1.0} if name == "jepa" else {}))
    batch = make_batch(objective.frames)
    with torch.no_grad():
        first, state = objective(batch)["loss"], torch.get_rng_state()
        assert torch.equal(objective(batch)["loss"], first) and torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(5)
        assert torch.equal(objective(batch)["loss"], first)
        same = torch.equal(objective(batch | {"seeds": batch["seeds"] + 1})["loss"], first)
    assert same == (name == "supervised")


@pytest.mark.parametrize("encoder", ["convnext", "vit"])
@pytest.mark.parametrize("name", ["mae", "supervised"])
def test_gradients_of_micro_batches_average_to_those_of_the_batch(name, encoder):
    objective = make(name, encoder)
    batch = make_batch(objective.frames, n=6)
    objective(batch)["loss"].backward()
    whole = {k: p.grad.clone() for k, p in objective.named_parameters()}
    objective.zero_grad()
    for i in range(0, 6, 2):
        (objective({k: v[i : i + 2] for k, v in batch.items()})["loss"] / 3).backward()
    for key, p in objective.named_parameters():
        assert torch.allclose(p.grad, whole[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("name, encoder", PAIRS)
def test_a_few_updates_on_one_batch_lower_the_loss(name, encoder):
    objective = make(name, encoder)
    batch, optimizer = make_batch(objective.frames), torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        parts = objective(batch)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append(float(parts["loss"].detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name, encoder", PAIRS)
def test_state_dict_is_the_whole_state(name, encoder):
    coefficients = {"target": "ema"} if name == "jepa" else {}
    a, b = make(name, encoder, **coefficients), make(name, encoder, **coefficients)
    with torch.no_grad():
        for p in a.parameters():
            p.add_(0.1 * torch.randn_like(p))
        b.load_state_dict(a.state_dict())
        batch = make_batch(a.frames)
        assert torch.equal(a(batch)["loss"], b(batch)["loss"])


@pytest.mark.parametrize("name, encoder", PAIRS)
def test_misfits_are_refused_before_the_first_step(name, encoder):
    with pytest.raises(ValueError, match="11 channels"):
        TRAINED[name](make_encoder(encoder, in_channels=11), system=SHEAR, shape=SHAPE)
    with pytest.raises(ValueError, match="does not fit"):
        TRAINED[name](make_encoder(encoder), system=SHEAR, shape=(8, 18, 16))
    objective = make(name, encoder)
    with pytest.raises(ValueError, match=r"fields of shape \(4, 4, 5, 16, 16\)"):
        objective(make_batch(5))


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("jepa", dict(target="teacher")),
        ("jepa", dict(horizon=0)),
        ("jepa", dict(momentum=2.0)),
        ("jepa", dict(variance=-1.0)),
        ("jepa", dict(chunks=0)),
        ("mae", dict(ratio=1.0)),
        ("mae", dict(ratio=0.0)),
        ("mae", dict(target_norm="batch")),
        ("mae", dict(patch=(2, 8, 8))),
        ("supervised", dict(head="deep")),
    ],
)
def test_wrong_coefficients_are_refused(name, wrong):
    value = next(iter(wrong.values()))
    with pytest.raises(ValueError, match=str(value).replace("(", r"\(").replace(")", r"\)")):
        make(name, "vit", **wrong)


def test_random_encoder_has_no_loss_and_keeps_its_encoder():
    encoder = make_encoder("vit")
    objective = RandomEncoder(encoder, system=SHEAR, shape=SHAPE)
    assert objective.encoder is encoder and objective.frames == 8 and not objective.trains
    with pytest.raises(RuntimeError, match="not trained"):
        objective(make_batch(8))


@pytest.mark.parametrize("head", [LinearHead, MLPHead, AttentiveHead])
def test_heads_read_any_number_of_tokens(head):
    torch.manual_seed(0)
    head = head(16, 3)
    for n in (1, 7):
        assert head(torch.randn(2, n, 16)).shape == (2, 3)
    z = torch.randn(2, 7, 16)
    assert torch.allclose(head(z), head(z.flip(1)), atol=1e-5)


def test_attention_weights_are_those_that_the_head_uses():
    torch.manual_seed(0)
    head = AttentiveHead(16, 2, heads=2)
    z = torch.randn(3, 9, 16)
    weights = head.attention(z)
    assert weights.shape == (3, 2, 9) and torch.allclose(weights.sum(-1), torch.ones(3, 2))
    values = head.to_keys_values(head.norm_tokens(z))[..., 16:].reshape(3, 9, 2, 8)
    a = head.query + head.proj(torch.einsum("bhn,bnhd->bhd", weights, values).flatten(1))
    assert torch.allclose(head(z), head.out(head.norm_out(a + head.mlp(head.norm_mlp(a)))), atol=1e-5)


def test_predictor_has_the_size_of_the_paper_and_treats_frames_alike():
    predictor = ConvPredictor(128)
    assert sum(p.numel() for p in predictor.parameters()) == 801_664
    z = torch.randn(2, 3 * 4 * 5, 128)
    whole = predictor(z, (3, 4, 5))
    frames = [predictor(f, (1, 4, 5)) for f in z.split(20, dim=1)]
    assert whole.shape == z.shape and torch.allclose(whole, torch.cat(frames, dim=1), atol=1e-5)
    with pytest.raises(ValueError, match="odd"):
        ConvPredictor(8, time_kernel=2)


def test_decoders_put_tokens_where_they_belong():
    torch.manual_seed(0)
    decoder, grid = ConvDecoder(8, 3, (2, 4, 4)), (2, 3, 3)
    a = torch.randn(1, 18, 8)
    b = a.clone()
    b[0, 9] += 1.0  # second token frame, corner
    changed = (decoder(b, grid) - decoder(a, grid)).abs().amax(dim=(0, 1)) > 1e-6
    assert (
        changed.shape == (4, 12, 12)
        and not changed[:2].any()
        and changed[2:, :8, :8].any()
        and not changed[2:, 8:].any()
        and not changed[2:, :, 8:].any()
    )
    transformer, keep = TransformerDecoder(16, n_out=5), torch.tensor([[3, 0, 7]])
    out = transformer(torch.randn(1, 3, 16), keep, (2, 2, 2))
    assert (
        out.shape == (1, 8, 5) and len({tuple(row.tolist()) for row in out[0]}) == 8
    )  # positions set even the hidden ones apart


# names

OUTSIDE = """
import torch
from torch import nn


class Means(nn.Module):
    def __init__(self, encoder, *, system, shape, weight=1.0):
        super().__init__()
        self.encoder, self.weight = encoder, weight
        self.head = nn.Linear(encoder.dim, system.n_channels)

    def forward(self, batch):
        x = batch["fields"]
        return {"loss": self.weight * (self.head(self.encoder(x).mean(1)) - x.mean((2, 3, 4))).square().mean()}


class Picky(Means):
    default_encoder, encoders, trains = "convnext", ("convnext",), False


class Anything(Means):
    def __init__(self, encoder, **options):
        super().__init__(encoder, system=options["system"], shape=options["shape"])
        self.options = options


class Lost(Means):
    def __init__(self, encoder, *, system, shape):
        super().__init__(encoder, system=system, shape=shape)
        del self.encoder


class Nothing(nn.Module):
    def __init__(self, encoder):
        super().__init__()


def function(encoder, *, system, shape):
    return Means(encoder, system=system, shape=shape)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch) -> str:
    "A package of its own, `lab.losses`, on the path; gives its name."
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "losses.py").write_text(OUTSIDE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "lab"]:
        monkeypatch.delitem(sys.modules, name)
    return "lab.losses"


def test_objectives_of_another_package(outside):
    name = f"{outside}:Means"
    cls = objective_class(name)
    assert (cls.default_encoder, cls.encoders, cls.trains) == ("vit", None, True)
    assert objective_module(name) == "lab.losses" and short_name(name) == "Means"
    assert check_pair(name, None) == "vit" and check_pair(name, "convnext") == "convnext"
    objective = build_objective(name, make_encoder("vit"), system=SHEAR, shape=SHAPE, weight=0.5)
    assert objective.frames == 8 and objective.shape == SHAPE and objective.weight == 0.5
    objective(make_batch(8))["loss"].backward()
    with pytest.raises(ValueError, match="has no coefficient wieght; it has: weight"):
        build_objective(name, make_encoder("vit"), system=SHEAR, shape=SHAPE, wieght=0.5)
    with pytest.raises(ValueError, match="does not take encoder 'resnet'; it takes: convnext, vit, axial"):
        check_pair(name, "resnet")


def test_what_an_objective_of_another_package_declares_is_kept(outside):
    cls = objective_class(f"{outside}:Picky")
    assert (cls.default_encoder, cls.encoders, cls.trains) == ("convnext", ("convnext",), False)
    assert check_pair(f"{outside}:Picky", None) == "convnext"
    with pytest.raises(ValueError, match="does not take encoder 'vit'; it takes: convnext"):
        check_pair(f"{outside}:Picky", "vit")
    options = build_objective(f"{outside}:Anything", make_encoder("vit"), system=SHEAR, shape=SHAPE, new=1).options
    assert options["new"] == 1


@pytest.mark.parametrize("objective", [*OBJECTIVES, "lab.losses:Means"])
def test_every_objective_takes_an_encoder_of_another_package(outside, objective):
    assert check_pair(objective, "lab.nets:make_encoder") == "lab.nets:make_encoder"
    with pytest.raises(ValueError, match="is not of the form"):
        check_pair(objective, "lab.nets:")


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "jeppa",
            "unknown objective 'jeppa'; valid: jepa, jepa_ema, jepa_sigreg, mae, forecast, next_frame, invariance, "
            'autoencoder, disco, disco_film, supervised, random, frozen, or "my_package.module:name"',
        ),
        ("lab/losses:Means", "is not of the form"),
        ("lab.loses:Means", "module lab.loses cannot be imported"),
        ("lab.losses:Meens", "lab.losses has no 'Meens'; it has: .*Means"),
        ("lab.losses:function", "must be a class derived from torch.nn.Module, not a function"),
        ("lab.losses:nn", "must be a class derived from torch.nn.Module, not a module"),
        ("lab.losses:Nothing", r"lacks forward\(batch\).* and the arguments system, shape of __init__"),
    ],
)
def test_names_that_are_no_objective(outside, name, message):
    with pytest.raises(ValueError, match=message):
        objective_class(name)


def test_an_objective_that_loses_its_encoder_is_refused(outside):
    with pytest.raises(ValueError, match="has no .encoder after it was built"):
        build_objective(f"{outside}:Lost", make_encoder("vit"), system=SHEAR, shape=SHAPE)


def test_modules_of_the_package():
    modules = {name: objective_module(name) for name in OBJECTIVES}
    assert modules["jepa"] == "objectives.jepa" and modules["random"] == "objectives.supervised"
    with pytest.raises(ValueError, match="valid: jepa"):
        objective_module("jeppa")

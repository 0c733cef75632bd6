"""Codes, operators with weights of each sample, their integration, and the objective that is made of them."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

from physrep.models.encoders import build_encoder
from physrep.models.heads import AttentiveHead
from physrep.models.pretrained import load_encoder
from physrep.objectives.disco import CodeHead, Disco, Operator, convolve, integrate, other_samples, relative_errors
from physrep.physics.systems import get_system
from physrep.training.pretrain import pretrain
from physrep.training.run import build, resolve

SHAPE = (4, 8, 8)
VIT = dict(dim=24, depth=1, heads=2, tubelet=(2, 4, 4))


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def objective(system: str = "shear_flow", **options) -> Disco:
    encoder = build_encoder("vit_code", in_channels=4, code=8, **VIT)
    options = {"width": 4, "stages": 1, "method": "euler", **options}
    return Disco(encoder, system=get_system(system), shape=SHAPE, **options)


def pairs(b: int = 6) -> dict:
    views = (torch.randn(b, 4, *SHAPE), torch.randn(b, 4, 3, 8, 8))
    return {"fields": views[0], "views": views, "seeds": torch.arange(b), "flow": torch.arange(b) // 2}


@pytest.mark.parametrize("name", ["vit_code", "convnext_code"])
def test_a_code_is_one_token(name):
    stem = dict(widths=(12, 24), depths=(1, 1), stem_kernel=(2, 4, 4), stem_stride=(2, 4, 4), strides=((2, 1, 1),))
    encoder = build_encoder(name, in_channels=4, code=8, **(VIT if name == "vit_code" else stem))
    x = torch.randn(2, 4, *SHAPE)
    code = encoder(x)
    assert code.shape == (2, 1, 8) and encoder.grid(SHAPE) == (1, 1, 1) and encoder.config["code"] == encoder.dim == 8
    assert torch.allclose(code[:, 0], encoder.to_code(encoder.backbone(x).mean(1)), atol=1e-6)
    assert AttentiveHead(8, 2)(code).shape == (2, 2)


@pytest.mark.parametrize("periodic", [(True, True), (True, False), (False, True)])
def test_operators_are_equivariant_along_periodic_axes_and_zero_for_zero_weights(periodic):
    operator = Operator(4, periodic=periodic, width=4)
    u, theta = torch.randn(3, 4, 16, 16), torch.randn(3, operator.n_weights) * operator.scales
    answer = operator(u, theta)
    assert answer.any() and not operator(u, torch.zeros_like(theta)).any() and not operator(u, operator.initial()).any()
    for axis, wraps in zip((-2, -1), periodic):
        assert torch.allclose(operator(u.roll(4, axis), theta), answer.roll(4, axis), atol=1e-4) == wraps
    alone = torch.cat([operator(u[i : i + 1], theta[i]) for i in range(3)])
    assert torch.allclose(alone, answer, atol=1e-5), "the weights of a sample are its own"


def test_walls_repeat_the_last_value():
    x = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    right = torch.tensor([[0.0, 0, 0], [0, 0, 1], [0, 0, 0]])[None, None]
    assert convolve(x, right, periodic=(True, False))[0, 0, 0].tolist() == [1, 2, 3, 3]
    assert convolve(x, right, periodic=(True, True))[0, 0, 0].tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("method, order", [("euler", 1), ("bosh3", 3), ("rk4", 4)])
def test_order_of_the_integrators(method, order):
    start = torch.tensor([[1.0]], dtype=torch.float64)
    truth = 1 / (1 + torch.arange(1.0, 3.0, dtype=torch.float64))  # u' = -u^2
    errors = []
    for steps in (16, 32):
        found = integrate(lambda u: -u.square(), start, 2, steps=steps, method=method)
        errors.append(float((found[0, 0] - truth).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_the_head_is_standardised_bounded_and_zero_for_zero():
    head = CodeHead(8, 500, spread=0.5)
    code = 1e-2 * torch.randn(64, 8) + 3
    assert 0.35 < head(code).std() < 0.6, "a code that hardly varies counts as much as any"
    assert head.eval()(1e6 * code).abs().max() <= 2 and not CodeHead(8, 5).eval()(torch.zeros(2, 8)).any()


def test_relative_errors_by_hand():
    start, true = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 1, 2, 2)
    true[1] = 3
    found = relative_errors(true - 1, true, start, floor=0.1)
    assert found.tolist() == pytest.approx([1 / 1.5, 1 / 9.5])


def test_another_sample_is_of_another_flow_if_there_is_one():
    for flow, first in ((torch.tensor([0, 0, 0, 1, 1, 2]), 3), (torch.tensor([0, 1, 0, 1]), 3)):
        others = other_samples(flow, len(flow))
        assert (flow[others] != flow).all() and others[0] == first
    assert (other_samples(torch.zeros(4), 4) != torch.arange(4)).all()


@pytest.mark.parametrize("system", ["shear_flow", "rayleigh_benard"])
def test_a_code_of_zero_is_persistence_and_the_loss_is_that_of_each_sample(system):
    model = objective(system).eval()
    batch = pairs()
    start = batch["views"][1][:, :, 0]
    assert torch.equal(model.predict(torch.zeros(6, 8), start), start[:, :, None].expand(-1, -1, 2, -1, -1))
    with torch.no_grad():
        code = model.code(batch["fields"])
        frames = model.predict(code, start)
        assert torch.allclose(model.predict(code[4:5], start[4:5]), frames[4:5], atol=1e-5), "no other sample counts"
        true = batch["views"][1][:, :, 1:]
        assert torch.allclose(model(batch)["loss"], relative_errors(frames, true, start, floor=0.1).mean())


class Known(Disco):
    "The first number of the code is the rate of decay of every field."

    def slope(self, u, made):
        return -made[:, :1, None, None] * u


class First(nn.Module):
    "The code is the first two numbers of a clip."

    dim, in_channels = 2, 4

    def grid(self, shape):
        return (1, 1, 1)

    def forward(self, x):
        return x[:, :2, 0, 0, 0][:, None]


def test_noise_is_not_in_the_frames_that_are_asked_for():
    model = Disco(First(), system=get_system("shear_flow"), shape=SHAPE, width=4, stages=1).eval()
    clean = pairs()
    noisy = clean | {"views": tuple(x + torch.randn_like(x) for x in clean["views"]), "clean": clean["views"]}
    context, asked = noisy["views"]
    predicted, (_, true) = model.predict(model.code(context), asked[:, :, 0]), clean["views"]
    written = relative_errors(predicted, true[:, :, 1:], true[:, :, 0], floor=model.floor).mean()
    torch.testing.assert_close(model(noisy)["loss"], written)


def test_the_gate_compares_with_another_code_on_the_same_frames():
    model = Known(First(), system=get_system("shear_flow"), shape=SHAPE, width=4, stages=1, rate=1.0, steps=2).eval()
    model.head = nn.Identity()
    batch = pairs()
    rates = torch.tensor([0.1, 0.1, 0.4, 0.4, 0.8, 0.8])
    batch["fields"][:, 0] = rates[:, None, None, None]
    times = torch.arange(3.0)[:, None, None]
    flows = torch.randn(6, 4, 1, 8, 8) * torch.exp(-rates[:, None, None, None, None] * times)
    found = model.gate(batch | {"views": (batch["fields"], flows)})
    assert set(found) == {"own", "persistence", "shuffled", "mean_code", "gate"}
    assert found["own"] < 1e-4 * found["mean_code"] and found["mean_code"] < found["shuffled"]
    assert found["gate"] == found["own"] / min(found[n] for n in ("persistence", "shuffled", "mean_code"))
    batch["fields"][:, 0] = 0.4
    blind = model.gate(batch | {"views": (batch["fields"], flows)})
    assert blind["gate"] >= 1 and blind["shuffled"] == blind["own"], "an operator without use of its code has none"


def test_views_of_the_same_and_of_another_window():
    there = objective()
    assert there.frames == 4 and there.views[1].start is None and there.views[1].own_symmetry
    with pytest.raises(ValueError, match="use ViewBatches"):
        there({"fields": torch.randn(2, 4, 4, 8, 8)})
    here = objective(other=False)
    fields = torch.randn(6, 4, 6, 8, 8)
    cut = {"views": (fields[:, :, :4], fields[:, :, 3:]), "fields": fields[:, :, :4]}
    assert here.frames == 6 and torch.equal(here({"fields": fields})["loss"], here(cut)["loss"])


def test_from_preset_to_probe(smoke_data, tmp_path):
    assert resolve("shear_flow", "disco", preset="smoke").encoder == "vit_code", "by default"
    here = dict(data_dir=smoke_data, run_dir=tmp_path)
    run = resolve("shear_flow", "disco", "convnext_code", preset="smoke", steps=2, batch_size=4, **here)
    folder = pretrain(run, progress=False, say=lambda text: None)
    curve = pd.read_csv(folder / "curve.csv")
    assert {"gate", "gate_own", "gate_shuffled", "gate_persistence"} <= set(curve) and curve.gate.notna().all()
    encoder = load_encoder(folder)
    assert encoder.encoder(torch.randn(2, 4, 16, 32, 32)).shape == (2, 1, encoder.dim)
    assert 11_000 < build(resolve("shear_flow", "disco", preset="laptop")).operator.n_weights < 13_000

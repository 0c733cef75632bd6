"""JEPA beyond its notebook: precision, chunks, both encoders, resuming, and what is refused."""

import copy
import math
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from physrep.core.randomness import sample_seeds
from physrep.models.convnext import ConvNeXt
from physrep.models.vit import ViT
from physrep.objectives.jepa import JEPA
from physrep.objectives.masked_jepa import MaskedJEPA
from physrep.objectives.regularisers import check_chunks, vicreg_loss
from physrep.physics.systems import get_system
from physrep.training.cost import example_batch
from physrep.training.run import build, resolve

SYSTEM, SHAPE = get_system("shear_flow"), (4, 16, 16)


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
    yield
    plt.close("all")


def encoder(name: str = "convnext") -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        return ViT(4, tubelet=(2, 4, 4), dim=12, depth=1, heads=2)
    stem = {"stem_kernel": (2, 4, 4), "stem_stride": (2, 4, 4)}
    return ConvNeXt(4, widths=(8, 12), depths=(1, 1), strides=((2, 1, 1),), kernel_size=3, **stem)


def jepa(name: str = "convnext", *, shape: tuple = SHAPE, **options) -> JEPA:
    return JEPA(encoder(name), system=SYSTEM, shape=shape, **options)


def batch_of(objective: JEPA, *, step: int = 0, n: int = 4) -> dict:
    g = torch.Generator().manual_seed(step)
    fields = torch.randn(n, 4, objective.frames, *objective.shape[1:], generator=g)
    return {"fields": fields, "labels": torch.zeros(n, 2), "seeds": sample_seeds(0, 0, step, list(range(n)))}


# the loss


class Places(torch.nn.Module):
    "Tells the place of each token and nothing about the clip."

    in_channels, dim = 4, 4

    def __init__(self):
        super().__init__()
        self.code = torch.nn.Parameter(2 * torch.randn(32, self.dim))

    def grid(self, shape):
        return (2, 4, 4)

    def forward(self, x):
        return self.code.expand(len(x), -1, -1)


def test_a_code_of_places_satisfies_vicreg_but_not_its_centred_form():
    batch = batch_of(jepa())
    plain, centred = (JEPA(Places(), system=SYSTEM, shape=SHAPE, centre=centre)(batch) for centre in (False, True))
    assert plain["variance"] < 0.25 * centred["variance"], "tokens differ from each other, as if they told clips apart"
    assert centred["variance"] == pytest.approx(2 * 0.5 * (1 - math.sqrt(1e-4))), "both sides are constant at a place"


def test_statistics_are_float32_under_autocast():
    p, z = 0.8 * torch.randn(200, 8) + 3, torch.randn(200, 8) - 5
    plain = vicreg_loss(p, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (p.T @ p).dtype == torch.bfloat16  # what the loss must not do
        inside = vicreg_loss(p, z)
    assert all(torch.equal(plain[k], inside[k]) for k in plain)
    half = vicreg_loss(p.bfloat16(), z.bfloat16())
    assert half["loss"].dtype == torch.float32
    assert torch.equal(half["loss"], vicreg_loss(p.bfloat16().float(), z.bfloat16().float())["loss"])


def test_order_matters_only_between_chunks():
    p, z = torch.randn(64, 5), torch.randn(64, 5)
    order = torch.randperm(64)
    assert torch.allclose(vicreg_loss(p, z)["loss"], vicreg_loss(p, z, order=order)["loss"], rtol=1e-5)
    shuffled = vicreg_loss(p, z, chunks=5, order=order)  # 64 = 4 * 13 + 12: the last chunk is smaller
    assert torch.equal(shuffled["loss"], vicreg_loss(p[order], z[order], chunks=5)["loss"])
    assert not torch.allclose(shuffled["covariance"], vicreg_loss(p, z, chunks=5)["covariance"])
    by_hand = [vicreg_loss(p[i], z[i])["loss"] for i in order.tensor_split(5)]
    assert torch.allclose(shuffled["loss"], torch.stack(by_hand).mean())


def test_one_side():
    p, z = 0.5 * torch.randn(64, 5), torch.randn(64, 5)
    one, two, other = vicreg_loss(p, z, regularised=p), vicreg_loss(p, z), vicreg_loss(p, z, regularised=z)
    for term in ("variance", "covariance"):
        assert torch.allclose(one[term] + other[term], two[term])
    assert torch.equal(one["invariance"], two["invariance"])
    with pytest.raises(ValueError, match=r"regularised must be \(64, 5\) as well, got \(64, 4\)"):
        vicreg_loss(p, z, regularised=z[:, :4])
    order = torch.randperm(64)
    shuffled = vicreg_loss(p, z, regularised=p + z, order=order, chunks=3)["covariance"]
    parts = [vicreg_loss(p[i], z[i], regularised=(p + z)[i])["covariance"] for i in order.tensor_split(3)]
    assert torch.allclose(shuffled, torch.stack(parts).mean())


def test_against_numpy_covariance_and_gradient_at_collapse():
    p = torch.randn(100, 6) @ torch.randn(6, 6)
    cov = torch.cov(p.T)
    off = cov[~torch.eye(6, dtype=bool)].square().sum() / 6
    assert torch.allclose(vicreg_loss(p, p)["covariance"], 2 * off, rtol=1e-4)
    constant = torch.ones(40, 4, requires_grad=True)  # the standard deviation is 0: its gradient must be finite
    vicreg_loss(constant, torch.zeros(40, 4))["loss"].backward()
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prediction": torch.ones(40, 4), "target": torch.ones(40, 5)}, r"\(40, 4\) and \(40, 5\)"),
        ({"prediction": torch.ones(2, 20, 4), "target": torch.ones(2, 20, 4)}, r"expected two \(n, d\)"),
        (
            {"prediction": torch.ones(40, 4), "target": torch.ones(40, 4), "order": torch.arange(39)},
            "permutation of the 40 rows",
        ),
        (
            {"prediction": torch.ones(40, 4), "target": torch.ones(40, 4), "chunks": 6},
            "chunks=6 give 6.*at most chunks=5",
        ),
        ({"prediction": torch.ones(40, 4), "target": torch.ones(40, 4), "chunks": 0}, "at least 1, got 0"),
        (
            {"prediction": torch.ones(7, 4), "target": torch.ones(7, 4)},
            "at least 8 samples.*What helps: a larger batch",
        ),
    ],
)
def test_loss_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        vicreg_loss(**arguments)


def test_twice_as_many_samples_is_enough():
    check_chunks(40, 4, 5)
    with pytest.raises(ValueError):
        check_chunks(39, 4, 5)


# the objective


@pytest.mark.parametrize("name", JEPA.encoders)
@pytest.mark.parametrize("target", ("shared", "stopgrad", "ema"))
def test_forward_is_vicreg_on_the_two_windows(name, target):
    model = jepa(name, target=target, horizon=3, invariance=2.0, variance=40.0, covariance=2.0)
    batch = batch_of(model)
    assert model.frames == 7 and model.shape == SHAPE
    parts = model(batch)
    assert set(parts) == {"loss", "invariance", "variance", "covariance", "relative"}
    assert [k for k, v in parts.items() if v.requires_grad] == ["loss"]
    context, later = batch["fields"][:, :, :4], batch["fields"][:, :, 3:]
    c, z = model.encoder(context), model.encoder(later)
    c, p, z = (tokens.flatten(0, 1) for tokens in (c, model.predictor.map(c, model.predictor.grid), z))
    assert torch.allclose(parts["relative"], (p - z).square().mean() / (c - z).square().mean(), rtol=1e-4)
    loss = 2 * (p - z).square().mean()
    off = ~torch.eye(12, dtype=bool)
    for side in (p, z) if target == "shared" else (c,):  # the written formula
        loss = loss + 40 * torch.relu(1 - (side.var(0) + 1e-4).sqrt()).mean() / 2
        loss = loss + 2 * torch.cov(side.T)[off].square().sum() / 12
    assert torch.allclose(parts["loss"], loss, rtol=1e-5)


def test_gradient_of_the_encoder():
    """A stopped target leaves the gradient of the context; a shared one adds that of the target."""
    grads = {}
    for target in ("shared", "stopgrad", "ema"):
        model = jepa(target=target, variance=0.0, covariance=0.0)  # the same loss for all three
        model(batch_of(model))["loss"].backward()
        grads[target] = model.encoder.stem[0].conv.weight.grad
    model = jepa()
    context, later = model.clips(batch_of(model))
    p = model.predictor(model.encoder, context)[1].detach()
    (25 * (p - model.encoder(later)).square().mean()).backward()  # through the target alone
    assert torch.equal(grads["stopgrad"], grads["ema"]) and grads["stopgrad"].norm() > 0
    assert torch.allclose(
        grads["shared"], grads["stopgrad"] + model.encoder.stem[0].conv.weight.grad, rtol=1e-3, atol=1e-7
    )


def test_global_generator_is_left_alone():
    model = jepa(noise=1.0, chunks=2)
    batch, state = batch_of(model), torch.get_rng_state()
    first = model(batch)["loss"]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, model(batch)["loss"])
    assert not torch.equal(first, model(batch | {"seeds": batch["seeds"] + 1})["loss"])
    assert torch.equal(model.eval()(batch)["loss"], jepa(chunks=2).eval()(batch)["loss"]), "without noise"


def updates(model: JEPA, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = model(batch_of(model, step=step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.after_step(step + 1, 5)
        losses.append(loss.item())
    return losses


def test_resumed_run_with_moving_average_is_the_same_run():
    options = {"target": "ema", "momentum": 0.5, "momentum_end": 0.9, "noise": 0.1, "chunks": 2}
    model = jepa(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = updates(model, optimizer, range(3))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert any(not torch.equal(a, b) for a, b in zip(model.encoder.parameters(), model.target.average.parameters()))
    again = jepa(**options)
    again.load_state_dict(state[0])
    optimizer_again = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer_again.load_state_dict(state[1])
    resumed = updates(again, optimizer_again, range(3, 5))
    assert resumed == updates(model, optimizer, range(3, 5)) and len(set(losses + resumed)) == 5


@pytest.mark.parametrize("momentum", (0.0, 1.0))
def test_extreme_momentum(momentum):
    model = jepa(target="ema", momentum=momentum, momentum_end=momentum)
    start = [p.clone() for p in model.encoder.parameters()]
    updates(model, torch.optim.AdamW(model.parameters(), lr=1e-2), range(1))
    want = model.encoder.parameters() if momentum == 0 else start
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(want, model.target.average.parameters()))


def test_nothing_to_do_after_a_step_without_a_moving_average():
    model = jepa(target="stopgrad")
    before = {k: v.clone() for k, v in model.state_dict().items() if k != "regulariser.updates"}
    model.after_step(1, 10)
    assert not any(k.startswith("target.average") for k in before)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize("name, shape, n", [("convnext", SHAPE, 3), ("vit", SHAPE, 1), ("convnext", (4, 16, 32), 2)])
def test_show(name, shape, n):
    model = jepa(name, shape=shape)
    figure = model.show(batch_of(model, n=n))
    assert isinstance(figure, Figure) and len(figure.axes) == 2 * min(n, 2) * 4
    first = figure.axes[0].images[0].get_array()  # x to the right: transposed
    assert first.shape == (shape[2], shape[1])
    assert figure.axes[1].get_title().startswith("component 1 (")


def test_show_of_a_perfect_prediction():
    model = jepa()

    answer = model.answer

    def perfect(batch):
        found, sides = answer(batch)
        return replace(found, predicted=found.true), sides

    model.answer = perfect
    titles = [ax.get_title() for ax in model.show(batch_of(model)).axes[1:4]]
    assert all(title.endswith("$R^2$ = 1.00") for title in titles)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": "teacher"}, "'teacher'; valid: shared, stopgrad, ema"),
        ({"horizon": 0}, "horizon must be at least 1"),
        ({"momentum": 1.1}, "momentum <= momentum_end <= 1 must hold, got 1.1 and 1.0"),
        ({"momentum": 0.9, "momentum_end": 0.8}, "must hold, got 0.9 and 0.8"),
        ({"covariance": -1.0}, "covariance must be finite and not negative, got -1.0"),
        ({"noise": float("nan")}, "noise must be finite and not negative, got nan"),
        ({"chunks": 0}, "chunks must be at least 1"),
        ({"shape": (4, 16, 15)}, "does not fit"),
    ],
)
def test_objective_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        jepa(**options)


def test_unknown_option_and_wrong_fields_are_refused():
    with pytest.raises(TypeError, match="covarience"):
        jepa(covarience=1.0)
    with pytest.raises(ValueError, match="takes 4 channels"):
        JEPA(encoder(), system=get_system("active_matter"), shape=SHAPE)
    model = jepa()
    with pytest.raises(ValueError, match=r"takes \(b, 4, 8, 16, 16\)"):
        model({"fields": torch.zeros(2, 4, 4, 16, 16), "seeds": torch.arange(2)})
    with pytest.raises(ValueError, match="a larger batch"):
        model(batch_of(model, n=1))


@pytest.mark.parametrize("target", ("shared", "stopgrad", "ema"))
def test_variance_and_covariance_hold_the_encoder(target):
    model = jepa(target=target, invariance=0.0)
    model(batch_of(model))["loss"].backward()
    held = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.predictor.parameters()]
    assert any(held) == (target == "shared")
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.parameters() if p.ndim > 1)


def test_a_predictor_that_spreads_cannot_hide_a_collapsed_encoder():
    model = jepa(target="stopgrad")
    batch = batch_of(model)
    healthy = model(batch)["variance"]
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.mul_(0.0)
    assert model(batch)["variance"] > 0.49 > 0.0 and model(batch)["variance"] >= healthy


def test_momentum_rises_on_a_cosine_and_depends_on_the_step_alone():
    model, steps, m0 = jepa(target="ema", momentum=0.5), 8, 0.5
    average = [p.clone() for p in model.encoder.parameters()]
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in model.encoder.parameters():
                p.add_(0.1 * torch.randn_like(p))
        before = [p.clone() for p in model.target.average.parameters()]
        model.after_step(step, steps)
        m = 1 - (1 - m0) * (1 + math.cos(math.pi * step / steps)) / 2  # the written formula
        average = [m * a + (1 - m) * p.detach() for a, p in zip(average, model.encoder.parameters())]
        assert all(torch.allclose(a, p, atol=1e-6) for a, p in zip(average, model.target.average.parameters()))
    assert all(torch.equal(a, p) for a, p in zip(before, model.target.average.parameters()))  # at the end it stands
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"from 1 to 8, got {wrong}"):
            model.after_step(wrong, steps)


@pytest.mark.parametrize("centre", [False, True])
def test_the_parts_of_the_log_make_up_the_loss(centre):
    torch.manual_seed(0)
    run = resolve("shear_flow", "jepa", "convnext", "smoke", coefficients={"centre": centre})
    objective = build(run).train()
    batch = example_batch(run, objective, 4)
    parts, weights = objective(batch), run.coefficients
    terms = ("invariance", "variance", "covariance")
    assert parts["loss"].item() == pytest.approx(sum(weights[name] * parts[name].item() for name in terms), rel=1e-5)


def test_options_of_the_other_mask_are_refused():
    encoder = ViT(4, dim=16, depth=1, heads=2, tubelet=(2, 4, 4))
    with pytest.raises(ValueError, match="count and scale are of mask 'blocks', and mask is 'tube'"):
        MaskedJEPA(encoder, system=get_system("shear_flow"), shape=(8, 16, 16), count=2)

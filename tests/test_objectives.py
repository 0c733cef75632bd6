"""What every method must do on every encoder, in small; names of methods; and what is refused."""

import copy

import numpy as np
import pytest
import torch
from test_composite import FIT, POOLED, SHAPE, SYSTEM, clips, encoder
from torch import nn

from physrep.core.randomness import sample_seeds
from physrep.models.encoders import ENCODERS
from physrep.objectives.composite import Composite
from physrep.objectives.methods import OBJECTIVES, build_objective, check_row, objective_class, objective_module
from physrep.objectives.pictures import feature_figure, likeness_figure, pixel_figure
from physrep.objectives.regularisers import NoRegulariser
from physrep.objectives.supervised import RandomEncoder
from physrep.objectives.targets import PixelTarget
from physrep.objectives.tasks import Blocks, Future, Tube
from physrep.physics.systems import get_system
from physrep.training.run import build, resolve

TRAINED = [name for name in OBJECTIVES if objective_class(name).trains]
OPTIONS = {"forecast": {"frames": 4}, "jepa": {"noise": 0.5, "target": "ema"}, "invariance": {"dims": (16, 8)}}


def make(name: str, backbone: str, **options) -> nn.Module:
    return build_objective(name, encoder(backbone), **FIT, **OPTIONS.get(name, {}) | options)


def batch_of(objective: nn.Module, n: int = 8) -> dict:
    "Random clips, with views where an objective asks for them."
    draw = torch.Generator().manual_seed(1)
    batch = {"fields": torch.randn(n, 4, objective.frames, *SHAPE[1:], generator=draw)}
    batch |= {"labels": torch.randn(n, 2, generator=draw), "seeds": sample_seeds(0, 0, 0, list(range(n)))}
    if any(view.start is None for view in getattr(objective, "views", ())):
        views = tuple(torch.randn(n, 4, v.frames, *SHAPE[1:], generator=draw) for v in objective.views)
        return batch | {"fields": views[0], "views": views}
    return batch


# the contract


@pytest.mark.parametrize("backbone", ["vit", "convnext", "axial"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_gradient_of_the_loss_reaches_every_weight_of_the_encoder(name, backbone):
    objective = make(name, backbone)
    parts = objective(batch_of(objective))
    assert parts["loss"].shape == () and parts["loss"].isfinite()
    assert len(parts) > 1 and [key for key, value in parts.items() if value.requires_grad] == ["loss"]
    parts["loss"].backward()
    for key, p in objective.named_parameters():
        assert p.requires_grad != key.startswith("target.average"), key
        assert p.grad is None or p.grad.isfinite().all(), key
    assert all(p.grad.abs().sum() > 0 for p in objective.encoder.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", TRAINED)
def test_random_numbers_come_from_the_seeds_alone(name):
    objective = make(name, "vit").eval() if name == "disco" else make(name, "vit")
    batch = batch_of(objective)
    with torch.no_grad():
        state, first = torch.get_rng_state(), objective(batch)["loss"]
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(5)
        assert torch.equal(objective(batch)["loss"], first)
        other = objective(batch | {"seeds": batch["seeds"] + 1})["loss"]
    assert torch.equal(other, first) == (name not in ("jepa", "masked_jepa", "mae")), "masks and noise"


@pytest.mark.parametrize("name", TRAINED)
def test_the_state_dict_is_the_whole_state(name):
    objective = make(name, "vit")
    batch, optimizer = batch_of(objective), torch.optim.AdamW(objective.parameters(), lr=1e-3)
    for step in range(2):
        objective(batch)["loss"].backward()
        optimizer.step()
        getattr(objective, "after_step", lambda *_: None)(step + 1, 4)
    again = make(name, "vit")
    again.load_state_dict(objective.state_dict())
    assert torch.equal(objective(batch)["loss"], again(batch)["loss"])


@pytest.mark.parametrize("name, backbone", [("mae", "vit"), ("mae", "convnext"), ("supervised", "vit")])
def test_gradients_of_micro_batches_average_to_those_of_the_batch(name, backbone):
    objective = make(name, backbone)
    batch = batch_of(objective, n=6)
    objective(batch)["loss"].backward()
    whole = {key: p.grad.clone() for key, p in objective.named_parameters()}
    objective.zero_grad()
    for i in range(0, 6, 2):
        (objective({k: v[i : i + 2] for k, v in batch.items()})["loss"] / 3).backward()
    for key, p in objective.named_parameters():
        assert torch.allclose(p.grad, whole[key], rtol=1e-3, atol=1e-6), key


@pytest.mark.parametrize("name", ["mae", "masked_jepa", "jepa_sigreg"])
def test_bfloat16(name):
    objective = make(name, "vit")
    batch = batch_of(objective)
    exact = objective(batch)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(batch)["loss"]
    assert loss.dtype == torch.float32 and abs(loss / exact - 1) < 0.05
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_draws_what_it_predicts(name):
    objective = make(name, "vit")
    assert objective.show(batch_of(objective)).axes


def drawn(ax) -> np.ndarray:
    "The image of a panel, first axis to the right; NaN where it is grey."
    return np.ma.filled(ax.images[0].get_array().astype(float), np.nan).T


def test_frames_of_a_prediction_of_pixels():
    truth, predicted = torch.randn(2, 3, 8, 12)
    hidden = (torch.arange(8) < 3)[None, :, None].expand(3, 8, 12)
    fig = pixel_figure(truth, predicted, times=[0, 2], shown=~hidden, hidden=hidden, first=5, title="pixels")
    assert fig.get_suptitle() == "pixels" and [ax.get_title() for ax in fig.axes[:2]] == ["frame 5", "frame 7"]
    assert [ax.get_ylabel() for ax in fig.axes[:8:2]] == ["truth", "shown", "prediction", "error"]
    assert fig.get_size_inches() == pytest.approx([1.3 * 2 + 1.1, 1.3 * 4 * 12 / 8 + 0.7]), "squares stay squares"
    nan = torch.tensor(torch.nan)
    rows = truth, truth.where(~hidden, nan), predicted.where(hidden, truth), (predicted - truth).where(hidden, nan)
    for ax, image in zip(fig.axes, (row[t] for row in rows for t in (0, 2))):
        assert np.allclose(drawn(ax), image, equal_nan=True)
        assert ax.images[0].get_clim() == pytest.approx(float(truth[[0, 2]].abs().max()) * np.array([-1, 1]))


def test_a_forecast_is_drawn_from_the_last_seen_frame_on():
    objective = make("forecast", "vit")
    batch = batch_of(objective)
    axes, last = objective.show(batch).axes, objective.clips(batch)[0].shape[2] - 1
    titles = [ax.get_title() for ax in axes if ax.get_title()]
    assert (titles[0], titles[-1]) == (f"frame {last - 4}", f"frame {last}")
    shown = axes[len(titles) : 2 * len(titles)]
    assert [bool(np.isnan(drawn(ax)).all()) for ax in shown] == [False] + [True] * (len(titles) - 1)


def test_the_frame_after_a_clip_is_drawn_beside_its_last():
    objective = make("next_frame", "axial")
    batch = clips(objective.frames)
    axes, last = objective.show(batch, sample=1, channel=2).axes, objective.shape[0] - 1
    assert [ax.get_title() for ax in axes[:2]] == [f"frame {last}", f"frame {last + 1}"]
    for ax, frame in zip(axes, (last, last + 1)):
        assert np.allclose(drawn(ax), batch["fields"][1, 2, frame], atol=1e-5)
    assert np.allclose(drawn(axes[2]), drawn(axes[0])), "nothing is predicted of the last one"


@pytest.mark.parametrize("name", ["jepa_sigreg", "masked_jepa"])
def test_features_are_drawn_beside_the_last_frames_that_they_are_of(name):
    objective = make(name, "vit")
    batch = clips(objective.frames)
    views, axes = objective.clips(batch), objective.show(batch, channel=1).axes
    for sample, first in enumerate((0, 8)):
        assert np.allclose(drawn(axes[first]), views[-1][sample, 1, -1])
        seen = drawn(axes[first + 4])
        assert np.isnan(seen).any() == objective.task.hides
        assert np.allclose(seen, np.where(np.isnan(seen), np.nan, views[0][sample, 1, -1]), equal_nan=True)


def test_pairs_are_drawn_as_the_likeness_of_their_mean_tokens():
    objective = make("invariance", "vit")
    batch = batch_of(objective)
    sides = [objective.encoder(x).mean(dim=1).detach() for x in objective.clips(batch)]
    assert np.allclose(drawn(objective.show(batch).axes[0]), drawn(likeness_figure(*sides).axes[0]), atol=1e-5)


def test_labels_are_drawn_against_predictions():
    objective = make("supervised", "vit")
    batch = batch_of(objective)
    fig = objective.show(batch)
    assert fig.get_size_inches() == pytest.approx([6, 3]) and len(fig.axes) == 2
    for ax, x, y in zip(fig.axes, batch["labels"].T, objective.predict(batch).detach().T):
        assert np.allclose(ax.lines[0].get_xydata(), torch.stack([x, y], dim=1), atol=1e-5)


def test_features_are_drawn_in_the_components_of_the_target():
    true, clips = torch.randn(3, 2 * 4 * 4, 5) * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1]), torch.randn(2, 2, 8, 16)
    predicted, images = true + 0.5 * torch.randn(true.shape), {"last": clips[0], "first": clips[1]}
    z, axes = true.flatten(0, 1) - true.mean((0, 1)), torch.linalg.svd(true.flatten(0, 1) - true.mean((0, 1)))[2][:3]
    p = (predicted.flatten(0, 1) - true.mean((0, 1))) @ axes.T
    r2 = 1 - (p - z @ axes.T).square().sum(0) / (z @ axes.T).square().sum(0)
    share = (z @ axes.T).square().sum(0) / z.square().sum()
    fig = feature_figure(true, predicted, images, grid=(2, 4, 4), sample=1, title="features")
    assert [ax.get_title() for ax in fig.axes[:4]] == [
        "features",
        *(f"component {i + 1} ({share[i]:.0%})\n$R^2$ = {r2[i]:.2f}" for i in range(3)),
    ]
    assert fig.get_size_inches() == pytest.approx([1.5 * 4 + 0.4, 1.5 * 16 / 8 * 4 + 0.6])
    for row in range(4):
        line, (sample, side) = fig.axes[4 * row : 4 * row + 4], divmod(row, 2)
        assert line[0].get_ylabel() == f"sample {1 + sample}\n{('target', 'prediction')[side]}"
        assert line[0].get_xlabel() == ("last", "first")[side] and np.allclose(drawn(line[0]), clips[side, sample])
        assert line[0].images[0].get_clim()[1] == pytest.approx(float(clips.abs().max()))
        maps = (z @ axes.T, p)[side].view(3, 2, 4, 4, 3)[1 + sample, -1]
        for c, ax in enumerate(line[1:]):
            assert np.allclose(np.abs(drawn(ax)), maps[..., c].abs(), atol=1e-4), "a component has no sign of its own"
            whole = (z @ axes.T).view(3, 2, 4, 4, 3)[:, -1, ..., c]
            assert ax.images[0].get_clim()[1] == pytest.approx(2.5 * float(whole.std()), rel=1e-4)


def test_the_likeness_of_views_is_a_cosine_without_the_mean():
    first, second = torch.randn(2, 5, 4)
    a, b = first - first.mean(0), second - second.mean(0)
    expected = [[float(x @ y / x.norm() / y.norm()) for y in b] for x in a]
    assert np.allclose(drawn(likeness_figure(first, second).axes[0]), expected, atol=1e-6)


def test_random_weights_have_no_loss():
    objective = RandomEncoder(encoder("vit"), **FIT)
    with pytest.raises(RuntimeError, match="not trained"):
        objective(batch_of(objective))


# refused

WRONG = [
    ("jepa", dict(target="teacher"), "unknown target 'teacher'; valid: values"),
    ("jepa", dict(horizon=0), "offset 0 of task 'window'"),
    ("jepa", dict(momentum_end=1.0), "no coefficient momentum_end; it has: .* momentum,"),
    ("masked_jepa", dict(momentum_end=1.0), "no coefficient momentum_end; it has: .* momentum,"),
    ("masked_jepa", dict(momentum=1.5), "momentum must lie in"),
    ("jepa", dict(sides="context"), "unknown sides 'context'; valid: both, target"),
    ("jepa", dict(sides="target", target="ema"), "sides='target' is for"),
    ("jepa", dict(pooled_variance=-1.0), "pooled_variance must be finite"),
    ("jepa", dict(variance=-1.0), "variance must be finite and not negative, got -1"),
    ("jepa", dict(invariance=-1.0), "weight and noise must be finite"),
    ("jepa", dict(chunks=0), "chunks must be at least 1"),
    ("jepa", dict(time_kernel=2), "time_kernel must be odd"),
    ("jepa", dict(covarience=1.0), "no coefficient covarience; it has: invariance, variance"),
    ("masked_jepa", dict(count=2), "count are of mask 'blocks'"),
    ("masked_jepa", dict(mask="block"), "unknown mask 'block'; valid: tube, blocks"),
    ("jepa_sigreg", dict(slices=0), "slices >= 1"),
    ("mae", dict(ratio=1.0), "ratio of 1.0 hides 16 of the 16"),
    ("mae", dict(target_norm="batch"), "unknown target_norm 'batch'; valid: none, patch"),
    ("mae", dict(patch=(2, 8, 8)), "must be the encoder's tubelet"),
    ("mae", dict(decoder_heads=5), "not divisible by 5 heads"),
    ("forecast", dict(frames=8), "at least one must be shown"),
    ("forecast", dict(frames=3), "multiple of the 2 frames of a token"),
    ("forecast", dict(target="shared"), "collapse"),
    ("next_frame", dict(target="whitened"), "unknown target 'whitened'; valid: values, change"),
    ("next_frame", dict(floor=0.0), "floor must be positive"),
    ("next_frame", dict(frames=0), "frames must be an int of at least 1"),
    ("invariance", dict(of="flow"), "valid: trajectory, window, labels"),
    ("invariance", dict(shown=0), "above 0 and at most 1; got 0"),
    ("autoencoder", dict(target="change"), "last seen frame"),
    ("disco", dict(method="rk5"), "unknown method 'rk5'; valid: euler"),
    ("disco", dict(other=False, gap=2), "gap=2 is for another window"),
    ("disco", dict(stages=5), "multiples of 32"),
    ("supervised", dict(head="deep"), "unknown head 'deep'; valid: linear, mlp, attentive"),
    ("composite", dict(target="change"), "last seen frame"),
    ("composite", dict(target="shared"), "collapse"),
    ("composite", dict(task="window"), "take task 'next'"),
    ("composite", dict(task="next", target="ema"), "take task 'window'"),
    ("composite", dict(task="none", target="ema"), "ask for pixels"),
    ("composite", dict(task="pair", target="ema", regulariser="sigreg"), "take target 'shared'"),
    ("composite", dict(task="pair", target="shared", regulariser="vicreg"), "no pixels and no positions"),
    (
        "composite",
        dict(task="pair", target="shared", regulariser={"name": "pooled_vicreg", "invariance": 0.0}),
        "must not be 0",
    ),
    ("composite", dict(task="window", target="shared", regulariser="pooled_vicreg"), "must be 0"),
    ("composite", dict(task="window", target="shared", regulariser=POOLED), "undoes any scale.*`normalise: true`"),
    ("composite", dict(task="pair", target="shared", regulariser="sigreg", pooled_variance=1.0), "mean tokens already"),
    ("composite", dict(task="pair", target={"name": "shared", "normalise": True}, regulariser="sigreg"), "normalise"),
    ("composite", dict(task="pair", target="shared", regulariser="pooled_vicreg", weight=2.0), "weight must be 1"),
    ("composite", dict(task="tube", target="ema", centre=True), "centre needs task 'window'"),
    ("composite", dict(task="tubes"), "unknown task 'tubes'; valid: tube"),
    ("composite", dict(task={"ratio": 0.5}), "unknown task None"),
    ("composite", dict(task={"name": "tube", "rate": 1}), "it has: ratio"),
    ("composite", dict(target={"name": "values", "momentum": 1}), "has no option momentum"),
    ("composite", dict(target={"name": "values", "floor": 0.1}), "floor is for kind 'whitened'"),
    ("composite", dict(regulariser={"name": "sigreg", "lam": 1}), "it has: slices"),
    ("composite", dict(predictor={"layer_scale": 1}), "it has: patch, width, depth, heads"),
    ("composite", dict(task="tube", predictor={"from_last": True}), "from_last is for tasks"),
    ("composite", dict(task="window", target="ema", predictor={"kind": "mlp"}), "conv, transformer"),
    (
        "composite",
        dict(task="pair", target="shared", regulariser="pooled_vicreg", predictor={"dims": (8,)}),
        "projector of its own",
    ),
    ("composite", dict(task=Blocks(1, 0.9)), "must stay visible"),
    ("composite", dict(task=Tube(0.01)), "hides 0 of"),
]


@pytest.mark.parametrize("name, options, message", WRONG, ids=lambda x: "" if isinstance(x, dict) else str(x)[:30])
def test_what_makes_no_objective_says_why(name, options, message):
    if name == "composite":
        name = "physrep.objectives.composite:Composite"
    with pytest.raises(ValueError, match=message):
        make(name, "vit", **options)


@pytest.mark.parametrize("name", ["mae", "jepa", "supervised", "disco"])
def test_encoders_and_batches_that_do_not_fit_are_refused(name):
    with pytest.raises(ValueError, match="takes 4 channels, active_matter has 11"):
        build_objective(name, encoder("vit"), system=get_system("active_matter"), shape=SHAPE)
    with pytest.raises(ValueError, match="does not fit"):
        build_objective(name, encoder("vit"), system=SYSTEM, shape=(8, 18, 16))
    objective = make(name, "vit")
    batch = batch_of(objective)
    broken = {key: x[:, :, :5] for key, x in batch.items() if key == "fields"}
    broken |= {"views": tuple(x[:, :, :1] for x in batch["views"])} if "views" in batch else {}
    with pytest.raises(ValueError, match="this objective takes"):
        objective(batch | broken)


# names


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


class Lost(Means):
    def __init__(self, encoder, **options):
        super().__init__(encoder, system=options["system"], shape=options["shape"])
        del self.encoder


def test_objectives_of_another_package():
    name = f"{__name__}:Means"
    cls = objective_class(name)
    assert (cls.default_encoder, cls.encoders, cls.trains) == ("vit", None, True)
    assert objective_module(name) == __name__ and objective_module("random") == "objectives.supervised"
    assert check_row(name, None) == "vit" and check_row(f"{__name__}:Picky", None) == "convnext"
    assert check_row("mae", "lab.nets:make_encoder") == "lab.nets:make_encoder"
    objective = build_objective(name, encoder("vit"), **FIT, weight=0.5)
    assert (objective.frames, objective.shape, objective.weight) == (8, SHAPE, 0.5)
    objective(batch_of(objective))["loss"].backward()


NAMES = [
    ("jeppa", "unknown objective 'jeppa'; valid: jepa, masked_jepa, .*random, frozen, or \"my_package.module:name\""),
    ("lab/losses:Means", "is not of the form"),
    ("no_such_package:Means", "module no_such_package cannot be imported"),
    (f"{__name__}:Meens", "has no 'Meens'; it has: .*Means"),
    ("math:sqrt", "must be a class derived from torch.nn.Module, not a builtin_function_or_method"),
    ("torch.nn:Linear", "lacks encoder and system and shape"),
    ("torch.nn:Module", r"lacks forward\(batch\)"),
]


@pytest.mark.parametrize("name, message", NAMES)
def test_names_that_are_no_objective(name, message):
    with pytest.raises(ValueError, match=message):
        objective_class(name)


def test_pairs_and_options_that_do_not_fit():
    for pair, message in (
        (("mae", "resnet"), "does not take encoder 'resnet'; it takes: vit, convnext, axial"),
        ((f"{__name__}:Means", "resnet"), f"it takes: {', '.join(ENCODERS)}"),
        ((f"{__name__}:Picky", "vit"), "does not take encoder 'vit'; it takes: convnext"),
        (("mae", "lab.nets:"), "is not of the form"),
    ):
        with pytest.raises(ValueError, match=message):
            check_row(*pair)
    with pytest.raises(ValueError, match="has no coefficient wieght; it has: weight"):
        build_objective(f"{__name__}:Means", encoder("vit"), **FIT, wieght=0.5)
    with pytest.raises(ValueError, match="has no .encoder after it was built"):
        build_objective(f"{__name__}:Lost", encoder("vit"), **FIT)


def test_a_composite_is_built_from_a_configuration():
    parts = {"task": {"name": "blocks", "count": 2}, "target": {"name": "ema", "loss": "smooth_l1"}}
    run = resolve("shear_flow", "physrep.objectives.composite:Composite", preset="smoke", coefficients=parts)
    objective = build(run)
    assert objective.task == Blocks(2) and objective.target.loss == "smooth_l1"
    assert isinstance(objective.regulariser, NoRegulariser)
    same = Composite(copy.deepcopy(objective.encoder), system=SYSTEM, shape=run.clip_shape, task=Future(8))
    assert isinstance(same.target, PixelTarget) and same.target.patch == same.predictor.patch

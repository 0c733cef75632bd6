"""Methods with names: the table of them, pairs of which a share is shown, and their controls."""

import pytest
import torch
from torch import nn

from physrep.core.randomness import sample_seeds
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.views import ViewBatches
from physrep.data.windows import Windows
from physrep.models.convnext import ConvNeXt
from physrep.models.vit import ViT
from physrep.objectives.composite import Composite
from physrep.objectives.invariance import Invariance
from physrep.objectives.methods import OBJECTIVES, build_objective, objective_class
from physrep.objectives.tasks import Pair, make_task
from physrep.physics.systems import get_system

SYSTEM, SHAPE = get_system("shear_flow"), (8, 16, 16)
FIT = dict(system=SYSTEM, shape=SHAPE)
OPTIONS = {"forecast": {"frames": 4}}


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def encoder(name: str = "vit") -> nn.Module:
    if name == "vit":
        return ViT(4, dim=24, depth=2, heads=2, tubelet=(2, 4, 4))
    stem = dict(stem_kernel=(2, 4, 4), stem_stride=(2, 4, 4))
    return ConvNeXt(4, widths=(12, 24), depths=(1, 1), strides=((2, 1, 1),), layer_scale=0.1, **stem)


def pairs(b: int = 4) -> dict:
    views = tuple(torch.randn(b, 4, *SHAPE) for _ in range(2))
    return {"fields": views[0], "views": views, "seeds": sample_seeds(0, 0, 0, list(range(b)))}


# the table


def test_the_table_and_its_order():
    trained = ["jepa", "jepa_ema", "jepa_sigreg", "mae", "forecast", "invariance", "autoencoder", "supervised"]
    assert list(OBJECTIVES) == [*trained, "random", "frozen"]
    for name in trained:
        cls = objective_class(name)
        assert set(cls.encoders) == {"vit", "convnext"} and cls.trains
        assert cls.default_encoder == ("convnext" if name in ("jepa", "supervised") else "vit"), name


@pytest.mark.parametrize("backbone", ["vit", "convnext"])
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if objective_class(n).trains])
def test_every_method_trains_every_encoder_by_its_name(name, backbone):
    objective = build_objective(name, encoder(backbone), **FIT, **OPTIONS.get(name, {}))
    batch = pairs(8)
    if name != "invariance":
        batch = {"fields": torch.randn(8, 4, objective.frames, 16, 16), "seeds": batch["seeds"]}
    objective(batch | {"labels": torch.randn(8, 2)})["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.encoder.parameters() if p.ndim > 1)


# a share of the tokens


class Counting(ViT):
    "A ViT that notes which tokens it was asked for."

    def forward(self, x, keep=None):
        self.asked = [*getattr(self, "asked", []), keep]
        return super().forward(x, keep)


def counting() -> Counting:
    return Counting(4, dim=24, depth=1, heads=2, tubelet=(2, 4, 4))


@pytest.mark.parametrize("shown, k", [(0.5, 32), (0.3, 19), (0.001, 1)])
def test_a_share_of_the_tokens_of_each_view_is_computed(shown, k):
    objective = Invariance(counting(), shown=shown, dims=(16, 8), **FIT)
    batch = pairs()
    parts = objective(batch)
    first, second = objective.encoder.asked
    assert first.shape == second.shape == (4, k) and (objective.n_shown, objective.n_tokens) == (k, 64)
    for keep in (first, second):
        assert all(len(set(row)) == k for row in keep.tolist()) and keep.min() >= 0 and keep.max() < 64
    if k > 1:
        assert not torch.equal(first, second), "each view has its own subset"
        assert len({tuple(row) for row in first.tolist()}) == 4, "each sample has its own subset"
    parts["loss"].backward()
    assert all(p.grad.abs().sum() > 0 for n, p in objective.encoder.named_parameters() if n.endswith("weight"))


def test_subsets_come_from_the_seeds_alone():
    objective = Invariance(counting(), shown=0.5, dims=(16, 8), **FIT)
    batch = pairs()
    before = torch.get_rng_state()
    objective(batch), objective(batch), objective(batch | {"seeds": batch["seeds"] + 1})
    assert torch.equal(before, torch.get_rng_state())
    asked = objective.encoder.asked
    assert torch.equal(asked[0], asked[2]) and torch.equal(asked[1], asked[3]) and not torch.equal(asked[0], asked[4])
    one = {"fields": batch["fields"][2:3], "seeds": batch["seeds"][2:3]}
    assert torch.equal(objective.places(one)[1], asked[1][2:3]), "a sample's subset does not depend on its neighbours"
    with pytest.raises(ValueError, match="2 seeds for 4"):
        objective(batch | {"seeds": batch["seeds"][:2]})


def test_every_token_is_computed_in_evaluation_mode_and_with_all_shown():
    for objective in (Invariance(counting(), shown=0.5, **FIT).eval(), Invariance(counting(), **FIT)):
        objective(pairs())
        assert objective.encoder.asked == [None, None]
    with torch.no_grad():
        objective = Invariance(encoder(), shown=0.5, norm="layer", **FIT)
        whole = Invariance(objective.encoder, norm="layer", **FIT)
        whole.load_state_dict(objective.state_dict())
        batch = pairs()
        assert not torch.equal(objective(batch)["loss"], whole(batch)["loss"])
        assert torch.equal(objective.eval()(batch)["loss"], whole.eval()(batch)["loss"])


def test_encoders_without_tubelets_see_everything():
    objective = Invariance(encoder("convnext"), shown=0.5, norm="layer", **FIT)
    whole = Invariance(objective.encoder, norm="layer", **FIT)
    whole.load_state_dict(objective.state_dict())
    batch = pairs()
    assert objective.n_shown == objective.n_tokens and torch.equal(objective(batch)["loss"], whole(batch)["loss"])
    assert objective.operations(4, 100) == whole.operations(4, 100)


def test_half_of_the_tokens_are_half_of_the_operations():
    whole, half = (Invariance(encoder(), shown=shown, dims=(16, 8), **FIT) for shown in (1.0, 0.5))
    rest = whole.operations(4)  # target and regulariser without encoding
    assert half.operations(4) == rest and half.operations(4, 10**6) - rest == (whole.operations(4, 10**6) - rest) // 2


@pytest.mark.parametrize("shown", [0, -0.5, 1.01, float("nan")])
def test_a_share_is_above_0_and_at_most_1(shown):
    for make in (lambda: Pair(shown=shown), lambda: Invariance(encoder(), shown=shown, **FIT)):
        with pytest.raises(ValueError, match=f"above 0 and at most 1; got {shown}"):
            make()
    assert make_task("pair", shown=1).n_shown(64) == 64
    parts = dict(task={"name": "pair", "shown": 0.5}, target="shared", regulariser="sigreg")
    assert Composite(encoder(), **parts, **FIT).n_shown == 32
    with pytest.raises(ValueError, match="11 channels"):
        Invariance(ViT(11, dim=24, depth=1, heads=2, tubelet=(2, 4, 4)), **FIT)


# controls


@pytest.mark.parametrize("of", ["trajectory", "window", "labels"])
def test_controls_of_invariance_train_from_files(of, smoke_data):
    vit = ViT(4, dim=24, depth=1, heads=2, tubelet=(4, 4, 4), temperature=30.0)
    objective = Invariance(vit, system=SYSTEM, shape=(8, 32, 32), of=of, shown=0.5, dims=(32, 32))
    windows = Windows(smoke_data, SYSTEM, "train", frames=objective.frames, stride=2)
    scaling = dict(normaliser=Normaliser.load(smoke_data, SYSTEM), scaler=LabelScaler.fit(SYSTEM, windows.labels))
    batches = ViewBatches(windows, objective.views, batch_size=16, augment=True, **scaling)
    indices = batches.samples(0)[0]
    here = windows.index[indices]
    there = batches.places(1, indices, next(batches(0))["seeds"])
    same_flow, apart = here[:, 0] == there[:, 0], abs(here[:, 1] - there[:, 1])
    labels = windows.labels[here[:, 0]] == windows.labels[there[:, 0]]
    assert labels.all() and same_flow.all() == (of != "labels") and same_flow.any() == (of != "labels")
    assert of == "labels" or (apart == 0 if of == "window" else apart >= 8).all()
    first = next(batches(0))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        objective(next(batches(step)))["loss"].backward()
        optimizer.step()
        objective.after_step(step + 1, 12)
        losses.append(float(objective(first)["loss"].detach()))
    assert losses[-1] < losses[0]


def test_the_control_that_uses_labels_says_so():
    assert "uses labels" in " ".join(Invariance.__doc__.split()) and "upper bound" in Invariance.__doc__
    assert "upper bound" in Pair.__doc__
    with pytest.raises(ValueError, match="valid: trajectory, window, labels"):
        Invariance(encoder(), of="flow", **FIT)

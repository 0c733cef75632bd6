"""Methods with names: the table of them, pairs of which a share is shown, their controls, and gates."""

import math

import pytest
import torch
from helpers import losses_in_training
from torch import nn

from physrep.core.randomness import sample_seeds
from physrep.data.batches import Batches, ViewBatches
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.windows import Windows
from physrep.models.axial import Axial
from physrep.models.convnext import ConvNeXt
from physrep.models.vit import ViT, patchify
from physrep.objectives.composite import Composite
from physrep.objectives.gates import answer_gate, gate_of, retrieval_gate, share_nearer
from physrep.objectives.invariance import Invariance
from physrep.objectives.methods import OBJECTIVES, build_objective, objective_class
from physrep.objectives.targets import hidden_mean, token_loss
from physrep.objectives.tasks import Blocks, Future, Next, Nothing, Pair, Tube, Window, interpolate_hidden, make_task
from physrep.physics.systems import get_system

SYSTEM, SHAPE = get_system("shear_flow"), (8, 16, 16)
FIT = dict(system=SYSTEM, shape=SHAPE)
OPTIONS = {"forecast": {"frames": 4}, "disco": {"other": False}, "disco_film": {"other": False}}


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def encoder(name: str = "vit") -> nn.Module:
    if name == "vit":
        return ViT(4, dim=24, depth=2, heads=2, tubelet=(2, 4, 4))
    if name == "axial":
        return Axial(4, dim=24, depth=1, heads=2, strides=(2, 2), layer_scale=0.1)
    stem = dict(stem_kernel=(2, 4, 4), stem_stride=(2, 4, 4))
    return ConvNeXt(4, widths=(12, 24), depths=(1, 1), strides=((2, 1, 1),), layer_scale=0.1, **stem)


def pairs(b: int = 4) -> dict:
    views = tuple(torch.randn(b, 4, *SHAPE) for _ in range(2))
    return {"fields": views[0], "views": views, "seeds": sample_seeds(0, 0, 0, list(range(b)))}


# the table


def test_the_table_and_its_order():
    pixels = ["mae", "forecast", "next_frame"]
    trained = ["jepa", "jepa_ema", "jepa_sigreg", *pixels, "invariance", "autoencoder"]
    trained += ["disco", "disco_film", "supervised"]
    assert list(OBJECTIVES) == [*trained, "random", "frozen"]
    defaults = {"jepa": "convnext", "supervised": "convnext", "next_frame": "axial"}
    defaults |= {"disco": "vit_code", "disco_film": "vit_code"}
    for name in trained:
        cls = objective_class(name)
        if name == "supervised":
            assert cls.encoders is None and cls.reads_labels, "any encoder"
            continue
        codes = {"convnext_code"} if name.startswith("disco") else {"axial"}
        assert cls.default_encoder == defaults.get(name, "vit"), name
        assert set(cls.encoders) == {"vit", "convnext", cls.default_encoder} | codes and cls.trains


@pytest.mark.parametrize("backbone", ["vit", "convnext", "axial"])
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
    losses = losses_in_training(objective, batches, steps=24)
    assert losses[-1] < losses[0]


def test_the_control_that_uses_labels_says_so():
    assert "uses labels" in " ".join(Invariance.__doc__.split()) and "upper bound" in Invariance.__doc__
    assert "upper bound" in Pair.__doc__
    with pytest.raises(ValueError, match="valid: trajectory, window, labels"):
        Invariance(encoder(), of="flow", **FIT)


# gates


def test_gate_is_own_over_the_smallest():
    assert gate_of(1.0, {"mean": 4.0, "copy": 2.0}) == {"own": 1.0, "mean": 4.0, "copy": 2.0, "gate": 0.5}
    assert gate_of(1.0, {"mean": 0.0})["gate"] == math.inf and math.isnan(gate_of(0.0, {"mean": 0.0})["gate"])
    with pytest.raises(ValueError, match="at least one"):
        gate_of(1.0, {})


@pytest.mark.parametrize("kind", ["mse", "l1", "smooth_l1"])
def test_errors_of_answers_by_hand(kind):
    true, mask = torch.randn(3, 8, 5), torch.rand(3, 8) < 0.5
    trivial = {"mean": hidden_mean(true, mask, each=True), "copy": true.roll(1, 0)}
    assert answer_gate(true, true, trivial, mask, kind=kind)["gate"] == 0
    found = answer_gate(true + 1e3 * ~mask[..., None], true, trivial, mask, kind=kind)
    assert found["own"] == 0, "what was not asked for does not count"
    best = min(trivial, key=lambda name: found[name])
    assert answer_gate(trivial[best].expand_as(true), true, trivial, mask, kind=kind)["gate"] == 1
    assert answer_gate(true.roll(2, 0), true, trivial, mask, kind=kind)["own"] > found["mean"], "shuffled: no better"
    hidden = true[mask]
    reference = nn.functional.mse_loss(hidden.mean(0).expand_as(hidden), hidden)
    assert kind != "mse" or found["mean"] == pytest.approx(float(reference), rel=1e-5)


QUESTIONS = [
    (Tube(), "values", {"mean", "interpolation"}),
    (Tube(), "patch", {"mean", "interpolation"}),
    (Blocks(2, 0.2), "whitened", {"mean", "interpolation"}),
    (Future(4), "values", {"mean", "persistence"}),
    (Next(2), "change", {"mean", "persistence"}),
    (Nothing(), "values", {"mean"}),
    (Tube(), "ema", {"mean", "place"}),
    (Future(4), "ema", {"mean", "place"}),
    (Window(4), "ema", {"mean", "place", "copy"}),
]


@pytest.mark.parametrize("backbone", ["vit", "convnext"])
@pytest.mark.parametrize("task, target, names", QUESTIONS, ids=lambda x: str(x) if not isinstance(x, set) else "")
def test_gate_names_the_trivial_answers_of_the_question(task, target, names, backbone):
    objective = Composite(encoder(backbone), task=task, target=target, **FIT).train()
    batch = {"fields": torch.randn(4, 4, objective.frames, 16, 16), "seeds": sample_seeds(0, 0, 0, [0, 1, 2, 3])}
    if target == "whitened":
        objective.target.whitening.fit(batch["fields"])
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    found = objective.gate(batch)
    assert set(found) == {"own", "gate"} | names and all(type(value) is float for value in found.values())
    assert found["gate"] == pytest.approx(found["own"] / min(found[name] for name in names))
    assert objective.training and objective.encoder.training and objective.gate(batch) == found
    assert all(torch.equal(value, state[name]) for name, value in objective.state_dict().items())
    assert all(p.grad is None for p in objective.parameters())


class Oracle(nn.Module):
    "A predictor that answers what it is told to."

    def __init__(self, predictor, answer):
        super().__init__()
        self.inner = predictor
        self.answer = answer
        self.patch = predictor.patch
        self.patch_grid = predictor.patch_grid

    def forward(self, encoder, x, shown=None):
        return self.inner(encoder, x, shown)[0], self.answer


@pytest.mark.parametrize("target", ["values", "patch", "whitened"])
@pytest.mark.parametrize(
    "task, name", [(Tube(), "interpolation"), (Blocks(2, 0.2), "interpolation"), (Future(4), "persistence")]
)
def test_gate_of_perfect_and_of_trivial_answers_in_the_units_of_the_target(task, name, target):
    objective = Composite(encoder(), task=task, target=target, **FIT)
    t, x, y = torch.meshgrid(torch.arange(8.0), torch.arange(16.0), torch.arange(16.0), indexing="ij")
    wave = torch.sin(2 * torch.pi * x / 16 + 0.1 * t) + 0 * y
    fields = wave + 0.1 * torch.arange(4.0)[:, None, None, None, None] + 0.01 * torch.randn(4, 4, *SHAPE)
    batch = {"fields": fields, "seeds": sample_seeds(0, 0, 0, [0, 1, 2, 3])}
    if target == "whitened":
        objective.target.whitening.fit(fields)
    true = objective.target(fields)
    shown = objective.masks(batch)[1]
    if name == "interpolation":
        guess = interpolate_hidden(fields, ~shown, (2, 4, 4), periodic=(True, True))
    else:
        guess = fields[:, :, 3:4].expand_as(fields)
    predictor = objective.predictor
    objective.predictor = Oracle(predictor, true)
    assert objective.gate(batch)["gate"] == 0
    objective.predictor = Oracle(predictor, objective.target(guess))
    found = objective.gate(batch)
    assert found["own"] == pytest.approx(found[name]) and found["gate"] >= 1 - 1e-6
    if target == "values":
        assert found["gate"] == pytest.approx(1), "on a smooth wave this answer is the better one"


def test_interpolation_wraps_along_the_periodic_axes_of_the_system_alone():
    fields = {}
    for name in ("shear_flow", "rayleigh_benard"):
        system = get_system(name)
        objective = Composite(encoder(), task="tube", system=system, shape=SHAPE)
        batch = {"fields": torch.randn(4, 4, *SHAPE), "seeds": sample_seeds(0, 0, 0, [0, 1, 2, 3])}
        hidden, shown = objective.masks(batch)
        periodic = tuple(b == "periodic" for b in system.boundary)
        guess = patchify(interpolate_hidden(batch["fields"], ~shown, (2, 4, 4), periodic=periodic), (2, 4, 4))
        expected = token_loss(guess, patchify(batch["fields"], (2, 4, 4)), hidden)
        assert objective.gate(batch)["interpolation"] == pytest.approx(float(expected), rel=1e-5)
        fields[name] = periodic
    assert fields["shear_flow"] == (True, True) and fields["rayleigh_benard"] == (True, False)


def test_a_copied_context_has_a_gate_of_one():
    objective = Composite(encoder(), task=Window(4), target={"name": "ema", "normalise": True}, **FIT)
    batch = {"fields": torch.randn(4, 4, 12, 16, 16), "seeds": torch.arange(4)}
    encoded = objective.eval().answer(batch)[0].trivial
    objective.predictor = Oracle.__new__(Oracle)
    nn.Module.__init__(objective.predictor)
    objective.predictor.forward = lambda enc, x, shown: (enc(x), encoded)
    found = objective.gate(batch)
    assert found["own"] == pytest.approx(found["copy"]) and not objective.training


# retrieval


def test_retrieval_by_hand():
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    assert share_nearer(first, first).fill_diagonal_(1).eq(1).all()
    assert (share_nearer(first, 5 * first + 3) == share_nearer(first, first)).all(), "scale and mean do not count"
    swapped = share_nearer(first, first[[1, 0, 2]])
    assert swapped.tolist() == [[0.5, 0.0, 1.0], [0.0, 0.5, 1.0], [1.0, 1.0, 0.5]]
    labels, flow = torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([4, 7, 9])
    found = retrieval_gate(first, first[[1, 0, 2]], flow, labels)
    assert found["retrieval"] == 0 and found["pairs"] == 2
    assert found["gate"] == 2 * (1 - found["retrieval_all"])
    perfect = retrieval_gate(first, first, flow, labels)
    assert perfect == {"retrieval": 1.0, "retrieval_all": 1.0, "pairs": 2.0, "gate": 0.0}


def test_retrieval_is_at_chance_for_what_says_nothing_of_the_trajectory():
    flow, labels = torch.arange(200), (torch.arange(200) // 10)[:, None].expand(-1, 2).double()
    first, second = torch.randn(2, 200, 32)
    assert retrieval_gate(first, second, flow, labels)["gate"] == pytest.approx(1, abs=0.1)
    assert retrieval_gate(torch.ones(200, 32), torch.ones(200, 32), flow, labels)["gate"] == 1
    of_labels = torch.randn(20, 32)[torch.arange(200) // 10] + 0.01 * torch.randn(2, 200, 32)
    found = retrieval_gate(*of_labels, flow, labels)
    assert found["retrieval"] == pytest.approx(0.5, abs=0.05) and found["gate"] < 0.1, "labels alone pass the gate"
    order = torch.randperm(200)
    assert retrieval_gate(first[order], second[order], flow[order], labels[order]) == pytest.approx(
        retrieval_gate(first, second, flow, labels)
    )


def test_windows_of_the_same_flow_are_no_others():
    first = torch.randn(6, 8)
    flow, labels = torch.tensor([0, 0, 0, 1, 1, 1]), torch.zeros(6, 2)
    found = retrieval_gate(first, first, flow, labels)
    assert found["pairs"] == 18 and found["retrieval"] == found["retrieval_all"] == 1
    alone = retrieval_gate(first, first, torch.zeros(6), labels)
    assert alone["pairs"] == 0 and all(math.isnan(alone[k]) for k in ("retrieval", "retrieval_all", "gate"))


def test_gate_of_a_pair_takes_all_tokens_and_needs_flows_and_labels():
    batch = pairs(8)
    same = batch | {"views": (batch["views"][0],) * 2, "flow": torch.arange(8), "labels": torch.zeros(8, 2)}
    objective = Invariance(counting(), shown=0.5, **FIT)
    assert objective.gate(same) == {"retrieval": 1.0, "retrieval_all": 1.0, "pairs": 56.0, "gate": 0.0}
    assert objective.encoder.asked == [None, None] and objective.training
    for missing in ("flow", "labels"):
        with pytest.raises(ValueError, match=f"needs {missing} in the batch"):
            objective.gate({name: value for name, value in same.items() if name != missing})
    different = same | {"labels": torch.arange(16.0).view(8, 2)}
    assert math.isnan(objective.gate(different)["retrieval"]) and objective.gate(different)["gate"] == 0


def test_batches_say_which_trajectory_a_window_is_of(smoke_data):
    objective = Invariance(encoder(), system=SYSTEM, shape=(8, 32, 32), dims=(16, 8))
    windows = Windows(smoke_data, SYSTEM, "valid", frames=8, stride=2)
    scaling = dict(normaliser=Normaliser.load(smoke_data, SYSTEM), scaler=LabelScaler.fit(SYSTEM, windows.labels))
    for batches in (
        Batches(windows, batch_size=12, **scaling),
        ViewBatches(windows, objective.views, batch_size=12, **scaling),
    ):
        batch = next(batches(0))
        assert batch["flow"].dtype == torch.int64 and batch["flow"].shape == (12,)
        assert torch.equal(batch["flow"], torch.as_tensor(batches.windows.index[batches.samples(0)[0], 0]))
        expected = scaling["scaler"].transform(windows.labels)[batch["flow"]]
        assert torch.allclose(batch["labels"].double(), torch.as_tensor(expected), atol=1e-5)
    held_out = next(batches.evaluation(32, limit=32))
    found = objective.gate(held_out)
    assert found["pairs"] > 0 and 0 <= found["gate"] <= 2

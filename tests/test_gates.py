"""Gates: errors of the trivial answers in the units of the target, and retrieval among pairs."""

import math

import pytest
import torch
from test_composite import FIT, PATCH, SHAPE, clips, counting, encoder, pairs
from torch import nn

from physrep.models.axial import Axial
from physrep.models.vit import patchify
from physrep.objectives.composite import Composite
from physrep.objectives.emulators import NextFrame
from physrep.objectives.gates import feature_gate, gate_of, retrieval_gate
from physrep.objectives.jepa import JEPA, VICRegOnly
from physrep.objectives.targets import token_loss
from physrep.objectives.tasks import Blocks, Future, Next, Nothing, Tube, Window, interpolate_hidden
from physrep.physics.systems import get_system
from physrep.training.watch import gate_measures


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)


def test_gate_is_own_over_the_smallest():
    assert gate_of(1.0, {"mean": 4.0, "copy": 2.0}) == {"own": 1.0, "mean": 4.0, "copy": 2.0, "gate": 0.5}
    assert gate_of(1.0, {"mean": 0.0})["gate"] == math.inf and math.isnan(gate_of(0.0, {"mean": 0.0})["gate"])


QUESTIONS = [
    (Tube(), "values", {"mean", "interpolation"}),
    (Tube(), "patch", {"mean", "interpolation"}),
    (Blocks(2, 0.2), "whitened", {"mean", "interpolation"}),
    (Future(4), "values", {"mean", "persistence"}),
    (Next(2), "change", {"mean", "persistence"}),
    (Nothing(), "values", {"mean"}),
]


@pytest.mark.parametrize("backbone", ["vit", "convnext"])
@pytest.mark.parametrize("task, target, names", QUESTIONS, ids=lambda x: str(x) if not isinstance(x, set) else "")
def test_gate_names_the_trivial_answers_of_the_question_and_changes_nothing(task, target, names, backbone):
    objective = Composite(encoder(backbone), task=task, target=target, **FIT).train()
    batch = clips(objective.frames)
    if target == "whitened":
        assert objective.gate(batch) == {}, "before the first training batch"
        objective.target.whitening.fit(batch["fields"])
    state = {name: value.clone() for name, value in objective.state_dict().items()}
    found = objective.gate(batch)
    assert set(found) == {"own", "gate"} | names and all(type(value) is float for value in found.values())
    assert found["gate"] == pytest.approx(found["own"] / min(found[name] for name in names))
    assert objective.training and objective.encoder.training and objective.gate(batch) == found
    assert all(torch.equal(value, state[name]) for name, value in objective.state_dict().items())


# features


def written_r2(answer, true, hidden, train):
    "The definition in loops: every feature without its mean at each position, times one factor that fits `train`."

    def centred(z, where):
        rows = []
        for n in range(z.shape[1]):
            at = z[where[:, n], n].double()
            rows.append(at - at.mean(dim=0))
        return torch.cat(rows)

    p, t = (centred(z, train[2]) for z in train[:2])
    factor = (p * t).sum(dim=0) / (p * p).sum(dim=0)
    p, t = (centred(z, hidden) for z in (answer, true))
    return float((1 - (t - factor * p).square().sum(dim=0) / t.square().sum(dim=0)).mean())


@pytest.mark.parametrize("masked", [True, False])
def test_r_squared_is_the_written_one_over_all_batches(masked):
    def made(b):
        true = torch.randn(b, 6, 5) + 10 * torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
        answer = 3 * true + 4 * torch.randn(b, 6, 5)
        return answer, true, torch.rand(b, 6) < 0.7 if masked else torch.ones(b, 6, dtype=torch.bool)

    train, valid = made(40), made(30)

    def batches(whole, scale=1.0):
        parts = zip(*(z.split((11, len(z) - 11)) for z in whole))
        return [({"r2": scale * answer}, true, hidden if masked else None) for answer, true, hidden in parts]

    found = feature_gate(lambda batch: batch, batches(train), batches(valid))["r2"]
    assert found == pytest.approx(written_r2(*valid, train), abs=1e-9) and 0.2 < found < 0.5
    assert feature_gate(lambda x: x, batches(train, -5.0), batches(valid, -5.0))["r2"] == pytest.approx(found)


def test_what_is_constant_or_not_finite_explains_nothing():
    true = torch.randn(20, 4, 3)
    for answer in (torch.ones(1, 4, 3), true.mean(dim=0, keepdim=True), torch.full((20, 4, 3), torch.nan)):
        batch = [({"r2": answer}, true, None)]
        assert feature_gate(lambda x: x, batch, batch)["r2"] == pytest.approx(0)
    flat = [({"r2": true}, torch.cat([true[..., :2], torch.ones(20, 4, 1)], dim=2), None)]
    assert feature_gate(lambda x: x, flat, flat)["r2"] == pytest.approx(2 / 3), "what does not vary counts as 0"
    small = [({"r2": true}, 1e-3 * true, None)]
    assert feature_gate(lambda x: x, small, small)["r2"] == pytest.approx(1), "however little it varies"


@pytest.mark.parametrize("backbone", ["vit", "convnext"])
@pytest.mark.parametrize("task, names", [(Tube(), {"r2"}), (Future(4), {"r2", "copy"}), (Window(4), {"r2", "copy"})])
def test_features_are_predicted_and_copied_and_nothing_changes(task, names, backbone):
    objective = Composite(encoder(backbone), task=task, target="ema", **FIT).train()
    batch = clips(objective.frames)
    answers, true, hidden = objective.features(batch)
    assert set(answers) == names and objective.asks_features and objective.gate(batch) == {}
    assert objective.training and not true.requires_grad and answers["r2"].shape == true.shape
    if isinstance(task, Window):
        assert torch.equal(answers["copy"], objective.encoder(batch["fields"][:, :, :8]))
    if isinstance(task, Future):
        t, h, w = objective.predictor.grid
        seen = objective.answer(batch)[0].encoded.unflatten(1, (-1, h, w))
        copy = answers["copy"].unflatten(1, (t, h, w))
        assert all(torch.equal(copy[:, k], seen[:, -1]) for k in range(t)), "the last shown token at each position"


def test_nothing_is_predicted_and_nothing_is_measured_with_a_weight_of_0():
    objective, batch = VICRegOnly(encoder(), **FIT), clips(16)
    assert not objective.predicts and gate_measures(objective, [batch], [batch]) == {}
    found = gate_measures(JEPA(encoder(), **FIT), [batch], [batch])
    assert set(found) == {"gate_r2", "gate_copy"}


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
    batch = clips() | {"fields": fields}
    if target == "whitened":
        objective.target.whitening.fit(fields)
    guess = fields[:, :, 3:4].expand_as(fields)
    if name == "interpolation":
        guess = interpolate_hidden(fields, ~objective.masks(batch)[1], PATCH, periodic=(True, True))
    predictor = objective.predictor
    objective.predictor = Oracle(predictor, objective.target(fields))
    assert objective.gate(batch)["gate"] == 0
    objective.predictor = Oracle(predictor, objective.target(guess))
    found = objective.gate(batch)
    assert found["own"] == pytest.approx(found[name]) and found["gate"] >= 1 - 1e-6
    if target == "values":
        assert found["gate"] == pytest.approx(1), "on a smooth wave this answer is the better one"


def test_interpolation_wraps_along_the_periodic_axes_of_the_system_alone():
    for name, periodic in (("shear_flow", (True, True)), ("rayleigh_benard", (True, False))):
        objective = Composite(encoder(), task="tube", system=get_system(name), shape=SHAPE)
        batch = clips()
        hidden, shown = objective.masks(batch)
        guess = patchify(interpolate_hidden(batch["fields"], ~shown, PATCH, periodic=periodic), PATCH)
        expected = token_loss(guess, patchify(batch["fields"], PATCH), hidden)
        assert objective.gate(batch)["interpolation"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("target", ["values", "change"])
def test_gate_of_the_next_frame_is_in_the_units_of_its_loss(target, frames):
    axial = Axial(4, dim=16, depth=1, heads=2, strides=(2, 2), layer_scale=0.5)
    objective = NextFrame(axial, target=target, frames=frames, **FIT)
    batch = clips(8 + frames)
    found, parts = objective.gate(batch), objective(batch)
    y, last = batch["fields"][:, :, 8:], batch["fields"][:, :, 7:8]
    asked = y - last if target == "change" else y
    size = 1e-3 + asked.square().mean(dim=(2, 3, 4))
    for name, error in (("persistence", y - last), ("mean", asked - asked.mean())):
        assert found[name] == pytest.approx(float((error.square().mean((2, 3, 4)) / size).mean()), rel=1e-4)
    assert found["own"] == pytest.approx(parts["loss"].item(), rel=1e-5)
    assert parts["relative"].item() == pytest.approx(found["own"] / found["persistence"], rel=1e-4)


# retrieval


def test_retrieval_by_hand():
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    labels, flow = torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([4, 7, 9])
    found = retrieval_gate(first, first[[1, 0, 2]], flow, labels)
    assert found["retrieval"] == 0 and found["pairs"] == 2
    assert found["retrieval_all"] == pytest.approx(4 / 6) and found["gate"] == 2 * (1 - found["retrieval_all"])
    perfect = retrieval_gate(first, 5 * first + 3, flow, labels)  # scale and mean do not count
    assert perfect == {"retrieval": 1.0, "retrieval_all": 1.0, "pairs": 2.0, "gate": 0.0}


def test_gate_of_a_pair_takes_all_tokens():
    batch, objective = pairs(8), counting(shown=0.5)
    same = batch | {"views": (batch["views"][0],) * 2, "flow": torch.arange(8), "labels": torch.zeros(8, 2)}
    assert objective.gate(same) == {"retrieval": 1.0, "retrieval_all": 1.0, "pairs": 56.0, "gate": 0.0}
    assert objective.encoder.asked == [None, None] and objective.training

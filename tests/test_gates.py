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
from physrep.objectives.gates import gate_of, retrieval_gate
from physrep.objectives.targets import token_loss
from physrep.objectives.tasks import Blocks, Future, Next, Nothing, Tube, Window, interpolate_hidden
from physrep.physics.systems import get_system


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
    (Tube(), "ema", {"mean", "position"}),
    (Future(4), "ema", {"mean", "position"}),
    (Window(4), "ema", {"mean", "position", "copy"}),
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

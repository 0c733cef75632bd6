"""A GPU beside the CPU: solvers, golden numbers, the speed of the paper's encoder, and preset gpu in pieces.

    .venv/bin/python -m pytest -m gpu -s -rs tests

No GPU has run them yet: their tolerances were chosen, not measured. On the CPU the same functions run on less."""

import copy
import json
import math
import time

import numpy as np
import pytest
import test_golden
import test_solvers
import torch

from physrep.experiments.benchmarks import timed_in_turn
from physrep.models.convnext import ConvNeXt, ConvNeXtBlock, DepthwiseConv3d
from physrep.probing.evaluate import valid_scores
from physrep.training.loop import TimeUp
from physrep.training.pretrain import pretrain
from physrep.training.run import Run, ensure_data, resolve

GPU = pytest.mark.gpu


@pytest.fixture
def float32_throughout():
    "Convolutions of a GPU without TF32, to which cuDNN rounds."
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


@GPU
@test_solvers.each
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-10)])
def test_flows_are_those_of_the_cpu(name, dtype, tolerance):
    solver = test_solvers.SOLVERS[name]
    ours, theirs = (test_solvers.fields(solver.run(n_frames=6, dtype=dtype, device=d)) for d in ("cpu", "cuda"))
    assert all(np.abs(a - b).max() <= tolerance for a, b in zip(ours, theirs))


@GPU
@pytest.mark.parametrize("kind", test_golden.KINDS)
def test_every_solver_method_and_probe_has_the_golden_numbers(kind, float32_throughout):
    golden = json.loads(test_golden.FILE.read_text())[kind]["values"]
    assert not test_golden.differences(test_golden.KINDS[kind]("cuda"), golden, within=1e-2)


class Plain(torch.nn.Module):
    "A copy of an encoder with PyTorch's own `Conv3d` and layers."

    def __init__(self, encoder: ConvNeXt):
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        for module in self.encoder.modules():
            if isinstance(module, DepthwiseConv3d):
                module.method = "direct"
            if isinstance(module, ConvNeXtBlock):
                module.forward = module.plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)


def tokens_and_gradient(encoder: torch.nn.Module, x: torch.Tensor, precision: torch.dtype) -> list[torch.Tensor]:
    "Tokens of clips, and the gradient of the mean of their squares in the first convolution."
    encoder.zero_grad()
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
        tokens = encoder(x).float()
    tokens.square().mean().backward()
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return [tokens.detach(), next(encoder.parameters()).grad]


@pytest.mark.parametrize("precision, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("device, batch, size", [("cpu", 1, 16), pytest.param("cuda", 16, 64, marks=GPU)])
def test_the_papers_encoder_beside_conv3d(device, batch, size, precision, tolerance, float32_throughout):
    "Equal numbers within the tolerance; prints how many times as fast ours is, there and back."
    torch.manual_seed(0)
    ours = ConvNeXt(4, init="fan_in", layer_scale=0.1).to(device)  # with a scale at which its blocks count
    ways, x = {"ours": ours, "Conv3d": Plain(ours)}, torch.randn(batch, 4, 16, size, size, device=device)
    for a, b in zip(*(tokens_and_gradient(way, x, precision) for way in ways.values())):
        assert (a - b).norm() <= tolerance * b.norm()
    if device == "cuda":
        calls = {name: lambda way=way: tokens_and_gradient(way, x, precision) for name, way in ways.items()}
        seconds = timed_in_turn(calls)
        print(f"\n{torch.cuda.get_device_name()}, {precision}: {seconds['Conv3d'] / seconds['ours']:.2f} times Conv3d")


def go_on(run: Run, device: str, minutes: float) -> dict | None:
    "Simulates and trains for so many minutes from where the last call stopped; errors on valid, None if not yet there."
    end = time.monotonic() + 60 * minutes
    quiet = dict(device=device, progress=False)
    try:
        ensure_data(run, workers=1, minutes=minutes, **quiet)
        pretrain(run, minutes=(end - time.monotonic()) / 60, **quiet)
    except (TimeoutError, TimeUp) as stopped:
        print(stopped)
        return None
    return valid_scores(run, **quiet)["valid"]


def test_work_in_pieces_goes_on_until_it_is_done():
    run = test_golden.small_run("mae", "vit", "pieces")
    assert go_on(run, "cpu", 0.0) is None
    assert go_on(run, "cpu", math.inf).keys() == {"linear", "knn", "kernel", "attentive"}


@GPU
@pytest.mark.long
def test_preset_gpu_in_pieces_of_eight_minutes():
    "The paper's encoder on the shear flow of preset gpu: its errors on valid are below 1, those of the labels' mean."
    errors = go_on(resolve("shear_flow", "jepa", preset="gpu"), "cuda", 8.0)
    if errors is None:
        pytest.skip("eight minutes are over; data/gpu and runs/gpu keep what is done: run this test again to go on")
    print(errors)
    assert all(np.mean(list(errors[probe].values())) < 1 for probe in errors)

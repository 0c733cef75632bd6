"""Emulators on random weights: the context alone counts, and units are those of the run."""

from functools import partial

import pytest
import torch

from physrep.models.axial import Axial
from physrep.models.convnext import ConvNeXt
from physrep.models.vit import ViT
from physrep.objectives.disco import Disco
from physrep.objectives.emulators import CODES, Forecast, NextFrame, emulator_of, rollout
from physrep.physics.systems import get_system

SHAPE = (8, 16, 16)


def objectives(system="shear_flow"):
    torch.manual_seed(0)
    s = get_system(system)
    vit = partial(ViT, s.n_channels, dim=32, depth=1, heads=2, tubelet=(2, 4, 4))
    about = dict(system=s, shape=SHAPE)
    cells = dict(stem_kernel=(2, 4, 4), stem_stride=(2, 4, 4), strides=(), layer_scale=0.1)
    conv = ConvNeXt(s.n_channels, widths=(8,), depths=(1,), last_2d=False, **cells)
    axial = Axial(s.n_channels, dim=32, depth=1, heads=2, strides=(2, 2), layer_scale=0.1)
    return {
        "forecast": Forecast(vit(), frames=4, **about),
        "forecast dense": Forecast(conv, frames=2, patch=(2, 4, 4), **about),
        "forecast change": Forecast(vit(), frames=2, target="change", **about),
        "next_frame": NextFrame(axial, target="change", **about),
        "next_frame of two": NextFrame(vit(), frames=2, **about),
        "disco": Disco(vit(), frames=1, **about),
    }


@pytest.mark.parametrize("name", objectives())
@pytest.mark.parametrize("code", CODES)
def test_a_forecaster_depends_on_its_context_only(name, code):
    objective = objectives()[name]
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(0.02 * torch.randn_like(p))  # operators start at rest
    emulator = emulator_of(objective, code=code)
    x = torch.randn(2, 4, 11, 16, 16)
    found = rollout(emulator, x, 5)
    assert found.shape == (2, 4, 5, 16, 16) and found.isfinite().all() and not found.requires_grad
    before = x.clone()
    before[:, :, : -emulator.context] = 9.0
    assert torch.equal(rollout(emulator, before, 5), found)
    for frame in (-emulator.context, -1):
        other = x.clone()
        other[0, :, frame] += 1.0
        changed = rollout(emulator, other, 5)
        assert not torch.allclose(changed[0], found[0], atol=1e-6), f"frame {frame} of the context counts"
        assert torch.allclose(changed[1], found[1], atol=1e-5), "another flow does not"

"""Rollouts where their notebooks do not look: The Well's metrics, forecasters on random weights, the context alone."""

from functools import partial

import numpy as np
import pytest
import torch
from the_well.benchmark.metrics import VRMSE, binned_spectral_mse
from the_well.data.datasets import WellMetadata

from physrep.data.scaling import Normaliser
from physrep.data.windows import Windows
from physrep.experiments.rollout import (
    FLOOR,
    INVARIANTS,
    PERSISTENCE,
    Flows,
    emulator_rows,
    finished_runs,
    floored_share,
    frame_errors,
    grid_points,
    in_units,
    load_emulator,
    roll_out,
    rollout_table,
    shown_steps,
    span_table,
    summarise,
)
from physrep.models.axial import Axial
from physrep.models.convnext import ConvNeXt
from physrep.models.vit import ViT
from physrep.objectives.disco import Disco
from physrep.objectives.emulators import (
    CODES,
    Emulator,
    Forecast,
    NextFrame,
    emulator_of,
    persistence_emulator,
    rollout,
)
from physrep.physics.emulation import energy_enstrophy, shell_spectrum, spectral_errors, vrmse
from physrep.physics.systems import SYSTEMS, get_system
from physrep.training.presets import get_preset
from physrep.training.pretrain import pretrain, restore
from physrep.training.run import resolve

SHAPE = (8, 16, 16)


def meta(shape):
    return WellMetadata("x", 2, shape, [], [], {0: ["a"], 1: [], 2: []}, {0: [], 1: [], 2: []}, [], 1, [1], [1])


def theirs(metric, predicted, true, **options):
    x, y = (torch.from_numpy(z)[..., None] for z in (predicted, true))
    return metric()(x, y, meta(true.shape[-2:]), **options)


@pytest.mark.parametrize("shape", [(32, 32), (24, 40), (16, 64)])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_metrics_are_those_of_the_well(shape, size):
    "With their default eps, which their own VRMSE takes whatever it is given; 1e-4: it decides the number."
    predicted, true = size * np.random.default_rng(0).normal(size=(2, 3, 2, *shape))
    assert np.allclose(vrmse(predicted, true), theirs(VRMSE, predicted, true)[..., 0], rtol=1e-6)
    found = theirs(binned_spectral_mse, predicted, true)
    for values, name in zip(spectral_errors(predicted, true), ("mse", "nmse")):
        for b in range(3):
            expected = found[f"spectral_error_{name}_per_bin_{b}"][..., 0].numpy()
            assert np.allclose(values[..., b], expected, rtol=1e-5)


def test_vrmse_is_the_formula_with_any_eps_and_floor():
    predicted, true = np.random.default_rng(1).normal(size=(2, 4, 12, 10))
    error = ((predicted - true) ** 2).sum((1, 2)) / 120
    variance = ((true - true.mean((1, 2), keepdims=True)) ** 2).sum((1, 2)) / 119
    for eps, floor in ((0.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.5, np.array([0.0, 1.0, 2.0, 3.0]))):
        assert np.allclose(
            vrmse(predicted, true, eps=eps, floor=floor), np.sqrt(error / np.maximum(variance + eps, floor))
        )
    flat = np.zeros((12, 10))
    assert vrmse(flat, flat, eps=0.0) == 0 and np.isinf(vrmse(flat + 1, flat, eps=0.0)), "a perfect answer is perfect"


def test_spectrum_and_energy_do_not_move_with_the_flow():
    x = np.random.default_rng(2).normal(size=(2, 16, 24))
    points = np.arange(16) / 16, np.arange(24) / 12
    moved = np.roll(x, (3, 5), axis=(1, 2))
    assert np.allclose(energy_enstrophy(x, points, (True, True)), energy_enstrophy(moved, points, (True, True)))
    k, power = shell_spectrum(x, (1 / 16, 1 / 12), (True, True))
    assert np.allclose(power, shell_spectrum(moved, (1 / 16, 1 / 12), (True, True))[1])
    assert np.allclose(k / (2 * np.pi), np.arange(1, len(k) + 1) / 2), "the longer side is 2"


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


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_units_are_those_of_the_run(system):
    "Fields times ten and shifted, with a normalisation that says so, give the same rollout times ten and shifted."
    emulator = emulator_of(objectives(system)["next_frame"])
    c = get_system(system).n_channels
    x = torch.randn(1, c, 8, 16, 16)
    plain = rollout(in_units(emulator, Normaliser(torch.zeros(c), torch.ones(c))), x, 3)
    scaled = rollout(
        in_units(emulator, Normaliser(torch.arange(c) * 1.0, torch.full((c,), 10.0))),
        10 * x + torch.arange(c).view(-1, 1, 1, 1),
        3,
    )
    assert torch.allclose(scaled, 10 * plain + torch.arange(c).view(-1, 1, 1, 1), atol=1e-3)


@pytest.fixture(scope="module")
def flows(smoke_data) -> Flows:
    train, test = (Windows(smoke_data, "shear_flow", s, frames=n, stride=36) for s, n in (("train", 1), ("test", 20)))
    norm = Normaliser.load(test.root, test.system)
    statistics = dict(mean=norm.mean.double().numpy(), variance=norm.std.double().numpy() ** 2)
    return Flows(test, train, start=8, steps=12, size=None, **statistics)


class Truth:
    "Hands out true frames, at some speed."

    def __init__(self, frames):
        self.frames, self.at = frames, 0

    def __call__(self, window):
        self.at += 1
        return self.frames[:, :, self.at - 1 : self.at]


def test_a_perfect_model_makes_no_error_and_persistence_repeats_the_last_frame(flows):
    fields = flows.read(np.arange(len(flows)))
    perfect = roll_out("perfect", Emulator(1, 1, lambda c: Truth(fields[:, :, 8:])), flows, progress=False)
    assert set(perfect.errors) == {"vrmse", "nmse_1", "nmse_2", "nmse_3", *INVARIANTS}
    assert all((e == 0).all() for e in perfect.errors.values())
    still = roll_out(PERSISTENCE, persistence_emulator(), flows, example=2, batch_size=3, progress=False)
    assert np.array_equal(still.frames, fields[2, :, 7:8].expand(-1, 12, -1, -1).numpy())
    true = fields[:, 0, 8:].double().numpy()
    expected = vrmse(fields[:, 0, 7:8].double().numpy().repeat(12, 1), true, floor=FLOOR * flows.variance[0])
    assert np.allclose(still.errors["vrmse"][:, 0], expected)
    energy = (fields[:, 2:].double() ** 2).sum(1).mean((2, 3)).numpy() / 2
    assert np.allclose(still.errors["energy"][:, 0], energy[:, 7:8] / energy[:, 8:] - 1, rtol=1e-5)


def test_a_rollout_that_blows_up_has_an_infinite_mean_and_a_median(flows):
    def begin(context):
        return lambda window: torch.where(torch.arange(len(window))[:, None, None, None, None] == 0, torch.inf, window)

    blown = roll_out("blown", Emulator(1, 1, begin), flows, progress=False)
    table = rollout_table([blown], flows, n_bootstrap=20)
    errors = table[table.metric == "vrmse"]
    assert np.isinf(errors["mean"]).all() and np.isfinite(errors["median"]).all()
    assert list(table.columns[:7]) == ["system", "method", "seed", "field", "metric", "step", "time"]
    spans = span_table(table, spans=((1, 1), (2, 8), (50, 60)))
    assert list(spans.columns) == [("median", "1"), ("mean", "1"), ("median", "2-8"), ("mean", "2-8")]
    assert ((floored_share(flows) >= 0) & (floored_share(flows) <= 1)).all()


def test_intervals_are_of_groups():
    values = np.random.default_rng(0).normal(size=(24, 2)) + np.array([0.0, 5.0])
    alone, grouped = (summarise(np.repeat(values, 4, 0), g) for g in (np.arange(96), np.repeat(np.arange(24), 4)))
    assert np.allclose(alone["mean"], values.mean(0)) and np.allclose(
        alone["median"], np.median(np.repeat(values, 4, 0), axis=0)
    )
    width = [s["mean_high"] - s["mean_low"] for s in (alone, grouped)]
    assert (width[1] > 1.5 * width[0]).all(), "four copies of a flow are one flow"
    assert np.isnan(summarise(values, np.zeros(24))["mean_low"]).all()


def test_errors_of_a_walled_layer_and_of_tensors():
    "Fields of rank 2 are means over components; a system of scalars has no energy."
    rng = np.random.default_rng(0)
    for name, fields in (("rayleigh_benard", 3), ("active_matter", 4)):
        s = get_system(name)
        windows = type("W", (), dict(system=s, grid=(8, 8), whole=(True, True), positions=None, boundary=s.boundary))()
        windows.files = [type("F", (), dict(spacing=(0.25, 0.125), path="x"))()]
        here = Flows(windows, windows, 1, 2, None, 5 * np.ones(s.n_channels), np.ones(s.n_channels))
        x, y = rng.normal(size=(2, 3, s.n_channels, 2, 8, 8))
        found = frame_errors(x, y, here)
        assert found["vrmse"].shape == (3, fields, 2) and found["predicted energy"].shape == (3, 1, 2)
        assert np.allclose(found["vrmse"][:, -1], vrmse(x, y)[:, s.channel_slice(s.fields[-1].name)].mean(1), rtol=1e-6)
        far = frame_errors(x + 5, y + 5, here)
        assert np.allclose(
            far["nmse_1"],
            np.stack([spectral_errors(x, y)[1][:, s.channel_slice(f.name), :, 0].mean(1) for f in s.fields], 1),
        ), "the mean of the set is no part of a spectrum"
        assert [len(p) for p in grid_points(windows, (4, 4))] == [4, 4]


def test_runs_that_are_missing_and_names_that_are_no_rows(smoke_data, tmp_path):
    preset = get_preset("smoke")
    with pytest.raises(
        FileNotFoundError,
        match="no finished run of next_frame-axial of shear_flow, seed 0; .*make rollout PRESET=smoke",
    ):
        finished_runs(emulator_rows("next_frame-axial"), ["shear_flow"], preset, smoke_data, tmp_path)
    with pytest.raises(ValueError, match="unknown row nothing; valid: all, jepa-convnext"):
        emulator_rows("nothing")
    assert shown_steps(32) == (1, 6, 32) and shown_steps(1) == (1,)


def test_a_finished_run_predicts_what_its_objective_does(smoke_data, tmp_path):
    run = resolve("shear_flow", "forecast", "vit", "smoke", steps=2)
    pretrain(run, smoke_data, tmp_path, progress=False, say=lambda text: None)
    emulator = load_emulator(run, tmp_path)
    x = Windows(smoke_data, "shear_flow", "test", frames=16, stride=16).read([0, 1])
    objective, norm = restore(run, tmp_path), Normaliser.load(smoke_data, "shear_flow")
    with torch.no_grad():
        z = norm(x)
        answer, _ = objective.answer({"fields": z, "seeds": torch.arange(2)})
        expected = norm.inverse(objective.target.pictures(answer.predicted, z, z[:, :, 7]))[:, :, 8:]
    assert torch.allclose(rollout(emulator, x[:, :, :8], 8), expected, atol=1e-5)

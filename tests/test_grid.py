"""Grids of labels and longer boxes where their notebooks do not look: plans, groups, ways to fit, bad input."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from physrep.data.generate import draw_parameters, make_files, plan
from physrep.data.scaling import LabelScaler
from physrep.data.windows import Windows
from physrep.experiments import grid as grids
from physrep.experiments.box import SHORTER, SPLIT, check_same_data, longer_box, plot_box
from physrep.experiments.grid import (
    FITS,
    GRID_SPLITS,
    SCORED,
    Asked,
    by_pair,
    describe_grid,
    fit_all,
    grid_sim,
    grid_table,
    grid_values,
)
from physrep.experiments.grid_ranks import REFERENCE, column_ranks, decided_order, order_changes, plot_grid
from physrep.physics.systems import SYSTEMS, get_system
from physrep.probing.features import Features
from physrep.probing.few_labels import fit_few
from physrep.training.presets import get_preset

SIMULATED = [(preset, system) for preset in ("smoke", "laptop", "gpu") for system in SYSTEMS]


@pytest.mark.parametrize("preset, system", SIMULATED)
def test_every_flow_of_a_grid_has_a_pair_of_the_grid(preset, system):
    sim = get_preset(preset).sim(system)
    grid = grid_sim(system, sim)
    files = plan(system, grid)
    names = get_system(system).label_names
    for split in GRID_SPLITS:
        pairs = [tuple(f.parameters[n] for n in names) for f in files if f.split == split]
        assert len(pairs) == len(set(pairs)) == 16
        assert set(pairs) == {(a, b) for a in grid.grid_values[names[0]] for b in grid.grid_values[names[1]]}
    drawn = {tuple(p.values()) for split in sim.draws for p in draw_parameters(system, sim, split)}
    assert not drawn & set(pairs), "no drawn flow is on the grid"


@pytest.mark.parametrize("preset, system", SIMULATED)
def test_a_grid_has_as_many_flows_as_the_drawn_splits(preset, system):
    sim = get_preset(preset).sim(system)
    flows = {
        split: sum(len(f.seeds) for f in plan(system, grid_sim(system, sim)) if f.split == split)
        for split in GRID_SPLITS
    }
    for drawn, split in zip(("train", "valid", "test"), GRID_SPLITS):
        assert abs(flows[split] - math.prod(sim.draws[drawn])) <= 8 or flows[split] == 16
    if preset != "smoke":
        assert flows["grid"] == math.prod(sim.draws["train"])


def test_no_two_flows_of_a_grid_start_alike():
    files = plan("shear_flow", grid_sim("shear_flow", get_preset("laptop").sim("shear_flow")))
    seeds = [seed for f in files for seed in f.seeds]
    assert len(seeds) == len(set(seeds)) == 416


def test_values_are_equally_spaced_after_the_transform():
    ranges = {"Prandtl": (0.5, 4.0), "Rayleigh": (1e4, 1e6)}
    values = grid_values(get_system("rayleigh_benard"), ranges, 5)
    for name, (low, high) in ranges.items():
        assert (values[name][0], values[name][-1]) == (low, high)
        np.testing.assert_allclose(np.diff(np.log10(values[name])), np.log10(high / low) / 4, rtol=1e-4)
    flat = grid_values(get_system("active_matter"), {"alpha": (-5.0, -1.0), "zeta": (1.0, 5.0)})
    np.testing.assert_allclose(np.diff(flat["alpha"]), 4 / 3, rtol=1e-4)


def test_bad_sets_are_refused_with_what_would_be_right():
    sim = get_preset("laptop").sim("shear_flow")
    with pytest.raises(ValueError, match="at least 2 values of each label, got 1"):
        grid_sim("shear_flow", sim, 1)
    with pytest.raises(ValueError, match="must draw train, valid, test, it has no valid"):
        grid_sim("shear_flow", sim.only(("train", "test")))
    with pytest.raises(ValueError, match="preset paper simulates nothing"):
        describe_grid(get_preset("paper"))
    with pytest.raises(ValueError, match="must draw shifted, .* it has train"):
        longer_box("shear_flow", sim.only(("train",)))
    with pytest.raises(ValueError, match="at least 2 times as long, got 1"):
        longer_box("shear_flow", sim, 1)


SHEAR = get_system("shear_flow")
RANGES = get_preset("laptop").sim("shear_flow").ranges


def split_features(noise=0.05):
    "Noisy labels as features of every split: pairs of the grid, and drawn ones."
    rng = np.random.default_rng(0)
    values = grid_values(SHEAR, RANGES)
    pairs = np.array([(a, b) for a in values["Reynolds"] for b in values["Schmidt"]])
    low, high = np.log10(pairs).min(0), np.log10(pairs).max(0)
    labels = {
        s: 10 ** (low + (high - low) * rng.random((n, 2))) for s, n in (("train", 96), ("valid", 48), ("test", 64))
    }
    labels |= {s: np.repeat(pairs, n, axis=0) for s, n in zip(GRID_SPLITS, (6, 3, 4))}
    features = {}
    for s, x in labels.items():
        tokens = np.log10(x) + noise * rng.normal(size=x.shape)
        features[s] = Features(torch.tensor(tokens[:, None], dtype=torch.float32), x, np.arange(len(x)))
    return features, LabelScaler.fit(SHEAR, labels["train"])


def test_a_probe_that_leaves_pairs_out_is_given_the_flows_of_a_pair_as_one(monkeypatch):
    seen = []

    def watched(name, features, scaler):
        seen.append(len(np.unique(features.groups)))
        return fit_few(name, features, scaler)

    monkeypatch.setattr(grids, "fit_few", watched)
    fit_all(*split_features(), probes=["linear"])
    assert seen == [16]


@pytest.fixture(scope="module")
def fitted():
    features, scaler = split_features()
    return features, scaler, fit_all(features, scaler)


def test_pairs_are_groups():
    features, _ = split_features()
    groups = by_pair(features["grid"]).groups
    assert len(np.unique(groups)) == 16 and (np.bincount(groups) == 6).all()
    assert all(len(np.unique(features["grid"].labels[groups == g], axis=0)) == 1 for g in range(16))


def test_neighbours_of_a_grid_answer_with_values_of_the_grid(fitted):
    features, scaler, predictions = fitted
    assert {key[1:] for key in predictions} == {(fit, split) for fit in FITS for split in SCORED}
    on_grid = predictions["knn", "grid", "test"]
    values = np.array(grid_values(SHEAR, RANGES)["Reynolds"])
    nearest = np.abs(np.log10(on_grid[:, :1]) - np.log10(values)).min(1)
    assert np.median(nearest) < 0.02, "the nearest training flows are of one pair"
    truth = features["grid_test"].labels
    assert np.square(np.log10(predictions["knn", "grid", "grid_test"] / truth)).mean() < 0.001


def test_a_linear_probe_of_linear_features_does_not_mind_the_grid(fitted):
    features, scaler, predictions = fitted
    truth = scaler.transform(features["test"].labels)
    errors = [np.square(scaler.transform(predictions["linear", fit, "test"]) - truth).mean() for fit in FITS]
    assert max(errors) < 1.5 * min(errors)


def test_table_and_order_of_made_up_answers(fitted):
    features, scaler, predictions = fitted
    asked = {("shear_flow", s): Asked(features[s].labels, np.arange(len(features[s])), scaler) for s in SCORED}
    rng = np.random.default_rng(1)
    answers = {}
    for key, p in predictions.items():
        if key[0] == "knn" and key[1] != "pairs left out":
            good, bad = ("mae", "jepa") if key[1] == "drawn" else ("jepa", "mae")
            noisy = scaler.inverse(scaler.clip(scaler.transform(p) + rng.normal(size=p.shape)))
            answers["shear_flow", good, "vit", *key] = (p,)
            answers["shear_flow", bad, "vit", *key] = (noisy, noisy)
    constant = {
        ("shear_flow", "constant", "none", "constant", f, s): (np.ones((len(features[s]), 2)) * 700,)
        for f, s in (REFERENCE,)
    }
    table = grid_table(answers | constant, asked, n_bootstrap=50)
    assert set(table.label) == {"mean", "Reynolds", "Schmidt"} and (table.low <= table.high).all()
    ranks = column_ranks(table)
    assert ranks.loc[("shear_flow", "knn", "mae", "vit"), REFERENCE] == 1
    assert ranks.loc[("shear_flow", "knn", "mae", "vit"), ("grid", "grid_test")] == 2
    decided = decided_order(answers | constant, asked, n_bootstrap=50)
    assert set(decided["first"]) | set(decided["second"]) == {"mae-vit", "jepa-vit"}, "a constant is no row"
    changes = order_changes(decided, table).set_index(["fit", "split"])
    assert changes.loc[("grid", "grid_test"), ["same", "opposite", "undecided"]].tolist() == [0, 1, 0]
    assert changes.loc[("drawn", "grid_test"), ["same", "opposite", "undecided"]].tolist() == [1, 0, 0]
    axes = plot_grid(table).axes
    marks = [line for line in axes[0].lines if line.get_marker() == "o"]
    assert len(marks) == 8, "two rows in four columns"


@pytest.mark.parametrize("preset, system", SIMULATED)
def test_a_longer_box_has_the_same_distances_and_flows_of_its_own(preset, system):
    sim = get_preset(preset).sim(system)
    long = longer_box(system, sim)
    short = sim.grid if isinstance(sim.grid, tuple) else (sim.grid, sim.grid)
    for axis in range(2):
        assert math.isclose(long.box[axis] / long.grid[axis], sim.box[axis] / short[axis])
        assert math.isclose(long.box[axis] / long.store_grid[axis], sim.box[axis] / sim.store_grid)
    assert math.isclose(long.dt * SHORTER.get(system, 1), sim.dt) and long.splits == (SPLIT,)
    assert not long.families, "the standard family"
    seeds = {seed for f in plan(system, sim) for seed in f.seeds}
    assert not seeds & {seed for f in plan(system, long) for seed in f.seeds}


def test_the_solvers_take_the_longer_box(tmp_path):
    "One flow of each system, two frames: the grid resolves what it must, and the stored grid is twice as long."
    for system in SYSTEMS:
        sim = replace(longer_box(system, get_preset("smoke").sim(system)), n_frames=2, draws={SPLIT: (2, 1)})
        make_files(plan(system, sim)[:1], system, sim, tmp_path / system)
        cut = Windows(tmp_path, system, SPLIT, frames=2, crop=((0, 32), (0, 32)))
        assert cut.files[0].grid == (64, 32) and cut.shape[1:] == (2, 32, 32)
        assert torch.isfinite(cut.read([0])).all()


def test_boxes_are_drawn_and_other_data_refused():
    about = dict(system="shear_flow", label="mean", low=0.1, high=2.5, n=10, seeds=1)
    rows = [
        {**about, "objective": o, "encoder": e, "probe": p, "split": s, "value": v}
        for o, e, p in (("mae", "vit", "linear"), ("statistics", "none", "kernel"))
        for s, v in (("test", 0.2), ("shifted", 1.0), (SPLIT, 7.0))
    ]
    axes = plot_box(pd.DataFrame(rows)).axes
    marks = [line.get_marker() for line in axes[0].lines]
    assert marks.count(">") == 2 and marks.count("x") == 2, "what is beyond the axis is an arrowhead"

    class Saved:
        path = "here/predictions.safetensors"
        data = {"test": "a"}

    class Stored:
        def fingerprint(self):
            return "b"

    with pytest.raises(ValueError, match=r"here/predictions.safetensors is of other data \(test\)"):
        check_same_data([Saved()], {"test": Stored(), "train": Stored()})

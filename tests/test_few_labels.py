"""Probes of few labelled flows: which flows, how they are chosen without a validation set, and what is written."""

import numpy as np
import pytest
import torch

from physrep.data.scaling import LabelScaler
from physrep.physics.systems import get_system
from physrep.probing import few_labels
from physrep.probing.evaluate import write_few
from physrep.probing.features import Features
from physrep.probing.few_labels import draw_flows, features_of, few_draws, fit_few, score_few
from physrep.probing.frozen import AttentiveRecipe, fit_probe

SYSTEM = get_system("shear_flow")
ABOUT = dict(system="shear_flow", objective="mae", encoder="vit", seed=0, run="r")


def toy(flows: int = 40, noise: float = 0.05, seed: int = 0) -> Features:
    "Three windows a flow, four tokens a window; the labels are linear in the mean token."
    rng = np.random.default_rng(seed)
    logs = rng.uniform((2.6, -0.6), (3.5, 0.3), (flows, 2)).repeat(3, 0)
    mean = np.column_stack([logs, rng.normal(size=(3 * flows, 3))])
    tokens = mean[:, None] + rng.normal(0, noise, (3 * flows, 4, 5))
    return Features(torch.from_numpy(tokens.astype("float32")), 10**logs, np.arange(flows).repeat(3))


def test_draws_are_whole_flows_spread_evenly_and_the_same_for_every_encoder():
    features, rng = toy(), np.random.default_rng(0)
    scaler = LabelScaler.fit(SYSTEM, features.labels)
    other = Features(torch.randn(120, 1, 7), features.labels, features.groups)
    for number in (2, 8, 40):
        flows = [draw_flows(features, scaler, number, k) for k in range(3)]
        assert all(len(set(f)) == number for f in flows) and len(features_of(features, flows[0])) == 3 * number
        assert np.array_equal(flows[1], draw_flows(other, scaler, number, 1))
        assert number == 40 or set(flows[0]) != set(flows[1])
    rank = features.labels[::3].argsort(0).argsort(0) / 39  # of each flow and label, from 0 to 1
    names = features.flows[::3]

    def off(flows: np.ndarray) -> float:
        "How far the ranks of eight flows are from even ones."
        return np.abs(np.sort(rank[np.isin(names, flows)], 0) - (np.arange(8)[:, None] + 0.5) / 8).max()

    drawn = np.mean([off(draw_flows(features, scaler, 8, k)) for k in range(30)])
    assert drawn < 0.6 * np.mean([off(rng.permutation(names)[:8]) for _ in range(300)]), "more evenly than luck"
    with pytest.raises(ValueError, match="from 1 to the 40 flows that have labels, got 41"):
        draw_flows(features, scaler, 41)


LAYOUTS = {  # parameters, flows of each, initial condition of a flow (from its parameters and its number), flows
    "two draws of initial conditions for each parameters": (128, 2, lambda p, k: 2 * p + k, 256),
    "initial conditions shared by several Schmidt": (12, 5, lambda p, k: 5 * (p // 4) + k, 60),
    "the same four initial conditions for all parameters": (60, 4, lambda p, k: k, 240),
    "one initial condition": (30, 1, lambda p, k: 0 * p, 30),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flows_are_counted_drawn_and_left_out_alike_in_every_layout(layout):
    number, each, start, flows = LAYOUTS[layout]
    parameters, k = (a.ravel() for a in np.indices((number, each)))
    labels = 10 ** np.random.default_rng(0).uniform((2.6, -0.6), (3.5, 0.3), (number, 2))[parameters]
    made = Features(torch.randn(len(k), 1, 4), labels, start(parameters, k))
    made = made.subset(np.arange(len(made)).repeat(3))  # three windows a flow
    scaler = LabelScaler.fit(SYSTEM, made.labels)
    assert len(np.unique(made.flows)) == flows
    drawn = draw_flows(made, scaler, 16)
    few = features_of(made, drawn)
    assert len(set(drawn)) == 16 and len(few) == 3 * 16, "as many labels as flows"
    for labels in (made.labels, few.labels):
        parts = few_labels.parts_of(labels, few_labels.FOLDS)
        assert len(parts) == few_labels.FOLDS and (np.sum(parts, axis=0) == 1).all(), "every window is left out once"
        for part in parts:
            assert not {*map(tuple, labels[part])} & {*map(tuple, labels[~part])}, "equal labels on both sides"
    about = dict(ABOUT, labelled_flows=0)
    rows = score_few(
        {"train": made, "test": few}, {"test": few.groups}, scaler, {16: 1, flows: 1}, about, probes=["knn"]
    )
    assert {row["labelled_flows"] for row in rows} == {16}


@pytest.mark.parametrize("flows, draws", [(256, {16: 3, 64: 3}), (64, {16: 3}), (16, {8: 1}), (8, {})])
def test_as_many_flows_as_there_are_no_few_flows(flows, draws):
    assert few_draws(flows) == draws


@pytest.mark.parametrize("name", ["linear", "knn", "kernel"])
def test_the_candidate_is_taken_that_is_best_on_the_flows_left_out(name):
    features = toy(16, noise=0.3)
    scaler = LabelScaler.fit(SYSTEM, features.labels)
    error = np.zeros(())
    for part in few_labels.parts_of(features.labels, few_labels.FOLDS):
        out, rest = features.subset(part), features.subset(~part)
        trials = fit_probe(name, rest, out, scaler).trials
        error = error + len(out) / len(features) * np.array([trial["valid_mse"] for trial in trials])
    best = fit_probe(name, features, features, scaler).trials[int(np.argmin(error))]
    assert fit_few(name, features, scaler).chosen == {k: v for k, v in best.items() if k != "valid_mse"}
    assert fit_few(name, features_of(features, features.flows[[0, 3]]), scaler).chosen, "two parameters are enough"
    with pytest.raises(ValueError, match="at least two different parameters"):
        fit_few(name, features_of(features, features.flows[:1]), scaler)


def test_flows_are_left_out_and_not_windows():
    "A flow's windows are copies of each other: whoever leaves windows out chooses one neighbour."
    features = toy(16)
    scaler = LabelScaler.fit(SYSTEM, features.labels)
    tokens = (torch.randn(16, 1, 5, generator=torch.Generator().manual_seed(i)) for i in range(5))
    copies = [Features(x.repeat_interleave(3, 0), features.labels, features.groups) for x in tokens]
    assert sum(fit_few("knn", f, scaler).chosen["k"] > 1 for f in copies) >= 3


def test_errors_fall_with_flows_and_neither_valid_nor_other_labels_are_seen(monkeypatch):
    seen = []

    def watched(name: str, features: Features, scaler: LabelScaler):
        seen.append(np.allclose(scaler.transform(features.labels).mean(0), 0))
        return fit_few(name, features, scaler)

    monkeypatch.setattr(few_labels, "fit_few", watched)
    monkeypatch.setattr(few_labels, "ATTENTIVE_ON", 8)
    train, test = toy(64), toy(30, seed=1)
    scaler = LabelScaler.fit(SYSTEM, train.labels)
    recipe = AttentiveRecipe(epochs=1, batch_size=8, head={"heads": 1})
    splits = {"train": train, "valid": None, "test": test}  # reading `valid` would fail
    rows = score_few(splits, {"test": test.groups}, scaler, {8: 2, 32: 1, 64: 3}, ABOUT, recipe=recipe)
    mean = {
        (r["probe"], r["labelled_flows"], r["draw"]): r["value"]
        for r in rows
        if (r["label"], r["metric"]) == ("mean", "mse")
    }
    three = {(p, n, k) for p in ("linear", "knn", "kernel") for n, k in ((8, 0), (8, 1), (32, 0))}
    assert set(mean) == three | {("attentive", 8, 0)}, "all flows are no few flows"
    assert mean["knn", 32, 0] < mean["knn", 8, 0] and mean["linear", 32, 0] < 0.05
    assert len(seen) == 9 and all(seen), "scaled by the few labels, not by all"


def test_of_few_flows_there_is_no_file_and_not_that_of_other_data(tmp_path):
    features = toy(8)
    scaler = LabelScaler.fit(SYSTEM, features.labels)
    (tmp_path / "few.json").write_text("{}")
    for _ in range(2):
        write_few(tmp_path, {"train": features}, {"train": None}, scaler, ABOUT)
        assert not list(tmp_path.iterdir())


def test_an_attentive_probe_of_few_flows_has_one_length_of_enough_updates():
    features, recipe = toy(8), AttentiveRecipe(epochs=24, batch_size=8, head={"heads": 1})  # three updates an epoch
    scaler = LabelScaler.fit(SYSTEM, features.labels)
    probe = few_labels.fit_attentive_on_few(features, scaler, updates=7, recipe=recipe, progress=False)
    assert [trial["epochs"] for trial in probe.trials] == [3]


def test_a_label_that_few_flows_share_names_the_draw():
    features = toy(40)
    labels = features.labels.copy()
    labels[:, 1] = np.where(features.groups == 39, 2.0, 1.0)
    features = Features(features.tokens, labels, features.groups)
    scaler = LabelScaler.fit(SYSTEM, labels)
    with pytest.raises(ValueError, match="Schmidt of shear_flow in draw . of 4 labelled flows are equal"):
        score_few({"train": features, "test": features}, {"test": features.groups}, scaler, {4: 9}, ABOUT)

"""Probes of few labelled flows: which flows, how they are chosen without a validation set, and what is written."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from physrep.data.scaling import LabelScaler
from physrep.physics.systems import get_system
from physrep.probing import few_labels
from physrep.probing.evaluate import FEW, score_run, write_few
from physrep.probing.features import Features
from physrep.probing.few_labels import draw_flows, fit_attentive_on_few, fit_few, of_flows, score_few, score_refitted
from physrep.probing.frozen import AttentiveRecipe, fit_probe
from physrep.probing.reading import probe_splits
from physrep.probing.records import read_results
from physrep.results.data_efficiency import (
    PAPER_SHARES,
    beside_labels_alone,
    plot_beside_paper,
    plot_data_efficiency,
    plot_shift,
    read_few,
)
from physrep.training.pretrain import pretrain
from physrep.training.run import resolve

SYSTEM = get_system("shear_flow")
ABOUT = dict(system="shear_flow", objective="mae", encoder="vit", seed=0, run="r")


def toy(flows: int = 40, noise: float = 0.05, seed: int = 0) -> Features:
    "Three windows a flow, four tokens a window; the labels are linear in the mean token."
    rng = np.random.default_rng(seed)
    logs = rng.uniform((2.6, -0.6), (3.5, 0.3), (flows, 2)).repeat(3, 0)
    mean = np.column_stack([logs, rng.normal(size=(3 * flows, 3))])
    tokens = mean[:, None] + rng.normal(0, noise, (3 * flows, 4, 5))
    return Features(torch.from_numpy(tokens.astype("float32")), 10**logs, np.arange(flows).repeat(3))


def two_flows_a_draw(draws: int) -> Features:
    "Of the three windows with equal labels two are of one flow, and the third is of another."
    features = toy(draws)
    return Features(features.tokens, features.labels, 2 * features.groups + np.tile([0, 0, 1], draws))


def test_draws_are_whole_flows_stratified_and_the_same_for_every_encoder():
    features = toy()
    scaler = LabelScaler.fit(SYSTEM, features.labels)
    other = Features(torch.randn(120, 1, 7), features.labels, features.groups)
    for number in (2, 8, 40):
        flows = [draw_flows(features, scaler, number, k) for k in range(3)]
        assert all(len(set(f)) == number for f in flows)
        assert np.array_equal(flows[1], draw_flows(other, scaler, number, 1))
        assert number == 40 or set(flows[0]) != set(flows[1])
        assert len(of_flows(features, flows[0])) == 3 * number
    labels = scaler.transform(of_flows(features, draw_flows(features, scaler, 8)).labels)
    assert (np.ptp(labels, axis=0) > 0.7 * np.ptp(scaler.transform(features.labels), axis=0)).all()
    for wrong in (0, 41):
        with pytest.raises(ValueError, match=f"from 1 to the 40 flows that have labels, got {wrong}"):
            draw_flows(features, scaler, wrong)


def test_drawn_flows_cover_the_range_more_evenly_than_luck():
    features, rng = toy(), np.random.default_rng(0)
    scaler = LabelScaler.fit(SYSTEM, features.labels)
    rank = features.labels[::3].argsort(0).argsort(0) / 39  # of each flow and label, from 0 to 1

    def off(flows: np.ndarray) -> float:
        "How far the ranks of eight flows are from even ones."
        return np.abs(np.sort(rank[flows], 0) - (np.arange(8)[:, None] + 0.5) / 8).max()

    drawn = np.mean([off(draw_flows(features, scaler, 8, k)) for k in range(30)])
    assert drawn < 0.6 * np.mean([off(rng.permutation(40)[:8]) for _ in range(300)])


@pytest.mark.parametrize("name", ["linear", "knn", "kernel"])
def test_the_candidate_is_taken_that_is_best_on_the_flows_left_out(name):
    features = toy(16, noise=0.3)
    scaler = LabelScaler.fit(SYSTEM, features.labels)
    error = np.zeros(())
    for part in few_labels._parts(features.groups, few_labels.FOLDS):
        out, rest = (of_flows(features, groups) for groups in (part, np.setdiff1d(features.groups, part)))
        trials = fit_probe(name, rest, out, scaler).trials
        error = error + len(out) / len(features) * np.array([trial["valid_mse"] for trial in trials])
    best = fit_probe(name, features, features, scaler).trials[int(np.argmin(error))]
    assert fit_few(name, features, scaler).chosen == {k: v for k, v in best.items() if k != "valid_mse"}


@pytest.mark.parametrize("name", ["linear", "knn", "kernel"])
def test_what_is_chosen_leaves_flows_out(name):
    features = toy(16, noise=0.3)
    scaler = LabelScaler.fit(SYSTEM, features.labels)
    probe = fit_few(name, features, scaler)
    assert probe.name == name and np.isfinite(probe.predict(features)).all()
    # a flow's windows are copies of each other: whoever leaves windows out in place of flows chooses one neighbour
    if name == "knn":
        tokens = (torch.randn(16, 1, 5, generator=torch.Generator().manual_seed(i)) for i in range(5))
        copies = [Features(x.repeat_interleave(3, 0), features.labels, features.groups) for x in tokens]
        assert sum(fit_few(name, f, scaler).chosen["k"] > 1 for f in copies) >= 3
    with pytest.raises(ValueError, match="at least two flows"):
        fit_few(name, of_flows(features, np.array([3])), scaler)


def test_probes_without_candidates_are_refused():
    features = toy(8)
    with pytest.raises(ValueError, match="no candidates of probe 'constant'"):
        fit_few("constant", features, LabelScaler.fit(SYSTEM, features.labels))


def test_errors_fall_with_flows_and_valid_is_never_read():
    train, test = toy(64), toy(30, seed=1)
    scaler = LabelScaler.fit(SYSTEM, train.labels)
    recipe = AttentiveRecipe(batch_size=8, head={"heads": 1})
    attentive = partial(fit_attentive_on_few, updates=6, recipe=recipe, seed=0)
    options = dict(attentive=attentive, attentive_on=8)
    splits = {"train": train, "valid": None, "test": test}  # reading `valid` would fail
    rows = score_few(splits, {"test": test.groups}, scaler, {8: 2, 32: 1, 64: 3}, ABOUT, **options)
    mean = {
        (r["probe"], r["labelled_flows"], r["draw"]): r["value"]
        for r in rows
        if (r["label"], r["metric"]) == ("mean", "mse")
    }
    assert set(mean) == {(p, n, k) for p in ("linear", "knn", "kernel") for n, k in ((8, 0), (8, 1), (32, 0))} | {
        ("attentive", 8, 0)
    }, "all flows are no few flows"
    assert mean["knn", 32, 0] < mean["knn", 8, 0] and mean["linear", 32, 0] < 0.05


def test_a_drifted_read_out_is_told_from_lost_information():
    features = two_flows_a_draw(24)
    scaler = LabelScaler.fit(SYSTEM, features.labels)
    drifted = Features(-features.tokens, features.labels, features.groups)
    lost = Features(torch.randn_like(features.tokens), features.labels, features.groups)
    errors = []
    for shifted in (drifted, lost):
        rows = score_refitted(shifted, shifted.groups, scaler, ABOUT, probes=["linear"])
        assert {r["split"] for r in rows} == {"refitted"} and rows[0]["labelled_flows"] == 24
        errors.append(next(r["value"] for r in rows if (r["label"], r["metric"]) == ("mean", "mse")))
    assert errors[0] < 0.05 and errors[1] > 0.7


def test_probes_of_few_flows_know_the_labels_of_these_alone(monkeypatch):
    seen = []

    def watched(name: str, features: Features, scaler: LabelScaler):
        seen.append((features, scaler))
        return fit_few(name, features, scaler)

    monkeypatch.setattr(few_labels, "fit_few", watched)
    train, test = toy(64), toy(30, seed=1)
    scaler = LabelScaler.fit(SYSTEM, train.labels)
    score_few({"train": train, "test": test}, {"test": test.groups}, scaler, {8: 2}, ABOUT, probes=["linear"])
    assert len(seen) == 2
    for features, own in seen:
        assert np.allclose(own.transform(features.labels).mean(0), 0), "scaled by the few labels, not by all"


@pytest.mark.parametrize("draws", [4, 11, 24])
def test_refitted_probes_predict_draws_that_they_were_not_fitted_on(draws, monkeypatch):
    class Perfect:
        def __init__(self, features: Features):
            self.seen = set(map(tuple, features.labels.tolist()))

        def predict(self, features: Features) -> np.ndarray:
            assert not self.seen & set(map(tuple, features.labels.tolist())), "fitted on parameters that it predicts"
            return features.labels

    monkeypatch.setattr(few_labels, "fit_few", lambda name, features, scaler: Perfect(features))
    features = two_flows_a_draw(draws)
    scaler = LabelScaler.fit(SYSTEM, features.labels)
    rows = score_refitted(features, features.groups, scaler, ABOUT, probes=["linear"])
    errors = [row["value"] for row in rows if row["metric"] == "mse"]
    assert errors and errors == pytest.approx([0] * len(errors), abs=1e-12)


def test_few_draws_of_shifted_flows_are_not_refitted():
    "One of two draws in each half chooses the probe of the other: with three there are no such halves."
    for draws, rows in ((1, 0), (3, 0), (4, 1)):
        features = two_flows_a_draw(draws)
        scaler = LabelScaler.fit(SYSTEM, toy(8).labels)
        assert bool(score_refitted(features, features.groups, scaler, ABOUT)) == bool(rows)


def test_a_run_has_its_rows_of_few_flows(smoke_data, tmp_path):
    run = resolve("shear_flow", "random", "vit", "smoke")
    folder = pretrain(run, smoke_data, tmp_path, progress=False, say=lambda _: None)
    scored = score_run(run, smoke_data, tmp_path, progress=False)
    assert {row["split"] for row in scored.rows} == {"valid", "test", "shifted"}
    rows = read_results([folder / "few.json"])
    assert set(rows.split) == {"test", "shifted", "refitted"}
    few = rows[rows.split == "test"]
    assert set(zip(few.labelled_flows, few.draw)) == {(8, k) for k in range(FEW[8])}, "16 flows are all of them"
    table = read_few([folder])
    assert set(table.labelled_flows) == {4, 8, 16} and "valid" not in set(table.split)
    assert len(plot_data_efficiency(table).axes) == 2 and len(plot_shift(table).axes) == 1
    more = table.assign(labelled_flows=table.labelled_flows.where(table.split != "refitted", 1000))
    assert len(plot_shift(more).axes) == 1, "more flows of shifted than of train"
    paper, here = plot_beside_paper(table, ("kernel",)).axes
    assert [tuple(line.get_ydata()) for line in paper.lines[:2]] == [tuple(p.values()) for p in PAPER_SHARES.values()]
    mean = table[(table.probe == "kernel") & (table.split == "test")].groupby("labelled_flows").value.mean()
    assert tuple(here.lines[0].get_xdata()) == (0.5, 1.0) and np.allclose(here.lines[0].get_ydata(), mean)


def test_a_label_that_few_flows_share_names_the_draw():
    features = toy(40)
    labels = features.labels.copy()
    labels[:, 1] = np.where(features.groups == 39, 2.0, 1.0)
    features = replace(features, labels=labels)
    scaler = LabelScaler.fit(SYSTEM, labels)
    with pytest.raises(ValueError, match="draw . of 4 labelled flows: .*Schmidt.* are equal .* leave it out"):
        score_few({"train": features, "test": features}, {"test": features.groups}, scaler, {4: 9}, ABOUT)


def test_rows_of_few_flows_of_other_data_do_not_stay(tmp_path, smoke_data):
    windows = probe_splits(resolve("shear_flow", "random", "vit", "smoke"), smoke_data, ("train", "test"))
    features = {"train": toy(8), "test": toy(8)}
    (tmp_path / "few.json").write_text("{}")
    scaler = LabelScaler.fit(SYSTEM, features["train"].labels)
    assert write_few(tmp_path, features, windows, scaler, ABOUT, labels_seen=True) == tmp_path
    assert not (tmp_path / "few.json").exists()


def test_all_labels_of_a_small_system_are_no_few_labels():
    about = dict(encoder="vit", draw=0, split="test", probe="kernel", value=0.5)
    flows = {"shear_flow": 896, "active_matter": 175}
    rows = [
        {**about, "system": s, "objective": o, "labelled_flows": n}
        for s, n in flows.items()
        for o in ("supervised", "mae")
    ]
    assert beside_labels_alone(pd.DataFrame(rows)).empty
    few = [{**row, "labelled_flows": 16} for row in rows if row["system"] == "active_matter"]
    assert set(beside_labels_alone(pd.DataFrame(rows + few)).system) == {"active_matter"}

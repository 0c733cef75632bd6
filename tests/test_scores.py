"""Scores: plain formulas, bootstrap over groups and seeds, and intervals that keep their promise."""

import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from physrep.data.scaling import LabelScaler
from physrep.physics.systems import get_system
from physrep.probing.scores import (
    METRICS,
    _spread,
    _weighted_medians,
    bootstrap_weights,
    difference_seeds,
    plot_predictions,
    score,
    score_seeds,
)
from physrep.training.run import resolve

SYSTEM = get_system("shear_flow")
SCALER = LabelScaler.fit(SYSTEM, 10 ** (np.random.default_rng(0).uniform(-2, 2, (1000, 2)) + [5, 0]))  # clips nothing


def make(seed: int, seeds: int = 1, spread: float = 0.0) -> tuple[list[np.ndarray], tuple]:
    "Predictions of so many seeds, and the other arguments of a score: 40 groups of 3 windows, which share their error."
    rng = np.random.default_rng(seed)
    u, error = rng.uniform(-1, 1, (40, 2)).repeat(3, 0), rng.normal(0, 0.2, (40, 2)).repeat(3, 0)
    noise = [rng.normal(0, 0.05, u.shape) + spread * rng.normal() for _ in range(seeds)]
    predictions = [10 ** (u + error + one + [5, 0]) for one in noise]
    return predictions, (10 ** (u + [5, 0]), np.arange(40).repeat(3), SYSTEM, SCALER)


def certain(*errors: float) -> tuple[list[np.ndarray], tuple]:
    "Predictions with the same error in every window: groups bring no chance."
    u = np.random.default_rng(0).uniform(-1, 1, (30, 2))
    truth = 10 ** (u - u.mean(0) + [5, 0])
    return [truth * 10**error for error in errors], (truth, np.arange(30), SYSTEM, SCALER)


def test_scores_and_their_draws_against_plain_formulas():
    (p,), (truth, groups, *rest) = make(0)
    rows = {(r["metric"], r["label"]): r for r in score(p, truth, groups, *rest)}
    assert len(rows) == len(METRICS) * 3 and all(r["n"] == len(truth) for r in rows.values())
    z, t = SCALER.transform(p), SCALER.transform(truth)
    for i, label in enumerate(SYSTEM.label_names):
        assert rows["mse", label]["value"] == pytest.approx(np.mean((z - t)[:, i] ** 2))
        assert rows["r2", label]["value"] == pytest.approx(1 - np.mean((z - t)[:, i] ** 2) / t[:, i].var())
        assert rows["relative_error", label]["value"] == pytest.approx(np.median(np.abs(p / truth - 1)[:, i]))
    weights, index = bootstrap_weights(groups, 1000)
    windows = [np.concatenate([np.flatnonzero(index == g) for g in range(40) for _ in range(w[g])]) for w in weights]
    drawn = [np.mean((z - t)[w, 0] ** 2) for w in windows[1:]]
    low, high = (rows["mse", "Reynolds"][end] for end in ("low", "high"))
    assert [low, high] == pytest.approx(np.quantile(drawn, (0.025, 0.975))), "whole groups are drawn"
    relative = np.abs(p / truth - 1)[:, 0]
    assert _weighted_medians(relative, weights, index)[2] == pytest.approx(np.median(relative[windows[2]]))


def test_a_single_group_has_no_interval_and_wild_predictions_are_clipped():
    _, (truth, groups, *rest) = make(0)
    for row in score(truth, truth, np.zeros(len(truth)), *rest, n_bootstrap=5):
        assert math.isnan(row["low"]) and math.isnan(row["high"]) and math.isfinite(row["value"])
    edge = SCALER.inverse(np.tile(SCALER.clip(np.full((1, 2), 99.0)), (len(truth), 1)))
    wild, clipped = (score(p, truth, groups, *rest, n_bootstrap=5) for p in (np.full_like(truth, 1e30), edge))
    assert [r["value"] for r in wild[:3]] == pytest.approx([r["value"] for r in clipped[:3]])


def test_a_label_of_zero_has_no_relative_error_and_the_others_have():
    (p,), (truth, groups, *_) = make(0)
    plain = replace(SYSTEM, labels=tuple(replace(label, log=False) for label in SYSTEM.labels))
    zero = np.where(np.arange(240).reshape(120, 2) == 7, 0.0, truth)
    rows = score(p, zero, groups, plain, LabelScaler.fit(plain, truth))
    found = {(r["metric"], r["label"]): r["value"] for r in rows}
    assert math.isnan(found["relative_error", "Schmidt"]) and math.isnan(found["relative_error", "mean"])
    assert found["relative_error", "Reynolds"] > 0 and found["mse", "Schmidt"] > 0


def test_several_seeds_have_the_mean_of_their_scores_and_wider_intervals_where_they_differ():
    predictions, args = make(0, seeds=3, spread=0.1)
    each = [score(p, *args) for p in predictions]
    for row, *singles in zip(score_seeds(predictions, *args), *each):
        assert row["value"] == pytest.approx(np.mean([r["value"] for r in singles])) and row["seeds"] == 3
    one, same = each[0], score_seeds(predictions[:1] * 3, *args)
    assert all(a["low"] == pytest.approx(b["low"]) and a["high"] == pytest.approx(b["high"]) for a, b in zip(one, same))
    far = args[0] * (predictions[0] / args[0]) ** 2
    wide = score_seeds([predictions[0], far, predictions[0]], *args)
    assert all(b["high"] - b["low"] > 1.3 * (a["high"] - a["low"]) for a, b in zip(same[:3], wide[:3]))


def test_the_interval_of_seeds_on_certain_groups_is_that_of_student_and_not_below_zero():
    errors = (0.2, 0.22, 0.24)
    predictions, args = certain(*errors)
    row = score_seeds(predictions, *args, n_bootstrap=4000)[0]
    values = np.square(errors) / SCALER.std[0] ** 2
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert row["value"] == pytest.approx(values.mean())
    assert row["low"] == pytest.approx(max(low, 0), rel=0.01) and row["high"] == pytest.approx(high, rel=0.01)
    pair, args = certain(0.01, 0.5)
    assert min(r["low"] for r in score_seeds(pair, *args) if r["metric"] != "r2") == 0
    assert difference_seeds(pair, pair[::-1], *args)[0]["low"] < 0, "a difference may be"


def test_groups_are_paired_between_methods_and_seeds_are_not():
    predictions, args = make(1, seeds=6)
    first, second = predictions[:3], [args[0] * (p / args[0]) ** 1.2 for p in predictions[3:]]
    for d, a, b in zip(difference_seeds(first, second, *args), score_seeds(first, *args), score_seeds(second, *args)):
        assert d["value"] == pytest.approx(a["value"] - b["value"], abs=1e-12) and d["seeds"] == 3
        if d["metric"] == "mse":
            assert d["high"] - d["low"] < 0.5 * math.hypot(a["high"] - a["low"], b["high"] - b["low"]) and d["high"] < 0
    itself = difference_seeds(first, first, *args)  # the value is zero, but its seeds are luck twice
    assert all(r["value"] == 0 and r["low"] < 0 < r["high"] for r in itself)
    assert all(r["seeds"] == 2 for r in difference_seeds(first, second[:2], *args, n_bootstrap=5))


def test_a_single_seed_is_given_the_spread_of_the_others_if_it_has_one():
    (single, *three), args = certain(0.3, 0.2, 0.22, 0.24)

    def width(first, second, **options) -> float:
        row = difference_seeds(first, second, *args, n_bootstrap=4000, **options)[0]
        return row["high"] - row["low"]

    alone = width([single], three, seeded=(False, True))
    one, mean = stats.t.rvs(2, size=(2, 200_000), random_state=0)
    both = np.ptp(np.quantile(one + mean / math.sqrt(3), (0.025, 0.975)))
    expected = both / (2 * stats.t.ppf(0.975, 2)) * math.sqrt(3)
    for some in (([single], three), (three, [single])):
        assert width(*some) == pytest.approx(expected * alone, rel=0.1), "the error of a seed, and that of three"
    assert width([single], three[:1]) == pytest.approx(0, abs=1e-9), "nobody knows"


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([np.ones((120, 2)), np.ones((3, 2))], r"prediction has shape \(3, 2\); 120 windows of shear_flow want"),
        ([], "no predictions"),
        ([np.full((120, 2), np.nan)], "prediction has 240 values that are not finite"),
    ],
)
def test_what_does_not_fit_is_named(predictions, message):
    (p,), args = make(0)
    with pytest.raises(ValueError, match=message):
        difference_seeds([p], predictions, *args)


def test_spread_at_grid_values_and_in_bins():
    rng = np.random.default_rng(0)
    x = rng.choice([1.0, 2.0, 4.0], 3000)
    where, (low, median, high) = _spread(x, x + rng.uniform(0, 1, 3000))
    assert np.allclose(where, [1, 2, 4]) and np.allclose([low - where, high - where], [[0.1], [0.9]], atol=0.03)
    x = rng.uniform(0, 1, 5000)  # in a bin the spread is that of the errors, not of x
    where, (low, median, high) = _spread(x, x + 0.01 * rng.uniform(-1, 1, 5000))
    assert len(where) == 10 and np.allclose(high - low, 0.016, atol=0.002) and np.allclose(median, where, atol=0.002)


def test_plots_of_few_windows_equal_predictions_and_plain_labels_below_zero():
    _, (truth, *_) = make(0)
    convection = resolve("rayleigh_benard", "random", preset="paper").system  # no logarithm of the Prandtl number
    some = np.array([[0.1, 1e6], [1.0, 1e8], [5.0, 1e10]])
    for system, t, p in (
        (SYSTEM, truth[:1], truth[:1]),
        (SYSTEM, truth, np.full_like(truth, 1e5)),
        (convection, some, some - [0.3, 0]),
    ):
        fig = plot_predictions(p, t, system, half_width=np.array([0.1, np.inf]))
        fig.canvas.draw()
        x, y = system.labels[0].transform(t[:, 0]), system.labels[0].transform(p[:, 0])
        assert fig.axes[0].get_title().endswith(f"= {1 - ((y - x) ** 2).mean() / max(x.var(), 1e-12):.2f}")
        diagonal, band = fig.axes[0].lines[0].get_xdata(), fig.axes[0].collections[0].get_paths()[0].vertices[:, 1]
        ends, band = system.labels[0].transform(diagonal), system.labels[0].transform(band)
        width = min(0.1, np.ptp(ends))
        assert [band.min(), band.max()] == pytest.approx([ends[0] - width, ends[1] + width]), "on both sides"
    assert fig.axes[0].get_xlim()[0] < -0.2, "the point below zero is inside"
    plt.close("all")

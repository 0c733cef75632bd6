"""Scores: plain formulas, bootstrap over groups and seeds, and intervals that keep their promise."""

import math
from dataclasses import replace

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
    score_difference,
    score_seeds,
)
from physrep.training.run import resolve

SYSTEM = get_system("shear_flow")


def make(
    seed: int, seeds: int = 1, sigma: float = 0.2, seed_offset: float = 0.0
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    "Predictions of so many seeds, truth, groups: 40 groups of 3 windows, errors shared by the group."
    rng = np.random.default_rng(seed)
    u, error = (rng.uniform(-1, 1, (40, 2)).repeat(3, 0), rng.normal(0, sigma, (40, 2)).repeat(3, 0))
    predictions = [
        10 ** (u + error + rng.normal(0, 0.05, u.shape) + seed_offset * rng.normal() + [5, 0]) for _ in range(seeds)
    ]
    return predictions, 10 ** (u + [5, 0]), np.arange(40).repeat(3)


SCALER = LabelScaler.fit(
    SYSTEM, 10 ** (np.random.default_rng(0).uniform(-2, 2, (1000, 2)) + [5, 0])
)  # nothing below is clipped


def test_scores_against_plain_formulas():
    (p,), truth, groups = make(0)
    rows = {(r["metric"], r["label"]): r for r in score(p, truth, groups, SYSTEM, SCALER, n_bootstrap=50)}
    assert len(rows) == len(METRICS) * 3 and all(r["n"] == len(truth) for r in rows.values())
    z, t = SCALER.transform(p), SCALER.transform(truth)
    for i, label in enumerate(SYSTEM.label_names):
        assert rows["mse", label]["value"] == pytest.approx(np.mean((z - t)[:, i] ** 2))
        assert rows["r2", label]["value"] == pytest.approx(1 - np.mean((z - t)[:, i] ** 2) / t[:, i].var())
        assert rows["relative_error", label]["value"] == pytest.approx(np.median(np.abs(p / truth - 1)[:, i]))


def test_a_bootstrap_draw_is_the_score_of_the_drawn_windows():
    (p,), truth, groups = make(0)
    weights, index = bootstrap_weights(groups, 3, seed=5)
    assert (weights.sum(1) == 40).all() and (weights[0] == 1).all()
    drawn = np.concatenate([np.flatnonzero(index == g) for g, times in enumerate(weights[2]) for _ in range(times)])
    relative = np.abs(p / truth - 1)[:, 0]
    assert _weighted_medians(relative, weights, index)[2] == pytest.approx(np.median(relative[drawn]))
    error = (SCALER.transform(p) - SCALER.transform(truth))[:, 0] ** 2
    sums = np.bincount(index, error)
    assert weights[2] @ sums / (weights[2] @ np.bincount(index)) == pytest.approx(error[drawn].mean())


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    scaler = LabelScaler.fit(SYSTEM, 10 ** (np.random.default_rng(0).uniform(-1, 1, (500, 2)) + [5, 0]))
    hits = {"groups": 0, "windows": 0}
    sigma, n = 0.1, 120
    for seed in range(n):
        rng = np.random.default_rng(seed)
        u = rng.uniform(-0.9, 0.9, (50, 2)).repeat(6, 0)
        p = u + sigma * rng.normal(size=(50, 2)).repeat(6, 0)  # far from the clipping range
        groups = {"groups": np.arange(50).repeat(6), "windows": np.arange(300)}
        for kind, g in groups.items():
            row = score(10 ** (p + [5, 0]), 10 ** (u + [5, 0]), g, SYSTEM, scaler, n_bootstrap=200, seed=seed)[2]
            assert (row["metric"], row["label"]) == ("mse", "mean")
            hits[kind] += row["low"] <= sigma**2 * np.mean(1 / scaler.std**2) <= row["high"]
    assert 0.86 < hits["groups"] / n <= 1 and hits["windows"] / n < 0.75


def test_paired_difference_is_the_difference_and_is_narrower():
    (a,), truth, groups = make(0)
    b = a * 1.02
    difference, first, second = (
        score_difference(a, b, truth, groups, SYSTEM, SCALER),
        *(score(p, truth, groups, SYSTEM, SCALER) for p in (a, b)),
    )
    for d, x, y in zip(difference, first, second):
        assert d["value"] == pytest.approx(x["value"] - y["value"], abs=1e-12)
        if d["metric"] == "mse":
            assert d["high"] - d["low"] < 0.3 * (x["high"] - x["low"])


def test_one_group_has_no_interval():
    _, truth, groups = make(0)
    for row in score(truth, truth, np.zeros(len(truth)), SYSTEM, SCALER, n_bootstrap=5):
        assert math.isnan(row["low"]) and math.isnan(row["high"]) and math.isfinite(row["value"])


def test_a_prediction_outside_the_range_is_scored_as_if_clipped():
    _, truth, groups = make(0)
    wild = np.full_like(truth, 1e30)
    edge = SCALER.inverse(np.tile(SCALER.clip(np.full((1, 2), 99.0)), (len(truth), 1)))
    scores = [score(p, truth, groups, SYSTEM, SCALER, n_bootstrap=5) for p in (wild, edge)]
    first, second = ([r["value"] for r in rows if r["metric"] == "mse"] for rows in scores)
    assert np.allclose(first, second)


def test_one_seed_is_the_plain_score_and_the_plain_difference():
    predictions, truth, groups = make(0, seeds=2)
    args = (truth, groups, SYSTEM, SCALER)
    kind = dict(n_bootstrap=200, seed=3)
    assert score_seeds(predictions[:1], *args, **kind) == [
        r | {"seeds": 1} for r in score(predictions[0], *args, **kind)
    ]
    assert difference_seeds(predictions[:1], predictions[1:], *args, **kind) == [
        r | {"seeds": 1} for r in score_difference(*predictions, *args, **kind)
    ]


def test_the_value_of_several_seeds_is_the_mean_of_their_scores():
    predictions, truth, groups = make(0, seeds=3, seed_offset=0.1)
    each = [score(p, truth, groups, SYSTEM, SCALER, n_bootstrap=2) for p in predictions]
    for row, *singles in zip(score_seeds(predictions, truth, groups, SYSTEM, SCALER, n_bootstrap=100), *each):
        assert (
            row["value"] == pytest.approx(np.mean([r["value"] for r in singles]))
            and row["seeds"] == 3
            and row["n"] == len(truth)
        )
        assert {k: row[k] for k in ("label", "metric")} == {k: singles[0][k] for k in ("label", "metric")}
        assert row["low"] < row["high"]


def test_equal_seeds_add_nothing_and_different_seeds_widen_the_interval():
    (p,), truth, groups = make(0)
    one, same = score(p, truth, groups, SYSTEM, SCALER), score_seeds([p, p, p], truth, groups, SYSTEM, SCALER)
    assert all(a["low"] == pytest.approx(b["low"]) and a["high"] == pytest.approx(b["high"]) for a, b in zip(one, same))
    far = truth * (p / truth) ** 2
    wide = score_seeds([p, far, p], truth, groups, SYSTEM, SCALER)
    assert all(b["high"] - b["low"] > 1.3 * (a["high"] - a["low"]) for a, b in zip(same, wide) if a["metric"] == "mse")


def test_the_interval_of_seeds_on_certain_groups_is_that_of_student():
    "Errors that are the same in every window: groups bring no chance, and the seeds are all there is."
    u = np.random.default_rng(0).uniform(-1, 1, (30, 2))
    u -= u.mean(0)
    truth, groups = 10 ** (u + [5, 0]), np.arange(30)
    errors = (0.2, 0.22, 0.24)
    row = score_seeds([truth * 10**e for e in errors], truth, groups, SYSTEM, SCALER, n_bootstrap=4000)[0]
    values = np.square(errors) / SCALER.std[0] ** 2
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert (row["metric"], row["label"]) == ("mse", "Reynolds") and row["value"] == pytest.approx(values.mean())
    assert row["low"] == pytest.approx(max(low, 0), rel=0.01) and row["high"] == pytest.approx(high, rel=0.01)


def test_the_interval_of_an_error_is_not_below_zero_and_that_of_a_difference_may_be():
    u = np.random.default_rng(0).uniform(-1, 1, (30, 2))
    truth, groups = 10 ** (u + [5, 0]), np.arange(30)
    pair = [truth * 10**0.01, truth * 10**0.5]
    assert min(r["low"] for r in score_seeds(pair, truth, groups, SYSTEM, SCALER) if r["metric"] != "r2") == 0
    assert difference_seeds(pair, pair[::-1], truth, groups, SYSTEM, SCALER)[0]["low"] < 0


def test_groups_are_paired_between_methods_and_seeds_are_not():
    predictions, truth, groups = make(1, seeds=6)
    first, second = predictions[:3], [truth * (p / truth) ** 1.2 for p in predictions[3:]]
    args = (truth, groups, SYSTEM, SCALER)
    difference = difference_seeds(first, second, *args)
    for d, a, b in zip(difference, score_seeds(first, *args), score_seeds(second, *args)):
        assert d["value"] == pytest.approx(a["value"] - b["value"], abs=1e-12) and d["seeds"] == 3
        if d["metric"] == "mse":
            assert d["high"] - d["low"] < 0.5 * math.hypot(a["high"] - a["low"], b["high"] - b["low"]) and d["high"] < 0
    # a method against itself: the value is zero, but its seeds are luck twice
    itself = difference_seeds(first, first, *args)
    assert all(r["value"] == 0 and r["low"] < 0 < r["high"] for r in itself)
    assert all(r["seeds"] == 2 for r in difference_seeds(first, second[:2], *args, n_bootstrap=5))


def test_a_single_seed_is_given_the_spread_of_the_others_if_it_has_one():
    "Errors that are the same in every window, as above: groups bring no chance."
    u = np.random.default_rng(0).uniform(-1, 1, (30, 2))
    truth, groups = 10 ** (u - u.mean(0) + [5, 0]), np.arange(30)
    one, *three = ([truth * 10**e] for e in (0.3, 0.2, 0.22, 0.24))
    three = [p for (p,) in three]

    def width(first, second, **options):
        row = difference_seeds(first, second, truth, groups, SYSTEM, SCALER, n_bootstrap=4000, **options)[0]
        return row["high"] - row["low"]

    alone = width(one, three, seeded=(False, True))
    single, mean = stats.t.rvs(2, size=(2, 200_000), random_state=0)
    expected = (
        np.ptp(np.quantile(single + mean / math.sqrt(3), (0.025, 0.975))) / (2 * stats.t.ppf(0.975, 2)) * math.sqrt(3)
    )
    for some in ((one, three), (three, one)):
        assert width(*some) == pytest.approx(expected * alone, rel=0.1), "the error of a seed, and that of three"
    assert width(three, one, seeded=(True, False)) == pytest.approx(alone, rel=0.01)
    assert width(one, [three[0]]) == pytest.approx(0, abs=1e-9), "nobody knows"


def test_a_label_of_zero_has_no_relative_error_and_the_others_have():
    (p,), truth, groups = make(0)
    plain = replace(SYSTEM, labels=tuple(replace(label, log=False) for label in SYSTEM.labels))
    scaler = LabelScaler.fit(plain, truth)
    zero = np.where(np.arange(240).reshape(120, 2) == 7, 0.0, truth)
    rows = {(r["metric"], r["label"]): r for r in score(p, zero, groups, plain, scaler)}
    first, second = plain.label_names
    for label in (second, "mean"):
        assert all(math.isnan(rows["relative_error", label][k]) for k in ("value", "low", "high"))
    assert rows["relative_error", first]["value"] > 0 and rows["mse", second]["value"] > 0


def test_what_does_not_fit_is_named():
    (p,), truth, groups = make(0)
    with pytest.raises(ValueError, match=r"prediction has shape \(3, 2\); 120 windows of shear_flow want \(120, 2\)"):
        score_seeds([p, np.ones((3, 2))], truth, groups, SYSTEM, SCALER)
    with pytest.raises(ValueError, match="no predictions"):
        difference_seeds([p], [], truth, groups, SYSTEM, SCALER)
    with pytest.raises(ValueError, match="prediction has 1 values that are not finite"):
        score(np.where(np.arange(240).reshape(120, 2) == 7, np.nan, p), truth, groups, SYSTEM, SCALER)


# --- the plot


def test_spread_at_grid_values_and_in_bins():
    rng = np.random.default_rng(0)
    x = rng.choice([1.0, 2.0, 4.0], 3000)
    where, (low, median, high) = _spread(x, x + rng.uniform(0, 1, 3000))
    assert np.allclose(where, [1, 2, 4])
    assert (
        np.allclose(low - where, 0.1, atol=0.03)
        and np.allclose(median - where, 0.5, atol=0.05)
        and np.allclose(high - where, 0.9, atol=0.03)
    )
    x = rng.uniform(0, 1, 5000)  # in a bin the spread is that of the errors, not of x
    where, (low, median, high) = _spread(x, x + 0.01 * rng.uniform(-1, 1, 5000))
    assert len(where) == 10 and np.allclose(high - low, 0.016, atol=0.002) and np.allclose(median, where, atol=0.002)


def test_plots_of_few_windows_and_of_equal_predictions():
    import matplotlib.pyplot as plt

    _, truth, _ = make(0)
    for n in (1, 3, 30, 120):
        fig = plot_predictions(np.full((n, 2), [1e5, 1.0]), truth[:n], SYSTEM, half_width=np.array([0.1, np.inf]))
        fig.canvas.draw()
        plt.close(fig)


def test_a_label_without_a_symbol_is_drawn_by_its_name():
    "As those of the guide to data of one's own."
    import matplotlib.pyplot as plt

    _, truth, _ = make(0)
    system = replace(SYSTEM, labels=tuple(replace(label, latex="") for label in SYSTEM.labels))
    fig = plot_predictions(truth, truth, system)
    fig.canvas.draw()
    assert [ax.get_title().split(":")[0] for ax in fig.axes[:2]] == ["Reynolds", "Schmidt"]
    plt.close(fig)


def test_plain_labels_below_zero_are_drawn():
    "The paper takes no logarithm of the Prandtl number, and a probe of it may say a negative one."
    import matplotlib.pyplot as plt

    system = resolve("rayleigh_benard", "random", preset="paper").system
    truth = np.array([[0.1, 1e6], [1.0, 1e8], [5.0, 1e10]])
    fig = plot_predictions(truth - [0.3, 0.0], truth, system, half_width=np.array([0.5, 0.5]))
    fig.canvas.draw()
    low, high = fig.axes[0].get_xlim()
    assert low < -0.2 and high > 5 and fig.axes[0].get_xscale() == "linear", "the point below zero is inside"
    plt.close(fig)

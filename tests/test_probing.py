"""Probes: known answers, selection on valid only, clipping, determinism, and intervals that keep their promise."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor

from physrep.data import LabelScaler
from physrep.probing import (
    METRICS,
    PROBES,
    AttentiveRecipe,
    Features,
    _weighted_medians,
    bootstrap_weights,
    extract,
    fit_probe,
    ridge_path,
    score,
    score_difference,
    standardiser,
    token_standardiser,
    valid_mse,
)
from physrep.systems import get_system

SYSTEM = get_system("shear_flow")
QUICK = {"attentive": {"recipe": AttentiveRecipe(epochs=3)}}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(seed: int, n_groups: int = 40, windows: int = 3, tokens: int = 6, dim: int = 16, signal: float = 1.0) -> Features:
    rng = np.random.default_rng(seed)
    u = rng.uniform(-1, 1, (n_groups, 2)).repeat(windows, 0)
    x = rng.normal(size=(len(u), tokens, dim))
    x[:, :, :2] += signal * u[:, None]
    return Features(x.astype(np.float16), 10 ** (u + [5, 0]), np.arange(n_groups).repeat(windows))


@pytest.fixture(scope="module")
def sets() -> tuple[Features, Features, Features, LabelScaler]:
    train, valid, test = (make(s) for s in range(3))
    return train, valid, test, LabelScaler.fit(SYSTEM, train.labels)


def test_ridge_path_is_scikit_learns_even_with_more_features_than_windows():
    rng = np.random.default_rng(0)
    for n, d in ((40, 7), (7, 40)):
        x, y = rng.normal(size=(n, d)), rng.normal(size=(n, 2))
        for lam, weight in zip((1e-3, 1.0), ridge_path(x, y, (1e-3, 1.0))):
            assert np.allclose(weight.T, Ridge(alpha=n * lam, fit_intercept=False).fit(x, y).coef_, atol=1e-8)


def test_ridge_without_penalty_is_the_pseudo_inverse_on_a_rank_deficient_matrix():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3)) @ rng.normal(size=(3, 9))
    y = rng.normal(size=(30, 2))
    assert np.allclose(ridge_path(x, y, (0.0,))[0], np.linalg.pinv(x) @ y)


def test_linear_probe_recovers_an_exactly_linear_label():
    train, valid, test = (make(s, tokens=1) for s in range(3))
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 2)) * 0.05

    def exact(f: Features) -> Features:
        return Features(f.tokens.float(), 10 ** (f.tokens.float().numpy()[:, 0] @ mix + [5, 0]), f.groups)

    train, valid, test = map(exact, (train, valid, test))
    scaler = LabelScaler.fit(SYSTEM, train.labels)
    probe = fit_probe("linear", train, valid, scaler)
    assert valid_mse(probe.predict_z(test), test, scaler) < 1e-3
    assert probe.chosen["lambda"] < 1e-4


def test_knn_probe_is_scikit_learns(sets):
    train, valid, test, scaler = sets
    probe = fit_probe("knn", train, valid, scaler)
    mean, scale = standardiser(train.pooled.numpy())
    reference = KNeighborsRegressor(n_neighbors=probe.chosen["k"], metric=probe.chosen["metric"], algorithm="brute")
    reference.fit((train.pooled.numpy() - mean) * scale, scaler.transform(train.labels))
    assert np.allclose(probe.predict_z(test), reference.predict((test.pooled.numpy() - mean) * scale))


def test_constant_predicts_the_training_mean_of_the_logarithm_and_scores_one_on_train(sets):
    train, valid, _, scaler = sets
    prediction = fit_probe("constant", train, valid, scaler).predict(train)
    assert np.allclose(prediction, 10 ** np.log10(train.labels).mean(0))
    rows = score(prediction, train.labels, train.groups, SYSTEM, scaler, n_bootstrap=10)
    mse = {r["label"]: r["value"] for r in rows if r["metric"] == "mse"}
    assert mse == pytest.approx({"Reynolds": 1.0, "Schmidt": 1.0, "mean": 1.0})


@pytest.mark.parametrize("name", PROBES)
def test_chosen_is_the_best_trial_on_valid_and_its_error_is_reproduced(sets, name):
    train, valid, _, scaler = sets
    probe = fit_probe(name, train, valid, scaler, **QUICK.get(name, {}))
    best = min(t["valid_mse"] for t in probe.trials)
    assert valid_mse(probe.predict_z(valid), valid, scaler) == pytest.approx(best, rel=1e-5)
    chosen = next(t for t in probe.trials if t["valid_mse"] == best)
    assert all(chosen[k] == v for k, v in probe.chosen.items())


@pytest.mark.parametrize("name", PROBES)
def test_same_seed_same_probe_and_the_global_generator_is_not_touched(sets, name):
    train, valid, test, scaler = sets
    first = fit_probe(name, train, valid, scaler, seed=1, **QUICK.get(name, {})).predict(test)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    second = fit_probe(name, train, valid, scaler, seed=1, **QUICK.get(name, {})).predict(test)
    assert np.array_equal(first, second) and torch.equal(state, torch.get_rng_state())


def test_another_seed_is_another_attentive_probe(sets):
    train, valid, test, scaler = sets
    first, second = (fit_probe("attentive", train, valid, scaler, seed=s, **QUICK["attentive"]).predict(test) for s in (0, 1))
    assert not np.allclose(first, second)


@pytest.mark.parametrize("name", PROBES)
def test_predictions_stay_in_the_range_of_train_extended_by_a_tenth(sets, name):
    train, valid, test, scaler = sets
    probe = fit_probe(name, train, valid, scaler, **QUICK.get(name, {}))
    far = Features(test.tokens.float() * 100, test.labels, test.groups)
    y, p = np.log10(train.labels), np.log10(probe.predict(far))
    margin = 0.1 * np.ptp(y, axis=0)
    assert (p >= y.min(0) - margin - 1e-9).all() and (p <= y.max(0) + margin + 1e-9).all()
    if name == "linear":
        assert np.isclose(p.max(0), y.max(0) + margin).all()


def test_a_prediction_outside_the_range_is_scored_as_if_clipped(sets):
    _, _, test, scaler = sets
    wild = np.full_like(test.labels, 1e30)
    edge = scaler.inverse(np.tile(scaler.clip(np.full((1, 2), 99.0)), (len(test), 1)))
    scores = [score(p, test.labels, test.groups, SYSTEM, scaler, n_bootstrap=5) for p in (wild, edge)]
    first, second = ([r["value"] for r in rows if r["metric"] == "mse"] for rows in scores)
    assert np.allclose(first, second)


def test_dead_features_do_not_matter(sets):
    train, valid, test, scaler = sets

    def with_dead(f: Features, value: float) -> Features:
        return Features(torch.cat([f.tokens.float(), torch.full_like(f.tokens[:, :, :8], value).float()], 2), f.labels, f.groups)

    for name in ("linear", "knn"):
        probe = fit_probe(name, with_dead(train, 0.1), with_dead(valid, 0.1), scaler)
        plain = fit_probe(name, train, valid, scaler)
        assert np.allclose(probe.predict(with_dead(test, 5.0)), plain.predict(test), rtol=1e-3)


def test_token_standardiser_matches_numpy_on_half_precision():
    tokens = (torch.randn(150, 7, 8, generator=torch.Generator().manual_seed(0)) * 3 + 20).half()
    tokens[:, :, 3] = 1.5
    mean, scale = token_standardiser(tokens)
    flat = tokens.double().flatten(0, 1).numpy()
    assert np.allclose(mean, flat.mean(0), rtol=1e-5) and scale[3] == 0
    alive = np.arange(8) != 3
    assert np.allclose(1 / scale.numpy()[alive], flat.std(0)[alive], rtol=1e-4)


def test_learning_rate_warms_up_and_ends_at_zero():
    recipe = AttentiveRecipe(lr=1.0, warmup=0.1)
    rates = [recipe.lr_at(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) == rates[9]
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_scores_against_plain_formulas(sets):
    train, valid, test, scaler = sets
    p = fit_probe("linear", train, valid, scaler).predict(test)
    rows = {(r["metric"], r["label"]): r for r in score(p, test.labels, test.groups, SYSTEM, scaler, n_bootstrap=50)}
    assert len(rows) == len(METRICS) * 3 and all(r["n"] == len(test) for r in rows.values())
    z, t = scaler.transform(p), scaler.transform(test.labels)
    for i, label in enumerate(SYSTEM.label_names):
        assert rows["mse", label]["value"] == pytest.approx(np.mean((z - t)[:, i] ** 2))
        assert rows["r2", label]["value"] == pytest.approx(1 - np.mean((z - t)[:, i] ** 2) / t[:, i].var())
        assert rows["relative_error", label]["value"] == pytest.approx(np.median(np.abs(p / test.labels - 1)[:, i]))


def test_a_bootstrap_draw_is_the_score_of_the_drawn_windows(sets):
    train, valid, test, scaler = sets
    p = fit_probe("linear", train, valid, scaler).predict(test)
    weights, index = bootstrap_weights(test.groups, 3, seed=5)
    assert (weights.sum(1) == 40).all() and (weights[0] == 1).all()
    drawn = np.concatenate([np.flatnonzero(index == g) for g, times in enumerate(weights[2]) for _ in range(times)])
    relative = np.abs(p / test.labels - 1)[:, 0]
    assert _weighted_medians(relative, weights, index)[2] == pytest.approx(np.median(relative[drawn]))
    error = (scaler.transform(p) - scaler.transform(test.labels))[:, 0] ** 2
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


def test_paired_difference_is_the_difference_and_is_narrower(sets):
    train, valid, test, scaler = sets
    a = fit_probe("linear", train, valid, scaler).predict(test)
    b = a * 1.02
    difference, first, second = score_difference(a, b, test.labels, test.groups, SYSTEM, scaler), *(
        score(p, test.labels, test.groups, SYSTEM, scaler) for p in (a, b)
    )
    for d, x, y in zip(difference, first, second):
        assert d["value"] == pytest.approx(x["value"] - y["value"], abs=1e-12)
        if d["metric"] == "mse":
            assert d["high"] - d["low"] < 0.3 * (x["high"] - x["low"])


def test_one_group_has_no_interval(sets):
    _, _, test, scaler = sets
    for row in score(test.labels, test.labels, np.zeros(len(test)), SYSTEM, scaler, n_bootstrap=5):
        assert math.isnan(row["low"]) and math.isnan(row["high"]) and math.isfinite(row["value"])


def test_errors_name_what_is_wrong(sets):
    train, valid, test, scaler = sets
    with pytest.raises(ValueError, match="unknown probe 'ridge'; valid: constant, linear, knn, attentive"):
        fit_probe("ridge", train, valid, scaler)
    with pytest.raises(ValueError, match="16 and 8 channels"):
        fit_probe("linear", train, make(1, dim=8), scaler)
    with pytest.raises(ValueError, match=r"prediction has shape \(3, 2\); 120 windows of shear_flow want \(120, 2\)"):
        score(np.ones((3, 2)), test.labels, test.groups, SYSTEM, scaler)
    with pytest.raises(ValueError, match="tokens of 1 of 120 windows are not finite, first at window 7"):
        bad = train.tokens.clone()
        bad[7, 0, 0] = torch.inf
        Features(bad, train.labels, train.groups)
    with pytest.raises(ValueError, match="no batches"):
        extract(torch.nn.Identity(), [], progress=False)


def test_extract_takes_no_gradient_and_uses_evaluation_mode():
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            return self.drop(x.flatten(2).transpose(1, 2)) * self.scale

    encoder, x = Encoder().train(), torch.randn(4, 3, 2, 2, 2)
    tokens = extract(encoder, ({"fields": part} for part in x.split(3)), dtype=torch.float32, progress=False)
    assert torch.equal(tokens, x.flatten(2).transpose(1, 2)) and encoder.training and not tokens.requires_grad

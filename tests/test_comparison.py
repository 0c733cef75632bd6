"""Comparison: the seeds of a method, intervals over flows and seeds, paired differences, and predictions in a CSV."""

import numpy as np
import pandas as pd
import pytest

from physrep.data.scaling import LabelScaler
from physrep.physics.systems import Label, System, get_system
from physrep.probing.records import read_predictions, write_predictions
from physrep.probing.scores import difference_seeds, score
from physrep.results.claims import claims_table, holm, plot_claims, read_claims
from physrep.results.comparison import SUMMARY, compare_predictions, differences, error_ratio, read_methods, summarise
from physrep.results.rows import make_study

SHEAR = get_system("shear_flow")
SCALER = LabelScaler.fit(SHEAR, np.array([(re, sc) for re in (400.0, 3200.0) for sc in (0.25, 2.0)]))
GROUPS = np.repeat(np.arange(20), 3)
TRUTH = np.column_stack([np.geomspace(400, 3200, 20), np.tile([0.25, 2.0], 10)])[GROUPS]


def run(folder, objective="jepa", encoder="convnext", seed=0, error=0.5, probes=("linear",), splits=("test",), **about):
    "A run folder with made-up predictions."
    rng = np.random.default_rng([len(objective), len(encoder), seed, int(100 * error)])
    tag, truth, groups = about.pop("tag", "0123abcd"), about.pop("truth", TRUTH), about.pop("groups", GROUPS)
    about = dict(system="shear_flow", scaler=SCALER, labelled_flows=256) | about
    z = about["scaler"].transform(truth)
    noisy = {(p, s): about["scaler"].inverse(z + error * rng.normal(size=z.shape)) for p in probes for s in splits}
    where = folder / (f"{objective}-{encoder}-{tag}/seed{seed}" if encoder != "none" else objective)
    about |= dict(objective=objective, encoder=encoder, seed=seed)
    labels, flows = dict.fromkeys(splits, truth), dict.fromkeys(splits, groups)
    return write_predictions(where / "predictions.safetensors", noisy, labels, flows, **about).parent


def test_runs_that_differ_in_the_seed_are_one_method(tmp_path):
    folders = [run(tmp_path, seed=k) for k in (2, 0, 1)]
    run(tmp_path, tag="89abcdef")
    a, b = read_methods(tmp_path)
    assert (a.name, b.name) == ("jepa-convnext-0123abcd", "jepa-convnext-89abcdef")
    last = read_predictions(folders[0]).predictions["linear", "test"]
    np.testing.assert_array_equal(a.seeds("linear", "test")[2], last)
    twice = run(tmp_path / "copy", seed=1)
    with pytest.raises(ValueError, match="both have seed 1") as error:
        read_methods(tmp_path)
    assert str(twice) in str(error.value) and str(folders[2]) in str(error.value)


def test_summary_of_one_seed_is_its_score_and_of_several_is_wider_where_they_differ(tmp_path):
    one = run(tmp_path)
    expected = score(read_predictions(one).predictions["linear", "test"], TRUTH, GROUPS, SHEAR, SCALER)
    summary = summarise(one)
    assert list(summary) == list(SUMMARY) and summary.spread.isna().all() and (summary.seeds == 1).all()
    for column in ("label", "metric", "value", "low", "high", "n"):
        assert summary[column].tolist() == [row[column] for row in expected]
    run(tmp_path, seed=1, error=1.5)
    [mse] = summarise(tmp_path).query("metric == 'mse' and label == 'mean'").itertuples()
    assert mse.value == pytest.approx(np.mean(mse.by_seed)) and mse.spread == pytest.approx(np.std(mse.by_seed, ddof=1))
    assert mse.low < min(mse.by_seed) * 1.3 and mse.high > max(mse.by_seed) * 0.7, "either seed may be drawn twice"


def test_difference_of_single_seeds_is_the_paired_difference(tmp_path):
    a, b = (
        run(tmp_path, probes=("linear", "attentive")),
        run(tmp_path, "mae", "vit", error=0.8, probes=("linear", "knn")),
    )
    found = compare_predictions(a, b)
    assert set(found.probe) == {"linear"}, "what both have"
    both = [[read_predictions(r).predictions["linear", "test"]] for r in (a, b)]
    expected = difference_seeds(*both, TRUTH, GROUPS, SHEAR, SCALER)
    assert found.difference.tolist() == [row["value"] for row in expected]
    assert found.low.tolist() == [row["low"] for row in expected]
    assert np.allclose(found.a - found.b, found.difference)
    assert set(compare_predictions(a, b, probe=("attentive", "knn"), metric="mse").probe) == {"attentive - knn"}


def test_seeds_are_paired_where_both_have_the_same(tmp_path):
    ours = [run(tmp_path, seed=k, error=0.2 * (k + 1)) for k in (0, 1)]
    same = [run(tmp_path, "mae", "vit", seed=k, error=0.3 * (k + 1)) for k in (0, 1)]
    other = [run(tmp_path, "random", "vit", seed=k) for k in (1, 2)]

    def mean_of(*places):
        [found] = compare_predictions(*places, metric="mse", n_bootstrap=5).query("label == 'mean'").itertuples()
        return found

    values = [mean_of(a, b).difference for a, b in zip(ours, same)]
    assert mean_of(ours, same).by_seed == pytest.approx(values)
    minus_mean = [mean_of(a, other).difference for a in ours]
    assert mean_of(ours, other).by_seed == pytest.approx(minus_mean)


def test_a_ratio_of_errors_is_that_of_their_means(tmp_path):
    places = (("jepa", 0.3), ("mae", 0.6))
    ours, theirs = ([run(tmp_path, name, seed=k, error=e) for k in range(4)] for name, e in places)
    found = error_ratio(ours, theirs, "linear")
    assert found["low"] < found["value"] < found["high"] < 1 and found["value"] < 0.5
    assert np.exp(np.log(found["by_seed"]).mean()) == pytest.approx(found["value"]) and found["p"] < 0.01
    again = error_ratio(ours, theirs, "linear", over=(theirs, ours))
    assert again["value"] == pytest.approx(found["value"] ** 2), "each over the other once more"
    assert error_ratio(ours, ours, "linear")["p"] == 1


def test_claims_are_decided_by_three_seeds_on_one_side_after_the_correction(tmp_path):
    study = make_study("laptop", systems="shear_flow", only="all", seeds="1 2", length=16, run_dir=tmp_path)
    rows = {row.name: row for row in study.rows}
    errors = {"jepa-vit": (0.3, 0.3, 0.3), "mae-vit": (0.9, 0.9, 0.9), "vicreg-vit": (0.3, 0.3, 0.27)}
    errors |= {"forecast-vit": (0.4,), "spectra": (0.05,)}
    for name, by_seed in errors.items():
        row = rows.get(name) or next(row for row in study.rows if row.objective == name)
        for seed, error in enumerate(by_seed):
            folder = study.folders(row, "shear_flow")[0]
            folder = folder if row.encoder == "none" else folder.parent / f"seed{seed}"
            about = dict(seed=seed, probes=("attentive", "kernel"), splits=("valid", "test"), error=error)
            written = run(tmp_path / name, *row.key, **about)
            folder.parent.mkdir(parents=True, exist_ok=True)
            (written / "result.json").touch()
            written.rename(folder)
    table = claims_table(study)
    found = {(line.first, line.second): line for line in table.itertuples(index=False)}
    assert found["jepa-vit", "mae-vit"].finding == "lower" and found["jepa-vit", "vicreg-vit"].finding == "undecided"
    assert found["forecast-vit", "mae-vit"].finding == "exploratory"
    assert found["vicreg-vit", "spectra"].finding == "higher", "the best on valid, against one without seeds"
    assert len(table) == 4 and plot_claims(table).axes
    assert table.corrected.min() == pytest.approx(27 * table.p.min()), "claims without a result count, too"
    assert (table.corrected >= table.p).all() and holm([0.01, 0.04, 0.03]).tolist() == [0.03, 0.06, 0.06]
    assert claims_table(make_study("laptop", systems="shear_flow", only="all", run_dir=tmp_path)).empty


def test_a_claim_of_an_unknown_row_is_refused(tmp_path):
    text = "{length: 1, split: test, seeds: 3, level: 0.05, claims: [{first: jepa, second: mae-vit, probe: kernel}]}"
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(ValueError, match="claims.yaml: a claim has .*'first': 'jepa'.*; valid are first: .*jepa-vit"):
        read_claims(tmp_path / "claims.yaml")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"truth": TRUTH[:-3], "groups": GROUPS[:-3]}, "not scored on the same windows"),
        ({"truth": TRUTH[::-1]}, "not scored on the same windows"),
        ({"scaler": LabelScaler.fit(SHEAR, TRUTH[3:])}, "scale their labels differently"),
        ({"data": {"test": "00bb"}}, "not scored on the same fields of split 'test'"),
        ({"probes": ("knn",)}, "no probe in common"),
        ({"splits": ("valid",)}, "no split 'test'; it has valid"),
    ],
)
def test_what_cannot_be_compared_is_refused_naming_both(tmp_path, about, message):
    a, b = run(tmp_path / "a", data={"test": "00aa"}), run(tmp_path / "b", "mae", "vit", **about)
    with pytest.raises(ValueError, match=message) as error:
        compare_predictions(a, b)
    assert "mae-vit-0123abcd" in str(error.value)


def test_differences_find_the_counterparts(tmp_path):
    for objective, encoder, probes in [
        ("jepa", "convnext", ("linear", "finetune")),
        ("random", "convnext", ("linear",)),
        ("random", "vit", ("linear",)),
        ("statistics", "none", ("linear", "kernel")),
        ("equations", "none", ("oracle",)),
    ]:
        for seed in range(2 if encoder != "none" else 1):
            splits = ("test", "valid")
            run(tmp_path, objective, encoder, seed, 0.3 if objective == "jepa" else 0.6, probes, splits)
    found = differences(tmp_path, n_bootstrap=100)
    best = found[found.reference == "statistics"].reference_probe.iloc[0]  # the better one on valid
    pairs = {(r.objective, r.encoder, r.probe, r.reference, r.reference_probe) for r in found.itertuples()}
    assert pairs == {
        ("jepa", "convnext", "linear", "random", "linear"),
        ("jepa", "convnext", "linear", "statistics", best),
        ("jepa", "convnext", "finetune", "statistics", best),
        ("random", "convnext", "linear", "statistics", best),
        ("random", "vit", "linear", "statistics", best),
        ("equations", "none", "oracle", "statistics", best),
    }
    with pytest.raises(ValueError, match="nothing to compare with.*objectives here: jepa"):
        differences([tmp_path / "jepa-convnext-0123abcd"])


def test_few_labelled_flows_are_methods_of_their_own(tmp_path):
    for flows, draw in ((256, 0), (16, 0), (16, 1)):
        for objective in ("jepa", "random"):
            run(tmp_path / f"{flows}-{draw}", objective, labelled_flows=flows, draw=draw, error=0.3 + 0.1 * draw)
    found = differences(tmp_path, references=["random"], n_bootstrap=20).query("label == 'mean'")
    assert list(zip(found.labelled_flows, found.draw)) == [(16, 0), (16, 1), (256, 0)], "each is compared with its like"


def test_predictions_of_a_system_of_ones_own(tmp_path):
    labels = (Label("length", log=True, paper_log=True), Label("drag", log=False, paper_log=False))
    own = System(name="pendulum", title="Pendulum", fields=(), labels=labels)
    folders = [run(tmp_path, name, scaler=LabelScaler.fit(own, TRUTH), system="pendulum") for name in ("jepa", "mae")]
    assert read_predictions(folders[0]).scaler.system == own
    assert set(summarise(folders[0]).label) == {"length", "drag", "mean"}
    assert len(compare_predictions(*folders, metric="mse")) == 3
    assert isinstance(summarise(tmp_path), pd.DataFrame)

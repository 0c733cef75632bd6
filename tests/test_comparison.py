"""Comparison: predictions files, the seeds of a method, intervals over flows and seeds, paired differences."""

import json

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from physrep.data.scaling import LabelScaler
from physrep.physics.systems import Label, System, get_system
from physrep.probing.records import read_predictions, write_predictions
from physrep.probing.scores import score, score_difference
from physrep.results.comparison import compare, differences, read_methods, summarise
from physrep.results.table import SUMMARY

SCALER = LabelScaler.fit(get_system("shear_flow"), np.array([(re, sc) for re in (400.0, 3200.0) for sc in (0.25, 2.0)]))
GROUPS = np.repeat(np.arange(20), 3)
TRUTH = np.column_stack([np.geomspace(400, 3200, 20), np.tile([0.25, 2.0], 10)])[GROUPS]


def run(
    folder,
    objective="jepa",
    encoder="convnext",
    seed=0,
    error=0.5,
    probes=("linear",),
    truth=TRUTH,
    groups=GROUPS,
    scaler=SCALER,
    system="shear_flow",
    tag="0123abcd",
    **extra,
):
    "A run folder with made-up predictions of its test split."
    rng = np.random.default_rng([len(objective), len(encoder), seed, int(100 * error)])
    z = SCALER.transform(TRUTH)
    predictions = {
        (p, "test"): SCALER.inverse(SCALER.clip(z + error * rng.normal(size=z.shape)))[: len(truth)] for p in probes
    }
    where = folder / (f"{objective}-{encoder}-{tag}/seed{seed}" if encoder != "none" else objective)
    about = (
        dict(system=system, objective=objective, encoder=encoder, seed=seed, scaler=scaler, labelled_flows=256) | extra
    )
    return write_predictions(
        where / "predictions.safetensors", predictions, {"test": truth, "train": truth}, {"test": groups}, **about
    ).parent


def test_other_seeds_are_no_pairs(tmp_path):
    places = [[run(tmp_path, name, seed=k) for k in seeds] for name, seeds in (("jepa", (0, 1)), ("mae", (1, 2)))]
    asked = dict(metric="mse", n_bootstrap=5)
    (found,) = compare(*places, **asked).query("label == 'mean'").itertuples()
    one, other = (compare(places[0][k], places[1], **asked).query("label == 'mean'").difference.item() for k in (0, 1))
    assert found.by_seed == pytest.approx((one, other)), "minus the mean of the other's seeds"


def test_predictions_are_read_back_as_written(tmp_path):
    folder = run(tmp_path, probes=("linear", "knn"), chosen={"linear": {"lambda": 0.1}})
    assert [p.name for p in folder.iterdir()] == ["predictions.safetensors"]
    p = read_predictions(folder)
    assert set(p.predictions) == {("linear", "test"), ("knn", "test")} and list(p.truth) == ["test"], (
        "truth without predictions is not kept"
    )
    np.testing.assert_array_equal(p.truth["test"], TRUTH)
    np.testing.assert_array_equal(p.groups["test"], GROUPS)
    assert (
        p.info["run"] == "jepa-convnext-0123abcd/seed0"
        and (p.info["labelled_flows"], p.info["draw"]) == (256, 0)
        and p.info["chosen"] == {"linear": {"lambda": 0.1}}
    )
    np.testing.assert_array_equal(p.scaler.transform(TRUTH), SCALER.transform(TRUTH))
    assert read_predictions(run(tmp_path, "constant", "none")).info["run"] == "constant"
    assert read_predictions(run(tmp_path, run="elsewhere/seed3/finetune")).info["run"] == "elsewhere/seed3/finetune"


def test_label_transforms_travel_with_the_predictions(tmp_path):
    from dataclasses import replace

    system = get_system("shear_flow")
    paper = replace(system, labels=tuple(replace(label, log=label.paper_log) for label in system.labels))
    folder = run(tmp_path, scaler=LabelScaler.fit(paper, TRUTH))
    assert [label.log for label in read_predictions(folder).scaler.system.labels] == [True, False]
    with pytest.raises(ValueError, match="scale their labels differently"):
        compare(folder, run(tmp_path, "mae", "vit"))


def test_torn_and_foreign_prediction_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no predictions at"):
        read_predictions(tmp_path)
    path = run(tmp_path) / "predictions.safetensors"
    whole = path.read_bytes()
    for torn in (whole[:100], whole[:-1], b"", b"no safetensors at all"):
        path.write_bytes(torn)
        with pytest.raises(ValueError, match="torn") as error:
            read_predictions(path)
        assert str(path) in str(error.value)
    for metadata in (
        None,
        {"physrep": "{"},
        {"physrep": "[]"},
        {"physrep": '{"kind": "physrep predictions"}'},
        {"physrep": '{"name": "vit"}'},
    ):
        save_file({"truth/test": TRUTH}, path, metadata=metadata)
        with pytest.raises(ValueError, match="not a predictions file|torn") as error:
            read_predictions(path)
        assert str(path) in str(error.value)


def test_predictions_that_do_not_fit_are_not_written(tmp_path):
    path, good = tmp_path / "predictions.safetensors", {("linear", "test"): TRUTH}
    about = dict(system="shear_flow", objective="jepa", encoder="vit", seed=0, scaler=SCALER, labelled_flows=256)
    for predictions, truth, groups, message in [
        ({}, {"test": TRUTH}, {"test": GROUPS}, "no predictions"),
        (good, {}, {"test": GROUPS}, "no truth"),
        (good, {"test": TRUTH}, {}, "no groups"),
        ({("linear", "test"): TRUTH[1:]}, {"test": TRUTH}, {"test": GROUPS}, "has shape"),
        (good, {"test": TRUTH[:, :1]}, {"test": GROUPS}, "has shape"),
        ({("linear", "test"): TRUTH * np.nan}, {"test": TRUTH}, {"test": GROUPS}, "not finite"),
        ({("a/b", "test"): TRUTH}, {"test": TRUTH}, {"test": GROUPS}, "'a/b'"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            write_predictions(path, predictions, truth, groups, **about)
        assert str(path) in str(error.value) and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="scaler is of shear_flow, the predictions are of active_matter"):
        write_predictions(path, good, {"test": TRUTH}, {"test": GROUPS}, **about | {"system": "active_matter"})


def test_runs_that_differ_in_the_seed_are_one_method(tmp_path):
    folders = [run(tmp_path, seed=k) for k in (2, 0, 1)]
    write_predictions(
        folders[0] / "finetune" / "predictions.safetensors",
        {("finetune", "test"): TRUTH},
        {"test": TRUTH},
        {"test": GROUPS},
        system="shear_flow",
        objective="jepa",
        encoder="convnext",
        seed=2,
        scaler=SCALER,
        labelled_flows=256,
        run="jepa-convnext-0123abcd/seed2/finetune",
    )
    run(tmp_path, tag="89abcdef")
    a, b = read_methods(tmp_path)
    assert (a.name, b.name) == ("jepa-convnext-0123abcd", "jepa-convnext-89abcdef") and a.probes("test") == [
        "linear",
        "finetune",
    ]
    assert len(a.seeds("linear", "test")) == 3 and len(a.seeds("finetune", "test")) == 1
    np.testing.assert_array_equal(
        a.seeds("linear", "test")[2], read_predictions(folders[0]).predictions["linear", "test"]
    )  # in the order of seeds
    assert [m.name for m in read_methods([folders[0], folders[0] / "predictions.safetensors"])] == [a.name], (
        "a file is read once"
    )
    twice = run(tmp_path / "copy", seed=1)
    with pytest.raises(ValueError, match="both have seed 1") as error:
        read_methods(tmp_path)
    assert str(twice) in str(error.value) and str(folders[2]) in str(error.value)


def test_seeds_scored_on_other_windows_are_refused(tmp_path):
    run(tmp_path)
    other = run(tmp_path, seed=1, truth=TRUTH[:-3], groups=GROUPS[:-3])
    with pytest.raises(ValueError, match="not scored on the same windows of split 'test'") as error:
        summarise(tmp_path)
    assert str(other) in str(error.value)


def test_summary_of_one_seed_is_its_score_and_of_several_is_wider_where_they_differ(tmp_path):
    one = run(tmp_path)
    p = read_predictions(one)
    expected = score(p.predictions["linear", "test"], TRUTH, GROUPS, SCALER.system, SCALER)
    summary = summarise(one)
    assert list(summary) == list(SUMMARY) and summary.spread.isna().all() and (summary.seeds == 1).all()
    for column in ("label", "metric", "value", "low", "high", "n"):
        assert summary[column].tolist() == [row[column] for row in expected]
    run(tmp_path, seed=1, error=1.5)
    both = summarise(tmp_path)
    mse = both[(both.metric == "mse") & (both.label == "mean")].iloc[0]
    assert (
        mse.value == pytest.approx(np.mean(mse.by_seed))
        and mse.spread == pytest.approx(np.std(mse.by_seed, ddof=1))
        and mse.run == "jepa-convnext-0123abcd"
    )
    assert mse.low < min(mse.by_seed) * 1.3 and mse.high > max(mse.by_seed) * 0.7, "either seed may be drawn twice"
    pd.testing.assert_frame_equal(both, summarise(read_methods(tmp_path)))


def test_difference_of_single_seeds_is_the_paired_difference(tmp_path):
    a, b = (
        run(tmp_path, probes=("linear", "attentive")),
        run(tmp_path, "mae", "vit", error=0.8, probes=("linear", "knn")),
    )
    found = compare(a, b)
    assert set(found.probe) == {"linear"}, "what both have" and set(found["first"]) == {"jepa-convnext-0123abcd"}
    expected = score_difference(
        *(read_predictions(r).predictions["linear", "test"] for r in (a, b)), TRUTH, GROUPS, SCALER.system, SCALER
    )
    for column, name in {
        "difference": "value",
        "low": "low",
        "high": "high",
        "label": "label",
        "metric": "metric",
        "n": "n",
    }.items():
        assert found[column].tolist() == [row[name] for row in expected]
    assert np.allclose(found.a - found.b, found.difference)
    crossed = compare(a, b, probe=("attentive", "knn"), metric="mse")
    assert set(crossed.probe) == {"attentive - knn"} and len(crossed) == 3
    three = compare(a, b, run(tmp_path, "random", "vit"), metric="mse", probe="linear")
    pairs = [tuple(name.split("-")[0] for name in pair) for pair in dict.fromkeys(zip(three["first"], three["second"]))]
    assert pairs == [("jepa", "mae"), ("jepa", "random"), ("mae", "random")]


def test_what_cannot_be_compared_is_refused_naming_both(tmp_path):
    a = run(tmp_path / "a")
    for b, message in [
        (run(tmp_path / "b", "mae", "vit", truth=TRUTH[:-3], groups=GROUPS[:-3]), "not scored on the same windows"),
        (run(tmp_path / "c", "mae", "vit", truth=TRUTH[::-1]), "not scored on the same windows"),
        (
            run(tmp_path / "d", "mae", "vit", scaler=LabelScaler.fit(SCALER.system, TRUTH[3:])),
            "scale their labels differently",
        ),
        (
            run(
                tmp_path / "e",
                "mae",
                "vit",
                system="rayleigh_benard",
                scaler=LabelScaler.fit(get_system("rayleigh_benard"), TRUTH),
            ),
            "of shear_flow, mae-vit-0123abcd of rayleigh_benard",
        ),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            compare(a, b)
        assert "jepa-convnext-0123abcd" in str(error.value) and "mae-vit-0123abcd" in str(error.value)
    b = run(tmp_path / "f", "mae", "vit", probes=("knn",))
    for options, message in [
        ({}, "no probe in common"),
        ({"probe": "linear"}, "mae-vit-0123abcd has knn"),
        ({"split": "valid"}, "no split 'valid'; it has test"),
        ({"metric": "rmse"}, "unknown metric 'rmse'"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(a, b, **options)
    with pytest.raises(ValueError, match="at least two"):
        compare(a)
    with pytest.raises(ValueError, match="holds 2 methods .jepa-convnext-0123abcd, mae-vit-0123abcd."):
        compare([a, b], a)


def test_runs_on_other_fields_are_refused_where_both_say_so(tmp_path):
    silent, a = run(tmp_path / "a", data=None), run(tmp_path / "a", seed=1, data={"test": "00aa", "train": "00cc"})
    assert read_predictions(silent).data == {} and read_predictions(a).data == {"test": "00aa"}, (
        "of the splits that have predictions"
    )
    [m] = read_methods(tmp_path / "a")
    assert m.data == {"test": "00aa"}
    for same in (
        run(tmp_path / "b", "mae", "vit"),
        run(tmp_path / "c", "mae", "vit", data={"test": "00aa"}),
        run(tmp_path / "d", "mae", "vit", data={"valid": "00dd"}),
    ):
        assert len(compare(m, same)) == len(compare(silent, same))
    with pytest.raises(
        ValueError,
        match="jepa-convnext-0123abcd and mae-vit-0123abcd were not scored on the same fields of split 'test'",
    ):
        compare(m, run(tmp_path / "e", "mae", "vit", data={"test": "00bb"}))
    other = run(tmp_path / "a", seed=2, data={"test": "00bb"})
    with pytest.raises(ValueError, match="same fields of split 'test': fingerprints 00bb and 00aa") as error:
        read_methods([silent, a, other])
    assert str(a) in str(error.value) and str(other) in str(error.value)


def test_differences_of_each_seed(tmp_path):
    for objective, seeds in {"jepa": 3, "mae": 3, "random": 2}.items():
        for k in range(seeds):
            run(tmp_path / objective, objective, seed=k, error=0.2 * (k + 1) + 0.1 * (objective == "mae"))
    value = {
        m: [
            summarise(tmp_path / m / f"{m}-convnext-0123abcd/seed{k}")
            .query("label == 'mean' and metric == 'mse'")
            .value.item()
            for k in range(n)
        ]
        for m, n in {"jepa": 3, "mae": 3, "random": 2}.items()
    }
    paired = compare(tmp_path / "jepa", tmp_path / "mae", metric="mse").query("label == 'mean'").iloc[0]
    assert paired.by_seed == pytest.approx(np.subtract(value["jepa"], value["mae"])) and np.mean(
        paired.by_seed
    ) == pytest.approx(paired.difference)
    other = differences(tmp_path, references=["random"]).query("objective == 'jepa' and label == 'mean'").iloc[0]
    assert other.by_seed == pytest.approx(np.subtract(value["jepa"], np.mean(value["random"]))) and np.mean(
        other.by_seed
    ) == pytest.approx(other.difference)


def test_differences_find_the_counterparts(tmp_path):
    for objective, encoder, probes in [
        ("jepa", "convnext", ("linear", "finetune")),
        ("random", "convnext", ("linear",)),
        ("random", "vit", ("linear",)),
        ("statistics", "none", ("linear",)),
        ("equations", "none", ("oracle",)),
        ("constant", "none", ("constant",)),
    ]:
        for seed in range(4 if encoder != "none" else 1):
            run(tmp_path, objective, encoder, seed=seed, error=0.3 if objective == "jepa" else 0.6, probes=probes)
    df = differences(tmp_path, n_bootstrap=200)
    pairs = {(r.objective, r.encoder, r.probe, r.reference_run, r.reference_probe) for r in df.itertuples()}
    assert pairs == {
        ("jepa", "convnext", "linear", "random-convnext-0123abcd", "linear"),
        ("jepa", "convnext", "linear", "statistics", "linear"),
        ("jepa", "convnext", "finetune", "statistics", "linear"),
        ("random", "convnext", "linear", "statistics", "linear"),
        ("random", "vit", "linear", "statistics", "linear"),
        ("equations", "none", "oracle", "statistics", "linear"),
    }
    assert (
        set(df.label) == {"Reynolds", "Schmidt", "mean"}
        and df.text.str.fullmatch(r"-?\d\.\d\d \[-?\d\.\d\d, -?\d\.\d\d\]").all()
    )
    row = df[(df.objective == "jepa") & (df.reference == "random") & (df.label == "mean")].iloc[0]
    assert row.high < 0 and (row.seeds_a, row.seeds_b) == (4, 4)
    run(tmp_path, "random", "vit", tag="89abcdef")
    run(tmp_path, "mae", "vit")
    with pytest.raises(ValueError, match="several rows of 'random'.*89abcdef"):
        differences(tmp_path)
    with pytest.raises(ValueError, match="nothing to compare with.*objectives here: jepa"):
        differences([tmp_path / "jepa-convnext-0123abcd"])


def test_a_control_is_compared_with_by_the_probe_that_is_best_on_valid(tmp_path):
    rng = np.random.default_rng(0)
    errors = {
        "linear": {"valid": 0.5, "test": 0.1},
        "knn": {"valid": 0.9, "test": 0.9},
        "kernel": dict(valid=0.2, test=0.4),
    }
    z = SCALER.transform(TRUTH)
    predictions = {
        (probe, split): SCALER.inverse(SCALER.clip(z + error * rng.normal(size=z.shape)))
        for probe, by in errors.items()
        for split, error in by.items()
    }
    truths = dict.fromkeys(("valid", "test"), TRUTH)
    about = {"system": "shear_flow", "objective": "spectra", "encoder": "none", "seed": 0, "labelled_flows": 256}
    path = tmp_path / "spectra" / "predictions.safetensors"
    groups = dict.fromkeys(truths, GROUPS)
    write_predictions(path, predictions, truths, groups, scaler=SCALER, **about, run="spectra")
    run(tmp_path, "jepa", "convnext", probes=("linear", "attentive"))
    df = differences(tmp_path, n_bootstrap=50)
    assert {(r.probe, r.reference_probe) for r in df.itertuples()} == {("linear", "kernel"), ("attentive", "kernel")}
    only_test = {k: v for k, v in predictions.items() if k[1] == "test"}
    write_predictions(path, only_test, {"test": TRUTH}, {"test": GROUPS}, scaler=SCALER, **about, run="spectra")
    with pytest.raises(ValueError, match="spectra has no predictions on valid of linear, knn, kernel, so none"):
        differences(tmp_path)


def test_summaries_of_a_whole_table_take_seconds(tmp_path):
    "20 methods with four probes and two splits of 288 windows take below 60 s on one core; here a tenth of them."
    import time

    groups, truth = np.repeat(np.arange(96), 3), np.tile(TRUTH[::3], (20, 1))[:288]
    z = SCALER.transform(truth)
    for seed in range(3):
        predictions = {
            (f"p{k}", split): SCALER.inverse(SCALER.clip(z + np.random.default_rng([seed, k]).normal(size=z.shape)))
            for k in range(8)
            for split in ("test", "valid")
        }
        where = tmp_path / f"jepa-vit-0123abcd/seed{seed}/predictions.safetensors"
        write_predictions(
            where,
            predictions,
            dict(test=truth, valid=truth),
            dict(test=groups, valid=groups),
            system="shear_flow",
            objective="jepa",
            encoder="vit",
            seed=seed,
            scaler=SCALER,
            labelled_flows=256,
        )
    started = time.process_time()
    summarise(tmp_path)
    assert time.process_time() - started < 6


def test_few_labelled_flows_are_methods_of_their_own(tmp_path):
    for flows, draw in ((256, 0), (16, 0), (16, 1)):
        for objective in ("jepa", "random"):
            run(tmp_path / f"{flows}-{draw}", objective, labelled_flows=flows, draw=draw, error=0.3 + 0.1 * draw)
    methods = read_methods(tmp_path)
    assert [(m.objective, m.labelled_flows, m.draw) for m in methods] == [
        (objective, *task) for objective in ("jepa", "random") for task in ((16, 0), (16, 1), (256, 0))
    ]
    df = differences(tmp_path, references=["random"], n_bootstrap=100).query("label == 'mean'")
    assert list(zip(df.labelled_flows, df.draw)) == [(16, 0), (16, 1), (256, 0)], "each is compared with its like"
    with pytest.raises(ValueError, match="labelled_flows must be at least 1 and draw at least 0, got 0, 0"):
        run(tmp_path, labelled_flows=0)


def test_predictions_of_a_system_of_ones_own(tmp_path):
    labels = (Label("length", log=True, paper_log=True), Label("drag", log=False, paper_log=False))
    own = System(name="pendulum", title="Pendulum", fields=(), labels=labels)
    folder = run(tmp_path, scaler=LabelScaler.fit(own, TRUTH), system="pendulum")
    p = read_predictions(folder)
    assert p.scaler.system == own and p.info["system"] == "pendulum"
    assert set(summarise(folder).label) == {"length", "drag", "mean"}
    run(tmp_path, "mae", "vit", scaler=LabelScaler.fit(own, TRUTH), system="pendulum")
    assert len(compare(folder, tmp_path / "mae-vit-0123abcd", metric="mse")) == 3


def test_predictions_of_the_first_version_are_refused_by_name(tmp_path):
    path = run(tmp_path) / "predictions.safetensors"
    with safe_open(path, "np") as f:
        info = json.loads(f.metadata()["physrep"])
        arrays = {name: f.get_tensor(name) for name in f.keys()}
    info = {k: v for k, v in info.items() if k not in ("labelled_flows", "draw")} | {"share": 1.0}
    save_file(arrays, path, metadata={"physrep": json.dumps(info)})
    with pytest.raises(
        ValueError, match="not a predictions file of physrep 0.2.*'share'.*probe the run again"
    ) as error:
        read_predictions(path)
    assert str(path) in str(error.value)

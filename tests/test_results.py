"""The results table: schema, whole files, seeds put together, Table 1 with gaps, the paper's numbers."""

import json
import math
import os

import numpy as np
import pandas as pd
import pytest
from helpers import gappy, row

from physrep.probing.records import SCHEMA, read_results, write_result
from physrep.results.table import PAPER, over_seeds, table1, two_digits, with_all_flows


def test_what_is_written_is_read_back_with_its_types(tmp_path):
    rows = [
        row(),
        row(label="Reynolds", low=math.nan, high=None, value=np.float32(1), n=np.int64(7)),
        row(metric="r2", value=math.nan),
        row(metric="relative_error", value=math.nan, low=math.nan, high=math.nan),  # of a label that is 0 somewhere
    ]
    path = write_result(tmp_path / "a" / "seed0" / "result.json", rows, config={"lr": 0.1})
    content = json.loads(path.read_text())
    assert content["config"] == {"lr": 0.1} and content["rows"][1]["low"] is None and "NaN" not in path.read_text()
    df = read_results(tmp_path)
    assert list(df) == list(SCHEMA) and df.value[:2].tolist() == [0.5, 1.0] and df.value[2:].isna().all()
    assert df.low.isna().tolist() == [False, True, False, True] and df.seed.dtype.kind == df.n.dtype.kind == "i"
    pd.testing.assert_frame_equal(df, read_results([path, tmp_path, str(path)]))  # a file is read once


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(value=None), "'value' of mse must be finite, got nan"),
        (row(value=math.inf), "'value' of mse must be finite, got inf"),
        (row(value=True), "'value' must be float, got True"),
        (row(value=-0.1), "'value' of mse cannot be negative"),
        (row(seed=0.5), "'seed' must be int, got 0.5"),
        (row(split=""), "'split' must be a non-empty str, got ''"),
        (row(draw=-1), "'draw' must be at least 0, got -1"),
        (row(label="Prandtl"), "'label' is 'Prandtl'; valid: Reynolds, Schmidt, mean"),
        (row(metric="rmse"), "'metric' is 'rmse'; valid: mse"),
        (row(labelled_flows=0), "'labelled_flows' must be at least 1, got 0"),
        (row(labelled_flows=1.0), "'labelled_flows' must be int, got 1.0"),
        (row(share=1.0), "'share' unknown"),
        (row(n=0), "'n' must be at least 1"),
        (row(low=0.7), "'low' and 'high' must be an interval"),
        (row(high=None), "'low' and 'high' must be an interval"),
        (row(accuracy=1.0), "'accuracy' unknown"),
        ({k: v for k, v in row().items() if k not in ("n", "run")}, "'n', 'run' missing"),
        ([1], "a row must be a dict"),
    ],
)
def test_rows_outside_the_schema_are_refused_on_writing_and_on_reading(tmp_path, bad, message):
    path = tmp_path / "result.json"
    with pytest.raises(ValueError, match=f"result.json is not written: row 1: {message}"):
        write_result(path, [row(label="Schmidt"), bad])
    assert list(tmp_path.iterdir()) == []
    path.write_text(json.dumps({"rows": [bad]}))
    with pytest.raises(ValueError, match=f"result.json is not a result: row 0: {message}"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "'rows' must be a list"),
        ('{"loss": 1}', "'rows' must be a list"),
        ('{"rows": []}', "at least one row"),
    ],
)
def test_broken_and_foreign_files_are_errors_that_name_the_file(tmp_path, text, message):
    write_result(tmp_path / "good" / "result.json", [row()])
    bad = tmp_path / "bad" / "result.json"
    bad.parent.mkdir()
    bad.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_results(tmp_path)
    assert str(bad) in str(error.value)


def test_nothing_there_is_not_an_empty_table(tmp_path):
    for where in (tmp_path, [], [tmp_path], tmp_path / "none"):
        with pytest.raises(FileNotFoundError):
            read_results(where)


def test_a_row_is_there_once(tmp_path):
    with pytest.raises(ValueError, match="row 1: same as row 0"):
        write_result(tmp_path / "result.json", [row(), row(value=0.1)])
    for name in "ab":
        write_result(tmp_path / name / "result.json", [row(), row(label="Schmidt")])
    with pytest.raises(ValueError, match="both have the row") as error:
        read_results(tmp_path)
    assert all(str(tmp_path / name / "result.json") in str(error.value) for name in "ab")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_result(tmp_path / "result.json", [row()])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_result(path, [row(value=0.1)], config={"what": object()})  # no JSON
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_result(path, [row(value=0.1)])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_seeds_are_averaged_and_two_runs_of_one_seed_are_not():
    df = pd.DataFrame([row(), row(seed=1, value=0.7, low=0.6, high=0.8, run="jepa-convnext/seed1")])
    s = over_seeds(df).iloc[0]
    assert (s.value, s.low, s.high, s.seeds) == pytest.approx((0.6, 0.5, 0.7, 2)) and s.spread == pytest.approx(
        math.sqrt(0.02)
    )
    with pytest.raises(ValueError, match="jepa-convnext/seed0, other/seed0"):
        over_seeds(pd.concat([df, pd.DataFrame([row(run="other/seed0")])]))


def test_table1_with_missing_rows():
    table = table1(gappy(), "shear_flow")
    order = [
        ("jepa", "convnext", "linear"),
        ("jepa", "convnext", "attentive"),
        ("mine", "own", "knn"),
        ("constant", "none", "constant"),
    ]
    assert list(table.index) == order, "fixed order, unknown names before the baselines; 25 flows are left out"
    jepa, attentive, mine, constant = (table.loc[name] for name in table.index)
    assert [jepa["mean", split] for split in ("valid", "test")] == [0.45, 0.5]
    assert (
        jepa["Reynolds", "test"] == 0.3 and np.isnan(jepa["Schmidt", "test"]) and np.isnan(attentive["mean", "valid"])
    )
    assert (
        attentive["paper", "The Well, valid"] == 0.38
        and np.isnan(jepa["paper", "The Well, valid"])
        and constant["mean", "test"] == 1
        and mine["mean", "test"] == 2.5
    )
    text = two_digits(table)
    assert (
        text.loc[order[0], ("mean", "test")] == "0.50"
        and text.loc[order[1], ("Schmidt", "test")] == "–"
        and text["", "seeds"].tolist() == ["1"] * 4
    )
    with pytest.raises(ValueError, match="no rows of system 'rayleigh_benard' .*active_matter, shear_flow"):
        table1(gappy(), "rayleigh_benard")
    with pytest.raises(ValueError, match="shear"):
        table1(gappy(), "shear")
    summary = over_seeds(gappy())
    with pytest.raises(ValueError, match="several variants have the same .*: jepa-convnext, jepa-convnext-long"):
        table1(pd.concat([summary, summary.assign(run=summary.run + "-long")]), "shear_flow")


def test_papers_numbers():
    mse = PAPER.set_index(["objective", "system"]).mse
    assert (
        len(mse) == 12
        and mse["jepa", "active_matter"] == 0.079
        and mse["mae", "shear_flow"] == 0.67
        and mse["disco", "rayleigh_benard"] == 0.01
    )
    assert (
        mse["mpp", "active_matter"] == 0.23
        and set(PAPER.data) == {"The Well"}
        and set(PAPER.split) == {"valid"}
        and PAPER.source.str.contains("2603.13227").all()
    )


def test_rows_of_a_system_of_ones_own_are_a_table():
    df = pd.DataFrame([row(system="pendulum", label=name) for name in ("length", "drag", "mean")])
    table = table1(df, "pendulum")
    assert list(table) == [
        ("mean", "test"),
        ("length", "test"),
        ("drag", "test"),
        ("paper", "The Well, valid"),
        ("", "seeds"),
    ]


def test_results_of_the_first_version_are_refused_by_name(tmp_path):
    old = {k: v for k, v in row().items() if k not in ("labelled_flows", "draw")} | {"share": 1.0}
    (tmp_path / "result.json").write_text(json.dumps({"rows": [old]}))
    with pytest.raises(
        ValueError, match="result.json is not a result: row 0: 'share' is a column of physrep 0.1; probe"
    ):
        read_results(tmp_path)


def test_all_flows_are_those_of_each_system():
    df = pd.DataFrame([row(), row(labelled_flows=16), row(system="active_matter", labelled_flows=64)])
    found = with_all_flows(df)
    assert found.labelled_flows.tolist() == [256, 64] and len(with_all_flows(df.assign(draw=1))) == 0

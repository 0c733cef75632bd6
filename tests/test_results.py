"""The results of a table: their schema, what makes them stale, tables with gaps, figures and their records."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import gappy, row
from matplotlib.figure import Figure

import physrep.core.provenance
from physrep.core.files import write_json
from physrep.core.provenance import provenance
from physrep.data.sets import find_files, fingerprint
from physrep.probing.records import SCHEMA, is_current, read_results, stale, write_result
from physrep.results.comparison import spread
from physrep.results.figures import figure_record, save_figure
from physrep.results.panels import interval_is_clear, plot_marks
from physrep.results.rows import make_study
from physrep.results.table import PAPER, mean_errors, table1
from physrep.results.verify import main, verify
from physrep.training.presets import get_preset

SMOKE = get_preset("smoke")


def test_what_is_written_is_read_back_with_its_types(tmp_path):
    rows = [row(), row(label="Reynolds", low=math.nan, high=None, n=np.int64(7)), row(metric="r2", value=math.nan)]
    path = write_result(tmp_path / "a" / "seed0" / "result.json", rows, config={"lr": 0.1})
    assert json.loads(path.read_text())["config"] == {"lr": 0.1} and "NaN" not in path.read_text()
    found = read_results([path, tmp_path])  # a file is read once
    assert list(found) == list(SCHEMA) and found.low.isna().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(seed=0.5), "'seed' must be int, got 0.5"),
        (row(split=""), "'split' must be a non-empty str, got ''"),
        (row(accuracy=1.0), "'accuracy' missing or unknown"),
        ({k: v for k, v in row().items() if k != "run"}, "'run' missing or unknown"),
        (row(label="Schmidt"), "same as row 0"),
    ],
)
def test_rows_outside_the_schema_are_refused_on_writing_and_on_reading(tmp_path, bad, message):
    path, rows = tmp_path / "result.json", [row(label="Schmidt"), bad]
    with pytest.raises(ValueError, match=f"result.json is not written: row 1: {message}"):
        write_result(path, rows)
    assert list(tmp_path.iterdir()) == []
    path.write_text(json.dumps({"rows": rows}))
    with pytest.raises(ValueError, match=f"result.json is not a result: .*row 1: {message}"):
        read_results(tmp_path)


def test_a_result_is_stale_by_its_configuration_its_data_or_an_integer(tmp_path):
    path, config, probing = tmp_path / "result.json", {"preset": "smoke", "lr": 0.1, "seed": 0}, SMOKE.probing()
    assert stale(path) == ["missing"]
    asked = dict(config=config, probing=probing)
    write_json(path, {"rows": [], **asked, "provenance": provenance()})
    assert is_current(path, **asked) and is_current(path, config=config | {"seed": 1})
    assert stale(path, config=config | {"lr": 0.2}) == ["config has another lr"]
    assert stale(path, probing=replace(SMOKE, probe_epochs=99).probing()) == ["probing has another epochs"]
    for kind in ("PHYSICS", "TRAINING", "PROBING"):
        write_json(
            path,
            {
                "rows": [],
                **asked,
                "provenance": provenance() | {"numbers": physrep.core.provenance.numbers() | {kind: 0}},
            },
        )
        assert stale(path, **asked) == [f"{kind} was 0, is {physrep.core.provenance.numbers(kind)[kind]}"]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(seeds=1, spread=math.nan, by_seed=[(v,) for v in rows.value])


def test_table1_with_missing_rows():
    table, title = table1(summary(gappy()), "linear"), "the paper's JEPA ConvNeXt"
    assert table.index.tolist()[0] == title and "constant" in table.index[-1]
    assert table.loc[title, "Shear flow"] == 0.5 and table.loc[title, "Active matter"] == 0.01
    assert math.isnan(table.loc[table.index[-1], "Active matter"])
    few = mean_errors(summary(gappy()))
    assert set(few.labelled_flows) == {256}, "25 labelled flows are another table"
    paper = PAPER.set_index(["objective", "system"]).mse
    assert len(paper) == 12 and paper["jepa", "active_matter"] == 0.079 and paper["mae", "shear_flow"] == 0.67
    assert math.isnan(spread([0.5])) and spread([0.5, 0.7]) == pytest.approx(math.sqrt(0.02))


def test_a_difference_is_clear_if_the_interval_and_every_seed_are_on_one_side():
    for low, high, seeds, clear in [(-2, -1, "-3 -1", True), (-2, -1, "-3 1", False), (-1, 1, "1 1", False)]:
        one = pd.Series({"low": low, "high": high, "by_seed": seeds})
        assert interval_is_clear(one) == clear
        assert (
            interval_is_clear(pd.Series({"low": low, "high": high, "by_seed": tuple(map(float, seeds.split()))}))
            == clear
        )


def drawn(folder, **options) -> None:
    fig = plot_marks(pd.DataFrame({"panel": ["a", "a"], "line": ["x", "y"], "value": [1.0, 2.0]}))
    table = pd.DataFrame({"x": [1.0, 2.0], "by_seed": [(1.0, 2.0), (3.0,)]})
    save_figure(fig, folder, "one", table, figure_record("05_table1", SMOKE, **options))


def state(folder, **options) -> tuple[str, list[str]]:
    [line] = verify(folder, **options).itertuples()
    return line.state, line.why


def test_the_same_figure_is_the_same_bytes_and_current(tmp_path, capsys):
    drawn(tmp_path / "a")
    drawn(tmp_path / "b")
    for kind in ("png", "svg", "csv"):
        assert (tmp_path / "a" / f"one.{kind}").read_bytes() == (tmp_path / "b" / f"one.{kind}").read_bytes()
    assert (tmp_path / "a" / "one.csv").read_text() == "x,by_seed\n1,1 2\n2,3\n"
    assert state(tmp_path / "a") == ("current", []) and main([str(tmp_path / "a")]) == 0
    with pytest.raises(ValueError, match="the table of its numbers is empty"):
        save_figure(Figure(), tmp_path, "two", pd.DataFrame(), {})
    with pytest.raises(FileNotFoundError, match="no figures in"):
        verify(tmp_path)


def test_what_changed_since_a_figure_was_drawn_is_named(tmp_path, smoke_data, monkeypatch):
    [of] = ({s: fingerprint(find_files(smoke_data, "shear_flow", s)) for s in ("train", "test")},)
    drawn(
        tmp_path,
        data={"shear_flow": of},
        runs={"shear_flow": ["mae-vit-00000000-802/seed0", "mine-vit-00000000/seed0"]},
    )
    why = ["shear_flow: run mae-vit-00000000-802 has the hash "]
    assert state(tmp_path)[0] == "stale" and [text[:50] for text in state(tmp_path)[1]] == why, "another configuration"
    drawn(tmp_path, data={"shear_flow": of | {"test": "0123456789abcdef"}})
    assert state(tmp_path) == ("stale", ["data of shear_flow, split test, are not those that were used"])
    drawn(tmp_path, kinds=("TRAINING",))
    monkeypatch.setattr(physrep.core.provenance, "PROBING", 98)
    assert state(tmp_path)[0] == "current", "this figure does not depend on probes"
    before = physrep.core.provenance.TRAINING
    monkeypatch.setattr(physrep.core.provenance, "TRAINING", 99)
    assert state(tmp_path) == ("stale", [f"TRAINING was {before}, is 99"])


def test_a_figure_of_a_selection_does_not_pass_for_that_of_all_rows(tmp_path):
    usual = make_study("smoke").parameters
    drawn(tmp_path, parameters=usual)
    assert state(tmp_path) == ("current", [])
    drawn(tmp_path, parameters=usual | {"systems": ["shear_flow"]})
    assert state(tmp_path) == ("stale", [f"systems are shear_flow, not {', '.join(usual['systems'])}"])
    drawn(tmp_path, parameters=usual | {"rows": [*usual["rows"], "mine-vit"]})
    assert state(tmp_path)[0] == "stale"
    drawn(tmp_path / "selection" / "figures", parameters=usual | {"rows": ["mae-vit"]})
    assert state(tmp_path / "selection" / "figures") == ("current", [])


@pytest.mark.parametrize("kind", ["png", "svg", "csv", "json"])
def test_a_file_of_a_figure_that_is_not_its_own_is_named(tmp_path, kind, capsys):
    drawn(tmp_path)
    (tmp_path / f"one.{kind}").write_text("{}")
    assert state(tmp_path)[0] == "broken" and main([str(tmp_path)]) == 1
    assert f"one.{kind} is not the file" in capsys.readouterr().out or kind == "json"


def test_committed_figures_are_the_files_that_were_written_with_their_records():
    "Stale is for `make verify` to say: a change of code may come before its figures. Broken never is."
    found = verify()
    assert found[found.state == "broken"].why.tolist() == []

"""Somebody else's predictions: the template, what is refused and how, a row of the table, a comparison with ours."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from physrep.core.files import read_json
from physrep.data.scaling import LabelScaler
from physrep.physics.systems import get_system
from physrep.probing.records import read_predictions, read_results, write_predictions
from physrep.probing.scores import score
from physrep.results.comparison import compare, differences
from physrep.results.submissions import (
    compare_csv,
    predictions_from_csv,
    reference_for,
    write_csv_row,
    write_windows_csv,
)

GRID = np.array([(re, sc) for re in (400.0, 800.0, 1600.0, 3200.0) for sc in (0.25, 0.5, 1.0, 2.0)])
SCALER = LabelScaler.fit(get_system("shear_flow"), GRID)
GROUPS = np.repeat(np.arange(16), 3)
TRUTH = GRID[GROUPS]
DATA = {"test": "00aa", "valid": "00bb"}


def guess(seed: int, error: float) -> np.ndarray:
    z = SCALER.transform(TRUTH) + error * np.random.default_rng(seed).normal(size=TRUTH.shape)
    return SCALER.inverse(SCALER.clip(z))


def our_run(folder, objective="jepa", seed=0, error=0.5, data=DATA, **extra):
    where = folder / f"{objective}-vit-0123abcd" / f"seed{seed}" / "predictions.safetensors"
    about = dict(system="shear_flow", objective=objective, encoder="vit", seed=seed, scaler=SCALER, labelled_flows=64)
    splits = ("test", "valid")
    predictions = {("linear", split): guess(seed + 7, error) for split in splits}
    return write_predictions(
        where, predictions, dict.fromkeys(splits, TRUTH), dict.fromkeys(splits, GROUPS), data=data, **about | extra
    ).parent


def a_users_notebook(template, path, values: np.ndarray, **columns):
    "The template, filled in with pandas; the first line is kept."
    first = template.read_text().splitlines()[0]
    df = pd.read_csv(template, comment="#").assign(value=np.ravel(values), **columns)
    path.write_text(f"{first}\n" + df.to_csv(index=False))
    return path


@pytest.fixture
def reference(tmp_path):
    return read_predictions(our_run(tmp_path / "runs"))


def test_a_filled_in_template_is_a_run(tmp_path, reference):
    template = write_windows_csv(reference, tmp_path / "windows.csv")
    assert template.read_text().splitlines()[:3] == [
        "# physrep benchmark 00aa system shear_flow split test",
        "window,label,value,flow",
        "0,Reynolds,,0",
    ]
    path = a_users_notebook(template, tmp_path / "rival-v2.csv", guess(1, 0.6))
    [p] = predictions_from_csv(path, reference)
    np.testing.assert_array_equal(p.predictions["submitted", "test"], guess(1, 0.6))
    assert p.info["objective"] == "rival_v2" and p.info["run"] == "rival_v2/seed0" and p.data == {"test": "00aa"}
    assert (
        p.info["labelled_flows"] == 64
        and predictions_from_csv(path, reference, labelled_flows=9)[0].info["labelled_flows"] == 9
    )


def test_columns_in_another_order_seeds_and_splits(tmp_path, reference):
    lines = [
        "# physrep benchmark 00aa split test",
        "# physrep benchmark 00bb split valid",
        "seed,value,label,window,split",
    ]
    for split in ("test", "valid"):
        for seed in (0, 3):
            for window, values in enumerate(guess(seed, 0.4)):
                lines += [
                    f"{seed}, {v!r}, {name}, {window}, {split}"
                    for v, name in zip(values.tolist(), ("Reynolds", "Schmidt"))
                ]
    (tmp_path / "a.csv").write_text("\n".join(lines[:3] + lines[:2:-1]))
    first, second = predictions_from_csv(tmp_path / "a.csv", reference, name="rival")
    assert (first.info["seed"], second.info["seed"]) == (0, 3) and set(first.truth) == {"test", "valid"}
    np.testing.assert_array_equal(second.predictions["submitted", "valid"], guess(3, 0.4))
    (tmp_path / "b.csv").write_text("\n".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="does not say which data it is of; ours are 00bb.*00bb split valid"):
        predictions_from_csv(tmp_path / "b.csv", reference)


def test_lines_that_are_wrong_are_named(tmp_path, reference):
    path = a_users_notebook(write_windows_csv(reference, tmp_path / "w.csv"), tmp_path / "a.csv", guess(1, 0.6))
    good = path.read_text().splitlines()
    for line, text, message in [
        (4, "0,Schmidt,one,0", "a.csv, line 4, column value: got 'one'; write the predicted Schmidt in physical units"),
        (4, "0,Schmidt,inf,0", "a.csv, line 4, column value: got 'inf'"),
        (4, "0,Schmidt,,0", "a.csv, line 4, column value: got ''"),
        (4, "0,Schmidt,0.0,0", "column value: got '0.0'; Schmidt must be positive, its logarithm is scored"),
        (4, "0,schmidt,1,0", "column label: got 'schmidt'; shear_flow has Reynolds, Schmidt"),
        (4, "-1,Schmidt,1,0", "column window: got '-1'; write a whole number from 0 to 47"),
        (4, "0.5,Schmidt,1,0", "column window: got '0.5'"),
        (4, "0,Schmidt,1", "line 4: 3 fields; window,label,value,flow are 4"),
        (4, "0,Reynolds,500,0", "line 4: window 0 has a second Reynolds; keep one of them"),
        (2, "window,label,prediction,flow", "no column value; its first line names window, label, value"),
        (2, "window,label,value,group", "unknown columns group; valid: window, label, value, split, seed, probe, flow"),
        (1, good[0].replace("shear_flow", "active_matter"), "is of system active_matter, .* of shear_flow"),
        (1, good[0].replace("00aa", "00ab"), "is of data 00ab, .* of 00aa .split 'test'.: not comparable"),
        (1, good[0].replace("split test", "split train"), "column split: got ''; our predictions have test, valid"),
    ]:
        (tmp_path / "a.csv").write_text("\n".join([*good[: line - 1], text, *good[line:]]))
        with pytest.raises(ValueError, match=message) as error:
            predictions_from_csv(tmp_path / "a.csv", reference)
        assert str(tmp_path / "a.csv") in str(error.value)


def test_files_that_are_not_whole_are_refused_with_the_count(tmp_path, reference):
    path = a_users_notebook(write_windows_csv(reference, tmp_path / "w.csv"), tmp_path / "a.csv", guess(1, 0.6))
    good = path.read_text().splitlines()
    for lines, message in [
        (good[:-5], "3 of 48 windows of split 'test' .*the first are 45, 46, 47; every window is scored"),
        (good[:2], "has no predictions"),
        (good[:1], "no column window, label, value"),
        ([], "no column window, label, value"),
    ]:
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=message):
            predictions_from_csv(path, reference)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="a.csv is no CSV"):
        predictions_from_csv(path, reference)
    with pytest.raises(FileNotFoundError, match="no file .*gone.csv"):
        predictions_from_csv(tmp_path / "gone.csv", reference)


def test_the_data_must_be_ours_unless_one_says_so(tmp_path, reference):
    path = a_users_notebook(write_windows_csv(reference, tmp_path / "w.csv"), tmp_path / "a.csv", guess(1, 0.6))
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    with pytest.raises(ValueError, match="does not say which data it is of; ours are 00aa"):
        predictions_from_csv(path, reference)
    assert predictions_from_csv(path, reference, version="00aa")[0].data == {"test": "00aa"}
    with pytest.raises(ValueError, match="is of data 00ff"):
        predictions_from_csv(path, reference, version="00ff")
    assert predictions_from_csv(path, reference, any_version=True)[0].data == {}, "it claims no data"
    silent = read_predictions(our_run(tmp_path / "silent", data=None))
    with pytest.raises(ValueError, match="has no fingerprint of split 'test'; probe the run again"):
        write_windows_csv(silent, tmp_path / "none.csv")
    with pytest.raises(ValueError, match="has no fingerprint"):
        predictions_from_csv(path, silent, version="00aa")
    assert predictions_from_csv(path, silent, any_version=True)


def test_a_row_of_the_table(tmp_path, reference):
    our_run(tmp_path / "runs", "statistics", error=0.9, encoder="none", run="statistics")
    path = a_users_notebook(write_windows_csv(reference, tmp_path / "w.csv"), tmp_path / "a.csv", guess(1, 0.6))
    result = write_csv_row(path, reference, tmp_path / "runs" / "rival")
    df = read_results(result)
    expected = score(guess(1, 0.6), TRUTH, GROUPS, SCALER.system, SCALER)
    assert df.value.tolist() == [row["value"] for row in expected] and set(df.objective) == {"rival"}
    apart = differences(tmp_path / "runs", references=["statistics"]).query("objective == 'rival' and label == 'mean'")
    assert apart.difference.item() < 0 and apart.reference_run.item() == "statistics"


def test_a_row_that_is_submitted_again_keeps_no_seeds_of_the_old_file(tmp_path, reference):
    template = write_windows_csv(reference, tmp_path / "w.csv")
    for seeds in ((0, 1), (0,)):
        files = [a_users_notebook(template, tmp_path / f"{k}.csv", guess(k, 0.6), seed=k) for k in seeds]
        lines = [file.read_text().splitlines() for file in files]
        path = tmp_path / "a.csv"
        path.write_text("\n".join([*lines[0], *(line for more in lines[1:] for line in more[2:])]) + "\n")
        write_csv_row(path, reference, tmp_path / "rival", n_bootstrap=20)
        assert sorted(p.parent.name for p in (tmp_path / "rival").rglob("*.safetensors")) == [f"seed{k}" for k in seeds]


def test_runs_of_several_systems_need_a_file_that_names_one(tmp_path, reference):
    other = replace(reference, info=reference.info | {"system": "active_matter"})
    with pytest.raises(ValueError, match="runs of active_matter, shear_flow; give those of one, or name it"):
        reference_for([other, reference])
    path = write_windows_csv(reference, tmp_path / "w.csv")
    assert reference_for([other, reference], path) is reference


def test_comparison_with_all_our_runs(tmp_path):
    for seed in range(4):
        our_run(tmp_path / "runs", "jepa", seed, 0.3)
        our_run(tmp_path / "runs", "random", seed, 0.9)
    reference = read_predictions(tmp_path / "runs" / "jepa-vit-0123abcd" / "seed0")
    path = a_users_notebook(write_windows_csv(reference, tmp_path / "w.csv"), tmp_path / "rival.csv", guess(1, 0.6))
    scores, apart = compare_csv(path, tmp_path / "runs", n_bootstrap=200)
    assert scores.label.tolist() == ["Reynolds", "Schmidt", "mean"] and set(apart["first"]) == {"rival"}
    assert scores.text.str.fullmatch(r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]").all()
    mean = apart.query("label == 'mean'").set_index("second")
    assert mean.low["jepa-vit-0123abcd"] > 0 > mean.high["random-vit-0123abcd"]
    [mine] = predictions_from_csv(path, reference)
    direct = compare(mine, tmp_path / "runs" / "jepa-vit-0123abcd", probe=("submitted", "linear"), n_bootstrap=200)
    expected = apart.query("second == 'jepa-vit-0123abcd'").difference
    assert direct.query("metric == 'mse'").difference.tolist() == expected.tolist()
    other = write_windows_csv(reference, tmp_path / "u.csv", "valid")
    scores, _ = compare_csv(a_users_notebook(other, tmp_path / "v.csv", guess(1, 0.1)), reference, metric="r2")
    assert scores.value.iloc[-1] > 0.9, "the split of the header"
    with pytest.raises(ValueError, match="unknown metric 'rmse'; valid: mse"):
        compare_csv(path, reference, metric="rmse")
    with pytest.raises(FileNotFoundError, match="no predictions"):
        compare_csv(path, tmp_path / "nowhere")


def test_what_somebody_has_filled_in_is_not_written_over(tmp_path, reference):
    template = write_windows_csv(reference, tmp_path / "w.csv")
    path = a_users_notebook(template, template, guess(1, 0.6))
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="w.csv is there already, and may hold predictions"):
        write_windows_csv(reference, path)
    assert path.read_bytes() == before


def test_a_row_of_ours_is_not_written_over(tmp_path, reference):
    path = a_users_notebook(write_windows_csv(reference, tmp_path / "w.csv"), tmp_path / "a.csv", guess(1, 0.6))
    trained = our_run(tmp_path / "runs")
    (trained / "config.json").write_text("{}")
    baseline = write_csv_row(path, reference, tmp_path / "runs" / "statistics")
    baseline.write_text(json.dumps({k: v for k, v in read_json(baseline).items() if k != "source"}))
    before = {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    for folder in (trained, trained.parent, baseline.parent):
        with pytest.raises(ValueError, match="holds results that are not those of a CSV"):
            write_csv_row(path, reference, folder)
    assert {p: p.read_bytes() for p in (tmp_path / "runs").rglob("*") if p.is_file()} == before


def test_a_table_that_cannot_be_read_is_named(tmp_path, reference):
    lines = write_windows_csv(reference, tmp_path / "w.csv").read_text().splitlines()
    twice = tmp_path / "twice.csv"
    twice.write_text("\n".join([lines[0], "window,label,value,value", "0,Reynolds,1000,2000"]))
    with pytest.raises(ValueError, match="twice.csv has the column value twice"):
        predictions_from_csv(twice, reference)
    endless = tmp_path / "endless.csv"
    endless.write_text("\n".join([lines[0], "window,label,value", '0,Reynolds,"1', *["1,Reynolds,1000"] * 10_000]))
    with pytest.raises(ValueError, match="endless.csv is no CSV: .*quotation mark that is not closed"):
        predictions_from_csv(endless, reference)


def test_a_split_that_a_file_does_not_have_is_named(tmp_path, reference):
    path = a_users_notebook(
        write_windows_csv(reference, tmp_path / "w.csv", "valid"), tmp_path / "v.csv", guess(1, 0.1)
    )
    _, columns, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{columns},split", *(f"{line},valid" for line in lines)]) + "\n")
    with pytest.raises(ValueError, match="v.csv has no predictions of split 'test'; it has valid: pass split"):
        compare_csv(path, reference, any_version=True)
    assert len(compare_csv(path, reference, split="valid", any_version=True, n_bootstrap=20)[0]) == 3

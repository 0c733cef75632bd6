"""Somebody else's predictions in a CSV: what is refused and how, a row of the table, a comparison with ours."""

import numpy as np
import pandas as pd
import pytest
from test_comparison import GROUPS, SCALER, TRUTH
from test_comparison import run as made_up

from physrep.probing.records import read_predictions, read_results
from physrep.probing.scores import score
from physrep.results.comparison import compare_predictions
from physrep.results.submissions import (
    compare_csv,
    predictions_from_csv,
    reference_for,
    write_csv_row,
    write_windows_csv,
)

LABELS = ("Reynolds", "Schmidt")
DATA = {"test": "00aa", "valid": "00bb"}
FIRST = "# physrep benchmark 00aa system shear_flow split test\n"


def guess(seed: int = 1, error: float = 0.4) -> np.ndarray:
    z = SCALER.transform(TRUTH) + error * np.random.default_rng(seed).normal(size=TRUTH.shape)
    return SCALER.inverse(z)


def written(path, values: np.ndarray, first: str = FIRST, **columns) -> pd.DataFrame:
    "Writes a CSV as a user would, and returns its table."
    table = pd.DataFrame({"window": np.repeat(np.arange(len(values)), 2), "label": [*LABELS] * len(values)})
    table = table.assign(value=values.ravel(), **columns)
    path.write_text(first + table.to_csv(index=False))
    return table


@pytest.fixture
def reference(tmp_path):
    return read_predictions(made_up(tmp_path / "runs", splits=("test", "valid"), data=DATA))


def test_the_list_of_windows_filled_in_is_a_run(tmp_path, reference):
    path = write_windows_csv(reference, tmp_path / "rival-v2.csv")
    assert path.read_text().startswith(FIRST + "window,label,value,flow\n0,Reynolds,,0\n")
    with pytest.raises(FileExistsError, match="is there already, and may hold predictions"):
        write_windows_csv(reference, path)
    table = pd.read_csv(path, comment="#").assign(value=guess().ravel())
    path.write_text(FIRST + table.sample(frac=1, random_state=0).to_csv(index=False))  # in any order
    [found] = predictions_from_csv(path, reference)
    np.testing.assert_allclose(found.predictions["submitted", "test"], guess(), rtol=1e-14)  # pandas 2 rounds
    assert found.info["run"] == "rival_v2/seed0" and found.data == {"test": "00aa"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "many"}, "line 5: value must be a number"),
        ({"value": "-1"}, "line 5: value must be positive"),
        ({"label": "Prandtl"}, "line 5: label must be one of Reynolds, Schmidt"),
        ({"window": "60"}, "line 5: window must be a whole number below"),
        ({"window": "0.5"}, "line 5: window must be a whole number below"),
        ({"window": "0"}, "line 5: this window has this label twice"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, reference, change, message):
    path = tmp_path / "a.csv"
    table = written(path, guess()).astype(str)
    for column, value in change.items():
        table.loc[2, column] = value
    path.write_text(FIRST + table.to_csv(index=False))
    with pytest.raises(ValueError, match=message) as error:
        predictions_from_csv(path, reference)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("window,value\n0,1\n", "has no column label"),
        (FIRST + "window,label,value,colour\n0,Reynolds,1,red\n", "has unknown columns colour"),
        (FIRST + "window,label,value\n0,Reynolds,1\n0,Schmidt,1\n", "59 of 60 windows .* have no value"),
        ("window,label,value\n0,Reynolds,1\n", "is of data that it does not name, .* of 00aa"),
        (FIRST.replace("00aa", "00cc") + "window,label,value\n0,Reynolds,1\n", "is of data 00cc, .* of 00aa"),
        (FIRST.replace("shear_flow", "pendulum") + "window,label,value\n0,Reynolds,1\n", "is of system pendulum"),
        ("", "is no CSV"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, reference, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        predictions_from_csv(tmp_path / "a.csv", reference)


def test_a_row_of_the_table(tmp_path, reference):
    path, folder = tmp_path / "a.csv", tmp_path / "runs" / "rival"
    tables = [written(path, guess(seed), seed=seed) for seed in (0, 3)]
    path.write_text(FIRST + pd.concat(tables).to_csv(index=False))
    write_csv_row(path, reference, folder)
    found = read_results(folder).query("seed == 3 and metric == 'mse' and label == 'mean'")
    expected = score(guess(3), TRUTH, GROUPS, SCALER.system, SCALER, n_bootstrap=0)
    assert found.objective.tolist() == ["rival"] and found.value.item() in [row["value"] for row in expected]
    assert sorted(p.name for p in folder.glob("seed*")) == ["seed0", "seed3"]
    written(path, guess(5))
    write_csv_row(path, reference, folder)
    assert len(list(folder.rglob("predictions.safetensors"))) == 1, "no seeds of the file of before"
    with pytest.raises(ValueError, match="holds results that are not those of a CSV"):
        (folder / "seed0" / "config.json").write_text("{}")
        write_csv_row(path, reference, folder)


def test_comparison_with_our_runs(tmp_path, reference):
    ours = [made_up(tmp_path / "runs", "mae", "vit", splits=("test",), data=DATA), reference.path.parent]
    written(tmp_path / "a.csv", guess())
    scores, apart = compare_csv(tmp_path / "a.csv", *ours, n_bootstrap=20)
    assert set(apart.second) == {"jepa-convnext-0123abcd", "mae-vit-0123abcd"} and set(scores.label) >= {"mean"}
    [rival] = predictions_from_csv(tmp_path / "a.csv", reference)
    pair = dict(probe=("submitted", "linear"), metric="mse", n_bootstrap=20)
    expected = compare_predictions(rival, ours[0], **pair).difference.tolist()
    assert apart[apart.second == "mae-vit-0123abcd"].difference.tolist() == expected
    with pytest.raises(ValueError, match="no run of pendulum"):
        written(tmp_path / "b.csv", guess(), first=FIRST.replace("shear_flow", "pendulum"))
        reference_for(ours, tmp_path / "b.csv")

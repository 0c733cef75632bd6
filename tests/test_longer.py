"""Rows with more updates: bad input, the notebook at preset smoke, and its figure."""

import nbformat
import pandas as pd
import pytest
from helpers import ROOT, papermill

from physrep.experiments.longer import longer_runs, plot_lengths
from physrep.experiments.recipes import rows_in
from physrep.results.rows import row_name
from physrep.training.presets import get_preset


def test_rows_are_read_once_each_and_none_are_refused():
    assert [row_name(row) for row in rows_in("mae-vit, jepa.circular-convnext,mae-vit")] == [
        "mae-vit",
        "jepa.circular-convnext",
    ]
    with pytest.raises(ValueError, match='no rows; write for example "mae-vit,forecast-vit"'):
        rows_in(",")
    with pytest.raises(ValueError, match="'mae' is no row that is trained; valid: jepa-convnext, "):
        rows_in("mae")


@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0, float("nan"), float("inf")])
def test_a_training_that_is_no_longer_is_refused(factor):
    with pytest.raises(ValueError, match=f"more than 1, such as 2; got {factor:g}"):
        longer_runs(rows_in("mae-vit"), factor, [0], "shear_flow", get_preset("smoke"))


def test_a_factor_that_adds_no_update_is_refused():
    with pytest.raises(
        ValueError, match="with a factor of 1.05, mae-vit has 6 updates as in Table 1; give a larger one"
    ):
        longer_runs(rows_in("mae-vit"), 1.05, [0], "shear_flow", get_preset("smoke"))


def test_the_notebook_compares_two_lengths_of_two_rows(smoke_data, tmp_path):
    about = {"preset": "smoke", "rows": "jepa-vit,forecast-vit", "seeds": "0", "data_dir": smoke_data}
    about |= {"run_dir": tmp_path / "runs"}
    common = [word for name, value in about.items() for word in ("-r", name, str(value))]
    out = tmp_path / "longer.ipynb"
    done = papermill("nbs/08i_longer_training.ipynb", str(out), *common, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = tmp_path / "runs" / "smoke"
    table = pd.read_csv(runs / "figures" / "longer_shear_flow.csv")
    table = table[table.factor > 0]
    assert set(zip(table.of, table.updates, table.seed)) == {
        (row, updates, 0) for row in ("jepa-vit", "forecast-vit") for updates in (6, 12)
    }
    for (row, seed), some in table[table.factor == 2].groupby(["of", "seed"]):
        (folder,) = runs.glob(f"shear_flow/{row.removesuffix('-vit')}.updates2-vit-*/seed{seed}")
        metrics = pd.read_csv(folder / "metrics.csv")
        assert metrics.step.max() == 12
        assert some.loss.unique() == pytest.approx(metrics.valid_loss.dropna().iloc[-1], rel=1e-4)
    shown = [str(cell.get("outputs")) for cell in nbformat.read(out, 4).cells]
    assert sum("image/png" in text for text in shown) == 1
    assert sum("row of Table 1" in text for text in shown) == 1, "a table of what longer trainings change"


def test_the_figure_has_a_line_for_each_seed_and_one_for_random_weights():
    trained = [
        {"of": of, "row": of, "factor": factor, "seed": seed, "error": error + 0.01 * seed - 0.1 * factor}
        for of, error in (("mae-vit", 0.5), ("forecast-vit", 0.4))
        for seed in (0, 1)
        for factor in (2.0, 1.0)
    ]
    random = [{"of": "mae-vit", "row": "random-vit", "factor": 0.0, "seed": k, "error": 0.3 + 0.2 * k} for k in (0, 1)]
    table = pd.DataFrame(trained + random).assign(probe="linear", low=0.05, high=0.6)
    (ax,) = plot_lengths(table).axes
    lines = [line for line in ax.lines if line.get_marker() == "o"]
    heights = sorted([round(float(y), 9) for y in line.get_ydata()] for line in lines)
    assert heights == [[0.3, 0.2], [0.31, 0.21], [0.4, 0.3], [0.41, 0.31]]
    assert all(line.get_xdata()[0] < line.get_xdata()[1] for line in lines), "from the shorter to the longer training"
    (dashed,) = (line for line in ax.lines if line.get_linestyle() == "--")
    assert dashed.get_ydata()[0] == pytest.approx(0.4)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1x", "2x"]

"""A row at other learning rates: the notebook at preset smoke, and its figure."""

import math

import nbformat
import pandas as pd
import pytest
from helpers import ROOT, papermill

from physrep.experiments.rates import plot_rates, rank_correlations


def test_the_notebook_draws_two_rates_and_keeps_the_run_of_the_table(smoke_data, tmp_path):
    about = {"preset": "smoke", "row": "jepa-vit", "factors": "0.5 1", "seeds": "0 1", "data_dir": smoke_data}
    about |= {"run_dir": tmp_path / "runs"}
    common = [word for name, value in about.items() for word in ("-r", name, str(value))]
    out = tmp_path / "rates.ipynb"
    done = papermill("nbs/08h_learning_rates.ipynb", str(out), *common, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = tmp_path / "runs" / "smoke"
    table = pd.read_csv(runs / "figures" / "rates.csv")
    untrained, table = table[table.factor == 0], table[table.factor > 0]
    assert set(untrained.seed) == {0, 1} and untrained[["loss", "gate"]].isna().all(axis=None)
    assert {"linear", "knn", "kernel", "attentive"} <= set(table.probe)
    assert set(zip(table.factor, table.seed)) == {(f, k) for f in (0.5, 1) for k in (0, 1)}
    for (factor, seed), some in table.groupby(["factor", "seed"]):
        (folder,) = runs.glob(f"shear_flow/{'jepa.rate0.5' if factor < 1 else 'jepa'}-vit-*/seed{seed}")
        assert some.gate.unique() == pytest.approx(pd.read_csv(folder / "curve.csv").gate.iloc[-1], rel=1e-4)
        assert some.loss.unique() == pytest.approx(
            pd.read_csv(folder / "metrics.csv").valid_loss.dropna().iloc[-1], rel=1e-4
        )
    losses = pd.read_csv(runs / "figures" / "rates_losses.csv")
    assert set(losses.row) == {"jepa-vit", "jepa.rate0.5-vit"}
    assert losses.groupby(["factor", "seed"]).step.agg(["min", "max"]).eq([1, 6]).all(axis=None), "the whole training"
    assert sum("image/png" in str(cell.get("outputs")) for cell in nbformat.read(out, 4).cells) == 2


@pytest.fixture
def table() -> pd.DataFrame:
    "Errors of three runs and of two random encoders, read by two probes."
    found = pd.DataFrame(
        {
            "factor": [0, 0, 0.5, 1, 1],
            "lr": [0, 0, 1e-3, 2e-3, 2e-3],
            "seed": [0, 1, 0, 0, 1],
            "loss": [math.nan, math.nan, 0.1, 0.2, 0.3],
            "error": [0.3, 0.5, 0.2, 0.3, 0.4],
        }
    )
    found = found.assign(low=0.1, high=0.9)
    return pd.concat([found.assign(probe="linear"), found.assign(probe="knn", error=1 - found.error)])


def test_the_figure_has_a_mark_for_each_run_and_a_line_for_random_weights(table):
    linear, knn = plot_rates(table).axes
    marks = sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in linear.lines if line.get_marker() == "o")
    assert marks == [(0.1, 0.2), (0.2, 0.3), (0.3, 0.4)]
    for ax, error in ((linear, 0.4), (knn, 0.6)):
        (dashed,) = (line for line in ax.lines if line.get_linestyle() == "--")
        assert dashed.get_ydata()[0] == pytest.approx(error)
    assert linear.get_ylim()[0] == 0 and linear.get_ylim()[1] > 0.9, "no mark is cut off"


def test_order_of_losses_and_errors(table):
    assert rank_correlations(table).to_dict() == pytest.approx({"linear": 1, "knn": -1})

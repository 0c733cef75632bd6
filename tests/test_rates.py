"""A row at other learning rates: bad input, runs that are shared with Table 1, and the notebook at preset smoke."""

import math

import nbformat
import pandas as pd
import pytest
from helpers import ROOT, papermill

from physrep.experiments.rates import (
    at_rate,
    factors_in,
    plot_rates,
    random_weights,
    rank_correlations,
    runs_at_rates,
    trained_row,
)
from physrep.results.rows import PERIODIC, ROWS, Row, row_name, run_of
from physrep.training.presets import get_preset


def test_rows_that_are_not_trained_are_refused():
    assert trained_row().pair == ("mae", "vit")
    with pytest.raises(ValueError, match="unknown row 'random-vit'; valid: jepa-convnext, "):
        trained_row("random-vit")


def test_random_weights_are_those_of_the_same_encoder():
    preset = get_preset("laptop")
    for name, path in (
        ("mae-vit", "random-vit"),
        ("jepa-convnext", "random-convnext"),
        ("disco-vit_code", "random-vit_code"),
    ):
        random = random_weights(trained_row(name))
        assert run_of(random, "shear_flow", preset).path.startswith(f"{path}-")
    assert random_weights(trained_row("mae-vit")) in ROWS
    periodic = trained_row("jepa.circular-convnext")
    run, trained = (run_of(row, "rayleigh_benard", preset) for row in (random_weights(periodic), periodic))
    assert run.encoder_config == trained.encoder_config and "padding_mode" in run.encoder_config
    assert run.path.startswith("random.circular-convnext-")


def test_factors_are_numbers_above_zero():
    assert factors_in("1 .25 0.5 0.50") == [0.25, 0.5, 1]
    with pytest.raises(ValueError, match="such as \"0.5 1\"; got 'half'"):
        factors_in("half")
    for text in ("", "0 1", "-1", "inf", "nan"):
        with pytest.raises(ValueError, match="must be numbers above 0, at least one; got"):
            factors_in(text)


@pytest.mark.parametrize("name", ["mae-vit", "jepa.circular-convnext"])
def test_only_the_rate_changes(name):
    row, preset = trained_row(name), get_preset("laptop")
    (usual,), (half,) = runs_at_rates(row, (1, 0.5), [3], "shear_flow", preset).values()
    assert usual.seed == half.seed == 3
    assert usual.path == run_of(row, "shear_flow", preset, 3).path, "the run of Table 1"
    changed = {k for k, v in half.as_dict().items() if v != usual.as_dict().get(k)}
    assert changed == {"tag", "recipe"} and half.recipe.lr == usual.recipe.lr / 2
    assert {k: v for k, v in half.recipe.decisive().items() if k != "lr"} == {
        k: v for k, v in usual.recipe.decisive().items() if k != "lr"
    }


def test_a_rate_is_added_to_what_a_row_changes():
    row = Row("jepa", "convnext", tag="own", encoder_config=PERIODIC, recipe={"weight_decay": 0.1})
    half = at_rate(row, 0.5, "shear_flow", get_preset("laptop"))
    assert row_name(half) == "jepa.own.rate0.5-convnext" and half.encoder_config == PERIODIC
    assert half.recipe == {"weight_decay": 0.1, "lr": 0.0005}


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match='no seeds; write for example "0 1 2"'):
        runs_at_rates(trained_row(), (0.5, 1), [], "shear_flow", get_preset("laptop"))


def test_a_system_of_ones_own_is_found_by_its_data(smoke_data, tmp_path, monkeypatch):
    "Its grid is told by its files only, so the learning rate of a row cannot be asked without them."
    (tmp_path / "my_waves.py").write_text(
        "from dataclasses import replace\nfrom physrep.physics.systems import get_system\n"
        'WAVES = replace(get_system("shear_flow"), name="waves")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    for path in (smoke_data / "shear_flow").rglob("*.*"):
        target = tmp_path / "data" / "waves" / path.relative_to(smoke_data / "shear_flow")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    preset = get_preset("smoke")
    found = runs_at_rates(trained_row(), (0.5, 1), [0], "my_waves:WAVES", preset, tmp_path / "data")
    assert found[0.5][0].recipe.lr == found[1][0].recipe.lr / 2


def test_the_notebook_draws_two_rates_and_keeps_the_run_of_the_table(smoke_data, tmp_path):
    about = {"preset": "smoke", "factors": "0.5 1", "seeds": "0 1", "data_dir": smoke_data}
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
        (folder,) = runs.glob(f"shear_flow/{'mae.rate0.5' if factor < 1 else 'mae'}-vit-*/seed{seed}")
        assert some.gate.unique() == pytest.approx(pd.read_csv(folder / "curve.csv").gate.iloc[-1], rel=1e-4)
        assert some.loss.unique() == pytest.approx(
            pd.read_csv(folder / "metrics.csv").valid_loss.dropna().iloc[-1], rel=1e-4
        )
    losses = pd.read_csv(runs / "figures" / "rates_losses.csv")
    assert set(losses.row) == {"mae-vit", "mae.rate0.5-vit"}
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

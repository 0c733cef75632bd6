"""Rows with the recipes that tuning chose: those of the committed table, bad input, the notebook at preset smoke."""

import nbformat
import pandas as pd
import pytest
from helpers import ROOT, papermill

from physrep.experiments import tuned
from physrep.experiments.recipes import rows_in
from physrep.experiments.tuned import CHOSEN, RANDOM, TUNED, USUAL, tuned_row, tuned_runs
from physrep.experiments.tuning import OWN, chosen_configurations, trial_run
from physrep.objectives.methods import objective_class
from physrep.results.rows import row_name, run_of
from physrep.training.presets import get_preset


def test_the_choice_is_that_of_the_committed_trials():
    found = chosen_configurations(pd.read_csv(ROOT / "figures" / "tuning.csv"))
    chosen = {f"{one.objective}-{one.encoder}": one.chosen for one in found.itertuples()}
    kinds = {row: objective_class(row[0]) for row in OWN}
    blind = ["-".join(row) for row, kind in kinds.items() if kind.trains and not getattr(kind, "reads_labels", False)]
    assert {name: chosen[name] for name in blind} | {"jepa.circular-convnext": chosen["jepa-convnext"]} == CHOSEN


def test_a_row_that_keeps_its_recipe_keeps_its_runs(monkeypatch):
    monkeypatch.setattr(tuned, "CHOSEN", {"mae-vit": 0})
    (ways,) = tuned_runs(rows_in("mae-vit"), [0, 1], "shear_flow", get_preset("smoke")).values()
    assert ways[TUNED] == ways[USUAL] and [run.seed for run in ways[RANDOM]] == [0, 1]


@pytest.mark.parametrize("system", ["shear_flow", "active_matter"])
def test_a_chosen_recipe_is_what_tuning_trains_in_that_system(system):
    laptop = get_preset("laptop")
    for row in rows_in(",".join(CHOSEN)):
        run = run_of(tuned_row(row, system, laptop), system, laptop)
        trial = trial_run(system, (row.objective, row.encoder), laptop, CHOSEN[row_name(row)])
        assert (run.recipe, run.coefficients) == (trial.recipe, trial.coefficients)
        assert run.tag == (".".join(filter(None, [row.tag, "tuned"])) if CHOSEN[row_name(row)] else row.tag)


def test_a_row_that_was_not_tuned_is_refused():
    with pytest.raises(ValueError, match="autoencoder-vit was not tuned; valid: jepa-convnext, "):
        tuned_runs(rows_in("autoencoder-vit"), [0], "shear_flow", get_preset("smoke"))
    with pytest.raises(ValueError, match='no seeds; write for example "0 1 2"'):
        tuned_runs(rows_in("mae-vit"), [], "shear_flow", get_preset("smoke"))


def test_the_notebook_compares_two_recipes_of_two_rows(smoke_data, tmp_path):
    names = ["invariance-vit", "forecast-vit"]
    about = {"preset": "smoke", "systems": "shear_flow", "rows": ",".join(names), "data_dir": smoke_data}
    common = [
        word for name, value in {**about, "run_dir": tmp_path / "runs"}.items() for word in ("-r", name, str(value))
    ]
    out = tmp_path / "chosen.ipynb"
    done = papermill("nbs/08j_chosen_recipes.ipynb", str(out), *common, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = tmp_path / "runs" / "smoke"
    table = pd.read_csv(runs / "figures" / "tuned.csv")
    assert set(zip(table.of, table.recipe)) == {(name, way) for name in names for way in (USUAL, TUNED, RANDOM)}
    errors = table.pivot(index=["of", "probe"], columns="recipe", values="error")
    assert (errors[TUNED] != errors[USUAL]).groupby("of").any().all()
    assert len(list(runs.glob("shear_flow/*.tuned-*/seed0/encoder.safetensors"))) == 2
    shown = [str(cell.get("outputs")) for cell in nbformat.read(out, 4).cells]
    assert sum("image/png" in text for text in shown) == 1
    assert sum("comparisons of two rows" in text for text in shown) == 1

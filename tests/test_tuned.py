"""Rows with the recipes that tuning chose: those of the committed table, bad input, the notebook at preset smoke."""

import nbformat
import pandas as pd
import pytest
from helpers import ROOT, papermill

from physrep.experiments.recipes import rows_in
from physrep.experiments.tuned import CHOSEN, RANDOM, TUNED, USUAL, chosen_in, tuned_row, tuned_runs
from physrep.experiments.tuning import OWN, chosen_configurations, trial_run
from physrep.objectives.methods import objective_class
from physrep.results.rows import run_of
from physrep.training.presets import get_preset


def test_the_choice_is_that_of_the_committed_trials():
    found = chosen_configurations(pd.read_csv(ROOT / "figures" / "tuning.csv"))
    chosen = {f"{one.objective}-{one.encoder}": one.chosen for one in found.itertuples()}
    kinds = {row: objective_class(row[0]) for row in OWN}
    blind = ["-".join(row) for row, kind in kinds.items() if kind.trains and not getattr(kind, "reads_labels", False)]
    assert {name: chosen[name] for name in blind} | {"jepa.circular-convnext": chosen["jepa-convnext"]} == CHOSEN[
        "laptop"
    ]


def test_a_row_that_keeps_its_recipe_keeps_its_runs():
    (ways,) = tuned_runs(rows_in("mae-vit"), {"mae-vit": 0}, [0, 1], "shear_flow", get_preset("smoke")).values()
    assert ways[TUNED] == ways[USUAL] and [run.seed for run in ways[RANDOM]] == [0, 1]


@pytest.mark.parametrize("system", ["shear_flow", "active_matter"])
def test_a_chosen_recipe_is_what_tuning_trains_in_that_system(system):
    laptop = get_preset("laptop")
    for name, number in CHOSEN["laptop"].items():
        (row,) = rows_in(name)
        run = run_of(tuned_row(row, number, system, laptop), system, laptop)
        trial = trial_run(system, (row.objective, row.encoder), laptop, number)
        assert (run.recipe, run.coefficients) == (trial.recipe, trial.coefficients)
        assert run.tag == ".".join(filter(None, [row.tag, "tuned"]))


def test_what_was_not_chosen_is_refused():
    chosen = chosen_in("", "laptop")
    with pytest.raises(ValueError, match="no configuration was chosen of autoencoder-vit; valid: jepa-convnext, "):
        tuned_runs(rows_in("autoencoder-vit"), chosen, [0], "shear_flow", get_preset("laptop"))
    with pytest.raises(ValueError, match='no seeds; write for example "0 1 2"'):
        tuned_runs(rows_in("mae-vit"), chosen, [], "shear_flow", get_preset("laptop"))
    with pytest.raises(ValueError, match="no configurations were chosen for preset paper, only for laptop; `make tune"):
        chosen_in("", "paper")
    assert chosen_in("mae-vit=3, forecast-vit=0", "paper") == {"mae-vit": 3, "forecast-vit": 0}
    for text in ("mae-vit", "mae-vit=", "=3", "mae-vit=-1", "mae-vit=1.5,"):
        with pytest.raises(ValueError, match="configurations must be rows with numbers, such as mae-vit=3"):
            chosen_in(text, "laptop")


def test_the_notebook_compares_two_recipes_of_two_rows(smoke_data, tmp_path):
    names = ["invariance-vit", "forecast-vit"]
    about = {"preset": "smoke", "systems": "shear_flow", "configurations": "invariance-vit=1,forecast-vit=1"}
    about |= {"data_dir": smoke_data}
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

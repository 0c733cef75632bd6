"""Rows with the recipes that tuning chose, beside those by hand: bad input, the notebook at a preset of one's own."""

import nbformat
import pandas as pd
import pytest
from helpers import ROOT, papermill

from physrep.experiments.recipes import rows_in
from physrep.experiments.tuned import BY_HAND, RANDOM, TUNED, tuned_runs
from physrep.training.presets import get_preset


def test_the_same_seeds_of_both_recipes_and_of_random_weights():
    laptop = get_preset("laptop")
    (ways,) = tuned_runs(rows_in("jepa.circular-convnext"), [0, 1], "shear_flow", laptop).values()
    assert [[run.seed for run in ways[way]] for way in (BY_HAND, TUNED, RANDOM)] == [[0, 1]] * 3
    assert [ways[way][0].row[0] for way in (BY_HAND, TUNED)] == ["jepa.circular", "jepa.circular.tuned"]
    assert len({str(ways[way][0].encoder_config) for way in ways}) == 1, "the padding, too"


def test_what_was_not_tuned_is_refused():
    with pytest.raises(
        ValueError, match="no recipe was searched for autoencoder-vit at preset laptop; valid: jepa-conv"
    ):
        tuned_runs(rows_in("autoencoder-vit"), [0], "shear_flow", get_preset("laptop"))
    with pytest.raises(ValueError, match='no seeds; write for example "0 1 2"'):
        tuned_runs(rows_in("mae-vit"), [], "shear_flow", get_preset("laptop"))
    with pytest.raises(ValueError, match="for mae-vit at preset paper; valid: none; `make tune PRESET=paper`"):
        tuned_runs(rows_in("mae-vit"), [0], "shear_flow", get_preset("paper"))


def test_the_notebook_compares_two_recipes_of_two_rows(smoke_data, tmp_path):
    names = ["invariance-vit", "forecast-vit"]
    preset = tmp_path / "tuned.yaml"
    preset.write_text(
        "base: smoke\ntuned: {invariance-vit: {coefficients: {shown: 0.25}}, forecast-vit: {recipe: {lr: 0.002}}}\n"
    )
    about = {"preset": preset, "systems": "shear_flow", "seeds": "0", "data_dir": smoke_data}
    common = [
        word for name, value in {**about, "run_dir": tmp_path / "runs"}.items() for word in ("-r", name, str(value))
    ]
    out = tmp_path / "chosen.ipynb"
    done = papermill("nbs/08j_chosen_recipes.ipynb", str(out), *common, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = tmp_path / "runs" / "tuned"
    table = pd.read_csv(runs / "figures" / "tuned.csv")
    assert set(zip(table.of, table.recipe)) == {(name, way) for name in names for way in (BY_HAND, TUNED, RANDOM)}
    errors = table.pivot(index=["of", "probe"], columns="recipe", values="error")
    assert (errors[TUNED] != errors[BY_HAND]).groupby("of").any().all()
    assert len(list(runs.glob("shear_flow/*.tuned-*/seed0/encoder.safetensors"))) == 2
    shown = [str(cell.get("outputs")) for cell in nbformat.read(out, 4).cells]
    assert sum("image/png" in text for text in shown) == 1
    assert sum("comparisons of two rows" in text for text in shown) == 1

"Ablations at preset smoke: trained, compared with their rows, drawn."

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, papermill
from scipy import stats

from physrep.core.files import read_json
from physrep.experiments import ablations
from physrep.experiments.ablations import is_decided, seeds_there, variant_ratios
from physrep.experiments.recipes import train_and_probe
from physrep.experiments.variants import VARIANTS, base_run, changed_run, variant_run
from physrep.probing.reading import FROZEN
from physrep.training.presets import get_preset


def test_further_seeds_are_shown_where_both_sides_have_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "is_current", lambda path, preset: path.is_file())
    smoke = get_preset("smoke")
    mine, row = variant_run("noise", "shear_flow", smoke), base_run("noise", "shear_flow", smoke)
    for run, seeds in ((mine, (5, 6)), (row, (6, 7))):
        for seed in seeds:
            file = run.with_seed(seed).folder(tmp_path) / "result.json"
            file.parent.mkdir(parents=True)
            file.write_text("{}")
    mine.folder(tmp_path).with_name("seed6.bak").mkdir()
    assert seeds_there("noise", "shear_flow", smoke, tmp_path) == [*smoke.seeds, 6]


def test_a_variant_has_the_recipe_of_its_row_in_the_system():
    for name in ("near", "sigreg"):
        variant, row = changed_run(name, "active_matter", get_preset("paper"))
        usual = get_preset("paper").recipe(*VARIANTS[name].row)
        assert variant.recipe.lr == row.recipe.lr != usual.lr, "active matter has another rate in the paper"


def test_two_seeds_are_enough_as_their_spread_is_pooled(monkeypatch):
    smoke, draw = get_preset("smoke"), np.random.default_rng(0)
    runs = {name: [variant_run(name, "shear_flow", smoke).with_seed(k) for k in (0, 1)] for name in ("near", "noise")}
    made: dict[str, np.ndarray] = {}

    def sums(folder, split, label="mean"):
        if (key := f"{folder} {label}") not in made:
            luck = 0.1 * draw.standard_normal((len(FROZEN), 1))
            made[key] = (2.0 if "near" in key else 1.0) * np.exp(luck) * np.ones((len(FROZEN), 30))
        return made[key], np.ones(30), np.zeros((30, 3))

    monkeypatch.setattr(ablations, "group_sums", sums)
    table = variant_ratios(runs, "runs")
    mean = table[(table.label == "mean") & (table.probe == "linear")].set_index("variant")
    logs = {key: np.log(value[0].mean()) for key, value in made.items() if key.endswith(" mean")}
    sides = [[log for key, log in logs.items() if word in key] for word in ("near", "noise", "jepa-vit")]
    assert [len(side) for side in sides] == [2, 2, 2], "both are compared with one row"
    spread = np.sqrt(np.mean([np.var(side, ddof=1) for side in sides]))
    by_hand = 2 * stats.t.ppf(0.975, 3) * spread
    assert np.log(mean.high / mean.low).to_numpy() == pytest.approx([by_hand] * 2, rel=0.25)
    assert np.log(mean.factor["near"]) == pytest.approx(np.mean(sides[0]) - np.mean(sides[2]))
    assert [is_decided(row) for row in mean.itertuples()] == [True, False]
    with pytest.raises(ValueError, match="same windows of 'test'; probe it again"):
        monkeypatch.setattr(ablations, "group_sums", lambda f, *_: (np.ones((4, 30)), np.ones(30), np.full(9, hash(f))))
        variant_ratios(runs, "runs")


@pytest.mark.long
def test_the_notebook_draws_a_variant_with_noise_beside_one_without(smoke_data, tmp_path):
    "`resolve` gives a run no other noise than its preset's, so a record can only name such a run."
    about = {"preset": "smoke", "variants": "noise,mask_token", "seeds": "0", "data_dir": smoke_data}
    about |= {"run_dir": tmp_path / "runs"}
    for name in ("noise", "mask_token"):  # the rows of Table 1 that they are compared with
        train_and_probe(base_run(name, "shear_flow", "smoke"), smoke_data, tmp_path / "runs", progress=False)
    common = [word for name, value in about.items() for word in ("-r", name, str(value))]
    done = papermill("nbs/08b_ablations.ipynb", str(tmp_path / "ablations.ipynb"), *common, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = tmp_path / "runs" / "smoke" / "figures"
    assert set(pd.read_csv(figures / "ablations.csv").variant) == {"noise", "mask_token"}
    record = read_json(figures / "ablations.json")
    assert any("jepa.noise" in run for run in record["runs"]) and not any("noise" in run for run in record["configs"])

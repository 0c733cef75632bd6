"Ablations at preset smoke: trained, compared with their rows, drawn."

import pandas as pd
import pytest
from helpers import ROOT, papermill

from physrep.core.files import read_json
from physrep.experiments import ablations
from physrep.experiments.ablations import seeds_there
from physrep.experiments.recipes import train_and_probe
from physrep.experiments.variants import base_run, variant_run
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
    assert seeds_there("noise", "shear_flow", smoke, tmp_path) == [*smoke.seeds, 6]


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

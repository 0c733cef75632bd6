"Ablations at preset smoke: trained, compared with their rows, drawn."

import pandas as pd
import pytest
from helpers import ROOT, papermill

from physrep.core.files import read_json
from physrep.experiments.recipes import train_and_probe
from physrep.experiments.variants import base_run


@pytest.mark.long
def test_the_notebook_draws_a_variant_with_noise_beside_one_without(smoke_data, tmp_path):
    "`resolve` gives a run no other noise than its preset's, so a record can only name such a run."
    about = {"preset": "smoke", "variants": "noise,mask_token", "seed": "0", "data_dir": smoke_data}
    about |= {"run_dir": tmp_path / "runs"}
    for name in ("noise", "mask_token"):  # the rows of Table 1 that they are compared with
        train_and_probe(base_run(name, "shear_flow", "smoke"), smoke_data, tmp_path / "runs", progress=False)
    common = [word for name, value in about.items() for word in ("-r" if name != "seed" else "-p", name, str(value))]
    done = papermill("nbs/08b_ablations.ipynb", str(tmp_path / "ablations.ipynb"), *common, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = tmp_path / "runs" / "smoke" / "figures"
    assert set(pd.read_csv(figures / "ablations.csv").variant) == {"noise", "mask_token"}
    record = read_json(figures / "ablations.json")
    assert any("jepa.noise" in run for run in record["runs"]) and not any("noise" in run for run in record["configs"])

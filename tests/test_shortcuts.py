"""Flows, an encoder and a probe, a line each."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import physrep
from physrep.core.files import read_json
from physrep.data.flows import read
from physrep.models.vit import ViT


@pytest.fixture(scope="module")
def flows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flows")
    return physrep.simulate("shear_flow", 12, preset="smoke", folder=folder, progress=False)


def test_flows_are_dealt_into_splits_and_read_again(flows):
    assert flows.split == "train+valid+test" and len(flows.labels) == 12
    assert len(np.unique(flows.labels, axis=0)) == 12, "each has parameters of its own"
    assert "12 flows of shear_flow" in flows._repr_html_() and "image/png" in flows._repr_html_()
    assert read(flows.root, "shear_flow").split == "train+valid", "closed splits of simulated flows are left out"
    with pytest.raises(ValueError, match="9 flows are too few for training"):
        physrep.simulate("shear_flow", 9)


def test_files_say_of_which_system_they_are(flows, tmp_path):
    assert read(flows.root).system.name == "shear_flow"
    with pytest.raises(FileNotFoundError, match="no .h5 or .hdf5 files in"):
        read(tmp_path)


def test_a_training_of_so_many_minutes_gives_an_encoder_and_a_probe(flows, tmp_path):
    encoder = physrep.pretrain(
        flows, "forecast", "vit", minutes=0.01, preset="smoke", folder=tmp_path, device="cpu", progress=False
    )
    assert read_json(encoder.folder / "config.json")["data"] == {"grid": list(flows.grid)}
    assert encoder.run.recipe.steps > encoder.run.recipe.warmup
    assert f"{encoder.run.recipe.steps} updates" in encoder._repr_html_() and "image/png" in encoder._repr_html_()
    clips = flows.memory[:3, :, : encoder.info["shape"][0]]
    probe = physrep.fit(encoder, flows, "linear", device="cpu", progress=False)
    assert probe.predict_fields(encoder, clips, dt=flows.dt).shape == (3, 2) and 0 < probe.info["error"] < 3


def test_a_module_of_ones_own_is_read_too(flows):
    torch.manual_seed(0)
    probe = physrep.fit(ViT(4, dim=24, depth=1, heads=2, tubelet=(4, 8, 8)), flows, "kernel", frames=8, progress=False)
    assert probe.config["moments"] and np.isfinite(probe.info["error"])


def test_flows_without_splits_are_refused(flows):
    one = read(flows.root)
    one.split = "test"
    with pytest.raises(ValueError, match="has no split train, valid: deal the flows into both"):
        physrep.pretrain(one)


def test_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import physrep\nprint(physrep.simulate('shear_flow', 10, preset='smoke', folder='d'))\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "10 flows of shear_flow" in done.stdout, done.stderr[-500:]

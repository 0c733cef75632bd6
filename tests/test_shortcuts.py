"""Flows, an encoder and a probe, a line each."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import physrep
from physrep.core.files import read_json
from physrep.data.flows import read
from physrep.data.generate import make_dataset
from physrep.models.vit import ViT
from physrep.probing import shortcuts
from physrep.training.presets import get_preset
from physrep.training.pretrain import training_windows


@pytest.fixture(scope="module")
def flows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flows")
    return physrep.simulate("shear_flow", 12, preset="smoke", folder=folder, progress=False)


def test_flows_are_dealt_into_splits_and_read_again(flows):
    assert flows.split == "train+valid" and len(flows.labels) == 12
    assert len(np.unique(flows.labels, axis=0)) == 12, "each has parameters of its own"
    assert "12 flows of shear_flow" in flows._repr_html_() and "image/png" in flows._repr_html_()
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
    assert (
        tmp_path in encoder.folder.parents
        and encoder.run.recipe.steps > encoder.run.recipe.warmup
        and encoder.run.seed == 0
    )
    assert f"{encoder.run.recipe.steps} updates" in encoder._repr_html_() and "image/png" in encoder._repr_html_()
    clips = flows.memory[:3, :, : encoder.info["shape"][0]]
    probe = physrep.fit(encoder, flows, "linear", device="cpu", progress=False)
    assert probe.predict_fields(encoder, clips, dt=flows.dt).shape == (3, 2)


def test_as_many_updates_as_the_time_of_the_later_ones_allows(flows, tmp_path, monkeypatch):
    run, now = shortcuts._run_on(flows, "forecast", "vit", "smoke", run_dir=tmp_path), [0.0]

    def slow(*arguments, step: int, **options) -> dict:
        now[0] += 2 if step >= 3 else 50
        return {"loss": 0.0}

    monkeypatch.setattr(shortcuts, "update", slow)
    monkeypatch.setattr(shortcuts.time, "monotonic", lambda: now[0])
    windows = training_windows(run)
    assert shortcuts._updates_in(run, 10.0, windows, "cpu") == 300, "of two seconds each"
    assert shortcuts._updates_in(run, 0.03, windows, "cpu") == run.recipe.warmup + 1


def test_a_module_of_ones_own_is_read_too(flows):
    torch.manual_seed(0)
    probe = physrep.fit(ViT(4, dim=24, depth=1, heads=2, tubelet=(4, 8, 8)), flows, "kernel", frames=8, progress=False)
    assert probe.config["moments"] and min(trial["valid_mse"] for trial in probe.trials) < 3


def test_the_error_is_that_on_test_where_flows_have_one(tmp_path):
    own = dict(draws={"train": (6, 1), "valid": (2, 1), "test": (2, 1)}, families={}, counts={}, grid_values={})
    sim = replace(get_preset("smoke").sim("shear_flow"), **own)
    make_dataset("shear_flow", sim, tmp_path, workers=1, progress=False)
    torch.manual_seed(0)
    encoder, flows = ViT(4, dim=24, depth=1, heads=2, tubelet=(4, 8, 8)), read(tmp_path)
    probe = physrep.fit(encoder, flows, "linear", device="cpu", progress=False)
    assert flows.split == "train+valid+test" and probe.info["error"] > 0


def test_flows_without_splits_are_refused(flows):
    one = read(flows.root)
    one.split = "test"
    with pytest.raises(ValueError, match="has no split train, valid: `physrep convert` deals flows into splits"):
        physrep.pretrain(one)


def test_a_script_needs_no_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import physrep\nprint(physrep.simulate('shear_flow', 10, preset='smoke', folder='d'))\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "10 flows of shear_flow" in done.stdout, done.stderr[-500:]

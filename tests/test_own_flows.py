"""What reads flows of one's own: folds by flow, readers that fit, refusals, and probes that are saved and used."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import physrep
from physrep.data.windows import Trajectories, Windows
from physrep.data.write import write_well
from physrep.experiments.command import main
from physrep.models.pretrained import model_folder
from physrep.physics.systems import Field, Label, System
from physrep.probing.features import Features
from physrep.results import own_flows
from physrep.results.own_flows import clips_of, compare, read_clips

WAVES = System("waves", "Waves", (Field("height"),), (Label("speed", log=True, paper_log=True),))


def waves(folder: Path, speed: np.ndarray, split: str = "train", starts=None, frames: int = 24) -> Path:
    "A file of waves of these speeds, with noise."
    time, x = np.arange(frames) * 0.1, np.arange(16)[:, None] / 16
    rng = np.random.default_rng([len(speed), len(split)])
    place = x - speed[:, None, None, None] * time[:, None, None] + rng.random((len(speed), 1, 1, 1))
    height = np.sin(2 * np.pi * place) + 0.1 * rng.normal(size=(len(speed), frames, 16, 16))
    path = folder / "waves" / "data" / split / "waves.hdf5"
    path.parent.mkdir(parents=True)
    more = {} if starts is None else {"initial_conditions": starts}
    return write_well(path, WAVES, {"height": height}, {"speed": speed}, time=time, box=(1.0, 1.0), **more)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    "24 waves of twelve speeds, in two splits."
    folder = tmp_path_factory.mktemp("data")
    speed = np.geomspace(0.5, 2, 12)
    waves(folder, speed)
    waves(folder, speed, "valid")
    return folder


def mean_and_change(x: torch.Tensor) -> torch.Tensor:
    "Features `(b, 2)` that know the speed."
    return torch.stack([x.mean((1, 2, 3, 4)), x.diff(dim=2).abs().mean((1, 2, 3, 4)).log()], dim=1)


mean_and_change.normalised = False


@pytest.fixture(scope="module")
def found(data) -> own_flows.Comparison:
    return compare({"mine": mean_and_change}, physrep.read(data, WAVES))


def test_an_encoder_in_place_of_the_shipped_ones_is_read_like_all_others(found):
    assert set(found.order) == {"constant", "statistics", "statistics + spectra", "mine", "statistics + spectra + mine"}
    assert found.table.columns.tolist() == ["reader", "label", "error", "low", "high", "flows"]
    error = found.table[found.table.label == "mean"].set_index("reader").error
    assert error["mine"] < 0.05 and 0.9 < error["constant"] < 1.5 and (found.table.flows == 24).all()
    assert found.order[-1] == "constant" and found.best in found.title and "constant" not in found.ties
    assert "<img" in found._repr_html_() and f"{found.best}" in found.plot().get_suptitle().replace("\n", " ")


def test_folds_leave_out_parameters_and_flows_that_start_alike(data, tmp_path):
    windows = clips_of(physrep.read(data, WAVES))
    folds = own_flows._folds(windows, own_flows._units(windows))
    speeds = windows.targets(np.arange(len(windows)))[:, 0]
    assert sum(part.sum() for part, _ in folds) == len(windows) and len(folds) == 5
    assert all(not set(speeds[part]) & set(speeds[~part]) for part, _ in folds)
    waves(tmp_path, np.geomspace(0.5, 2, 16), starts=np.arange(16) // 2)  # 8 starts, two speeds each
    pairs = clips_of(physrep.read(tmp_path, WAVES))
    starts = pairs.window_groups()
    assert len(np.unique(own_flows._units(pairs))) == 8
    for part, _ in own_flows._folds(pairs, own_flows._units(pairs)):
        assert not set(starts[part]) & set(starts[~part])


def test_predictions_come_from_probes_that_have_not_seen_the_flow(data):
    windows = clips_of(physrep.read(data, WAVES))
    rng = np.random.default_rng(0)
    named = rng.normal(size=(24, 1, 64)).astype(np.float32)[windows.index[:, 0]]  # the flow by name, and nothing else
    features = Features(named, windows.targets(np.arange(len(windows))), windows.window_groups())
    folds = own_flows._folds(windows, own_flows._units(windows))
    error = np.log(own_flows._out_of_fold(windows, {"named": features}, folds)["named"] / features.labels)
    assert error.var() > 0.8 * np.log(features.labels).var()


@pytest.mark.parametrize(
    "speed, message",
    [
        (np.geomspace(0.5, 2, 11), "has 11 labelled flows of waves; to compare readers takes 12"),
        (np.ones(12), "all labels speed of waves in .* are equal .*three different values"),
        (np.repeat([1.0, 2.0], 6), "without a fold are equal .*three different values"),
    ],
)
def test_too_few_flows_and_labels_that_do_not_vary_are_refused(tmp_path, speed, message):
    waves(tmp_path, speed)
    with pytest.raises(ValueError, match=message):
        compare({}, physrep.read(tmp_path, WAVES))


def test_a_saved_probe_reads_clips_and_says_how_many_truths_its_intervals_held(found, tmp_path):
    for reader in ("statistics", "statistics + spectra"):
        found.save(tmp_path / "p.safetensors", reader)
        probe = physrep.load_probe(tmp_path / "p.safetensors")
        clips, truth = found.windows.read(np.arange(8)).numpy(), found.truth[:8]
        values = read_clips(probe, clips, 0.1)
        low, high = probe.interval(values)
        assert 0.7 < probe.info["coverage"]["speed"] <= 1 and probe.info["reader"] == reader
        assert ((low <= truth) & (truth <= high)).mean() > 0.5
    with pytest.raises(ValueError, match="reads clips .* 0.1 apart; got .* 0.2 apart"):
        read_clips(probe, clips, 0.2)


def test_shipped_encoders_that_fit_are_asked_and_the_command_draws_and_saves(smoke_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(own_flows, "MOST", 32)
    plot, probe = tmp_path / "errors.png", tmp_path / "best.safetensors"
    assert main(["compare", str(smoke_data), "--system", "shear_flow", "--plot", str(plot), "--save", str(probe)]) == 0
    said = capsys.readouterr().out
    assert re.search("left out: active_matter-.*: this encoder takes concentration", said)
    name = model_folder("shear_flow").name
    for reader in ("equations", name, f"random weights of {name}", "constant"):
        assert f"\n{reader}  " in said
    assert plot.is_file() and "held the truth of Reynolds" in said
    saved = physrep.load_probe(probe)
    clips = Windows(smoke_data, "shear_flow", "valid", frames=16, stride=16).read([0, 1]).numpy()
    assert read_clips(saved, clips, 0.2).shape == (2, 2)


def test_clips_of_another_grid_are_left_out_with_the_reason(smoke_data):
    flows = Trajectories(smoke_data, "shear_flow", "train", crop=((0, 16), (0, 16)))
    encoders, left_out = own_flows._encoders(None, clips_of(flows))
    assert "trained on grids of 32x32, got 16x16" in left_out[model_folder("shear_flow").name] and not encoders


def test_a_folder_says_what_it_holds(data, smoke_data, tmp_path):
    assert physrep.read(smoke_data, "shear_flow").split == "train+unlabelled+valid+test+shifted"
    assert physrep.read(data, WAVES).split == "train+valid"
    with pytest.raises(ValueError, match="are of 'waves'; give the system to read"):
        physrep.read(data)
    with pytest.raises(FileNotFoundError, match="no .h5 or .hdf5 files"):
        physrep.read(tmp_path)


def test_the_old_name_says_the_new_one():
    with pytest.raises(ValueError, match="called physrep.compare_predictions since version 0.3"):
        physrep.compare("runs/a", "runs/b", metric="mse")
    with pytest.raises(ImportError, match="is called compare_predictions"):
        from physrep.results.comparison import compare  # noqa: F401

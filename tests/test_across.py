"""One encoder for several systems: what it is fed, that it goes on where it was stopped, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from physrep.experiments.across import (
    SHARED,
    InTurn,
    Translated,
    load_joint,
    pretrain_jointly,
    score_translated,
    shared_names,
    translate,
)
from physrep.probing.records import read_predictions
from physrep.data.batches import Batches
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.windows import Windows
from physrep.models.encoders import build_encoder
from physrep.models.pretrained import load_encoder
from physrep.data.generate import make_dataset
from physrep.training.presets import PRESETS, get_preset
from physrep.probing.evaluate import probe_splits
from physrep.training.run import resolve
from physrep.physics.systems import SYSTEMS, get_system
from physrep.training.loop import TimeUp

PAIR = ["shear_flow", "active_matter"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for system in PAIR:
        make_dataset(system, get_preset("smoke").sim(system), folder, workers=1, progress=False)
    return folder


def batches(folder, system, **options):
    w, s = Windows(folder, system, "train", frames=16, stride=8), get_system(system)
    return Batches(
        w, batch_size=4, normaliser=Normaliser.load(folder, s), scaler=LabelScaler.fit(s, w.labels), **options
    )


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_every_channel_has_one_place(system):
    own = shared_names(get_system(system))
    assert len(set(own)) == len(own) and set(own) <= set(SHARED.channels)
    x = torch.randn(2, len(own), 3, 4, 4)
    shared = translate(x, own, SHARED.channels)
    assert torch.equal(translate(shared, SHARED.channels, own), x)
    assert int((shared != 0).sum()) == x.numel(), "and all others are zero"


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match=r"fields must be \(b, 2, t, h, w\)"):
        translate(torch.zeros(1, 3, 2, 4, 4), ["scalar", "pressure"], ["scalar"])
    with pytest.raises(ValueError, match="no channel in common: pressure and scalar"):
        translate(torch.zeros(1, 1, 2, 4, 4), ["pressure"], ["scalar"])


def test_updates_take_systems_in_turn(two):
    turn = InTurn({s: batches(two, s) for s in PAIR})
    for step in range(4):
        [batch], name = list(turn(step)), PAIR[step % 2]
        [plain] = batches(two, name)(step // 2)
        assert torch.equal(batch["fields"], translate(plain["fields"], shared_names(get_system(name)), SHARED.channels))
    assert len(list(turn.evaluation(limit=4))) == 2, "one batch of each"


def test_an_interrupted_training_is_the_same_training(two, tmp_path):
    options = dict(systems=PAIR, objective="mae", encoder="vit", preset="smoke", data_dir=two, progress=False)
    whole, interrupted = pretrain_jointly(**options, run_dir=tmp_path / "a"), 0
    while True:
        try:
            again = pretrain_jointly(**options, run_dir=tmp_path / "b", minutes=1e-6)
            break
        except TimeUp:
            interrupted += 1
    assert interrupted > 1 and whole.parent.name == again.parent.name
    for name in ("metrics.csv", "encoder.safetensors"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    seed = pretrain_jointly(**options, run_dir=tmp_path / "b", seed=1)
    assert (seed / "encoder.safetensors").read_bytes() != (again / "encoder.safetensors").read_bytes()


def test_a_joint_encoder_is_loaded_for_one_of_its_systems(two, tmp_path):
    folder = pretrain_jointly(PAIR, "mae", "vit", "smoke", two, tmp_path, progress=False)
    for name in PAIR:
        encoder, own = load_joint(folder, name), windows(two, name)["test"]
        assert encoder.info["channels"] == get_system(name).channels
        fields = own.read([0, 1])
        whole = encoder.encoder.encoder(
            translate(Normaliser.load(two, get_system(name))(fields), shared_names(get_system(name)), SHARED.channels)
        )
        assert abs(encoder.embed(fields, own.files[0].dt) - whole.mean(1).numpy()).max() < 1e-5
    with pytest.raises(ValueError, match=f"was trained on {', '.join(sorted(PAIR))}, not on 'rayleigh_benard'"):
        load_joint(folder, "rayleigh_benard")
    with pytest.raises(ValueError, match="load_joint"):
        load_encoder(folder)
    with pytest.raises(ValueError, match="is an encoder of shear_flow alone"):
        load_joint("shear_flow-jepa-convnext", "shear_flow")


def test_a_finished_joint_encoder_is_left_as_it_is(two, tmp_path):
    options = dict(
        systems=PAIR, objective="mae", encoder="vit", preset="smoke", data_dir=two, run_dir=tmp_path, progress=False
    )
    folder = pretrain_jointly(**options)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"}
    assert pretrain_jointly(**options) == folder and before == {
        p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"
    }


@pytest.mark.parametrize("systems", [["shear_flow", "rayleigh_benard"], []])
def test_clips_of_different_shapes_are_refused_before_any_work(systems, tmp_path):
    with pytest.raises(ValueError, match="of preset native they have"):
        pretrain_jointly(systems, "jepa", "convnext", "native", tmp_path / "no data", tmp_path)


def windows(data, system):
    return probe_splits(resolve(system, "random", preset="smoke"), data)


@pytest.mark.parametrize("objective", ["supervised", "random"])
def test_labels_of_different_systems_cannot_be_mixed(objective, two, tmp_path):
    with pytest.raises(
        ValueError, match=f"only a self-supervised objective can be trained on several systems, got '{objective}'"
    ):
        pretrain_jointly(PAIR, objective, "convnext", "smoke", two, tmp_path)


def test_labels_are_those_of_the_preset(two, tmp_path, monkeypatch):
    "The paper takes no logarithm of Schmidt numbers: what reads another system is scored as the rows it is compared with."
    monkeypatch.setitem(PRESETS, "smoke", replace(get_preset("smoke"), paper_labels=True))
    encoder = build_encoder("convnext", in_channels=11, **get_preset("smoke").encoders["convnext"])
    score_translated(
        encoder, shared_names(get_system("active_matter")), windows(two, "shear_flow"), tmp_path, preset="smoke", objective="random", encoder_name="convnext", run="from/seed0",
        probes=["linear"], progress=False,
    )  # fmt: skip
    assert [label.log for label in read_predictions(tmp_path).scaler.system.labels] == [True, False]


def test_an_encoder_of_one_system_reads_another(two, tmp_path):
    encoder = build_encoder("convnext", in_channels=4, **get_preset("smoke").encoders["convnext"])
    scored = score_translated(
        encoder, shared_names(get_system("shear_flow")), windows(two, "active_matter"), tmp_path, preset="smoke", objective="random", encoder_name="convnext", run="from/seed0",
        probes=["linear", "knn"], progress=False,
    )  # fmt: skip
    assert {r["probe"] for r in scored.rows} == {"linear", "knn"} and {r["system"] for r in scored.rows} == {
        "active_matter"
    }
    reader, x = (
        Translated(encoder, shared_names(get_system("shear_flow")), get_system("active_matter")),
        torch.randn(2, 11, 16, 32, 32),
    )
    seen = x.clone()
    seen[:, 3:] = 0
    assert torch.equal(reader(x), reader(seen)), "it does not see the tensors that it was not trained on"
    assert np.isfinite(scored.predictions["linear", "test"]).all()

"""One encoder for several systems: what it is fed, that it goes on where it was stopped, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from physrep.core.files import default_data_dir, read_json
from physrep.core.provenance import is_current
from physrep.data.batches import Batches
from physrep.data.generate import make_dataset
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.windows import Windows
from physrep.experiments.across import (
    SHARED,
    AlternatingBatches,
    Translated,
    load_joint,
    pretrain_jointly,
    resolve_jointly,
    shared_names,
    translate,
)
from physrep.experiments.transfer import Reader, score_reader
from physrep.models.encoders import build_encoder
from physrep.models.pretrained import load_encoder
from physrep.physics.systems import SYSTEMS, get_system
from physrep.probing.reading import probe_splits
from physrep.probing.records import read_predictions
from physrep.training.loop import TimeUp
from physrep.training.presets import PRESETS, get_preset
from physrep.training.run import resolve

PAIR = ["shear_flow", "active_matter"]


@pytest.fixture(scope="module")
def two():
    "A `data_dir` with two systems."
    folder = default_data_dir("smoke")
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
    turn = AlternatingBatches({s: batches(two, s) for s in PAIR})
    for step in range(4):
        [batch], name = list(turn(step)), PAIR[step % 2]
        [plain] = batches(two, name)(step // 2)
        assert torch.equal(batch["fields"], translate(plain["fields"], shared_names(get_system(name)), SHARED.channels))
    assert len(list(turn.evaluation(limit=4))) == 2, "one batch of each"


def test_an_interrupted_training_is_the_same_training(two, tmp_path):
    joint = resolve_jointly(PAIR, "mae", "vit", "smoke")
    whole = pretrain_jointly(joint, two, tmp_path / "a", progress=False)
    interrupted = 0
    while True:
        try:
            again = pretrain_jointly(joint, two, tmp_path / "b", minutes=1e-6, progress=False)
            break
        except TimeUp:
            interrupted += 1
    assert interrupted > 1 and whole.parent.name == again.parent.name
    for name in ("metrics.csv", "encoder.safetensors"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    seed = pretrain_jointly(resolve_jointly(PAIR, "mae", "vit", "smoke", seed=1), two, tmp_path / "b", progress=False)
    assert seed.parent == again.parent
    assert (seed / "encoder.safetensors").read_bytes() != (again / "encoder.safetensors").read_bytes()


def test_a_joint_encoder_is_loaded_for_one_of_its_systems(two, tmp_path):
    joint = resolve_jointly(PAIR, "mae", "vit", "smoke")
    folder = pretrain_jointly(joint, two, tmp_path, progress=False)
    for name in PAIR:
        encoder = load_joint(folder, name)
        own = windows(two, name)["test"]
        assert encoder.info["modules"] == list(joint.modules)
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
        load_joint("shear_flow-forecast-vit", "shear_flow")


def test_a_finished_joint_encoder_is_left_as_it_is(two, tmp_path):
    joint = resolve_jointly(PAIR, "mae", "vit", "smoke")

    def files() -> dict:
        "Times of change of what is in the folder."
        return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.name != ".lock"}

    folder = pretrain_jointly(joint, two, tmp_path, progress=False)
    before = files()
    assert pretrain_jointly(joint, two, tmp_path, progress=False) == folder and before == files()
    record = read_json(folder / "provenance.json")
    assert is_current(record) and set(PAIR) <= set(record["entries"])
    assert "probing.evaluate" not in record["modules"], "a probe that changes retrains nothing"


def test_a_joint_encoder_of_other_code_is_trained_again_and_the_old_one_is_kept(two, tmp_path):
    joint = resolve_jointly(PAIR, "mae", "vit", "smoke")
    folder = pretrain_jointly(joint, two, tmp_path, progress=False)
    weights = (folder / "encoder.safetensors").read_bytes()
    record = folder / "provenance.json"
    record.write_text(record.read_text().replace(read_json(record)["code"], "0123456789abcdef"))
    said = []
    pretrain_jointly(joint, two, tmp_path, progress=False, say=said.append)
    assert "its code changed" in said[0]
    assert (folder / "old-encoder.safetensors").read_bytes() == (folder / "encoder.safetensors").read_bytes() == weights


@pytest.mark.parametrize("systems", [["shear_flow", "rayleigh_benard"], []])
def test_clips_of_different_shapes_are_refused_before_any_work(systems):
    with pytest.raises(ValueError, match="of preset native they have"):
        resolve_jointly(systems, "jepa", "convnext", "native")


def windows(data, system):
    return probe_splits(resolve(system, "random", preset="smoke"), data)


def read(encoder, source, target, data, folder, probes):
    "Probes an encoder of one system on another one."
    reader = Reader(encoder, shared_names(get_system(source)), "random", ["models.convnext"])
    run = resolve(target, "random", "convnext", "smoke")
    return score_reader(reader, run, windows(data, target), folder, name="from", probes=probes)


@pytest.mark.parametrize("objective", ["supervised", "random"])
def test_labels_of_different_systems_cannot_be_mixed(objective):
    with pytest.raises(
        ValueError, match=f"only a self-supervised objective can be trained on several systems, got '{objective}'"
    ):
        resolve_jointly(PAIR, objective, "convnext", "smoke")


def test_labels_are_those_of_the_preset(two, tmp_path, monkeypatch):
    "The paper takes no logarithm of Schmidt numbers; readers of another system are scored as the rows beside them."
    monkeypatch.setitem(PRESETS, "smoke", replace(get_preset("smoke"), paper_labels=True))
    encoder = build_encoder("convnext", in_channels=11, **get_preset("smoke").encoders["convnext"])
    read(encoder, "active_matter", "shear_flow", two, tmp_path, ["linear"])
    assert [label.log for label in read_predictions(tmp_path).scaler.system.labels] == [True, False]


def test_an_encoder_of_one_system_reads_another(two, tmp_path):
    encoder = build_encoder("convnext", in_channels=4, **get_preset("smoke").encoders["convnext"])
    folder = read(encoder, "shear_flow", "active_matter", two, tmp_path, ["linear", "knn"])
    scored = read_predictions(folder)
    assert {probe for probe, _ in scored.predictions} == {"linear", "knn"}
    assert scored.scaler.system.name == "active_matter" and scored.info["run"] == "from/seed0"
    assert np.isfinite(scored.predictions["linear", "test"]).all()
    reader = Translated(encoder, shared_names(get_system("shear_flow")), get_system("active_matter"))
    x = torch.randn(2, 11, 16, 32, 32)
    seen = x.clone()
    seen[:, 3:] = 0
    assert torch.equal(reader(x), reader(seen)), "it does not see the tensors that it was not trained on"

"""The training loop and what is around it: resumes, curves, claims, divergence, hashes, costs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from physrep.core.files import read_json, write_json
from physrep.models.pretrained import load_encoder
from physrep.training import watch
from physrep.training.cost import cost
from physrep.training.loop import Recipe, TimeUp, TrainingDiverged, make_optimizer, update
from physrep.training.presets import get_preset
from physrep.training.pretrain import claim, pretrain, training_batches, training_windows
from physrep.training.run import Run, build, ensure_data, label_scaler, resolve

quiet = dict(progress=False, say=lambda text: None)


@pytest.fixture
def smoke(smoke_data, tmp_path):
    "Makes a run of preset smoke on the shared data, in a folder of its own."

    def made(objective: str, encoder: str | None = None, preset="smoke", **changes) -> Run:
        return resolve("shear_flow", objective, encoder, preset, data_dir=smoke_data, run_dir=tmp_path, **changes)

    return made


def equal(one: Path, two: Path) -> bool:
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.long
def test_a_run_is_a_branch_of_a_longer_one(smoke, tmp_path):
    "A run of 64 updates finishes encoders after 4 and 16; each is that of a shorter run, which goes on to the longer."
    longer = smoke("forecast", steps=64)
    folder = pretrain(longer, **quiet)
    curve = pd.read_csv(folder / "curve.csv")
    assert curve.step.tolist() == [0, 4, 16, 64]
    assert {"online", "online_Reynolds", "online_Schmidt", "gate", "gate_persistence", "effective_rank"} <= set(curve)
    alone = replace(longer.at(16), run_dir=tmp_path / "alone")
    other = pretrain(alone, **quiet)
    for file in ("encoder.safetensors", "objective.safetensors", "curve.csv"):
        assert (longer.at(16).folder / file).read_bytes() == (other / file).read_bytes(), file
    pretrain(alone.at(64), **quiet)
    for file in ("encoder.safetensors", "objective.safetensors", "curve.csv"):
        assert (folder / file).read_bytes() == (alone.at(64).folder / file).read_bytes(), f"{file}, from a trunk"
    assert load_encoder(other).info["objective"] == "forecast"
    with pytest.raises(ValueError, match="has done 51 updates, and an encoder of 5 branches off at 4"):
        pretrain(alone.at(5), **quiet)
    random = pretrain(smoke("random", "vit"), **quiet)
    assert pd.read_csv(random / "curve.csv").online.tolist() == [curve.online[0]], "where it starts from"
    assert pd.read_csv(random / "metrics.csv").effective_rank[0] > 1, "random weights are watched, too"


class Twice(torch.nn.Module):
    "An objective that has its encoder under two names, and says a number that is no tensor."

    def __init__(self, encoder, *, system, shape):
        super().__init__()
        self.encoder, self.shape = encoder, shape
        self.net = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.dim, 1))
        self.trains = True

    def forward(self, batch):
        return {"loss": self.net(batch["fields"]).square().mean(), "temperature": 0.5}


@pytest.mark.parametrize(
    "objective, change",
    [("jepa", {"accumulate": 2}), ("jepa", {"predictor_lr": 3.0}), ("my_twice:Twice", {})],
    ids=["micro-batches", "a faster predictor", "shared weights"],
)
def test_in_pieces(objective, change, smoke, tmp_path, monkeypatch):
    "A time limit stops with a checkpoint; called again and again the run is finished, and is the undisturbed one."
    monkeypatch.setitem(sys.modules, "my_twice", sys.modules[__name__])
    run = smoke(objective, "vit", steps=4, recipe=change)
    for pieces in (1, 2, 3):
        with pytest.raises(TimeUp, match=f"at update {pieces} of"):
            pretrain(run, minutes=1e-9, **quiet)
    done = pretrain(run, minutes=1e-9, **quiet)
    other = replace(run, run_dir=tmp_path / "whole")
    whole = pretrain(other, **quiet)
    for file in ("encoder.safetensors", "curve.csv", "metrics.csv"):
        assert (whole / file).read_bytes() == (done / file).read_bytes(), file
    left = [sorted(p.name for p in one.trunk.rglob("checkpoint/*")) for one in (run, other)]
    assert left[0] == left[1] == ["last.csv", "last.safetensors"], "from where a longer run goes on"


def test_a_moving_average_is_what_is_kept_and_watched(smoke):
    "The file holds the target's encoder; the gate of features is r squared with a copy beside it."
    run = smoke("masked_jepa", "vit", steps=4, coefficients={"momentum": 0.5})
    folder = pretrain(run, **quiet)
    kept, state = load_file(folder / "encoder.safetensors"), load_file(folder / "objective.safetensors")
    average = {name: state[f"target.average.{name}"] for name in kept}
    assert all(torch.equal(kept[name], average[name]) for name in kept)
    assert any(not torch.equal(kept[name], state[f"encoder.{name}"]) for name in kept)
    rows = pd.read_csv(folder / "curve.csv").to_dict("records")
    assert {"gate_r2"} == {name for name in rows[-1] if "gate" in name} and all(row["gate_r2"] < 0.25 for row in rows)
    assert "less than 25%" in watch.shortcomings(rows[-1])[0] and not watch.passed(rows[-1])


def test_regularisers_draw_with_the_seed_of_the_run(smoke):
    for objective in ("jepa_sigreg", "jepa"):
        parts = [build(smoke(objective, "vit", seed=seed)).regulariser for seed in (0, 1)]
        assert len({part.generator("directions").initial_seed() for part in parts}) == 2, objective


def test_held_out_pairs_lie_under_symmetries_of_their_own(smoke):
    run = smoke("invariance", "vit", coefficients={"of": "window"})
    valid = training_batches(run, training_windows(run))["valid"]
    one, two = (next(valid.evaluation(8)) for _ in range(2))
    assert not torch.allclose(one["views"][0], one["views"][1]), "the same window, under another symmetry"
    assert all(torch.equal(a, b) for a, b in zip(one["views"], two["views"]))


def test_a_diverging_run_keeps_its_checkpoint(smoke):
    run = smoke("supervised", lr=1e17, steps=50, recipe={"clip_norm": 1e30, "checkpoint_seconds": 0.0})
    with pytest.raises(TrainingDiverged, match=r"at step \d+ \(learning rate .*seeds .*The last checkpoint is kept"):
        pretrain(run, **quiet)
    assert not (run.folder / "encoder.safetensors").exists()
    tensors = load_file(run.trunk / "checkpoint" / "last.safetensors")
    assert all(torch.isfinite(t).all() for t in tensors.values())


@pytest.mark.parametrize("where", [0, 1])
def test_a_loss_that_is_not_finite_leaves_the_weights_untouched(where):
    "In the first or the last of two micro-batches; the message names the batch at fault."
    layer = torch.nn.Linear(2, 1)
    objective = mock.MagicMock(side_effect=lambda batch: {"loss": layer(batch["fields"]).mean()}, spec=layer)
    objective.parameters = layer.parameters
    batches = [{"fields": torch.ones(1, 2), "seeds": torch.tensor([k])} for k in range(2)]
    batches[where]["fields"][:] = torch.nan
    recipe, before = Recipe(steps=2, lr=0.1, accumulate=2), [p.clone() for p in layer.parameters()]
    with pytest.raises(TrainingDiverged, match=rf"the loss is nan at step 0 .*seeds \[{where}\]"):
        update(objective, make_optimizer(layer, recipe), batches, recipe, step=0, device=torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))


def test_a_folder_is_claimed_for_one_configuration_and_todays_numbers(smoke):
    run, said = smoke("random", "vit"), []
    folder = pretrain(run, progress=False, say=said.append)
    record = read_json(folder / "provenance.json")
    assert record["data"] and record["seconds"] > 0 and record["parameters"] > 0 and "commit" in record
    assert read_json(folder / "config.json") == run.as_dict()
    assert claim(run, record, True, said.append) and said.pop().endswith("is finished")
    write_json(folder / "config.json", run.as_dict() | {"tag": "other"})
    with pytest.raises(ValueError, match="holds another run .tag: there 'other', asked for ''"):
        claim(run, record, True)
    write_json(folder / "config.json", run.as_dict())
    numbers = record["numbers"]
    for old, now, resume, why in (
        (record | {"numbers": numbers | {"TRAINING": 0}}, record, True, "anew: TRAINING was 0, is"),
        (record, record | {"data": "other"}, True, "anew: its data changed"),
        (record, record, False, "anew: resume is off"),
    ):
        write_json(folder / "provenance.json", old | {"seconds": 50.0})
        (folder / "encoder.safetensors").write_bytes(why.encode())
        (folder / "checkpoint").mkdir(exist_ok=True)
        (folder / "checkpoint" / "last.safetensors").write_bytes(b"days")
        assert not claim(run, now, resume, said.append) and why in said.pop()
        assert (folder / "old-encoder.safetensors").read_bytes() == why.encode(), "put aside"
        assert [p.name for p in (folder / "checkpoint").iterdir()] == ["old-last.safetensors"]
        assert read_json(folder / "provenance.json")["seconds"] == 0.0
    write_json(folder / "provenance.json", record | {"numbers": numbers | {"PROBING": 0}})
    (folder / "encoder.safetensors").write_bytes(b"")
    assert claim(run, record, True, said.append), "how it is probed is no matter of the encoder"


def test_time_elsewhere_does_not_count(smoke):
    "A folder of `make unpack` has results and no encoder."
    run = smoke("mae")
    write_json(run.folder / "provenance.json", {"data": "d", "seconds": 50.0})
    assert not claim(run, {"data": "d"}, True)
    assert read_json(run.trunk / "provenance.json")["seconds"] == 0.0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"system": "shear"}, "unknown system 'shear'; valid: shear_flow, rayleigh_benard, active_matter"),
        ({"recipe": {"warmup": -3}}, "warmup must be a number of updates"),
        ({"recipe": {"warmup": 0.02}}, "recipe: warmup must be int, got 0.02"),
        ({"length": 0.0}, "length must be a positive number"),
        ({"recipe": {"betas": 0.9}}, "recipe: betas must be tuple"),
        ({"recipe": {"foo": 1}}, "recipe has no field foo; it has: steps"),
        ({"recipe": {"weight_decay": float("inf")}}, "weight_decay must be float, got inf"),
        ({"recipe": {"predictor_lr": 0.0}}, "predictor_lr.* must be positive"),
        ({"recipe": {"accumulate": 3}}, "batch_size must be a multiple of accumulate"),
        ({"recipe": {"schedule": "steps"}}, "schedule must be constant or cosine"),
        ({"recipe": {"unlabelled": "with"}}, 'unlabelled must be true, false or "with labels"'),
        ({"steps": 0}, "must be positive"),
        ({"steps": 2.0}, "steps must be int, got 2.0"),
        ({"tag": "a/b"}, "tag may hold letters"),
        ({"objective": "frozen", "encoder": "vit"}, "frozen probes an encoder of your own"),
    ],
)
def test_what_no_run_can_have_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        resolve(**{"system": "shear_flow", "objective": "mae", "preset": "smoke", **wrong})


def test_data_and_coefficients_are_asked_for_before_any_work(smoke):
    with pytest.raises(ValueError, match="preset paper does not simulate shear_flow: pass data_dir"):
        ensure_data(resolve("shear_flow", "mae", preset="paper"))
    with pytest.raises(ValueError, match="no coefficient ratoi"):
        pretrain(smoke("mae", coefficients={"ratoi": 0.5}))
    plain = replace(get_preset("smoke"), augment=False)
    run = smoke("invariance", "vit", plain, coefficients={"of": "window"})
    with pytest.raises(ValueError, match="two views of the same frames .* and preset smoke has none"):
        training_batches(run, training_windows(run))


def test_a_run_is_all_that_decides_numbers(smoke_data):
    run = resolve("shear_flow", "mae", preset="smoke")
    same = (
        dict(seed=3),
        dict(recipe={"evaluations": 7}),
        dict(steps=9),
        dict(length=16),
        dict(data_dir=smoke_data),
        dict(run_dir="elsewhere"),
    )
    assert {resolve("shear_flow", "mae", preset="smoke", **one).hash for one in same} == {run.hash}
    others = [dict(lr=2e-3), dict(coefficients={"ratio": 0.25}), dict(encoder_config={"depth": 2}), dict(tag="x")]
    others += [dict(recipe={"warmup": 30}), dict(preset=replace(get_preset("smoke"), paper_labels=True))]
    hashes = {resolve("shear_flow", "mae", **{"preset": "smoke", **other}).hash for other in others}
    assert len(hashes | {run.hash}) == 1 + len(others)
    a, b = (build(run.with_seed(s)).encoder.state_dict() for s in (0, 1))
    assert any(not torch.equal(a[k], b[k]) for k in a), "two seeds start from two encoders"


def test_the_papers_presets_scale_labels_with_the_papers_constants():
    train = mock.Mock(root="data", labels=np.array([[1e4, 0.1], [1e5, 1.0], [5e5, 10.0]]))
    paper, laptop = (resolve("shear_flow", "mae", preset=p) for p in ("paper", "laptop"))
    scaler = label_scaler(paper, train)
    assert scaler.mean.tolist() == [4.85, 2.69] and scaler.std.tolist() == [0.61, 3.38]
    assert np.allclose(scaler.transform(train.labels)[:, 1], (train.labels[:, 1] - 2.69) / 3.38), "Sc is not logged"
    assert np.allclose(scaler.low, scaler.transform(train.labels).min(0))
    assert np.allclose(label_scaler(laptop, train).transform(train.labels).mean(0), 0)


@pytest.mark.parametrize(
    "objective, unlabelled, splits, labels",
    [
        ("mae", True, "train+unlabelled", False),
        ("mae", False, "train", True),
        ("supervised", True, "train", True),
        ("supervised", "with labels", "train+unlabelled", True),
    ],
)
def test_labels_that_nobody_is_to_learn_from_are_not_in_batches(objective, unlabelled, splits, labels, smoke):
    run = smoke(objective, "vit", recipe={"unlabelled": unlabelled})
    batches = training_batches(run, training_windows(run))
    assert run.trained_on == splits and ("labels" in next(iter(batches["train"](0)))) == labels
    assert "labels" in next(iter(batches["valid"].evaluation()))


@pytest.mark.parametrize(
    "system, preset, asked, padding",
    [
        ("shear_flow", "laptop", "circular", "circular"),  # as it was asked for: the box closes on itself
        ("shear_flow", "laptop", "periodic", ["circular", "circular"]),
        ("rayleigh_benard", "laptop", "periodic", ["circular", "zeros"]),
        ("rayleigh_benard", "laptop", "circular", ["circular", "zeros"]),
        ("rayleigh_benard", "laptop", ["zeros", "reflect"], ["zeros", "reflect"]),
        ("shear_flow", "paper", ["circular", "circular"], ["circular", "zeros"]),
    ],
)
def test_a_convolution_does_not_wrap_across_a_wall_or_a_crop(system, preset, asked, padding):
    found = resolve(system, "jepa", "convnext", preset, encoder_config={"padding_mode": asked})
    assert found.encoder_config["padding_mode"] == padding


def test_what_is_found_once_for_a_network_is_found_again_for_another():
    "Frames, views and operations are kept by this key: weights do not matter to them, options and the system do."

    def key(system: str = "shear_flow", **changes) -> tuple:
        return resolve(system, "jepa", "vit", "smoke", **changes).network_key

    assert key() == key(seed=1) == key(steps=3, lr=0.1) == key(tag="x")
    others = (key("active_matter"), key(coefficients={"horizon": 4}), key(encoder_config={"depth": 2}))
    assert len({key(), *others}) == 4
    runs = [resolve("shear_flow", "forecast", "vit", "smoke", steps=steps) for steps in (2, 6)]
    assert cost(runs[1])["total"] == 3 * cost(runs[0])["total"] > 0
    assert cost(replace(runs[0], recipe=None)) == {"encode": cost(runs[0])["encode"], "train": 0, "total": 0}


def test_large_clips_are_watched_in_smaller_parts(smoke, monkeypatch):
    run, sizes, original = smoke("forecast", "vit", steps=2), [], watch.pooled
    counted = lambda batches: (sizes.append(len(one["seeds"])) or one for one in batches)  # noqa: E731
    monkeypatch.setattr(watch, "pooled", lambda encoder, batches, t: original(encoder, counted(batches), t))
    monkeypatch.setattr(watch, "MOST_NUMBERS", 3 * 4 * int(np.prod(run.clip_shape)))
    curve = pd.read_csv(pretrain(run, **quiet) / "curve.csv")
    assert 1 < max(sizes) <= 4 and np.isfinite(curve.online).all(), "one that would be alone goes with others"


LONG = """
import json, os, sys, torch
from physrep.data import windows
from physrep.training.pretrain import pretrain
from physrep.training.run import resolve

torch.set_num_threads(1)
windows._fits = lambda *_: False  # windows are read from their files, as those of a large set
seen = []

def look(row):
    pages = int(open("/proc/self/statm").read().split()[1])
    seen.append((row["step"], pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))

options = dict(steps=1500, recipe={"checkpoint_seconds": 5.0}, data_dir=sys.argv[1], run_dir=sys.argv[2])
pretrain(resolve("shear_flow", "mae", preset="smoke", **options), progress=False, on_metrics=look)
print(json.dumps(seen))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the kernel says there how much memory a process has")
def test_memory_and_open_files_do_not_grow_over_a_thousand_updates(smoke_data, tmp_path):
    command = [sys.executable, "-c", LONG, str(smoke_data), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = pd.DataFrame(json.loads(done.stdout.splitlines()[-1]), columns=["step", "bytes", "files"])
    early, late = seen[seen.step.between(200, 500)], seen[seen.step >= 1200]
    assert late.bytes.median() < early.bytes.median() + 20e6, "twenty million bytes over 1000 updates"
    assert late.files.max() <= early.files.max()

"""The training loop: killed and resumed runs are the same runs, for every objective; the run folder's guards."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from physrep.core.files import read_json, write_json
from physrep.models.pretrained import load_encoder, save_encoder
from physrep.objectives.methods import OBJECTIVES
from physrep.training import watch
from physrep.training.loop import TimeUp, TrainingDiverged
from physrep.training.presets import get_preset
from physrep.training.pretrain import claim, plot_metrics, pretrain, training_batches, training_windows
from physrep.training.run import build, ensure_data, label_scaler, resolve

ROOT = Path(__file__).resolve().parent.parent
quiet = dict(progress=False, say=lambda text: None)

# Trains in another process. In the third save it stops in the middle: after the temporary file is written, before it is
# renamed.
CHILD = """
import os, sys, time, torch
torch.set_num_threads(1)
import physrep.training.loop, physrep.training.pretrain, physrep.training.run
data, runs, moment, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
if moment == "save":
    original, count = os.replace, [0]
    def replace(a, b):
        count[0] += str(b).endswith("last.safetensors")
        if count[0] == 3:
            open(runs + "/ready", "w").close()
            time.sleep(60)
        original(a, b)
    os.replace = replace
run = physrep.training.run.resolve("shear_flow", sys.argv[5], preset="smoke", steps=steps)
physrep.training.pretrain.pretrain(run, data, runs, checkpoint_seconds=0, progress=False)
"""


@pytest.mark.parametrize(
    "objective,moment",
    [("jepa", "any"), ("supervised", "save"), pytest.param("mae", "any", marks=pytest.mark.long)],
)
def test_killed_run_resumes_to_the_same_bits(objective, moment, smoke_data, tmp_path):
    steps = 8
    run = resolve("shear_flow", objective, preset="smoke", steps=steps)
    whole = pretrain(run, smoke_data, tmp_path / "whole", **quiet)
    (tmp_path / "killed").mkdir()
    command = [sys.executable, "-c", CHILD, str(smoke_data), str(tmp_path / "killed"), moment, str(steps), objective]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    folder, deadline = run.folder(tmp_path / "killed"), time.monotonic() + 90
    sign = tmp_path / "killed" / "ready" if moment == "save" else folder / "checkpoint" / "last.safetensors"
    while not sign.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert sign.exists() and not (folder / "encoder.safetensors").exists(), "killed before the end"
    resumed = pretrain(run, smoke_data, tmp_path / "killed", **quiet)
    a, b = load_file(whole / "encoder.safetensors"), load_file(resumed / "encoder.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for file in ("metrics.csv", "curve.csv"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes(), file


def test_the_learning_curve_is_of_finished_encoders(smoke_data, tmp_path):
    "A run of 64 updates finishes encoders after 1, 4 and 16; each is that of a shorter run with the same warm-up."
    options = dict(preset="smoke", recipe={"warmup": 1 / 32})
    run = resolve("shear_flow", "forecast", steps=64, **options)
    folder = pretrain(run, smoke_data, tmp_path / "long", **quiet)
    curve = pd.read_csv(folder / "curve.csv")
    assert curve.step.tolist() == [0, 1, 4, 16, 64]
    assert {"online", "online_Reynolds", "online_Schmidt", "gate", "gate_persistence", "effective_rank"} <= set(curve)
    short = resolve("shear_flow", "forecast", steps=16, preset="smoke", recipe={"warmup": 1 / 8})
    other = pretrain(short, smoke_data, tmp_path / "short", **quiet)
    a, b = load_file(folder / "curve" / "16.safetensors"), load_file(other / "encoder.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert load_encoder(folder / "curve" / "16.safetensors").info["objective"] == "forecast"
    assert curve.online[3] == pd.read_csv(other / "curve.csv").online.iloc[-1]
    random = pretrain(resolve("shear_flow", "random", "vit", preset="smoke"), smoke_data, tmp_path / "random", **quiet)
    assert pd.read_csv(random / "curve.csv").online.tolist() == [curve.online[0]], "where it starts from"


# disco takes as long as all others together; test_disco trains it
@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - {"random", "frozen", "disco"}))
@pytest.mark.parametrize("encoder", ["vit", "convnext"])
def test_every_method_trains_on_both_backbones(objective, encoder, smoke_data, tmp_path):
    run = resolve("shear_flow", objective, encoder, preset="smoke", steps=2, batch_size=4)
    folder = pretrain(run, smoke_data, tmp_path, **quiet)
    last = pd.read_csv(folder / "curve.csv").iloc[-1]
    assert last.step == 2 and np.isfinite(last.online)
    assert objective == "supervised" or np.isfinite(last.gate)


def test_a_whitened_target_is_fitted_by_the_first_update(smoke_data, tmp_path):
    run = resolve("shear_flow", "forecast", preset="smoke", steps=2, batch_size=4, coefficients={"target": "whitened"})
    curve = pd.read_csv(pretrain(run, smoke_data, tmp_path, **quiet) / "curve.csv")
    assert np.isnan(curve.gate.iloc[0]) and np.isfinite(curve.gate.iloc[-1])


@pytest.mark.parametrize(
    "change", [{"accumulate": 2}, {"predictor_lr": 3.0}], ids=["micro-batches", "a faster predictor"]
)
def test_in_pieces(change, smoke_data, tmp_path):
    "A time limit stops with a checkpoint; called again and again the run is finished, and is the undisturbed one."
    run = resolve("shear_flow", "jepa", "vit", preset="smoke", steps=4, recipe=change)
    whole, pieces = pretrain(run, smoke_data, tmp_path / "a", **quiet), 0
    while True:
        try:
            done = pretrain(run, smoke_data, tmp_path / "b", minutes=1e-9, **quiet)
            break
        except TimeUp as stop:
            pieces += 1
            assert f"at update {pieces} of 4" in str(stop)
    assert pieces == 3
    assert (whole / "encoder.safetensors").read_bytes() == (done / "encoder.safetensors").read_bytes()


def test_a_diverging_run_keeps_its_checkpoint(smoke_data, tmp_path):
    run = resolve("shear_flow", "supervised", preset="smoke", lr=1e17, steps=50, recipe={"clip_norm": 1e30})
    with pytest.raises(TrainingDiverged, match=r"at step \d+ \(learning rate .*seeds .*The last checkpoint is kept"):
        pretrain(run, smoke_data, tmp_path, checkpoint_seconds=0, **quiet)
    folder = run.folder(tmp_path)
    assert not (folder / "encoder.safetensors").exists()
    tensors = load_file(folder / "checkpoint" / "last.safetensors")
    assert all(torch.isfinite(t).all() for t in tensors.values())


def test_finished_run_is_kept_and_changed_data_are_noticed(smoke_data, tmp_path):
    from dataclasses import replace

    from physrep.data.generate import make_dataset
    from physrep.training.presets import get_preset

    run = resolve("shear_flow", "random", "vit", preset="smoke")
    folder = pretrain(run, smoke_data, tmp_path, **quiet)
    stamp, said = (folder / "encoder.safetensors").stat().st_mtime_ns, []
    pretrain(run, smoke_data, tmp_path, progress=False, say=said.append)
    assert (folder / "encoder.safetensors").stat().st_mtime_ns == stamp and "is finished" in said[0]
    make_dataset(
        "shear_flow",
        replace(get_preset("smoke").sim("shear_flow"), n_frames=20),
        tmp_path / "other",
        workers=1,
        progress=False,
    )
    pretrain(run, tmp_path / "other", tmp_path, progress=False, say=said.append)
    assert "anew: its data changed" in said[1]


def test_an_encoder_of_other_code_is_not_probed_as_one_of_today(smoke_data, tmp_path):
    from physrep.probing.evaluate import score_run

    run = resolve("shear_flow", "random", "vit", preset="smoke")
    folder = pretrain(run, smoke_data, tmp_path, **quiet)
    record = read_json(folder / "provenance.json")
    write_json(folder / "provenance.json", record | {"code": "0123456789abcdef"})
    with pytest.raises(ValueError, match="seed0 was trained by other code than today's; train it again"):
        score_run(run, smoke_data, tmp_path, probes=["linear"], progress=False)
    assert not (folder / "result-linear.json").exists()
    pretrain(run, smoke_data, tmp_path, **quiet)
    assert score_run(run, smoke_data, tmp_path, probes=["linear"], progress=False).rows


def test_run_folder_is_complete(smoke_data, tmp_path):
    run = resolve("shear_flow", "jepa", preset="smoke", steps=4)
    folder = pretrain(run, smoke_data, tmp_path, **quiet)
    assert read_json(folder / "config.json") == run.as_dict()
    record = read_json(folder / "provenance.json")
    assert {"code", "data", "versions", "device", "seconds", "commit"} <= record.keys()
    metrics = pd.read_csv(folder / "metrics.csv")
    assert {
        "step",
        "lr",
        "loss",
        "invariance",
        "variance",
        "covariance",
        "valid_loss",
        "feature_std",
        "effective_rank",
    } <= set(metrics)
    info = load_encoder(folder).info
    assert (
        info["channels"] == ["tracer", "pressure", "velocity_x", "velocity_y"]
        and info["dt"] == 0.2
        and info["shape"] == [16, 32, 32]
    )
    assert run.window_frames == 16 + run.coefficients["horizon"] and not run.views


def test_names_are_checked_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="unknown system 'shear'; valid: shear_flow, rayleigh_benard, active_matter"):
        resolve("shear", "mae")
    with pytest.raises(ValueError, match="preset paper does not simulate shear_flow: pass data_dir"):
        ensure_data(resolve("shear_flow", "mae", preset="paper"))
    with pytest.raises(ValueError, match="no coefficient ratoi"):
        pretrain(resolve("shear_flow", "mae", preset="smoke", coefficients={"ratoi": 0.5}), tmp_path, tmp_path)


def test_a_random_run_reports_how_much_its_features_vary(smoke_data, tmp_path):
    folder = pretrain(resolve("shear_flow", "random", "convnext", preset="smoke"), smoke_data, tmp_path, **quiet)
    (row,) = pd.read_csv(folder / "metrics.csv").to_dict("records")
    assert row["feature_std"] > 0 and row["effective_rank"] > 1


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"recipe": {"warmup": -3}}, "warmup must be a share"),
        ({"recipe": {"foo": 1}}, "recipe has no foo"),
        ({"steps": 0}, "steps, lr, accumulate and clip_norm must be positive"),
        ({"steps": 2.0}, "steps must be int, got 2.0"),
        ({"recipe": {"weight_decay": float("inf")}}, "weight_decay a number from 0, got 0.1 and inf"),
        ({"recipe": {"predictor_lr": 0.0}}, "predictor_lr must be a positive number .1: that of the encoder., got 0.0"),
    ],
)
def test_recipes_are_checked(wrong, message):
    with pytest.raises(ValueError, match=message):
        resolve("shear_flow", "mae", preset="smoke", **wrong)


def test_seeds_and_objectives_share_what_they_should(smoke_data, tmp_path):
    "Two seeds give two encoders; the random encoder of a seed is where the training of that seed starts."
    a, b = (build(resolve("shear_flow", "mae", preset="smoke", seed=s)).encoder.state_dict() for s in (0, 1))
    assert any(not torch.equal(a[k], b[k]) for k in a)
    random = load_encoder(
        pretrain(resolve("shear_flow", "random", "vit", preset="smoke"), smoke_data, tmp_path, **quiet)
    ).encoder.state_dict()
    assert all(torch.equal(a[k], random[k]) for k in a)


def test_a_run_is_all_that_decides_numbers():
    run = resolve("shear_flow", "mae", preset="smoke")
    assert run.hash == resolve("shear_flow", "mae", preset="smoke", seed=3).hash
    others = [
        dict(lr=2e-3),
        dict(coefficients={"ratio": 0.25}),
        dict(encoder_config={"depth": 2}),
        dict(recipe={"warmup": 0.3}),
        dict(tag="x"),
    ]
    hashes = {resolve("shear_flow", "mae", preset="smoke", **other).hash for other in others}
    assert len(hashes | {run.hash}) == 1 + len(others)
    assert resolve("shear_flow", "mae", preset="smoke", recipe={"evaluations": 7}).hash == run.hash, "only watching"


def test_the_papers_presets_scale_labels_with_the_papers_constants():
    class Train:
        root = "data"
        labels = np.array([[1e4, 0.1], [1e5, 1.0], [5e5, 10.0]])

    paper, laptop = (resolve("shear_flow", "mae", preset=p) for p in ("paper", "laptop"))
    scaler = label_scaler(paper, Train)
    assert scaler.mean.tolist() == [4.85, 2.69] and scaler.std.tolist() == [0.61, 3.38]
    assert np.allclose(scaler.transform(Train.labels)[:, 1], (Train.labels[:, 1] - 2.69) / 3.38), "Sc is not logged"
    assert np.allclose(scaler.low, scaler.transform(Train.labels).min(0))
    assert np.allclose(scaler.high, scaler.transform(Train.labels).max(0))
    assert np.allclose(label_scaler(laptop, Train).transform(Train.labels).mean(0), 0)


def test_labels_of_the_paper_make_another_run():
    from dataclasses import replace

    from physrep.training.presets import get_preset

    plain = resolve("shear_flow", "supervised", "vit", "smoke")
    paper = resolve("shear_flow", "supervised", "vit", replace(get_preset("smoke"), paper_labels=True))
    assert plain.hash != paper.hash and [label.log for label in paper.system.labels] == [True, False]


def test_metrics_are_heard_as_they_are_made(smoke_data, tmp_path):
    heard = []
    folder = pretrain(
        resolve("shear_flow", "mae", preset="smoke"), smoke_data, tmp_path, on_metrics=heard.append, **quiet
    )
    assert [row["step"] for row in heard] == pd.read_csv(folder / "metrics.csv").step.tolist()


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

run = resolve("shear_flow", "mae", preset="smoke", steps=1500)
pretrain(run, sys.argv[1], sys.argv[2], progress=False, checkpoint_seconds=5, on_metrics=look)
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
    assert len(early) >= 3 and len(late) >= 3
    assert late.bytes.median() < early.bytes.median() + 20e6, "twenty million bytes over 1000 updates"
    assert late.files.max() <= early.files.max()


def test_the_attention_of_a_vit_is_counted_as_the_products_that_it_is():
    """Ours, PyTorch's kernel and plain products: equal forwards. Backwards the kernel computes the weights once more,
    and so does ours where it has not kept them."""
    from unittest import mock

    from physrep.models import vit
    from physrep.training.cost import count_flops, example_batch

    def kernel(qkv):
        return vit.F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)

    def products(qkv):
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)

    run = resolve("shear_flow", "supervised", "vit", "laptop")
    objective = build(run)
    batch = example_batch(run, objective, 2)
    counts = []
    ours = vit.ProductAttention.apply
    for attention, kept in ((vit.attention, 0), (ours, 0), (ours, vit.KEPT), (kernel, 0), (products, 0)):
        with mock.patch.object(vit, "attention", attention), mock.patch.object(vit, "KEPT", kept):
            forward = count_flops(lambda: objective(batch))
            counts.append((forward, count_flops(lambda: objective(batch)["loss"].backward())))
    usual, computed_again, kept, (forward, both), (forward_products, both_products) = counts
    tokens = 4 * 8 * 8
    once = run.encoder_config["depth"] * 2 * 2 * tokens**2 * run.encoder_config["dim"]
    assert forward == forward_products > 2 * once
    assert both == both_products + once
    assert usual == computed_again == (forward, both) and kept == (forward, both_products)


@pytest.mark.parametrize("objective", ["invariance", "forecast"])
def test_the_cost_of_an_objective_with_views_is_counted(objective):
    from physrep.training.cost import cost, example_batch

    run = resolve("shear_flow", objective, "vit", "smoke")
    model = build(run)
    batch = example_batch(run, model, 3)
    assert [len(x) for x in batch["views"]] == [3] * len(model.views)
    assert [x.shape[2] for x in batch["views"]] == [view.frames for view in model.views]
    assert cost(run)["train"] > cost(run)["encode"] > 0


def test_operations_are_counted_once_for_all_seeds_and_lengths(monkeypatch):
    from physrep.training import cost as module

    sizes, count = [], module._count
    monkeypatch.setattr(module, "_COUNTED", {})
    monkeypatch.setattr(module, "_count", lambda run, size: sizes.append(size) or count(run, size))
    runs = [
        resolve("shear_flow", "mae", "vit", "smoke", seed=seed, recipe={"steps": steps, "batch_size": size})
        for seed, steps, size in ((0, 2, 4), (1, 6, 4), (0, 2, 8))
    ]
    first, longer, larger = map(module.cost, runs)
    assert sizes == [4, 8] and longer["total"] == 3 * first["total"] == 1.5 * larger["total"]
    module.cost(replace(runs[0], encoder_config={**runs[0].encoder_config, "depth": 2}))
    module.cost(replace(runs[0], coefficients={**runs[0].coefficients, "ratio": 0.25}))
    assert sizes == [4, 8, 4, 4], "another network or question is counted anew"
    assert module.cost(replace(runs[0], recipe=None))["train"] == 0 and sizes[-1] == 0


class Twice(torch.nn.Module):
    "An objective that has its encoder under two names, and says a number that is no tensor."

    def __init__(self, encoder, *, system, shape):
        super().__init__()
        self.encoder, self.shape = encoder, shape
        self.net = torch.nn.Sequential(encoder, torch.nn.Linear(encoder.dim, 1))
        self.trains = True

    def forward(self, batch):
        return {"loss": self.net(batch["fields"]).square().mean(), "temperature": 0.5}


def test_an_objective_may_share_weights_and_say_plain_numbers(smoke_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_twice", sys.modules[__name__])
    run = resolve("shear_flow", "my_twice:Twice", "vit", "smoke", steps=4)
    with pytest.raises(TimeUp):
        pretrain(run, smoke_data, tmp_path / "two", minutes=0, **quiet)
    folder, whole = (pretrain(run, smoke_data, tmp_path / name, **quiet) for name in ("two", "one"))
    assert set(pd.read_csv(folder / "metrics.csv").temperature) == {0.5}
    a, b = (load_file(f / "checkpoint" / "last.safetensors") for f in (folder, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), "resumed in the middle"
    assert any(k.startswith("model.net.0.") for k in a) and any(k.startswith("model.encoder.") for k in a)


def test_an_encoder_may_use_a_weight_twice(tmp_path):
    encoder = build(resolve("shear_flow", "random", "vit", "smoke")).encoder
    encoder.again = encoder.blocks[0].mlp if hasattr(encoder.blocks[0], "mlp") else encoder.blocks[0]
    about = dict(system="shear_flow", mean=torch.zeros(4), std=torch.ones(4), shape=(4, 8, 8), dt=0.2)
    save_encoder(tmp_path / "encoder.safetensors", encoder, "vit", **about)
    found = load_file(tmp_path / "encoder.safetensors")
    assert found.keys() == encoder.state_dict().keys()


def test_large_clips_are_watched_in_smaller_parts(smoke_data, tmp_path, monkeypatch):
    run = resolve("shear_flow", "forecast", "vit", "smoke", steps=2)
    sizes = []
    original = watch.pooled
    monkeypatch.setattr(
        watch, "pooled", lambda e, b, f: original(e, (sizes.append(len(x["seeds"])) or x for x in b), f)
    )
    usual = pretrain(run, smoke_data, tmp_path / "usual", **quiet)
    assert max(sizes) > 4
    sizes.clear()
    clip = run.clip_shape  # (t, h, w)
    monkeypatch.setattr(watch, "MOST_NUMBERS", 3 * 4 * clip[0] * clip[1] * clip[2])
    parts = pretrain(run, smoke_data, tmp_path / "parts", **quiet)
    assert max(sizes) <= 4, "one that would be alone goes with others"
    a, b = (pd.read_csv(f / "curve.csv").online for f in (usual, parts))
    assert np.allclose(a, b, rtol=1e-4)


def test_labels_that_nobody_is_to_learn_from_are_not_in_batches(smoke_data):
    for objective, there in (("mae", False), ("supervised", True)):
        run = resolve("shear_flow", objective, "vit", "smoke")
        batches = training_batches(run, training_windows(run, smoke_data))
        assert ("labels" in next(iter(batches["train"](0)))) == there, objective
        assert "labels" in next(iter(batches["valid"].evaluation()))


def test_what_was_trained_by_other_code_is_put_aside_and_time_elsewhere_does_not_count(tmp_path):
    folder = tmp_path / "mae-vit" / "seed0"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "last.safetensors").write_bytes(b"days")
    write_json(folder / "provenance.json", {"code": "old", "data": "d", "seconds": 50.0})
    assert not claim(folder, {}, {"code": "new", "data": "d"}, True, lambda text: None)
    assert (folder / "checkpoint" / "old-last.safetensors").read_bytes() == b"days"
    assert not (folder / "checkpoint" / "last.safetensors").exists()
    unpacked = tmp_path / "jepa-vit" / "seed0"
    write_json(unpacked / "provenance.json", {"code": "new", "data": "d", "seconds": 50.0})
    assert not claim(unpacked, {}, {"code": "new", "data": "d"}, True, lambda text: None)
    assert read_json(unpacked / "provenance.json")["seconds"] == 0.0


def test_a_figure_of_the_loss_needs_no_evaluations(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2.0\n2,1.0\n")
    assert len(plot_metrics([tmp_path]).axes[0].lines) == 2


def test_two_views_of_the_same_frames_need_symmetries(smoke_data):
    preset = replace(get_preset("smoke"), augment=False)
    run = resolve("shear_flow", "invariance", "vit", preset, coefficients={"of": "window"})
    with pytest.raises(ValueError, match="two views of the same frames .* and preset smoke has none"):
        training_batches(run, training_windows(run, smoke_data))
    assert training_batches(replace(run, clip=replace(run.clip, augment=True)), training_windows(run, smoke_data))

"""Probes: known answers, selection on valid only, intervals, files; fine-tuning; results that are today's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor

from physrep.core.files import read_json, write_json, write_tensors
from physrep.core.provenance import PROBING
from physrep.data.batches import Batches
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.windows import Windows
from physrep.models.pretrained import load_encoder
from physrep.physics.systems import Label, System, get_system
from physrep.probing import finetune, frozen
from physrep.probing.evaluate import measure, score_run, valid_scores
from physrep.probing.features import Features, encoder_digest, features_of, probe_splits, probed_splits
from physrep.probing.finetune import FINE_TUNED, fine_tune, fit_finetune
from physrep.probing.frozen import (
    PROBES,
    AttentiveRecipe,
    ProbeKind,
    conformal_half_width,
    fit_probe,
    load_probe,
    new_head,
    ridge_path,
    squared_error,
    standardiser,
    token_standardiser,
)
from physrep.probing.records import stale
from physrep.training.loop import warmup_cosine
from physrep.training.pretrain import pretrain, restore, training_batches, training_windows
from physrep.training.run import Run, resolve

SYSTEM = get_system("shear_flow")
QUICK = {"attentive": {"recipe": AttentiveRecipe(epochs=3, head={"heads": 4, "mlp_ratio": 2.0})}}
LABELS = Label("length", log=True, paper_log=True, latex="l"), Label("drag", log=False, paper_log=False)
SYSTEMS = [SYSTEM, System("pendulum", "Pendulum", (), LABELS)]
SYSTEMS.append(replace(SYSTEM, labels=(SYSTEM.labels[0], replace(SYSTEM.labels[1], log=False))))


def make(seed: int, n_groups: int = 40, windows: int = 3, dim: int = 16) -> Features:
    rng = np.random.default_rng(seed)
    u = rng.uniform(-1, 1, (n_groups, 2)).repeat(windows, 0)
    x = rng.normal(size=(len(u), 6, dim))
    x[:, :, :2] += u[:, None]
    return Features(x.astype(np.float16), 10 ** (u + [5, 0]), np.arange(n_groups).repeat(windows), {"encoder": "0123"})


TRAIN, VALID, TEST = (make(seed) for seed in range(3))
SCALER = LabelScaler.fit(SYSTEM, TRAIN.labels)


def standardised(f: Features, by: Features, reading: str = "pooled") -> np.ndarray:
    mean, scale = standardiser(getattr(by, reading).numpy())
    return (getattr(f, reading).numpy() - mean) * scale


def test_ridge_path_is_scikit_learns_and_the_pseudo_inverse_without_penalty():
    rng = np.random.default_rng(0)
    for n, d in ((40, 7), (7, 40)):
        x, y = rng.normal(size=(n, d)), rng.normal(size=(n, 2))
        for lam, weight in zip((1e-3, 1.0), ridge_path(x, y, (1e-3, 1.0))):
            assert np.allclose(weight.T, Ridge(alpha=n * lam, fit_intercept=False).fit(x, y).coef_, atol=1e-8)
    x = rng.normal(size=(30, 3)) @ rng.normal(size=(3, 9))
    y = rng.normal(size=(30, 2))
    assert np.allclose(ridge_path(x, y, (0.0,))[0], np.linalg.pinv(x) @ y)


def test_knn_and_kernel_are_scikit_learns(monkeypatch):
    x, test, y = standardised(TRAIN, TRAIN), standardised(TEST, TRAIN), SCALER.transform(TRAIN.labels)
    knn = fit_probe("knn", TRAIN, VALID, SCALER)
    reference = KNeighborsRegressor(knn.chosen["k"], metric=knn.chosen["metric"], algorithm="brute").fit(x, y)
    assert np.allclose(knn.predict_z(TEST), reference.predict(test))
    for moments, reading in ((True, "moments"), (False, "pooled")):
        kernel = fit_probe("kernel", TRAIN, VALID, SCALER, moments=moments)
        x, test = standardised(TRAIN, TRAIN, reading), standardised(TEST, TRAIN, reading)
        reference = KernelRidge(alpha=len(x) * kernel.chosen["lambda"], kernel="rbf", gamma=kernel.chosen["gamma"])
        assert np.allclose(kernel.predict_z(TEST), reference.fit(x, y - y.mean(0)).predict(test) + y.mean(0), atol=1e-3)
    monkeypatch.setattr(frozen, "LANDMARKS", 60)  # of 120 windows
    few = [fit_probe("kernel", TRAIN, VALID, SCALER, seed=seed) for seed in (0, 0, 1)]
    assert few[0].arrays["landmarks"].shape == (60, 32) and np.array_equal(few[0].predict(TEST), few[1].predict(TEST))
    assert not np.array_equal(few[0].predict(TEST), few[2].predict(TEST))


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_is_chosen_on_valid_follows_from_its_seed_and_stays_in_range(name):
    options = QUICK.get(name, {})
    probe = fit_probe(name, TRAIN, VALID, SCALER, seed=1, **options)
    best = min(t["valid_mse"] for t in probe.trials)
    assert squared_error(probe.predict_z(VALID), VALID.labels, SCALER) == pytest.approx(best, rel=1e-5)
    assert probe.chosen.items() <= next(t for t in probe.trials if t["valid_mse"] == best).items()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = fit_probe(name, TRAIN, VALID, SCALER, seed=1, **options).predict(TEST)
    assert np.array_equal(again, probe.predict(TEST)) and torch.equal(state, torch.get_rng_state())
    if name == "attentive":
        assert not np.allclose(again, fit_probe(name, TRAIN, VALID, SCALER, seed=2, **options).predict(TEST))
    y, p = np.log10(TRAIN.labels), np.log10(probe.predict(replace(TEST, tokens=TEST.tokens.float() * 100)))
    margin = 0.1 * np.ptp(y, axis=0)
    assert (p >= y.min(0) - margin - 1e-9).all() and (p <= y.max(0) + margin + 1e-9).all()
    assert name != "linear" or np.isclose(p.max(0), y.max(0) + margin).all()


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_probe_from_its_file_is_the_probe_to_the_last_bit(name, system, tmp_path):
    probe = fit_probe(name, TRAIN, VALID, LabelScaler.fit(system, TRAIN.labels), **QUICK.get(name, {}))
    probe.save(tmp_path / "some" / "probe.safetensors", info={"run": "a"})
    again = load_probe(tmp_path / "some" / "probe.safetensors")
    assert again.scaler.system == system and np.array_equal(again.predict(TEST), probe.predict(TEST))
    assert np.array_equal(again.interval(TEST), probe.interval(probe.predict(TEST)))
    same = ("name", "chosen", "trials", "config")
    assert [getattr(again, k) for k in same] == [getattr(probe, k) for k in same]
    assert again.info == {"encoder": "0123", "run": "a"} and probe.info == {"encoder": "0123"}


def test_a_kernel_probe_of_before_reads_the_mean_alone(tmp_path):
    new, old = (fit_probe("kernel", TRAIN, VALID, SCALER, moments=moments) for moments in (True, False))
    old.config.pop("moments")  # as in a file that does not know it
    old.save(tmp_path / "probe")
    again = load_probe(tmp_path / "probe")
    assert np.array_equal(again.predict(TEST), old.predict(TEST)) and again.arrays["mean"].shape == (16,)
    of_one_token = replace(TEST, tokens=TEST.pooled[:, None])
    assert np.array_equal(again.predict(of_one_token), old.predict(TEST)), "the spread is not looked at"
    assert new.config["moments"] and not np.allclose(new.predict(TEST), old.predict(TEST))


def test_lengths_are_branches_of_one_run_each_annealed_to_zero(monkeypatch):
    def errors(**options) -> dict[int, float]:
        recipe = AttentiveRecipe(head={"heads": 4}, warmup=5, **options)
        trials = fit_probe("attentive", TRAIN, VALID, SCALER, recipe=recipe).trials
        return {trial["epochs"]: trial["valid_mse"] for trial in trials}

    seen = []
    usual = AttentiveRecipe.lr_at

    def watched(*args):
        seen.append(usual(*args))
        return seen[-1]

    monkeypatch.setattr(AttentiveRecipe, "lr_at", watched)
    four = errors(epochs=8)
    rates = np.array(seen) / AttentiveRecipe.lr
    assert list(four) == [1, 2, 4, 8] and errors(epochs=4).items() <= four.items()
    assert all(errors(epochs=length, halvings=0) == {length: four[length]} for length in (1, 2, 4, 8))
    # four updates an epoch; the trunk leaves for one epoch at 0, 1 and 3 and for two at 6
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.5, 0.25]) and rates[4:8] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[8:12] == pytest.approx([1, 0.75, 0.5, 0.25]) and (rates[12:20] == 1).all()
    assert rates[-8:] == pytest.approx(np.arange(8, 0, -1) / 8) and len(rates) == 4 * (6 + 1 + 1 + 1 + 2)
    for epochs, lengths in ((1, [1]), (2, [1, 2]), (96, [12, 24, 48, 96]), (100, [12, 25, 50, 100])):
        assert AttentiveRecipe(epochs=epochs).lengths == lengths


def test_files_that_are_no_probe_are_named(tmp_path):
    path = tmp_path / "p.safetensors"
    fit_probe("linear", TRAIN, VALID, SCALER).save(path)
    whole = path.read_bytes()
    for content in (whole[:-7], b"", b"{}", whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="p.safetensors"):
            load_probe(path)
    write_tensors(path, {"tokens": torch.zeros(2)}, {"split": "train"})
    with pytest.raises(ValueError, match="p.safetensors holds no probe .*; a probe is one of constant, linear, knn"):
        load_probe(path)
    other = replace(SYSTEM, labels=tuple(replace(label, name=label.name + "2") for label in SYSTEM.labels))
    fit_probe("linear", TRAIN, VALID, LabelScaler.fit(other, TRAIN.labels)).save(path)
    with pytest.raises(ValueError, match="labels are Reynolds2, Schmidt2; shear_flow has Reynolds, Schmidt"):
        load_probe(path)


def test_what_does_not_fit_is_named():
    for call, message in [
        (lambda: fit_probe("ridge", TRAIN, VALID, SCALER), "unknown probe 'ridge'; valid: constant, linear, knn"),
        (lambda: fit_probe("linear", TRAIN, VALID, SCALER).predict(make(1, dim=8)), "on 16 channels; these have 8"),
        (lambda: fit_probe("linear", TRAIN, VALID, SCALER).interval(TEST, level=90), "between 0 and 1, got 90"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_dead_features_do_not_matter_and_tokens_are_standardised_in_half_precision():
    def with_dead(f: Features, value: float) -> Features:
        return replace(f, tokens=torch.cat([f.tokens.float(), torch.full_like(f.tokens[:, :, :8], value).float()], 2))

    for name in ("linear", "knn", "kernel"):
        probe = fit_probe(name, with_dead(TRAIN, 0.1), with_dead(VALID, 0.1), SCALER)
        plain = fit_probe(name, TRAIN, VALID, SCALER)
        assert np.allclose(probe.predict(with_dead(TEST, 5.0)), plain.predict(TEST), rtol=1e-3)
    tokens = (torch.randn(150, 7, 8, generator=torch.Generator().manual_seed(0)) * 3 + 20).half()
    tokens[:, :, 3] = 1.5
    least = 10 * np.finfo(np.float32).eps
    for value in (0.5, 1.5, -3.0):
        constant = Features(torch.full((1, 2, 1), value, requires_grad=True), np.ones((1, 2)), np.zeros(1))
        assert not constant.tokens.requires_grad
        assert constant.moments[0].tolist() == pytest.approx([value, np.log(least * max(1, abs(value)))])
    mean, scale = token_standardiser(tokens)
    flat, alive = tokens.double().flatten(0, 1).numpy(), np.arange(8) != 3
    assert np.allclose(mean, flat.mean(0), rtol=1e-5) and scale[3] == 0
    assert np.allclose(1 / scale.numpy()[alive], flat.std(0)[alive], rtol=1e-4)


@pytest.mark.parametrize("width, heads", [(16, 8), (12, 4), (9, 1)])
def test_any_width_has_as_many_heads_as_divide_it(width, heads):
    assert new_head(width, 2, {}, 0).heads == heads and new_head(width, 2, {"heads": 1}, 0).heads == 1


def test_intervals_are_order_statistics_cover_fresh_data_and_are_whole_for_few_residuals():
    residuals = np.arange(1.0, 20.0)[::-1, None]  # 1 ... 19, so (n + 1) p = 18 for p = 0.9
    assert conformal_half_width(residuals, 0.9) == [18.0] and conformal_half_width(residuals, 0.95) == [19.0]
    assert np.isinf(conformal_half_width(residuals, 0.951)) and conformal_half_width(residuals, 0.05) == [1.0]
    fresh, inside = make(1000, n_groups=700), []
    for seed in range(12):  # half-widths of one fit, from 40 flows of 3 windows, may be off by several per cent
        train, valid = make(10 + seed), make(100 + seed)
        low, high = fit_probe("linear", train, valid, LabelScaler.fit(SYSTEM, train.labels)).interval(fresh, 0.9)
        inside.append(np.mean((low <= fresh.labels) & (fresh.labels <= high)))
    assert np.mean(inside) == pytest.approx(0.9, abs=0.03)
    few = fit_probe("linear", TRAIN, VALID.subset(np.arange(5)), SCALER)
    edge = SCALER.inverse(SCALER.clip(np.array([[-99.0, -99.0], [99.0, 99.0]])))
    assert np.allclose(few.interval(TEST, 0.99), edge[:, None])


def test_a_probe_of_ones_own_is_an_entry(tmp_path, monkeypatch):
    def fit(train, valid, scaler, *, seed=0):
        return replace(fit_probe("linear", train, valid, scaler), name="twice")

    monkeypatch.setitem(PROBES, "twice", ProbeKind(fit, lambda probe, f: 2 * PROBES["linear"].predict(probe, f)))
    fit_probe("twice", TRAIN, VALID, SCALER).save(tmp_path / "p")
    expected = 2 * fit_probe("linear", TRAIN, VALID, SCALER).predict_z(TEST)
    assert np.array_equal(load_probe(tmp_path / "p").predict_z(TEST), expected)


# --- encoders


@pytest.fixture(scope="module")
def run(smoke_data, tmp_path_factory) -> Run:
    "A random encoder, probed."
    places = dict(data_dir=smoke_data, run_dir=tmp_path_factory.mktemp("runs"))
    run = resolve("shear_flow", "random", "vit", "smoke", **places)
    pretrain(run, progress=False, say=lambda _: None)
    score_run(run, progress=False)
    return run


def test_an_own_head_answers_in_the_scaling_that_it_was_trained_with(smoke_data, tmp_path):
    places = dict(data_dir=smoke_data, run_dir=tmp_path, recipe={"unlabelled": "with labels"})
    run = resolve("shear_flow", "supervised", "vit", "smoke", **places)
    pretrain(run, progress=False, say=lambda _: None)
    found = score_run(run, probes=["linear"], progress=False).predictions["head", "valid"]
    batch = next(iter(training_batches(run, training_windows(run))["valid"].evaluation()))
    with torch.no_grad():
        z = restore(run).eval().predict(batch).double().numpy()
    scaler = LabelScaler.fit(SYSTEM, training_windows(run)["train"].labels)
    assert not np.allclose(scaler.mean, LabelScaler.fit(SYSTEM, probe_splits(run, ("train",))["train"].labels).mean)
    assert np.allclose(scaler.inverse(scaler.clip(z))[0], found[0], rtol=1e-4), "the first window of both"


@pytest.mark.parametrize("most", [None, 16])  # of 256 tokens
def test_a_saved_probe_answers_for_raw_fields_and_starts_a_fine_tuning(run, most, tmp_path):
    encoder, windows = load_encoder(run.folder), probe_splits(run, ("train", "valid"))
    scaler = LabelScaler.fit(SYSTEM, windows["train"].labels)
    kept = {s: features_of(encoder, w, scaler, max_tokens=most, progress=False) for s, w in windows.items()}
    assert kept["train"].tokens.shape[1] == (most or 256)
    fit_probe("attentive", kept["train"], kept["valid"], scaler, **QUICK["attentive"]).save(tmp_path / "probe")
    start, raw = load_probe(tmp_path / "probe"), windows["valid"].read(np.arange(8))
    assert np.allclose(start.predict_fields(encoder, raw, 0.2), start.predict(kept["valid"])[:8], rtol=1e-2)
    with pytest.raises(ValueError, match="fitted on features of the encoder with digest"):
        start.predict_fields(load_encoder("shear_flow"), raw, 0.2)
    scaling = dict(normaliser=Normaliser(encoder.mean, encoder.std), scaler=scaler, batch_size=8)

    def tuned(start=start, seed=0, epochs=2, **options):
        train = Batches(windows["train"], seed=seed, **scaling | options)
        return fit_finetune(encoder, train, Batches(windows["valid"], **scaling), start=start, epochs=epochs, lr=1e-2)

    before, labels = encoder_digest(encoder), kept["valid"].labels
    first, again, parts, other = tuned(), tuned(), tuned(accumulate=2), tuned(seed=1)
    frozen_error = squared_error(start.predict_z(kept["valid"]), labels, scaler)
    assert not any(p.requires_grad for p in first.network.parameters()), "it is no longer trained"
    assert first.trials[0] == {"epoch": 0, "valid_mse": pytest.approx(frozen_error, rel=2e-3)}
    errors = [[t["valid_mse"] for t in one.trials] for one in (first, again, parts, other)]
    assert errors[0] == errors[1] == pytest.approx(errors[2], rel=1e-3) and errors[0][1:] != errors[3][1:]
    assert first.chosen["epoch"] == int(np.argmin(errors[0])) and encoder_digest(encoder) == before, "a copy is trained"
    rates, adamw = [], finetune.torch.optim.AdamW

    class Watched(adamw):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            return super().step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune.torch.optim, "AdamW", Watched)
        tuned()
    n = len(rates)
    assert n > 1 and rates == pytest.approx(
        [1e-2 * warmup_cosine(i, rise=max(1, round(n / 10)), end=n) for i in range(n)]
    )
    with pytest.raises(ValueError, match="starts from an attentive probe of the same encoder, got a linear probe"):
        tuned(start=fit_probe("linear", kept["train"], kept["valid"], scaler))
    with pytest.raises(ValueError, match=r"normaliser=Normaliser\(encoder.mean, encoder.std\)"):
        tuned(normaliser=Normaliser(torch.zeros(4), 2 * torch.ones(4)))


def test_a_result_is_todays_until_something_that_decides_it_changes(run, smoke_data, tmp_path):
    file, windows = run.folder / "result.json", probe_splits(run)
    asked = dict(config=run.with_seed(3).as_dict(), probing=run.preset.probing(), windows=windows)
    assert stale(file, **asked) == stale(run.folder / "few.json", **asked) == []
    assert stale(tmp_path / "result.json") == ["missing"]
    other = Windows(smoke_data, SYSTEM, "valid", frames=16, stride=16)
    for change, reason in [
        ({"config": asked["config"] | {"recipe": {"steps": 9}}}, "config has another recipe"),
        ({"config": {}}, "config has another clip"),
        ({"probing": asked["probing"] | {"epochs": 9}}, "probing has another epochs"),
        ({"windows": windows | {"test": other}}, "other data in test"),
    ]:
        assert stale(file, **asked | change)[0].startswith(reason)
    found = read_json(file)
    assert 0 < found["seconds"] < 600
    found["provenance"]["numbers"]["PROBING"] = 0
    write_json(tmp_path / "result.json", found)
    assert stale(tmp_path / "result.json", **asked) == [f"PROBING was 0, is {PROBING}"]
    write_json(tmp_path / "result.json", {"rows": found["rows"]})
    assert stale(tmp_path / "result.json", **asked) == [], "from elsewhere"


def test_scores_on_valid_are_those_of_the_result(run):
    rows = {
        (r["probe"], r["split"], r["metric"], r["label"]): r["value"]
        for r in read_json(run.folder / "result.json")["rows"]
    }
    for probe, errors in valid_scores(run, progress=False)["valid"].items():
        assert errors == pytest.approx({label: rows[probe, "valid", "mse", label] for label in errors}, rel=1e-4)


def test_what_is_measured_does_not_depend_on_how_many_clips_are_read_at_a_time(run):
    windows, sizes = probe_splits(run, ("valid",))["valid"], []

    def watched(clips: np.ndarray, **about) -> np.ndarray:
        sizes.append(len(clips))
        return clips.mean((2, 3, 4))

    of_one = 4 * int(np.prod(windows.shape))
    found = [measure(windows, watched, memory) for memory in (1, 3 * of_one, len(windows) * of_one)]
    assert sizes[: len(windows)] == [1] * len(windows) and sizes[len(windows)] == 3 and sizes[-1] == len(windows)
    assert np.allclose(found[0], found[1]) and np.allclose(found[0], found[2])


def test_a_rate_that_was_tried_is_kept_until_its_settings_change(run, monkeypatch):
    tried = []

    def watched(*args, **options):
        tried.append(options["lr"])
        return fit_finetune(*args, **options)

    monkeypatch.setattr(finetune, "fit_finetune", watched)
    for rates, seen, expected in [
        ((1e-3,), 32, [1e-3]),
        ((1e-3, 3e-3), 32, [3e-3]),
        ((1e-3, 3e-3), 40, []),  # as many epochs
        ((3e-3,), 32, [3e-3]),  # one is not asked for
        ((3e-3,), 64, [3e-3]),
    ]:
        fine_tune(run, rates=rates, seen=seen, progress=False)
        assert tried == expected
        tried.clear()
    result = read_json(run.folder / FINE_TUNED)
    assert set(result["chosen"]["finetune"]["valid_mse"]) == {"0.003"} and result["finetuning"]["seen"] == 64
    assert {row["split"] for row in result["rows"]} == {*probed_splits(run)} - {"train"}
    with pytest.raises(ValueError, match="was trained with these labels already"):
        fine_tune(resolve("shear_flow", "supervised", "vit", "smoke", data_dir=run.data_dir, run_dir=run.run_dir))


def test_an_encoder_that_other_code_trained_is_not_scored(run):
    path = run.folder / "provenance.json"
    record = read_json(path)
    write_json(path, record | {"numbers": record["numbers"] | {"TRAINING": 0}})
    with pytest.raises(ValueError, match="trained by other code than today's .TRAINING was 0"):
        score_run(run, progress=False)
    write_json(path, record)

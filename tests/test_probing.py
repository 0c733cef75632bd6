"""Probes: known answers, selection on valid only, clipping, determinism, intervals, files, fine-tuning."""

import itertools
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor

from physrep.core.files import read_tensors, write_tensors
from physrep.core.randomness import generator
from physrep.data.batches import Batches
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.windows import Windows
from physrep.experiments import token_reading
from physrep.models.encoders import build_encoder
from physrep.models.pretrained import LoadedEncoder
from physrep.physics.systems import Label, System, get_system
from physrep.probing import token_order
from physrep.probing.evaluate import _finetune
from physrep.probing.features import Features, encoder_digest, extract
from physrep.probing.finetune import FinetuneRecipe, fit_finetune
from physrep.probing.frozen import (
    PROBES,
    AttentiveRecipe,
    ProbeKind,
    fit_probe,
    load_probe,
    new_head,
    ridge_path,
    standardiser,
    token_standardiser,
)
from physrep.probing.prediction import conformal_half_width, squared_error
from physrep.probing.reading import features_of
from physrep.probing.token_order import shuffled
from physrep.training.presets import get_preset

SYSTEM = get_system("shear_flow")
QUICK = {"attentive": {"recipe": AttentiveRecipe(epochs=3)}}


def make(
    seed: int, n_groups: int = 40, windows: int = 3, tokens: int = 6, dim: int = 16, signal: float = 1.0
) -> Features:
    rng = np.random.default_rng(seed)
    u = rng.uniform(-1, 1, (n_groups, 2)).repeat(windows, 0)
    x = rng.normal(size=(len(u), tokens, dim))
    x[:, :, :2] += signal * u[:, None]
    return Features(x.astype(np.float16), 10 ** (u + [5, 0]), np.arange(n_groups).repeat(windows))


@pytest.fixture(scope="module")
def sets() -> tuple[Features, Features, Features, LabelScaler]:
    train, valid, test = (make(s) for s in range(3))
    return train, valid, test, LabelScaler.fit(SYSTEM, train.labels)


def test_ridge_path_is_scikit_learns_even_with_more_features_than_windows():
    rng = np.random.default_rng(0)
    for n, d in ((40, 7), (7, 40)):
        x, y = rng.normal(size=(n, d)), rng.normal(size=(n, 2))
        for lam, weight in zip((1e-3, 1.0), ridge_path(x, y, (1e-3, 1.0))):
            assert np.allclose(weight.T, Ridge(alpha=n * lam, fit_intercept=False).fit(x, y).coef_, atol=1e-8)


def test_ridge_without_penalty_is_the_pseudo_inverse_on_a_rank_deficient_matrix():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3)) @ rng.normal(size=(3, 9))
    y = rng.normal(size=(30, 2))
    assert np.allclose(ridge_path(x, y, (0.0,))[0], np.linalg.pinv(x) @ y)


def test_linear_probe_recovers_an_exactly_linear_label():
    train, valid, test = (make(s, tokens=1) for s in range(3))
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 2)) * 0.05

    def exact(f: Features) -> Features:
        return Features(f.tokens.float(), 10 ** (f.tokens.float().numpy()[:, 0] @ mix + [5, 0]), f.groups)

    train, valid, test = map(exact, (train, valid, test))
    scaler = LabelScaler.fit(SYSTEM, train.labels)
    probe = fit_probe("linear", train, valid, scaler)
    assert squared_error(probe.predict_z(test), test.labels, scaler) < 1e-3
    assert probe.chosen["lambda"] < 1e-4


def test_knn_probe_is_scikit_learns(sets):
    train, valid, test, scaler = sets
    probe = fit_probe("knn", train, valid, scaler)
    mean, scale = standardiser(train.pooled.numpy())
    reference = KNeighborsRegressor(n_neighbors=probe.chosen["k"], metric=probe.chosen["metric"], algorithm="brute")
    reference.fit((train.pooled.numpy() - mean) * scale, scaler.transform(train.labels))
    assert np.allclose(probe.predict_z(test), reference.predict((test.pooled.numpy() - mean) * scale))


def test_kernel_probe_is_scikit_learns_with_every_window_and_near_it_with_half_of_them():
    rng = np.random.default_rng(0)

    def bent(n: int) -> Features:
        u = rng.uniform(-1, 1, (n, 2))
        x = np.concatenate([np.cos(3 * u), np.sin(3 * u), u[:, :1] * u[:, 1:]], axis=1)
        return Features(torch.from_numpy(x[:, None]).float(), 10 ** (u**2 + [5, 0]), np.arange(n))

    train, valid, test = bent(200), bent(60), bent(60)
    scaler = LabelScaler.fit(SYSTEM, train.labels)
    probe = fit_probe("kernel", train, valid, scaler)
    mean, scale = standardiser(train.pooled.numpy())
    reference = KernelRidge(alpha=200 * probe.chosen["lambda"], kernel="rbf", gamma=probe.chosen["gamma"])
    y = scaler.transform(train.labels)
    reference.fit((train.pooled.numpy() - mean) * scale, y - y.mean(0))
    expected = reference.predict((test.pooled.numpy() - mean) * scale) + y.mean(0)
    assert np.allclose(probe.predict_z(test), expected, atol=1e-3)
    error = squared_error(probe.predict_z(test), test.labels, scaler)
    assert error < 0.05 * squared_error(fit_probe("linear", train, valid, scaler).predict_z(test), test.labels, scaler)
    few = [fit_probe("kernel", train, valid, scaler, seed=s, landmarks=100) for s in (0, 0, 1)]
    assert few[0].arrays["landmarks"].shape == (100, 5)
    assert np.array_equal(few[0].predict(test), few[1].predict(test))
    assert not np.array_equal(few[0].predict(test), few[2].predict(test))
    assert squared_error(few[0].predict_z(test), test.labels, scaler) < 0.05


def test_constant_predicts_the_training_mean_of_the_logarithm_and_scores_one_on_train(sets):
    train, valid, _, scaler = sets
    prediction = fit_probe("constant", train, valid, scaler).predict(train)
    assert np.allclose(prediction, 10 ** np.log10(train.labels).mean(0))
    assert np.mean((scaler.transform(prediction) - scaler.transform(train.labels)) ** 2, axis=0) == pytest.approx(
        [1.0, 1.0]
    )


@pytest.mark.parametrize("name", PROBES)
def test_chosen_is_the_best_trial_on_valid_and_its_error_is_reproduced(sets, name):
    train, valid, _, scaler = sets
    probe = fit_probe(name, train, valid, scaler, **QUICK.get(name, {}))
    best = min(t["valid_mse"] for t in probe.trials)
    assert squared_error(probe.predict_z(valid), valid.labels, scaler) == pytest.approx(best, rel=1e-5)
    chosen = next(t for t in probe.trials if t["valid_mse"] == best)
    assert all(chosen[k] == v for k, v in probe.chosen.items())


@pytest.mark.parametrize("name", PROBES)
def test_same_seed_same_probe_and_the_global_generator_is_not_touched(sets, name):
    train, valid, test, scaler = sets
    first = fit_probe(name, train, valid, scaler, seed=1, **QUICK.get(name, {})).predict(test)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    second = fit_probe(name, train, valid, scaler, seed=1, **QUICK.get(name, {})).predict(test)
    assert np.array_equal(first, second) and torch.equal(state, torch.get_rng_state())


def test_another_seed_is_another_attentive_probe(sets):
    train, valid, test, scaler = sets
    first, second = (
        fit_probe("attentive", train, valid, scaler, seed=s, **QUICK["attentive"]).predict(test) for s in (0, 1)
    )
    assert not np.allclose(first, second)


@pytest.mark.parametrize("name", PROBES)
def test_predictions_stay_in_the_range_of_train_extended_by_a_tenth(sets, name):
    train, valid, test, scaler = sets
    probe = fit_probe(name, train, valid, scaler, **QUICK.get(name, {}))
    far = Features(test.tokens.float() * 100, test.labels, test.groups)
    y, p = np.log10(train.labels), np.log10(probe.predict(far))
    margin = 0.1 * np.ptp(y, axis=0)
    assert (p >= y.min(0) - margin - 1e-9).all() and (p <= y.max(0) + margin + 1e-9).all()
    if name == "linear":
        assert np.isclose(p.max(0), y.max(0) + margin).all()


def test_dead_features_do_not_matter(sets):
    train, valid, test, scaler = sets

    def with_dead(f: Features, value: float) -> Features:
        return Features(
            torch.cat([f.tokens.float(), torch.full_like(f.tokens[:, :, :8], value).float()], 2), f.labels, f.groups
        )

    for name in ("linear", "knn", "kernel"):
        probe = fit_probe(name, with_dead(train, 0.1), with_dead(valid, 0.1), scaler)
        plain = fit_probe(name, train, valid, scaler)
        assert np.allclose(probe.predict(with_dead(test, 5.0)), plain.predict(test), rtol=1e-3)


def test_token_standardiser_matches_numpy_on_half_precision():
    tokens = (torch.randn(150, 7, 8, generator=torch.Generator().manual_seed(0)) * 3 + 20).half()
    tokens[:, :, 3] = 1.5
    mean, scale = token_standardiser(tokens)
    flat = tokens.double().flatten(0, 1).numpy()
    assert np.allclose(mean, flat.mean(0), rtol=1e-5) and scale[3] == 0
    alive = np.arange(8) != 3
    assert np.allclose(1 / scale.numpy()[alive], flat.std(0)[alive], rtol=1e-4)


def test_learning_rate_warms_up_and_ends_at_zero():
    recipe = AttentiveRecipe(lr=1.0, warmup=0.1)
    rates = [recipe.lr_at(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) == rates[9]
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_errors_name_what_is_wrong(sets):
    train, valid, test, scaler = sets
    with pytest.raises(ValueError, match="unknown probe 'ridge'; valid: constant, linear, knn, kernel, attentive"):
        fit_probe("ridge", train, valid, scaler)
    with pytest.raises(ValueError, match="16 and 8 channels"):
        fit_probe("linear", train, make(1, dim=8), scaler)
    probe = fit_probe("linear", train, valid, scaler)
    with pytest.raises(ValueError, match="fitted on 16 channels, the features have 8"):
        probe.predict(make(1, dim=8))
    with pytest.raises(ValueError, match="between 0 and 1, got 90"):
        probe.interval(test, level=90)


# --- intervals


def test_half_widths_are_order_statistics():
    residuals = np.arange(1.0, 20.0)[::-1, None]  # 1 ... 19, so (n + 1) p = 18 for p = 0.9
    assert conformal_half_width(residuals, 0.9) == [18.0] and conformal_half_width(residuals, 0.95) == [19.0]
    assert np.isinf(conformal_half_width(residuals, 0.951)) and conformal_half_width(residuals, 0.05) == [1.0]


def test_intervals_cover_fresh_data_as_often_as_they_say():
    "Averaged over fits on fresh samples: half-widths from 40 flows of 3 windows may be off by several per cent."
    fresh = make(1000, n_groups=700)
    for level in (0.5, 0.9):
        inside = []
        for seed in range(12):
            train, valid = make(10 + seed), make(100 + seed)
            scaler = LabelScaler.fit(SYSTEM, train.labels)
            low, high = fit_probe("linear", train, valid, scaler).interval(fresh, level)
            inside.append(np.mean((low <= fresh.labels) & (fresh.labels <= high)))
        assert np.mean(inside) == pytest.approx(level, abs=0.03)


def test_intervals_of_predictions_are_those_of_features_and_stay_in_the_range_of_train(sets):
    train, valid, test, scaler = sets
    probe = fit_probe("linear", train, valid, scaler)
    for a, b in zip(probe.interval(test, 0.8), probe.interval(probe.predict(test), 0.8)):
        assert np.allclose(a, b, rtol=1e-12)
    few = fit_probe("linear", train, valid.subset(np.arange(5)), scaler)
    low, high = few.interval(test, 0.99)  # five residuals say nothing about 99 %
    edge = scaler.inverse(scaler.clip(np.array([[-99.0, -99.0], [99.0, 99.0]])))
    assert np.allclose(low, edge[0]) and np.allclose(high, edge[1])


# --- files


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_from_its_file_is_the_probe_to_the_last_bit(sets, name, tmp_path):
    train, valid, test, scaler = sets
    train = Features(train.tokens, train.labels, train.groups, {"encoder": "0123", "split": "train"})
    options = {"recipe": AttentiveRecipe(epochs=3, head={"heads": 4, "mlp_ratio": 2.0})} if name == "attentive" else {}
    probe, path = fit_probe(name, train, valid, scaler, **options), tmp_path / "some" / "probe.safetensors"
    probe.save(path, info={"run": "a"})
    again = load_probe(path)
    assert np.array_equal(again.predict(test), probe.predict(test)) and np.array_equal(
        again.predict_z(valid), probe.predict_z(valid)
    )
    for a, b in zip(again.interval(test, 0.9), probe.interval(test, 0.9)):
        assert np.array_equal(a, b)
    assert (again.name, again.chosen, again.trials, again.config) == (
        probe.name,
        probe.chosen,
        probe.trials,
        probe.config,
    )
    assert again.info == {"encoder": "0123", "split": "train", "run": "a"} and probe.info == {
        "encoder": "0123",
        "split": "train",
    }
    again.save(tmp_path / "again.safetensors")
    assert np.array_equal(load_probe(tmp_path / "again.safetensors").predict(test), probe.predict(test))


def test_which_labels_are_logarithmic_comes_from_the_file(sets, tmp_path):
    train, valid, test, _ = sets
    linear_schmidt = replace(SYSTEM, labels=(SYSTEM.labels[0], replace(SYSTEM.labels[1], log=False)))
    probe = fit_probe("linear", train, valid, LabelScaler.fit(linear_schmidt, train.labels))
    probe.save(tmp_path / "p.safetensors")
    again = load_probe(tmp_path / "p.safetensors")
    assert [label.log for label in again.scaler.system.labels] == [True, False] and np.array_equal(
        again.predict(test), probe.predict(test)
    )


def test_files_that_are_no_probe_are_named(sets, tmp_path):
    train, valid, _, scaler = sets
    path = tmp_path / "p.safetensors"
    with pytest.raises(FileNotFoundError, match="p.safetensors"):
        load_probe(path)
    fit_probe("linear", train, valid, scaler).save(path)
    whole = path.read_bytes()
    for content in (whole[:-7], whole[:40], b"", b"{}", whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="p.safetensors"):
            load_probe(path)
    write_tensors(path, {"tokens": torch.zeros(2)}, {"split": "train"})
    with pytest.raises(
        ValueError, match="p.safetensors holds no probe; a probe is one of constant, linear, knn, kernel, attentive"
    ):
        load_probe(path)
    other = replace(SYSTEM, labels=tuple(replace(label, name=label.name + "2") for label in SYSTEM.labels))
    fit_probe("linear", train, valid, LabelScaler.fit(other, train.labels)).save(path)
    with pytest.raises(ValueError, match="p.safetensors: labels are Reynolds2, Schmidt2; shear_flow has Reynolds, Sch"):
        load_probe(path)


def test_a_system_of_ones_own_has_probe_files_too(sets, tmp_path):
    train, valid, test, _ = sets
    labels = (Label("length", log=True, paper_log=True, latex="l"), Label("drag", log=False, paper_log=False))
    pendulum = System(name="pendulum", title="Pendulum", fields=(), labels=labels)
    probe = fit_probe("linear", train, valid, LabelScaler.fit(pendulum, train.labels))
    probe.save(tmp_path / "p.safetensors")
    again = load_probe(tmp_path / "p.safetensors")
    assert again.scaler.system == pendulum
    assert np.array_equal(again.predict(test), probe.predict(test))
    assert np.array_equal(again.interval(test), probe.interval(test))


@pytest.mark.parametrize("name", ["shear_flow", "navier_stokes"])
def test_files_of_the_first_version_are_read(sets, name, tmp_path):
    "They name the system within the scaling, and have label names and transforms in two lists."
    train, valid, test, _ = sets
    system = replace(SYSTEM, name=name, labels=(SYSTEM.labels[0], replace(SYSTEM.labels[1], log=False)))
    probe, path = fit_probe("knn", train, valid, LabelScaler.fit(system, train.labels)), tmp_path / "p.safetensors"
    probe.save(path)
    tensors, record = read_tensors(path)
    scaling = {k: record["scaler"][k] for k in ("mean", "std", "low", "high")}
    scaling |= {"system": record.pop("system"), "labels": system.label_names, "log": [True, False]}
    write_tensors(tmp_path / "old.safetensors", tensors, record | {"scaler": scaling})
    again = load_probe(tmp_path / "old.safetensors")
    assert again.scaler.system.name == name and [label.log for label in again.scaler.system.labels] == [True, False]
    assert np.array_equal(again.predict(test), probe.predict(test))


def test_a_probe_of_ones_own_is_an_entry(sets, tmp_path, monkeypatch):
    train, valid, test, scaler = sets

    def fit(train, valid, scaler, *, seed=0):
        return replace(fit_probe("linear", train, valid, scaler), name="twice")

    def twice(probe, f):
        return 2 * PROBES["linear"].predict(probe, f)

    monkeypatch.setitem(PROBES, "twice", ProbeKind(fit, twice))
    probe = fit_probe("twice", train, valid, scaler)
    probe.save(tmp_path / "p.safetensors")
    expected = 2 * fit_probe("linear", train, valid, scaler).predict_z(test)
    assert np.array_equal(load_probe(tmp_path / "p.safetensors").predict_z(test), expected)


# --- encoders


def small_encoder(
    seed: int = 0, normaliser: Normaliser | None = None, shape: tuple[int, int, int] = (4, 32, 32)
) -> LoadedEncoder:
    normaliser = normaliser or Normaliser.identity(SYSTEM)
    torch.manual_seed(seed)
    encoder = build_encoder("vit", in_channels=4, dim=16, depth=1, heads=2, tubelet=(2, 8, 8))
    info = {
        "name": "vit",
        "config": dict(encoder.config),
        "system": "shear_flow",
        "channels": SYSTEM.channels,
        "shape": list(shape),
        "dt": 0.2,
    }
    return LoadedEncoder(encoder, info | {"mean": normaliser.mean.tolist(), "std": normaliser.std.tolist()})


@pytest.fixture(scope="module")
def flows(smoke_data) -> dict[str, Windows]:
    return {
        split: Windows(smoke_data / "shear_flow", "shear_flow", split, frames=4, stride=8)
        for split in ("train", "valid", "test")
    }


def test_a_saved_probe_answers_for_raw_fields_as_for_features(flows, tmp_path):
    normaliser, scaler = (
        Normaliser(torch.tensor([0.1, 0.2, 0.0, 0.0]), torch.tensor([0.5, 2.0, 0.3, 0.3])),
        LabelScaler.fit(SYSTEM, flows["train"].labels),
    )
    encoder = small_encoder(normaliser=normaliser)
    features = {}
    for split, w in flows.items():
        batches = Batches(w, batch_size=16, normaliser=normaliser, scaler=scaler)
        tokens = extract(encoder, batches.evaluation(), progress=False)
        features[split] = Features(
            tokens, w.targets(np.arange(len(w))), w.window_groups(), {"encoder": encoder_digest(encoder)}
        )
    for name in PROBES:
        fit_probe(name, features["train"], features["valid"], scaler, **QUICK.get(name, {})).save(
            tmp_path / f"{name}.safetensors"
        )
        probe = load_probe(tmp_path / f"{name}.safetensors")
        raw = flows["test"].read(np.arange(20))
        assert np.allclose(
            probe.predict_fields(encoder, raw, dt=0.2), probe.predict(features["test"].subset(np.arange(20))), rtol=1e-2
        )
        for stranger in (small_encoder(1, normaliser), small_encoder(0)):  # other weights, another normalisation
            with pytest.raises(ValueError, match=f"{encoder_digest(encoder)}, this one has {encoder_digest(stranger)}"):
                probe.predict_fields(stranger, raw, dt=0.2)
    with pytest.raises(ValueError, match="frames 0.2 apart, got dt=0.4"):
        probe.predict_fields(encoder, raw, dt=0.4)


def test_a_probe_of_averaged_tokens_averages_those_of_raw_fields(flows, tmp_path):
    encoder, scaler = small_encoder(), LabelScaler.fit(SYSTEM, flows["train"].labels)
    kept = {s: features_of(encoder, w, scaler, max_tokens=2, progress=False) for s, w in flows.items()}
    assert kept["test"].tokens.shape[1] == 2 < encoder.embed(flows["test"].read([0]), 0.2, pool=False).shape[1]
    fit_probe("attentive", kept["train"], kept["valid"], scaler, **QUICK["attentive"]).save(tmp_path / "probe")
    raw = flows["test"].read(np.arange(20))
    found = load_probe(tmp_path / "probe").predict_fields(encoder, raw, dt=0.2)
    assert np.allclose(found, load_probe(tmp_path / "probe").predict(kept["test"].subset(np.arange(20))), rtol=1e-2)


@pytest.mark.parametrize("count", [1, 37, 1000])
def test_windows_beyond_memory_are_shuffled_in_blocks(monkeypatch, count):
    tokens = torch.arange(count)[:, None, None].expand(-1, 4, 8).half().contiguous()  # 64 bytes a window
    in_memory = list(shuffled(tokens, 32, "some", 0))
    assert torch.equal(torch.cat(in_memory), torch.randperm(count, generator=generator("some", 0))), (
        "as it always was, up to 8 GB"
    )
    monkeypatch.setattr(token_order, "BLOCK", 64 * 10)
    monkeypatch.setattr(token_order, "BLOCKS_TOGETHER", 5)
    read = []
    monkeypatch.setattr(token_order, "_read_through", lambda block: read.append(block[:, 0, 0].int().tolist()))
    seen = []
    for index in shuffled(tokens, 32, "some", 0, in_any_order=63):
        assert set(index.tolist()) <= {window for block in read for window in block}, "read before it is asked for"
        seen.append(index)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(count))
    assert [len(index) for index in seen] == [len(index) for index in in_memory]
    assert all(block == list(range(block[0], block[-1] + 1)) for block in read) and len(read) == math.ceil(count / 10)
    if count == 1000:
        assert read != sorted(read) and len(set((seen[0] // 10).tolist())) == 5, "a batch has windows of several blocks"
        assert not torch.equal(torch.cat(seen), torch.cat(list(shuffled(tokens, 32, "some", 1, in_any_order=63))))


class Amplitudes:
    "Windows whose labels are the amplitudes of a wave in the two velocity components."

    def __init__(self, seed: int, n: int):
        rng = np.random.default_rng(seed)
        self.system, self.shape, u = SYSTEM, (4, 2, 8, 8), rng.uniform(-1, 1, (n, 2))
        self.fields = rng.normal(0, 0.3, (n, *self.shape)).astype(np.float32)
        self.fields[:, 2:] += (u + 1.5)[:, :, None, None, None] * np.sin(np.pi * np.arange(8) / 2)
        self.labels = 10 ** (u + [5.0, 0.0])
        self.whole, self.positions = (True, True), None
        self.index = np.stack([np.arange(n), np.zeros(n, int)], axis=1)

    def __len__(self) -> int:
        return len(self.fields)

    def read(self, indices: np.ndarray, out: torch.Tensor) -> torch.Tensor:
        return out[: len(indices)].copy_(torch.from_numpy(self.fields[indices]))

    def targets(self, indices: np.ndarray) -> np.ndarray:
        return self.labels[indices]


class TracerOnly(torch.nn.Module):
    "Patches to tokens with random weights, those of both velocity components zero."

    def __init__(self):
        super().__init__()
        self.dim, self.config = 16, {}
        self.conv = torch.nn.Conv3d(4, 16, (2, 4, 4), (2, 4, 4))
        with torch.no_grad():
            self.conv.weight[:, 2:] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def finetuning() -> tuple[LoadedEncoder, dict[str, Amplitudes], LabelScaler]:
    "An encoder that does not look at the velocity, and windows whose labels are there."
    torch.manual_seed(0)
    info = {
        "name": "tracer only",
        "config": {},
        "system": "shear_flow",
        "channels": SYSTEM.channels,
        "shape": [2, 8, 8],
        "dt": 0.2,
    }
    windows = {
        split: Amplitudes(seed, n) for seed, (split, n) in enumerate({"train": 256, "valid": 64, "test": 128}.items())
    }
    return (
        LoadedEncoder(TracerOnly(), info | {"mean": [0.0] * 4, "std": [1.0] * 4}),
        windows,
        LabelScaler.fit(SYSTEM, windows["train"].labels),
    )


def batches_of(finetuning, split: str, **options) -> Batches:
    encoder, windows, scaler = finetuning
    return Batches(
        windows[split],
        **{"batch_size": 32, "normaliser": Normaliser(encoder.mean, encoder.std), "scaler": scaler} | options,
    )


def test_finetuning_finds_what_the_frozen_encoder_does_not_show_and_leaves_it_as_it_was(finetuning):
    encoder, windows, scaler = finetuning
    before, modes = encoder_digest(encoder), [m.training for m in encoder.modules()]
    tuned = fit_finetune(
        encoder,
        batches_of(finetuning, "train"),
        batches_of(finetuning, "valid"),
        recipe=FinetuneRecipe(epochs=12, lr=1e-3, encoder_lr=1e-3),
    )
    assert encoder_digest(encoder) == before and [m.training for m in encoder.modules()] == modes
    assert not any(p.requires_grad for p in encoder.parameters())
    features = {
        s: Features(
            extract(encoder, batches_of(finetuning, s).evaluation(), progress=False), w.labels, np.arange(len(w))
        )
        for s, w in windows.items()
    }
    frozen = fit_probe("attentive", features["train"], features["valid"], scaler)
    test = features["test"]
    assert squared_error(frozen.predict_z(test), test.labels, scaler) > 0.7
    assert squared_error(tuned.predict_z(batches_of(finetuning, "test")), test.labels, scaler) < 0.3
    assert tuned.predict(batches_of(finetuning, "test", batch_size=50)) == pytest.approx(
        tuned.predict(batches_of(finetuning, "test")), rel=1e-4
    )
    best = min(tuned.trials, key=lambda t: t["valid_mse"])
    assert tuned.chosen == {"epoch": best["epoch"]} and len(tuned.trials) == 13 and tuned.name == "finetune"
    assert squared_error(
        tuned.predict_z(batches_of(finetuning, "valid")), features["valid"].labels, scaler
    ) == pytest.approx(best["valid_mse"], rel=1e-5)
    low, high = tuned.interval(batches_of(finetuning, "test"), 0.9)
    assert 0.8 < np.mean((low <= test.labels) & (test.labels <= high)) < 0.98


@pytest.mark.parametrize("most", [None, 2])  # of 4 tokens
def test_finetuning_starts_at_the_attentive_probe(finetuning, most):
    encoder, windows, scaler = finetuning
    info = {"encoder": encoder_digest(encoder)} | ({"max_tokens": most} if most else {})
    tokens = {
        s: extract(encoder, batches_of(finetuning, s).evaluation(), max_tokens=most, progress=False) for s in windows
    }
    assert tokens["train"].shape[1] == (most or 4)
    features = {s: Features(tokens[s], w.labels, np.arange(len(w)), info) for s, w in windows.items()}
    probes = {
        name: fit_probe(name, features["train"], features["valid"], scaler, **QUICK.get(name, {}))
        for name in ("linear", "attentive")
    }
    train, valid = (batches_of(finetuning, s) for s in ("train", "valid"))
    tuned = fit_finetune(encoder, train, valid, start=probes["attentive"], recipe=FinetuneRecipe(epochs=1))
    frozen = squared_error(probes["attentive"].predict_z(features["valid"]), features["valid"].labels, scaler)
    assert tuned.trials[0] == {"epoch": 0, "valid_mse": pytest.approx(frozen, rel=1e-3)}, "features are kept as float16"
    with pytest.raises(ValueError, match="starts from an attentive probe of the same encoder, got a linear probe"):
        fit_finetune(encoder, train, valid, start=probes["linear"])
    other = replace(probes["attentive"], info={"encoder": "0" * 32})
    with pytest.raises(ValueError, match="attentive probe of 0000"):
        fit_finetune(encoder, train, valid, start=other)


def test_finetuning_follows_from_its_seeds_and_touches_no_generator(finetuning):
    recipe, valid = FinetuneRecipe(epochs=2), batches_of(finetuning, "valid")

    def run(seed: int = 0, **options) -> np.ndarray:
        return fit_finetune(
            finetuning[0], batches_of(finetuning, "train", **options), valid, seed=seed, recipe=recipe
        ).predict(valid)

    first = run()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert np.array_equal(first, run()) and torch.equal(state, torch.get_rng_state())
    assert not np.allclose(first, run(seed=1)) and not np.allclose(first, run(augment=True))
    assert np.allclose(first, run(accumulate=2), rtol=1e-3)  # micro-batches are one batch


def test_finetuning_refuses_batches_with_another_normalisation(finetuning):
    other = batches_of(finetuning, "train", normaliser=Normaliser(torch.zeros(4), 2 * torch.ones(4)))
    with pytest.raises(ValueError, match=r"normaliser=Normaliser\(encoder.mean, encoder.std\)"):
        fit_finetune(finetuning[0], other, batches_of(finetuning, "valid"))


def test_the_papers_presets_finetune_in_micro_batches(finetuning, monkeypatch):
    encoder, windows, scaler = finetuning
    seen = {}

    def stop(encoder, train, valid, **options):
        seen.update(train=(train.batch_size, [len(part["labels"]) for part in train(0)]), valid=valid.batch_size)
        raise InterruptedError

    monkeypatch.setattr("physrep.probing.evaluate.fit_finetune", stop)
    for name in ("paper", "native"):
        preset = replace(get_preset(name), size=None)
        run = SimpleNamespace(preset=preset, clip=SimpleNamespace(size=None), seed=0)
        with pytest.raises(InterruptedError):
            _finetune(run, encoder, None, windows, scaler, device="cpu", progress=False)
        assert seen == {"train": (32, [4] * 8), "valid": 4}


def test_the_reading_of_tokens_is_timed_by_command(tmp_path, capsys, monkeypatch):
    orders, plain = [], token_reading.shuffled
    monkeypatch.setattr(token_reading, "shuffled", lambda *a, **k: orders.append(k["in_any_order"]) or plain(*a, **k))
    assert token_reading.main(["--gigabytes", "0.02", "--folder", str(tmp_path)]) == 0
    assert re.search(
        r"window by window [\d.]+ GB/s, in shuffled blocks [\d.]+ GB/s; ratio [\d.]+", capsys.readouterr().out
    )
    assert orders == [2**63, 0], "whatever the size of the file, in any order and in blocks"
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="gigabytes must hold a window of 301056 bytes, got 0"):
        token_reading.reading_rates(tmp_path, 0)


@pytest.mark.parametrize("width, heads", [(16, 8), (12, 4), (9, 1)])
def test_any_width_has_as_many_heads_as_divide_it(width, heads):
    assert new_head(width, 2, {}, 0).heads == heads
    assert new_head(width, 2, {"heads": 1}, 0).heads == 1

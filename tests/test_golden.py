"""A few numbers of every solver, method and probe beside committed ones: was an integer of provenance forgotten?

    python tests/test_golden.py      writes tests/golden.json anew, after an integer was raised

Numbers agree to 1e-3 or so on other processors and versions of libraries; another sign, factor or axis does not."""

import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from physrep.core.files import write_json
from physrep.core.provenance import numbers
from physrep.models.pretrained import load_encoder
from physrep.physics import active_matter, rayleigh_benard, shear_flow
from physrep.physics.oracle import equation_oracle
from physrep.physics.statistics import spectra, summary_statistics
from physrep.physics.systems import get_system
from physrep.training.loop import TimeUp, read_metrics
from physrep.training.presets import get_preset
from physrep.training.pretrain import pretrain, training_batches, training_windows
from physrep.training.run import Run, ensure_data, label_scaler, load_splits, resolve

FILE = Path(__file__).with_name("golden.json")
WITHIN = 1e-3  # of the numbers of `fingerprint`: on one thread or two, with AVX-512 or SSE they differ by 2e-5
Numbers = dict[str, list[float]]


def fingerprint(values: object) -> list[float]:
    """The logarithm of the size of an array, and two sums of its numbers with weights that vary without a pattern, over
    its size: they change with a sign, the order and the axes."""
    x = torch.as_tensor(values).detach().double().flatten().numpy()
    size = float(np.linalg.norm(x)) or 1e-12
    weights = np.cos(np.outer([0.7, 1.9], np.arange(1.0, len(x) + 1) ** 2))
    return [round(float(v), 5) for v in (math.log(size / math.sqrt(len(x))), *(weights @ x / size))]


FLOWS: dict[str, tuple[Callable, dict, dict]] = {
    "shear_flow": (shear_flow.simulate, dict(reynolds=800.0, schmidt=0.5), dict(grid=32, dt=0.025, box=(1.0, 1.0))),
    "rayleigh_benard": (
        rayleigh_benard.simulate,
        dict(rayleigh=1e5, prandtl=2.0),
        dict(grid=(32, 32), dt=0.01, box=(2.0, 1.0)),
    ),
    "active_matter": (active_matter.simulate, dict(alpha=-3.0, zeta=2.0), dict(grid=48, dt=0.05, box=(5.0, 5.0))),
}


def physics(device: str = "cpu") -> Numbers:
    "Ten steps of each solver from both families of initial conditions, and what statistics and oracle read from them."
    found = {}
    for name, (simulate, labels, options) in FLOWS.items():
        system = get_system(name)
        for family in ("standard", "shifted"):
            about = dict(n_frames=11, frame_dt=options["dt"], family=family, device=device)
            flow = simulate(**labels, seeds=[3], **options, **about)
            for field in system.fields:
                found[f"{name}, {family}, {field.name}"] = fingerprint(flow[field.name])
        parts = [flow[f.name].reshape(*flow[f.name].shape[:4], -1) for f in system.fields]
        clip = np.moveaxis(np.concatenate(parts, axis=-1), -1, 1)
        spacing = tuple(length / n for length, n in zip(options["box"], clip.shape[3:]))
        known = dict(system=system, dt=options["dt"], spacing=spacing)
        found[f"{name}, statistics"] = fingerprint(summary_statistics(clip, **known))
        powers = spectra(clip, **known)
        found[f"{name}, spectra"] = fingerprint(np.maximum(powers, powers.max() - 18))  # smaller ones are rounding
        noise = np.cos(np.arange(clip.size) ** 2.0).reshape(clip.shape)  # of clean fields any method reads the labels
        read = equation_oracle(clip + 0.01 * clip.std((0, 2, 3, 4), keepdims=True) * noise, **known)
        found[f"{name}, oracle"] = fingerprint(read / [labels[label.name.lower()] for label in system.labels])
    return found


SMALL = {"vit": dict(dim=16, tubelet=(4, 4, 4)), "convnext": {}, "axial": dict(dim=16)}
SHORTER = {"jepa": dict(horizon=4), "jepa_sigreg": dict(offset=4), "forecast": dict(frames=4)}
ROWS = [(method, encoder) for method in ("jepa", "mae", "masked_jepa", "forecast") for encoder in ("vit", "convnext")]
ROWS += [(method, "vit") for method in ("jepa_sigreg", "invariance", "autoencoder", "supervised", "random")]
ROWS += [("next_frame", "axial"), ("disco", "vit_code")]


FOLDER = tempfile.TemporaryDirectory(prefix="physrep-golden-")  # removed when the process ends


def small_run(method: str, encoder: str, device: str = "cpu") -> Run:
    "A run of six updates on a few small flows."
    smoke = get_preset("smoke")
    draws = dict(draws={"train": (6, 1), "valid": (4, 1)}, families={})
    sim = replace(smoke.sim("shear_flow"), grid=32, store_grid=16, n_frames=16, **draws)
    preset = replace(smoke, name="small", sims={"shear_flow": sim}, frames=8, probe_stride=4)
    options = dict(coefficients=SHORTER.get(method), encoder_config=SMALL.get(encoder.partition("_")[0]))
    options |= dict(data_dir=Path(FOLDER.name) / "data", run_dir=Path(FOLDER.name) / device)
    return resolve("shear_flow", method, encoder, preset, steps=6, **options)


def trained(method: str, encoder: str, device: str = "cpu") -> Path:
    "The folder of a run that was stopped after its first update and went on, with a branch that ends after two."
    run, quiet = small_run(method, encoder, device), dict(progress=False, say=lambda text: None, device=device)
    ensure_data(run, workers=1, progress=False)  # the flows of the CPU
    if run.recipe and not (run.folder / "encoder.safetensors").exists():
        with pytest.raises(TimeUp):
            pretrain(run, minutes=1e-9, **quiet)
    return pretrain(run, **quiet)


def training(device: str = "cpu") -> Numbers:
    "Tokens of trained and of branched encoders, losses, and what the online probe and the gate say."
    found = {}
    for method, encoder in ROWS:
        run, folder = small_run(method, encoder, device), trained(method, encoder, device)
        batches = training_batches(run, training_windows(run), device)
        fields = next(iter(batches["valid"].evaluation(4)))["fields"][:, :, :8]
        for length in (6, 2) if run.recipe else (0,):
            with torch.no_grad():
                tokens = load_encoder(run.at(length).folder, device).encoder.eval()(fields).cpu()
            # a bias that no loss depends on goes where rounding sends it
            found[f"{method}-{encoder}, {length} updates"] = fingerprint(tokens - tokens.mean(0))
        logged = {"metrics": ("loss", "valid_loss", "effective_rank"), "curve": ("online", "gate", "gate_r2")}
        for table, columns in logged.items():
            rows = read_metrics(folder / f"{table}.csv")
            for column in columns:
                values = [row[column] for row in rows if math.isfinite(row.get(column, math.nan))]
                if values:
                    found[f"{method}-{encoder}, {column}"] = fingerprint(values)
    return found


def probing(device: str = "cpu") -> Numbers:
    "Features of an encoder, every probe of frozen features and one that is fine-tuned, few labels, and one interval."
    from physrep.probing.features import Features, features_of
    from physrep.probing.few_labels import fit_few
    from physrep.probing.finetune import fit_finetune, labelled_batches
    from physrep.probing.frozen import PROBES, AttentiveRecipe, fit_probe
    from physrep.probing.scores import score

    run = small_run("mae", "vit", device)
    encoder = load_encoder(trained("mae", "vit", device), device)
    windows = load_splits(run, ("train", "valid"), frames=run.clip.frames, stride=run.preset.probe_stride)
    scaler = label_scaler(run, windows["train"])
    read = {split: features_of(encoder, w, scaler, device=device, progress=False) for split, w in windows.items()}
    found = {"tokens": fingerprint(read["valid"].tokens.float())}
    rng, made = np.random.default_rng(0), {}  # clearer features: what is chosen on valid shall be chosen everywhere
    shown = rng.normal(size=(2, 4, 6))
    for split, n in {"train": 80, "valid": 40}.items():
        z = rng.normal(size=(n, 2))
        tokens = np.tanh(np.einsum("nk,ktd->ntd", z, shown)) + 0.1 * rng.normal(size=(n, 4, 6))
        made[split] = Features(tokens.astype(np.float32), scaler.inverse(z), np.arange(n) // 4)
    options = {"attentive": dict(recipe=AttentiveRecipe(epochs=8, lr=1e-2), device=device, progress=False)}
    for name in sorted(set(PROBES) - {"constant"}):
        probe = fit_probe(name, made["train"], made["valid"], scaler, **options.get(name, {}))
        found[f"{name}, predictions"] = fingerprint(probe.predict_z(made["valid"]))
        found[f"{name}, half width"] = fingerprint(probe.half_width())
    found["few labels"] = fingerprint(fit_few("linear", made["train"], scaler).predict_z(made["valid"]))
    rows = score(probe.predict(made["valid"]), made["valid"].labels, made["valid"].groups, scaler.system, scaler)
    found["interval"] = fingerprint([row[name] for row in rows for name in ("value", "low", "high")])
    start = fit_probe("attentive", read["train"], read["valid"], scaler, **options["attentive"])
    batches = labelled_batches(run, windows, encoder, scaler, device)
    tuned = fit_finetune(encoder, batches["train"], batches["valid"], start=start, epochs=1)
    found["finetune"] = fingerprint(tuned.predict_z(batches["valid"]))
    return found


KINDS: dict[str, Callable[[str], Numbers]] = {"PHYSICS": physics, "TRAINING": training, "PROBING": probing}


def differences(found: Numbers, golden: Numbers, within: float = WITHIN) -> dict[str, float]:
    "How far numbers are from the golden ones of the same name, where that is too far."
    apart = {name: max(abs(a - b) for a, b in zip(found[name], golden[name])) for name in found.keys() & golden.keys()}
    return {name: round(value, 4) for name, value in sorted(apart.items()) if not value < within}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_the_golden_ones(kind):
    golden, found = json.loads(FILE.read_text())[kind], KINDS[kind]()
    again = f"then write the new numbers: python tests/{Path(__file__).name}"
    different = differences(found, golden["values"])
    assert not different, (
        f"numbers have changed ({different}). If they were meant to, raise {kind} in physrep.core.provenance "
        f"(nbs/core/provenance.ipynb, export it with nbdev_export): results that were made before become stale; {again}"
    )
    assert found.keys() == golden["values"].keys(), f"a solver, method or probe is new or gone; {again}"
    assert golden["integer"] == numbers()[kind], f"{kind} was raised; {again}"


def write() -> None:
    "Writes golden.json: numbers that are as before stay as they are; others only if their integer was raised."
    old = json.loads(FILE.read_text()) if FILE.is_file() else {}
    new = {}
    for kind, function in KINDS.items():
        found, before = function(), old.get(kind, {"integer": None, "values": {}})
        if (different := differences(found, before["values"])) and before["integer"] == numbers()[kind]:
            raise SystemExit(f"{kind} has other numbers ({different}): raise it in nbs/core/provenance.ipynb first")
        kept = {name: before["values"][name] for name in found.keys() & before["values"].keys() - different.keys()}
        new[kind] = {"integer": numbers()[kind], "values": found | kept}
    write_json(FILE, new)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(write())

"""Bad input of every kind: the error names the value, the file and what would be right, or the result is right."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from broken import (
    SYSTEM,
    change,
    copy,
    cut,
    encoder_file,
    predictions_file,
    probe_file,
    replace,
    stage,
    tiny_preset,
    well_file,
    well_set,
    with_header,
    with_info,
)
from safetensors.torch import save_file

import physrep
from physrep.core.files import open_tensors, read_json, read_tensors, write_tensors
from physrep.core.places import load_object
from physrep.data.download import check_files
from physrep.data.generate import make_dataset
from physrep.data.sets import read_stats
from physrep.data.well import WellFile, WellFormatError
from physrep.data.windows import Windows
from physrep.experiments.command import main, output_path
from physrep.explore.your_flow import flow_from_array, flow_from_bytes
from physrep.models.encoders import ENCODERS, build_encoder
from physrep.models.metadata import FRACTIONS
from physrep.models.pretrained import save_encoder
from physrep.probing.records import read_predictions
from physrep.probing.sharing import BUILDERS
from physrep.results.rows import read_rows
from physrep.results.submissions import predictions_from_csv
from physrep.training.presets import get_preset, read_preset

DEEP = "[" * 10**5
NESTED = json.loads("[" * 800 + "]" * 800)
PICKLE = b"\x80\x04K\x01."


@dataclass(frozen=True)
class Sound:
    "What is made once, and is copied before it is broken."

    root: Path

    @property
    def preset(self) -> Path:
        return self.root / "tiny.yaml"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Sound:
    root = tmp_path_factory.mktemp("sound")
    sim = get_preset(tiny_preset(root)).sim("shear_flow")
    make_dataset("shear_flow", sim, root / "data", workers=1, progress=False)
    well_set(root / "set")
    encoder_file(root / "encoder.safetensors")
    probe_file(root / "probe.safetensors")
    predictions_file(root)
    (root / "file").write_text("a file, no folder")
    return Sound(root)


@dataclass(frozen=True)
class Case:
    "Something wrong: what is done in a folder with sound things at hand, and what must be said."

    name: str
    do: Callable[[Path, Sound], object]
    error: type[Exception]
    says: tuple[str, ...]


# --- parameters of the stages, through the cells of their notebooks


def run_stage(name: str, cells: int, values: dict, folder: Path, sound: Sound) -> object:
    usual = {"preset": str(sound.preset), "data_dir": str(sound.root / "data")}
    usual |= {} if name == "00_simulate" else {"objective": "mae", "run_dir": str(folder / "runs")}
    places = {"FILE": str(sound.root / "file"), "EMPTY": str(folder)}
    return stage(name, cells, **usual | {k: places.get(v, v) if isinstance(v, str) else v for k, v in values.items()})


SIMULATE = [
    ({"system": "shear"}, ValueError, "preset tiny simulates shear_flow", "not shear"),
    ({"system": "my:thing"}, ValueError, "preset tiny simulates", "not my:thing"),
    ({"preset": "phone"}, ValueError, "unknown preset 'phone'; valid: smoke, laptop"),
    ({"preset": "no.yaml"}, FileNotFoundError, "no preset file no.yaml; valid names: smoke"),
    ({"preset": "paper"}, ValueError, "preset paper simulates nothing (it reads The Well)"),
    ({"preset": "laptop"}, ValueError, "holds data that were made differently", "there 0.05, asked for", "Delete"),
    ({"data_dir": "FILE"}, NotADirectoryError, "data_dir must be a folder", "file is a file"),
    ({"device": "tpu"}, ValueError, "unknown device 'tpu'; valid: auto, cpu, cuda"),
    ({"device": "cuda:99x"}, ValueError, "device 'cuda:99x'", "valid: auto, cpu"),
    ({"workers": "two"}, TypeError, "parameter workers must be int (default 0), got 'two'"),
    ({"refined": "yes"}, TypeError, "parameter refined must be bool", "got 'yes'"),
    ({"refined": True, "preset": "gpu"}, ValueError, "preset gpu names no flows that are simulated again"),
    ({"sytem": "x"}, ValueError, "unknown parameter sytem; this notebook has: system, preset"),
]
PRETRAIN = [
    ({"objective": "mea"}, ValueError, "unknown objective 'mea'; valid: jepa", "my_package.module:name"),
    ({"encoder": "resnet"}, ValueError, "objective 'mae' does not take encoder 'resnet'; it takes: vit"),
    ({"objective": "next_frame", "encoder": "vit_code"}, ValueError, "does not take encoder 'vit_code'", "axial"),
    ({"encoder": "nowhere_at_all:make"}, ValueError, "module nowhere_at_all cannot be imported", "PYTHONPATH"),
    ({"objective": "frozen"}, ValueError, "my_package.module:make_encoder"),
    ({"seeds": "0 x"}, ValueError, 'such as "0 1 2"', "got 'x'"),
    ({"seeds": "0,1"}, ValueError, "seeds must be numbers with spaces", "'0,1'"),
    ({"seeds": "1 1"}, ValueError, "seeds must be different, got '1 1'"),
    ({"seed": 1.5}, TypeError, "parameter seed must be int", "got 1.5"),
    ({"steps": -3}, ValueError, "steps, lr, accumulate and clip_norm must be positive", "steps=-3"),
    ({"steps": True}, TypeError, "parameter steps must be int", "got True"),
    ({"batch_size": -4}, ValueError, "batch_size must be a positive multiple of accumulate=1, got -4"),
    ({"lr": -1.0}, ValueError, "must be positive", "lr=-1.0"),
    ({"recipe": {"stepz": 1}}, ValueError, "recipe has no stepz; it has: accumulate"),
    ({"recipe": {"accumulate": 0}}, ValueError, "accumulate", "must be positive"),
    ({"recipe": {"precision": "float8"}}, ValueError, "precision", "float8"),
    ({"recipe": {"schedule": "step"}}, ValueError, "schedule", "step", "cosine"),
    ({"coefficients": "ratio"}, TypeError, "parameter coefficients must be dict", "got 'ratio'"),
    ({"tag": "../../x"}, ValueError, "tag may hold letters, digits, '.' and '_', got '../../x'"),
    ({"tag": ".."}, ValueError, "tag may hold", "got '..'"),
    ({"resume": "yes"}, TypeError, "parameter resume must be bool", "got 'yes'"),
    (
        {"preset": "paper", "data_dir": "EMPTY"},
        FileNotFoundError,
        "no .h5 or .hdf5 files of shear_flow in",
        "of any split",
    ),
    ({"data_dir": "FILE"}, NotADirectoryError, "data_dir is the file", "give the folder that holds shear_flow/data/"),
]
PROBE = [
    ({"probes": "finetune"}, ValueError, "finetune_epochs: 0", "probes may be linear, knn, kernel, attentive"),
    ({"rows": "no.yaml"}, FileNotFoundError, "no file no.yaml; it holds `rows:`"),
    ({"objective": "frozen"}, ValueError, "frozen", "my_package.module:make_encoder"),
    ({"seeds": "zero"}, ValueError, "seeds must be numbers", "'zero'"),
    ({"probes": "linera"}, ValueError, "unknown probe 'linera'; valid: linear, knn, kernel, attentive"),
    ({"probes": "linear"}, FileNotFoundError, "no encoder at", "finished run folder"),
]


def stages() -> list[Case]:
    "A case of every line above; how many cells are run depends on where the error belongs."
    found = []
    for name, usual, table in (("00_simulate", 3, SIMULATE), ("03_pretrain", 3, PRETRAIN), ("04_probe", 3, PROBE)):
        for values, error, *says in table:
            late = "data_dir" in values or "linear" in says[0] or values.get("probes") == "linear"
            cells = usual + 1 if late and name != "00_simulate" else usual
            do = partial(run_stage, name, cells, values)
            found.append(Case(f"{name[3:]} {values}", lambda f, s, do=do: do(f, s), error, tuple(says)))
    return found


# --- presets and rows


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


SIM = "base: smoke\nsims: {shear_flow: {ranges: {Reynolds: [400.0, 500.0]}, grid: 8, store_grid: 8, n_frames: 4, "
PRESET = [
    ("base: smoke\nframez: 3", "has no field framez; it has: description, sims"),
    (b"base: smoke\ndescription: \xff", "is not YAML", "0xff"),
    ("[" * 1000, "is not YAML"),
    ("!!python/object/apply:os.getcwd []", "is not YAML", "python/object/apply"),
    ("", "must hold a mapping with the fields of a preset, got None"),
    ("- smoke", "must hold a mapping"),
    ("\x00", "is not YAML", "#x0000"),
    ("base: [smoke]", "base: unknown preset", "valid: smoke, laptop"),
    ("base: smoke\nsystems: [shear]", "systems has unknown shear; valid: shear_flow"),
    ("base: smoke\nnoise: .nan", "noise must be a finite number, got nan"),
    ("base: smoke\nprobe_lr: .inf", "probe_lr must be a finite number, got inf"),
    (f"base: smoke\nprobe_lr: {10**400}", "probe_lr must be a finite number, got 1000"),
    ("base: smoke\nseeds: [0, 0]", "seeds must be different numbers from 0, got [0, 0]"),
    ("base: smoke\nseeds: [-1]", "seeds must be different numbers from 0, got [-1]"),
    ("base: smoke\nprobe_stride: 0", "probe_stride must be more than 0, got 0"),
    ("base: smoke\ntrain: {mae: {steps: 2, lr: .nan}}", "train.mae: steps, lr", "lr=nan"),
    ("base: smoke\ntrain: {mae: null}", "train.mae must be a mapping of steps, lr", "got None"),
    (SIM + "draws: {train: [1, 1]}, frame_dt: 0.1, dt: -0.1}}", "sims.shear_flow: dt must be positive, got -0.1"),
    (SIM + "draws: {train: [0, 1]}, frame_dt: 0.1, dt: 0.1}}", "split train must have at least 1 of everything"),
    (SIM + "draws: {../x: [1, 1]}, frame_dt: 0.1, dt: 0.1}}", "a split is a folder", "not '../x'"),
    (SIM.replace("400.0", "900.0") + "draws: {train: [1, 1]}, frame_dt: 0.1, dt: 0.1}}", "range of Reynolds", "(900"),
]
NAMES = ["..", ".", "a\nb", "-x", "a b", "x" * 90]  # of files, and so of folders
ROW = "rows: [{objective: mae, encoder: vit, tag: mine, %s}]"
ROWS = [
    ("rows: [", "is no YAML"),
    ("rows: [!!python/name:os.getcwd ]", "is no YAML", "python/name"),
    ("rows: 3", "must hold `rows:` and nothing else"),
    ("rows: [3]", "row 1: a row is a mapping of fields, got 3"),
    (ROW % "titel: x", "row 1: unknown field titel; valid: objective, encoder"),
    (ROW % "color: 3", "row 1: color must be str, got 3"),
    (ROW % "recipe: 3", "row 1: recipe must be a mapping, got 3"),
    (ROW % "kind: random", "kind is 'random'; with this objective it is 'trained'"),
    ("rows: [{objective: mae, encoder: vit}]", "there is a row mae-vit already; give yours a `tag`"),
    ("rows: [{objective: '..', predictions: {shear_flow: a.csv}}]", "row 1: '..'", "use letters, digits, _ and ."),
]


def texts() -> list[Case]:
    found = []
    for text, *says in PRESET:
        found.append(
            Case(
                f"preset {text[:40]!r}",
                lambda f, s, text=text: read_preset(write(f, "mine.yaml", text)),
                ValueError,
                ("mine.yaml", *says),
            )
        )
    for name in NAMES:
        do = lambda f, s, name=name: read_preset(write(f, f"{name}.yaml", "base: smoke"))  # noqa: E731
        found.append(Case(f"preset named {name[:9]!r}", do, ValueError, ("folders are called after a preset", "64")))
    for text, *says in ROWS:
        do = lambda f, s, text=text: read_rows(write(f, "rows.yaml", text))  # noqa: E731
        found.append(Case(f"rows {text[-40:]!r}", do, ValueError, ("rows.yaml", *says)))
    return found


# --- files of The Well's format


def read_broken(edit: Callable[[Path], object], folder: Path, sound: Sound) -> object:
    root = copy(sound.root / "set", folder / "set")
    edit(root / "shear_flow" / "data" / "train" / "flow.hdf5")
    return Windows(root, "shear_flow", "train", frames=2).read([5])


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


TRACER, TIME = "t0_fields/tracer", "dimensions/time"
HDF5 = [  # what is done to the file (or what is put in the place of which part), and what is said
    ("half", cut, "truncated or damaged, copy or write it again"),
    ("empty", lambda p: p.write_bytes(b""), "an empty file"),
    ("page", lambda p: p.write_text("<html>404"), "a web page, not HDF5", "download it again"),
    ("pickle", lambda p: p.write_bytes(PICKLE), "not an HDF5 file, it starts with"),
    ("no field", lambda p: change(p, lambda f: f.pop(TRACER)), "no dataset 't0_fields/tracer'; /t0_fields holds"),
    ("no time", lambda p: change(p, lambda f: f.pop(TIME)), "no dataset 'dimensions/time'; /dimensions holds x, y"),
    ("no label", lambda p: change(p, lambda f: f.pop("scalars/Reynolds")), "no label 'Reynolds'", "holds Schmidt"),
    ("no scalars", lambda p: change(p, lambda f: f.pop("scalars")), "no group 'scalars'"),
    ("no name", lambda p: change(p, lambda f: f.attrs.pop("dataset_name")), "no attribute dataset_name"),
    (
        "another system",
        lambda p: change(p, lambda f: f.attrs.update(dataset_name="active_matter")),
        "dataset_name is 'active_matter'",
        "shear_flow was asked for",
    ),
    (
        "another number",
        lambda p: change(p, lambda f: f.attrs.update(n_trajectories=7)),
        "n_trajectories is 7, the fields have 2",
    ),
    ("transposed", (TRACER, zeros(2, 5, 6, 8)), "must be (trajectory, time, x, y) = (2, 5, 6, 8)"),
    ("one flow", (TRACER, zeros(5, 8, 6)), "tracer must be (trajectory, time, x, y), it is (5, 8, 6)"),
    ("three components", ("t1_fields/velocity", zeros(2, 5, 8, 6, 3)), "velocity must be", "it is (2, 5, 8, 6, 3)"),
    ("integers", (TRACER, zeros(2, 5, 8, 6, dtype=np.int32)), "tracer must hold floats, it is int32"),
    ("text", (TRACER, np.full((2, 5, 8, 6), b"x")), "tracer must hold floats"),
    ("no frame", (TRACER, zeros(2, 0, 8, 6)), "tracer must hold floats, it is float32 (2, 0, 8, 6)"),
    (
        "a NaN",
        lambda p: change(p, lambda f: f[TRACER].__setitem__((1, 2, 3, 4), np.nan)),
        "NaN or infinity in tracer of trajectory 1, frame 2",
    ),
    ("times of NaN", (TIME, np.full(5, np.nan)), "dimensions/time must be finite, increase"),
    ("times backwards", (TIME, np.arange(5.0)[::-1].copy()), "dimensions/time must be finite, increase"),
    ("times of more frames", (TIME, np.arange(6.0)), "the shape (5,) or (2, 5); it is (6,)"),
    ("few points", ("dimensions/x", np.arange(3.0)), "dimensions/x has (3,) points, the fields have 8"),
    ("no logarithm", ("scalars/Reynolds", 0.0), "Reynolds must be positive (its log10 is the target), got 0.0"),
    ("a label of NaN", ("scalars/Reynolds", np.nan), "/scalars/Reynolds is nan"),
    ("three labels", ("scalars/Reynolds", np.ones(3)), "must be one number, or one per trajectory, it is (3,)"),
    ("conditions", ("physrep_initial_condition", np.arange(3)), "must be 2 integers, it is int64 (3,)"),
    ("conditions of text", ("physrep_initial_condition", [b"a", b"b"]), "must be 2 integers, it is object (2,)"),
    ("conditions of NaN", ("physrep_initial_condition", np.full(2, np.nan)), "must be 2 integers, it is float64 (2,)"),
    ("a link to nothing", (TRACER, h5py.ExternalLink("gone.hdf5", "/x")), "no dataset 't0_fields/tracer'"),
    ("a link to no HDF5", (TRACER, h5py.ExternalLink("/etc/passwd", "/x")), "no dataset 't0_fields/tracer'"),
    ("a link to itself", (TRACER, h5py.SoftLink(f"/{TRACER}")), "too many links"),
]
STATS = [
    ("", "not statistics but 'None'"),
    ("mean: 3", "no 'mean'", "write_stats makes complete statistics"),
    ("mean: {tracer: a, pressure: 0}", "mean of tracer is 'a', not numbers"),
    (f"mean: {{tracer: {10**400}, pressure: 0}}", "mean of tracer is 1000", "not numbers"),
    (b"\xff", "not YAML"),
    ("!!python/object/apply:os.getcwd []", "not YAML"),
    ("[" * 5000, "not YAML"),
]


def wells() -> list[Case]:
    found = []
    for name, edit, *says in HDF5:
        make = edit if callable(edit) else lambda p, edit=edit: change(p, replace(*edit))
        do = lambda f, s, make=make: read_broken(make, f, s)  # noqa: E731
        found.append(Case(f"well {name}", do, ValueError, ("flow.hdf5", *says)))
    for text, *says in STATS:
        do = lambda f, s, text=text: read_stats(write(f, "stats.yaml", text), SYSTEM)  # noqa: E731
        found.append(Case(f"stats {text[:20]!r}", do, ValueError, ("stats.yaml", *says)))
    gone = lambda p: p.unlink()  # noqa: E731
    found.append(Case("well gone", lambda f, s: read_broken(gone, f, s), FileNotFoundError, ("splits with files:",)))
    lost = lambda f, s: Windows(s.root / "nothing", "shear_flow", "train", frames=2)  # noqa: E731
    found.append(Case("no folder", lost, FileNotFoundError, ("no .h5 or .hdf5 files of shear_flow in", "nothing")))
    long = lambda f, s: Windows(s.root / "set", "shear_flow", "train", frames=6)  # noqa: E731
    found.append(Case("too long a window", long, ValueError, ("has 6 frames; the longest has 5",)))
    return found


# --- encoders, probes, records


def use_encoder(edit: Callable[[Path], object], folder: Path, sound: Sound) -> object:
    path = copy(sound.root / "encoder.safetensors", folder / "encoder.safetensors")
    edit(path)
    return physrep.load_encoder(path).embed(zeros(1, 4, 4, 8, 8), dt=0.2)


def first_tensor(found: dict) -> dict:
    return next(value for key, value in found.items() if key != "__metadata__")


ENCODER = [
    ("half", cut, "is not a whole safetensors file"),
    ("empty", lambda p: p.write_bytes(b""), "is not a whole safetensors file", "header too small"),
    ("pickle", lambda p: p.write_bytes(PICKLE), "is not a whole safetensors file"),
    ("huge header", lambda p: with_header(p, lambda h: None, 2**62), "header too large"),
    ("absurd shape", lambda p: with_header(p, lambda h: first_tensor(h).update(shape=[2**40, 2**40])), "not a whole"),
    ("no metadata", lambda p: with_header(p, lambda h: h.pop("__metadata__")), "was not written by physrep"),
    ("no JSON", lambda p: with_header(p, lambda h: h["__metadata__"].update(physrep="{")), "description is no JSON"),
    ("a list", lambda p: with_header(p, lambda h: h["__metadata__"].update(physrep="[]")), "must be a mapping"),
    ("no name", {"name": None}, "name must be the name of an encoder, got None"),
    ("no config", {"config": None}, "config must be a mapping of arguments"),
    ("config of text", {"config": "x"}, "config must be a mapping of arguments, got 'x'"),
    ("no channels", {"channels": None}, "channels must be a list of names"),
    ("no mean", {"mean": None}, "mean must be 4 finite numbers, one a channel, got None"),
    ("a short mean", {"mean": [0.0]}, "mean must be 4 finite numbers", "got [0.0]"),
    ("a mean of 401 digits", {"mean": [0, 0, 0, 10**400]}, "mean must be 4 finite numbers"),
    ("a std of 0", {"std": [0.0] * 4}, "std must be 4 positive numbers, one a channel"),
    ("a std of NaN", {"std": [float("nan")] * 4}, "std must be 4 positive numbers"),
    ("a time of text", {"dt": "fast"}, "dt must be a positive number, or null, got 'fast'"),
    ("no shape", {"shape": None}, "shape must be three positive integers (frames, height, width)"),
    ("two sizes", {"shape": [4, 8]}, "shape must be three positive integers"),
    ("half a pixel", {"shape": [4, 8, 8.5]}, "shape must be three positive integers"),
    ("a mean far away", {"mean": [0.0, 2.0**64, 0.0, 0.0]}, "mean of pressure must be at most 1e+07 std from 0"),
    ("no system", {"system": None}, "system must be one of shear_flow, rayleigh_benard"),
    ("an unknown system", {"system": "waves"}, "system must be one of", "got 'waves'"),
    ("a module", {"system": "this:s"}, "system must be one of", "got 'this:s'"),
    ("an unknown encoder", {"name": "resnet"}, "unknown encoder 'resnet'; valid: convnext, vit"),
    ("a word for a width", {"config": {"dim": "wide"}}, "no encoder can be built as its description says"),
    ("an unknown argument", {"config": {"dimm": 8}}, "no encoder can be built", "dimm"),
    ("weights of NaN", lambda p: p.write_bytes(p.read_bytes()[:-64] + b"\xff" * 64), "are not finite", "damaged"),
    ("half a head", {"config": {"dim": 8, "heads": 0.5}}, "heads in config must be a positive integer, got 0.5"),
    ("too many neurons", {"config": {"dim": 8, "mlp_ratio": 1e8}}, "mlp_ratio in config must be a number from 0"),
    ("endless neurons", {"config": {"dim": 8, "mlp_ratio": float("inf")}}, "mlp_ratio in config must be a number"),
    ("many brackets", {"config": {"inner": NESTED}}, "config has brackets in brackets beyond what can be read"),
    ("no heads", {"config": {"dim": 8, "heads": 0}}, "heads in config must be a positive integer, got 0"),
    (
        "half a part",
        {"name": "vit_code", "config": {"inner": {"dim": 8.5}}},
        "inner in config must be a positive integer",
    ),
    (
        "half a tubelet",
        {"config": {"tubelet": [2, 4, 4.5]}},
        "tubelet in config must be a positive integer, got [2, 4, 4.5]",
    ),
    ("too wide", {"config": {"dim": 10**9}}, "config asks for 1000000000, and the file has"),
    ("too few channels", {"channels": ["a"] * 3, "mean": [0.0] * 3, "std": [1.0] * 3}, "do not fit the encoder 'vit'"),
    (
        "another width",
        {"config": {"dim": 6, "depth": 1, "heads": 2, "tubelet": [2, 4, 4]}},
        "do not fit the encoder 'vit'",
    ),
    (
        "a larger width",
        {"config": {"dim": 16, "depth": 1, "heads": 2, "tubelet": [2, 4, 4]}},
        "config asks for 3.07e+03 weights or more, and the file has 1920",
    ),
]
FIELDS = [
    (zeros(1, 3, 4, 8, 8), 0.2, "fields must be (b, 4, 4, h, w) with channels tracer", "got shape (1, 3, 4, 8, 8)"),
    (zeros(4, 4, 8, 8), 0.2, "got shape (4, 4, 8, 8)"),
    (zeros(1, 4, 4, 8, 4), 0.2, "trained on grids of 8x8, got 8x4; resample"),
    (zeros(1, 4, 4, 8, 8) + np.nan, 0.2, "fields hold values that are not finite"),
    (zeros(1, 4, 4, 8, 8, dtype=complex), 0.2, "real numbers are wanted"),
    (np.array([None]), 0.2, "real numbers are wanted"),
    (zeros(1, 4, 4, 8, 8), 0.1, "trained on frames 0.2 apart, got dt=0.1"),
    (zeros(1, 4, 4, 8, 8), float("nan"), "got dt=nan"),
]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)


PROBE_FILES = [
    ("half", cut, "is not a whole safetensors file"),
    ("flipped bit", flip, "is damaged: its content does not match its digest"),
    ("no metadata", lambda p: with_header(p, lambda h: h.pop("__metadata__")), "was not written by physrep"),
    ("an encoder", lambda p: encoder_file(p), "was not written by physrep, or is damaged"),
    ("pickle", lambda p: p.write_bytes(PICKLE), "is not a whole safetensors file"),
    ("a list for a text", lambda p: with_description(p, [[], "00aa"]), "have no description with a digest"),
    ("deep brackets", lambda p: with_header(p, lambda h: h["__metadata__"].update(physrep=DEEP)), "no description"),
    ("no labels", lambda p: written_again(p, scaler={"mean": [0.0]}), "its scaler is missing or of another type"),
    ("a list for a name", lambda p: written_again(p, name=[]), "holds no probe; a probe is one of"),
    ("no trials", lambda p: written_again(p, trials=None), "in its description trials is missing or of another type"),
    ("a word chosen", lambda p: written_again(p, chosen="x", config=3), "chosen, config is missing or of another type"),
]
PREDICTIONS = [
    ("no draw", {"draw": None}, "is not a predictions file of physrep 0.2: KeyError('draw')"),
    ("an infinite draw", {"draw": float("inf")}, "is not a predictions file of physrep 0.2: OverflowError"),
    ("no labels", {"scaler": []}, "is not a predictions file of physrep 0.2: TypeError"),
    ("deep brackets", lambda p: with_header(p, lambda h: h["__metadata__"].update(physrep=DEEP)), "is torn or no"),
]


def with_description(path: Path, description: object) -> None:
    "The file with another description where `read_tensors` looks for it."
    with_header(path, lambda h: h["__metadata__"].update(physrep=json.dumps(description)))


def written_again(path: Path, **changes: object) -> None:
    "The probe with changes to its description (None takes an entry out), and with the digest that belongs to them."
    tensors, record = read_tensors(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    write_tensors(path, tensors, {k: v for k, v in (record | changes).items() if v is not None})


def weights() -> list[Case]:
    found = []
    for name, edit, *says in ENCODER:
        make = edit if callable(edit) else lambda p, edit=edit: with_info(p, **edit)
        do = lambda f, s, make=make: use_encoder(make, f, s)  # noqa: E731
        found.append(Case(f"encoder {name}", do, ValueError, ("encoder.safetensors", *says)))
    for fields, dt, *says in FIELDS:
        do = lambda f, s, x=fields, dt=dt: physrep.load_encoder(s.root / "encoder.safetensors").embed(x, dt)  # noqa: E731
        found.append(Case(f"fields {says[-1][-30:]}", do, ValueError, tuple(says)))
    for name, edit, *says in PROBE_FILES:
        load = lambda f, s, edit=edit: physrep.load_probe(  # noqa: E731
            (lambda p: (edit(p), p)[1])(copy(s.root / "probe.safetensors", f / "probe.safetensors"))
        )
        found.append(Case(f"probe {name}", load, ValueError, ("probe.safetensors", *says)))
    for name, edit, *says in PREDICTIONS:
        make = edit if callable(edit) else lambda p, edit=edit: with_info(p, **edit)
        read = lambda f, s, make=make: read_predictions(  # noqa: E731
            make(copy(s.root / "predictions.safetensors", f / "predictions.safetensors"))
        )
        found.append(Case(f"predictions {name}", read, ValueError, ("predictions.safetensors", *says)))
    missing = ("no encoder at nothing", "shear_flow-forecast-vit")
    found.append(Case("encoder nowhere", lambda f, s: physrep.load_encoder("nothing"), FileNotFoundError, missing))
    hub = ("a name on the Hub is hf:user/name, got 'hf:../../x'",)
    found.append(Case("encoder above the hub", lambda f, s: physrep.load_encoder("hf:../../x"), ValueError, hub))
    torn = lambda f, s: read_json(write(f, "result.json", '{"rows": ['))  # noqa: E731
    found.append(Case("torn JSON", torn, ValueError, ("result.json is not JSON", "delete it and run again")))
    return found


# --- predictions of others, the command line, a flow of the user's


LINES = [f"{w},{label},1.0" for w in range(4) for label in SYSTEM.label_names]
HEAD = ["# physrep benchmark 00aa system shear_flow split test", "window,label,value"]
CSV = [
    ([], "has no column window, label, value"),
    (["window,label", "0,Reynolds"], "has no column value"),
    ([HEAD[0], "window,label,value,colour", "0,Reynolds,1,red"], "unknown columns colour; valid: window"),
    ([*HEAD, "9,Reynolds,1.0"], "line 3, column window: got '9'; write a whole number from 0 to 3"),
    ([*HEAD, "0,Prandtl,1.0"], "line 3, column label: got 'Prandtl'; shear_flow has Reynolds, Schmidt"),
    ([*HEAD, "0,Reynolds,much"], "line 3, column value: got 'much'; write the predicted Reynolds in physical units"),
    ([*HEAD, "0,Reynolds,-1"], "Reynolds must be positive, its logarithm is scored"),
    ([*HEAD, "0,Reynolds"], "line 3: 2 fields; window,label,value are 3"),
    ([*HEAD, *LINES, LINES[0]], "window 0 has a second Reynolds; keep one of them"),
    ([*HEAD, *LINES[:-2]], "1 of 4 windows of split 'test'", "every window is scored"),
    ([HEAD[0].replace("00aa", "ffff"), *HEAD[1:], *LINES], "is of data ffff", "of 00aa", "not comparable"),
    ([HEAD[0].replace("shear_flow", "active_matter"), *HEAD[1:], *LINES], "is of system active_matter"),
    ([HEAD[1], *LINES], "does not say which data it is of; ours are 00aa", "first line"),
]
COMMAND = [
    (["pretain"], 2, "unknown command 'pretain'; valid: simulate, pretrain, probe, compare"),
    (["simulate", "--workers", "two"], 2, "argument --workers: invalid int value: 'two'"),
    (["pretrain", "--stepz", "3"], 2, "unrecognized arguments: --stepz 3"),
    (["pretrain", "--recipe", "[1]"], 2, "must be a mapping such as '{variance: 40}', got '[1]'"),
    (["pretrain", "--recipe", "[" * 1000], 2, "must be a mapping such as"),
    (["pretrain", "--recipe", "!!python/name:os.getcwd"], 2, "must be a mapping such as"),
    (["probe", "own"], 2, "'own' is no place of a function; write my_package.module:make_encoder"),
    (
        ["compare", "no.csv", "--reference", "nowhere"],
        1,
        "no file no.csv; `physrep compare no.csv --template --reference RUN` (`write_windows_csv`) writes one to",
    ),
    (["verify", "nowhere"], 2, "nowhere"),
    (["download", "shear"], 2, "required: root"),
]


def run_command(arguments: list[str]) -> None:
    "Runs it in this process; the exit code becomes an error, so that it can be in the table."
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    raise ChildProcessError(code)


def npy(array: object, **options: object) -> bytes:
    import io

    raw = io.BytesIO()
    np.save(raw, array, **options)
    return raw.getvalue()


def own(content: bytes, name: str, folder: Path, sound: Sound) -> object:
    return flow_from_bytes(name, content, SYSTEM, 0.2, (1.0, 1.0))


ABSURD = npy(zeros(4, 2, 8, 8)).replace(b"(4, 2, 8, 8), }", b"(9**9**9,8), }")
LONG = npy(zeros(4, 2, 8, 8)).replace(b"(4, 2, 8, 8)", b"(4, 9, 8, 8)")
UPLOADS = [
    ("a.exe", b"MZ", "files end in .npy, .hdf5 or .h5, this one in .exe"),
    ("a", b"", "this one in nothing"),
    ("a.npy", bytes(8_000_001), "8.0 MB; at most 8 MB can be uploaded"),
    ("a.npy", b"", "no whole .npy file"),
    ("a.npy", PICKLE, "no whole .npy file"),
    (
        "a.npy",
        npy(np.array([print], dtype=object), allow_pickle=True),
        "it holds a pickle of Python objects, which is not read",
    ),
    ("a.npy", npy(zeros(4, 2, 8, 8))[:-4], "bytes are no array (4, 2, 8, 8) of float32"),
    ("a.npy", LONG, "bytes are no array (4, 9, 8, 8)"),
    ("a.npy", ABSURD, "no whole .npy file"),
    ("a.npy", npy(zeros(3, 2, 8, 8)), "wanted is (4, time, x, y), with the channels tracer"),
    ("a.npy", npy(zeros(4, 1, 8, 8)), "it needs two frames"),
    ("a.npy", npy(zeros(4, 2, 8, 8) + np.inf), "512 values of the array are not finite"),
    ("a.npy", npy(np.full((4, 2, 8, 8), "x")), "real numbers are wanted"),
    ("a.hdf5", b"", "an empty file"),
    ("a.hdf5", PICKLE, "not an HDF5 file"),
]
# changes to a file of The Well's format that is uploaded; the fuzzer found these
UPLOADED = [
    (lambda f: f[TRACER].__setitem__((0, 0, 0, 0), np.nan), "1 values of the file are not finite"),
    (replace(TRACER, 3.0), "must be (trajectory, time, x, y), it is ()"),
    (replace(TIME, h5py.Empty("f4")), "not as in The Well's format"),
    (replace("dimensions/x", h5py.Empty("f4")), "not as in The Well's format"),
    (lambda f: (f.pop("scalars/Reynolds"), f.create_group("scalars/Reynolds")), "no dataset 'scalars/Reynolds'"),
    (lambda f: f["dimensions"].attrs.update(spatial_dims=3), "not as in The Well's format"),
]


def doors() -> list[Case]:
    found = []
    for lines, *says in CSV:
        do = lambda f, s, lines=lines: predictions_from_csv(  # noqa: E731
            write(f, "theirs.csv", "\n".join(lines)), predictions_file(f)
        )
        found.append(Case(f"csv {says[0][-40:]}", do, ValueError, ("theirs.csv", *says)))
    for arguments, code, *says in COMMAND:
        do = lambda f, s, a=arguments: run_command(a)  # noqa: E731
        found.append(Case(f"physrep {' '.join(arguments)[:40]}", do, ChildProcessError, (str(code), *says)))
    for name, content, *says in UPLOADS:
        found.append(Case(f"upload {says[0][:40]}", partial(own, content, name), ValueError, tuple(says)))
    for edit, *says in UPLOADED:
        do = lambda f, s, edit=edit: own(change(well_file(f / "a.h5"), edit).read_bytes(), "a.h5", f, s)  # noqa: E731
        found.append(Case(f"uploaded {says[0]}", do, ValueError, tuple(says)))
    for dt, box in ((0.0, (1.0, 1.0)), (float("nan"), (1.0, 1.0)), (0.1, (1.0, -1.0))):
        do = lambda f, s, a=(dt, box): flow_from_array(zeros(4, 2, 8, 8), SYSTEM, *a)  # noqa: E731
        found.append(Case(f"flow of {dt} in {box}", do, ValueError, ("must be positive", f"{dt:g}")))
    return found


CASES = [*stages(), *texts(), *wells(), *weights(), *doors()]


@pytest.mark.parametrize("case", CASES, ids=[f"{n}-{case.name}"[:60] for n, case in enumerate(CASES)])
def test_bad_input_is_named(case, sound, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHYSREP_ROOT", str(Path(__file__).resolve().parent.parent))
    with pytest.raises(case.error) as error:
        case.do(tmp_path, sound)
    said = str(error.value) + "".join(capsys.readouterr())
    for words in case.says:
        assert words in said, f"{words!r} is not in {said!r}"


def test_every_argument_of_our_encoders_that_may_be_a_fraction_is_known():
    signatures = [inspect.signature(load_object(name, ENCODERS)) for name in BUILDERS]
    found = {name for one in signatures for name, p in one.parameters.items() if "float" in str(p.annotation)}
    assert found == set(FRACTIONS)


def test_an_encoder_whose_columns_count_from_0_is_loaded(tmp_path):
    name = "physrep.models.avit:AViT"
    small = dict(columns=[0, 1, 2, 3], dim=16, depth=1, heads=2, strides=(4, 2, 2))
    encoder = build_encoder(name, in_channels=4, **small)
    about = dict(objective="mpp", preset="laptop", seed=0, shape=(4, 32, 32), dt=0.2)
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, name, system=SYSTEM, mean=torch.zeros(4), std=torch.ones(4), **about)
    assert physrep.load_encoder(path).encoder.config["columns"] == [0, 1, 2, 3]
    with_info(path, config=encoder.config | {"columns": [-1, 1, 2, 3]})
    with pytest.raises(ValueError, match="columns in config must be an integer, got"):
        physrep.load_encoder(path)


def test_weights_that_are_finite_and_give_features_that_are_not(sound, tmp_path):
    path = copy(sound.root / "encoder.safetensors", tmp_path / "encoder.safetensors")
    weights, metadata = open_tensors(path)
    save_file({name: torch.full_like(value, 3e38) for name, value in weights.items()}, path, metadata)
    with pytest.raises(ValueError, match="features are not finite: the weights are damaged"):
        physrep.load_encoder(path).embed(zeros(1, 4, 4, 8, 8), 0.2)


def test_what_is_not_broken_is_read(sound, tmp_path):
    "The same ways with sound things: what the table refuses is refused for what was broken."
    assert run_stage("00_simulate", 3, {}, tmp_path, sound)["folder"] == sound.root / "data" / "shear_flow"
    assert run_stage("03_pretrain", 3, {"seeds": "3 1"}, tmp_path, sound)["runs"][1].seed == 1
    assert read_preset(write(tmp_path, "my.own-2.yaml", "base: smoke")).name == "my.own-2"
    assert read_broken(lambda p: None, tmp_path, sound).shape == (1, 4, 2, 8, 6)
    assert np.isfinite(use_encoder(lambda p: None, tmp_path, sound)).all()
    assert (
        len(predictions_from_csv(write(tmp_path, "a.csv", "\n".join([*HEAD, *LINES])), predictions_file(tmp_path))) == 1
    )
    assert own(npy(zeros(4, 2, 8, 8)), "a.NPY", tmp_path, sound).n_frames == 2
    assert own(well_file(tmp_path / "a.hdf5").read_bytes(), "a.h5", tmp_path, sound).n_frames == 5
    assert check_files(sound.root / "set" / "shear_flow", SYSTEM) == []


def test_names_of_executed_notebooks_stay_in_their_folder(tmp_path):
    values = {"run_dir": str(tmp_path), "preset": "smoke", "system": "shear_flow", "objective": "mae"}
    path = output_path("pretrain", values | {"encoder": "a.b:C", "tag": "../../../x"})
    assert path.resolve().parent == (tmp_path / "smoke" / "notebooks").resolve()
    assert path.name == "pretrain-shear_flow-mae-C-.._.._.._x.ipynb"
    several = output_path("probe", values | {"seed": 0, "seeds": "0 1/.."})
    assert several.name == "probe-shear_flow-mae-seed0_1_...ipynb", "no seed overwrites another one"
    assert output_path("probe", values | {"seed": 1, "seeds": ""}).name == "probe-shear_flow-mae-seed1.ipynb"


@pytest.mark.parametrize("option", [["--template"], ["--name", "mine"], ["--metric", "r2"]])
def test_a_written_row_takes_no_options_of_the_printed_comparison(option, capsys):
    with pytest.raises(SystemExit):
        main(["compare", "mine.csv", "--reference", "runs", "--into", "mine", *option])
    assert "leave out --template, --name, --metric" in capsys.readouterr().err


@pytest.mark.parametrize("key, value", [("t0_fields/tracer", 3.0), ("dimensions/time", b"soon"), ("dimensions/x", 1.0)])
def test_a_part_of_a_kind_that_nobody_expects_is_named_with_its_file(key, value, tmp_path):
    path = change(well_file(tmp_path / "a.hdf5"), replace(key, value))
    with pytest.raises(WellFormatError, match="a.hdf5"):
        WellFile(path, SYSTEM)

"""Sound files of every kind, small ones, and ways to break them: for tests that do."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
import yaml

from physrep.core.files import project_root
from physrep.data.scaling import LabelScaler
from physrep.data.write import write_stats, write_well
from physrep.models.encoders import build_encoder
from physrep.models.pretrained import save_encoder
from physrep.physics.systems import System, get_system
from physrep.probing.features import Features
from physrep.probing.frozen import fit_probe
from physrep.probing.records import read_predictions, write_predictions

SYSTEM = get_system("shear_flow")
SHAPE = (2, 5, 8, 6)  # trajectories, frames, points along x and y
GRID = np.array([(re, sc) for re in (400.0, 1600.0) for sc in (0.5, 2.0)])


def well_file(
    path: Path, seed: int = 0, system: System | str = SYSTEM, shape: tuple[int, ...] = SHAPE, **changes: object
) -> Path:
    "A sound file of The Well's format: noise. Labels are those of `parameters`, or 1."
    system = get_system(system) if isinstance(system, str) else system
    rng, b = np.random.default_rng(seed), shape[0]
    fields = {f.name: rng.normal(size=(*shape, *(2,) * f.rank)).astype(np.float32) for f in system.fields}
    labels = {"Reynolds": 800.0, "Schmidt": 1.0} if system == SYSTEM else dict.fromkeys(system.label_names, 1.0)
    options = dict(time=np.arange(shape[1]) * 0.2, box=(1.0, 1.0), initial_conditions=range(b * seed, b * seed + b))
    if system.boundary[1] == "wall":
        options["coordinates"] = {"y": np.linspace(0.0, 1.0, shape[3])}
    given = dict(fields=fields, parameters=labels) | options | changes
    return write_well(path, system, **given)


def well_set(root: Path) -> Path:
    "A sound set of two splits; returns its root."
    for seed, split in enumerate(("train", "valid")):
        well_file(root / "shear_flow" / "data" / split / "flow.hdf5", seed)
    write_stats(root, SYSTEM)
    return root


def change(path: Path, edit: Callable[[h5py.File], object]) -> Path:
    "The HDF5 file after an edit."
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def replace(key: str, value: object) -> Callable[[h5py.File], None]:
    "An edit that puts another dataset, or a link, in the place of one."

    def edit(file: h5py.File) -> None:
        attributes = dict(file[key].attrs) if key in file else {}
        if key in file:
            del file[key]
        file[key] = value
        if not isinstance(value, h5py.SoftLink | h5py.ExternalLink):
            file[key].attrs.update(attributes)

    return edit


def encoder_file(path: Path) -> Path:
    "A small encoder of the shear flow."
    torch.manual_seed(0)
    encoder = build_encoder("vit", in_channels=SYSTEM.n_channels, dim=8, depth=1, heads=2, tubelet=(2, 4, 4))
    about = dict(system=SYSTEM, mean=torch.zeros(4), std=torch.ones(4), shape=(4, 8, 8), dt=0.2)
    save_encoder(path, encoder, "vit", objective="mae", preset="laptop", seed=0, **about)
    return path


def probe_file(path: Path) -> Path:
    "A linear probe of four features."
    rng = np.random.default_rng(0)
    scaler = LabelScaler.fit(SYSTEM, GRID)
    part = Features(torch.tensor(rng.normal(size=(4, 1, 4)), dtype=torch.float32), GRID, np.arange(4))
    fit_probe("linear", part, part, scaler).save(path)
    return path


def predictions_file(folder: Path):
    "The predictions of a run on four windows."
    scaler = LabelScaler.fit(SYSTEM, GRID)
    about = dict(system="shear_flow", objective="jepa", encoder="vit", seed=0, labelled_flows=4, draw=0, run="a/seed0")
    split = {"test": GRID}, {"test": np.arange(4)}
    path = folder / "predictions.safetensors"
    write_predictions(path, {("linear", "test"): GRID}, *split, scaler=scaler, data={"test": "00aa"}, **about)
    return read_predictions(path)


def header(path: Path) -> tuple[dict, bytes]:
    "The JSON header of a safetensors file, and the bytes after it."
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(path: Path, edit: Callable[[dict], object], size: int | None = None) -> Path:
    "The safetensors file with an edited header; `size`: what is said of the header's length."
    found, body = header(path)
    edit(found)
    text = json.dumps(found).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)
    return path


def with_info(path: Path, **changes: object) -> Path:
    "The encoder file with other metadata; None takes an entry away."

    def edit(found: dict) -> None:
        info = json.loads(found["__metadata__"]["physrep"]) | changes
        found["__metadata__"]["physrep"] = json.dumps({k: v for k, v in info.items() if v is not None})

    return with_header(path, edit)


def cut(path: Path, share: float = 0.5) -> Path:
    "The file without its end."
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    return path


def stage(name: str, cells: int, **values: object) -> dict:
    "Runs the first cells of a stage's notebook with these parameters, as papermill would; returns its names."
    notebook = json.loads((project_root() / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    given = "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in values.items())
    names: dict = {"In": ["", sources[0], given], "display": print}
    for source in (sources[0], given, *sources[1:cells]):
        exec("\n".join(line for line in source.splitlines() if not line.startswith("%")), names)
    return names


def copy(source: Path, target: Path) -> Path:
    "A copy that may be broken."
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target))


TINY = """
base: smoke
frames: 4
probe_stride: 4
probe_epochs: 1
seeds: [0]
systems: [shear_flow]
sims:
  shear_flow:
    ranges: {Reynolds: [400.0, 800.0], Schmidt: [0.5, 2.0]}
    draws: {train: [4, 1], valid: [2, 1], test: [2, 1]}
    grid: 16
    store_grid: 8
    n_frames: 8
    frame_dt: 0.2
    dt: 0.05
encoders: {vit: {dim: 8, depth: 1, heads: 2, tubelet: [2, 4, 4]}}
objectives: {mae: {ratio: 0.5, patch: [2, 4, 4], decoder_width: 8, decoder_depth: 1}}
train: {mae: {steps: 4, lr: 0.001, batch_size: 2, evaluations: 1}}
"""


def tiny_preset(folder: Path, **fields: object) -> Path:
    "A preset whose data, training and probing take a second; `fields` are written over its own."
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(TINY) | fields))
    return path

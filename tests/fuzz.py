"""Mutates sound files at random and reads them: whatever comes must be a result, or an error that names the file.

    python tests/fuzz.py --seconds 60 [--seed 0] [--keep folder]

It reads encoders, probes, predictions, checkpoints (safetensors), presets, rows, statistics (YAML), The Well's files
(HDF5), uploads and archives of results (zip). A *find* is any other exception, a message without the file's name, a
result that is not finite, or a reader that takes more than ten seconds, hangs, or ends its process. Every kind of find
is printed once with its seed, which makes it again; `--keep` saves the file. What was found stands as a case in
tests/test_bad_input.py or tests/test_archive.py. What hangs or ends in C, inside HDF5, cannot be a case."""

import argparse
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from broken import SYSTEM, TINY, encoder_file, predictions_file, probe_file, well_file, with_header

import physrep
from physrep.data.sets import read_stats
from physrep.data.windows import Windows
from physrep.data.write import write_stats
from physrep.explore.your_flow import flow_from_bytes
from physrep.probing.records import read_predictions
from physrep.results.archive import read_archive, write_archive
from physrep.results.rows import read_rows
from physrep.training.loop import Recipe, load_checkpoint, make_optimizer, save_checkpoint
from physrep.training.presets import read_preset

DEEP = "[" * 10**5
ODD_TEXT = [
    DEEP,
    "",
    "..",
    "\x00",
    "é",
    "../x",
    "null",
    "-1",
    ".nan",
    "1e400",
    "!!python/name:os",
    "[" * 40,
    "{",
    "&a",
    "*a",
]
ODD_NUMBERS = [0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e400, float("nan")]
ODD_VALUES = [*ODD_NUMBERS, *ODD_TEXT, None, True, [], {}, [[]], [1, "a"], {"a": 1}]


# errors that are not clear, of definitions that every figure depends on: they wait until all are drawn again
KNOWN = {"rows": r"^TypeError: unsupported operand|^RecursionError"}


def mutated_bytes(raw: bytes, rng: random.Random) -> bytes:
    "Some bytes changed, cut out, doubled or cut off; more often near the beginning, where headers are."
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if not data:
            break
        place = int(len(data) * rng.random() ** rng.choice([1, 4]))
        way = rng.randrange(5)
        if way == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif way == 1:
            data[place] = rng.choice([0, 255, 127, 128, ord("9"), ord('"')])
        elif way == 2:
            del data[place : place + rng.randrange(1, 9)]
        elif way == 3:
            data[place:place] = data[place : place + rng.randrange(1, 9)]
        else:
            del data[place:]
    return bytes(data)


def mutated_value(value: object, rng: random.Random) -> object:
    "A JSON value with one entry, at any depth, changed, dropped or moved."
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return value | {rng.choice(ODD_TEXT): rng.choice(ODD_VALUES)}
        return value | {key: mutated_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return [*value[:i], *([] if rng.random() < 0.2 else [mutated_value(value[i], rng)]), *value[i + 1 :]]
    return rng.choice(ODD_VALUES)


def mutated_header(path: Path, rng: random.Random) -> None:
    "A safetensors file with a sound frame and a changed header, or with a changed description inside of it."

    def edit(found: dict) -> None:
        metadata = found.get("__metadata__", {})
        inner = metadata.get("physrep")
        if inner and rng.random() < 0.7:
            metadata["physrep"] = json.dumps(mutated_value(json.loads(inner), rng))
            return
        changed = mutated_value(found, rng)
        found.clear()
        found.update(changed if isinstance(changed, dict) else {"a": changed})

    with_header(path, edit)


def mutated_hdf5(path: Path, rng: random.Random) -> None:
    "A sound HDF5 file with one part deleted, replaced or given another attribute."
    import h5py

    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        name = rng.choice(names)
        way = rng.randrange(5)
        item = file[name]
        if way == 0:
            del file[name]
        elif way == 1 and isinstance(item, h5py.Dataset):
            values = np.asarray(item[()], dtype="f8" if item.dtype.kind in "fiu" else None)
            del file[name]
            odd = [
                values[..., :0] if values.ndim else values,
                values.T,
                values * np.nan if values.dtype.kind == "f" else 0,
            ]
            file[name] = rng.choice([*odd, h5py.Empty("f4"), 3.0, "text", np.array([b"a", b"b"]), values.astype("S4")])
        elif way == 2:
            del file[name]
            file[name] = rng.choice([h5py.SoftLink("/"), h5py.SoftLink(f"/{name}"), h5py.ExternalLink("x", "/y")])
        elif way == 3:
            holder = rng.choice([file, item])
            if keys := sorted(holder.attrs):
                holder.attrs[rng.choice(keys)] = rng.choice([3, "x", [1.0, 2.0], np.nan, h5py.Empty("f4"), b"\xff"])
        else:
            del file[name]
            file.create_group(name)


YAML = {
    "preset": TINY,
    "rows": "rows:\n- {objective: mae, encoder: vit, tag: mine, recipe: {lr: 0.1}, color: '#112233', cost: 1}\n"
    "- {objective: own, predictions: {shear_flow: a.csv}}\n",
}


def mutated_yaml(text: str, rng: random.Random) -> bytes:
    "YAML with another value somewhere, or other characters."
    import yaml

    if rng.random() < 0.5:
        return mutated_bytes(text.encode(), rng)
    return yaml.safe_dump(mutated_value(yaml.safe_load(text), rng)).encode()


class Files:
    "Sound files of each kind, and how each kind is read."

    def __init__(self, root: Path):
        self.root = root
        self.model = torch.nn.Linear(3, 2)
        save_checkpoint(root / "checkpoint.safetensors", self.model, self.optimizer(), 3)
        encoder_file(root / "encoder.safetensors")
        probe_file(root / "probe.safetensors")
        predictions_file(root)
        well_file(root / "set" / "shear_flow" / "data" / "train" / "flow.hdf5")
        write_stats(root / "set", SYSTEM)
        results = {"result.json": b'{"rows": []}', "curve/11.json": b"{}", "curve.csv": b"step,loss\n1,0.5\n"}
        write_archive(root / "seed0.zip", {"mae-vit-01234567/seed0": results, "random-vit-89abcdef/seed0": results})
        self.stats = (root / "set" / "shear_flow" / "stats.yaml").read_text()
        self.sources = {
            "encoder": root / "encoder.safetensors",
            "probe": root / "probe.safetensors",
            "predictions": root / "predictions.safetensors",
            "checkpoint": root / "checkpoint.safetensors",
            "well": root / "set" / "shear_flow" / "data" / "train" / "flow.hdf5",
            "upload": root / "set" / "shear_flow" / "data" / "train" / "flow.hdf5",
            "archive": root / "seed0.zip",
        }

    def optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, Recipe(steps=1, lr=0.1))

    def broken(self, kind: str, folder: Path, rng: random.Random) -> Path:
        "A mutated file of that kind in a folder."
        if kind in ("preset", "rows", "stats"):
            path = folder / "mine.yaml"
            path.write_bytes(mutated_yaml(YAML.get(kind, self.stats), rng))
            return path
        source = self.sources[kind]
        path = folder / "shear_flow" / "data" / "train" / "flow.hdf5" if kind == "well" else folder / source.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
        if kind == "archive" or rng.random() < 0.4:
            path.write_bytes(mutated_bytes(source.read_bytes(), rng))
        elif path.suffix == ".hdf5":
            mutated_hdf5(path, rng)
        else:
            mutated_header(path, rng)
        return path

    def embed(self, encoder: physrep.models.pretrained.LoadedEncoder, fields: np.ndarray) -> np.ndarray | None:
        "Features of fields; None where the clip of the description has no blocks of the network's size."
        try:
            return encoder.embed(fields, dt=encoder.info["dt"] or 1.0)
        except (ValueError, RuntimeError) as error:
            if "features are not finite" in str(error):
                raise ValueError(f"encoder.safetensors: {error}") from error  # said of the encoder, which has no name
            return None

    def read(self, kind: str, path: Path) -> object:
        "What a user of such a file does."
        if kind == "encoder":
            encoder = physrep.load_encoder(path)
            shape = (1, len(encoder.info["channels"]), *encoder.info["shape"])
            return None if np.prod(shape) > 10**6 else self.embed(encoder, np.zeros(shape, np.float32))
        if kind == "well":
            return Windows(path.parents[3], "shear_flow", "train", frames=2).read([0]).numpy()
        if kind == "upload":
            return flow_from_bytes(path.name, path.read_bytes(), SYSTEM, 0.2, (1.0, 1.0)).fields
        if kind == "checkpoint":
            return load_checkpoint(path, self.model, self.optimizer())
        readers: dict[str, Callable] = {
            "probe": physrep.load_probe,
            "predictions": read_predictions,
            "archive": read_archive,
        }
        readers |= {"preset": read_preset, "rows": read_rows, "stats": lambda p: read_stats(p, SYSTEM)}
        return readers[kind](path)


KINDS = ("encoder", "probe", "predictions", "checkpoint", "well", "upload", "preset", "rows", "stats", "archive")


def find(files: Files, kind: str, seed: int, folder: Path) -> str:
    "What is wrong with how a mutated file is read; empty if nothing is."
    path = files.broken(kind, folder, random.Random(f"{kind} {seed}"))
    started = time.monotonic()
    try:
        result = files.read(kind, path)
        if isinstance(result, np.ndarray) and not np.isfinite(result).all():
            return "result is not finite"
    except (ValueError, FileNotFoundError) as error:
        if kind != "upload" and path.name not in str(error):
            return f"{type(error).__name__} without the file: {error}"
    except Exception as error:  # what this is here to find
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({Path(place.filename).name}, {place.name})"
    return "slow" if time.monotonic() - started > 10 else ""


class Reader:
    "A process that reads mutated files one after the other, from a seed on, and says what is wrong with each."

    def __init__(self, files: Files, kinds: tuple[str, ...], seed: int, root: Path):
        reading, writing = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            os.close(reading)  # so that it ends with the parent
            try:
                for k in itertools.count(seed):
                    with tempfile.TemporaryDirectory(dir=root) as folder:
                        what = find(files, kinds[k % len(kinds)], k, Path(folder))
                    os.write(writing, json.dumps(what[:2000]).encode() + b"\n")
            except BaseException:  # of the mutations, or SystemExit of a reader
                traceback.print_exc()
            finally:
                os._exit(1)  # what is below belongs to the parent
        os.close(writing)
        self.said = os.fdopen(reading, "rb", buffering=0)

    def next(self, seconds: float = 30) -> tuple[str, bool]:
        "What is wrong with the next file, and whether the process lives: C code may hang, or end it."
        if not select.select([self.said], [], [], seconds)[0]:
            self.end()
            return f"hangs, ended after {seconds:g} s", False
        line = self.said.readline()
        if line:
            return json.loads(line), True
        return f"the process ended with {self.end()}", False

    def end(self) -> int:
        "Ends the process, if it lives; its exit code, or minus the signal that killed it."
        if not self.said.closed:
            self.said.close()
            os.kill(self.child, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        return self.code


def shortened(what: str) -> str:
    "A find without what changes from one file to the next, so that each kind is told once."
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?|'[^']*'|\"[^\"]*\"|/\S+", "…", what)[:90]


def fuzz(seconds: float, seed: int = 0, keep: Path | None = None, kinds: tuple[str, ...] = KINDS) -> dict[str, int]:
    "Mutates and reads for so long; what was found, by kind and message, with how often."
    found: Counter[str] = Counter()
    torch.set_num_threads(1)
    first = seed
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "sound").mkdir()
        files = Files(root / "sound")
        reader, deadline = Reader(files, kinds, seed, root), time.monotonic() + seconds
        try:
            while seed == first or time.monotonic() < deadline:
                what, lives = reader.next()
                kind = kinds[seed % len(kinds)]
                if what and not re.search(KNOWN.get(kind, r"(?!)"), what):
                    name = f"{kind}: {shortened(what)}"
                    if not found[name]:
                        print(f"FOUND {kind}, seed {seed}: {what[:300]}", flush=True)
                        if keep:
                            (keep / f"{kind}-{seed}").mkdir(parents=True)
                            files.broken(kind, keep / f"{kind}-{seed}", random.Random(f"{kind} {seed}"))
                    found[name] += 1
                seed += 1
                if not lives:
                    reader = Reader(files, kinds, seed, root)
        finally:
            reader.end()
    print(f"{seed - first} files of {', '.join(kinds)}; {len(found)} kinds of finds {dict(found)}; next seed {seed}")
    return dict(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files of finds")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    asked = parser.parse_args()
    sys.exit(bool(fuzz(asked.seconds, asked.seed, asked.keep, tuple(asked.kinds.split(",")))))

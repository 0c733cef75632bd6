"""Sound files, mutated at random: what comes is a result, or an error that names the file."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from broken import encoder_file, predictions_file, probe_file

import physrep
from physrep.data.sets import STATS as STATS_OF_A_SET
from physrep.data.sets import read_stats
from physrep.physics.systems import get_system
from physrep.probing.records import read_predictions
from physrep.results.archive import read_archive, write_archive
from physrep.results.rows import read_rows
from physrep.training.loop import Recipe, load_checkpoint, make_optimizer, save_checkpoint
from physrep.training.presets import read_preset

LAYER = torch.nn.Linear(2, 2)
OPTIMIZER = make_optimizer(LAYER, Recipe(steps=4, lr=0.1))
TEXT = [b"[" * 50, b"null", b"-1", b".nan", b"1e400", b"!!python/name:os", b"{", b"&a", b"*a", b"\xff", b"\n", b": "]
PRESET = "base: smoke\nframes: 4\nseeds: [0]\ntrain: {mae: {steps: 4, lr: 0.001, batch_size: 2}}\n"
ROWS = "rows: [{objective: mae, encoder: vit, tag: mine, recipe: {lr: 0.1}}]\n"
STATS = "".join(f"{k}: {{tracer: 1.0, pressure: 1.0, velocity: [1.0, 1.0]}}\n" for k in STATS_OF_A_SET)


def use_encoder(path: Path) -> None:
    features = physrep.load_encoder(path).embed(np.zeros((1, 4, 4, 8, 8), np.float32), dt=0.2)
    assert np.isfinite(features).all()


def checkpoint(path: Path) -> Path:
    save_checkpoint(path, LAYER, OPTIMIZER, 3)
    return path


KINDS = {  # name of the file: how it is made, how it is read
    "encoder.safetensors": (encoder_file, use_encoder),
    "probe.safetensors": (probe_file, physrep.load_probe),
    "predictions.safetensors": (lambda path: predictions_file(path.parent), read_predictions),
    "last.safetensors": (checkpoint, lambda path: load_checkpoint(path, LAYER, OPTIMIZER)),
    "seed0.zip": (lambda p: write_archive(p, {"a-vit-01234567/seed0": {"result.json": b"{}" * 99}}), read_archive),
    "mine.yaml": (lambda path: path.write_text(PRESET), read_preset),
    "rows.yaml": (lambda path: path.write_text(ROWS), read_rows),
    "stats.yaml": (lambda path: path.write_text(STATS), lambda path: read_stats(path, get_system("shear_flow"))),
}


def mutated(raw: bytes, rng: random.Random) -> bytes:
    "The bytes after one to three changes: flipped bits, a cut, a piece doubled, odd text; often near the beginning."
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(raw) if rng.random() < 0.4 else min(len(raw), 600)) if raw else 0
        kind = rng.randrange(4)
        if kind == 0 and raw:
            raw = raw[:place] + bytes([raw[place] ^ (1 << rng.randrange(8))]) + raw[place + 1 :]
        elif kind == 1:
            raw = raw[:place]
        elif kind == 2:
            raw = raw[:place] + raw[place : place + rng.randrange(1, 200)] * 2 + raw[place:]
        else:
            raw = raw[:place] + rng.choice(TEXT) + raw[place + rng.randrange(4) :]
    return raw


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_is_a_result_or_an_error_that_names_it(name, tmp_path):
    make, read = KINDS[name]
    path = tmp_path / name
    make(path)
    sound, rng = path.read_bytes(), random.Random(name)
    read(path)
    for k in range(400):
        path.write_bytes(mutated(sound, rng))
        try:
            read(path)
        except (ValueError, OSError) as error:
            assert name in str(error), f"mutation {k}: {error}"

"""Features: extraction, digests, a cache that is never wrong, and the order of windows."""

import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from physrep.core.files import ABANDONED, tensors_digest, weights_digest, write_tensors
from physrep.core.randomness import generator
from physrep.data.scaling import LabelScaler
from physrep.data.windows import Windows
from physrep.models.encoders import build_encoder
from physrep.models.pretrained import LoadedEncoder, load_encoder, save_encoder
from physrep.physics.systems import get_system
from physrep.probing import features as module
from physrep.probing.features import (
    Features,
    cache_path,
    cached,
    coarser_grid,
    encoder_digest,
    extract,
    features_key,
    features_of,
    fewer_tokens,
    shuffled,
    windows_at_once,
)

SYSTEM = get_system("shear_flow")
KEY = {"encoder": "abc", "split": "train", "crop": ((0, 8), (0, 8)), "mean": [0.1, 0.2]}
TOKENS = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)).half()


def saved(path, *, seed: int = 0, std: float = 1.0, shape=(16, 32, 32), **config) -> LoadedEncoder:
    "A small ViT from its file, with the same normalisation for all channels."
    torch.manual_seed(seed)
    encoder = build_encoder("vit", **dict(in_channels=4, dim=24, depth=1, heads=2, tubelet=(4, 8, 8)) | config)
    scale = {"mean": torch.zeros(4), "std": torch.full((4,), std)}
    save_encoder(path, encoder, "vit", system="shear_flow", **scale, shape=shape, dt=0.2)
    return load_encoder(path)


def test_a_channel_that_half_precision_harms_is_not_hidden_by_one_that_it_does_not():
    tokens = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([50.0, 1.0])
    assert module._survives_rounding(tokens)
    for harmed in (torch.tensor([0.0, 5e4]), torch.tensor([0.0, 1e6])):  # spread of a rounding; more than it holds
        assert not module._survives_rounding(tokens + harmed)


class Make:
    "Counts how often it is called."

    def __init__(self, tokens: torch.Tensor = TOKENS):
        self.tokens, self.calls = tokens, 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return self.tokens


class OnASmallCard(torch.nn.Module):
    "Means over space of at most `room` clips at once, with dropout."

    def __init__(self, room: int):
        super().__init__()
        self.room, self.drop = room, torch.nn.Dropout(0.5)
        self.sizes: list[int] = []

    def forward(self, x):
        assert not torch.is_grad_enabled()
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.drop(x.mean((-1, -2)).transpose(1, 2))


def test_extraction_takes_no_gradient_evaluation_mode_and_parts_of_what_a_card_cannot_hold():
    clips = torch.randn(7, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    small = OnASmallCard(2).train()
    found = extract(small, [{"fields": clips}], dtype=torch.float32, progress=False)
    assert torch.allclose(found, clips.mean((-1, -2)).transpose(1, 2)) and small.sizes == [7, 4, 2, 2, 3, 2, 1]
    assert small.training and not found.requires_grad
    with pytest.raises(torch.OutOfMemoryError):
        extract(OnASmallCard(0), [{"fields": clips}], progress=False)


def test_what_is_not_right_is_named(tmp_path):
    labels, groups = np.ones((5, 2)), np.arange(5)
    bad = TOKENS.clone()
    bad[3, 0, 0] = torch.inf
    nan = [{"fields": torch.full((2, 1, 2, 2, 2), torch.nan)}]
    cases = [
        (lambda: Features(bad, labels, groups), "tokens of 1 of 5 windows are not finite, first at window 3"),
        (lambda: Features(TOKENS, labels * np.nan, groups), "labels of 5 of 5 windows are not finite"),
        (lambda: Features(TOKENS, labels[:3], groups), r"of the same windows, at least one; got \(5, 3, 8\), \(3, 2\)"),
        (lambda: extract(torch.nn.Identity(), [], progress=False), "no batches"),
        (lambda: extract(OnASmallCard(2), nan, progress=False), "tokens are not finite as torch.float"),
        (lambda: fewer_tokens(torch.randn(2, 97, 3), torch.nn.Identity(), (8, 48, 32), 96), "97 tokens .* cannot be"),
        (lambda: fewer_tokens(TOKENS, torch.nn.Identity(), (8, 48, 32), 0), "at least one token"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert error.type is ValueError, "float32 would not hold them either"


def test_tokens_are_averaged_over_neighbours_in_the_grid_of_the_encoder():
    for grid, most, coarser in [
        ((8, 14, 14), 1568, (8, 14, 14)),
        ((8, 14, 14), 1567, (8, 14, 7)),
        ((8, 14, 14), 391, (4, 7, 7)),
        ((8, 32, 8), 392, (8, 8, 4)),
        ((1, 1, 35), 7, (1, 1, 7)),
    ]:
        assert coarser_grid(grid, most) == coarser
    tokens = torch.randn(3, 4 * 6 * 4, 24)  # the grid of clips of 8 frames of 48 x 32
    vit = build_encoder("vit", in_channels=4, dim=24, depth=1, heads=2, tubelet=(2, 8, 8))
    few = fewer_tokens(tokens, vit, (8, 48, 32), 24)
    by_hand = torch.nn.functional.avg_pool3d(tokens.mT.unflatten(2, (4, 6, 4)), (1, 2, 2)).flatten(2).mT
    assert few.shape == (3, 24, 24) and torch.allclose(few, by_hand, atol=1e-6)
    assert torch.allclose(few.mean(1), tokens.mean(1), atol=1e-6), "probes of the mean token read the same"
    in_order = fewer_tokens(tokens, torch.nn.Identity(), (8, 48, 32), 48)  # an encoder that says no grid
    assert torch.allclose(in_order, tokens.unflatten(1, (48, 2)).mean(2), atol=1e-6)


def test_moments_are_mean_and_log_spread_and_finite_where_nothing_varies():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 7, 5)) * [1, 1e-3, 20, 0, 0] + [0, 0, 3, 0, 1000.1]).astype("float32")
    f = Features(x, np.ones((200, 2)), np.arange(200))
    flat = x.astype("float64")
    assert f.moments.shape == (200, 10) and f.moments.dtype == torch.float32
    assert torch.equal(f.moments[:, :5], f.pooled) and torch.equal(f.subset(f.groups > 150).moments, f.moments[151:])
    assert np.allclose(f.moments[:, 5:8], np.log(flat.std(1)[:, :3]), atol=1e-5)
    assert (f.moments[:, 8:] == f.moments[0, 8:]).all() and f.moments.isfinite().all(), "constants stay constants"
    one = Features(x[:, :1], np.ones((200, 2)), np.arange(200))
    assert torch.equal(one.moments, one.pooled)


# --- the cache


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_hit_gives_identical_tokens_without_making_them(tmp_path, dtype, capsys):
    make, folder = Make(TOKENS.to(dtype)), tmp_path / "new" / "folder"
    first = cached(folder, "train", KEY, make)
    second = cached(folder, "train", dict(reversed(KEY.items())) | {"crop": [[0, 8], [0, 8]]}, make)
    assert torch.equal(first, second) and second.dtype == dtype and make.calls == 1 and not capsys.readouterr().out
    other = cached(folder, "test", KEY | {"split": "test"}, Make(TOKENS + 1))
    assert torch.equal(other, TOKENS + 1) and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "flipped byte", "foreign key", "foreign tensors"])
def test_a_file_that_cannot_be_used_is_said_and_made_again(tmp_path, damage, capsys):
    make = Make()
    cached(tmp_path, "train", KEY, make)
    path = cache_path(tmp_path, "train", KEY)
    whole = path.read_bytes()
    content = {"truncated": whole[:-1], "empty": b"", "text": b"a note to myself"}
    content["flipped byte"] = whole[:-30] + bytes([whole[-30] ^ 16]) + whole[-29:]
    path.unlink()
    if damage in content:
        path.write_bytes(content[damage])
    elif damage == "foreign key":  # a sound file under the wrong name
        write_tensors(path, {"tokens": TOKENS + 1}, KEY | {"split": "test"})
    else:
        write_tensors(path, {"other": TOKENS + 1}, KEY)
    assert torch.equal(cached(tmp_path, "train", KEY, make), TOKENS) and make.calls == 2
    assert path.name in capsys.readouterr().out
    assert torch.equal(cached(tmp_path, "train", KEY, make), TOKENS) and make.calls == 2, "sound again"


def test_tokens_of_another_key_and_leftovers_of_killed_processes_make_way(tmp_path):
    def fails() -> torch.Tensor:
        raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        cached(tmp_path, "train", KEY, fails)
    assert not list(tmp_path.iterdir())
    cached(tmp_path, "train", KEY | {"numbers": "yesterday's"}, Make())
    cached(tmp_path, "test", KEY, Make())
    old, new = (tmp_path / f".train-{i}.safetensors.{i:016x}.tmp" for i in (0, 1))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, time.time() - ABANDONED - 60))
    assert torch.equal(cached(tmp_path, "train", KEY, Make()), TOKENS)
    kept = {cache_path(tmp_path, name, KEY) for name in ("train", "test")}
    assert set(tmp_path.iterdir()) == kept | {new}


def test_digests_and_keys_change_with_anything_that_matters(tmp_path, smoke_data):
    base = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    same = {"b": torch.ones(8)[::2], "a": torch.zeros(3, 2).t()}  # another order, other strides
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(4)},
        {"a": torch.zeros(2, 3), "c": torch.ones(4)},
        {"a": torch.zeros(2, 3).int(), "b": torch.ones(4)},
        {"a": torch.zeros(2, 3), "b": torch.ones(4).nextafter(torch.tensor(2.0))},
    ]
    assert tensors_digest(base) == tensors_digest(same)
    assert len({tensors_digest(t) for t in [base, *others]}) == 1 + len(others)
    first, again, heads = saved(tmp_path / "a"), saved(tmp_path / "b"), saved(tmp_path / "c", heads=4)
    assert encoder_digest(first) == encoder_digest(again) == encoder_digest(load_encoder(tmp_path / "a"))
    assert weights_digest(heads) == weights_digest(first), "the same weights, read by four heads"
    different = [first, heads, saved(tmp_path / "d", seed=1), saved(tmp_path / "e", std=2.0)]
    assert len({encoder_digest(e) for e in different}) == 4

    def windows(split: str = "valid", **options) -> Windows:
        return Windows(smoke_data, SYSTEM, split, **{"frames": 4, "stride": 16} | options)

    some = [windows(), windows("test"), windows(stride=8), windows(frames=8), windows(crop=((0, 16), (0, 16)))]
    keys = [features_key(e, some[0]) for e in different] + [
        features_key(first, w, size=s) for w in some for s in (8, 9)
    ]
    assert len({cache_path("", "a", key) for key in keys}) == len(keys)


def test_large_clips_come_in_small_batches_and_tokens_beyond_float16_as_float32(smoke_data, monkeypatch):
    windows, seen = Windows(smoke_data, SYSTEM, "valid", frames=16, stride=20), []
    numbers = 4 * 16 * 32 * 32
    monkeypatch.setattr(module, "memory_available", lambda: 3 * 200 * numbers)

    class GrowsLater(torch.nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x.flatten(1)[:, None, :8] + (1e6 if len(seen) > 1 else 0)

    found = features_of(GrowsLater(), windows, LabelScaler.fit(SYSTEM, windows.labels), progress=False)
    assert found.tokens.dtype == torch.float32 and found.tokens.isfinite().all() and found.tokens.max() > 9e5
    assert seen[0] == 3 and windows_at_once(numbers, "cuda") == 64 and windows_at_once(2**30) == 1


# --- what does not fit memory or disk

LARGE = """
import resource, sys
from pathlib import Path

import numpy as np, torch
from physrep.probing.features import Features, cached, extract

torch.set_num_threads(1)
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
encoder, clips = torch.nn.Identity(), ({"fields": torch.full((8, 1024, 256), float(i))} for i in range(100))
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (1024 * (used + 150_000),) * 2)
options = dict(expected=800, memory_limit=limit, scratch=folder, kept=True, progress=False)
first = cached(folder, "train", {}, lambda: extract(encoder, clips, **options))
tokens = cached(folder, "train", {}, None)
features = Features(tokens, np.ones((800, 2)), np.arange(800))
assert tokens.shape == (800, 1024, 256) and tokens.dtype == torch.float16
assert torch.equal(features.pooled[:, 0], torch.arange(100.0).repeat_interleave(8))
assert features.tokens[torch.tensor([799, 0])].amax((1, 2)).tolist() == [99.0, 0.0]
assert [p.suffix for p in folder.iterdir()] == [".safetensors"], "the file of extraction has no name"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory that does not count mapped files")
@pytest.mark.long
def test_tokens_larger_than_memory(tmp_path):
    "With room for 150 MB, 400 MB of tokens are extracted, kept, pooled and taken in any order, but not without a file."
    for limit, fits in ((2**24, True), (2**40, False)):
        call = [sys.executable, "-c", LARGE, str(tmp_path / str(limit)), str(limit)]
        done = subprocess.run(call, capture_output=True, text=True)
        assert (done.returncode == 0) == fits, done.stderr
    assert "memory" in done.stderr.lower()


def test_a_disk_that_is_too_small_is_named_before_the_work(tmp_path, monkeypatch):
    small = OnASmallCard(2)
    clips = [{"fields": torch.zeros(2, 4, 3, 2, 2)}] * 5
    free = 10 * 3 * 4 * 2  # bytes of ten windows as float16
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    options = dict(expected=10, memory_limit=0, scratch=tmp_path / "new", progress=False)
    assert extract(small, clips, **options).shape == (10, 3, 4)
    small.sizes.clear()
    with pytest.raises(OSError, match=f"would go to {tmp_path}.*, where .* are free; what helps: another folder"):
        extract(small, clips, kept=True, **options)
    assert small.sizes == [2], "the tokens would be there twice while they are copied"
    assert len(extract(small, clips, expected=11, progress=False)) == 10, "what fits memory needs no disk"


@pytest.mark.parametrize("count", [1, 37, 1000])
def test_windows_beyond_memory_are_shuffled_in_blocks(monkeypatch, count):
    tokens = torch.arange(count)[:, None, None].expand(-1, 4, 8).half().contiguous()  # 64 bytes a window
    in_memory = list(shuffled(tokens, 32, "some", 0))
    assert torch.equal(torch.cat(in_memory), torch.randperm(count, generator=generator("some", 0)))
    monkeypatch.setattr(module, "READ_AT_ONCE", 64 * 10)
    monkeypatch.setattr(module, "BLOCKS_TOGETHER", 5)
    seen = list(shuffled(tokens, 32, "some", 0, in_any_order=63))
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(count))
    assert [len(index) for index in seen] == [len(index) for index in in_memory]
    if count == 1000:
        groups = [set((windows // 10).tolist()) for windows in torch.cat(seen).split(50)]
        assert all(len(blocks) == 5 for blocks in groups) and groups[0] != set(range(5)), "five blocks at a time"

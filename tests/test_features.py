"""Features: extraction, digests, and a cache that is never wrong."""

import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from physrep.core.files import read_tensors, tensors_digest, weights_digest, write_tensors
from physrep.core.provenance import code_digest
from physrep.data.scaling import LabelScaler
from physrep.data.windows import Windows
from physrep.models.encoders import build_encoder
from physrep.models.pretrained import LoadedEncoder, load_encoder, save_encoder
from physrep.physics.systems import get_system
from physrep.probing.evaluate import Reader, _drop_others
from physrep.probing.features import (
    ABANDONED,
    Features,
    FewerTokens,
    cache_path,
    cached,
    coarser_grid,
    encoder_digest,
    extract,
    features_key,
    fewer_tokens,
    key_text,
)
from physrep.probing.reading import features_of

SYSTEM = get_system("shear_flow")
KEY = {"encoder": "abc", "split": "train", "crop": ((0, 8), (0, 8)), "mean": [0.1, 0.2]}
TOKENS = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)).half()


def save(path, encoder: torch.nn.Module, *, std: float = 1.0, shape: tuple[int, int, int] = (4, 16, 16)) -> None:
    "A small ViT as a file, with the same normalisation for all channels."
    scale = {"mean": torch.zeros(4), "std": torch.full((4,), std)}
    save_encoder(path, encoder, "vit", system="shear_flow", **scale, shape=shape, dt=0.2)


class Grid(torch.nn.Module):
    "An encoder with given tokens on the grid of a ViT with tubelets of 2 x 8 x 8."

    def __init__(self, tokens: torch.Tensor):
        super().__init__()
        self.tokens = tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tokens

    def grid(self, shape) -> tuple[int, int, int]:
        return shape[0] // 2, shape[1] // 8, shape[2] // 8


class Make:
    "Counts how often it is called."

    def __init__(self, tokens: torch.Tensor = TOKENS):
        self.tokens = tokens
        self.calls = 0
        self.said: list[str] = []

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return self.tokens

    def ask(self, folder, key=KEY, name="train") -> torch.Tensor:
        return cached(folder, name, key, self, report=self.said.append)


def test_extract_takes_no_gradient_and_uses_evaluation_mode():
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            return self.drop(x.flatten(2).transpose(1, 2)) * self.scale

    encoder, x = Encoder().train(), torch.randn(4, 3, 2, 2, 2)
    tokens = extract(encoder, ({"fields": part} for part in x.split(3)), dtype=torch.float32, progress=False)
    assert torch.equal(tokens, x.flatten(2).transpose(1, 2)) and encoder.training and not tokens.requires_grad


class OnASmallCard(torch.nn.Module):
    "Means over space of at most `room` clips at once."

    def __init__(self, room: int):
        super().__init__()
        self.room = room
        self.sizes: list[int] = []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.mean((-1, -2)).transpose(1, 2)


def test_a_batch_that_a_card_cannot_hold_is_read_in_parts():
    clips = torch.randn(7, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    small = OnASmallCard(2)
    found = extract(small, [{"fields": clips}], dtype=torch.float32, progress=False)
    assert torch.allclose(found, clips.mean((-1, -2)).transpose(1, 2)) and small.sizes == [7, 4, 2, 2, 3, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        extract(OnASmallCard(0), [{"fields": clips}], progress=False)


def test_features_and_batches_that_are_not_right_are_named():
    labels, groups = np.ones((5, 2)), np.arange(5)
    with pytest.raises(ValueError, match="tokens of 1 of 5 windows are not finite, first at window 3"):
        bad = TOKENS.clone()
        bad[3, 0, 0] = torch.inf
        Features(bad, labels, groups)
    with pytest.raises(ValueError, match="labels of 5 of 5 windows are not finite"):
        Features(TOKENS, labels * np.nan, groups)
    with pytest.raises(ValueError, match="no batches"):
        extract(torch.nn.Identity(), [], progress=False)


# --- the cache


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_hit_gives_identical_tokens_without_making_them(tmp_path, dtype):
    make = Make(TOKENS.to(dtype))
    first, second = make.ask(tmp_path / "new" / "folder"), make.ask(tmp_path / "new" / "folder")
    assert torch.equal(first, second) and second.dtype == dtype and make.calls == 1 and not make.said
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == [cache_path("", "train", KEY).name]


def test_a_key_is_equal_whatever_its_order_and_two_keys_do_not_collide(tmp_path):
    make, other = Make(), Make(TOKENS + 1)
    make.ask(tmp_path)
    make.ask(tmp_path, dict(reversed(KEY.items())) | {"crop": [[0, 8], [0, 8]]})
    assert make.calls == 1
    assert torch.equal(other.ask(tmp_path, KEY | {"split": "test"}), TOKENS + 1) and torch.equal(
        make.ask(tmp_path), TOKENS
    )
    assert other.calls == 1 and make.calls == 1 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "damage", ["truncated", "header cut", "empty", "text", "flipped byte", "foreign key", "foreign tensors", "encoder"]
)
def test_a_file_that_cannot_be_used_is_said_and_made_again(tmp_path, damage):
    make = Make()
    make.ask(tmp_path)
    path = cache_path(tmp_path, "train", KEY)
    whole = path.read_bytes()
    content = {
        "truncated": whole[:-1], "header cut": whole[:20], "empty": b"", "text": b"a note to myself",
        "flipped byte": whole[:-30] + bytes([whole[-30] ^ 16]) + whole[-29:],
    }  # fmt: skip
    path.unlink()
    if damage in content:
        path.write_bytes(content[damage])
    elif damage == "foreign key":  # a sound file under the wrong name
        write_tensors(path, {"tokens": TOKENS + 1}, KEY | {"split": "test"})
    elif damage == "foreign tensors":
        write_tensors(path, {"other": TOKENS + 1}, KEY)
    else:
        encoder = build_encoder("vit", in_channels=4, dim=16, depth=1, heads=2, tubelet=(2, 8, 8))
        save(path, encoder)
    assert torch.equal(make.ask(tmp_path), TOKENS) and make.calls == 2
    assert len(make.said) == 1 and make.said[0].startswith(path.name) and str(tmp_path) not in make.said[0]
    if damage == "foreign key":
        assert "(split)" in make.said[0]
    assert torch.equal(make.ask(tmp_path), TOKENS) and make.calls == 2 and len(make.said) == 1  # sound again


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"tokens": TOKENS[:1, :1]}, {"split": "train"})
    whole = path.read_bytes()
    for i in range(len(whole)):
        for bit in (1, 32, 128):
            bad = tmp_path / f"{i}-{bit}.safetensors"
            bad.write_bytes(whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :])
            with pytest.raises(ValueError, match=bad.name):
                read_tensors(bad)


def test_a_failed_make_or_write_leaves_nothing_and_a_half_written_leftover_does_not_matter(tmp_path):
    def fails() -> torch.Tensor:
        raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        cached(tmp_path, "train", KEY, fails)
    assert not list(tmp_path.iterdir())
    path = cache_path(tmp_path, "train", KEY)
    leftover = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # of a killed run that had our process id
    leftover.write_bytes(b"half")
    path.with_name(f".{path.name}.1.tmp").write_bytes(b"half of another process")
    make = Make()
    assert (
        torch.equal(make.ask(tmp_path), TOKENS)
        and torch.equal(make.ask(tmp_path), TOKENS)
        and make.calls == 1
        and not make.said
    )


def test_keys_must_be_json(tmp_path):
    for key in ({"dtype": torch.float16}, {"mean": float("nan")}):
        with pytest.raises(ValueError, match="a key must be JSON"):
            cached(tmp_path, "train", key, Make())


def test_memory_stays_flat(tmp_path):
    "Writing and reading 100 MB takes no second copy in memory; mapped pages do not count, since they can be dropped."
    code = f"""
import torch
from physrep.probing.features import cached
torch.set_num_threads(1)
def anonymous():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
import threading, time
seen = []
def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.002)
before = anonymous()
threading.Thread(target=watch, daemon=True).start()
tokens = cached({str(tmp_path)!r}, "t", {{}}, lambda: torch.full((400, 128, 1024), 0.5, dtype=torch.float16))
print(max(seen) - before)
del tokens
time.sleep(0.1)  # what was looked at before that is in `seen` by then
before, start = anonymous(), len(seen)
tokens = cached({str(tmp_path)!r}, "t", {{}}, None)
assert float(tokens[-1, -1, -1]) == 0.5
time.sleep(0.02)
print(max(seen[start:]) - before)
"""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("needs Linux's account of memory")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    writing, reading = map(float, done.stdout.split())
    assert writing < 160 and reading < 50


# --- digests


def test_digests_tell_names_types_shapes_and_bytes_apart():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    same = {"b": torch.ones(8)[::2], "a": torch.zeros(3, 2).t()}  # another order, other strides
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(4)},
        {"a": torch.zeros(2, 3), "c": torch.ones(4)},
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3).int(), "b": torch.ones(4)},
        {"a": torch.zeros(2, 3), "b": torch.ones(4).nextafter(torch.tensor(2.0))},
    ]
    assert tensors_digest(base) == tensors_digest(same)
    assert len({tensors_digest(t) for t in [base, *others]}) == 1 + len(others)
    assert tensors_digest({"s": torch.tensor(1.0), "e": torch.zeros(0)}) != tensors_digest(
        {"s": torch.tensor(2.0), "e": torch.zeros(0)}
    )


def test_an_encoder_keeps_its_digest_through_a_file_and_changes_it_with_anything_that_matters(tmp_path):
    def saved(name: str, seed: int = 0, std: float = 1.0, **config) -> LoadedEncoder:
        torch.manual_seed(seed)
        encoder = build_encoder("vit", **dict(in_channels=4, dim=16, depth=1, heads=2, tubelet=(2, 8, 8)) | config)
        save(tmp_path / name, encoder, std=std)
        return load_encoder(tmp_path / name)

    first, again = saved("a"), saved("b")
    assert encoder_digest(first) == encoder_digest(again) == encoder_digest(load_encoder(tmp_path / "a"))
    heads = saved("c", heads=4)  # the same weights, read by four heads
    assert weights_digest(heads) == weights_digest(first)
    assert len({encoder_digest(e) for e in (first, heads, saved("d", seed=1), saved("e", std=2.0))}) == 4


def test_the_key_of_real_windows_changes_with_what_the_tokens_depend_on(smoke_data, tmp_path):
    torch.manual_seed(0)
    encoder = build_encoder("vit", in_channels=4, dim=16, depth=1, heads=2, tubelet=(2, 8, 8))
    save(tmp_path / "e", encoder, shape=(4, 32, 32))
    encoder, root = load_encoder(tmp_path / "e"), smoke_data / "shear_flow"

    def windows(split: str = "valid", **options) -> Windows:
        return Windows(root, "shear_flow", split, **{"frames": 4, "stride": 16} | options)

    keys = [
        features_key(encoder, w)
        for w in (windows(), windows("test"), windows(stride=8), windows(frames=8), windows(crop=((0, 16), (0, 16))))
    ]
    keys += [
        features_key(encoder, windows(), **o)
        for o in ({"size": 16}, {"amp": True}, {"dtype": torch.float32}, {"device": "cuda:1"})
    ]
    assert len({key_text(k) for k in keys}) == len(keys)
    assert key_text(features_key(encoder, windows(), device="cpu")) == key_text(keys[0])


def test_the_key_covers_the_modules_that_put_an_encoder_together_and_no_entry_of_another(smoke_data, tmp_path):
    save(tmp_path / "e", build_encoder("vit", in_channels=4, dim=16, depth=1, heads=2, tubelet=(2, 8, 8)))
    encoder, windows = load_encoder(tmp_path / "e"), Windows(smoke_data, SYSTEM, "valid", frames=4, stride=16)
    plain = features_key(encoder, windows)
    entries = ("shear_flow", "vit")
    assert plain["code"] == code_digest("models.vit", "probing.features", "data.batches", entries=entries)
    encoder.info["modules"] = ["experiments.across"]
    joint = features_key(encoder, windows)
    assert {k for k in plain if plain[k] != joint[k]} == {"code"}


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
first = cached(folder, "train", {}, lambda: extract(encoder, clips, memory_limit=limit, scratch=folder, progress=False))
tokens = cached(folder, "train", {}, None)
features = Features(tokens, np.ones((800, 2)), np.arange(800))
assert tokens.shape == (800, 1024, 256) and tokens.dtype == torch.float16
assert torch.equal(features.pooled[:, 0], torch.arange(100.0).repeat_interleave(8))
assert features.tokens[torch.tensor([799, 0])].amax((1, 2)).tolist() == [99.0, 0.0]
assert [p.suffix for p in folder.iterdir()] == [".safetensors"], "the file of extraction has no name"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory that does not count mapped files")
def test_tokens_larger_than_memory(tmp_path):
    "With room for 150 MB, 400 MB of tokens are extracted, kept, pooled and taken in any order, but not without a file."
    for limit, fits in ((2**24, True), (2**40, False)):
        done = subprocess.run(
            [sys.executable, "-c", LARGE, str(tmp_path / str(limit)), str(limit)], capture_output=True, text=True
        )
        assert (done.returncode == 0) == fits, done.stderr
    assert "memory" in done.stderr.lower()


@pytest.mark.parametrize(
    ("grid", "most", "coarser"),
    [
        ((8, 14, 14), 1568, (8, 14, 14)),
        ((8, 14, 14), 1567, (8, 14, 7)),
        ((8, 14, 14), 392, (8, 7, 7)),
        ((8, 14, 14), 391, (4, 7, 7)),
        ((8, 32, 8), 392, (8, 8, 4)),
        ((1, 1, 35), 7, (1, 1, 7)),
        ((8, 14, 14), 1, (1, 1, 1)),
    ],
)
def test_the_longest_axis_of_a_grid_of_tokens_gets_coarser_first(grid, most, coarser):
    assert coarser_grid(grid, most) == coarser


def test_tokens_are_averaged_over_neighbours_in_the_grid_of_the_encoder():
    vit = build_encoder("vit", in_channels=4, dim=24, depth=1, heads=2, tubelet=(2, 8, 8))
    tokens = torch.randn(3, 4 * 6 * 4, 24)  # the grid of clips of 8 frames of 48 x 32
    few = fewer_tokens(tokens, vit, (8, 48, 32), 24)
    by_hand = torch.nn.functional.avg_pool3d(tokens.mT.unflatten(2, (4, 6, 4)), (1, 2, 2)).flatten(2).mT
    assert few.shape == (3, 24, 24) and torch.allclose(few, by_hand, atol=1e-6)
    assert torch.allclose(few.mean(1), tokens.mean(1), atol=1e-6), "probes of the mean token read the same"
    in_order = fewer_tokens(tokens, torch.nn.Identity(), (8, 48, 32), 48)  # an encoder that says no grid
    assert torch.allclose(in_order, tokens.unflatten(1, (48, 2)).mean(2), atol=1e-6)
    with pytest.raises(
        ValueError, match=r"97 tokens on a grid \(1, 1, 97\) cannot be averaged to about 96, only to 1; set"
    ):
        fewer_tokens(torch.randn(2, 97, 3), torch.nn.Identity(), (8, 48, 32), 96)
    assert torch.equal(FewerTokens(Grid(tokens), 24)(torch.zeros(3, 4, 8, 48, 32)), few)
    assert torch.equal(FewerTokens(Reader(Grid(tokens), "of mine"), 24)(torch.zeros(3, 4, 8, 48, 32)), few)
    with pytest.raises(ValueError, match="at least one token of a window must be kept, got 0"):
        fewer_tokens(tokens, vit, (8, 48, 32), 0)


def test_fewer_tokens_are_kept_under_a_key_of_their_own_and_fill_less_of_the_disk(smoke_data, tmp_path):
    vit = build_encoder("vit", in_channels=4, dim=24, depth=1, heads=2, tubelet=(4, 8, 8))
    save(tmp_path / "e", vit, shape=(16, 32, 32))
    windows = Windows(smoke_data, SYSTEM, "valid", frames=16, stride=20)
    options = dict(cache=tmp_path / "features", progress=False)
    scaler = LabelScaler.fit(SYSTEM, windows.labels)
    whole = features_of(load_encoder(tmp_path / "e"), windows, scaler, **options)
    few = features_of(load_encoder(tmp_path / "e"), windows, scaler, max_tokens=16, **options)
    assert (whole.tokens.shape[1], few.tokens.shape[1]) == (64, 16) and few.info["max_tokens"] == 16
    assert "max_tokens" not in whole.info and torch.allclose(few.pooled, whole.pooled, atol=1e-3)
    small, large = sorted(path.stat().st_size for path in options["cache"].iterdir())
    assert small < 0.3 * large


def test_large_clips_come_in_small_batches(smoke_data, monkeypatch):
    windows, seen = Windows(smoke_data, SYSTEM, "valid", frames=16, stride=20), []
    monkeypatch.setattr("physrep.probing.reading._AT_ONCE", 3 * 4 * 16 * 32 * 32)

    class Watched(torch.nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x.flatten(1)[:, None, :8]

    features_of(Watched(), windows, LabelScaler.fit(SYSTEM, windows.labels), progress=False)
    assert sum(seen) == len(windows) > 3 and set(seen[:-1]) == {3}


def test_a_buffer_has_one_shape_and_a_place(tmp_path):
    def clips(*counts):
        return [{"fields": torch.zeros(2, n, 4)} for n in counts]

    for limit in (0, 2**31):
        with pytest.raises(ValueError, match=r"same shape in every batch, got \(3, 4\) and then \(2, 4\)"):
            extract(torch.nn.Identity(), clips(3, 2), memory_limit=limit, progress=False)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="tokens so far, in .*file"):
        extract(torch.nn.Identity(), clips(3), memory_limit=0, scratch=tmp_path / "file", progress=False)
    assert extract(
        torch.nn.Identity(), clips(3, 3), memory_limit=0, scratch=tmp_path / "new" / "folder", progress=False
    ).shape == (4, 3, 4)
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_a_disk_that_is_too_small_is_named_before_the_work(tmp_path, monkeypatch):
    seen = []

    class Counted(torch.nn.Identity):
        def forward(self, x):
            seen.append(len(x))
            return x

    clips = [{"fields": torch.zeros(2, 3, 4)}] * 5
    free = 10 * 3 * 4 * 2  # bytes of ten windows as float16
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    enough = dict(memory_limit=0, scratch=tmp_path / "new", progress=False)
    assert extract(Counted(), clips, expected=10, **enough).shape == (10, 3, 4)
    seen.clear()
    with pytest.raises(OSError, match=f"would go to {tmp_path}.*, where .* are free; what helps: another folder"):
        extract(Counted(), clips, expected=10, kept_in=tmp_path, **enough)
    assert seen == [2], "the tokens would be there twice while they are copied"
    assert len(extract(Counted(), clips, expected=11, progress=False)) == 10, "what fits memory needs no disk"


def test_files_of_a_killed_process_are_removed_after_a_day(tmp_path):
    old, new = (tmp_path / f".train-{i}.safetensors.1.tmp" for i in (0, 1))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, time.time() - ABANDONED - 60))
    cached(tmp_path, "train", KEY, Make())
    assert not old.exists() and new.exists()


def test_a_run_keeps_the_features_of_today_only(smoke_data, tmp_path):
    vit = build_encoder("vit", in_channels=4, dim=24, depth=1, heads=2, tubelet=(4, 8, 8))
    save(tmp_path / "e", vit, shape=(16, 32, 32))
    encoder, folder = load_encoder(tmp_path / "e"), tmp_path / "features"
    windows = {s: Windows(smoke_data, SYSTEM, s, frames=16, stride=20) for s in ("valid", "test")}
    for w in windows.values():
        features_of(encoder, w, LabelScaler.fit(SYSTEM, w.labels), cache=folder, progress=False)
    before = set(folder.iterdir())
    cached(folder, "valid", {"code": "yesterday"}, Make())
    _drop_others(folder, encoder, windows)
    assert set(folder.iterdir()) == before and len(before) == 2


class GrowsLater(torch.nn.Module):
    "Tokens of which those after the first batch are too large for float16."

    def __init__(self):
        super().__init__()
        self.batches = 0

    def forward(self, x):
        self.batches += 1
        return x.flatten(1)[:, None, :8] + (1e6 if self.batches != 1 else 0)


def test_tokens_that_float16_does_not_hold_are_read_as_float32(smoke_data, monkeypatch):
    windows = Windows(smoke_data, SYSTEM, "valid", frames=16, stride=20)
    monkeypatch.setattr("physrep.probing.reading._AT_ONCE", 3 * 4 * 16 * 32 * 32)
    found = features_of(GrowsLater(), windows, LabelScaler.fit(SYSTEM, windows.labels), progress=False)
    assert found.tokens.dtype == torch.float32 and found.tokens.isfinite().all() and found.tokens.max() > 9e5


def test_tokens_that_are_no_numbers_are_refused():
    clips = [{"fields": torch.full((2, 1, 2, 2, 2), torch.nan)}]
    with pytest.raises(ValueError, match="tokens are not finite as torch.float.* in batch 0") as error:
        extract(OnASmallCard(2), clips, progress=False)
    assert error.type is ValueError, "float32 would not hold them either"

"""Views: one view is `Batches` bit for bit, partners keep their distance, every step is a function of its number."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from physrep.data.batches import Batches, Partners, View, ViewBatches, read_frames
from physrep.data.generate import make_dataset
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.windows import Windows
from physrep.physics.systems import get_system
from physrep.training.presets import get_preset

SHEAR = get_system("shear_flow")
CLIP = View(8)
PAIR = View(8, offset=None, own_symmetry=True)


def options(windows, **changes):
    normaliser = Normaliser.load(windows.root, windows.system)
    scaler = LabelScaler.fit(windows.system, windows.labels)
    return dict(normaliser=normaliser, scaler=scaler, augment=True, noise=0.1, batch_size=6, seed=3) | changes


def equal(one: dict, two: dict) -> bool:
    return all(torch.equal(one[k], two[k]) for k in ("fields", "labels", "seeds", "flow"))


@pytest.fixture(scope="module")
def shear(smoke_data):
    return Windows(smoke_data, SHEAR, "train", frames=8, stride=2)


@pytest.mark.parametrize("name", ["shear_flow", "rayleigh_benard", "active_matter"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_one_view_is_batches_bit_for_bit(name, in_memory, tmp_path):
    sim = replace(get_preset("smoke").sim(name).only(()), draws={"train": (4, 2)}, n_frames=12)
    folder = make_dataset(name, sim, tmp_path, workers=1, progress=False)
    windows = Windows(folder, name, "train", frames=8, stride=2, in_memory=in_memory)
    for changes in ({}, {"accumulate": 3, "ahead": True}, {"size": 24}, {"augment": False, "noise": 0.0}):
        plain = Batches(windows, **options(windows, **changes))
        views = ViewBatches(windows, [CLIP], **options(windows, **changes))
        assert views.left_out == 0 and views.shape == plain.shape
        runs = [(b(0), b(7), b.evaluation(5, limit=7)) for b in (plain, views)]
        for one, two in zip(*runs):
            assert all(equal(a, b) for a, b in zip(one, two, strict=True))


def test_fixed_views_are_cut_from_one_read(smoke_data, monkeypatch):
    windows = Windows(smoke_data, SHEAR, "train", frames=16, stride=4)
    whole = next(Batches(windows, **options(windows))(1))["fields"]
    reads, copy = [], windows.copy
    monkeypatch.setattr(windows, "copy", lambda k, start, out: (reads.append(out.shape[1]), copy(k, start, out)))
    served = ViewBatches(windows, [CLIP, View(8, offset=8), View(4, offset=2)], **options(windows))
    first, second, third = next(served(1))["views"]
    assert reads == [16] * 6 and served.shape == (4, 8, 32, 32)
    assert torch.equal(torch.cat([first, second], dim=2), whole) and torch.equal(third, whole[:, :, 2:6])


@pytest.mark.parametrize("gap", [0, 5])
def test_partner_keeps_its_distance_and_reaches_every_place(shear, gap):
    partners = Partners(shear, replace(PAIR, gap=gap), frames=8)
    n = int(partners.lengths[0])
    for start in (0, 3, 14, n - 8):
        want = [s for s in range(n - 7) if s + 8 + gap <= start or s >= start + 8 + gap]
        u = (np.arange(len(want)) + 0.5) / len(want)  # uniform: equal parts of [0, 1) for each
        places = np.array([(2, start)] * len(want))
        assert partners.draw(places, u).tolist() == [[2, s] for s in want]
        assert partners.count(places[:1]).tolist() == [len(want)]
        assert partners.draw(places[:1], np.array([1 - 2**-24]))[0, 1] == want[-1]


@pytest.mark.parametrize("in_memory", [True, False])
def test_partner_is_what_the_task_says(smoke_data, in_memory):
    windows = Windows(smoke_data, SHEAR, "train", frames=8, stride=2, in_memory=in_memory)
    served = ViewBatches(windows, [CLIP, PAIR], **options(windows, augment=False, noise=0.0))
    indices, seeds = served.samples(2)
    second = next(served(2))["views"][1]
    for i, (k, start) in enumerate(served.starts(1, indices, seeds)):
        out = np.empty((4, 8, 32, 32), dtype=np.float32)
        windows.copy(k, start, out)
        assert torch.equal(second[i], served.normaliser(torch.from_numpy(out)[None])[0])
        assert k == windows.index[indices[i], 0]


def test_views_are_a_function_of_the_step(shear):
    views = [CLIP, PAIR, View(8, offset=0, own_symmetry=True)]
    batches, again = (ViewBatches(shear, views, **options(shear, ahead=ahead)) for ahead in (False, True))
    list(again(0))
    one, two = next(batches(5)), next(again(5))
    assert all(torch.equal(a, b) for a, b in zip(one["views"], two["views"]))
    parts = list(ViewBatches(shear, views, **options(shear, accumulate=3))(5))
    for i in range(3):
        assert torch.equal(torch.cat([p["views"][i] for p in parts]), one["views"][i])
    assert not torch.equal(one["views"][1], next(batches(6))["views"][1])


def test_symmetries_and_noise_are_shared_or_not(shear):
    views = [CLIP, View(8, offset=0, own_symmetry=True), View(8, offset=None, own_symmetry=True, of="window")]
    batches = ViewBatches(shear, views, **options(shear, noise=0.0))
    clip, own, window = next(batches(0))["views"]
    for other in (own, window):
        assert not torch.allclose(clip, other)
        assert torch.allclose(clip.square().sum((2, 3, 4)), other.square().sum((2, 3, 4)), rtol=0.05)
    noisy = ViewBatches(shear, views, **options(shear, noise=0.5))
    for batch, again in zip(batches.evaluation(4, limit=4), noisy.evaluation(2, limit=4)):
        assert not torch.allclose(batch["views"][1], batch["fields"]), "held-out pairs have symmetries of their own"
        assert all(torch.equal(a[:2], b) for a, b in zip(batch["views"], again["views"])), "of the window's seed alone"
    still = ViewBatches(shear, [CLIP, PAIR, View(8, offset=0)][::2], **options(shear, augment=True))
    plain = ViewBatches(shear, [CLIP], **options(shear, augment=False))
    assert torch.equal(next(still.evaluation(4))["fields"], next(plain.evaluation(4))["fields"]), "without symmetries"
    batch = next(noisy(0))
    assert all(torch.equal(a, b) for a, b in zip(batch["clean"], (clip, own, window))), "what they are without noise"
    first, second, _ = (n - c for n, c in zip(batch["views"], (clip, own, window)))
    assert abs(float(second.std()) - 0.5) < 0.01 and abs(float((first * second).mean())) < 0.005, "independent"


def test_evaluation_depends_on_the_window_alone_and_has_no_batch_of_one(shear):
    batches = ViewBatches(shear, [CLIP, PAIR], **options(shear))
    few = [b["views"][1] for b in batches.evaluation(4, limit=9)]
    assert [len(b) for b in few] == [4, 5], "of one sample there is no spread"
    chosen = np.linspace(0, len(batches.windows) - 1, 9).round().astype(int)
    everything = torch.cat([b["views"][1] for b in batches.evaluation(7)])
    assert torch.equal(torch.cat(few), everything[chosen])
    assert [len(b["fields"]) for b in batches.evaluation(1, limit=3)] == [1, 1, 1]


def test_windows_without_room_are_left_out(smoke_data):
    windows = Windows(smoke_data, SHEAR, "train", frames=16, stride=4)  # of 36 frames: 8 and 12 have no room
    batches = ViewBatches(windows, [View(16), replace(PAIR, frames=16)], **options(windows))
    assert sorted(set(batches.windows.index[:, 1])) == [0, 4, 16, 20]
    assert batches.left_out == len(windows) - len(batches.windows) > 0
    assert batches.windows.memory is windows.memory and len(windows) == 6 * len(windows.trajectories)
    with pytest.raises(ValueError, match="36 frames, and a window of 16, a gap of 5 and a partner of 16 take 37"):
        ViewBatches(windows, [View(16), View(16, offset=None, gap=5)], **options(windows))


def test_labels_that_no_other_flow_has(shear, smoke_data):
    lonely = Windows(smoke_data, SHEAR, "train", frames=8)
    lonely.labels = lonely.labels + np.arange(len(lonely.labels))[:, None]
    with pytest.raises(ValueError, match="no second flow for any of them"):
        ViewBatches(lonely, [CLIP, replace(PAIR, of="labels")], **options(shear))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(frames=0), "frames must be an int of at least 1, got 0"),
        (dict(frames=8, offset=-1), "offset must be an int of at least 0, got -1"),
        (dict(frames=8, offset=4, gap=2), "are for a partner"),
        (dict(frames=8, offset=4, of="labels"), "are for a partner"),
        (dict(frames=8, offset=None, of="labels", gap=2), "gap=2 is for another window"),
        (dict(frames=8, offset=None, of="flow"), "valid: trajectory, window, labels"),
        (dict(frames=8, offset=None, of="window"), "would be the first view twice"),
    ],
)
def test_views_that_contradict_themselves(wrong, message):
    with pytest.raises(ValueError, match=message):
        View(**wrong)


def test_views_that_do_not_fit_the_windows(shear):
    assert read_frames([CLIP, View(8, offset=8), PAIR]) == 16
    for views in ([], [PAIR], [View(8, offset=2)], [View(8, own_symmetry=True)]):
        with pytest.raises(ValueError, match="first view must have offset 0"):
            read_frames(views)
    with pytest.raises(ValueError, match="need windows of 16 frames .read_frames., got 8"):
        ViewBatches(shear, [CLIP, View(8, offset=8)], **options(shear))

"""Data sets: what is made again and what stays, symmetries, batches, windows of one kind."""

import multiprocessing
import pickle
import shutil
import time
from dataclasses import replace
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from broken import well_file

from physrep.core.files import read_json, write_json
from physrep.core.randomness import sample_seeds, seed_for
from physrep.data import generate
from physrep.data.batches import Batches, apply_symmetry, resize, symmetry_draws
from physrep.data.generate import FLOWS_A_CALL, _batches, plan
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.sets import find_files, fingerprint
from physrep.data.well import RECIPE, UnreadableFileError, WellFormatError
from physrep.data.windows import Windows, windows_of
from physrep.physics import rayleigh_benard
from physrep.physics.oracle import equation_oracle
from physrep.physics.shear_flow import simulate
from physrep.physics.systems import SYSTEMS, Label, get_system
from physrep.training.presets import get_preset
from physrep.training.run import load_splits, resolve

SHEAR, LAYER = get_system("shear_flow"), get_system("rayleigh_benard")
SIM = get_preset("smoke").sim("shear_flow")
TINY = replace(SIM.only(()), draws={"train": (2, 1), "test": (2, 1)}, n_frames=3)
STILL = np.array([[0, 0]])
make_shear = partial(generate.make_dataset, "shear_flow", workers=1, progress=False)


def fingerprints(root):
    return {s: fingerprint(find_files(root, SHEAR, s)) for s in ("train", "test")}


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*.hdf5")}


# ---- making a set


def test_a_version_has_parameters_and_initial_conditions_of_its_own():
    for name, sim in get_preset("laptop").sims.items():
        new, old = (plan(name, replace(sim, version=version)) for version in (3, 2))
        assert sim.version == 3 and {f.split for f in new} == {"train", "unlabelled", "valid", "test", "shifted"}
        seeds, parameters = zip(
            *[({s for f in p for s in f.seeds}, {str(f.parameters) for f in p}) for p in (new, old)]
        )
        assert len(seeds[0]) == 2 * len(parameters[0]) == 1504 and not seeds[0] & seeds[1]
        assert not parameters[0] & parameters[1]


def test_batches_of_files_hold_every_one_once():
    files = plan("shear_flow", SIM)
    batches = _batches(files, FLOWS_A_CALL["cpu"])
    assert sum(batches, []) == files and all(len({f.split for f in b}) == 1 for b in batches)
    assert [sum(len(f.seeds) for f in b) for b in batches] == [16, 8, 8, 8, 8]


def test_a_set_grows_by_a_split_and_keeps_the_others(tmp_path):
    folder = make_shear(TINY, tmp_path)
    before = times(folder)
    grown = replace(TINY, draws={**TINY.draws, "shifted": (2, 2)}, families={"shifted": "shifted"})
    make_shear(grown, tmp_path)
    after = times(folder)
    assert before.items() < after.items() and len(after) == 2 + 2 + 2
    for sim in (TINY, grown):  # a preset without the split finds what it wants
        make_shear(sim, tmp_path)
        assert times(folder) == after
    for other in (replace(grown, families={}), replace(grown, version=1), replace(grown, frame_dt=0.4)):
        with pytest.raises(ValueError, match="holds data that were made differently"):
            make_shear(other, tmp_path)


def test_splits_of_two_grids_are_not_mixed_and_a_plan_of_another_form_is_another(tmp_path):
    values = {"Reynolds": (400.0, 500.0), "Schmidt": (1.0,)}
    folder = make_shear(replace(TINY, draws={}, counts={"grid": 1}, grid_values=values), tmp_path)
    other = replace(TINY, draws={}, counts={"grid2": 1}, grid_values=values | {"Reynolds": (600.0,)})
    with pytest.raises(ValueError, match="made differently .grid_values: there .*400.*, asked for .*600"):
        make_shear(other, tmp_path)
    write_json(folder / "plan.json", {"system": "shear_flow", "code": "0" * 16, "splits": {"train": 2}})
    with pytest.raises(ValueError, match="holds data that were made differently .*splits: there"):
        make_shear(TINY, tmp_path)


@pytest.mark.parametrize("back", [False, True])
def test_a_split_that_was_drawn_is_another_on_a_grid(tmp_path, back):
    values = {"Reynolds": (400.0, 500.0), "Schmidt": (1.0,)}
    both = [TINY.only(("train",)), replace(TINY, draws={}, counts={"train": 1}, grid_values=values)]
    first, other = both[::-1] if back else both
    folder = make_shear(first, tmp_path)
    before = times(folder)
    with pytest.raises(ValueError, match="made differently .counts: there .*; draws: there"):
        make_shear(other, tmp_path)
    assert times(folder) == before


@pytest.mark.parametrize("system", SYSTEMS)
def test_shifted_flows_start_in_another_way_and_obey_the_same_equations(system, tmp_path):
    about, sim = get_system(system), get_preset("laptop").sim(system).only(())
    sim = replace(sim, draws={"test": (4, 1), "shifted": (4, 1)}, families={"shifted": "shifted"}, n_frames=16)
    generate.make_dataset(system, sim, tmp_path, workers=1, progress=False)
    scaler = LabelScaler.fit(about, np.array([list(ends) for ends in sim.ranges.values()]).T)
    spread = {}
    for split in sim.draws:
        w = Windows(tmp_path, about, split, frames=16)
        clips, file = w.read(np.arange(4)).numpy(), w.files[0]
        options = dict(system=about, dt=file.dt, spacing=file.spacing, heights=w.positions, periodic=None)
        error = scaler.transform(equation_oracle(clips, **options)) - scaler.transform(w.targets(np.arange(4)))
        assert np.square(error).mean() < 0.05, "the equations have the same coefficients whatever the start"
        spread[split] = clips[:, :, 0].std(2).mean((0, 2))  # along x, as they start
    ratio = spread["shifted"] / spread["test"].clip(1e-9)
    assert (np.abs(np.log(ratio[spread["test"] > 1e-9])) > 0.2).any(), "another family of starts"


def test_two_processes_make_the_same_data_and_time_that_is_over_can_be_resumed(tmp_path):
    sim = replace(TINY, draws={"train": (9, 2), "test": (2, 1)})
    with pytest.raises(TimeoutError, match=": 8 of 11 files of .* are done; call it again"):
        make_shear(sim, tmp_path / "1", minutes=1e-6)
    assert not (tmp_path / "1" / "shear_flow" / "stats.yaml").exists()
    make_shear(sim, tmp_path / "1")
    make_shear(sim, tmp_path / "2", workers=2)
    assert fingerprints(tmp_path / "1") == fingerprints(tmp_path / "2")


def test_new_code_makes_anew_what_it_had_planned_and_nothing_else(tmp_path):
    folder = make_shear(TINY, tmp_path)
    prints, old, recipe = fingerprints(tmp_path), times(folder / "data"), read_json(folder / "plan.json")
    mine = folder / "data" / "mine" / "days_of_work.hdf5"
    mine.parent.mkdir()
    mine.write_bytes(b"a split of one's own")
    write_json(folder / "plan.json", recipe | {"code": "0" * 16})
    with pytest.raises(TimeoutError):
        make_shear(TINY, tmp_path, minutes=0)
    assert not (folder / "stats.yaml").exists(), "statistics of the old flows would make the set look complete"
    make_shear(TINY, tmp_path)
    assert fingerprints(tmp_path) == prints and read_json(folder / "plan.json") == recipe
    assert mine.read_bytes() == b"a split of one's own" and not old.items() & times(folder / "data").items()


def test_files_of_ones_own_among_the_planned_are_named_and_stay(tmp_path):
    folder = make_shear(TINY, tmp_path)
    planned, notes, recipe = min(times(folder)), folder / "notes.tmp", read_json(folder / "plan.json")
    own = well_file(planned.with_name("own.hdf5"))
    content = own.read_bytes()
    notes.write_text("of no interrupted write")
    for code in (recipe["code"], "0" * 16):
        write_json(folder / "plan.json", recipe | {"code": code})
        with pytest.raises(ValueError, match="own.hdf5 is not in the plan of this set; move it to a split of its own"):
            make_shear(TINY, tmp_path)
        assert own.read_bytes() == content
    own.rename(planned)
    with pytest.raises(ValueError, match=f"{planned.name} has the name of a planned file, and physrep has not simulat"):
        make_shear(TINY, tmp_path)
    assert planned.read_bytes() == content
    planned.rename(tmp_path / "own.hdf5")
    make_shear(TINY, tmp_path)
    assert len(times(folder)) == 4 and notes.is_file()


def test_files_that_are_not_ours_to_remove_stay(tmp_path, monkeypatch):
    file = tmp_path / "theirs" / "shear_flow" / "data" / "train" / "shear_flow_Reynolds_1e4.hdf5"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"days of a download")
    with pytest.raises(ValueError, match="Reynolds_1e4.hdf5.*no plan.json. Preset paper or native reads them"):
        make_shear(TINY, tmp_path / "theirs")
    assert file.read_bytes() == b"days of a download" and not (tmp_path / "theirs/shear_flow/plan.json").exists()
    folder = make_shear(TINY, tmp_path / "ours")
    (folder / "stats.yaml").unlink()  # so that files are looked at
    before = times(folder)

    def held(path, system):
        raise UnreadableFileError(f"{path}: cannot be read here and now")

    monkeypatch.setattr(generate, "WellFile", held)
    with pytest.raises(UnreadableFileError, match="cannot be read here and now"):
        make_shear(TINY, tmp_path / "ours")
    assert times(folder) == before, "of another program that holds a file"


def test_statistics_are_those_of_train_whatever_was_made_first(tmp_path, monkeypatch):
    folder, stats = tmp_path / "shear_flow", lambda: (tmp_path / "shear_flow" / "stats.yaml").read_text()
    make_shear(TINY.only(("test",)), tmp_path)
    of_test = stats()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(generate, "write_stats", lambda *_, **__: 1 / 0)
        make_shear(TINY, tmp_path)
    assert not (folder / "stats.yaml").exists(), "those of test are not left"
    make_shear(TINY, tmp_path)
    of_train = stats()
    make_shear(replace(TINY, draws={"late": (2, 1)}), tmp_path)
    alone = make_shear(TINY.only(("train",)), tmp_path / "alone")
    assert of_test != of_train == stats() == (alone / "stats.yaml").read_text()


def test_flows_that_are_rounded_differently_have_the_fingerprint_of_their_recipe(tmp_path):
    make_shear(TINY, tmp_path)
    before = fingerprints(tmp_path)
    path = find_files(tmp_path, SHEAR, "test")[0]
    with h5py.File(path, "r+") as file:
        file["t0_fields/tracer"][0, 0] *= 1 + 1e-6
    assert fingerprints(tmp_path) == before
    with h5py.File(path, "r+") as file:
        file.attrs[RECIPE] = generate.recipe_digest("shear_flow", TINY, "test", "cuda")
    assert fingerprints(tmp_path)["test"] != before["test"], "begun on a GPU, finished on the CPU"
    with h5py.File(path, "r+") as file:
        del file.attrs[RECIPE]
    changed = fingerprints(tmp_path)
    assert changed["test"] != before["test"] and changed["train"] == before["train"]
    other = make_shear(replace(TINY, n_frames=4), tmp_path / "other").parent
    assert fingerprints(other)["train"] != before["train"]


def test_a_script_that_would_simulate_in_every_process_is_told_so(tmp_path, monkeypatch):
    "Such a process would wait for itself, at the lock."
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match='below `if __name__ == "__main__":`, or with workers=1'):
        make_shear(TINY, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.long  # only a change of the preset or of a solver can break it
@pytest.mark.parametrize(
    "system, pair",
    [
        ("shear_flow", {"Reynolds": 6400.0, "Schmidt": 2.0}),
        ("rayleigh_benard", {"Prandtl": 0.5, "Rayleigh": 1e6}),
        ("active_matter", {"alpha": -5.0, "zeta": 5.0}),
    ],
)
def test_time_steps_of_preset_gpu_hold_for_its_fastest_flows(system, pair, tmp_path):
    sim = get_preset("gpu").sim(system)
    assert all(value in sim.ranges[name] for name, value in pair.items())
    corner = {name: (value,) for name, value in pair.items()}
    sim = replace(sim.only(()), grid_values=corner, counts={"train": 2}, n_frames=24)
    generate.make_dataset(system, sim, tmp_path, workers=1, progress=False)  # raises SimulationBlewUp otherwise


# ---- symmetries


def stacked(fields, scalars):
    "What a solver gives as channels `(b, c, t, x, y)`."
    return np.concatenate([*(fields[s][:, None] for s in scalars), np.moveaxis(fields["velocity"], -1, 1)], axis=1)


@pytest.mark.parametrize("mirror", [[True, False], [False, True], [True, True]])
def test_symmetries_commute_with_the_solver(mirror):
    "A mirrored and shifted initial state evolves into the mirrored and shifted solution."
    options = dict(grid=32, n_frames=9, frame_dt=0.2, dtype=torch.float64)
    x = stacked(simulate(400.0, 1.0, [3], **options), ("tracer", "pressure"))
    y = apply_symmetry(torch.as_tensor(x), np.array([[5, 11]]), np.array([mirror]), SHEAR).numpy()
    tracer, _, u, v = y[0, :, 0]
    assert np.abs(tracer - u).max() < 1e-9 < np.abs(tracer).max(), "flows of the set start with the tracer as velocity"
    k = 2j * np.pi * np.fft.fftfreq(32, 1 / 32)
    slope_v = np.fft.ifft(k[:, None] * np.fft.fft(v, axis=0), axis=0).real
    slope_u = np.fft.ifft(k * np.fft.fft(u, axis=1), axis=1).real
    again = stacked(
        simulate(400.0, 1.0, [3], initial=((slope_v - slope_u)[None], tracer[None]), **options), ("tracer", "pressure")
    )
    assert np.abs(again[0, [0, 2, 3], -1] - y[0, [0, 2, 3], -1]).max() < 1e-9


def test_upside_down_commutes_with_the_solver():
    "Warm and cold exchanged, the layer upside down: again the same layer, with the pressure that goes with it."
    heights = rayleigh_benard.vertical_points(24, "legendre")
    options = dict(grid=(32, 24), n_frames=5, frame_dt=0.5, dt=0.025, store_nodes="legendre", dtype=torch.float64)
    x, y = np.meshgrid(np.arange(32) / 16, heights, indexing="ij")
    rolls = 0.2 * np.sin(np.pi * y) * np.cos(np.pi * x) + 0.1 * np.sin(2 * np.pi * y) * np.sin(2 * np.pi * x)
    start = (1 - y + rolls)[None]

    def channels(b):
        fields = rayleigh_benard.simulate(3e4, 1.0, [0], initial=(np.zeros_like(b), b), **options)
        return torch.as_tensor(stacked(fields, ("buoyancy", "pressure")))

    fields = channels(start)
    assert np.abs(fields[0, 3, -1]).max() > 0.1, "it moves"
    for mirror, moved in (([False, True], 1 - start[:, :, ::-1]), ([True, True], 1 - start[:, ::-1, ::-1])):
        image = apply_symmetry(fields, STILL, np.array([mirror]), LAYER, heights)
        assert (channels(np.ascontiguousarray(moved)) - image).abs().max() < 1e-6  # offsets are float32
    with pytest.raises(ValueError, match="positions along y must be 24 points"):
        apply_symmetry(fields, STILL, np.array([[False, True]]), LAYER, heights**2)


@pytest.mark.parametrize("name", ["shear_flow", "active_matter"])
def test_symmetry_point_by_point(name):
    system = get_system(name)
    x = np.random.default_rng(0).standard_normal((4, system.n_channels, 2, 6, 8)).astype(np.float32)
    shifts = np.array([[0, 0], [2, 7], [5, 0], [1, 3]])
    mirrors = np.array([[False, False], [True, False], [False, True], [True, True]])
    found = apply_symmetry(torch.from_numpy(x), shifts, mirrors, system).numpy()
    for i, (shift, mirror) in enumerate(zip(shifts, mirrors)):
        where = [(np.arange(n) + s)[:: -1 if m else 1] % n for n, s, m in zip(x.shape[3:], shift, mirror)]
        want = x[i][:, :, where[0]][:, :, :, where[1]]
        for axis in np.flatnonzero(mirror):
            want = want * system.mirror_signs(axis)[:, None, None, None]
        np.testing.assert_array_equal(found[i], want)


def test_symmetry_draws_cover_the_group_and_depend_on_the_sample_only():
    seeds = sample_seeds(0, 0, 0, list(range(200)))
    shifts, mirrors = symmetry_draws(seeds, SHEAR, (32, 32))
    assert set(shifts[:, 0]) == set(range(32)) and 0.3 < mirrors.mean() < 0.7
    assert np.array_equal(symmetry_draws(seeds[50:60], SHEAR, (32, 32))[0], shifts[50:60])
    shifts, mirrors = symmetry_draws(seeds, LAYER, (32, 32))
    assert not shifts[:, 1].any() and 0.3 < mirrors[:, 1].mean() < 0.7, "nothing is shifted through a wall"
    shifts, mirrors = symmetry_draws(seeds, LAYER, (32, 32), whole=(False, False))
    assert not shifts.any() and not mirrors[:, 1].any() and mirrors[:, 0].any(), "a crop is not turned upside down"


# ---- batches


def parts(windows, **changes):
    scaler = LabelScaler.fit(SHEAR, windows.labels)
    return dict(batch_size=6, normaliser=Normaliser.load(windows.root, SHEAR), scaler=scaler) | changes


@pytest.fixture(scope="module")
def train(smoke_data):
    return Windows(smoke_data, SHEAR, "train", frames=16, stride=8)


def test_updates_span_epochs_and_every_epoch_visits_each_window_once(smoke_data):
    w = Windows(smoke_data, SHEAR, "test", frames=16, stride=20)
    batches, other = (Batches(w, **parts(w, batch_size=5, seed=seed)) for seed in (3, 4))
    n = len(w)
    indices, seeds = (np.concatenate(x) for x in zip(*(batches.samples(k) for k in range(2 * n))))
    for epoch in range(10):
        assert sorted(indices[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert len(set(seeds.tolist())) == 10 * n, "a window has other random numbers in the next epoch"
    assert not np.array_equal(other.samples(2)[0], batches.samples(2)[0])
    with pytest.raises(ValueError, match="positive multiple of accumulate, got 5 and 2"):
        Batches(w, **parts(w, batch_size=5, accumulate=2))


def test_resize_noise_and_crop(smoke_data, train):
    x = torch.rand(2, 3, 4, 8, 6)
    assert resize(x, None) is x and resize(x[..., :6, :], 6).data_ptr() == x.data_ptr()
    assert resize(torch.ones_like(x), 16).sub(torch.ones(2, 3, 4, 16, 16)).abs().max() < 1e-6
    w = Windows(smoke_data, SHEAR, "train", frames=16, stride=8, crop=((0, 16), (8, 32)))
    assert w.shape == (4, 16, 16, 24) and torch.equal(w.read([3]), train.read([3])[..., :16, 8:32])
    noisy, clean = (Batches(train, **parts(train, size=20, noise=noise)) for noise in (0.5, 0.0))
    assert noisy.shape == (4, 16, 20, 20)
    assert abs(float((next(noisy(3))["fields"] - next(clean(3))["fields"]).std()) - 0.5) < 0.01
    assert torch.equal(next(noisy(3))["clean"], next(clean(3))["fields"]) and "clean" not in next(clean(3))
    held_out = next(noisy.evaluation())
    assert torch.equal(held_out["fields"], next(clean.evaluation())["fields"]) and "clean" not in held_out


@pytest.mark.parametrize("accumulate", [1, 3])
def test_batches_made_ahead_are_the_same_and_each_is_made_once(train, accumulate, monkeypatch):
    plain, early = (
        Batches(train, **parts(train, augment=True, noise=0.1, accumulate=accumulate, ahead=ahead))
        for ahead in (False, True)
    )
    expected = [*plain.evaluation(5, limit=12), *(b for step in (0, 1, 2, 7) for b in plain(step))]
    copy, made, make = train.copy, [], early.make
    monkeypatch.setattr(train, "copy", lambda *place: (time.sleep(0.002), copy(*place)))  # the next takes its time
    found = [*early.evaluation(5, limit=12)]  # and the buffer of the last is not its own
    early.make = lambda indices, seeds: made.append(indices.tolist()) or make(indices, seeds)
    found += [b for step in (0, 1, 2, 7) for b in early(step)]  # a run goes on elsewhere
    for one, two in zip(expected, found, strict=True):
        assert all(torch.equal(one[k], two[k]) for k in ("fields", "labels", "seeds"))
    early._ahead.thread.shutdown()
    assert len(made) == 4 * accumulate + 2, "each once, and one ahead of every jump"


def test_labels_may_be_in_any_unit():
    system = replace(SHEAR, labels=(Label("diffusivity", False, True),))
    labels = np.linspace(0.5e-9, 1.5e-9, 6)[:, None]
    z = LabelScaler.fit(system, labels).transform(labels)
    assert np.allclose([z.mean(), z.std()], [0, 1])
    with pytest.raises(ValueError, match="all labels diffusivity of shear_flow are equal"):
        LabelScaler.fit(system, np.full((3, 1), 1e-9))


def test_numbers_of_any_type_are_the_same_key():
    assert (
        seed_for("step", np.int64(3)) == seed_for("step", np.uint8(3)) == seed_for("step", 3) != seed_for("step", "3")
    )


# ---- windows


def test_windows_end_are_read_by_a_mask_and_are_sent_without_what_is_in_memory(train):
    assert [x["index"] for x in train] == list(range(len(train))), "iteration ends"
    mask = np.arange(len(train)) % 2 == 1
    assert torch.equal(train.read(mask), train.read(np.flatnonzero(mask)))
    with pytest.raises(ValueError, match="zip"):
        train.read([0, 1, 2], out=torch.empty(2, *train.shape))
    sent = pickle.dumps(train)
    assert train.memory is not None and len(sent) < 100_000
    assert torch.equal(pickle.loads(sent).read([-1]), train.read([-1]))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_value_that_is_not_finite_is_found_when_it_is_read_and_a_large_one_is_finite(tmp_path, in_memory):
    path = sorted(make_shear(replace(TINY, draws={"train": (2, 2)}, n_frames=8), tmp_path).rglob("*.hdf5"))[1]
    with h5py.File(path, "r+") as f:
        f["t0_fields/tracer"][0] = 3e38  # their sum is infinite
        f["t1_fields/velocity"][1, 5, 5, 7, 1] = np.inf
        f["t0_fields/tracer"][1, 6, 0, 0] = np.nan  # later: the first frame is named
    w = Windows(tmp_path, SHEAR, "train", frames=4, stride=4, crop=((0, 16), (0, 16)), in_memory=in_memory)
    k = w.trajectories.index((1, 1))
    (place,) = np.flatnonzero((w.index == (k, 4)).all(1))
    batches = Batches(w, **parts(w))
    frames = np.array([[k, 5]])
    for read in (lambda: w[place], lambda: w.read_frames(frames), lambda: list(batches.evaluation())):
        with pytest.raises(WellFormatError, match="NaN or infinity in velocity_y of trajectory 1, frame 5"):
            read()
    if not in_memory:
        assert w.read([w.trajectories.index((1, 0)) * 2]).max() == np.float32(3e38), "other windows can be read"


def stretch(name):
    return lambda file: file[f"dimensions/{name}"].write_direct(2 * file[f"dimensions/{name}"][...])


def cut(dimension, axis, part):
    "Keeps a part of an axis of all fields."

    def change(file):
        keys = [f"{group}/{name}" for group in ("t0_fields", "t1_fields") for name in file[group]]
        for key, place in [(f"dimensions/{dimension}", part), *((k, (slice(None),) * axis + (part,)) for k in keys)]:
            data = file[key][place]
            del file[key]
            file[key] = data

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (stretch("time"), "has frames 0.4 .* frames 0.2 "),
        (stretch("x"), "has frames 0.2 and points 0.0625, 0.03125 apart"),
        (cut("x", 2, slice(16)), r"has a grid of \(16, 32\), .* \(32, 32\)"),
    ],
)
def test_files_and_splits_are_of_one_kind(tmp_path, smoke_data, change, message):
    folder = shutil.copytree(smoke_data / "shear_flow", tmp_path / "shear_flow")
    for path in (folder / "data" / "valid").iterdir():
        with h5py.File(path, "r+") as file:
            change(file)
    run = resolve("shear_flow", "mae", "vit", "smoke", data_dir=tmp_path)
    load_splits(run, ("train", "unlabelled"), frames=4, stride=4)
    for load in (
        lambda: load_splits(run, ("train", "unlabelled", "valid"), frames=4, stride=4),
        lambda: Windows(tmp_path, SHEAR, "train+valid", frames=2),
    ):
        with pytest.raises(WellFormatError, match=f"valid/.*{message}.*put them in sets of their own"):
            load()


def test_trajectories_of_two_lengths_make_no_array(tmp_path, smoke_data):
    folder = shutil.copytree(smoke_data / "shear_flow", tmp_path / "shear_flow")
    with h5py.File(find_files(folder, SHEAR, "train")[-1], "r+") as file:
        cut("time", 1, slice(-3))(file)
    with pytest.raises(ValueError, match=r"in_memory=True needs .* \[33, 36\] frames"):
        Windows(folder, SHEAR, "train", frames=2, in_memory=True)
    assert not Windows(folder, SHEAR, "train", frames=2).in_memory


def test_files_between_walls_have_their_points_at_the_same_heights(tmp_path):
    "Spacings of uneven points are unknown, and those of two kinds of uneven points are not the same."
    for name, power in (("a", 2.0), ("b", 3.0)):
        at = {"y": np.linspace(0.0, 1.0, 6) ** power}
        path = tmp_path / "rayleigh_benard" / "data" / "train" / f"{name}.hdf5"
        well_file(path, system=LAYER, shape=(1, 3, 8, 6), coordinates=at)
    with pytest.raises(WellFormatError, match="b.hdf5 has its lowest points at .* between the walls"):
        Windows(tmp_path, LAYER, "train", frames=2)


def test_groups_are_of_initial_conditions_and_reynolds_numbers(tmp_path):
    "The velocity is the same whatever the Schmidt number. Files of The Well have the same names in every split."
    for split, start in (("ours", [7]), ("train", None), ("valid", None)):
        for name, re, sc in (("a", 400.0, 0.5), ("b", 400.0, 2.0), ("c", 800.0, 2.0)):
            path, labels = tmp_path / f"shear_flow/data/{split}/{name}.hdf5", {"Reynolds": re, "Schmidt": sc}
            well_file(path, shape=(1, 2, 4, 4), parameters=labels, initial_conditions=start)
    ours = Windows(tmp_path, SHEAR, "ours", frames=2)
    a, b, c = ours.groups
    assert a == b != c and len(set(ours.flows)) == 3, "each has a label that was paid for"
    assert windows_of(ours, ours.flows[1:2]).labels.tolist() == [[400.0, 2.0]]
    both = Windows(tmp_path, SHEAR, "train+valid", frames=2)
    assert len(set(both.groups)) == 6
    assert set(both.groups) > set(Windows(tmp_path, SHEAR, "train", frames=2).groups)

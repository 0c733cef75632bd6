"""Data sets: interruption, leaks between splits, batches from files of The Well's layout."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from physrep.core.files import read_json, write_json
from physrep.core.randomness import sample_seeds, seed_for
from physrep.data import generate
from physrep.data.batches import Ahead, Batches, Order, apply_symmetry, prefetch, resize, symmetry_draws
from physrep.data.generate import FLOWS_A_CALL, _batches, _recipe, draw_parameters, make_dataset, make_files, plan
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.sets import COUNTS_AS, count_as_known, find_files, fingerprint, known_flows, recipe_digest
from physrep.data.well import UnreadableFileError, WellFile, WellFormatError
from physrep.data.windows import Windows, check_disjoint
from physrep.data.write import write_well
from physrep.physics import rayleigh_benard
from physrep.physics.oracle import equation_oracle
from physrep.physics.shear_flow import simulate
from physrep.physics.systems import SYSTEMS, Label, get_system
from physrep.training.presets import get_preset
from physrep.training.run import load_splits, resolve

SHEAR = get_system("shear_flow")
SIM = get_preset("smoke").sim("shear_flow")
BARE = SIM.only(())  # without splits


def fingerprints(folder):
    return {s: Windows(folder, SHEAR, s, frames=2).fingerprint() for s in ("train", "valid", "test")}


@pytest.mark.parametrize("preset", ["smoke", "laptop", "gpu"])
@pytest.mark.parametrize("system", ["shear_flow", "rayleigh_benard", "active_matter"])
def test_draws_are_continuous_stratified_and_in_one_split(system, preset):
    sim = get_preset(preset).sim(system)
    files = plan(system, sim)
    assert plan(system, replace(sim, n_frames=99)) == files, "draws depend on names, numbers and ranges alone"
    for split, (number, flows) in sim.draws.items():
        own = [f for f in files if f.split == split]
        assert len(own) == number and all(len(f.seeds) == flows for f in own)
        for label in get_system(system).labels:
            low, high = sim.ranges[label.name]
            values = np.array([f.parameters[label.name] for f in own])
            assert low <= values.min() and values.max() <= high and len(set(values)) == number
            start, end = label.transform([low, high])
            places = number * (np.sort(label.transform(values)) - start) / (end - start) - np.arange(number)
            assert -1e-2 < places.min() and places.max() < 1 + 1e-2, "one in each stratum, to six digits"
            assert 0.2 < places.std() < 0.4 or number < 10, "not at a fixed place of the stratum: no hidden grid"
    assert (
        len({tuple(f.parameters.values()) for f in files}) == len({f.path(Path(), system) for f in files}) == len(files)
    )
    assert len({seed for f in files for seed in f.seeds}) == sim.n_trajectories
    values = [value for f in files for value in f.parameters.items()]
    assert len(set(values)) > 0.99 * len(values), "not even single values repeat, but by rounding"


def test_a_refined_set_holds_the_same_flows():
    files = {tuple(f.parameters.items()): f.seeds for f in plan("shear_flow", SIM) if f.split == "test"}
    refined = plan("shear_flow", SIM.refined({"test": 1}))
    assert {tuple(f.parameters.items()): f.seeds for f in refined} == {p: seeds[:1] for p, seeds in files.items()}


def test_splits_differ_in_all_that_is_drawn():
    sim = replace(BARE, draws=dict.fromkeys(("train", "valid", "test"), (6, 1)))
    drawn = [draw_parameters("shear_flow", sim, split) for split in sim.draws]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert drawn[0] != draw_parameters("shear_flow", replace(sim, draws={"train": (7, 1)}), "train")[:6]
    assert drawn[0] == draw_parameters("shear_flow", replace(sim, draws={"train": (6, 5)}), "train")


@pytest.mark.parametrize("system", ["shear_flow", "rayleigh_benard", "active_matter"])
def test_files_made_together_are_those_made_alone(system, tmp_path):
    sim = replace(get_preset("smoke").sim(system), n_frames=4)
    some = plan(system, sim)[:3]
    for path, planned in zip(make_files(some, system, sim, tmp_path / "together"), some):
        [alone] = make_files([planned], system, sim, tmp_path / "alone")
        for i in range(2):
            one, two = (WellFile(p, get_system(system)).window(i, 0, 4) for p in (path, alone))
            assert np.array_equal(one, two)
        assert WellFile(path, get_system(system)).labels == planned.parameters


def test_batches_hold_every_file_once():
    files = plan("shear_flow", SIM)
    batches = _batches(files, FLOWS_A_CALL["cpu"])
    assert sum(batches, []) == files and all(len({f.split for f in b}) == 1 for b in batches)
    assert [sum(len(f.seeds) for f in b) for b in batches] == [16, 8, 8, 8, 8]
    assert [len(b) for b in _batches(files, 1)] == [1] * len(files) and _batches([], 4) == []


def test_a_set_grows_by_a_split_and_keeps_the_others(tmp_path):
    sim = replace(BARE, draws={"train": (3, 2), "test": (2, 1)}, n_frames=3)
    folder = make_dataset("shear_flow", sim, tmp_path, workers=1, progress=False)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.hdf5")}
    grown = replace(sim, draws={**sim.draws, "shifted": (2, 2)}, families={"shifted": "shifted"})
    make_dataset("shear_flow", grown, tmp_path, workers=1, progress=False)
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*.hdf5")}
    assert before.items() < after.items() and len(after) == 3 + 2 + 2
    make_dataset("shear_flow", sim, tmp_path, workers=1, progress=False)  # a preset without it finds what it wants
    make_dataset("shear_flow", grown, tmp_path, workers=1, progress=False)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.hdf5")} == after
    for other in (replace(grown, families={}), replace(grown, version=1), replace(grown, frame_dt=0.4)):
        with pytest.raises(ValueError, match="holds data that were made differently"):
            make_dataset("shear_flow", other, tmp_path, workers=1, progress=False)


@pytest.mark.parametrize("system", ["shear_flow", "rayleigh_benard", "active_matter"])
def test_shifted_flows_start_in_another_way_and_obey_the_same_equations(system, tmp_path):
    about = get_system(system)
    sim = replace(get_preset("laptop").sim(system).only(()), draws={"test": (4, 1), "shifted": (4, 1)}, n_frames=16)
    make_dataset(system, replace(sim, families={"shifted": "shifted"}), tmp_path, workers=1, progress=False)
    spread = {}
    for split in ("test", "shifted"):
        w = Windows(tmp_path, about, split, frames=16)
        clips = w.read(np.arange(4)).numpy()
        file = w.files[0]
        found = equation_oracle(
            clips, system=about, dt=file.dt, spacing=file.spacing, heights=w.positions, periodic=None
        )
        scaler = LabelScaler.fit(about, np.array([list(ends) for ends in sim.ranges.values()]).T)
        error = (scaler.transform(found) - scaler.transform(w.targets(np.arange(4)))) ** 2
        assert error.mean() < 0.05, "the equations have the same coefficients whatever the start"
        spread[split] = clips[:, :, 0].std(2).mean((0, 2))  # along x, as they start
    ratio = spread["shifted"] / spread["test"].clip(1e-9)
    assert (np.abs(np.log(ratio[spread["test"] > 1e-9])) > 0.2).any(), "another family of starts"


def test_unknown_family():
    with pytest.raises(ValueError, match="unknown family of initial conditions 'wild'; valid: standard, shifted"):
        simulate(400.0, 1.0, [0], n_frames=2, family="wild")


def test_killed_simulation_is_finished_and_the_same(tmp_path, smoke_data):
    code = (
        "from tests.test_data import SIM; from physrep.data.generate import make_dataset; "
        f"make_dataset('shear_flow', SIM, {str(tmp_path)!r}, workers=1, progress=False)"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, start_new_session=True)
    deadline = time.monotonic() + 240  # the machine may be busy
    while not list(tmp_path.rglob("*.hdf5")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    files = list(tmp_path.rglob("*.hdf5"))
    assert 0 < len(files) < 16 and not (tmp_path / "shear_flow" / "stats.yaml").exists()
    (tmp_path / "shear_flow" / "data" / "train" / ".left.1.tmp").write_bytes(b"half a file")
    make_dataset("shear_flow", SIM, tmp_path, workers=1, progress=False)
    assert not list(tmp_path.rglob("*.tmp"))
    assert fingerprints(tmp_path) == fingerprints(smoke_data)


def test_two_processes_make_the_same_data(tmp_path):
    sim = replace(BARE, draws={"train": (9, 2), "valid": (2, 1), "test": (1, 2)}, n_frames=4)
    one, two = (
        make_dataset("shear_flow", sim, tmp_path / "1", workers=1, progress=False),
        make_dataset("shear_flow", sim, tmp_path / "2", workers=2, progress=False),
    )
    assert fingerprints(one) == fingerprints(two)


def test_out_of_time_is_an_error_that_can_be_resumed(tmp_path):
    sim = replace(BARE, draws={"train": (8, 2), "valid": (2, 1), "test": (2, 1)}, n_frames=3)
    with pytest.raises(TimeoutError, match=": 8 of 12 files of .* are done; call it again"):
        make_dataset("shear_flow", sim, tmp_path, workers=1, minutes=1e-6, progress=False)
    make_dataset("shear_flow", sim, tmp_path, workers=1, progress=False)


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
    make_dataset(system, sim, tmp_path, workers=1, progress=False)  # raises SimulationBlewUp otherwise


def test_new_code_makes_the_data_anew(tmp_path):
    from physrep.core.files import read_json, write_json

    sim = replace(BARE, draws={"train": (2, 1), "valid": (1, 1), "test": (1, 1)}, n_frames=3)
    folder = make_dataset("shear_flow", sim, tmp_path, workers=1, progress=False)
    before = fingerprints(folder)
    victim = sorted((folder / "data/train").iterdir())[0]
    victim.write_bytes(sorted((folder / "data/train").iterdir())[1].read_bytes())  # whole, but not what this code gives
    plan = read_json(folder / "plan.json")
    write_json(folder / "plan.json", plan | {"code": "0" * 16})
    with pytest.raises(TimeoutError):
        make_dataset("shear_flow", sim, tmp_path, workers=1, minutes=0, progress=False)
    assert not (folder / "stats.yaml").exists(), "statistics of the old flows would make the set look complete"
    make_dataset("shear_flow", sim, tmp_path, workers=1, progress=False)
    assert fingerprints(folder) == before and read_json(folder / "plan.json") == plan


def test_flows_that_are_rounded_differently_count_as_those_of_the_recipe(tmp_path, smoke_data, monkeypatch):
    folder = tmp_path / "set" / "shear_flow"
    shutil.copytree(smoke_data / "shear_flow", folder)
    before, recipe = fingerprints(tmp_path / "set"), read_json(folder / "plan.json")
    files = {split: find_files(tmp_path / "set", SHEAR, split) for split in ("valid", "test")}
    known = {recipe_digest(recipe, split): before[split] for split in files}
    monkeypatch.setattr("physrep.data.sets.known_flows", lambda: known)
    assert count_as_known(folder, files) == {} and not (folder / COUNTS_AS).exists(), "to the last digit the same"
    with h5py.File(files["test"][0], "r+") as file:
        file["t0_fields/tracer"][0, 0] *= 1 + 1e-6
    changed = fingerprints(tmp_path / "set")
    assert changed["test"] != before["test"] and changed["valid"] == before["valid"]
    assert list(count_as_known(folder, files).values()) == [before["test"]]
    assert fingerprints(tmp_path / "set") == before
    with h5py.File(files["test"][0], "r+") as file:
        file["t0_fields/tracer"][0, 0] *= 2
    assert fingerprints(tmp_path / "set")["test"] not in (before["test"], changed["test"]), "changed later"
    files["test"][1].unlink()
    assert count_as_known(folder, files) == {}, "a file that was planned is missing"
    assert fingerprints(tmp_path / "set")["test"] != before["test"]


def test_the_recipes_of_todays_code_are_known():
    for system in ("shear_flow", "rayleigh_benard", "active_matter"):
        recipe = json.loads(json.dumps(_recipe(system, get_preset("laptop").sim(system))))
        for split in ("train", "valid", "test", "shifted"):
            assert recipe_digest(recipe, split) in known_flows(), (
                f"{system}, {split}: the solver or what plans and writes has changed; tools/same_numbers.py shows that "
                "flows did not, or tools/same_flows.py that they are the same but for rounding"
            )


def test_a_simulated_set_says_what_it_counts_as(tmp_path, monkeypatch):
    tiny = replace(BARE, draws={"train": (2, 1)}, n_frames=2)
    folder = make_dataset("shear_flow", tiny, tmp_path / "first", workers=1, progress=False)
    recipe = recipe_digest(read_json(folder / "plan.json"), "train")
    monkeypatch.setattr("physrep.data.sets.known_flows", lambda: {recipe: "0123456789abcdef"})
    make_dataset("shear_flow", tiny, tmp_path / "second", workers=1, progress=False)
    here = [fingerprint(find_files(tmp_path / name, SHEAR, "train")) for name in ("first", "second")]
    assert here[0] != here[1] == "0123456789abcdef"
    assert here[0] == fingerprint(find_files(tmp_path / "second", SHEAR, "train"), exact=True)


@pytest.mark.parametrize("told", ['{"HERE": "../../etc"}', '{"HERE": 7}', '["HERE"]'])
def test_a_set_that_counts_as_no_fingerprint_is_refused(tmp_path, smoke_data, told):
    folder = tmp_path / "shear_flow"
    shutil.copytree(smoke_data / "shear_flow", folder)
    files = find_files(tmp_path, SHEAR, "valid")
    (folder / COUNTS_AS).write_text(told.replace("HERE", fingerprint(files)))
    with pytest.raises(
        WellFormatError, match=r"counts_as\.json must name fingerprints .16 hex digits., it has .*; delete the file"
    ):
        fingerprint(files)


def test_planted_leak_is_found(tmp_path, smoke_data):
    folder = tmp_path / "shear_flow"
    shutil.copytree(smoke_data / "shear_flow", folder)
    source = sorted((folder / "data" / "train").glob("*.hdf5"))[0]
    shutil.copy(source, folder / "data" / "test" / source.name)
    splits = [Windows(folder, SHEAR, s, frames=16, stride=8) for s in ("train", "test")]
    with pytest.raises(
        ValueError, match="2 of 10 trajectories of 'test' have an initial condition that 'train' has too"
    ):
        check_disjoint(*splits)


def test_published_files_with_one_name_in_every_split_are_no_leak(tmp_path):
    "The Well's files do not say which initial condition they hold, and have the same names in all splits."
    for split, seed in (("train", 1), ("valid", 2)):
        fields = simulate(400.0, 0.5, [seed], grid=32, n_frames=3)
        times = fields.pop("time")
        write_well(
            tmp_path / "shear_flow" / "data" / split / "shear_flow_Reynolds_4e2_Schmidt_5e-1.hdf5",
            SHEAR,
            fields,
            {"Reynolds": 400.0, "Schmidt": 0.5},
            time=times,
            box=(1.0, 1.0),
        )
    check_disjoint(*(Windows(tmp_path, SHEAR, s, frames=2) for s in ("train", "valid")))


def test_groups_ignore_schmidt_but_not_reynolds(tmp_path):
    "Equal initial condition: one group for all Schmidt numbers, as the velocity is the same; one a Reynolds number."
    for re, sc in ((400.0, 0.5), (400.0, 2.0), (800.0, 2.0)):
        fields = simulate(re, sc, [7], grid=32, n_frames=3)
        time_ = fields.pop("time")
        path = tmp_path / "shear_flow" / "data" / "train" / f"shear_flow_Reynolds_{re:g}_Schmidt_{sc:g}.hdf5"
        write_well(
            path, SHEAR, fields, {"Reynolds": re, "Schmidt": sc}, time=time_, box=(1.0, 1.0), initial_conditions=[7]
        )
    w = Windows(tmp_path, SHEAR, "train", frames=2)
    assert w.groups[0] == w.groups[1] != w.groups[2]


def test_no_trajectory_long_enough(smoke_data):
    with pytest.raises(ValueError, match="has 99 frames; the longest has 36"):
        Windows(smoke_data, SHEAR, "train", frames=99)


def test_symmetries_commute_with_the_solver():
    "A mirrored and shifted initial state evolves into the mirrored and shifted solution."
    fields = simulate(400.0, 1.0, [3], grid=32, n_frames=9, frame_dt=0.2, dtype=torch.float64)
    x = torch.as_tensor(
        np.concatenate(
            [fields["tracer"][:, None], fields["pressure"][:, None], np.moveaxis(fields["velocity"], -1, 1)], axis=1
        )
    )
    k = 2 * np.pi * np.fft.fftfreq(32, 1 / 32)

    def vorticity(u, v):
        return (
            np.fft.ifft(1j * k[:, None] * np.fft.fft(v, axis=0), axis=0).real
            - np.fft.ifft(1j * k * np.fft.fft(u, axis=1), axis=1).real
        )

    for mirror in ([True, False], [False, True], [True, True]):
        y = apply_symmetry(x, np.array([[5, 11]]), np.array([mirror]), SHEAR).numpy()
        start = y[0, :, 0]
        again = simulate(
            400.0,
            1.0,
            [3],
            grid=32,
            n_frames=9,
            frame_dt=0.2,
            dtype=torch.float64,
            initial=(vorticity(start[2], start[3])[None], start[0][None]),
        )
        assert np.abs(again["velocity"][0, -1] - np.moveaxis(y[0, 2:, -1], 0, -1)).max() < 1e-9
        assert np.abs(again["tracer"][0, -1] - y[0, 0, -1]).max() < 1e-9


@pytest.mark.parametrize("name", ["shear_flow", "active_matter"])
def test_symmetry_point_by_point(name):
    system = get_system(name)
    x = np.random.default_rng(0).standard_normal((4, system.n_channels, 2, 6, 8)).astype(np.float32)
    shifts, mirrors = (
        np.array([[0, 0], [2, 7], [5, 0], [1, 3]]),
        np.array([[False, False], [True, False], [False, True], [True, True]]),
    )
    found = apply_symmetry(torch.from_numpy(x), shifts, mirrors, system).numpy()
    for i, (shift, mirror) in enumerate(zip(shifts, mirrors)):
        where = [(np.arange(n) + s)[:: -1 if m else 1] % n for n, s, m in zip(x.shape[3:], shift, mirror)]
        want = x[i][:, :, where[0]][:, :, :, where[1]]
        for axis in np.flatnonzero(mirror):
            want = want * system.mirror_signs(axis)[:, None, None, None]
        np.testing.assert_array_equal(found[i], want)


def test_a_split_is_identified_once(tmp_path, smoke_data, monkeypatch):
    windows = Windows(smoke_data, SHEAR, "test", frames=2)
    first = windows.fingerprint()
    monkeypatch.setattr("physrep.data.windows.fingerprint", lambda paths: pytest.fail("the files are read again"))
    assert windows.fingerprint() == first


def test_updates_span_epochs():
    order = Order(10, 4, seed=3)
    indices, seeds = zip(*(order(step) for step in range(5)))
    assert sorted(np.concatenate(indices)[:10]) == sorted(np.concatenate(indices)[10:]) == list(range(10)), (
        "two epochs in five updates"
    )
    assert len(set(torch.cat(seeds).tolist())) == 20, "a window has other random numbers in the next epoch"
    again, reseeded = Order(10, 4, seed=3), Order(10, 4, seed=4)
    assert np.array_equal(again(2)[0], indices[2]) and not np.array_equal(reseeded(2)[0], indices[2])


def test_resize_leaves_what_has_the_size():
    x = torch.rand(2, 3, 4, 8, 6)
    assert resize(x, None) is x and resize(x[..., :6, :], 6).data_ptr() == x.data_ptr()
    assert (
        resize(torch.ones_like(x), 16).shape == (2, 3, 4, 16, 16)
        and resize(torch.ones_like(x), 16).sub(1).abs().max() < 1e-6
    )


def test_upside_down_commutes_with_the_solver():
    "Warm and cold exchanged, the layer upside down: again the same layer, with the pressure that goes with it."
    walls, heights = get_system("rayleigh_benard"), rayleigh_benard.vertical_points(24, "legendre")
    options = dict(grid=(32, 24), n_frames=5, frame_dt=0.5, dt=0.025, store_nodes="legendre", dtype=torch.float64)
    x, y = np.meshgrid(np.arange(32) / 16, heights, indexing="ij")
    start = (1 - y + 0.2 * np.sin(np.pi * y) * np.cos(np.pi * x) + 0.1 * np.sin(2 * np.pi * y) * np.sin(2 * np.pi * x))[
        None
    ]

    def channels(b):
        f = rayleigh_benard.simulate(3e4, 1.0, [0], initial=(np.zeros_like(b), b), **options)
        return torch.as_tensor(
            np.concatenate([f["buoyancy"][:, None], f["pressure"][:, None], np.moveaxis(f["velocity"], -1, 1)], axis=1)
        )

    fields = channels(start)
    assert np.abs(fields[0, 3, -1]).max() > 0.1, "it moves"
    for mirror, moved in (([False, True], 1 - start[:, :, ::-1]), ([True, True], 1 - start[:, ::-1, ::-1])):
        image = apply_symmetry(fields, np.array([[0, 0]]), np.array([mirror]), walls, heights)
        assert (channels(np.ascontiguousarray(moved)) - image).abs().max() < 1e-6  # offsets are float32
    with pytest.raises(ValueError, match="positions along y must be 24 points"):
        apply_symmetry(fields, np.array([[0, 0]]), np.array([[False, True]]), walls, heights**2)


@pytest.mark.parametrize("mirror", [[True, False], [False, True], [True, True]])
def test_a_mirror_image_of_the_shear_flow_stays_a_flow_of_the_set(mirror):
    "The tracer starts as a copy of the velocity along x, in every flow of the set and in every mirror image."
    fields = simulate(400.0, 1.0, [3], grid=32, n_frames=2, frame_dt=0.2, dtype=torch.float64)
    x = np.concatenate(
        [fields["tracer"][:, None], fields["pressure"][:, None], np.moveaxis(fields["velocity"], -1, 1)], 1
    )
    assert np.abs(x[0, 0, 0] - x[0, 2, 0]).max() < 1e-9 < np.abs(x[0, 0, 0]).max()
    y = apply_symmetry(torch.from_numpy(x), np.array([[5, 11]]), np.array([mirror]), SHEAR).numpy()
    assert np.abs(y[0, 0, 0] - y[0, 2, 0]).max() < 1e-9


def test_symmetry_draws_cover_the_group_and_depend_on_the_sample_only():
    seeds = sample_seeds(0, 0, 0, list(range(200)))
    shifts, mirrors = symmetry_draws(seeds, SHEAR, (32, 32))
    assert set(shifts[:, 0]) == set(range(32)) and 0.3 < mirrors.mean() < 0.7
    assert np.array_equal(symmetry_draws(seeds[50:60], SHEAR, (32, 32))[0], shifts[50:60])
    walls = get_system("rayleigh_benard")
    shifts, mirrors = symmetry_draws(seeds, walls, (32, 32))
    assert not shifts[:, 1].any() and 0.3 < mirrors[:, 1].mean() < 0.7, (
        "nothing is shifted through a wall, but half is turned upside down"
    )
    shifts, mirrors = symmetry_draws(seeds, walls, (32, 32), whole=(False, False))
    assert not shifts.any() and not mirrors[:, 1].any() and mirrors[:, 0].any(), (
        "a crop is not shifted, nor turned upside down"
    )


def test_resize_noise_and_crop(smoke_data):
    w = Windows(smoke_data, SHEAR, "train", frames=16, stride=8, crop=((0, 16), (8, 32)))
    assert w.shape == (4, 16, 16, 24)
    full = Windows(smoke_data, SHEAR, "train", frames=16, stride=8)
    assert torch.equal(w.read([3]), full.read([3])[..., :16, 8:32])
    normaliser, scaler = Normaliser.load(smoke_data, SHEAR), LabelScaler.fit(SHEAR, w.labels)
    batches = Batches(full, batch_size=4, normaliser=normaliser, scaler=scaler, size=20, noise=0.5)
    clean = Batches(full, batch_size=4, normaliser=normaliser, scaler=scaler, size=20)
    noisy, plain = next(batches(3)), next(clean(3))
    assert batches.shape == (4, 16, 20, 20) and noisy["fields"].shape == (4, 4, 16, 20, 20)
    assert abs(float((noisy["fields"] - plain["fields"]).std()) - 0.5) < 0.01
    assert torch.equal(next(batches.evaluation())["fields"], next(clean.evaluation())["fields"]), (
        "evaluation is without noise"
    )


def test_data_that_nothing_here_has_simulated_are_left_alone(tmp_path):
    file = tmp_path / "shear_flow" / "data" / "train" / "shear_flow_Reynolds_1e4.hdf5"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"days of a download")
    (tmp_path / "shear_flow" / "stats.yaml").write_text("mean: {}")
    with pytest.raises(
        ValueError, match="shear_flow_Reynolds_1e4.hdf5.*no plan.json.*Preset paper or native reads them"
    ):
        make_dataset("shear_flow", SIM, tmp_path, workers=1, progress=False)
    assert file.read_bytes() == b"days of a download" and (tmp_path / "shear_flow" / "stats.yaml").is_file()
    assert not (tmp_path / "shear_flow" / "plan.json").exists()


def test_batches_made_ahead_are_the_same(smoke_data):
    w = Windows(smoke_data, SHEAR, "train", frames=16, stride=8)
    options = dict(
        batch_size=6,
        accumulate=3,
        normaliser=Normaliser.load(smoke_data, SHEAR),
        scaler=LabelScaler.fit(SHEAR, w.labels),
        augment=True,
        noise=0.1,
    )
    plain, early = (Batches(w, **options, ahead=ahead) for ahead in (False, True))
    for one, two in ((plain(3), early(3)), (plain.evaluation(5, limit=12), early.evaluation(5, limit=12))):
        one, two = list(one), list(two)
        assert len(one) == 3 and all(
            torch.equal(a[k], b[k]) for a, b in zip(one, two, strict=True) for k in ("fields", "labels", "seeds")
        )


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_first_batch_of_the_next_update_is_made_ahead(smoke_data, accumulate):
    w = Windows(smoke_data, SHEAR, "train", frames=16, stride=8)
    options = dict(normaliser=Normaliser.load(smoke_data, SHEAR), scaler=LabelScaler.fit(SHEAR, w.labels), augment=True)
    plain, early = (Batches(w, batch_size=6, accumulate=accumulate, ahead=ahead, **options) for ahead in (False, True))
    made, make = [], early.make
    early.make = lambda indices, seeds: made.append(indices.tolist()) or make(indices, seeds)
    for step in (0, 1, 2, 7):  # a run goes on elsewhere
        for one, two in zip(plain(step), early(step), strict=True):
            assert torch.equal(one["fields"], two["fields"]) and torch.equal(one["seeds"], two["seeds"])
    early._ahead._thread.shutdown()
    used = [part.tolist() for step in (0, 1, 2, 3, 7, 8) for part, _ in early.parts(step)]
    skipped = 2 * (accumulate - 1)  # of steps 3 and 8 only the first was made
    assert len(made) == len(used) - skipped, "each once, and one ahead of every jump"


def test_evaluation_and_the_batch_that_is_made_ahead_do_not_write_to_one_buffer_at_once(smoke_data, monkeypatch):
    w = Windows(smoke_data, SHEAR, "train", frames=16, stride=8, in_memory=True)
    options = dict(batch_size=6, normaliser=Normaliser.load(smoke_data, SHEAR), scaler=LabelScaler.fit(SHEAR, w.labels))
    plain, early = (Batches(w, ahead=ahead, **options) for ahead in (False, True))
    expected = [*plain(0), *plain.evaluation(6, limit=12), *plain(1)]
    copy = w.copy
    monkeypatch.setattr(w, "copy", lambda *place: (time.sleep(0.005), copy(*place)))  # the next takes its time
    found = [*early(0), *early.evaluation(6, limit=12), *early(1)]
    assert all(torch.equal(a["fields"], b["fields"]) for a, b in zip(expected, found, strict=True))


def test_one_is_made_ahead_and_an_error_comes_in_its_turn():
    made, used = [], []

    def maker(i):
        if i == 3:
            raise ValueError("the fourth")
        made.append(i)
        return i

    with pytest.raises(ValueError, match="the fourth"):
        for i in prefetch((partial(maker, i) for i in range(9)), ahead=Ahead()):
            used.append(i)
            assert len(made) <= len(used) + 1
    assert used == [0, 1, 2] and made in ([0, 1, 2], [0, 1, 2, 4])


def test_a_step_that_spans_two_epochs(smoke_data):
    w = Windows(smoke_data, SHEAR, "valid", frames=16, stride=20)
    batches = Batches(w, batch_size=5, normaliser=Normaliser.identity(SHEAR), scaler=LabelScaler.fit(SHEAR, w.labels))
    n = len(w)
    order = np.concatenate([batches.samples(k)[0] for k in range(2 * n)])
    for epoch in range(5):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == list(range(n))
    with pytest.raises(ValueError, match="positive multiple of accumulate, got 5 and 2"):
        Batches(
            w,
            batch_size=5,
            accumulate=2,
            normaliser=Normaliser.identity(SHEAR),
            scaler=LabelScaler.fit(SHEAR, w.labels),
        )


def test_stats_normalise_every_field(smoke_data):
    w = Windows(smoke_data, SHEAR, "train", frames=36)
    z = Normaliser.load(smoke_data, SHEAR)(w.read(np.arange(len(w))))
    assert torch.allclose(z[:, :2].std((0, 2, 3, 4)), torch.ones(2), atol=1e-2)
    assert abs(float(z[:, 2:].square().mean()) - 1) < 1e-2
    assert isinstance(w.files[0], WellFile)


def test_stats_are_of_train_wherever_it_stands(tmp_path):
    first, last = ({"train": (2, 1), "test": (2, 1)}, {"test": (2, 1), "train": (2, 1)})
    made = [
        make_dataset("shear_flow", replace(BARE, draws=draws, n_frames=3), tmp_path / str(k), workers=1, progress=False)
        for k, draws in enumerate((first, last))
    ]
    of_train, in_another_order = ((folder / "stats.yaml").read_text() for folder in made)
    assert of_train == in_another_order != ""


@pytest.mark.parametrize("in_memory", [True, False])
def test_windows_are_a_sequence(smoke_data, in_memory):
    w = Windows(smoke_data, SHEAR, "test", frames=16, stride=8, in_memory=in_memory)
    one = w[3]
    assert one["fields"].shape == w.shape and one["fields"].dtype == one["labels"].dtype == torch.float32
    assert torch.equal(one["fields"], w.read([3])[0]) and one["labels"].tolist() == pytest.approx(w.targets([3])[0])
    assert w[np.int64(3)]["index"] == torch.utils.data.default_collate([one])["index"].item() == 3
    for i in (-1, -len(w)):
        assert w[i]["index"] == i % len(w) and torch.equal(w[i]["fields"], w[i % len(w)]["fields"])
    for i in (len(w), -len(w) - 1):
        with pytest.raises(IndexError, match=f"no window {i}: .*test has {len(w)} of 16 frames"):
            w[i]
    with pytest.raises(TypeError):
        w[0.0]
    assert [x["index"] for x in w] == list(range(len(w))), "iteration ends"


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_windows_in_worker_processes(smoke_data, context):
    w = Windows(smoke_data, SHEAR, "test", frames=16, stride=8)
    w.read([0])
    assert w.memory is not None and len(pickle.dumps(w)) < 100_000, "what is in memory stays here"
    loader = DataLoader(w, batch_size=5, num_workers=2, multiprocessing_context=context)
    batches = list(loader)
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(len(w)))
    assert torch.equal(torch.cat([b["fields"] for b in batches]), w.read(np.arange(len(w))))
    assert np.allclose(torch.cat([b["labels"] for b in batches]), w.targets(np.arange(len(w))))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_value_that_is_not_finite_is_found_when_it_is_read(tmp_path, smoke_data, in_memory, value):
    folder = shutil.copytree(smoke_data / "shear_flow", tmp_path / "shear_flow")
    path = sorted((folder / "data" / "train").glob("*.hdf5"))[1]
    with h5py.File(path, "r+") as f:
        f["t1_fields/velocity"][1, 20, 5, 7, 1] = value
        f["t0_fields/tracer"][1, 21, 0, 0] = -value  # later: the first frame is named
    w = Windows(tmp_path, SHEAR, "train", frames=4, stride=4, crop=((0, 16), (0, 16)), in_memory=in_memory)
    message = f"{path}: NaN or infinity in velocity_y of trajectory 1, frame 20"
    k = w.trajectories.index((1, 1))
    place = int(np.flatnonzero((w.index == (k, 20)).all(1))[0])
    scaler = LabelScaler.fit(SHEAR, w.labels)
    batches = Batches(w, batch_size=4, normaliser=Normaliser.identity(SHEAR), scaler=scaler)
    for read in (
        lambda: w.read([0, place]),
        lambda: w[place],
        lambda: w.read_frames(np.array([[k, 20]])),
        lambda: list(batches.evaluation()),
    ):
        with pytest.raises(WellFormatError) as error:
            read()
        assert str(error.value) == message
    if not in_memory:
        assert torch.isfinite(w.read([place - 1])).all(), "other windows can be read"


def test_large_numbers_are_finite(tmp_path, smoke_data):
    folder = shutil.copytree(smoke_data / "shear_flow", tmp_path / "shear_flow")
    for path in (folder / "data" / "test").glob("*.hdf5"):
        with h5py.File(path, "r+") as f:
            f["t0_fields/tracer"][...] = 3e38  # their sum is infinite
    assert Windows(tmp_path, SHEAR, "test", frames=4, in_memory=False).read([0]).max() == np.float32(3e38)


def test_a_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "data").write_text("")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "shear_flow").write_text("")
    with pytest.raises(NotADirectoryError, match="data is a file; give the folder that holds shear_flow/data/"):
        Windows(tmp_path / "data", SHEAR, "train", frames=2)
    for data_dir, named in (("data", "data"), ("here", "shear_flow")):
        with pytest.raises(NotADirectoryError, match=f"data_dir must be a folder, .*{named} is a file"):
            make_dataset("shear_flow", SIM, tmp_path / data_dir, progress=False)


def test_labels_that_do_not_vary():
    with pytest.raises(ValueError, match=r"all labels Schmidt of shear_flow in a/train are equal \(0.5\)"):
        LabelScaler.fit(SHEAR, np.array([[400.0, 0.5], [800.0, 0.5]]), "a/train")
    with pytest.raises(ValueError, match=r"all labels Schmidt of shear_flow are equal"):
        LabelScaler.fit(SHEAR, np.array([[400.0, 0.5], [800.0, 0.5]]))


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_statistics_stay_those_of_train_when_a_set_grows(tmp_path, monkeypatch):
    sim = replace(BARE, draws={"valid": (2, 1), "train": (2, 1), "test": (2, 1)}, n_frames=3)
    options = dict(workers=1, progress=False)
    folder = make_dataset("shear_flow", sim.only(("valid",)), tmp_path, **options)
    of_valid = (folder / "stats.yaml").read_text()
    make_dataset("shear_flow", sim.only(("test",)), tmp_path, **options)
    assert (folder / "stats.yaml").read_text() == of_valid, "the first split stays"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate, "write_stats", interrupt)
        make_dataset("shear_flow", sim, tmp_path, **options)
    assert not (folder / "stats.yaml").exists(), "those of valid are not left"
    make_dataset("shear_flow", sim, tmp_path, **options)
    of_train = (folder / "stats.yaml").read_text()
    assert of_train != of_valid
    more = replace(sim, draws={**sim.draws, "shifted": (2, 1)}, families={"shifted": "shifted"})
    make_dataset("shear_flow", more.only(("shifted",)), tmp_path, **options)
    assert (folder / "stats.yaml").read_text() == of_train
    alone = make_dataset("shear_flow", sim.only(("train",)), tmp_path / "alone", **options)
    assert (alone / "stats.yaml").read_text() == of_train


def test_new_code_removes_what_it_had_planned_and_nothing_else(tmp_path):
    sim = replace(BARE, draws={"train": (2, 1)}, n_frames=3)
    folder = make_dataset("shear_flow", sim, tmp_path, workers=1, progress=False)
    mine = folder / "data" / "mine" / "days_of_work.hdf5"
    mine.parent.mkdir()
    mine.write_bytes(b"a split of one's own")
    write_json(folder / "plan.json", read_json(folder / "plan.json") | {"code": "0" * 16})
    old = {p: p.stat().st_mtime_ns for p in (folder / "data/train").iterdir()}
    make_dataset("shear_flow", sim, tmp_path, workers=1, progress=False)
    assert mine.read_bytes() == b"a split of one's own"
    new = {p: p.stat().st_mtime_ns for p in (folder / "data/train").iterdir()}
    assert new.keys() == old.keys() and not new.items() & old.items()


def test_a_file_that_another_program_holds_is_not_simulated_again(tmp_path, monkeypatch):
    sim = replace(BARE, draws={"train": (2, 1)}, n_frames=3)
    folder = make_dataset("shear_flow", sim, tmp_path, workers=1, progress=False)
    (folder / "stats.yaml").unlink()  # so that files are looked at
    before = {p: p.stat().st_mtime_ns for p in (folder / "data/train").iterdir()}

    def held(path, system):
        raise UnreadableFileError(f"{path}: cannot be read here and now")

    monkeypatch.setattr(generate, "WellFile", held)
    with pytest.raises(UnreadableFileError, match="cannot be read here and now"):
        make_dataset("shear_flow", sim, tmp_path, workers=1, progress=False)
    assert {p: p.stat().st_mtime_ns for p in (folder / "data/train").iterdir()} == before


def grown(tmp_path, smoke_data, change):
    "Split `train` of two files, the second one changed."
    split = tmp_path / "shear_flow" / "data" / "train"
    split.mkdir(parents=True)
    for source in find_files(smoke_data, SHEAR, "train")[:2]:
        shutil.copy(source, split)
    last = sorted(split.iterdir())[-1]
    with h5py.File(last, "r+") as file:
        change(file)
    return tmp_path


def stretch(file, name):
    file[f"dimensions/{name}"][...] = 2 * file[f"dimensions/{name}"][...]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: stretch(f, "time"), "has frames 0.4 .* frames 0.2 "),
        (lambda f: stretch(f, "x"), "has frames 0.2 and points 0.0625, 0.03125 apart"),
    ],
)
def test_files_of_a_split_are_of_one_kind(tmp_path, smoke_data, change, message):
    with pytest.raises(WellFormatError, match=f"{message}.*put them in sets of their own"):
        Windows(grown(tmp_path, smoke_data, change), SHEAR, "train", frames=2)


def test_splits_of_a_set_are_of_one_kind(tmp_path, smoke_data):
    shutil.copytree(smoke_data / "shear_flow", tmp_path / "shear_flow")
    for path in (tmp_path / "shear_flow" / "data" / "test").iterdir():
        with h5py.File(path, "r+") as file:
            stretch(file, "time")
    run = resolve("shear_flow", "mae", "vit", "smoke")
    load_splits(run, tmp_path, ("train", "valid"), frames=4, stride=4)
    with pytest.raises(WellFormatError, match="test/.* has frames 0.4 .*train/.* frames 0.2 "):
        load_splits(run, tmp_path, ("train", "valid", "test"), frames=4, stride=4)


def test_a_split_of_two_grids_names_both(tmp_path, smoke_data):
    def crop(file):
        for group in ("t0_fields", "t1_fields"):
            for name, field in {**file[group]}.items():
                data, about = field[:, :, :16], dict(field.attrs)
                del file[group][name]
                file[group][name] = data
                file[group][name].attrs.update(about)
        x = file["dimensions/x"][:16]
        del file["dimensions/x"]
        file["dimensions/x"] = x

    with pytest.raises(WellFormatError, match=r"has a grid of \(16, 32\), .* \(32, 32\)"):
        Windows(grown(tmp_path, smoke_data, crop), SHEAR, "train", frames=2)


def test_windows_by_a_mask_and_into_a_buffer_that_is_too_small(smoke_data):
    w = Windows(smoke_data, SHEAR, "test", frames=16, stride=8)
    mask = np.arange(len(w)) % 2 == 1
    assert torch.equal(w.read(mask), w.read(np.flatnonzero(mask)))
    with pytest.raises(ValueError, match="zip"):
        w.read([0, 1, 2], out=torch.empty(2, *w.shape))


def test_trajectories_of_two_lengths_make_no_array(tmp_path, smoke_data):
    def shorten(file):
        for group in ("t0_fields", "t1_fields"):
            for name, field in {**file[group]}.items():
                data = field[:, :-3]
                del file[group][name]
                file[group][name] = data
        time = file["dimensions/time"][:-3]
        del file["dimensions/time"]
        file["dimensions/time"] = time

    folder = grown(tmp_path, smoke_data, shorten)
    n = Windows(smoke_data, SHEAR, "train", frames=2).files[0].n_frames
    with pytest.raises(ValueError, match=rf"in_memory=True needs .* \[{n - 3}, {n}\] frames"):
        Windows(folder, SHEAR, "train", frames=2, in_memory=True)
    assert not Windows(folder, SHEAR, "train", frames=2).in_memory


def test_groups_of_foreign_files_tell_splits_apart(tmp_path, smoke_data):
    "Files of The Well have the same names in every split."
    source = find_files(smoke_data, SHEAR, "train")[0]
    for split in ("train", "valid"):
        (tmp_path / "shear_flow" / "data" / split).mkdir(parents=True)
        path = tmp_path / "shear_flow" / "data" / split / "published.hdf5"
        shutil.copy(source, path)
        with h5py.File(path, "r+") as file:
            del file["physrep_initial_condition"]
    both = Windows(tmp_path, SHEAR, "train+valid", frames=2)
    assert len(set(both.groups)) == len(both.groups) == 2 * both.files[0].n_trajectories
    assert set(both.groups) >= set(Windows(tmp_path, SHEAR, "train", frames=2).groups)


@pytest.mark.parametrize("number", [np.int64(3), np.int32(3), np.uint8(3)])
def test_numbers_of_any_type_are_the_same_key(number):
    assert seed_for("step", number) == seed_for("step", 3) != seed_for("step", "3")


def test_a_plan_of_another_form_is_data_that_were_made_differently(tmp_path):
    folder = tmp_path / "shear_flow"
    folder.mkdir()
    write_json(folder / "plan.json", {"system": "shear_flow", "code": "0" * 16, "splits": {"train": 2}})
    with pytest.raises(ValueError, match="holds data that were made differently .*splits: there"):
        make_dataset("shear_flow", SIM, tmp_path, workers=1, progress=False)


def test_files_between_walls_have_their_points_at_the_same_heights(tmp_path):
    "Spacings of uneven points are unknown, and those of two kinds of uneven points are not the same."
    split, x = tmp_path / "rayleigh_benard" / "data" / "train", np.arange(8) / 8
    fields = {name: np.random.default_rng(0).normal(size=(1, 3, 8, 6)) for name in ("buoyancy", "pressure")}
    fields["velocity"] = np.zeros((1, 3, 8, 6, 2))
    for name, power in (("a", 2.0), ("b", 3.0)):
        path, at = split / f"{name}.hdf5", {"x": x, "y": np.linspace(0.0, 1.0, 6) ** power}
        path.parent.mkdir(parents=True, exist_ok=True)
        labels = {"Rayleigh": 1e5, "Prandtl": 1.0}
        write_well(path, "rayleigh_benard", fields, labels, time=[0.0, 0.1, 0.2], coordinates=at)
    with pytest.raises(WellFormatError, match="b.hdf5 has its lowest points at .* between the walls"):
        Windows(tmp_path, "rayleigh_benard", "train", frames=2)


def test_a_script_that_would_simulate_in_every_process_is_told_so(tmp_path, monkeypatch):
    script = tmp_path / "mine.py"
    script.write_text(
        "import multiprocessing\n"
        'print(getattr(multiprocessing.current_process(), "_inheriting", False), flush=True)\n'
        'if __name__ == "__main__":\n'
        '    process = multiprocessing.get_context("spawn").Process(target=print)\n'
        "    process.start()\n"
        "    process.join()\n"
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60).stdout.split()
    assert said == ["False", "True"], "Python tells a process that imports a script from one that runs it"
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match='below `if __name__ == "__main__":`, or with workers=1'):
        make_dataset("shear_flow", BARE, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_splits_of_two_grids_are_not_mixed(tmp_path):
    sim = replace(BARE, draws={}, counts={"grid": 1}, n_frames=3)
    values = {"Reynolds": (400.0, 500.0), "Schmidt": (1.0,)}
    make_dataset("shear_flow", replace(sim, grid_values=values), tmp_path, workers=1, progress=False)
    other = replace(sim, counts={"grid2": 1}, grid_values=values | {"Reynolds": (600.0,)})
    with pytest.raises(ValueError, match="made differently .grid_values: there .*400.*, asked for .*600"):
        make_dataset("shear_flow", other, tmp_path, workers=1, progress=False)


def test_labels_may_be_in_any_unit():
    system = replace(SYSTEMS["shear_flow"], labels=(Label("diffusivity", False, True),))
    labels = np.linspace(0.5e-9, 1.5e-9, 6)[:, None]
    z = LabelScaler.fit(system, labels).transform(labels)
    assert np.allclose([z.mean(), z.std()], [0, 1])
    with pytest.raises(ValueError, match="all labels diffusivity of shear_flow are equal"):
        LabelScaler.fit(system, np.full((3, 1), 1e-9))


def test_two_mirror_images_one_after_the_other_are_both_at_once():
    "Also of a scalar that changes its sign and has a number added along both axes."
    twice = tuple((axis, "tracer") for axis in (0, 1)), tuple((axis, "tracer", 1.0, 0.0) for axis in (0, 1))
    system = replace(SHEAR, mirror_axes=(0, 1), odd_scalars=twice[0], mirror_offsets=twice[1])
    x, still = torch.randn(1, 4, 2, 6, 8, generator=torch.Generator().manual_seed(0)), np.array([[0, 0]])
    both = apply_symmetry(x, still, np.array([[True, True]]), system)
    first = apply_symmetry(x, still, np.array([[True, False]]), system)
    assert torch.allclose(both, apply_symmetry(first, still, np.array([[False, True]]), system))
    assert torch.allclose(apply_symmetry(both, still, np.array([[False, False]]), system), both)
    assert torch.allclose(apply_symmetry(first, still, np.array([[True, False]]), system), x, atol=1e-6)

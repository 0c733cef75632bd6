"""Files as The Well publishes them: native grids and layouts against its own reader, large files, the paper's crops."""

import re
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from broken import well_file
from helpers import dry_run
from the_well.data import WellDataModule, WellDataset
from the_well.data.normalization import ZScoreNormalization

from physrep.data.batches import Batches
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.sets import find_files, find_folder
from physrep.data.well import WellFile
from physrep.data.windows import Windows
from physrep.data.write import write_stats
from physrep.experiments.command import main
from physrep.models.pretrained import load_encoder
from physrep.physics.systems import SYSTEMS, Field, Label, System, declaration_problem, get_system
from physrep.results.rows import systems_of
from physrep.training.loop import Recipe
from physrep.training.presets import PRESETS, get_preset
from physrep.training.pretrain import pretrain
from physrep.training.run import resolve

FRAMES = 4
# grid, parameters as in a published file, a second pair, and coordinates as published
NATIVE = {
    "active_matter": (
        (256, 256),
        {"L": 10.0, "zeta": 11.0, "alpha": -2.0},
        {"L": 10.0, "zeta": 3.0, "alpha": -1.0},
        {"x": np.linspace(0, 10, 256, False), "y": np.linspace(0, 10, 256, False)},
    ),
    "shear_flow": (
        (256, 512),
        {"Reynolds": 1e5, "Schmidt": 2.0},
        {"Reynolds": 1e4, "Schmidt": 0.1},
        {"x": np.linspace(0, 1, 256, False), "y": np.linspace(0, 1, 512, False)},
    ),
    "rayleigh_benard": (
        (512, 128),
        {"Rayleigh": 1e9, "Prandtl": 5.0},
        {"Rayleigh": 1e6, "Prandtl": 0.1},
        {"x": np.linspace(0, 4, 512, False), "y": (1 - np.cos(np.pi * (np.arange(128) + 0.5) / 128)) / 2},
    ),
}
SPACING = {
    "active_matter": (10 / 256, 10 / 256),
    "shear_flow": (1 / 256, 2 / 512),  # the longer axis is labelled from 0 to 1, and is 2 long
    "rayleigh_benard": (4 / 512, np.nan),
}


@pytest.fixture(scope="module", params=list(NATIVE))
def native(request, tmp_path_factory):
    "Files of two pairs in every split, as `the-well-download` leaves them in <base>/datasets/<name>; base and name."
    base, name = tmp_path_factory.mktemp(request.param), request.param
    root, (grid, *pairs, coordinates) = base / "datasets" / name, NATIVE[name]
    for split in ("train", "valid", "test"):
        for p, parameters in enumerate(pairs):
            path, about = (
                root / "data" / split / f"{name}_{p}.hdf5",
                dict(parameters=parameters, initial_conditions=None),
            )
            well_file(path, p + len(split), name, (2, FRAMES, *grid), coordinates=coordinates, **about)
            with h5py.File(path, "r+") as file:
                del file.attrs["written_by"]  # by others
    write_stats(root, name)
    return base, name


def test_values_are_those_of_the_wells_own_reader(native):
    base, name = native
    system, steps = get_system(name), dict(n_steps_input=FRAMES - 1, n_steps_output=1)
    theirs = WellDataset(path=str(base / "datasets" / name), well_split_name="train", use_normalization=False, **steps)
    ours = Windows(base, name, "train", frames=FRAMES, in_memory=False)
    assert len(theirs) == len(ours) == 4
    for i in range(len(ours)):
        fields = np.concatenate([theirs[i]["input_fields"], theirs[i]["output_fields"]])  # (t, x, y, c)
        np.testing.assert_array_equal(ours.read([i])[0].numpy(), np.moveaxis(fields, -1, 0))
        scalars = dict(zip(NATIVE[name][1], theirs[i]["constant_scalars"].tolist()))
        assert ours.targets([i])[0] == pytest.approx([scalars[label] for label in system.label_names])


def test_valid_and_test_are_normalised_with_the_statistics_of_train(native):
    "The data module of The Well normalises `train` alone (1.2.0), and its reader nothing if no kind is named."
    base, name = native
    normalised = dict(use_normalization=True, normalization_type=ZScoreNormalization)
    theirs = WellDataModule(str(base / "datasets"), name, batch_size=1, **normalised)
    unnamed = WellDataset(path=str(base / "datasets" / name), well_split_name="train", use_normalization=True)
    scale, train = Normaliser.load(base, name), Windows(base, name, "train", frames=1)
    scaler = LabelScaler.fit(train.system, train.labels)
    for split, dataset in (("valid", theirs.val_dataset), ("test", theirs.test_dataset), ("train", unnamed)):
        windows = Windows(base, name, split, frames=1)
        physical = windows.read([0])
        np.testing.assert_array_equal(np.moveaxis(dataset[0]["input_fields"].numpy(), -1, 0), physical[0], "as stored")
        batches = Batches(windows, batch_size=1, normaliser=Normaliser.load(windows.root, name), scaler=scaler)
        assert torch.equal(next(batches.evaluation())["fields"], scale(physical))


def test_both_layouts_are_found_and_the_grid_is_understood(native, tmp_path):
    base, name = native
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / name).symlink_to(base / "datasets" / name)  # `hf download --local-dir hub/<name>`
    for root in (base, base / "datasets", base / "datasets" / name, tmp_path / "hub"):
        assert [p.name for p in find_files(root, name, "valid")] == [f"{name}_0.hdf5", f"{name}_1.hdf5"]
        assert find_folder(root, name).resolve() == (base / "datasets" / name).resolve()
        assert systems_of(get_preset("paper"), root) == (name,)
    for other in set(SYSTEMS) - {name}:  # the folder of one set is not that of another
        with pytest.raises(FileNotFoundError, match=f"no .h5 or .hdf5 files of {other}"):
            find_files(base / "datasets" / name, other, "valid")
    file = WellFile(find_files(base, name, "train")[0], name)
    assert file.contiguous and file.time.dtype == np.float64 and file.dt == pytest.approx(0.2)
    assert file.spacing == pytest.approx(SPACING[name], rel=1e-4, nan_ok=True) and "L" not in file.labels


def test_the_papers_crop_and_size(native):
    base, name = native
    system = get_system(name)
    crop, size = dict(system.paper)["crop"], dict(system.paper)["size"]
    windows = Windows(base, name, "train", frames=2, crop=crop)
    (x0, x1), (y0, y1) = crop
    with h5py.File(windows.paths[0]) as file:
        first = file[f"t0_fields/{system.fields[0].name}"][0, :2, x0:x1, y0:y1]
    np.testing.assert_array_equal(windows.read([0])[0, 0].numpy(), first)
    scaler = LabelScaler.fit(system, windows.labels)
    batches = Batches(windows, batch_size=2, normaliser=Normaliser.load(base, system), scaler=scaler, size=size)
    assert next(batches.evaluation())["fields"].shape == (2, system.n_channels, 2, size, size)


def test_native_grids_instead_of_the_papers_crop(native, tmp_path, monkeypatch):
    base, name = native
    paper = resolve(name, "supervised", "vit", preset="paper")
    assert paper.clip_shape == (16, 224, 224) and paper.crop == dict(get_system(name).paper)["crop"]
    vit, train = dict(dim=16, depth=1, heads=2, tubelet=(2, 16, 16)), Recipe(steps=1, batch_size=2, lr=1e-3)
    small = replace(get_preset("native"), frames=2, encoders={"vit": vit}, train={"supervised": train})
    monkeypatch.setitem(PRESETS, "native", small)
    run = resolve(name, "supervised", "vit", preset="native", data_dir=base, run_dir=tmp_path)
    assert run.clip.stride == paper.clip.stride == (1 if name == "active_matter" else 4) and run.crop is None
    encoder = load_encoder(pretrain(run, progress=False))
    assert tuple(encoder.info["shape"]) == run.clip_shape == (2, *NATIVE[name][0])


def test_the_papers_graph_and_splits_without_leaks(native, tmp_path, capsys):
    "`make reproduce PRESET=paper DATA=<folder>` finds what is there, and `physrep leak-free` deals it anew."
    base, name = native
    said = dry_run(preset="paper", data=str(base))
    for rule in (f"{name}_jepa_convnext_pretrain", f"{name}_baselines", "05_table1"):
        assert re.search(rf"^{rule}\s+1$", said, re.M), rule
    assert "simulate" not in said
    if name == "shear_flow":
        new = tmp_path / "new"
        assert main(["leak-free", name, str(base), str(new)]) == 0
        assert main(["leak-free", name, str(base), str(base / "datasets")]) == 1
        assert "is there already; name another folder" in capsys.readouterr().err
        for root in (base, new):
            windows = [Windows(root, name, s, frames=FRAMES, in_memory=False) for s in ("train", "valid", "test")]
            assert sum(map(len, windows)) == 12


def test_memory_does_not_grow_with_the_file(tmp_path):
    "A file of 13 GB (sparse: its fields are declared, allocated and never written) and a window from its end."
    grid, parameters, _, coordinates = NATIVE["shear_flow"]
    path, shear = tmp_path / "shear_flow" / "data" / "train" / "large.hdf5", get_system("shear_flow")
    about = dict(parameters=parameters, coordinates=coordinates, initial_conditions=None)
    well_file(path, system=shear, shape=(1, 2, *grid), **about)
    with h5py.File(path, "r+") as file:
        file.attrs["n_trajectories"] = 32
        del file["dimensions/time"]
        file["dimensions/time"] = np.arange(200) * 0.1
        for f in shear.fields:
            key = f"t{f.rank}_fields/{f.name}"
            del file[key]
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            space = h5py.h5s.create_simple((32, 200, *grid, *(2,) * f.rank))
            h5py.h5d.create(file.id, key.encode(), h5py.h5t.NATIVE_FLOAT, space, properties)
    assert path.stat().st_size > 13e9
    code = (
        "import resource, sys; from physrep.data.windows import Windows\n"
        "windows = Windows(sys.argv[1], 'shear_flow', 'train', frames=16, stride=4)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for i in range(0, len(windows), 97): assert windows.read([i]).shape == (1, 4, 16, 256, 512)\n"
        "print(len(windows), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count, grown = done.stdout.split()
    window = 4 * 16 * 256 * 512 * 4 / 2**20
    assert int(count) == 32 * 47 and float(grown) < 6 * window, f"{grown} MiB for windows of {window} MiB"


OWN = System("reaction", "A reaction", (Field("fuel"),), (Label("Damkohler", log=True, paper_log=True),))


def test_larger_grids_of_ones_own_are_resized_and_others_are_as_stored(tmp_path):
    for name, side in (("mine", 32), ("small", 16), ("large", 64)):
        (tmp_path / f"{name}.yaml").write_text(f"base: smoke\nsize: {side}\n")
    preset = get_preset(tmp_path / "mine.yaml")
    for grid, side in (((64, 64), 32), ((32, 32), None), ((16, 64), None)):
        run = resolve(replace(OWN, native=grid), "mae", "vit", preset)
        assert run.clip.size == side and run.clip_shape[1:] == ((side, side) if side else grid) and run.crop is None
    with pytest.raises(ValueError, match="preset mine resizes clips to 32x32, and the grid of reaction is 48x64"):
        resolve(replace(OWN, native=(48, 64)), "mae", "vit", preset)
    for name, side in (("mine", None), ("small", 16), ("large", None)):  # flows are stored on 32x32
        assert resolve("shear_flow", "mae", "vit", tmp_path / f"{name}.yaml").clip.size == side, "never made larger"
    published = replace(preset, sims={})
    assert resolve("shear_flow", "mae", "vit", published).clip.size == 32, "a published grid is cropped, and resized"


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"odd_scalars": (0, "fuel")}, r"odd_scalars must be a tuple such as \(\(axis, scalar\),\)"),
        (
            {"mirror_offsets": ((0, "fuel", 1.0),)},
            r"such as \(\(axis, scalar, a, b\),\)",
        ),
        ({"odd_scalars": ((1, "fuel"),)}, r"odd_scalars holds \(axis, scalar\) of mirror_axes and scalar fields"),
        ({"axes": "xy"}, "axes must be a tuple, got 'xy'"),
        ({"axes": ("x", "x"), "fields": (Field("fuel", 1),)}, "are equal: fuel"),
        ({"axes": ("x", "x")}, "axes must be two different names"),
        ({"paper": (("crop", ((0, 32), (0, 32))),)}, "native must say which grid is cropped"),
    ],
)
def test_slips_in_a_declaration_are_named(change, problem):
    mine = replace(OWN, mirror_axes=(0,))
    assert declaration_problem(mine) == "" and re.search(problem, declaration_problem(replace(mine, **change)))

"""Files of The Well where the notebooks do not look: what is written, refused, read, and told apart."""

import dataclasses
import os
import pickle
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
import yaml
from broken import change, replace, well_file

from physrep.data import sets, well
from physrep.data.batches import Batches, apply_symmetry
from physrep.data.download import check_files
from physrep.data.leakage import find_flows, leakage, write_leak_free
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.sets import STATS, find_files, find_folder, fingerprint, read_stats
from physrep.data.well import RECIPE, UnreadableFileError, WellFile, WellFormatError, open_hdf5
from physrep.data.windows import Windows, check_disjoint
from physrep.data.write import write_stats, write_well
from physrep.physics.systems import SYSTEMS, Field, Label, System, get_system

NX, NY, FRAMES = 12, 10, 9
PARAMETERS = {
    "active_matter": {"L": 10.0, "zeta": 3.0, "alpha": -2.0},
    "shear_flow": {"Reynolds": 1e4, "Schmidt": 0.2},
    "rayleigh_benard": {"Rayleigh": 1e6, "Prandtl": 0.7},
}  # in The Well's order, which is not that of the labels of the system


def make_fields(name, n=3, t=FRAMES, grid=(NX, NY), seed=0):
    rng, fields = np.random.default_rng(seed), {}
    for f in get_system(name).fields:
        scale = 10.0 ** rng.uniform(-2, 1, size=(2,) * f.rank)
        x = rng.standard_normal((n, t, *grid, *(2,) * f.rank)) * scale + rng.uniform(-1, 1)
        fields[f.name] = x.astype(np.float32)
    return fields


def make(path, name="shear_flow", seed=0, n=3, **options):
    given = dict(parameters=PARAMETERS[name], time=0.5 * np.arange(FRAMES), box=(1.0, 2.0))
    given |= dict(fields=make_fields(name, n=n, seed=seed), initial_conditions=np.arange(n) + 40)
    given["coordinates"] = {"y": np.linspace(0, 1, NY)} if name == "rayleigh_benard" else None
    return write_well(path, name, **(given | options))


def refusal(path, name="shear_flow"):
    with pytest.raises(WellFormatError) as error:
        WellFile(path, name)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_written_file_follows_the_format(tmp_path, name):
    "Groups, attributes and types that the format's description and its checker ask for."
    path, system, names = make(tmp_path / "a.hdf5", name), get_system(name), list(PARAMETERS[name])
    with h5py.File(path) as f:
        found = dict(f.attrs) | {"simulation_parameters": list(f.attrs["simulation_parameters"])}
        expected = {"dataset_name": name, "grid_type": "cartesian", "n_spatial_dims": 2, "n_trajectories": 3}
        assert found == expected | PARAMETERS[name] | {"simulation_parameters": names}
        assert list(f["dimensions"].attrs["spatial_dims"]) == ["x", "y"]
        for rank in range(3):
            group = f[f"t{rank}_fields"]
            assert list(group.attrs["field_names"]) == [x.name for x in system.fields if x.rank == rank]
            for dataset in group.values():
                assert dataset.dtype == np.float32 and dataset.shape == (3, FRAMES, NX, NY, *(2,) * rank)
                assert dataset.attrs["dim_varying"].tolist() == [True, True] and dataset.chunks is None
        groups = ("dimensions", "scalars", "boundary_conditions", "t0_fields", "t1_fields", "t2_fields")
        for item in (item for group in groups for item in f[group].values()):
            assert all(isinstance(item.attrs[flag], np.bool_) for flag in ("sample_varying", "time_varying"))
        assert list(f["scalars"].attrs["field_names"]) == names
        for boundary in f["boundary_conditions"].values():
            (axis,) = boundary.attrs["associated_dims"]
            assert boundary.attrs["bc_type"] == system.boundary[system.axes.index(axis)].upper()
            assert boundary["mask"].shape == f["dimensions"][axis].shape and boundary["mask"][[0, -1]].all()


def test_the_same_input_gives_the_same_bytes_also_as_tensors(tmp_path):
    before = make(tmp_path / "a.hdf5").read_bytes()
    fields = {k: torch.from_numpy(v).requires_grad_() for k, v in make_fields("shear_flow").items()}
    changes = dict(fields=fields, time=torch.arange(FRAMES) * 0.5, initial_conditions=torch.arange(3) + 40)
    assert make(tmp_path / "a.hdf5").read_bytes() == make(tmp_path / "b.hdf5", **changes).read_bytes() == before


@pytest.mark.parametrize("existing", [False, True])
def test_a_crash_leaves_what_was_there_before(tmp_path, monkeypatch, existing):
    path = tmp_path / "a.hdf5"
    before = make(path, seed=1).read_bytes() if existing else None
    create, seen = h5py.Group.create_dataset, []

    def crash(self, name, *args, **kwargs):
        if name == "velocity":
            seen.extend(p.name for p in tmp_path.glob("*.h*5"))
            raise OSError("no space left on device")
        return create(self, name, *args, **kwargs)

    monkeypatch.setattr(h5py.Group, "create_dataset", crash)
    with pytest.raises(OSError, match="no space left"):
        make(path)
    assert seen == [p.name for p in tmp_path.iterdir()] == (["a.hdf5"] if existing else [])
    assert not existing or path.read_bytes() == before


GOOD = make_fields("shear_flow")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"parameters": {"Reynolds": 1e4}}, "missing: Schmidt"),
        ({"parameters": {"Reynolds": 1e4, "Schmidt": np.nan}}, "Schmidt must be one finite number"),
        ({"parameters": {"Reynolds": 1e39, "Schmidt": 1.0}}, "Reynolds must be one finite number .in float32."),
        ({"parameters": {"Reynolds": 1e-46, "Schmidt": 1.0}}, "Reynolds must be one finite number .in float32: 1e-38"),
        ({"parameters": {"Reynolds": 0.0, "Schmidt": 1.0}}, "Reynolds must be positive"),
        ({"parameters": PARAMETERS["shear_flow"] | {"n_trajectories": 7}}, "n_trajectories belong to the format"),
        ({"fields": {"tracer": np.zeros((1, 2, 3, 4))}}, "tracer, pressure, velocity"),
        ({"fields": GOOD | {"velocity": np.zeros((3, FRAMES, NX, NY, 3))}}, "velocity must be"),
        ({"fields": GOOD | {"pressure": np.full((3, FRAMES, NX, NY), np.inf)}}, "pressure of trajectory 0 holds NaN"),
        ({"time": np.zeros(FRAMES)}, "time must be finite, increasing"),
        ({"box": None}, r"give coordinates\['x'\] or a box"),
        ({"coordinates": {"z": np.arange(3)}}, "coordinates of z"),
        ({"coordinates": {"x": np.arange(3)}}, r"coordinates\['x'\] must be finite, increasing"),
        ({"name": "rayleigh_benard", "coordinates": None}, r"coordinates\['y'\]: the nodes between walls"),
        ({"attributes": {"dataset_name": "mine"}}, "dataset_name belong"),
        ({"initial_conditions": [1, 2]}, "must be 3 integers"),
        ({"initial_conditions": [0.2, 0.4, 0.6]}, "must be 3 integers, got an array float64"),
        ({"path": "a.nc"}, ".hdf5 or .h5"),
    ],
)
def test_wrong_input_is_refused_before_writing(tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says):
        make(tmp_path / wrong.get("path", "a.hdf5"), **{k: v for k, v in wrong.items() if k != "path"})
    assert not list(tmp_path.iterdir())


def test_a_file_holds_any_number_of_labelled_trajectories(tmp_path):
    labels = {"Reynolds": np.arange(1.0, 8301.0), "Schmidt": 1.0}
    path = well_file(tmp_path / "a.hdf5", shape=(8300, 1, 2, 2), parameters=labels)
    assert np.array_equal(WellFile(path, "shear_flow").labels["Reynolds"], labels["Reynolds"])


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2"])
def test_other_number_formats_and_a_user_block(tmp_path, dtype):
    "One field in another format: read by HDF5, the others still plain, the values those of a cast to float32."
    new = np.random.default_rng(5).standard_normal((3, FRAMES, NX, NY, 2)).astype(dtype)
    with h5py.File(make(tmp_path / "a.hdf5")) as a, h5py.File(tmp_path / "b.hdf5", "w", userblock_size=4096) as b:
        b.attrs.update(a.attrs)
        for key in a:
            a.copy(key, b)
        del b["t1_fields/velocity"]
        b["t1_fields/velocity"] = new
    window = WellFile(tmp_path / "b.hdf5", "shear_flow").window(1, 2, 4, crop=((1, 9), (2, 10)))
    assert (window[2:] == np.moveaxis(new[1, 2:6, 1:9, 2:10].astype(np.float32), -1, 0)).all()
    assert (window[0] == GOOD["tracer"][1, 2:6, 1:9, 2:10]).all()


def test_a_file_travels_and_one_that_changes_or_shrinks_is_noticed(tmp_path, monkeypatch):
    path = make(tmp_path / "a.hdf5")
    file = pickle.loads(pickle.dumps(WellFile(path, "shear_flow")))
    assert (file.window(1, 0, 5) == WellFile(path, "shear_flow").window(1, 0, 5)).all()
    make(path, n=1)
    with pytest.raises(WellFormatError, match="changed since it was opened"):
        file.window(2, 0, 5)
    file = WellFile(make(path), "shear_flow")
    monkeypatch.setattr(well, "state_of", lambda path: file._states[path])
    os.truncate(path, path.stat().st_size // 2)  # after the check: an error with a name, no bus error and no zeros
    with pytest.raises(WellFormatError, match="a.hdf5: truncated"):
        file.window(2, 0, 5)


def test_labels_and_times_by_name_order_and_alias_that_may_vary(tmp_path):
    path = make(tmp_path / "a.hdf5", parameters={"Schmidt": 0.1, "Reynolds": 3e5})
    assert WellFile(path, "shear_flow").labels == {"Reynolds": 3e5, "Schmidt": 0.1}
    # a list of names that went stale says Rayleigh while the dataset is called Reynolds
    names = np.array(["Rayleigh", "Schmidt"], dtype=h5py.string_dtype())
    change(path, lambda f: f["scalars"].attrs.modify("field_names", names))
    assert WellFile(path, "shear_flow").labels["Reynolds"] == 3e5
    change(path, lambda f: f["scalars"].move("Reynolds", "Rayleigh"))
    assert WellFile(path, "shear_flow").labels["Reynolds"] == 3e5
    # in Rayleigh-Benard convection Rayleigh is a name of its own, Reynolds none
    wrong = change(make(tmp_path / "d.hdf5", "rayleigh_benard"), lambda f: f["scalars"].move("Rayleigh", "Reynolds"))
    assert "no label 'Rayleigh'" in refusal(wrong, "rayleigh_benard")
    time = 0.5 * np.arange(FRAMES) + np.arange(3)[:, None]
    file = WellFile(make(path, parameters={"Reynolds": [1e4, 2e4, 3e4], "Schmidt": 0.2}, time=time), "shear_flow")
    assert file.label_table().tolist() == [[1e4, 0.2], [2e4, 0.2], [3e4, 0.2]]
    assert file.time.shape == (3, FRAMES) and file.dt == 0.5


@pytest.mark.parametrize("key", ["scalars/Schmidt", "dimensions/time", "dimensions/y", "physrep_initial_condition"])
def test_numbers_outside_of_the_file_are_not_those_of_whatever_lies_in_the_current_folder(tmp_path, monkeypatch, key):
    def outside(file):
        shape, dtype = file[key].shape or (3,), file[key].dtype
        del file[key]
        file.create_dataset(key, shape, dtype, external=[("numbers", 0, h5py.h5f.UNLIMITED)])

    path = change(make(tmp_path / "a.hdf5"), outside)
    np.arange(1, 99, dtype="f4").tofile(tmp_path / "numbers")
    monkeypatch.chdir(tmp_path)
    assert f"{key} is the bytes of numbers; copy" in refusal(path)


def test_points_in_nanometres_are_as_even_as_those_in_metres(tmp_path):
    uneven = np.array([0.0, 1, 2, 3, 4, 6, 7, 8])
    for unit in (1.0, 1e-9):
        path = change(well_file(tmp_path / f"{unit}.hdf5"), replace("dimensions/x", uneven * unit))
        assert np.isnan(WellFile(path, "shear_flow").spacing[0])


def test_the_spacing_of_a_square_box_on_an_uneven_grid_is_that_of_the_file(tmp_path):
    "A published shear flow has a box of 1 x 2 whose longer axis is labelled from 0 to 1; one that we wrote has not."
    fields = make_fields("shear_flow", grid=(8, 16))
    path = make(tmp_path / "a.hdf5", fields=fields, box=(1.0, 1.0), initial_conditions=None)
    assert WellFile(path, "shear_flow").spacing == (0.125, 0.0625)
    assert WellFile(change(path, lambda f: f.attrs.pop("written_by")), "shear_flow").spacing == (0.125, 0.125)


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    path = make(tmp_path / "shear_flow" / "data" / "train" / "a.hdf5")
    writes = "import h5py, sys, time; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", writes, str(path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "open\n"
            with pytest.raises(UnreadableFileError, match="a.hdf5: cannot be read here and now: .*lock"):
                WellFile(path, "shear_flow")
            (problem,) = check_files(tmp_path / "shear_flow", "shear_flow", remove=True)
            assert "cannot be read here and now" in problem and path.is_file(), "another copy would not help"
        finally:
            other.kill()
    assert WellFile(path, "shear_flow").n_trajectories == 3
    stale, memory = "file read failed: errno = 116, error message = 'Stale file handle'", "memory allocation failed"
    for kind, said in (
        (RuntimeError, f"Can't get number of chunks ({stale})"),
        (OSError, f"Can't read data ({memory})"),
    ):
        with pytest.raises(UnreadableFileError, match="a.hdf5: cannot be read here and now"), open_hdf5(path):
            raise kind(said)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(well, "open_bytes", refuse)
    with pytest.raises(UnreadableFileError, match="a.hdf5: cannot be read here and now: .*Permission denied"):
        WellFile(path, "shear_flow")


def declared(**storage):
    "A field that is there, and has no numbers, or not all."

    def edit(file):
        del file["t0_fields/pressure"]
        field = file["t0_fields"].create_dataset("pressure", (3, FRAMES, NX, NY), "f4", **storage)
        if storage:
            field[:2] = 1.0

    return edit


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        *((lambda p, k=k: os.truncate(p, int(p.stat().st_size * k)), "truncated") for k in (0.001, 0.3, 0.9999)),
        (lambda p: change(p, declared()), "/t0_fields/pressure was declared but not"),
        (lambda p: change(p, declared(chunks=(1, FRAMES, NX, NY))), "/t0_fields/pressure was declared but not"),
        (lambda p: change(p, replace("t0_fields/pressure", np.zeros((3, 8, NX, NY), "f4"))), "pressure must be"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "Git LFS pointer"),
        (lambda p: change(p, lambda f: f.attrs.modify("dataset_name", "my_flow")), "write dataset_name = 'shear_flow'"),
        (lambda p: make(p, "active_matter"), "dataset_name is 'active_matter', shear_flow was asked for"),
    ],
)
def test_files_that_are_refused(tmp_path, spoil, says):
    path = make(tmp_path / "a.hdf5")
    spoil(path)
    assert says in refusal(path)


def test_a_damaged_chunk_names_the_file(tmp_path):
    path = make(tmp_path / "a.hdf5", compression="gzip")
    with h5py.File(path) as f:
        chunk = f["t0_fields/tracer"].id.get_chunk_info(0)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(bytes(chunk.size))
    with pytest.raises(WellFormatError, match="a.hdf5: truncated or damaged"):
        WellFile(path, "shear_flow").window(0, 0, 2)


@pytest.mark.parametrize("layout", ["shear_flow", "datasets/shear_flow", "."])
def test_find_files(tmp_path, layout):
    folder = tmp_path / layout / "data" / "train"
    expected = [make(folder / name) for name in ("b.h5", "a.hdf5")]
    for name in ("notes.txt", ".d.hdf5.17.partial", "._a.hdf5"):
        (folder / name).write_text("not data")
    assert find_files(tmp_path, "shear_flow", "train") == sorted(expected)
    for split in ("valid", "t*"):  # a name, no pattern: splits are not mixed
        with pytest.raises(FileNotFoundError, match=f"splits with files: {folder}"):
            find_files(tmp_path, "shear_flow", split)
    for read in (find_folder, read_stats):
        with pytest.raises(NotADirectoryError, match="a.hdf5 is a file; give the folder that holds shear_flow/data/"):
            read(folder / "a.hdf5", "shear_flow")


@pytest.mark.parametrize("name", SYSTEMS)
def test_statistics(tmp_path, monkeypatch, name):
    "Against one computation over all, with blocks of two frames and files of unequal size, as The Well keys them."
    monkeypatch.setattr("physrep.data.write._BLOCK_BYTES", 2 * 4 * get_system(name).n_channels * NX * NY)
    parts = [make_fields(name, n=n, seed=n) for n in (3, 1)]
    for i, fields in enumerate(parts):
        make(tmp_path / name / f"data/train/{i}.hdf5", name, n=(3, 1)[i], fields=fields)
    path = write_stats(tmp_path, name)
    assert path == tmp_path / name / "stats.yaml" and tuple(yaml.safe_load(path.read_text())) == STATS
    stats = read_stats(path, name)
    for f in get_system(name).fields:
        x = np.concatenate([p[f.name] for p in parts]).astype(np.float64)
        for suffix, y in (("", x), ("_delta", np.diff(x, axis=1))):
            axes = (0, 1, 2, 3)
            for key, value in {"mean": y.mean(axes), "std": y.std(axes), "rms": np.sqrt((y**2).mean(axes))}.items():
                np.testing.assert_allclose(stats[key + suffix][f.name], value, rtol=1e-9, atol=1e-12)


def test_statistics_that_cannot_be_or_are_not_complete(tmp_path):
    one = {k: v[:, :1] for k, v in GOOD.items()}
    path = make(tmp_path / "data/train/a.hdf5", fields=one, time=[0.0])
    with pytest.raises(ValueError, match="single frames"):
        write_stats(tmp_path, "shear_flow")
    change(make(path), lambda f: f["t0_fields/tracer"].__setitem__((1, 4, 2, 2), np.nan))
    with pytest.raises(WellFormatError, match="a.hdf5: NaN or infinity in trajectory 1"):
        write_stats(tmp_path, "shear_flow")
    with pytest.raises(FileNotFoundError, match="no statistics of shear_flow"):
        read_stats(tmp_path, "shear_flow")
    make(path)
    good = yaml.safe_load(write_stats(tmp_path, "shear_flow").read_text())
    for field, value in (("velocity", 1.0), ("tracer", None), ("tracer", float("nan"))):
        (tmp_path / "stats.yaml").write_text(yaml.safe_dump(good | {"std": good["std"] | {field: value}}))
        with pytest.raises(WellFormatError, match=f"stats.yaml: std of {field} must be finite numbers of shape"):
            read_stats(tmp_path, "shear_flow")
    # the published form, four decimals and a signed exponent
    published = {k: {n: np.vectorize(lambda v: f"{v:.4E}")(v).tolist() for n, v in m.items()} for k, m in good.items()}
    (tmp_path / "stats.yaml").write_text(yaml.safe_dump(published).replace("'", ""))
    for key, by_field in read_stats(tmp_path, "shear_flow").items():
        for name, value in by_field.items():
            np.testing.assert_allclose(value, good[key][name], rtol=1e-4)


def test_a_fingerprint_is_of_the_values_and_nothing_else(tmp_path):
    big = {"fields": make_fields("shear_flow", grid=(40, 48))}

    def fresh(folder):
        return [make(tmp_path / folder / f"data/{split}/a.hdf5", seed=i, **big) for i, split in enumerate("tv")]

    files = fresh("one")
    original = fingerprint(files)
    assert original == fingerprint(files[::-1]) == fingerprint(fresh("two")) and len(original) == 16
    before, turned = os.stat(files[0]), lambda f: f["t0_fields/tracer"].__setitem__((0, 0, 0, 0), 3.0)
    change(files[0], turned)  # in place: the same size, and then the same time of the last change
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(files[0]).st_size == before.st_size and fingerprint(files) != original
    prints = {original, fingerprint(files[:1])}
    changes = [
        ("t0_fields/tracer", (0, 0, 0, 0), 9.0),
        ("t1_fields/velocity", (-1,) * 5, 9.0),
        ("scalars/Schmidt", (), 0.3),
    ]
    changes += [("dimensions/time", 3, 1.51), ("physrep_initial_condition", 1, 7)]
    for i, (key, place, value) in enumerate(changes):
        changed = fresh(f"changed{i}")
        change(changed[1], lambda f, key=key, place=place, value=value: f[key].__setitem__(place, value))
        prints.add(fingerprint(changed))
    assert len(prints) == 7
    files[0].write_text("<html>")
    with pytest.raises(WellFormatError, match="web page"):
        fingerprint(files)


@pytest.mark.parametrize("n", [1, 6, 9])
def test_a_fingerprint_sees_any_field_of_any_trajectory(n, tmp_path):
    path = make(tmp_path / "a.hdf5", n=n, fields=make_fields("shear_flow", n=n, grid=(40, 48)))
    prints = {fingerprint([path])}
    for k in range(n):
        for key in ("t0_fields/tracer", "t0_fields/pressure", "t1_fields/velocity"):
            with h5py.File(path, "r+") as file:
                kept = file[key][k]
                file[key][k] = 0
            sets._KNOWN.clear()  # several changes may be within one tick of the clock
            prints.add(fingerprint([path]))
            with h5py.File(path, "r+") as file:
                file[key][k] = kept
    assert len(prints) == 1 + 3 * n


@pytest.mark.parametrize("recipe", [{}, {RECIPE: "0123456789abcdef"}])
def test_a_link_and_a_copy_of_a_file_have_one_fingerprint(recipe, tmp_path):
    path = make(tmp_path / "one" / "a.hdf5", attributes=recipe)
    link, copy = tmp_path / "linked.hdf5", tmp_path / "copied.hdf5"
    link.symlink_to(path)
    shutil.copy(path, copy)
    assert fingerprint([path]) == fingerprint([link]) == fingerprint([copy])
    other = make(tmp_path / "other.hdf5", attributes=recipe, initial_conditions=[5, 6, 7])
    assert fingerprint([path]) != fingerprint([other])


# ---- a system of one's own

OWN = System(
    name="reaction",
    title="A reaction",
    fields=(Field("fuel"), Field("product"), Field("heat")),
    labels=(Label("Damkohler", log=True, paper_log=True),),
)  # not in SYSTEMS; without crop, native grid and numbers of a paper
WALLED = dataclasses.replace(
    OWN, name="channel", fields=(Field("heat"), Field("velocity", 1)), boundary=("periodic", "wall")
)
HEIGHTS = np.linspace(-1, 1, 48)


def make_own(root, system=OWN, y=HEIGHTS):
    for number, split in enumerate(("train", "valid", "test")):
        for value in (1.0, 10.0):
            path = root / system.name / "data" / split / f"Damkohler_{value:g}.hdf5"
            options = dict(parameters={"Damkohler": value}, box=(4.0, 3.0), initial_conditions=None)
            if system.boundary[1] == "wall":
                options["coordinates"] = {"y": y}
            well_file(path, number + int(10 * value), system, (2, 6, 64, len(y)), **options)
    return root


@pytest.mark.parametrize("system", [OWN, WALLED], ids=lambda s: s.name)
def test_a_system_of_ones_own_from_files_to_batches(tmp_path, system):
    root = make_own(tmp_path, system)
    files = find_files(root, system, "train")
    assert len(files) == 2 and find_files(root / system.name, system, "train") == files
    assert write_stats(root, system) == tmp_path / system.name / "stats.yaml"
    walls = system.boundary[1] == "wall"
    with h5py.File(files[0], "r+") as file:  # names of axes may be bytes of fixed length
        file["dimensions"].attrs["spatial_dims"] = np.array(["x", "y"], dtype="S")
    windows = Windows(root, system, "train", frames=4, stride=2)
    assert np.allclose(windows.positions, HEIGHTS) if walls else windows.positions is None
    check_disjoint(windows, Windows(root, system, "test", frames=4))
    normaliser, scaler = Normaliser.load(root, system), LabelScaler.fit(system, windows.labels, root)
    batch = next(Batches(windows, batch_size=4, normaliser=normaliser, scaler=scaler, augment=True)(0))
    assert batch["fields"].shape == (4, 3, 4, 64, 48) and batch["labels"].shape == (4, 1)
    assert check_files(root / system.name, system) == []


@pytest.mark.parametrize("group", [(), ("Damkohler",)])
def test_leaks_of_a_system_of_ones_own(tmp_path, group):
    "With and without labels that make a group, though the system has no velocity."
    system = dataclasses.replace(OWN, group=group)
    root = make_own(tmp_path / "published", system)
    shutil.copy(find_files(root, system, "train")[0], find_files(root, system, "test")[0])
    found = leakage(find_flows(root, system))
    assert found.loc["test", "train"] == 2 and found.loc["valid"].drop("trajectories").sum() == 0
    write_leak_free(root, tmp_path / "view", system)
    check_disjoint(*(Windows(tmp_path / "view", system, split, frames=4) for split in ("train", "valid", "test")))


def test_walls_are_no_periodic_boundary_and_mirror_images_need_heights_from_0_to_1(tmp_path):
    path = find_files(make_own(tmp_path, WALLED), WALLED, "train")[0]
    mirrored = dataclasses.replace(WALLED, mirror_axes=(1,), mirror_offsets=((1, "heat", 1.0, 0.0),))
    with pytest.raises(WellFormatError, match="increasing heights between the walls at 0 and 1, it runs from -1 to 1"):
        WellFile(path, mirrored)
    own = dataclasses.replace(WALLED, mirror_axes=(1,))
    x, still = torch.zeros(1, 3, 2, 64, 48), np.zeros((1, 2), int)
    apply_symmetry(x, still, still == 0, dataclasses.replace(own, mirror_axes=(0, 1)), WellFile(path, own).positions)
    with pytest.raises(ValueError, match="positions along y must be 48 points that lie symmetrically, .* of channel"):
        apply_symmetry(x, still, still == 1, own, HEIGHTS * (HEIGHTS + 3))
    shifted = dataclasses.replace(WALLED, boundary=("periodic", "periodic"))
    with pytest.raises(WellFormatError, match="boundaries along y are WALL, and .* declares 'periodic'; "):
        WellFile(path, shifted)
    with pytest.raises(WellFormatError, match="boundaries along x are PERIODIC, and .* declares 'wall'; "):
        WellFile(path, dataclasses.replace(WALLED, boundary=("wall", "wall")))
    change(path, lambda f: f.pop("boundary_conditions/y_wall_dirichlet"))
    assert WellFile(path, shifted).grid == (64, 48), "nothing is said of y"

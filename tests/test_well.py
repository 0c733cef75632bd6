"""Files of The Well: what is written, what is refused, what is read, and that the_well's own reader agrees."""

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
from the_well.data import WellDataset
from the_well.data.normalization import RMSNormalization, ZScoreNormalization

from physrep.data import well
from physrep.data.batches import Batches
from physrep.data.download import check_files
from physrep.data.leakage import data_report, find_flows, leakage, write_leak_free
from physrep.data.scaling import LabelScaler, Normaliser
from physrep.data.sets import STATS, find_files, find_folder, fingerprint, read_stats
from physrep.data.well import UnreadableFileError, WellFile, WellFormatError
from physrep.data.windows import Windows, check_disjoint
from physrep.data.write import write_stats, write_well
from physrep.physics.statistics import spectra, summary_statistics
from physrep.physics.systems import SYSTEMS, Field, Label, System, get_system
from physrep.probing.evaluate import measure

SHEAR = get_system("shear_flow")
NX, NY, FRAMES = 12, 10, 9
PARAMETERS = {
    "active_matter": {"L": 10.0, "zeta": 3.0, "alpha": -2.0},
    "shear_flow": {"Reynolds": 1e4, "Schmidt": 0.2},
    "rayleigh_benard": {"Rayleigh": 1e6, "Prandtl": 0.7},
}  # in The Well's order, which is not that of the labels of the system


def make_fields(name, n=3, t=FRAMES, grid=(NX, NY), seed=0):
    rng = np.random.default_rng(seed)
    fields = {}
    for f in get_system(name).fields:
        scale = 10.0 ** rng.uniform(-2, 1, size=(2,) * f.rank)
        fields[f.name] = (rng.standard_normal((n, t, *grid, *(2,) * f.rank)) * scale + rng.uniform(-1, 1)).astype(
            np.float32
        )
    return fields


def make(path, name="shear_flow", seed=0, n=3, **options):
    arguments = {
        "fields": make_fields(name, n=n, seed=seed),
        "parameters": PARAMETERS[name],
        "time": 0.5 * np.arange(FRAMES),
        "box": (1.0, 2.0),
        "coordinates": {"y": np.linspace(0, 1, NY)} if name == "rayleigh_benard" else None,
        "initial_conditions": np.arange(n) + 40,
    }
    return write_well(path, name, **(arguments | options))


def channels_of(name, fields):
    "Reference for `window`: (B, c, T, x, y), built without physrep's reader."
    parts = [np.moveaxis(fields[f.name].reshape(*fields[f.name].shape[:4], -1), -1, 1) for f in get_system(name).fields]
    return np.concatenate(parts, axis=1)


def edited(path, change):
    "Apply `change(h5py.File)` to a file."
    with h5py.File(path, "r+") as f:
        change(f)
    return path


def refusal(path, name="shear_flow"):
    with pytest.raises(WellFormatError) as error:
        WellFile(path, name)
    assert str(path) in str(error.value)
    return str(error.value)


# ---- written files


@pytest.mark.parametrize("name", SYSTEMS)
def test_written_file_follows_the_format(tmp_path, name):
    "Every group, attribute and type that the format's description and its checker ask for."
    path, system = make(tmp_path / "a.hdf5", name), get_system(name)
    with h5py.File(path) as f:
        assert f.attrs["dataset_name"] == name and f.attrs["grid_type"] == "cartesian"
        assert f.attrs["n_spatial_dims"] == 2 and f.attrs["n_trajectories"] == 3
        assert list(f.attrs["simulation_parameters"]) == list(PARAMETERS[name])
        assert {p: f.attrs[p] for p in PARAMETERS[name]} == PARAMETERS[name]
        axes = f["dimensions"].attrs["spatial_dims"]
        assert list(axes) == ["x", "y"] and isinstance(axes, np.ndarray) and isinstance(axes[0], str)
        assert (
            f["dimensions/time"].shape == (FRAMES,)
            and f["dimensions/x"].shape == (NX,)
            and f["dimensions/y"].shape == (NY,)
        )
        for rank in range(3):
            group = f[f"t{rank}_fields"]
            assert list(group.attrs["field_names"]) == [x.name for x in system.fields if x.rank == rank]
            for dataset in group.values():
                assert dataset.dtype == np.float32 and dataset.shape == (3, FRAMES, NX, NY, *(2,) * rank)
                assert (
                    dataset.attrs["dim_varying"].tolist() == [True, True] and dataset.attrs["dim_varying"].dtype == bool
                )
                assert dataset.chunks is None and dataset.id.get_offset() % 4 == 0
        flagged = [*f["dimensions"].values(), *f["scalars"].values(), *f["boundary_conditions"].values()]
        flagged += [dataset for rank in range(3) for dataset in f[f"t{rank}_fields"].values()]
        for item in flagged:
            assert isinstance(item.attrs["sample_varying"], np.bool_) and isinstance(
                item.attrs["time_varying"], np.bool_
            )
        assert list(f["scalars"].attrs["field_names"]) == list(PARAMETERS[name])
        assert all(f["scalars"][p].shape == () and f["scalars"][p].dtype == np.float32 for p in PARAMETERS[name])
        assert len(f["boundary_conditions"]) == 2
        for boundary in f["boundary_conditions"].values():
            (axis,) = boundary.attrs["associated_dims"]
            assert isinstance(boundary.attrs["associated_fields"], np.ndarray)
            assert boundary.attrs["bc_type"] == system.boundary[system.axes.index(axis)].upper()
            assert boundary["mask"].dtype == bool and boundary["mask"].shape == f["dimensions"][axis].shape


@pytest.mark.parametrize("normalization", [ZScoreNormalization, RMSNormalization])
@pytest.mark.parametrize("name", SYSTEMS)
def test_well_dataset_reads_the_same_values(tmp_path, name, normalization):
    "the_well loads our files and statistics; every value of every window is that of our reader, normalised alike."
    system = get_system(name)
    for i in range(2):
        make(tmp_path / name / f"data/train/{i}.hdf5", name, seed=i)
    write_stats(tmp_path, name)
    stats = read_stats(tmp_path, name)
    z_scores = normalization is ZScoreNormalization
    by_channel = {k: np.concatenate([stats[k][f.name].ravel() for f in system.fields]) for k in ("mean", "std", "rms")}
    shift = by_channel["mean"] * z_scores
    scale = np.maximum(by_channel["std" if z_scores else "rms"], 1e-4)
    theirs = WellDataset(
        well_base_path=str(tmp_path),
        well_dataset_name=name,
        well_split_name="train",
        n_steps_input=2,
        n_steps_output=3,
        use_normalization=True,
        normalization_type=normalization,
    )
    flat = theirs.metadata.field_names
    assert [c for rank in range(3) for c in flat[rank]] == system.channels
    files = [WellFile(p, name) for p in find_files(tmp_path, name, "train")]
    windows = [(f, b, s) for f in files for b in range(3) for s in range(FRAMES - 4)]
    assert len(theirs) == len(windows)
    for item, (f, b, s) in zip((theirs[i] for i in range(len(theirs))), windows):
        sample = np.concatenate([item["input_fields"], item["output_fields"]])
        ours = (f.window(b, s, 5) - shift.reshape(-1, 1, 1, 1)) / scale.reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(np.moveaxis(sample, -1, 0), ours, rtol=1e-4, atol=1e-5)
    codes = {"periodic": 2, "wall": 0}
    assert item["boundary_conditions"].tolist() == [[codes[kind]] * 2 for kind in system.boundary]
    np.testing.assert_allclose(item["constant_scalars"], list(PARAMETERS[name].values()), rtol=1e-6)
    np.testing.assert_allclose(item["output_time_grid"], 0.5 * np.arange(2, 5))
    assert files[0].labels == {label: PARAMETERS[name][label] for label in system.label_names}
    assert files[0].label_table().tolist() == [[PARAMETERS[name][label] for label in system.label_names]] * 3


def test_same_input_gives_the_same_bytes(tmp_path):
    assert make(tmp_path / "a.hdf5").read_bytes() == make(tmp_path / "b.hdf5").read_bytes()


def test_tensors_are_accepted(tmp_path):
    fields = {k: torch.from_numpy(v).requires_grad_() for k, v in make_fields("shear_flow").items()}
    path = make(
        tmp_path / "a.hdf5", fields=fields, time=torch.arange(FRAMES) * 0.5, initial_conditions=torch.arange(3) + 40
    )
    assert path.read_bytes() == make(tmp_path / "b.hdf5").read_bytes()


@pytest.mark.parametrize("existing", [False, True])
def test_a_crash_leaves_no_file(tmp_path, monkeypatch, existing):
    "A crash in the middle of writing leaves what was there before, and nothing else."
    path = tmp_path / "a.hdf5"
    before = make(path, seed=1).read_bytes() if existing else None
    create, calls = h5py.Group.create_dataset, []

    def crash(self, name, *args, **kwargs):
        if name == "velocity":
            calls.append([p.name for p in tmp_path.glob("*.h*5")])
            raise OSError("no space left on device")
        return create(self, name, *args, **kwargs)

    monkeypatch.setattr(h5py.Group, "create_dataset", crash)
    with pytest.raises(OSError, match="no space left"):
        make(path)
    assert calls == [["a.hdf5"] if existing else []]  # a reader that looks meanwhile sees no half file
    assert [p.name for p in tmp_path.iterdir()] == (["a.hdf5"] if existing else [])
    assert not existing or path.read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"parameters": {"Reynolds": 1e4}}, "missing: Schmidt"),
        ({"parameters": {"Reynolds": 1e4, "Schmidt": np.nan}}, "Schmidt must be one finite number"),
        ({"parameters": {"Reynolds": 1e4, "Schmidt": [1.0, 2.0]}}, "Schmidt must be"),
        ({"fields": {"tracer": np.zeros((1, 2, 3, 4))}}, "tracer, pressure, velocity"),
        ({"fields": make_fields("shear_flow") | {"pressure": np.zeros((3, FRAMES, NX, NY + 1))}}, "pressure must be"),
        ({"fields": make_fields("shear_flow") | {"velocity": np.zeros((3, FRAMES, NX, NY, 3))}}, "velocity must be"),
        (
            {"fields": make_fields("shear_flow") | {"pressure": np.full((3, FRAMES, NX, NY), np.inf)}},
            "pressure of trajectory 0",
        ),
        ({"time": np.zeros(FRAMES)}, "increasing"),
        ({"box": None}, r"coordinates\['x'\] or a box"),
        ({"coordinates": {"z": np.arange(3)}}, "coordinates of z"),
        ({"coordinates": {"x": np.arange(3)}}, "must be 12 finite, increasing numbers"),
        ({"attributes": {"dataset_name": "mine"}}, "dataset_name belong"),
        ({"initial_conditions": [1, 2]}, "must be 3 integers"),
    ],
)
def test_wrong_input_is_refused_before_writing(tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says):
        make(tmp_path / "a.hdf5", **wrong)
    assert not list(tmp_path.iterdir())


def test_walls_need_coordinates_and_names_an_ending(tmp_path):
    with pytest.raises(ValueError, match=r"coordinates\['y'\]: the nodes between walls"):
        make(tmp_path / "a.hdf5", "rayleigh_benard", coordinates=None)
    with pytest.raises(ValueError, match=".hdf5 or .h5"):
        make(tmp_path / "a.nc")


# ---- windows


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize(
    "layout", [{}, {"chunks": (1, 4, 5, 10)}, {"compression": "gzip"}, {"compression": "lzf", "chunks": (2, 2, 12, 3)}]
)
def test_windows_are_the_written_values(tmp_path, name, layout):
    file = WellFile(make(tmp_path / "a.h5", name, **layout), name)
    whole = channels_of(name, make_fields(name))
    assert file.contiguous == (not layout)
    assert (file.n_trajectories, file.n_frames, file.grid, file.dt) == (3, FRAMES, (NX, NY), 0.5)
    assert file.initial_conditions.tolist() == [40, 41, 42]
    slots = np.full((2, file.system.n_channels, 3, 5, 4), np.nan, dtype=np.float32)
    for b, start, stride, crop in [
        (0, 0, 1, None),
        (2, 6, 1, None),
        (1, 0, 4, ((0, 5), (6, 10))),
        (2, 1, 2, ((7, 12), (0, 4))),
    ]:
        (x0, x1), (y0, y1) = crop or ((0, NX), (0, NY))
        expected = whole[b][:, start : start + 2 * stride + 1 : stride, x0:x1, y0:y1]
        got = file.window(b, start, 3, stride, crop)
        assert got.dtype == np.float32 and got.shape == expected.shape and (got == expected).all()
        if crop:
            assert np.shares_memory(file.window(b, start, 3, stride, crop, out=slots[1]), slots)
            assert (slots[1] == expected).all() and np.isnan(slots[0]).all()
    buffer = torch.zeros(2, *file.window(0, 0, 3).shape)
    file.window(1, 2, 3, out=buffer.numpy()[1])
    assert (buffer[1].numpy() == whole[1][:, 2:5]).all() and not buffer[0].any()


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2"])
def test_other_number_formats(tmp_path, dtype):
    "One field in another format: read by HDF5, the others still mapped, the values those of a cast to float32."
    path = make(tmp_path / "a.hdf5")
    new = np.random.default_rng(5).standard_normal((3, FRAMES, NX, NY, 2)).astype(dtype)

    def change(f):
        del f["t1_fields/velocity"]
        f["t1_fields/velocity"] = new

    file = WellFile(edited(path, change), "shear_flow")
    assert not file.contiguous
    window = file.window(1, 2, 4, crop=((1, 9), (2, 10)))
    assert (window[2:] == np.moveaxis(new[1, 2:6, 1:9, 2:10].astype(np.float32), -1, 0)).all()
    assert (window[0] == make_fields("shear_flow")["tracer"][1, 2:6, 1:9, 2:10]).all()


def test_user_block_and_odd_offsets(tmp_path):
    "An array that starts after a user block, at whatever byte, is found."
    source, path = make(tmp_path / "a.hdf5"), tmp_path / "b.hdf5"
    with h5py.File(source) as a, h5py.File(path, "w", userblock_size=1024) as b:
        for key, value in a.attrs.items():
            b.attrs[key] = value
        for key in a:
            a.copy(key, b)
    file = WellFile(path, "shear_flow")
    assert file.contiguous and (file.window(2, 1, 5) == WellFile(source, "shear_flow").window(2, 1, 5)).all()


def test_windows_that_do_not_exist(tmp_path):
    file = WellFile(make(tmp_path / "a.hdf5"), "shear_flow")
    good = {"trajectory": 0, "start": 0, "n_frames": 2}
    for wrong in (
        {"trajectory": 3},
        {"trajectory": -1},
        {"start": -1},
        {"start": 8},
        {"n_frames": 0},
        {"stride": 0},
        {"stride": 9},
        {"crop": ((0, 13), (0, 10))},
        {"crop": ((3, 3), (0, 10))},
        {"out": np.empty((4, 3, NX, NY), dtype=np.float32)},
        {"out": np.empty((4, 2, NX, NY))},
    ):
        with pytest.raises(ValueError):
            file.window(**(good | wrong))


def test_a_file_is_a_few_kilobytes_and_travels(tmp_path):
    "No handle, no map: pickles small, reads after that, and open files and maps do not grow in number."
    file = WellFile(make(tmp_path / "a.hdf5"), "shear_flow")
    blob = pickle.dumps(file)
    assert len(blob) < 8000
    again = pickle.loads(blob)
    assert (again.window(1, 0, 5) == file.window(1, 0, 5)).all()
    if os.path.isdir("/proc/self/fd"):
        files = [WellFile(file.path, "shear_flow") for _ in range(30)]
        for f in files:
            f.window(0, 0, 5)
        with open("/proc/self/maps") as maps:
            assert str(file.path) not in maps.read()
        assert str(file.path) not in [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]


def test_a_file_that_changes_is_noticed(tmp_path):
    file = WellFile(make(tmp_path / "a.hdf5"), "shear_flow")
    make(tmp_path / "a.hdf5", n=1)
    with pytest.raises(WellFormatError, match="changed since it was opened"):
        file.window(2, 0, 5)


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    "After the check, and before the last byte: an error with a name, no bus error and no zeros."
    file = WellFile(make(tmp_path / "a.hdf5"), "shear_flow")
    monkeypatch.setattr("physrep.data.well._state_of", lambda path: file._state)
    os.truncate(file.path, file.path.stat().st_size // 2)
    with pytest.raises(WellFormatError, match="a.hdf5: truncated"):
        file.window(2, 0, 5)


# ---- labels and time


def test_labels_by_name_order_and_alias(tmp_path):
    shuffled = make(tmp_path / "a.hdf5", parameters={"Schmidt": 0.1, "Reynolds": 3e5})
    assert WellFile(shuffled, "shear_flow").labels == {"Reynolds": 3e5, "Schmidt": 0.1}
    alias = make(tmp_path / "b.hdf5")
    edited(alias, lambda f: f["scalars"].move("Reynolds", "Rayleigh"))
    assert WellFile(alias, "shear_flow").labels == {"Reynolds": 1e4, "Schmidt": 0.2}
    # a list of names that went stale says Rayleigh while the dataset is called Reynolds
    names = np.array(["Rayleigh", "Schmidt"], dtype=h5py.string_dtype())
    stale = edited(make(tmp_path / "c.hdf5"), lambda f: f["scalars"].attrs.modify("field_names", names))
    assert WellFile(stale, "shear_flow").labels["Reynolds"] == 1e4
    # in Rayleigh-Benard convection Rayleigh is a name of its own, Reynolds none
    wrong = edited(make(tmp_path / "d.hdf5", "rayleigh_benard"), lambda f: f["scalars"].move("Rayleigh", "Reynolds"))
    assert "no label 'Rayleigh'" in refusal(wrong, "rayleigh_benard")


def test_labels_and_times_that_vary_in_a_file(tmp_path):
    time = 0.5 * np.arange(FRAMES) + np.arange(3)[:, None]
    path = make(tmp_path / "a.hdf5", parameters={"Reynolds": [1e4, 2e4, 3e4], "Schmidt": 0.2}, time=time)
    file = WellFile(path, "shear_flow")
    assert file.labels["Reynolds"].tolist() == [1e4, 2e4, 3e4] and file.labels["Schmidt"] == 0.2
    assert file.label_table().tolist() == [[1e4, 0.2], [2e4, 0.2], [3e4, 0.2]]
    assert file.time.shape == (3, FRAMES) and file.dt == 0.5
    item = WellDataset(path=str(tmp_path), n_steps_input=1, n_steps_output=FRAMES - 1)[2]
    np.testing.assert_allclose(item["constant_scalars"], [3e4, 0.2], rtol=1e-6)


def test_files_of_others_have_no_initial_conditions(tmp_path):
    assert WellFile(make(tmp_path / "a.hdf5", initial_conditions=None), "shear_flow").initial_conditions is None
    path = edited(make(tmp_path / "b.hdf5"), lambda f: f.attrs.modify("dataset_name", "shear_flow_mini"))
    assert WellFile(path, "shear_flow").n_trajectories == 3  # a variant of the system, as rayleigh_benard_uniform


# ---- files that are refused


def test_the_spacing_of_a_square_box_on_an_uneven_grid_is_that_of_the_file(tmp_path):
    "A published shear flow has a box of 1 x 2 whose longer axis is labelled from 0 to 1; one that we wrote has not."
    fields = {f.name: np.zeros((1, 2, 8, 16, *(2,) * f.rank), dtype=np.float32) for f in SHEAR.fields}
    about = dict(time=[0.0, 0.1], box=(1.0, 1.0))
    path = write_well(tmp_path / "a.hdf5", SHEAR, fields, {"Reynolds": 900.0, "Schmidt": 1.0}, **about)
    assert WellFile(path, SHEAR).spacing == (0.125, 0.0625)
    with h5py.File(path, "r+") as file:
        del file.attrs["written_by"]
    assert WellFile(path, SHEAR).spacing == (0.125, 0.125), "as published"


def test_a_file_that_is_in_use_is_not_called_damaged(tmp_path):
    fields = {f.name: np.zeros((1, 2, 8, 8, *(2,) * f.rank), dtype=np.float32) for f in SHEAR.fields}
    about = dict(time=[0.0, 0.1], box=(1.0, 1.0))
    path = tmp_path / "shear_flow" / "data" / "train" / "a.hdf5"
    path.parent.mkdir(parents=True)
    write_well(path, SHEAR, fields, {"Reynolds": 900.0, "Schmidt": 1.0}, **about)
    writes = "import h5py, sys, time; f = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", writes, str(path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "open\n"
            with pytest.raises(UnreadableFileError, match="a.hdf5: cannot be read here and now; HDF5 says: .*lock"):
                WellFile(path, SHEAR)
            (problem,) = check_files(tmp_path / "shear_flow", SHEAR, remove=True)
            assert "cannot be read here and now" in problem and path.is_file(), "another copy would not help"
        finally:
            other.kill()
    assert WellFile(path, SHEAR).n_trajectories == 1


def test_not_hdf5(tmp_path):
    path = tmp_path / "a.hdf5"
    for content, says in {
        b"<!DOCTYPE html>\n<html><body>503 Service Unavailable</body></html>": "web page",
        b"  <html>\n<body>no</body>": "web page",
        b"": "empty",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00": "Git LFS pointer",
        b"PK\x03\x04" + bytes(3000): "not an HDF5 file",
    }.items():
        path.write_bytes(content)
        assert says in refusal(path)
    with pytest.raises(FileNotFoundError, match="none.hdf5"):
        WellFile(tmp_path / "none.hdf5", "shear_flow")


@pytest.mark.parametrize("left", [0.001, 0.3, 0.9, 0.9999])
def test_truncated(tmp_path, left):
    path = make(tmp_path / "a.hdf5")
    os.truncate(path, int(path.stat().st_size * left))
    assert "truncated" in refusal(path)


def test_arrays_that_end_past_the_file_or_were_never_written(tmp_path, monkeypatch):
    path = make(tmp_path / "a.hdf5")
    size, real = path.stat().st_size, os.stat
    with monkeypatch.context() as patch:  # HDF5 notices most cuts itself; here the check of our own

        def smaller(p, *args, **kwargs):
            result = list(real(p, *args, **kwargs))
            result[6] = size // 2
            return os.stat_result(result)

        patch.setattr("pathlib.os.stat", smaller)
        with pytest.raises(
            WellFormatError, match=f"truncated, /t._fields/[a-z]+ ends at byte .* the file has {size // 2}"
        ):
            WellFile(path, "shear_flow")

    def declare(f, **storage):
        del f["t0_fields/pressure"]
        f["t0_fields"].create_dataset("pressure", (3, FRAMES, NX, NY), "f4", **storage)

    assert "/t0_fields/pressure was declared but not" in refusal(edited(path, declare))

    def partly(f):
        declare(f, chunks=(1, FRAMES, NX, NY), compression="gzip")
        f["t0_fields/pressure"][:2] = 1.0

    assert "/t0_fields/pressure was declared but not" in refusal(edited(path, partly))


def test_a_damaged_chunk_names_the_file(tmp_path):
    path = make(tmp_path / "a.hdf5", compression="gzip")
    with h5py.File(path) as f:
        chunk = f["t0_fields/tracer"].id.get_chunk_info(0)
    with open(path, "r+b") as raw:
        raw.seek(chunk.byte_offset)
        raw.write(bytes(chunk.size))
    with pytest.raises(WellFormatError, match="a.hdf5: truncated or damaged"):
        WellFile(path, "shear_flow").window(0, 0, 2)


def test_another_system(tmp_path):
    for name in SYSTEMS:
        path = make(tmp_path / f"{name}.hdf5", name)
        for other in set(SYSTEMS) - {name}:
            message = refusal(path, other)
            assert f"dataset_name is '{name}'" in message and f"fields of {name};" in message and other in message
    path = edited(tmp_path / "shear_flow.hdf5", lambda f: f.attrs.modify("dataset_name", "my_flow"))
    assert "has the fields of shear_flow" in refusal(path, "active_matter")
    assert "no attribute dataset_name" in refusal(edited(path, lambda f: f.attrs.pop("dataset_name")))


@pytest.mark.parametrize(
    "key",
    [
        *("t0_fields", "t1_fields", "scalars", "dimensions"),
        *("t0_fields/tracer", "t1_fields/velocity", "dimensions/time", "dimensions/x"),
    ],
)
def test_what_is_missing_is_named(tmp_path, key):
    message = refusal(edited(make(tmp_path / "a.hdf5"), lambda f: f.__delitem__(key)))
    assert f"no {'dataset' if '/' in key else 'group'} {key!r}" in message


@pytest.mark.parametrize("label", ["Reynolds", "Schmidt"])
def test_missing_and_senseless_labels(tmp_path, label):
    path = make(tmp_path / "a.hdf5")
    for value in (np.nan, np.inf, -1.0):
        edited(path, lambda f, value=value: f[f"scalars/{label}"].write_direct(np.array(value, dtype=np.float32)))
        message = refusal(path)
        assert label in message and str(value) in message
    message = refusal(edited(path, lambda f: f.__delitem__(f"scalars/{label}")))
    assert f"no label {label!r}" in message and ("Rayleigh" in message) == (label == "Reynolds")


def replace(key, value):
    def change(f):
        attributes = dict(f[key].attrs)
        del f[key]
        f[key] = value
        f[key].attrs.update(attributes)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (replace("t0_fields/pressure", np.zeros((3, FRAMES, NX, NY + 1), "f4")), "/t0_fields/pressure must be"),
        (replace("t0_fields/pressure", np.zeros((3, FRAMES - 1, NX, NY), "f4")), "/t0_fields/pressure must be"),
        (replace("t1_fields/velocity", np.zeros((3, FRAMES, NX, NY, 3), "f4")), "/t1_fields/velocity must be"),
        (replace("t1_fields/velocity", np.zeros((3, FRAMES, NX, NY), "f4")), "/t1_fields/velocity must be"),
        (replace("t0_fields/tracer", np.zeros((FRAMES, NX, NY), "f4")), "/t0_fields/tracer must be"),
        (replace("t0_fields/tracer", np.zeros((3, FRAMES, NX, NY), "i4")), "must hold floats, it is int32"),
        (replace("dimensions/time", np.arange(FRAMES - 1.0)), "dimensions/time must"),
        (replace("dimensions/time", np.zeros(FRAMES)), "dimensions/time must"),
        (replace("dimensions/y", np.arange(NY + 1.0)), "dimensions/y has"),
        (replace("scalars/Schmidt", np.ones(2, "f4")), "/scalars/Schmidt must be one number"),
        (replace("physrep_initial_condition", np.arange(2)), "physrep_initial_condition must be 3 integers"),
        (lambda f: f.attrs.modify("n_trajectories", 4), "n_trajectories is 4, the fields have 3"),
        (
            lambda f: f["dimensions"].attrs.modify("spatial_dims", np.array(["y", "x"], dtype=h5py.string_dtype())),
            "spatial_dims",
        ),
    ],
)
def test_wrong_shapes_are_named(tmp_path, change, says):
    assert says in refusal(edited(make(tmp_path / "a.hdf5"), change))


# ---- folders


@pytest.mark.parametrize("layout", ["shear_flow", "datasets/shear_flow", "."])
def test_find_files(tmp_path, layout):
    folder = tmp_path / layout / "data" / "train"
    expected = [make(folder / name) for name in ("b.h5", "a.hdf5", "c.hdf5")]
    (folder / "notes.txt").write_text("not data")
    (folder / ".d.hdf5.17.partial").write_text("being written")
    (folder / "._a.hdf5").write_text("left by an archive")
    assert find_files(tmp_path, "shear_flow", "train") == sorted(expected)
    with pytest.raises(FileNotFoundError) as error:
        find_files(tmp_path, "shear_flow", "valid")
    assert str(folder) in str(error.value) and str(tmp_path / "datasets/shear_flow/data/valid") in str(error.value)
    with pytest.raises(FileNotFoundError, match="no files of any split"):
        find_files(tmp_path / "elsewhere", "shear_flow", "train")
    with pytest.raises(FileNotFoundError):
        find_files(tmp_path, "shear_flow", "t*")  # a name, no pattern: splits are not mixed


@pytest.mark.parametrize("read", [find_folder, read_stats, lambda root, name: find_files(root, name, "train")])
def test_a_file_is_no_folder(tmp_path, read):
    path = make(tmp_path / "data/train/a.hdf5")
    with pytest.raises(NotADirectoryError, match="a.hdf5 is a file; give the folder that holds shear_flow/data/"):
        read(path, "shear_flow")


# ---- statistics


@pytest.mark.parametrize("name", SYSTEMS)
def test_statistics(tmp_path, monkeypatch, name):
    "Against one computation over all, with blocks of two frames and files of unequal size, as The Well keys them."
    monkeypatch.setattr("physrep.data.write._BLOCK_BYTES", 2 * 4 * get_system(name).n_channels * NX * NY)
    parts = []
    for i, n in enumerate((3, 1)):
        fields = make_fields(name, n=n, seed=i)
        make(tmp_path / name / f"data/train/{i}.hdf5", name, n=n, fields=fields)
        parts.append(fields)
    path = write_stats(tmp_path, name)
    assert path == tmp_path / name / "stats.yaml" and path == write_stats(tmp_path / name, name)
    raw = yaml.safe_load(path.read_text())
    assert tuple(raw) == STATS
    stats = read_stats(path, name)
    for f in get_system(name).fields:
        x = np.concatenate([p[f.name] for p in parts]).astype(np.float64)
        for suffix, y in (("", x), ("_delta", np.diff(x, axis=1))):
            axes = (0, 1, 2, 3)
            for key, value in {"mean": y.mean(axes), "std": y.std(axes), "rms": np.sqrt((y**2).mean(axes))}.items():
                np.testing.assert_allclose(raw[key + suffix][f.name], value, rtol=1e-9, atol=1e-12)
                assert stats[key + suffix][f.name].shape == (2,) * f.rank


def test_statistics_of_single_frames_and_of_nan(tmp_path):
    one = {k: v[:, :1] for k, v in make_fields("shear_flow").items()}
    path = make(tmp_path / "data/train/a.hdf5", fields=one, time=[0.0])
    with pytest.raises(ValueError, match="single frames"):
        write_stats(tmp_path, "shear_flow")
    make(path)

    def spoil(f):
        f["t0_fields/tracer"][1, 4, 2, 2] = np.nan

    edited(path, spoil)
    with pytest.raises(WellFormatError, match="a.hdf5: NaN or infinity in trajectory 1"):
        write_stats(tmp_path, "shear_flow")
    assert not (tmp_path / "stats.yaml").exists()


def test_incomplete_statistics(tmp_path):
    make(tmp_path / "data/train/a.hdf5")
    with pytest.raises(FileNotFoundError, match="no statistics of shear_flow"):
        read_stats(tmp_path, "shear_flow")
    path = write_stats(tmp_path, "shear_flow")
    good = yaml.safe_load(path.read_text())
    for spoil, says in [
        (lambda s: s.pop("rms_delta"), "no 'rms_delta'"),
        (lambda s: s["std"].pop("tracer"), "no field 'tracer' in 'std'"),
        (lambda s: s["std"].update(velocity=1.0), "std of velocity"),
        (lambda s: s["std"].update(velocity=["a", "b"]), "not numbers"),
        (lambda s: s["mean"].update(tracer=float("nan")), "mean of tracer"),
    ]:
        stats = yaml.safe_load(yaml.safe_dump(good))
        spoil(stats)
        path.write_text(yaml.safe_dump(stats))
        with pytest.raises(WellFormatError, match=says) as error:
            read_stats(tmp_path, "shear_flow")
        assert str(path) in str(error.value)
    path.write_text(yaml.safe_dump({k: good[k] for k in ("mean", "std")}))  # the old form of The Well
    assert set(read_stats(tmp_path, "shear_flow", require=("mean", "std"))) == {"mean", "std"}
    for page in ("<!DOCTYPE html><html><body>503: Service</body></html>", "a: [b", ""):
        path.write_text(page)
        with pytest.raises(WellFormatError, match="stats.yaml"):
            read_stats(tmp_path, "shear_flow")
    # the published form, four decimals and a signed exponent
    path.write_text(yaml.safe_dump(good).replace("'", ""))
    published = {k: {n: np.vectorize(lambda v: f"{v:.4E}")(v).tolist() for n, v in m.items()} for k, m in good.items()}
    path.write_text(yaml.safe_dump(published).replace("'", ""))
    for key, by_field in read_stats(tmp_path, "shear_flow").items():
        for name, value in by_field.items():
            np.testing.assert_allclose(value, good[key][name], rtol=1e-4)


# ---- fingerprint


def test_fingerprint(tmp_path):
    def fresh(folder):
        big = make_fields("shear_flow", grid=(40, 48))
        options = {"fields": big, "coordinates": {"x": np.arange(40), "y": np.arange(48)}}
        return [
            make(tmp_path / folder / f"data/{split}/a.hdf5", seed=i, **options)
            for i, split in enumerate(("train", "valid"))
        ]

    files = fresh("one")
    original = fingerprint(files)
    assert original == fingerprint(files[::-1]) == fingerprint(fresh("two")) and len(original) == 16
    os.utime(files[0])
    assert fingerprint(files) == original

    def turned(f):
        f["t0_fields/tracer"][0, 0, 0, 0] *= -1

    before = os.stat(files[0])
    edited(files[0], turned)  # in place: the same size, and then the same time of the last change
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(files[0]).st_size == before.st_size and fingerprint(files) != original
    edited(files[0], turned)
    assert fingerprint(files) == original

    def first(f):
        f["t0_fields/tracer"][0, 0, 0, 0] += 1

    def last(f):
        f["t1_fields/velocity"][-1, -1, -1, -1, -1] += 1

    def label(f):
        f["scalars/Schmidt"][...] = 0.3

    def attribute(f):
        f.attrs["Schmidt"] = 0.3

    def frame(f):
        f["dimensions/time"][3] += 0.01

    def group(f):
        f["physrep_initial_condition"][1] = 7

    prints = {original, fingerprint(files[:1]), fingerprint(files[1:])}
    for i, change in enumerate((first, last, label, attribute, frame, group)):
        changed = fresh(f"changed{i}")
        edited(changed[1], change)
        prints.add(fingerprint(changed))
    renamed = fresh("renamed")
    prints.add(fingerprint([renamed[0], shutil.move(renamed[1], renamed[1].with_name("b.hdf5"))]))
    assert len(prints) == 3 + 6 + 1 - 1  # one file alone is known by its name in its folder, and both hold the same
    with pytest.raises(ValueError, match="no files"):
        fingerprint([])
    files[0].write_text("<html>")
    with pytest.raises(WellFormatError, match="web page"):
        fingerprint(files)


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


def make_own(root, system=OWN, damkohler=(1.0, 10.0), splits=("train", "valid", "test"), **options):
    for number, (split, value) in enumerate((s, v) for s in splits for v in damkohler):
        shape, rng = (2, 6, 64, 48), np.random.default_rng(number)
        fields = {f.name: value + rng.standard_normal(shape + (2,) * f.rank) for f in system.fields}
        path = root / system.name / "data" / split / f"Damkohler_{value:g}.hdf5"
        coordinates = {"y": np.linspace(-1, 1, 48)} if system.boundary[1] == "wall" else None
        given = {"time": 0.1 * np.arange(6), "box": (4.0, 3.0), "coordinates": coordinates} | options
        write_well(path, system, fields, {"Damkohler": value}, **given)
    return root


@pytest.mark.parametrize("system", [OWN, WALLED], ids=lambda s: s.name)
def test_a_system_of_ones_own_from_files_to_batches(tmp_path, system):
    assert system.name not in SYSTEMS
    root = make_own(tmp_path, system)
    files = find_files(root, system, "train")
    assert len(files) == 2 and find_files(root / system.name, system, "train") == files
    assert find_folder(root, system) == tmp_path / system.name and len(fingerprint(files)) == 16
    assert write_stats(root, system) == tmp_path / system.name / "stats.yaml"
    assert set(read_stats(root, system)["mean"]) == {f.name for f in system.fields}
    file = WellFile(files[0], system)
    assert file.grid == (64, 48) and file.labels == {"Damkohler": 1.0}
    walls = system.boundary[1] == "wall"
    assert np.allclose(file.positions, np.linspace(-1, 1, 48)) if walls else file.positions is None
    windows = Windows(root, system, "train", frames=4, stride=2)
    assert windows.shape == (3, 4, 64, 48) and windows[0]["labels"].tolist() == [1.0]
    check_disjoint(windows, Windows(root, system, "test", frames=4))
    normaliser, scaler = Normaliser.load(root, system), LabelScaler.fit(system, windows.labels, root)
    batches = Batches(windows, batch_size=4, normaliser=normaliser, scaler=scaler, augment=True)
    batch = next(batches(0))
    assert batch["fields"].shape == (4, 3, 4, 64, 48) and batch["labels"].shape == (4, 1)
    assert check_files(root / system.name, system) == []


@pytest.mark.parametrize("group", [(), ("Damkohler",)])
def test_leaks_of_a_system_of_ones_own(tmp_path, group):
    "With and without labels that make a group, though the system has no velocity."
    system = dataclasses.replace(OWN, group=group)
    root = make_own(tmp_path / "published", system)
    test = find_files(root, system, "test")[0]
    test.write_bytes(find_files(root, system, "train")[0].read_bytes())
    lines, ranges = data_report(root, system, frames=4)
    assert lines.loc["train", "Damkohler"] == "1, 10" and len(ranges) == 9
    found = leakage(find_flows(root, system))
    assert found.loc["test", "train"] == 2 and found.loc["valid"].drop("trajectories").sum() == 0
    write_leak_free(root, tmp_path / "view", system)
    check_disjoint(*(Windows(tmp_path / "view", system, split, frames=4) for split in ("train", "valid", "test")))


def test_heights_that_a_mirror_image_needs_must_be_there(tmp_path):
    make_own(tmp_path, WALLED)
    mirrored = dataclasses.replace(WALLED, mirror_axes=(1,), mirror_offsets=((1, "heat", 1.0, 0.0),))
    with pytest.raises(WellFormatError, match="increasing heights between the walls at 0 and 1, it runs from -1 to 1"):
        WellFile(find_files(tmp_path, WALLED, "train")[0], mirrored)


def test_one_value_of_a_label_is_nothing_to_learn(tmp_path):
    windows = Windows(make_own(tmp_path, damkohler=(5.0,)), OWN, "train", frames=4)
    with pytest.raises(ValueError, match="all labels Damkohler of reaction in .*train are equal .5.: nothing to learn"):
        LabelScaler.fit(OWN, windows.labels, windows.paths[0].parent)


def test_walls_are_no_periodic_boundary(tmp_path):
    root = make_own(tmp_path, WALLED)
    shifted = dataclasses.replace(WALLED, boundary=("periodic", "periodic"))
    with pytest.raises(WellFormatError, match="boundaries along y are WALL, and .* declares them periodic; declare"):
        WellFile(find_files(root, WALLED, "train")[0], shifted)
    both = edited(find_files(root, WALLED, "train")[0], lambda f: f.__delitem__("boundary_conditions/y_wall_dirichlet"))
    assert WellFile(both, shifted).grid == (64, 48), "nothing is said of y"
    make_own(tmp_path / "periodic", OWN)
    walls = dataclasses.replace(OWN, boundary=("wall", "wall"))
    assert WellFile(find_files(tmp_path / "periodic", OWN, "train")[0], walls).grid == (64, 48), "clips do not shift"


def test_a_file_of_a_system_of_ones_own_is_told_from_others(tmp_path):
    make_own(tmp_path)
    renamed = edited(find_files(tmp_path, OWN, "train")[0], lambda f: f.attrs.modify("dataset_name", "my-set"))
    with pytest.raises(WellFormatError, match="fields of reaction; .* asked for; if it is that, write dataset_name = "):
        WellFile(renamed, OWN)
    shutil.rmtree(tmp_path / "reaction")
    make_own(tmp_path)
    message = "dataset_name is 'reaction', and it has the fields of no system known here; shear_flow was asked for"
    with pytest.raises(WellFormatError, match=message):
        WellFile(find_files(tmp_path, OWN, "train")[0], "shear_flow")


def layer(tmp_path, y):
    "Fields of a system of one's own between walls at other heights than 0 and 1."
    channel = System(
        "channel",
        "Channel flow",
        (Field("dye"), Field("velocity", 1)),
        (Label("Reynolds", log=True, paper_log=True),),
        boundary=("periodic", "wall"),
    )
    folder = tmp_path / "channel" / "data" / "train"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    fields = {f.name: rng.normal(size=(2, 6, 8, len(y), *(2,) * f.rank)) for f in channel.fields}
    options = dict(time=np.arange(6) * 0.1, coordinates={"x": np.arange(8) / 8, "y": y})
    write_well(folder / "a.hdf5", channel, fields, {"Reynolds": 100.0}, **options)
    return Windows(tmp_path, channel, "train", frames=6)


def test_a_layer_may_lie_between_any_two_heights(tmp_path):
    uneven = np.cos(np.pi * (np.arange(12)[::-1] + 0.5) / 12)  # from -1 to 1, dense at the walls
    windows = layer(tmp_path / "uneven", uneven)
    assert np.allclose(windows.positions, uneven)
    for function in (summary_statistics, spectra):
        assert np.isfinite(measure(windows, function)).all()
    even = np.linspace(-1, 1, 12)
    there, given = layer(tmp_path / "even", even), measure(layer(tmp_path / "again", even + 5), summary_statistics)
    assert np.allclose(measure(there, summary_statistics), given, rtol=1e-4), "only distances count"


@pytest.mark.parametrize(
    "parameters, y, message",
    [
        ({"Reynolds": 0.0}, np.arange(4.0), "Reynolds must be positive"),
        ({"Reynolds": 1e39}, np.arange(4.0), "Reynolds must be one finite number .in float32."),
        ({"Reynolds": 10.0}, np.arange(4.0)[::-1], "must be 4 finite, increasing numbers"),
    ],
)
def test_what_no_reader_takes_is_not_written(tmp_path, parameters, y, message):
    system = System("channel", "", (Field("dye"),), (Label("Reynolds", log=True, paper_log=True),))
    system = dataclasses.replace(system, boundary=("periodic", "wall"))
    options = dict(time=np.arange(2), coordinates={"x": np.arange(8), "y": y})
    with pytest.raises(ValueError, match=message):
        write_well(tmp_path / "a.hdf5", system, {"dye": np.zeros((1, 2, 8, 4))}, parameters, **options)
    assert not (tmp_path / "a.hdf5").exists()


def test_names_of_axes_may_be_bytes_of_fixed_length(tmp_path):
    windows = layer(tmp_path, np.linspace(0, 1, 4))
    with h5py.File(windows.paths[0], "r+") as file:
        file["dimensions"].attrs["spatial_dims"] = np.array(["x", "y"], dtype="S")
    assert WellFile(windows.paths[0], windows.system).grid == (8, 4)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    path = make(tmp_path / "a.hdf5")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(well, "open_bytes", refuse)
    with pytest.raises(UnreadableFileError, match="a.hdf5: cannot be read here and now: .*Permission denied"):
        WellFile(path, "shear_flow")

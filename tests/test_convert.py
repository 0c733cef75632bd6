"""Arrays of others in The Well's layout: what is read back, how flows are cut and dealt, and what is refused and why."""

import sys
from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest

from physrep.data.convert import SPLITS, convert, deal
from physrep.data.sets import read_stats
from physrep.data.well import WellFile
from physrep.data.windows import Windows, check_disjoint
from physrep.experiments.command import main
from physrep.physics.systems import Field, Label, System, get_system

LABELS = (Label("speed", True, True), Label("damping", False, False))
WAVES = System("waves", "Waves", (Field("height"), Field("velocity", 1)), LABELS)
N, FRAMES, GRID = 6, 35, 16
KNOWN = {"speed": np.arange(1.0, N + 1), "damping": np.linspace(0, 1, N)}
PLACE = dict(dt=0.5, box=(1, 2))
i, t, x, y, c = np.ix_(range(N), range(FRAMES), np.arange(GRID) / GRID, np.arange(GRID) / GRID, range(3))
FLOWS = np.sin(2 * np.pi * x + i + 0.1 * t + c) + np.cos(4 * np.pi * y - 0.2 * (i + 1) * t)  # (n, t, x, y, c)
HEIGHT, VELOCITY = FLOWS[..., 0], FLOWS[..., 1:]
SOURCES = {"height": HEIGHT, "velocity": VELOCITY}


def read(folder, table, system=WAVES) -> list[WellFile]:
    "The files of a set, in the order of the flows."
    parts = folder / system.name / "data"
    return [
        WellFile(parts / split / f"{system.name}_{k:04d}.hdf5", system) for k, split in table.split.items() if split
    ]


def test_every_kind_of_source_gives_the_same_set(tmp_path, monkeypatch):
    for k in range(N):
        np.save(tmp_path / f"h_{k + 7}.npy", HEIGHT[k])  # 10 comes after 9
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["deep/u"] = np.moveaxis(VELOCITY, 0, -1)
    xarray = ModuleType("xarray")  # what is asked of it
    xarray.__spec__ = ModuleSpec("xarray", None)
    xarray.open_dataset = lambda path: nullcontext(SimpleNamespace(variables={"h": HEIGHT.transpose(3, 0, 1, 2)}))
    monkeypatch.setitem(sys.modules, "xarray", xarray)
    (tmp_path / "h.nc").touch()
    files = {"height": str(tmp_path / "h_*.npy"), "velocity": tmp_path / "v.h5:/deep/u"}
    netcdf = {"height": tmp_path / "h.nc:h", "velocity": list(VELOCITY)}
    for name, sources, axes in (
        ("memory", SOURCES, None),
        ("one", FLOWS, "ntxyc"),
        ("files", files, {"height": "txy", "velocity": "txycn"}),
        ("netcdf", netcdf, {"height": "yntx"}),
    ):
        table = convert(WAVES, tmp_path / name, sources, KNOWN, axes=axes, **PLACE)
        for k, file in enumerate(read(tmp_path / name, table)):
            assert file.labels == {label: KNOWN[label][k] for label in KNOWN} and file.dt == 0.5
            assert file.spacing == (1 / GRID, 2 / GRID)
            assert np.array_equal(file.window(0, 0, FRAMES), np.moveaxis(FLOWS[k], -1, 0).astype(np.float32)), name


def test_fewer_points_pieces_and_splits(tmp_path):
    table = convert(
        WAVES, tmp_path, SOURCES, KNOWN | {"damping": [*KNOWN["damping"][1:], np.nan]}, size=8, cut=16, **PLACE
    )
    assert list(table.pieces) == [2, 2, 2, 2, 2, 0] and table.split[5] == "" and set(table.split[:5]) == set(SPLITS)
    for k, file in enumerate(read(tmp_path, table)):
        assert file.n_trajectories == 2 and len(set(file.initial_conditions)) == 1
        expected = np.moveaxis(FLOWS[k, 16:32, ::2, ::2], -1, 0)  # its waves fit
        assert np.allclose(file.window(1, 0, 16), expected, atol=1e-6)
    check_disjoint(*(Windows(tmp_path, WAVES, split, frames=16) for split in SPLITS))
    assert read_stats(tmp_path, WAVES)["std"]["velocity"].shape == (2,)
    walls = System("walls", "Walls", (Field("height"),), LABELS, boundary=("periodic", "wall"))
    table = convert(walls, tmp_path, {"height": HEIGHT}, KNOWN, size=(16, 4), **PLACE)
    means = read(tmp_path, table, walls)[2]
    assert np.allclose(means.window(0, 0, 9)[0], HEIGHT[2, :9].reshape(9, 16, 4, 4).mean(-1), atol=1e-6)
    assert np.allclose(means.positions, [0.25, 0.75, 1.25, 1.75])


def test_what_belongs_together_is_dealt_together():
    labels, starts = np.repeat(np.arange(8), 3)[:, None], np.arange(24)
    starts[[0, 3]] = 99  # a start of two parameters
    split = deal(labels, starts, (1, 1, 1), seed=3)
    assert all(len(set(split[labels[:, 0] == k])) == 1 for k in range(8)) and split[0] == split[3]
    assert (deal(labels, starts, (1, 1, 1), seed=3) == split).all() and set(split) == set(SPLITS)


def test_a_tensor_one_split_at_a_time(tmp_path):
    active = get_system("active_matter")
    x = np.concatenate([FLOWS] * 4, -1)[..., : active.n_channels]
    for split in ("valid", "train"):
        convert(active, tmp_path, x, {"alpha": KNOWN["speed"], "zeta": KNOWN["damping"]}, split=split, **PLACE)
    file = Windows(tmp_path, active, "valid", frames=16).files[4]
    assert np.array_equal(file.window(0, 0, 1)[:, 0], np.moveaxis(x[4, 0], -1, 0).astype(np.float32))
    assert read_stats(tmp_path, active)["std"]["D"].shape == (2, 2)


def test_the_command_declares_a_system_converts_and_says_what_is_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    np.save("v.npy", VELOCITY)
    pd.DataFrame(KNOWN | {"start": [1, 1, 2, 3, 4, 5]}).to_csv("labels.csv", index=False)
    words = "my_converted:FLOW set velocity=v.npy --labels labels.csv --dt 0.5 --box 1 2 --cut 17".split()
    assert main(["convert", *words, "--fields", "velocity:1"]) == 0
    told = capsys.readouterr().out
    assert (
        told.endswith("next: PYTHONPATH=. physrep report my_converted:FLOW set\n") and "17 frames: objectives" in told
    )
    assert main(["report", "my_converted:FLOW", "set"]) == 0
    assert get_system("my_converted:FLOW").channels == ["velocity_x", "velocity_y"]
    assert main(["convert", *words]) == 1 and "must be new" in capsys.readouterr().err
    assert main(["convert", *words, "--fields", "velocity:1"]) == 1 and "is there already" in capsys.readouterr().err
    assert main(["convert", words[0], "new", "v.npy", "a=b", *words[3:]]) == 1
    assert "some words have a name" in capsys.readouterr().err


NAN = np.where(t[..., 0] == 20, np.nan, HEIGHT)
BAD = {
    "a field is missing": (dict(sources={"height": HEIGHT}), "has the fields height, velocity; there are sources of height"),
    "components": (dict(sources={**SOURCES, "velocity": FLOWS}), r"velocity \(the array\) has axes .* c = 2 components"),
    "order": (dict(sources={**SOURCES, "height": HEIGHT[..., :9]}), "order cannot be told from their sizes"),
    "letters": (dict(axes="ntxzc"), "axes='ntxzc' do not fit"),
    "text": (dict(sources={**SOURCES, "height": HEIGHT.astype(str)}), "of <U.*Give real numbers"),
    "lengths": (dict(sources={**SOURCES, "height": HEIGHT[:, 2:]}), "6 flows of 33 frames of 16x16; velocity .* 35 frames"),
    "NaN": (dict(sources={**SOURCES, "height": NAN}), r"height \(the array\): NaN or infinity in frame 20 of flow 0"),
    "no file": (dict(sources={**SOURCES, "height": "none*.npy"}), r"no file none\*.npy"),
    "pickle": (dict(sources={**SOURCES, "height": "a.npy"}), "a.npy: no whole .npy file with numbers"),
    "dataset": (dict(sources={**SOURCES, "height": "a.h5:b"}), "a.h5 has no 'b'; write a.h5:NAME, it holds c/d"),
    "no xarray": (dict(sources={**SOURCES, "height": "a.nc:b"}), "a.nc: sources are .* with xarray, A.nc:VARIABLE"),
    "frames": (dict(cut=15), "has 35 frames of .* asked are 15 .* frames are 16 to"),
    "long": (dict(cut=36), "asked are 36"),
    "larger": (dict(size=32), r"asked are 35 of \(32, 32\); .* points at most as many"),
    "label": (dict(labels={"speed": 1}), "labels of waves are missing: damping; there are speed"),
    "label count": (dict(labels={**KNOWN, "speed": "1,2"}), "speed has 2 values for 6 flows"),
    "label equal": (dict(labels={**KNOWN, "speed": 2}), "all labels speed of waves in train are equal"),
    "label zero": (dict(labels={**KNOWN, "speed": KNOWN["damping"]}), "speed must be positive"),
    "label unknown": (dict(labels={**KNOWN, "speed": np.nan}), "no flow has all labels of waves"),
    "CSV": (dict(labels="a.csv"), "a.csv: a CSV with a line of names and lines of numbers .*'two'"),
    "few": (dict(labels={**KNOWN, "start": [1, 1, 1, 1, 2, 3]}), "6 flows with .* 3 different starts are 3 parts"),
    "time step": (dict(dt=-1.0), "time must be finite, increasing"),
    "split": (dict(split="tset"), "split train, valid or test"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_said_before_anything_is_there(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "xarray", None)
    (tmp_path / "a.csv").write_text("speed,damping\n1,two\n")
    (tmp_path / "a.npy").write_bytes(b"\x80\x04K\x01.")
    (tmp_path / "a.nc").touch()
    with h5py.File("a.h5", "w") as file:
        file["c/d"] = HEIGHT
    change, says = BAD[case]
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        convert(WAVES, "set", **(dict(sources=SOURCES, labels=KNOWN) | PLACE | change))
    assert not list(tmp_path.rglob("*.hdf5"))

"""Arrays of others in The Well's layout: what is read back, how flows are cut and dealt, what is refused."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

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

LABELS = (Label("speed", True, True), Label("age", False, False))
WAVES = System("waves", "", (Field("height"), Field("velocity", 1)), LABELS)
N, FRAMES, GRID = 6, 35, 16
KNOWN = {"speed": np.arange(1.0, N + 1), "age": np.arange(N) / 4}
PLACE = dict(dt=0.5, box=(1, 2))
i, t, x, y, c = np.ix_(range(N), range(FRAMES), np.arange(GRID) / GRID, np.arange(GRID) / GRID, range(3))
FLOWS = np.sin(2 * np.pi * x + i + 0.1 * t + c) + np.cos(4 * np.pi * y - 0.2 * (i + 1) * t)  # (n, t, x, y, c)
HEIGHT, VELOCITY = FLOWS[..., 0], FLOWS[..., 1:]
SOURCES = {"height": HEIGHT, "velocity": VELOCITY}


def read(folder, system=WAVES) -> list[WellFile]:
    "The files of a set, in the order of the flows."
    paths = (folder / system.name / "data").rglob("*.hdf5")
    return [WellFile(path, system) for path in sorted(paths, key=lambda path: path.name)]


def test_every_kind_of_source_gives_the_same_set(tmp_path, monkeypatch):
    for k in range(N):
        np.save(tmp_path / f"h_{k + 7}.npy", HEIGHT[k])  # 10 comes after 9
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["deep/u"] = np.moveaxis(VELOCITY, 0, -1)
    opened = nullcontext(SimpleNamespace(variables={"h": HEIGHT.transpose(3, 0, 1, 2)}))  # what is asked of xarray
    monkeypatch.setitem(sys.modules, "xarray", SimpleNamespace(open_dataset=lambda path: opened))
    monkeypatch.setattr("physrep.data.convert.find_spec", lambda name: True)
    (tmp_path / "h.nc").touch()
    files = {"height": str(tmp_path / "h_*.npy"), "velocity": tmp_path / "v.h5:/deep/u"}
    netcdf = {"height": tmp_path / "h.nc:h", "velocity": list(VELOCITY)}
    axes = {"files": {"height": "txy", "velocity": "txycn"}, "netcdf": {"height": "yntx"}}
    for name, sources in {"memory": SOURCES, "one": FLOWS, "files": files, "netcdf": netcdf}.items():
        convert(WAVES, tmp_path / name, sources, KNOWN, axes=axes.get(name), **PLACE)
        for k, file in enumerate(read(tmp_path / name)):
            assert file.labels == {label: KNOWN[label][k] for label in KNOWN}
            assert file.dt == 0.5 and file.spacing == (1 / GRID, 2 / GRID)
            assert np.array_equal(file.window(0, 0, FRAMES), np.moveaxis(FLOWS[k], -1, 0).astype(np.float32)), name


def test_fewer_points_pieces_and_splits(tmp_path):
    table = convert(WAVES, tmp_path, SOURCES, KNOWN | {"age": [0, 1, 2, 3, 4, np.nan]}, size=8, cut=16, **PLACE)
    assert list(table.pieces) == [2, 2, 2, 2, 2, 0] and set(table.split[:5]) == set(SPLITS) and table.split[5] == ""
    for k, file in enumerate(read(tmp_path)):
        assert file.n_trajectories == 2 and len(set(file.initial_conditions)) == 1
        expected = np.moveaxis(FLOWS[k, 16:32, ::2, ::2], -1, 0)  # its waves fit
        assert np.allclose(file.window(1, 0, 16), expected, atol=1e-6)
    check_disjoint(*(Windows(tmp_path, WAVES, split, frames=16) for split in SPLITS))
    walls = System("walls", "", (Field("height"),), LABELS, boundary=("periodic", "wall"))
    convert(walls, tmp_path, {"height": HEIGHT}, KNOWN, size=(16, 4), **PLACE)
    means = read(tmp_path, walls)[2]
    assert np.allclose(means.window(0, 0, 9)[0], HEIGHT[2, :9].reshape(9, 16, 4, 4).mean(-1), atol=1e-6)
    assert np.allclose(means.positions, [0.25, 0.75, 1.25, 1.75])


def test_what_belongs_together_is_dealt_together():
    labels, starts = np.repeat(np.arange(8), 3)[:, None], np.arange(24)
    starts[[0, 3]] = 99  # a start of two parameters
    split = deal(labels, starts, (1, 1, 1), seed=3)
    assert all(len(set(split[labels[:, 0] == k])) == 1 for k in range(8)) and split[0] == split[3]
    assert (deal(labels, starts, (1, 1, 1), seed=3) == split).all() and set(split) == set(SPLITS)


def test_tensors_one_split_at_a_time(tmp_path):
    active = get_system("active_matter")
    given = np.concatenate([FLOWS] * 4, -1)[..., : active.n_channels]
    for split in ("valid", "train"):
        convert(active, tmp_path, given, {"alpha": KNOWN["speed"], "zeta": KNOWN["age"]}, split=split, **PLACE)
    assert np.allclose(read(tmp_path, active)[-1].window(0, 0, 1)[:, 0], np.moveaxis(given[-1, 0], -1, 0), atol=1e-6)
    assert read_stats(tmp_path, active)["std"]["D"].shape == (2, 2)


def test_the_command_declares_a_system_converts_and_says_what_is_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    np.save("v.npy", VELOCITY)
    pd.DataFrame(KNOWN | {"start": [1, 1, 2, 3, 4, 5]}).to_csv("labels.csv", index=False)
    words = "convert my_converted:FLOW set velocity=v.npy --labels labels.csv --dt 0.5 --box 1 2 --cut 17".split()
    assert main([*words, "--fields", "velocity:1"]) == 0
    assert "next: PYTHONPATH=. physrep report my_converted:FLOW set\n" in capsys.readouterr().out
    assert main(["report", "my_converted:FLOW", "set"]) == 0
    wrong = {"must be new": [], "rank 0, 1 or 2": ["--fields", "a:3"], "none: c": ["--axes", "a=b", "c"]}
    for says, more in wrong.items():
        assert main([*words, *more]) == 1 and says in capsys.readouterr().err


NAN = np.where(t[..., 0] == 20, np.nan, HEIGHT)
BAD = [
    ("there are sources of height$", dict(sources={"height": HEIGHT})),
    ("velocity .the array. has axes .* c = 2 components", dict(sources={**SOURCES, "velocity": FLOWS})),
    ("order cannot be told from their sizes", dict(sources={**SOURCES, "height": HEIGHT[..., :9]})),
    ("of <U.*Give real numbers", dict(sources={**SOURCES, "height": HEIGHT.astype(str)})),
    ("6 flows of 33 frames of 16x16; velocity .* 35 f", dict(sources={**SOURCES, "height": HEIGHT[:, 2:]})),
    ("NaN or infinity in frame 20 of flow 0", dict(sources={**SOURCES, "height": NAN})),
    (r"no file none\*.npy", dict(sources={**SOURCES, "height": "none*.npy"})),
    ("a.npy: no whole .npy file with numbers", dict(sources={**SOURCES, "height": "a.npy"})),
    ("a.h5 has no 'b'; write a.h5:NAME, it holds c/d", dict(sources={**SOURCES, "height": "a.h5:b"})),
    ("a.nc: sources are .* with xarray, A.nc:VARIABLE", dict(sources={**SOURCES, "height": "a.nc:b"})),
    ("axes='ntxzc' do not fit", dict(axes="ntxzc")),
    ("has 35 frames of .* asked are 36 .* frames are 16 to", dict(cut=36)),
    (r"asked are 35 of \(32, 32\); .* points at most as many", dict(size=32)),
    ("labels of waves are missing: age; there are speed", dict(labels={"speed": 1})),
    ("speed has 2 values for 6 flows", dict(labels={**KNOWN, "speed": "1,2"})),
    ("all labels speed of waves in train are equal", dict(labels={**KNOWN, "speed": 2})),
    ("speed must be positive", dict(labels={**KNOWN, "speed": KNOWN["age"]})),
    ("no flow has all labels of waves", dict(labels={**KNOWN, "speed": np.nan})),
    ("a.csv: a CSV with a line of names .*'two'", dict(labels="a.csv")),
    ("6 flows with .* 3 different starts are 3 parts", dict(labels={**KNOWN, "start": [1, 1, 1, 1, 2, 3]})),
    ("time must be finite, increasing", dict(dt=-1.0)),
    ("split train, valid or test", dict(split="tset")),
]  # fmt: skip


@pytest.mark.parametrize("says,change", BAD, ids=[says for says, _ in BAD])
def test_what_does_not_fit_is_said_before_anything_is_there(says, change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("physrep.data.convert.find_spec", lambda name: None)
    (tmp_path / "a.csv").write_text("speed,age\n1,two\n")
    (tmp_path / "a.npy").write_bytes(b"\x80\x04K\x01.")
    (tmp_path / "a.nc").touch()
    with h5py.File("a.h5", "w") as file:
        file["c/d"] = 0.0
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        convert(WAVES, "set", **(dict(sources=SOURCES, labels=KNOWN) | PLACE | change))
    assert not list(tmp_path.rglob("*.hdf5"))

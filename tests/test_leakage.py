"""Leakage where its notebook does not look: bad values, other systems, records, views that cannot be."""

import shutil
import warnings

import h5py
import numpy as np
import pytest

from physrep.data.leakage import data_report, deal_flows, find_flows, leakage, main, write_leak_free
from physrep.data.scaling import LabelScaler
from physrep.data.well import DamagedFileError, WellFile
from physrep.data.windows import Windows, check_disjoint
from physrep.data.write import write_well
from physrep.physics.systems import get_system
from physrep.probing import evaluate
from physrep.probing.evaluate import bootstrap_groups, window_flows, write_scores
from physrep.probing.features import probe_splits
from physrep.probing.records import read_predictions
from physrep.training.run import resolve

BOX = {"active_matter": (10.0, 10.0), "shear_flow": (1.0, 2.0), "rayleigh_benard": (4.0, 1.0)}


def write(path, system, labels, seeds, *, shared=("velocity",), n_frames=2, grid=(8, 16), record=False, **change):
    "A file of noise; `shared` fields depend on the seed (and on the group's labels), the others on all labels too."
    s, fields = get_system(system), {}
    for f in s.fields:
        key = [len(f.name), *(int(1000 * labels[n]) for n in (s.group if f.name in shared else s.label_names))]
        fields[f.name] = np.stack(
            [
                np.random.default_rng([seed, *map(abs, key)]).normal(size=(n_frames, *grid, *(2,) * f.rank))
                for seed in seeds
            ]
        ).astype(np.float32)
    coordinates = {"y": np.linspace(0, 1, grid[1])} if system == "rayleigh_benard" else None
    extra = {"initial_conditions": list(seeds)} if record else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_well(
        path,
        system,
        fields | change,
        labels,
        time=0.1 * np.arange(n_frames),
        box=BOX[system],
        coordinates=coordinates,
        **extra,
    )


def shear(root, record=False):
    for split, seeds in {"train": (range(8), range(4, 12)), "valid": ((8,), (0,)), "test": ((9,), (1,))}.items():
        for schmidt, s in zip((0.5, 2.0), seeds):
            write(
                root / "shear_flow" / "data" / split / f"Sc_{schmidt}.hdf5",
                "shear_flow",
                {"Reynolds": 1e4, "Schmidt": schmidt},
                list(s),
                record=record,
            )
    return root


@pytest.mark.parametrize("record", [False, True])
def test_planted_twins_are_found_with_and_without_a_record(tmp_path, record):
    table = leakage(find_flows(shear(tmp_path, record), "shear_flow"))
    assert table.loc["valid"].to_dict() == {"train": 2, "test": 0, "valid": 0, "trajectories": 2}
    assert table.loc["test", "train"] == 2


@pytest.mark.parametrize("record", [False, True])
def test_the_bootstrap_draws_twins_of_a_split_together(tmp_path, record):
    windows = Windows(shear(tmp_path, record) / "shear_flow", "shear_flow", "train", frames=1)
    found = {}  # flow -> initial conditions of its windows, by how the file was written: seeds 0 to 7 and 4 to 11
    for flow, (k, _) in zip(window_flows(windows), windows.index):
        found.setdefault(int(flow), set()).add((0, 4)[windows.trajectories[k][0]] + windows.trajectories[k][1])
    assert len(found) == 12 and all(len(s) == 1 for s in found.values()), "16 trajectories, 4 of them twins"


def test_the_bootstrap_draws_new_parameters_with_all_their_flows(tmp_path):
    rng = np.random.default_rng(0)
    for split, number in (("train", 3), ("test", 14), ("valid", 3)):
        for k in range(number):
            labels = {"Reynolds": 1e4 * (1 + k + (split == "test") / 2), "Schmidt": 1.0}
            path = tmp_path / "shear_flow" / "data" / split / f"{k}.hdf5"
            velocity = rng.normal(size=(2, 2, 8, 16, 2)).astype(np.float32)
            write(path, "shear_flow", labels, [0, 1], velocity=velocity)
    train, test, valid = (
        Windows(tmp_path / "shear_flow", "shear_flow", s, frames=1) for s in ("train", "test", "valid")
    )
    flows, groups = window_flows(test), bootstrap_groups(test, train)
    assert len(np.unique(flows)) == 28 and len(np.unique(groups)) == 14
    assert all(len(np.unique(test.labels[test.index[groups == g, 0]], axis=0)) == 1 for g in groups)
    for other, of in ((valid, train), (train, train), (test, test)):  # parameters that train has
        assert np.array_equal(bootstrap_groups(other, of), window_flows(other))
    few = bootstrap_groups(valid, test)
    assert np.array_equal(few, window_flows(valid)), "3 draws of parameters are too few"


def test_a_flow_of_train_in_test_is_refused_wherever_splits_are_loaded(smoke_data, tmp_path):
    folder = shutil.copytree(smoke_data / "shear_flow", tmp_path / "shear_flow")
    source = min((folder / "data" / "train").glob("*.hdf5"))
    shutil.copy(source, folder / "data" / "test" / source.name)
    with pytest.raises(ValueError, match="of 'test' have an initial condition that 'train' has too"):
        probe_splits(resolve("shear_flow", "random", "vit", "smoke", data_dir=tmp_path))


def test_scores_are_drawn_by_parameters(smoke_data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "ENOUGH", 2)  # smoke has four draws
    windows = probe_splits(resolve("shear_flow", "random", "vit", "smoke", data_dir=smoke_data))
    test = windows["test"]
    truth = test.targets(np.arange(len(test)))
    scaler = LabelScaler.fit(get_system("shear_flow"), windows["train"].labels)
    write_scores(tmp_path, {("linear", "test"): truth}, windows, scaler, objective="mae", encoder="vit")
    monkeypatch.chdir(tmp_path)
    here = write_scores(".", {("linear", "test"): truth}, windows, scaler, objective="mae", encoder="vit")
    assert {row["run"] for row in here.rows} == {tmp_path.name}, "a folder has a name, however it is called"
    groups = read_predictions(tmp_path).groups["test"]
    assert len(np.unique(groups)) == len(np.unique(test.labels, axis=0)) < len(np.unique(test.groups))


def test_equal_velocity_at_another_reynolds_number_is_no_twin(tmp_path):
    velocity = np.random.default_rng(0).normal(size=(1, 2, 8, 16, 2)).astype(np.float32)
    for split, reynolds in (("train", 1e4), ("valid", 5e4), ("test", 1e5)):
        write(
            tmp_path / "shear_flow" / "data" / split / "a.hdf5",
            "shear_flow",
            {"Reynolds": reynolds, "Schmidt": 1.0},
            [0],
            velocity=velocity,
        )
    assert leakage(find_flows(tmp_path, "shear_flow")).drop(columns="trajectories").to_numpy().sum() == 0


@pytest.mark.parametrize("difference, twins", [(1e-7, True), (1e-2, False)])
def test_twins_may_differ_by_rounding(tmp_path, difference, twins):
    velocity = np.random.default_rng(0).normal(size=(1, 2, 8, 16, 2)).astype(np.float32)
    for split, schmidt, v in (
        ("train", 1.0, velocity),
        ("valid", 2.0, velocity + np.float32(difference)),
        ("test", 5.0, -velocity),
    ):
        write(
            tmp_path / "shear_flow" / "data" / split / "a.hdf5",
            "shear_flow",
            {"Reynolds": 1e4, "Schmidt": schmidt},
            [0],
            velocity=v,
        )
    assert bool(leakage(find_flows(tmp_path, "shear_flow")).loc["valid", "train"]) is twins


@pytest.mark.parametrize(
    "system, labels",
    [("active_matter", {"alpha": -1.0, "zeta": 3.0}), ("rayleigh_benard", {"Prandtl": 1.0, "Rayleigh": 1e6})],
)
def test_other_systems_are_twins_in_all_fields(tmp_path, system, labels):
    every = [f.name for f in get_system(system).fields]
    for split, seed in (("train", 0), ("valid", 0), ("test", 1)):
        write(tmp_path / system / "data" / split / "a.hdf5", system, labels, [seed], shared=every)
    found = leakage(find_flows(tmp_path, system))
    assert found.loc["valid", "train"] == 1 and found.loc["test", "train"] == 0
    lines, ranges = data_report(tmp_path, system, frames=1)
    assert lines.loc["test", "windows"] == 2 and len(ranges) == 3 * get_system(system).n_channels


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path):
    tracer = np.ones((1, 4, 8, 16), dtype=np.float32)
    path = write(
        tmp_path / "shear_flow" / "data" / "train" / "a.hdf5",
        "shear_flow",
        {"Reynolds": 1e4, "Schmidt": 1.0},
        [0],
        n_frames=4,
        tracer=tracer,
    )
    with h5py.File(path, "r+") as f:
        f["t0_fields/tracer"][0, 0, 0, :3], f["t0_fields/tracer"][0, 1, 0, 0] = np.nan, np.inf
    lines, ranges = data_report(tmp_path, "shear_flow", ["train"])
    assert lines.loc["train", "not finite"] == 3, "frame 1 is neither first, middle nor last"
    assert ranges.loc[("tracer", "train")].to_dict() == {"min": 1.0, "mean": 1.0, "rms": 1.0, "max": 1.0}
    assert data_report(tmp_path, "shear_flow", ["train"], every=1)[0].loc["train", "not finite"] == 4


def test_dealing_is_repeatable_and_keeps_whole_flows(tmp_path):
    flows = find_flows(shear(tmp_path), "shear_flow")
    first, second = (deal_flows(flows, "shear_flow") for _ in range(2))
    assert first.equals(second) and (first.groupby("flow").split.nunique() == 1).all()
    assert set(first.split) == {"train", "valid", "test"}


def test_a_view_is_read_like_the_published_files_with_the_true_box(tmp_path):
    dealt = write_leak_free(shear(tmp_path / "published"), tmp_path / "view", "shear_flow")
    windows = [Windows(tmp_path / "view", "shear_flow", s, frames=2) for s in ("train", "valid", "test")]
    check_disjoint(*windows)
    for w in windows:
        for file in w.files:
            rows = dealt[(dealt.split == w.split) & (dealt.Schmidt == file.labels["Schmidt"])]
            for i, row in enumerate(rows.itertuples()):
                source = WellFile(row.file, "shear_flow")
                assert np.array_equal(file.window(i, 0, 2), source.window(row.trajectory, 0, 2))
                assert file.spacing == pytest.approx(source.spacing)
    assert (tmp_path / "view" / "shear_flow" / "stats.yaml").is_file()


def test_views_move_with_their_sources(tmp_path):
    write_leak_free(shear(tmp_path / "here" / "published"), tmp_path / "here" / "view", "shear_flow")
    (tmp_path / "here").rename(tmp_path / "there")
    assert np.isfinite(Windows(tmp_path / "there" / "view", "shear_flow", "train", frames=2).read([0]).numpy()).all()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: p.unlink(), "is a view of .*Sc_0.5.hdf5, which is not there"),
        (lambda p: p.write_bytes(p.read_bytes()[:-4096]), "Sc_0.5.hdf5: truncated"),
    ],
)
def test_views_of_what_is_gone_are_refused(tmp_path, spoil, message):
    "HDF5 itself would read zeros."
    write_leak_free(shear(tmp_path / "published"), tmp_path / "view", "shear_flow")
    spoil(tmp_path / "published" / "shear_flow" / "data" / "train" / "Sc_0.5.hdf5")
    with pytest.raises(DamagedFileError, match=message):
        Windows(tmp_path / "view", "shear_flow", "train", frames=2)


def test_a_flow_that_starts_with_nan_is_like_no_other(tmp_path):
    velocity = np.random.default_rng(0).normal(size=(3, 1, 8, 16, 2)).astype(np.float32)
    for split in ("train", "valid", "test"):
        write(
            tmp_path / "shear_flow" / "data" / split / "a.hdf5",
            "shear_flow",
            {"Reynolds": 1e4, "Schmidt": 1.0},
            [0, 1, 2],
            n_frames=1,
            velocity=velocity,
        )
        with h5py.File(tmp_path / "shear_flow" / "data" / split / "a.hdf5", "r+") as f:
            f["t1_fields/velocity"][1] = np.nan
    flows = find_flows(tmp_path, "shear_flow")
    assert sorted(flows.groupby("flow").size()) == [1, 1, 1, 3, 3]
    _, ranges = data_report(tmp_path, "shear_flow", ["train"], frames=1)
    assert np.isfinite(ranges.to_numpy()).all(), "of the values that are finite"


def test_from_the_command_line(tmp_path, capsys):
    assert main(["shear_flow", str(shear(tmp_path)), "--frames", "1"]) == 0
    out = capsys.readouterr().out
    assert "not finite" in out and "velocity_x" in out and "trajectories with a twin" in out
    assert (
        main(["shear_flow", str(tmp_path), "--split", "tset"]) == 1 and "splits with files" in capsys.readouterr().out
    )
    assert main(["shear", str(tmp_path)]) == 1 and "unknown system 'shear'" in capsys.readouterr().out


def test_a_channel_without_a_finite_value_has_no_range(tmp_path):
    write(tmp_path / "shear_flow" / "data" / "train" / "a.hdf5", "shear_flow", {"Reynolds": 1e4, "Schmidt": 1.0}, [0])
    with h5py.File(tmp_path / "shear_flow" / "data" / "train" / "a.hdf5", "r+") as f:
        f["t0_fields/tracer"][:] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines, ranges = data_report(tmp_path, "shear_flow", ["train"], frames=1)
    assert (
        ranges.loc["tracer"].isna().to_numpy().all()
        and ranges.drop(index="tracer").notna().to_numpy().all()
        and lines["not finite"].item() == 2 * 8 * 16
    )


def test_labels_that_vary_in_a_file_are_refused(tmp_path):
    for split in ("train", "valid", "test"):
        write(
            tmp_path / "shear_flow" / "data" / split / "a.hdf5", "shear_flow", {"Reynolds": 1e4, "Schmidt": 1.0}, [0, 1]
        )
    with h5py.File(tmp_path / "shear_flow" / "data" / "test" / "a.hdf5", "r+") as f:
        del f["scalars/Schmidt"]
        f["scalars/Schmidt"] = np.array([1.0, 2.0], dtype=np.float32)
    with pytest.raises(ValueError, match="test/a.hdf5 holds trajectories with different labels"):
        write_leak_free(tmp_path, tmp_path / "view", "shear_flow")
    assert not (tmp_path / "view").exists()


def test_files_of_one_name_with_other_parameters_in_another_split_lose_no_trajectory(tmp_path):
    "A view is called like the file of its first flow; here the numbers of files mean something else in each split."
    names = {"train": (1e4, 5e4), "valid": (5e4, 1e4), "test": (5e4, 1e4)}
    for first, (split, numbers) in enumerate(names.items()):
        for k, reynolds in enumerate(numbers):
            seeds = [*range(10 * first, 10 * first + 3), 5]  # 5 is in every split
            labels = {"Reynolds": reynolds, "Schmidt": 1.0}
            write(tmp_path / "shear_flow" / "data" / split / f"flow{k}.hdf5", "shear_flow", labels, seeds)
    dealt = write_leak_free(tmp_path, tmp_path / "view", "shear_flow")
    written = {s: Windows(tmp_path / "view", "shear_flow", s, frames=2) for s in names}
    assert sum(file.n_trajectories for w in written.values() for file in w.files) == len(dealt) == 24
    for split, w in written.items():
        found = sorted(float(file.labels["Reynolds"]) for file in w.files for _ in range(file.n_trajectories))
        assert found == sorted(dealt[dealt.split == split].Reynolds)


def test_scalars_of_every_trajectory_become_those_of_the_rows(tmp_path):
    shear(tmp_path / "published")
    for path in (tmp_path / "published").rglob("*.hdf5"):
        with h5py.File(path, "r+") as f:
            n = f["t0_fields/tracer"].shape[0]
            for name in ("Reynolds", "Schmidt"):
                value = f[f"scalars/{name}"][()]
                del f[f"scalars/{name}"]
                f[f"scalars/{name}"] = np.full(n, value)
            f["scalars/number"] = np.arange(n, dtype=np.float32)
    dealt = write_leak_free(tmp_path / "published", tmp_path / "view", "shear_flow")
    files = [f for s in ("train", "valid", "test") for f in Windows(tmp_path / "view", "shear_flow", s, frames=2).files]
    assert sum(file.n_trajectories for file in files) == len(dealt)
    for file in files:
        with h5py.File(file.path) as f:
            assert f["scalars/Reynolds"].shape == () and f["scalars/Reynolds"][()] == 1e4
            assert f["scalars/number"].size in (1, file.n_trajectories)


def test_a_set_that_is_not_written_leaves_nothing(tmp_path, monkeypatch):
    shear(tmp_path / "published")
    with monkeypatch.context() as patch:
        patch.setattr("physrep.data.leakage.write_stats", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_leak_free(tmp_path / "published", tmp_path / "view", "shear_flow")
    assert not (tmp_path / "view" / "shear_flow").exists()
    write_leak_free(tmp_path / "published", tmp_path / "view", "shear_flow")
    assert sorted(p.name for p in (tmp_path / "view").iterdir()) == ["shear_flow"]


def test_fewer_flows_than_splits_cannot_be_dealt(tmp_path):
    flows = find_flows(shear(tmp_path), "shear_flow")
    two = flows[flows.flow.isin(flows.flow.unique()[:2])]
    few = two.assign(split=(["train", "valid", "test"] * len(two))[: len(two)])
    with pytest.raises(ValueError, match="3 splits need as many flows with Reynolds = 10000, there are 2; leave a"):
        deal_flows(few, "shear_flow")

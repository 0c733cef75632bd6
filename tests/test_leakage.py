"""Leakage where its notebook does not look: bad values, other systems, records, views that cannot be."""

import shutil
import warnings

import h5py
import numpy as np
import pytest
from broken import change

from physrep.data.download import check_files
from physrep.data.leakage import data_report, deal_flows, find_flows, leakage, main, write_leak_free
from physrep.data.scaling import LabelScaler
from physrep.data.sets import find_files, fingerprint
from physrep.data.well import RECIPE, UnreadableFileError, WellFile, WellFormatError
from physrep.data.windows import Windows, check_disjoint
from physrep.data.write import write_well
from physrep.physics.systems import get_system
from physrep.probing import evaluate
from physrep.probing.evaluate import bootstrap_groups, window_flows, write_scores
from physrep.probing.features import probe_splits
from physrep.probing.records import read_predictions
from physrep.training.run import resolve

SPLITS = ("train", "valid", "test")
BOX = {"active_matter": (10.0, 10.0), "shear_flow": (1.0, 2.0), "rayleigh_benard": (4.0, 1.0)}
LABELS = {"Reynolds": 1e4, "Schmidt": 1.0}


def write(root, split, seeds, labels=LABELS, system="shear_flow", name="a", record=False, n_frames=2, **change):
    "A file of noise; the velocity of a shear flow depends on seed and Reynolds number alone, other fields on all."
    s, grid = get_system(system), (8, 16)
    fields = {}
    for f in s.fields:
        names = s.group if f.name == "velocity" and s.group else s.label_names
        key = [len(f.name), *(abs(int(1000 * labels[n])) for n in names)]
        shape = (n_frames, *grid, *(2,) * f.rank)
        fields[f.name] = np.stack([np.random.default_rng([seed, *key]).normal(size=shape) for seed in seeds])
    options = dict(time=0.1 * np.arange(n_frames), box=BOX[system])
    if system == "rayleigh_benard":
        options["coordinates"] = {"y": np.linspace(0, 1, grid[1])}
    if record:
        options["initial_conditions"] = list(seeds)
    return write_well(root / system / "data" / split / f"{name}.hdf5", system, fields | change, labels, **options)


def shear(root, record=False):
    "Seeds 0 to 7 at one Schmidt number and 4 to 11 at another, with twins in all splits."
    for split, seeds in {"train": (range(8), range(4, 12)), "valid": ((8,), (0,)), "test": ((9,), (1,))}.items():
        for schmidt, s in zip((0.5, 2.0), seeds):
            write(root, split, s, LABELS | {"Schmidt": schmidt}, name=f"Sc_{schmidt}", record=record)
    return root


def velocity(n=1, seed=0, n_frames=2):
    return np.random.default_rng(seed).normal(size=(n, n_frames, 8, 16, 2)).astype(np.float32)


@pytest.mark.parametrize("record", [False, True])
def test_planted_twins_are_found_and_drawn_together_with_and_without_a_record(tmp_path, record):
    table = leakage(find_flows(shear(tmp_path, record), "shear_flow"))
    assert table.loc["valid"].to_dict() == {"train": 2, "test": 0, "valid": 0, "trajectories": 2}
    assert table.loc["test", "train"] == 2
    windows = Windows(tmp_path / "shear_flow", "shear_flow", "train", frames=1)
    found = {}  # flow -> initial conditions of its windows
    for flow, (k, _) in zip(window_flows(windows), windows.index):
        found.setdefault(int(flow), set()).add((0, 4)[windows.trajectories[k][0]] + windows.trajectories[k][1])
    assert len(found) == 12 and all(len(s) == 1 for s in found.values()), "16 trajectories, 4 of them twins"


def test_the_bootstrap_draws_new_parameters_with_all_their_flows(tmp_path):
    for split, number in (("train", 3), ("test", 14), ("valid", 3)):
        for k in range(number):
            labels = LABELS | {"Reynolds": 1e4 * (1 + k + (split == "test") / 2)}
            write(tmp_path, split, [0, 1], labels, name=str(k), velocity=velocity(2, seed=[k, len(split)]))
    train, valid, test = (Windows(tmp_path, "shear_flow", s, frames=1) for s in SPLITS)
    flows, groups = window_flows(test), bootstrap_groups(test, train)
    assert len(np.unique(flows)) == 28 and len(np.unique(groups)) == 14
    assert all(len(np.unique(test.labels[test.index[groups == g, 0]], axis=0)) == 1 for g in groups)
    for other, of in ((valid, train), (train, train), (test, test), (valid, test)):  # known parameters, or few draws
        assert np.array_equal(bootstrap_groups(other, of), window_flows(other))


def test_scores_are_drawn_by_parameters(smoke_data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "ENOUGH", 2)  # smoke has four draws
    windows = probe_splits(resolve("shear_flow", "random", "vit", "smoke", data_dir=smoke_data))
    valid = windows["valid"]
    truth = {("linear", "valid"): valid.targets(np.arange(len(valid)))}
    scaler = LabelScaler.fit(get_system("shear_flow"), windows["train"].labels)
    monkeypatch.chdir(tmp_path)
    windows["train"].groups[:] = 0  # as if all flows started alike
    here = write_scores(".", truth, windows, scaler, objective="mae", encoder="vit")
    assert {row["run"] for row in here.rows} == {tmp_path.name}, "a folder has a name, however it is called"
    assert {row["labelled_flows"] for row in here.rows} == {8}, "parameters of smoke, each with one initial condition"
    groups = read_predictions(tmp_path).groups["valid"]
    assert len(np.unique(groups)) == len(np.unique(valid.labels, axis=0)) < len(np.unique(valid.groups))


def test_a_flow_of_train_in_valid_is_refused_wherever_splits_are_loaded(smoke_data, tmp_path):
    folder = shutil.copytree(smoke_data / "shear_flow", tmp_path / "shear_flow")
    source = min((folder / "data" / "train").glob("*.hdf5"))
    shutil.copy(source, folder / "data" / "valid" / source.name)
    with pytest.raises(ValueError, match="of 'valid' have an initial condition that 'train' has too"):
        probe_splits(resolve("shear_flow", "random", "vit", "smoke", data_dir=tmp_path))


@pytest.mark.parametrize(
    "change, difference, twins",
    [({"Schmidt": 2.0}, 1e-7, True), ({"Schmidt": 2.0}, 1e-2, False), ({"Reynolds": 5e4}, 0.0, False)],
    ids=["rounding", "another start", "another Reynolds number"],
)
def test_what_a_twin_is(tmp_path, change, difference, twins):
    v = velocity()
    write(tmp_path, "train", [0], velocity=v)
    write(tmp_path, "valid", [0], LABELS | change, velocity=v + np.float32(difference))
    write(tmp_path, "test", [0], LABELS | {"Schmidt": 5.0}, velocity=-v)
    found = leakage(find_flows(tmp_path, "shear_flow"))
    assert bool(found.loc["valid", "train"]) is twins and not found.loc["test", ["train", "valid"]].any()


@pytest.mark.parametrize(
    "system, labels",
    [("active_matter", {"alpha": -1.0, "zeta": 3.0}), ("rayleigh_benard", {"Prandtl": 1.0, "Rayleigh": 1e6})],
)
def test_other_systems_are_twins_in_all_fields(tmp_path, system, labels):
    for split, seed in (("train", 0), ("valid", 0), ("test", 1)):
        write(tmp_path, split, [seed], labels, system)
    found = leakage(find_flows(tmp_path, system))
    assert found.loc["valid", "train"] == 1 and found.loc["test", "train"] == 0
    lines, ranges = data_report(tmp_path, system, frames=1)
    assert lines.loc["test", "windows"] == 2 and len(ranges) == 3 * get_system(system).n_channels


@pytest.mark.parametrize("seed, flows", [(1, 2), (0, 1)], ids=["another start", "rounding"])
def test_a_field_of_large_values_hides_no_other(tmp_path, seed, flows):
    for split, k, temperature in (("train", 0, 300.0), ("test", seed, np.nextafter(np.float32(300), 400))):
        fields = {"buoyancy": np.full((1, 2, 8, 16), temperature), "velocity": 2e-3 * velocity(seed=k)}
        labels = {"Prandtl": 1.0, "Rayleigh": 1e6}
        write(tmp_path, split, [0], labels, "rayleigh_benard", pressure=np.zeros((1, 2, 8, 16)), **fields)
    assert find_flows(tmp_path, "rayleigh_benard", ["train", "test"]).flow.nunique() == flows


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path):
    path = write(tmp_path, "train", [0], n_frames=4, tracer=np.ones((1, 4, 8, 16)))
    with h5py.File(path, "r+") as f:
        f["t0_fields/tracer"][0, 0, 0, :3], f["t0_fields/tracer"][0, 1, 0, 0] = np.nan, np.inf
        f["t0_fields/pressure"][:] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines, ranges = data_report(tmp_path, "shear_flow", ["train"], frames=1)
        more = data_report(tmp_path, "shear_flow", ["train"], every=1)[0]
    assert lines.loc["train", "not finite"] == 3 + 3 * 128, "frame 1 is neither first, middle nor last"
    assert ranges.loc[("tracer", "train")].to_dict() == {"min": 1.0, "mean": 1.0, "rms": 1.0, "max": 1.0}
    assert ranges.loc["pressure"].isna().to_numpy().all() and ranges.drop(index="pressure").notna().to_numpy().all()
    assert more.loc["train", "not finite"] == 4 + 4 * 128


def test_a_flow_that_starts_with_nan_is_like_no_other(tmp_path):
    for split in SPLITS:
        with h5py.File(write(tmp_path, split, [0, 1, 2], n_frames=1, velocity=velocity(3, n_frames=1)), "r+") as f:
            f["t1_fields/velocity"][1] = np.nan
    assert sorted(find_flows(tmp_path, "shear_flow").groupby("flow").size()) == [1, 1, 1, 3, 3]


def test_dealing_is_repeatable_and_keeps_whole_flows(tmp_path):
    flows = find_flows(shear(tmp_path), "shear_flow")
    first, second = (deal_flows(flows, "shear_flow") for _ in range(2))
    assert first.equals(second) and (first.groupby("flow").split.nunique() == 1).all()
    assert set(first.split) == set(SPLITS)
    few = flows[flows.flow.isin(flows.flow.unique()[:2])]
    few = few.assign(split=(list(SPLITS) * len(few))[: len(few)])
    with pytest.raises(ValueError, match="3 splits need as many flows with Reynolds = 10000, there are 2; leave a"):
        deal_flows(few, "shear_flow")


def test_a_view_is_read_like_the_published_files_with_the_true_box_wherever_both_are_moved(tmp_path):
    dealt = write_leak_free(shear(tmp_path / "here" / "published"), tmp_path / "here" / "view", "shear_flow")
    (tmp_path / "here").rename(tmp_path / "there")
    windows = [Windows(tmp_path / "there" / "view", "shear_flow", s, frames=2) for s in SPLITS]
    check_disjoint(*windows)
    for w in windows:
        for file in w.files:
            rows = dealt[(dealt.split == w.split) & (dealt.Schmidt == file.labels["Schmidt"])]
            assert file.n_trajectories == len(rows)
            for i, row in enumerate(rows.itertuples()):
                source = WellFile(str(row.file).replace("/here/", "/there/"), "shear_flow")
                assert np.array_equal(file.window(i, 0, 2), source.window(row.trajectory, 0, 2))
                assert file.spacing == pytest.approx(source.spacing)
    assert (tmp_path / "there" / "view" / "shear_flow" / "stats.yaml").is_file()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: p.unlink(), "is a view of .*Sc_0.5.hdf5: no such file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-4096]), "Sc_0.5.hdf5: truncated"),
    ],
)
def test_views_of_what_is_gone_are_refused(tmp_path, spoil, message):
    "HDF5 itself would read zeros."
    write_leak_free(shear(tmp_path / "published"), tmp_path / "view", "shear_flow")
    spoil(tmp_path / "published" / "shear_flow" / "data" / "train" / "Sc_0.5.hdf5")
    with pytest.raises(UnreadableFileError, match=message):
        Windows(tmp_path / "view", "shear_flow", "train", frames=2)
    check_files(tmp_path / "view" / "shear_flow", "shear_flow", remove=True)
    assert len(list(tmp_path.glob("view/*/data/*/*.hdf5"))) == 6, "views are whole, whatever became of what they show"


def test_a_view_of_what_changed_or_moved_after_it_was_opened_is_not_read(tmp_path):
    write_leak_free(shear(tmp_path / "published"), tmp_path / "once", "shear_flow")
    write_leak_free(tmp_path / "once", tmp_path / "twice", "shear_flow")
    for spoil in (lambda p: p.write_bytes(p.read_bytes()), lambda p: p.rename(p.with_name("b"))):
        views = [Windows(tmp_path / s, "shear_flow", "train", frames=2, in_memory=False) for s in ("once", "twice")]
        assert all(w.read(range(len(w))).all() for w in views), "no zeros"
        spoil(tmp_path / "published" / "shear_flow" / "data" / "train" / "Sc_0.5.hdf5")
        for windows in views:
            for read in (lambda w=windows: w.read(range(len(w))), windows.fingerprint):
                with pytest.raises(WellFormatError, match="5.hdf5: changed since it was opened; open .*hdf5 again"):
                    read()


def test_from_the_command_line(tmp_path, capsys):
    assert main(["shear_flow", str(shear(tmp_path)), "--frames", "1"]) == 0
    out = capsys.readouterr().out
    assert "not finite" in out and "velocity_x" in out and "trajectories with a twin" in out
    assert main(["shear_flow", str(tmp_path), "--split", "tset"]) == 1
    assert "splits with files" in capsys.readouterr().out


def test_labels_that_vary_in_a_file_are_refused(tmp_path):
    for split in SPLITS:
        path = write(tmp_path, split, [0, 1])
    with h5py.File(path, "r+") as f:
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
            write(tmp_path, split, seeds, LABELS | {"Reynolds": reynolds}, name=f"flow{k}")
    dealt = write_leak_free(tmp_path, tmp_path / "view", "shear_flow")
    for split in names:
        w = Windows(tmp_path / "view", "shear_flow", split, frames=2)
        assert sorted(w.labels[:, 0]) == sorted(dealt[dealt.split == split].Reynolds)


def test_scalars_of_every_trajectory_become_those_of_the_rows(tmp_path):
    for path in shear(tmp_path / "published").rglob("*.hdf5"):
        with h5py.File(path, "r+") as f:
            n = f["t0_fields/tracer"].shape[0]
            for name in ("Reynolds", "Schmidt"):
                value = f[f"scalars/{name}"][()]
                del f[f"scalars/{name}"]
                f[f"scalars/{name}"] = np.full(n, value)
            f["scalars/number"] = np.arange(n, dtype=np.float32)
    dealt = write_leak_free(tmp_path / "published", tmp_path / "view", "shear_flow")
    for split in SPLITS:
        for file in Windows(tmp_path / "view", "shear_flow", split, frames=2).files:
            (schmidt,) = set(file.labels["Schmidt"])
            rows = dealt[(dealt.split == split) & (dealt.Schmidt == schmidt)]
            with h5py.File(file.path) as f:
                assert f["scalars/number"][()].tolist() == rows.trajectory.tolist()


def test_a_view_of_simulated_flows_is_not_taken_for_them(tmp_path):
    "Files that say that a recipe made them are told apart by it alone."
    for path in shear(tmp_path / "published").rglob("*.hdf5"):
        change(path, lambda file: file.attrs.update({RECIPE: "0" * 16}))
    write_leak_free(tmp_path / "published", tmp_path / "view", "shear_flow")
    one, other = (fingerprint(find_files(tmp_path / s, "shear_flow", "train")) for s in ("published", "view"))
    assert one != other


def test_a_set_that_is_not_written_leaves_nothing(tmp_path, monkeypatch):
    shear(tmp_path / "published")
    with monkeypatch.context() as patch:
        patch.setattr("physrep.data.leakage.write_stats", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_leak_free(tmp_path / "published", tmp_path / "view", "shear_flow")
    assert not (tmp_path / "view" / "shear_flow").exists()
    write_leak_free(tmp_path / "published", tmp_path / "view", "shear_flow")
    assert sorted(p.name for p in (tmp_path / "view").iterdir()) == ["shear_flow"]

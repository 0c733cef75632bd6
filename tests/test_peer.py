"""Files drawn in The Well's layout: what its own reader reads, ours reads equally or refuses with a reason."""

from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from the_well.data import WellDataset
from the_well.data.datasets import BoundaryCondition, WellMetadata

from physrep.data.windows import Windows
from physrep.physics.systems import Field, Label, System

OPEN, PERIODIC = BoundaryCondition.OPEN.value, BoundaryCondition.PERIODIC.value
rarely = st.sampled_from([False] * 39 + [True])
floats = st.sampled_from(["f4", "f8"])
FIELDS = (Field("heat"), Field("fuel"), Field("velocity", 1), Field("stress", 2))
LABELS = (Label("Damkohler", log=True, paper_log=True), Label("angle", log=False, paper_log=False))


@st.composite
def systems(draw) -> System:
    "A system with some of the fields in any order, with or without walls."
    fields = draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3, unique=True))
    boundary = draw(st.tuples(*[st.sampled_from(["periodic", "wall"])] * 2))
    axes = draw(st.sampled_from([("x", "y"), ("r", "z")]))
    return System("mine", "Mine", tuple(fields), LABELS, axes=axes, boundary=boundary)


def put(group: h5py.Group, name: str, values: np.ndarray, varies: tuple[bool, ...], draw, **storage: object) -> None:
    "A dataset that says whether it varies by trajectory, by frame, and along the axes; rarely one of these is wrong."
    said = np.array(varies) ^ (draw(rarely) & (np.arange(len(varies)) == draw(st.integers(0, 3))))
    group.create_dataset(name, data=values, **storage)
    group[name].attrs.update(sample_varying=said[0], time_varying=said[1], dim_varying=said[2:])


def put_fields(file: h5py.File, system: System, shape: tuple[int, ...], draw, rng: np.random.Generator) -> None:
    "Fields; rarely one is constant by trajectory, by frame or along an axis, or holds what float32 does not."
    for rank in range(3):
        group, names = file.create_group(f"t{rank}_fields"), [f.name for f in system.fields if f.rank == rank]
        group.attrs["field_names"] = np.array(draw(st.permutations(names)), dtype=h5py.string_dtype())
        for name in names:
            varies = tuple(not draw(rarely) for _ in shape)
            leading = [n for n, varying in zip(shape[:2], varies[:2]) if varying]
            points = [n if varying else 1 for n, varying in zip(shape[2:], varies[2:])]
            values = rng.normal(size=(*leading, *points, *(2,) * rank))
            values.flat[0] = draw(st.sampled_from([1.0] * 30 + [np.nan, 1e300]))
            with np.errstate(over="ignore"):
                values = values.astype(draw(floats))
            put(group, name, values, varies, draw, compression=draw(st.sampled_from([None, "gzip"])))


def put_scalars(file: h5py.File, shape: tuple[int, ...], draw, rng: np.random.Generator) -> None:
    "Labels, and a scalar that is none: one number or one per trajectory, rarely one per frame."
    group, names = file.create_group("scalars"), [*(label.name for label in LABELS), "gravity"]
    group.attrs["field_names"] = np.array(draw(st.permutations(names)), dtype=h5py.string_dtype())
    for name in names:
        varies = draw(st.booleans()), draw(rarely)
        values = rng.uniform(0.1, 9, [n for n, v in zip(shape, varies) if v]).astype(draw(floats))
        put(group, name, values, varies, draw)


def put_dimensions(file: h5py.File, system: System, shape: tuple[int, ...], draw) -> None:
    "Time and coordinates of any spacing and origin; rarely uneven, or (time: often) of each trajectory."
    group = file.create_group("dimensions")
    group.attrs["spatial_dims"], dtype = list(system.axes), draw(floats)
    for name, n, each in zip(("time", *system.axes), shape[1:], (st.booleans(), rarely, rarely)):
        points = np.arange(n) ** (2 if draw(rarely) else 1) * draw(st.sampled_from([0.1, 0.5, 3.0]))
        if varies := draw(each):
            points = points * np.linspace(1, draw(st.sampled_from([1, 1.005, 2])), shape[0])[:, None]
        points = (points + draw(st.sampled_from([0, 2]))).astype(dtype)
        put(group, name, points, (varies, name == "time"), draw)


def put_boundaries(file: h5py.File, system: System, grid: tuple[int, ...], draw) -> None:
    "Mostly what the system declares; rarely another kind or none, a condition of both axes, or one inside the grid."
    group, kinds = file.create_group("boundary_conditions"), st.sampled_from(["WALL", "OPEN", "PERIODIC"])
    conditions = [([i], system.boundary[i].upper()) for i in range(2) if not draw(rarely)]
    conditions += [(axes, draw(kinds)) for axes in ([0], [1], [0, 1]) if draw(rarely)]
    for number, (axes, kind) in enumerate(draw(st.permutations(conditions))):
        mask = np.ones([grid[i] for i in axes], bool)
        mask[(slice(1, -1),) * len(axes)] = False
        one = group.create_group(f"{number}")
        one["mask"] = mask ^ draw(rarely)
        one.attrs.update(bc_type=kind, associated_dims=[system.axes[i] for i in axes])


def write(path: Path, system: System, frames: int, draw) -> None:
    "A small file of that system, with at least so many frames, and grids of either parity."
    shape = draw(st.tuples(st.integers(1, 3), st.integers(frames, 5), st.integers(1, 5), st.integers(1, 5)))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs.update(dataset_name="mine", grid_type="cartesian", n_spatial_dims=2, n_trajectories=shape[0])
        put_fields(file, system, shape, draw, rng)
        put_scalars(file, shape, draw, rng)
        put_dimensions(file, system, shape, draw)
        put_boundaries(file, system, shape[2:], draw)


def peer(root: Path, frames: int) -> tuple[WellMetadata, list[dict]]:
    """The Well's reader: what it says of the files, and the windows.

    ValueError for arrays of other shapes than it announces, as where a dataset says wrongly by what it varies."""
    options = dict(n_steps_input=frames, n_steps_output=0, use_normalization=False, normalize_time_grid=False)
    dataset = WellDataset(path=str(root), well_split_name="train", **options)
    about = dataset.metadata
    expected = {k: tuple(v) for k, v in about.sample_shapes.items()} | {"input_time_grid": ()}
    windows = [{k: v.numpy() for k, v in dataset[i].items()} for i in range(len(dataset))]
    for key, value in ((k, v) for window in windows for k, v in window.items() if k in expected):
        if value.shape != ((frames,) if key.startswith("input") else ()) + expected[key]:
            raise ValueError(f"{key} is {value.shape}")
    return about, windows


def compare(ours: Windows, about: WellMetadata, theirs: list[dict]) -> None:
    "AssertionError where windows, labels, times, points or boundaries are not equal."
    [file], system, frames = ours.files, ours.system, ours.frames
    channels, kinds = [name for rank in range(3) for name in about.field_names[rank]], about.boundary_condition_types
    scalars = [about.constant_scalar_names.index(name) for name in system.label_names]
    assert len(ours) == len(theirs)
    times = np.broadcast_to(file.time, (file.n_trajectories, file.n_frames))
    for i, window in enumerate(theirs):
        order = [channels.index(name) for name in system.channels]
        np.testing.assert_array_equal(ours.read([i])[0], np.moveaxis(window["input_fields"], -1, 0)[order].astype("f4"))
        labels = window["constant_scalars"][scalars]
        np.testing.assert_array_equal(ours.targets([i])[0].astype("f4"), labels.astype("f4"))
        trajectory, start = ours.index[i]
        np.testing.assert_array_equal(times[trajectory, start : start + frames], window["input_time_grid"])
        if frames > 1:
            np.testing.assert_allclose(np.diff(window["input_time_grid"]), file.dt, rtol=0.02)
        x, y = window["space_grid"][:, 0, 0], window["space_grid"][0, :, 1]
        for points, spacing in zip((x, y), file.spacing):
            steps = np.diff(points)
            even = len(steps) > 0 and np.allclose(steps, steps.mean(), rtol=1e-3, atol=0)
            np.testing.assert_allclose(steps.mean() if even else np.nan, spacing, rtol=1e-5)
        assert file.positions is None or np.array_equal(file.positions, y)
        for kind, sides in zip(system.boundary, window["boundary_conditions"]):
            unsaid = "OPEN" not in kinds and (sides == OPEN).any()  # which is also its default
            assert unsaid or (sides == PERIODIC).all() == (kind == "periodic")


def outcome(root: Path, system: System, frames: int) -> str:
    "Who reads the set; AssertionError where both do and do not agree, or where ours gives no reason."
    try:
        theirs = peer(root, frames)
    except (AssertionError, IndexError, KeyError, RuntimeError, ValueError):
        return "refused by the peer"
    try:
        ours = Windows(root, system, "train", frames=frames)
        ours.read(range(len(ours)))
    except ValueError as error:
        foreseen = "a part of it is not as in The Well's format" not in str(error)
        assert "a.hdf5: " in str(error) and foreseen
        return "refused"
    compare(ours, *theirs)
    return "equal"


@pytest.mark.filterwarnings("ignore:overflow", "ignore:Only axis-aligned")
@pytest.mark.parametrize("examples", [25, pytest.param(1000, marks=pytest.mark.long)])
def test_what_the_wells_reader_reads_ours_reads_equally_or_refuses(examples, tmp_path):
    outcomes = Counter()
    path = tmp_path / "data" / "train" / "a.hdf5"

    @settings(derandomize=True, database=None, max_examples=examples, deadline=None)
    @given(system=systems(), frames=st.integers(1, 3), data=st.data())
    def check(system, frames, data):
        write(path, system, frames, data.draw)
        outcomes[outcome(tmp_path, system, frames)] += 1

    check()
    assert outcomes["equal"] > examples / 5 and outcomes["refused"], f"{outcomes}: it proves little"

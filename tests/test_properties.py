"""Properties that hold for every input of a kind: windows, splits, plans, label transforms, files."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from physrep.data.generate import draw_parameters, plan
from physrep.data.scaling import LabelScaler
from physrep.data.well import WellFile
from physrep.data.windows import Windows, check_disjoint
from physrep.data.write import write_well
from physrep.physics.systems import SYSTEMS, get_system
from physrep.training.presets import PRESETS

# the same inputs in every run, and no file of a database of examples
few = settings(
    derandomize=True,
    database=None,
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
sizes = st.integers(1, 5)
systems = st.sampled_from(sorted(SYSTEMS))


def write(path: Path, system, shape: tuple[int, ...], seed: int, **options: object) -> dict[str, np.ndarray]:
    "A file of random numbers; returns its fields."
    rng = np.random.default_rng(seed)
    fields = {f.name: rng.normal(size=(*shape, *(2,) * f.rank)).astype(np.float32) for f in system.fields}
    walls = [a for a, kind in zip(system.axes, system.boundary) if kind == "wall"]
    n = dict(zip(system.axes, shape[2:]))
    centres = {a: (np.arange(n[a]) + 0.5) / n[a] for a in walls}
    labels = dict.fromkeys(system.label_names, 1.0)
    options = dict(time=np.arange(shape[1]) * 0.1, box=(2.0, 1.0), coordinates=centres) | options
    write_well(path, system, fields, labels, **options)
    return fields


@few
@given(
    frames=st.integers(1, 6),
    stride=st.integers(1, 4),
    lengths=st.lists(st.tuples(st.integers(1, 3), st.integers(2, 9)), min_size=1, max_size=3),  # one frame has no step
)
def test_windows_lie_inside_their_trajectories_and_are_as_many_as_the_formula_says(tmp_path, frames, stride, lengths):
    system = get_system("shear_flow")
    root = tmp_path / f"{frames}-{stride}-{'_'.join(f'{b}x{t}' for b, t in lengths)}"
    for i, (b, t) in enumerate(lengths):
        write(root / "shear_flow" / "data" / "train" / f"{i}.hdf5", system, (b, t, 2, 2), i)
    expected = sum(b * max(0, (t - frames) // stride + 1) for b, t in lengths)
    if not expected:
        with pytest.raises(ValueError, match=f"no trajectory of .* has {frames} frames; the longest has"):
            Windows(root, "shear_flow", "train", frames=frames, stride=stride)
        return
    windows = Windows(root, "shear_flow", "train", frames=frames, stride=stride)
    length = np.repeat([t for _, t in lengths], [b for b, _ in lengths])
    trajectory, start = windows.index.T
    assert len(windows) == expected == len(np.unique(windows.index, axis=0))
    assert (start >= 0).all() and (start + frames <= length[trajectory]).all() and (start % stride == 0).all()
    assert windows.read([0, len(windows) - 1]).shape == (2, 4, frames, 2, 2)


@few
@given(
    conditions=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), min_size=2, max_size=2),
)
def test_splits_are_disjoint_if_their_initial_conditions_are(tmp_path, conditions):
    root = tmp_path / "-".join("".join(map(str, c)) for c in conditions)
    parts = []
    for split, own in zip(("train", "valid"), conditions):
        path = root / "shear_flow" / "data" / split / "a.hdf5"
        write(path, get_system("shear_flow"), (len(own), 2, 2, 2), 0, initial_conditions=own)  # equal labels
        parts.append(Windows(root, "shear_flow", split, frames=1))
    shared = set(conditions[0]) & set(conditions[1])
    if not shared:
        check_disjoint(*parts)
        return
    with pytest.raises(ValueError, match=f"{len(shared)} of {len(conditions[1])} trajectories of 'valid'"):
        check_disjoint(*parts)


@few
@given(system=systems, flows=st.integers(1, 3), draws=st.integers(1, 12), preset=st.sampled_from(["smoke", "laptop"]))
def test_no_draw_of_parameters_and_no_initial_condition_is_planned_twice(system, flows, draws, preset):
    sim = PRESETS[preset].sim(system)
    splits = ("train", "valid", "test")
    sim = replace(sim, draws=dict.fromkeys(splits, (draws, flows)), families={})
    files = plan(system, sim)
    seeds = [seed for f in files for seed in f.seeds]
    assert len(seeds) == len(set(seeds)) == sim.n_trajectories == 3 * draws * flows
    assert len({tuple(f.parameters.values()) for f in files}) == 3 * draws
    for label in get_system(system).labels:
        low, high = label.transform(sim.ranges[label.name])
        for split in splits:
            drawn = label.transform([p[label.name] for p in draw_parameters(system, sim, split)])
            strata = np.floor((drawn - low) / (high - low) * draws * (1 - 1e-5)).astype(int)
            assert (low <= drawn + 1e-5).all() and (drawn <= high + 1e-5).all()
            assert len(set(strata.clip(0, draws - 1))) >= draws - 1, "one in each stratum, but for the sixth digit"


positive = st.floats(1e-3, 1e7, allow_nan=False)


@few
@given(system=systems, values=st.lists(positive, min_size=2, max_size=6, unique=True))
def test_labels_come_back_and_keep_their_order(system, values):
    for label in get_system(system).labels:
        there = label.transform(np.sort(values))
        assert (np.diff(there) >= 0).all(), "monotone"
        assert np.allclose(label.inverse(there), np.sort(values), rtol=1e-9)
        if label.log:
            with pytest.raises(ValueError, match="must be positive"):
                label.transform(-values[0])


@few
@given(system=systems, n=st.integers(2, 8), seed=st.integers(0, 99), spread=st.floats(0.1, 3.0))
def test_scaled_labels_come_back_and_have_mean_0_and_variance_1(system, n, seed, spread):
    about = get_system(system)
    labels = 10 ** np.random.default_rng(seed).normal(scale=spread, size=(n, len(about.labels)))
    scaler = LabelScaler.fit(about, labels)
    z = scaler.transform(labels)
    assert np.allclose(z.mean(0), 0, atol=1e-9) and np.allclose(z.std(0), 1)
    assert np.allclose(scaler.inverse(z), labels) and np.array_equal(scaler.clip(z), z)
    far = scaler.clip(z + 100)
    assert (far <= scaler.high + 0.1 * (scaler.high - scaler.low) + 1e-12).all()


@few
@given(
    system=systems,
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), sizes, st.integers(2, 5)),
    compression=st.sampled_from([None, "gzip", "lzf"]),
    data=st.data(),
)
def test_what_is_written_is_read(tmp_path, system, shape, compression, data):
    about = get_system(system)
    path = tmp_path / f"{system}-{shape}-{compression}.hdf5"
    fields = write(path, about, shape, sum(shape), compression=compression)
    file = WellFile(path, system)
    b, t, h, w = shape
    assert (file.n_trajectories, file.n_frames, *file.grid) == shape
    assert math.isnan(file.dt) if t == 1 else math.isclose(file.dt, 0.1)
    trajectory, start = data.draw(st.integers(0, b - 1)), data.draw(st.integers(0, t - 1))
    x0, y0 = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    window = file.window(trajectory, start, t - start, crop=((x0, h), (y0, w)))
    for f in about.fields:
        whole = fields[f.name][trajectory, start:, x0:, y0:].reshape(t - start, h - x0, w - y0, -1)
        assert np.array_equal(window[about.channel_slice(f.name)], np.moveaxis(whole, -1, 0))

"""The widgets' logic without a browser: what the notebooks of explore do not assert themselves."""

import io
import math
import re
import shutil
import types
import warnings
from dataclasses import replace

import h5py
import numpy as np
import pytest
from PIL import Image

from physrep.data.scaling import LabelScaler
from physrep.data.windows import Windows
from physrep.explore import sets
from physrep.explore.latent import token_colours
from physrep.explore.live import LiveTab
from physrep.explore.page import bar_html
from physrep.explore.pictures import at_even_heights
from physrep.explore.readers import Session, encoder_folders, encoder_info, explorable_systems
from physrep.explore.solve import Flow, ParameterRange, cell_centres, fine_enough, solve
from physrep.explore.your_flow import open_upload, unlike_html
from physrep.models.pretrained import SHIPPED, load_encoder, model_folder
from physrep.physics.spectral import SimulationBlewUp
from physrep.physics.systems import get_system
from physrep.probing.frozen import load_probe, probe_encoder
from physrep.training.presets import get_preset
from physrep.training.run import build, resolve


@pytest.fixture(scope="module")
def session() -> Session:
    session = Session("shear_flow", runs="none")
    session.simulate({"Reynolds": 800.0, "Schmidt": 1.0}, frames=18, seed=5)
    return session


def test_every_shipped_encoder_can_be_explored(session):
    folders = [folder for folder in SHIPPED.iterdir() if folder.is_dir()]
    listed = [f for name in explorable_systems() for f in encoder_folders(name, "none").values()]
    assert sorted(listed) == sorted(folders)
    assert {encoder_info(folder)["shape"][0] for folder in folders} == {16}
    table = session.read(0)
    assert (table.groupby("kind").test_error.median() < 1).all(), "errors on test come with the package"
    assert set(table.kind) == {"encoder", "statistics", "equations"}


def test_runs_of_ones_own_are_listed_beside_encoders_of_the_same_name(tmp_path):
    title, shipped = next(iter(encoder_folders("shear_flow", tmp_path).items()))
    for name in ("forecast-vit-01234567-802", "forecast-vit-89abcdef-802"):
        shutil.copytree(shipped, tmp_path / "shear_flow" / name / "seed0")
    found = encoder_folders("shear_flow", tmp_path)
    assert found[title] == shipped
    assert {f"{title} (01234567-802)", f"{title} (89abcdef-802)"} < set(found)


def test_a_flow_that_its_time_step_cannot_follow_is_stopped():
    sim = replace(get_preset("laptop").sims["shear_flow"], dt=0.2)
    with pytest.raises(SimulationBlewUp, match="the flow became impossible at frame"):
        solve(get_system("shear_flow"), {"Reynolds": 3200.0, "Schmidt": 1.0}, sim, frames=30)


def test_a_flow_beyond_the_training_is_solved_on_a_finer_grid():
    sim, system = get_preset("laptop").sims["rayleigh_benard"], get_system("rayleigh_benard")
    values = {"Prandtl": 0.4, "Rayleigh": 2.5e6}
    fine = fine_enough("rayleigh_benard", values, sim)
    assert all(n > m for n, m in zip(fine.grid, sim.grid)) and fine.dt < sim.dt
    flow = solve(system, values, sim, frames=3)
    assert np.array_equal(flow.fields, solve(system, values, fine, frames=3).fields)
    assert flow.fields.shape == (4, 3, 32, 32) and flow.dt == sim.frame_dt


def test_pictures_have_x_to_the_right_and_y_upwards(session):
    flow = session.blank(1)
    n, m = flow.fields.shape[2:]
    flow.fields[0, 0, n // 2 :, m // 2 :] = session.scales["tracer"].high
    picture = session.picture("tracer", None, flow, arrows=False)
    box = picture.ax.get_window_extent()
    image = np.asarray(Image.open(io.BytesIO(picture.png(0))).convert("RGB"), dtype=int)[::-1]  # rows from below
    left, right = (round(box.x0 + share * box.width) for share in (0.25, 0.75))
    below, above = (round(box.y0 + share * box.height) for share in (0.25, 0.75))
    assert (image[below, left] == image[above, left]).all() and (image[below, left] == image[below, right]).all()
    assert np.abs(image[above, right] - image[below, left]).sum() > 100


def test_colours_of_uneven_heights_stand_where_they_belong():
    even = cell_centres(32)
    dense = (1 - np.cos(np.pi * even)) / 2
    shown = at_even_heights(np.broadcast_to(dense, (2, 3, 32)).astype(np.float32), dense)
    assert shown.shape == (2, 3, 32) and shown.dtype == np.float32
    inside = (even >= dense[0]) & (even <= dense[-1])
    assert inside.sum() >= 30 and np.allclose(shown[0, 0][inside], even[inside], atol=1e-6), "the height itself"
    assert at_even_heights(shown, None) is shown and at_even_heights(shown, even) is shown


def test_a_code_is_one_token_and_has_one_colour():
    run = resolve("shear_flow", "disco", "vit_code", "smoke")
    encoder = build(run).encoder
    grid = encoder.grid(run.clip_shape)
    assert math.prod(grid) == 1
    tokens = np.random.default_rng(0).normal(size=(1, 1, 8))
    loaded = types.SimpleNamespace(encoder=encoder, embed=lambda window, dt, pool: tokens)
    colours = token_colours(loaded, np.zeros((4, *run.clip_shape), np.float32), 0.2)
    assert colours.shape == (*grid, 3) and np.isfinite(colours).all()


def test_the_page_opens_with_a_flow_that_has_rolled_up():
    tab = LiveTab()
    assert tab.system.value == "shear_flow" and tab.runner.wait(60)
    dye = tab.session.flow.fields[0, tab.player.slider.value]
    assert tab.player.play.value == tab.player.slider.value == tab.start.value > 0
    assert (dye - dye.mean(0)).std() > 0.7 * dye.std() > 0.1, "dye that differs along x, and is there"


def test_an_answer_stands_on_its_bar_where_it_lies_in_the_range():
    about = ParameterRange("Reynolds", 100.0, 10_000.0, (1000.0, 1000.0), log=True)
    row = types.SimpleNamespace(kind="encoder", predicted=-1.0, low=1000.0, high=1e6, true=math.nan)
    bar = bar_html(about, row)
    assert re.findall(r'physrep-(\w+)" style="([^"]*)"', bar) == [
        ("bar", "color:#0072B2"),
        ("trained", "left:50.0%;width:0.0%"),
        ("span", "left:50.0%;width:50.0%"),
        ("says", "left:0.0%"),
    ]


def test_a_probe_that_kept_its_clips_says_how_unlike_a_window_is(smoke_data, tmp_path):
    encoder = load_encoder("shear_flow")
    windows = {s: Windows(smoke_data, "shear_flow", s, frames=16, stride=16) for s in ("train", "valid")}
    scaler = LabelScaler.fit(encoder.system, windows["train"].labels)
    found = probe_encoder(encoder, windows, scaler, get_preset("smoke"), probes=["linear"], progress=False)
    folder = tmp_path / "shear_flow" / "forecast-vit-01234567" / "seed0"
    shutil.copytree(model_folder("shear_flow"), folder)
    found.probes["linear"].save(folder / "probe-linear.safetensors")
    probe = load_probe(folder / "probe-attentive.safetensors")
    older = {name: array for name, array in probe.arrays.items() if not name.startswith("seen.")}
    replace(probe, arrays=older).save(folder / "probe-attentive.safetensors")
    session = Session("shear_flow", runs=tmp_path)
    session.choose([next(title for title in session.folders if "01234567" in title)])
    flow = Flow.in_box(session.system, windows["train"].read([0])[0].numpy(), windows["train"].files[0].dt, (1.0, 1.0))
    for factor, words in ((1.0, "physrep-good"), (4.0, "of them it does not know")):
        with warnings.catch_warnings(action="error"):
            table = session.read(0, replace(flow, fields=factor * flow.fields))
        assert words in unlike_html(table)
    linear = table[table.reader.str.contains("linear probe") & (table.kind == "encoder")]
    assert (linear.low < 410).any() and (linear.distance > 1.5).all(), "the interval is all that there is"
    assert "nothing was kept" in unlike_html(table), "by a probe of an older version"


@pytest.mark.parametrize("names", [("tracer", "pressure", "velocity"), ("all",)])
def test_datasets_of_an_hdf5_file_are_read_as_convert_reads_them(session, tmp_path, names):
    fields = np.moveaxis(session.flow.fields, 0, -1)
    parts = {"tracer": fields[..., 0], "pressure": fields[..., 1], "velocity": fields[..., 2:], "all": fields}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name in names:
            file[f"run/{name}"] = np.stack([parts[name]] * 2)
    flow = open_upload(tmp_path / "a.h5", session.system, 0.2, (1.0, 1.0))
    assert np.array_equal(flow.fields, session.flow.fields) and flow.title == "the first of 2 flows"


def test_datasets_that_are_no_channels_are_told(session, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["u"], file["v"] = np.zeros((2, 20, 8, 8))
    with pytest.raises(ValueError, match="has the arrays u, v; give a dataset for each of tracer, pressure, velocity"):
        open_upload(tmp_path / "a.h5", session.system)


def test_data_sets_are_found_in_order_and_closed_folders_left_out(tmp_path, smoke_data, monkeypatch):
    for name in ("explore", "laptop", "a", "of_others"):
        (tmp_path / name).symlink_to(smoke_data)
    find_folder = sets.find_folder

    def find(folder, system):
        if folder.name == "of_others":
            raise PermissionError(13, "Permission denied")
        return find_folder(folder, system)

    monkeypatch.setattr(sets, "find_folder", find)
    assert list(sets.data_sets("shear_flow", tmp_path)) == ["laptop", "explore", "a"]


def test_without_a_checkout_flows_go_to_a_folder_of_ones_own(tmp_path, monkeypatch):
    def nowhere():
        raise FileNotFoundError

    monkeypatch.setattr(sets, "project_root", nowhere)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sets.data_folder() == tmp_path / ".cache" / "physrep" / "data"
    assert sets.data_sets("shear_flow") == {}, "there is no such folder yet"


def test_the_page_is_made_of_the_widgets_that_every_jupyter_has():
    "VS Code ships these packages and loads any other from a server elsewhere, if it is allowed to."
    import ipywidgets as widgets

    from physrep.explore.page import explore

    page = explore("shear_flow")
    for i in range(len(page.makers)):
        page.tab.selected_index = i
    page.made["2 Live probe"].runner.wait(60)
    page.made["4 What it saw"].runner.wait(60)
    assert set(page.made) == set(page.makers)
    states = widgets.Widget.get_manager_state(drop_defaults=False)["state"].values()
    used = {module for s in states for module in (s["model_module"], s["state"]["_view_module"])}
    assert used - {None} == {f"@jupyter-widgets/{name}" for name in ("base", "controls")}

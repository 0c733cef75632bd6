"""The widgets' logic without a browser: what the notebooks of explore do not assert themselves."""

import io
import math
import shutil
import types
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from physrep.explore import sets
from physrep.explore.latent import token_colours
from physrep.explore.pictures import at_even_heights
from physrep.explore.readers import Session, encoder_folders, encoder_info, explorable_systems
from physrep.explore.solve import cell_centres, fine_enough, solve
from physrep.models.pretrained import SHIPPED
from physrep.physics.spectral import SimulationBlewUp
from physrep.physics.systems import get_system
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
    for name in ("forecast-vit-01234567", "forecast-vit-89abcdef"):
        shutil.copytree(shipped, tmp_path / "shear_flow" / name / "seed0")
    found = encoder_folders("shear_flow", tmp_path)
    assert found[title] == shipped
    assert {f"{title} (01234567)", f"{title} (89abcdef)"} < set(found)


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

"""The widgets' logic: flows solved frame by frame, readers, the session, pictures, and the tabs without a browser."""

import importlib.util
import io
import math
import shutil
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from physrep.explore import sets
from physrep.explore.latent import token_colours
from physrep.explore.live import Job, Session, explorable_systems
from physrep.explore.pictures import SEEN, FlowPicture, at_even_heights, fixed_scale, number, scales_of
from physrep.explore.readers import encoder_folders, encoder_info
from physrep.explore.solve import fine_enough, parameter_ranges, solve
from physrep.models.pretrained import SHIPPED, load_encoder
from physrep.physics.spectral import SimulationBlewUp
from physrep.probing.frozen import load_probe
from physrep.training.presets import get_preset
from physrep.training.run import build, resolve


@pytest.fixture(scope="module")
def session() -> Session:
    session = Session("shear_flow", runs="none")
    session.simulate({"Reynolds": 800.0, "Schmidt": 1.0}, frames=18, seed=5)
    return session


def test_every_shipped_encoder_can_be_explored():
    folders = [folder for folder in SHIPPED.iterdir() if folder.is_dir()]
    listed = [f for name in explorable_systems() for f in encoder_folders(name, "none").values()]
    assert sorted(listed) == sorted(folders)
    for folder in folders:
        assert encoder_info(folder)["shape"][0] == 16
    assert explorable_systems()[0] == "rayleigh_benard"


def test_the_session_reads_what_the_library_reads(session):
    table = session.read(1)
    folder = session.folders[session.encoders[0]]
    encoder = load_encoder(folder)
    for head in ("linear", "attentive"):
        probe = load_probe(folder, head)
        wanted = probe.predict_fields(encoder, session.flow.fields[None, :, 1:17], dt=session.flow.dt)
        rows = table[table.reader == f"{session.encoders[0]}, {head} head"]
        assert np.array_equal(rows.predicted, wanted[0])
        assert np.array_equal(rows.low, probe.interval(wanted)[0][0])
    exact = table[table.kind == "equations"]
    assert np.allclose(exact.predicted, exact["true"], rtol=0.02)


def test_the_errors_on_test_come_with_the_package(session):
    table = session.read(0)
    assert (table.groupby("kind").test_error.median() < 1).all()
    assert set(table.kind) == {"encoder", "statistics", "equations"}, "the heads of the statistics are in the package"


def test_a_run_that_cannot_be_is_stopped():
    sim = get_preset("laptop").sims["shear_flow"]
    with pytest.raises(SimulationBlewUp, match="the flow became impossible at frame"):
        from dataclasses import replace

        solve("shear_flow", {"Reynolds": 3200.0, "Schmidt": 1.0}, replace(sim, dt=0.2), frames=30)
    with pytest.raises(ValueError, match="no solver for acoustics|unknown system"):
        solve("acoustics", {}, sim, frames=3)


def test_a_finer_grid_beyond_the_training_gives_the_same_kind_of_flow():
    sim = get_preset("laptop").sims["rayleigh_benard"]
    values = {"Prandtl": 0.4, "Rayleigh": 2.5e6}
    fine = fine_enough("rayleigh_benard", values, sim)
    assert all(n > m for n, m in zip(fine.grid, sim.grid)) and fine.dt < sim.dt
    flow = solve("rayleigh_benard", values, sim, frames=3)
    assert np.array_equal(flow.fields, solve("rayleigh_benard", values, fine, frames=3).fields)
    assert flow.fields.shape == (4, 3, 32, 32) and np.isfinite(flow.fields).all() and flow.dt == sim.frame_dt
    ranges = parameter_ranges("rayleigh_benard", sim)
    assert ranges["Rayleigh"].low < 1e4 and not ranges["Rayleigh"].knows(2.5e6)


def test_a_job_reports_in_its_own_thread_and_is_cancelled_at_a_report():
    threads, ended, go = [], [], threading.Event()

    def work(report) -> None:
        for i in range(100):
            threads.append(threading.current_thread())
            go.wait(10)
            report(i, 100)

    job = Job(work, on_cancel=lambda: ended.append("cancelled"), on_done=lambda _: ended.append("done")).start()
    job.cancel()
    go.set()
    assert job.wait(10) and ended == ["cancelled"] and len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_pictures_have_a_fixed_scale_and_mark_the_window(session):
    picture = session.picture("velocity_x", 2)
    assert picture.png(3) == picture.png(3) != picture.png(4)
    with pytest.raises(ValueError, match="frames 0 to 17, not 18"):
        picture.png(18)
    with pytest.raises(ValueError, match="no channel 'vorticity'; it has tracer"):
        FlowPicture(session.flow, "vorticity", fixed_scale(0, 1))
    assert fixed_scale(5.0, 1.0).low == 2.5 and fixed_scale(0.1, 1.0).low == -2.5
    assert set(scales_of(session.flow)) == set(session.system.channels) and number(float("nan")) == "–"


def test_the_page_makes_a_tab_when_it_is_looked_at_and_shows_errors():
    pytest.importorskip("ipywidgets")
    from physrep.explore.page import Page

    made = []

    def broken():
        made.append("b")
        raise ValueError("no <flow>")

    page = Page({"a": lambda: pytest.fail("nobody looked"), "b": broken}, "b")
    assert made == ["b"] and "no &lt;flow&gt;" in page.places[1].children[0].value


def _inside(widget) -> list:
    "A widget and all that it holds."
    return [widget, *(inner for child in getattr(widget, "children", ()) for inner in _inside(child))]


def test_the_page_is_made_of_the_widgets_that_every_jupyter_has():
    "VS Code ships these packages and loads any other from a server elsewhere, if it is allowed to."
    widgets = pytest.importorskip("ipywidgets")
    from physrep.explore.latent import MapPicture
    from physrep.explore.latent_tab import ClickMap
    from physrep.explore.page import FIRST, TABS, Page, build

    page = Page({t: lambda place=place: build(place, systems=["shear_flow"]) for t, place in TABS.items()}, FIRST)
    for i in range(len(TABS)):
        page.tab.selected_index = i
    assert set(page.made) == set(TABS)
    assert all(tab.runner.job is None or tab.runner.job.wait(60) for tab in page.made.values())
    clicked = []
    points = ClickMap(clicked.append)
    points.show(MapPicture(b"", np.array([[10.0, 20.0], [30.0, 40.0]])), ["a", "b"])
    points.box.children[2].click()
    assert clicked == [1], "a point is a button; nothing listens to the mouse"
    states = widgets.Widget.get_manager_state(drop_defaults=False)["state"]
    assert {widget.model_id for widget in _inside(page.box)} < set(states)
    used = {state["model_module"] for state in states.values()} | {
        state["state"]["_view_module"] for state in states.values()
    }
    assert used - {None} == {f"@jupyter-widgets/{name}" for name in ("base", "controls")}


def test_folders_named_to_the_app_are_those_of_where_it_was_started():
    "The page runs in a folder of its own, in which a relative path would be another place."
    path = Path(__file__).resolve().parent.parent / "tools" / "app.py"
    spec = importlib.util.spec_from_file_location("app", path)
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    source = 'frames: int = 0  # of a flow\ndata_dir: str = ""  # folder of the data sets'
    notebook = {"cells": [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}]}
    (cell,) = app.page(notebook, {"data_dir": "data/mine", "frames": "20"})["cells"]
    assert cell["source"] == f"frames: int = 20\ndata_dir: str = {str(Path('data/mine').resolve())!r}"


def test_a_code_is_one_token_and_has_one_colour():
    run = resolve("shear_flow", "disco", "vit_code", "smoke")
    encoder = build(run).encoder
    grid = encoder.grid(run.clip_shape)
    assert math.prod(grid) == 1
    tokens = np.random.default_rng(0).normal(size=(1, 1, 8))
    loaded = types.SimpleNamespace(encoder=encoder, embed=lambda window, dt, pool: tokens)
    colours = token_colours(loaded, np.zeros((4, *run.clip_shape), np.float32), 0.2)
    assert colours.shape == (*grid, 3) and np.isfinite(colours).all()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int)


def of_colour(image: np.ndarray, colour: str) -> np.ndarray:
    "Rows and columns (n, 2) of the pixels of a colour."
    return np.argwhere(np.abs(image - np.array(to_rgb(colour)) * 255).max(-1) < 3)


def test_pictures_have_x_to_the_right_and_y_upwards(session):
    flow = session.blank(1)
    x, y = (np.arange(n) for n in flow.fields.shape[2:])
    tracer = np.where((x[:, None] > 20) & (y > 20), 5.0, 0.0).astype(np.float32)  # far along both axes
    flow.fields[flow.system.channels.index("tracer"), 0] = tracer
    picture = FlowPicture(flow, "tracer", fixed_scale(0, 1), arrows=False)
    image, box = pixels(picture.png(0)), picture.ax.get_window_extent()
    height = image.shape[0]
    top, bottom = round(height - box.y1), round(height - box.y0)
    inside = image[top:bottom, round(box.x0) : round(box.x1)]
    n, m = (size // 2 for size in inside.shape[:2])
    far = np.abs(inside - inside[-5, 5]).sum(-1) > 100  # than the lower left corner
    assert far[:n, m:].mean() > 0.2, "the upper right quarter"
    for other in (far[:n, :m], far[n:, m:], far[n:, :m]):
        assert other.mean() < 0.05, "but for the frame"


def test_the_frame_is_marked_in_the_window_alone(session):
    picture = session.picture("velocity_x", 2)
    box = picture.ax.get_window_extent()
    marked = {}
    for frame in (1, 2, 2 + session.frames - 1):
        image = pixels(picture.png(frame))
        edge = image[:, round(box.x0)][round(image.shape[0] - box.y1) : round(image.shape[0] - box.y0)]
        marked[frame] = len(of_colour(edge[None], SEEN)) > 0.9 * len(edge)
    assert marked == {1: False, 2: True, 2 + session.frames - 1: True}


def test_colours_of_uneven_heights_stand_where_they_belong():
    dense = (1 - np.cos(np.pi * (np.arange(32) + 0.5) / 32)) / 2
    even = (np.arange(32) + 0.5) / 32
    shown = at_even_heights(np.broadcast_to(dense, (2, 3, 32)).astype(np.float32), dense)
    assert shown.shape == (2, 3, 32) and shown.dtype == np.float32
    inside = (even >= dense[0]) & (even <= dense[-1])
    assert inside.sum() >= 30 and np.allclose(shown[0, 0][inside], even[inside], atol=1e-6), "the height itself"
    assert at_even_heights(shown, None) is shown and at_even_heights(shown, even) is shown


def test_without_a_checkout_flows_go_to_a_folder_of_ones_own(tmp_path, monkeypatch):
    def nowhere():
        raise FileNotFoundError

    monkeypatch.setattr(sets, "project_root", nowhere)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sets.explore_folder() == tmp_path / ".cache" / "physrep" / "data" / "explore"
    assert sets.data_sets("shear_flow") == {}, "there is no such folder yet"


def test_folders_that_may_not_be_looked_into_are_left_out(tmp_path, smoke_data, monkeypatch):
    (tmp_path / "laptop").symlink_to(smoke_data)
    (tmp_path / "of_others").mkdir()
    original = sets.find_folder

    def find(folder, system):
        if folder.name == "of_others":
            raise PermissionError(13, "Permission denied")
        return original(folder, system)

    monkeypatch.setattr(sets, "find_folder", find)
    assert list(sets.data_sets("shear_flow", tmp_path)) == ["laptop"]


def test_the_laptops_flows_come_first_and_then_those_of_the_page(tmp_path, smoke_data):
    for name in ("explore", "laptop", "a"):
        (tmp_path / name).symlink_to(smoke_data)
    assert list(sets.data_sets("shear_flow", tmp_path)) == ["laptop", "explore", "a"]


def test_runs_of_ones_own_are_listed_beside_encoders_of_the_same_name(tmp_path):
    title, shipped = next(iter(encoder_folders("shear_flow", tmp_path).items()))
    for name in ("forecast-vit-01234567", "forecast-vit-89abcdef"):
        folder = tmp_path / "shear_flow" / name / "seed0"
        shutil.copytree(shipped, folder)
    found = encoder_folders("shear_flow", tmp_path)
    assert found[title] == shipped
    assert {f"{title} (01234567)", f"{title} (89abcdef)"} < set(found)

"""The page of nbs/09_explore in a real browser: it opens, every tab works, answers are those of the library.

With PHYSREP_SCREENSHOTS=nbs/explore/screenshots the tests take the pictures of the documentation."""

import http.client
import os
import re
import subprocess
import sys
import time
import uuid
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from browser import FRAMES, answers, cut_off, enter, free_port, open_browser, rows_of, wait_for

from physrep.data.convert import convert
from physrep.explore.page import answers_html
from physrep.explore.perturb import Change, before_and_after, changes_html, rests_on, rests_png
from physrep.explore.readers import Session
from physrep.explore.sets import open_flow, parameters_in

ROOT = Path(__file__).resolve().parent.parent
if find_spec("voila") is None or find_spec("playwright") is None:
    pytest.skip("the page was not tested: voila and playwright are missing; make setup", allow_module_level=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def address(data_dir):
    "Where the page is served, as `make app` serves it, but for one system and short flows."
    port = free_port()
    options = f"--no-browser --port {port} --systems shear_flow --frames {FRAMES} --flows 3 --data-dir {data_dir}"
    command = [sys.executable, str(ROOT / "tools" / "app.py"), *options.split()]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    app = subprocess.Popen(command, text=True, **pipes)
    said = []
    for line in app.stdout:  # it ends if the app ends
        said.append(line)
        if "Kernel pool" in line and "is filled" in line:
            break
    assert app.poll() is None, "".join(said)[-3000:]
    yield re.search(r"http://127.0.0.1:\d+/[?]token=\w+", "".join(said))[0]
    app.terminate()
    app.wait(30)


@pytest.fixture(scope="module")
def page(address):
    with open_browser(width=1400, height=1000) as page:
        page.goto(address)
        yield page


@pytest.fixture(scope="module")
def keep(page, tmp_path_factory):
    "Takes a screenshot of the tab that is shown."
    folder = Path(os.environ.get("PHYSREP_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))

    def take(name: str) -> None:
        page.wait_for_timeout(500)
        page.locator(".physrep-page").screenshot(path=folder / f"{name}.png")

    return take


@pytest.fixture(scope="module")
def middle() -> Session:
    "The flow of the first four tabs: parameters from the middle of the training, the first initial condition."
    session = Session("shear_flow")
    session.simulate({k: r.middle for k, r in session.ranges.items()}, frames=FRAMES, seed=3)
    return session


def asked(address: str, path: str, **headers: str) -> int:
    "What the server of the page answers to a request: 200, 302 to its login, 403, ..."
    server = http.client.HTTPConnection(urlsplit(address).netloc)
    server.request("GET", path, headers=headers)
    return server.getresponse().status


def test_only_who_has_the_token_and_comes_by_the_name_of_this_machine_gets_a_kernel(address):
    port, token = urlsplit(address).port, urlsplit(address).query
    socket = dict(Connection="Upgrade", Upgrade="websocket")
    key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}
    channels = f"/api/kernels/{uuid.uuid4()}/channels"
    assert asked(address, "/") == asked(address, "/?token=guessed") == 302
    assert asked(address, channels, **socket, **key) == 403
    for path in (f"/?{token}", f"{channels}?{token}"):  # a name that somebody has pointed at this machine
        headers = dict(Host=f"other.example:{port}", Origin=f"http://other.example:{port}", **socket, **key)
        assert asked(address, path, **headers) == 403


def test_the_page_opens_with_the_window_that_is_read_and_fits_narrow_screens(page, keep):
    wait_for(page, "1,130")
    film = page.locator(".physrep-film img")
    assert page.locator(".physrep-film .widget-readout").inner_text() == f"{FRAMES - 16}", "not the first stripes"
    for width in (400, 800, 1400):
        page.set_viewport_size({"width": width, "height": 1000})
        assert film.bounding_box()["y"] + film.bounding_box()["height"] < 1000, "it is seen at once"
        assert cut_off(page) == []
    keep("2_live_probe")


def test_sliders_solve_and_the_answers_are_those_of_the_library(page, middle):
    wait_for(page, "1,130")
    assert answers(page, ".physrep-answers") == rows_of(answers_html(middle.read(FRAMES - 16), middle.ranges))
    assert "import" not in page.inner_text("body"), "no source is shown"
    enter(page, ".physrep-Reynolds", "700")
    wait_for(page, "700")
    session = Session("shear_flow")
    session.simulate({"Reynolds": 700.0, "Schmidt": session.ranges["Schmidt"].middle}, frames=FRAMES, seed=3)
    assert answers(page, ".physrep-answers") == rows_of(answers_html(session.read(FRAMES - 16), session.ranges))
    enter(page, ".physrep-Reynolds", "4000")
    page.locator(".physrep-beyond", has_text="Beyond the training").wait_for()
    wait_for(page, "4,000")


def test_data_are_made_on_the_spot_and_shown(page, keep, data_dir):
    page.get_by_role("tab", name="Data").click()
    page.locator(".physrep-status", has_text="There is no data set of this flow yet").wait_for()
    page.locator(".physrep-make").click()
    page.locator(".physrep-status", has_text="Made 3 flows").wait_for()
    page.locator(".physrep-read tr", has_text="the truth").first.wait_for()
    path = next(iter(parameters_in(data_dir / "explore" / "shear_flow", "shear_flow", "flows").values()))
    flow = open_flow(path, "shear_flow")
    session = Session("shear_flow")
    assert answers(page, ".physrep-read") == rows_of(answers_html(session.read(0, flow), session.ranges))
    keep("1_data")


def test_a_click_on_a_point_of_the_map_shows_its_window_and_neighbours(page, keep):
    page.get_by_role("tab", name="Latent space").click()
    page.locator(".physrep-draw").click()
    page.locator(".physrep-status", has_text="9 windows").wait_for()
    first = page.locator("img.physrep-near").get_attribute("src")
    page.locator(".physrep-point").nth(5).click(force=True)
    page.wait_for_function("src => document.querySelector('img.physrep-near').src != src", arg=first)
    keep("3_latent_space")


def test_what_is_changed_or_hidden_moves_the_answers_as_the_library_says(page, keep, middle):
    page.get_by_role("tab", name="What it saw").click()
    page.locator(".physrep-changes tr", has_text="equation oracle").first.wait_for()
    undo = page.get_by_role("button", name="Undo all").click
    steps = [
        (lambda: enter(page, ".physrep-noise", "0.5"), Change(noise=0.5)),
        (undo, Change()),
        (
            lambda: page.locator(".physrep-hide select").select_option("tracer (dye)"),
            Change(channels=("tracer",)),
        ),
        (lambda: enter(page, ".physrep-hide-frames", "4 – 12"), Change(channels=("tracer",), frames=(4, 12))),
        (undo, Change()),
        (lambda: enter(page, ".physrep-hide-x", "0.25 – 0.75"), Change(x=(0.25, 0.75), y=(0.0, 1.0))),
        (lambda: enter(page, ".physrep-hide-y", "0.50 – 1.00"), Change(x=(0.25, 0.75), y=(0.5, 1.0))),
    ]
    assert answers(page, ".physrep-changes") == rows_of(changes_html(before_and_after(middle, FRAMES - 16, Change())))
    for do, change in steps:
        before = page.locator(".physrep-changes").inner_text()
        do()
        page.wait_for_function("text => document.querySelector('.physrep-changes').innerText != text", arg=before)
        wanted = rows_of(changes_html(before_and_after(middle, FRAMES - 16, change)))
        assert answers(page, ".physrep-changes") == wanted, change
        if change.noise:
            keep("4_what_it_saw")


def test_the_map_of_what_answers_rest_on_is_that_of_the_library(page, middle):
    page.get_by_role("button", name="Where do answers rest?").click()
    page.locator(".physrep-status", has_text="Each patch was hidden").wait_for()
    picture = page.locator("img.physrep-maps")
    picture.wait_for()
    shown = picture.evaluate("async image => Array.from(await (await fetch(image.src)).bytes())")
    names, readers = middle.system.label_names, [r for r in middle.readers if r.kind == "encoder"]
    maps = {(r.name, name): m for r in readers for name, m in zip(names, rests_on(middle, FRAMES - 16, r))}
    assert bytes(shown) == rests_png(maps, middle.flow)


def load(page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator(".physrep-upload").click()
    chooser.value.set_files(path)


def test_a_flow_of_the_user_is_checked_and_read(page, keep, tmp_path):
    page.get_by_role("tab", name="Your flow").click()
    session = Session("shear_flow")
    flow = session.simulate({"Reynolds": 900.0, "Schmidt": 1.0}, frames=20, seed=7)
    np.save(tmp_path / "flow.npy", flow.fields)
    load(page, tmp_path / "flow.npy")
    page.locator(".physrep-status", has_text="All fits").wait_for()
    page.locator(".physrep-yours tr", has_text="equation oracle").first.wait_for()
    said = page.locator(".physrep-yours .physrep-good, .physrep-yours .physrep-warn")
    assert said.count() >= 1, "how unlike the training it is"
    wanted = rows_of(answers_html(session.read(0, flow), session.ranges))
    assert answers(page, ".physrep-yours") == [row for row in wanted if row[0] != "the truth"], "an array has no labels"
    keep("5_your_flow")
    fields, labels = np.moveaxis(flow.fields, 0, -1)[None], dict(zip(flow.system.label_names, flow.labels))
    convert("shear_flow", tmp_path, fields, labels, dt=flow.dt, box=flow.box, split="test")
    load(page, next(tmp_path.rglob("*.hdf5")))
    page.locator(".physrep-yours tr", has_text="the truth").first.wait_for()
    assert answers(page, ".physrep-yours") == wanted, "a file of physrep convert says its labels, too"


def test_a_page_that_is_left_ends_its_kernel(page, address):
    with page.expect_websocket() as socket:
        page.reload()
    kernel = f"{urlsplit(socket.value.url).path.removesuffix('/channels')}?{urlsplit(address).query}"
    assert asked(address, kernel) == 200
    page.goto("about:blank")
    end = time.monotonic() + 60
    while asked(address, kernel) != 404 and time.monotonic() < end:
        time.sleep(0.2)
    assert asked(address, kernel) == 404

"""The page of nbs/09_explore in a real browser: it opens, sliders solve, answers are those of the library.

With PHYSREP_SCREENSHOTS=nbs/explore/screenshots the tests take the pictures of the documentation."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import pytest
from browser import FRAMES, answers, enter, expected, open_browser, rows_of, wait_for

from physrep.explore.live import Session
from physrep.explore.sets import open_flow, pairs_of

ROOT = Path(__file__).resolve().parent.parent
if find_spec("voila") is None or find_spec("playwright") is None:
    pytest.skip("the page was not tested: voila and playwright are missing; make setup", allow_module_level=True)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sets")


@contextlib.contextmanager
def served(data_dir: Path, port: int) -> Iterator[tuple[subprocess.Popen, str]]:
    "The page, served as `make app` serves it, but for one system and short flows: its process and its address."
    values = {"systems": "shear_flow", "frames": str(FRAMES), "flows": "3", "data_dir": str(data_dir)}
    options = [part for name, value in values.items() for part in ("-p", name, value)]
    command = [sys.executable, str(ROOT / "tools" / "app.py"), "--no-browser", "--port", str(port), *options]
    app = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    )
    try:
        said = []
        for line in app.stdout:  # it ends if the app ends
            said.append(line)
            if "Kernel pool" in line and "is filled" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:\d+/", "".join(said))
        assert app.poll() is None and found, "".join(said)[-3000:]
        yield app, found[0]
    finally:
        app.terminate()
        app.wait(30)


@pytest.fixture(scope="module")
def address(data_dir):
    with served(data_dir, 8876) as (_, found):
        yield found


@pytest.fixture(scope="module")
def page(address):
    with open_browser(width=1880, height=860) as page:
        page.goto(address)
        yield page


@pytest.fixture(scope="module")
def keep(page, tmp_path_factory):
    "Takes a screenshot of the tab that is shown, and returns its file."
    folder = Path(os.environ.get("PHYSREP_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)

    def take(name: str) -> Path:
        page.wait_for_timeout(500)
        path = folder / f"{name}.png"
        page.locator(".physrep-page").screenshot(path=path)
        return path

    return take


def test_the_page_opens_with_the_live_probe(page, address):
    assert address.startswith("http://127.0.0.1")
    wait_for(page, "1,130")
    table = answers(page, ".physrep-answers")
    assert len(table) == 6 and table[0][0] == "the truth"
    assert "physrep.explore" not in page.content() and "import" not in page.inner_text("body"), "no source is shown"


def test_a_slider_solves_and_the_answers_are_those_of_the_library(page, keep):
    enter(page, ".physrep-Reynolds", "700")
    wait_for(page, "700")
    session = Session("shear_flow")
    schmidt = float(page.locator(".physrep-Schmidt .widget-readout").inner_text())
    session.simulate({"Reynolds": 700.0, "Schmidt": session.ranges["Schmidt"].middle}, frames=FRAMES, seed=1)
    assert schmidt == pytest.approx(session.ranges["Schmidt"].middle, abs=0.01)
    assert answers(page, ".physrep-answers") == expected(session.read(FRAMES - 16))
    assert keep("2_live_probe").stat().st_size > 20_000


def test_beyond_the_training_the_page_says_so(page):
    enter(page, ".physrep-Reynolds", "4000")
    page.locator(".physrep-beyond", has_text="Beyond the training").wait_for()
    wait_for(page, "4,000")


def test_data_are_made_on_the_spot_and_shown(page, keep, data_dir):
    page.get_by_role("tab", name="Data").click()
    page.locator(".physrep-status", has_text="There is no data set of this flow yet").wait_for()
    began = time.monotonic()
    page.locator(".physrep-make").click()
    page.locator(".physrep-status", has_text="Made 3 flows").wait_for()
    assert time.monotonic() - began < 60
    page.locator(".physrep-read tr", has_text="the truth").wait_for()
    path = next(iter(pairs_of(data_dir / "explore" / "shear_flow", "shear_flow", "flows").values()))
    flow = open_flow(path, "shear_flow")
    assert answers(page, ".physrep-read") == expected(Session("shear_flow").read(0, flow))
    keep("1_data")


def test_a_click_on_a_point_of_the_map_shows_its_window_and_neighbours(page, keep):
    page.get_by_role("tab", name="Latent space").click()
    page.locator(".physrep-draw").click()
    page.locator(".physrep-status", has_text="9 windows").wait_for()
    first = page.locator("img.physrep-near").get_attribute("src")
    page.locator(".physrep-point").nth(5).click(force=True)
    page.wait_for_function("src => document.querySelector('img.physrep-near').src != src", arg=first)
    keep("3_latent_space")


@pytest.fixture(scope="module")
def seen() -> Session:
    "The flow of the tab of what an encoder saw."
    session = Session("shear_flow")
    session.simulate({k: r.middle for k, r in session.ranges.items()}, frames=FRAMES, seed=1)
    return session


def changes(session: Session, **change) -> list[list[str]]:
    "The rows of the table of that tab, from the library."
    from physrep.explore.perturb import Change, compare
    from physrep.explore.saw_tab import changes_html

    return rows_of(changes_html(compare(session, FRAMES - 16, Change(**change))))


def wait_for_changes(page, do) -> list[list[str]]:
    "The rows of that table after something was done that changes them."
    before = page.locator(".physrep-changes").inner_text()
    do()
    page.wait_for_function("text => document.querySelector('.physrep-changes').innerText != text", arg=before)
    return answers(page, ".physrep-changes")


def test_noise_moves_the_answers_as_the_library_says(page, keep, seen):
    page.get_by_role("tab", name="What it saw").click()
    page.locator(".physrep-changes tr", has_text="Equation oracle").wait_for()
    before = answers(page, ".physrep-changes")
    assert before == changes(seen)
    assert wait_for_changes(page, lambda: enter(page, ".physrep-noise", "0.5")) == changes(seen, noise=0.5) != before
    keep("4_what_it_saw")


def test_what_is_hidden_moves_the_answers_as_the_library_says(page, seen):
    told = [wait_for_changes(page, page.get_by_role("button", name="Undo all").click)]
    for do, hidden in {
        lambda: page.locator(".physrep-hide select").select_option("tracer (dye)"): dict(channels=("tracer",)),
        lambda: enter(page, ".physrep-hide-frames", "4 – 12"): dict(channels=("tracer",), frames=(4, 12)),
    }.items():
        told.append(wait_for_changes(page, do))
        assert told[-1] == changes(seen, **hidden) != told[-2]


def test_a_region_that_is_hidden_moves_the_answers_as_the_library_says(page, seen):
    wait_for_changes(page, page.get_by_role("button", name="Undo all").click)
    band = wait_for_changes(page, lambda: enter(page, ".physrep-hide-x", "0.25 – 0.75"))
    assert band == changes(seen, x=(0.25, 0.75), y=(0.0, 1.0))
    patch = wait_for_changes(page, lambda: enter(page, ".physrep-hide-y", "0.50 – 1.00"))
    assert patch == changes(seen, x=(0.25, 0.75), y=(0.5, 1.0)) != band


def test_the_map_of_what_answers_rest_on_is_that_of_the_library(page, seen):
    from physrep.explore.perturb import rests_on, rests_png

    page.get_by_role("button", name="Where do answers rest?").click()
    page.locator(".physrep-status", has_text="Each patch was hidden").wait_for()
    picture = page.locator("img.physrep-maps")
    picture.wait_for()
    shown = picture.evaluate("async image => Array.from(await (await fetch(image.src)).bytes())")
    names, readers = seen.system.label_names, [r for r in seen.readers if r.kind == "encoder"]
    maps = {(r.name, name): m for r in readers for name, m in zip(names, rests_on(seen, FRAMES - 16, r))}
    assert bytes(shown) == rests_png(maps, seen.flow)


def test_a_flow_of_the_user_is_checked_and_read(page, keep, tmp_path):
    import numpy as np

    page.get_by_role("tab", name="Your flow").click()
    session = Session("shear_flow")
    flow = session.simulate({"Reynolds": 900.0, "Schmidt": 1.0}, frames=20, seed=7)
    np.save(tmp_path / "flow.npy", flow.fields)
    with page.expect_file_chooser() as chooser:
        page.locator(".physrep-upload").click()
    chooser.value.set_files(tmp_path / "flow.npy")
    page.locator(".physrep-status", has_text="All fits").wait_for()
    page.locator(".physrep-yours tr", has_text="Equation oracle").wait_for()
    assert answers(page, ".physrep-yours")[0][0] != "the truth", "an array has no parameters"
    assert [row[1] for row in answers(page, ".physrep-yours")] == [
        row[1] for row in expected(session.read(0, flow))[1:]
    ]
    keep("5_your_flow")


def make_data(page, address: str) -> None:
    "Asks the page for a handful of flows."
    page.goto(address)
    page.get_by_role("tab", name="Data").click()
    page.locator(".physrep-make").click()


@pytest.mark.long
def test_a_page_that_is_killed_while_it_makes_data_makes_the_same_data_when_it_is_started_again(page, tmp_path):
    "SIGKILL for the server and its kernels, in the middle of a set of files."
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    another = page.context.browser.new_page(viewport={"width": 1880, "height": 860})
    with served(killed, 8877) as (app, place):
        make_data(another, place)
        everyone = [app, *psutil.Process(app.pid).children(recursive=True)]
        until = time.monotonic() + 60
        while not list(killed.rglob("*.hdf5")) and time.monotonic() < until:
            time.sleep(0.002)
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        app.wait(30)
    assert len(list(killed.rglob("*.hdf5"))) < 3, "in the middle"
    found = []
    for folder, port in ((killed, 8877), (whole, 8878)):
        with served(folder, port) as (_, place):
            make_data(another, place)
            another.locator(".physrep-status", has_text="Made 3 flows").wait_for()
        paths = sorted(path.relative_to(folder) for path in folder.rglob("*.hdf5"))
        found.append({path: open_flow(folder / path, "shear_flow") for path in paths})
    assert found[0].keys() == found[1].keys() and len(found[1]) >= 3
    for path, flow in found[1].items():
        again = found[0][path]
        assert np.array_equal(again.fields, flow.fields) and again.labels == flow.labels

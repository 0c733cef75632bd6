"""The page of nbs/09_explore in a real browser: it opens, sliders solve, answers are those of the library.

With PHYSREP_SCREENSHOTS=nbs/explore/screenshots the tests take the pictures of the documentation."""

import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from physrep.explore.live import Session
from physrep.explore.sets import open_flow, pairs_of

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
LOCAL = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"  # the page needs nothing from elsewhere
FRAMES = 24
LONG = 60_000  # ms; seconds on a machine that does nothing else

if find_spec("voila") is None or find_spec("playwright") is None:
    pytest.skip("the page was not tested: voila and playwright are missing; make setup", allow_module_level=True)
if BROWSER is None:
    pytest.skip(
        "the page was not tested: there is no Chromium. apt-get install chromium, or CHROMIUM=/path/of/it",
        allow_module_level=True,
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def address(data_dir):
    "The page, served as `make app` serves it, but for one system and short flows."
    values = {"systems": "shear_flow", "frames": str(FRAMES), "flows": "3", "data_dir": str(data_dir)}
    options = [part for name, value in values.items() for part in ("-p", name, value)]
    command = [sys.executable, str(ROOT / "tools" / "app.py"), "--no-browser", "--port", "8876", *options]
    app = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    )
    said = []
    for line in app.stdout:  # it ends if the app ends
        said.append(line)
        if "Kernel pool" in line and "is filled" in line:
            break
    found = re.search(r"http://127\.0\.0\.1:\d+/", "".join(said))
    assert app.poll() is None and found, "".join(said)[-3000:]
    yield found[0]
    app.terminate()
    app.wait(30)


@pytest.fixture(scope="module")
def page(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=[*QUIET.split(), LOCAL])
        page = browser.new_page(viewport={"width": 1880, "height": 860})
        page.set_default_timeout(LONG)
        page.goto(address)
        yield page
        browser.close()


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


def answers(page, inside: str) -> list[list[str]]:
    "The rows of the table of answers in a part of the page."
    rows = page.locator(f"{inside} .physrep-table tr").all()
    return [[cell.inner_text() for cell in row.locator("td").all()] for row in rows[1:]]


def expected(table) -> list[list[str]]:
    "The same rows from a table of the library."
    from physrep.explore.live_tab import answers_html

    lines = re.findall(r"<tr>(.*?)</tr>", answers_html(table))
    return [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in lines[1:]]


def wait_for(page, values: str) -> None:
    "Waits until the page says that it has solved and read the flow of these parameters."
    page.locator(".physrep-answers tr", has_text="the truth").filter(has_text=values).wait_for()
    page.locator(".physrep-status", has_text=f"Solved {FRAMES} frames").wait_for()


def test_the_page_opens_with_the_live_probe(page, address):
    assert address.startswith("http://127.0.0.1")
    wait_for(page, "1,130")
    table = answers(page, ".physrep-answers")
    assert len(table) == 6 and table[0][0] == "the truth"
    assert "physrep.explore" not in page.content() and "import" not in page.inner_text("body"), "no source is shown"


def test_a_slider_solves_and_the_answers_are_those_of_the_library(page, keep):
    field = page.locator(".physrep-Reynolds .widget-readout")
    field.fill("700")
    field.press("Enter")
    wait_for(page, "700")
    session = Session("shear_flow")
    schmidt = float(page.locator(".physrep-Schmidt .widget-readout").inner_text())
    session.simulate({"Reynolds": 700.0, "Schmidt": session.ranges["Schmidt"].middle}, frames=FRAMES, seed=1)
    assert schmidt == pytest.approx(session.ranges["Schmidt"].middle, abs=0.01)
    assert answers(page, ".physrep-answers") == expected(session.read(FRAMES - 16))
    assert keep("2_live_probe").stat().st_size > 20_000


def test_beyond_the_training_the_page_says_so(page):
    field = page.locator(".physrep-Reynolds .widget-readout")
    field.fill("4000")
    field.press("Enter")
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


def test_noise_moves_the_answers_as_the_library_says(page, keep):
    from physrep.explore.perturb import Change, compare
    from physrep.explore.saw_tab import changes_html

    page.get_by_role("tab", name="What it saw").click()
    page.locator(".physrep-changes tr", has_text="Equation oracle").wait_for()
    before = answers(page, ".physrep-changes")
    field = page.locator(".physrep-noise .widget-readout")
    field.fill("0.5")
    field.press("Enter")
    page.wait_for_function(
        "text => document.querySelector('.physrep-changes').innerText != text",
        arg=page.locator(".physrep-changes").inner_text(),
    )
    session = Session("shear_flow")
    session.simulate({k: r.middle for k, r in session.ranges.items()}, frames=FRAMES, seed=1)
    lines = re.findall(r"<tr>(.*?)</tr>", changes_html(compare(session, FRAMES - 16, Change(noise=0.5))))
    wanted = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in lines[1:]]
    assert answers(page, ".physrep-changes") == wanted != before
    keep("4_what_it_saw")


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

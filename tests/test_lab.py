"""nbs/09_explore in JupyterLab and Notebook 7, in a browser: it runs, fits its cell, says what the library says."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import FRAMES, answers, enter, expected, open_browser, wait_for

from physrep.explore.live import Session
from physrep.explore.page import TABS

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"JupyterLab": "lab/tree/lab.ipynb?reset", "Notebook 7": "notebooks/notebook.ipynb"}
NEWS = "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
if missing := [name for name in ("jupyterlab", "notebook", "playwright") if find_spec(name) is None]:
    pytest.skip(f"Jupyter was not tested: {', '.join(missing)} missing; make setup", allow_module_level=True)


def copies_of_the_notebook(folder: Path) -> None:
    "The notebook for one system and short flows, once for each place, so that each has a kernel of its own."
    from papermill import execute_notebook

    values = {"systems": "shear_flow", "frames": FRAMES, "flows": 3, "data_dir": str(folder / "data")}
    for name in ("lab", "notebook"):
        made = str(folder / f"{name}.ipynb")
        execute_notebook(str(ROOT / "nbs" / "09_explore.ipynb"), made, values, prepare_only=True, progress_bar=False)


def soon(holds, seconds: float = 60) -> bool:
    "Waits until something holds; False if it takes too long."
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.2)
    return bool(held)


def listens(port: int) -> bool:
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    "A server of JupyterLab, which also serves Notebook 7, with settings and files of its own."
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    copies_of_the_notebook(folder)
    (home / "settings" / NEWS).parent.mkdir(parents=True)
    (home / "settings" / NEWS).write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    own = {f"JUPYTER_{name}_DIR": str(home / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name.upper()}_DIR": str(home / name) for name in ("settings", "workspaces")}
    own |= {"IPYTHONDIR": str(home / "ipython"), "PHYSREP_ROOT": str(ROOT), "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--no-browser --allow-root --ip 127.0.0.1 --port {port} --ServerApp.port_retries=0"
    command = [sys.executable, "-m", "jupyterlab", *options.split(), "--IdentityProvider.token="]
    with (home / "log").open("w") as log:
        streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        server = subprocess.Popen([*command, f"--ServerApp.root_dir={folder}"], env=os.environ | own, **streams)
    assert soon(lambda: listens(port) or server.poll() is not None), "the server has not started"
    assert server.poll() is None, (home / "log").read_text()[-3000:]
    yield f"http://127.0.0.1:{port}/"
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def page(address):
    with open_browser(width=1280, height=900) as page:
        yield page


def cut_off(page) -> list[str]:
    "The parts of the page that are wider than the cell or that scroll sideways."
    return page.locator(".physrep-page").evaluate(
        """page => {
            const edge = page.getBoundingClientRect().right
            const bad = e => e.getBoundingClientRect().right > edge + 1
            const scrolls = e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX == 'auto'
            return [...page.querySelectorAll('*')].filter(e => bad(e) || scrolls(e)).map(e => e.className)
        }"""
    )


def has_kernel(address: str, name: str) -> bool:
    "Whether the notebook in the browser has its kernel; Jupyter asks for one if cells are run before."
    with urllib.request.urlopen(f"{address}api/sessions", timeout=5) as answer:
        sessions = json.load(answer)
    kernels = [session["kernel"] for session in sessions if session["path"] in PLACES[name]]
    return any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels)


@pytest.mark.parametrize("name", ["JupyterLab", pytest.param("Notebook 7", marks=pytest.mark.long)])
def test_the_notebook_runs_and_says_what_the_library_says(name, address, page):
    page.goto(address + PLACES[name])
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    assert soon(lambda: has_kernel(address, name)), "no kernel"
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells$")).click()
    wait_for(page, "1,130")
    page.get_by_label("solve again when a slider is moved").uncheck()
    enter(page, ".physrep-Reynolds", "700")
    page.locator(".physrep-simulate").click()
    wait_for(page, "700")
    session = Session("shear_flow")
    session.simulate({"Reynolds": 700.0, "Schmidt": session.ranges["Schmidt"].middle}, frames=FRAMES, seed=1)
    assert answers(page, ".physrep-answers") == expected(session.read(FRAMES - 16))
    for title in TABS:
        page.get_by_role("tab", name=title).click()
        page.locator(".physrep-intro:visible").wait_for()
        assert cut_off(page) == []
        assert page.locator(".physrep-bad:visible").count() == 0

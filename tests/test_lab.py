"""nbs/09_explore in JupyterLab and Notebook 7, in a browser: it runs, fits its cell, says what the library says."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import FRAMES, answers, cut_off, enter, free_port, open_browser, rows_of, wait_for

from physrep.explore.page import answers_html
from physrep.explore.readers import Session

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"JupyterLab": "lab/tree/lab.ipynb?reset", "Notebook 7": "notebooks/notebook.ipynb"}
NEWS = "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
if missing := [name for name in ("jupyterlab", "notebook", "playwright") if find_spec(name) is None]:
    pytest.skip(f"Jupyter was not tested: {', '.join(missing)} missing; make setup", allow_module_level=True)


def soon(holds, seconds: float = 60) -> bool:
    "Waits until something holds; False if it takes too long."
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.2)
    return bool(held)


def sessions(address: str) -> list[dict] | None:
    "The notebooks that are open, as Jupyter tells them; None if it does not answer yet."
    try:
        with urllib.request.urlopen(f"{address}api/sessions", timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    "A server of JupyterLab, which also serves Notebook 7, with settings and files of its own."
    from papermill import execute_notebook

    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    values = {"systems": "shear_flow", "frames": FRAMES, "flows": 3, "data_dir": str(folder / "data")}
    for name in ("lab", "notebook"):  # each place has a kernel of its own
        made = str(folder / f"{name}.ipynb")
        execute_notebook(str(ROOT / "nbs" / "09_explore.ipynb"), made, values, prepare_only=True, progress_bar=False)
    (home / "settings" / NEWS).parent.mkdir(parents=True)
    (home / "settings" / NEWS).write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    own = {f"JUPYTER_{name}_DIR": str(home / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name.upper()}_DIR": str(home / name) for name in ("settings", "workspaces")}
    own |= {"IPYTHONDIR": str(home / "ipython"), "PHYSREP_ROOT": str(ROOT), "OMP_NUM_THREADS": "1"}
    port = free_port()
    options = f"--no-browser --allow-root --ip 127.0.0.1 --port {port} --ServerApp.port_retries=0"
    command = [sys.executable, "-m", "jupyterlab", *options.split(), "--IdentityProvider.token="]
    with (home / "log").open("w") as log:
        streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        server = subprocess.Popen([*command, f"--ServerApp.root_dir={folder}"], env=os.environ | own, **streams)
    address = f"http://127.0.0.1:{port}/"
    assert soon(lambda: sessions(address) is not None), (home / "log").read_text()[-3000:]
    yield address
    server.terminate()
    server.wait(30)


@pytest.fixture(scope="module")
def page(address):
    with open_browser(width=1280, height=900) as page:
        yield page


@pytest.mark.parametrize("name", ["JupyterLab", pytest.param("Notebook 7", marks=pytest.mark.long)])
def test_the_notebook_runs_and_says_what_the_library_says(name, address, page):
    page.goto(address + PLACES[name])
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()

    def has_kernel() -> bool:  # Jupyter asks for one if cells are run before
        kernels = [s["kernel"] for s in sessions(address) if s["path"] in PLACES[name]]
        return any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels)

    assert soon(has_kernel), "no kernel"
    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells$")).click()
    wait_for(page, "1,130")
    page.get_by_label("solve again when a slider is moved").uncheck()
    enter(page, ".physrep-Reynolds", "700")
    page.locator(".physrep-simulate").click()
    wait_for(page, "700")
    session = Session("shear_flow")
    session.simulate({"Reynolds": 700.0, "Schmidt": session.ranges["Schmidt"].middle}, frames=FRAMES, seed=3)
    assert answers(page, ".physrep-answers") == rows_of(answers_html(session.read(FRAMES - 16), session.ranges))
    for tab in page.locator(".physrep-page").get_by_role("tab").all():
        tab.click()
        page.locator(".physrep-intro:visible").wait_for()
        assert cut_off(page) == []
        assert page.locator(".physrep-bad:visible").count() == 0

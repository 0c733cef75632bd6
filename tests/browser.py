"""A Chromium without a network, and what tests of the page of nbs/09_explore read from it."""

import html
import os
import re
import shutil
import socket
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
LOCAL = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"  # the page needs nothing from elsewhere
FRAMES = 32

if BROWSER is None:
    pytest.skip(
        "the page was not tested: there is no Chromium. apt-get install chromium, or CHROMIUM=/path/of/it",
        allow_module_level=True,
    )


@contextmanager
def open_browser(width: int, height: int):
    "An empty page of that size, in pixels."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=[*QUIET.split(), LOCAL])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(60_000)  # seconds on a machine that does nothing else
        yield page
        browser.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(page, inside: str) -> list[list[str]]:
    "The rows of the table in a part of the page."
    rows = page.locator(f"{inside} .physrep-numbers tr:has(td)").all()
    return [[cell.inner_text() for cell in row.locator("td").all()] for row in rows]


def rows_of(table: str) -> list[list[str]]:
    "The same rows from a table of the library."
    lines = re.findall(r"<tr>(<td>.*?)</tr>", table)
    cells = [re.findall(r"<td>(.*?)</td>", line) for line in lines]
    return [[html.unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in cells]


def enter(page, inside: str, value: str) -> None:
    "Types a value into the field beside a slider."
    field = page.locator(f"{inside} .widget-readout")
    field.fill(value)
    field.press("Enter")


def wait_for(page, values: str) -> None:
    "Waits until the page says that it has solved and read the flow of these parameters."
    page.locator(".physrep-answers tr", has_text="the truth").filter(has_text=values).wait_for()
    page.locator(".physrep-status", has_text=f"Solved {FRAMES} frames").wait_for()


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

"""Serves the widgets of nbs/09_explore.ipynb as a page, on this machine only, at an address with a token.

    python tools/app.py [--port 8866] [--no-browser] [--systems NAMES] [--data-dir FOLDER] [--frames N] [--flows N]

A kernel is started in advance, so that the page opens at once. Kernels end when their page is closed, or ten minutes
after a browser was lost; there are KERNELS at most, each with MEMORY at most. The page shows no source and runs no text
of a user.
"""

import argparse
import asyncio
import os
import resource
import secrets
import sys
import tempfile
import threading
import webbrowser
from pathlib import Path

import nbformat
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.web import HTTPError
from traitlets.config import Config
from voila.app import Voila
from voila.voila_identity_provider import VoilaIdentityProvider

ROOT = Path(__file__).resolve().parent.parent
KERNELS = 4  # one of them waits for the next page
MEMORY = 4 * 2**30  # bytes of a process; where a file wants more, the page says so (Linux; others do not count it)
OPTIONS = [
    "--Voila.ip=127.0.0.1",
    "--token",  # a new one each time, in the address that is printed and opened; then a cookie
    "--strip_sources=True",
    "--show_tracebacks=False",
    "--preheat_kernel=True",
    "--pool_size=1",
    # of the extensions of JupyterLab only those of widgets: others want parts of JupyterLab that a page has not
    "--VoilaConfiguration.extension_allowlist=@jupyter-widgets/jupyterlab-manager",
    "--VoilaConfiguration.extension_allowlist=@voila-dashboards/widgets-manager8",
    "--MappingKernelManager.cull_interval=60",
    "--MappingKernelManager.cull_idle_timeout=600",
    "--MappingKernelManager.cull_connected=False",
]
# a larger upload than the page takes reaches it, so that it can say so: 10 MiB end the connection otherwise
# a name that someone else has pointed at this machine is no name of it
SETTINGS = {"websocket_max_message_size": 64 * 2**20, "allow_remote_access": False}


class OneToken(VoilaIdentityProvider):
    "Whoever comes with the token gets a cookie, and another without which a page that is closed cannot end its kernel."

    def set_login_cookie(self, handler, user) -> None:
        super().set_login_cookie(handler, user)
        if not handler.get_cookie("_xsrf"):
            handler.set_cookie("_xsrf", secrets.token_hex(16), samesite="Strict")


class FewKernels(AsyncMappingKernelManager):
    "Starts one kernel after the other, and no more than `KERNELS`."

    def __init__(self, **options):
        super().__init__(**options)
        self.turn = asyncio.Lock()

    async def start_kernel(self, **options) -> str:
        async with self.turn:
            if len(self) >= KERNELS:
                reason = f"{KERNELS} pages are open, close one and load this again after a minute"
                raise HTTPError(503, reason=reason)
            return await super().start_kernel(**options)


class App(Voila):
    def launch_browser(self) -> None:
        "Opens the address with its token, by a file of this user alone: commands are seen by everybody."
        page = Path(self.connection_dir) / "open.html"
        page.write_text(f'<meta http-equiv="refresh" content="0; url={self.display_url}">', encoding="utf-8")
        threading.Thread(target=webbrowser.open, args=[page.as_uri()]).start()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8866)
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("--systems", default="", help="comma-separated; default: all with an encoder in the package")
    # the page runs in another folder, in which a relative path would be another place
    parser.add_argument("--data-dir", type=os.path.abspath, help="of data sets; default: data/")
    parser.add_argument("--frames", type=int, default=0, help="of a simulated flow; default: as in the training")
    parser.add_argument("--flows", type=int, default=24, help="that the page makes where there is no data set")
    asked = parser.parse_args()
    os.environ.setdefault("PHYSREP_ROOT", str(ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("JUPYTER_TOKEN", "JUPYTER_TOKEN_FILE"):  # of another server
        os.environ.pop(name, None)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # kernels inherit it

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "physrep.ipynb"
        options = dict(systems=asked.systems, data_dir=asked.data_dir or "", frames=asked.frames, flows=asked.flows)
        code = f"from physrep.explore.page import explore\n\nexplore(**{options})"
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        cells = [nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
        sys.argv = ["voila", str(path), f"--port={asked.port}", *OPTIONS, *(["--no-browser"] * asked.no_browser)]
        config = Config()
        config.VoilaConfiguration.multi_kernel_manager_class = FewKernels
        config.Voila.identity_provider_class = OneToken
        config.IdentityProvider.cookie_options = {"samesite": "Strict"}  # links and images of other pages come without
        App.launch_instance(tornado_settings=SETTINGS, config=config)

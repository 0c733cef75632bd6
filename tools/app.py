"""Serves the widgets of nbs/09_explore.ipynb as a page, on this machine only.

    python tools/app.py [--port 8866] [--no-browser] [--systems NAMES] [--data-dir FOLDER] [--frames N] [--flows N]

A kernel is started in advance, so that the page opens at once. Kernels end ten minutes after their page was closed.
The page shows no source and runs no text of a user.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = [
    "--Voila.ip=127.0.0.1",
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
SETTINGS = {"websocket_max_message_size": 64 * 2**20}

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
    from voila.app import Voila

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "physrep.ipynb"
        options = dict(systems=asked.systems, data_dir=asked.data_dir or "", frames=asked.frames, flows=asked.flows)
        code = f"from physrep.explore.page import explore\n\nexplore(**{options})"
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        cells = [nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
        sys.argv = ["voila", str(path), f"--port={asked.port}", *OPTIONS, *(["--no-browser"] * asked.no_browser)]
        Voila.launch_instance(tornado_settings=SETTINGS)

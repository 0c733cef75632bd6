"""Serves the widgets of nbs/09_explore.ipynb as a page, on this machine only.

    python tools/app.py [--port 8866] [--no-browser] [-p NAME VALUE ...]     with parameters of the notebook

A kernel is started in advance, so that the page opens at once. Kernels end ten minutes after their page was closed.
The page shows no source and runs no text of a user.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "09_explore.ipynb"
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


def page(notebook: dict, values: dict[str, str]) -> dict:
    "The notebook's code cells, with other parameters: what is around the widgets is for those who read the notebook."
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        if "parameters" in cell["metadata"].get("tags", []):
            known = {line.split(":")[0]: line for line in "".join(cell["source"]).splitlines()}
            if unknown := sorted(set(values) - set(known)):
                raise SystemExit(f"unknown parameter {', '.join(unknown)}; there are {', '.join(known)}")
            kinds = {name: line.split(":")[1].split("=")[0].strip() for name, line in known.items()}
            # the page runs in another folder
            values = {n: os.path.abspath(v) if n.endswith("_dir") and v else v for n, v in values.items()}
            told = {name: repr(int(v) if kinds[name] == "int" else v) for name, v in values.items()}
            lines = [f"{name}: {kinds[name]} = {told[name]}" if name in told else line for name, line in known.items()]
            cell["source"] = "\n".join(lines)
    return notebook | {"cells": cells}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8866)
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    asked = parser.parse_args()
    os.environ.setdefault("PHYSREP_ROOT", str(ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from voila.app import Voila

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "physrep.ipynb"
        path.write_text(json.dumps(page(json.loads(NOTEBOOK.read_text(encoding="utf-8")), dict(asked.p))))
        sys.argv = ["voila", str(path), f"--port={asked.port}", *OPTIONS, *(["--no-browser"] * asked.no_browser)]
        Voila.launch_instance(tornado_settings=SETTINGS)

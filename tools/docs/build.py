"""Builds the book from the committed notebooks, as `make docs` does: static pages, no network, nothing executed.

python tools/docs/build.py                    all pages, in _docs/html
python tools/docs/build.py --only core        the notebooks whose name begins with `core`, for a quick look
"""

import argparse
import os
import sys
from pathlib import Path

from contents import ROOT
from stage import stage


def build(out: Path, only: list[str], jobs: int = 1, quiet: bool = True) -> int:
    "Stages the source in `out`/source and builds `out`/html; the exit code of Sphinx, which a warning makes 1."
    from sphinx.cmd.build import main as sphinx

    sys.path.insert(1, str(ROOT))  # the package beside the notebooks
    stage(out / "source", lambda n: not only or n.name.startswith(tuple(only)))
    options = ["-b", "html", "-c", str(Path(__file__).parent), "-d", str(out / "doctrees"), "-j", str(jobs)]
    options += ["--fail-on-warning", *(["--quiet"] if quiet else [])]
    return sphinx([*options, str(out / "source"), str(out / "html")])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the book [_docs]")
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names of notebooks, e.g. core 03_")
    parser.add_argument("--jobs", type=int, default=1, help="processes [1]")
    parser.add_argument("--verbose", action="store_true", help="say what is read and written")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    code = build(asked.out.resolve(), asked.only, asked.jobs, quiet=not asked.verbose)
    if code == 0:
        page = asked.out.resolve() / "html" / "index.html"
        print(f"the book: {page}\nopen it in a browser, or serve it: python3 -m http.server -d {page.parent} 8000")
    sys.exit(code)

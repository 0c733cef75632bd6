"""All checks of the repository, as `make test` runs them: what is generated is in sync, ruff, nbdev_test, pytest.

Ends with a line `N passed, N failed` over checks, notebooks and tests; exits with 1 if anything failed.
"""

import filecmp
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
passed, failed = [], []


def run(*command: str, cwd: Path = ROOT, show: bool = True) -> tuple[int, str]:
    "Runs a command of the environment, showing its output as it comes; returns its exit code and output."
    with subprocess.Popen(
        [str(BIN / command[0]), *command[1:]], cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if show and line.strip():
                print("  " + line.rstrip(), flush=True)
    return process.returncode, "".join(lines)


def record(name: str, ok: bool, why: str = "") -> None:
    (passed if ok else failed).append(name)
    if not ok:
        print(f"  FAILED {name}" + (f": {why}" if why else ""), flush=True)


def section(number: int, title: str) -> None:
    print(f"== {number}/4 {title} ({time.monotonic() - START:.0f} s)", flush=True)


def check_generated() -> None:
    "physrep/, README.md and the notebooks are what export, readme and clean make of them (tried on a copy)."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "physrep"
        copy.mkdir()
        for name in ("nbs", "physrep", "tests", "settings.ini", "setup.py", "pyproject.toml", "README.md", "figures"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for cache in copy.rglob("__pycache__"):
            shutil.rmtree(cache)
        for command in (("nbdev_export",), ("nbdev_clean",), ("python", "tests/notebooks.py", "--readme")):
            code, text = run(*command, cwd=copy, show=False)
            record(" ".join(command), code == 0, text[-2000:])
        files = sorted(p.relative_to(copy) for pattern in ("physrep/**/*.py", "nbs/*.ipynb", "README.md", "pyproject.toml") for p in copy.glob(pattern))
        here = sorted(p.relative_to(ROOT) for p in (ROOT / "physrep").rglob("*.py"))
        stale = [str(p) for p in files if not (ROOT / p).is_file() or not filecmp.cmp(ROOT / p, copy / p, shallow=False)]
        orphans = [str(p) for p in here if p not in files]
        record("generated files in sync", not stale and not orphans, f"out of step: {', '.join(stale + orphans)}; run: make notebooks readme")


def check_notebooks() -> None:
    "nbdev_test, with a count: one test a notebook."
    workers = str(os.cpu_count() or 1)
    code, text = run("nbdev_test", "--n_workers", workers, "--do_print", "--timing")
    # stages and experiments are passed over by nbdev_test (`skip_exec`); pytest runs them through papermill
    names = sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb") if "skip_exec: true" not in p.read_text(encoding="utf-8"))
    tail = text.split("nbdev Tests Failed On The Following Notebooks:")[-1] if code else ""
    bad = [n for n in names if re.search(rf"^\s*{re.escape(n)}\s*$", tail, re.M)]
    for n in names:
        record(n, n not in bad)
    if code and not bad:
        record("nbdev_test", False, "it failed without naming a notebook")


def check_tests() -> None:
    "pytest, counted from its own report."
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code, _ = run("python", "-m", "pytest", "-q", "--durations=5", f"--junitxml={report}", "tests")
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    for case in cases:
        kinds = {child.tag for child in case}
        if "skipped" not in kinds:
            record(f"{case.get('classname')}::{case.get('name')}", not kinds & {"failure", "error"})
    if code and not any("::" in name for name in failed):
        record("pytest", False, f"exit code {code}")


START = time.monotonic()
if __name__ == "__main__":
    section(1, "what is generated is in sync, notebooks are clean")
    check_generated()
    section(2, "ruff")
    record("ruff", run("ruff", "check", "--quiet", "physrep", "tests")[0] == 0)
    section(3, "nbdev_test: every notebook of the library")
    check_notebooks()
    section(4, "pytest")
    check_tests()
    print(f"== done in {time.monotonic() - START:.0f} s" + "".join(f"\n  FAILED {name}" for name in failed))
    print(f"{len(passed)} passed, {len(failed)} failed")
    sys.exit(bool(failed))

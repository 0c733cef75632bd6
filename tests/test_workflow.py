"""Two workflows on the same runs: the second says so and waits; what was killed holds nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
from helpers import ROOT

CODE = """
import sys
from pathlib import Path
from workflow import main
sys.exit(main("few", "--version", root=Path(sys.argv[1])))
"""
HOLD = """
import sys, time
import filelock
filelock.FileLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""


def start(root: Path) -> subprocess.Popen:
    "A workflow of preset `few` that prints the version of snakemake, on runs below `root`."
    command = [sys.executable, "-c", CODE, str(root)]
    return subprocess.Popen(command, cwd=ROOT / "tools", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_second_workflow_waits_for_the_first(tmp_path):
    lock = filelock.FileLock(tmp_path / "runs" / "few" / ".workflow.lock")
    Path(lock.lock_file).parent.mkdir(parents=True)
    with lock:
        second = start(tmp_path)
        assert second.stdout.readline() == "== another make works on runs/few; waiting until it is done\n"
        time.sleep(1)
        assert second.poll() is None
    assert second.communicate(timeout=60)[0].count(".") == 2 and second.returncode == 0


def test_a_killed_workflow_keeps_nobody_waiting(tmp_path):
    (tmp_path / "runs" / "few").mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "runs" / "few" / ".workflow.lock")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert "waiting" not in start(tmp_path).communicate(timeout=60)[0]

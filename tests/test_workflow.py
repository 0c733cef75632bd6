"""Two workflows on the same runs: the second says so and waits; what was killed holds nothing."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from helpers import ROOT, dry_run

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


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> dict[str, str]:
    "The command of each job at preset smoke with rows of one's own, by rule."
    folder = tmp_path_factory.mktemp("rows of my own")
    (folder / "rival.csv").write_text("")
    rows = ("{objective: rival, predictions: {shear_flow: rival.csv}}", "{objective: jepa, encoder: vit, tag: near}")
    (folder / "rows.yaml").write_text("".join(["rows:\n", *(f"  - {row}\n" for row in rows)]))
    (folder / "mine.yaml").write_text("base: smoke\n")  # nothing of it is there yet
    options = dict(preset=str(folder / "mine.yaml"), data=str(folder / "data"))
    done = dry_run("--printshellcmds", **options, rows=str(folder / "rows.yaml"), systems="shear_flow")
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(re.findall(r"^(?:local)?rule (\S+):$.*?^Shell command: (.*?)$", done.stdout, re.M | re.S))


def test_a_file_of_rows_is_told_to_jobs_of_these_rows_alone(planned):
    "A job that is told something else runs again."
    told = {name for name, command in planned.items() if name.startswith("probe_") and "rows.yaml" in command}
    assert told == {"probe_shear_flow_jepa.near_vit"}
    assert sum(name.startswith("probe_") for name in planned) > 8


def test_commands_take_folders_with_spaces(planned):
    rest = planned["compare_shear_flow_rival"].partition(" compare ")[2].replace(str(ROOT), "'/a folder'")
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {rest}"], capture_output=True, text=True).stdout.splitlines()
    assert words[0].endswith("/rival.csv") and "rows of my own" in words[0]
    assert words[1::2] == ["--reference", "--into"]
    assert words[2::2] == [f"/a folder/runs/mine/shear_flow/{name}" for name in ("constant", "rival")]


def test_another_number_of_cores_is_no_other_command(planned):
    "The number of processes stands in the shell, not in what is compared with the last time."
    command = planned["simulate_shear_flow"]
    assert command.startswith("export SIMULATING=1; ") and '-p workers "$SIMULATING"' in command


def test_targets_declare_the_figures_that_there_is_something_to_draw_for(tmp_path):
    "Of one cell alone, at a preset without learning rates that were found before; and nothing has been scored yet."
    preset = tmp_path / "mine.yaml"
    preset.write_text("base: smoke\n")
    options = dict(preset=str(preset), data=str(tmp_path / "data"), cells="tube-pixels-vit", encoders="yes")
    done = dry_run("attentive", "matters", "box", "grid", **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    drawn = set(re.findall(r"figures/(\w+)\.csv", done.stdout))
    assert {"probe_length", "matters", "box", "grid"} <= drawn
    assert not drawn & {"probe_length_cells", "matters_shares", "matters_probes", "matters_paper", "matters_systems"}
    assert "probe_shear_flow_random_vit" in done.stdout, "random weights are probed where they have no result yet"

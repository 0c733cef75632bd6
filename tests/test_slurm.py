"The workflow on a real Slurm of one node, which the test starts (Debian: slurmctld, slurmd, slurm-client, munge)."

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, copied, jobs_of

PROFILE = ROOT / "tools" / "slurm" / "config.yaml"
DAEMONS, COMMANDS = (
    ("munged", "slurmctld", "slurmd"),
    ("sbatch", "srun", "sinfo", "scancel", "squeue", "scontrol"),
)
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
SlurmdPort={other}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def stop(pid_file: Path) -> None:
    if pid_file.is_file():
        os.kill(int(pid_file.read_text()), signal.SIGTERM)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    "A Slurm of one node; the environment in which its commands find it."
    missing = [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name) is None]
    if missing or os.geteuid():
        pytest.skip(f"Slurm is started as root, and needs {', '.join(missing) or 'nothing more'}")
    pytest.importorskip("snakemake_executor_plugin_slurm")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munge = {name: folder / "munge" / name for name in ("socket", "pid-file", "log-file", "seed-file")}
    places = [f"--{name}={path}" for name, path in munge.items()]
    # as much memory as two jobs ask for, whether this machine has it or not
    memory = 2 * yaml.safe_load(PROFILE.read_text())["default-resources"]["mem_mb"]
    values = dict(folder=folder, host=host, port=free_port(), other=free_port(), cores=os.cpu_count(), memory=memory)
    (folder / "slurm.conf").write_text(SETTINGS.format(**values))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    (folder / "bin").mkdir()
    for name in COMMANDS:  # jobs lose all variables of Slurm, so the commands set this one
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which(name)} "$@"\n')
        command.chmod(0o755)
    environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
    try:
        subprocess.run(["munged", "--force", f"--key-file={key}", *places], check=True)
        subprocess.run(["slurmctld"], check=True, env=environment)
        subprocess.run(["slurmd", "-N", host], check=True, env=environment)
        for _ in range(60):
            time.sleep(0.5)
            done = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True)
            if done.stdout.strip() == "idle":
                break
        assert done.stdout.strip() == "idle", (folder / "slurmctld.log").read_text()[-3000:]
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        for pid_file in (folder / "slurmd.pid", folder / "slurmctld.pid", munge["pid-file"]):
            stop(pid_file)


def snakemake(folder: Path, environment: dict, *options: str) -> list[str]:
    "The command of the workflow as `make reproduce PROFILE=tools/slurm` gives it, at preset smoke for few rows."
    config = ["preset=smoke", "systems=shear_flow", "only=mae-vit,random-vit", "cores=2"]
    # this Slurm keeps no accounts, so the queue says how jobs are
    fast = ["--slurm-init-seconds-before-status-checks", "2", "--slurm-no-account", "--slurm-status-command", "squeue"]
    profile = ["--workflow-profile", str(PROFILE.parent), "--latency-wait", "5"]
    return [
        sys.executable,
        "-m",
        "snakemake",
        *profile,
        *fast,
        "--nolock",
        "--rerun-triggers",
        "mtime",
        *options,
        "--config",
        *config,
    ]


def jobs(environment: dict) -> list[str]:
    done = subprocess.run(["squeue", "-h", "-o", "%i"], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_profile_is_one_of_snakemake():
    profile = yaml.safe_load(PROFILE.read_text())
    assert profile["executor"] == "slurm" and profile["retries"] > 0
    assert {"mem_mb", "runtime"} <= profile["default-resources"].keys()


@pytest.mark.long
def test_table_1_is_made_by_the_jobs_of_a_cluster(cluster, tmp_path):
    folder = copied(tmp_path / "shared")
    environment = {**cluster, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{ROOT}"}
    environment.pop("PHYSREP_ROOT", None)
    about = dict(cwd=folder, env=environment, stdin=subprocess.DEVNULL, text=True)
    # interrupted when the first job runs: its jobs are cancelled, and the next call goes on
    first = subprocess.Popen(snakemake(folder, environment), **about, stderr=subprocess.DEVNULL)
    for _ in range(300):
        time.sleep(0.2)
        if jobs(environment):
            break
    first.send_signal(signal.SIGINT)
    first.wait(timeout=120)
    for _ in range(100):
        if not jobs(environment):
            break
        time.sleep(0.2)
    assert not jobs(environment) and not list((folder / "runs").rglob("table1.csv"))
    done = subprocess.run(
        snakemake(folder, environment), **about, timeout=900, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "SLURM jobid" in done.stdout and (folder / "runs/smoke/figures/table1.csv").is_file()
    # what every job has recorded is what the next call wants: nothing is to be done
    again = subprocess.run(snakemake(folder, environment, "--dry-run"), **about, timeout=300, capture_output=True)
    assert not jobs_of(again.stdout + again.stderr), again.stdout[-3000:] + again.stderr[-3000:]

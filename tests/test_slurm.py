"The workflow on a real Slurm of one node, which the test starts (Debian: slurmctld, slurmd, slurm-client, munge)."

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml
from helpers import ROOT, copied, jobs_of, same_files
from helpers import snakemake as alone

PROFILE = ROOT / "tools" / "slurm" / "config.yaml"
ROWS = {"systems": "shear_flow", "only": "mae-vit,random-vit"}
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
AuthInfo=socket={folder}/munge/socket,cred_expire=10
SlurmdTimeout=6
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


def wait(found: Callable[[], object], seconds: float, what: str) -> object:
    "What `found` returns when that is something."
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, f"no {what} in {seconds} seconds"
        time.sleep(0.2)
    return result


def asked(environment: dict, *command: str) -> str:
    "What a command of Slurm prints."
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def start_node(environment: dict) -> None:
    subprocess.run(["slurmd", "-N", socket.gethostname().partition(".")[0]], check=True, env=environment)
    wait(lambda: asked(environment, "sinfo", "-h", "-o", "%t") in ("idle", "mix", "alloc"), 60, "node")


def kill_node(environment: dict, *jobs: str) -> None:
    "SIGKILL for slurmd and all that it has started for jobs, as a node without power; Slurm finds it down."
    lines = [line for job in jobs for line in asked(environment, "scontrol", "listpids", job).splitlines()[1:]]
    pids = [int(line.split()[0]) for line in lines]
    daemon = int((Path(environment["SLURM_CONF"]).parent / "slurmd.pid").read_text())
    steps = {p for pid in pids for p in psutil.Process(pid).parents() if p.name().startswith("slurmstepd")}
    for number in (signal.SIGSTOP, signal.SIGKILL):  # all at once: none tells how another ended
        for one in (psutil.Process(daemon), *steps, *map(psutil.Process, pids)):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)
    wait(lambda: "down" in asked(environment, "sinfo", "-h", "-o", "%t"), 60, "node that is down")


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
        start_node(environment)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        for pid_file in (folder / "slurmd.pid", folder / "slurmctld.pid", munge["pid-file"]):
            stop(pid_file)


def snakemake(folder: Path, environment: dict, *options: str) -> list[str]:
    "The command of the workflow as `make reproduce PROFILE=tools/slurm` gives it, at preset smoke for few rows."
    config = [f"{key}={value}" for key, value in {"preset": "smoke", **ROWS, "cores": 2}.items()]
    # this Slurm keeps no accounts, so the queue says how jobs are
    fast = ["--slurm-init-seconds-before-status-checks", "2", "--slurm-no-account", "--slurm-status-command", "squeue"]
    profile = [
        "--workflow-profile",
        str(PROFILE.parent),
        "--latency-wait",
        "5",
        "--nolock",
        "--rerun-triggers",
        "mtime",
    ]
    return [sys.executable, "-m", "snakemake", *profile, *fast, *options, "--config", *config]


def jobs(environment: dict, *which: str) -> list[str]:
    return asked(environment, "squeue", "-h", "-o", "%i", *which).split()


def test_the_profile_is_one_of_snakemake():
    profile = yaml.safe_load(PROFILE.read_text())
    assert profile["executor"] == "slurm" and profile["retries"] > 0
    assert {"mem_mb", "runtime"} <= profile["default-resources"].keys()


@pytest.mark.long
def test_table_1_is_made_by_the_jobs_of_a_cluster_though_a_node_dies(cluster, tmp_path):
    folder = copied(tmp_path / "shared")
    environment = {**cluster, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{ROOT}"}
    environment.pop("PHYSREP_ROOT", None)
    about = dict(cwd=folder, env=environment, stdin=subprocess.DEVNULL, text=True)
    # interrupted when the first job runs: its jobs are cancelled, and the next call goes on
    first = subprocess.Popen(snakemake(folder, environment), **about, stderr=subprocess.DEVNULL)
    wait(lambda: jobs(environment), 60, "job")
    first.send_signal(signal.SIGINT)
    first.wait(timeout=120)
    wait(lambda: not jobs(environment), 20, "end of the jobs")
    assert not list((folder / "runs").rglob("table1.csv"))
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with subprocess.Popen(snakemake(folder, environment), **about, **pipe) as second:
        try:
            wait(lambda: list((folder / "runs").rglob("checkpoint")), 300, "training")
            kill_node(environment, *jobs(environment, "--states=RUNNING"))
            start_node(environment)
            said, _ = second.communicate(timeout=900)
        finally:
            second.kill()
    assert second.returncode == 0, said[-5000:]
    assert "SLURM jobid" in said and "Restarts=1" in asked(environment, "scontrol", "show", "jobs")
    alone(copied(tmp_path / "alone"), **ROWS)
    for name in ("encoder.safetensors", "predictions.safetensors", "table1.csv"):
        assert same_files((tmp_path / "alone", folder), name), name
    # what every job has recorded is what the next call wants: nothing is to be done
    again = subprocess.run(snakemake(folder, environment, "--dry-run"), **about, timeout=300, capture_output=True)
    assert not jobs_of(again.stdout + again.stderr), again.stdout[-3000:] + again.stderr[-3000:]


@pytest.mark.long
def test_a_training_of_two_processes_is_one_job_and_goes_on_when_its_node_dies(cluster, smoke_data, tmp_path):
    "torchrun is what the job calls; Slurm starts the job again when the node is back, as `JobRequeue` says by default."

    def command(runs: Path) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        options = ["--objective", "mae", "--preset", "smoke", "--steps", "160", "--recipe", "{checkpoint_seconds: 0}"]
        places = ["--device", "cpu", "--data-dir", str(smoke_data), "--run-dir", str(runs)]
        return [*launcher, "-m", "physrep.training.distributed", *options, *places]

    environment = {**cluster, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    roots, log = (tmp_path / "undisturbed", tmp_path / "killed"), tmp_path / "log"
    subprocess.run(command(roots[0]), env=environment, check=True, stderr=subprocess.DEVNULL, timeout=300)
    options = ["--parsable", "--cpus-per-task=2", f"--output={log}", "--open-mode=append", "--wrap"]
    job = asked(environment, "sbatch", *options, shlex.join(command(roots[1])))
    wait(lambda: any(len(p.read_text().splitlines()) > 8 for p in roots[1].rglob("last.csv")), 120, "checkpoint")
    kill_node(cluster, job)
    assert not list(roots[1].glob("*/*/*-160/*/encoder.safetensors")), "it was killed before its end"
    start_node(cluster)
    wait(lambda: not jobs(cluster), 300, "end of the job")
    told = asked(cluster, "scontrol", "show", "job", job)
    assert "JobState=COMPLETED" in told and "Restarts=1" in told, told + log.read_text()[-3000:]
    updates = re.findall(r"(\d+)/160 \[", log.read_text().split(" 0/160 [00:00<?")[2])
    assert min(map(int, updates)) > 60, "it begins at the checkpoint"
    assert {"encoder.safetensors", "metrics.csv", "curve.csv"} <= {p.name for p in same_files(roots, "*.[sc]*")}

# Runs the jobs of a plan: simulate -> pretrain -> probe -> figures. Every job is a papermill call. What is still to be
# done, and what each job waits for, is said by `physrep.experiments.plan`; it asks the records of results whether they
# are current. Results are written below runs/ (git-ignored); `make figures` copies figures from there. Stamps below
# runs/<preset>/finished/ tell jobs apart within one call of Snakemake; what an earlier call did has no job any more.
#
# config: target (reproduce, simulate, study, or the notebook of an experiment), preset, data, systems, rows, only, seeds
# and length as in `physrep.results.rows.make_study`. On a cluster also cores (of a job that can use several) and gpus (of a
# job that trains).
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from physrep.core.files import project_root, read_json, remove_leftovers, write_json
from physrep.experiments.plan import Job, plan_jobs, read_experiments
from physrep.physics.systems import get_system
from physrep.results.rows import make_study

ROOT = project_root()
ASKED = {name: str(config.get(name) or "") for name in ("systems", "only", "rows", "seeds", "length")}
ASKED = {name: value for name, value in ASKED.items() if value}
ASKED |= {"data_dir": str(config["data"])} if config.get("data") else {}
PRESET = str(config.get("preset") or "laptop")
STUDY = make_study(PRESET, **ASKED)
OUT = ROOT / "runs" / STUDY.preset.name
# on a cluster every job parses this file for itself: cores and GPUs come from config there, not from the machine
CORES, GPUS = int(config.get("cores") or workflow.cores), int(config.get("gpus") or 0)
# one job at a time on a GPU, which leaves cores for others; on the CPU as many as there are cores, one thread each
TRAINING_THREADS = CORES // 2 + 1 if GPUS or torch.cuda.is_available() else 1
# systems are simulated side by side: no core waits while one of them starts or ends; a GPU has one process at a time
WORKERS = 1 if torch.cuda.is_available() else max(1, CORES // max(1, len(STUDY.preset.sims)))
SIMULATING = "$SIMULATING"  # a number that the shell of a job knows
# a job of a cluster parses this file when others are done, and a plan of its own would lack those, or itself
PLAN = OUT / "finished" / "plan.json"
if workflow.is_main_process:
    PLANNED = plan_jobs(STUDY, str(config.get("target") or "reproduce"))
else:
    PLANNED = [Job(**job) for job in read_json(PLAN)]
JOBS = {job.name: job for job in PLANNED}


def stamp(name):
    "What says that a job of this call is done."
    return OUT / "finished" / f"{name}.done"


def given_to_papermill(name, value):
    "A parameter as an option: text stays text, e.g. a tag `2`, and 5e-05 is a number, which YAML writes 5.0e-05."
    if isinstance(value, dict):
        text = yaml.safe_dump({name: value}, default_flow_style=True, width=10**6).strip()
        return f"-y {shlex.quote(text)}"
    if value is SIMULATING:
        return f'-p {name} "{value}"'
    return f"{'-r' if isinstance(value, str | Path) else '-p'} {name} {shlex.quote(str(value))}"


def parameters(job):
    "What a job is told: its own parameters, the preset, where the data are, and for experiments the whole study."
    preset = str(Path(PRESET).resolve()) if PRESET.endswith((".yaml", ".yml")) else PRESET
    given = {"preset": preset} | ({"data_dir": ASKED["data_dir"]} if "data_dir" in ASKED else {})
    if job.notebook in read_experiments():
        given |= ASKED | {"systems": ",".join(STUDY.systems), "seeds": " ".join(map(str, STUDY.seeds))}
        given |= {"rows": str(Path(ASKED["rows"]).resolve())} if "rows" in ASKED else {}
        given |= {"figure_dir": str(STUDY.drawn / "figures")}
    given |= {"workers": SIMULATING} if job.simulates else {}
    return given | job.parameters


def papermill(job):
    """The command of a job. papermill reads a notebook from standard input if that is a pipe, so it never is one. Its
    output goes to a log beside the notebook that it makes, and progress bars to the terminal, too, one line at a time;
    of a job that fails the end of the log is shown."""
    values = " ".join(given_to_papermill(k, v) for k, v in parameters(job).items())
    folder = (STUDY.drawn if job.notebook in read_experiments() else OUT) / "notebooks"
    places = (folder / job.name, sys.executable, ROOT / "nbs" / f"{job.notebook}.ipynb")
    target, python, source = (shlex.quote(str(place)) for place in places)
    last = f"""case "$line" in *%\\|*) echo "  {job.name}: ${{line##*$'\\r'}}";; esac"""
    options = f"--log-output --no-progress-bar {values} < /dev/null 2>&1"
    call = f"{python} -m papermill {source} {target}.ipynb {options} | tee {target}.log"
    shown = f"while IFS= read -r line; do {last}; done"
    made = f"mkdir -p {shlex.quote(str(folder))}"
    return f"{made} && {{ {call} | {shown} ; }} || {{ tail -n 40 {target}.log; exit 1; }}"


if workflow.is_main_process:
    for name in JOBS:
        stamp(name).unlink(missing_ok=True)
    remove_leftovers(OUT)
    if not workflow.output_settings.dryrun:
        write_json(PLAN, [asdict(job) for job in PLANNED])


# what came out of a system is printed while the next one is trained
NAMES = {system: get_system(system).name for system in STUDY.systems}
PROBED = {s: [n for n in JOBS if n.startswith(f"{NAMES[s]}-") and "-pretrain" not in n] for s in STUDY.systems}
PROBED = {s: names for s, names in PROBED.items() if any(name.endswith("-probe") for name in names)}


rule all:
    default_target: True
    input: [stamp(name) for name in (*JOBS, *(f"{NAMES[system]}-printed" for system in PROBED))]


for job in JOBS.values():
    rule:
        name: job.name.replace("-", "_").replace(".", "_")
        input: [stamp(name) for name in job.after if name in JOBS]
        output: touch(stamp(job.name))
        params: command=papermill(job)
        threads: TRAINING_THREADS if job.trains else WORKERS if job.simulates else 1
        resources:
            gpu=GPUS if job.trains else 0,
            simulating=WORKERS if job.simulates else 0,
        priority: job.priority
        shell: "export SIMULATING={resources.simulating}; {params.command}"


for system, names in PROBED.items():
    files = [folder / "result.json" for row in STUDY.rows for folder in STUDY.folders(row, system)]
    rule:
        name: f"print_{NAMES[system]}".replace("-", "_")
        input: [stamp(name) for name in names]
        output: touch(stamp(f"{NAMES[system]}-printed"))
        params: command=" ".join(shlex.quote(str(file)) for file in files)
        priority: 900
        shell: "{sys.executable} -m physrep.experiments.table1 {params.command}"

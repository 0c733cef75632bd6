# The graph simulate -> pretrain -> probe -> figures. Every job is a papermill call; the logic is in the notebooks and the library.
# Results are written below runs/ (git-ignored); `make reproduce` copies the figures at the end.
#
# A job runs again if its output is missing, or if its parameters, an input, or the digest of the code and notebook source that it
# uses have changed. A commit alone changes nothing.
import shlex
import sys
from pathlib import Path

import torch

from physrep.cost import VARIANTS
from physrep.evaluate import BASELINES, ROWS
from physrep.presets import get_preset, project_root
from physrep.provenance import code_digest, notebook_digest
from physrep.runs import baseline_folder, default_data_dir, modules_of, resolve, run_folder
from physrep.tuning import ENCODER_FROM, WALKS, log_path

ROOT = project_root()
PRESET = get_preset(config.get("preset") or "laptop")
DATA = Path(config.get("data") or default_data_dir(PRESET.name)).resolve()
OUT = ROOT / "runs" / PRESET.name


def stage(name, *modules):
    "What a job of this notebook depends on, besides its inputs."
    return notebook_digest(ROOT / "nbs" / f"{name}.ipynb") + code_digest(*modules)


def papermill(name, out, **parameters):
    """The command of a job. papermill reads a notebook from standard input if that is a pipe, so it never is one. Its output goes to a log beside the
    notebook that it makes, progress bars to the terminal too, one line at a time; of a job that fails the end of the log is shown."""
    target, python, source = (shlex.quote(str(p)) for p in (OUT / "notebooks" / out, sys.executable, ROOT / "nbs" / f"{name}.ipynb"))
    values = " ".join(f"-p {k} {shlex.quote(str(v))}" for k, v in ({"preset": PRESET.name} | ({"data_dir": DATA} if config.get("data") else {}) | parameters).items())
    bars = f"""while IFS= read -r line; do case "$line" in *%\\|*) echo "  {out}: ${{line##*$'\\r'}}";; esac; done"""
    return (
        f"mkdir -p {shlex.quote(str(OUT / 'notebooks'))} && {{ {python} -m papermill {source} {target}.ipynb --log-output --no-progress-bar {values} "
        f"< /dev/null 2>&1 | tee {target}.log | {bars} ; }} || {{ tail -n 40 {target}.log; exit 1; }}"
    )


def simulated(system):
    "The file that is written last when a system is simulated; nothing for The Well's own data."
    return [DATA / system / "stats.yaml"] if system in PRESET.sims else []


# one job at a time on a GPU; on the CPU as many as there are cores, one thread each
JOB_THREADS = workflow.cores if torch.cuda.is_available() else 1
RESULTS = []

for system in PRESET.systems:
    if system in PRESET.sims:
        rule:
            name: f"simulate_{system}"
            output: simulated(system)
            params: code=stage("00g_simulate", "generate", f"sim.{system}"), command=papermill("00g_simulate", f"{system}-simulate", system=system)
            threads: workflow.cores
            shell: "{params.command}"

    for baseline in BASELINES:
        RESULTS.append(baseline_folder(baseline, system, PRESET.name) / "result.json")
        rule:
            name: f"probe_{system}_{baseline}"
            input: simulated(system)
            output: RESULTS[-1]
            params: code=stage("04_probe", "evaluate"), command=papermill("04_probe", f"{system}-{baseline}", system=system, objective=baseline)
            shell: "{params.command}"

    for objective, encoder in ROWS:
        for seed in PRESET.seeds:
            run = resolve(system, objective, encoder, PRESET.name, seed=seed)
            name, folder = f"{system}-{objective}-{encoder}-seed{seed}", run_folder(run)
            values = dict(system=system, objective=objective, encoder=encoder, seed=seed)
            RESULTS.append(folder / "result.json")
            rule:
                name: f"pretrain_{name}".replace("-", "_")
                input: simulated(system)
                output: folder / "encoder.safetensors"
                params: code=stage("03_pretrain", *modules_of(run)), command=papermill("03_pretrain", f"{name}-pretrain", **values)
                threads: JOB_THREADS
                priority: {"jepa": 3, "supervised": 2, "mae": 1}.get(objective, 0)  # long jobs first
                shell: "{params.command}"
            rule:
                name: f"probe_{name}".replace("-", "_")
                input: folder / "encoder.safetensors"
                output: folder / "result.json"
                threads: JOB_THREADS
                params: code=stage("04_probe", "evaluate", *modules_of(run)), command=papermill("04_probe", f"{name}-probe", **values)
                shell: "{params.command}"

rule table1:
    input: RESULTS
    output: expand(OUT / "figures" / "{name}.{ext}", name=["table1", "table1_differences"], ext=["png", "svg", "csv", "json"])
    params: code=stage("05_table1", "evaluate", "figures", "cost", "verify"), command=papermill("05_table1", "table1")
    shell: "{params.command}"

# the same flows at twice the resolution, read by the same encoders and probes
if PRESET.refined:
    rule resolution:
        input: RESULTS
        output: expand(OUT / "figures" / "resolution.{ext}", ext=["png", "svg", "csv", "json"])
        params: code=stage("05b_resolution", "evaluate", "figures", "generate"), command=papermill("05b_resolution", "resolution")
        threads: workflow.cores
        shell: "{params.command}"

# one row again, with other threads and other instructions
rule machines:
    input: RESULTS
    output: expand(OUT / "figures" / "machines.{ext}", ext=["png", "svg", "csv", "json"])
    params: code=stage("05c_machines", "evaluate", "figures", "verify"), command=papermill("05c_machines", "machines", system=PRESET.systems[0])
    threads: workflow.cores
    shell: "{params.command}"

# `make tune`: a job per row of the table; what has been tried already is in its log
TUNED = {row: log_path(PRESET.systems[0], row, PRESET.name) for row in WALKS}
for row, log in TUNED.items():
    rule:
        name: f"tune_{'_'.join(row)}"
        input: ([f"{TUNED[ENCODER_FROM[row]]}.done"] if row in ENCODER_FROM else []) + simulated(PRESET.systems[0])
        output: touch(f"{log}.done")
        params: command=papermill("08a_tuning", f"tuning-{'-'.join(row)}", system=PRESET.systems[0], rows="-".join(row), draw=False)
        shell: "{params.command}"

rule tuning:
    input: [f"{log}.done" for log in TUNED.values()]
    output: expand(OUT / "figures" / "tuning.{ext}", ext=["png", "svg", "csv", "json"])
    params: code=stage("08a_tuning", "tuning"), command=papermill("08a_tuning", "tuning", system=PRESET.systems[0])
    shell: "{params.command}"

# `make ablations`: a job per variant and seed
VARIED = [(name, seed, OUT / "ablations" / f"{name}-seed{seed}.done") for name in VARIANTS for seed in PRESET.seeds]
for name, seed, done in VARIED:
    rule:
        name: f"ablate_{name}_seed{seed}"
        input: simulated(PRESET.systems[0])
        output: touch(done)
        params: code=stage("08b_ablations", "cost", "evaluate", "figures", "verify"), command=papermill("08b_ablations", f"ablation-{name}-seed{seed}", system=PRESET.systems[0], variants=name, seed=seed, draw=False)
        threads: JOB_THREADS
        shell: "{params.command}"

rule ablations:
    input: RESULTS + [done for *_, done in VARIED]
    output: expand(OUT / "figures" / "ablations.{ext}", ext=["png", "svg", "csv", "json"])
    params: code=stage("08b_ablations", "cost", "evaluate", "figures", "verify"), command=papermill("08b_ablations", "ablations", system=PRESET.systems[0])
    shell: "{params.command}"

rule simulated:
    input: [simulated(system) for system in PRESET.systems]

rule all:
    default_target: True
    input: rules.table1.output, (rules.resolution.output + rules.machines.output) if PRESET.refined else []

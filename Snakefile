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
from physrep.evaluate import BASELINES, ROWS, systems_of
from physrep.presets import get_preset, project_root
from physrep.provenance import code_digest, notebook_digest
from physrep.runs import baseline_folder, clip_shape, default_data_dir, modules_of, resolve, run_folder
from physrep.systems import get_system
from physrep.tuning import ENCODER_FROM, WALKS, log_path

ROOT = project_root()
PRESET = get_preset(config.get("preset") or "laptop")
DATA = Path(config.get("data") or default_data_dir(PRESET.name)).resolve()
OUT = ROOT / "runs" / PRESET.name
SYSTEMS = systems_of(PRESET, DATA)  # that are simulated, or whose data are there
PROBING = str(PRESET.probing())


def stage(name, *modules):
    "What a job of this notebook depends on, besides its inputs."
    return notebook_digest(ROOT / "nbs" / f"{name}.ipynb") + code_digest(*modules)


def papermill(name, out, folder=OUT, **parameters):
    """The command of a job. papermill reads a notebook from standard input if that is a pipe, so it never is one. Its output goes to a log beside the
    notebook that it makes, progress bars to the terminal too, one line at a time; of a job that fails the end of the log is shown."""
    target, python, source = (shlex.quote(str(p)) for p in (folder / "notebooks" / out, sys.executable, ROOT / "nbs" / f"{name}.ipynb"))
    values = " ".join(f"-p {k} {shlex.quote(str(v))}" for k, v in ({"preset": PRESET.name} | ({"data_dir": DATA} if config.get("data") else {}) | parameters).items() if v is not None)
    bars = f"""while IFS= read -r line; do case "$line" in *%\\|*) echo "  {out}: ${{line##*$'\\r'}}";; esac; done"""
    return (
        f"mkdir -p {shlex.quote(str(folder / 'notebooks'))} && {{ {python} -m papermill {source} {target}.ipynb --log-output --no-progress-bar {values} "
        f"< /dev/null 2>&1 | tee {target}.log | {bars} ; }} || {{ tail -n 40 {target}.log; exit 1; }}"
    )


def simulated(system):
    "The file that is written last when a system is simulated; nothing for The Well's own data."
    return [DATA / system / "stats.yaml"] if system in PRESET.sims else []


def finished(name, files):
    """The stamp of a job that keeps or replaces `files` itself. Snakemake deletes declared outputs before a job; an encoder that may have cost days is better
    put aside by the training that takes its place. No stamp where a file is missing."""
    if not all(f.is_file() for f in files):
        (OUT / "finished" / name).unlink(missing_ok=True)
    return OUT / "finished" / name


# one job at a time on a GPU, which leaves cores for jobs that need none; on the CPU as many as there are cores, one thread each
JOB_THREADS = workflow.cores // 2 + 1 if torch.cuda.is_available() else 1
# systems are simulated side by side: no core waits while one of them starts or ends
SIM_WORKERS = max(1, workflow.cores // max(1, len(PRESET.sims)))
# several seeds are text; one alone would be read as a number
SEEDS = {"seeds": " ".join(map(str, PRESET.seeds))} if len(PRESET.seeds) > 1 else {"seed": PRESET.seeds[0]}
ACROSS = (("jepa", "convnext"), ("random", "convnext"))  # rows that 08c_across_systems compares with, if all systems have the same grid
SAME_GRID = len({clip_shape(resolve(system, "jepa", "convnext", PRESET.name)) for system in SYSTEMS}) == 1
RESULTS, OF_ROW, REFINED = [], {}, []

for system in SYSTEMS:
    if system in PRESET.sims:
        rule:
            name: f"simulate_{system}"
            output: simulated(system)
            params: code=stage("00g_simulate", "generate", f"sim.{system}"), command=papermill("00g_simulate", f"{system}-simulate", system=system, workers=SIM_WORKERS)
            threads: workflow.cores if torch.cuda.is_available() else SIM_WORKERS
            priority: 9
            shell: "{params.command}"

    if system in PRESET.sims and PRESET.refined:
        REFINED.append(Path(f"{DATA}_refined") / system / "stats.yaml")
        rule:
            name: f"refine_{system}"
            output: REFINED[-1]
            params: code=stage("00g_simulate", "generate", f"sim.{system}"), command=papermill("00g_simulate", f"{system}-refine", system=system, refined=True, workers=1)
            shell: "{params.command}"

# The rows of a system: once on its data; The Well's shear flow once more on splits without leaks, with runs of its own.
LEAK_FREE = [system for system in SYSTEMS if system not in PRESET.sims and get_system(system).group]
MORE, LEAKAGE = ROOT / "runs" / "leak_free", []
for system in LEAK_FREE:
    rule:
        name: f"leak_free_{system}"
        output: MORE / "data" / system / "stats.yaml"
        params: code=stage("00h_leak_free", "report"), command=papermill("00h_leak_free", f"{system}-leak-free", MORE, preset=None, system=system, data_dir=DATA, out_dir=MORE / "data")
        shell: "{params.command}"

for system, runs_in, about in [(s, None, {}) for s in SYSTEMS] + [(s, MORE, {"data_dir": MORE / "data", "run_dir": MORE}) for s in LEAK_FREE]:
    inputs, tag, into = (simulated(system), "", RESULTS) if runs_in is None else ([MORE / "data" / system / "stats.yaml"], "leak_free_", LEAKAGE)
    baselines = [baseline_folder(b, system, PRESET.name, runs_in) / "result.json" for b in BASELINES]
    into += baselines
    rule:
        name: f"probe_{tag}{system}_baselines"
        input: inputs
        output: baselines
        params: code=stage("04_probe", "evaluate") + PROBING, command=papermill("04_probe", f"{tag}{system}-baselines", system=system, objective="baselines", **about)
        shell: "{params.command}"

    for objective, encoder in ROWS:  # all seeds of a row in one job: starting one costs as much as a probe
        runs = [resolve(system, objective, encoder, PRESET.name, seed=seed) for seed in PRESET.seeds]
        name, values = f"{tag}{system}-{objective}-{encoder}", dict(system=system, objective=objective, encoder=encoder, **SEEDS, **about)
        trained, results = ([run_folder(run, runs_in) / file for run in runs] for file in ("encoder.safetensors", "result.json"))
        into += results
        OF_ROW.setdefault((objective, encoder), []).extend(results if runs_in is None else [])
        if objective != "random":  # where nothing is trained, probing makes the run
            rule:
                name: f"pretrain_{name}".replace("-", "_")
                input: inputs
                output: touch(finished(name, trained))
                params: code=stage("03_pretrain", *modules_of(runs[0])), command=papermill("03_pretrain", f"{name}-pretrain", **values)
                threads: JOB_THREADS
                priority: 4 if (objective, encoder) in ACROSS else {"supervised": 2, "mae": 1}[objective]  # long jobs first, and what the longest waits for
                shell: "{params.command}"
        rule:
            name: f"probe_{name}".replace("-", "_")
            input: inputs if objective == "random" else OUT / "finished" / name
            output: results
            threads: JOB_THREADS
            priority: 4 if (objective, encoder) in ACROSS else 0
            params: code=stage("04_probe", "evaluate", *modules_of(runs[0])) + PROBING, command=papermill("04_probe", f"{name}-probe", **values)
            shell: "{params.command}"


def figures(*names):
    return expand(OUT / "figures" / "{name}.{ext}", name=names, ext=["png", "svg", "csv", "json"])


rule table1:
    input: RESULTS
    output: figures("table1", "table1_differences", "table1_differences_statistics", *[f"table1_{s}" for s in SYSTEMS])
    params: code=stage("05_table1", "evaluate", "figures", "cost", "verify") + PROBING, command=papermill("05_table1", "table1", systems=",".join(SYSTEMS))
    shell: "{params.command}"

# the same flows at twice the resolution, read by the same encoders and probes
rule resolution:
    input: RESULTS + REFINED
    output: figures("resolution")
    params: code=stage("05b_resolution", "evaluate", "figures") + PROBING, command=papermill("05b_resolution", "resolution")
    shell: "{params.command}"

# one encoder for all systems, and encoders that read another
rule across:
    input: [result for row in ACROSS for result in OF_ROW[row]]
    output: figures("across")
    params: code=stage("08c_across_systems", "across", "figures") + PROBING, command=papermill("08c_across_systems", "across", systems=",".join(SYSTEMS))
    threads: JOB_THREADS
    priority: 5
    shell: "{params.command}"

# what the published splits give away
rule leakage:
    input: RESULTS + LEAKAGE
    output: figures("leakage")
    params: code=stage("05d_leakage", "evaluate", "figures") + PROBING, command=papermill("05d_leakage", "leakage", system=(LEAK_FREE or [None])[0])
    shell: "{params.command}"

# a second thing to ask all encoders
rule regimes:
    input: RESULTS
    output: figures("regimes")
    params: code=stage("08d_regimes", "regimes", "evaluate", "figures") + PROBING, command=papermill("08d_regimes", "regimes", systems=",".join(SYSTEMS))
    threads: JOB_THREADS
    priority: 1  # the longest of the last
    shell: "{params.command}"

# `make machines`: one row again, with other threads and other instructions
rule machines:
    input: RESULTS
    output: figures("machines")
    params: code=stage("05c_machines", "evaluate", "figures", "verify") + PROBING, command=papermill("05c_machines", "machines", system=SYSTEMS[0])
    threads: workflow.cores
    shell: "{params.command}"

# `make tune`: a job per row of the table; what has been tried already is in its log
TUNED = {row: log_path(SYSTEMS[0], row, PRESET.name) for row in WALKS}
for row, log in TUNED.items():
    rule:
        name: f"tune_{'_'.join(row)}"
        input: ([f"{TUNED[ENCODER_FROM[row]]}.done"] if row in ENCODER_FROM else []) + simulated(SYSTEMS[0])
        output: touch(f"{log}.done")
        params: command=papermill("08a_tuning", f"tuning-{'-'.join(row)}", system=SYSTEMS[0], rows="-".join(row), draw=False)
        shell: "{params.command}"

rule tuning:
    input: [f"{log}.done" for log in TUNED.values()]
    output: figures("tuning")
    params: code=stage("08a_tuning", "tuning"), command=papermill("08a_tuning", "tuning", system=SYSTEMS[0])
    shell: "{params.command}"

# `make ablations`: a job per variant and seed
VARIED = [(name, seed, OUT / "ablations" / f"{name}-seed{seed}.done") for name in VARIANTS for seed in PRESET.seeds]
for name, seed, done in VARIED:
    rule:
        name: f"ablate_{name}_seed{seed}"
        input: simulated(SYSTEMS[0])
        output: touch(done)
        params: code=stage("08b_ablations", "cost", "evaluate", "figures", "verify") + PROBING, command=papermill("08b_ablations", f"ablation-{name}-seed{seed}", system=SYSTEMS[0], variants=name, seed=seed, draw=False)
        threads: JOB_THREADS
        shell: "{params.command}"

rule ablations:
    input: RESULTS + [done for *_, done in VARIED]
    output: figures("ablations")
    params: code=stage("08b_ablations", "cost", "evaluate", "figures", "verify"), command=papermill("08b_ablations", "ablations", system=SYSTEMS[0])
    shell: "{params.command}"

rule simulated:
    input: [simulated(system) for system in SYSTEMS]

rule all:
    default_target: True
    input: rules.table1.output, rules.regimes.output, rules.across.output if len(SYSTEMS) > 1 and SAME_GRID else [], rules.resolution.output if REFINED else [], rules.leakage.output if LEAK_FREE else []

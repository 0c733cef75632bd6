# The graph simulate -> pretrain -> probe -> figures. Every job is a papermill call; the logic is in the notebooks and the library.
# Results are written below runs/ (git-ignored); `make figures` copies figures from there.
#
# A job runs again if its output is missing, or if its parameters, an input, or the digest of the code that it uses have
# changed. Digests are of syntax trees: words, pictures of other jobs and commits change nothing. The notebook counts where it
# draws a figure that is kept; where data, encoders or probes are made only the library counts, and what it draws is a look.
#
# config: preset (a name or a .yaml file), data (a folder or an address), systems (comma-separated), rows (a rows.yaml with rows of
# your own), only (rows of the table, comma-separated, e.g. mae-vit,random-vit; baselines and rows of your own are always there),
# seeds (further ones, "1 2"; those of the preset are always there), cells (of `make matters`), few (of `make few`), encoders (yes:
# encoders are needed, so rows of which only results were unpacked are trained here).
# On a cluster also cores (of a job that can use several) and gpus (of a job that trains); see tools/slurm/config.yaml.
import contextlib
import hashlib
import json
import shlex
import sys
from functools import cache
from pathlib import Path

import torch
import yaml

from physrep.core.names import seeds_in
from physrep.core.files import default_data_dir, project_root
from physrep.core.provenance import code_digest, notebook_digest
from physrep.data.generate import SOLVERS
from physrep.data.remote import is_address
from physrep.data.sets import find_files
from physrep.experiments.long_probe import encoder_rows, long_probe_root, with_long_probe
from physrep.experiments.paper_order import PAPER_ROWS
from physrep.experiments.matters import BUDGET, CELLS, COMPARED, FOUND, PAIRS, cell_run, cells_of, matters_root
from physrep.experiments.matters_errors import crossed
from physrep.experiments.probe_length import FILE as LENGTH_FILE
from physrep.experiments.own_question_figures import jepa_rows, faster
from physrep.experiments import longer, rates
from physrep.experiments.recipes import at_length, at_rate, changed_runs
from physrep.experiments.rollout import emulator_rows
from physrep.experiments.table1 import searched_row, table_rows
from physrep.experiments.trained_on_few import DRAWS
from physrep.experiments.tuning import OWN, TUNING_SEED, tuning_root
from physrep.experiments.variants import VARIANTS, changed_run
from physrep.physics.systems import get_system
from physrep.probing.baselines import baselines_for
from physrep.results.archive import FINE_TUNED, scored_elsewhere, with_seeds_there
from physrep.results.data_efficiency import TRAINED_ON_FEW
from physrep.results.rows import CONTROLS, Row, changes_of, chosen_rows, read_rows, references_of, row_name, run_of, systems_of
from physrep.training.presets import get_preset
from physrep.training.run import baseline_folder, resolve

code_digest = cache(code_digest)  # many jobs use the same code, which stays what it is while this is read
ROOT = project_root()
ASKED = str(config.get("preset") or "laptop")
PRESET = get_preset(ASKED)
DATA = config.get("data") or default_data_dir(PRESET.name)
DATA = DATA if is_address(DATA) else Path(DATA).resolve()
OUT = ROOT / "runs" / PRESET.name
ASKED_SEEDS = seeds_in(str("" if config.get("seeds") is None else config["seeds"]))
ONLY = str(config.get("only") or "")
BY_HAND = chosen_rows(ONLY)  # the same with the recipes of the preset: what is compared with variants of these
WITH_ROWS = ({"rows": Path(config["rows"]).resolve()} if config.get("rows") else {}) | ({"only": ONLY} if ONLY else {})
OWN_ROWS = {row.pair for row in read_rows(config["rows"])} if config.get("rows") else set()
NEEDS_ENCODERS = config.get("encoders") in (True, "yes")
NAMED = [name for name in str(config.get("systems") or "").split(",") if name]
SYSTEMS = {get_system(name).name: name for name in NAMED or systems_of(PRESET, DATA)}  # name in tables -> as it was asked for
FIRST = next(iter(SYSTEMS))
TABLE_ROWS = {system: table_rows(PRESET, asked, ONLY, config.get("rows") or "") for system, asked in SYSTEMS.items()}
# what a system of your own has no entry for is left out: twins, a regime's measure, more resolution, transfer
BUILT_IN = all(system in SOLVERS for system in SYSTEMS)
READS = any(system not in PRESET.sims for system in SYSTEMS)  # files that nobody simulates
# what all results rest on besides code and runs: how encoders are probed, and on which flows
PROBING = str(PRESET.probing()) + hashlib.sha256(f"{PRESET.sims} {PRESET.refined}".encode()).hexdigest()[:16]


def stage(name, *modules, entries=()):
    "What a figure of this notebook depends on, besides its inputs."
    return notebook_digest(ROOT / "nbs" / f"{name}.ipynb") + code_digest(*modules, entries=entries)


SIMULATING = "$SIMULATING"  # a number that the shell of a job knows


def given_to_papermill(name, value):
    "A parameter as an option of papermill: text stays text, e.g. a tag `2`, and 5e-05 a number, which YAML writes 5.0e-05."
    if isinstance(value, dict):
        return f"-y {shlex.quote(yaml.safe_dump({name: value}, default_flow_style=True, width=10**6).strip())}"
    if value is SIMULATING:
        return f'-p {name} "{value}"'
    return f"{'-r' if isinstance(value, str | Path) else '-p'} {name} {shlex.quote(str(value))}"


def papermill(name, out, folder=OUT, **parameters):
    """The command of a job. papermill reads a notebook from standard input if that is a pipe, so it never is one. Its output
    goes to a log beside the notebook that it makes, progress bars to the terminal too, one line at a time; of a job that fails
    the end of the log is shown."""
    preset = Path(ASKED).resolve() if ASKED.endswith((".yaml", ".yml")) else ASKED
    given = {"preset": preset} | ({"data_dir": DATA} if config.get("data") or READS else {}) | parameters
    values = " ".join(given_to_papermill(k, v) for k, v in given.items() if v is not None)
    target, python, source = (
        shlex.quote(str(p)) for p in (folder / "notebooks" / out, sys.executable, ROOT / "nbs" / f"{name}.ipynb")
    )
    bars = f"""while IFS= read -r line; do case "$line" in *%\\|*) echo "  {out}: ${{line##*$'\\r'}}";; esac; done"""
    return (
        f"mkdir -p {shlex.quote(str(folder / 'notebooks'))} && {{ {python} -m papermill {source} {target}.ipynb --log-output "
        f"--no-progress-bar {values} < /dev/null 2>&1 | tee {target}.log | {bars} ; }} || {{ tail -n 40 {target}.log; exit 1; }}"
    )


def simulated(system):
    "The file that is written last when a system is simulated; for data that are read as they are, those files."
    if system in PRESET.sims:
        if is_address(DATA):
            raise ValueError(f"preset {PRESET.name} simulates {system}, which needs a folder on this machine, not {DATA}; PRESET=paper or native reads")
        return [DATA / system / "stats.yaml"]
    if is_address(DATA):  # nothing that the workflow could look at
        return []
    found = []
    for split in ("train", "valid", "test"):
        with contextlib.suppress(FileNotFoundError):
            found += find_files(DATA, get_system(SYSTEMS[system]), split)
    return found


def finished(stamp, there):
    """The stamp of a job that keeps or replaces its files itself. Snakemake deletes declared outputs before a job; an encoder
    that may have cost days is better put aside by the training that takes its place. No stamp where files are not `there`; jobs of
    a cluster, which parse this file for themselves, leave stamps alone."""
    if not there and workflow.is_main_process:
        stamp.unlink(missing_ok=True)
    return stamp


def seen_by_baselines(run):
    "The clip, how labels are scaled, and a system of your own, as a digest: a baseline's folder does not name them."
    about = run.as_dict()
    text = json.dumps([about.get(name) for name in ("clip", "paper_labels", "definition")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_values(row, system):
    "What of a row the stages are told, as papermill takes it."
    tag = {"tag": row.tag} if row.tag else {}
    return {"objective": row.objective, "encoder": row.encoder} | tag | changes_of(row, system)


# On a cluster every job parses this file for itself: numbers of cores and GPUs come from config there, not from the machine.
CORES, GPUS = int(config.get("cores") or workflow.cores), int(config.get("gpus") or 0)
# one job at a time on a GPU, which leaves cores for jobs that need none; on the CPU as many as there are cores, one thread each
JOB_THREADS = CORES // 2 + 1 if GPUS or torch.cuda.is_available() else 1
# systems are simulated side by side: no core waits while one of them starts or ends; a GPU has one process at a time
SIM_WORKERS = 1 if torch.cuda.is_available() else max(1, CORES // max(1, len(PRESET.sims)))
FIRST_SYSTEMS = {system: 100 * (len(SYSTEMS) - place) for place, system in enumerate(SYSTEMS)}  # systems finish one after the other
ACROSS = (("jepa", "convnext"), ("random", "convnext"))  # rows that 08c_across_systems compares with, if all grids are the same
ENCODED = {system: [row for row in some if row.kind in ("trained", "random", "frozen")] for system, some in TABLE_ROWS.items()}
SEARCHED = [row for row in BY_HAND if row_name(row) in PRESET.tuned]
BOTH = [*BY_HAND, *(searched_row(row, PRESET) for row in SEARCHED)]
BESIDE = {s: [row for row in BOTH if row.kind != "baseline" and row not in ENCODED[s]] for s in SYSTEMS}  # the recipe not taken
PREDICTED = [row for row in TABLE_ROWS[FIRST] if row.kind == "predictions"]
EMULATED = emulator_rows()  # what `make rollout` needs besides: rows of the table or not, they are trained and probed alike
SAME_GRID = len({run_of(ENCODED[s][0], asked, PRESET, 0, DATA).clip_shape for s, asked in SYSTEMS.items()}) == 1
# a cosine cannot end early
KEEPS_CURVES = all(recipe.schedule == "constant" for recipe in PRESET.train.values()) and any(r.kind == "trained" for r in TABLE_ROWS[FIRST])
SHIFTED_TOO = all(system in PRESET.sims and "shifted" in PRESET.sims[system].splits for system in SYSTEMS)
RESULTS, OF_ROW, REFINED = [], {}, []
BESIDE_RESULTS = []  # of the rows with the recipe that a system does not take, which `make tuned` reads
HAND_RESULTS = []  # of the rows with the recipes of the preset, and of baselines
STAMP_OF = {}  # result -> what says that its encoder is there, where encoders are needed
MORE_SEEDS = []  # results of further seeds: Table 1, learning curves and few labels show them
ALL_ENCODERS = True  # False where `make unpack` took results of the preset's seeds from the repository

for system, asked in SYSTEMS.items():
    if system in PRESET.sims:
        solver = code_digest("data.generate", SOLVERS[system], entries=(system,))
        rule:
            name: f"simulate_{system}"
            output: simulated(system)
            params: code=solver, flows=repr(PRESET.sims[system]), command=papermill("00_simulate", f"{system}-simulate", system=system, workers=SIMULATING)
            threads: CORES if torch.cuda.is_available() else SIM_WORKERS
            resources: simulating=SIM_WORKERS  # not a parameter: another number of cores changes no flow
            priority: FIRST_SYSTEMS[system] + 9
            shell: "export SIMULATING={resources.simulating}; {params.command}"

    if system in PRESET.sims and PRESET.refined:
        REFINED.append(Path(f"{DATA}_refined") / system / "stats.yaml")
        rule:
            name: f"refine_{system}"
            output: REFINED[-1]
            params: code=solver, flows=f"{PRESET.sims[system]} {PRESET.refined}", command=papermill("00_simulate", f"{system}-refine", system=system, refined=True, workers=1)
            shell: "{params.command}"

# The rows of a system: once on its data; The Well's shear flow once more on splits without leaks, with runs of its own.
LEAK_FREE = [s for s in SYSTEMS if s in SOLVERS and s not in PRESET.sims and get_system(SYSTEMS[s]).group and not is_address(DATA)]
MORE, LEAKAGE = ROOT / "runs" / "leak_free", []
DEALT = MORE / "data" / PRESET.name  # the lock of a workflow is that of its preset
for system in LEAK_FREE:
    rule:
        name: f"leak_free_{system}"
        input: simulated(system)
        output: DEALT / system / "stats.yaml"
        params: code=code_digest("data.leakage"), command=papermill("00h_leak_free", f"{system}-leak-free", MORE, preset=None, system=SYSTEMS[system], data_dir=DATA, out_dir=DEALT)
        shell: "{params.command}"

PLACES = [(s, None, {}) for s in SYSTEMS] + [(s, MORE, {"data_dir": DEALT, "run_dir": MORE}) for s in LEAK_FREE]
for system, runs_in, about in PLACES:
    asked = SYSTEMS[system]
    inputs, tag, into = (simulated(system), "", RESULTS) if runs_in is None else ([DEALT / system / "stats.yaml"], "leak_free_", LEAKAGE)
    baselines = [baseline_folder(b, system, PRESET, runs_in) / "result.json" for b in baselines_for(get_system(asked))]
    into += baselines
    if runs_in is None:
        HAND_RESULTS += baselines
    if not all(scored_elsewhere(result.parent, PRESET) for result in baselines):
        rule:
            name: f"probe_{tag}{system}_baselines".replace("-", "_")
            input: inputs
            output: baselines
            params: code=code_digest("probing.baselines", entries=(system,)) + PROBING + seen_by_baselines(run_of(ENCODED[system][0], asked, PRESET, 0, DATA)), command=papermill("04_probe", f"{tag}{system}-baselines", system=asked, objective="baselines", **about)
            shell: "{params.command}"

    for row in PREDICTED if runs_in is None else []:  # someone else's predictions, in a file
        if system in row.predictions:
            RESULTS.append(baseline_folder(row.objective, system, PRESET) / "result.json")
            rule:
                name: f"compare_{system}_{row.objective}".replace("-", "_")
                input: csv=row.predictions[system], reference=baselines[0]
                output: RESULTS[-1]
                params: command=f"{shlex.quote(sys.executable)} -m physrep.experiments.command compare"
                shell: '{params.command} {input.csv:q} --reference "$(dirname {input.reference:q})" --into "$(dirname {output:q})"'

    # all seeds of the preset in one job, because starting one costs as much as a probe; each further seed is a job
    seeds_there = with_seeds_there(PRESET, asked, ENCODED[system], ROOT / "runs", DATA).seeds
    further = [] if runs_in else [k for k in dict.fromkeys((*seeds_there, *ASKED_SEEDS)) if k not in PRESET.seeds]
    of_place = ENCODED[system] if runs_in is None else [row for row in BY_HAND if row.kind != "baseline"]  # 05d_leakage reads these
    jobs = [(row, seeds) for row in of_place for seeds in (PRESET.seeds, *((seed,) for seed in further))]
    if runs_in is None:
        asked_too = [(k,) for k in ASKED_SEEDS if k not in PRESET.seeds]
        jobs += [(row, seeds) for row in BESIDE[system] for seeds in (PRESET.seeds, *asked_too)]
        jobs += [(row, PRESET.seeds) for row in EMULATED if row not in [*ENCODED[system], *BESIDE[system]]]
    for row, seeds in jobs:
        every = [run_of(row, asked, PRESET, seed, DATA) for seed in seeds]
        wanted = [run.folder(runs_in) / "result.json" for run in every]
        if row in of_place:
            (into if seeds == PRESET.seeds else MORE_SEEDS).extend(wanted)
        if runs_in is None and seeds == PRESET.seeds:
            OF_ROW.setdefault(row.pair, []).extend(wanted)
            HAND_RESULTS.extend(wanted if row in BY_HAND else [])
        if runs_in is None and row in BESIDE[system]:
            BESIDE_RESULTS.extend(wanted)
        asks_encoders = NEEDS_ENCODERS and seeds == PRESET.seeds  # experiments ask those of the preset's seeds
        runs = [run for run in every if asks_encoders or not scored_elsewhere(run.folder(runs_in), PRESET)]
        if row in of_place and seeds == PRESET.seeds and len(runs) < len(every):
            ALL_ENCODERS = False
        if not runs:
            continue
        name = f"{tag}{system}-{row_name(row)}" + ("" if seeds == PRESET.seeds else f"-seed{seeds[0]}")
        values = dict(system=asked, **row_values(row, asked), seeds=" ".join(str(run.seed) for run in runs), **about)
        trained, results = ([run.folder(runs_in) / file for run in runs] for file in ("encoder.safetensors", "result.json"))
        if row.kind == "trained":  # where nothing is trained, probing makes the run
            rule:
                name: f"pretrain_{name}".replace("-", "_")
                input: inputs
                output: touch(finished(OUT / "finished" / name, all(f.is_file() for f in trained)))
                params: code=code_digest(*runs[0].modules, entries=runs[0].entries), command=papermill("03_pretrain", f"{name}-pretrain", **values)
                threads: JOB_THREADS
                resources: gpu=GPUS
                priority: FIRST_SYSTEMS[system] + row.cost  # long jobs first, and what the longest waits for
                shell: "{params.command}"
        stamp = OUT / "finished" / name
        alone = asks_encoders and row.kind == "random" and all(f.is_file() for f in results)  # what is there is not made again
        if alone or asks_encoders and row.kind == "trained":
            STAMP_OF |= dict.fromkeys(results, stamp)
        rule:
            name: f"probe_{name}".replace("-", "_")
            input: inputs + ([stamp] if row.kind == "trained" else [])
            output: touch(finished(stamp, all(f.is_file() for f in trained))) if alone else results
            threads: JOB_THREADS
            resources: gpu=GPUS
            priority: FIRST_SYSTEMS[system] + (row.cost if row.pair in ACROSS else 0)
            params: code=code_digest("probing.evaluate", *runs[0].modules, entries=runs[0].entries) + PROBING, finetuned=row.finetuned, command=papermill("04_probe", f"{name}-probe", **values, **{k: v for k, v in WITH_ROWS.items() if k == "rows" and row.pair in OWN_ROWS}, curve=True if KEEPS_CURVES and row in ENCODED.get(system, []) and runs_in is None and row.kind == "trained" else None)
            shell: "{params.command}"


def figures(*names):
    return expand(OUT / "figures" / "{name}.{ext}", name=names, ext=["png", "svg", "csv", "json"])


SHOWN = {"systems": ",".join(SYSTEMS.values())}
DIFFERENCES = {"random": "table1_differences", **{c: f"table1_differences_{c}" for c in CONTROLS}}

rule table1:
    input: RESULTS + MORE_SEEDS
    output: figures("overview", "table1", "curves", *[DIFFERENCES[r] for r in references_of(TABLE_ROWS[FIRST])], *[f"table1_{s}" for s in SYSTEMS])
    params: rows=repr(TABLE_ROWS), code=stage("05_table1", "results.seeds", "results.panels", "results.curves", "results.forest", "results.comparison", "results.table", "experiments.costs", "experiments.table1", "experiments.overview") + PROBING, command=papermill("05_table1", "table1", **SHOWN, **WITH_ROWS)
    shell: "{params.command}"

# what came out of a system is printed while the next one is trained
PRINTED = [OUT / "finished" / f"{system}-printed" for system in SYSTEMS]
for system, done in zip(SYSTEMS, PRINTED):
    rule:
        name: f"print_{system}".replace("-", "_")
        input: [result for result in RESULTS if result.is_relative_to(OUT / system)]
        output: touch(done)
        params: command=f"{shlex.quote(sys.executable)} -m physrep.experiments.table1"
        priority: FIRST_SYSTEMS[system] + 99
        shell: "{params.command} {input:q}"

# a method is a curve: the encoders that a run kept on its way are probed by the job that probes its last one; a job a system
# does what is still missing, then all are drawn
SCORED = [OUT / "finished" / f"{system}-learning-curves" for system in SYSTEMS]
for system, done in zip(SYSTEMS, SCORED):
    rule:
        name: f"learning_curves_{system}".replace("-", "_")
        input: [result for result in RESULTS + MORE_SEEDS if result.is_relative_to(OUT / system)]
        output: touch(done)
        params: rows=repr(TABLE_ROWS[system]), code=code_digest("experiments.learning_curves") + PROBING, command=papermill("05a_learning_curves", f"{system}-learning-curves", systems=SYSTEMS[system], draw=False, **WITH_ROWS)
        threads: JOB_THREADS
        resources: gpu=GPUS
        shell: "{params.command}"

rule learning_curves:
    input: RESULTS + MORE_SEEDS + SCORED
    output: figures("learning_curves")
    params: rows=repr(TABLE_ROWS), code=stage("05a_learning_curves", "experiments.learning_curve_figures", "experiments.table1") + PROBING, command=papermill("05a_learning_curves", "learning_curves", **SHOWN, **WITH_ROWS)
    shell: "{params.command}"

# `make few`: supervised encoders that are trained on few labelled flows, a job for each system
FEW_LABELS = [OUT / "finished" / f"{system}-few-labels" for system in SYSTEMS]
for system, done in zip(SYSTEMS, FEW_LABELS):
    asked_rows = [row for row in TABLE_ROWS[system] if row.objective == "supervised"]
    made = [run_of(row, SYSTEMS[system], PRESET, seed, DATA).folder() / TRAINED_ON_FEW for row in asked_rows for seed in range(DRAWS)]
    rule:
        name: f"few_labels_{system}".replace("-", "_")
        input: simulated(system)
        output: touch(finished(done, all(file.is_file() for file in made)))
        params: rows=repr(asked_rows), code=code_digest("experiments.trained_on_few") + PROBING, command=papermill("06_data_efficiency", f"{system}-few-labels", systems=SYSTEMS[system], draw=False, **WITH_ROWS)
        threads: JOB_THREADS
        resources: gpu=GPUS
        shell: "{params.command}"

# few labels, and flows that start in another way
rule data_efficiency:
    input: RESULTS + MORE_SEEDS + [done for done in FEW_LABELS if config.get("few") or done.is_file()]
    output: figures("data_efficiency", *(["table1_shifted", "shift"] if SHIFTED_TOO else []), *(["data_efficiency_paper"] if "shear_flow" in SYSTEMS else []))
    params: rows=repr(TABLE_ROWS), code=stage("06_data_efficiency", "experiments.table1", "experiments.trained_on_few", "results.seeds", "results.data_efficiency", "results.panels", "results.comparison") + PROBING, command=papermill("06_data_efficiency", "data_efficiency", **SHOWN, **WITH_ROWS)
    shell: "{params.command}"

# `make finetune`: encoders that are trained further with labels, a job for each system and row, with its own random weights
FURTHER_TRAINED = []
for system, row in ((system, row) for system in SYSTEMS for row in BY_HAND if row.kind != "baseline" and row.objective != "supervised"):
    own = [one for one in table_rows(PRESET, SYSTEMS[system], row_name(row)) if one.kind != "baseline"]
    seeds = list(dict.fromkeys((*PRESET.seeds, *ASKED_SEEDS)))
    runs = [run_of(one, SYSTEMS[system], PRESET, seed, DATA) for one in own for seed in seeds]
    name = f"{system}-{row_name(row)}-finetune"
    FURTHER_TRAINED.append(OUT / "finished" / name)
    rule:
        name: name.replace("-", "_").replace(".", "_")
        input: [run.folder() / "result.json" for run in runs]
        output: touch(finished(FURTHER_TRAINED[-1], all((run.folder() / FINE_TUNED).is_file() for run in runs)))
        params: code=code_digest("experiments.fine_tuned", *runs[0].modules, entries=runs[0].entries) + PROBING, command=papermill("05e_fine_tuned", name, systems=SYSTEMS[system], only=row_name(row), seeds=" ".join(map(str, seeds)), draw=False)
        threads: JOB_THREADS
        resources: gpu=GPUS
        shell: "{params.command}"

rule finetune:
    input: RESULTS + MORE_SEEDS + FURTHER_TRAINED
    output: figures("fine_tuned")
    params: rows=repr(TABLE_ROWS), code=stage("05e_fine_tuned", "experiments.fine_tuned") + PROBING, command=papermill("05e_fine_tuned", "fine_tuned", **SHOWN, only=ONLY or None)
    threads: JOB_THREADS
    resources: gpu=GPUS
    shell: "{params.command}"

def with_encoders(results):
    "Results and, where they were unpacked, what trains their encoders."
    results = list(results)
    return [*results, *dict.fromkeys(STAMP_OF[result] for result in results if result in STAMP_OF)]


# what asks encoders of all rows something new; where it cannot, it says why
CAN = {
    "ablations": BUILT_IN,
    "question": BUILT_IN,
    "grid": BUILT_IN,
    "box": BUILT_IN,
    "resolution": len(REFINED) == len(SYSTEMS) and not ONLY,
    "across": BUILT_IN and len(SYSTEMS) > 1 and SAME_GRID and not ONLY,
    "regimes": BUILT_IN and not ONLY,
}
CANNOT = "echo 'this needs built-in systems; and all rows (across, resolution, regimes), several systems on one grid (across), or simulated ones (resolution)'"

# the same flows at twice the resolution, read by the same encoders and probes
rule resolution:
    input: with_encoders(RESULTS) + REFINED if CAN["resolution"] else []
    output: figures("resolution") if CAN["resolution"] else []
    params: rows=repr(TABLE_ROWS), code=stage("05b_resolution", "experiments.resolution", "experiments.refinement", "experiments.table1", "results.forest") + PROBING, command=papermill("05b_resolution", "resolution", **SHOWN) if CAN["resolution"] else CANNOT
    shell: "{params.command}"

# one encoder for all systems, and encoders that read another
rule across:
    input: with_encoders(result for row in ACROSS for result in OF_ROW.get(row, [])) if CAN["across"] else []
    output: figures("across") if CAN["across"] else []
    params: code=stage("08c_across_systems", "experiments.transfer") + PROBING, command=papermill("08c_across_systems", "across", **SHOWN) if CAN["across"] else CANNOT
    threads: JOB_THREADS
    resources: gpu=GPUS
    priority: 5
    shell: "{params.command}"

# what the published splits give away
rule leakage:
    input: HAND_RESULTS + LEAKAGE
    output: figures("leakage")
    params: code=stage("05d_leakage", "experiments.leak_free") + PROBING, command=papermill("05d_leakage", "leakage", system=SYSTEMS[(LEAK_FREE or [FIRST])[0]], only=ONLY or None)
    shell: "{params.command}"

# a second thing to ask all encoders
rule regimes:
    input: with_encoders(RESULTS) if CAN["regimes"] else []
    output: figures("regimes") if CAN["regimes"] else []
    params: rows=repr(TABLE_ROWS), code=stage("08d_regimes", "experiments.regimes") + PROBING, command=papermill("08d_regimes", "regimes", **SHOWN) if CAN["regimes"] else CANNOT
    threads: JOB_THREADS
    resources: gpu=GPUS
    priority: 1  # the longest of the last
    shell: "{params.command}"

# `make rollout`: predictions fed back, of the rows whose objective predicts frames
rule rollout:
    input: with_encoders(result for row in EMULATED for result in OF_ROW[row.pair])
    output: figures("rollout", "rollout_spectra", "rollout_drift", "rollout_frames", "rollout_probes")
    params: code=stage("07_rollout", "experiments.rollout_figures") + PROBING, command=papermill("07_rollout", "rollout", **SHOWN)
    threads: JOB_THREADS
    resources: gpu=GPUS
    shell: "{params.command}"

# `make machines`: one row again, with other threads and other instructions; further seeds of which there is an encoder
MAE_RESULTS = [r for r in dict.fromkeys((*HAND_RESULTS, *BESIDE_RESULTS, *MORE_SEEDS)) if r.is_relative_to(OUT / FIRST) and r.parts[-3].startswith("mae-vit-")]
MAE_SEEDS = [k for k in ASKED_SEEDS if not any(scored_elsewhere(r.parent, PRESET) for r in MAE_RESULTS if r.parent.name == f"seed{k}")]
rule machines:
    input: with_encoders(MAE_RESULTS)
    output: figures("machines")
    params: code=stage("05c_machines", "experiments.machines") + PROBING, command=papermill("05c_machines", "machines", system=SYSTEMS[FIRST], seeds=" ".join(map(str, MAE_SEEDS)) or None)
    threads: CORES
    shell: "{params.command}"

# `make grid`: probes that are fitted and scored on a grid of labels, as sets of The Well have
rule grid:
    input: with_encoders(RESULTS) if CAN["grid"] else []
    output: figures("grid") if CAN["grid"] else []
    params: rows=repr(TABLE_ROWS), code=stage("08e_grid", "experiments.grid", "experiments.grid_ranks") + PROBING, command=papermill("08e_grid", "grid", **SHOWN, only=ONLY or None) if CAN["grid"] else CANNOT
    threads: CORES  # it simulates a set
    shell: "{params.command}"

# `make box`: flows in a box twice as long
rule box:
    input: with_encoders(RESULTS) if CAN["box"] else []
    output: figures("box") if CAN["box"] else []
    params: rows=repr(TABLE_ROWS), code=stage("08f_box", "experiments.box") + PROBING, command=papermill("08f_box", "box", **SHOWN, only=ONLY or None) if CAN["box"] else CANNOT
    threads: CORES  # it simulates a set
    shell: "{params.command}"

# `make question`: what else answers the question of a JEPA; a job per row and system trains the row with a faster predictor
QUESTIONED = {}
for system, row in ((system, row) for system in SYSTEMS if CAN["question"] for row in jepa_rows() if row in BY_HAND):
    run, name = run_of(faster(row), SYSTEMS[system], PRESET, 0, DATA), f"{system}-{row_name(row)}"
    QUESTIONED[name] = OUT / "question" / f"{name}.done"
    probed = (run.with_seed(seed).folder() / "result.json" for seed in PRESET.seeds)
    rule:
        name: f"question_{name}".replace("-", "_")
        input: [result for result in OF_ROW[row.pair] if result.is_relative_to(OUT / system)]
        output: touch(finished(QUESTIONED[name], all(file.is_file() for file in probed)))
        params: code=code_digest("experiments.own_question", "probing.evaluate", *run.modules, entries=run.entries) + run.hash + PROBING, command=papermill("08g_own_question", f"question-{name}", systems=SYSTEMS[system], rows=row_name(row), draw=False)
        threads: JOB_THREADS
        resources: gpu=GPUS
        shell: "{params.command}"

rule question:
    input: list(QUESTIONED.values())
    output: figures("own_question", "own_question_probes") if CAN["question"] else []
    params: code=stage("08g_own_question", "experiments.own_question_figures", "results.forest") + PROBING, command=papermill("08g_own_question", "question", **SHOWN, rows=",".join(row_name(row) for row in jepa_rows() if row in BY_HAND) or "none") if CAN["question"] else CANNOT
    threads: JOB_THREADS
    resources: gpu=GPUS
    shell: "{params.command}"

# `make rates`: a row at other learning rates with several seeds, to tell its error from that of one training; a job each
def trained_rows(usual):
    "The trained rows that are asked for, or else those of these names."
    return [row for row in chosen_rows(ONLY or ",".join(usual)) if row.kind == "trained"]


RATED = trained_rows([rates.ASKED])
RATED = RATED[0] if len(RATED) == 1 else None  # of several or none the notebook says what would be right
RATE_SEEDS = list(dict.fromkeys((*rates.SEEDS, *ASKED_SEEDS)))
AT_RATES = []
for factor, runs in (changed_runs(at_rate, RATED, rates.FACTORS, RATE_SEEDS, SYSTEMS[FIRST], PRESET, DATA) if RATED else {}).items():
    for run in runs:
        name = f"{row_name(RATED)}-{factor:g}-seed{run.seed}"
        AT_RATES.append(OUT / "rates" / f"{name}.done")
        rule:
            name: f"rate_{name}".replace("-", "_").replace(".", "_")
            input: simulated(FIRST)
            output: touch(finished(AT_RATES[-1], (run.folder() / "result.json").is_file()))
            params: code=code_digest("experiments.recipes", *run.modules, entries=run.entries) + run.hash + PROBING, command=papermill("08h_learning_rates", f"rates-{name}", system=SYSTEMS[FIRST], row=row_name(RATED), factors=f"{factor:g}", seeds=str(run.seed), draw=False)
            threads: JOB_THREADS
            resources: gpu=GPUS
            shell: "{params.command}"

rule rates:
    input: AT_RATES
    output: figures("rates", "rates_losses")
    params: code=stage("08h_learning_rates", "experiments.rates", "experiments.recipes") + PROBING, command=papermill("08h_learning_rates", "rates", system=SYSTEMS[FIRST], row=row_name(RATED) if RATED else ONLY, factors=" ".join(f"{factor:g}" for factor in rates.FACTORS), seeds=" ".join(map(str, RATE_SEEDS)))
    threads: JOB_THREADS
    resources: gpu=GPUS
    shell: "{params.command}"

# `make longer`: rows with more updates than Table 1 gives them; a job for each system, row and seed, a figure for each system
LONGER_ROWS = trained_rows(longer.ASKED)
LONGER_SEEDS = list(dict.fromkeys((*longer.SEEDS, *ASKED_SEEDS)))
LONGER = []
for system in SYSTEMS:
    stamps = []
    for row, seed in ((row, seed) for row in LONGER_ROWS for seed in LONGER_SEEDS):
        _, run = (run for (run,) in changed_runs(at_length, row, (1, longer.FACTOR), [seed], SYSTEMS[system], PRESET, DATA).values())
        name = f"{system}-{row_name(row)}-seed{seed}"
        stamps.append(OUT / "longer" / f"{name}.done")
        rule:
            name: f"longer_{name}".replace("-", "_").replace(".", "_")
            input: simulated(system)
            output: touch(finished(stamps[-1], (run.folder() / "result.json").is_file()))
            params: code=code_digest("experiments.recipes", *run.modules, entries=run.entries) + run.hash + PROBING, command=papermill("08i_longer_training", f"longer-{name}", system=SYSTEMS[system], rows=row_name(row), factor=longer.FACTOR, seeds=str(seed), draw=False)
            threads: JOB_THREADS
            resources: gpu=GPUS
            shell: "{params.command}"

    LONGER += figures(f"longer_{system}")
    rule:
        name: f"longer_{system}"
        input: stamps
        output: figures(f"longer_{system}")
        params: code=stage("08i_longer_training", "experiments.longer", "experiments.recipes") + PROBING, command=papermill("08i_longer_training", f"longer-{system}", system=SYSTEMS[system], rows=",".join(map(row_name, LONGER_ROWS)) or ONLY, factor=longer.FACTOR, seeds=" ".join(map(str, LONGER_SEEDS)))
        threads: JOB_THREADS
        resources: gpu=GPUS
        shell: "{params.command}"

rule longer:
    input: LONGER

# `make tune`: a job per row of the table; trials that are done are kept
TUNED = {row: OUT / "tuning" / f"{'-'.join(row)}.done" for row in OWN}
for row, done in TUNED.items():
    run = run_of(Row(*row), SYSTEMS[FIRST], PRESET, 0, DATA)
    tried = (tuning_root(ROOT / "runs") / PRESET.name / FIRST).glob(f"{'-'.join(row)}-*/seed{TUNING_SEED}/result.json")
    rule:
        name: f"tune_{'_'.join(row)}"
        input: simulated(FIRST)
        output: touch(finished(done, any(tried)))
        params: code=code_digest("experiments.tuning", *run.modules, entries=run.entries) + run.hash + PROBING, command=papermill("08a_tuning", f"tuning-{'-'.join(row)}", system=SYSTEMS[FIRST], rows="-".join(row), draw=False)
        shell: "{params.command}"

rule tuning:
    input: list(TUNED.values())
    output: figures("tuning")
    params: code=stage("08a_tuning", "experiments.tuning"), command=papermill("08a_tuning", "tuning", system=SYSTEMS[FIRST])
    shell: "{params.command}"

# `make tuned`: the rows of Table 1 that were tuned, with the recipe of the search and the one by hand
NONE_TUNED = f"echo 'none of {ONLY or 'the rows'} was tuned at preset {PRESET.name}: nothing to compare'"
rule tuned:
    input: RESULTS + MORE_SEEDS + BESIDE_RESULTS if SEARCHED else []
    output: figures("tuned") if SEARCHED else []
    params: code=stage("08j_chosen_recipes", "experiments.tuned") + PROBING, command=papermill("08j_chosen_recipes", "tuned", **SHOWN, rows=",".join(map(row_name, SEARCHED))) if SEARCHED else NONE_TUNED
    threads: JOB_THREADS
    resources: gpu=GPUS
    shell: "{params.command}"

# `make ablations`: a job per variant and seed
VARIED = [(name, seed, OUT / "ablations" / f"{name}-seed{seed}.done") for name in VARIANTS if CAN["ablations"] for seed in dict.fromkeys((*PRESET.seeds, *ASKED_SEEDS))]
for name, seed, done in VARIED:
    run, _ = changed_run(name, SYSTEMS[FIRST], PRESET, seed=seed, data_dir=DATA)
    probed = (OUT / FIRST).glob(f"{'-'.join(run.row)}-*/seed{seed}/result.json")
    rule:
        name: f"ablate_{name}_seed{seed}"
        input: simulated(FIRST)
        output: touch(finished(done, any(probed)))
        params: code=code_digest("experiments.ablations", *run.modules, entries=run.entries) + run.hash + PROBING, command=papermill("08b_ablations", f"ablation-{name}-seed{seed}", system=SYSTEMS[FIRST], variants=name, seeds=str(seed), draw=False)
        threads: JOB_THREADS
        resources: gpu=GPUS
        shell: "{params.command}"

rule ablations:
    input: [result for result in RESULTS + MORE_SEEDS if result.is_relative_to(OUT / FIRST)] + [done for *_, done in VARIED] if CAN["ablations"] else []
    output: figures("ablations") if CAN["ablations"] else []
    params: code=stage("08b_ablations", "experiments.ablations"), command=papermill("08b_ablations", "ablations", system=SYSTEMS[FIRST]) if CAN["ablations"] else CANNOT
    shell: "{params.command}"

# `make matters`: a job per cell of the factorial, with its seeds and systems (and rates, where none was found before); the
# figures show what is there
ELSEWHERE = [asked for system, asked in SYSTEMS.items() if system != FIRST]
COMBINED = str(config.get("cells") or "")  # cells, or `all`; default: those whose learning rate was found before, or all
COMBINED = CELLS if COMBINED == "all" else COMBINED.split(",") if COMBINED else cells_of(SYSTEMS[FIRST], PRESET)
FACTORIAL = {name: OUT / "matters" / f"{name}.done" for name in COMBINED}
FOLDERS = {}  # cell -> its runs, those of the same task, target and network with another padding too
MADE_BY = {}  # cell -> what decides about its runs; their updates follow from the operations of the row BUDGET
for name, done in list(FACTORIAL.items()):
    try:
        of_budget = "".join(resolve(asked, *BUDGET, PRESET, data_dir=DATA).hash for asked in SYSTEMS.values())
        run = cell_run(name, SYSTEMS[FIRST], PRESET, steps=1, data_dir=DATA)  # as many updates as make operations equal are found later
        MADE_BY[name] = code_digest("experiments.matters", *run.modules, entries=run.entries) + run.hash + of_budget + PROBING
    except ValueError:
        if config.get("cells") not in (None, "", "all"):  # asked for by name
            raise
        del FACTORIAL[name]  # this preset's clips or tokens are too short for it
        continue
    FOLDERS[name] = f"{'-'.join(run.row)}-*"
    probed = (matters_root(ROOT / "runs") / PRESET.name / FIRST).glob(f"{FOLDERS[name]}/seed{PRESET.seeds[-1]}/result.json")
    rule:
        name: f"cell_{name}".replace("-", "_")
        input: [file for system in SYSTEMS for file in simulated(system)]
        output: touch(finished(done, any(probed)))
        params: code=MADE_BY[name], command=papermill("08_what_matters", f"matters-{name}", system=SYSTEMS[FIRST], systems=",".join(ELSEWHERE), cells=name, seeds=" ".join(map(str, dict.fromkeys((*PRESET.seeds, *ASKED_SEEDS)))), draw=False)
        threads: JOB_THREADS
        resources: gpu=GPUS
        shell: "{params.command}"

# of some cells alone there may be nothing to draw in some of these
MATTERS = ["matters_shares", "matters_probes", "matters_over_random", *(["matters_paper", "matters_systems"] if ELSEWHERE else [])]
rule matters:
    input: list(FACTORIAL.values())
    output: figures("matters", *(MATTERS if FACTORIAL.keys() >= {*cells_of(SYSTEMS[FIRST], PRESET)} else []))
    params: code=stage("08_what_matters", "experiments.matters_figures", "experiments.matters_probes", "experiments.matters_systems") + PROBING, command=papermill("08_what_matters", "matters", system=SYSTEMS[FIRST], systems=",".join(ELSEWHERE), train=False)
    shell: "{params.command}"

# `make attentive`: the comparison of the paper, read with attentive probes of several lengths, a job for each system; and the
# other cells of the first system, those that were asked for or whose learning rate was found before, a job for each, and with
# one seed those of the systems that have learning rates of their own. None where the readings were taken from the repository
LENGTH_SEEDS = list(dict.fromkeys((*PRESET.seeds, *ASKED_SEEDS)))
OWN_RATES = [s for s in SYSTEMS if s != FIRST and FOUND.get((PRESET.name, s), {}).keys() >= {*cells_of(SYSTEMS[FIRST], PRESET)}]
CELLS_READ = [name for name in FACTORIAL if name not in COMPARED] if config.get("cells") or (PRESET.name, FIRST) in FOUND else []
READ_LONGER = {system: (system, "random-*", LENGTH_SEEDS, {}) for system in SYSTEMS}
for system, seeds in [(FIRST, LENGTH_SEEDS), *((system, PRESET.seeds[:1]) for system in OWN_RATES)]:
    for name in CELLS_READ:
        READ_LONGER[name if system == FIRST else f"{system}-{name}"] = (system, FOLDERS[name], seeds, {"cells": name, "factors": "1 8"})
for name, (system, folders, seeds, asked) in list(READ_LONGER.items()):
    read = list((matters_root(ROOT / "runs") / PRESET.name / system).glob(f"{folders}/seed{seeds[-1]}/{LENGTH_FILE}"))
    if read and all(scored_elsewhere(file.parent, PRESET) for file in read):
        del READ_LONGER[name]
        continue
    rule:
        name: f"attentive_{name}".replace("-", "_")
        input: simulated(system)
        output: touch(finished(OUT / "attentive" / f"{name}.done", read))
        params: code=code_digest("experiments.probe_length") + "".join(MADE_BY[cell] for cell in asked.get("cells", ",".join(COMPARED)).split(",") if cell in MADE_BY), command=papermill("08k_probe_length", f"attentive-{name}", systems=SYSTEMS[system], chosen_on=SYSTEMS[FIRST], seeds=" ".join(map(str, seeds)), draw=False, **asked)
        threads: JOB_THREADS
        resources: gpu=GPUS
        shell: "{params.command}"

rule attentive:
    input: [OUT / "attentive" / f"{name}.done" for name in READ_LONGER]
    output: figures("probe_length", *(["probe_length_cells", *(f"probe_length_cells_{system}" for system in OWN_RATES)] if CELLS_READ else []))
    params: code=stage("08k_probe_length", "experiments.probe_length", "experiments.matters_probes", "experiments.matters_lengths") + PROBING, command=papermill("08k_probe_length", "probe_length", systems=",".join(SYSTEMS.values()), chosen_on=SYSTEMS[FIRST], train=False)
    shell: "{params.command}"

# `make long-probe`: the encoders of Table 1, read by an attentive probe that is trained longer; a job for each system and row
LONG_PRESET, LONG_RUNS = with_long_probe(PRESET), long_probe_root(ROOT / "runs")
READ_AGAIN = []
for system, row in ((system, row) for system in SYSTEMS for row in BY_HAND if row.kind in ("trained", "random")):
    own = encoder_rows(PRESET, SYSTEMS[system], row_name(row))
    seeds = list(dict.fromkeys((*PRESET.seeds, *ASKED_SEEDS)))
    runs = [run_of(one, SYSTEMS[system], PRESET, seed, DATA) for one in own for seed in seeds]
    if all(scored_elsewhere(run.folder(LONG_RUNS), LONG_PRESET) for run in runs):
        continue
    name = f"{system}-{row_name(row)}"
    READ_AGAIN.append(OUT / "long_probe" / f"{name}.done")
    rule:
        name: f"long_probe_{name}".replace("-", "_").replace(".", "_")
        input: simulated(system), [run.folder() / "result.json" for run in runs]
        output: touch(finished(READ_AGAIN[-1], all((run.folder(LONG_RUNS) / "result.json").is_file() for run in runs)))
        params: code=code_digest("experiments.long_probe", *runs[0].modules, entries=runs[0].entries) + str(LONG_PRESET.probing()), command=papermill("08l_long_probe", f"long-{name}", systems=SYSTEMS[system], only=row_name(row), seeds=" ".join(map(str, seeds)), draw=False)
        threads: JOB_THREADS
        resources: gpu=GPUS
        shell: "{params.command}"

rule long_probe:
    input: RESULTS + MORE_SEEDS + READ_AGAIN + (SCORED if KEEPS_CURVES else [])
    output: figures("long_probe", *(["long_probe_curves"] if KEEPS_CURVES else []), *(["paper_order"] if set(PAPER_ROWS) <= {row.pair for row in BY_HAND} else []))
    params: rows=repr(TABLE_ROWS), code=stage("08l_long_probe", "experiments.long_probe") + PROBING, command=papermill("08l_long_probe", "long_probe", **SHOWN, only=ONLY or None, train=False)
    shell: "{params.command}"

# at a preset that was tuned, `make regimes`, `make across` and `make resolution` are asked for by name
WHOLE = ALL_ENCODERS and not ONLY and not any(BESIDE.values())

rule simulated:
    input: [simulated(system) for system in SYSTEMS]

rule all:
    default_target: True
    input:
        MORE_SEEDS,
        PRINTED,
        rules.table1.output,
        rules.learning_curves.output if KEEPS_CURVES else [],
        rules.data_efficiency.output,
        rules.regimes.output if WHOLE else [],
        rules.across.output if WHOLE else [],
        rules.resolution.output if WHOLE else [],
        rules.leakage.output if LEAK_FREE else [],

# ---
# skip_exec: true
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ablations: one thing changed
# > What keeps features apart, what is hidden, what two windows share, how a ConvNeXt is padded, which backbone: what does each of them change?
#
#     make ablations                                                                                   # all variants and seeds, then the figure
#     papermill nbs/08b_ablations.ipynb runs/circular.ipynb -p variants circular -p seed 0 < /dev/null
#
# At the end you can tell which part of a method its errors come from. Each variant changes one thing of a row of Table 1 ([experiments.variants](experiments/variants.ipynb)) and is compared with that row on the same flows, seeds and probes. What is done already is kept.

# %% tags=["parameters"]
system: str = "shear_flow"  # active_matter, shear_flow or rayleigh_benard
preset: str = "laptop"  # smoke, laptop, gpu, paper or native
variants: str = ""  # comma-separated names of experiments.variants; default: all
seed: int = -1  # only this one; default: all of the preset
draw: bool = True  # compare with Table 1, whose runs must be there, and write the figure
data_dir: str = ""  # folder of the data set; default: data/<preset>
run_dir: str = ""  # folder of the runs; default: runs/
figure_dir: str = ""  # folder of the figure; default: <run_dir>/<preset>/figures
device: str = "auto"  # auto, cpu or cuda
threads: int = 1  # torch threads

# %%
from physrep.core.devices import pick_device
from physrep.core.parameters import check_parameters

check_parameters(In)

# %%
# %matplotlib inline
from pathlib import Path

import torch

from physrep.core.files import read_json
from physrep.core.paths import project_root
from physrep.experiments.ablations import base_runs, train_variants, variant_costs, variant_differences
from physrep.experiments.variants import VARIANTS, variant_run
from physrep.results.figures import figure_record, save_figure
from physrep.results.forest import plot_differences
from physrep.results.verify import check_current
from physrep.training.presets import get_preset
from physrep.training.run import ensure_data

torch.set_num_threads(threads)
device = pick_device(device)
root = Path(run_dir or project_root() / "runs")
chosen = get_preset(preset)
names = variants.split(",") if variants else list(VARIANTS)
seeds = [seed] if seed >= 0 else list(chosen.seeds)
data = ensure_data(variant_run(names[0], system, preset), data_dir or None, device=device)

# %% [markdown]
# ## Training and probing

# %%
runs = train_variants(names, system, preset, seeds, data, root, device=device)

# %% [markdown]
# ## What changed
#
# The paired difference of the errors on `test` of the variant and of the row of Table 1, with its 95 % interval (bootstrap over flows and seeds), for the three probes of frozen features: linear (ridge regression on the mean token), kNN (the mean label of the nearest neighbours) and attentive (a query that attends to all tokens). Left of zero the variant is better. A mark is filled where the interval and every seed are on one side of zero.

# %%
if draw:
    varied = [run for variant in runs.values() for run in variant]
    rows = [run for name in names for run in base_runs(name, runs[name])]
    check_current([run.folder(root) for run in rows], chosen)
    table = variant_differences(runs, root)
    record = figure_record(
        "08b_ablations",
        ["experiments.ablations", "results.forest"],
        preset=preset,
        parameters=dict(system=system, variants=variants, seed=seed),
        runs=list({run.path: run for run in (*varied, *rows)}.values()),
        data={system: read_json(varied[0].folder(root) / "result.json")["data"]},
        device=device,
    )
    fig = plot_differences(table, system)
    save_figure(fig, figure_dir or root / chosen.name / "figures", "ablations", table, record)
    display(fig)

# %%
if draw:
    texts = dict(index=["variant", "probe"], columns="label", values="text", aggfunc="first", sort=False)
    display(table.pivot_table(**texts))

# %% [markdown]
# ## What it cost
#
# Updates, and operations of the whole training of one seed ([training.cost](training/cost.ipynb)).

# %%
if draw:
    display(variant_costs(runs).round(2))

# %% [markdown]
# ## What it says
#
# At preset `laptop`, on the shear flow:
#
# - **-0.10 and -0.21**: with padding that follows the periodic box, the error of JEPA is lower with the linear probe and with kNN. With the attentive probe the difference is undecided.
# - **0.16**: with three times as many updates (326 in place of 100), the error of MAE is higher with kNN. With the other two probes the difference is undecided. More compute does not explain why MAE stays behind.

# %% [markdown]
# **Next:** [08c_across_systems](08c_across_systems.ipynb) gives encoders other systems to read.

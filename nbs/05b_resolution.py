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
# # Do the numbers depend on the numerics?
# > The same flows at twice the resolution and half the time step, read by the same encoders and probes.
#
#     papermill nbs/05b_resolution.ipynb runs/resolution.ipynb -p preset laptop < /dev/null
#
# A probe could use errors of the solver in place of the flow. The grid damps, the time step has an error, and both might depend on the viscosity. At the end you can say whether the numbers of Table 1 depend on the solver. Some flows of the `test` split are simulated once more from
# the same initial conditions, on a grid with twice as many points per axis and half the time step, and stored on the same grid as before ([experiments.refinement](experiments/refinement.ipynb)). The probes of Table 1, as they were saved, are asked again ([experiments.resolution](experiments/resolution.ipynb)).

# %% tags=["parameters"]
preset: str = "laptop"  # smoke, laptop, gpu, paper or native
systems: str = ""  # comma-separated; default: all of the preset
data_dir: str = ""  # folder of the data set; default: data/<preset>
fine_dir: str = ""  # folder of the refined data set; default: <data_dir>_refined
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
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from physrep.core.paths import default_data_dir, project_root
from physrep.experiments.refinement import describe_refined, flow_differences, plot_flow_differences, refined_windows
from physrep.experiments.resolution import refined_differences
from physrep.physics.systems import get_system
from physrep.results.figures import figure_record, save_figure
from physrep.results.forest import plot_systems_differences
from physrep.results.rows import chosen_rows, run_of
from physrep.results.verify import check_current
from physrep.training.presets import get_preset

torch.set_num_threads(threads)
device = pick_device(device)
chosen = get_preset(preset)
if systems:
    chosen = replace(chosen, systems=tuple(systems.split(",")))
root = Path(run_dir or project_root() / "runs")
data = Path(data_dir or default_data_dir(chosen.name))
windows = refined_windows(chosen, data, fine_dir or f"{data}_refined", device)
describe_refined(windows, chosen)

# %% [markdown]
# ## How much do the flows differ?
#
# Root mean square of the difference, relative to the standard deviation of the field, in time (median over flows; the band is from the 10th to the 90th percentile). Where a flow is chaotic (convection at Rayleigh 1e6, active matter), the smallest
# error grows until the two are different flows with the same statistics. No finer grid would change that, and a probe must not depend on it.

# %%
parted = pd.concat([flow_differences(*pair) for pair in windows.values()], ignore_index=True)
plot_flow_differences(parted)

# %% [markdown]
# ## Do the probes notice?
#
# The error of every probe of frozen features of every row on the refined flows, minus its error on the same flows as they are stored: linear (ridge regression on the mean token), kNN (the mean label of the nearest neighbours) and attentive (a query that attends to all tokens).

# %%
rows = [row for row in chosen_rows() if row.kind != "baseline"]
runs = {(s, row.pair): [run_of(row, s, chosen, k) for k in chosen.seeds] for s in windows for row in rows}
check_current([run.folder(root) for seeds in runs.values() for run in seeds], chosen)
tables = [refined_differences(seeds, *windows[s], root, device=device) for (s, _), seeds in runs.items()]
paired = pd.concat(tables, ignore_index=True)
mse = paired[paired.metric == "mse"]

# %%
split = next(iter(chosen.refined))
record = figure_record(
    "05b_resolution",
    ["experiments.resolution", "experiments.refinement", "results.forest"],
    preset=preset,
    parameters=dict(preset=preset),
    runs=[run for seeds in runs.values() for run in seeds],
    data={name: {split: stored.fingerprint()} for name, (_, stored) in windows.items()},
    device=device,
    refined_data={name: {split: refined.fingerprint()} for name, (refined, _) in windows.items()},
)
fig = plot_systems_differences(mse, mse.reference.iloc[0])
save_figure(fig, figure_dir or root / chosen.name / "figures", "resolution", mse, record)
fig

# %%
for name in windows:
    print(get_system(name).title)
    index = ["objective", "encoder", "probe"]
    errors = mse[mse.system == name].pivot_table(index=index, columns="label", values=["b", "a"], sort=False)
    display(errors.rename(columns={"a": "refined", "b": "stored"}, level=0).round(3))

# %% [markdown]
# ## The largest change, in words

# %%
for name in windows:
    one = mse[(mse.system == name) & (mse.label == "mean")]
    largest = one.loc[one.difference.abs().idxmax()]
    row = f"{largest.objective} {largest.encoder}, {largest.probe}"
    print(f"{name}: largest change of a mean error: {row}: {largest.text} at an error of {largest.b:.3f}")

# %% [markdown]
# **Next:** [05c_machines](05c_machines.ipynb) asks the same of threads and processors.

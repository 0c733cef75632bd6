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
# # The state of the flow: a second thing to ask for
# > What can be read from each encoder about the state of the flow, now and one clip later: roll-up, heat flux and number of defects.
#
#     papermill nbs/08d_regimes.ipynb runs/regimes.ipynb -p preset laptop < /dev/null
#
# The parameters of the equations are labels that come with a simulation. Here the label is computed from the fields themselves, so it can be had for any data, and it changes along a trajectory. At the end you can say which encoders hold more about the state of a flow than a few statistics do, and whether the state one clip later can be read as well.
#
# - **Shear flow:** the share of the kinetic energy in waves. A layer that has rolled up has much of it.
# - **Convection:** the Nusselt number at the walls, which is the heat flux through them in units of what conduction alone would carry.
# - **Active matter:** the number of half-charged defects, points around which the direction of the rods turns by half a turn.
#
# ([physics.regimes](physics/regimes.ipynb) defines the three.) *Now* is the last frame that the encoder has seen. *Later* is the last frame of the following clip, which it has not seen. Both are asked of the same windows. The encoders are those of Table 1, frozen, with a
# linear probe (ridge regression on the mean token) and kNN (the mean of the nearest neighbours). Part of the state follows from the parameters and the time alone, and part of the future from the present. Each of the two is a baseline with a row of its own.

# %% tags=["parameters"]
preset: str = "laptop"  # smoke, laptop, gpu, paper or native
systems: str = ""  # comma-separated; default: all of the preset
data_dir: str = ""  # folder of the data sets; default: data/<preset>
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

import pandas as pd
import torch

from physrep.core.paths import default_data_dir, project_root
from physrep.experiments.regimes import (
    BASELINES,
    describe_targets,
    plot_regimes,
    regime_answers,
    regime_differences,
    regime_table,
    regime_windows,
)
from physrep.results.figures import figure_record, save_figure
from physrep.results.rows import chosen_rows, run_of, title_of
from physrep.training.presets import get_preset

torch.set_num_threads(threads)
pd.set_option("display.max_colwidth", None)
device = pick_device(device)
chosen = get_preset(preset)
names = systems.split(",") if systems else list(chosen.systems)
root = Path(run_dir or project_root() / "runs")
data = Path(data_dir or default_data_dir(chosen.name))

# %% [markdown]
# ## The numbers of this data set
#
# On `test`.

# %%
windows, targets = regime_windows(names, chosen, data)
describe_targets(targets).round(2)

# %% [markdown]
# ## What can be read from each encoder?
#
# Errors on `test`, z-scored.

# %%
answers = {}
for name in names:
    answers |= regime_answers(name, windows[name], targets[name], chosen, data, root, device=device)
table = regime_table(answers)
mse = table[(table.metric == "mse") & (table.split == "test")]
errors = mse.pivot_table(
    index=["objective", "encoder", "probe"], columns=["system", "when"], values="value", sort=False
)
errors.round(2)

# %% [markdown]
# ## At a glance
#
# Error of the linear probe on `test`, z-scored: the mean of train scores about 1 (dashed). Filled: now; hollow: one clip later. Lines: 95 % intervals by bootstrap over flows and seeds; dots: seeds.

# %%
rows = [row for row in chosen_rows() if row.kind != "baseline"]
record = figure_record(
    "08d_regimes",
    ["experiments.regimes"],
    preset=preset,
    parameters=dict(preset=preset, systems=systems),
    runs=[run_of(row, s, chosen, k, data) for s in names for row in rows for k in chosen.seeds],
    device=device,
    data={s: {split: w.fingerprint() for split, w in by.items()} for s, by in windows.items()},
)
fig = plot_regimes(table)
save_figure(fig, figure_dir or root / chosen.name / "figures", "regimes", table[table.metric == "mse"], record)
fig

# %% [markdown]
# ## Telling the classes apart
#
# Each number is split at a threshold into two classes: laminar or rolled up, conducting or convecting, without or with defects. The area under the ROC curve is the probability that a window of the second class gets the higher prediction: 1 is perfect, 1/2 is chance (`test`, linear probe, mean over seeds). A dash means that one class has fewer than one window in twenty.

# %%
linear = mse[mse.probe == "linear"]
auc = linear.assign(auc=["–" if pd.isna(v) else f"{v:.3f}" for v in linear.auc])
classes = dict(index=["objective", "encoder"], columns=["system", "when"], values="auc", aggfunc="first", sort=False)
auc.pivot_table(**classes).fillna("")

# %% [markdown]
# ## Differences
#
# Paired, on the same windows, with 95 % intervals over flows and seeds (linear probe, `test`): each encoder against the summary statistics, and against random weights of its own kind. Below zero is better; an interval that includes zero decides nothing.

# %%
pairs = regime_differences(answers)
pairs.pivot_table(index=["against", "encoder"], columns=["system", "when"], values="text", aggfunc="first", sort=False)

# %% [markdown]
# ## The best encoder without labels, in words

# %%
for system in names:
    one = linear[linear.system == system].set_index(["when", "objective", "encoder"]).value
    for when in ("now", "later"):
        simple = [name for name in reversed(BASELINES.values()) if (when, name, "none") in one]
        beside = ", ".join(f"{title_of(name)} {one[when, name, 'none']:.2f}" for name in simple)
        best = one[when].loc[["jepa", "mae", "random"]].idxmin()
        print(
            f"{system}, {when}: best encoder without labels of the parameters is {title_of(*best)} "
            f"at {one[when][best]:.2f}; {beside}"
        )

# %% [markdown]
# **Next:** [11_tutorial_row](11_tutorial_row.ipynb) adds a row of your own to Table 1.

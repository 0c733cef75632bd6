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
# # Table 1: what can be read from the encoders?
# > Every method, probe and split side by side, with seeds, intervals, paired differences, and the paper's numbers beside ours.
#
#     papermill nbs/05_table1.ipynb runs/table1.ipynb -p preset laptop < /dev/null
#
# At the end you can say which encoders hold more about the parameters of a flow than random weights and a few statistics do, and how sure that is. It reads the results of all runs of a preset (`make reproduce` makes them) and draws `table1`, `curves` and `table1_differences`. `-p rows <rows.yaml>` adds rows of your own
# ([11_tutorial_row](11_tutorial_row.ipynb) makes some), and `-p extra <folder>` adds any other folder with results.

# %% tags=["parameters"]
preset: str = "laptop"  # smoke, laptop, gpu, paper or native
systems: str = ""  # comma-separated; default: all of the preset
only: str = ""  # rows of the table, comma-separated, e.g. mae-vit,random-vit; default: the main rows
rows: str = ""  # path of a rows.yaml with rows of your own; default: none
extra: str = ""  # folders of further results, comma-separated
data_dir: str = ""  # folder of the data sets; needed for a system whose grid only its files tell
run_dir: str = ""  # folder of the runs; default: runs/
figure_dir: str = ""  # folder of the figures; default: <run_dir>/<preset>/figures

# %%
from physrep.core.parameters import check_parameters

check_parameters(In)

# %%
# %matplotlib inline
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from physrep.core.files import read_json
from physrep.core.paths import project_root
from physrep.experiments.costs import cost_table, round_costs
from physrep.physics.oracle import assumptions, has_oracle
from physrep.physics.systems import get_system
from physrep.probing.records import read_results
from physrep.results.comparison import REFERENCES, differences, summarise
from physrep.results.curves import plot_curves, read_curves, trained_table
from physrep.results.figures import figure_record, save_figure
from physrep.results.forest import plot_systems_differences
from physrep.results.panels import plot_systems, plot_table1
from physrep.results.rows import chosen_rows, read_rows, row_folders, run_of
from physrep.results.table import PAPER, table1, two_digits
from physrep.results.verify import check_current
from physrep.training.presets import get_preset

pd.set_option("display.max_rows", 100)
chosen = get_preset(preset)
root = Path(run_dir or project_root() / "runs")
data = data_dir or None
asked = {get_system(s).name: s for s in (systems.split(",") if systems else chosen.systems)}  # name -> as asked for
names = list(asked)
titles = {name: get_system(s).title for name, s in asked.items()}
shown = (*chosen_rows(only), *(read_rows(rows) if rows else ()))
places = row_folders(chosen, root, list(asked.values()), shown, data) + [Path(f) for f in extra.split(",") if f]
check_current(places, chosen)
# a folder of one's own may hold several seeds
folders = [f.parent for place in places for f in sorted(place.rglob("result.json"))]
measured = read_results(folders)
len(folders), len(measured)

# %% [markdown]
# ## How to read it
#
# **Errors** are mean squared errors of z-scored labels: a constant scores about 1, lower is better.
#
# **Probes** are what is fitted on the features to read the labels: *linear* is a ridge regression on the mean token, *kNN* takes the mean label of the nearest neighbours, *attentive* lets one query attend to all tokens. The encoder is frozen. *Fine-tuned* trains the encoder as well. *Own head* is what a supervised encoder was trained with.
#
# **Splits**: parameters are drawn continuously, and `test` has other parameters and other initial conditions than `train`. `valid` chose among the variants of each probe, so it is optimistic. Numbers are means over seeds. A seed is an initialisation, an order of the windows and a probe, at fixed data.
#
# **Methods** differ in what they ask of an encoder. *JEPA* (joint-embedding predictive architecture): which features will a later window have? *Masked JEPA*: which features has what is hidden? *MAE* (masked autoencoder): which pixels are hidden? *Forecast*: which frames follow? *Invariance*: what do two windows of one trajectory share? None of them sees a label. *Supervised* encoders are trained on the labels, *random weights* not at all.
#
# **Two baselines** say what the numbers mean. *Summary statistics* is a ridge regression on standard deviations of fields, gradients and changes, what a physicist writes down in a minute. *Equation oracle* solves
# the equations for their coefficients; it is told what the equations are (below the table: all that both are told). From an encoder with a higher error than the first, less can be read about the parameters than from a few standard deviations. The gap between the first and the second is what a better encoder could gain.
#
# **The paper's numbers** are for other data (The Well, with Reynolds numbers of the shear flow from 1e4 to 5e5 in place of 400 to 3200), its validation split and an attentive head: they stand beside ours for orientation, not for comparison.

# %%
summary = summarise(folders)
summary = summary[summary.system.isin(names)]  # rows of one's own may be of another system
for system in names:
    print(titles[system])
    display(two_digits(table1(summary, system, shown)))

# %%
known = [get_system(s) for s in asked.values() if has_oracle(get_system(s))]
told = {f"equation oracle, {s.title}": asdict(assumptions(s)) for s in known}
pd.DataFrame(told | {"summary statistics": asdict(assumptions(get_system(asked[names[0]]), "statistics"))}).T

# %% [markdown]
# ## At a glance
#
# The mean over the labels of each system.

# %%
with_runs = [row for row in shown if row.kind not in ("baseline", "predictions")]
runs = [run_of(row, s, chosen, k, data) for s in asked.values() for row in with_runs for k in chosen.seeds]
results = [read_json(folder / "result.json") for folder in folders]
record = figure_record(
    "05_table1",
    ["probing.baselines", "results.comparison", "results.curves", "results.panels", "results.forest"],
    preset=preset,
    parameters=dict(preset=preset, systems=systems, rows=rows, extra=extra),
    runs=[*runs, *sorted(set(measured.run) - {run.path for run in runs})],
    data={r["config"]["system"]: r["data"] for r in results if "config" in r},
)
figures = figure_dir or root / chosen.name / "figures"
fig = plot_systems(summary, rows=shown)
save_figure(fig, figures, "table1", summary[(summary.label == "mean") & (summary.metric == "mse")], record)
fig

# %% [markdown]
# ## Label by label

# %%
for system in names:
    print(titles[system])
    fig = plot_table1(summary, system, rows=shown)
    save_figure(fig, figures, f"table1_{system}", summary[summary.system == system], record)
    display(fig)

# %% [markdown]
# ## Have they been trained?
#
# An objective that has not beaten the trivial answer to its own question has taught nothing that counts as its own: a forecast has to beat the last frame, hidden pixels what can be interpolated from around them, features the mean of all features, pairs the toss of a coin between two flows with equal parameters. `gate` is its error on `valid` over that of the best trivial answer, so it has to be below 1. The features also have to vary along several directions ([training.watch](training/watch.ipynb)).

# %%
curves = read_curves([place for place in places if (place / "curve.csv").is_file()])
trained = trained_table(curves, shown)
failed = trained[trained["not trained, because"] != ""]
trained.drop(columns=["objective", "encoder"]).round(3)

# %% [markdown]
# ## Learning curves
#
# What an online probe (ridge regression on part of `train`, scored on `valid`) reads from encoders that were finished on the way: after 1/64, 1/16 and 1/4 of the run, and at its end.

# %%
fig = plot_curves(curves, shown)
save_figure(fig, figures, "curves", curves, record)
fig

# %% [markdown]
# ## Does pretraining help?
#
# Differences on the same flows: a flow that is hard for both methods cancels in the difference, so its interval is narrower than those of the two numbers. First against the *random encoder* of the same architecture and
# probe, which is what was there before training; then against summary statistics. Left of zero is better; a mark is filled where the interval and every seed are on one side of it. Intervals (95 %) are by bootstrap over flows and over seeds. With three seeds they are
# too narrow rather than too wide ([probing.scores](probing/scores.ipynb) shows by how much).

# %%
paired = differences(folders)
for reference in REFERENCES:
    name = "table1_differences" if reference == "random" else f"table1_differences_{reference}"
    drawn = paired[(paired.reference == reference) & (paired.label == "mean")]
    if drawn.empty:  # of a few rows none may have a row of random weights beside it
        continue
    fig = plot_systems_differences(paired, reference, rows=shown)
    save_figure(fig, figures, name, drawn, record)
    display(fig)

# %% [markdown]
# Once more without the rows that are not called trained, where there are any.

# %%
if failed.empty:
    print("every row is trained")
else:
    bad = set(zip(failed.system, failed.objective, failed.encoder))
    kept = [key not in bad for key in zip(paired.system, paired.objective, paired.encoder)]
    display(plot_systems_differences(paired[kept], "random", rows=shown))

# %%
layout = dict(index=["objective", "encoder", "probe"], columns=["reference", "label"], values="text")
for system in names:
    print(titles[system])
    one = paired[paired.system == system]
    display(one.pivot_table(**layout, aggfunc="first", sort=False).fillna("–"))

# %% [markdown]
# ## What it cost
#
# Parameters of the encoder; operations to embed a clip, to train on a window, and of the whole training ([training.cost](training/cost.ipynb)); time of pretraining and of probing (one thread, beside another job), mean over seeds.
# All trained rows take about three minutes of one core at preset `laptop`, so they have seen different numbers of windows.

# %%
round_costs(cost_table(runs, root))

# %% [markdown]
# ## The paper's numbers

# %%
PAPER[PAPER.system.isin(names)]

# %% [markdown]
# **Next:** [05b_resolution](05b_resolution.ipynb) asks whether these numbers depend on the solver.

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
# # Stage: probe
# > Predicts the parameters of the equations from a frozen encoder, and writes its rows of the results table.
#
# At the end you can say with what error each parameter can be read from an encoder.
#
#     papermill nbs/04_probe.ipynb runs/probe.ipynb -p objective mae < /dev/null
#     physrep probe --objective mae                     # the same
#     physrep probe my_package.module:make_encoder      # an encoder of your own
#
# A *probe* is a small model that predicts the labels from frozen features. *Linear* is ridge regression (least squares with a penalty on large coefficients) on the mean token. *kNN* is the mean label of the training windows with the nearest features. *Attentive* is a learned query that weighs all tokens.
#
# The run must be finished: `03_pretrain` with the same parameters makes it. A run of random weights, where nothing is trained, is made here. `objective constant`, `statistics` and `equations` (or
# all three: `baselines`) score what needs no run. With `objective frozen` an encoder of your own is probed as it is: `encoder` then names a function that makes it
# ([11_tutorial_row](11_tutorial_row.ipynb)).
# Features are kept in the run folder: a second call, with other probes, does not extract them again.

# %% tags=["parameters"]
system: str = "shear_flow"  # active_matter, shear_flow, rayleigh_benard, or my_package.module:SYSTEM
objective: str = "jepa"  # as in 03_pretrain; or frozen, constant, statistics, equations, baselines (all three)
encoder: str = ""  # convnext, vit, or my_package.module:make_encoder; default: the objective's own
preset: str = "laptop"  # smoke, laptop, gpu, paper, native, or the path of a .yaml file
seed: int = 0  # of the run
seeds: str = ""  # several, one after the other: "0 1 2"; default: seed
data_dir: str = ""  # folder of the data set; default: data/<preset>
run_dir: str = ""  # folder of the runs; default: runs/
device: str = "auto"  # auto, cpu or cuda
probes: str = ""  # comma-separated; default: linear,knn,attentive, for some rows finetune
rows: str = ""  # file with rows of your own, which may say that they are fine-tuned
steps: int = 0  # of the run, as in 03_pretrain, and so are the next six
batch_size: int = 0
lr: float = 0.0
tag: str = ""
coefficients: dict = {}
encoder_config: dict = {}
recipe: dict = {}
threads: int = 1  # torch threads

# %%
from physrep.core.devices import pick_device
from physrep.core.parameters import check_parameters

check_parameters(In)

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import pandas as pd
import torch

from physrep.physics.systems import get_system
from physrep.probing.baselines import BASELINES, baselines_for, score_baseline
from physrep.probing.evaluate import FROZEN, coverage, probe_splits, score_run
from physrep.probing.scores import plot_predictions
from physrep.results.rows import ROWS, read_rows
from physrep.training.pretrain import pretrain
from physrep.training.run import ensure_data, resolve

torch.set_num_threads(threads)
device = pick_device(device)
changes = dict(steps=steps or None, batch_size=batch_size or None, lr=lr or None, tag=tag)
changes |= dict(coefficients=coefficients, encoder_config=encoder_config, recipe=recipe)
baselines = baselines_for(get_system(system)) if objective == "baselines" else [b for b in BASELINES if b == objective]
named = dict(objective="random") if baselines else dict(objective=objective, encoder=encoder, **changes)
run = resolve(system, preset=preset, seed=seed, data_dir=data_dir or None, **named)
runs = [run.with_seed(int(s)) for s in seeds.split()] or [run]
table_rows = (*ROWS, *(read_rows(rows) if rows else ()))
tuned = any(row.finetuned for row in table_rows if row.pair == run.row)
chosen = probes.split(",") if probes else [*FROZEN, *(["finetune"] if tuned else [])]
if "finetune" in chosen and probes and (objective == "frozen" or not run.preset.finetune_epochs):
    why = "an encoder of your own" if objective == "frozen" else f"preset {preset}, which has finetune_epochs: 0,"
    raise ValueError(f"{why} is not fine-tuned; probes may be {', '.join(FROZEN)}")
data = ensure_data(run, data_dir or None, device=device)

# %%
windows = probe_splits(run, data)  # the same for all seeds
if baselines:
    scored = {name: score_baseline(name, run, data, run_dir or None, windows=windows) for name in baselines}
else:
    if run.objective == "random":  # nothing is trained
        for r in runs:
            pretrain(r, data, run_dir or None, device=device)
    options = dict(probes=chosen, windows=windows, device=device)
    scored = {f"seed {r.seed}": score_run(r, data, run_dir or None, **options) for r in runs}

# %% [markdown]
# ## Scores
#
# Squared error of the z-scored labels: a constant scores 1 on `valid` and `test`, and lower is better. On `unseen` a constant scores less, because its labels spread less: the row of the constant says how much. `valid` was used
# to choose among variants of a probe, so it is optimistic. `test` has new initial conditions, `unseen` parameters off the training grid.

# %%
table = pd.concat([pd.DataFrame(s.rows) for s in scored.values()], keys=scored, names=["", "row"]).reset_index(level=0)
table[table.metric == "mse"].pivot(index=["probe", "label"], columns=["", "split"], values="value").round(3)

# %% [markdown]
# ## Predicted against true
#
# In physical units, on `unseen` parameters (or `test`, where there are none), with median and central 80 % of the predictions. The grey band is a split conformal interval: its width comes from the residuals on `valid`, and it should hold the truth in 90 % of the cases. If there are several seeds, the first is shown.

# %%
shown = scored.items() if baselines else [(f"{objective} {run.encoder}", next(iter(scored.values())))]
for name, one in shown:
    split = "unseen" if "unseen" in one.truth else "test"
    for probe in dict.fromkeys(p for p, _ in one.predictions):
        fitted = one.probes.get(probe)
        band = fitted.half_width() * fitted.scaler.std if fitted else None
        title = f"{name}, {probe}, {split}"
        plot_predictions(one.predictions[probe, split], one.truth[split], run.system, title=title, half_width=band)
        plt.show()

# %% [markdown]
# How often the 90 % intervals hold the truth. On `unseen` they may hold it less often: nothing on `valid` says how a probe interpolates between the values of the grid.

# %%
pd.concat({name: coverage(one, run.system) for name, one in scored.items()}, axis=1).round(2)

# %%
pd.DataFrame({name: {probe: str(c) for probe, c in one.chosen.items()} for name, one in scored.items()})

# %% [markdown]
# **Next:** [05_table1](05_table1.ipynb) puts all encoders side by side.

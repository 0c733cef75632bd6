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
# # Stage: pretrain
# > Trains one encoder with one objective, and shows how the training went and what the model predicts.
#
# At the end you can train an encoder, and tell from its curves whether it has collapsed. The *objective* is what it is trained for. `jepa` predicts the features of a later window from those of an earlier one, `jepa_ema` the features of what is hidden; `mae` fills in hidden pixels, `forecast` the frames that follow; `invariance` finds what two windows of a trajectory share. `supervised` is trained on the labels, and `random` is not trained.
#
#     papermill nbs/03_pretrain.ipynb runs/mae.ipynb -p objective mae < /dev/null
#     papermill nbs/03_pretrain.ipynb -p objective mae < /dev/null | cat      # the executed notebook goes to standard output
#     physrep pretrain --objective mae                                        # the same, without these two rules
#
# Interrupt it and run it again: it goes on from its checkpoint. If the run is finished, it only draws. Data that are missing are simulated.
# Always give papermill `< /dev/null`: if its standard input is a pipe it reads the *notebook* from there.
#
# An objective of your own is named by its place, `-p objective my_package.module:Class`, and so is an encoder (`my_package.module:make_encoder`) and a system (`my_package.module:SYSTEM`).

# %% tags=["parameters"]
system: str = "shear_flow"  # active_matter, shear_flow, rayleigh_benard, or my_package.module:SYSTEM
objective: str = "jepa"  # of objectives.methods: jepa, jepa_ema, mae, forecast, ..., or my_package.module:Class
encoder: str = ""  # convnext, vit, or my_package.module:make_encoder; default: the objective's own
preset: str = "laptop"  # smoke, laptop, gpu, paper, native, or the path of a .yaml file
seed: int = 0  # of initialisation, order, masks and noise
seeds: str = ""  # several, one after the other: "0 1 2"; default: seed
data_dir: str = ""  # folder of the data set; default: data/<preset>
run_dir: str = ""  # folder of the runs; default: runs/
device: str = "auto"  # auto, cpu or cuda
steps: int = 0  # updates; 0: the preset's
batch_size: int = 0  # windows an update; 0: the preset's
lr: float = 0.0  # peak learning rate; 0: the preset's
resume: bool = True  # go on from a checkpoint, keep a finished run
tag: str = ""  # marks a variant in the name of the run folder
coefficients: dict = {}  # of the objective, over the preset's: -y "coefficients: {variance: 40}"
encoder_config: dict = {}  # of the encoder, over the preset's
recipe: dict = {}  # weight_decay, warmup, clip_norm, accumulate, precision, ..., over the preset's
threads: int = 1  # torch threads; on small grids one is fastest
minutes: float = 0.0  # stop after so many minutes (to be run again); 0: no limit

# %%
from physrep.core.devices import pick_device
from physrep.core.parameters import check_parameters

check_parameters(In)

# %%
# %matplotlib inline
import pandas as pd
import torch
from IPython.display import display

from physrep.training.loop import read_metrics
from physrep.training.pretrain import plot_metrics, pretrain, restore, training_batches, training_windows
from physrep.training.run import ensure_data, resolve
from physrep.training.watch import shortcomings

torch.set_num_threads(threads)
changes = dict(steps=steps or None, batch_size=batch_size or None, lr=lr or None, tag=tag)
changes |= dict(coefficients=coefficients, encoder_config=encoder_config, recipe=recipe, data_dir=data_dir or None)
run = resolve(system, objective, encoder, preset, seed=seed, **changes)
runs = [run.with_seed(int(s)) for s in seeds.split()] or [run]
session = dict(device=pick_device(device), resume=resume, minutes=minutes or float("inf"))
runs[0].window_frames  # builds the model: a wrong coefficient fails here, before any work
pd.set_option("display.max_colwidth", None)
pd.Series({k: str(v) for k, v in runs[0].as_dict().items()}, name="run").to_frame()

# %%
data = ensure_data(runs[0], data_dir or None, device=session["device"], minutes=session["minutes"])
windows = training_windows(runs[0], data)  # the same for all seeds
folders = [pretrain(r, data, run_dir or None, windows=windows, **session) for r in runs]

# %% [markdown]
# ## How it went
#
# Left: the loss on training and held-out windows, over the updates. Right: do the features vary, and along how many directions? A standard deviation
# near 0 or an effective rank near 1 means that the encoder has collapsed: it gives the same features whatever it sees. One line per seed.

# %%
metrics = pd.DataFrame(read_metrics(folders[0] / "metrics.csv"))
if "valid_loss" in metrics:
    display(plot_metrics(folders))
    metrics = metrics.dropna(subset=["valid_loss"])
metrics.iloc[[0, -1]].T.rename_axis("measure").set_axis(["first", "last"], axis=1).round(4)

# %% [markdown]
# Encoders that were finished on the way: what a ridge regression reads from them (`online`, on `valid`), and whether the objective has beaten the trivial answers to its own question (`gate` below 1).

# %%
curve = pd.DataFrame(read_metrics(folders[0] / "curve.csv"))
display(curve.round(3))
for reason in shortcomings(curve.iloc[-1].dropna()) if runs[0].recipe else []:
    print(f"not called trained: {reason}")

# %% [markdown]
# ## What it predicts
#
# On windows of `valid`.

# %%
valid = training_batches(runs[0], windows, session["device"])["valid"]
model = restore(runs[0], run_dir or None, session["device"])
if hasattr(model, "show"):
    display(model.show(next(valid.evaluation(32, limit=32))))

# %%
for folder in folders:
    print(folder.relative_to(folder.parents[3]))

# %% [markdown]
# **Next:** [04_probe](04_probe.ipynb) measures what can be read from the encoder.

# ---
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
# # Ablations
# > Variants of a row of Table 1, trained, probed and compared with that row on the same flows, seeds and probes.
#
# At the end you can say what one change of a row does to its errors, with an interval. [experiments.variants](variants.ipynb) declares the variants; [08b_ablations](../08b_ablations.ipynb) runs them.

# %%
#| default_exp experiments.ablations

# %%
#| export
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from physrep.experiments.variants import base_run, check_variant, variant_run
from physrep.probing.evaluate import FROZEN, probe_splits, score_run
from physrep.probing.records import read_predictions
from physrep.results.comparison import compare, interval_text
from physrep.results.rows import title_of
from physrep.results.verify import is_current
from physrep.training.cost import cost
from physrep.training.pretrain import pretrain
from physrep.training.run import Run


# %% [markdown]
# ## Training and probing
#
# A variant has a run of its own for each seed, and is probed as its row is, but not fine-tuned. What is done already is kept.

# %%
#| export
def train_variants(
    names: Sequence[str],  # of VARIANTS
    system: str,
    preset: str,
    seeds: Sequence[int],
    data_dir: str | Path,
    run_dir: str | Path | None = None,
    *,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, list[Run]]:
    "The finished and probed runs of each variant, one a seed. ValueError for an unknown variant."
    runs = {name: [variant_run(name, system, preset, seed=k) for k in seeds] for name in names}
    windows = probe_splits(runs[names[0]][0], data_dir)  # the same for all
    for name, run in ((name, run) for name, variant in runs.items() for run in variant):
        folder = pretrain(run, data_dir, run_dir, device=device, progress=progress)
        if not is_current(folder / "result.json", run.preset, windows):
            score_run(run, data_dir, run_dir, probes=FROZEN, windows=windows, device=device, progress=progress)
        print(f"{name}, seed {run.seed}: {run.name}")
    return runs


def base_runs(name: str, runs: Sequence[Run]) -> list[Run]:
    "The runs of the row of Table 1 that a variant changes, of the same seeds."
    return [base_run(name, run.system.name, run.preset, seed=run.seed) for run in runs]


# %% [markdown]
# ## The comparison

# %%
#| export
def variant_differences(runs: Mapping[str, Sequence[Run]], run_dir: str | Path | None = None) -> pd.DataFrame:
    """The error of each variant minus that of its row on the same flows: rows of `comparison.compare` with the columns
    that `forest.plot_differences` wants. `runs` are those of `train_variants`; the row must be probed already."""
    found = []
    for name, variant in runs.items():
        folders = [run.folder(run_dir) for run in variant]
        base = base_runs(name, variant)[0]
        pair = compare(folders, [run.folder(run_dir) for run in base_runs(name, variant)], metric="mse")
        info = read_predictions(folders[0]).info
        about = {"system": variant[0].system.name, "objective": variant[0].objective, "encoder": variant[0].encoder}
        about |= {"labelled_flows": info["labelled_flows"], "draw": info["draw"]}
        text = [interval_text(*numbers) for numbers in zip(pair.difference, pair.low, pair.high)]
        reference = f"{title_of(*base.row)}\nvariant: {check_variant(name).title}"
        found.append(pair.assign(**about, reference=reference, variant=name, text=text))
    return pd.concat(found, ignore_index=True)


def variant_costs(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    "Updates and operations of the training of each variant and of its row."
    found = []
    for name, variant in runs.items():
        for which, run in ((name, variant[0]), ("as in Table 1", base_runs(name, variant)[0])):
            about = {"row": f"{run.objective}-{run.encoder}", "which": which, "updates": run.recipe.steps}
            found.append(about | {"TFLOP": cost(run)["total"] / 1e12})
    return pd.DataFrame(found)


# %% [markdown]
# ## An example
#
# Circular padding at preset smoke, one seed. The table has a row for each label, and one for their mean.

# %%
# %matplotlib inline
import tempfile

from physrep.results.forest import plot_differences
from physrep.training.run import ensure_data

folder = Path(tempfile.mkdtemp())
row = base_run("circular", "shear_flow", "smoke")
data = ensure_data(row, folder / "data", workers=1, progress=False)
pretrain(row, data, folder / "runs", progress=False)
score_run(row, data, folder / "runs", progress=False)
variants = train_variants(["circular"], "shear_flow", "smoke", [0], data, folder / "runs", progress=False)
table = variant_differences(variants, folder / "runs")
table[table.label == "mean"][["variant", "probe", "a", "b", "text"]]

# %%
written = (variants["circular"][0].folder(folder / "runs") / "result.json").stat().st_mtime_ns
assert train_variants(["circular"], "shear_flow", "smoke", [0], data, folder / "runs", progress=False) == variants
now = (variants["circular"][0].folder(folder / "runs") / "result.json").stat().st_mtime_ns
assert now == written, "done: nothing is probed again"
assert base_runs("circular", variants["circular"]) == [row]
assert set(table.label) == {"mean", *row.system.label_names} and set(table.probe) == set(FROZEN)
assert variant_costs(variants).TFLOP.nunique() == 1, "padding costs no operations that are counted"
plot_differences(table, "shear_flow")

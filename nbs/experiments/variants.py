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
# # Variants
# > One thing of a row of Table 1 changed: what keeps features apart, what is hidden, what a pair of windows shares, the padding, the backbone.
#
# At the end you can train a variant of a row beside it. A variant that is a row of its own (`jepa_sigreg`, say) has the run of that row.

# %%
#| default_exp experiments.variants

# %%
#| export
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from physrep.training.presets import Preset
from physrep.training.run import Run, resolve


# %%
#| export
@dataclass(frozen=True)
class Variant:
    "A row of Table 1 with one thing changed: another objective or encoder, or other options of either."

    title: str  # what is changed, in a few words
    row: tuple[str, str]  # (objective, encoder)
    objective: str = ""  # in place of the row's
    encoder: str = ""  # in place of the row's
    coefficients: Mapping = field(default_factory=dict)  # of the objective, over the preset's
    encoder_config: Mapping = field(default_factory=dict)  # of the encoder, over the preset's

    @property
    def changes(self) -> dict:
        "The options that are changed, as `resolve` takes them."
        both = {"coefficients": self.coefficients, "encoder_config": self.encoder_config}
        return {name: dict(value) for name, value in both.items() if value}


VARIANTS: dict[str, Variant] = {
    "circular": Variant("circular padding", ("jepa", "convnext"), encoder_config={"padding_mode": "circular"}),
    "sigreg": Variant("SIGReg in place of VICReg", ("jepa", "vit"), objective="jepa_sigreg"),
    "blocks": Variant("blocks hidden in place of tubes", ("jepa_ema", "vit"), coefficients={"mask": "blocks"}),
    "nothing_hidden": Variant("nothing hidden: an autoencoder", ("mae", "vit"), objective="autoencoder"),
    "same_window": Variant("the same window twice", ("invariance", "vit"), coefficients={"of": "window"}),
    "equal_labels": Variant("another flow, equal labels", ("invariance", "vit"), coefficients={"of": "labels"}),
    **{
        f"{objective}_convnext": Variant("a ConvNeXt in place of the ViT", (objective, "vit"), encoder="convnext")
        for objective in ("jepa_ema", "mae", "forecast", "invariance")
    },
}

# %% [markdown]
# - `circular`: the ConvNeXt of JEPA pads periodically in space, as the box is, in place of the paper's zeros.
# - `sigreg`: another regulariser keeps the features of JEPA apart ([objectives.regularisers](../objectives/regularisers.ipynb)).
# - `blocks`: what is hidden comes in blocks, as in V-JEPA ([objectives.tasks](../objectives/tasks.ipynb)).
# - `nothing_hidden`: the decoder of MAE is asked for a clip that the encoder has seen.
# - `same_window`: a control of invariance. The two views differ by a symmetry only, so nothing has to be recognised over time.
# - `equal_labels`: another control, and an upper bound. The two views are of *different* flows with equal parameters, so it uses the labels.
# - `..._convnext`: the same question, asked of another backbone.


# %%
#| export
def check_variant(name: str) -> Variant:
    "The variant of that name; ValueError for an unknown one, with the valid names."
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; valid: {', '.join(VARIANTS)}")
    return VARIANTS[name]


def variant_run(
    name: str, system: str, preset: str | Path | Preset, *, seed: int = 0, data_dir: str | Path | None = None
) -> Run:
    """The run of a variant, tagged with its name unless it is a row of its own. ValueError for an unknown one, with the
    valid names."""
    variant = check_variant(name)
    row = (variant.objective or variant.row[0], variant.encoder or variant.row[1])
    tag = name if variant.changes else ""
    return resolve(system, *row, preset, seed=seed, tag=tag, data_dir=data_dir, **variant.changes)


def base_run(
    name: str, system: str, preset: str | Path | Preset, *, seed: int = 0, data_dir: str | Path | None = None
) -> Run:
    "The run of the row that a variant changes. ValueError for an unknown variant, with the valid names."
    return resolve(system, *check_variant(name).row, preset, seed=seed, data_dir=data_dir)


# %%
import pandas as pd

found = {name: (base_run(name, "shear_flow", "laptop"), variant_run(name, "shear_flow", "laptop")) for name in VARIANTS}
pd.DataFrame(
    {name: {"row": "-".join(a.row), "variant": "-".join(filter(None, (*b.row, b.tag)))} for name, (a, b) in found.items()}
).T.assign(changed=[VARIANTS[name].title for name in found])

# %%
assert all(a.hash != b.hash for a, b in found.values()), "each changes something"
assert found["circular"][1].encoder_config["padding_mode"] == "circular"
assert found["sigreg"][1] == resolve("shear_flow", "jepa_sigreg", "vit", "laptop"), "a row of its own"
try:
    variant_run("circle", "shear_flow", "laptop")
except ValueError as error:
    print(error)

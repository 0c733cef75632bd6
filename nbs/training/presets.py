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
# # Presets
# > Every number that a run needs, for three sizes of computer and two readings of The Well: smoke, laptop, gpu, paper, native.
#
# At the end you can read off what a preset simulates and trains, and where its data and runs live. A preset is data: notebooks and
# library read it, nothing else decides.

# %%
#| default_exp training.presets

# %%
#| export
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from physrep.data.generate import SimPreset
from physrep.training.loop import Recipe

# %%
import pytest


# %% [markdown]
# ## The pieces of a preset
#
# *Simulation*: a grid of parameter pairs, so many initial conditions of each in `train`, `valid` and `test`, and pairs off the grid, drawn
# continuously inside its range, in `unseen`. One time step and one resolution for all of them, so that no numerical error depends on the label.

# %% [markdown]
# *Clips*: how long an encoder looks (`frames`), at which grid, and where windows of a trajectory start. `size` is what The Well's native
# grids are resized to. *Training*: updates, windows per update, learning rate. *Probes*: how many windows of a trajectory are probed, and how long the attentive probe trains.

# %%
#| export
@dataclass(frozen=True)
class Numbers:
    "Everything a run needs to know about its size."

    name: str
    description: str  # one line for the reader
    sims: Mapping[str, SimPreset]
    encoders: Mapping[str, Mapping]  # encoder name -> its keyword arguments
    objectives: Mapping[str, Mapping]  # "objective-encoder", or "objective" for every encoder of it -> coefficients
    train: Mapping[str, Recipe]  # "objective-encoder", or "objective" for every encoder of it
    frames: int = 16  # frames of one clip
    size: int | None = None  # clips are resized to size x size on the device; None: as stored
    train_stride: int | None = 1  # frames between window starts in training; None: the paper's for the system
    probe_stride: int | None = 16  # in probing
    augment: bool = True  # exact symmetries of the system, in pretraining
    noise: float = 0.0  # std of noise on the (normalised) input
    probe_epochs: int = 20  # of the attentive probe
    probe_lr: float = 1e-3  # of the attentive probe
    probe_batch: int = 32
    finetune_epochs: int = 2  # 0: no fine-tuning
    finetune_accumulate: int = 1  # micro-batches of probe_batch, in fine-tuning
    # split -> trajectories per pair that are simulated again at twice the resolution
    refined: Mapping[str, int] = field(default_factory=dict)
    paper_labels: bool = False  # label transforms and constants of the paper
    seeds: tuple[int, ...] = (0,)
    systems: tuple[str, ...] = ("shear_flow", "rayleigh_benard", "active_matter")

    def probing(self) -> dict:
        "What decides how encoders are probed, JSON-able: it belongs to every score."
        frozen = {
            "stride": self.probe_stride,
            "epochs": self.probe_epochs,
            "lr": self.probe_lr,
            "batch_size": self.probe_batch,
        }
        return frozen | ({"finetune_epochs": self.finetune_epochs} if self.finetune_epochs else {})

    def scope(self) -> dict:
        """What else decides the numbers of a figure and is in no run's configuration, JSON-able: it belongs to every
        figure."""
        return {
            "seeds": list(self.seeds),
            "systems": list(self.systems),
            "refined": dict(self.refined),
            "paper_labels": self.paper_labels,
        }


# %% [markdown]
# *A preset* looks them up: what an objective on an encoder is trained with, what a system is simulated with.

# %%
#| export
@dataclass(frozen=True)
class Preset(Numbers):
    "The numbers of one size of computer or reading of The Well, and what is looked up in them."

    def recipe(self, objective: str, encoder: str) -> Recipe:
        """The training recipe for an objective on an encoder. An objective from outside the package (`module:Class`)
        that has none of its own takes that of `mae`. ValueError, with the recipes that there are, for any other."""
        for key in (f"{objective}-{encoder}", objective, *(["mae"] if ":" in objective else [])):
            if key in self.train:
                return self.train[key]
        raise ValueError(
            f"preset {self.name} has no training recipe for {objective}-{encoder}; it has {', '.join(self.train)}"
        )

    def coefficients(self, objective: str, encoder: str) -> Mapping:
        """The coefficients of an objective on an encoder; none where nothing is trained, or for an objective from
        outside
        the package, which has defaults of its own. ValueError, with the names that there are, for any other."""
        for key in (f"{objective}-{encoder}", objective):
            if key in self.objectives:
                return self.objectives[key]
        if ":" in objective or objective in ("random", "frozen"):
            return {}
        raise ValueError(
            f"preset {self.name} has no coefficients for {objective}-{encoder}; it has {', '.join(self.objectives)}"
        )

    def encoder_config(self, encoder: str) -> Mapping:
        "The keyword arguments of an encoder; none for one from outside the package. ValueError for an unknown one."
        if encoder in self.encoders:
            return self.encoders[encoder]
        if ":" in encoder:
            return {}
        raise ValueError(f"preset {self.name} has no encoder {encoder!r}; it has {', '.join(self.encoders)}")

    def sim(self, system: str) -> SimPreset:
        "What is simulated for a system; ValueError where the preset does not simulate it."
        if system not in self.sims:
            raise ValueError(
                f"preset {self.name} simulates {', '.join(self.sims) or 'nothing (it reads The Well)'}, not {system}"
            )
        return self.sims[system]


# %% [markdown]
# ## The three systems at laptop size
#
# All are stored at 32x32. Shear flow is solved at 64x64 with dt 0.025 (good up to Re 3200 and Re Sc 6400); below Re 400 it only relaminarises.
# Rayleigh-Benard convection is solved on 64 points by 40 nodes with dt 0.01 (good up to Ra 1e6, where single plumes are no longer predictable but their
# statistics are), active matter at 48x48 with dt 0.05 (its defects are resolved up to zeta 5). Solver notebooks show where these limits come from, and
# [05b_resolution](../05b_resolution.ipynb) what they cost.

# %%
#| export
_SHEAR_GRID = {"Reynolds": (400.0, 800.0, 1600.0, 3200.0), "Schmidt": (0.25, 0.5, 1.0, 2.0)}
_SHEAR = dict(grid_values=_SHEAR_GRID, grid=64, store_grid=32, frame_dt=0.2, dt=0.025)
_CONVECTION_GRID = {"Prandtl": (0.5, 1.0, 2.0, 4.0), "Rayleigh": (1e4, 31623.0, 1e5, 316228.0, 1e6)}
_CONVECTION = dict(grid_values=_CONVECTION_GRID, grid=(64, 40), store_grid=32, frame_dt=0.5, dt=0.01, box=(2.0, 1.0))
_MATTER_GRID = {"alpha": (-1.0, -2.0, -3.5, -5.0), "zeta": (1.0, 2.0, 3.5, 5.0)}
_MATTER = dict(grid_values=_MATTER_GRID, grid=48, store_grid=32, frame_dt=0.25, dt=0.05, box=(5.0, 5.0))


def _corners(numbers: dict) -> dict:
    "The same with the smallest and the largest value of each parameter only."
    return numbers | {
        "grid_values": {name: (min(values), max(values)) for name, values in numbers["grid_values"].items()}
    }


# %% [markdown]
# ## The five presets
#
# `smoke` shows in a few minutes that everything runs; its numbers mean nothing. `laptop` is what `make reproduce` runs. `gpu` is the paper's encoder on 128x128
# simulations. `paper` reads The Well as the paper does, `native` on its own grids.

# %%
#| export
_LAPTOP_ENCODERS = {
    "convnext": dict(
        widths=(48, 96),
        depths=(2, 2),
        stem_kernel=(4, 4, 4),
        stem_stride=(4, 4, 4),
        strides=((2, 1, 1),),
        kernel_size=7,
        init="fan_in",  # the paper's std of 0.02 would make a block 0.2 % of its stream at these widths
        layer_scale=0.1,  # 1e-6, as for long trainings, keeps the blocks shut for all of a short one
        stem_norm="none",  # a norm right after the stem hides the amplitude of every patch
    ),
    "vit": dict(dim=64, depth=4, heads=2, tubelet=(4, 4, 4), temperature=30.0),
}
_PREDICTOR = dict(predictor_scale=0.1)  # 1e-6, as for long trainings, keeps it shut for hundreds of updates
_DECODER = dict(decoder_width=64, decoder_depth=2)
_LAPTOP_OBJECTIVES = {
    "jepa": dict(invariance=2.0, variance=40.0, covariance=2.0, horizon=16, noise=0.1, **_PREDICTOR),
    "jepa_ema": dict(mask="tube", ratio=0.75, momentum=0.99, predictor_depth=2),
    "jepa_sigreg": dict(offset=16, sigreg=0.05, **_PREDICTOR),
    "mae": dict(ratio=0.75, patch=(4, 4, 4), **_DECODER),
    "forecast": dict(frames=8, patch=(4, 4, 4), **_DECODER),
    "invariance": dict(shown=0.5, invariance=25.0, variance=25.0, covariance=1.0, dims=(128, 128, 128)),
    "autoencoder": dict(**_DECODER),
    "supervised": dict(head="linear"),
}
_PAPER_ENCODERS = {"convnext": {}, "vit": dict(dim=384, depth=12, heads=6, tubelet=(2, 16, 16))}

# %% [markdown]
# Smoke: the same notebooks in as little time as they take. Two seeds, so that everything that compares seeds runs too.

# %%
#| export
_SMOKE = Preset(
    name="smoke",
    description="a few minutes; shows that everything runs, its numbers mean nothing",
    sims={
        system: SimPreset(
            **_corners(numbers), counts={"train": 4, "valid": 2, "test": 2}, unseen_pairs=2, unseen_count=2, n_frames=36
        )
        for system, numbers in (("shear_flow", _SHEAR), ("rayleigh_benard", _CONVECTION), ("active_matter", _MATTER))
    },
    encoders={
        "convnext": _LAPTOP_ENCODERS["convnext"] | dict(widths=(16, 32), depths=(1, 1)),
        "vit": _LAPTOP_ENCODERS["vit"] | dict(dim=32, depth=1, heads=2),
    },
    objectives=_LAPTOP_OBJECTIVES,
    train={name: Recipe(steps=6, batch_size=8, lr=1e-3, evaluations=2) for name in _LAPTOP_OBJECTIVES},
    probe_epochs=2,
    finetune_epochs=1,
    refined={"test": 1},
    seeds=(0, 1),
)

# %% [markdown]
# Laptop: the numbers of `make reproduce`. Every encoder is trained for about three minutes of one core, in many small updates: batches of 8 or 16 where the loss is a mean over tokens, of 64 pairs where it compares whole windows. Nothing is tuned for a system. The paper's coefficients of JEPA (2, 40, 2) are kept.

# %%
#| export
def _three_minutes(**numbers) -> Recipe:
    "A recipe of so many updates that it takes about three minutes of one core."
    return Recipe(warmup=0.02, weight_decay=0.05, evaluations=5, **numbers)


_LAPTOP = Preset(
    name="laptop",
    description="two cores, no GPU: what `make reproduce` runs",
    sims={
        system: SimPreset(
            **numbers, counts={"train": 16, "valid": 4, "test": 4}, unseen_pairs=24, unseen_count=2, n_frames=48
        )
        for system, numbers in (("shear_flow", _SHEAR), ("rayleigh_benard", _CONVECTION), ("active_matter", _MATTER))
    },
    encoders=_LAPTOP_ENCODERS,
    objectives=_LAPTOP_OBJECTIVES,
    train={
        "jepa-convnext": _three_minutes(steps=800, batch_size=16, lr=1e-3),
        "jepa": _three_minutes(steps=600, batch_size=16, lr=1e-3),
        "jepa_ema": _three_minutes(steps=1800, batch_size=16, lr=1e-3),
        "jepa_sigreg": _three_minutes(steps=500, batch_size=16, lr=1e-3),
        "mae": _three_minutes(steps=3600, batch_size=8, lr=2e-3),
        "forecast": _three_minutes(steps=2900, batch_size=8, lr=2e-3),
        "invariance": _three_minutes(steps=400, batch_size=64, lr=1e-3),
        "autoencoder": _three_minutes(steps=2300, batch_size=8, lr=2e-3),
        "supervised": _three_minutes(steps=1600, batch_size=16, lr=2e-3),
    },
    probe_epochs=12,
    probe_lr=5e-3,  # in so few epochs; 1e-3 needs about twice as many for the same error on valid
    # one epoch, on half as much data again, moved no error by more than 0.004, and cost as much as all other probes
    finetune_epochs=0,
    refined={"test": 1},
    seeds=(0,),
)

# %% [markdown]
# One GPU: the paper's encoder on larger simulations. Nobody has tuned or run it whole yet.

# %%
#| export
_GPU = Preset(
    name="gpu",
    description="one GPU: the paper's encoder on 128x128 simulations",
    sims={
        system: SimPreset(
            **numbers, counts={"train": 48, "valid": 6, "test": 6}, unseen_pairs=24, unseen_count=4, n_frames=48
        )
        for system, numbers in (
            (
                "shear_flow",
                _SHEAR
                | dict(
                    grid=128,
                    store_grid=128,
                    dt=0.00625,
                    grid_values=_SHEAR_GRID | {"Reynolds": (400.0, 800.0, 1600.0, 3200.0, 6400.0)},
                ),
            ),
            ("rayleigh_benard", _CONVECTION | dict(grid=(128, 128), store_grid=128, dt=0.0025)),
            ("active_matter", _MATTER | dict(grid=128, store_grid=128, dt=0.025)),
        )
    },
    encoders={"convnext": {}, "vit": dict(dim=384, depth=12, heads=6, tubelet=(2, 8, 8))},
    objectives={
        "jepa": dict(invariance=1.0, variance=25.0, covariance=1.0, chunks=1, horizon=4),  # not tuned at this size
        "jepa_sigreg": dict(offset=4),
        "mae": dict(ratio=0.75, patch=(2, 8, 8)),
        "invariance": dict(shown=0.5),
        **{name: {} for name in ("jepa_ema", "forecast", "autoencoder", "supervised")},
    },
    train={
        "jepa": Recipe(steps=1500, batch_size=16, lr=1e-3, precision="bfloat16"),
        "jepa_sigreg": Recipe(steps=1500, batch_size=16, lr=1e-3, precision="bfloat16"),
        "invariance": Recipe(steps=1500, batch_size=128, lr=1e-3, precision="bfloat16"),
        **{
            name: Recipe(steps=3000, batch_size=32, lr=1e-3, precision="bfloat16")
            for name in ("jepa_ema", "mae", "forecast", "autoencoder")
        },
        "supervised": Recipe(steps=1500, batch_size=32, lr=1e-3, precision="bfloat16"),
    },
)

# %% [markdown]
# The paper's configuration on The Well: 6 epochs of about 32k windows at 256 windows an update. Fields are normalised and get no noise; the paper adds noise of standard deviation 1 to raw ones.

# %%
#| export
_PAPER = Preset(
    name="paper",
    description="The Well in the paper's configuration: cropped, 224x224",
    sims={},
    encoders=_PAPER_ENCODERS,
    objectives={
        "jepa": dict(invariance=2.0, variance=40.0, covariance=2.0, chunks=5),
        "mae": dict(ratio=0.9, patch=(2, 16, 16)),
        "jepa_ema": dict(ratio=0.9),
        "invariance": dict(shown=0.25),  # its losses need many pairs at once
        **{name: {} for name in ("jepa_sigreg", "forecast", "autoencoder", "supervised")},
    },
    train={
        # 6 epochs of about 32k windows at 256 windows an update, and the paper's cosine
        name: Recipe(steps=750, batch_size=256, accumulate=k, lr=1e-4, precision="bfloat16", schedule="cosine")
        for name, k in {
            "jepa": 32,
            "jepa_ema": 16,
            "jepa_sigreg": 32,
            "mae": 8,
            "forecast": 16,
            "invariance": 4,
            "autoencoder": 16,
            "supervised": 16,
        }.items()
    },
    size=224,
    train_stride=None,
    probe_stride=None,
    augment=False,
    probe_epochs=100,
    finetune_accumulate=8,  # 32 clips at once would take 90 GB
    paper_labels=True,
)

# %% [markdown]
# The paper shows the encoder a crop of the shear flow and of the convecting layer, resized. A crop has no periodic boundary any more, so the same once more on the whole grids as they are stored (256x256, 256x512, 512x128): a window costs up to four times as much.

# %%
#| export
_NATIVE = replace(
    _PAPER,
    name="native",
    description="The Well on its native grids, otherwise as paper",
    size=None,
    encoders=_PAPER_ENCODERS | {"convnext": {"recompute": True}},  # 8 clips of 256x512 would take about 70 GB
)

# %%
#| export
PRESETS = {p.name: p for p in (_SMOKE, _LAPTOP, _GPU, _PAPER, _NATIVE)}


def get_preset(name: str | Path | Preset) -> Preset:
    """The preset of that name, or of that YAML file (`read_preset`); a preset is handed back as it is. ValueError, with
    the valid names, for an unknown one."""
    if isinstance(name, Preset):
        return name
    if str(name) in PRESETS:
        return PRESETS[str(name)]
    if str(name).endswith((".yaml", ".yml")):
        return read_preset(name)
    raise ValueError(f"unknown preset {str(name)!r}; valid: {', '.join(PRESETS)}, or the path of a .yaml file")


# %% [markdown]
# ### A preset of your own
#
# A preset is data, so a YAML file with the same fields is one, too. With `base` it takes over everything that it does not name from a preset of the library. It is called after its file, as are the folders of its data and runs.

# %%
#| export
def _text(kind: Any) -> str:
    "What a field of this annotation holds, in the words of YAML."
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        return " or ".join(map(_text, inner))
    if get_origin(kind) is tuple:
        return (
            f"a list of {_text(inner[0])}, not empty" if ... in inner else f"a list of {len(inner)} {_text(inner[0])}"
        )
    if get_origin(kind) is Mapping:
        return f"a mapping to {_text(inner[1])}"
    return {NoneType: "null", Mapping: "a mapping"}.get(kind, kind.__name__)


def _fits(value: object, kind: Any) -> bool:
    "Whether a value is what an annotation says. A list is a tuple, an int is a float; a bool is no number."
    inner = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_fits(value, one) for one in inner)
    if get_origin(kind) is tuple:
        size = max(1, len(value)) if isinstance(value, (list, tuple)) and ... in inner else len(inner)
        return isinstance(value, (list, tuple)) and len(value) == size and all(_fits(v, inner[0]) for v in value)
    if get_origin(kind) is Mapping:
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


def _built(cls: type, values: Mapping, where: str) -> Any:
    "An instance of a dataclass from a mapping; ValueError that names the place, and unknown, missing or wrong fields."
    known = get_type_hints(cls)
    names = ", ".join(name for name in known if name != "name")  # that of a preset is no field of its file
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping of {names}, got {values!r}")
    if unknown := sorted(str(name) for name in values if name not in known):
        raise ValueError(f"{where} has no field {', '.join(unknown)}; it has: {names}")
    for name, value in values.items():
        if not _fits(value, known[name]):
            hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) and "e" in value else ""
            raise ValueError(f"{where}: {name} must be {_text(known[name])}, got {value!r}{hint}")
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


# %%
#| export
_MAPPINGS = ("sims", "train", "encoders", "objectives")


def _given(path: Path) -> dict:
    "What a preset file holds; ValueError, with the file, for a name that is taken, or what is no preset."
    if path.stem in PRESETS:
        raise ValueError(
            f"{path} is called like a preset of the library, and would have its data and runs; call it something else"
        )
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML ({error})") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold a mapping with the fields of a preset, got {given!r:.60}")
    if "name" in given:
        raise ValueError(f"{path}: a preset is called after its file, {path.stem}; remove `name`, or rename the file")
    for name in _MAPPINGS:
        if not isinstance(given.get(name) or {}, Mapping):
            raise ValueError(f"{path}: {name} must be a mapping, got {given[name]!r:.60}")
    for name, value in given.items():
        smallest = "0 or more" if name in ("finetune_epochs", "noise") else "more than 0"
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and (value < 0 or (value == 0 and smallest == "more than 0")):
            raise ValueError(f"{path}: {name} must be {smallest}, got {value}")
    return given


def read_preset(path: str | Path) -> Preset:
    """The preset in a YAML file: the fields of `Preset`, with `sims` (system -> fields of `SimPreset`) and `train`
    (objective -> fields of `Recipe`). `base: laptop` takes over what the file does not name; entries of `sims`,
    `train`, `encoders` and `objectives` are merged one by one. The name is that of the file, as are the folders of its
    data and runs: no preset of the library may have it.

    Raises FileNotFoundError, or ValueError that names the file and the field that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no preset file {path}; valid names: {', '.join(PRESETS)}")
    given = _given(path)
    try:
        base = get_preset(given.pop("base")) if "base" in given else None
    except ValueError as error:
        raise ValueError(f"{path}: base: {error}") from error
    for name, cls in (("sims", SimPreset), ("train", Recipe)):
        if name in given:
            entries = given[name] or {}
            given[name] = {k: _built(cls, v, f"{path}: {name}.{k}") for k, v in entries.items()}
    for name in _MAPPINGS:
        if base or name in given:
            given[name] = {**(getattr(base, name) if base else {}), **(given.get(name) or {})}
    inherited = {f.name: getattr(base, f.name) for f in fields(Preset)} if base else {}
    about = {"name": path.stem, "description": f"from {path.name}"}
    return _built(Preset, {**inherited, **about, **given}, str(path))


# %%
import tempfile

folder = Path(tempfile.mkdtemp())
(folder / "longer.yaml").write_text("base: smoke\ntrain:\n  mae: {steps: 12, batch_size: 8, lr: 0.001}\nseeds: [0]\n")
longer = get_preset(folder / "longer.yaml")
longer.name, longer.recipe("mae", "vit").steps, longer.recipe("jepa", "convnext").steps, longer.seeds

# %%
assert longer.sims == PRESETS["smoke"].sims and get_preset(longer) is longer
for text, message in (
    ("base: smoke\nprobe_epoch: 3", "has no field probe_epoch; it has: description, "),
    ("base: smoke\ntrain: {mae: {steps: -1, lr: 0.1}}", "train.mae: steps, lr"),
    ("base: phone", "unknown preset 'phone'"),
    ("- smoke", "must hold a mapping"),
    ("probe_epochs: 3", "missing"),
    ("base: smoke\nname: x", "remove `name`, or rename the file"),
    ("base: smoke\nseeds: 3", "wrong.yaml: seeds must be a list of int, not empty, got 3"),
    ("base: smoke\nframes: 1.5", "frames must be int, got 1.5"),
    ("base: smoke\nprobe_lr: 1e-3", "probe_lr must be float, got '1e-3' .*write 1.0e-3"),
    ("base: smoke\ntrain: [mae]", "train must be a mapping"),
):
    (folder / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        get_preset(folder / "wrong.yaml")
(folder / "laptop.yaml").write_text("base: smoke")
with pytest.raises(ValueError, match="laptop.yaml is called like a preset of the library"):
    get_preset(folder / "laptop.yaml")

# %%
import pandas as pd

pd.set_option("display.max_colwidth", None)
pd.DataFrame(
    {
        p.name: {
            "for": p.description,
            "trajectories": sum(s.n_trajectories for s in p.sims.values()) or "The Well's",
            "grid": p.size or (p.sims["shear_flow"].store_grid if p.sims else "as stored"),
            "updates (JEPA)": p.train["jepa"].steps,
            "windows an update": p.train["jepa"].batch_size,
            "ConvNeXt": str(dict(p.encoders["convnext"]) or "the paper's"),
            "ViT": str(dict(p.encoders["vit"])),
        }
        for p in PRESETS.values()
    }
)

# %% [markdown]
# A name is looked up once. An unknown one raises an error that lists the valid ones.

# %%
laptop = get_preset("laptop")
assert laptop.sim("shear_flow").n_trajectories == 16 * (16 + 4 + 4) + 24 * 2
with pytest.raises(ValueError, match="valid: smoke, laptop, gpu, paper, native, or the path"):
    get_preset("desktop")
with pytest.raises(ValueError, match="simulates nothing"):
    get_preset("paper").sim("shear_flow")
with pytest.raises(ValueError, match="no training recipe for jeppa-vit"):
    laptop.recipe("jeppa", "vit")
with pytest.raises(ValueError, match="no coefficients for jeppa-vit"):
    laptop.coefficients("jeppa", "vit")
laptop.recipe("jepa", "convnext")

# %% [markdown]
# Two rules hold for every preset: JEPA compares two clips, so a trajectory must hold both; and no more than one trajectory starts from
# an initial condition, so the splits share none.

# %%
for p in PRESETS.values():
    for sim in p.sims.values():
        assert (
            sim.n_frames >= 2 * p.frames
            and (sim.grid if isinstance(sim.grid, int) else min(sim.grid)) >= sim.store_grid
            and round(sim.frame_dt / sim.dt) * sim.dt == pytest.approx(sim.frame_dt)
        )

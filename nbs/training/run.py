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
# # A run and its folder
# > From a few names to every number of a run: resolved once, at the door, and handed down as one object.
#
# At the end you can say in one line what is to be trained, read off every number that follows from it, and know where it will lie on disk.

# %%
#| default_exp training.run

# %%
#| export
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from physrep.core.paths import default_data_dir, project_root
from physrep.core.places import short_name
from physrep.core.randomness import seed_for
from physrep.data.generate import SOLVERS, SimPreset, make_dataset
from physrep.data.scaling import LabelScaler
from physrep.data.sets import find_files
from physrep.data.well import WellFile
from physrep.data.windows import Windows, check_disjoint
from physrep.models.encoders import build_encoder, encoder_module
from physrep.objectives.methods import build_objective, check_pair, objective_class, objective_module
from physrep.physics.systems import SYSTEMS, System, get_system
from physrep.training.loop import Recipe
from physrep.training.presets import Preset, get_preset


# %% [markdown]
# ## What a run is made of
#
# A run is fixed by names (system, objective, encoder, preset) and a few numbers. What is not given comes from the preset. Where the data lie and on which device it runs are not part of it.
#
# *Clips* say how much of a trajectory the encoder sees at once.

# %%
#| export
@dataclass(frozen=True)
class Clip:
    "What an encoder sees at once, and where windows start."

    frames: int
    size: int | None  # clips are resized to size x size; None: as they are stored
    stride: int  # frames between the starts of training windows
    augment: bool  # exact symmetries of the system, in pretraining
    noise: float  # std of noise on normalised fields, in pretraining


@dataclass(frozen=True)
class Stored:
    "Data that are read as they are, such as The Well's: the grid points `(h, w)` of their files."

    grid: tuple[int, int]


# %% [markdown]
# *A setup* holds all of it: the names, the numbers, and what follows from them, such as the shape of a clip.

# %%
#| export
@dataclass(frozen=True)
class Setup:
    "Everything that a run computes with, and what follows from it."

    system: System  # with the label transforms of the preset
    objective: str  # name in `objectives.methods`, or "my_package.module:Class"
    encoder: str  # name in `models.encoders`, or "my_package.module:make_encoder"
    preset: Preset
    seed: int
    tag: str  # marks a variant in the folder's name
    encoder_config: Mapping
    coefficients: Mapping  # of the objective
    recipe: Recipe | None  # None where nothing is trained
    clip: Clip
    data: SimPreset | Stored

    @property
    def simulated(self) -> bool:
        "Whether physrep makes the data."
        return isinstance(self.data, SimPreset)

    @property
    def crop(self) -> tuple | None:
        "The paper's crop of published grids `((x0, x1), (y0, y1))` where the preset resizes them, else None."
        return dict(self.system.paper).get("crop") if self.clip.size and not self.simulated else None

    @property
    def clip_shape(self) -> tuple[int, int, int]:
        "`(t, h, w)` of what the encoder sees."
        if self.clip.size:
            return (self.clip.frames, self.clip.size, self.clip.size)
        h, w = (self.data.store_grid,) * 2 if isinstance(self.data, SimPreset) else self.data.grid
        return (self.clip.frames, h, w)

    @cached_property
    def _asked(self) -> tuple[int, tuple]:
        objective = build(self)
        return objective.frames, tuple(getattr(objective, "views", ()))

    @property
    def window_frames(self) -> int:
        "Frames of a training window: a clip, or a clip and what is to be predicted of it."
        return self._asked[0]

    @property
    def views(self) -> tuple:
        "The `View`s of a sample that the objective asks for by themselves; none if it cuts them from one window."
        views = self._asked[1]
        return views if any(v.start is None or v.own_symmetry for v in views) else ()

    @property
    def modules(self) -> tuple[str, ...]:
        "The modules that a run depends on: the loop, its encoder, its objective, its solver."
        solver = [SOLVERS[self.system.name]] if self.simulated else []
        return ("training.pretrain", encoder_module(self.encoder), objective_module(self.objective), *solver)

    @property
    def entries(self) -> tuple[str, ...]:
        "The entries of tables (systems, solvers, objectives, encoders) that a run depends on."
        return (self.system.name, self.objective, self.encoder)


# %% [markdown]
# *A run* is a setup with a name. Its folder is named after its configuration, by a hash of everything but the seed. Two configurations never share a folder, and the seeds of one lie side by side.

# %%
#| export
@dataclass(frozen=True)
class Run(Setup):
    "One encoder that is trained and probed, every parameter resolved (by `resolve`), and where it lies."

    def as_dict(self) -> dict:
        "Everything that decides numbers, as JSON-able data: `config.json` of its folder."
        config = {
            "system": self.system.name,
            "objective": self.objective,
            "encoder": self.encoder,
            "preset": self.preset.name,
            "seed": self.seed,
            "tag": self.tag,
            "encoder_config": dict(self.encoder_config),
            "coefficients": dict(self.coefficients),
            "recipe": self.recipe.decisive() if self.recipe else {},
            "clip": asdict(self.clip),
            "data": asdict(self.data),
        }
        if self.system.name not in SYSTEMS:  # one of your own: what it is decides numbers, too
            config["definition"] = asdict(self.system)
        if self.preset.paper_labels:  # transforms and constants of the labels are the paper's
            config["paper_labels"] = {label.name: label.log for label in self.system.labels}
        return json.loads(json.dumps(config))

    @property
    def hash(self) -> str:
        "Eight hexadecimal digits that depend on everything but the seed."
        text = json.dumps({k: v for k, v in self.as_dict().items() if k != "seed"}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        "`<objective>-<encoder>[-tag]-<hash>`: all seeds of a configuration."
        return "-".join(filter(None, (*self.row, self.tag, self.hash)))

    @property
    def row(self) -> tuple[str, str]:
        "(objective, encoder) as they stand in results: of `my_package.module:Class` it is `Class`."
        return short_name(self.objective), short_name(self.encoder)

    @property
    def path(self) -> str:
        "`<name>/seed<k>`, as it stands in tables."
        return f"{self.name}/seed{self.seed}"

    def folder(self, run_dir: str | Path | None = None) -> Path:
        "`<run_dir>/<preset>/<system>/<name>/seed<k>`; `run_dir` defaults to `runs/` of the project."
        return system_folder(self.preset, self.system, run_dir) / self.path

    def with_seed(self, seed: int) -> "Run":
        return replace(self, seed=seed)


# %%
#| export
def system_folder(preset: Preset, system: System | str, run_dir: str | Path | None = None) -> Path:
    "`<run_dir>/<preset>/<system>`: all runs and baselines of a system."
    name = system if isinstance(system, str) else system.name
    return Path(run_dir or project_root() / "runs") / preset.name / name


def baseline_folder(name: str, system: System | str, preset: str | Preset, run_dir: str | Path | None = None) -> Path:
    "Where the result of a baseline (constant, statistics, equations) goes: it is no run, but a row of the table."
    return system_folder(get_preset(preset), system, run_dir) / name


# %% [markdown]
# ## Resolving names
#
# `resolve` checks every name and every value before any work starts.

# %%
#| export
def _recipe(preset: Preset, objective: str, encoder: str, changes: Mapping) -> Recipe | None:
    """The recipe of the preset with changes; None where nothing is trained. ValueError for unknown names and impossible
    values."""
    known = [f.name for f in fields(Recipe)]
    if unknown := sorted(set(changes) - set(known)):
        raise ValueError(f"recipe has no {', '.join(unknown)}; it has: {', '.join(sorted(known))}")
    if not objective_class(objective).trains:
        return None
    return replace(preset.recipe(objective, encoder), **changes)


def _stored(system: System, preset: Preset, data_dir: str | Path | None) -> Stored:
    "The grid of data that are read: The Well's, or that of the first training file."
    if system.native:
        return Stored(tuple(system.native))
    if data_dir is None:
        raise ValueError(
            f"preset {preset.name} does not simulate {system.name}: pass data_dir, the folder that holds "
            f"{system.name}/data/train/*.hdf5"
        )
    return Stored(tuple(WellFile(find_files(data_dir, system, "train")[0], system).grid))


# %%
#| export
def stride_of(system: System, stride: int | None, default: int = 1) -> int:
    "Frames between the starts of windows: what the preset says, or else the paper's for the system, or else `default`."
    return stride or dict(system.paper).get("stride", default)


def resolve(
    system: str | System,
    objective: str,
    encoder: str | None = None,  # default: the objective's
    preset: str | Path | Preset = "laptop",
    *,
    seed: int = 0,
    steps: int | None = None,  # updates; default: the preset's, as are the next two
    batch_size: int | None = None,
    lr: float | None = None,
    tag: str = "",  # marks a variant in the folder's name
    coefficients: Mapping | None = None,  # of the objective, over the preset's
    encoder_config: Mapping | None = None,  # of the encoder, over the preset's
    recipe: Mapping | None = None,  # of the training recipe, over the preset's
    data_dir: str | Path | None = None,  # only for a system whose grid nothing but its files can tell
) -> Run:
    """Every parameter of a run. Raises ValueError for unknown names and impossible values; the message lists the valid
    ones."""
    preset = get_preset(preset)
    encoder = check_pair(objective, encoder)
    if objective == "frozen" and ":" not in encoder:
        raise ValueError(
            f"objective frozen probes an encoder of your own: my_package.module:make_encoder, not {encoder!r}"
        )
    system = system if isinstance(system, System) else get_system(system)
    if preset.paper_labels:
        system = replace(system, labels=tuple(replace(label, log=label.paper_log) for label in system.labels))
    changes = {k: v for k, v in {"steps": steps, "batch_size": batch_size, "lr": lr}.items() if v is not None}
    if tag and not tag.replace("_", "").replace(".", "").isalnum():
        raise ValueError(f"tag may hold letters, digits, '.' and '_', got {tag!r}")
    return Run(
        system=system,
        objective=objective,
        encoder=encoder,
        preset=preset,
        seed=int(seed),
        tag=tag,
        encoder_config=_json({**preset.encoder_config(encoder), **(encoder_config or {})}),
        coefficients=_json({**preset.coefficients(objective, encoder), **(coefficients or {})}),
        recipe=_recipe(preset, objective, encoder, {**changes, **(recipe or {})}),
        clip=Clip(
            frames=preset.frames,
            size=preset.size if dict(system.paper).get("crop") else None,
            stride=stride_of(system, preset.train_stride),
            augment=preset.augment,
            noise=preset.noise,
        ),
        data=preset.sims.get(system.name) or _stored(system, preset, data_dir),
    )


# %%
#| export
def _json(value: Mapping) -> dict:
    "The same as JSON would give it back: what is kept in a file and what is computed with are one."
    return json.loads(json.dumps(value))


# %%
run = resolve("shear_flow", "mae", preset="smoke")
run.as_dict()

# %%
run.folder("runs"), run.clip_shape, run.modules

# %% [markdown]
# Wrong names and values fail here, and the message says what would be right.

# %%
for wrong in (
    dict(system="shear", objective="mae"),
    dict(system="shear_flow", objective="mea"),
    dict(system="shear_flow", objective="mae", preset="phone"),
    dict(system="shear_flow", objective="mae", encoder="resnet"),
    dict(system="shear_flow", objective="mae", lr=-1.0),
    dict(system="shear_flow", objective="mae", batch_size=0),
    dict(system="shear_flow", objective="mae", steps=-5),
    dict(system="acoustics", objective="mae"),
    dict(system="shear_flow", objective="mae", recipe={"lrr": 1}),
    dict(system="shear_flow", objective="mae", tag="a/b"),
):
    try:
        resolve(**wrong)
        raise AssertionError(f"{wrong} was accepted")
    except ValueError as error:
        print(error)

# %% [markdown]
# The seed has a folder of its own below the configuration's. Everything else makes another configuration.

# %%
other_lr = resolve("shear_flow", "mae", preset="smoke", lr=1e-4)
assert run.folder().parent == run.with_seed(1).folder().parent != other_lr.folder().parent
paper = resolve("shear_flow", "mae", preset="paper")
assert [label.log for label in paper.system.labels] == [True, False]
assert [label.log for label in run.system.labels] == [True, True]


# %% [markdown]
# ## Data of a run
#
# Simulated data are made if they are missing. Data of The Well, or your own, are read where they are.

# %%
#| export
def ensure_data(run: Run, data_dir: str | Path | None = None, **options) -> Path:
    """The folder of the data of a run: simulates what is missing (`options` go to `make_dataset`). Raises ValueError
    where
    nothing is simulated and no folder is given, NotADirectoryError for a path that is a file."""
    if data_dir is not None and Path(data_dir).is_file():
        raise NotADirectoryError(f"data_dir is the file {data_dir}; give the folder that holds {run.system.name}/data/")
    if not run.simulated:
        if data_dir is None:
            raise ValueError(
                f"preset {run.preset.name} does not simulate {run.system.name}: pass data_dir, the folder that holds "
                f"{run.system.name}/data/train/*.hdf5 (The Well's, or your own in its format)"
            )
        return Path(data_dir)
    folder = Path(data_dir or default_data_dir(run.preset.name))
    make_dataset(run.system.name, run.data, folder, **options)
    return folder


def load_splits(
    run: Run, data_dir: str | Path, splits: tuple[str, ...], *, frames: int, stride: int | None
) -> dict[str, Windows]:
    """Windows of these splits of a run's data. Raises ValueError if two of them share an initial condition, where the
    files record them, as ours do (`physrep.data.leakage` looks for twins in others)."""
    stride = stride_of(run.system, stride, default=frames)
    windows = {s: Windows(data_dir, run.system, s, frames=frames, stride=stride, crop=run.crop) for s in splits}
    check_disjoint(*windows.values())
    return windows


# %% [markdown]
# Targets are z-scored with the training labels. The presets that repeat the paper take its constants instead: they are facts about the published grids of parameters.

# %%
#| export
def label_scaler(run: Run, train: Windows) -> LabelScaler:
    """The scaling of a run's labels: fitted on the windows of `train`, with the paper's mean and std where the preset
    takes
    the paper's labels. ValueError for a label that does not vary."""
    scaler = LabelScaler.fit(run.system, train.labels, source=train.root)
    constants = dict(run.system.paper)
    if not run.preset.paper_labels or "label_mean" not in constants:
        return scaler
    mean = np.array(constants["label_mean"])
    std = np.array(constants["label_std"])
    low, high = ((end * scaler.std + scaler.mean - mean) / std for end in (scaler.low, scaler.high))
    return LabelScaler(run.system, mean, std, low, high)


# %% [markdown]
# ## A model
#
# The initialisation depends on (seed, encoder) alone: a trained encoder and the random one of the same seed start from the same weights.

# %%
#| export
def build(run: Run) -> torch.nn.Module:
    "The objective of a run around a new encoder. ValueError for coefficients or shapes that do not fit."
    with torch.random.fork_rng():
        torch.manual_seed(seed_for("encoder", run.encoder, run.seed))
        encoder = build_encoder(run.encoder, in_channels=run.system.n_channels, **run.encoder_config)
        torch.manual_seed(seed_for("objective", run.objective, run.seed))
        return build_objective(run.objective, encoder, system=run.system, shape=run.clip_shape, **run.coefficients)


# %%
objective = build(run)
same = build(resolve("shear_flow", "random", "vit", preset="smoke"))
assert all(
    torch.equal(a, b) for a, b in zip(objective.encoder.state_dict().values(), same.encoder.state_dict().values())
)
run.window_frames, resolve("shear_flow", "jepa", preset="smoke").window_frames

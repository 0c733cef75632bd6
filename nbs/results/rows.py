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
# # Rows
# > The rows of the table, each declared once, and rows of your own from a file.
#
# At the end you can add a row to Table 1, and say how it is named, drawn and ordered.

# %%
#| default_exp results.rows

# %%
#| export
import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from physrep.core.places import short_name, split_name
from physrep.data.sets import find_files
from physrep.models.encoders import ENCODERS
from physrep.objectives.methods import OBJECTIVES
from physrep.physics.oracle import has_oracle
from physrep.physics.systems import get_system
from physrep.training.presets import Preset, get_preset
from physrep.training.run import Run, resolve, system_folder


# %% [markdown]
# ## What is said of a row
#
# A row is an encoder that was trained with an objective, or a baseline without an encoder. Its line says everything
# that the workflow, the tables and the figures ask about it. `color` and `marker` have a default for rows that do not
# choose. The last five fields are for rows of your own: they change what the preset says.

# %%
#| export
@dataclass(frozen=True)
class Row:
    "One row of the table: what is trained, what it is called, how it is drawn."

    objective: str  # name in `objectives.methods`, "my_package.module:Class", "frozen", or a name for predictions
    encoder: str = "none"  # name in `models.encoders`, or "my_package.module:make_encoder"; none for a baseline
    title: str = ""  # default: names of objective and encoder
    color: str = "#882255"
    marker: str = "v"
    finetuned: bool = False  # whether the encoder is fine-tuned as well as probed
    cost: int = 0  # jobs of a higher class start first
    kind: str = "trained"  # trained, random, frozen (probed only), predictions (of a file), baseline
    tag: str = ""  # marks a variant in the names of its runs
    coefficients: dict = field(default_factory=dict, hash=False)  # of the objective, over the preset's
    encoder_config: dict = field(default_factory=dict, hash=False)  # of the encoder, over the preset's
    recipe: dict = field(default_factory=dict, hash=False)  # of the training recipe, over the preset's
    predictions: dict = field(default_factory=dict, hash=False)  # system -> CSV of `submissions.predictions_from_csv`
    main: bool = True  # whether `make reproduce` runs it without being asked

    @property
    def pair(self) -> tuple[str, str]:
        "(objective, encoder) as they stand in results: of `my_package.module:Class` it is `Class`."
        return short_name(self.objective), short_name(self.encoder)


# %%
Row("jepa", "vit", title="JEPA ViT").pair, Row("my_package.losses:Mine", "vit").pair

# %% [markdown]
# ## The rows of Table 1
#
# What is trained without labels, what is trained with them, and what is not trained at all. All self-supervised rows
# stand on the same small ViT, so that they differ in what is asked only; the paper's JEPA stands on its ConvNeXt as well.
# The other pairs of a method and a backbone are run when they are asked for (`ONLY=forecast-convnext`). Random
# weights are fine-tuned too: they show what the same labels teach without pretraining. Three baselines learn nothing or
# almost nothing: a ridge regression on summary statistics, the equations themselves
# ([physics.oracle](../physics/oracle.ipynb)), and a constant.
#
# `cost` is the class of a job. [08c_across_systems](../08c_across_systems.ipynb) waits for the two of class 4.

# %%
#| export
# fmt: off
ROWS: tuple[Row, ...] = (
    Row("jepa", "convnext", "JEPA ConvNeXt", "#0072B2", "s", finetuned=True, cost=4),
    Row("jepa", "vit", "JEPA ViT", "#0072B2", "o", cost=3),
    Row("jepa_ema", "vit", "masked JEPA ViT", "#56B4E9", "o", cost=3),
    Row("mae", "vit", "MAE ViT", "#D55E00", "o", finetuned=True, cost=3),
    Row("forecast", "vit", "forecast ViT", "#E69F00", "o", cost=3),
    Row("invariance", "vit", "invariance ViT", "#CC79A7", "o", cost=3),
    Row("supervised", "vit", "supervised ViT", "#009E73", "o", cost=3),
    Row("jepa_sigreg", "vit", "JEPA with SIGReg ViT", "#332288", "o", cost=2, main=False),
    Row("autoencoder", "vit", "autoencoder ViT", "#8C6D31", "o", cost=2, main=False),
    Row("jepa_ema", "convnext", "masked JEPA ConvNeXt", "#56B4E9", "s", cost=2, main=False),
    Row("jepa_sigreg", "convnext", "JEPA with SIGReg ConvNeXt", "#332288", "s", cost=2, main=False),
    Row("mae", "convnext", "MAE ConvNeXt", "#D55E00", "s", cost=2, main=False),
    Row("forecast", "convnext", "forecast ConvNeXt", "#E69F00", "s", cost=2, main=False),
    Row("invariance", "convnext", "invariance ConvNeXt", "#CC79A7", "s", cost=2, main=False),
    Row("autoencoder", "convnext", "autoencoder ConvNeXt", "#8C6D31", "s", cost=2, main=False),
    Row("supervised", "convnext", "supervised ConvNeXt", "#009E73", "s", cost=2, main=False),
    Row("random", "convnext", "random weights ConvNeXt", "#7A7A7A", "s", finetuned=True, cost=4, kind="random"),
    Row("random", "vit", "random weights ViT", "#7A7A7A", "o", finetuned=True, kind="random"),
    Row("statistics", "none", "summary statistics", "#6A3D9A", "D", kind="baseline"),
    Row("equations", "none", "equation oracle", "#7F4A2E", "D", kind="baseline"),
    Row("constant", "none", "constant", "#000000", "D", kind="baseline"),
)
# fmt: on

# %%
#| export
def row_name(row: Row) -> str:
    "A row in names of jobs and files, e.g. `mae-vit`."
    return "-".join(filter(None, (*(part.rpartition(":")[2] for part in row.pair), row.tag)))


def chosen_rows(only: str = "", rows: Sequence[Row] = ROWS) -> tuple[Row, ...]:
    """The rows named in `only`, comma-separated (`mae-vit,random-vit`), and the baselines; the main rows if it is
    empty, every one for `all`. ValueError for an unknown name, with the valid ones."""
    if not only:
        return tuple(row for row in rows if row.main)
    if only == "all":
        return tuple(rows)
    names = only.split(",")
    valid = [row_name(row) for row in rows if row.kind != "baseline"]
    if unknown := [name for name in names if name not in valid]:
        raise ValueError(f"unknown row {', '.join(unknown)}; valid: all, {', '.join(valid)}")
    return tuple(row for row in rows if row.kind == "baseline" or row_name(row) in names)


def references_of(rows: Sequence[Row]) -> list[str]:
    """The objectives that other rows can be compared with: random weights, if a row of the same backbone is there, and
    summary statistics."""
    random = {row.pair[1] for row in rows if row.kind == "random"}
    found = ["random"] if any(row.kind != "random" and row.pair[1] in random for row in rows) else []
    return found + ["statistics"] * any(row.objective == "statistics" for row in rows)


# %%
few = ("mae-vit,random-vit", "mae-vit,random-convnext")
pd.DataFrame([{"only": only, "references": references_of(chosen_rows(only))} for only in few])

# %%
shown = ["title", "color", "marker", "finetuned", "cost", "kind"]
pd.DataFrame([{name: getattr(row, name) for name in shown} for row in ROWS])

# %%
assert len({row.pair for row in ROWS}) == len(ROWS)
assert [row.kind for row in chosen_rows()] == 7 * ["trained"] + 2 * ["random"] + 3 * ["baseline"]
assert {row.encoder for row in ROWS if row.objective == "forecast"} == {"vit", "convnext"}
assert {row.objective for row in ROWS if row.finetuned} == {"jepa", "mae", "random"}
assert [row_name(row) for row in chosen_rows("mae-vit,random-vit")][:2] == ["mae-vit", "random-vit"]
assert references_of(ROWS) == ["random", "statistics"] and references_of(chosen_rows("mae-vit")) == ["statistics"]

# %% [markdown]
# ## Names
#
# A row has one title. A backbone or a probe has a title as well, for axes and panels.

# %%
#| export
ENCODER_TITLES = {"convnext": "ConvNeXt", "vit": "ViT", "none": ""}
PROBE_TITLES = {
    "linear": "linear",
    "knn": "kNN",
    "attentive": "attentive",
    "head": "own head",
    "finetune": "fine-tuned",
    "oracle": "least squares",
    "constant": "constant",
}


def _find(objective: str | None, encoder: str | None, rows: Sequence[Row]) -> Row | None:
    "The first row with that objective and encoder; None stands for any."
    for row in rows:
        if objective in (None, row.objective, row.pair[0]) and encoder in (None, row.encoder, row.pair[1]):
            return row
    return None


def _word(name: str, rows: Sequence[Row]) -> str:
    "The title of an objective, an encoder or a probe; of `my_package.module:Class` it is `Class`."
    if name in ENCODER_TITLES:
        return ENCODER_TITLES[name]
    if row := _find(name, None, rows):
        return row.title.removesuffix(f" {_word(row.encoder, ())}") or _word(row.objective, ())
    return PROBE_TITLES.get(name, name.split(":")[-1])


def title_of(*names: str, rows: Sequence[Row] = ROWS) -> str:
    "The title of a row, `title_of('jepa', 'convnext')`, or else the titles of these names, each once."
    row = _find(*names, rows) if len(names) == 2 else None
    if row and row.title:
        return row.title
    return " ".join(word for word in dict.fromkeys(_word(name, rows) for name in names) if word)


# %%
[
    title_of("jepa", "convnext"),
    title_of("random"),
    title_of("jepa", "vit"),
    title_of("knn"),
    title_of("a.b:Mine", "vit"),
]

# %%
assert [title_of(*row.pair) for row in ROWS] == [row.title for row in ROWS]
assert title_of("jepa") == "JEPA" and title_of("mae", "convnext") == "MAE ConvNeXt" and title_of("vit") == "ViT"
assert title_of("statistics") == "summary statistics" and title_of("own", "own") == "own"
assert title_of("frozen", "x:y", rows=[Row("frozen", "x:y", "DINO base")]) == "DINO base"


# %% [markdown]
# ## Colours and markers
#
# An objective has one colour and a backbone has one marker. A row of your own may choose both.

# %%
#| export
def color_of(objective: str, encoder: str | None = None, rows: Sequence[Row] = ROWS) -> str:
    "Colour of a row, or else of the first row with its objective; a neutral one if there is none."
    row = _find(objective, encoder, rows) or _find(objective, None, rows) or Row(objective)
    return row.color


def marker_of(encoder: str, objective: str | None = None, rows: Sequence[Row] = ROWS) -> str:
    "Marker of a row, or else of the first row with its backbone; a triangle that points down if there is none."
    row = _find(objective, encoder, rows) or _find(None, encoder, rows) or Row("")
    return row.marker


# %%
own = (*ROWS, Row("frozen", "x:y", "DINO base", color="#E69F00", marker="^"))
[color_of("mae"), color_of("frozen"), color_of("frozen", "x:y", own), marker_of("vit"), marker_of("x:y", "frozen", own)]

# %%
assert all(color_of(*row.pair) == row.color and marker_of(row.encoder, row.objective) == row.marker for row in ROWS)
assert color_of("mae", "convnext") == color_of("mae") and color_of("frozen", "x:y", own) == "#E69F00"
assert color_of("unknown") == "#882255" and marker_of("unknown") == "v"

# %% [markdown]
# ## A fixed order
#
# Tables and figures show rows in one order, whatever is measured next. Unknown rows follow the known ones by alphabet,
# and baselines come last.

# %%
#| export
PROBE_ORDER = tuple(PROBE_TITLES)
SPLIT_ORDER = ("valid", "test", "unseen")


def ordered(names: Sequence[str], order: Sequence[str]) -> list[str]:
    "The different names, those in `order` first and in its order, then the others by alphabet."
    return sorted(set(names), key=lambda name: (order.index(name) if name in order else len(order), name))


def row_order(measured: pd.DataFrame | Sequence[Any], rows: Sequence[Row] = ROWS) -> list[tuple[str, str]]:
    "The different (objective, encoder) of a table, or of what has the two as attributes, in the order of `rows`."
    if isinstance(measured, pd.DataFrame):
        pairs = set(zip(measured.objective, measured.encoder))
    else:
        pairs = {(m.objective, m.encoder) for m in measured}
    place = {}
    for i, row in enumerate(rows):
        for pair in (row.pair, (row.objective, row.encoder)):
            place.setdefault(pair, (row.kind == "baseline", i))
    return sorted(pairs, key=lambda pair: (*place.get(pair, (False, len(rows))), pair))


# %%
row_order([ROWS[-1], ROWS[2], Row("mine", "vit"), ROWS[0], Row("jepa", "vit")])

# %%
assert row_order(ROWS[::-1]) == [row.pair for row in ROWS]
encoded = [row.pair for row in ROWS if row.kind != "baseline"]
assert row_order([*ROWS, Row("yours", "vit"), Row("mine", "vit")])[: len(encoded) + 2] == [
    *encoded,
    ("mine", "vit"),
    ("yours", "vit"),
]
assert row_order(own, own)[len(encoded)] == ("frozen", "x:y")
assert row_order([Row("frozen", "y"), ROWS[-1]], own)[0] == ("frozen", "y")
assert ordered(["own", "knn", "another", "linear", "knn"], PROBE_ORDER) == ["linear", "knn", "another", "own"]

# %% [markdown]
# ## Rows of your own
#
# A file `rows.yaml` lists rows that this repository does not have. A row names an objective and an encoder, of physrep
# or of your own package, and may change what the preset says about them. Two more kinds need no training:
#
# - objective `frozen`: the encoder is only probed, as for a foundation model;
# - `predictions`: a CSV for each system, as [results.submissions](submissions.ipynb) describes.

# %%
#| export
_CHANGES = ("coefficients", "encoder_config", "recipe", "predictions")
_FIELDS = ("objective", "encoder", "title", "color", "marker", "finetuned", "cost", "kind", "tag", *_CHANGES)
_KINDS = ("trained", "random", "frozen", "predictions")


def _check_look(entry: Mapping) -> None:
    "ValueError for a colour or marker that matplotlib does not have."
    from matplotlib.colors import is_color_like
    from matplotlib.lines import Line2D

    if "color" in entry and not is_color_like(entry["color"]):
        raise ValueError(f"color {entry['color']!r} is none; write for example '#E69F00'")
    if "marker" in entry and entry["marker"] not in Line2D.markers:
        raise ValueError(f"marker {entry['marker']!r} is none of matplotlib's; write for example '^'")


def _kind_of(entry: Mapping) -> str:
    "The kind of a user's row, as it says or as its fields tell; ValueError if it says what its fields do not fit."
    natural = "predictions" if entry.get("predictions") else str(entry["objective"])
    kind = natural if natural in _KINDS else "trained"
    if entry.get("kind", kind) != kind:
        raise ValueError(f"kind is {entry['kind']!r}; with this objective it is {kind!r}, and may be left out")
    return kind


# %%
#| export
def _row_from(entry: object, folder: Path) -> Row:
    "A user's row; ValueError for fields that are unknown, missing, or of another type."
    if not isinstance(entry, dict):
        raise ValueError(f"a row is a mapping of fields, got {entry!r}")
    if unknown := [str(name) for name in entry if name not in _FIELDS]:
        raise ValueError(f"unknown field {', '.join(unknown)}; valid: {', '.join(_FIELDS)}")
    for name, value in entry.items():
        usual = dict if name in _CHANGES else type(getattr(Row(""), name))
        if not isinstance(value, usual) or (usual is int and isinstance(value, bool)):
            raise ValueError(f"{name} must be {'a mapping' if usual is dict else usual.__name__}, got {value!r}")
    needed = ("objective",) if "predictions" in entry else ("objective", "encoder")
    if missing := [name for name in needed if not entry.get(name)]:
        raise ValueError(f"{' and '.join(missing)} missing; a row has an objective and an encoder")
    kind = _kind_of(entry)
    _check_look(entry)
    if kind == "predictions":
        if not re.fullmatch(r"[\w.]+", entry["objective"]) or entry["objective"] in OBJECTIVES:
            raise ValueError(
                f"objective names the predictions: letters, digits, '.' and '_', got {entry['objective']!r}"
            )
        files = {system: str(folder / path) for system, path in entry["predictions"].items()}
        return Row(**entry | {"kind": kind, "predictions": files})
    if kind == "frozen" and entry.get("finetuned"):
        raise ValueError("finetuned is true, but an encoder of objective frozen is only probed: leave finetuned out")
    if kind != "frozen":
        split_name(entry["objective"], OBJECTIVES, "objective")
    split_name(entry["encoder"], ENCODERS, "encoder")
    return Row(**entry | {"kind": kind})


def read_rows(path: str | Path) -> tuple[Row, ...]:
    """The rows of a user's `rows.yaml`: a list `rows` of mappings with the fields of `Row`.

    ValueError that names file and row: for unknown fields and names, with the valid ones, and for an objective and
    encoder that another row has, here or in the table. FileNotFoundError if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; it holds `rows:`, a list of rows with objective and encoder")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict) or list(content) != ["rows"] or not isinstance(content["rows"], list):
        raise ValueError(f"{path} must hold `rows:` and nothing else, a list of rows with objective and encoder")
    found: list[Row] = []
    for i, entry in enumerate(content["rows"], 1):
        try:
            row = _row_from(entry, path.absolute().parent)
            if row.pair in [other.pair for other in (*ROWS, *found)]:
                raise ValueError(f"there is a row {'-'.join(row.pair)} already; a table cannot tell the two apart")
        except ValueError as error:
            raise ValueError(f"{path}, row {i}: {error}") from None
        found.append(row)
    return tuple(found)


# %%
import tempfile

folder = Path(tempfile.mkdtemp())
example = """
rows:
  - objective: jepa
    encoder: vit
    title: JEPA ViT
    coefficients: {horizon: 2}
  - objective: frozen
    encoder: my_package.dino:make_encoder
    color: "#E69F00"
  - objective: rivals
    title: predictions of a rival
    predictions: {shear_flow: rivals.csv}
"""
(folder / "rows.yaml").write_text(example)
mine = read_rows(folder / "rows.yaml")
pd.DataFrame([{name: getattr(row, name) for name in ("pair", "title", "kind", "color")} for row in mine])

# %%
import pytest

assert [row.kind for row in mine] == ["trained", "frozen", "predictions"] and mine[0].coefficients == {"horizon": 2}
assert mine[2].predictions == {"shear_flow": str(folder / "rivals.csv")} and mine[2].encoder == "none"
for text, message in {
    "rows: [{objective: jepa, encoder: vit, colour: red}]": "wrong.yaml, row 1: unknown field colour; valid: objective",
    "rows: [{objective: jepa}]": "row 1: encoder missing",
    "rows: [{objective: jepb, encoder: vit}]": "row 1: unknown objective 'jepb'; valid: jepa, .*or .my_package",
    "rows: [{objective: mae, encoder: vit}]": "row 1: there is a row mae-vit already",
    "rows: [{objective: frozen, encoder: 'm:e', finetuned: true}]": "frozen is only probed: leave finetuned out",
}.items():
    (folder / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(folder / "wrong.yaml")


# %% [markdown]
# ## All rows of a preset
#
# A table is made of the runs that the preset describes, of nothing else that may lie in the folder.

# %%
#| export
def systems_of(preset: Preset, data_dir: str | Path) -> tuple[str, ...]:
    """The systems of a preset that simulates; else those that have data in the folder. FileNotFoundError if there are
    none."""
    if preset.sims:
        return preset.systems
    there = []
    for system in preset.systems:
        with contextlib.suppress(FileNotFoundError):
            find_files(data_dir, system, "train")
            there.append(system)
    if not there:
        example = f"{preset.systems[0]}/data/train/*.hdf5"
        names = ", ".join(preset.systems)
        raise FileNotFoundError(
            f"preset {preset.name} reads The Well, but {data_dir} holds none of {names}; "
            f"pass DATA=<folder> (it holds e.g. {example})"
        )
    return tuple(there)


def run_of(
    row: Row, system: str, preset: str | Path | Preset, seed: int = 0, data_dir: str | Path | None = None
) -> Run:
    "The run of a row with an encoder; ValueError for a baseline or predictions, which have none, and as `resolve`."
    if row.kind in ("baseline", "predictions"):
        raise ValueError(f"row {row.objective} has no run: it is of kind {row.kind}")
    changes = {name: getattr(row, name) for name in ("coefficients", "encoder_config", "recipe") if getattr(row, name)}
    return resolve(system, row.objective, row.encoder, preset, seed=seed, tag=row.tag, data_dir=data_dir, **changes)


# %%
#| export
def _folders_of(
    row: Row, system: str, preset: Preset, run_dir: str | Path | None, data_dir: str | Path | None
) -> list[Path]:
    "The folders of a row's results for a system: one a seed, or a single one for a row without a run."
    named = get_system(system)  # of my_package.module:SYSTEM, too, folders have the name
    if row.kind == "predictions" and named.name not in row.predictions:
        return []
    if row.objective == "equations" and not has_oracle(named):
        return []
    if row.kind in ("baseline", "predictions"):
        return [system_folder(preset, named, run_dir) / row.objective]
    return [run_of(row, system, preset, seed, data_dir).folder(run_dir) for seed in preset.seeds]


def row_folders(
    preset: str | Path | Preset,
    run_dir: str | Path | None = None,
    systems: Sequence[str] | None = None,  # names, or my_package.module:SYSTEM; default: those of the preset
    rows: Sequence[Row] = ROWS,
    data_dir: str | Path | None = None,  # as in `resolve`
) -> list[Path]:
    "The folders of all rows of a preset's table; FileNotFoundError that lists those that have no result."
    chosen = get_preset(preset)
    folders = []
    for system in systems or chosen.systems:
        for row in rows:
            folders += _folders_of(row, system, chosen, run_dir, data_dir)
    if missing := [f for f in folders if not (f / "result.json").is_file()]:
        names = ", ".join(f"{f.parent.name}/{f.name}" for f in missing)
        raise FileNotFoundError(f"no results yet of {names}; `make reproduce PRESET={chosen.name}` makes them")
    return folders


# %%
for system in ("shear_flow", "active_matter"):
    for row in ROWS:
        for where in _folders_of(row, system, get_preset("smoke"), folder, None):
            where.mkdir(parents=True)
            (where / "result.json").touch()
[str(f.relative_to(folder)) for f in row_folders("smoke", folder, ["shear_flow"])][:3]

# %%
assert len(row_folders("smoke", folder, ["shear_flow", "active_matter"])) == 2 * (6 * 2 + 3)
with pytest.raises(FileNotFoundError, match="no results yet of jepa-convnext-.*, rayleigh_benard/constant"):
    row_folders("smoke", folder)
with pytest.raises(
    FileNotFoundError, match="no results yet of jepa-vit-.*/seed0, jepa-vit-.*/seed1, shear_flow/rivals"
):
    row_folders("smoke", folder, ["shear_flow"], (*ROWS, mine[0], mine[2]))

"""A preset by row and system, and of a file: what it takes over, and every mistake with the file and the field."""

from dataclasses import replace
from pathlib import Path

import pytest

from physrep.results.rows import ROWS
from physrep.training.cost import cost
from physrep.training.loop import Recipe
from physrep.training.presets import PRESETS, TFLOP, Preset, read_preset
from physrep.training.run import resolve

SYSTEMS = ("shear_flow", "rayleigh_benard", "active_matter")


def preset(folder: Path, text: str, name: str = "mine") -> Preset:
    (folder / f"{name}.yaml").write_text(text)
    return read_preset(folder / f"{name}.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_that_changes_nothing_is_its_base(tmp_path, name):
    same, base = preset(tmp_path, f"base: {name}\n"), PRESETS[name]
    kept = ("sims", "encoders", "seeds", "systems", "frames", "size", "paper_labels")
    assert same.name == "mine" and same.probing() == base.probing()
    assert all(getattr(same, field) == getattr(base, field) for field in kept)
    for row in (("mae", "vit"), ("jepa", "convnext"), ("supervised", "convnext")):
        for system in SYSTEMS:
            assert same.recipe(*row, system) == base.recipe(*row, system)
            assert same.coefficients(*row, system) == base.coefficients(*row, system)


def test_the_most_specific_name_counts():
    "A row before its method, and a system of either before the name alone."
    recipe = {k: Recipe(steps=k, lr=1e-3) for k in range(1, 6)}
    names = ("mae", "mae@shear_flow", "mae-vit", "mae-vit@shear_flow", "mae.near-vit")
    mine = replace(PRESETS["smoke"], train=dict(zip(names, recipe.values())))
    for (encoder, system, tag), steps in {
        ("convnext", "active_matter", ""): 1,
        ("convnext", "shear_flow", ""): 2,
        ("vit", "active_matter", ""): 3,
        ("vit", "shear_flow", ""): 4,
        ("vit", "active_matter", "far"): 3,
        ("vit", "shear_flow", "near"): 5,
    }.items():
        assert mine.recipe("mae", encoder, system, tag).steps == steps
        assert resolve(system, "mae", encoder, mine, tag=tag).recipe.steps == steps
        assert resolve(system, "mae", encoder, mine, tag=tag, length=16).recipe.steps == 16 * steps
    assert mine.recipe("my:Own", "vit", "shear_flow").steps == 2, "that of mae for one from outside"
    rates = {resolve(s, "jepa", "convnext", "paper").recipe.lr for s in ("active_matter", "shear_flow")}
    assert rates == {1e-4}, "one rule for all rows"


@pytest.mark.parametrize(
    "entry, changed",
    [
        ("mae", {(e, s) for e in ("vit", "convnext") for s in SYSTEMS}),
        ("mae@shear_flow", {("vit", "shear_flow"), ("convnext", "shear_flow")}),
        ("mae-vit", {("vit", s) for s in SYSTEMS}),
        ("mae-vit@active_matter", {("vit", "active_matter")}),
    ],
)
def test_an_entry_of_a_file_replaces_all_of_the_base_that_its_name_covers(tmp_path, entry, changed):
    "Preset laptop holds mae, mae-vit and mae-vit@active_matter."
    text = "base: laptop\nlength: 1\n"
    text += f"train: {{{entry}: {{steps: 5, lr: 1.0e-3}}}}\nobjectives: {{{entry}: {{ratio: 0.25}}}}\n"
    mine, base = preset(tmp_path, text), PRESETS["laptop"]
    for row in ((encoder, system) for encoder in ("vit", "convnext") for system in SYSTEMS):
        found = mine.recipe("mae", *row).steps == 5, mine.coefficients("mae", *row) == {"ratio": 0.25}
        assert found == (row in changed, row in changed), row
        if row not in changed:
            assert mine.recipe("mae", *row) == base.recipe("mae", *row)
    assert mine.recipe("jepa", "convnext", "shear_flow") == base.recipe("jepa", "convnext", "shear_flow")


def test_entries_are_merged_and_lists_become_tuples(tmp_path):
    text = "base: smoke\nseeds: [3]\nsystems: [shear_flow]\nencoders: {vit: {dim: 8}}\nsize: null\n"
    mine = preset(tmp_path, text + "train: {mae: {steps: 2, lr: 1, betas: [0.9, 0.9]}}")
    assert mine.seeds == (3,) and mine.systems == ("shear_flow",) and mine.size is None
    assert mine.recipe("mae", "vit").betas == (0.9, 0.9) and mine.recipe("jepa") == PRESETS["smoke"].recipe("jepa")
    assert mine.encoders == {**PRESETS["smoke"].encoders, "vit": {"dim": 8}}


def test_a_base_may_be_a_file_beside_it_or_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "first.yaml").write_text("base: smoke\nframes: 8\ntrain: {mae: {steps: 2, lr: 1}}\n")
    mine = preset(tmp_path, "base: first.yaml\n")
    assert mine.frames == 8 and mine.recipe("mae", "vit").steps == 2
    monkeypatch.chdir(tmp_path.parent)
    assert preset(tmp_path, f"base: {tmp_path.name}/first.yaml\n").frames == 8


SIM = "{ranges: {Re: [4.0, 5.0]}, grid: 8, store_grid: 8, n_frames: 4, frame_dt: 0.1, dt: 0.1, draws: {train: [2, 1]}}"


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "is not YAML"),
        ("tuned: {mae-vit: {recipe: {lr: 0.1}}}", "Write the recipe of a row under train, as mae-vit, or as mae-vit@"),
        ("seeds: []", "seeds must be tuple"),
        ("seeds: [true]", "seeds must be tuple"),
        ("seeds: [1, 1]", "seeds must be different numbers from 0"),
        ("systems: [shear]", "unknown system shear; valid: "),
        ("train: 5", "train must be .*, got 5"),
        ("encoders: {vitt: {dim: 32}}", "unknown encoder vitt; valid: convnext"),
        ("probe_epochs: true", "probe_epochs must be int, got True"),
        ("noise: .nan", "noise must be float, got nan"),
        ("train: {mae: 3}", "train.mae must be a mapping of steps, lr"),
        ("train: {mae: {steps: 2.5, lr: 0.1}}", "train.mae: steps must be int, got 2.5"),
        ("train: {mae: {steps: 2, lr: 0.1, betas: 3}}", "train.mae: betas must be tuple.float, float., got 3"),
        ("train: {mae: {steps: 2, lr: 0.1, warmup: 1.5}}", "train.mae: warmup must be int, got 1.5"),
        ("train: {jeppa: {steps: 5, lr: 1.0e-4}}", "unknown method jeppa; valid: jepa"),
        ("objectives: {mae@shear: {ratio: 0.5}}", "unknown system shear"),
        ("train: {mae-vti: {steps: 5, lr: 1.0e-4}}", "unknown encoder vti"),
        (f"sims: {{shear-flow: {SIM}}}", "unknown simulation shear-flow; valid: active_matter"),
        ("sims: {shear_flow: {grid: wide}}", "sims.shear_flow: grid must be int . tuple.int, int., got 'wide'"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_and_field(tmp_path, line, message):
    with pytest.raises(ValueError, match=f"mine.yaml.*{message}"):
        preset(tmp_path, line if line.startswith(("base", "{")) else f"base: smoke\n{line}\n")


def test_a_name_of_the_library_is_taken(tmp_path):
    with pytest.raises(ValueError, match="laptop.yaml: data and runs are kept under the name of the preset"):
        preset(tmp_path, "base: smoke\n", "laptop")


@pytest.mark.long
def test_length_1_takes_ten_tflop_in_every_row_and_system():
    for row in (row for row in ROWS if row.kind == "trained"):
        for system in SYSTEMS:
            options = dict(tag=row.tag, encoder_config=row.encoder_config, length=1.0)
            total = cost(resolve(system, row.objective, row.encoder, "laptop", **options))["total"]
            assert total == pytest.approx(TFLOP * 1e12, rel=0.02), (row.name, system)

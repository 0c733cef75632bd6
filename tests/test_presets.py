"""A preset of a file: what it takes over, what it is called, and every mistake with the file and the field."""

from dataclasses import replace
from pathlib import Path

import pytest

from physrep.experiments.table1 import row_in
from physrep.results.rows import ROWS, run_of
from physrep.training import run
from physrep.training.loop import Recipe
from physrep.training.presets import PRESETS, read_preset
from physrep.training.run import resolve


def preset(folder: Path, text: str, name: str = "mine"):
    (folder / f"{name}.yaml").write_text(text)
    return read_preset(folder / f"{name}.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_of_the_library_hold_what_their_annotations_say(tmp_path, name):
    "A file that changes nothing is checked as a whole, and is the same but for its name."
    same = preset(tmp_path, f"base: {name}\n")
    assert same.probing() == PRESETS[name].probing() and same.scope() == PRESETS[name].scope()
    assert same.sims == PRESETS[name].sims and same.train == PRESETS[name].train and same.name == "mine"


def test_entries_are_merged_and_lists_become_tuples(tmp_path):
    text = (
        "base: smoke\nseeds: [3]\nsystems: [shear_flow]\ntrain: {mae: {steps: 2, lr: 1, betas: [0.9, 0.9]}}\nsize: null"
    )
    mine = preset(tmp_path, text)
    assert mine.seeds == (3,) and mine.systems == ("shear_flow",) and mine.size is None
    assert mine.recipe("mae", "vit").betas == (0.9, 0.9) and mine.train["jepa"] == PRESETS["smoke"].train["jepa"]


@pytest.mark.parametrize("name", PRESETS)
def test_a_name_of_the_library_is_taken(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name}.yaml is called like a preset of the library"):
        preset(tmp_path, "base: smoke\n", name)


def test_a_file_gives_no_name(tmp_path):
    for name in ("mine", "other"):
        with pytest.raises(ValueError, match="mine.yaml: a preset is called after its file, mine; remove `name`"):
            preset(tmp_path, f"base: smoke\nname: {name}\n")


@pytest.mark.parametrize(
    "line, message",
    [
        ("seeds: 3", "seeds must be a list of int, not empty, got 3"),
        ("seeds: []", "seeds must be a list of int, not empty"),
        ("seeds: [a]", "seeds must be a list of int"),
        ("seeds: [true]", "seeds must be a list of int"),
        ("seeds:", "seeds must be a list of int"),
        ("systems: shear_flow", "systems must be a list of str, not empty, got 'shear_flow'"),
        ("systems: []", "systems must be a list of str"),
        ("train: 5", "train must be a mapping, got 5"),
        ("sims: [shear_flow]", "sims must be a mapping"),
        ("encoders: vit", "encoders must be a mapping"),
        ("encoders: {vit: 4}", "encoders must be a mapping to a mapping"),
        ("objectives: [mae]", "objectives must be a mapping"),
        ("refined: 1", "refined must be a mapping to int"),
        ("frames: 1.5", "frames must be int, got 1.5"),
        ("frames: '16'", "frames must be int, got '16'"),
        ("frames: 0", "frames must be more than 0, got 0"),
        ("size: big", "size must be int or null, got 'big'"),
        ("probe_epochs: true", "probe_epochs must be int, got True"),
        ("finetune_epochs: -1", "finetune_epochs must be 0 or more, got -1"),
        ("augment: 1", "augment must be bool, got 1"),
        ("probe_lr: 1e-3", "probe_lr must be float, got '1e-3' .*write 1.0e-3"),
        ("train: {mae: 3}", "train.mae must be a mapping of steps, lr"),
        ("train: {mae: {steps: 2.5, lr: 0.1}}", "train.mae: steps must be int, got 2.5"),
        ("train: {mae: {steps: 2, lr: 0.1, betas: 3}}", "train.mae: betas must be a list of 2 float, got 3"),
        ("sims: {shear_flow: {grid: wide}}", "sims.shear_flow: grid must be int or a list of 2 int, got 'wide'"),
        ("base: phone", "base: unknown preset 'phone'"),
        ("base: mine.yaml", "base: .*mine.yaml builds on this file, which cannot build on it as well"),
        ("train: {mae: {steps: 2, lr: 0.1, weight_decay: .nan}}", "weight_decay a number from 0, got 0.1 and nan"),
        ("{", "is not YAML"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_and_field(tmp_path, line, message):
    with pytest.raises(ValueError, match=f"mine.yaml.*{message}"):
        preset(tmp_path, line if line.startswith(("base", "{")) else f"base: smoke\n{line}\n")


def test_a_system_may_have_a_recipe_of_its_own():
    mine = replace(
        PRESETS["smoke"], train={**PRESETS["smoke"].train, "mae@shear_flow": Recipe(steps=3, batch_size=4, lr=1e-3)}
    )
    assert mine.recipe("mae", "vit", "shear_flow").steps == 3 and mine.recipe("mae", "vit", "active_matter").steps == 6
    assert mine.recipe("my:Own", "vit", "shear_flow").steps == 3 and mine.recipe("jepa", "vit", "shear_flow").steps == 6
    assert resolve("shear_flow", "mae", "vit", mine).recipe.steps == 3
    rates = {s: resolve(s, "jepa", "convnext", "paper").recipe.lr for s in ("active_matter", "shear_flow")}
    assert rates == {"active_matter": 1e-3, "shear_flow": 1e-4}, "the paper's"


def test_what_an_objective_asks_for_is_found_once_for_seeds_and_recipes_alone(monkeypatch):
    "Weights do not matter to it; options of the objective and of the encoder, and the system, do."
    built = []
    monkeypatch.setattr(run, "_ASKED", {})
    monkeypatch.setattr(run, "build", lambda one, build=run.build: built.append(one) or build(one))

    def frames(system: str = "shear_flow", **changes) -> int:
        return resolve(system, "jepa", "vit", "smoke", **changes).window_frames

    assert frames() == frames(seed=1) == frames(steps=3) == 32 and len(built) == 1
    assert frames(coefficients={"horizon": 4}) == 20 and len(built) == 2
    assert frames("active_matter") and len(built) == 3


def test_a_base_stands_beside_its_file_and_builds_on_no_file_that_builds_on_it(tmp_path, monkeypatch):
    (tmp_path / "first.yaml").write_text("base: smoke\nframes: 8\n")
    assert preset(tmp_path, "base: first.yaml\n").frames == 8, "from any working directory"
    (tmp_path / "first.yaml").write_text("base: mine.yaml\n")
    with pytest.raises(ValueError, match="mine.yaml: base: .*first.yaml: base: .*mine.yaml builds on this file"):
        preset(tmp_path, "base: first.yaml\n")
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "first.yaml").write_text(f"base: {tmp_path.name}/mine.yaml\n")
    with pytest.raises(ValueError, match="mine.yaml builds on this file"):
        preset(tmp_path, f"base: {tmp_path.name}/first.yaml\n")


def test_a_recipe_for_one_system_is_not_replaced_by_what_was_tuned(tmp_path):
    mine = preset(tmp_path, "base: laptop\ntrain: {mae@shear_flow: {steps: 500, lr: 1.0e-3}}\n")
    (row,) = (row for row in ROWS if row.pair == ("mae", "vit"))
    steps = {s: run_of(row_in(s, row, mine), s, mine).recipe.steps for s in ("shear_flow", "active_matter")}
    usual = PRESETS["laptop"]
    tuned = run_of(row_in("active_matter", row, usual), "active_matter", usual).recipe.steps
    assert steps == {"shear_flow": 500, "active_matter": tuned} and tuned != usual.train["mae"].steps


@pytest.mark.parametrize("encoder", ["convnext", "convnext_code"])
def test_the_papers_sizes_start_as_the_papers_code_does(encoder):
    native, paper = (PRESETS[name].encoder_config(encoder) for name in ("native", "paper"))
    assert native["init"] == paper["init"] == "torch"
    assert {k: v for k, v in native.items() if k != "recompute"} == dict(paper)


def test_a_recipe_of_ones_own_replaces_those_for_one_system(tmp_path):
    mine = preset(tmp_path, "base: paper\ntrain: {jepa: {steps: 50, batch_size: 64, lr: 1.0e-4}}\n")
    assert {mine.recipe("jepa", "convnext", s).steps for s in ("shear_flow", "active_matter")} == {50}
    assert mine.recipe("mae", "vit", "shear_flow") == PRESETS["paper"].recipe("mae", "vit", "shear_flow")
    mine = preset(tmp_path, "base: paper\ntrain: {'my:Own': {steps: 50, batch_size: 64, lr: 1.0e-4}}\n")
    assert mine.recipe("my:Own", "vit", "shear_flow").steps == 50, "not that of mae for the system"


@pytest.mark.parametrize(
    "line, message",
    [
        ("train: {jeppa: {steps: 5, batch_size: 4, lr: 1.0e-4}}", "train has unknown objective jeppa; valid: jepa"),
        ("objectives: {jeppa: {horizon: 4}}", "objectives has unknown objective jeppa"),
        ("train: {mae@shear: {steps: 5, batch_size: 4, lr: 1.0e-4}}", "train.mae@shear: unknown system 'shear'"),
        (
            "train: {mae-vti: {steps: 5, batch_size: 4, lr: 1.0e-4}}",
            "train.mae-vti: unknown encoder 'vti'; valid",
        ),
        (
            "objectives: {mae@shear_flow: {ratio: 0.5}}",
            "objectives.mae@shear_flow: only recipes .* leave out @",
        ),
        ("encoders: {vitt: {dim: 32}}", "encoders has unknown vitt; valid: convnext, vit"),
        (
            "sims: {shear-flow: {ranges: {Reynolds: [400.0, 500.0], Schmidt: [1.0, 2.0]}, grid: 8, store_grid: 8, "
            "n_frames: 4, frame_dt: 0.1, dt: 0.1, draws: {train: [2, 1]}}}",
            "sims.shear-flow: no solver of that name; valid: active_matter",
        ),
    ],
)
def test_recipes_of_nothing_are_refused(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        preset(tmp_path, f"base: smoke\n{line}\n")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"betas": 0.9}, "betas must be a list of 2"),
        ({"warmup": None}, "warmup must be float, got None"),
        ({"evaluations": 2.5}, "evaluations must be int, got 2.5"),
    ],
)
def test_values_of_a_recipe_are_checked_before_any_work(changes, message):
    with pytest.raises(ValueError, match=f"recipe: {message}"):
        resolve("shear_flow", "mae", "vit", "smoke", recipe=changes)


@pytest.mark.parametrize(
    "system, preset, padding",
    [
        ("shear_flow", "laptop", "circular"),  # as it was asked for: the box closes on itself
        ("rayleigh_benard", "laptop", ["circular", "zeros"]),
        ("shear_flow", "paper", ["circular", "zeros"]),
    ],
)
def test_a_convolution_does_not_wrap_across_a_wall_or_a_crop(system, preset, padding):
    for asked in ("circular", ["circular", "circular"]):
        found = resolve(system, "jepa", "convnext", preset, encoder_config={"padding_mode": asked})
        assert found.encoder_config["padding_mode"] == (asked if padding == "circular" else padding)

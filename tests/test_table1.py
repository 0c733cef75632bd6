"""The rows of Table 1: the recipes that the committed trials chose, and the random weights that belong to each row."""

from dataclasses import replace

import pandas as pd
import pytest
from helpers import ROOT

from physrep.core.files import read_json
from physrep.experiments.table1 import (
    against_random,
    differences_from_own,
    row_in,
    searched_row,
    sides,
    table_rows,
)
from physrep.experiments.tuned import BY_HAND, lower_on_valid
from physrep.experiments.tuning import OWN, chosen_configurations, trial_run
from physrep.objectives.methods import objective_class
from physrep.results.comparison import compare, differences, read_methods
from physrep.results.rows import ROWS, chosen_rows, row_name, run_of
from physrep.training.cost import cost
from physrep.training.presets import get_preset, read_preset

LAPTOP = get_preset("laptop")
NAMED = {row_name(row): row for row in ROWS}


def chosen_numbers() -> dict[str, int]:
    "Row -> the configuration that the committed trials choose."
    found = chosen_configurations(pd.read_csv(ROOT / "figures" / "tuning.csv"))
    chosen = {f"{one.objective}-{one.encoder}": one.chosen for one in found.itertuples()}
    trained = {"-".join(row): chosen["-".join(row)] for row in OWN if objective_class(row[0]).trains}
    return trained | {"jepa.circular-convnext": chosen["jepa-convnext"]}


def test_every_trained_row_is_tuned():
    assert chosen_numbers().keys() == LAPTOP.tuned.keys()
    assert set(LAPTOP.tuned) == {row_name(row) for row in chosen_rows() if row.kind == "trained"}


@pytest.mark.parametrize("name", LAPTOP.tuned)
def test_a_row_has_the_recipe_that_the_committed_trials_choose(name):
    row = NAMED[name]
    run = run_of(searched_row(row, LAPTOP), "shear_flow", LAPTOP)
    trial = trial_run("shear_flow", (row.objective, row.encoder), LAPTOP, chosen_numbers()[name])
    assert (run.recipe, run.coefficients) == (trial.recipe, trial.coefficients)
    assert run.tag == ".".join(filter(None, [row.tag, "tuned"]))


@pytest.mark.parametrize("system", LAPTOP.systems)
def test_each_system_takes_the_recipe_with_the_lower_committed_error_on_valid(system):
    table = pd.read_csv(ROOT / "figures" / "tuned.csv").query("system == @system")
    lower = lower_on_valid(table).lower
    assert set(lower.index) == set(LAPTOP.tuned) and table.seed.nunique() == 3
    for name, which in lower.items():
        taken = row_in(system, NAMED[name], LAPTOP)
        assert taken == (NAMED[name] if which == BY_HAND else searched_row(NAMED[name], LAPTOP)), name


def test_a_system_of_ones_own_is_named_by_its_place(tmp_path, monkeypatch):
    (tmp_path / "my_systems.py").write_text(
        "from physrep.physics.systems import SYSTEMS\nMINE = SYSTEMS['shear_flow']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "base: smoke\ntuned: {mae-vit: {recipe: {lr: 0.1}, by_hand: ['my_systems:MINE']}}\n"
    )
    preset = read_preset(tmp_path / "mine.yaml")
    for system, tag in (("my_systems:MINE", ""), ("shear_flow", ""), ("active_matter", "tuned")):
        assert row_in(system, NAMED["mae-vit"], preset).tag == tag


def test_rows_keep_their_order_look_and_place():
    rows = table_rows(LAPTOP, "shear_flow")
    usual = chosen_rows()
    titles = [row.title for row in rows]
    assert [t for t in titles if t != "random weights periodic ConvNeXt"] == [row.title for row in usual]
    assert titles.index("random weights periodic ConvNeXt") == len(rows) - 5, "before the baselines"
    assert {row.title: (row.color, row.marker, row.encoder_config) for row in usual}.items() <= {
        row.title: (row.color, row.marker, row.encoder_config) for row in rows
    }.items()
    assert table_rows(get_preset("smoke"), "shear_flow", "mae-vit") == chosen_rows("mae-vit"), "nothing is tuned there"


def test_a_preset_of_ones_own_keeps_what_was_tuned_but_for_what_it_sets(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: laptop\nobjectives: {jepa: {horizon: 4}}\ntrain: {mae: {steps: 2, lr: 0.1}}\n")
    assert set(LAPTOP.tuned) - set(read_preset(file).tuned) == {
        "jepa-convnext",
        "jepa.circular-convnext",
        "jepa-vit",
        "mae-vit",
    }
    file.write_text("base: laptop\ntrain: {jepa: {steps: 2, lr: 0.1}}\n")
    left = set(LAPTOP.tuned) - set(read_preset(file).tuned)
    assert left == {"jepa-vit"}, "the base has a recipe for jepa-convnext, which that of jepa does not change"
    file.write_text("base: laptop\ntuned:\n")
    assert not read_preset(file).tuned


@pytest.mark.parametrize(
    "tuned, message",
    [
        ("{mae-vits: {}}", "preset mine: tuned has mae-vits; valid: jepa-convnext, "),
        ("3", "mine.yaml: tuned must be a mapping of rows of Table 1, got 3"),
        ("{mae-vit: {lr: 0.1}}", "mine.yaml: tuned.mae-vit must be a mapping with coefficients, recipe and by_hand"),
        ("{mae-vit: {recipe: 3}}", "mine.yaml: tuned.mae-vit must be a mapping with coefficients, recipe and by_hand"),
        (
            "{mae-vit: {by_hand: shear_flow}}",
            "mine.yaml: tuned.mae-vit: by_hand must be a list of systems .shear_flow, ",
        ),
        ("{mae-vit: {by_hand: [3]}}", "or my_package.module:SYSTEM., got .3."),
        (
            "{mae-vit: {by_hand: [shear]}}",
            "mine.yaml: tuned.mae-vit: by_hand must be a list of systems .*got .'shear'.",
        ),
        ("{mae-vit: {recipe: {rate: 3}}}", "mine.yaml: tuned.mae-vit: recipe has no rate; it has: steps, "),
        ("{mae-vit: {recipe: {lr: high}}}", "mine.yaml: tuned.mae-vit: lr must be float, got 'high'"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, tuned, message):
    (tmp_path / "mine.yaml").write_text(f"base: smoke\ntuned: {tuned}\n")
    with pytest.raises(ValueError, match=message):
        table_rows(read_preset(tmp_path / "mine.yaml"), "shear_flow")


def test_rows_of_ones_own_do_not_look_tuned(tmp_path):
    for entry in ("{objective: jepa, encoder: vit, tag: tuned}", "{objective: jepa, encoder: vit, tag: near.tuned}"):
        (tmp_path / "rows.yaml").write_text(f"rows: [{entry}]\n")
        with pytest.raises(ValueError, match="rows.yaml: the tag tuned of jepa.*-vit marks recipes that tuning chose"):
            table_rows(LAPTOP, "shear_flow", own=tmp_path / "rows.yaml")


def test_a_tuned_row_is_fine_tuned_where_the_row_is():
    for name in ("mae-vit", "forecast-vit"):
        row = searched_row(NAMED[name], LAPTOP)
        assert row.finetuned == NAMED[name].finetuned == (name == "mae-vit")


def test_operations_are_those_of_the_row_but_for_two_percent_where_a_system_has_more_fields():
    for system, most in (("rayleigh_benard", 0.001), ("active_matter", 0.02)):
        for name in ("mae-vit", "forecast-vit", "invariance-vit", "jepa_ema-vit"):
            usual, tuned = (
                cost(run_of(r, system, LAPTOP))["total"] for r in (NAMED[name], searched_row(NAMED[name], LAPTOP))
            )
            assert tuned == pytest.approx(usual, rel=most)


def test_the_committed_table_is_of_these_rows():
    runs = {run.split("/")[0] for run in read_json(ROOT / "figures" / "table1.json")["runs"]}
    for system in LAPTOP.systems:
        there = {run_of(row, system, LAPTOP).name for row in table_rows(LAPTOP, system) if row.kind != "baseline"}
        assert there <= runs, system


def test_a_padding_is_compared_with_random_weights_that_pad_alike(smoke_runs_of_paddings):
    folders, rows = smoke_runs_of_paddings
    paired = differences_from_own(folders.values(), rows).query("reference == 'random' and label == 'mean'")
    usual = differences(read_methods(list(folders.values()))).query("reference == 'random' and label == 'mean'")
    for name, other in (("jepa.circular", "random.circular"), ("jepa", "random")):
        found = paired[paired.objective == name].set_index("probe")
        pair = compare(folders[name], folders[other], metric="mse").query("label == 'mean'").set_index("probe")
        assert len(found) == 4 and (found.difference == pair.difference).all()
    before, after = (one[one.objective == "jepa.circular"].difference.to_numpy() for one in (usual, paired))
    assert (before != after).any(), "with zeros it is another difference"
    assert not len(paired[paired.objective == "random.circular"]), "it is no answer to random weights"
    assert set(against_random(paired, rows).title) == {"JEPA ConvNeXt", "JEPA periodic ConvNeXt"}
    wider = [replace(row, encoder_config={"widths": [24, 48]}) if row.pair[0] == "jepa" else row for row in rows]
    assert set(against_random(differences_from_own(folders.values(), wider), wider).title) == {"JEPA periodic ConvNeXt"}
    some = [row for row in rows if row.pair[0] in ("jepa.circular", "random.circular")]
    alone = differences_from_own([folders[row.pair[0]] for row in some], some)
    assert set(alone.reference) == {"random"} and set(alone.objective) == {"jepa.circular"}
    some = [row for row in rows if row.pair[0] == "jepa"]
    nothing = differences_from_own([folders["jepa"]], some)
    assert nothing.empty and against_random(nothing, some).empty, "nothing to compare with"


def test_a_side_takes_the_interval_and_every_seed():
    low, high = [-2.0, -2.0, 1.0, 1.0, -1.0], [-1.0, -1.0, 2.0, 2.0, 1.0]
    by_seed = [(-1, -2), (-1, 1), (1, 2), (2, -1), (1, 1)]
    difference = [-1.5, -1.5, 1.5, 1.5, 0.5]
    verdicts = sides(pd.DataFrame({"difference": difference, "low": low, "high": high, "by_seed": by_seed}))
    assert verdicts == ["better", "undecided", "worse", "undecided", "undecided"]


@pytest.fixture(scope="module")
def smoke_runs_of_paddings(smoke_data, tmp_path_factory):
    "Folders of JEPA on two ConvNeXts and of their random weights, by objective, and the rows of the table."
    from physrep.probing.evaluate import score_run
    from physrep.training.pretrain import pretrain

    root, smoke = tmp_path_factory.mktemp("paddings"), get_preset("smoke")
    rows = table_rows(smoke, "shear_flow", "jepa-convnext,jepa.circular-convnext,random-convnext")
    folders = {}
    for row in rows:
        if row.kind != "baseline":
            run = run_of(row, "shear_flow", smoke)
            pretrain(run, smoke_data, root, progress=False, say=lambda text: None)
            score_run(run, smoke_data, root, probes=("linear", "knn", "kernel", "attentive"), progress=False)
            folders[row.pair[0]] = run.folder(root)
    return folders, rows


@pytest.mark.parametrize(
    "part", ["recipe: {lr: 5e-5}", "coefficients: {ratio: 1E+2}", "encoder_config: {a: {b: -3e4}}"]
)
def test_a_number_that_yaml_reads_as_text_is_named(part, tmp_path):
    (tmp_path / "rows.yaml").write_text(f"rows:\n  - {{objective: mae, encoder: vit, tag: own, {part}}}\n")
    with pytest.raises(TypeError, match=r"rows.yaml, row mae.own-vit.*is the text .*with a dot and a sign: 5.0e-5"):
        table_rows(LAPTOP, "shear_flow", own=tmp_path / "rows.yaml")

"""The rows of Table 1: the recipes that the committed trials chose, and the random weights that belong to each row."""

import pandas as pd
import pytest
from helpers import ROOT

from physrep.core.files import read_json
from physrep.experiments.table1 import (
    against_random,
    candidates,
    differences_from_own,
    sides,
    table_rows,
    tuned_row,
    which_candidate,
)
from physrep.experiments.tuning import OWN, best_two, chosen_configurations, trial_run
from physrep.objectives.methods import objective_class
from physrep.results.comparison import compare, differences, read_methods
from physrep.results.rows import ROWS, chosen_rows, row_name, run_of
from physrep.training.cost import cost
from physrep.training.presets import BEST, BY_HAND, CANDIDATES, SECOND, get_preset, read_preset

LAPTOP = get_preset("laptop")
NAMED = {row_name(row): row for row in ROWS}


def chosen_numbers() -> dict[str, dict[str, int]]:
    "Row -> the configurations that are best and second best of the committed trials."
    trials = pd.read_csv(ROOT / "figures" / "tuning.csv")
    chosen = {f"{one.objective}-{one.encoder}": one.chosen for one in chosen_configurations(trials).itertuples()}
    found = {}
    for row in (row for row in OWN if objective_class(row[0]).trains):
        name = "-".join(row)
        of_row = trials[(trials.objective == row[0]) & (trials.encoder == row[1])]
        (second,) = {*best_two(of_row.to_dict("records"))} - {chosen[name]}
        found[name] = {BEST: chosen[name], SECOND: second}
    return found | {"jepa.circular-convnext": found["jepa-convnext"]}


def test_every_trained_row_is_tuned():
    assert chosen_numbers().keys() == LAPTOP.tuned.keys()
    assert set(LAPTOP.tuned) == {row_name(row) for row in chosen_rows() if row.kind == "trained"}


@pytest.mark.parametrize("name", LAPTOP.tuned)
def test_candidates_are_the_best_two_of_the_committed_trials_and_the_row_by_hand(name):
    row = NAMED[name]
    there = candidates(row, LAPTOP)
    assert tuple(there) == CANDIDATES and there[BY_HAND] == row
    for which, number in chosen_numbers()[name].items():
        run = run_of(there[which], "shear_flow", LAPTOP)
        trial = trial_run("shear_flow", (row.objective, row.encoder), LAPTOP, number)
        assert (run.recipe, run.coefficients) == (trial.recipe, trial.coefficients), which
        assert run.tag == ".".join(filter(None, [row.tag, "tuned"]))


def test_each_system_has_the_recipe_with_the_lowest_committed_error_on_valid():
    scores = pd.read_csv(ROOT / "figures" / "candidates.csv")
    asked = scores[scores.candidate.isin(CANDIDATES)]
    assert set(asked.groupby(["system", "of"]).size()) == {3} and set(asked.system) == set(LAPTOP.systems)
    for (system, name), some in asked.groupby(["system", "of"]):
        lowest = some.loc[some.score.idxmin()]
        assert lowest.chosen and some.chosen.sum() == 1
        assert which_candidate(NAMED[name], LAPTOP, system) == lowest.candidate, (system, name)
        assert tuned_row(NAMED[name], LAPTOP, system) == candidates(NAMED[name], LAPTOP)[lowest.candidate]
    assert set(asked.of) == set(LAPTOP.tuned)


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
        (
            "{mae-vit: {lr: 0.1}}",
            "mine.yaml: tuned.mae-vit must be a mapping with coefficients, recipe, second, systems, got",
        ),
        (
            "{mae-vit: {recipe: 3}}",
            "mine.yaml: tuned.mae-vit must be a mapping with coefficients, recipe, second, systems",
        ),
        ("{mae-vit: {second: {systems: {}}}}", "tuned.mae-vit.second must be a mapping with coefficients, recipe, got"),
        ("{mae-vit: {second: {recipe: {rate: 3}}}}", "tuned.mae-vit.second: recipe has no rate; it has: steps, "),
        ("{mae-vit: {systems: {shear: best}}}", "tuned.mae-vit: systems has 'shear'; valid: shear_flow, "),
        ("{mae-vit: {systems: {shear_flow: second}}}", "shear_flow takes one of best, by hand, got 'second'"),
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
        run = run_of(candidates(NAMED[name], LAPTOP)[BEST], "shear_flow", LAPTOP)
        (row,) = (row for row in table_rows(LAPTOP, "shear_flow", "all") if row.pair == run.row)
        assert row.finetuned == NAMED[name].finetuned == (name == "mae-vit")


def test_operations_are_those_of_the_row_but_for_two_percent_where_a_system_has_more_fields():
    for system, most in (("rayleigh_benard", 0.001), ("active_matter", 0.02)):
        for name in ("mae-vit", "forecast-vit", "invariance-vit", "jepa_ema-vit"):
            costs = {
                which: cost(run_of(row, system, LAPTOP))["total"]
                for which, row in candidates(NAMED[name], LAPTOP).items()
            }
            assert costs == pytest.approx(dict.fromkeys(CANDIDATES, costs[BY_HAND]), rel=most)


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

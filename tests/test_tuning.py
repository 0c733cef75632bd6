"""Tuning is fair: every row gets the same points, the same operations and the same look at `valid`."""

import json
import math

import pytest

from physrep.core.files import read_json, write_json
from physrep.experiments import tuning
from physrep.experiments.tuning import (
    CONFIGURATIONS,
    FILLING,
    LOWER,
    OWN,
    REPEATED,
    TUNING_SEED,
    best_two,
    chosen_configurations,
    configuration,
    plot_tuning,
    points,
    read_trials,
    run_row,
    run_trial,
    trial_record,
    trial_run,
    trial_score,
    tuning_table,
)
from physrep.objectives.methods import objective_class
from physrep.results.archive import main as archive
from physrep.results.rows import ROWS
from physrep.training.cost import cost
from physrep.training.loop import TrainingDiverged
from physrep.training.presets import get_preset
from physrep.training.pretrain import pretrain
from physrep.training.run import build, resolve

TRAINED = [row for row in OWN if objective_class(row[0]).trains]


def test_every_main_row_of_the_table_is_tuned():
    main = {(row.objective, row.encoder) for row in ROWS if row.main and row.kind in ("trained", "random")}
    assert main == set(OWN)


def test_rows_get_the_same_points_and_more_points_move_none():
    assert (points(3) == points(FILLING)[:3]).all()
    preset = get_preset("laptop")
    for number in range(1, FILLING):
        shared = {
            tuple(configuration(row, preset, number)["recipe"][k] for k in ("lr", "weight_decay")) for row in TRAINED
        }
        assert len(shared) == 1, "learning rate and weight decay are those of every row"
    rates = [configuration(("mae", "vit"), preset, k)["recipe"]["lr"] for k in range(1, CONFIGURATIONS)]
    assert len(set(rates)) == len(rates)


@pytest.mark.parametrize("row", TRAINED, ids="-".join)
def test_the_last_configurations_are_the_preset_with_lower_learning_rates(row):
    preset = get_preset("laptop")
    usual = preset.recipe(*row).lr
    for number, factor in zip(range(FILLING, CONFIGURATIONS), LOWER):
        change = configuration(row, preset, number)
        assert change == {
            "coefficients": {},
            "encoder_config": {},
            "recipe": {"lr": pytest.approx(factor * usual, rel=0.05)},
        }


@pytest.mark.parametrize("row", [("mae", "vit"), ("random", "vit")], ids="-".join)
def test_more_configurations_can_be_added(row):
    preset = get_preset("laptop")
    found = [json.dumps(configuration(row, preset, number), sort_keys=True) for number in range(CONFIGURATIONS + 4)]
    assert len(set(found)) == len(found)


def test_a_choice_that_would_not_be_searched_is_refused(monkeypatch):
    row = ("mae", "vit")
    monkeypatch.setitem(tuning.OWN, row, {"ratio": (0.5, 0.9), "mask": (1, 2), "depth": (1, 2)})
    with pytest.raises(ValueError, match=r"mae-vit has 3 choices of its own \(ratio, mask, depth\), at most 2"):
        configuration(row, get_preset("laptop"), 1)


def test_the_score_weighs_relative_errors_and_none_above_a_constant():
    assert trial_score({"linear": 0.2, "knn": 0.3}, {"linear": 0.9, "knn": 0.7}) == pytest.approx((0.25 * 0.8) ** 0.5)
    assert trial_score({"linear": 0.25}, {"linear": 1.3}) == trial_score({"linear": 0.25}, {"linear": 1.0}) == 0.5
    assert trial_score({"linear": 0.25}, {"linear": 1.3, "knn": 0.8}) == pytest.approx((0.25 * 0.9) ** 0.5), (
        "each probe"
    )
    assert trial_score({"linear": 0.2, "knn": 0.4}, {}) == pytest.approx(0.3)


@pytest.mark.parametrize("row", OWN, ids="-".join)
def test_every_configuration_can_be_built(row):
    preset = get_preset("laptop")
    for number in range(CONFIGURATIONS):
        run = resolve("shear_flow", *row, preset, seed=TUNING_SEED, **configuration(row, preset, number))
        build(run)
        assert (run.recipe is None) == (row not in TRAINED) == (not objective_class(row[0]).trains)


@pytest.mark.parametrize("row", [("mae", "vit"), ("invariance", "vit")], ids="-".join)
def test_every_configuration_takes_the_same_operations(row):
    total = [cost(trial_run("shear_flow", row, "laptop", number))["total"] for number in (0, 1, 3)]
    assert max(total) / min(total) < 1.01


def test_configuration_0_stays_what_it_was_when_the_preset_takes_another(monkeypatch):
    row = ("mae", "vit")
    before = {"coefficients": {"ratio": 0.5}, "recipe": {"steps": 5, "batch_size": 4, "lr": 1e-4}}
    monkeypatch.setitem(tuning.BEFORE, row, before)
    run = trial_run("shear_flow", row, "smoke", 0)
    assert (run.coefficients["ratio"], run.recipe.steps, run.recipe.lr) == (0.5, 5, 1e-4)
    assert trial_run("shear_flow", row, "smoke", 1).recipe.batch_size == 4  # once that of configuration 0


def test_a_trial_is_run_once_and_sees_train_and_valid_only(tmp_path, smoke_data):
    arguments = ("shear_flow", ("mae", "vit"), "smoke", 1, smoke_data, tmp_path)
    first = run_trial(*arguments)
    assert set(first["all"]) == {"linear", "knn", "kernel", "attentive"} and set(first["data"]) == {"train", "valid"}
    encoder = next(tmp_path.rglob("encoder.safetensors"))
    made = encoder.stat().st_mtime_ns
    assert run_trial(*arguments) == first and encoder.stat().st_mtime_ns == made
    path = trial_record(trial_run(*arguments[:4]), tmp_path)
    record = read_json(path)
    write_json(path, {**record, "provenance": {**record["provenance"], "code": "0123456789abcdef"}, "score": 9.0})
    assert not read_trials("shear_flow", [("mae", "vit")], "smoke", tmp_path), "a record of other code is not drawn"
    assert run_trial(*arguments)["score"] == first["score"], "nor taken"


def test_a_search_goes_on_where_another_machine_stopped(tmp_path, smoke_data):
    here, there, archives = tmp_path / "here", tmp_path / "there", tmp_path / "archives"
    first = run_trial("shear_flow", ("supervised", "vit"), "smoke", 1, smoke_data, here)
    assert archive(["pack", "--preset", "smoke", "--run-dir", str(here), "--archives", str(archives)]) == 0
    assert archive(["unpack", "--preset", "smoke", "--run-dir", str(there), "--archives", str(archives)]) == 0
    assert run_trial("shear_flow", ("supervised", "vit"), "smoke", 1, smoke_data, there) == first
    assert not list(there.rglob("encoder.safetensors")), "nothing is trained"
    assert [t["number"] for t in read_trials("shear_flow", [("supervised", "vit")], "smoke", there)] == [1]


def test_a_supervised_encoder_has_no_few_labels(tmp_path, smoke_data):
    found = run_trial("shear_flow", ("supervised", "vit"), "smoke", 0, smoke_data, tmp_path)
    assert found["few"] == {} and found["score"] == pytest.approx(sum(found["all"].values()) / len(found["all"]))


def test_the_best_two_are_run_again_with_two_more_seeds(tmp_path, smoke_data):
    row = ("random", "vit")
    trials = run_row("shear_flow", row, "smoke", smoke_data, tmp_path, configurations=3, say=lambda text: None)
    assert len(trials) == 3 + 2 * len(REPEATED)
    again = {t["number"] for t in trials if t["seed"] in REPEATED}
    worst = max((t for t in trials if t["seed"] == TUNING_SEED), key=lambda t: t["score"])["number"]
    assert again == set(best_two(trials)) and worst not in again
    there = read_trials("shear_flow", [row], "smoke", tmp_path)
    assert sorted(json.dumps(t, sort_keys=True) for t in there) == sorted(json.dumps(t, sort_keys=True) for t in trials)
    assert not list(tmp_path.rglob("checkpoint")), "nothing is trained"


def test_a_row_without_choices_is_refused():
    with pytest.raises(ValueError, match="no choices for disco-vit_code; there are: jepa-convnext"):
        trial_run("shear_flow", ("disco", "vit_code"), "smoke", 1)


def test_a_recipe_of_a_system_is_where_its_configurations_start(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: smoke\ntrain: {mae@shear_flow: {lr: 0.0001, batch_size: 2, steps: 4}}\n")
    preset = get_preset(tmp_path / "mine.yaml")
    first, *others = (trial_run("shear_flow", ("mae", "vit"), preset, k).recipe for k in range(CONFIGURATIONS))
    assert (first.lr, first.batch_size) == (0.0001, 2)
    assert {one.batch_size for one in others} <= {1, 2, 4}
    assert [one.lr for one in others[FILLING - 1 :]] == [pytest.approx(factor * 0.0001, rel=0.05) for factor in LOWER]


def test_a_trial_that_diverges_does_not_end_the_search(tmp_path, smoke_data, monkeypatch):
    def train(run, data_dir, run_dir, **options):
        if run.recipe.lr == trial_run("shear_flow", ("mae", "vit"), "smoke", 1).recipe.lr:
            write_json(run.folder(run_dir) / "provenance.json", {"seconds": 1.0})
            raise TrainingDiverged("the loss is not finite in update 3")
        return pretrain(run, data_dir, run_dir, **options)

    monkeypatch.setattr(tuning, "pretrain", train)
    asked = ("shear_flow", ("mae", "vit"), "smoke")
    trials = [run_trial(*asked, number, smoke_data, tmp_path) for number in (0, 1, 2)]
    assert math.isinf(trials[1]["score"]) and "update 3" in trials[1]["diverged"]
    assert set(best_two(trials)) == {0, 2}
    table = tuning_table(read_trials("shear_flow", [("mae", "vit")], "smoke", tmp_path))
    assert table.set_index("number").score.apply(math.isinf).to_dict() == {0: False, 1: True, 2: False}
    assert chosen_configurations(table).chosen.item() in (0, 2) and plot_tuning(table).axes

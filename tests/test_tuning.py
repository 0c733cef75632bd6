"""Walks are fair: they start where the presets are, and every row has the same number of trials."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from physrep.experiments.tuning import (
    MARGIN,
    PARTS,
    TUNING_SEED,
    UNTRAINED,
    WALKS,
    merge,
    plot_walks,
    run_trial,
    run_walk,
    trial_run,
)
from physrep.probing.evaluate import FROZEN
from physrep.training.presets import PRESETS, get_preset
from physrep.training.run import Run, resolve

TRAINED = [row for row, walk in WALKS.items() if walk.trains]


@pytest.mark.parametrize("row", TRAINED, ids="-".join)
def test_walks_start_from_the_recipes_of_the_laptop(row):
    base = json.loads(json.dumps(WALKS[row].base))
    shipped = resolve("shear_flow", *row, "laptop").as_dict()
    assert all(shipped[part][k] == v for part in PARTS for k, v in base.get(part, {}).items())


def test_every_row_has_the_same_number_of_trials():
    assert len({walk.n_trials for walk in WALKS.values()}) == 1


def made_up(run: Run, data_dir, run_dir) -> dict:
    "Likes training, and a small learning rate, by less than the margin."
    if run.recipe is None:
        return {"score": 0.9, "valid": {}, "seconds": 0.0, "parameters": 1}
    return {"score": 0.4 + run.recipe.lr, "valid": {}, "seconds": 1.0, "parameters": 1}


def test_changes_within_the_noise_are_not_kept(tmp_path):
    log = run_walk("shear_flow", ("mae", "vit"), "laptop", "", tmp_path, trial=made_up, say=lambda text: None)
    assert [t["title"] for t in log if t["kept"]] == [UNTRAINED, "base"]
    assert len(log) == WALKS["mae", "vit"].n_trials


def test_a_walk_begins_with_its_own_encoder_before_training_and_may_end_there(tmp_path):
    seen = []

    def useless(run, data_dir, run_dir):
        seen.append(run)
        return {"score": 0.5 - 0.9 * MARGIN * (run.recipe is not None), "valid": {}, "seconds": 1.0, "parameters": 1}

    log = run_walk("shear_flow", ("mae", "vit"), "laptop", "", tmp_path, trial=useless, say=lambda text: None)
    assert [t["title"] for t in log if t["kept"]] == [UNTRAINED]
    assert [run.objective for run in seen[:3]] == ["random", "mae", "mae"]
    assert seen[0].recipe is None and seen[0].seed == seen[1].seed == TUNING_SEED
    assert seen[0].encoder_config == seen[1].encoder_config


def test_random_weights_choose_a_shape_and_a_seed_without_training(tmp_path, smoke_data):
    row = ("random", "vit")
    walk = WALKS[row]
    assert walk.n_trials == WALKS["mae", "vit"].n_trials and walk.trials()[0] == ("base", {})
    titles = dict(walk.changes)
    run = trial_run("shear_flow", row, "smoke", merge(merge(walk.base, titles["width 128"]), titles["seed 102"]))
    assert (run.seed, run.encoder_config["dim"], run.recipe) == (102, 128, None)
    log = run_walk("shear_flow", row, "smoke", smoke_data, tmp_path, changes=1, say=lambda text: None)
    assert [t["title"] for t in log] == ["base", "width 128"] and log[1]["parameters"] > 2 * log[0]["parameters"]
    assert set(log[0]["valid"]) == set(FROZEN) and not log[0]["config"]["recipe"]
    assert not list(tmp_path.rglob("checkpoint")), "nothing is trained"
    again = run_trial(run.with_seed(TUNING_SEED), smoke_data, tmp_path / "again")
    assert again["valid"] == log[1]["valid"], "a trial is what its configuration says"


def test_an_interrupted_walk_goes_on_where_it_was(tmp_path):
    calls = []

    def killed(run, data_dir, run_dir):
        calls.append(run)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made_up(run, data_dir, run_dir)

    arguments = ("shear_flow", ("mae", "vit"), "laptop", "", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_walk(*arguments, trial=killed, say=lambda text: None)
    whole = run_walk(*arguments, trial=killed, say=lambda text: None)
    assert len(calls) == WALKS["mae", "vit"].n_trials + 1, "only the trial that was killed is run again"
    assert whole == run_walk(
        "shear_flow", ("mae", "vit"), "laptop", "", tmp_path / "undisturbed", trial=made_up, say=lambda text: None
    )


def test_a_walk_does_not_depend_on_the_recipes_that_it_ends_at(tmp_path, monkeypatch):
    arguments = ("shear_flow", ("jepa", "convnext"), "laptop", "")
    before = run_walk(*arguments, tmp_path / "a", trial=made_up, changes=2, say=lambda text: None)
    laptop = get_preset("laptop")
    other = replace(
        laptop,
        encoders=laptop.encoders | {"convnext": {**laptop.encoders["convnext"], "causal": True}},
        objectives={**laptop.objectives, "jepa": {"noise": 9.0}},
    )
    changed = replace(other.recipe("jepa", "convnext"), weight_decay=9.0)
    other = replace(other, train={**other.train, "jepa-convnext": changed})
    monkeypatch.setitem(PRESETS, "laptop", other)
    assert before == run_walk(*arguments, tmp_path / "b", trial=made_up, changes=2, say=lambda text: None)


def test_supervised_rows_wait_for_the_encoder_and_take_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="takes the encoder that mae-vit chose: run that walk first"):
        run_walk("shear_flow", ("supervised", "vit"), "laptop", "", tmp_path, trial=made_up)

    def far(run, data_dir, run_dir):
        trained = 0.0 if run.recipe is None else 0.1
        return made_up(run, data_dir, run_dir) | {"score": 0.5 - trained - 1e-5 * run.encoder_config["temperature"]}

    run_walk("shear_flow", ("mae", "vit"), "laptop", "", tmp_path, trial=far, say=lambda text: None)
    log = run_walk(
        "shear_flow", ("supervised", "vit"), "laptop", "", tmp_path, trial=made_up, changes=1, say=lambda text: None
    )
    assert (
        log[0]["config"]["encoder_config"]["temperature"]
        == 10000.0
        != WALKS["mae", "vit"].base["encoder_config"]["temperature"]
    )


def test_a_log_of_another_walk_is_refused(tmp_path):
    arguments = ("shear_flow", ("mae", "vit"), "laptop", "", tmp_path)
    run_walk(*arguments, trial=made_up, changes=1, say=lambda text: None)
    path = next(tmp_path.rglob("shear_flow-mae-vit.json"))
    path.write_text(path.read_text().replace('"hash": "', '"hash": "x', 1))
    with pytest.raises(
        ValueError, match=rf"trial 0 \({UNTRAINED}\) is not that of this walk \({UNTRAINED}\): its hash differs; delete"
    ):
        run_walk(*arguments, trial=made_up)


def test_a_trial_of_other_code_is_refused(tmp_path):
    arguments = ("shear_flow", ("mae", "vit"), "laptop", "", tmp_path)
    log = run_walk(*arguments, trial=made_up, changes=1, say=lambda text: None)
    path = next(tmp_path.rglob("shear_flow-mae-vit.json"))
    path.write_text(path.read_text().replace(log[1]["code"]["update"], "0123456789ab"))
    with pytest.raises(ValueError, match=rf"trial 0 \({UNTRAINED}\) .* its code differs; delete the file"):
        run_walk(*arguments, trial=made_up)


def test_the_line_of_the_best_changes_at_trials_that_were_kept():
    kept = [True, False, True, False]
    table = pd.DataFrame({"trial": range(4), "kept": kept, "score": [0.6, 0.9, 0.4, 0.5], "change": list("abcd")})
    fig = plot_walks(table.assign(objective="mae", encoder="vit"))
    best, threshold = fig.axes[0].lines[:2]
    # the points of a step that goes down at the old score, and at the height of a kept trial to the new one
    assert best.get_drawstyle() == threshold.get_drawstyle() == "steps-pre"
    assert best.get_xdata().tolist() == [0.6, 0.6, 0.4, 0.4] and best.get_ydata().tolist() == [0, -1, -2, -3]
    assert threshold.get_xdata() == pytest.approx(best.get_xdata() - MARGIN) and threshold.get_linestyle() == ":"


def test_a_preset_of_another_size_has_no_walk(tmp_path):
    with pytest.raises(ValueError, match="presets smoke and laptop; preset paper has none"):
        run_walk("shear_flow", ("mae", "vit"), "paper", "", tmp_path, trial=made_up)

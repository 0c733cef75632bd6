"""Rows with another recipe: bad input, and runs that are shared with Table 1."""

from dataclasses import replace

import pytest

from physrep.experiments.recipes import at_length, at_rate, changed_runs, factors_in, random_weights, trained_row
from physrep.results.rows import PERIODIC, ROWS, Row, row_name, run_of
from physrep.training.presets import get_preset


def test_rows_that_are_not_trained_are_refused():
    assert trained_row("mae-vit").pair == ("mae", "vit")
    with pytest.raises(ValueError, match="'random-vit' is no row that is trained; valid: jepa-convnext, "):
        trained_row("random-vit")


def test_random_weights_are_those_of_the_same_encoder():
    preset = get_preset("laptop")
    for name, path in (
        ("mae-vit", "random-vit"),
        ("jepa-convnext", "random-convnext"),
        ("disco-vit_code", "random-vit_code"),
    ):
        random = random_weights(trained_row(name))
        assert run_of(random, "shear_flow", preset).path.startswith(f"{path}-")
    assert random_weights(trained_row("mae-vit")) in ROWS
    periodic = trained_row("jepa.circular-convnext")
    run, trained = (run_of(row, "rayleigh_benard", preset) for row in (random_weights(periodic), periodic))
    assert run.encoder_config == trained.encoder_config and "padding_mode" in run.encoder_config
    assert run.path.startswith("random.circular-convnext-")


def test_factors_are_numbers_above_zero():
    assert factors_in("1 .25 0.5 0.50") == [0.25, 0.5, 1]
    with pytest.raises(ValueError, match="such as \"0.5 1\"; got 'half'"):
        factors_in("half")
    for text in ("", "0 1", "-1", "inf", "nan"):
        with pytest.raises(ValueError, match="must be numbers above 0, at least one; got"):
            factors_in(text)


@pytest.mark.parametrize("name", ["mae-vit", "jepa.circular-convnext"])
@pytest.mark.parametrize(("change", "field"), [(at_rate, "lr"), (at_length, "steps")])
def test_only_one_number_of_the_recipe_changes(name, change, field):
    row, preset = trained_row(name), get_preset("laptop")
    (usual,), (half,) = changed_runs(change, row, (1, 0.5), [3], "shear_flow", preset).values()
    assert usual.seed == half.seed == 3
    assert usual.path == run_of(row, "shear_flow", preset, 3).path, "the run of Table 1"
    changed = {k for k, v in half.as_dict().items() if v != usual.as_dict().get(k)}
    assert changed == {"tag", "recipe"}
    number = getattr(usual.recipe, field)
    assert half.recipe == replace(usual.recipe, **{field: type(number)(number / 2)})


def test_a_training_has_at_least_one_update():
    ((run,),) = changed_runs(at_length, trained_row("mae-vit"), [0.01], [0], "shear_flow", get_preset("smoke")).values()
    assert run.recipe.steps == 1


def test_a_rate_is_added_to_what_a_row_changes():
    row = Row("jepa", "convnext", tag="own", encoder_config=PERIODIC, recipe={"weight_decay": 0.1})
    usual = run_of(row, "shear_flow", get_preset("laptop"))
    assert (
        at_rate(row, 1e-7, usual).tag == "own.rate0.0000001" and at_length(row, 1e6, usual).tag == "own.updates1000000"
    )
    assert at_rate(row, 0.1234567, usual).tag != at_rate(row, 0.1234568, usual).tag
    half = at_rate(row, 0.5, usual)
    assert row_name(half) == "jepa.own.rate0.5-convnext" and half.encoder_config == PERIODIC
    assert half.recipe == {"weight_decay": 0.1, "lr": 0.0005}


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match='no seeds; write for example "0 1 2"'):
        changed_runs(at_rate, trained_row("mae-vit"), (0.5, 1), [], "shear_flow", get_preset("laptop"))


def test_a_system_of_ones_own_is_found_by_its_data(smoke_data, tmp_path, monkeypatch):
    "Its grid is told by its files only, so the learning rate of a row cannot be asked without them."
    (tmp_path / "my_waves.py").write_text(
        "from dataclasses import replace\nfrom physrep.physics.systems import get_system\n"
        'WAVES = replace(get_system("shear_flow"), name="waves")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    for path in (smoke_data / "shear_flow").rglob("*.*"):
        target = tmp_path / "data" / "waves" / path.relative_to(smoke_data / "shear_flow")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    preset = get_preset("smoke")
    found = changed_runs(at_rate, trained_row("mae-vit"), (0.5, 1), [0], "my_waves:WAVES", preset, tmp_path / "data")
    assert found[0.5][0].recipe.lr == found[1][0].recipe.lr / 2

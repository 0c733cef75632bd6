"""Rows: what is said of one, rows of one's own from a file, their order, a study of them, and variants."""

from dataclasses import replace

import pandas as pd
import pytest

from physrep.experiments.plan import table_jobs
from physrep.models.encoders import ENCODERS
from physrep.objectives.methods import OBJECTIVES
from physrep.results.rows import (
    PERIODIC,
    ROWS,
    Variant,
    make_study,
    read_rows,
    row_order,
    title_of,
    variant_run,
)
from physrep.training.cost import cost
from physrep.training.presets import get_preset

STUDY = make_study("laptop")


def written(folder, text):
    (folder / "rows.yaml").write_text(text)
    return folder / "rows.yaml"


def test_every_row_of_the_table_can_be_trained_or_is_a_baseline():
    for row in ROWS:
        if row.kind == "baseline":
            assert row.encoder == "none" and row.objective not in OBJECTIVES
        else:
            assert row.objective in OBJECTIVES and row.encoder in ENCODERS
            assert STUDY.run(row, "shear_flow").path.startswith(row.name)
    assert len({(row.color, row.marker) for row in ROWS}) > len(ROWS) / 2
    with pytest.raises(ValueError, match="row constant-none has no run: it is of kind baseline"):
        STUDY.run(ROWS[-1], "shear_flow")


def test_a_periodic_row_pads_each_axis_as_the_system_ends_there():
    row = next(row for row in ROWS if row.encoder_config == PERIODIC)
    for system, modes in (("shear_flow", ["circular", "circular"]), ("rayleigh_benard", ["circular", "zeros"])):
        assert STUDY.run(row, system).encoder_config["padding_mode"] == modes
    paper = replace(STUDY, preset=get_preset("paper"))
    for system, modes in (("shear_flow", ["circular", "zeros"]), ("active_matter", ["circular"] * 2)):
        run = paper.run(row, system)  # the paper's crop is a part of these axes
        assert run.encoder_config["padding_mode"] == modes
        assert run.seen_system.boundary == tuple("periodic" if mode == "circular" else "wall" for mode in modes)


def test_rows_of_ones_own_are_read_with_what_they_change(tmp_path):
    text = """
rows:
  - {objective: jepa, encoder: vit, tag: near, coefficients: {horizon: 2}, recipe: {steps: 7}}
  - {objective: "my.losses:Mine", encoder: convnext, title: Mine, color: red, marker: "*"}
  - {objective: frozen, encoder: "my.dino:make_encoder", kind: frozen}
  - {objective: rival.v2, predictions: {shear_flow: deep/rival.csv, active_matter: /x.csv}}
"""
    jepa, mine, dino, rival = read_rows(written(tmp_path, text))
    run = make_study("smoke").run(jepa, "shear_flow", seed=1)
    assert run.coefficients["horizon"] == 2 and run.recipe.steps == 7 and run.tag == "near" and run.seed == 1
    assert mine.key == ("Mine", "convnext") and title_of(*mine.key, rows=(mine,)) == "Mine"
    assert dino.kind == "frozen" and dino.key == ("frozen", "make_encoder")
    assert rival.predictions == {"shear_flow": str(tmp_path / "deep" / "rival.csv"), "active_matter": "/x.csv"}
    study = make_study("smoke", systems="shear_flow,rayleigh_benard", rows=tmp_path / "rows.yaml", run_dir=tmp_path)
    assert study.folders(rival, "rayleigh_benard") == [], "the file is of two systems"
    assert study.folders(rival, "shear_flow") == [tmp_path / "smoke" / "shear_flow" / "rival.v2"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("7", "a row is a mapping of fields, got 7"),
        ("{objective: jepa, encoder: vit, colour: red}", "unknown field colour; valid: objective, encoder, title"),
        ("{objective: jepa}", "encoder missing; a row has an objective and an encoder"),
        ("{objective: jepb, encoder: vit}", "unknown objective 'jepb'; valid: jepa"),
        ("{objective: jepa, encoder: vti}", "unknown encoder 'vti'; valid: convnext, vit, axial"),
        ("{objective: jepa, encoder: vit, color: reddish}", "color 'reddish' or marker None is none of matplotlib's"),
        ("{objective: mae, encoder: vit}", "there is a row mae-vit already"),
        ("{objective: 'a/b', predictions: {shear_flow: x.csv}}", "objective names the predictions: .* got 'a/b'"),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path, entry, message):
    path = written(tmp_path, f"rows:\n  - {{objective: jepa, encoder: vit, tag: good}}\n  - {entry}\n")
    with pytest.raises(ValueError, match=message) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}, row 2: ")


@pytest.mark.parametrize("text", ["", "rows: 3", "rows: []\nmore: 1", "rows: [", "\x00"])
def test_files_that_are_no_rows_are_named(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(ValueError) as error:
        read_rows(path)
    assert str(path) in str(error.value)


def test_order_and_titles_of_unknown_rows():
    pairs = [row.key for row in ROWS[::-1]] + [("zz", "own"), ("aa", "own")]
    table = pd.DataFrame(pairs, columns=["objective", "encoder"])
    encoded, baselines = ([row.key for row in ROWS if (row.kind == "baseline") == one] for one in (False, True))
    assert row_order(table) == [*encoded, ("aa", "own"), ("zz", "own"), *baselines]
    assert title_of("my.losses:Mine", "vit") == "Mine ViT"


def test_a_study_without_results_says_what_makes_them(tmp_path):
    study = make_study("smoke", systems="shear_flow", only="jepa-convnext", run_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="no results yet of jepa-convnext below .*; `make reproduce`"):
        study.results("shear_flow")
    with pytest.raises(FileNotFoundError, match="preset paper reads The Well, but .* holds none of .*; pass DATA="):
        make_study("paper", data_dir=tmp_path)


def test_a_longer_study_goes_on_from_the_trunks_of_the_usual_one(tmp_path):
    usual, longer = (make_study("laptop", only="mae-vit", length=x, run_dir=tmp_path) for x in ("", "16x"))
    first, last = (study.run(study.rows[0], "shear_flow") for study in (usual, longer))
    assert last.trunk == first.trunk and last.recipe.steps == round(16 / usual.preset.length) * first.recipe.steps
    assert (longer.drawn, longer.parameters["length"]) == (tmp_path / "laptop" / "16x" / "selection", 16.0)
    assert "length" not in usual.parameters and make_study("laptop", length=usual.preset.length).length == 0
    [job] = [job for job in table_jobs(longer) if job.name == "shear_flow-mae-vit-pretrain"]
    assert job.parameters["length"] == 16.0
    with pytest.raises(ValueError, match="such as 16 or 16x, got 'long'"):
        make_study("laptop", length="long")


def test_a_variant_is_its_row_with_one_thing_changed():
    name = "mae-vit"
    run, usual = variant_run(STUDY, "faster", Variant(name, "a higher rate", lr=3.0), "shear_flow")
    assert run.recipe.lr == pytest.approx(3 * usual.recipe.lr) and run.recipe.steps == usual.recipe.steps
    assert run.coefficients == usual.coefficients and run.tag == "faster" and run.hash != usual.hash
    run, _ = variant_run(STUDY, "half", Variant(name, "half as long", length=0.5), "shear_flow")
    assert cost(run)["total"] == pytest.approx(cost(usual)["total"] / 2, rel=0.02)
    run, _ = variant_run(STUDY, "more", Variant(name, "more is hidden", coefficients={"ratio": 0.9}), "shear_flow")
    assert dict(run.coefficients) == dict(usual.coefficients) | {"ratio": 0.9} and run.recipe.lr == usual.recipe.lr
    run, _ = variant_run(STUDY, "other", Variant(name, "another objective", objective="forecast"), "shear_flow")
    assert run.objective == "forecast" and set(run.coefficients) != set(usual.coefficients)
    run, _ = variant_run(STUDY, "noisy", Variant(name, "noise", noise=0.5), "shear_flow")
    assert run.clip.noise == 0.5
    with pytest.raises(ValueError):
        variant_run(STUDY, "gone", Variant("gone-vit", "a row that is none"), "shear_flow")

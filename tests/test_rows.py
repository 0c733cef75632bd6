"""Rows: what is said of one, rows of one's own from a file, their names, looks and order, and their folders."""

import pandas as pd
import pytest

from physrep.models.encoders import ENCODERS
from physrep.objectives.methods import OBJECTIVES
from physrep.results.rows import (
    PERIODIC,
    ROWS,
    Row,
    changes_of,
    chosen_rows,
    color_of,
    marker_of,
    read_rows,
    references_of,
    row_folders,
    row_order,
    run_of,
    systems_of,
    title_of,
)
from physrep.training.presets import get_preset
from physrep.training.run import resolve, seen_system, system_folder


def written(folder, text):
    (folder / "rows.yaml").write_text(text)
    return folder / "rows.yaml"


def test_every_row_of_the_table_can_be_trained_or_is_a_baseline():
    for row in ROWS:
        if row.kind == "baseline":
            assert row.encoder == "none" and row.objective not in OBJECTIVES
        else:
            assert row.objective in OBJECTIVES and row.encoder in ENCODERS
            changed = {"tag": row.tag, **changes_of(row, "shear_flow")} if row.tag else {}
            asked = resolve("shear_flow", row.objective, row.encoder, "laptop", **changed)
            assert run_of(row, "shear_flow", "laptop").name == asked.name
    assert [row.kind == "baseline" for row in ROWS] == sorted(row.kind == "baseline" for row in ROWS), "baselines last"
    with pytest.raises(ValueError, match="row constant has no run: it is of kind baseline"):
        run_of(ROWS[-1], "shear_flow", "laptop")


def test_a_periodic_row_pads_each_axis_as_the_system_ends_there():
    row = next(row for row in ROWS if row.encoder_config == PERIODIC)
    for system, modes in (("shear_flow", ["circular", "circular"]), ("rayleigh_benard", ["circular", "zeros"])):
        assert run_of(row, system, "laptop").encoder_config["padding_mode"] == modes
    cut = {
        "shear_flow": ["circular", "zeros"],
        "rayleigh_benard": ["zeros", "zeros"],
        "active_matter": ["circular"] * 2,
    }
    for system, modes in cut.items():  # the paper's crop is a part of these axes
        run = run_of(row, system, "paper")
        assert run.encoder_config["padding_mode"] == modes
        assert seen_system(run).boundary == tuple("periodic" if mode == "circular" else "wall" for mode in modes)


def test_what_waits_longest_starts_first():
    cost = {row.pair: row.cost for row in ROWS}
    assert cost["jepa", "convnext"] == cost["random", "convnext"] == max(cost.values())
    assert cost["jepa", "convnext"] > cost["mae", "vit"] > cost["forecast", "convnext"] > cost["random", "vit"]
    assert {row.cost for row in ROWS if not row.main} == {2}, "what is run when it is asked for"


def test_rows_of_ones_own_are_read_with_what_they_change(tmp_path):
    path = written(
        tmp_path,
        """
rows:
  - {objective: jepa, encoder: vit, tag: near, coefficients: {horizon: 2}, recipe: {steps: 7}, finetuned: true}
  - {objective: "my.losses:Mine", encoder: convnext, title: Mine, color: red, marker: "*"}
  - {objective: frozen, encoder: "my.dino:make_encoder", kind: frozen}
  - {objective: rival.v2, predictions: {shear_flow: deep/rival.csv, active_matter: /x.csv}}
""",
    )
    jepa, mine, dino, rival = read_rows(path)
    assert (jepa.kind, jepa.finetuned, jepa.recipe) == ("trained", True, {"steps": 7})
    run = run_of(jepa, "shear_flow", "smoke", seed=1)
    assert run.coefficients["horizon"] == 2 and run.recipe.steps == 7 and run.tag == "near" and run.seed == 1
    assert mine.pair == ("Mine", "convnext") and title_of(*mine.pair, rows=(mine,)) == "Mine"
    assert dino.kind == "frozen" and dino.pair == ("frozen", "make_encoder")
    assert rival.kind == "predictions" and rival.encoder == "none"
    assert rival.predictions == {"shear_flow": str(tmp_path / "deep" / "rival.csv"), "active_matter": "/x.csv"}
    assert len({jepa, mine, dino, rival}) == 4, "a row can be a key"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("7", "a row is a mapping of fields, got 7"),
        (
            "{objective: jepa, encoder: vit, colour: red}",
            "unknown field colour; valid: objective, encoder, title, color",
        ),
        ("{objective: jepa}", "encoder missing; a row has an objective and an encoder"),
        ("{title: x}", "objective and encoder missing"),
        ("{objective: jepb, encoder: vit}", "unknown objective 'jepb'; valid: jepa, jepa_ema"),
        ("{objective: jepa, encoder: vti}", "unknown encoder 'vti'; valid: convnext, vit, axial"),
        ("{objective: jepa, encoder: 'x.y'}", "unknown encoder 'x.y'"),
        ("{objective: jepa, encoder: vit, color: reddish}", "color 'reddish' is none; write for example '#E69F00'"),
        ("{objective: jepa, encoder: vit, marker: '%'}", "marker '%' is none of matplotlib's"),
        ("{objective: jepa, encoder: vit, finetuned: 1}", "finetuned must be bool, got 1"),
        (
            "{objective: frozen, encoder: 'm:e', finetuned: true}",
            "finetuned is true, but an encoder of objective frozen is only probed",
        ),
        ("{objective: jepa, encoder: vit, cost: true}", "cost must be int, got True"),
        ("{objective: jepa, encoder: vit, recipe: 3}", "recipe must be a mapping, got 3"),
        ("{objective: jepa, encoder: vit, kind: frozen}", "kind is 'frozen'; with this objective it is 'trained'"),
        ("{objective: mae, encoder: vit}", "there is a row mae-vit already"),
        ("{objective: 'a/b', predictions: {shear_flow: x.csv}}", "objective names the predictions: .* got 'a/b'"),
        ("{objective: jepa, predictions: {shear_flow: x.csv}}", "objective names the predictions"),
        (
            "{objective: statistics, predictions: {shear_flow: x.csv}}",
            "there is a row statistics already; give yours another",
        ),
        ("{objective: mine, tag: new, predictions: {shear_flow: x.csv}}", "predictions take no tag"),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path, entry, message):
    path = written(tmp_path, f"rows:\n  - {{objective: jepa, encoder: vit, tag: good}}\n  - {entry}\n")
    with pytest.raises(ValueError, match=message) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}, row 2: ")


@pytest.mark.parametrize("text", ["", "rows: 3", "[1]", "rows: []\nmore: 1", "row: []", "rows: [", "\x00"])
def test_files_that_are_no_rows_are_named(tmp_path, text):
    path = written(tmp_path, text)
    with pytest.raises(ValueError) as error:
        read_rows(path)
    assert str(path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="no file .*gone.yaml; it holds `rows:`"):
        read_rows(tmp_path / "gone.yaml")
    assert read_rows(written(tmp_path, "rows: []")) == ()


def test_order_titles_and_looks_of_unknown_rows():
    df = pd.DataFrame(
        [row.pair for row in ROWS[::-1]] + [("zz", "own"), ("aa", "own")], columns=["objective", "encoder"]
    )
    encoded = [row.pair for row in ROWS if row.kind != "baseline"]
    baselines = [row.pair for row in ROWS if row.kind == "baseline"]
    assert row_order(df) == [*encoded, ("aa", "own"), ("zz", "own"), *baselines]
    mine = (*ROWS, Row("zz", "own", "Mine", "#123456", "^"))
    assert row_order(df, mine)[len(encoded) :][:2] == [("zz", "own"), ("aa", "own")]
    assert (title_of("zz", "own"), title_of("zz", "own", rows=mine)) == ("zz own", "Mine")
    assert (color_of("zz", "own"), color_of("zz", "own", mine)) == ("#882255", "#123456")
    assert (marker_of("own", "zz"), marker_of("own", "zz", mine)) == ("v", "^")
    assert title_of("my.losses:Mine", "vit") == "Mine ViT"


def test_folders_of_a_preset(tmp_path):
    rival = Row("rival", predictions={"shear_flow": "x.csv"}, kind="predictions")
    with pytest.raises(FileNotFoundError, match="no results yet of jepa-convnext-.*; `make reproduce PRESET=smoke`"):
        row_folders("smoke", tmp_path, ["shear_flow"])
    smoke = get_preset("smoke")
    encoded = [row for row in chosen_rows() if row.kind != "baseline"]
    without = [row for row in chosen_rows() if row.kind == "baseline"]
    for system in ("shear_flow", "active_matter"):
        places = [run_of(row, system, smoke, seed).folder(tmp_path) for row in encoded for seed in smoke.seeds]
        places += [system_folder(smoke, system, tmp_path) / row.objective for row in (*without, rival)]
        for folder in places:
            folder.mkdir(parents=True)
            (folder / "result.json").touch()
    assert len(row_folders("smoke", tmp_path, ["shear_flow"], chosen_rows())) == 10 * 2 + 4
    found = row_folders(smoke, tmp_path, ["shear_flow", "active_matter"], (*chosen_rows(), rival))
    assert len(found) == 2 * 24 + 1, "the file is of one system"


def test_what_a_few_rows_can_be_compared_with():
    assert references_of(ROWS) == ["random", "statistics", "spectra"]
    assert references_of(chosen_rows("mae-vit,random-vit")) == ["random", "statistics", "spectra"]
    for few in ("mae-vit", "random-vit", "mae-vit,random-convnext"):
        assert references_of(chosen_rows(few)) == ["statistics", "spectra"], few
    assert references_of(chosen_rows("mae-vit")[:1]) == []
    wide = Row("mae", "vit", tag="wide", encoder_config={"dim": 128})
    assert references_of((*chosen_rows("random-vit")[:1], wide)) == [], "another network"


def test_a_row_without_a_title_is_told_from_ours_by_its_tag():
    rows = (*ROWS, Row("invariance", "vit", tag="mine"))
    assert title_of("invariance.mine", "vit", rows=rows) == "invariance.mine ViT"
    assert title_of("invariance", "vit", rows=rows) == title_of("invariance", "vit")


def test_folders_of_a_system_of_ones_own_have_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_ripples.py").write_text(
        "from physrep.physics.systems import Field, Label, System\n"
        "RIPPLES = System('ripples', 'Ripples', (Field('h'),), (Label('c', True, True),))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rival = Row("rival", predictions={"ripples": "x.csv"}, kind="predictions")
    for name in ("statistics", "spectra", "constant", "rival"):
        (tmp_path / "smoke" / "ripples" / name).mkdir(parents=True)
        (tmp_path / "smoke" / "ripples" / name / "result.json").touch()
    baselines = [row for row in ROWS if row.kind == "baseline"]
    found = row_folders("smoke", tmp_path, ["my_ripples:RIPPLES"], (*baselines, rival))
    assert [str(f.relative_to(tmp_path)) for f in found] == [
        f"smoke/ripples/{n}" for n in ("statistics", "spectra", "constant", "rival")
    ]


def test_systems_that_are_simulated_or_there(tmp_path):
    assert systems_of(get_preset("smoke"), tmp_path) == get_preset("smoke").systems
    with pytest.raises(
        FileNotFoundError, match="preset paper reads The Well, but .* holds none of .*; pass DATA=<folder>"
    ):
        systems_of(get_preset("paper"), tmp_path)


def test_two_rows_of_predictions_have_two_names(tmp_path):
    rows = "".join(f"  - {{objective: mine, predictions: {{shear_flow: {name}.csv}}}}\n" for name in "ab")
    with pytest.raises(ValueError, match="row 2: there is a row mine already; give yours another objective"):
        read_rows(written(tmp_path, f"rows:\n{rows}"))

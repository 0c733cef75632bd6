"""Whether JEPA fails at its own question, or its predictor: bad input, and the notebook on one row at preset smoke."""

import nbformat
import pandas as pd
import pytest
import torch
from helpers import ROOT, papermill

from physrep.experiments.own_question import Asked, ask, asked_rows, faster, fit_linear_answer, plot_questions
from physrep.results.rows import row_name, run_of
from physrep.training.run import build, resolve


def test_rows_are_those_of_jepa_and_others_are_refused():
    assert [row_name(row) for row in asked_rows()] == ["jepa-convnext", "jepa.circular-convnext", "jepa-vit"]
    with pytest.raises(ValueError, match="unknown row mae-vit; valid: jepa-convnext, jepa.circular-convnext, jepa-vit"):
        asked_rows(["mae-vit"])


def test_only_the_predictor_is_faster():
    for row in asked_rows():
        usual, fast = (run_of(r, "rayleigh_benard", "laptop") for r in (row, faster(row)))
        changed = {k for k, v in fast.as_dict().items() if v != usual.as_dict().get(k)}
        assert changed == {"tag", "recipe"} and fast.recipe.predictor_lr == 3
        assert {k: v for k, v in fast.recipe.decisive().items() if k != "predictor_lr"} == usual.recipe.decisive()


def test_an_objective_of_pixels_has_no_features_to_ask_for():
    objective = build(resolve("shear_flow", "mae", "vit", "smoke"))
    with pytest.raises(ValueError, match="must ask for the features of a later window, as jepa does"):
        ask(objective, [])


def test_a_penalty_needs_four_windows():
    x = torch.randn(3, 4, 2).numpy()
    with pytest.raises(ValueError, match="give at least 4, got 3"):
        fit_linear_answer(x, x)


def test_trivial_answers_are_the_written_ones():
    draw = torch.Generator().manual_seed(1)
    context, later = torch.randn(2, 6, 4, 3, generator=draw).unbind(0)
    found = Asked(context, later, context, (1, 2, 2)).trivial()
    assert found["mean"] == pytest.approx(float(later.flatten(0, 1).var(dim=0, correction=0).mean()), rel=1e-5)
    assert found["place"] == pytest.approx(float(later.var(dim=0, correction=0).mean()), rel=1e-5)
    assert found["copy"] == pytest.approx(float((later - context).square().mean()), rel=1e-5)


def test_the_notebook_asks_one_row(smoke_data, tmp_path):
    about = {"preset": "smoke", "systems": "shear_flow", "rows": "jepa-vit", "seed": 0}
    about |= {"data_dir": smoke_data, "run_dir": tmp_path / "runs"}
    common = [word for name, value in about.items() for word in ("-p", name, str(value))]
    out = tmp_path / "question.ipynb"
    done = papermill("nbs/08g_own_question.ipynb", str(out), *common, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = tmp_path / "runs" / "smoke"
    assert len(list(runs.glob("shear_flow/jepa*-vit-*/seed0/result.json"))) == 2
    table = pd.read_csv(runs / "figures" / "own_question.csv")
    assert table.predictor_lr.tolist() == [1, 3] and table.random_gate.nunique() == 1, "the same random weights"
    best = table[["mean", "place", "copy"]].min(axis=1)
    for answer in ("own", "settled", "linear"):
        assert (table[answer] / best).tolist() == pytest.approx(table[f"{answer}_gate"].tolist(), rel=1e-4)
    assert (table.settled < table.own).all(), "400 updates more than six"
    assert any("image/png" in str(cell.get("outputs")) for cell in nbformat.read(out, 4).cells)


def test_the_figure_has_a_line_for_each_row():
    gates = {f"{name}_gate": 0.5 for name in ("own", "settled", "linear", "random")}
    about = {"system": "shear_flow", "row": "JEPA ViT"}
    questions = pd.DataFrame([about | gates | {"predictor_lr": lr} for lr in (1.0, 3.0)])
    change = {"difference": -0.1, "low": -0.2, "high": 0.0, "split": "test", "label": "mean", "probe": "linear"}
    axes = plot_questions(questions, pd.DataFrame([about | change])).axes
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["Shear flow\nJEPA ViT"]
    left, right = ([line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1] for ax in axes)
    assert left == [0.5] * 6 and right == [-0.1], "and one mark for both random ones"

"""What else answers the question of a JEPA: bad input, and the notebook on one row at preset smoke."""

import math

import nbformat
import pandas as pd
import pytest
import torch
from helpers import ROOT, papermill

from physrep.experiments.own_question import FeaturePairs, feature_pairs
from physrep.experiments.own_question_figures import faster, jepa_rows, plot_questions
from physrep.results.rows import row_name, run_of
from physrep.training.run import build, resolve


def test_rows_are_those_of_jepa_and_others_are_refused():
    assert [row_name(row) for row in jepa_rows()] == ["jepa-convnext", "jepa.circular-convnext", "jepa-vit"]
    with pytest.raises(ValueError, match="unknown row mae-vit; valid: jepa-convnext, jepa.circular-convnext, jepa-vit"):
        jepa_rows(["mae-vit"])


def test_only_the_predictor_is_faster():
    for row in jepa_rows():
        usual, fast = (run_of(r, "rayleigh_benard", "laptop") for r in (row, faster(row)))
        changed = {k for k, v in fast.as_dict().items() if v != usual.as_dict().get(k)}
        assert changed == {"tag", "recipe"} and fast.recipe.predictor_lr == 3
        assert {k: v for k, v in fast.recipe.decisive().items() if k != "predictor_lr"} == usual.recipe.decisive()


def test_an_objective_of_pixels_has_no_features_to_ask_for():
    objective = build(resolve("shear_flow", "mae", "vit", "smoke"))
    with pytest.raises(ValueError, match="must ask for the features of a later window, as jepa does"):
        feature_pairs(objective, [])


def test_trivial_answers_are_the_written_ones():
    context, later = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(1)).unbind(0)
    pair = FeaturePairs(context, later, context, (1, 2, 2))
    errors = {
        "mean": float(later.flatten(0, 1).var(dim=0, correction=0).mean()),
        "place": float(later.var(dim=0, correction=0).mean()),
        "copy": float((later - context).square().mean()),
    }
    assert pair.trivial() == pytest.approx(errors, rel=1e-5)
    assert pair.gate(later + 2) == pytest.approx(4 / min(errors.values()), rel=1e-5)


def test_the_notebook_asks_one_row(smoke_data, tmp_path):
    about = {"preset": "smoke", "systems": "shear_flow", "rows": "jepa-vit", "seed": 0}
    about |= {"data_dir": smoke_data, "run_dir": tmp_path / "runs"}
    common = [word for name, value in about.items() for word in ("-p", name, str(value))]
    out = tmp_path / "question.ipynb"
    done = papermill("nbs/08g_own_question.ipynb", str(out), *common, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = tmp_path / "runs" / "smoke"
    table = pd.read_csv(runs / "figures" / "own_question.csv").set_index("features")
    assert table.index.tolist() == ["usual predictor", "faster predictor", "random weights"]
    assert table.loc["random weights", ["own", "settled"]].isna().all()
    for features, run in (("usual predictor", "jepa-vit"), ("faster predictor", "jepa.predictor3-vit")):
        (curve,) = runs.glob(f"shear_flow/{run}-*/seed0/curve.csv")
        assert table.own[features] == pytest.approx(pd.read_csv(curve).gate.iloc[-1], rel=1e-4), "the gate of the run"
    assert (table.settled != table.own)[:2].all(), "the predictor has gone on"
    changes = pd.read_csv(runs / "figures" / "own_question_probes.csv")
    assert set(changes.probe) == {"linear", "knn", "kernel", "attentive"} and set(changes.split) == {"test"}
    assert sum("image/png" in str(cell.get("outputs")) for cell in nbformat.read(out, 4).cells) == 2


def test_the_figure_has_a_mark_for_each_answer():
    about, answers = {"system": "shear_flow", "row": "JEPA ViT"}, dict(own=0.9, settled=0.8, shrunk=0.7, linear=0.6)
    rows = [about | answers | {"features": name} for name in ("usual predictor", "faster predictor")]
    rows.append(about | answers | {"features": "random weights", "own": math.nan, "settled": math.nan})
    (ax,) = plot_questions(pd.DataFrame(rows)).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["Shear flow\nJEPA ViT"]
    marks = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1]
    assert sorted(marks) == [0.6] * 3 + [0.7] * 3 + [0.8] * 2 + [0.9] * 2

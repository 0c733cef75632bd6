"""Table 1's encoders under a longer attentive probe: the same encoders, in a place of their own, beside Table 1."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT, papermill

from physrep.core.files import read_json, write_json
from physrep.experiments import long_probe, study
from physrep.experiments.learning_curves import score_snapshots, snapshots
from physrep.experiments.long_probe import (
    chose_the_end,
    curves_of_both,
    encoder_rows,
    long_probe_root,
    long_probe_table,
    order_by_length,
    order_of_paper,
    other_probes,
    over_random,
    plot_long_probe,
    plot_paper_order,
    read_curve_longer,
    read_longer,
    seeds_read,
    with_long_probe,
)
from physrep.experiments.table1 import shown_rows
from physrep.probing.evaluate import score_run
from physrep.probing.reading import FROZEN
from physrep.results.rows import run_of
from physrep.results.verify import is_current
from physrep.training.presets import get_preset
from physrep.training.pretrain import pretrain

SMOKE = replace(get_preset("smoke"), seeds=(0,))
ASKED = "jepa-convnext,mae-vit,random-vit"


@pytest.fixture(scope="module")
def read_twice(smoke_data, tmp_path_factory):
    "The folder of runs in which three rows are read with both probes; MAE's encoder was not there for the longer one."
    folder = tmp_path_factory.mktemp("long")
    for row in encoder_rows(SMOKE, "shear_flow", ASKED):
        run = run_of(row, "shear_flow", SMOKE)
        pretrain(run, smoke_data, folder, progress=False, say=lambda text: None)
        score_run(run, smoke_data, folder, progress=False)
        if row.objective == "mae":
            (run.folder(folder) / "encoder.safetensors").rename(folder / "away")
        assert read_longer(run, smoke_data, folder, progress=False)
        assert not read_longer(run, smoke_data, folder, progress=False), "it is there"
        if row.objective == "mae":
            (folder / "away").rename(run.folder(folder) / "encoder.safetensors")
        if row.objective == "jepa":
            score_snapshots(run, smoke_data, folder, probes=("attentive",))
            assert len(read_curve_longer(run, smoke_data, folder, progress=False)) == 1
    return folder


def test_the_same_encoder_is_read_in_a_place_of_its_own_and_table_1_stays(read_twice):
    long = with_long_probe(SMOKE)
    assert (long.probe_epochs, long.probe_lr) == (8 * SMOKE.probe_epochs, pytest.approx(0.4 * SMOKE.probe_lr))
    for row in encoder_rows(SMOKE, "shear_flow", ASKED):
        run = run_of(row, "shear_flow", SMOKE)
        usual, longer = run.folder(read_twice), run.folder(long_probe_root(read_twice))
        assert (usual / "encoder.safetensors").read_bytes() == (longer / "encoder.safetensors").read_bytes()
        assert is_current(usual / "result.json", SMOKE) and is_current(longer / "result.json", long)
        assert not is_current(longer / "result.json", SMOKE), "no result of Table 1"
        rows = [pd.DataFrame(read_json(folder / "result.json")["rows"]) for folder in (usual, longer)]
        others = [one[one.probe.isin(["linear", "knn", "kernel"])].reset_index(drop=True) for one in rows]
        pd.testing.assert_frame_equal(*others)
        attentive = [one[one.probe == "attentive"].value.to_numpy() for one in rows]
        assert not np.allclose(*attentive)


def test_encoders_on_the_way_are_read_with_both_probes(read_twice):
    rows = {"shear_flow": encoder_rows(SMOKE, "shear_flow", ASKED)}
    curves = curves_of_both(rows, SMOKE, read_twice)
    assert set(curves.probe) == {"attentive"} and set(curves.objective) == {"jepa", "random"}, (
        "MAE has none in one place"
    )
    assert curves.groupby(["objective", "epochs"]).size().tolist() == [2, 2, 1, 1]
    (run,) = (run_of(row, "shear_flow", SMOKE) for row in rows["shear_flow"] if row.objective == "jepa")
    kept = [snapshots(run, root) for root in (read_twice, long_probe_root(read_twice))]
    assert all(kept[0][step].read_bytes() == kept[1][step].read_bytes() for step in kept[0])
    for root, (_, curve) in zip((read_twice, long_probe_root(read_twice)), curves[curves.trained].groupby("epochs")):
        table = pd.DataFrame(read_json(run.folder(root) / "result.json")["rows"])
        last = table.query("probe == 'attentive' and split == 'test' and label == 'mean' and metric == 'mse'")
        assert curve.value.iloc[-1] == last.value.item() and curve.value.is_unique
    assert curves_of_both({"shear_flow": encoder_rows(SMOKE, "shear_flow", "mae-vit")}, SMOKE, read_twice).empty


def test_a_row_alone_is_drawn_without_random_weights(read_twice, smoke_data):
    rows, presets = {"shear_flow": encoder_rows(SMOKE, "shear_flow", "mae-vit")}, {"shear_flow": SMOKE}
    where = dict(run_dir=read_twice, data_dir=smoke_data)
    over = over_random(rows, presets, **where)
    table = long_probe_table(rows, presets, over, **where)
    assert over.empty and len(table) == 2 and table.over_random.isna().all()
    assert plot_long_probe(table, shown_rows(rows["shear_flow"])).axes


def test_rows_of_ones_own_are_read_for_longer(tmp_path):
    (tmp_path / "rows.yaml").write_text("rows:\n- {objective: mae, encoder: vit, tag: mine, recipe: {lr: 0.001}}\n")
    rows = encoder_rows(SMOKE, "shear_flow", ASKED, tmp_path / "rows.yaml")
    assert [row.pair[0] for row in rows][-1] == "mae.mine" and len(rows) == 4


def test_an_encoder_of_table_1_is_not_trained_again(read_twice, smoke_data, tmp_path, monkeypatch):
    shutil.copytree(read_twice, tmp_path / "runs")
    shutil.rmtree(long_probe_root(tmp_path / "runs"))
    said = []
    monkeypatch.setattr(long_probe, "pretrain", lambda *a, **k: pretrain(*a, **k, say=said.append))
    (row,) = encoder_rows(SMOKE, "shear_flow", "mae-vit")
    run = run_of(row, "shear_flow", SMOKE)
    assert read_longer(run, smoke_data, tmp_path / "runs", progress=False)
    assert said == [f"{run.path} is finished"]
    assert not [p for p in run.folder(long_probe_root(tmp_path / "runs")).glob(".*") if p.name != ".lock"]


def test_an_encoder_that_table_1_has_trained_anew_is_copied_again(read_twice, smoke_data, tmp_path, monkeypatch):
    shutil.copytree(read_twice, tmp_path / "runs")
    (row,) = encoder_rows(SMOKE, "shear_flow", "mae-vit")
    run = run_of(row, "shear_flow", SMOKE)
    here, there = (run.folder(root) for root in (long_probe_root(tmp_path / "runs"), tmp_path / "runs"))
    write_json(here / "provenance.json", read_json(here / "provenance.json") | {"code": "of before"})
    (here / "result.json").unlink()
    said = []
    monkeypatch.setattr(long_probe, "pretrain", lambda *a, **k: pretrain(*a, **k, say=said.append))
    assert read_longer(run, smoke_data, tmp_path / "runs", progress=False)
    assert said == [f"{run.path} is finished"] and (here / "result.json").is_file()
    assert (here / "provenance.json").read_bytes() == (there / "provenance.json").read_bytes()


def test_tables_have_the_errors_of_both_places_and_both_orders(read_twice):
    rows = {"shear_flow": encoder_rows(SMOKE, "shear_flow", ASKED)}
    assert seeds_read(SMOKE, "shear_flow", rows["shear_flow"], read_twice) == (0,)
    assert seeds_read(replace(SMOKE, seeds=(0, 1)), "shear_flow", rows["shear_flow"], read_twice) == ()
    over = over_random(rows, {"shear_flow": SMOKE}, read_twice)
    assert set(zip(over.probe, over.epochs)) == {(p, n * SMOKE.probe_epochs) for p in FROZEN for n in (1, 8)}
    table = long_probe_table(rows, {"shear_flow": SMOKE}, over, read_twice)
    for row in rows["shear_flow"]:
        run = run_of(row, "shear_flow", SMOKE)
        for epochs, place in ((SMOKE.probe_epochs, read_twice), (8 * SMOKE.probe_epochs, long_probe_root(read_twice))):
            found = pd.DataFrame(read_json(run.folder(place) / "result.json")["rows"])
            found = found.query("probe == 'attentive' and split == 'test' and label == 'mean' and metric == 'mse'")
            line = table[(table.objective == row.pair[0]) & (table.encoder == row.pair[1]) & (table.epochs == epochs)]
            assert line.value.item() == pytest.approx(found.value.item())
    assert table.verdict.notna().tolist() == [False, True, False] * 2, "only MAE has random weights of its network here"
    order = order_of_paper(rows, {"shear_flow": SMOKE}, read_twice).query("probe == 'attentive'").set_index("epochs")
    errors = table.set_index(["objective", "epochs"]).query("encoder == 'vit' or objective == 'jepa'").value
    for epochs in order.index:
        assert order.difference[epochs] == pytest.approx(errors["jepa", epochs] - errors["mae", epochs])
    ends = chose_the_end(rows, {"shear_flow": SMOKE}, read_twice)
    assert other_probes(rows, {"shear_flow": SMOKE}, read_twice).to_dict() == {"shear_flow": pytest.approx(0, abs=1e-9)}
    assert ends.epochs.tolist() == list(order.index) and ends.probes.tolist() == [3, 3]
    chosen = [
        read_json(run_of(row, "shear_flow", SMOKE).folder(read_twice) / "result.json")["chosen"]["attentive"]["epoch"]
        for row in rows["shear_flow"]
    ]
    assert ends["last"][0] == sum(epoch >= SMOKE.probe_epochs - 1 for epoch in chosen)
    assert len(plot_long_probe(table, shown_rows(rows["shear_flow"])).axes) == 1
    both = order_of_paper(rows, {"shear_flow": SMOKE}, read_twice)
    assert len(plot_paper_order(both).axes[0].get_yticklabels()) == len(FROZEN) + 1, "the attentive one of both lengths"
    with pytest.raises(ValueError, match="no system has both rows of the paper"):
        plot_paper_order(both[:0])
    with pytest.raises(ValueError, match="no row is read with both probes"):
        plot_long_probe(table[:0], shown_rows(rows["shear_flow"]))


def test_a_changed_order_is_counted_once_a_pair():
    errors = {"jepa": (0.2, 0.2), "mae": (0.3, 0.1), "forecast": (0.4, 0.05), "random": (0.5, 0.5)}
    lines = [
        {"system": "shear_flow", "objective": name, "encoder": "vit", "epochs": epochs, "value": value}
        for name, both in errors.items()
        for epochs, value in zip((12, 96), both)
    ]
    assert order_by_length(pd.DataFrame(lines)).to_dict("records") == [
        {"system": "shear_flow", "pairs": math.comb(4, 2), "changed": 3}
    ]


def test_results_are_packed_unpacked_and_removed(read_twice, tmp_path, capsys):
    archives, elsewhere = tmp_path / "archives", tmp_path / "elsewhere"
    options = ["--preset", "smoke", "--archives", str(archives)]
    assert long_probe.main(["pack", "--run-dir", str(read_twice), *options]) == 0
    assert long_probe.main(["unpack", "--run-dir", str(elsewhere), *options]) == 0
    run = run_of(encoder_rows(SMOKE, "shear_flow", "mae-vit")[0], "shear_flow", SMOKE)
    here, there = (run.folder(long_probe_root(folder)) / "result.json" for folder in (read_twice, elsewhere))
    assert here.read_bytes() == there.read_bytes()
    assert long_probe.main(["remove", "--run-dir", str(elsewhere), *options]) == 0 and not there.exists()
    said = capsys.readouterr().out.splitlines()
    assert said == [f"long_probe/smoke/shear_flow: 3 {state}" for state in ("written", "written", "removed")]
    (archives / "long_probe" / "smoke" / "shear_flow" / "seed0.zip").write_bytes(b"none")
    assert long_probe.main(["unpack", "--run-dir", str(elsewhere), *options]) == 1
    assert "seed0.zip is no archive of results" in capsys.readouterr().err


def test_a_study_plans_encoders_of_which_only_results_are_here(tmp_path, monkeypatch):
    preset = get_preset("laptop")
    run = run_of(encoder_rows(preset, "shear_flow", "mae-vit")[0], "shear_flow", preset)
    monkeypatch.setattr(study, "planned_runs", lambda *_: [])
    monkeypatch.setattr(study, "cost", lambda run: {"total": 60e9, "train": 10**6})
    plan = study.study_table(preset, ["shear_flow"], tmp_path, [1])
    assert "long-probe" not in set(plan.make), "make reproduce trains them, and they are read where they are"
    monkeypatch.setattr(study, "scored_elsewhere", lambda folder, preset: "mae" in str(folder))
    for done in (False, True):
        plan = study.study_table(preset, ["shear_flow"], tmp_path, [1])
        (first, second) = plan[plan.make == "long-probe"].to_dict("records")
        assert (first["row"], first["done"], second["seed"], second["done"]) == (
            "mae.tuned-vit read for longer",
            done,
            1,
            False,
        )
        (again,) = plan[plan.make == "resolution"].to_dict("records")
        assert (again["row"], again["done"]) == ("mae.tuned-vit", done), "asked something new by the commands after it"
        for file in (
            run.folder(long_probe_root(tmp_path)) / "result.json",
            run.folder(tmp_path) / "encoder.safetensors",
        ):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")


def test_the_notebook_draws_what_is_there_and_says_what_is_missing(read_twice, smoke_data, tmp_path):
    given = ["-p", "preset", "smoke", "-p", "systems", "shear_flow", "-p", "only", ASKED, "-p", "train", "False"]
    given += ["-p", "data_dir", str(smoke_data), "-p", "figure_dir", str(tmp_path / "figures"), "-r", "seeds"]
    notebook = ("nbs/08l_long_probe.ipynb", str(tmp_path / "out.ipynb"))
    done = papermill(*notebook, *given, "0", "-p", "run_dir", str(read_twice), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    drawn = pd.read_csv(tmp_path / "figures" / "long_probe.csv")
    assert len(drawn) == 6 and set(drawn.epochs) == {SMOKE.probe_epochs, 8 * SMOKE.probe_epochs}
    assert len(pd.read_csv(tmp_path / "figures" / "long_probe_curves.csv")) == 6
    done = papermill(*notebook, *given, "", "-p", "run_dir", str(tmp_path), cwd=ROOT)
    assert done.returncode and "no system has results of every row with both probes" in done.stderr


def test_an_encoder_of_todays_code_is_not_replaced_by_an_old_one_of_table_1(
    read_twice, smoke_data, tmp_path, monkeypatch
):
    shutil.copytree(read_twice, tmp_path / "runs")
    (row,) = encoder_rows(SMOKE, "shear_flow", "mae-vit")
    run = run_of(row, "shear_flow", SMOKE)
    here, there = (run.folder(root) for root in (long_probe_root(tmp_path / "runs"), tmp_path / "runs"))
    write_json(there / "provenance.json", read_json(there / "provenance.json") | {"code": "of before"})
    (here / "result.json").unlink()  # killed while it was read
    before = (here / "encoder.safetensors").stat().st_mtime_ns
    said = []
    monkeypatch.setattr(long_probe, "pretrain", lambda *a, **k: pretrain(*a, **k, say=said.append))
    assert read_longer(run, smoke_data, tmp_path / "runs", progress=False)
    assert said == [f"{run.path} is finished"] and (here / "encoder.safetensors").stat().st_mtime_ns == before


def test_results_of_other_code_are_not_compared(read_twice, tmp_path):
    rows = encoder_rows(SMOKE, "shear_flow", "random-vit")
    folder = shutil.copytree(read_twice, tmp_path / "runs")
    assert seeds_read(SMOKE, "shear_flow", rows, folder) == (0,)
    path = run_of(rows[0], "shear_flow", SMOKE).folder(folder) / "result.json"
    found = read_json(path)
    write_json(path, found | {"provenance": found["provenance"] | {"code": "0" * 16}})
    with pytest.raises(ValueError, match="results of other code than today's in .*random-vit"):
        seeds_read(SMOKE, "shear_flow", rows, folder)

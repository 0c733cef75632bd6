"""Encoders that a run keeps on its way are probed as its last one is."""

import pandas as pd
import pytest

from physrep.core.files import read_json, write_json
from physrep.experiments.learning_curve_figures import learning_curve, orders, plot_learning_curves
from physrep.experiments.learning_curves import score_snapshots, snapshots
from physrep.probing.evaluate import score_run
from physrep.probing.records import read_results
from physrep.results.curves import read_curves, trained_table
from physrep.training.pretrain import pretrain
from physrep.training.run import resolve

PROBES = ("linear", "knn")


@pytest.fixture(scope="module")
def trained(smoke_data, tmp_path_factory):
    "A run of 32 updates, which keeps encoders after 2 and 8 of them, and the folder of its runs."
    run = resolve("shear_flow", "mae", "vit", "smoke", steps=32)
    runs = tmp_path_factory.mktemp("runs")
    pretrain(run, smoke_data, runs, progress=False, say=lambda text: None)
    return run, runs


def test_encoders_on_the_way_are_scored_once(trained, smoke_data):
    run, runs = trained
    assert list(snapshots(run, runs)) == [2, 8]
    paths = score_snapshots(run, smoke_data, runs, probes=PROBES)
    df = read_results(paths)
    assert set(df.probe) == set(PROBES) and set(df.split) == {"test"} and df.run.nunique() == 2
    first, second = (df[df.run.str.endswith(f"/{step}")].value.to_numpy() for step in (2, 8))
    assert (first != second).any(), "two encoders"
    before = paths[0].stat().st_mtime_ns
    assert score_snapshots(run, smoke_data, runs, probes=PROBES) == paths
    assert paths[0].stat().st_mtime_ns == before
    found = read_json(paths[0])
    write_json(paths[0], {**found, "provenance": {**found["provenance"], "code": "of another day"}})
    score_snapshots(run, smoke_data, runs, probes=PROBES)
    assert read_json(paths[0])["rows"] == found["rows"] and paths[0].stat().st_mtime_ns != before


def test_a_curve_ends_at_the_result_of_the_table(trained, smoke_data):
    run, runs = trained
    score_snapshots(run, smoke_data, runs)
    score_run(run, smoke_data, runs, progress=False)
    curve = learning_curve(run, runs)
    linear = curve[curve.probe == "linear"]
    assert linear.step.tolist() == [2, 8, 32] and linear.share.tolist() == [2 / 32, 8 / 32, 1]
    assert linear.operations.iloc[1] == pytest.approx(linear.operations.iloc[2] / 4)
    table = read_results([run.folder(runs) / "result.json"])
    last = table[
        (table.probe == "linear") & (table.split == "test") & (table.label == "mean") & (table.metric == "mse")
    ]
    assert linear.value.iloc[-1] == last.value.item()
    assert orders(curve).shape == (1, 3)
    shorter = curve[curve.step > 2].assign(objective="forecast", value=lambda t: t.value * (1 + (t.step < 32)))
    ranks = orders(pd.concat([curve, shorter])).T
    assert ranks[ranks.columns[0]].tolist() == [1, 1, 1]
    assert ranks[ranks.columns[1]].fillna(0).tolist() == [0, 2, 1], "no first point, and equal in the end"
    still = curve[curve.step == 2].assign(objective="random")
    fig = plot_learning_curves(curve, still, ("linear",))
    (ax,) = fig.axes
    assert ax.get_lines()[1].get_ydata().tolist() == linear.value.tolist()


def test_runs_without_encoders_on_the_way_are_refused(trained, tmp_path):
    run, _ = trained
    with pytest.raises(FileNotFoundError, match="2.safetensors.* not there; train shear|train mae-vit"):
        snapshots(run, tmp_path)
    with pytest.raises(ValueError, match="only trainings with schedule 'constant' keep them"):
        snapshots(resolve("shear_flow", "random", "vit", "smoke"), tmp_path)


def test_curves_of_a_variant_are_not_those_of_its_row(tmp_path):
    for tag, gate in (("", 1.5), ("circular", 0.5)):
        folder = tmp_path / f"jepa{tag}"
        folder.mkdir()
        config = {"system": "shear_flow", "objective": "jepa", "encoder": "convnext", "tag": tag, "seed": 0}
        write_json(folder / "config.json", config | {"recipe": {"batch_size": 2}})
        (folder / "curve.csv").write_text(
            f"step,online,effective_rank,feature_std,gate\n0,0.9,9,1,\n10,0.5,9,1,{gate}\n"
        )
    curves = read_curves(sorted(tmp_path.iterdir()))
    assert set(curves.objective) == {"jepa", "jepa.circular"}
    ends = trained_table(curves).set_index("objective")
    assert ends.gate.to_dict() == {"jepa": 1.5, "jepa.circular": 0.5}
    assert (ends["not trained, because"] != "").to_dict() == {"jepa": True, "jepa.circular": False}
    nothing = trained_table(curves.assign(windows=0))
    assert nothing.empty and list(nothing) == list(ends.reset_index()[list(nothing)]), "random weights alone"

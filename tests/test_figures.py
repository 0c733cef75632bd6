"""The figures: marks and gaps, the same bytes each time, whole or not at all, and a record of what made them."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import gappy, row
from matplotlib.figure import Figure
from matplotlib.image import imread

from physrep.core.files import project_root
from physrep.core.provenance import definitions, notebook_digest
from physrep.results.figures import figure_record, resolve_arguments, save_figure
from physrep.results.forest import is_clear, plot_differences, plot_systems_differences
from physrep.results.panels import plot_systems, plot_table1
from physrep.results.rows import ROWS, Row
from physrep.results.table import over_seeds
from physrep.training.run import resolve


def test_the_figure_of_table1_with_missing_rows():
    fig = plot_table1(gappy(), "shear_flow")
    assert [ax.get_title() for ax in fig.axes] == ["mean over labels", "Reynolds"]
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["linear", "attentive", "kNN", ""]
    low, high = fig.axes[0].get_xlim()
    assert fig.axes[0].get_xscale() == "log" and 0 < low < 0.2 and high > 2.5, "all that is measured has room"
    assert fig.legends[0].get_texts()[-1].get_text() == "a constant"
    for metric in ("r2", "relative_error"):
        other = plot_table1(
            pd.DataFrame(
                [row(metric=metric), row(metric=metric, seed=1, run="b"), row(metric=metric, label="Reynolds")]
            ),
            "shear_flow",
            metric,
        )
        assert len(other.axes) == 2
    with pytest.raises(ValueError, match="unknown metric 'rmse'"):
        plot_table1(gappy(), "shear_flow", "rmse")
    with pytest.raises(ValueError, match="on split test"):
        plot_table1(pd.DataFrame([row(split="valid")]), "shear_flow")


def test_the_same_figure_is_the_same_bytes(tmp_path):
    contents = []
    for name in "ab":
        png = save_figure(
            plot_table1(gappy(), "shear_flow"), tmp_path / name, "table1", gappy().assign(value=1 / 3), {"code": "ab"}
        )
        assert png == tmp_path / name / "table1.png"
        contents.append({p.suffix: p.read_bytes() for p in sorted(png.parent.iterdir())})
    assert contents[0] == contents[1] and list(contents[0]) == [".csv", ".json", ".png", ".svg"]
    assert (
        b",0.333333," in contents[0][".csv"]
        and b"dc:date" not in contents[0][".svg"]
        and b"Software" not in contents[0][".png"]
    )
    record = json.loads(contents[0][".json"])
    assert record["code"] == "ab" and [f["name"] for f in record["files"]] == ["table1.png", "table1.svg", "table1.csv"]


def test_a_figure_that_fails_changes_nothing(tmp_path):
    good, bad, table = Figure(), Figure(), pd.DataFrame([row()])
    bad.suptitle(r"$\nonsense{$")
    save_figure(good, tmp_path, "one", table, {})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for fig, name, data, record, error in [
        (bad, "one", table, {}, ValueError),
        (good, "one", table, {"x": object()}, TypeError),
        (good, "one", table, {"files": []}, ValueError),
        (good, "one", table, {"figure": "x"}, ValueError),
        (good, "../x", table, {}, ValueError),
        (good, "two", table[:0], {}, ValueError),
    ]:
        with pytest.raises(error):
            save_figure(fig, tmp_path, name, data, record)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def seeded() -> pd.DataFrame:
    rows = [
        row(
            objective=o,
            encoder=e,
            probe=p,
            seed=k,
            value=v + 0.05 * k,
            low=v - 0.1,
            high=v + 0.1,
            run=f"{o}-{e}/seed{k}",
        )
        for o, e, p, v, seeds in [
            ("jepa", "convnext", "linear", 0.5, 3),
            ("jepa", "convnext", "finetune", 0.3, 3),
            ("statistics", "none", "linear", 0.6, 1),
            ("equations", "none", "oracle", 0.15, 1),
        ]
        for k in range(seeds)
    ]
    return over_seeds(pd.DataFrame(rows))


def test_seeds_are_dots_and_the_baselines_are_rows():
    summary = seeded()
    fig = plot_table1(summary, "shear_flow")
    [ax] = fig.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["linear", "fine-tuned", "linear", "least squares"]
    assert [t.get_text() for t in ax.texts] == ["JEPA ConvNeXt", "summary statistics", "equation oracle"]
    dots = [line.get_xdata() for line in ax.lines if line.get_marker() == "."]
    assert sorted(map(tuple, dots)) == sorted(summary.by_seed[summary.seeds == 3]), (
        "three dots for each line with three seeds"
    )
    vertical = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"]
    assert vertical == [0.6], "what summary statistics score goes through the panel"
    better = summary[summary.objective == "statistics"].assign(probe="kernel", value=0.4)
    controls = [better, better.assign(objective="spectra", value=0.2), better.assign(objective="spectra", probe="knn")]
    for metric, expected in (("mse", [0.4, 0.2]), ("r2", [0.6, 0.4])):
        fig = plot_table1(pd.concat([summary, *controls]).assign(metric=metric), "shear_flow", metric)
        dotted = [line for line in fig.axes[0].lines if line.get_linestyle() == ":"]
        assert [line.get_xdata()[0] for line in dotted] == expected, "the best probe of each control"
        assert "statistics + spectra, best probe" in [t.get_text() for t in fig.legends[0].get_texts()]
    fig = plot_table1(summary, "shear_flow")
    assert [t.get_text() for t in fig.legends[0].get_texts()][:2] == [
        "test, 95 % interval, seeds included",
        "its seeds",
    ]


def test_seeds_are_numbers_in_the_csv(tmp_path):
    save_figure(plot_table1(seeded(), "shear_flow"), tmp_path, "table1", seeded(), {})
    df = pd.read_csv(tmp_path / "table1.csv", keep_default_na=False, na_values=[""])
    assert df.by_seed[0] == "0.5 0.55 0.6" and df.encoder[3] == "none" and df.by_seed.astype(str)[3] == "0.15"


def difference(**changes: object) -> dict:
    base = row() | {
        "reference": "random",
        "reference_probe": "linear",
        "difference": -0.2,
        "low": -0.3,
        "high": -0.1,
        "text": "-0.20 [-0.30, -0.10]",
        "seeds_a": 3,
    }
    return base | changes


def test_differences_that_touch_zero_are_hollow():
    df = pd.DataFrame(
        [
            difference(),
            difference(probe="knn", high=0.01),
            difference(objective="mae", encoder="vit", difference=0.1, low=0.05, high=0.2),
            difference(reference="statistics"),
            difference(label="Reynolds", difference=-9.0, low=-9.0, high=-9.0),
        ]
    )
    fig = plot_differences(df, "shear_flow")
    assert [" ".join(ax.get_title().split("\n")[:2]) for ax in fig.axes] == [
        "difference from random weights",
        "difference from summary statistics",
    ]
    marks = [line for line in fig.axes[0].lines if line.get_marker() not in ("None", None, "")]
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False, True, False]
    assert sum(t.get_text() == "-0.20" for t in fig.axes[0].texts) == 3 and min(fig.axes[0].get_xlim()) > -1
    alone = plot_differences(df[df.reference == "random"], "shear_flow")
    assert sum(t.get_text() == "-0.20 [-0.30, -0.10]" for t in alone.axes[0].texts) == 3, "room for the interval"
    assert len(plot_differences(df, "shear_flow", label="Reynolds").axes) == 1
    for bad, message in [
        (df.assign(metric=["mse"] + 4 * ["r2"]), "several metrics"),
        (df.assign(system="active_matter"), "there are: active_matter, Reynolds; active_matter, mean"),
    ]:
        with pytest.raises(ValueError, match=message):
            plot_differences(bad, "shear_flow")


def test_differences_with_a_seed_of_the_other_sign_are_hollow():
    seeds = [(-0.3, -0.1, -0.2), (-0.3, 0.01, -0.3), (-0.3, 0.0, -0.3), math.nan]
    df = pd.DataFrame(
        [difference(probe=p, by_seed=s) for p, s in zip(("linear", "knn", "attentive", "finetune"), seeds)]
    )
    for table, hollow in [
        (df, [False, True, True, False]),
        (df.drop(columns="by_seed"), 4 * [False]),
        (df.assign(low=-0.3, high=0.0), 4 * [True]),
    ]:
        fig = plot_differences(table, "shear_flow")
        assert [
            line.get_markerfacecolor() == "white" for line in fig.axes[0].lines if line.get_marker() not in ("None", "")
        ] == hollow
        assert ("every seed" in fig.legends[0].get_texts()[0].get_text()) == ("by_seed" in table)


METHODS = [
    ("jepa", "convnext"),
    ("mae", "vit"),
    ("disco", "disco"),
    ("supervised", "vit"),
    ("random", "convnext"),
    ("statistics", "none"),
    ("constant", "none"),
]
TITLES = ["Shear flow", "Rayleigh-Benard convection", "Active matter"]


def three_systems() -> pd.DataFrame:
    """The linear probe is the best of every frozen encoder: of JEPA on shear flow, MAE on active matter, and random
    weights on convection. Fine-tuned and supervised encoders are better still."""
    best = {"shear_flow": "jepa", "active_matter": "mae", "rayleigh_benard": "random"}
    value = {"linear": 0.5, "knn": 0.7, "finetune": 0.05}
    return pd.DataFrame(
        [
            row(
                system=s,
                objective=o,
                encoder=e,
                probe=p,
                split=split,
                value=v,
                low=0.8 * v,
                high=1.2 * v,
                run=f"{o}-{e}/seed0",
            )
            for s, winner in best.items()
            for o, e in METHODS
            for split in ("valid", "test")
            for p in (("linear",) if e == "none" else ("linear", "knn", "finetune"))
            for v in [0.2 if o == winner and p == "linear" else 0.1 if o == "supervised" else value[p]]
            if (s, o) != ("rayleigh_benard", "disco")
        ]
    )


def no_number_overlaps(fig: Figure) -> bool:
    "Whether what is written right of a panel ends before the next panel and before the edge."
    fig.draw_without_rendering()
    ends = [ax.get_window_extent().x0 for ax in fig.axes[1:]] + [fig.bbox.x1]
    return all(t.get_window_extent().x1 < end for ax, end in zip(fig.axes, ends) for t in ax.texts)


def test_all_systems_side_by_side():
    fig = plot_systems(three_systems())
    assert [ax.get_title().replace("\n", " ") for ax in fig.axes] == TITLES and no_number_overlaps(fig)
    plates = [[t.get_text() for t in ax.texts if t.get_bbox_patch() is not None] for ax in fig.axes]
    assert plates == [
        ["0.20", "JEPA ConvNeXt,\nlinear"],
        ["0.20", "random weights ConvNeXt,\nlinear"],
        ["0.20", "MAE ViT,\nlinear"],
    ]
    bold = [t.get_text() for t in fig.axes[0].texts if t.get_fontweight() == "bold" and t.get_text()[0] == "0"]
    assert bold == ["0.050", "0.050", "0.10", "0.050", "0.050", "0.50", "0.50"], "the best of each method"
    assert [t.get_text() for t in fig.axes[1].texts].count("–") == 3, "not measured"
    higher = plot_systems(three_systems().assign(metric="r2"), "r2")
    assert [t.get_text() for t in higher.axes[0].texts if t.get_bbox_patch() is not None] == [
        "0.70",
        "JEPA ConvNeXt,\nkNN",
    ], "of r2 the highest is best"
    assert len(plot_systems(gappy()).axes) == 2 and len(plot_systems(seeded()).axes) == 1
    for bad, message in [
        (
            three_systems().query("split != 'test' or system != 'shear_flow'"),
            "'shear_flow' and metric 'mse' on split test",
        ),
        (three_systems()[:0], "without rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            plot_systems(bad)


def test_differences_of_all_systems_side_by_side():
    rows = three_systems().query("split == 'test' and objective != 'constant'").to_dict("records")
    df = pd.DataFrame(
        [
            difference(**r | {"low": -0.3, "high": -0.1}, reference=ref, text="-0.20 [-0.30, -0.10]")
            for r in rows
            for ref in ("random", "statistics")
            if r["objective"] != ref
        ]
    )
    fig = plot_systems_differences(df, "random")
    assert [ax.get_title().replace("\n", " ") for ax in fig.axes] == TITLES and no_number_overlaps(fig)
    assert fig.get_suptitle() == "difference from random weights (same backbone and probe): mean over labels, test"
    assert [sum(t.get_text().startswith("-0.20") for t in ax.texts) for ax in fig.axes] == [13, 10, 13]
    with pytest.raises(
        ValueError, match="no differences from 'equations', mean over labels; references: random, statistics"
    ):
        plot_systems_differences(df, "equations")
    with pytest.raises(ValueError, match="several splits"):
        plot_systems_differences(df.assign(split=df.probe), "random")


def test_pictures_of_sixty_lines_stay_small(tmp_path):
    methods = [
        ("jepa", "convnext"),
        ("jepa", "vit"),
        ("mae", "vit"),
        ("next_frame", "vit"),
        ("disco", "disco"),
        ("autoencoder", "convnext"),
        ("mpp", "avit"),
        ("supervised", "convnext"),
        ("supervised", "vit"),
        ("random", "convnext"),
        ("random", "vit"),
        ("mine", "own"),
    ]
    lines = [
        dict(objective=o, encoder=e, probe=p)
        for o, e in methods
        for p in ("linear", "knn", "attentive", "head", "finetune")
    ]
    errors = np.random.default_rng(0).uniform(0.1, 0.9, (60, 2, 3, 3))  # line, split, label, seed
    rows = [
        row(
            **line,
            split=split,
            label=label,
            seed=seed,
            value=v,
            low=0.85 * v,
            high=1.2 * v,
            run=f"{line['objective']}-{line['encoder']}/seed{seed}",
        )
        for line, by_split in zip(lines, errors)
        for split, by_label in zip(("valid", "test"), by_split)
        for label, by_seed in zip(("mean", "Reynolds", "Schmidt"), by_label)
        for seed, v in enumerate(by_seed)
    ]
    apart = [
        difference(
            **line,
            reference=reference,
            difference=d,
            low=d - 0.1,
            high=d + 0.1,
            text=f"{d:.2f} [{d - 0.1:.2f}, {d + 0.1:.2f}]",
        )
        for line, pair in zip(lines, np.random.default_rng(1).normal(0, 0.3, (60, 2)))
        for reference, d in zip(("random", "statistics"), pair)
    ]
    for name, fig, table in [
        ("table1", plot_table1(over_seeds(pd.DataFrame(rows)), "shear_flow"), rows),
        ("differences", plot_differences(pd.DataFrame(apart), "shear_flow"), apart),
    ]:
        png = save_figure(fig, tmp_path, name, pd.DataFrame(table), {})
        assert png.stat().st_size < 200_000, f"{name}: {png.stat().st_size}"
        pixels = imread(png)
        assert pixels.shape[1] == 930 and pixels[0, 0].tolist()[:3] == [1, 1, 1], "full size, on white"


def test_a_record_says_what_made_the_figure():
    long = resolve("shear_flow", "jepa", "convnext", "smoke", steps=9, tag="long")
    record = figure_record(
        "05_table1",
        ["results.table"],
        preset="smoke",
        parameters={"preset": "smoke"},
        runs=["b/seed0", "a", "b/seed0", long.with_seed(1), long],
        data={"shear_flow": {"test": "00"}},
        note="x",
    )
    modules = sorted({"results.table", *long.modules})
    entries = ["convnext", "jepa", "shear_flow"]
    assert (record["modules"], record["entries"]) == (modules, entries)
    assert record["definitions"] == definitions(*modules, entries=entries)
    assert "over_seeds" in record["definitions"] and "save_figure" not in record["definitions"]
    assert record["notebook_digest"] == notebook_digest(project_root() / "nbs" / "05_table1.ipynb")
    assert record["runs"] == ["a", "b/seed0", f"{long.name}/seed0", f"{long.name}/seed1"]
    assert record["configs"] == {long.name: resolve_arguments(long)} and record["configs"][long.name]["tag"] == "long"
    assert record["note"] == "x" and record["device"].startswith("cpu") and json.dumps(record)


@pytest.mark.parametrize(
    ("notebook", "modules", "options", "error", "message"),
    [
        ("05_tabel1", ["results.table"], {}, FileNotFoundError, "05_tabel1"),
        ("05_table1", ["resluts"], {}, ValueError, "no module 'resluts'"),
        ("05_table1", ["results.table"], {"preset": "lap"}, ValueError, "unknown preset 'lap'"),
        ("05_table1", ["results.table"], {"data": {"test": "00aa"}}, ValueError, "data of test must be .* by split"),
    ],
)
def test_a_record_of_what_is_not_there_is_refused(notebook, modules, options, error, message):
    with pytest.raises(error, match=message):
        figure_record(notebook, modules, **{"preset": "smoke"} | options)


def test_a_run_is_recorded_by_what_differs_from_its_preset():
    usual = resolve("shear_flow", "mae", "vit", "smoke", seed=3)
    about = {"system": "shear_flow", "objective": "mae", "encoder": "vit", "preset": "smoke"}
    assert resolve_arguments(usual) == about
    changes = {
        "tag": "other",
        "coefficients": {"ratio": 0.5},
        "encoder_config": {"depth": 3},
        "recipe": {"lr": 0.5, "betas": [0.8, 0.9]},
    }
    run = resolve(**about, **changes)
    assert resolve_arguments(run) == about | changes and resolve(**about, **changes).name == run.name != usual.name
    with pytest.raises(ValueError, match="is not what its preset says .*; give its name as text"):
        resolve_arguments(replace(usual, clip=replace(usual.clip, stride=7)))


def test_rows_of_ones_own_have_their_own_look_and_place():
    rows = (*ROWS, Row("frozen", "my_package.dino:make_encoder", "DINO base", "#123456", "^"))
    df = pd.DataFrame(
        [
            row(),
            row(objective="frozen", encoder="make_encoder"),
            row(objective="aaa", encoder="own"),
            row(objective="constant", encoder="none", probe="constant"),
        ]
    )
    [ax] = plot_table1(df, "shear_flow", rows=rows).axes
    names = {t.get_text(): t.get_color() for t in ax.texts}
    assert list(names) == ["JEPA ConvNeXt", "DINO base", "aaa own", "constant"]
    assert names["DINO base"] == "#123456" and names["aaa own"] == "#882255"
    assert {line.get_marker() for line in ax.lines} >= {"^", "s", "v"}
    apart = pd.DataFrame([difference(objective="frozen", encoder="make_encoder"), difference()])
    forest = plot_differences(apart, "shear_flow", rows=rows)
    assert [t.get_text() for t in forest.axes[0].texts if t.get_fontweight() == "bold"] == [
        "JEPA ConvNeXt",
        "DINO base",
    ]


def test_a_system_of_ones_own_is_drawn():
    df = pd.DataFrame([row(system="pendulum", label=name) for name in ("length", "mean")])
    assert [ax.get_title() for ax in plot_table1(df, "pendulum").axes] == ["mean over labels", "length"]
    both = pd.concat([df, pd.DataFrame([row(run="x")])])
    assert [ax.get_title() for ax in plot_systems(both).axes] == ["Shear flow", "pendulum"]


def test_differences_of_several_numbers_of_labelled_flows_are_not_one_figure():
    apart = pd.DataFrame([difference(), difference(probe="knn", labelled_flows=16)])
    with pytest.raises(ValueError, match="several labelled_flows or draws of shear_flow: 16, 256; select one"):
        plot_differences(apart, "shear_flow")
    systems = pd.DataFrame([difference(), difference(system="active_matter", labelled_flows=64)])
    assert len(plot_systems_differences(systems).axes) == 2, "another system has another number of flows"


def test_seeds_of_a_committed_table_decide_what_is_filled():
    "A CSV has them as text, and a row whose seeds disagree is hollow all the same."
    table = pd.read_csv(project_root() / "figures" / "table1_differences.csv")
    some = table[table.by_seed.str.contains(" ") & ((table.low > 0) | (table.high < 0))]
    agree = [len({np.sign(float(d)) for d in text.split()}) == 1 for text in some.by_seed]
    assert [is_clear(row) for row in some.itertuples()] == agree and not all(agree)


def test_errors_beyond_the_axis_are_arrowheads_with_their_numbers():
    rows = [
        row(value=v, low=0.8 * v, high=1.2 * v, probe=p)
        for p, v in (("linear", 0.5), ("knn", 9.0), ("kernel", 0.0004), ("attentive", 3.5))
    ]
    [ax] = plot_table1(pd.DataFrame(rows), "shear_flow").axes
    low, high = ax.get_xlim()
    assert 0.3 < low < 0.4 and 3.5 < high < 4.5, "0.002 to 4, as far as something is there"
    ends = {
        line.get_marker(): line.get_xdata()[0] for line in ax.lines if line.get_marker() in "<>" and line.get_marker()
    }
    assert ends == {"<": low, ">": high} and {"9.00", "0.000"} <= {t.get_text() for t in ax.texts}
    lines = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 2 and line.get_ydata()[0] == -3.0]
    assert [max(x) for x in lines] == [high], "an interval ends at the edge"


def test_the_best_line_is_chosen_on_valid_and_has_to_beat_a_constant():
    errors = {"linear": (0.3, 0.5), "knn": (0.4, 0.2)}
    rows = [
        row(probe=p, split=split, value=v, low=0.8 * v, high=1.2 * v)
        for p, both in errors.items()
        for split, v in zip(("valid", "test"), both)
    ]

    def plates(table: pd.DataFrame, **options: str) -> list[str]:
        return [t.get_text() for t in plot_systems(table, **options).axes[0].texts if t.get_bbox_patch() is not None]

    df = pd.DataFrame(rows)
    assert plates(df) == ["0.50", "JEPA ConvNeXt,\nlinear"], "the lowest of many errors on test is too low"
    assert plates(df[df.split == "test"]) == ["0.20", "JEPA ConvNeXt,\nkNN"], "without valid there is only test"
    assert "bold: best probe on valid" in plot_systems(df).legends[0].get_texts()[-2].get_text()
    worse = df.assign(high=df.high.where(df.split == "valid", 1.1))
    assert plates(worse) == [] and "no encoder is shown\nto beat a constant" in [
        t.get_text() for t in plot_systems(worse).axes[0].texts
    ]

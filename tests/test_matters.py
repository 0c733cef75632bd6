"""The factorial: equal terms, the learning rate that valid chooses, shares that are known, and what is missing."""

import hashlib
import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
import torch
from scipy import stats
from statsmodels.stats.anova import anova_lm

from physrep.core.files import project_root, read_json, write_json
from physrep.data.scaling import LabelScaler
from physrep.experiments import matters, matters_probes, matters_systems
from physrep.experiments.matters import (
    ALL_RATES,
    BUDGET,
    CELL_ENCODERS,
    CELLS,
    COMPARED,
    FOUND,
    PAIRS,
    PAPER,
    PERIODIC,
    RATES,
    SEARCH,
    Place,
    at_rate,
    cell_run,
    check_cell,
    keep_search,
    make_room,
    matters_root,
    planned_cells,
    rate_of,
    rates_from,
    score_on_valid,
    scored_runs,
    seeds_elsewhere,
    seeds_there,
    untrained_run,
    valid_errors,
)
from physrep.experiments.matters_errors import Errors, read_errors
from physrep.experiments.matters_figures import cell_means, plot_cells, plot_main_effects, plot_shares
from physrep.experiments.matters_model import (
    FACTORS,
    LEVELS,
    OVER_MEAN,
    analyse,
    components,
    contributions,
    corners,
    estimable,
    main_effects,
    paper_claim,
    pooled_spread,
    present_levels,
    shares,
    term_columns,
    term_tests,
    with_luck,
)
from physrep.experiments.matters_probes import (
    MEAN,
    OWN,
    cell_ratios,
    paper_by_probe,
    plot_by_probe,
)
from physrep.experiments.matters_systems import (
    OnSystem,
    cost_of_other_rates,
    effects_on_systems,
    level_ratios,
    paper_on_systems,
    place_lucks,
    ratio_tables,
    read_compared,
    read_system,
    spread_of_seeds,
    tried_rates,
)
from physrep.models.vit import ViT
from physrep.objectives.cells import Cell
from physrep.objectives.composite import Composite
from physrep.physics.systems import get_system
from physrep.probing.evaluate import score_run
from physrep.probing.reading import FROZEN
from physrep.probing.records import write_predictions
from physrep.results.comparison import interval_text
from physrep.results.figures import resolve_arguments
from physrep.training.cost import cost, example_batch
from physrep.training.loop import TrainingDiverged, make_optimizer, update
from physrep.training.presets import get_preset
from physrep.training.run import build, resolve

SMOKE = get_preset("smoke")
TWO = [name for name in CELLS if name not in PAIRS and "circular" not in name]  # encoders: smaller tables, same model
GRID = pd.DataFrame([CELLS[name] for name in TWO], columns=FACTORS)
SOME = ("tube-pixels-vit", "future-ema-convnext", "window-pixels-vit", "window-shared-convnext", "pair-pooled-vit")


@pytest.mark.parametrize("name", CELLS)
def test_each_cell_makes_an_update(name):
    run = cell_run(name, "shear_flow", SMOKE, steps=1)
    objective = build(run).train()
    batch = example_batch(run, objective, run.recipe.batch_size)
    before = [p.detach().clone() for p in objective.encoder.parameters()]
    optimizer = make_optimizer(objective, run.recipe)
    found = update(objective, optimizer, [batch], run.recipe, step=0, device=torch.device("cpu"))
    moved = [not torch.equal(a, b) for a, b in zip(before, objective.encoder.parameters())]
    assert math.isfinite(found["loss"]) and found["grad_norm"] > 0 and all(moved), "all of the encoder is trained"


@pytest.mark.parametrize("name", SOME)
def test_operations_are_equal(name):
    run = cell_run(name, "shear_flow", "laptop")
    assert abs(cost(run)["total"] / cost(resolve("shear_flow", *BUDGET, "laptop"))["total"] - 1) < 0.02


def test_cells_differ_in_their_factors_only():
    runs = {name: cell_run(name, "shear_flow", "laptop", steps=1) for name in CELLS}
    assert len({run.name for run in runs.values()}) == len(CELLS)
    assert len({run.recipe for name, run in runs.items() if name not in PAIRS}) == 1, "one recipe, one batch"
    for name, run in runs.items():
        network, _, circular = check_cell(name)["encoder"].partition("_")
        usual = resolve("shear_flow", "jepa", run.encoder, "laptop").encoder_config
        assert run.encoder == network
        assert run.encoder_config == usual | ({"padding_mode": ["circular", "circular"]} if circular else {})
    walls = cell_run("tube-pixels-convnext_circular", "rayleigh_benard", "laptop", steps=1)
    assert walls.encoder_config["padding_mode"] == ["circular", "zeros"], "periodic along x, walls along z"
    assert resolve_arguments(runs["window-ema-vit"])["coefficients"]["task"] == "window", (
        "a figure's record can hold it"
    )
    for wrong in ({"name": "tube-pixels"}, {"name": "tube-pixels-vit", "rate": "best"}):
        with pytest.raises(ValueError, match="valid: "):
            cell_run(**wrong, system="shear_flow", preset="laptop", steps=1)


@pytest.fixture
def any_code(monkeypatch):
    "Whatever is there counts as of today's code."
    monkeypatch.setattr(matters, "is_current", lambda path, *_: path.is_file())


def write_scores(run, run_dir, scores: dict) -> None:
    "What `score_on_valid` leaves of a cell, without any training."
    for rate, score in scores.items():
        write_json(at_rate(run, rate).folder(matters_root(run_dir)) / "valid.json", {"score": score})


def test_the_rate_is_chosen_on_valid_and_what_is_missing_is_said(tmp_path, monkeypatch, any_code):
    monkeypatch.setattr(matters, "CELLS", {name: CELLS[name] for name in SOME[:3]})
    first, second, third = (cell_run(name, "shear_flow", SMOKE) for name in SOME[:3])
    write_scores(first, tmp_path, {"lowest": 0.6, "low": 0.4, "middle": None, "high": 0.5})  # middle diverged
    write_scores(second, tmp_path, {"low": 0.5, "middle": 0.2})
    write_scores(third, tmp_path, dict.fromkeys(RATES))
    done = at_rate(first, "low").with_seed(1)
    write_json(done.folder(matters_root(tmp_path)) / "result.json", {})
    found, missing = scored_runs("shear_flow", SMOKE, [0, 1], tmp_path)
    assert found == {SOME[0]: [done]}
    assert missing == [
        f"{SOME[0]}: seed 0",
        f"{SOME[1]}: 2 of 4 learning rates tried",
        f"{SOME[2]}: diverged at all learning rates",
    ]


def test_a_rate_that_was_found_before_is_taken_until_all_are_tried_here(tmp_path, any_code):
    laptop = get_preset("laptop")
    run = cell_run("tube-pixels-vit", "shear_flow", laptop, steps=1)
    assert rate_of("tube-pixels-vit", run, tmp_path) == FOUND["laptop", "shear_flow"]["tube-pixels-vit"] == "high"
    write_scores(run, tmp_path, {"lowest": 0.1, "low": 0.2, "middle": 0.3})
    assert rate_of("tube-pixels-vit", run, tmp_path) == "high"
    write_scores(run, tmp_path, {"high": 0.4})
    assert rate_of("tube-pixels-vit", run, tmp_path) == "lowest"
    write_scores(run, tmp_path, {"further down": 0.05})
    assert rate_of("tube-pixels-vit", run, tmp_path) == "lowest", "the best of the same four for every cell"
    unknown = cell_run("tube-pixels-vit", "active_matter", "smoke", steps=1)
    assert rate_of("tube-pixels-vit", unknown, tmp_path) is None


@pytest.mark.parametrize(
    "system, figure",
    [
        ("shear_flow", "matters"),
        ("rayleigh_benard", "probe_length_cells_rayleigh_benard"),
        ("active_matter", "probe_length_cells_active_matter"),
    ],
)
def test_the_rates_that_were_found_are_those_of_the_committed_figure(system, figure):
    configs = read_json(project_root() / "figures" / f"{figure}.json")["configs"]
    used = {(c["tag"], c["encoder"], "padding_mode" in c.get("encoder_config", {})): c for c in configs.values()}
    found = FOUND["laptop", system]
    assert len(used) == len(found) == 29
    for name, rate in found.items():
        run = cell_run(name, system, "laptop", rate=rate, steps=1)
        config = used[run.tag, run.encoder, "circular" in name]
        assert config["recipe"]["lr"] == run.recipe.lr, name


def test_the_rates_of_the_comparison_are_those_of_the_committed_figure_in_every_system():
    configs = read_json(project_root() / "figures" / "matters_paper.json")["configs"].values()
    others = {
        system: found for (preset, system), found in FOUND.items() if (preset, system) != ("laptop", "shear_flow")
    }
    assert others and all({*COMPARED} <= {*found} for found in others.values())
    for system, found in others.items():
        for name, rate in ((name, found[name]) for name in COMPARED):
            run = cell_run(name, system, "laptop", rate=rate, steps=1)
            alike = [c for c in configs if (c["system"], c["tag"], c["encoder"]) == (system, run.tag, run.encoder)]
            same = [c for c in alike if ("padding_mode" in c.get("encoder_config", {})) == (name == PERIODIC)]
            assert {c["recipe"]["lr"] for c in same} == {run.recipe.lr}, (system, name)


def test_on_other_systems_the_comparison_is_planned_at_their_own_rates_too(tmp_path, monkeypatch, any_code):
    preset, paper, other = replace(SMOKE, seeds=(0, 1)), PAPER["VideoMAE"], "tube-ema-vit"
    monkeypatch.setattr(matters, "FOUND", {("smoke", "shear_flow"): {paper: "high", other: "low"}})
    runs = {name: cell_run(name, "active_matter", preset) for name in (paper, other)}

    def planned(name: str) -> list:
        found = planned_cells(preset, ["shear_flow", "active_matter"], tmp_path)
        return [run for cell, run in found if cell == name and run.system.name == "active_matter"]

    at = {rate: at_rate(runs[paper], rate) for rate in RATES}
    rates = [*at.values(), at["middle"].with_seed(1), at["high"].with_seed(1)]
    assert sorted(run.path for run in planned(paper)) == sorted(run.path for run in rates), "a search, and both rates"
    write_scores(runs[paper], tmp_path, {"lowest": 0.4, "low": 0.3, "middle": None, "high": 0.4})
    both = [at[rate].with_seed(seed).path for rate in ("low", "high") for seed in (0, 1)]
    assert sorted(run.path for run in planned(paper)) == sorted(both), "the search is done"
    assert [run.path for run in planned(other)] == [at_rate(runs[other], "low").path], (
        "one seed at the rate of the first"
    )


def test_the_comparison_is_read_at_the_rate_of_its_system(tmp_path, monkeypatch, any_code):
    monkeypatch.setattr(matters_systems, "check_current", lambda *args: None)
    draw, groups = np.random.default_rng(1), np.repeat(np.arange(6), 4)
    video = cell_run(PAPER["VideoMAE"], "active_matter", SMOKE)
    write_scores(video, tmp_path, {"lowest": 0.4, "low": 0.3, "middle": 0.5, "high": 0.4})
    seeds = {"shear_flow": [0], "active_matter": [0, 1]}
    assert read_compared(seeds, SMOKE, otherwise="shear_flow", run_dir=tmp_path) == [], "none is scored"
    for run in (at_rate(video, "low"), at_rate(video, "high").with_seed(1)):  # the latter is at the rate of the first
        write_run(run, tmp_path, draw, groups)
        write_json(run.folder(matters_root(tmp_path)) / "result.json", {"data": {"test": "00aa"}})
    (place,) = read_compared(seeds, SMOKE, otherwise="shear_flow", run_dir=tmp_path)
    assert place.system == "active_matter" and [run.path for run in place.runs] == [at_rate(video, "low").path]
    assert f"{PAPER['VideoMAE']}: seed 1" in place.missing and len(place.missing) == 3, "other cells are not asked for"
    assert place.rates_of == "active_matter"
    monkeypatch.setattr(matters, "FOUND", {("smoke", "shear_flow"): {PAPER["VideoMAE"]: "high"}})
    (at_rate(video, "low").folder(matters_root(tmp_path)) / "result.json").unlink()
    (place,) = read_compared(seeds, SMOKE, otherwise="shear_flow", run_dir=tmp_path)
    assert place.rates_of == "shear_flow" and [run.seed for run in place.runs] == [1], "those of another system"
    tried = tried_rates(["active_matter"], SMOKE, tmp_path)
    assert list(tried.chosen) == ["low", "not kept", "not kept"]
    assert tried.middle["active_matter", PAPER["VideoMAE"]] == 0.5
    cost = cost_of_other_rates(tried, "shear_flow", SMOKE, tmp_path)
    assert cost.loc[("active_matter", "pixels")].tolist() == pytest.approx([4 / 3, 4 / 3, 4 / 3, 1, 1])
    assert cost_of_other_rates(tried, "active_matter", SMOKE, tmp_path).empty


def test_scores_of_a_search_are_kept_with_the_run_that_it_chose(tmp_path, monkeypatch, any_code):
    monkeypatch.setattr(matters, "FOUND", {})
    run = cell_run(SOME[0], "shear_flow", SMOKE, steps=1)
    scores = {"lowest": 0.6, "low": 0.4, "middle": None, "high": 0.5}
    write_scores(run, tmp_path, scores)
    assert keep_search(run, tmp_path) is None, "the chosen run has no results yet"
    chosen = at_rate(run, "low").folder(matters_root(tmp_path))
    rows = [{"split": "valid", "metric": "mse", "label": "mean", "value": 0.4}]
    write_json(chosen / "result.json", {"rows": rows})
    assert keep_search(run, tmp_path) == chosen / SEARCH
    for rate in RATES:
        (at_rate(run, rate).folder(matters_root(tmp_path)) / "valid.json").unlink()
    assert valid_errors(run, tmp_path) == scores | {"middle": math.inf}
    assert rate_of(SOME[0], run, tmp_path) == "low"
    mark = hashlib.sha256((chosen / "result.json").read_bytes()).hexdigest()[:16]
    (chosen / ".unpacked").write_text("\n".join([mark, "result.json", SEARCH]))
    make_room(chosen)
    assert not (chosen / "result.json").exists() and rate_of(SOME[0], run, tmp_path) == "low", (
        "training forgets nothing"
    )


def test_a_system_takes_rates_of_its_own_if_it_has_those_of_all_cells(tmp_path, monkeypatch, any_code):
    preset, (one, other) = replace(SMOKE, seeds=(0, 1)), ("tube-ema-vit", PAPER["JEPA"])
    here, there = ("smoke", "shear_flow"), ("smoke", "active_matter")
    monkeypatch.setattr(matters, "FOUND", {here: {one: "high", other: "low"}, there: {other: "middle"}})
    asked = ("active_matter", "shear_flow", preset, tmp_path)
    assert rates_from(*asked) == "shear_flow"
    run = cell_run(one, "active_matter", preset)
    write_scores(run, tmp_path, {"lowest": 0.1, "low": 0.2, "middle": 0.3, "high": 0.4})
    assert rates_from(*asked) == "active_matter", "one was found before, the other here"
    planned = planned_cells(preset, ["shear_flow", "active_matter"], tmp_path)
    jepa = at_rate(cell_run(other, "active_matter", preset), "middle")
    expected = [at_rate(run, "lowest"), jepa, jepa.with_seed(1)]
    assert [r for _, r in planned if r.system.name == "active_matter"] == expected
    _, missing = scored_runs("active_matter", preset, [0, 1], tmp_path, cells=[one, other], chosen_on="active_matter")
    assert missing == [f"{one}: seed 0", f"{other}: seed 0", f"{other}: seed 1"]


def test_what_was_scored_elsewhere_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(matters, "pretrain", lambda *args, **kwargs: pytest.fail("it is trained again"))
    monkeypatch.setattr(matters, "probe_splits", lambda *args: {})
    monkeypatch.setattr(matters, "is_current", lambda path, *rest: path.is_file())
    run = cell_run(SOME[0], "shear_flow", SMOKE, steps=1)
    rows = [{"split": "valid", "metric": "mse", "label": "mean", "value": 0.4}]
    write_json(run.folder(matters_root(tmp_path)) / "result.json", {"rows": rows})
    assert Place("shear_flow", SMOKE, "", tmp_path).train_at(run, "middle", [0]) == [at_rate(run, "middle")]


@pytest.mark.parametrize("call", ["train", "search"])
def test_a_training_takes_the_place_of_results_from_elsewhere(tmp_path, monkeypatch, call):
    run = cell_run(SOME[0], "shear_flow", SMOKE, steps=1)
    folder = run.folder(matters_root(tmp_path))
    write_json(folder / "result.json", {})
    (folder / ".unpacked").write_text(hashlib.sha256((folder / "result.json").read_bytes()).hexdigest()[:16])

    def diverges(run, *args, **kwargs):
        assert not folder.exists(), "nothing from elsewhere stands beside an encoder from here"
        raise TrainingDiverged("the loss is nan")

    monkeypatch.setattr(matters, "pretrain", diverges)
    monkeypatch.setattr(matters, "probe_splits", lambda *args: {})
    monkeypatch.setattr(matters, "is_current", lambda path, *rest: False)
    if call == "train":
        assert Place("shear_flow", SMOKE, "", tmp_path).train_at(run, "middle", [0]) == []
    else:
        assert score_on_valid(run, "", tmp_path)["score"] is None


def test_only_the_comparison_is_tried_further_where_an_end_is_best(tmp_path, monkeypatch, any_code):
    true = {"further down": 0.1, "lowest": 0.2, "low": 0.3, "middle": 0.4, "high": 0.5, "further up": 0.6}
    tried, trained = [], []

    def score(run, *args, **kwargs):
        (rate,) = (rate for rate in true if at_rate(run, rate) == run)
        tried.append(rate)
        write_scores(run, tmp_path, {rate: true[rate]})

    monkeypatch.setattr(matters, "score_on_valid", score)
    monkeypatch.setattr(Place, "train_at", lambda self, run, rate, seeds: trained.append(rate) or [])
    for name in (PERIODIC, "tube-pixels-convnext"):
        Place("shear_flow", SMOKE, "", tmp_path).train_cell(name, [0])
    assert tried == [*RATES, "further down", *RATES] and trained == ["lowest", "lowest"]


def test_a_search_that_is_asked_for_takes_no_rate_of_before(tmp_path, monkeypatch):
    monkeypatch.setattr(matters, "FOUND", {("smoke", "shear_flow"): {SOME[0]: "high"}})
    tried, trained = [], []
    monkeypatch.setattr(matters, "score_on_valid", lambda run, *args, **kwargs: tried.append(run.recipe.lr))
    monkeypatch.setattr(Place, "train_at", lambda self, run, rate, seeds: trained.append(rate) or [])
    place = Place("shear_flow", SMOKE, "", tmp_path)
    place.train_cell(SOME[0], [0], ["low"])
    assert len(tried) == 1 and not trained, "three rates are not tried yet"
    place.train_cell(SOME[0], [0])
    assert len(tried) == 1 and trained == ["high"]


def test_a_training_that_diverges_has_no_score_and_is_not_repeated(tmp_path, monkeypatch):
    tried = []

    def diverges(run, *args, **kwargs):
        tried.append(run.recipe.lr)
        raise TrainingDiverged("the loss is nan")

    monkeypatch.setattr(matters, "pretrain", diverges)
    monkeypatch.setattr(matters, "probe_splits", lambda *args: {})
    run = cell_run(SOME[0], "shear_flow", SMOKE, steps=1)
    for _ in range(2):
        found = score_on_valid(run, "", tmp_path)
        assert found["score"] is None and found["diverged"] == "the loss is nan"
    assert len(tried) == 1
    assert Place("shear_flow", SMOKE, "", tmp_path).train_at(run, "low", [0, 1]) == []


def test_the_score_of_a_rate_is_the_mean_error_on_valid(smoke_data, tmp_path):
    run = cell_run("tube-pixels-vit", "shear_flow", SMOKE, steps=1)
    found = score_on_valid(run, smoke_data, tmp_path, progress=False)
    assert set(found["valid"]) == set(FROZEN) and set(found["data"]) == {"train", "valid"}
    assert found["score"] == pytest.approx(np.mean([list(labels.values()) for labels in found["valid"].values()]))
    assert valid_errors(run, tmp_path) == {"middle": found["score"]}
    rows = pd.DataFrame(score_run(run, smoke_data, matters_root(tmp_path), probes=FROZEN, progress=False).rows)
    (run.folder(matters_root(tmp_path)) / "valid.json").unlink()
    assert valid_errors(run, tmp_path) == {"middle": pytest.approx(found["score"])}, "of what was scored on all splits"
    rows = rows.query("split == 'valid' and metric == 'mse' and label != 'mean'")
    there = {(head, label): error for head, labels in found["valid"].items() for label, error in labels.items()}
    assert there == pytest.approx({(r.probe, r.label): r.value for r in rows.itertuples()})


def test_the_places_of_hidden_tokens_are_centred_by_themselves():
    torch.manual_seed(0)
    vit = ViT(4, dim=16, depth=1, heads=2, tubelet=(2, 4, 4))
    cell = Cell(vit, system=get_system("shear_flow"), shape=(8, 16, 16), target="shared")
    batch = {"fields": torch.randn(6, 4, 8, 16, 16), "seeds": torch.arange(6)}
    raw, centred = Composite.answer(cell, batch)[1], cell.answer(batch)[1]
    places = cell.masks(batch)[0].nonzero()[:, 1].view(6, -1)
    for z, found in zip(raw, centred, strict=True):
        for place in places.unique():
            here = places == place
            n = int(here.sum())
            by_hand = (z[here] - z[here].mean(0)) * math.sqrt(n / max(1, n - 1))
            assert torch.allclose(found[here], by_hand, atol=1e-5)


def write_run(
    run, run_dir, draw: np.random.Generator, groups: np.ndarray, gate: float = 0.5, fields: str = "00aa"
) -> np.ndarray:
    """A run folder with made-up predictions of its probes on `test`; their errors `(heads, windows, labels)`, z-scored
    and clipped."""
    folder = run.folder(matters_root(run_dir))
    folder.mkdir(parents=True, exist_ok=True)
    scaler = LabelScaler(get_system("shear_flow"), *(np.array([v, v]) for v in (0.0, 1.0, -2.0, 2.0)))
    truth = np.random.default_rng(0).normal(size=(len(groups), 2))
    z = truth + draw.normal(size=(len(FROZEN), len(groups), 2))
    predictions = {(head, "test"): scaler.inverse(z[i]) for i, head in enumerate(FROZEN)}
    about = {"system": "shear_flow", "objective": run.row[0], "encoder": run.encoder, "seed": run.seed}
    options = dict(scaler=scaler, labelled_flows=16, run=run.path, **about)
    file = folder / "predictions.safetensors"
    write_predictions(
        file, predictions, {"test": scaler.inverse(truth)}, {"test": groups}, data={"test": fields}, **options
    )
    row = {"step": 6, "effective_rank": 9.0, "feature_std": 0.1, "gate": gate}
    pd.DataFrame([row]).to_csv(folder / "curve.csv", index=False)
    assert (np.abs(z) > 2.4).any(), "a tenth beyond the range of labels"
    return np.clip(z, -2.4, 2.4) - truth


def test_errors_are_those_of_the_predictions(tmp_path):
    draw, groups = np.random.default_rng(1), np.repeat(np.arange(6), 4)
    runs = {name: [cell_run(name, "shear_flow", SMOKE, steps=1)] for name in SOME[:2]}
    z = [write_run(run, tmp_path, draw, groups, gate) for (run,), gate in zip(runs.values(), (0.5, 1.5))]
    errors = read_errors(runs, tmp_path)
    assert np.allclose(errors.logs(), [np.log((one**2).mean(axis=(1, 2))) for one in z])
    weights = np.array([2.0, 0, 0, 1, 0, 0])  # the first group twice, the fourth once
    index = np.concatenate([np.flatnonzero(groups == g) for g in (0, 0, 3)])
    assert np.allclose(errors.logs(weights)[1], np.log((z[1][:, index] ** 2).mean(axis=(1, 2))))
    one = read_errors(runs, tmp_path, label="Schmidt")
    assert np.allclose(one.logs()[0], np.log((z[0][:, :, 1] ** 2).mean(axis=1)))
    assert list(errors.runs.passed) == [True, False] and "1.50 times" in errors.runs.why[1]
    assert list(errors.passed().runs.cell) == [SOME[0]] and len(errors.table()) == 8
    other = {SOME[2]: [cell_run(SOME[2], "shear_flow", SMOKE, steps=1)]}
    write_run(other[SOME[2]][0], tmp_path, draw, groups[::-1].copy())
    with pytest.raises(ValueError, match="same windows"):
        read_errors(runs | other, tmp_path)
    elsewhere = {SOME[3]: [cell_run(SOME[3], "shear_flow", SMOKE, steps=1)]}
    write_run(elsewhere[SOME[3]][0], tmp_path, draw, groups, fields="00bb")
    with pytest.raises(ValueError, match="same windows"):  # equal labels of other fields
        read_errors(runs | elsewhere, tmp_path)
    with pytest.raises(ValueError, match="valid: mean, Reynolds, Schmidt"):
        read_errors(runs, tmp_path, label="Re")


def made_up(draw: np.random.Generator, seeds: int = 3, cells: pd.DataFrame = GRID, luck: float = 0.15) -> Errors:
    "Errors with a task, a target and both together; flows differ, and each run on each of them a little."
    runs = cells.loc[cells.index.repeat(seeds)].reset_index(drop=True)
    runs["seed"] = list(range(seeds)) * len(cells)
    runs["cell"] = ["-".join(levels) for levels in runs[list(FACTORS)].to_numpy()]
    runs = runs.assign(passed=True, run=runs.cell + "/" + runs.seed.astype(str))
    y = true_logs(runs) + luck * draw.standard_normal(len(runs))
    y = y[:, None] + np.array([0.2, 0.1, -0.1, -0.2]) + 0.1 * draw.standard_normal((len(runs), 4))
    flows = draw.gamma(3, 1 / 3, 40)
    sums = np.exp(y)[:, :, None] * flows / flows.mean() * draw.gamma(50, 1 / 50, (len(runs), 4, 40))
    return Errors(runs, FROZEN, sums, np.ones(40))


def true_logs(frame: pd.DataFrame) -> np.ndarray:
    "The logarithm of the error of each cell without luck."
    task, target, both = (
        term_columns(frame, term, LEVELS)[:, 0] for term in (("task",), ("target",), ("task", "target"))
    )
    return 0.5 * task + 0.2 * target + 0.3 * both


# mean squares of the effects: columns of three levels are 1, 0, -1
TRUE = {
    "task": 0.5**2 * 2 / 3,
    "target": 0.2**2 * 2 / 3,
    "task x target": 0.3**2 * 4 / 9,
    "head": 0.025,
    "seed": 0.15**2,
}


@pytest.mark.parametrize("dropped", [[], [3, 10]], ids=["all cells", "two cells missing"])
def test_known_shares_come_back(dropped):
    draw = np.random.default_rng(2)
    tables = [made_up(draw, 3, GRID.drop(index=dropped)) for _ in range(40)]
    found = pd.DataFrame([components(e.runs, e.logs()) for e in tables]).mean()
    expected = pd.Series(TRUE).reindex(found.index).fillna(0.0).drop("head x run")
    assert (abs(found[expected.index] - expected) < 0.12 * expected + 0.003).all()
    assert (components(tables[0].runs, tables[0].logs()) >= 0).all()


def test_a_main_effect_is_that_of_marginal_means():
    errors = made_up(np.random.default_rng(3), 2)
    y = errors.logs()
    means = pd.Series(y.mean(axis=1)).groupby(errors.runs.task.to_numpy()).mean()
    found = (
        main_effects(errors, n_bootstrap=2).query("over == @OVER_MEAN").set_index(["factor", "level"]).effect["task"]
    )
    assert np.allclose(np.log(found), (means - means.mean())[found.index])
    assert np.isclose(components(errors.runs, y, times=0)["task"], means.var(ddof=0))


def test_intervals_cover():
    draw = np.random.default_rng(4)
    true = contributions(dict(zip(["-".join(x) for x in GRID.to_numpy()], true_logs(GRID))))
    covered = []
    for _ in range(20):
        errors = made_up(draw)
        claim = paper_claim(errors, n_bootstrap=50).set_index("changed")
        covered.append((claim.low < np.exp(true)) & (np.exp(true) < claim.high))
    share = pd.DataFrame(covered).mean()
    assert (share > 0.75).all() and share.mean() > 0.85, share
    table = shares(errors, n_bootstrap=40).set_index("component")
    assert ((table.low <= table.share) & (table.share <= table.high)).all()
    whole = sum(TRUE.values()) + 0.01
    assert table.low["task"] < TRUE["task"] / whole < table.high["task"]
    wider = shares(made_up(draw, luck=0.4), n_bootstrap=40).set_index("component")
    assert wider.high["task"] - wider.low["task"] > table.high["task"] - table.low["task"]


def test_intervals_of_cells_are_as_wide_as_seeds_and_flows_make_them():
    errors = made_up(np.random.default_rng(8), 3)
    cells, draw = errors.runs.cell.to_numpy(), np.random.default_rng(0)
    (spread,), left = pooled_spread(errors.logs().mean(axis=1, keepdims=True), cells)
    y = np.stack([with_luck(errors, draw) for _ in range(1000)])
    first, other = (y[:, cells == cell].mean(axis=1) for cell in (cells[0], cells[-1]))  # flows cancel
    assert (first - other).std() == pytest.approx(spread * math.sqrt(2 / 3 * left / (left - 2)), rel=0.12)
    flows = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=1000)
    assert y.mean(axis=1).std() == pytest.approx(np.std([errors.logs(w).mean() for w in flows]), rel=0.15)
    found = main_effects(errors, n_bootstrap=400).query("factor == 'task' and over == @OVER_MEAN")
    by_hand = 2 * stats.t.ppf(0.975, left) * spread * math.sqrt((1 / 6 - 1 / 18) / 3)
    assert np.allclose(np.log(found.high / found.low), by_hand, rtol=0.2)


def test_terms_are_tested_as_in_an_analysis_of_variance():
    errors = made_up(np.random.default_rng(3), 2)
    frame = errors.runs.assign(y=errors.logs().mean(axis=1))
    model = smf.ols("y ~ C(task, Sum) * C(target, Sum) * C(encoder, Sum)", frame).fit()
    theirs, ours = anova_lm(model, typ=3).iloc[1:-1], term_tests(errors)
    assert len(ours) == 7 and np.allclose(ours.F, theirs["F"]) and np.allclose(ours.p, theirs["PR(>F)"])


def test_missing_cells_and_seeds_leave_out_what_they_would_tell():
    all_three = FACTORS
    runs = made_up(np.random.default_rng(5), 1).runs
    levels = present_levels(runs)
    assert all_three not in estimable(runs, levels), "one seed: all three together or luck?"
    assert all_three in estimable(made_up(np.random.default_rng(5), 2).runs, levels)
    gone = GRID[~((GRID.task == "window") & (GRID.target == "pixels"))]
    terms = estimable(made_up(np.random.default_rng(5), 2, gone).runs, levels)
    assert ("task", "encoder") in terms and ("task", "target") not in terms and all_three not in terms
    errors = made_up(np.random.default_rng(5), 2, gone)
    found = analyse(errors, n_bootstrap=4)
    assert found.claim is None and "window-pixels-vit, window-pixels-convnext" in found.says
    assert (
        errors.factorial().runs.cell.nunique() == 12 and found.shares.set_index("component").estimated["task x target"]
    ), "of the cells that are crossed"
    one = errors.take(np.array([0, 1]))
    assert analyse(one, n_bootstrap=4).shares is None and "too few" in analyse(one, n_bootstrap=4).says


def test_the_way_of_the_paper_adds_up_and_names_its_factor():
    steps = dict.fromkeys(corners(), 0.0)
    steps |= {cell: math.log(0.5) for cell in corners() if cell.startswith("window")}
    assert set(PAPER.values()) <= set(steps) and len(steps) == 8
    assert np.allclose(contributions(steps)[["task", "target", "encoder", "all"]], [math.log(0.5), 0, 0, math.log(0.5)])
    errors = made_up(np.random.default_rng(6))
    found = analyse(errors, n_bootstrap=20)
    assert np.isclose(found.claim.factor[:3].prod(), found.claim.factor[3])
    assert "The task contributes most" in found.says and found.without_failed is None
    failed = Errors(errors.runs.assign(passed=errors.runs.seed > 0), errors.heads, errors.sums, errors.sizes)
    again = analyse(failed, n_bootstrap=4)
    assert again.without_failed is not None and set(again.table().part) == {
        "shares",
        "without failed",
        "VideoMAE to JEPA",
    }
    assert json.dumps(again.says)


def test_figures_of_an_incomplete_experiment():
    errors = made_up(np.random.default_rng(7), 1, GRID.iloc[[0, 1, 2, 3, 6, 7, 8]])  # one corner of a cube is missing
    passed = [True, False, True, False, True, False, True]
    errors = Errors(errors.runs.assign(passed=passed), errors.heads, errors.sums, errors.sizes)
    assert list(cell_means(errors).passed) == passed
    fig = plot_cells(errors, {"vit": 0.9})
    assert [ax.get_title() for ax in fig.axes] == ["ViT", "ConvNeXt"]
    found = analyse(errors, n_bootstrap=4)
    assert found.claim is None and plot_shares(found.shares, found.without_failed, found.claim).axes
    assert len(plot_main_effects({"shear_flow": main_effects(errors, n_bootstrap=4)}).axes) == len(FACTORS)


def test_one_seed_takes_the_spread_of_errors_that_have_several(tmp_path):
    several, one = made_up(np.random.default_rng(8), 3), made_up(np.random.default_rng(9), 1)
    flows, seeds = main_effects(one, n_bootstrap=100), main_effects(one, seeds_of=several, n_bootstrap=100)
    assert np.allclose(flows.effect, seeds.effect)
    assert (np.log(seeds.high / seeds.low) > np.log(flows.high / flows.low)).all()
    with pytest.raises(ValueError, match="no cell of active_matter is there.* of 4 learning rates tried"):
        read_system("active_matter", SMOKE, [0], chosen_on="shear_flow", run_dir=tmp_path)


def test_a_system_with_enough_seeds_has_a_spread_of_its_own():
    paper = GRID[["-".join(cell) in PAPER.values() for cell in GRID.to_numpy()]]
    first = made_up(np.random.default_rng(8), 3, luck=0.01)
    few, enough = (made_up(np.random.default_rng(9), seeds, paper, luck=0.5) for seeds in (2, 3))
    here, two, three = (OnSystem(name, [], errors, {}, {}, []) for name, errors in zip("abc", (first, few, enough)))
    assert place_lucks(two, here)[0][1] == place_lucks(here, here)[0][1], "2 degrees of freedom: those of the first"
    (spread, left), _ = place_lucks(three, here)
    assert left == 4 and spread[-1] > 5 * place_lucks(here, here)[0][0][-1]
    spreads = spread_of_seeds([here, three])
    assert spreads.loc[("c", "all cells"), MEAN] == pytest.approx(spread[-1])
    own = spreads.loc["c"].loc[list(PAPER.values()), MEAN]
    assert np.sqrt((own**2).mean()) == pytest.approx(spread[-1]), "both cells have as many seeds"
    table = paper_on_systems([here, two, three], n_bootstrap=200)
    ratios, ends = ratio_tables(table).values()
    row = table[(table.probe == MEAN) & (table.over == "VideoMAE") & (table.system == "c")].iloc[0]
    place = ("VideoMAE", "JEPA, zero padding", "c")
    assert ratios.loc[place, MEAN] == interval_text(row.factor, row.low, row.high)
    assert ends.loc[place, MEAN] == f"{row.lowest:.2f} to {row.highest:.2f}"
    table = table[(table.probe == MEAN) & (table.over == "VideoMAE")].set_index("system")
    width = np.log(table.high / table.low)
    assert width["c"] > 3 * width["b"], "the spread of its own seeds is larger"


def test_cells_that_are_not_crossed_have_no_shares():
    cells = pd.DataFrame([CELLS[cell] for cell in COMPARED], columns=list(FACTORS))
    errors = made_up(np.random.default_rng(8), 3, cells)
    assert errors.factorial().runs.empty, "which factor it is cannot be told"
    found = analyse(errors, n_bootstrap=4)
    assert found.shares is None and "too few: no factor has two levels that can be told" in found.says


def test_two_levels_are_compared_also_where_a_factor_has_three():
    errors = made_up(np.random.default_rng(8), 3)
    effects = main_effects(errors, n_bootstrap=50).assign(system="a")
    task = errors.runs.task.to_numpy()
    means = {level: errors.logs()[task == level].mean() for level in LEVELS["task"]}
    pairs = effects[(effects.factor == "task") & (effects.over != OVER_MEAN)].set_index(["level", "over"])
    assert list(pairs.index) == list(combinations(LEVELS["task"], 2))
    for (one, other), row in pairs.iterrows():
        assert row.effect == pytest.approx(math.exp(means[one] - means[other])) and row.low < row.effect < row.high
    row = pairs.loc["tube", "window"]
    assert level_ratios(effects).a["task", "tube over window"] == interval_text(row.effect, row.low, row.high)


def test_systems_are_compared_by_the_cells_that_all_of_them_have():
    every, crossed = made_up(np.random.default_rng(8), 2), GRID[(GRID.task != "future") & (GRID.target != "ema")]
    some = made_up(np.random.default_rng(8), 1, crossed)
    places = [OnSystem(name, [], errors, {}, {}, []) for name, errors in (("a", every), ("b", some))]
    effects = effects_on_systems(places, n_bootstrap=4)
    levels = effects[effects.over == OVER_MEAN].groupby("system")["level"].agg(set)
    assert levels["a"] == levels["b"] == {"tube", "window", "pixels", "shared", "vit", "convnext"}


def test_only_the_comparison_of_the_paper_has_several_seeds_on_other_systems():
    assert {name for name in CELLS if len(seeds_elsewhere(name, [0, 1, 2])) > 1} == set(COMPARED)
    assert all(seeds_elsewhere(name, [0, 1, 2])[:1] == [0] for name in CELLS)


def test_a_cell_is_compared_with_those_that_are_there():
    errors = made_up(np.random.default_rng(8), 3, luck=0.01)
    found = cell_ratios(errors, PAPER["JEPA"], [PAPER["VideoMAE"], PERIODIC], n_bootstrap=50)
    assert set(found.over) == {PAPER["VideoMAE"]}, "no run has periodic padding here"
    found = found[found.probe == MEAN]
    true = dict(zip(["-".join(x) for x in GRID.to_numpy()], true_logs(GRID)))
    row = found.iloc[0]
    assert row.factor == pytest.approx(math.exp(true[PAPER["JEPA"]] - true[PAPER["VideoMAE"]]), rel=0.1)
    assert row.low < row.factor < row.high
    with pytest.raises(ValueError, match=f"no runs of {PERIODIC}; there are tube-pixels-vit"):
        cell_ratios(errors)


def test_probes_that_contradict_each_other_are_told_apart():
    errors = made_up(np.random.default_rng(9), 3, luck=0.01)
    sums = errors.sums.copy()
    jepa = (errors.runs.cell == PAPER["JEPA"]).to_numpy()
    sums[jepa, 0] *= 0.5
    sums[jepa, 1] *= 2.0
    errors = Errors(errors.runs, errors.heads, sums, errors.sizes)
    untrained = {"convnext": sums[jepa][:1] * 1.5}
    found = paper_by_probe(errors, untrained, n_bootstrap=100)
    ratio = found[found.over == "VideoMAE"].set_index("probe").factor
    assert ratio[errors.heads[1]] / ratio[errors.heads[0]] == pytest.approx(4, rel=0.1)
    assert ratio[MEAN] == pytest.approx(np.exp(np.log(ratio.drop(MEAN)).mean()))
    assert (found.lowest <= found.factor).all() and (found.factor <= found.highest).all()
    by_hand = errors.logs()[jepa].min(0) - errors.logs()[(errors.runs.cell == PAPER["VideoMAE"]).to_numpy()].max(0)
    lowest = found[found.over == "VideoMAE"].set_index("probe").lowest
    assert np.allclose(np.log(lowest[list(errors.heads)]), by_hand)
    own = found[found.over == OWN]
    assert set(own.cell) == {"JEPA, zero padding"}, "random weights of the other networks are not there"
    assert own.factor.between(0.55, 0.8).all()
    assert [len(ax.containers) for ax in plot_by_probe(found).axes] == [1, 1]
    tests = matters_probes.tests_by_probe(errors)  # imported by name, pytest would take it for a test
    assert list(tests) == [*errors.heads, MEAN] and tests.loc["target", errors.heads[0]] < 1e-3


def test_seeds_that_are_there_are_found(tmp_path):
    assert seeds_there("shear_flow", SMOKE, tmp_path) == list(SMOKE.seeds)
    run = cell_run(SOME[0], "shear_flow", SMOKE, steps=1).with_seed(7)
    run.folder(matters_root(tmp_path)).mkdir(parents=True)
    run.folder(matters_root(tmp_path)).with_name("seed0.bak").mkdir()
    assert seeds_there("shear_flow", SMOKE, tmp_path) == [*SMOKE.seeds, 7]


def test_random_weights_have_the_padding_of_their_network():
    for encoder in CELL_ENCODERS:
        mine = untrained_run(encoder, "shear_flow", "laptop")
        cell = cell_run(f"tube-pixels-{encoder}", "shear_flow", "laptop", steps=1)
        assert mine.objective == "random" and mine.encoder_config == cell.encoder_config


def test_a_cell_takes_the_recipe_of_its_system(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: smoke\ntrain: {jepa@shear_flow: {lr: 0.004, steps: 4}}\n")
    preset = get_preset(tmp_path / "mine.yaml")
    run = cell_run("window-shared-convnext", "shear_flow", preset, rate="middle", steps=1)
    assert run.recipe.lr == pytest.approx(0.004 * ALL_RATES["middle"])
    assert at_rate(run, "low").recipe.lr == pytest.approx(0.004 * ALL_RATES["low"])

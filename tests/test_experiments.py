"""Every experiment on small runs of preset smoke, and what the committed numbers of one rest on."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT

from physrep.core.files import read_json, write_json
from physrep.data.scaling import Normaliser
from physrep.data.windows import Windows
from physrep.experiments import few_labels, other_flows, rollout, tuning
from physrep.experiments.benchmarks import plainly, reading_file, time_readers, time_updates
from physrep.experiments.factorial import CELLS, PAPER_CELLS, cell_ratios, cell_run, plot_factorial, train_cell
from physrep.experiments.jobs import is_trained, train_and_score
from physrep.experiments.learning_curves import learning_curves, ranks, score_snapshots, shorter_runs
from physrep.experiments.table1 import over_random, plot_paper_order, plot_table1, study_errors
from physrep.experiments.variants import VARIANTS, plot_variants, train_variant, variant_ratios
from physrep.models.encoders import build_encoder
from physrep.models.vit import patchify
from physrep.objectives.emulators import Emulator, persistence_emulator
from physrep.physics.measures import vrmse
from physrep.physics.systems import SYSTEMS, get_system
from physrep.probing.evaluate import score_baseline
from physrep.probing.records import read_results
from physrep.results.archive import kept_files
from physrep.results.rows import CONTROLS, ROWS, Row, make_study, variant_run
from physrep.results.table import mean_errors
from physrep.training.cost import cost, example_batch
from physrep.training.loop import TrainingDiverged
from physrep.training.presets import get_preset
from physrep.training.pretrain import pretrain
from physrep.training.run import build, resolve

LAPTOP = make_study("laptop")
SYSTEM = "shear_flow"
ONLY = "mae-vit,forecast-vit,supervised-vit,random-vit"


def score_baselines(study):
    run = study.run(study.kind("random")[0], SYSTEM)
    for row in study.kind("baseline"):
        score_baseline(row.objective, run)


@pytest.fixture(scope="module")
def study(smoke_data, tmp_path_factory):
    "Four rows of one system and seed, trained and probed."
    smoke = get_preset("smoke")
    recipes = {name: replace(recipe, evaluations=1) for name, recipe in smoke.train.items()}
    preset = replace(smoke, seeds=(0,), train=recipes)
    made = make_study(preset, systems=SYSTEM, only=ONLY, data_dir=smoke_data, run_dir=tmp_path_factory.mktemp("runs"))
    for row in made.kind("trained", "random"):
        train_and_score(made.run(row, SYSTEM), progress=False)
    return replace(made, rows=made.kind("trained", "random"))


def test_what_is_done_is_not_done_again_and_other_flows_are_not_taken_for_it(study, tmp_path):
    run = study.run(study.rows[0], SYSTEM)
    before = (run.folder / "result.json").stat().st_mtime_ns
    train_and_score(run, encoder=True, progress=False)
    assert (run.folder / "result.json").stat().st_mtime_ns == before and is_trained(run)
    record = read_json(run.folder / "provenance.json")
    assert record["numbers"].keys() == {"PHYSICS", "TRAINING", "PROBING"} and record["seconds"] > 0


def test_table_and_differences(study):
    errors = mean_errors(study_errors(study), "attentive")
    assert set(zip(errors.objective, errors.encoder)) == {row.key for row in study.rows}
    assert plot_table1(errors, study.rows).axes
    apart = over_random(study)
    assert set(apart.objective) == {"mae", "forecast"}, "trained without labels"
    assert np.allclose(apart.a - apart.b, apart.difference)


@pytest.mark.parametrize(
    ("row", "system", "chosen"),
    [("jepa.circular-convnext", SYSTEM, "em"), ("jepa.circular-convnext", "active_matter", "i4")]
    + [("jepa-vit", system, "i4") for system in (SYSTEM, "active_matter")],
)
def test_the_laptops_jepa_is_the_candidate_that_was_chosen_and_candidates_start_by_hand(row, system, chosen):
    study = make_study("laptop", systems=system, only=row)
    tried = [one for one in tuning.read_candidates(study) if one.name in ("a", chosen)]
    runs = {one.name: tuning.trial_runs(study, one)[tuning.LENGTH] for one in tried}
    run = study.run(next(one for one in study.rows if one.name == row), system)
    assert run.coefficients == runs[chosen].coefficients != runs["a"].coefficients
    assert run.recipe.decisive() == runs[chosen].recipe.decisive() != runs["a"].recipe.decisive()
    assert runs["a"].coefficients == study.preset.base.coefficients("jepa")


def test_the_papers_order_is_jepa_over_mae_each_over_its_random_weights():
    table = pd.read_csv(ROOT / "figures" / "paper_order.csv")
    errors = pd.read_csv(ROOT / "figures" / "table1.csv")
    errors = errors[(errors.split == "test") & (errors.label == "mean") & (errors.metric == "mse")]
    value = errors.set_index(["system", "objective", "encoder", "probe"]).value
    for line in table.itertuples():
        jepa, untrained = (value[line.system, f"{o}.circular", "convnext", line.probe] for o in ("jepa", "random"))
        mae, other = (value[line.system, o, "vit", line.probe] for o in ("mae", "random"))
        assert line.value == pytest.approx(jepa / untrained / (mae / other), rel=2e-3)
    assert plot_paper_order(table).axes


def test_curves_are_read_from_encoders_on_the_way(study):
    row = next(row for row in study.rows if row.name == "mae-vit")
    run = study.run(row, SYSTEM)
    on_the_way = len(shorter_runs(run))
    files = score_snapshots(run)
    stamps = [file.stat().st_mtime_ns for file in files]
    assert [file.stat().st_mtime_ns for file in score_snapshots(run)] == stamps, "current ones are kept"
    curves = learning_curves(replace(study, rows=(row,)))
    assert len(curves) == on_the_way + 1 > 1, "the last one too"
    assert len(ranks(curves)) == 1


def test_few_labels_of_probes_and_of_a_supervised_row(study):
    row = next(row for row in study.rows if row.reads_labels)
    run = study.run(row, SYSTEM)
    path = few_labels.train_on_few(run, numbers=(2,), progress=False)
    found = read_results(path)
    assert set(found.labelled_flows) == {2} and {"head", "kernel"} <= set(found.probe)
    table = few_labels.few_table(study)
    supervised = table[table.objective == "supervised"]
    assert set(supervised.probe) == {"head"} and 2 in set(supervised.labelled_flows)
    other = few_labels.few_table(replace(study, preset=replace(study.preset, probe_epochs=1)))
    assert 2 not in set(other.labelled_flows), "a preset that probes in another way"
    with pytest.raises(ValueError, match="reads no labels"):
        few_labels.train_on_few(study.run(study.rows[0], SYSTEM))


@pytest.mark.long  # operations of 57 cells are counted
def test_every_cell_takes_as_many_operations_as_mae():
    usual = cost(cell_run(LAPTOP, PAPER_CELLS["VideoMAE"], SYSTEM))["total"]
    for cell in CELLS:
        assert cost(cell_run(LAPTOP, cell, SYSTEM))["total"] == pytest.approx(usual, rel=0.05), cell
    with pytest.raises(ValueError, match="unknown cell 'tube-pixel-vit'; valid: tube-pixels-vit"):
        cell_run(LAPTOP, "tube-pixel-vit", SYSTEM)


@pytest.mark.long
def test_a_cell_over_random_weights(study):
    train_cell(study, PAPER_CELLS["VideoMAE"], SYSTEM, [0], progress=False)
    cells, levels = cell_ratios(study, SYSTEM)
    [line] = cells.itertuples()
    assert line.low < line.value < line.high and set(levels.level) == {"tube", "pixels", "vit"}
    assert np.allclose(levels.value, line.value), "means over a single cell"
    assert plot_factorial(levels, cells).axes


@pytest.mark.long
def test_every_variant_costs_what_its_row_costs():
    for name, variant in VARIANTS.items():
        run, usual = variant_run(LAPTOP, name, variant, SYSTEM)
        assert run.hash != usual.hash, f"{name} changes nothing"
        if variant.recipe.get("unlabelled") is not False:
            assert cost(run)["total"] == pytest.approx(cost(usual)["total"], rel=0.05), name


@pytest.mark.long
def test_a_variant_over_its_row(study):
    train_variant(study, "more_hidden", [0], progress=False)
    [line] = variant_ratios(study).itertuples()
    assert line.row == "mae-vit" and line.low <= line.value <= line.high
    assert plot_variants(variant_ratios(study)).axes


CANDIDATES = """
pixels:
  rows: [mae-vit]
  systems: [shear_flow, active_matter]
  by: valid_loss
  candidates:
    hand: {why: by hand}
    wild: {why: diverges, lr: 9.0}
    more: {why: more is hidden, of: hand, coefficients: {ratio: 0.9}}
    forecast: {why: a control, control: true, objective: forecast}
"""


def test_candidates_are_read_with_what_they_are_of(tmp_path):
    every = tuning.read_candidates(LAPTOP)
    jobs = tuning.parts(replace(LAPTOP, run_dir=tmp_path))
    assert jobs["jepa-vit/b@shear_flow@4"] == [] and "jepa-vit/b@shear_flow@4" in jobs["jepa-vit/e@shear_flow"]
    changes = {one.part: one.variant for one in every}
    fast = changes["jepa-vit/e@active_matter"]
    assert fast.recipe == {"predictor_lr": 3.0} and {"predictor_hidden", "pooled_variance"} <= set(fast.coefficients)
    assert "predictor_hidden" not in changes["jepa-vit/h@shear_flow"].coefficients, "they are of another objective"
    assert "jepa-vit/d@shear_flow" not in changes and "jepa.circular-convnext/d@shear_flow" in changes
    some = tuning.read_candidates(make_study("laptop", systems="shear_flow", only="mae-vit"), names="third")
    assert [one.part for one in some] == ["mae-vit/random@shear_flow", "mae-vit/third@shear_flow"]


@pytest.mark.parametrize(
    "change, message",
    [
        (("lr: 9.0", "rate: 9.0"), "candidate wild of pixels: .*'rate'"),
        (("lr: 9.0", "lr: 9e0"), "candidate wild of pixels: .*text '9e0'"),
        (("of: hand", "of: by_hand"), "candidate more of pixels: 'by_hand'"),
        (("[mae-vit]", "[mae-vti]"), "unknown row mae-vti; valid: .*mae-vit"),
    ],
)
def test_a_file_of_candidates_says_what_is_wrong(change, message, tmp_path):
    (tmp_path / "own.yaml").write_text(CANDIDATES.replace(*change))
    with pytest.raises(ValueError, match=f"own.yaml: .*{message}"):
        tuning.read_candidates(LAPTOP, tmp_path / "own.yaml")


def test_half_of_the_candidates_go_on_and_a_diverged_one_does_not_end_it(study, monkeypatch, tmp_path):
    (tmp_path / "own.yaml").write_text(CANDIDATES)
    candidates, seen = tuning.read_candidates(study, tmp_path / "own.yaml"), []

    def train(run, **options):
        seen.append((run.objective, run.recipe and run.recipe.steps))
        if run.recipe and run.recipe.lr > 1e-3:
            write_json(run.trunk / "provenance.json", {"seconds": 1.0})
            raise TrainingDiverged("the loss is not finite in update 3")
        return pretrain(run, **options)

    monkeypatch.setattr(tuning, "pretrain", train)
    todo = tuning.parts(study, candidates, 2.0)
    first = [f"mae-vit/{name}@shear_flow@0.5" for name in ("random", "hand", "wild", "more", "forecast")]
    assert list(todo)[:5] == first == todo["mae-vit/hand@shear_flow"] and len(todo) == 9
    for part in todo:
        tuning.do_part(study, part, candidates, 2.0, progress=False)
    assert tuning.parts(study, candidates, 2.0) == {} and len(seen) == 5 + 2, "one of three, and the control"
    monkeypatch.setattr(tuning, "pretrain", lambda *args, **options: pytest.fail("trained again"))
    tuning.do_part(study, first[0], candidates, 2.0)
    table = tuning.tuning_table(study, candidates, 2.0)
    verdicts = table.set_index(["candidate", "length"]).verdict
    assert verdicts["wild", 0.5] == "out: the training diverged" and verdicts["random", 0.0] == "control"
    assert sum(verdicts == "goes on") == 1 and sum(verdicts.str.startswith("out: valid_loss")) == 1
    last = table[table.length == 2.0].set_index("candidate")
    assert last.steps.tolist() == [12, last.steps["forecast"]] and (last.error > 0).all() and (last.online > 0).all()
    assert tuning.plot_tuning(table, length=2.0).axes
    on_the_way = list((study.run_dir / "tuning").rglob("result-kernel.json"))
    assert on_the_way and all(set(read_results(file).split) == {"valid"} for file in on_the_way), "test is not read"
    with pytest.raises(ValueError, match="unknown part 'mae-vit/b'; valid: mae-vit/random@shear_flow"):
        tuning.do_part(study, "mae-vit/b", candidates)
    monkeypatch.setattr(Windows, "fingerprint", lambda self: "of other flows")
    assert list(tuning.parts(study, candidates, 2.0))[:5] == first, "results on other data are not taken"


@pytest.fixture(scope="module")
def flows(study) -> rollout.RolloutFlows:
    row = next(row for row in study.rows if row.objective == "forecast")
    return rollout.flows_of(study.run(row, SYSTEM), steps=6)


class Truth:
    "Hands out true frames."

    def __init__(self, frames):
        self.frames, self.at = frames, 0

    def __call__(self, window):
        self.at += 1
        return self.frames[:, :, self.at - 1 : self.at]


def test_a_perfect_model_makes_no_error_and_persistence_repeats_the_last_frame(flows):
    fields = flows.read(np.arange(len(flows)))
    start = flows.start
    perfect = rollout.roll_out(Row("perfect"), Emulator(1, 1, lambda context: Truth(fields[:, :, start:])), flows)
    assert all((error == 0).all() for error in perfect.errors.values())
    still = rollout.roll_out(rollout.PERSISTENCE, persistence_emulator(), flows)
    true = fields[:, 0, start:].double().numpy()
    last = fields[:, 0, start - 1 : start].double().numpy().repeat(true.shape[1], 1)
    assert np.allclose(still.errors["vrmse"][:, 0], vrmse(last, true, floor=rollout.FLOOR * flows.variance[0]))
    table = rollout.rollout_table([still], flows)
    assert set(table.step) == set(range(1, true.shape[1] + 1)) and (table.low <= table["median"]).all()


def test_a_forecaster_is_rolled_out_beside_its_probe(study):
    rows = [row for row in rollout.emulator_rows(study) if row.name == "forecast-vit"]
    with pytest.raises(FileNotFoundError, match="no rollouts of forecast-vit .* NB=07_rollout"):
        rollout.read_rollouts(study, rows)
    rollout.do_part(study, ["forecast-vit", SYSTEM])
    table = rollout.read_rollouts(study, rows)
    assert {"forecast", "persistence"} == set(table.objective) and np.isfinite(table["median"]).all()
    both = rollout.beside_probe(table, study, rows, step=2, probe="linear")
    assert len(both) == 1 and rollout.plot_probes(both, rows).axes and rollout.plot_vrmse(table, rows).axes
    x = Windows(study.data_dir, SYSTEM, "valid", frames=16, stride=16).read([0, 1])
    run = study.run(rows[0], SYSTEM)
    norm = Normaliser.load(run.data_folder, run.system)
    assert rollout.load_emulator(run).context < 16 and norm(x).shape == x.shape


def test_the_same_encoders_are_asked_about_other_flows(study):
    rows = [row for row in study.rows if row.name in ("mae-vit", "supervised-vit", "random-vit")]
    few = replace(study, rows=(*rows, *(row for row in ROWS if row.objective in CONTROLS)))
    score_baselines(few)
    parts = other_flows.parts(few)
    box = {f"box/{SYSTEM}"} & parts.keys()  # it is kept beside the data for the next time
    assert parts.keys() - box == {f"controls/{SYSTEM}", *(f"{row.name}/{SYSTEM}/0" for row in rows)}
    assert parts[f"mae-vit/{SYSTEM}/0"] == [*box]
    for part in parts:
        other_flows.do_part(few, part.split("/"), device="cpu")
    assert not other_flows.parts(few)
    table = other_flows.other_flows_table(few)
    assert set(table.flows) == {"test", "shifted", "long_box"} and {"parameters", "state"} == set(table.asked)
    assert {"random", "mae", "spectra"} <= set(table.objective) and (table.value > 0).all()
    assert other_flows.plot_other_flows(table, ROWS).axes
    held = other_flows.intervals_table(few)
    assert set(held.flows) == {"valid", "test", "shifted", "long_box"} and (held.coverage <= held.widened).all()
    assert other_flows.plot_intervals(held).axes
    blocks = other_flows.blocks_table(few)
    end = {name: blocks[(blocks.objective == name) & (blocks.block == 0)] for name in ("mae", "random")}
    assert set(end["mae"].probe) == {"kernel", "kernel of means", "kernel with statistics"}
    assert set(blocks.block) == {0, 1} and other_flows.plot_blocks(blocks, ROWS).axes
    beside = other_flows.beside_statistics(blocks, table)
    assert len(beside) == 3 and beside.second.nunique() == 1 and other_flows.plot_beside(beside, ROWS).axes
    folders = [few.run(row, SYSTEM).folder for row in rows]
    assert [(folder / other_flows.FEW_ASKED).is_file() for folder in folders] == [True, False, True], "needs no labels"
    kept = kept_files(folders[0])  # no encoder is needed to draw
    assert {"result_asked.json", "result_state.json", "few_asked.json", "predictions_asked.safetensors"} <= set(kept)


def test_a_block_is_read_as_its_tokens_are():
    encoder = build_encoder("vit", in_channels=3, dim=16, depth=2, heads=2, tubelet=(2, 4, 4))
    x = torch.randn(3, 3, 4, 8, 8)
    tokens = [encoder.blocks[0](encoder.embed(patchify(x, (2, 4, 4))) + encoder.pos_embed(encoder.grid(x.shape[2:])))]
    tokens.append(encoder.blocks[1](tokens[0]))
    expected = [part for t in tokens for part in (t.mean(1), t.std(1, correction=0).log())]
    assert torch.allclose(other_flows.BlockMoments(encoder)(x)[:, 0], torch.cat(expected, 1), atol=1e-4)


def test_channels_of_another_system_are_given_by_what_they_mean():
    for name, system in SYSTEMS.items():
        shared = other_flows.shared_names(system)
        assert len(shared) == system.n_channels and {"velocity_x", "velocity_y"} <= set(shared), name
    seen = []
    encoder = torch.nn.Identity()
    encoder.dim = 1
    encoder.forward = lambda x: seen.append(x) or x
    there, here = get_system("shear_flow"), get_system("rayleigh_benard")
    x = torch.randn(1, here.n_channels, 2, 4, 4)
    other_flows.Translated(encoder, there, here)(x)
    place = other_flows.shared_names(there).index("velocity_x")
    assert torch.equal(seen[0][:, place], x[:, other_flows.shared_names(here).index("velocity_x")])


@pytest.mark.parametrize("encoder", ["vit", "convnext"])
def test_an_update_in_plain_pytorch_computes_the_same(encoder):
    run = resolve(SYSTEM, "jepa", encoder, "smoke")
    objective = build(run)
    batch = example_batch(run, objective, 2)
    ours = float(objective(batch)["loss"].detach())
    with plainly():
        assert float(objective(batch)["loss"].detach()) == pytest.approx(ours, rel=1e-5)


def test_updates_and_readers_are_timed(study, tmp_path):
    rows = [row for row in study.rows if row.name == "mae-vit"]
    updates = time_updates([study.run(row, SYSTEM) for row in rows], [2], repeats=1)
    assert (updates.seconds > 0).all() and updates.times_plain.notna().all()
    reading = time_readers(reading_file(tmp_path), windows=2, repeats=1)
    assert {"physrep", "copy in memory"} <= set(reading.reader) and (reading.windows_per_second > 0).all()

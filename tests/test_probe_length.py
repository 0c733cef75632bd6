"""Attentive probes of several lengths: what they read is what the preset's probe reads, and what is there is kept."""

import hashlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from physrep.core.files import project_root, read_json, write_json
from physrep.experiments import matters, probe_length
from physrep.experiments.matters import COMPARED, PAPER, PERIODIC, Place, at_rate, cell_run, matters_root, rate_of
from physrep.experiments.matters_errors import Errors, group_sums
from physrep.experiments.matters_lengths import at_lengths, changed_pairs, plot_cells_by_length, read_on_both
from physrep.experiments.matters_systems import OnSystem
from physrep.experiments.probe_length import (
    ZEROS,
    kept_readings,
    length_ratios,
    length_table,
    lengths_in,
    named_runs,
    plot_lengths,
    random_name,
    read_at_lengths,
)
from physrep.probing.reading import FROZEN
from physrep.training.presets import get_preset

SMOKE = get_preset("smoke")


def test_a_factor_of_one_reads_what_the_probe_of_the_preset_reads_and_nothing_is_read_twice(
    smoke_data, tmp_path, monkeypatch
):
    run = matters.untrained_run("vit", "shear_flow", SMOKE)
    place = Place("shear_flow", SMOKE, smoke_data, tmp_path, progress=False)
    found = read_at_lengths(run, place, [1, 2])
    folder = run.folder(matters_root(tmp_path))
    sums, sizes, _ = group_sums(folder, "test")
    usual = found["read"][str(SMOKE.probe_epochs)]
    assert np.allclose(usual["sums"], sums[FROZEN.index("attentive")]) and found["sizes"] == sizes.tolist()
    assert all(0 < one["epoch"] <= int(epochs) for epochs, one in found["read"].items())

    fitted, fit = [], probe_length.fit_probe
    monkeypatch.setattr(probe_length, "fit_probe", lambda *a, **k: fitted.append(k["recipe"].epochs) or fit(*a, **k))
    again = read_at_lengths(run, place, [1, 3])
    assert fitted == [3 * SMOKE.probe_epochs], "one and two times are there"
    assert again["read"].keys() == {str(k * SMOKE.probe_epochs) for k in (1, 2, 3)}
    assert again["read"][str(SMOKE.probe_epochs)] == usual
    (kept,) = kept_readings({"random-vit": [run, run.with_seed(5)]}, tmp_path)["random-vit"]
    assert kept == again


def test_results_from_elsewhere_are_made_again_with_an_encoder(smoke_data, tmp_path):
    run = matters.untrained_run("vit", "shear_flow", SMOKE)
    place = Place("shear_flow", SMOKE, smoke_data, tmp_path, progress=False)
    place.score_untrained()
    folder = run.folder(matters_root(tmp_path))
    read_at_lengths(run, place, [2])
    (folder / "encoder.safetensors").unlink()
    (folder / ".unpacked").write_text(hashlib.sha256((folder / "result.json").read_bytes()).hexdigest()[:16])
    write_json(folder / matters.SEARCH, {"scores": {"low": 0.5}})
    again = read_at_lengths(run, place, [1])["read"]
    assert list(again) == [str(SMOKE.probe_epochs)], "what was read of the encoder from elsewhere is not beside it"
    assert (folder / "encoder.safetensors").is_file()
    assert read_json(folder / matters.SEARCH)["scores"] == {"low": 0.5}, "hours of a search are kept"


def test_the_errors_of_a_length_are_those_of_its_readings(smoke_data, tmp_path):
    run = matters.untrained_run("vit", "shear_flow", SMOKE)
    there = Place("shear_flow", SMOKE, smoke_data, tmp_path, progress=False)
    reading = read_at_lengths(run, there, [1, 2])
    sums, sizes, _ = group_sums(run.folder(matters_root(tmp_path)), "test")
    errors = Errors(pd.DataFrame({"seed": [0, 1]}), FROZEN, np.stack([sums, sums]), sizes)
    runs = [run, run.with_seed(1)]  # the second one is not read
    place = OnSystem("shear_flow", runs, errors, {}, {"test": reading["data"]["test"]}, [])
    found = at_lengths(place, SMOKE, [0, 1], tmp_path)
    assert [epochs // SMOKE.probe_epochs for epochs in found] == [1, 2]
    which = FROZEN.index("attentive")
    for epochs, one in found.items():
        assert one.runs == runs[:1] and one.missing == [runs[1].path] and list(one.errors.runs.seed) == [0]
        assert one.errors.sums[0, which].tolist() == reading["read"][str(epochs)]["sums"]
        assert np.array_equal(np.delete(one.errors.sums[0], which, 0), np.delete(sums, which, 0)), "of other probes"
        assert one.untrained.keys() == {"vit"} and np.array_equal(one.untrained["vit"], one.errors.sums)
    assert at_lengths(replace(place, runs=runs[1:], errors=errors.take(np.array([1]))), SMOKE, [0], tmp_path) == {}
    with pytest.raises(ValueError, match=f"{run.path} was read at several lengths on other flows"):
        at_lengths(replace(place, flows={"test": "others"}), SMOKE, [0], tmp_path)


def test_pairs_of_cells_whose_order_changes_are_counted():
    errors = {"tube-pixels-vit": (3.0, 1.0), "tube-ema-vit": (2.0, 1.5), "tube-ema-convnext": (4.0, 0.5)}
    rows = [(cell, "attentive", n, e) for cell, both in errors.items() for n, e in zip((12, 96), both)]
    table = pd.DataFrame(rows, columns=["cell", "probe", "epochs", "error"])
    found = changed_pairs(table).set_index("network")
    assert found.loc["all"].tolist() == [3, 3] and found.loc["vit"].tolist() == [1, 1]
    assert found.loc["convnext"].tolist() == [0, 0] and "convnext_circular" not in found.index
    with pytest.raises(ValueError, match="no cell was read at several lengths"):
        plot_cells_by_length(table[:0])


def test_a_system_has_its_own_learning_rate_or_that_of_the_first(tmp_path, monkeypatch):
    video = PAPER["VideoMAE"]
    monkeypatch.setattr(matters, "FOUND", {("smoke", "shear_flow"): dict.fromkeys(COMPARED, "low")})
    runs = named_runs("active_matter", SMOKE, [0, 3], chosen_on="shear_flow", run_dir=tmp_path)
    assert set(runs) == {*COMPARED, *map(random_name, matters.CELL_ENCODERS)}
    assert [run.seed for run in runs[video]] == [0, 3]
    assert runs[video][0] == at_rate(cell_run(video, "active_matter", SMOKE), "low")
    monkeypatch.setattr(matters, "FOUND", matters.FOUND | {("smoke", "active_matter"): {video: "high"}})
    runs = named_runs("active_matter", SMOKE, [0], chosen_on="shear_flow", run_dir=tmp_path)
    assert runs[video][0] == at_rate(cell_run(video, "active_matter", SMOKE), "high")
    monkeypatch.setattr(matters, "FOUND", {})
    with pytest.raises(ValueError, match=f"{video} has no learning rate on active_matter or shear_flow yet"):
        named_runs("active_matter", SMOKE, [0], chosen_on="shear_flow", run_dir=tmp_path)


def readings(draw: np.random.Generator, by_length: dict[int, float], seeds: int = 3, luck: float = 0.05) -> list[dict]:
    "Made-up readings with these errors by epochs."
    flows = np.random.default_rng(0).lognormal(0, 0.3, 12)
    found = []
    for _ in range(seeds):
        own = np.exp(draw.normal(0, luck))
        read = {str(n): {"valid": e, "epoch": n, "sums": (e * own * flows).tolist()} for n, e in by_length.items()}
        found.append({"read": read, "sizes": [2] * len(flows)})
    return found


def test_ratios_are_those_of_errors_at_each_length():
    draw = np.random.default_rng(3)
    some = {PAPER["VideoMAE"]: readings(draw, {12: 0.4, 24: 0.1}), ZEROS: readings(draw, {12: 0.2, 24: 0.2, 48: 0.1})}
    some[random_name("vit")] = readings(draw, {12: 0.5, 24: 0.3})
    assert lengths_in(some) == [12, 24], "that all have"
    table = length_table(some)
    ratios = length_ratios(some, n_bootstrap=100).set_index(["cell", "over", "epochs"])
    geometric = {
        (name, n): np.exp(np.mean([np.log(sum(one["read"][str(n)]["sums"])) for one in found]))
        for name, found in some.items()
        for n in (12, 24)
    }
    for (cell, over, n), row in ratios.iterrows():
        assert row.factor == pytest.approx(geometric[cell, n] / geometric[over, n]) and row.low < row.factor < row.high
    assert set(ratios.index.droplevel("epochs")) == {
        (ZEROS, PAPER["VideoMAE"]),
        (PAPER["VideoMAE"], random_name("vit")),
    }, "pairs of which both are there"
    assert PERIODIC not in set(table.name) and (table["last"] == 3).all() and (table.lowest <= table.error).all()
    assert len(plot_lengths(table.assign(system="shear_flow")).axes) == 1
    assert length_ratios({}).empty


def test_the_committed_readings_are_of_runs_at_known_rates():
    configs = read_json(project_root() / "figures" / "probe_length.json")["configs"].values()
    found = {
        (c["system"], c["tag"], c["encoder"], "padding_mode" in c.get("encoder_config", {})): c["recipe"]["lr"]
        for c in configs
        if "recipe" in c
    }
    assert len(found) == 9
    for system in get_preset("laptop").systems:
        for name in COMPARED:
            here, first = (cell_run(name, s, "laptop", steps=1) for s in (system, "shear_flow"))
            rate = rate_of(name, here, "no such folder") or rate_of(name, first, "no such folder")
            run = at_rate(here, rate)
            assert found[system, run.tag, run.encoder, name == PERIODIC] == run.recipe.lr, (system, name)


def test_a_system_that_was_read_at_more_lengths_than_the_first_is_compared_at_those_of_both():
    ours, theirs = {12: "a", 24: "b", 96: "c"}, {12: "d", 96: "e"}
    assert (
        read_on_both(ours, theirs) == {12: "a", 96: "c"} and read_on_both(ours) == ours and read_on_both(ours, {}) == {}
    )


def test_readings_of_different_flows_are_not_compared(smoke_data, tmp_path):
    place = Place("shear_flow", SMOKE, smoke_data, tmp_path, progress=False)
    runs = {encoder: [matters.untrained_run(encoder, "shear_flow", SMOKE)] for encoder in ("vit", "convnext")}
    for (run,) in runs.values():
        read_at_lengths(run, place, [1])
    assert set(kept_readings(runs, tmp_path)) == set(runs)
    path = runs["vit"][0].folder(matters_root(tmp_path)) / probe_length.FILE
    found = read_json(path)
    write_json(path, found | {"data": found["data"] | {"test": {"flows": "others"}}})
    with pytest.raises(ValueError, match="vit and convnext were read on different test flows"):
        kept_readings(runs, tmp_path)

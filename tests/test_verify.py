"""Every way in which a figure can stop being what it was: its files, code, notebook, configurations and data."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

import physrep.results.verify
from physrep.core.files import read_json, write_json
from physrep.core.provenance import provenance
from physrep.data.sets import find_files, fingerprint
from physrep.probing.reading import probe_splits
from physrep.results.figures import figure_record, save_figure
from physrep.results.verify import check_current, is_current, main, verify
from physrep.training.presets import PRESETS, get_preset
from physrep.training.run import resolve

TABLE = pd.DataFrame({"x": [1.0, 2.0]})


def draw(folder: Path, name: str = "one", **options) -> Path:
    fig = Figure(figsize=(2, 1))
    fig.subplots().plot(TABLE.x)
    runs = [resolve("shear_flow", "mae", "vit", "smoke").path, "constant", "statistics"]
    defaults = dict(preset="smoke", runs=runs, data={"shear_flow": {}})
    return save_figure(fig, folder, name, TABLE, figure_record("05_table1", ["results.table"], **defaults | options))


def edit(folder: Path, **changes: object) -> None:
    write_json(folder / "one.json", read_json(folder / "one.json") | changes)


def state(folder: Path, **options) -> tuple[str, str]:
    [line] = verify(folder, **options).itertuples()
    return line.state, "; ".join(line.why)


def test_what_was_just_drawn_is_current(tmp_path, capsys):
    draw(tmp_path)
    draw(tmp_path, "two")
    df = verify(tmp_path)
    assert (
        df.figure.tolist() == ["one", "two"]
        and df.state.tolist() == ["current"] * 2
        and df.why.tolist() == [[], []]
        and df.unchecked.tolist() == [[], []]
    )
    assert main([str(tmp_path)]) == 0 and capsys.readouterr().out == "current  one\ncurrent  two\n2 current\n"


@pytest.mark.parametrize("kind", ["png", "svg", "csv"])
def test_a_byte_of_a_file(tmp_path, kind):
    draw(tmp_path)
    path = tmp_path / f"one.{kind}"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert state(tmp_path) == ("broken", f"one.{kind} is not the file that was written with the record")
    path.unlink()
    assert state(tmp_path) == ("broken", f"one.{kind} is missing")


def test_a_definition_that_changed_is_named(tmp_path, monkeypatch):
    draw(tmp_path)
    now = read_json(tmp_path / "one.json")["definitions"]
    gone = {name: digest for name, digest in now.items() if name != "over_seeds"}
    other = gone | {"score": "0" * 12, "extra": "1" * 12}
    monkeypatch.setattr(physrep.results.verify, "definitions", lambda *names, entries: other)
    assert state(tmp_path) == ("stale", "code changed: score; code no longer used: over_seeds; code new: extra")
    monkeypatch.setattr(
        physrep.results.verify, "definitions", lambda *names, entries: now | {f"f{k:02}": "" for k in range(20)}
    )
    assert state(tmp_path)[1] == "code new: f00, f01, f02, f03, f04, f05, f06, f07 and 12 more"
    monkeypatch.undo()
    edit(tmp_path, modules=["gone"])
    assert state(tmp_path)[0] == "stale" and "no module 'gone'" in state(tmp_path)[1]


def test_a_definition_outside_of_those_used_does_not_matter(tmp_path):
    draw(tmp_path)
    found = read_json(tmp_path / "one.json")["definitions"]
    assert "plot_table1" not in found and "pretrain" not in found and state(tmp_path) == ("current", "")


def test_only_the_entries_of_tables_that_were_used_matter(tmp_path):
    run = resolve("shear_flow", "mae", "vit", "smoke")
    draw(tmp_path, runs=[run])
    record = read_json(tmp_path / "one.json")
    assert record["entries"] == ["mae", "shear_flow", "vit"] and record["configs"].keys() == {run.name}
    assert any("'mae'" in name for name in record["definitions"])
    assert not any("'jepa'" in name or "'convnext'" in name for name in record["definitions"])


def test_presets_are_in_the_record_and_not_among_the_modules(tmp_path):
    draw(tmp_path)
    record = read_json(tmp_path / "one.json")
    assert not any("PRESETS" in name for name in record["definitions"])
    assert record["probing"] == get_preset("smoke").probing()
    edit(tmp_path, probing=record["probing"] | {"epochs": 99})
    assert state(tmp_path) == ("stale", f"preset smoke: epochs 99 then, {record['probing']['epochs']} now")
    edit(tmp_path, probing=record["probing"], scope=record["scope"] | {"seeds": [0, 1, 2]})
    assert state(tmp_path) == ("stale", "preset smoke: seeds [0, 1, 2] then, [0, 1] now")


def test_the_notebook(tmp_path):
    draw(tmp_path)
    edit(tmp_path, notebook_digest="0" * 16)
    assert state(tmp_path) == ("stale", "notebook 05_table1 changed")
    edit(tmp_path, notebook="05_gone")
    assert state(tmp_path) == ("stale", "notebook 05_gone does not exist")


def test_configurations_by_the_presets_defaults_and_by_their_arguments(tmp_path):
    asked = {"system": "shear_flow", "objective": "jepa", "preset": "smoke", "tag": "long"}
    long = resolve(**asked, steps=9)
    draw(tmp_path, runs=[long, long.with_seed(1)])
    assert state(tmp_path) == ("current", "")
    edit(tmp_path, configs={long.name: asked | {"steps": 10}})
    assert state(tmp_path)[0] == "stale" and f"run {long.name} is jepa.long-convnext-" in state(tmp_path)[1]
    assert state(tmp_path)[1].count("configuration changed") == 1
    edit(tmp_path, configs={}, runs=["jepa-convnext-0123abcd/seed0", "jepa-convnext-0123abcd/seed1"])
    why = state(tmp_path)[1]
    assert why.startswith("run jepa-convnext-0123abcd is jepa-convnext-") and ";" not in why
    edit(tmp_path, runs=["jepb-convnext-0123abcd/seed0"])
    assert "cannot be configured today: unknown objective 'jepb'" in state(tmp_path)[1]
    edit(tmp_path, runs=["jepa-convnext-0123abcd/seed0"], preset="smoky")
    assert "unknown preset 'smoky'" in state(tmp_path)[1]


def test_a_preset_that_changed_changes_its_runs(tmp_path, monkeypatch):
    "What a run does not say itself is the preset's: if that changes, the run has another name today."
    draw(tmp_path, runs=[resolve("shear_flow", "mae", "vit", "smoke", coefficients={"ratio": 0.5})])
    smoke = get_preset("smoke")
    mae = smoke.objectives["mae"] | {"decoder_depth": 3}
    monkeypatch.setitem(PRESETS, "smoke", replace(smoke, objectives={**smoke.objectives, "mae": mae}))
    assert state(tmp_path)[0] == "stale" and "its configuration changed" in state(tmp_path)[1]


def test_data_are_compared_where_they_are(tmp_path, smoke_data):
    prints = {s: fingerprint(find_files(smoke_data, "shear_flow", s)) for s in ("train", "test")}
    draw(tmp_path, data={"shear_flow": prints})
    assert state(tmp_path, data_dir=smoke_data) == ("current", "")
    [line] = verify(tmp_path, data_dir=tmp_path).itertuples()
    assert line.state == "current" and line.unchecked == [
        f"shear_flow {s}: data not here, not checked" for s in ("test", "train")
    ]
    draw(tmp_path, data={"shear_flow": prints | {"test": "0" * 16}})
    assert state(tmp_path, data_dir=smoke_data) == (
        "stale",
        "data of shear_flow, split test, are not those that were used",
    )


def test_records_that_are_missing_torn_or_of_another_kind(tmp_path):
    png = draw(tmp_path)
    record = tmp_path / "one.json"
    whole = record.read_text()
    record.unlink()
    assert state(tmp_path) == ("broken", "no record: what made it is unknown")
    for text, message in [
        (whole[:-9], "is not JSON"),
        ("[1]", "does not have files"),
        ('{"code": "ab"}', "does not have files"),
    ]:
        record.write_text(text)
        assert state(tmp_path)[0] == "broken" and message in state(tmp_path)[1]
    record.write_text(whole)
    old = {k: v for k, v in read_json(record).items() if k not in ("definitions", "entries")}
    write_json(record, old)
    assert state(tmp_path) == ("stale", "the record does not have entries, definitions: draw the figure again")
    (tmp_path / "one.csv").unlink()
    assert state(tmp_path)[0] == "broken" and "one.csv is missing; the record does not" in state(tmp_path)[1]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(FileNotFoundError, match="no figures in"):
        verify(tmp_path)
    assert not png.exists() and main([str(tmp_path)]) == 2


def test_the_command_says_why_and_fails(tmp_path):
    draw(tmp_path)
    (tmp_path / "one.csv").write_text("x\n3\n")
    done = subprocess.run(
        [sys.executable, "-m", "physrep.results.verify", str(tmp_path)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout == "broken   one\n         one.csv is not the file that was written with the record\n1 broken\n"


def test_committed_figures_are_the_files_that_were_written_with_their_records():
    "Stale is for `make verify` to say: a change of code may come before its figures. Broken never is."
    found = verify()
    assert {"table1", "table1_differences", "curves", "resolution", "across", "regimes"} <= set(found.figure)
    assert found[found.state == "broken"].why.tolist() == []


def test_results_of_todays_code_and_of_another(tmp_path):
    made = {"config": {"preset": "smoke"}, "probing": get_preset("smoke").probing()}
    now = provenance("results.table", entries=("vit",))
    path = tmp_path / "seed0" / "result.json"
    assert not is_current(path)
    for content, current in [
        ({**made, "provenance": now}, True),
        ({**made, "provenance": now | {"code": "0" * 16}}, False),
        ({**made, "provenance": now | {"modules": ["gone"]}}, False),
        ({**made, "provenance": {"code": now["code"]}}, False),
        ({**made, "provenance": now, "probing": {**made["probing"], "epochs": 99}}, False),
        ({**made, "provenance": now, "config": {"preset": "a preset of one's own"}}, True),
        ({}, True),
    ]:
        write_json(path, {"rows": [], **content})
        assert is_current(path) == current, content
    write_json(path, {"rows": [], **made, "provenance": now | {"code": "0" * 16}})
    with pytest.raises(ValueError, match="results of other code than today's in .*seed0"):
        check_current([tmp_path])


def test_a_preset_of_a_file_is_compared_where_it_is_given(tmp_path):
    "By its name nobody finds it: such a result counts as current only as long as nobody brings the preset."
    (tmp_path / "mine.yaml").write_text("base: smoke\nprobe_epochs: 3\n")
    before = get_preset(tmp_path / "mine.yaml")
    now = provenance("results.table", entries=("vit",))
    path = tmp_path / "seed0" / "result.json"
    write_json(path, {"rows": [], "config": {"preset": "mine"}, "probing": before.probing(), "provenance": now})
    assert is_current(path) and is_current(path, before)
    check_current([path.parent], before)
    (tmp_path / "mine.yaml").write_text("base: smoke\nprobe_epochs: 4\n")
    after = get_preset(tmp_path / "mine.yaml")
    assert is_current(path) and not is_current(path, after)
    with pytest.raises(ValueError, match="results of other code than today's in .*seed0"):
        check_current([path.parent], after)


def test_a_result_on_other_data_is_not_current(tmp_path, smoke_data):
    run = resolve("shear_flow", "mae", "vit", "smoke")
    windows = probe_splits(run, smoke_data)
    data = {split: one.fingerprint() for split, one in windows.items()}
    made = {"config": run.as_dict(), "probing": run.preset.probing(), "provenance": provenance("results.table")}
    path = tmp_path / "result.json"
    for held, current in [(data, True), (data | {"valid": "0" * 16}, False), ({"test": data["test"]}, False)]:
        write_json(path, {"rows": [], "data": held, **made})
        assert is_current(path, run.preset, windows) == current and is_current(path, run.preset)


def test_data_of_a_preset_of_a_file_are_looked_for_by_its_name(tmp_path, smoke_data, monkeypatch):
    shutil.copytree(smoke_data / "shear_flow", tmp_path / "root" / "data" / "mine" / "shear_flow")
    (tmp_path / "mine.yaml").write_text("base: smoke\n")
    preset = str(tmp_path / "mine.yaml")
    files = find_files(smoke_data, "shear_flow", "test")
    for held, why in [(fingerprint(files), []), ("0" * 16, ["data of shear_flow, split test, are no"])]:
        draw(tmp_path / "figures", preset=preset, runs=[], data={"shear_flow": {"test": held}})
        place = physrep.results.verify._data_place
        monkeypatch.setattr(physrep.results.verify, "default_data_dir", lambda name: tmp_path / "root" / "data" / name)
        assert place(preset) == tmp_path / "root" / "data" / "mine"
        [line] = verify(tmp_path / "figures").itertuples()
        monkeypatch.undo()
        assert line.unchecked == [] and [text[:38] for text in line.why] == why
    (tmp_path / "mine.yaml").unlink()
    assert state(tmp_path / "figures")[0] == "stale" and "no preset file" in state(tmp_path / "figures")[1]


def test_a_baseline_of_other_clips_is_not_current(tmp_path):
    "Its folder does not have them in its name, as that of a run has."
    run = resolve("shear_flow", "random", "vit", "smoke")
    made = {"config": run.as_dict(), "probing": run.preset.probing(), "provenance": provenance("results.table")}
    path, longer = tmp_path / "result.json", replace(run.preset, frames=run.preset.frames + 4)
    for encoder, current in [("none", False), ("vit", True)]:
        write_json(path, {"rows": [{"encoder": encoder}], **made})
        assert is_current(path, run.preset) and is_current(path, longer) == current
    assert not is_current(path, replace(run.preset, paper_labels=True)), "errors in other units"
    write_json(
        path, {"rows": [{"encoder": "none"}], **made, "config": made["config"] | {"clip": {"frames": 8, "size": 16}}}
    )
    assert not is_current(path, replace(run.preset, frames=8, size=8))
    assert is_current(path, replace(run.preset, frames=8, size=16))

"""Every way in which a figure can stop being what it was: its files, the code, the notebook, the configurations, the data."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

import physrep.results.verify
from physrep.results.figures import figure_record, save_figure
from physrep.training.presets import get_preset
from physrep.core.files import read_json, write_json
from physrep.core.provenance import module_digests
from physrep.training.run import resolve, run_folder
from physrep.results.verify import main, verify
from physrep.data.sets import find_files, fingerprint

TABLE = pd.DataFrame({"x": [1.0, 2.0]})


def draw(folder: Path, name: str = "one", **options) -> Path:
    fig = Figure(figsize=(2, 1))
    fig.subplots().plot(TABLE.x)
    run = run_folder(resolve("shear_flow", "mae", "vit", "smoke"), folder)
    defaults = dict(
        preset="smoke", runs=[f"{run.parent.name}/{run.name}", "constant", "statistics"], data={"shear_flow": {}}
    )
    return save_figure(fig, folder, name, TABLE, figure_record("05_table1", ["results"], **defaults | options))


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


def test_a_module_that_changed_is_named(tmp_path, monkeypatch):
    draw(tmp_path)
    digests = module_digests("results")
    monkeypatch.setattr(
        physrep.results.verify, "module_digests", lambda *names: digests | {"scores": "0" * 16, "extra": "1" * 16}
    )
    assert state(tmp_path) == ("stale", "module scores changed; module extra is new")
    monkeypatch.undo()
    edit(tmp_path, modules=["gone"])
    assert state(tmp_path) == ("stale", "physrep has no module 'gone'")


def test_a_module_outside_of_those_used_does_not_matter(tmp_path):
    draw(tmp_path)
    assert "figures" not in read_json(tmp_path / "one.json")["code"] and state(tmp_path) == ("current", "")


def test_presets_are_in_the_record_and_not_among_the_modules(tmp_path):
    draw(tmp_path)
    record = read_json(tmp_path / "one.json")
    assert (
        "presets" not in module_digests("evaluate")
        and "presets" not in record["code"]
        and record["probing"] == get_preset("smoke").probing()
    )
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
    asked = {"system": "shear_flow", "objective": "jepa", "preset": "smoke", "tag": "long", "steps": 9}
    long = run_folder(resolve(**asked), tmp_path).parent.name
    draw(tmp_path, configs={long: asked}, runs=[f"{long}/seed0", f"{long}/seed1"])
    assert state(tmp_path) == ("current", "")
    edit(tmp_path, configs={long: asked | {"steps": 10}})
    assert (
        state(tmp_path)[0] == "stale"
        and f"run {long} is jepa-convnext-long-" in state(tmp_path)[1]
        and state(tmp_path)[1].count("configuration changed") == 1
    )
    edit(tmp_path, configs={}, runs=["jepa-convnext-0123abcd/seed0", "jepa-convnext-0123abcd/seed1"])
    assert (
        state(tmp_path)[1].startswith("run jepa-convnext-0123abcd is jepa-convnext-") and ";" not in state(tmp_path)[1]
    )
    edit(tmp_path, runs=["jepb-convnext-0123abcd/seed0"])
    assert "cannot be configured today: unknown objective 'jepb'" in state(tmp_path)[1]
    edit(tmp_path, runs=["jepa-convnext-0123abcd/seed0"], preset="smoky")
    assert "unknown preset 'smoky'" in state(tmp_path)[1]


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
    assert state(tmp_path) == ("broken", "no record: nobody knows what made it")
    for text, message in [
        (whole[:-9], "is not JSON"),
        ("[1]", "does not have files"),
        ('{"code": "ab"}', "does not have files, modules"),
    ]:
        record.write_text(text)
        assert state(tmp_path)[0] == "broken" and message in state(tmp_path)[1]
    record.write_text(whole)
    edit(tmp_path, code="0123456789abcdef")
    assert state(tmp_path) == ("broken", "the record does not have code by module: draw the figure again")
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
    assert {"table1", "table1_differences", "resolution", "machines", "tuning", "ablations"} <= set(found.figure)
    assert found[found.state == "broken"].why.tolist() == []

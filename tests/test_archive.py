"""Results that come with the repository: packed and unpacked, added to by several machines, and broken on purpose."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from physrep.core.provenance import provenance
from physrep.data.sets import find_files, fingerprint
from physrep.results.archive import (
    check_same_flows,
    is_unpacked,
    kept_files,
    main,
    pack,
    read_archive,
    remove_unpacked,
    result_in,
    unpack,
    with_seeds_there,
    write_archive,
)
from physrep.results.rows import chosen_rows, make_study
from physrep.training.presets import get_preset
from physrep.training.run import resolve

RUN = "mae-vit-01234567/seed0"
LAPTOP = get_preset("laptop")


def scored(folder: Path, run: str = RUN, value: float = 0.5, **record: object) -> Path:
    "The folder of a run as probing leaves it, with files that are not kept; `record` over what made it."
    target = folder / run
    target.mkdir(parents=True)
    result = {"value": value, "provenance": provenance() | record, "probing": LAPTOP.probing()}
    (target / "result.json").write_text(json.dumps(result))
    for name in ("few.json", "curve.csv", "metrics.csv", "predictions.safetensors", "config.json"):
        (target / name).write_bytes(f"{name} of {run}".encode())
    for name in ("encoder.safetensors", "probe-linear.safetensors", ".lock"):
        (target / name).write_bytes(b"weights")
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def moved(folder: Path, archives: Path, elsewhere: Path) -> dict[str, str]:
    pack(folder, archives, LAPTOP)
    return unpack(archives, elsewhere, LAPTOP)


def test_what_a_table_needs_comes_back_to_the_byte_and_nothing_else(tmp_path):
    there = scored(tmp_path / "runs")
    rival = scored(tmp_path / "runs", "rival")
    (rival / "seed0").mkdir()
    (rival / "seed0" / "predictions.safetensors").write_bytes(b"of somebody else, whose CSV is scored again")
    assert moved(tmp_path / "runs", tmp_path / "archives", tmp_path / "others") == {RUN: "written"}
    found = contents(tmp_path / "others" / RUN)
    found.pop(".unpacked")
    assert found == {name: path.read_bytes() for name, path in kept_files(there).items()}
    assert "few.json" in found and not [name for name in found if "encoder" in name or "probe" in name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archives", "others", "runs"]


def test_of_a_training_the_evaluations_are_kept(tmp_path):
    there = scored(tmp_path / "runs")
    (there / "metrics.csv").write_text("step,loss,valid_loss\n1,0.5,0.75\n10,0.4,\n20,0.3,0.25\n")
    moved(tmp_path / "runs", tmp_path / "archives", tmp_path / "others")
    kept = (tmp_path / "others" / RUN / "metrics.csv").read_text()
    assert kept == "step,loss,valid_loss\n1,0.5,0.75\n20,0.3,0.25\n"


def test_machines_add_to_an_archive_and_the_last_result_of_a_run_counts(tmp_path):
    archives = tmp_path / "archives"
    scored(tmp_path / "one")
    scored(tmp_path / "one", "statistics")
    pack(tmp_path / "one", archives, LAPTOP)
    scored(tmp_path / "two", "jepa-vit-89abcdef/seed1")
    scored(tmp_path / "two", value=0.25)
    pack(tmp_path / "two", archives, LAPTOP)
    assert sorted(p.name for p in archives.iterdir()) == ["baselines.zip", "seed0.zip", "seed1.zip"]
    assert json.loads(read_archive(archives / "seed0.zip")[RUN]["result.json"])["value"] == 0.25
    before = (archives / "seed0.zip").read_bytes()
    pack(tmp_path / "two", archives, LAPTOP)
    assert (archives / "seed0.zip").read_bytes() == before, "the same bytes from the same results"


def test_results_of_other_integers_are_neither_packed_nor_unpacked(tmp_path):
    scored(tmp_path / "runs", numbers={"PHYSICS": 0, "TRAINING": 1, "PROBING": 1})
    assert pack(tmp_path / "runs", tmp_path / "archives", LAPTOP) == {RUN: "old"}
    old = {name: path.read_bytes() for name, path in kept_files(tmp_path / "runs" / RUN).items()}
    write_archive(tmp_path / "archives" / "seed0.zip", {RUN: old})
    assert unpack(tmp_path / "archives", tmp_path / "others", LAPTOP) == {RUN: "old"}
    assert contents(tmp_path / "others") == {}


def test_what_was_made_here_stays(tmp_path):
    scored(tmp_path / "runs")
    begun = tmp_path / "begun" / RUN / "checkpoint"
    begun.mkdir(parents=True)
    assert moved(tmp_path / "runs", tmp_path / "archives", tmp_path / "begun") == {RUN: "there"}
    assert not (begun.parent / "result.json").exists(), "a training that is under way gets no result from elsewhere"
    unpack(tmp_path / "archives", tmp_path / "others", LAPTOP)
    there = tmp_path / "others" / RUN
    assert is_unpacked(there)
    (there / "few.json").write_text("scored here since")
    (there / "own.json").write_text("{}")
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    with (there / ".unpacked").open("a") as mark:
        mark.write("\n../../../outside.json\t44136fa355b3678a")
    assert remove_unpacked(there) and sorted(contents(there)) == ["few.json", "own.json"]
    assert outside.is_file(), "a mark names nothing outside its folder"


def test_an_unpacked_result_of_yesterday_is_renewed(tmp_path, monkeypatch):
    scored(tmp_path / "runs")
    moved(tmp_path / "runs", tmp_path / "archives", tmp_path / "others")
    monkeypatch.setattr("physrep.core.provenance.PROBING", 99)
    scored(tmp_path / "today", value=0.25)
    assert moved(tmp_path / "today", tmp_path / "archives", tmp_path / "others") == {RUN: "written"}
    assert json.loads((tmp_path / "others" / RUN / "result.json").read_text())["value"] == 0.25


def test_results_of_other_flows_are_refused_with_what_to_do(tmp_path, smoke_data):
    told = {split: fingerprint(find_files(smoke_data, "shear_flow", split)) for split in ("train", "test")}
    for place, data in (("same", told), ("other", told | {"test": "0123456789abcdef"})):
        folder = tmp_path / place / "runs" / "laptop" / "shear_flow"
        result = scored(folder) / "result.json"
        result.write_text(json.dumps(json.loads(result.read_text()) | {"data": data}))
        elsewhere = tmp_path / f"{place}_elsewhere"
        moved(folder, tmp_path / place / "archives", elsewhere / "laptop" / "shear_flow")
        run = resolve("shear_flow", "mae", "vit", LAPTOP, data_dir=smoke_data, run_dir=elsewhere)
        if place == "same":
            check_same_flows(run)
            continue
        with pytest.raises(ValueError, match="0123456789abcdef.*archive remove --preset laptop"):
            check_same_flows(run)


def test_seeds_are_shown_that_any_row_has(tmp_path):
    rows = "mae-vit,random-vit"
    study = make_study(LAPTOP, systems="shear_flow", only=rows, run_dir=tmp_path)
    more = make_study(LAPTOP, systems="shear_flow", only=rows, run_dir=tmp_path, seeds="3 4")
    for row in study.kind("trained", "random"):
        for run in more.runs(row, "shear_flow"):
            if run.seed != 4 or row.kind == "random":
                scored(run.folder.parent, run.folder.name)
    there = with_seeds_there(study)
    assert there.seeds == (*study.seeds, 3, 4)
    assert [run.seed for run in there.scored("trained") if run.seed > 2] == [3], "of a row those that it has"
    assert chosen_rows(rows) == study.rows


def test_trials_of_tuning_are_packed_apart(tmp_path, capsys):
    runs, archives, others = (tmp_path / name for name in ("runs", "archives", "others"))
    scored(runs / "laptop" / "shear_flow")
    scored(runs / "tuning" / "laptop" / "shear_flow", "jepa.trial1-vit-01234567/seed0")
    for action, place in (("pack", runs), ("unpack", others)):
        assert main([action, "--run-dir", str(place), "--archives", str(archives)]) == 0
    assert len(list(others.rglob("result.json"))) == 2
    assert main(["remove", "--run-dir", str(others)]) == 0 and not list(others.rglob("result.json"))
    assert main(["remove", "--run-dir", str(others)]) == 2
    assert "tuning/laptop/shear_flow: 1 results taken" in capsys.readouterr().out
    (archives / "laptop" / "shear_flow" / "seed0.zip").write_text("broken")
    assert main(["unpack", "--run-dir", str(others), "--archives", str(archives)]) == 1


BAD_MEMBERS = {
    "climbs out": "../../evil/seed0/result.json",
    "absolute": "/tmp/evil/seed0/result.json",
    "another seed": "mae-vit-01234567/seed1/result.json",
    "weights": f"{RUN}/encoder.safetensors",
    "a script": f"{RUN}/run.py",
    "hidden": f"{RUN}/.unpacked",
    "Windows": "mae\\..\\seed0/result.json",
}


@pytest.mark.parametrize("name", BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_a_file_that_no_run_has_is_refused_before_anything_is_written(tmp_path, name):
    write_archive(tmp_path / "archives" / "baselines.zip", {"statistics": {"result.json": b"{}"}})
    with zipfile.ZipFile(tmp_path / "archives" / "seed0.zip", "w") as archive:
        archive.writestr(f"{RUN}/result.json", "{}")
        archive.writestr(name, "{}")
    with pytest.raises(ValueError, match=r"seed0\.zip holds .*, which is no result of seed0; get it again"):
        unpack(tmp_path / "archives", tmp_path / "runs", LAPTOP)
    assert not list((tmp_path / "runs").rglob("*"))


def test_a_broken_archive_is_named(tmp_path):
    path = tmp_path / "seed0.zip"
    write_archive(
        path, {RUN: {"result.json": b'{"value": 0.5}', "few.json": bytes(np.random.default_rng(0).bytes(5000))}}
    )
    whole = path.read_bytes()
    place = whole.index(b"few.json") + 400
    broken = [b"not found", whole[: len(whole) // 2], whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"seed0\.zip is no archive of results"):
            read_archive(path)
    write_archive(path, {RUN: {"few.json": b"{}"}})
    with pytest.raises(ValueError, match=r"seed0\.zip: .* has no result.json"):
        read_archive(path)


def test_the_archives_of_the_repository_are_of_todays_integers():
    from physrep.core.files import project_root

    archives = project_root() / "figures" / "results" / "laptop"
    for system in LAPTOP.systems:
        for path in sorted((archives / system).glob("*.zip")):
            made = [json.loads(files[result_in(files)])["provenance"] for files in read_archive(path).values()]
            assert {"PHYSICS", "TRAINING", "PROBING"} == set.union(*(set(one["numbers"]) for one in made)), path

"""Results that come with the repository: packed and unpacked, added to by several machines, and broken on purpose."""

import json
import zipfile
from pathlib import Path

import pytest

from physrep.core.provenance import provenance
from physrep.results.archive import (
    kept_files,
    main,
    pack,
    read_archive,
    scored_elsewhere,
    unpack,
    with_seeds_there,
    write_archive,
)
from physrep.results.rows import Row, run_of
from physrep.training.presets import get_preset

RUN = "mae-vit-01234567/seed0"


def scored(folder: Path, run: str = RUN, value: float = 0.5, **record: object) -> Path:
    "The folder of a run of today's code as probing leaves it, with files that are not kept."
    target = folder / run
    (target / "curve").mkdir(parents=True)
    config = {"preset": "laptop", "system": "shear_flow"}
    record = provenance("core.files") | record
    probing = json.loads(json.dumps(get_preset("laptop").probing()))
    result = {"value": value, "config": config, "provenance": record, "probing": probing}
    (target / "result.json").write_text(json.dumps(result))
    for name in ("few.json", "curve.csv", "metrics.csv", "predictions.safetensors", "curve/11.json", "config.json"):
        (target / name).write_bytes(f"{name} of {run}".encode())
    for name in ("encoder.safetensors", "probe-linear.safetensors", "curve/11.safetensors", ".lock"):
        (target / name).write_bytes(b"weights")
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_a_table_needs_comes_back_to_the_byte_and_nothing_else(tmp_path):
    there = scored(tmp_path / "runs")
    assert pack(tmp_path / "runs", tmp_path / "archives") == {tmp_path / "archives" / "seed0.zip": [RUN]}
    assert unpack(tmp_path / "archives", tmp_path / "others") == {RUN: "written"}
    found = contents(tmp_path / "others" / RUN)
    assert found.pop(".unpacked") == b""
    assert found == {name: path.read_bytes() for name, path in kept_files(there).items()}
    assert {*found} == {f"{name}.json" for name in ("result", "few", "config", "curve/11")} | {
        f"{name}.csv" for name in ("curve", "metrics")
    } | {"predictions.safetensors"}
    assert [p.name for p in (tmp_path / "others").iterdir()] == [RUN.split("/")[0]], "no folder of unpacking is left"


def test_an_archive_depends_on_nothing_but_what_is_in_it(tmp_path):
    for name in ("one", "two"):
        scored(tmp_path / name)
        pack(tmp_path / name, tmp_path / f"archives_{name}")
    one, two = (tmp_path / f"archives_{name}" / "seed0.zip" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_machines_add_to_an_archive_and_the_last_result_of_a_run_counts(tmp_path):
    archives = tmp_path / "archives"
    scored(tmp_path / "one")
    scored(tmp_path / "one", "statistics")
    assert sorted(p.name for p in pack(tmp_path / "one", archives)) == ["baselines.zip", "seed0.zip"]
    scored(tmp_path / "two", "jepa-vit-89abcdef/seed0")
    scored(tmp_path / "two", "jepa-vit-89abcdef/seed1")
    scored(tmp_path / "two", value=0.25)
    pack(tmp_path / "two", archives)
    runs = read_archive(archives / "seed0.zip")
    assert list(runs) == ["jepa-vit-89abcdef/seed0", RUN]
    assert json.loads(runs[RUN]["result.json"])["value"] == 0.25
    assert list(read_archive(archives / "seed1.zip")) == ["jepa-vit-89abcdef/seed1"]
    assert list(read_archive(archives / "baselines.zip")) == ["statistics"]


def test_results_of_other_code_are_neither_packed_nor_unpacked(tmp_path):
    scored(tmp_path / "runs", code="0123456789abcdef")
    with pytest.raises(FileNotFoundError, match="no results of today's code in .*runs; `make reproduce` makes them"):
        pack(tmp_path / "runs", tmp_path / "archives")
    old = {name: path.read_bytes() for name, path in kept_files(tmp_path / "runs" / RUN).items()}
    write_archive(tmp_path / "archives" / "seed0.zip", {RUN: old})
    assert unpack(tmp_path / "archives", tmp_path / "others") == {RUN: "old"}
    assert contents(tmp_path / "others") == {}


def test_what_has_a_folder_here_is_left_as_it_is(tmp_path):
    scored(tmp_path / "runs")
    pack(tmp_path / "runs", tmp_path / "archives")
    begun = tmp_path / "others" / RUN
    begun.mkdir(parents=True)
    (begun / "checkpoint").mkdir()
    assert unpack(tmp_path / "archives", tmp_path / "others") == {RUN: "there"}
    assert not (begun / "result.json").exists(), "a training that is under way gets no result from elsewhere"


def test_a_run_counts_as_scored_elsewhere_until_it_is_trained_here_or_its_code_changes(tmp_path):
    here = scored(tmp_path / "runs")
    assert not scored_elsewhere(here)
    pack(tmp_path / "runs", tmp_path / "archives")
    unpack(tmp_path / "archives", tmp_path / "others")
    there = tmp_path / "others" / RUN
    assert scored_elsewhere(there)
    (there / "encoder.safetensors").write_bytes(b"weights")
    assert not scored_elsewhere(there)
    (there / "encoder.safetensors").unlink()
    result = json.loads((there / "result.json").read_text())
    result["provenance"]["code"] = "0123456789abcdef"
    (there / "result.json").write_text(json.dumps(result))
    assert not scored_elsewhere(there)


BAD_MEMBERS = {
    "climbs out": "../../evil/seed0/result.json",
    "absolute": "/tmp/evil/seed0/result.json",
    "climbs inside": "mae/../seed0/result.json",
    "another seed": "mae-vit-01234567/seed1/result.json",
    "weights": f"{RUN}/encoder.safetensors",
    "a script": f"{RUN}/run.py",
    "hidden": f"{RUN}/.unpacked",
    "Windows": "mae\\..\\seed0/result.json",
}


@pytest.mark.parametrize("name", BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_a_file_that_no_run_has_is_refused_before_anything_is_written(tmp_path, name):
    good = {"result.json": b"{}"}
    write_archive(tmp_path / "archives" / "baselines.zip", {"statistics": good})
    with zipfile.ZipFile(tmp_path / "archives" / "seed0.zip", "w") as archive:
        archive.writestr(f"{RUN}/result.json", "{}")
        archive.writestr(name, "{}")
    with pytest.raises(ValueError, match=r"seed0\.zip holds .*, which is no result of seed0; get it again"):
        unpack(tmp_path / "archives", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def broken_archives(folder: Path) -> dict[str, Path]:
    "Archives that are none, by what is wrong with them."
    folder.mkdir()
    names = ("text", "cut", "flipped", "misplaced", "no result", "too large", "another packing")
    paths = {name: folder / name.replace(" ", "_") / "seed0.zip" for name in names}
    write_archive(paths["cut"], {RUN: {"result.json": b'{"value": 0.5}', "few.json": bytes(5000)}})
    whole = paths["cut"].read_bytes()
    paths["cut"].write_bytes(whole[: len(whole) // 2])
    write_archive(paths["no result"], {RUN: {"few.json": b"{}"}})
    start = whole.index(b"PK\x01\x02") + 42  # where the list of contents says the first file begins
    contents = {
        "text": b"not found",
        "flipped": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "misplaced": whole[:start] + b"\xff\xff\xff\x00" + whole[start + 4 :],  # found by tests/fuzz.py
    }
    for name, content in contents.items():
        paths[name].parent.mkdir()
        paths[name].write_bytes(content)
    paths["another packing"].parent.mkdir()
    with zipfile.ZipFile(paths["another packing"], "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(f"{RUN}/result.json", "{}")
    paths["too large"].parent.mkdir()
    with zipfile.ZipFile(paths["too large"], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{RUN}/few.json", bytes(65 * 2**20))
    return paths


def test_a_broken_archive_is_named_with_what_to_do(tmp_path):
    says = {
        "text": "is no archive of results",
        "cut": "is no archive of results",
        "flipped": "is no archive of results",
        "misplaced": "is no archive of results",
        "another packing": "which is no result of seed0",
        "no result": f"{RUN} has no result.json",
        "too large": f"few.json has {65 * 2**20} bytes; a result has at most",
    }
    for name, path in broken_archives(tmp_path / "broken").items():
        with pytest.raises(ValueError, match=says[name]) as caught:
            unpack(path.parent, tmp_path / "runs")
        assert str(path) in str(caught.value), name
        assert not (tmp_path / "runs").exists()


def test_seeds_are_shown_that_every_row_has(tmp_path):
    rows = (Row("mae", "vit"), Row("random", "vit"), Row("constant", "none", kind="baseline"))
    preset = get_preset("laptop")
    for row, seeds in zip(rows, ((0, 1, 2), (0, 2, 5))):
        for seed in seeds:
            folder = run_of(row, "shear_flow", preset, seed).folder(tmp_path)
            folder.mkdir(parents=True)
            (folder / "result.json").write_text("{}")
    assert with_seeds_there(preset, "shear_flow", rows, tmp_path).seeds == (*preset.seeds, 2)
    assert with_seeds_there(preset, "active_matter", rows, tmp_path).seeds == preset.seeds
    assert with_seeds_there(preset, "shear_flow", rows[:1], tmp_path).seeds == (*preset.seeds, 1, 2)


def test_by_command(tmp_path, capsys):
    places = ["--run-dir", str(tmp_path / "runs"), "--archives", str(tmp_path / "archives")]
    assert main(["pack", *places]) == main(["unpack", *places]) == 2
    assert "no results of preset laptop to unpack" in capsys.readouterr().out
    scored(tmp_path / "runs" / "laptop" / "shear_flow")
    scored(tmp_path / "runs" / "laptop" / "shear_flow", "old-vit-01234567/seed0", code="0123456789abcdef")
    scored(tmp_path / "runs" / "matters" / "laptop" / "shear_flow", "cell-vit-01234567/seed1")
    assert main(["pack", *places]) == 0
    assert "shear_flow: 1 results of other code than today's are left out" in capsys.readouterr().out
    places[1] = str(tmp_path / "others")
    assert main(["unpack", *places]) == 0
    assert (tmp_path / "others" / "matters" / "laptop" / "shear_flow" / "cell-vit-01234567" / "seed1").is_dir()
    (tmp_path / "archives" / "laptop" / "shear_flow" / "seed0.zip").write_text("not found")
    assert main(["unpack", *places]) == 1
    assert "is no archive of results" in capsys.readouterr().err

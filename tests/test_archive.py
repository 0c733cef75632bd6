"""Results that come with the repository: packed and unpacked, added to by several machines, and broken on purpose."""

import hashlib
import importlib.util
import json
import shutil
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from physrep.core.paths import project_root
from physrep.core.provenance import provenance
from physrep.data.scaling import LabelScaler
from physrep.data.sets import COUNTS_AS, KNOWN, find_files, fingerprint
from physrep.experiments import study
from physrep.physics.systems import get_system
from physrep.probing.records import write_predictions, write_result
from physrep.results.archive import (
    check_same_flows,
    kept_files,
    main,
    pack,
    read_archive,
    remove_unpacked,
    scored_elsewhere,
    unpack,
    with_seeds_there,
    write_archive,
)
from physrep.results.rows import Row, run_of
from physrep.training.presets import get_preset
from physrep.training.run import resolve

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
    for name in ("few.json", "curve.csv", "metrics.csv", "predictions.safetensors", "config.json"):
        (target / name).write_bytes(f"{name} of {run}".encode())
    for name, of in (("11", provenance("core.files")), ("44", {"code": "0123456789abcdef"})):
        (target / "curve" / f"{name}.json").write_text(json.dumps({"provenance": of}))
    for name in ("encoder.safetensors", "probe-linear.safetensors", "curve/11.safetensors", ".lock"):
        (target / name).write_bytes(b"weights")
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_predictions_of_others_are_scored_again_and_not_packed(tmp_path):
    scored(tmp_path / "runs")
    rival = scored(tmp_path / "runs", "rival")
    (rival / "seed0").mkdir()
    (rival / "seed0" / "predictions.safetensors").write_bytes(b"theirs")
    assert pack(tmp_path / "runs", tmp_path / "archives") == {RUN: "written"}


def test_what_a_table_needs_comes_back_to_the_byte_and_nothing_else(tmp_path):
    there = scored(tmp_path / "runs")
    assert pack(tmp_path / "runs", tmp_path / "archives") == {RUN: "written"}
    assert unpack(tmp_path / "archives", tmp_path / "others") == {RUN: "written"}
    found = contents(tmp_path / "others" / RUN)
    digest, *lines = found.pop(".unpacked").decode().splitlines()
    digests = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in found.items()}
    assert digest == digests["result.json"] and dict(line.split("\t") for line in lines) == digests
    assert found == {name: path.read_bytes() for name, path in kept_files(there).items()}
    assert {*found} == {f"{name}.json" for name in ("result", "few", "config", "curve/11")} | {
        f"{name}.csv" for name in ("curve", "metrics")
    } | {"predictions.safetensors"}
    assert [p.name for p in (tmp_path / "others").iterdir()] == [RUN.split("/")[0]]
    assert not list(tmp_path.glob(".unpack*")), "no folder of unpacking is left"


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
    pack(tmp_path / "one", archives)
    assert sorted(p.name for p in archives.iterdir()) == ["baselines.zip", "seed0.zip"]
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
    assert pack(tmp_path / "runs", tmp_path / "archives") == {RUN: "old"}
    assert not (tmp_path / "archives").exists()
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


def test_a_run_counts_as_scored_elsewhere_until_it_is_trained_or_scored_here(tmp_path):
    here = scored(tmp_path / "runs")
    assert not scored_elsewhere(here)
    pack(tmp_path / "runs", tmp_path / "archives")
    unpack(tmp_path / "archives", tmp_path / "others")
    there = tmp_path / "others" / RUN
    for name in ("encoder.safetensors", "checkpoint"):
        assert scored_elsewhere(there)
        (there / name).write_bytes(b"weights")
        assert not scored_elsewhere(there) and not remove_unpacked(there), name
        (there / name).unlink()
    (there / "result.json").write_text((there / "result.json").read_text() + "\n")
    assert not scored_elsewhere(there), "another result"
    assert there.is_dir()


def test_what_was_made_here_stays_when_results_from_elsewhere_are_removed(tmp_path):
    scored(tmp_path / "runs")
    pack(tmp_path / "runs", tmp_path / "archives")
    unpack(tmp_path / "archives", tmp_path / "others")
    there = tmp_path / "others" / RUN
    (there / "trained_on_few.json").write_text("{}")
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    with (there / ".unpacked").open("a") as mark:
        mark.write(f"\n../../../outside.json\n{outside}")
    assert remove_unpacked(there) and list(contents(there)) == ["trained_on_few.json"]
    assert outside.is_file(), "a mark names nothing outside its folder"


def test_results_from_elsewhere_are_renewed_when_their_code_is_of_yesterday(tmp_path):
    scored(tmp_path / "runs", code="0123456789abcdef")
    old = {name: path.read_bytes() for name, path in kept_files(tmp_path / "runs" / RUN).items()}
    there = tmp_path / "others" / RUN
    there.mkdir(parents=True)
    for name in ("result.json", "few.json"):
        (there / name).write_bytes(old[name])
    digest = hashlib.sha256(old["result.json"]).hexdigest()[:16]
    (there / ".unpacked").write_text("\n".join([digest, "result.json", "few.json"]))
    assert not scored_elsewhere(there)
    scored(tmp_path / "today")
    pack(tmp_path / "today", tmp_path / "archives")
    assert unpack(tmp_path / "archives", tmp_path / "others") == {RUN: "written"}
    assert scored_elsewhere(there) and remove_unpacked(there) and not there.exists()


def test_results_of_other_flows_are_refused_with_what_to_do(tmp_path, smoke_data):
    splits = {split: fingerprint(find_files(smoke_data, "shear_flow", split)) for split in ("train", "test")}
    for place, data in (("same", splits), ("other", splits | {"test": "0123456789abcdef"})):
        folder = scored(tmp_path / place)
        result = json.loads((folder / "result.json").read_text()) | {"data": data}
        (folder / "result.json").write_text(json.dumps(result))
        check_same_flows(tmp_path / place, smoke_data, "shear_flow")  # nothing was unpacked
        pack(tmp_path / place, tmp_path / f"archives_{place}")
        unpack(tmp_path / f"archives_{place}", tmp_path / f"unpacked_{place}")
    check_same_flows(tmp_path / "unpacked_same", smoke_data, "shear_flow")
    with pytest.raises(
        ValueError, match=f"0123456789abcdef.*CUDA_VISIBLE_DEVICES= make data.*remove --preset {tmp_path.name}`"
    ):
        check_same_flows(tmp_path / "unpacked_other", smoke_data, "shear_flow")
    rounded = tmp_path / "rounded"
    shutil.copytree(smoke_data / "shear_flow", rounded / "shear_flow")
    (rounded / "shear_flow" / COUNTS_AS).write_text(json.dumps({splits["test"]: "0123456789abcdef"}))
    check_same_flows(tmp_path / "unpacked_other", rounded, "shear_flow")


def test_the_flows_of_the_committed_results_are_known_by_their_recipe():
    known = {entry["fingerprint"]: entry for entry in json.loads(KNOWN.read_text())}
    assert len({entry["recipe"] for entry in known.values()}) == len(known)
    archives = project_root() / "figures" / "results" / "laptop"
    for system in get_preset("laptop").systems:
        result = json.loads(read_archive(archives / system / "baselines.zip")["constant"]["result.json"])
        for split, fingerprint_then in result["data"].items():
            assert known[fingerprint_then]["set"] == f"laptop, {system}"
            assert known[fingerprint_then]["split"] == split


def test_flows_are_told_from_others_by_what_baselines_predict(tmp_path):
    path = project_root() / "tools" / "same_flows.py"
    spec = importlib.util.spec_from_file_location("same_flows", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    scaler = LabelScaler(get_system("active_matter"), *(np.array([v, v]) for v in (0.0, 1.0, -9.0, 9.0)))
    truth, groups = np.random.default_rng(0).normal(size=(6, 2)), np.arange(6)
    about = dict(system="active_matter", objective="spectra", encoder="none", seed=0, labelled_flows=16, run="spectra")

    def written(name: str, error: float, other: int = 0, moved: float = 0.0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        predictions = {("knn", "test"): truth}
        labels = {"test": truth + moved}
        file = folder / "predictions.safetensors"
        write_predictions(file, predictions, labels, {"test": groups + other}, scaler=scaler, **about)
        row = dict(probe="knn", split="test", label="mean", metric="mse", value=error, low=0.3, high=0.5, n=6, draw=0)
        write_result(folder / "result.json", [about | row])
        return folder

    first = written("first", 0.4)
    assert tool.differences(written("near", 0.41), first) == {"knn, test": pytest.approx(0.05)}
    with pytest.raises(ValueError, match="other groups of flows in split 'test'"):
        tool.differences(written("grouped", 0.4, other=1), first)
    with pytest.raises(ValueError, match="other labels in split 'test'"):
        tool.differences(written("labelled", 0.4, moved=0.1), first)


def test_the_runs_of_what_matters_are_packed_beside_those_of_the_table(tmp_path, capsys):
    runs, archives = tmp_path / "runs", tmp_path / "archives"
    cell = "Cell.tube_pixels-vit-01234567/seed1"
    scored(runs / "laptop" / "shear_flow")
    scored(runs / "matters" / "laptop" / "shear_flow", cell)
    assert main(["pack", "--run-dir", str(runs), "--archives", str(archives)]) == 0
    assert set(read_archive(archives / "matters" / "laptop" / "shear_flow" / "seed1.zip")) == {cell}
    others = tmp_path / "others"
    assert main(["unpack", "--run-dir", str(others), "--archives", str(archives)]) == 0
    assert (others / "matters" / "laptop" / "shear_flow" / cell / "result.json").is_file()
    assert (others / "laptop" / "shear_flow" / RUN / "result.json").is_file()
    assert main(["remove", "--run-dir", str(others), "--archives", str(archives)]) == 0
    assert not list(others.rglob("result.json"))
    assert "matters/laptop/shear_flow: 1 results taken" in capsys.readouterr().out


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
    names = ("text", "cut", "flipped", "misplaced", "no result", "no record", "too large", "another packing")
    paths = {name: folder / name.replace(" ", "_") / "seed0.zip" for name in names}
    write_archive(paths["cut"], {RUN: {"result.json": b'{"value": 0.5}', "few.json": bytes(5000)}})
    whole = paths["cut"].read_bytes()
    paths["cut"].write_bytes(whole[: len(whole) // 2])
    write_archive(paths["no result"], {RUN: {"few.json": b"{}"}})
    write_archive(paths["no record"], {RUN: {"result.json": b'{"config": 1, "provenance": []}'}})
    place = whole.index(b"few.json") + len("few.json") + 4  # in what is packed
    start = whole.index(b"PK\x01\x02") + 42  # where the list of contents says the first file begins
    contents = {
        "text": b"not found",
        "flipped": whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :],
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
        "no record": f"result.json of {RUN} is no result",
        "too large": f"few.json has {65 * 2**20} bytes; a result has at most",
    }
    for name, path in broken_archives(tmp_path / "broken").items():
        with pytest.raises(ValueError, match=says[name]) as caught:
            unpack(path.parent, tmp_path / "runs")
        assert str(path) in str(caught.value), name
        assert not (tmp_path / "runs").exists()


def test_seeds_are_shown_that_every_row_has_of_todays_code(tmp_path):
    rows = (Row("mae", "vit"), Row("random", "vit"), Row("constant", "none", kind="baseline"))
    preset = get_preset("laptop")
    for row, seeds in zip(rows, ((0, 1, 2, 3), (0, 2, 3, 5))):
        for seed in seeds:
            folder = run_of(row, "shear_flow", preset, seed).folder(tmp_path)
            scored(
                folder.parents[1], str(folder.relative_to(folder.parents[1])), **{"code": "old"} if seed == 3 else {}
            )
    assert with_seeds_there(preset, "shear_flow", rows, tmp_path).seeds == (*preset.seeds, 2)
    assert with_seeds_there(preset, "active_matter", rows, tmp_path).seeds == preset.seeds
    assert with_seeds_there(preset, "shear_flow", rows[:1], tmp_path).seeds == (*preset.seeds, 1, 2)


def test_the_speed_of_this_machine_is_counted_in_operations_of_pytorchs_attention(monkeypatch):
    "As those of all trainings are: within `fast_products` attention has fewer, and an estimate would be too long."
    inside, counted = [], []

    @contextmanager
    def fast():
        inside.append(True)
        yield
        inside.clear()

    monkeypatch.setattr(study, "fast_products", fast)
    monkeypatch.setattr(study, "cost", lambda run: counted.append(bool(inside)) or {"train": 10**6})
    monkeypatch.setattr(study, "update", lambda *_, **__: counted.append(bool(inside)))
    assert study.measured_rate(resolve("shear_flow", "mae", "vit", "smoke"), seconds=0.0) > 0
    assert counted == [False, True, True]


def test_a_study_does_not_plan_what_was_unpacked_unless_its_encoder_is_asked(tmp_path, monkeypatch):
    preset, runs = get_preset("laptop"), tmp_path / "runs"
    here, there = (run_of(Row("mae", "vit"), "shear_flow", preset, seed) for seed in (0, 1))
    system = here.folder(runs).parents[1]
    scored(tmp_path / "others", str(there.folder(runs).relative_to(system)))
    pack(tmp_path / "others", tmp_path / "archives")
    unpack(tmp_path / "archives", system)
    planned = [(command, run) for command in ("reproduce", "rates", "longer", "question") for run in (here, there)]
    monkeypatch.setattr(study, "planned_runs", lambda *_: planned)
    monkeypatch.setattr(study, "cost", lambda run: {"total": 60e9, "train": 10**6})
    table = study.study_table(preset, run_dir=runs)
    of_question = table[(table.make == "question") & (table.seed == 1)]
    assert not of_question.done.any(), "its answers were not unpacked"
    assert [tuple(row) for row in table[table.done][["make", "seed"]].to_numpy()] == [
        ("reproduce", 1),
        ("rates", 1),
        ("longer", 1),
    ]


def test_by_command(tmp_path, capsys):
    places = ["--run-dir", str(tmp_path / "runs"), "--archives", str(tmp_path / "archives")]
    for action in ("pack", "unpack", "remove"):
        assert main([action, *places]) == 2
        assert f"nothing to {action} of preset laptop in {tmp_path}" in capsys.readouterr().out
    scored(tmp_path / "runs" / "laptop" / "shear_flow")
    scored(tmp_path / "runs" / "laptop" / "shear_flow", "old-vit-01234567/seed0", code="0123456789abcdef")
    scored(tmp_path / "runs" / "laptop" / "my_system", "mae-vit-89abcdef/seed1")
    assert main(["pack", *places]) == 0
    said = capsys.readouterr().out
    assert "shear_flow: 1 results packed, 1 of other code than today's left out" in said
    assert "my_system: 1 results packed, 0 of" in said
    places[1] = str(tmp_path / "others")
    assert main(["unpack", *places]) == 0
    assert "shear_flow: 1 results taken, 0 have a folder here, 0 of" in capsys.readouterr().out
    assert main(["remove", *places]) == 0
    assert "my_system: 1 results from elsewhere removed" in capsys.readouterr().out
    assert not list((tmp_path / "others").rglob("result.json"))
    (tmp_path / "archives" / "laptop" / "shear_flow" / "seed0.zip").write_text("not found")
    assert main(["unpack", *places]) == 1
    assert "is no archive of results" in capsys.readouterr().err


def test_the_archives_of_the_repository_can_be_read():
    archives = sorted((project_root() / "figures" / "results").rglob("*.zip"))
    assert {path.parent.name for path in archives} >= set(get_preset("laptop").systems)
    assert all(read_archive(path) for path in archives)


def test_what_was_made_here_beside_an_old_result_stays_and_the_new_result_comes(tmp_path):
    scored(tmp_path / "runs")
    pack(tmp_path / "runs", tmp_path / "archives")
    there = tmp_path / "others" / RUN
    unpack(tmp_path / "archives", tmp_path / "others")
    mark = (there / ".unpacked").read_text().splitlines()
    old = json.loads((there / "result.json").read_text())
    old["provenance"]["code"] = "0123456789abcdef"
    (there / "result.json").write_text(json.dumps(old))
    digest = hashlib.sha256((there / "result.json").read_bytes()).hexdigest()[:16]
    (there / ".unpacked").write_text("\n".join([digest, *(m.replace(mark[0], digest) for m in mark[1:])]))
    (there / "trained_on_few.json").write_text("three quarters of an hour")
    (there / "few.json").write_text("made here since")
    unpack(tmp_path / "archives", tmp_path / "others")
    assert scored_elsewhere(there), "the new result is there"
    assert (there / "trained_on_few.json").read_text() == "three quarters of an hour"
    assert (there / "few.json").read_text() == "made here since"
    remove_unpacked(there)
    assert sorted(p.name for p in there.iterdir()) == ["few.json", "trained_on_few.json"]


def test_a_copy_of_a_folder_is_no_seed(tmp_path):
    folder = scored(tmp_path / "runs")
    shutil.copytree(folder, folder.with_name("seed0.bak"))
    assert pack(tmp_path / "runs", tmp_path / "archives") == {RUN: "written"}
    assert [path.name for path in (tmp_path / "archives").iterdir()] == ["seed0.zip"]
    preset = get_preset("laptop")
    run = run_of(Row("mae", "vit"), "shear_flow", preset, 0)
    copy = run.with_seed(7).folder(tmp_path / "more").with_name("seed7.bak")
    copy.mkdir(parents=True)
    assert with_seeds_there(preset, "shear_flow", [Row("mae", "vit")], tmp_path / "more") == preset


def test_old_scores_on_the_way_are_not_unpacked_with_a_result_of_today(tmp_path):
    there = scored(tmp_path / "runs")
    files = {name: path.read_bytes() for name, path in kept_files(there).items()}
    files["curve/44.json"] = (there / "curve" / "44.json").read_bytes()  # of other code, as before a change
    write_archive(tmp_path / "archives" / "seed0.zip", {RUN: files})
    assert unpack(tmp_path / "archives", tmp_path / "others") == {RUN: "written"}
    assert [path.name for path in (tmp_path / "others" / RUN / "curve").iterdir()] == ["11.json"]

"""Downloads where the notebook does not look: the client, sizes, the disk, what is asked for, the command line."""

import inspect
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import yaml

import physrep.data.download
from physrep.data.download import check_files, download, main
from physrep.data.write import write_stats, write_well


@pytest.fixture
def published(tmp_path):
    "A published set of one small file a split, with statistics, a picture and a file of another folder."
    rng = np.random.default_rng(0)
    fields = {
        "tracer": rng.normal(size=(1, 2, 8, 16)),
        "pressure": rng.normal(size=(1, 2, 8, 16)),
        "velocity": rng.normal(size=(1, 2, 8, 16, 2)),
    }
    root = tmp_path / "published"
    for split in ("train", "valid", "test"):
        for name in ("Reynolds_1e4", "Reynolds_5e4"):
            path = root / "data" / split / f"shear_flow_{name}.hdf5"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_well(
                path,
                "shear_flow",
                fields,
                {"Reynolds": float(name.split("_")[1]), "Schmidt": 1.0},
                time=[0.0, 0.1],
                box=(1.0, 2.0),
            )
    write_stats(root, "shear_flow")
    (root / "README.md").write_text("words")
    (root / "data" / "train" / "gif").mkdir()
    (root / "data" / "train" / "gif" / "a.hdf5").write_text("no")
    return root


class Client:
    "Stands for the package huggingface_hub."

    def __init__(self, root, spoil=lambda name, call: False):
        self.root, self.spoil, self.calls = root, spoil, []

    def HfApi(self):
        siblings = [
            SimpleNamespace(rfilename=str(p.relative_to(self.root)), size=p.stat().st_size)
            for p in sorted(self.root.rglob("*"))
            if p.is_file()
        ]
        return SimpleNamespace(repo_info=lambda name, **_: SimpleNamespace(siblings=siblings))

    def snapshot_download(self, name, *, repo_type, revision, local_dir, allow_patterns):
        self.calls.append((name, sorted(n for n in allow_patterns if not (local_dir / n).is_file())))
        for n in self.calls[-1][1]:
            (local_dir / n).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / n, local_dir / n)
            if self.spoil(n, len(self.calls)):
                (local_dir / n).write_bytes((local_dir / n).read_bytes()[:-1])


def test_only_what_is_asked_for_comes_and_the_second_call_brings_nothing(published, tmp_path):
    client = Client(published)
    folder = download("shear_flow", tmp_path / "mine", ["valid"], pattern="*1e4*", client=client, say=lambda text: None)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "data/valid/shear_flow_Reynolds_1e4.hdf5",
        "stats.yaml",
    ]
    download("shear_flow", tmp_path / "mine", ["valid"], pattern="*1e4*", client=client, say=lambda text: None)
    assert client.calls[0][0] == "polymathic-ai/shear_flow" and client.calls[1][1] == []


def test_a_file_that_stays_wrong_is_named_and_gone(published, tmp_path):
    client = Client(published, spoil=lambda name, call: "stats" in name or "test/shear_flow_Reynolds_5e4" in name)
    with pytest.raises(
        RuntimeError,
        match=r"after 2 tries still wrong: .*shear_flow_Reynolds_5e4.hdf5.*stats.yaml: \d+ bytes, the server has \d+",
    ):
        download("shear_flow", tmp_path / "mine", client=client, say=lambda text: None)
    assert len(client.calls) == 2 and len(list((tmp_path / "mine").rglob("*.hdf5"))) == 5


def test_a_whole_file_that_physrep_cannot_use_is_named_and_stays(published, tmp_path):
    with h5py.File(published / "data" / "valid" / "shear_flow_Reynolds_1e4.hdf5", "r+") as f:
        f["dimensions"].attrs["spatial_dims"] = ["x", "z"]
    client = Client(published)
    with pytest.raises(
        RuntimeError, match=r"after 1 try still wrong: .*Reynolds_1e4.hdf5: dimensions@spatial_dims is \['x', 'z'\]"
    ):
        download("shear_flow", tmp_path / "mine", client=client, say=lambda text: None)
    assert len(client.calls) == 1 and len(list((tmp_path / "mine").rglob("*.hdf5"))) == 6


def test_what_has_come_already_needs_no_room(published, tmp_path, monkeypatch):
    folder, said = tmp_path / "mine" / "shear_flow", []
    (folder / "data" / "train").mkdir(parents=True)
    shutil.copy(published / "data" / "train" / "shear_flow_Reynolds_1e4.hdf5", folder / "data" / "train")
    (folder / "data" / "train" / "shear_flow_Reynolds_5e4.hdf5").write_bytes(b"half")  # of another size: comes again
    part = folder / ".cache" / "huggingface" / "download" / "data" / "x.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    sizes = [
        p.stat().st_size for p in published.rglob("*") if p.suffix in (".hdf5", ".yaml") and p.parent.name != "gif"
    ]
    need = sum(sizes) - (published / "data" / "train" / "shear_flow_Reynolds_1e4.hdf5").stat().st_size - 1000
    for free, enough in ((need - 1, False), (need, True)):
        monkeypatch.setattr(
            physrep.data.download.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free)
        )
        with pytest.raises(RuntimeError if enough else ValueError, match="still wrong" if enough else "the disk has"):
            download(
                "shear_flow",
                tmp_path / "mine",
                client=Client(published, spoil=lambda name, call: True),
                tries=1,
                say=said.append,
            )


def test_a_disk_that_is_too_small_is_found_before_the_first_byte(published, tmp_path, monkeypatch):
    monkeypatch.setattr(physrep.data.download.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    client = Client(published)
    with pytest.raises(ValueError, match="GB are still to come, the disk has 0.0 GB free"):
        download("shear_flow", tmp_path / "mine", client=client)
    assert client.calls == []


def test_bad_names(published, tmp_path):
    with pytest.raises(ValueError, match="unknown split val; valid: train, valid, test"):
        download("shear_flow", tmp_path, ["val"], client=Client(published))
    with pytest.raises(ValueError, match="unknown system 'shear'"):
        download("shear", tmp_path, client=Client(published))
    with pytest.raises(FileNotFoundError, match="no .h5 or .hdf5 files in"):
        check_files(tmp_path / "nothing", "shear_flow")


def test_without_the_client_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert main(["shear_flow", str(tmp_path)]) == 1
    assert "pip install 'physrep[download]'" in capsys.readouterr().out


def test_check_from_the_command_line(published, tmp_path, capsys):
    shutil.copytree(published / "data" / "valid", tmp_path / "mine" / "shear_flow" / "data" / "valid")
    assert (
        main(["shear_flow", str(tmp_path / "mine"), "--check"]) == 0
        and "all files are whole" in capsys.readouterr().out
    )
    (tmp_path / "mine" / "shear_flow" / "data" / "valid" / "b.hdf5").write_text("<html>")
    assert (
        main(["shear_flow", str(tmp_path / "mine"), "--check"]) == 1 and "b.hdf5: a web page" in capsys.readouterr().out
    )
    (tmp_path / "mine" / "shear_flow").rename(tmp_path / "hub")  # the folder itself, as the hub's client leaves it
    (tmp_path / "hub" / "stats.yaml").write_text("<html>")
    assert main(["shear_flow", str(tmp_path / "hub"), "--check", "--remove"]) == 1
    out = capsys.readouterr().out
    assert (
        "b.hdf5: a web page" in out
        and "stats.yaml: not statistics but '<html>'" in out
        and not (tmp_path / "hub" / "data" / "valid" / "b.hdf5").exists()
    )
    assert (
        main(["active_matter", str(tmp_path / "hub"), "--check"]) == 1
        and "no .h5 or .hdf5 files of active_matter" in capsys.readouterr().out
    )


def test_the_client_has_the_face_that_is_used():
    import huggingface_hub

    assert {"repo_type", "revision", "local_dir", "allow_patterns"} <= set(
        inspect.signature(huggingface_hub.snapshot_download).parameters
    )
    assert {"repo_type", "revision", "files_metadata"} <= set(
        inspect.signature(huggingface_hub.HfApi.repo_info).parameters
    )


def test_older_statistics_and_hidden_files_are_no_fault(published, tmp_path):
    stats = yaml.safe_load((published / "stats.yaml").read_text())
    (published / "stats.yaml").write_text(yaml.safe_dump({key: stats[key] for key in ("mean", "std")}))
    (published / "data" / "train" / "._shear_flow_Reynolds_1e4.hdf5").write_bytes(b"of a finder")
    assert check_files(published, "shear_flow") == []
    (published / "stats.yaml").write_text(yaml.safe_dump({"mean": stats["mean"]}))
    (problem,) = check_files(published, "shear_flow")
    assert "no 'std'" in problem


def test_a_hub_that_cannot_be_reached_is_said_without_a_traceback(published, tmp_path, monkeypatch, capsys):
    class ConnectError(Exception):
        "As that of httpx, which is no OSError."

    ConnectError.__module__ = "httpx"

    class Unreachable(Client):
        def HfApi(self):
            raise ConnectError("Temporary failure in name resolution")

    with pytest.raises(ConnectionError, match="polymathic-ai/shear_flow: the hub cannot be reached .Temporary failure"):
        download("shear_flow", tmp_path, client=Unreachable(published))
    monkeypatch.setattr(physrep.data.download, "_client", lambda: Unreachable(published))
    assert main(["shear_flow", str(tmp_path)]) == 1 and "call it again to go on" in capsys.readouterr().out

"""Downloads where the notebook does not look: the client, sizes, the disk, what is asked for, the command line."""

import inspect
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import h5py
import pytest
import yaml
from broken import well_file

import physrep.data.download
from physrep.data.download import check_files, main
from physrep.data.write import write_stats

download = partial(physrep.data.download.download, "shear_flow", say=lambda text: None)


@pytest.fixture
def published(tmp_path):
    "A published set of two small files a split, with statistics, a page and a file of another folder."
    root = tmp_path / "published"
    for split in ("train", "valid", "test"):
        for reynolds in ("1e4", "5e4"):
            path = root / "data" / split / f"shear_flow_Reynolds_{reynolds}.hdf5"
            well_file(path, shape=(1, 2, 8, 16), parameters={"Reynolds": float(reynolds), "Schmidt": 1.0})
    write_stats(root, "shear_flow")
    (root / "README.md").write_text("words")
    (root / "data" / "train" / "gif").mkdir()
    (root / "data" / "train" / "gif" / "a.hdf5").write_text("no")
    return root


class Client:
    "Stands for the package huggingface_hub; what is in `spoilt` arrives a byte short."

    def __init__(self, root, spoilt=()):
        self.root, self.spoilt, self.calls = root, spoilt, []

    def HfApi(self):
        found = [p for p in sorted(self.root.rglob("*")) if p.is_file()]
        siblings = [SimpleNamespace(rfilename=str(p.relative_to(self.root)), size=p.stat().st_size) for p in found]
        return SimpleNamespace(repo_info=lambda name, **_: SimpleNamespace(siblings=siblings))

    def snapshot_download(self, name, *, repo_type, local_dir, allow_patterns):
        self.calls.append(sorted(n for n in allow_patterns if not (local_dir / n).is_file()))
        for n in self.calls[-1]:
            (local_dir / n).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.root / n, local_dir / n)
            if any(part in n for part in self.spoilt):
                (local_dir / n).write_bytes((local_dir / n).read_bytes()[:-1])


def test_only_what_is_asked_for_comes_and_the_second_call_brings_nothing(published, tmp_path):
    client = Client(published)
    for _ in range(2):
        folder = download(tmp_path / "mine", ["valid"], pattern="*1e4*", client=client)
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert found == ["data/valid/shear_flow_Reynolds_1e4.hdf5", "stats.yaml"] and client.calls == [found, []]


def test_a_file_that_stays_damaged_is_named_and_gone(published, tmp_path):
    client = Client(published, spoilt=("stats", "test/shear_flow_Reynolds_5e4"))
    with pytest.raises(RuntimeError, match=r"still wrong: .*Reynolds_5e4.hdf5.*stats.yaml: \d+ bytes, the server has"):
        download(tmp_path / "mine", client=client)
    assert len(client.calls) == 2 and len(list((tmp_path / "mine").rglob("*.hdf5"))) == 5


def test_a_whole_file_that_physrep_cannot_use_is_named_and_stays(published, tmp_path):
    with h5py.File(published / "data" / "valid" / "shear_flow_Reynolds_1e4.hdf5", "r+") as f:
        f["dimensions"].attrs["spatial_dims"] = ["x", "z"]
    client = Client(published)
    with pytest.raises(RuntimeError, match=r"still wrong: .*1e4.hdf5: dimensions@spatial_dims is \['x', 'z'\]"):
        download(tmp_path / "mine", client=client)
    assert len(client.calls) == 1 and len(list((tmp_path / "mine").rglob("*.hdf5"))) == 6


def test_a_disk_that_is_too_small_is_found_before_the_first_byte_and_what_has_come_needs_no_room(
    published, tmp_path, monkeypatch
):
    folder, client = tmp_path / "mine" / "shear_flow", Client(published)
    (folder / "data" / "train").mkdir(parents=True)
    first = published / "data" / "train" / "shear_flow_Reynolds_1e4.hdf5"
    shutil.copy(first, folder / "data" / "train")
    (folder / "data" / "train" / "shear_flow_Reynolds_5e4.hdf5").write_bytes(b"half")  # of another size: comes again
    part = folder / ".cache" / "huggingface" / "download" / "data" / "x.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    whole = sum(p.stat().st_size for p in [*published.glob("data/*/*.hdf5"), published / "stats.yaml"])
    need = whole - first.stat().st_size - 1000
    for free in (need - 1, need):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if free < need:
            with pytest.raises(ValueError, match="GB are still to come, the disk has"):
                download(tmp_path / "mine", client=client)
            assert client.calls == []
    (folder / "data" / "train" / "shear_flow_Reynolds_5e4.hdf5").unlink()
    download(tmp_path / "mine", client=client)


def test_what_cannot_be_downloaded_or_checked_is_said(published, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="unknown split val; valid: train, valid, test"):
        download(tmp_path, ["val"], client=Client(published))
    with pytest.raises(FileNotFoundError, match="no .h5 or .hdf5 files in"):
        check_files(tmp_path / "nothing", "shear_flow")

    class ConnectError(Exception):
        "As that of httpx, which is no OSError."

    ConnectError.__module__ = "httpx"

    def unreachable():
        raise ConnectError("Temporary failure in name resolution")

    for client, said in ((None, "pip install 'physrep[download]'"), (SimpleNamespace(HfApi=unreachable), "go on")):
        monkeypatch.setitem(sys.modules, "huggingface_hub", client)
        assert main(["shear_flow", str(tmp_path)]) == 1 and said in capsys.readouterr().out


def test_what_is_whole_is_not_removed(published):
    "A field put together from parts of its own file, and a link to a disk that is not there now."
    path = published / "data" / "train" / "shear_flow_Reynolds_1e4.hdf5"
    with h5py.File(path, "r+") as file:
        file.move("t0_fields/tracer", "parts")
        layout = h5py.VirtualLayout(file["parts"].shape, file["parts"].dtype)
        layout[...] = h5py.VirtualSource(file["parts"])
        file["t0_fields"].create_virtual_dataset("tracer", layout)
    assert check_files(published, "shear_flow", remove=True) == []
    link = published / "data" / "train" / "link.hdf5"
    link.symlink_to(published / "elsewhere.hdf5")
    (problem,) = check_files(published, "shear_flow", remove=True)
    assert "link.hdf5: missing" in problem and path.is_file() and link.is_symlink()


def test_check_from_the_command_line(published, tmp_path, capsys):
    root = tmp_path / "mine"
    shutil.copytree(published / "data" / "valid", root / "shear_flow" / "data" / "valid")
    assert main(["shear_flow", str(root), "--check"]) == 0 and "all files are whole" in capsys.readouterr().out
    (root / "shear_flow" / "data" / "valid" / "b.hdf5").write_text("<html>")
    assert main(["shear_flow", str(root), "--check"]) == 1 and "b.hdf5: a web page" in capsys.readouterr().out
    hub = (root / "shear_flow").rename(tmp_path / "hub")  # the folder itself, as the hub's client leaves it
    (hub / "stats.yaml").write_text("<html>")
    assert main(["shear_flow", str(hub), "--check", "--remove"]) == 1
    out = capsys.readouterr().out
    assert "b.hdf5: a web page" in out and "stats.yaml: not statistics but '<html>'" in out
    assert not (hub / "data" / "valid" / "b.hdf5").exists() and len(list(hub.rglob("*.hdf5"))) == 2
    assert main(["active_matter", str(hub), "--check"]) == 1 and "files of active_matter" in capsys.readouterr().out


def test_the_client_has_the_face_that_is_used():
    import huggingface_hub as hub

    assert {"repo_type", "local_dir", "allow_patterns"} <= inspect.signature(hub.snapshot_download).parameters.keys()
    assert {"repo_type", "files_metadata"} <= inspect.signature(hub.HfApi.repo_info).parameters.keys()


def test_older_statistics_and_hidden_files_are_no_fault(published, tmp_path):
    stats = yaml.safe_load((published / "stats.yaml").read_text())
    (published / "stats.yaml").write_text(yaml.safe_dump({key: stats[key] for key in ("mean", "std")}))
    (published / "data" / "train" / "._shear_flow_Reynolds_1e4.hdf5").write_bytes(b"of a finder")
    assert check_files(published, "shear_flow") == []
    (published / "stats.yaml").write_text(yaml.safe_dump({"mean": stats["mean"]}))
    (problem,) = check_files(published, "shear_flow")
    assert "no 'std'" in problem

"Sets on a network: a web server that is slow, cuts connections and answers with error pages, read through the cache."

import http.server
import json
import os
import re
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import fsspec
import h5py
import pytest
import torch
from broken import well_file
from helpers import dry_run
from torch.utils.data import DataLoader

from physrep.core.files import project_root
from physrep.data import leakage, remote, sets
from physrep.data.remote import NetworkError
from physrep.data.scaling import Normaliser
from physrep.data.sets import find_files, find_folder, fingerprint, read_stats
from physrep.data.well import WellFile, WellFormatError
from physrep.data.windows import Windows
from physrep.data.write import write_stats
from physrep.training.run import ensure_data, resolve

PAGE = b"<html><body>503 Service Unavailable</body></html>"


class FaultyHandler(http.server.SimpleHTTPRequestHandler):
    "Serves a folder with ranges; `server.faults` holds what goes wrong with the next requests for a range."

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes, **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            return super().do_GET() if self.command == "GET" else super().do_HEAD()
        body, tag = file.read_bytes(), f'"{file.stat().st_mtime_ns}"'
        if "Range" not in self.headers:
            if self.server.head_faults:
                self.server.head_faults.pop()
                return self.answer(503, PAGE)
            return self.answer(200, body, ETag=tag, Accept_Ranges="bytes")
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        first, last = int(first), min(int(last or len(body)), len(body) - 1)
        part = body[first : last + 1]
        self.server.asked.append((file.name, first, last + 1))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault in ("page", "page as data", "gone"):
            return self.answer({"page": 503, "page as data": 200, "gone": 404}[fault], PAGE)
        if fault == "cut":
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            return self.connection.close()
        time.sleep(0.3 if fault == "slow" else 0)
        return self.answer(206, part, ETag=tag, Content_Range=f"bytes {first}-{last}/{len(body)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A set of three files of two trajectories each, of random numbers; the fields of each take 3 MB."
    root = tmp_path_factory.mktemp("set")
    for k, schmidt in enumerate((0.2, 0.5, 1.0)):
        labels = {"Reynolds": 1e4, "Schmidt": schmidt}
        well_file(root / f"shear_flow/data/train/Schmidt_{schmidt:g}.hdf5", k, shape=(2, 24, 64, 64), parameters=labels)
    write_stats(root, "shear_flow")
    return root


class HubHandler(FaultyHandler):
    "The same as the Hugging Face hub: a list of each folder, and files at `resolve/main`."

    def do_GET(self):
        place = unquote(self.path.partition("?")[0])
        api, *repository, what = [*place.strip("/").split("/", 4), ""][:5]
        if api != "api":
            return super().do_GET()
        top = Path(self.directory, *repository)
        folder = top / what.removeprefix("tree/main").strip("/")
        if not folder.is_dir():
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound" if top.is_dir() else "RepoNotFound")
        kinds = {True: "directory", False: "file"}
        there = [(kinds[p.is_dir()], p.relative_to(top), p.stat()) for p in folder.iterdir()]
        tree = [dict(type=k, path=str(p), size=s.st_size, oid=str(s.st_mtime_ns)) for k, p, s in there]
        body = tree if what else {"id": "/".join(repository[1:]), "sha": "0" * 40}
        return self.answer(200, json.dumps(body).encode())

    def translate_path(self, path):
        return super().translate_path(path.replace("/resolve/main/", "/"))


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(remote.LIMIT, "1")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "BLOCK", 2**16)
    remote._STATES.clear()
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(FaultyHandler, directory=str(folder)))
    found.faults, found.head_faults, found.asked = [], [], []
    found.address = f"http://127.0.0.1:{found.server_port}"
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def files(root, k: int = 0) -> WellFile:
    return WellFile(find_files(root, "shear_flow", "train")[k], "shear_flow")


def cached_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in (folder / "cache").glob("*/*/*"))


def test_a_set_at_an_address_is_the_set_of_the_folder(server, folder):
    here, there = (Windows(root, "shear_flow", "train", frames=4) for root in (folder, server.address))
    assert len(here) == len(there) and [p.name for p in here.paths] == [p.name for p in there.paths]
    assert here.fingerprint() == there.fingerprint() == fingerprint([str(path) for path in there.paths])
    assert torch.equal(here.read([0, 5, -1]), there.read([0, 5, -1]))
    assert str(read_stats(folder, "shear_flow")) == str(read_stats(server.address, "shear_flow"))
    asked = len(server.asked)
    assert torch.equal(here.read([0, 5, -1]), there.read([0, 5, -1])) and len(server.asked) == asked, "from the cache"


def test_only_what_a_window_needs_is_fetched(server, folder):
    file = files(server.address)
    server.asked.clear()
    file.window(1, 20, 4, crop=((0, 8), (0, 64)))
    fetched = sum(last - first for _, first, last in server.asked)
    size = (folder / "shear_flow/data/train" / file.path.name).stat().st_size
    assert 0 < fetched <= 15 * remote.BLOCK < size / 3  # 4 frames of 3 fields, and a block at each of their ends


@pytest.mark.parametrize("fault, said", [("page", "503"), ("page as data", "<html>"), ("cut", ""), ("slow", "")])
def test_what_passes_is_waited_for_and_what_does_not_is_said(server, folder, tmp_path, fault, said):
    file, before = files(server.address), cached_bytes(tmp_path)
    if fault != "slow":
        server.faults = [fault] * 20
        with pytest.raises(NetworkError, match=rf"Schmidt_0.2.hdf5: bytes \d+ to \d+ .* in 5 tries.*{said}"):
            file.window(1, 3, 8)
        assert cached_bytes(tmp_path) == before, "nothing of it was kept"
    server.faults = [fault] * (remote.TRIES - 1)
    assert (file.window(1, 3, 8) == files(folder).window(1, 3, 8)).all()
    assert fault == "slow" or not server.faults, "all of them were met"


def test_an_error_inside_hdf5_and_of_a_version_is_the_error_of_the_network(server):
    path = find_files(server.address, "shear_flow", "train")[0]
    for ranges, heads in ((20, 0), (0, 20)):
        remote._STATES.clear()
        server.faults, server.head_faults = ["page"] * ranges, [1] * heads
        with pytest.raises(NetworkError, match="not to be had in 5 tries"):
            WellFile(path, "shear_flow")
    server.faults, server.head_faults = [], [1] * 3
    assert WellFile(path, "shear_flow").n_trajectories == 2


def test_a_file_that_goes_away_is_not_asked_for_again(server):
    file = files(server.address)
    server.faults, before = ["gone"] * 20, len(server.asked)
    with pytest.raises(FileNotFoundError, match="Schmidt_0.2"):
        file.window(1, 3, 8)
    assert len(server.asked) == before + 1
    with pytest.raises(FileNotFoundError, match="no .h5 or .hdf5 files of shear_flow in .*http"):
        find_files(server.address, "shear_flow", "valid")


def test_the_cache_keeps_its_limit(server, folder, tmp_path, monkeypatch):
    cache = remote.BlockCache(tmp_path / "cache", limit=60 * remote.BLOCK)
    monkeypatch.setattr(remote, "block_cache", lambda: cache)
    for _ in range(2):
        for k in range(3):
            here, there = files(folder, k), files(server.address, k)
            assert (here.window(1, 0, 24) == there.window(1, 0, 24)).all()
            assert cached_bytes(tmp_path) <= 1.06 * cache.limit
    assert cached_bytes(tmp_path) > 0.5 * cache.limit


def test_the_blocks_that_were_used_longest_ago_go_first_and_nothing_else(tmp_path):
    cache, keys = remote.BlockCache(tmp_path, limit=4 * remote.BLOCK), [f"{k:032x}" for k in range(3)]
    mine = tmp_path / "my_project" / "simulations" / "result.hdf5"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(bytes(3 * remote.BLOCK))
    os.utime(mine, (1, 1))
    for k, key in enumerate(keys):
        cache.put(key, 0, bytes(remote.BLOCK))
        os.utime(cache.path(key, 0), (1000 + k, 1000 + k))
    assert cache.get(keys[0], 0, remote.BLOCK) is not None, "it is used now"
    cache.limit = 3 * remote.BLOCK
    cache.make_room(remote.BLOCK)
    assert [cache.path(key, 0).is_file() for key in keys] == [True, False, False]
    assert mine.is_file(), "what is no block stays"


def test_windows_on_a_network_in_worker_processes(server, folder):
    options = dict(frames=4, stride=4, in_memory=False)
    here, there = (Windows(root, "shear_flow", "train", **options) for root in (folder, server.address))
    loader = DataLoader(there, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(next(iter(loader))["fields"], here.read(range(4)))


def test_a_file_that_changes_is_noticed(server, folder):
    copy = folder / "changed" / "Schmidt.hdf5"
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(files(folder).path.read_bytes())
    file = WellFile(f"{server.address}/changed/Schmidt.hdf5", "shear_flow")
    first = file.window(0, 0, 4)
    copy.write_bytes(files(folder, 1).path.read_bytes())
    remote._STATES.clear()  # a minute later
    with pytest.raises(WellFormatError, match="changed since it was opened"):
        file.window(0, 0, 4)
    again = WellFile(f"{server.address}/changed/Schmidt.hdf5", "shear_flow")
    assert again.labels["Schmidt"] == 0.5 and (again.window(0, 0, 4) != first).any()


def test_the_version_of_a_file_is_what_its_store_says_and_else_the_process(monkeypatch):
    said = {}
    store = SimpleNamespace(invalidate_cache=lambda path: None, info=lambda path: {"size": 7, "name": path} | said)
    place = SimpleNamespace(fs=store, path="folder/file", parent=SimpleNamespace(path="folder"))
    silent = remote._ask_state(place)
    assert silent[0] == 7 and remote._ask_state(place) == silent, "in one process"
    monkeypatch.setattr(remote, "_PROCESS", "another")
    assert remote._ask_state(place) != silent
    found = set()
    for name in ("ETag", "mtime", "LastModified", "last_modified", "generation", "Content-MD5", "blob_id", "created"):
        for value in (1, 2):
            said = {name: value, "accessTime": len(found)}
            found.add(remote._ask_state(place))
    assert len(found) == 16, "and not when it was read"


def test_views_of_other_files_are_refused(server, folder):
    view = folder / "view" / "view.hdf5"
    view.parent.mkdir(exist_ok=True)
    view.write_bytes(files(folder).path.read_bytes())
    with h5py.File(view, "r+") as file:
        shape = file["t0_fields/tracer"].shape
        del file["t0_fields/tracer"]
        layout = h5py.VirtualLayout(shape, dtype="f4")
        layout[...] = h5py.VirtualSource("/etc/passwd", "tracer", shape=shape)
        file["t0_fields"].create_virtual_dataset("tracer", layout)
    with pytest.raises(WellFormatError, match="tracer stands in other files"):
        WellFile(f"{server.address}/view/view.hdf5", "shear_flow")


def test_a_cache_that_cannot_be_written_costs_a_warning(server, folder, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="blocks are not kept in"):
        found = files(server.address).window(0, 0, 4)
    assert (found == files(folder).window(0, 0, 4)).all()


@pytest.mark.parametrize("limit", ["many", "0.001", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(limit, monkeypatch):
    monkeypatch.setenv(remote.CACHE, "")
    assert remote.block_cache().folder == Path("~/.cache/physrep/blocks").expanduser()
    monkeypatch.setenv(remote.LIMIT, limit)
    with pytest.raises(ValueError, match="PHYSREP_CACHE_GB=.*must be a number of gigabytes"):
        remote.block_cache()


HUB = "datasets/polymathic-ai"
FRAMES = dict(frames=16, stride=4, in_memory=False)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    "A shear flow in the layout of the hub: four files of two trajectories of 40 frames of 64 x 128 points."
    root = tmp_path_factory.mktemp("hub")
    for k, (split, schmidt) in enumerate((("train", 0.2), ("train", 0.5), ("valid", 0.5), ("test", 0.2))):
        labels = {"Reynolds": 1e4, "Schmidt": schmidt}
        path = root / HUB / "shear_flow/data" / split / f"shear_flow_Reynolds_1e4_Schmidt_{schmidt}.hdf5"
        well_file(path, k, shape=(2, 40, 64, 128), parameters=labels, initial_conditions=None)
    write_stats(root / HUB, "shear_flow")
    return root


@pytest.fixture(params=["memory", "file"])
def address(request, hub, tmp_path, monkeypatch):
    "The address of that root in a store of fsspec."
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))
    remote._STATES.clear()
    if request.param == "file":
        yield f"file://{hub}"
        return
    store, root = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    store.put(f"{hub}/", root, recursive=True)
    yield f"memory://{root}"
    store.rm(root, recursive=True)


def test_the_layout_of_the_hub_is_read_as_from_a_disk(hub, address, capsys):
    here = hub / HUB
    mine = [Windows(here, "shear_flow", split, **FRAMES) for split in ("train", "valid", "test")]
    for below in ("", "/shear_flow/", "/shear_flow/data"):
        root = f"{address}/{HUB}{below}"
        assert str(find_folder(root, "shear_flow")).endswith(f"{HUB}/shear_flow")
        assert str(Normaliser.load(root, "shear_flow")) == str(Normaliser.load(here, "shear_flow"))
        for one in mine:
            other = Windows(root, "shear_flow", one.split, **FRAMES)
            assert one.fingerprint() == other.fingerprint() and torch.equal(one.read([0, -1]), other.read([0, -1]))
    report = [leakage.main(["shear_flow", str(r)]) or capsys.readouterr().out for r in (here, f"{address}/{HUB}")]
    assert report[0] == report[1] and "twin" in report[0]
    with pytest.raises(FileNotFoundError, match="no .h5 or .hdf5 files of shear_flow in .*train/data/train"):
        find_files(f"{address}/{HUB}/shear_flow/data/train", "shear_flow", "train")
    stats = Path(f"{here}/shear_flow/stats.yaml").read_text()
    written = write_stats(f"{address}/{HUB}", "shear_flow")
    assert written.read_text() == stats and not Path("memory:").exists()


@pytest.mark.parametrize("address", ["memory"], indirect=True)
def test_what_a_run_reads_is_in_the_table_of_the_page(address, tmp_path, monkeypatch):
    "A sixteenth of the points and of a block: frames and blocks are to each other as in the published files."
    monkeypatch.setattr(remote, "BLOCK", 2**16)
    page = (project_root() / "tools/docs/pages/the_well.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^\| ([^|]+?) \| [^|]+ \| ([\d.]+) MB \|", page, re.M))
    root, fetched, found = f"{address}/{HUB}", [], {}
    monkeypatch.setattr(remote, "fetch", lambda *a, get=remote.fetch: fetched.append(a[2] - a[1]) or get(*a))

    def measure(what, do, again=False):
        monkeypatch.setenv(remote.CACHE, str(tmp_path / (what if not again else "all windows of `train`")))
        fetched.clear()
        sets._KNOWN.clear()
        do()
        found[what] = sum(fetched) / 1e6

    train = Windows(root, "shear_flow", "train", **FRAMES)
    measure("open the files", lambda: [Windows(root, "shear_flow", s, **FRAMES) for s in ("train", "valid", "test")])
    measure("`physrep report`", lambda: leakage.main(["shear_flow", root]))
    measure("fingerprint of `train`", train.fingerprint)
    measure("one window", lambda: train.read([3]))
    measure("all windows of `train`", lambda: train.read(range(len(train))))
    measure("the same again", lambda: train.read(range(len(train))), again=True)
    assert found == pytest.approx({what: float(said[what]) for what in found}, abs=0.1)


def test_the_hub_gives_what_is_asked_for_and_not_more(server, folder, tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    (tmp_path / HUB).symlink_to(folder)
    server.RequestHandlerClass = partial(HubHandler, directory=str(tmp_path))
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.address})
    windows = Windows(f"hf://{HUB}", "shear_flow", "train", frames=4, in_memory=False)
    assert torch.equal(windows.read([0, 9]), Windows(folder, "shear_flow", "train", frames=4).read([0, 9]))
    assert read_stats(f"hf://{HUB}/shear_flow", "shear_flow")
    assert len(server.asked) == len(set(server.asked)), "no block twice"
    assert sum(last - first for _, first, last in server.asked) == cached_bytes(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"of shear_flow in hf://{HUB}/shear_flow/data/test or .*train"):
        find_files(f"hf://{HUB}", "shear_flow", "test")
    with pytest.raises(FileNotFoundError, match="no .h5 or .hdf5 files of shear_flow in hf://polymathic-ai/shear_flow"):
        find_files("hf://polymathic-ai", "shear_flow", "train")
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": "http://127.0.0.1:9"})  # nobody is there
    with pytest.raises(NetworkError, match="its files were not to be had in 5 tries"):
        find_files(f"hf://{HUB}/active_matter", "active_matter", "train")


def test_an_address_of_the_hub_without_its_client_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "hf", raising=False)
    with pytest.raises(ValueError, match="hf://datasets/polymathic-ai: .* needs pip install .*huggingface_hub"):
        remote.as_path("hf://datasets/polymathic-ai")


def test_nothing_is_simulated_into_an_address():
    for place in ("memory://sets", Path("memory://sets")):
        with pytest.raises(ValueError, match="smoke simulates shear_flow, which needs a folder on this machine"):
            ensure_data(resolve("shear_flow", "mae", preset="smoke", data_dir=place))


@pytest.mark.long
def test_the_workflow_takes_an_address(server):
    said = dry_run("--printshellcmds", quiet=("host",), preset="paper", data=server.address)
    assert f"data_dir {server.address}" in said and "simulate" not in said

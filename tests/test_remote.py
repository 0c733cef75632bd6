"Sets on a network: a web server that is slow, cuts connections and answers with error pages, read through the cache."

import http.client
import http.server
import os
import shutil
import threading
import time
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import dry_run
from torch.utils.data import DataLoader

from physrep.data import remote
from physrep.data.remote import NetworkError, as_path, open_bytes
from physrep.data.sets import find_files, fingerprint, read_stats
from physrep.data.well import WellFile, WellFormatError
from physrep.data.windows import Windows
from physrep.data.write import write_stats, write_well
from physrep.physics.systems import get_system
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

    def fail(self, fault: str, part: bytes) -> bool:
        "What goes wrong with a request for this part of a file; whether it is answered by that."
        if fault == "slow":
            time.sleep(0.3)
            return False
        if fault == "cut":
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.close_connection = True
            self.connection.close()
        else:
            self.answer({"page": 503, "page as data": 200, "gone": 404}[fault], PAGE)
        return True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            return super().do_GET() if self.command == "GET" else super().do_HEAD()
        if self.server.head_faults and "Range" not in self.headers:
            self.server.head_faults.pop()
            return self.answer(503, PAGE)
        body, tag = file.read_bytes(), f'"{file.stat().st_mtime_ns}"'
        if "Range" not in self.headers:
            return self.answer(200, body, ETag=tag, Accept_Ranges="bytes")
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        first, last = int(first), min(int(last or len(body)), len(body) - 1)
        part = body[first : last + 1]
        self.server.asked.append((file.name, first, last + 1))
        if self.server.faults and self.fail(self.server.faults.pop(0), part):
            return None
        return self.answer(206, part, ETag=tag, Content_Range=f"bytes {first}-{last}/{len(body)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A set of three files of two trajectories each, of random numbers; the fields of each take 3 MB."
    root = tmp_path_factory.mktemp("set")
    shear, rng = get_system("shear_flow"), np.random.default_rng(0)
    for schmidt in (0.2, 0.5, 1.0):
        fields = {f.name: rng.standard_normal((2, 24, 64, 64) + (2,) * f.rank) for f in shear.fields}
        write_well(
            root / f"shear_flow/data/train/Schmidt_{schmidt:g}.hdf5",
            "shear_flow",
            fields,
            parameters={"Reynolds": 1e4, "Schmidt": schmidt},
            time=0.2 * np.arange(24),
            box=(1.0, 1.0),
        )
    write_stats(root, "shear_flow")
    return root


@pytest.fixture
def server(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(remote.LIMIT, "1")
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(remote, "BLOCK", 2**16)
    monkeypatch.setattr(remote.fetch, "__kwdefaults__", {"pause": 0.01})
    remote._STATES.clear()
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(FaultyHandler, directory=str(folder)))
    found.faults, found.head_faults, found.asked, found.folder = [], [], [], folder
    found.address = f"http://127.0.0.1:{found.server_port}"
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def cached_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in (folder / "cache").glob("*/*/*"))


def test_a_set_at_an_address_is_the_set_of_the_folder(server, folder):
    here, there = (Windows(root, "shear_flow", "train", frames=4) for root in (folder, server.address))
    assert len(here) == len(there) and [p.name for p in here.paths] == [p.name for p in there.paths]
    assert here.fingerprint() == there.fingerprint()
    assert fingerprint([str(path) for path in there.paths]) == fingerprint(here.paths), "addresses may be text"
    assert (here.read([0, 5, -1]) == there.read([0, 5, -1])).all()
    assert read_stats(folder, "shear_flow")["mean"].keys() == read_stats(server.address, "shear_flow")["mean"].keys()
    asked = len(server.asked)
    assert (here.read([0, 5, -1]) == there.read([0, 5, -1])).all() and len(server.asked) == asked  # from the cache


def test_only_what_a_window_needs_is_fetched(server, folder):
    path = find_files(server.address, "shear_flow", "train")[0]
    file = WellFile(path, "shear_flow")
    server.asked.clear()
    file.window(1, 20, 4, crop=((0, 8), (0, 64)))
    fetched = sum(last - first for _, first, last in server.asked)
    size = (folder / "shear_flow/data/train" / path.name).stat().st_size
    assert 0 < fetched <= 15 * remote.BLOCK < size / 3  # 4 frames of 3 fields, and a block at each of their ends


@pytest.mark.parametrize("fault", ["page", "page as data", "cut", "slow"])
def test_what_passes_is_waited_for(server, folder, fault):
    path = find_files(server.address, "shear_flow", "train")[0]
    file = WellFile(path, "shear_flow")
    server.faults = [fault] * (1 if fault == "slow" else remote.TRIES - 1)
    expected = WellFile(find_files(folder, "shear_flow", "train")[0], "shear_flow").window(1, 3, 8)
    assert (file.window(1, 3, 8) == expected).all()
    assert not server.faults  # all of them were met


@pytest.mark.parametrize("fault, said", [("page", "503"), ("page as data", "<html>"), ("cut", "")])
def test_what_does_not_pass_is_said(server, fault, said, tmp_path):
    file = WellFile(find_files(server.address, "shear_flow", "train")[0], "shear_flow")
    before = cached_bytes(tmp_path)
    server.faults = [fault] * 20
    with pytest.raises(
        NetworkError, match=rf"Schmidt_0.2.hdf5: bytes \d+ to \d+ were not to be had in 5 tries.*{said}"
    ):
        file.window(1, 3, 8)
    assert cached_bytes(tmp_path) == before  # nothing of it was kept


def test_an_error_inside_hdf5_is_the_error_of_the_network(server):
    path = find_files(server.address, "shear_flow", "train")[0]
    remote._STATES.clear()
    server.faults = ["page"] * 20
    with pytest.raises(NetworkError, match="503"):
        WellFile(path, "shear_flow")
    server.faults.clear()
    server.head_faults = [1] * 20
    remote._STATES.clear()
    with pytest.raises(NetworkError, match="the store does not say what it is"):
        WellFile(path, "shear_flow")
    server.head_faults = [1] * 3
    assert WellFile(path, "shear_flow").n_trajectories == 2


def test_a_file_that_goes_away_is_not_asked_for_again(server):
    file = WellFile(find_files(server.address, "shear_flow", "train")[0], "shear_flow")
    server.faults, before = ["gone"] * 20, len(server.asked)
    with pytest.raises(FileNotFoundError, match="Schmidt_0.2"):
        file.window(1, 3, 8)
    assert len(server.asked) == before + 1
    with pytest.raises(FileNotFoundError, match="no .h5 or .hdf5 files of shear_flow in .*http"):
        find_files(server.address, "shear_flow", "valid")


def test_the_cache_keeps_its_limit(server, folder, tmp_path, monkeypatch):
    cache = remote.BlockCache(tmp_path / "cache", limit=60 * remote.BLOCK)
    monkeypatch.setattr(remote, "block_cache", lambda: cache)
    here, there = (Windows(root, "shear_flow", "train", frames=4, stride=4) for root in (folder, server.address))
    assert sum(p.stat().st_size for p in here.paths) > 2 * cache.limit
    for _ in range(2):
        for trajectory in range(6):
            frames = np.empty((2, *there.shape), dtype=np.float32)
            here.copy(trajectory, 3, frames[0])
            there.files[trajectory // 2].window(trajectory % 2, 3, 4, out=frames[1])
            assert (frames[0] == frames[1]).all()
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
        os.utime(cache._path(key, 0), (1000 + k, 1000 + k))
    assert cache.get(keys[0], 0, remote.BLOCK) is not None, "it is used now"
    cache.limit = 3 * remote.BLOCK
    cache.make_room(remote.BLOCK)
    assert [cache._path(key, 0).is_file() for key in keys] == [True, False, False]
    assert mine.is_file(), "what is no block stays"


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv(remote.CACHE, "")
    assert remote.block_cache().folder == Path("~/.cache/physrep/blocks").expanduser()
    monkeypatch.setenv(remote.LIMIT, "inf")
    with pytest.raises(ValueError, match="PHYSREP_CACHE_GB='inf' must be a number of gigabytes"):
        remote.block_cache()


def test_windows_on_a_network_in_worker_processes(server, folder):
    here, there = (
        Windows(root, "shear_flow", "train", frames=4, stride=4, in_memory=False) for root in (folder, server.address)
    )
    loader = DataLoader(there, batch_size=4, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(next(iter(loader))["fields"], here.read(range(4)))


def test_a_file_that_changes_is_noticed(server, folder):
    copy = folder / "changed" / "Schmidt.hdf5"
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(find_files(folder, "shear_flow", "train")[0].read_bytes())
    file = WellFile(f"{server.address}/changed/Schmidt.hdf5", "shear_flow")
    first = file.window(0, 0, 4)
    copy.write_bytes(find_files(folder, "shear_flow", "train")[1].read_bytes())
    remote._STATES.clear()  # a minute later
    with pytest.raises(WellFormatError, match="changed since it was opened"):
        file.window(0, 0, 4)
    again = WellFile(f"{server.address}/changed/Schmidt.hdf5", "shear_flow")
    assert again.labels["Schmidt"] == 0.5 and (again.window(0, 0, 4) != first).any()


def test_views_of_other_files_are_refused(server, folder):
    view = folder / "view" / "view.hdf5"
    view.parent.mkdir(exist_ok=True)
    source = find_files(folder, "shear_flow", "train")[0]
    view.write_bytes(source.read_bytes())
    with h5py.File(view, "r+") as file:
        shape = file["t0_fields/tracer"].shape
        del file["t0_fields/tracer"]
        layout = h5py.VirtualLayout(shape, dtype="f4")
        layout[...] = h5py.VirtualSource("/etc/passwd", "tracer", shape=shape)
        file["t0_fields"].create_virtual_dataset("tracer", layout)
    with pytest.raises(WellFormatError, match="tracer stands in other files"):
        WellFile(f"{server.address}/view/view.hdf5", "shear_flow")


def test_a_full_or_read_only_cache_costs_a_warning(server, folder, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="blocks are not kept in"):
        file = WellFile(find_files(server.address, "shear_flow", "train")[0], "shear_flow")
        found = file.window(0, 0, 4)
    assert (found == WellFile(find_files(folder, "shear_flow", "train")[0], "shear_flow").window(0, 0, 4)).all()


@pytest.mark.parametrize("limit", ["many", "0.001", "-3", "nan"])
def test_a_limit_that_is_none_is_refused(limit, monkeypatch):
    monkeypatch.setenv(remote.LIMIT, limit)
    with pytest.raises(ValueError, match="PHYSREP_CACHE_GB=.*must be a number of gigabytes"):
        remote.block_cache()


def test_an_address_that_pathlib_has_shortened_is_read(server, folder):
    with open_bytes(as_path(Path(f"{server.address}/shear_flow/stats.yaml"))) as raw:
        assert raw.read() == (folder / "shear_flow/stats.yaml").read_bytes()


def test_nothing_is_simulated_into_an_address():
    run = resolve("shear_flow", "mae", preset="smoke")
    for place in ("memory://sets", Path("memory://sets")):
        with pytest.raises(
            ValueError, match="smoke simulates shear_flow, which needs a folder on this machine, not mem"
        ):
            ensure_data(run, place)
    done = dry_run(preset="smoke", data="memory://sets", systems="shear_flow")
    assert done.returncode == 1 and "smoke simulates shear_flow, which needs a folder on this machine" in done.stdout


@pytest.mark.long
def test_the_workflow_takes_an_address(server):
    done = dry_run("--printshellcmds", preset="paper", data=server.address)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "pretrain_shear_flow_mae_vit" in done.stdout and "probe_shear_flow_baselines" in done.stdout
    assert f"data_dir {server.address}" in done.stdout and "leak_free" not in done.stdout


class FaultyStore(FaultyHandler):
    "Passes requests on to an object store; the same faults happen to those for a range."

    def do_GET(self):
        if "Range" in self.headers and self.server.faults and self.fail(self.server.faults.pop(0), b"x" * 4096):
            return
        store = http.client.HTTPConnection(*self.server.store)
        store.request(self.command, self.path, headers=dict(self.headers))
        found = store.getresponse()
        body = found.read()
        kept = {k.title(): v for k, v in found.getheaders() if k.lower() not in ("server", "date", "connection")}
        self.answer(found.status, body, **kept)


@pytest.mark.long
def test_a_set_in_an_object_store(folder, tmp_path, monkeypatch):
    'The same from S3, served by moto through a line with faults: pip install s3fs "moto[s3]" flask flask-cors'
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    import boto3
    import fsspec

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of the library below; physrep asks again itself
    monkeypatch.setenv(remote.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote.fetch, "__kwdefaults__", {"pause": 0.01})
    server.start()
    host, port = server.get_host_and_port()
    line = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FaultyStore)
    line.store, line.faults = (host, port), []
    threading.Thread(target=line.serve_forever, daemon=True).start()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://127.0.0.1:{line.server_port}"})
    try:
        store = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        store.create_bucket(Bucket="sets")
        for path in sorted((folder / "shear_flow").rglob("*.*")):
            store.upload_file(str(path), "sets", str(path.relative_to(folder)))
        here, there = (Windows(root, "shear_flow", "train", frames=4) for root in (folder, "s3://sets"))
        assert here.fingerprint() == there.fingerprint()
        assert (here.read([0, 5, -1]) == there.read([0, 5, -1])).all()
        one, same = (WellFile(windows.paths[0], "shear_flow") for windows in (here, there))
        monkeypatch.setattr(type(there.paths[0].fs), "retries", 1)
        for fault in ("page", "page as data", "cut", "slow"):
            shutil.rmtree(tmp_path / "cache")
            line.faults = [fault] * (remote.TRIES - 1)
            assert (same.window(1, 3, 8) == one.window(1, 3, 8)).all(), fault
            assert fault == "slow" or not line.faults, "all of them were met"
        shutil.rmtree(tmp_path / "cache")
        line.faults = ["page"] * 100
        with pytest.raises(NetworkError, match="were not to be had in 5 tries"):
            same.window(1, 3, 8)
        line.faults = []
        assert (same.window(1, 3, 8) == one.window(1, 3, 8)).all()
        assert read_stats("s3://sets", "shear_flow")["std"].keys() == read_stats(folder, "shear_flow")["std"].keys()
        first = there.paths[0]
        store.upload_file(str(here.paths[1]), "sets", str(here.paths[0].relative_to(folder)))
        remote._STATES.clear()  # a minute later
        with pytest.raises(WellFormatError, match="changed since it was opened"):
            there.files[0].window(0, 0, 4)
        store.delete_object(Bucket="sets", Key=str(here.paths[0].relative_to(folder)))
        remote._STATES.clear()
        with pytest.raises(FileNotFoundError, match="no such file"):
            WellFile(first, "shear_flow")
    finally:
        line.shutdown()
        line.server_close()
        server.stop()


def test_what_a_store_says_of_a_version_is_in_the_key_and_a_silent_store_is_read_again(monkeypatch):
    class Store:
        said: dict = {}

        def invalidate_cache(self, path):
            pass

        def info(self, path):
            return {"size": 7, "name": path} | self.said

    class Parent:
        path = "folder"

    class Place:
        fs, path, parent = Store(), "folder/file", Parent()

    silent = remote._ask_state(Place)
    assert silent[0] == 7 and remote._ask_state(Place) == silent, "in one process"
    monkeypatch.setattr(remote, "_PROCESS", "another")
    assert remote._ask_state(Place) != silent
    for name in ("ETag", "blob_id", "last-modified", "mtime"):
        states = []
        for version in ("one", "two"):
            Store.said = {name: version}
            states.append(remote._ask_state(Place))
        assert states[0] != states[1], name


def test_a_block_that_may_only_be_read_is_not_fetched_again(tmp_path, monkeypatch):
    cache = remote.BlockCache(tmp_path, limit=4 * remote.BLOCK)
    cache.put(f"{1:032x}", 0, b"block")

    def refuse(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(remote.os, "utime", refuse)
    assert cache.get(f"{1:032x}", 0, 5) == b"block" and cache.get(f"{1:032x}", 1, 5) is None

"""What files of strangers may do: nothing runs, nothing leads out of a folder, nothing takes all memory."""

import ast
import asyncio
import dataclasses
import importlib.util
import json
import os
import pickle
import re
import resource
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from broken import SYSTEM, change, encoder_file, probe_file, replace, well_file, well_set, with_header, with_info
from safetensors.torch import save_file

import physrep
from physrep.core.files import open_tensors, read_tensors, write_tensors
from physrep.data.download import check_files
from physrep.data.sets import read_stats
from physrep.data.well import WellFile, WellFormatError, parts_outside
from physrep.data.windows import Windows
from physrep.explore import your_flow
from physrep.explore.your_flow import LARGEST, UNPACKED, flow_from_bytes, open_upload
from physrep.models import elsewhere
from physrep.models.encoders import build_encoder
from physrep.probing.features import cache_path, cached
from physrep.probing.records import read_predictions
from physrep.results.rows import read_rows
from physrep.training.loop import Recipe, load_checkpoint, make_optimizer
from physrep.training.presets import read_preset
from physrep.training.run import resolve

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "physrep").rglob("*.py")) + sorted((ROOT / "tools").rglob("*.py"))


class Trap:
    "Its unpickling makes a file."

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def trap(tmp_path):
    "Bytes that make a folder when they are unpickled; at the end of the test it must not be there."
    marker = tmp_path / "it-ran"
    raw = pickle.dumps(Trap(marker))
    pickle.loads(raw)
    assert marker.is_dir(), "the trap works"
    marker.rmdir()
    yield Trap(marker)
    assert not marker.exists(), "a pickle was run"


@pytest.mark.parametrize("by", ["pickle", "torch"])
@pytest.mark.parametrize("door", ["encoder", "probe", "predictions", "checkpoint", "tensors", "weights"])
def test_no_pickle_is_run(tmp_path, trap, by, door):
    path = tmp_path / "file.safetensors"
    if by == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save({"weight": torch.zeros(2), "more": trap}, path)

    def checkpoint(path):
        model = torch.nn.Linear(1, 1)
        load_checkpoint(path, model, make_optimizer(model, Recipe(steps=1, lr=0.1)))

    if door == "weights":  # the one reader that takes files of torch.save
        path = path.rename(tmp_path / "file.pth")
    read = {
        "encoder": physrep.load_encoder,
        "probe": physrep.load_probe,
        "predictions": read_predictions,
        "checkpoint": checkpoint,
        "tensors": open_tensors,
        "weights": elsewhere.read_weights,
    }
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read[door](path)


def test_a_pickle_in_the_cache_is_made_again(tmp_path, trap, capsys):
    path = cache_path(tmp_path, "test", {"a": 1})
    path.write_bytes(pickle.dumps(trap))
    tokens = cached(tmp_path, "test", {"a": 1}, lambda: torch.ones(1, 1, 2))
    assert tokens.shape == (1, 1, 2) and "made again" in capsys.readouterr().out


def test_an_array_of_objects_is_not_read(tmp_path, trap):
    np.save(tmp_path / "a.npy", np.array([trap], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no whole .npy file with numbers"):
        flow_from_bytes("a.npy", (tmp_path / "a.npy").read_bytes(), SYSTEM, 0.1, (1.0, 1.0))


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    "Every call in a module, with the dotted name of what is called."
    found = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


FORBIDDEN = {"eval", "exec", "compile", "pickle.load", "pickle.loads", "joblib.load", "os.system", "os.popen"}
FORBIDDEN |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "dump")}
FORBIDDEN |= {"marshal.loads", "shelve.open", "tempfile.mktemp", "np.memmap.load", "torch.hub.load"}
FORBIDDEN |= {"pd.read_pickle", "pandas.read_pickle"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_runs_text_or_reads_what_can_run(path):
    for name, node in calls(path):
        if path.name == "mutants.py" and name in ("exec", "compile"):  # runs our own modules with a fault in them
            continue
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert name not in FORBIDDEN, f"line {node.lineno}: {name}"
        if name in ("torch.load", "load"):  # by itself it would be torch's
            assert keywords.get("weights_only") == "True", f"line {node.lineno}: torch.load"
        assert keywords.get("allow_pickle", "False") == "False", f"line {node.lineno}: {name}"
        if name in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle") == "False", f"line {node.lineno}: np.load"
        assert keywords.get("shell", "False") == "False", f"line {node.lineno}: a shell"


@pytest.mark.parametrize("read", [read_preset, read_rows], ids=["preset", "rows"])
def test_yaml_makes_no_objects(tmp_path, read):
    marker = tmp_path / "it-ran"
    (tmp_path / "mine.yaml").write_text(f"!!python/object/apply:os.mkdir [{marker}]")
    with pytest.raises(ValueError, match="mine.yaml is n.* YAML"):
        read(tmp_path / "mine.yaml")
    assert not marker.exists()


def test_an_encoder_file_imports_no_module_for_its_system(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="encoder.safetensors: in its description system must be one of"):
        physrep.load_encoder(with_info(encoder_file(tmp_path / "encoder.safetensors"), system="planted:SYSTEM"))


def test_an_encoder_file_runs_no_code_of_others(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    path = with_info(encoder_file(tmp_path / "encoder.safetensors"), name="planted:make")
    for place in (path, tmp_path):
        with pytest.raises(ValueError, match="is built by 'planted:make', which is not physrep's; trust_code=True"):
            physrep.load_encoder(place)
    with pytest.raises(SystemExit, match="it ran"):
        physrep.load_encoder(path, trust_code=True)


# --- nothing leads out of a folder


def test_what_a_file_shows_of_others_is_found(tmp_path):
    path = well_file(tmp_path / "a.hdf5")
    assert parts_outside(path) == {}
    secret = well_file(tmp_path / "secret.hdf5", 1)
    tracer = "t0_fields/tracer"
    change(path, replace(tracer, h5py.ExternalLink(str(secret), f"/{tracer}")))
    assert parts_outside(path) == {f"/{tracer}": str(secret)}


def borrowed(folder: Path, way: str) -> Path:
    "A set whose first file shows numbers of a file above its folder."
    secret = well_file(folder / "secret.hdf5", 1)
    path = well_set(folder / "set") / "shear_flow" / "data" / "train" / "flow.hdf5"
    tracer, shape = "t0_fields/tracer", (2, 5, 8, 6)
    if way == "link":
        change(path, replace(tracer, h5py.ExternalLink(str(secret), f"/{tracer}")))
    elif way == "relative link":
        change(path, replace(tracer, h5py.ExternalLink("../../../../secret.hdf5", f"/{tracer}")))
    elif way == "bytes":
        (folder / "secret.txt").write_bytes(b"password" * 240)
        with h5py.File(path, "r+") as file:
            del file[tracer]
            file.create_dataset(tracer, shape, "f4", external=[(str(folder / "secret.txt"), 0, 1920)])
    else:
        layout = h5py.VirtualLayout(shape, "f4")
        layout[...] = h5py.VirtualSource(str(secret), tracer, shape=shape)
        with h5py.File(path, "r+") as file:
            del file[tracer]
            file.create_virtual_dataset(tracer, layout)
    return path


WAYS = ["link", "relative link", "bytes", "view"]


@pytest.mark.parametrize("way", WAYS)
def test_an_upload_shows_no_other_file(tmp_path, way):
    path = borrowed(tmp_path, way)
    with pytest.raises(ValueError, match="/t0_fields/tracer is a view of another file, .*must hold all itself"):
        open_upload(path, SYSTEM)


@pytest.mark.parametrize("way", ["link", "relative link", "bytes"])
def test_a_set_shows_no_numbers_of_other_files(tmp_path, way):
    """A view is read: leak-free splits are views. Plain arrays are read by their place in the file, so a link would
    give the bytes at that place in the wrong one."""
    path = borrowed(tmp_path, way)
    for read in (lambda: WellFile(path, SYSTEM), lambda: Windows(tmp_path / "set", SYSTEM, "train", frames=2)):
        with pytest.raises(WellFormatError, match="flow.hdf5: .*copy what it shows into this file"):
            read()


@pytest.mark.parametrize("label", ["scalars/Reynolds", "dimensions/time"])
def test_a_file_has_its_labels_and_times_in_itself(tmp_path, label):
    well_file(tmp_path / "other.hdf5", 1)
    path = well_file(tmp_path / "a.hdf5")
    change(path, replace(label, h5py.ExternalLink("other.hdf5", f"/{label}")))
    with pytest.raises(WellFormatError, match=f"a.hdf5: {label} is a link into .*other.hdf5"):
        WellFile(path, SYSTEM)


@pytest.mark.parametrize("way", WAYS)
def test_the_check_of_a_downloaded_set_names_files_that_show_others(tmp_path, way):
    path = borrowed(tmp_path, way)
    problems = check_files(tmp_path / "set" / "shear_flow", SYSTEM, remove=True)
    assert len(problems) == 1 and "/t0_fields/tracer is a view of" in problems[0] and "outside" in problems[0]
    assert path.is_file(), "it is told, not taken away: another download would be the same"


@pytest.mark.parametrize("target", ["/etc/passwd", "/../../etc/passwd"])
def test_links_inside_a_file_stay_inside(tmp_path, target):
    path = change(well_file(tmp_path / "a.hdf5"), replace("t0_fields/tracer", h5py.SoftLink(target)))
    with pytest.raises(ValueError, match="no dataset 't0_fields/tracer'"):
        open_upload(path, SYSTEM)


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "\x00", "..\\x", "é/", "-"])
def test_no_tag_and_no_name_of_a_preset_leads_out_of_the_folder_of_runs(tmp_path, name):
    with pytest.raises(ValueError, match="tag may hold letters, digits"):
        resolve("shear_flow", "mae", "vit", "smoke", tag=name)
    if "/" not in name and "\x00" not in name:
        (tmp_path / f"{name}.yaml").write_text("base: smoke")
        with pytest.raises(ValueError, match="must be letters, digits"):
            read_preset(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize("name", ["../../etc:x", "a.b:../x", "os:..", "/etc/passwd:x"])
def test_places_of_code_are_dotted_names(name):
    with pytest.raises(ValueError, match="is no dotted name"):
        resolve("shear_flow", name, "vit", "smoke")


# --- nothing takes all memory


def test_safetensors_that_promise_too_much(tmp_path):
    path = encoder_file(tmp_path / "encoder.safetensors")
    raw = path.read_bytes()
    for size in (2**63, 2**40, 200_000_000, len(raw) + 1):
        path.write_bytes(struct.pack("<Q", size) + raw[8:])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            physrep.load_encoder(path)
    for shape in ([2**40, 2**40], [2**60], [-1], [0.5], ["a"]):
        header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            open_tensors(path)


@pytest.mark.parametrize(
    "config",
    [
        {"dim": 10**9},
        {"depth": 10**9},
        {"tubelet": [10**6] * 3},
        {"a": {"b": [10**12]}},
        {"dim": 100, "heads": 2},  # as many as the square of a width
        {"dim": 8, "depth": 100},
        {"depth": 2},  # of the usual width
        {"widths": [4, 100], "depths": [1, 1]},
        {"widths": [90, 90], "depths": [1, 1], "mlp_ratio": 0.0},  # between its stages
    ],
)
def test_a_small_file_builds_no_large_network(tmp_path, config):
    path = with_info(encoder_file(tmp_path / "encoder.safetensors"), config=config)
    with pytest.raises(ValueError, match="config asks for .* weights in all"):
        physrep.load_encoder(path)


def test_a_published_file_names_no_more_layers_than_it_has_tensors(tmp_path):
    for name in ("blocks.999999999.norm1.weight", f"encoder.blocks.{10**40}.norm1.weight", "res_blocks.0.101.a.b"):
        save_file({name: torch.zeros(8)}, tmp_path / "small.safetensors")
        with pytest.raises(ValueError, match=r"small.safetensors: .* more layers than the 1 tensors"):
            elsewhere.read_weights(tmp_path / "small.safetensors")


def test_tensors_that_overlap_or_leave_gaps(tmp_path):
    path = probe_file(tmp_path / "probe.safetensors")

    def overlap(found: dict) -> None:
        names = [k for k in found if k != "__metadata__"]
        found[names[1]]["data_offsets"] = found[names[0]]["data_offsets"]

    with pytest.raises(ValueError, match="probe.safetensors is not a whole safetensors file"):
        read_tensors(with_header(path, overlap))


def test_other_tensors_under_the_digest_of_a_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(2)}, {"x": 1})
    raw = path.read_bytes()
    path.write_bytes(raw[:-4] + struct.pack("<f", 1.0))
    with pytest.raises(ValueError, match="does not match its digest"):
        read_tensors(path)


def test_uploads_are_limited_and_do_not_unfold(tmp_path):
    with pytest.raises(ValueError, match="at most 8 MB can be uploaded"):
        flow_from_bytes("a.npy", bytes(LARGEST + 1), SYSTEM, 0.1, (1.0, 1.0))
    path = well_file(tmp_path / "bomb.hdf5")
    with h5py.File(path, "r+") as file:
        options = dict(chunks=(2**20,), compression="gzip", shuffle=True)
        file.create_dataset("zeros", (UNPACKED // 4 + 1,), "f4", **options)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="unpacks to 64 MB; at most 64 MB are read"):
        open_upload(path, SYSTEM)
    packed = zlib.compress(bytes(2**20))
    with pytest.raises(ValueError, match="no whole .npy file"):
        flow_from_bytes("a.npy", packed, SYSTEM, 0.1, (1.0, 1.0))


@pytest.mark.parametrize("read", [read_preset, read_rows, lambda path: read_stats(path, SYSTEM)])
@pytest.mark.parametrize("field", ["sims", "rows", "mean"])
def test_yaml_of_many_aliases_is_refused_quickly(tmp_path, read, field):
    "Millions of words from eight lines, wherever they stand: aliases are counted as if they were written out."
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 7)]
    (tmp_path / "mine.yaml").write_text("\n".join([*lines, f"{field}: {{velocity: *a6}}"]))
    with pytest.raises(ValueError, match="mine.yaml is not YAML that can be read .with aliases written out"):
        read(tmp_path / "mine.yaml")


def test_a_chunk_of_an_upload_that_unpacks_to_more_than_it_says(tmp_path):
    "One chunk of 900 MB in a file of 1 MB: it is unpacked in a process with little memory, and not in this one."
    path = well_file(tmp_path / "a.hdf5")
    pack, zeros, sum_of_all = zlib.compressobj(wbits=-15), bytes(2**20), 1
    block = pack.compress(zeros) + pack.flush(zlib.Z_FULL_FLUSH)
    for _ in range(900):
        sum_of_all = zlib.adler32(zeros, sum_of_all)
    packed = b"\x78\x9c" + 900 * block + pack.flush() + struct.pack(">I", sum_of_all)
    with h5py.File(path, "r+") as file:
        shape = file["t0_fields/tracer"].shape
        del file["t0_fields/tracer"]
        tracer = file["t0_fields"].create_dataset("tracer", shape, "f4", chunks=shape, compression="gzip")
        tracer.id.write_direct_chunk((0, 0, 0, 0), packed)
    assert path.stat().st_size < LARGEST
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="write it again|memory allocation failed"):  # HDF5 1.14 says the latter
        flow_from_bytes("a.hdf5", path.read_bytes(), SYSTEM, 0.1, (1.0, 1.0))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16, "KB"


# --- the page


@pytest.fixture(scope="module")
def app():
    "The module tools/app.py."
    pytest.importorskip("voila")
    spec = importlib.util.spec_from_file_location("app", ROOT / "tools" / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_served_to_this_machine_only_and_shows_no_code(app):
    assert {"--Voila.ip=127.0.0.1", "--token", "--strip_sources=True", "--show_tracebacks=False"} <= set(app.OPTIONS)
    text = (ROOT / "tools" / "app.py").read_text(encoding="utf-8")
    assert "0.0.0.0" not in text and "allow_origin" not in text and "disable_check_xsrf" not in text


def test_kernels_of_the_page_are_few(app, monkeypatch):
    async def start(manager, **options):
        await asyncio.sleep(0)
        manager._kernels[str(len(manager))] = None

    async def ask(times: int) -> list:
        manager = app.FewKernels()
        return await asyncio.gather(*(manager.start_kernel() for _ in range(times)), return_exceptions=True)

    monkeypatch.setattr(app.AsyncMappingKernelManager, "start_kernel", start)
    answers = asyncio.run(ask(app.KERNELS + 2))
    assert answers[: app.KERNELS] == [None] * app.KERNELS
    assert [error.status_code for error in answers[app.KERNELS :]] == [503, 503]


def test_what_is_larger_than_the_memory_of_the_page_is_said():
    from physrep.explore.page import Runner

    runner = Runner()
    runner.act(lambda: bytes(2**60))
    assert "fetch or write it again" in runner.line.value


def test_what_a_user_writes_is_shown_as_text():
    "Names of channels and of files stand in HTML: a tag in them is text."
    from physrep.explore.page import Runner, table_html

    assert "<script" not in table_html(["what"], [("<script>alert(1)</script>",)])
    runner = Runner()
    runner.fail(ValueError("/<script>alert(1)</script> is a view of another file"))
    assert "<script" not in runner.line.value and "&lt;script" in runner.line.value


def test_own_modules_build_encoders_only_where_the_user_names_them(tmp_path):
    "`build_encoder` calls what a place names; a plain name is one of the package."
    with pytest.raises(ValueError, match="unknown encoder 'os.system'"):
        build_encoder("os.system", in_channels=1)


def test_symbolic_links_are_followed_as_the_owner_set_them(tmp_path):
    "A set may live elsewhere by links of the owner; a link in a circle is a missing file."
    root = well_set(tmp_path / "set")
    path = root / "shear_flow" / "data" / "train" / "flow.hdf5"
    path.rename(tmp_path / "moved.hdf5")
    path.symlink_to(tmp_path / "moved.hdf5")
    assert len(Windows(root, "shear_flow", "train", frames=5)) == 2
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(FileNotFoundError, match="flow.hdf5: no such file"):
        Windows(root, "shear_flow", "train", frames=5)


def test_a_small_upload_that_unpacks_to_much_is_refused(tmp_path):
    path = well_file(tmp_path / "chunk.hdf5")
    with h5py.File(path, "r+") as file:
        time = file["dimensions/time"][()]
        del file["dimensions/time"]
        file.create_dataset("dimensions/time", data=time, maxshape=(None,), chunks=(2**26,), compression="gzip")
    assert path.stat().st_size < your_flow.LARGEST
    with pytest.raises(ValueError, match="unpacks to 5.. MB"):
        open_upload(path, SYSTEM)
    path = well_file(tmp_path / "words.hdf5")
    with h5py.File(path, "r+") as file:
        file.create_dataset("notes", data=["a" * 1000] * 10, dtype=h5py.string_dtype())
    with pytest.raises(ValueError, match="notes holds text or arrays of different lengths"):
        open_upload(path, SYSTEM)


def test_frames_that_are_not_there_are_not_made_up():
    flow = your_flow.flow_from_arrays(np.zeros((4, 16, 32, 32)), SYSTEM, 1e6, (1.0, 1.0))
    info = {"shape": (16, 32, 32), "dt": 0.2, "channels": SYSTEM.channels, "mean": [0.0] * 4, "std": [1.0] * 4}
    with pytest.raises(ValueError, match="this cannot be resampled: time between frames"):
        your_flow.resample(flow, info)
    states = {
        dt: your_flow.check_flow(dataclasses.replace(flow, dt=dt), info)[2].state for dt in (0.05, 0.2, 0.201, 0.4)
    }
    assert states == {0.05: "can be resampled", 0.2: "fits", 0.201: "fits", 0.4: "does not fit"}


def test_weights_that_are_wrapped_in_themselves_are_refused(tmp_path):
    wrapped: dict = {}
    wrapped["model"] = wrapped
    torch.save(wrapped, tmp_path / "round.pt")
    with pytest.raises(ValueError, match="no state dict; these are no tensors: model"):
        elsewhere.read_weights(tmp_path / "round.pt")

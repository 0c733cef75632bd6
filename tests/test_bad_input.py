"""Bad input, a line a case: the error names the value, the file and what would be right."""

import io
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from broken import (
    SYSTEM,
    change,
    copy,
    cut,
    encoder_file,
    predictions_file,
    probe_file,
    replace,
    stage,
    tiny_preset,
    well_file,
    well_set,
    with_header,
    with_info,
)

import physrep
from physrep.core.files import read_json
from physrep.data.generate import make_dataset
from physrep.data.sets import read_stats
from physrep.data.windows import Windows
from physrep.experiments.command import main, output_path
from physrep.explore.your_flow import flow_from_bytes
from physrep.models.encoders import build_encoder
from physrep.models.pretrained import save_encoder
from physrep.probing.records import read_predictions
from physrep.training.presets import get_preset, read_preset

ERRORS = (ValueError, TypeError, OSError, ChildProcessError)
PICKLE = b"\x80\x04K\x01."
TRACER, TIME = "t0_fields/tracer", "dimensions/time"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    "A folder of what is made once, and copied before it is broken."
    root = tmp_path_factory.mktemp("sound")
    sim = get_preset(tiny_preset(root)).sim("shear_flow")
    make_dataset("shear_flow", sim, root / "data", workers=1, progress=False)
    well_set(root / "set")
    encoder_file(root / "encoder.safetensors")
    probe_file(root / "probe.safetensors")
    predictions_file(root)
    (root / "file").write_text("a file, no folder")
    return root


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("PHYSREP_ROOT", str(Path(__file__).resolve().parent.parent))
    monkeypatch.chdir(tmp_path)


def check(says: tuple[str, ...], call, *arguments, said=lambda: "") -> None:
    "The call fails, and its error has these words."
    with pytest.raises(ERRORS) as error:
        call(*arguments)
    text = str(error.value) + said()
    for words in says:
        assert words in text, f"{words!r} is not in {text!r}"


def named(table: list[tuple]) -> dict:
    "Cases and their names, for `parametrize`."
    return dict(argvalues=table, ids=[f"{n}-{str(case[-1])[:40]}" for n, case in enumerate(table)])


def zeros(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


def run_stage(name: str, cells: int, values: dict, folder: Path, sound: Path) -> dict:
    "The first cells of a stage with these parameters; FILE and EMPTY are places."
    usual = {"preset": str(sound / "tiny.yaml"), "data_dir": str(sound / "data")}
    usual |= {} if name == "00_simulate" else {"objective": "mae", "run_dir": str(folder / "runs")}
    places = {"FILE": str(sound / "file"), "EMPTY": str(folder)}
    given = {k: places.get(v, v) if isinstance(v, str) else v for k, v in values.items()}
    return stage(name, cells, **usual | given)


STAGES = [
    ("00_simulate", {"system": "shear"}, "preset tiny simulates shear_flow", "not shear"),
    ("00_simulate", {"preset": "phone"}, "unknown preset 'phone'; valid: smoke, laptop"),
    ("00_simulate", {"preset": "no.yaml"}, "no preset file no.yaml; valid names: smoke"),
    ("00_simulate", {"preset": "paper"}, "preset paper simulates nothing (it reads The Well)"),
    ("00_simulate", {"preset": "laptop"}, "holds data that were made differently", "Delete"),
    ("00_simulate", {"data_dir": "FILE"}, "data_dir must be a folder", "file is a file"),
    ("00_simulate", {"device": "tpu"}, "unknown device 'tpu'; valid: auto, cpu, cuda"),
    ("00_simulate", {"workers": "two"}, "parameter workers must be int (default 0), got 'two'"),
    ("00_simulate", {"sytem": "x"}, "unknown parameter sytem; this notebook has: system, preset"),
    ("03_pretrain", {"objective": "mea"}, "unknown objective 'mea'; valid: jepa", "my_package.module:name"),
    ("03_pretrain", {"encoder": "resnet"}, "objective 'mae' does not take encoder 'resnet'; it takes: vit"),
    ("03_pretrain", {"encoder": "nowhere_at_all:make"}, "module nowhere_at_all cannot be imported", "PYTHONPATH"),
    ("03_pretrain", {"seeds": "0 x"}, 'such as "0 1 2"', "got 'x'"),
    ("03_pretrain", {"seeds": "1 1"}, "seeds must be different, got '1 1'"),
    ("03_pretrain", {"seed": 1.5}, "parameter seed must be int", "got 1.5"),
    ("03_pretrain", {"steps": -3}, "must be positive", "steps=-3"),
    ("03_pretrain", {"batch_size": -4}, "recipe: batch_size", "must be positive", "batch_size=-4"),
    ("03_pretrain", {"recipe": {"stepz": 1}}, "recipe has no field stepz; it has: steps, lr"),
    ("03_pretrain", {"recipe": {"precision": "float8"}}, "precision", "float8"),
    ("03_pretrain", {"coefficients": {"ratoi": 0.5}}, "ratoi"),
    ("03_pretrain", {"tag": "../../x"}, "tag may hold letters, digits, '.' and '_', got '../../x'"),
    ("03_pretrain", {"preset": "paper", "data_dir": "EMPTY"}, "no .h5 or .hdf5 files of shear_flow in"),
    ("03_pretrain", {"data_dir": "FILE"}, "data_dir must be a folder", "file is a file"),
    ("04_probe", {"objective": "frozen"}, "frozen", "my_package.module:make_encoder"),
    ("04_probe", {"probes": "linera"}, "unknown probe 'linera'; valid: linear, knn, kernel, attentive"),
    ("04_probe", {"probes": "linear"}, "no encoder at", "finished run folder"),
]


@pytest.mark.parametrize("case", **named(STAGES))
def test_parameters_of_stages(case, sound, tmp_path):
    name, values, *says = case
    check(tuple(says), run_stage, name, 4, values, tmp_path, sound)


SIM = "base: smoke\nsims: {shear_flow: {ranges: {Reynolds: [400.0, 500.0]}, grid: 8, store_grid: 8, n_frames: 4, "
PRESETS = [
    ("base: smoke\nframez: 3", "has no field framez; it has: description, sims"),
    ("!!python/object/apply:os.getcwd []", "is not YAML", "python/object/apply"),
    ("", "must hold a mapping with the fields of a preset, got None"),
    ("base: [smoke]", "base: unknown preset", "valid: smoke, laptop"),
    ("base: smoke\nsystems: [shear]", "unknown system shear; valid: shear_flow"),
    ("base: smoke\nnoise: .nan", "noise must be float, got nan"),
    ("base: smoke\nseeds: [0, 0]", "seeds must be different numbers from 0, got [0, 0]"),
    ("base: smoke\nprobe_stride: 0", "probe_stride and train_stride must be at least 1"),
    ("base: smoke\ntrain: {mae: {steps: 2, lr: .nan}}", "train.mae: lr must be float, got nan"),
    ("base: smoke\ntrain: {jepa_ema: {steps: 5}}", "'jepa_ema': this method is called 'masked_jepa'"),
    ("base: smoke\nobjectives: {jepa_ema-vit: {ratio: 0.5}}", "'jepa_ema-vit': this method is called 'masked_jepa'"),
    ("base: smoke\ntuned: {mae-vit: {recipe: {lr: 0.1}}}", "tuned", "train"),
    (
        SIM + "draws: {train: [1, 1]}, frame_dt: 0.1, dt: -0.1}}",
        "sims.shear_flow: dt, frame_dt",
        "must be positive, got dt=-0.1",
    ),
    (SIM + "draws: {../x: [1, 1]}, frame_dt: 0.1, dt: 0.1}}", "a split is a folder", "got '../x'"),
]


@pytest.mark.parametrize("case", **named(PRESETS))
def test_presets(case, tmp_path):
    text, *says = case
    (tmp_path / "mine.yaml").write_text(text)
    check(("mine.yaml", *says), read_preset, tmp_path / "mine.yaml")


def wall_all_round(file: h5py.File) -> None:
    "One condition of both axes."
    one = file.create_group("boundary_conditions/wall")
    one["mask"] = np.ones((8, 6), bool)
    one.attrs.update(bc_type="WALL", associated_dims=["x", "y"])


WELL = [  # what is done to the file, or put in the place of which part
    (cut, "truncated or damaged, copy or write it again"),
    (lambda p: p.write_bytes(b""), "an empty file"),
    (lambda p: p.write_text("<html>404"), "a web page, not HDF5", "download it again"),
    (lambda p: p.unlink(), "splits with files:"),
    (lambda p: change(p, lambda f: f.pop(TRACER)), "no dataset 't0_fields/tracer'; /t0_fields holds"),
    (lambda p: change(p, lambda f: f.pop("scalars/Reynolds")), "no label 'Reynolds'", "holds Schmidt"),
    (lambda p: change(p, lambda f: f.attrs.update(dataset_name="active_matter")), "dataset_name is 'active_matter'"),
    (lambda p: change(p, lambda f: f[TRACER].__setitem__((1, 2, 3, 4), np.nan)), "tracer of trajectory 1, frame 2"),
    ((TRACER, zeros(2, 5, 6, 8)), "must be (trajectory, time, x, y) = (2, 5, 6, 8)"),
    (("t1_fields/velocity", zeros(2, 5, 8, 6, 3)), "velocity must be", "it is (2, 5, 8, 6, 3)"),
    ((TRACER, zeros(2, 5, 8, 6, dtype=np.int32)), "tracer must hold floats, it is int32"),
    ((TRACER, 3.0), "tracer must be"),
    ((TIME, np.arange(5.0)[::-1].copy()), "dimensions/time must be finite, increase"),
    ((TIME, np.array([0.0, 1.0, 2.0, 3.0, 30.0])), "frames are between 1 and 27 apart", "evenly spaced, to 1 %"),
    ((TIME, b"soon"), "a part of it is not as in The Well's format"),
    (("dimensions/x", np.arange(3.0)), "dimensions/x has (3,) points, the fields have 8"),
    (("dimensions/x", np.arange(8.0)[::-1].copy()), "dimensions/x must increase; it has a step of -1"),
    (("dimensions/x", np.arange(8.0) * [[1.0], [2.0]]), "dimensions/x differs by trajectory; write files with a grid"),
    (
        lambda p: change(p, lambda f: f[TRACER].attrs.update(time_varying=False)),
        "tracer is not time_varying; repeat it",
    ),
    (
        lambda p: change(p, wall_all_round),
        "along x are PERIODIC and WALL, and shear_flow declares 'periodic'; 'periodic'",
    ),
    (("scalars/Reynolds", 0.0), "Reynolds must be positive (its log10 is the target), got 0.0"),
    (("scalars/Reynolds", np.ones(3)), "must be one number, or one per trajectory, it is (3,)"),
    (("physrep_initial_condition", np.arange(3)), "must be 2 integers, it is int64 (3,)"),
    ((TRACER, h5py.ExternalLink("/etc/passwd", "/x")), "no dataset 't0_fields/tracer'"),
    ((TRACER, h5py.SoftLink(f"/{TRACER}")), "too many links"),
]


@pytest.mark.parametrize("case", **named(WELL))
def test_files_of_the_well(case, sound, tmp_path):
    edit, *says = case
    path = copy(sound / "set", tmp_path / "set") / "shear_flow" / "data" / "train" / "flow.hdf5"
    edit(path) if callable(edit) else change(path, replace(*edit))
    read = lambda: Windows(tmp_path / "set", "shear_flow", "train", frames=2).read([5])  # noqa: E731
    check(tuple(says), read)


def test_sets_and_statistics(sound, tmp_path):
    check(("has 6 frames; the longest has 5",), lambda: Windows(sound / "set", "shear_flow", "train", frames=6))
    missing = "no .h5 or .hdf5 files of shear_flow in"
    check((missing, "nothing"), lambda: Windows(sound / "nothing", "shear_flow", "train", frames=2))
    for text, says in [("", "not statistics but 'None'"), ("mean: 3", "no 'mean'"), ("[", "not YAML")]:
        (tmp_path / "stats.yaml").write_text(text)
        check(("stats.yaml", says), read_stats, tmp_path / "stats.yaml", SYSTEM)


def use_encoder(path: Path) -> object:
    return physrep.load_encoder(path).embed(zeros(1, 4, 4, 8, 8), dt=0.2)


ENCODERS = [  # what is done to the file, or changed in its description
    (cut, "is not a whole safetensors file"),
    (lambda p: p.write_bytes(PICKLE), "is not a whole safetensors file"),
    (lambda p: with_header(p, lambda h: None, 2**62), "header too large"),
    (lambda p: with_header(p, lambda h: h.pop("__metadata__")), "was not written by physrep"),
    (lambda p: p.write_bytes(p.read_bytes()[:-64] + b"\xff" * 64), "are not finite", "damaged"),
    ({"name": "resnet"}, "unknown encoder 'resnet'; valid: convnext, vit"),
    ({"config": "x"}, "config must be a mapping of arguments, got 'x'"),
    ({"config": {"dimm": 8}}, "no encoder can be built", "dimm"),
    ({"config": {"dim": 8, "heads": 0}}, "heads in config must be a positive integer, got 0"),
    ({"config": {"dim": 10**9}}, "config asks for 1000000000, and the file has"),
    ({"config": {"dim": 6, "depth": 1, "heads": 2, "tubelet": [2, 4, 4]}}, "do not fit the encoder 'vit'"),
    ({"mean": [0.0]}, "mean must be 4 finite numbers", "got [0.0]"),
    ({"std": [0.0] * 4}, "std must be 4 positive numbers, one a channel"),
    ({"dt": "fast"}, "dt must be a positive number, or null, got 'fast'"),
    ({"shape": [4, 8]}, "shape must be three positive integers"),
    ({"system": "waves"}, "system must be one of", "got 'waves'"),
]


@pytest.mark.parametrize("case", **named(ENCODERS))
def test_encoders(case, sound, tmp_path):
    edit, *says = case
    path = copy(sound / "encoder.safetensors", tmp_path / "encoder.safetensors")
    edit(path) if callable(edit) else with_info(path, **edit)
    check(("encoder.safetensors", *says), use_encoder, path)


FIELDS = [
    (zeros(1, 3, 4, 8, 8), 0.2, "fields must be (b, 4, 4, h, w) with channels tracer", "got shape (1, 3, 4, 8, 8)"),
    (zeros(1, 4, 4, 8, 4), 0.2, "trained on grids of 8x8, got 8x4; resample"),
    (zeros(1, 4, 4, 8, 8) + np.nan, 0.2, "fields hold values that are not finite"),
    (zeros(1, 4, 4, 8, 8, dtype=complex), 0.2, "real numbers are wanted"),
    (zeros(1, 4, 4, 8, 8), 0.1, "trained on frames 0.2 apart, got dt=0.1"),
]


@pytest.mark.parametrize("case", **named(FIELDS))
def test_fields(case, sound):
    fields, dt, *says = case
    check(tuple(says), lambda: physrep.load_encoder(sound / "encoder.safetensors").embed(fields, dt))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)


RECORDS = [
    ("probe", cut, "is not a whole safetensors file"),
    ("probe", flip, "is damaged: its content does not match its digest"),
    ("probe", encoder_file, "was not written by physrep, or is damaged"),
    ("predictions", cut, "predictions.safetensors is"),
    ("predictions", lambda p: with_info(p, draw=None), "no predictions file of physrep"),
    ("predictions", lambda p: with_info(p, scaler=[]), "no predictions file of physrep"),
]


@pytest.mark.parametrize("case", **named(RECORDS))
def test_probes_and_predictions(case, sound, tmp_path):
    kind, edit, *says = case
    path = copy(sound / f"{kind}.safetensors", tmp_path / f"{kind}.safetensors")
    edit(path)
    check((path.name, *says), physrep.load_probe if kind == "probe" else read_predictions, path)


def test_what_is_not_there_or_torn(tmp_path):
    check(("no encoder at nothing", "shear_flow-"), physrep.load_encoder, "nothing")
    check(("a name on the Hub is hf:user/name, got 'hf:../../x'",), physrep.load_encoder, "hf:../../x")
    (tmp_path / "result.json").write_text('{"rows": [')
    check(("result.json is not JSON", "delete it and run again"), read_json, tmp_path / "result.json")


COMMANDS = [
    (["pretain"], 2, "unknown command 'pretain'; valid: simulate, pretrain, probe, compare"),
    (["simulate", "--workers", "two"], 2, "argument --workers: invalid int value: 'two'"),
    (["pretrain", "--recipe", "[1]"], 2, "must be a mapping such as '{variance: 40}', got '[1]'"),
    (["probe", "own"], 2, "'own' is no import path of a function; write my_package.module:make_encoder"),
    (["compare-predictions", "no.csv", "--reference", "nowhere"], 1, "no file no.csv; `physrep compare-predictions no"),
    (["compare", "no.csv", "--reference", "nowhere"], 1, "called physrep compare-predictions"),
    (["leak-free", "shear_flow", "nowhere", "out"], 1, "nowhere"),
    (["verify", "nowhere"], 2, "nowhere"),
    (["download", "shear"], 2, "required: root"),
]


def run_command(arguments: list[str]) -> None:
    "Runs it in this process; the exit code becomes an error."
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    raise ChildProcessError(f"code {code}: ")


@pytest.mark.parametrize("case", **named(COMMANDS))
def test_commands(case, capsys):
    arguments, code, *says = case
    check((f"code {code}", *says), run_command, arguments, said=lambda: "".join(capsys.readouterr()))


def npy(array: object, **options: object) -> bytes:
    raw = io.BytesIO()
    np.save(raw, array, **options)
    return raw.getvalue()


UPLOADS = [
    ("a.exe", b"MZ", "files end in .npy, .hdf5 or .h5, this one in .exe"),
    ("a.npy", bytes(8_000_001), "8.0 MB; at most 8 MB can be uploaded"),
    ("a.npy", PICKLE, "no whole .npy file"),
    ("a.npy", npy(zeros(4, 2, 8, 8))[:-4], "no whole .npy file"),
    ("a.npy", npy(zeros(3, 2, 8, 8)), "a letter for each, such as axes='ntxyc'", "c = 4 components"),
    ("a.npy", npy(zeros(4, 2, 8, 8) + np.inf), "NaN or infinity in frame 0"),
    ("a.npy", npy(np.full((4, 2, 8, 8), "x")), "Give real numbers"),
    ("a.hdf5", PICKLE, "not an HDF5 file"),
]


@pytest.mark.parametrize("case", **named(UPLOADS))
def test_uploads(case):
    name, content, *says = case
    check(tuple(says), flow_from_bytes, name, content, SYSTEM, 0.2, (1.0, 1.0))


def test_what_is_not_broken_is_read(sound, tmp_path):
    "The same ways with sound things: what the tables refuse is refused for what was broken."
    assert run_stage("00_simulate", 4, {}, tmp_path, sound)["folder"] == sound / "data" / "shear_flow"
    assert run_stage("03_pretrain", 3, {"seeds": "3 1"}, tmp_path, sound)["runs"][1].seed == 1
    assert Windows(sound / "set", "shear_flow", "train", frames=2).read([5]).shape == (1, 4, 2, 8, 6)
    assert np.isfinite(use_encoder(sound / "encoder.safetensors")).all()
    assert physrep.load_probe(sound / "probe.safetensors") and read_predictions(sound / "predictions.safetensors")
    assert flow_from_bytes("a.NPY", npy(zeros(4, 2, 8, 8)), SYSTEM, 0.2, (1.0, 1.0)).n_frames == 2
    content = well_file(tmp_path / "a.hdf5").read_bytes()
    assert flow_from_bytes("a.h5", content, SYSTEM, 0.2, (1.0, 1.0)).n_frames == 5


def test_names_of_executed_notebooks_stay_in_their_folder(tmp_path):
    values = {"run_dir": str(tmp_path), "preset": "smoke", "system": "shear_flow", "objective": "mae"}
    path = output_path("pretrain", values | {"encoder": "a.b:C", "tag": "../../../x"})
    assert path.resolve().parent == (tmp_path / "smoke" / "notebooks").resolve()


def test_an_encoder_whose_columns_count_from_0_is_loaded(tmp_path):
    name, small = "physrep.models.avit:AViT", dict(columns=[0, 1, 2, 3], dim=16, depth=1, heads=2, strides=(4, 2, 2))
    encoder = build_encoder(name, in_channels=4, **small)
    about = dict(objective="mpp", preset="laptop", seed=0, shape=(4, 32, 32), dt=0.2)
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder, name, system=SYSTEM, mean=torch.zeros(4), std=torch.ones(4), **about)
    assert physrep.load_encoder(path).encoder.config["columns"] == [0, 1, 2, 3]

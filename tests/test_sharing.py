"""Encoders that go to the Hugging Face Hub and come back, on a local stand-in for it."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import row
from safetensors.torch import save_file

import physrep
from physrep.models.pretrained import model_folder
from physrep.probing.features import encoder_digest
from physrep.probing.records import write_result
from physrep.probing.sharing import hub_folder, save_pretrained
from physrep.training.run import resolve

NAME = "shear_flow"


@pytest.fixture()
def run_folder(tmp_path):
    "A finished run: encoder, probes, configuration, scores."
    folder = shutil.copytree(model_folder(NAME), tmp_path / "run")
    (folder / "config.json").write_text(json.dumps(resolve("shear_flow", "forecast", "vit", "laptop").as_dict()))
    rows = [
        row(split=s, label=label, value=v)
        for s, v in (("valid", 0.45), ("test", 0.5))
        for label in ("Reynolds", "mean")
    ]
    write_result(folder / "result.json", [*rows, row(metric="r2", low=None, high=None, value=0.6)])
    return folder


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    "A stand-in that copies `<tmp_path>/hub/<user>/<name>`, and keeps what it was asked."
    asked = []

    def snapshot_download(repository, *, revision=None, allow_patterns):
        asked.append((repository, revision))
        source, target = tmp_path / "hub" / repository, tmp_path / "cache" / f"{len(asked)}"
        target.mkdir(parents=True)
        for path in {p for pattern in allow_patterns for p in source.glob(pattern)}:
            shutil.copyfile(path, target / path.name)
        return str(target)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return asked


def test_a_run_comes_back_from_the_hub(run_folder, tmp_path, hub):
    folder = physrep.save_pretrained(run_folder, tmp_path / "hub" / "me" / "mae", repository="me/mae")
    (folder / "code.py").write_text("raise SystemExit")
    encoder = physrep.load_encoder("hf:me/mae", revision="v1")
    probe = physrep.load_probe("hf:me/mae", "linear")
    assert hub == [("me/mae", "v1"), ("me/mae", None)]
    assert encoder_digest(encoder) == encoder_digest(physrep.load_encoder(NAME)) == probe.info["encoder"]
    assert not list((tmp_path / "cache").rglob("code.py")), "only weights and the card are fetched"


def test_the_card_has_facts_scores_and_limits(run_folder, tmp_path):
    (tmp_path / "mae").mkdir()  # an empty folder may be there
    folder = save_pretrained(run_folder, tmp_path / "mae", repository="me/mae", license="apache-2.0")
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    encoder = physrep.load_encoder(NAME)
    parameters = sum(p.numel() for p in encoder.encoder.parameters())
    assert facts["license"] == "apache-2.0" and facts["library_name"] == "physrep"
    about = (encoder.info["objective"], parameters)
    assert (facts["physrep"]["objective"], facts["physrep"]["parameters"]) == about
    metrics = [r["metrics"][0] for r in facts["model-index"][0]["results"]]
    assert [m["value"] for m in metrics] == [0.45, 0.45, 0.5, 0.5]
    assert metrics[0]["args"] == {"low": 0.4, "high": 0.6, "n": 100}
    assert "| linear | test | mean | 0.500 (0.400 to 0.600) | 0.600 |  | 100 |" in text
    assert "| linear | valid | Reynolds | 0.450 (0.400 to 0.600) |" in text
    assert "Simulated flows of `shear_flow`, 1024 for training." in text, "256, and 768 without labels"
    for part in ('load_encoder("hf:me/mae")', "Reynolds from 400 to 3200", "`(b, 4, 16, 32, 32)`", "attentive, linear"):
        assert part in text


def test_the_hubs_own_client_reads_the_card(run_folder, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    card = huggingface_hub.ModelCard.load(save_pretrained(run_folder, tmp_path / "mae") / "README.md")
    assert card.data.library_name == "physrep" and card.data.license is None
    assert [r.metric_value for r in card.data.eval_results] == [0.45, 0.45, 0.5, 0.5]


def test_an_encoder_without_records_says_so(tmp_path):
    encoder = physrep.load_encoder(NAME)
    folder = save_pretrained(encoder, tmp_path / "alone")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "encoder.safetensors"]
    text = (folder / "README.md").read_text()
    assert "No scores are recorded" in text and "are not recorded in this folder" in text and "model-index" not in text
    assert physrep.load_encoder(folder).info == encoder.info


def test_a_probe_of_another_encoder_is_not_published(run_folder, tmp_path):
    shutil.copyfile(model_folder("active_matter") / "probe-linear.safetensors", run_folder / "probe-linear.safetensors")
    with pytest.raises(ValueError, match="probe-linear.safetensors was fitted on another encoder"):
        save_pretrained(run_folder, tmp_path / "mae")
    with pytest.raises(FileExistsError, match="run is not an empty folder"):
        save_pretrained(NAME, run_folder)


def test_names_that_are_none_and_a_missing_client(tmp_path, hub, monkeypatch):
    for name in ("hf:me", "hf:me/../mae", "hf:me/mae/more", "hf:"):
        with pytest.raises(ValueError, match="a name on the Hub is hf:user/name, got"):
            physrep.load_encoder(name)
    with pytest.raises(ValueError, match="have a revision; got 'v1'"):
        physrep.load_encoder(NAME, revision="v1")
    (tmp_path / "hub" / "me" / "empty").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="hf:me/empty holds no encoder of physrep"):
        hub_folder("hf:me/empty")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"hf:me/mae needs the Hugging Face client: pip install 'physrep\[hub\]'"):
        physrep.load_encoder("hf:me/mae")


def test_code_of_others_builds_no_encoder_of_the_hub(tmp_path, hub):
    info = {"name": "os:abort", "config": {}, "channels": ["a"]}
    (tmp_path / "hub" / "me" / "evil").mkdir(parents=True)
    file = tmp_path / "hub" / "me" / "evil" / "encoder.safetensors"
    save_file({"a": torch.zeros(1)}, file, metadata={"physrep": json.dumps(info)})
    with pytest.raises(ValueError, match="hf:me/evil is built by 'os:abort', which is not physrep's"):
        physrep.load_encoder("hf:me/evil")
    info["name"] = "nowhere_at_all:make"
    save_file({"a": torch.zeros(1)}, file, metadata={"physrep": json.dumps(info)})
    with pytest.raises(ValueError, match="module nowhere_at_all cannot be imported"):
        physrep.load_encoder("hf:me/evil", trust_code=True)

"""Takes the encoders and probes that come with the package from the runs of preset laptop, seed 0.

    python tools/weights.py 16x     of trainings of that length

In each system it is the encoder without labels on the ViT whose probes have the lowest error on `valid` (geometric mean
of kernel ridge and attentive). Beside it are a card with its errors on `test` and on other flows, and the heads of
summary statistics, with the errors of all readers on `test`, which physrep.explore shows."""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from physrep.core.files import read_json
from physrep.data.scaling import LabelScaler
from physrep.data.windows import Windows
from physrep.experiments.other_flows import ASKED
from physrep.explore.readers import SHOWN_PROBES, STATISTICS_HEADS, errors_of
from physrep.models.pretrained import load_encoder
from physrep.physics.statistics import summary_statistics
from physrep.probing.evaluate import baseline_folder, measured_features
from physrep.probing.features import probe_splits
from physrep.probing.frozen import fit_probe, load_probe
from physrep.probing.sharing import model_card
from physrep.results.comparison import summarise
from physrep.results.rows import Study, make_study
from physrep.results.table import mean_errors
from physrep.training.run import Run

WEIGHTS = Path(__file__).resolve().parent.parent / "physrep" / "weights"  # here, wherever physrep is imported from
FILES = ("encoder.safetensors", "probe-linear.safetensors", "probe-attentive.safetensors")


def best_run(study: Study, system: str) -> Run | None:
    "The run that is read best on `valid`, of those whose encoder is here; None without any."
    read = []
    for run in study.scored("trained"):
        here = run.system.name == system and (run.folder / FILES[0]).is_file()
        if here and run.encoder == "vit" and run.objective != "supervised" and not run.tag:
            errors = mean_errors(summarise([run.folder], n_bootstrap=0), split="valid").set_index("probe").value
            read.append((errors["kernel"] * errors["attentive"], run))
    return min(read, key=lambda pair: pair[0])[1] if read else None


def write_card(folder: Path, run: Run) -> None:
    "Writes the card of an encoder, with its errors on flows like those of the training and on others."
    files = {"result.json": ("test", "shifted"), ASKED: ("long_box",)}
    rows = [
        row
        for name, splits in files.items()
        if (run.folder / name).is_file()
        for row in read_json(run.folder / name)["rows"]
        if row["split"] in splits and row["probe"] in (*SHOWN_PROBES, "kernel")
    ]
    about = dict(where=folder.name, rows=rows, config=run.as_dict(), probes=SHOWN_PROBES)
    text = model_card(folder.name, load_encoder(folder), **about)
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_statistics(folder: Path, windows: Mapping[str, Windows], errors: Mapping[str, Mapping[str, float]]) -> None:
    "Fits the heads of summary statistics and writes them, with the errors of all readers."
    scaler = LabelScaler.fit(windows["train"].system, windows["train"].labels)
    features = measured_features({s: windows[s] for s in ("train", "valid")}, summary_statistics)
    for head in STATISTICS_HEADS:
        probe = fit_probe(head, features["train"], features["valid"], scaler)
        small = replace(probe, trials=[])  # the list of trials is longer than the parameters
        small.save(folder / f"statistics-{head}.safetensors", info={"test_errors": errors})


if __name__ == "__main__":
    study = make_study("laptop", only="all", length=sys.argv[1] if len(sys.argv) > 1 else "")
    for system in study.systems:
        run = best_run(study, system)
        if run is None:
            print(f"{system}: no encoder of this length, what is in {WEIGHTS} stays")
            continue
        folder, target = run.folder, WEIGHTS / f"{system}-{run.objective}-{run.encoder}"
        if lacking := [name for name in FILES if not (folder / name).is_file()]:
            raise SystemExit(f"{folder} has no {', '.join(lacking)}: probe it first, physrep probe")
        for old in WEIGHTS.glob(f"{system}-*"):
            shutil.rmtree(old)
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(folder / name, target / name)
        write_card(target, run)
        for name in FILES[1:]:
            load_probe(target / name)
        statistics, equations = (baseline_folder(n, run) for n in ("statistics", "equations"))
        sources = {f"{target.name}/{head}": (folder, head) for head in SHOWN_PROBES}
        sources |= {f"statistics/{head}": (statistics, head) for head in STATISTICS_HEADS}
        sources |= {"equations/oracle": (equations, "oracle")}
        errors = {name: errors_of(place / "result.json", probe) for name, (place, probe) in sources.items()}
        write_statistics(target, probe_splits(run), errors)
        size = sum(path.stat().st_size for path in target.iterdir())
        print(f"{target.name}: {size / 1e6:.1f} MB")

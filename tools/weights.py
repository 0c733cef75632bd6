"""Takes the encoders and probes that come with the package from the runs of preset laptop: seed 0, both probes.

Beside them it writes the heads of summary statistics, with the errors of all readers on `test`: physrep.explore shows
them."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from physrep.data.scaling import LabelScaler
from physrep.data.windows import Windows
from physrep.explore.readers import SHOWN_PROBES, STATISTICS_HEADS, errors_of
from physrep.models.pretrained import load_encoder
from physrep.physics.statistics import summary_statistics
from physrep.probing.evaluate import baseline_folder, measured_features
from physrep.probing.features import probe_splits
from physrep.probing.frozen import fit_probe, load_probe
from physrep.training.run import resolve

WEIGHTS = Path(__file__).resolve().parent.parent / "physrep" / "weights"  # here, wherever physrep is imported from
SHIPPED_ROWS = [
    ("active_matter", "mae", "vit"),
    ("rayleigh_benard", "invariance", "vit"),
    ("shear_flow", "forecast", "vit"),
]
FILES = ("encoder.safetensors", "probe-linear.safetensors", "probe-attentive.safetensors")


def write_statistics(folder: Path, windows: Mapping[str, Windows], errors: Mapping[str, Mapping[str, float]]) -> None:
    "Fits the heads of summary statistics and writes them, with the errors of all readers."
    scaler = LabelScaler.fit(windows["train"].system, windows["train"].labels)
    features = measured_features({s: windows[s] for s in ("train", "valid")}, summary_statistics)
    for head in STATISTICS_HEADS:
        probe = fit_probe(head, features["train"], features["valid"], scaler)
        small = replace(probe, trials=[])  # the list of trials is longer than the parameters
        small.save(folder / f"statistics-{head}.safetensors", info={"test_errors": errors})


if __name__ == "__main__":
    for row in SHIPPED_ROWS:
        run, target = resolve(*row, "laptop"), WEIGHTS / "-".join(row)
        folder = run.folder
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise SystemExit(f"{folder} has no {', '.join(missing)}; train and probe it first")
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(folder / name, target / name)
        load_encoder(target)
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

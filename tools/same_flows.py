"""Shows that the sets of data that are here hold the flows of the committed results, and writes that down.

    python tools/same_flows.py                   # all systems of preset laptop

A solver rounds differently on another processor, and chaotic flows make such differences larger. All baselines (summary
statistics with every probe, power spectra, the equations) are fitted and scored here, and compared with the committed
results. If labels and groups are equal, and no error differs by more than `SHARE` of the width of its 95 % interval,
the recipes of the sets are written into `physrep/data/known_flows.json`. Every computer that simulates by these recipes
from then on counts its flows as the same ones (`physrep.data.sets`)."""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from physrep.core.files import read_json, write_json
from physrep.core.paths import default_data_dir, project_root
from physrep.data.sets import recipe_digest
from physrep.physics.systems import get_system
from physrep.probing.baselines import baselines_for, score_baseline
from physrep.probing.records import read_predictions, read_results
from physrep.results.archive import read_archive
from physrep.training.presets import Preset, get_preset
from physrep.training.run import baseline_folder, resolve

FILE = project_root() / "physrep" / "data" / "known_flows.json"
SHARE = 0.1


def differences(here: Path, there: Path) -> dict[str, float]:
    """`probe, split` -> how far the error of a baseline differs, as a share of the width of its interval there.
    ValueError if the two are of other labels or groups."""
    new, old = read_predictions(here), read_predictions(there)
    for split, truth in old.truth.items():
        if not np.allclose(old.scaler.transform(truth), old.scaler.transform(new.truth[split]), atol=1e-5):
            raise ValueError(f"{here} and {there} have other labels in split {split!r}")
        if not np.array_equal(old.groups[split], new.groups[split]):
            raise ValueError(f"{here} and {there} have other groups of flows in split {split!r}")
    tables = [read_results(folder / "result.json") for folder in (here, there)]
    a, b = (t[(t.metric == "mse") & (t.label == "mean")].set_index(["probe", "split"]) for t in tables)
    if set(a.index) != set(b.index):
        raise ValueError(f"{here} and {there} have other probes or splits")
    shares = (a.value - b.value).abs() / (b.high - b.low)
    return {", ".join(key): float(share) for key, share in shares.items() if b.high[key] > b.low[key]}


def committed(system: str, preset: Preset, folder: Path) -> Path:
    "The committed results of all baselines of a system, in `<folder>/<preset>/<system>`, of whatever code."
    archive = project_root() / "figures" / "results" / preset.name / system / "baselines.zip"
    for name, files in read_archive(archive).items():
        place = baseline_folder(name, get_system(system), preset, folder)
        place.mkdir(parents=True)
        for file, content in files.items():
            (place / file).write_bytes(content)
    return folder


def compare(system: str, preset: Preset, data_dir: Path, folder: Path) -> bool:
    "Whether the baselines of a system say the same here as in the committed results; prints the largest differences."
    here, there = folder / "here", committed(system, preset, folder / "there")
    run = resolve(system, "mae", "vit", preset, data_dir=data_dir)
    alike = True
    for name in baselines_for(get_system(system)):
        score_baseline(name, run, data_dir, here)
        found = differences(*(baseline_folder(name, run.system, preset, place) for place in (here, there)))
        worst = max(found, key=lambda key: found[key])
        print(f"{system}, {name}: errors differ by at most {found[worst]:.2g} of an interval ({worst})", flush=True)
        alike &= all(share <= SHARE for share in found.values())
    return alike


def entries(system: str, preset: Preset, data_dir: Path) -> list[dict]:
    "What is written down about the splits of a set that have committed results."
    plan = read_json(data_dir / system / "plan.json")
    with tempfile.TemporaryDirectory() as name:
        there = baseline_folder("constant", get_system(system), preset, committed(system, preset, Path(name)))
        told = read_json(there / "result.json")["data"]
    about = {"set": f"{preset.name}, {system}"}
    return [
        about | {"split": split, "recipe": recipe_digest(plan, split), "fingerprint": fingerprint}
        for split, fingerprint in sorted(told.items())
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="laptop", help="a name (default: laptop)")
    asked = parser.parse_args()
    preset = get_preset(asked.preset)
    data_dir = default_data_dir(preset.name)
    with tempfile.TemporaryDirectory() as name:
        other = [s for s in preset.systems if not compare(s, preset, data_dir, Path(name) / s)]
    if other:
        print(f"{', '.join(other)}: other flows than those of the committed results; nothing was written")
        return 1
    before = {entry["recipe"]: entry for entry in (json.loads(FILE.read_text()) if FILE.is_file() else [])}
    found = {entry["recipe"]: entry for system in preset.systems for entry in entries(system, preset, data_dir)}
    write_json(FILE, sorted((before | found).values(), key=lambda entry: (entry["set"], entry["split"])))
    print(f"{len(found)} splits are the same but for rounding; {FILE.relative_to(project_root())} says so")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

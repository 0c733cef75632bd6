"""Shows that a change of the code changes no number, and writes that down, so that no run has to be done again.

    python tools/same_numbers.py --against HEAD~1 --why "clearer errors in the loop"

Data, encoders and results of every row are made at preset smoke, once by the code of the other commit and once by that
of this checkout. If all of them are equal bit by bit, the definitions that differ are written into
`physrep/core/same_numbers.json`, and count as those of the other commit from then on (`physrep.core.provenance`)."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "physrep" / "core" / "same_numbers.json"
STEPS = 32  # updates: enough for two encoders of the learning curve


def runs_compared():
    "All rows that are trained, and random weights, on the first system; MAE and random weights on the others."
    from physrep.results.rows import ROWS
    from physrep.training.presets import get_preset
    from physrep.training.run import resolve

    first, *others = get_preset("smoke").systems
    rows = [(row.objective, row.encoder) for row in ROWS if row.kind in ("trained", "random")]
    asked = [(first, *row) for row in rows]
    asked += [(system, *row) for system in others for row in (("mae", "vit"), ("random", "vit"))]
    return [resolve(*one, "smoke", steps=STEPS if one[1] != "random" else None) for one in asked]


def numbers(folder: Path) -> dict:
    "What the code that is imported makes: fingerprints of data, digests of encoders, rows of results, by name."
    import torch

    from physrep.core.files import read_json
    from physrep.probing.evaluate import probe_splits, score_run
    from physrep.training.pretrain import pretrain
    from physrep.training.run import ensure_data

    torch.set_num_threads(1)
    found = {}
    for run in runs_compared():
        data = ensure_data(run, folder / "data", workers=1)
        place = pretrain(run, data, folder / "runs", progress=False, say=lambda text: None)
        score_run(run, data, folder / "runs", progress=False)
        name = f"{run.system.name}, {run.objective}-{run.encoder}"
        found[f"{run.system.name}, data"] = {s: w.fingerprint() for s, w in probe_splits(run, data).items()}
        for file in [place / "encoder.safetensors", *sorted((place / "curve").glob("*.safetensors"))]:
            found[f"{name}, {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
        for file in ("result.json", "few.json"):
            if (place / file).is_file():
                found[f"{name}, {file}"] = read_json(place / file)["rows"]
        print(f"  {name}", file=sys.stderr, flush=True)
    return found


def used() -> dict[str, list[str]]:
    "The digests of all definitions behind the runs that are compared, by name."
    from physrep.core import provenance

    found: dict[str, set[str]] = {}
    for run in runs_compared():
        for name, digests in provenance._used((*run.modules, "probing.evaluate"), run.entries).items():
            found.setdefault(name, set()).update(digests)
    return {name: sorted(digests) for name, digests in found.items()}


def ask(tree: Path, what: str, folder: Path) -> dict:
    "`numbers` or `used` of the code of a checkout, in a process of its own."
    into = folder / f"{what}.json"
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--ask", what, "--folder", folder, "--into", into]
    subprocess.run(command, cwd=tree, env=environment, check=True, stdin=subprocess.DEVNULL)
    return json.loads(into.read_text())


def differing(old: dict[str, list[str]], new: dict[str, list[str]]) -> dict[str, list[tuple[str, str]]]:
    """Definitions that changed or are new, with the digest that each counts as (empty: none) and its own. ValueError
    for one that is gone: nothing can count as it."""
    if gone := sorted(old.keys() - new.keys()):
        raise ValueError(f"{', '.join(gone)} gone; keep the definition, or train again")
    found = {}
    for name in sorted(new):
        before = [d for d in old.get(name, []) if d not in new[name]]
        after = [d for d in new[name] if d not in old.get(name, [])]
        if len(before) > len(after):
            raise ValueError(f"a definition of {name} is gone; keep it, or train again")
        if after:
            found[name] = list(zip([*before, *[""] * (len(after) - len(before))], after))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="the other commit")
    parser.add_argument("--why", help="what changed, in a few words")
    parser.add_argument("--ask", choices=("numbers", "used"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.ask:
        asked.into.write_text(json.dumps(numbers(asked.folder) if asked.ask == "numbers" else used()))
        return 0
    if not (asked.against and asked.why):
        parser.error("--against COMMIT and --why TEXT are needed")
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", asked.against], check=True, capture_output=True, text=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            folders = {place: Path(name) / part for place, part in ((tree, "old"), (ROOT, "new"))}
            for folder in folders.values():
                folder.mkdir()
            changed = differing(*(ask(place, "used", folder) for place, folder in folders.items()))
            if not changed:
                print("no definition of a run or a probe differs")
                return 0
            print(f"{len(changed)} definitions differ: {', '.join(changed)}")
            old, new = (ask(place, "numbers", folder) for place, folder in folders.items())
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=False)
    if other := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        print(f"{len(other)} of {len(new)} differ; nothing was written: {'; '.join(other[:10])}")
        return 1
    there = json.loads(FILE.read_text())["changes"] if FILE.is_file() else []
    change = {"why": asked.why, "against": commit, "compared": sorted(new), "definitions": changed}
    FILE.write_text(json.dumps({"changes": [*there, change]}, indent=1, sort_keys=True) + "\n")
    print(f"{len(new)} files and tables are equal; {FILE.relative_to(ROOT)} says so")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

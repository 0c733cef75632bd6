"""Shows that a change of the code changes no number, and writes that down, so that no run has to be done again.

    python tools/same_numbers.py --against HEAD~1 --why "clearer errors in the loop"

Data, encoders and results of every row are made at preset smoke, with more shifted flows, once by the code of the
other commit and once by that of this checkout. If all of them are equal bit by bit, the definitions that differ are
written into `physrep/core/same_numbers.json`, and count as those of the other commit from then on
(`physrep.core.provenance`).

    python tools/same_numbers.py --against HEAD~1 --rounding --why "products of matrices by another library"

A change of the order of sums changes the last digits, as another processor does, whose runs count as well. With
`--rounding` the data must still be equal, but weights may differ by 1 %, and errors of probes by a tenth of the width
of their 95 % interval (root mean square over the rows of a result): a probe on eight flows may find another neighbour.
The largest differences that were found are written down, too.

    python tools/same_numbers.py --tables --against HEAD~1 --why "pairs by the number of their seeds"

With `--tables` nothing is trained. Table 1, with all paired differences, its panels, the overview and the names of all
rows, is made from the results in `figures/results`, by both codes, and only definitions of these are declared equal.

    python tools/same_numbers.py --tables --redrawn panel --against HEAD~1 --why "panels have a logarithmic axis"

    python tools/same_numbers.py --operations --against HEAD~1 --why "operations are counted once for all seeds"

With `--operations` nothing is trained either. The operations of all rows on all systems, and of all cells of
`make matters`, are counted by both codes, and only definitions of `training.cost` are declared equal.

With `--redrawn` the pictures of a kind may look different, while all tables must be equal. The figures that show such
pictures are drawn again for the same commit, as nothing else will say that theirs are old."""

import argparse
import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "physrep" / "core" / "same_numbers.json"
STEPS = 32  # updates: enough for two encoders of the learning curve
WEIGHTS, ERRORS = 0.01, 0.1  # with --rounding: relative, and in widths of an interval, as in tools/same_flows.py
NUMBERS = ("value", "low", "high")  # of a row of a result


def preset_compared():
    "Preset smoke with as many draws of shifted flows as it takes to resample draws, as in the larger presets."
    from physrep.probing.evaluate import ENOUGH
    from physrep.training.presets import get_preset

    smoke = get_preset("smoke")
    sims = {
        name: replace(s, draws={**s.draws, "shifted": (ENOUGH, s.draws["shifted"][1])})
        for name, s in smoke.sims.items()
    }
    return replace(smoke, name="same_numbers", sims=sims)


def runs_compared():
    "All rows that are trained, and random weights, on the first system; MAE and random weights on the others."
    from physrep.results.rows import ROWS, changes_of
    from physrep.training.run import resolve

    preset = preset_compared()
    first, *others = preset.systems
    rows = [row for row in ROWS if row.kind in ("trained", "random")]
    asked = [(first, row) for row in rows]
    asked += [(s, row) for s in others for row in rows if row.pair in (("mae", "vit"), ("random", "vit"))]
    about = [(s, row, dict(tag=row.tag, steps=STEPS if row.kind == "trained" else None)) for s, row in asked]
    return [resolve(s, row.objective, row.encoder, preset, **some, **changes_of(row, s)) for s, row, some in about]


def numbers(folder: Path) -> dict:
    "What the code that is imported makes: fingerprints of data, digests of encoders, rows of results, by name."
    import torch

    from physrep.core.files import read_json
    from physrep.probing.evaluate import score_run
    from physrep.probing.reading import probe_splits
    from physrep.training.pretrain import pretrain
    from physrep.training.run import ensure_data

    torch.set_num_threads(1)
    found = {}
    for run in runs_compared():
        data = ensure_data(run, folder / "data", workers=1)
        place = pretrain(run, data, folder / "runs", progress=False, say=lambda text: None)
        score_run(run, data, folder / "runs", progress=False)
        name = f"{run.system.name}, {'-'.join(run.row)}"
        found[f"{run.system.name}, data"] = {s: w.fingerprint() for s, w in probe_splits(run, data).items()}
        for file in [place / "encoder.safetensors", *sorted((place / "curve").glob("*.safetensors"))]:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found[f"{name}, {file.name}"] = {"file": str(file.relative_to(folder)), "sha256": digest}
        for file in ("result.json", "few.json"):
            if (place / file).is_file():
                found[f"{name}, {file}"] = read_json(place / file)["rows"]
        print(f"  {name}", file=sys.stderr, flush=True)
    return found


def used() -> dict[str, list[str]]:
    "The digests of all definitions behind the runs that are compared and their data, by name."
    from physrep.core import provenance
    from physrep.data.generate import SOLVERS

    found: dict[str, set[str]] = {}
    for run in runs_compared():
        modules = (*run.modules, "probing.evaluate", "data.generate", SOLVERS[run.system.name])
        for name, digests in provenance._used(modules, run.entries).items():
            found.setdefault(name, set()).update(digests)
    return {name: sorted(digests) for name, digests in found.items()}


COMPARISONS = tuple(f"results.{name}" for name in ("archive", "comparison", "curves", "forest", "panels", "seeds"))
COMPARISONS += ("experiments.overview", "experiments.table1")
PICTURES = ("curves", "forest", "overview", "panel")  # what `tables` draws of each system


def tables(folder: Path) -> dict:
    "What the code that is imported makes of the results of this checkout: tables, panels and names, as text."
    from physrep.experiments.overview import best_probes, plot_overview
    from physrep.experiments.table1 import against_random, differences_from_own, shown_as, shown_rows, table_rows
    from physrep.results.archive import _scored, unpack
    from physrep.results.comparison import summarise
    from physrep.results.curves import plot_curves, read_curves, trained_table
    from physrep.results.forest import plot_differences
    from physrep.results.panels import plot_table1
    from physrep.results.rows import ROWS, references_of, title_of
    from physrep.results.seeds import folders_of_seeds
    from physrep.training.presets import get_preset

    preset, found = get_preset("laptop"), {}
    found["names"] = [[title_of(*row.pair), title_of(row.pair[0]), title_of(row.pair[1])] for row in ROWS]
    for system in preset.systems:
        unpack(ROOT / "figures" / "results" / "laptop" / system, folder / "runs" / "laptop" / system, preset)
        rows = table_rows(preset, system)
        _, places = folders_of_seeds(preset, {system: rows}, folder / "runs")
        found[f"{system}, runs"] = [name for name, _ in _scored(folder / "runs" / "laptop" / system)]
        shown = shown_rows(rows)
        apart = differences_from_own(places, shown)
        made = {"errors": summarise(places), "differences": apart, "over random": against_random(apart, shown)}
        found |= {f"{system}, {name}": table.to_csv(index=False) for name, table in made.items()}
        errors, curves = shown_as(made["errors"]), shown_as(read_curves(places))
        found[f"{system}, trained"] = trained_table(curves, shown).to_csv(index=False)
        found[f"{system}, curves"] = drawn(plot_curves(curves, shown))
        found[f"{system}, panel"] = drawn(plot_table1(errors, system, rows=shown))
        found[f"{system}, forest"] = drawn(plot_differences(made["over random"], system, rows=shown))
        found[f"{system}, overview"] = drawn(plot_overview(best_probes(errors, shown), shown))
        found[f"{system}, references"] = references_of(rows)
        print(f"  {system}", file=sys.stderr, flush=True)
    return found


def drawn(fig) -> str:
    "A figure as text that is equal for equal figures."
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "equal"}):
        fig.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def used_in_tables() -> dict[str, list[str]]:
    "The digests of all definitions behind comparisons, by name."
    from physrep.core import provenance

    return {name: sorted(digests) for name, digests in provenance._used(COMPARISONS, ()).items()}


def operations() -> dict:
    "The operations of all rows and cells that the code that is imported counts, by name."
    from physrep.experiments.matters import cell_run, cells_of
    from physrep.results.rows import ROWS, run_of
    from physrep.training.cost import cost
    from physrep.training.presets import get_preset

    preset = get_preset("laptop")
    rows = [row for row in ROWS if row.kind in ("trained", "random")]
    found = {f"{s}, {'-'.join(row.pair)}": cost(run_of(row, s, preset)) for s in preset.systems for row in rows}
    first = preset.systems[0]
    return found | {f"{first}, {name}": cost(cell_run(name, first, preset)) for name in cells_of(first, preset)}


def used_in_operations() -> dict[str, list[str]]:
    "The digests of the definitions of `training.cost`, by name."
    from physrep.core import provenance

    full = "physrep.training.cost"
    parts = provenance._module(full, provenance._source(full))[0]
    return {name: [provenance._same_numbers(name, digest)] for name, _, digest in parts}


def weights_differ(old: Path, new: Path) -> float:
    "The difference of the weights of two encoders, relative to those of the first."
    from safetensors.numpy import load_file

    a, b = load_file(old), load_file(new)
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        return math.inf
    size = math.fsum(float((v.astype("f8") ** 2).sum()) for v in a.values())
    return math.sqrt(math.fsum(float(((b[k].astype("f8") - v) ** 2).sum()) for k, v in a.items()) / size)


def errors_differ(old: list[dict], new: list[dict]) -> float:
    """The difference of the numbers in the rows of two results, in widths of the first one's intervals, root mean
    square; infinite if anything else differs."""
    about = [[{k: v for k, v in row.items() if k not in NUMBERS} for row in rows] for rows in (old, new)]
    if about[0] != about[1]:
        return math.inf
    squares = []
    for rows in zip(old, new):
        a, b = ({k: math.nan if row[k] is None else row[k] for k in NUMBERS if k in row} for row in rows)
        width = a.get("high", math.nan) - a.get("low", math.nan)
        width = width if math.isfinite(width) and width > 0 else 1.0
        if a.keys() != b.keys() or any(math.isnan(a[k]) != math.isnan(b[k]) for k in a):
            return math.inf
        squares += [((a[k] - b[k]) / width) ** 2 for k in a if not math.isnan(a[k])]
    return math.sqrt(sum(squares) / max(1, len(squares)))


def rounding(old: dict, new: dict, folders: dict) -> tuple[dict[str, float], list[str]]:
    "The largest differences of weights and of errors, and what differs by more than rounding may."
    largest, other = {"weights": 0.0, "errors": 0.0}, []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        kind = "weights" if key.endswith(".safetensors") else "errors"
        if a is None or b is None or key.endswith(", data"):
            other.append(key)
            continue
        if kind == "weights":
            difference = weights_differ(folders["old"] / a["file"], folders["new"] / b["file"])
        else:
            difference = errors_differ(a, b)
        largest[kind] = max(largest[kind], difference)
        if not difference <= (WEIGHTS if kind == "weights" else ERRORS):
            other.append(f"{key} by {difference:.2g}")
    return largest, other


def ask(tree: Path, what: str, folder: Path) -> dict:
    "What a function of `ASKED` finds with the code of a checkout, in a process of its own."
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


ASKED = {
    "numbers": numbers,
    "used": used,
    "tables": tables,
    "used_in_tables": used_in_tables,
    "operations": operations,
    "used_in_operations": used_in_operations,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="the other commit")
    parser.add_argument("--why", help="what changed, in a few words")
    parser.add_argument("--rounding", action="store_true", help="the last digits may differ")
    parser.add_argument("--tables", action="store_true", help="of comparisons alone, from the committed results")
    parser.add_argument("--operations", action="store_true", help="of operations alone, which are counted")
    redrawn = "pictures of this kind may differ; several times for several kinds"
    parser.add_argument("--redrawn", action="append", choices=PICTURES, default=[], help=redrawn)
    parser.add_argument("--ask", choices=list(ASKED), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.ask:
        takes_folder = asked.ask in ("numbers", "tables")
        asked.into.write_text(json.dumps(ASKED[asked.ask](*([asked.folder] if takes_folder else []))))
        return 0
    what = "tables" if asked.tables else "operations" if asked.operations else "numbers"
    definitions = "used" if what == "numbers" else f"used_in_{what}"
    if asked.tables and asked.operations:
        parser.error("--tables and --operations are two calls, one after the other")
    if what != "numbers" and asked.rounding:
        parser.error(f"{what} are compared bit by bit: leave out --rounding")
    if asked.redrawn and not asked.tables:
        parser.error("--redrawn is for pictures of tables: add --tables")
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
            changed = differing(*(ask(place, definitions, folder) for place, folder in folders.items()))
            if not changed:
                print("no definition behind these numbers differs")
                return 0
            print(f"{len(changed)} definitions differ: {', '.join(changed)}")
            old, new = (ask(place, what, folder) for place, folder in folders.items())
            largest, other = {"weights": 0.0, "errors": 0.0}, []
            if asked.rounding:
                largest, other = rounding(old, new, {folder.name: folder for folder in folders.values()})
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=False)
    if not asked.rounding:
        may = {key for key in old.keys() & new.keys() if key.rsplit(", ", 1)[-1] in asked.redrawn}
        other = sorted(key for key in (old.keys() | new.keys()) - may if old.get(key) != new.get(key))
    if asked.rounding:
        print(f"largest difference of weights {largest['weights']:.2g}, of errors {largest['errors']:.2g}")
    if other:
        print(f"{len(other)} of {len(new)} differ; nothing was written: {'; '.join(other[:10])}")
        return 1
    there = json.loads(FILE.read_text())["changes"] if FILE.is_file() else []
    compared = sorted(key for key in new if key.rsplit(", ", 1)[-1] not in asked.redrawn)
    change = {"why": asked.why, "against": commit, "compared": compared, "definitions": changed}
    change |= {"redrawn": asked.redrawn} if asked.redrawn else {}
    change |= {"largest_differences": largest} if asked.rounding else {}
    FILE.write_text(json.dumps({"changes": [*there, change]}, indent=1, sort_keys=True) + "\n")
    equal = "equal but for rounding" if asked.rounding else "equal"
    print(f"{len(compared)} files and tables are {equal}; {FILE.relative_to(ROOT)} says so")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

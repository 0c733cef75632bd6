"""How far the numbers of a run are from the committed ones.

    python tools/compare_figures.py runs/laptop/figures figures [names]    names, e.g. tuning: only those tables

Rows of two tables are the same row if they agree in all columns that are not measured: names, splits, numbers of
samples. Measured are floats and lists of floats; names of runs, seconds, and text made from numbers are passed over.
Where two rows are of other numbers of seeds, the first of one are compared with the first of the other, in the order of
their seeds, and nothing else: seed 0 with seed 0, where both begin with it. Where several seeds are committed, their
standard deviation says how large a difference is: another processor rounds differently, and training amplifies that, as
another seed does.
"""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

TIMES = ("benchmarks", "peer_solver", "scaling", "scaling_sources")  # how fast a machine is: no two runs agree
NUMBERS = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|nan|inf", re.I)


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def is_passed_over(name: str) -> bool:
    "Names of runs change with any setting, seconds with the machine; `text` is the numbers beside it, rounded."
    return name in ("run", "text") or name.endswith("_run") or "seconds" in name


def counts_seeds(name: str) -> bool:
    "Numbers of seeds: they do not tell rows apart."
    return name == "seeds" or name.startswith("seeds_")


def is_list_of_numbers(column: pd.Series) -> bool:
    "Text such as `0.41 0.44 0.39`, one number a seed."
    values = column.dropna()
    if not len(values) or pd.api.types.is_numeric_dtype(column):
        return False
    return all(isinstance(v, str) and v.split() and all(map(NUMBERS.fullmatch, v.split())) for v in values)


def is_measured(name: str, tables: tuple[pd.DataFrame, pd.DataFrame]) -> bool:
    columns = [table[name] for table in tables]
    return any(map(pd.api.types.is_float_dtype, columns)) or any(map(is_list_of_numbers, columns))


def numbers(value) -> list[float]:
    "What a measured cell holds; an empty one holds none."
    if isinstance(value, str):
        return [float(v) for v in value.split()]
    return [] if pd.isna(value) else [float(value)]


def keyed(table: pd.DataFrame, keys: list[str]) -> dict[tuple, dict]:
    "Rows by what they are about; rows about the same thing are told apart by their order."
    rows, seen = {}, {}
    for row in table.to_dict("records"):
        key = tuple("" if pd.isna(row[k]) else str(row[k]) for k in keys)
        seen[key] = seen.get(key, -1) + 1
        rows[(*key, seen[key])] = row
    return rows


def columns(new: pd.DataFrame, old: pd.DataFrame) -> tuple[list[str], list[str], list[str], list[str]]:
    "The columns that both tables have: those that tell rows apart, are measured, count seeds, and say yes or no."
    common = [c for c in old.columns if c in new.columns and not is_passed_over(c)]
    measured = [c for c in common if is_measured(c, (new, old))]
    seeds = [c for c in common if counts_seeds(c)]
    apart = [c for c in common if c not in measured and c not in seeds]
    keys = [c for c in apart if not pd.api.types.is_bool_dtype(old[c])]
    return keys, measured, seeds, [c for c in apart if c not in keys]  # yes and no: found, not asked for


def beside_seeds(new: pd.DataFrame, old: pd.DataFrame) -> list[float]:
    """How far the errors of equal seeds are apart, in standard deviations of the seeds, where several are committed. Of
    rows that are trained: random weights are the same everywhere, and would make any two runs look alike."""
    keys, measured, *_ = columns(new, old)
    left, right = keyed(new, keys), keyed(old, keys)
    apart = []
    for key in [key for key in right if key in left and "by_seed" in measured]:
        if str(right[key].get("objective", "")).startswith("random"):
            continue
        a, b = numbers(right[key]["by_seed"]), numbers(left[key]["by_seed"])
        spread = np.std(a, ddof=1) if len(a) > 1 else 0.0
        apart += [abs(x - y) / spread for x, y in zip(a, b) if spread > 0]
    return apart


def differences(new: pd.DataFrame, old: pd.DataFrame) -> tuple[dict, list[tuple], list[str]]:
    """Two tables: what was counted, every pair of numbers as `(|difference|, column, row, old, new)`, and what cannot
    be compared. The difference is infinite where only one is a finite number, or where lists have other lengths."""
    keys, measured, seeds, said = columns(new, old)
    left, right = keyed(new, keys), keyed(old, keys)
    both = [key for key in right if key in left]
    pairs, notes = [], []
    fewer = {key for key in both if any(left[key][c] != right[key][c] for c in seeds)}
    if fewer:
        notes.append(f"{len(fewer)} row(s) of other numbers of seeds, compared in their order")
    for key in both:
        about = " ".join(part for part in key[:-1] if part and len(part) <= 40)
        for c in [c for c in measured if c == "by_seed"] if key in fewer else measured:
            a, b = numbers(right[key][c]), numbers(left[key][c])
            if key in fewer:  # in the order of the seeds: those that both have
                a, b = a[: len(b)], b[: len(a)]
            if len(a) != len(b):
                pairs.append((math.inf, c, about, right[key][c], left[key][c]))
            for x, y in zip(a, b):
                gap = 0.0 if x == y or (np.isnan(x) and np.isnan(y)) else abs(x - y)
                pairs.append((math.inf if np.isnan(gap) else gap, c, about, x, y))
    for c in said:
        if changed := sum(left[key][c] != right[key][c] for key in both):
            notes.append(f"{c} differs in {changed} row(s)")
    for rows, others, where in ((left, right, "new"), (right, left, "committed")):
        if only := sum(key not in others for key in rows):
            notes.append(f"{only} row(s) only in the {where} table")
    for one, other, where in ((new, old, "new"), (old, new, "committed")):
        if only := [c for c in one.columns if c not in other.columns]:
            notes.append(f"column(s) only in the {where} table: {', '.join(only)}")
    return {"rows": len(both), "numbers": len(pairs)}, pairs, notes


def report(new: Path, old: Path, names: tuple[str, ...] = ()) -> str:
    "The numbers of two folders of figures, as one block of text."

    def tables(folder: Path) -> list[str]:
        return sorted(p.stem for p in folder.glob("*.csv") if (p.stem in names if names else p.stem not in TIMES))

    here, there = tables(new), tables(old)
    if not here:
        return f"== no tables in {new}"
    if not there:
        return f"== nothing committed in {old} to compare {new} with"
    lines, largest = [], (-1.0, "", None)
    width = max(map(len, {*here, *there}))
    for name in sorted({*here, *there}):
        if name not in there or name not in here:
            where = "new, nothing committed" if name in here else "committed, not drawn here"
            lines.append(f"  {name:<{width}}  {where}")
            continue
        try:
            both = read(new / f"{name}.csv"), read(old / f"{name}.csv")
            counted, pairs, notes = differences(*both)
            apart = beside_seeds(*both)
        except (ValueError, KeyError, OSError) as error:  # an empty file, say
            lines.append(f"  {name:<{width}}  not comparable: {error}")
            continue
        worst = max(pairs, key=lambda pair: pair[0], default=None)
        if worst is None:
            lines.append(f"  {name:<{width}}  not comparable: no row in common; " + "; ".join(notes))
            continue
        if worst[0] > largest[0]:
            largest = (worst[0], name, worst)
        text = f"largest difference {worst[0]:<9.3g} of {counted['numbers']} numbers in {counted['rows']} rows"
        if apart and worst[0] > 0:
            within = 100 * np.mean(np.array(apart) < 1)
            half = f"trained rows: half within {np.median(apart):.2g}"
            notes.insert(0, f"{half} and {within:.0f} % within 1 standard deviation of seeds")
        lines.append(f"  {name:<{width}}  " + "; ".join([text, *notes]))
    head = [f"== numbers in {new} against those in {old}"]
    if largest[2] is not None:
        gap, name, (_, column, about, a, b) = largest
        if gap == 0:
            head.append("  no number differs")
        else:
            shown = [f"{v:g}" if isinstance(v, float) else f"{v}" for v in (a, b)]
            head.append(f"  largest difference: {gap:.3g}, {shown[0]} committed and {shown[1]} now")
            head.append(f"  in {name}.csv, column {column}, row: {about}")
    return "\n".join([*head, *lines])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    print(report(Path(sys.argv[1]), Path(sys.argv[2]), tuple(sys.argv[3:])))

"""How far the errors of a run are from the committed ones.

    python tools/compare_figures.py runs/laptop/figures figures

Compares `table1.csv` of two folders: errors of rows that are trained, seed by seed in their order, beside the standard
deviation of the committed seeds. Another processor rounds differently, and training amplifies that, as another seed
does.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

KEYS = ["system", "objective", "encoder", "probe", "split", "label", "metric", "labelled_flows", "draw"]


def seeds_of(folder: Path) -> dict[tuple, np.ndarray]:
    "Row -> its errors by seed, of the rows that are trained."
    table = pd.read_csv(folder / "table1.csv", keep_default_na=False)
    table = table[(table.metric == "mse") & (table.encoder != "none") & ~table.objective.str.startswith("random")]
    return {tuple(row[k] for k in KEYS): np.array(str(row["by_seed"]).split(), float) for _, row in table.iterrows()}


def report(new: Path, old: Path) -> str:
    "The comparison in words."
    if not (new / "table1.csv").is_file() or not (old / "table1.csv").is_file():
        return f"== no Table 1 in {new if not (new / 'table1.csv').is_file() else old}: nothing to compare"
    here, there = seeds_of(new), seeds_of(old)
    both = [key for key in here if key in there]
    gaps = [np.abs(here[key][0] - there[key][0]) for key in both]
    spread = [np.std(there[key], ddof=1) for key in both if len(there[key]) > 1]
    if not both:
        return f"== {new} and {old} have no row in common"
    worst = both[int(np.argmax(gaps))]
    lines = [f"== {len(both)} errors beside those in {old}: the median difference is {np.median(gaps):.4f}"]
    lines.append(f"   the largest is {max(gaps):.3f} ({', '.join(map(str, worst[:6]))})")
    if spread:
        inside = np.mean([g <= s for g, s in zip(gaps, spread)])
        lines.append(f"   {inside:.0%} are within one standard deviation of the committed seeds")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("give two folders of figures: the new one and the committed one")
    print(report(*map(Path, sys.argv[1:])))

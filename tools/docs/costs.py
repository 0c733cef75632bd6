"""Counts the operations of rows of Table 1 at preset `paper`, for the guide about The Well; minutes of one core.

    python tools/docs/costs.py jepa-convnext mae-vit > tools/docs/costs.csv       # no names: all rows

Operations of a window hardly depend on the batch, so two windows are counted; VICReg of JEPA then has one chunk. Every
system of four channels has these numbers; eleven channels change the first layer of an encoder only.
"""

import csv
import sys

from physrep.results.rows import ROWS
from physrep.training.cost import cost
from physrep.training.run import resolve

if __name__ == "__main__":
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["objective", "encoder", "encode", "train"])
    asked = sys.argv[1:] or [f"{row.objective}-{row.encoder}" for row in ROWS]
    pairs = dict.fromkeys((row.objective, row.encoder) for row in ROWS if row.kind != "baseline")
    for objective, encoder in pairs:
        if f"{objective}-{encoder}" in asked:
            recipe = {"batch_size": 2, "accumulate": 1} if objective not in ("random", "frozen") else None
            chunks = {"chunks": 1} if objective == "jepa" else None
            counted = cost(resolve("shear_flow", objective, encoder, "paper", recipe=recipe, coefficients=chunks))
            table.writerow([objective, encoder, counted["encode"], counted["train"]])
            sys.stdout.flush()

"""The numbers in the README and on the findings page are those of the CSVs beside the figures.

python tools/readme_numbers.py            say which differ; exits with 1 if any does
python tools/readme_numbers.py --write    put those of the CSVs into nbs/index.ipynb and the page, then make README.md
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import nbformat
import pandas as pd

from physrep.probing.features import main_split

ROOT = Path(__file__).resolve().parent.parent
INDEX, FINDINGS = ROOT / "nbs" / "index.ipynb", ROOT / "tools" / "docs" / "pages" / "findings.md"
SYSTEMS = ("shear_flow", "rayleigh_benard", "active_matter")
ROWS = {  # as the README's table calls them
    "random weights, ConvNeXt": ("random", "convnext"),
    "JEPA, ConvNeXt": ("jepa", "convnext"),
    "random weights, ViT": ("random", "vit"),
    "masked JEPA, ViT": ("masked_jepa", "vit"),
    "MAE, ViT": ("mae", "vit"),
    "forecast, ViT": ("forecast", "vit"),
    "invariance, ViT": ("invariance", "vit"),
    "trained with labels, ViT": ("supervised", "vit"),
    "statistics with spectra": ("spectra", "none"),
}


@cache
def table(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "figures" / f"{name}.csv")


def errors(probe: str, **where: object) -> pd.Series:
    "Mean error on the split that tables show, with all labels: (system, objective, encoder) -> value."
    found = table("table1")
    asked = dict(probe=probe, split=main_split(set(found.split)), label="mean", metric="mse") | where
    for column, value in asked.items():
        found = found[found[column] == value]
    most = found.groupby("system").labelled_flows.transform("max")
    return found[found.labelled_flows == most].set_index(["system", "objective", "encoder"]).value


def gains(objective: str, encoder: str = "vit") -> tuple[int, int]:
    "In how many comparisons a row is below random weights of its network, and of how many."
    one = table("over_random")
    one = one[(one.objective == objective) & (one.encoder == encoder)]
    return sum(one.verdict == "better"), len(one)


def verdicts(name: str, *which: str) -> tuple[int, ...]:
    "How many lines of a table have each verdict."
    return tuple(int((table(name).verdict == verdict).sum()) for verdict in which)


def best_without_labels(system: str) -> float:
    found = errors("attentive")[system]
    return found[
        [o.partition(".")[0] not in ("random", "supervised", "constant") and e != "none" for o, e in found.index]
    ].min()


def few(system: str, objective: str, flows: int) -> float:
    found = table("few_labels")
    found = found[(found.system == system) & (found.objective == objective) & (found.encoder == "vit")]
    return found[found.labelled_flows == flows].value.mean()


def sides(name: str) -> tuple[int, int, int]:
    "Lines, and those whose interval is below and above 1."
    found = table(name)
    return len(found), int((found.high < 1).sum()), int((found.low > 1).sum())


def rollout_error(objective: str, step: int = 8) -> float:
    found = table("rollout")
    found = found[(found.system == "shear_flow") & (found.objective == objective) & (found.metric == "vrmse")]
    return found[found.step == step]["median"].mean()


def shifted_best() -> float:
    "The lowest attentive error of an encoder without labels on shear flows that start in another way."
    found = errors("attentive", split="shifted")["shear_flow"]
    return found[[o.partition(".")[0] not in ("random", "supervised") and e != "none" for o, e in found.index]].min()


def halved() -> tuple[int, int, int]:
    "Encoders, and those with less than half the error of a constant on `test` and on flows that start in another way."
    found = table("other_flows")
    found = found[(found.asked == "parameters") & (found.encoder != "none") & (found.trained_on == found.system)]
    test, shifted = (found[found.flows == flows].value for flows in ("test", "shifted"))
    return len(test), int((test < 0.5).sum()), int((shifted < 0.5).sum())


def speed(reader: str) -> float:
    return table("benchmarks").set_index("reader").windows_per_second[reader]


def digits(value: float, n: int = 2) -> str:
    return f"{value:.{n}f}"


def readme_row(key: tuple[str, str]) -> tuple[str, ...]:
    found = errors("kernel")
    return tuple(digits(found[(s, *key)], 3 if s == "rayleigh_benard" else 2) for s in SYSTEMS)


# a pattern with a group for each number -> what the numbers are
README: dict[str, Callable[[], tuple]] = {
    rf"\| {title} \| (\S+) \| (\S+) \| (\S+) \|": (lambda key=key: readme_row(key)) for title, key in ROWS.items()
} | {
    r"MAE on a ViT in (\d+) of (\d+) comparisons": lambda: (
        *verdicts("paper_order", "worse"),
        len(table("paper_order")),
    ),
    r"below random weights of its network in (\d+) of (\d+) comparisons": lambda: gains("forecast"),
}
PAGE: dict[str, Callable[[], tuple]] = {
    r"JEPA has the higher error in (\d+) of (\d+)": lambda: (
        *verdicts("paper_order", "worse"),
        len(table("paper_order")),
    ),
    r"The (\d+) of the shear flow are undecided": lambda: verdicts("paper_order", "undecided"),
    r"random weights in (\d+) of (\d+) comparisons": lambda: (
        *verdicts("over_random", "better"),
        len(table("over_random")),
    ),
    r"raises it in (\d+)\. The other (\d+) are": lambda: verdicts("over_random", "worse", "undecided"),
    r"forecasts gain in (\d+) of (\d+) comparisons each": lambda: gains("invariance"),
    r"periodic ConvNeXt gains in (\d+), MAE in (\d+)": lambda: (
        gains("jepa.circular", "convnext")[0],
        gains("mae")[0],
    ),
    r"without labels is (\S+) on the shear flow": lambda: (digits(best_without_labels("shear_flow")),),
    r"on the periodic ConvNeXt\), (\S+) in convection": lambda: (digits(best_without_labels("rayleigh_benard"), 3),),
    r"\(invariance\) and (\S+) in active matter": lambda: (digits(best_without_labels("active_matter")),),
    r"with (\S+) on the shear flow\. In convection their": lambda: (
        digits(errors("kernel")["shear_flow", "spectra", "none"], 3),
    ),
    r"In convection it has (\S+), and the same network trained on these labels has (\S+)\.": lambda: (
        digits(few("rayleigh_benard", "invariance", 16)),
        digits(few("rayleigh_benard", "supervised", 16)),
    ),
    r"trained alike in (\d+) of (\d+) cases": lambda: (
        *verdicts("fine_tuned", "better"),
        len(table("fine_tuned").dropna(subset="second")),
    ),
    r"On the shear flow (\d+) changes": lambda: sides("variants")[:1],
    r"of JEPA, to (\S+) of it": lambda: (digits(table("variants").set_index("variant").value["circular"]),),
    r"and (\d+) are undecided\.\n\nThe five": lambda: (sides("variants")[0] - sum(sides("variants")[1:]),),
    r"frame 8 in each system: (\S+) on the shear flow, where the last given frame, held still, has (\S+)\.": lambda: (
        digits(rollout_error("forecast")),
        digits(rollout_error("persistence")),
    ),
    r"attentive error is that of forecasts, (\S+)\. Summary": lambda: (digits(shifted_best()),),
    r"ones among them, (\d+) have less than half the error of a constant on `test`, and (\d+) on": lambda: halved()[1:],
    r"Of (\d+) encoders, with random": lambda: halved()[:1],
    r"update of a ViT is (\S+) times": lambda: (digits(table("benchmarks").times_plain.median()),),
    r"read (\S+) times as fast as by The Well's own reader, which is (\S+) of": lambda: (
        digits(speed("physrep") / speed("The Well's reader"), 1),
        digits(speed("physrep") / speed("copy in memory")),
    ),
}


def differing(text: str, known: dict[str, Callable[[], tuple]]) -> Iterator[tuple[re.Match, tuple[str, ...]]]:
    "Sentences whose numbers are not those of the CSVs, with those that are. ValueError for one that is not there."
    for pattern, numbers in known.items():
        if not (found := re.search(pattern, text)):
            raise ValueError(f"no sentence fits {pattern!r}: mend it in tools/readme_numbers.py")
        if found.groups() != (wanted := tuple(map(str, numbers()))):
            yield found, wanted


def with_numbers(text: str, known: dict[str, Callable[[], tuple]]) -> str:
    for found, wanted in differing(text, known):
        new, end = "", found.start()
        for i, number in enumerate(wanted, 1):
            new += text[end : found.start(i)] + number
            end = found.end(i)
        text = text.replace(found[0], new + text[end : found.end()])
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        notebook = nbformat.read(INDEX, 4)
        whole = "\0".join(c.source for c in notebook.cells)
        for cell, source in zip(notebook.cells, with_numbers(whole, README).split("\0")):
            cell.source = source
        nbformat.write(notebook, INDEX)
        FINDINGS.write_text(with_numbers(FINDINGS.read_text(encoding="utf-8"), PAGE), encoding="utf-8")
        print("now: python tools/notebooks.py --readme")
        sys.exit()
    wrong = 0
    for path, known in ((ROOT / "README.md", README), (FINDINGS, PAGE)):
        for found, wanted in differing(path.read_text(encoding="utf-8"), known):
            print(f"{path.relative_to(ROOT)}: {found[0]!r}, but the CSVs have {', '.join(wanted)}")
            wrong += 1
    sys.exit(bool(wrong))

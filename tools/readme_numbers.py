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

from physrep.experiments.learning_curves import still_falling
from physrep.probing.features import main_split

ROOT = Path(__file__).resolve().parent.parent
INDEX, FINDINGS = ROOT / "nbs" / "index.ipynb", ROOT / "tools" / "docs" / "pages" / "findings.md"
SYSTEMS = ("shear_flow", "rayleigh_benard", "active_matter")
ROWS = {  # as the README's table calls them
    "random weights, periodic ConvNeXt": ("random.circular", "convnext"),
    "JEPA, periodic ConvNeXt": ("jepa.circular", "convnext"),
    "random weights, ViT": ("random", "vit"),
    "JEPA, ViT": ("jepa", "vit"),
    "masked JEPA, ViT": ("masked_jepa", "vit"),
    "MAE, periodic ConvNeXt": ("mae.circular", "convnext"),
    "MAE, ViT": ("mae", "vit"),
    "forecast, ViT": ("forecast", "vit"),
    "invariance, ViT": ("invariance", "vit"),
    "trained with labels, ViT": ("supervised", "vit"),
    "statistics with spectra": ("spectra", "none"),
}


@cache
def table(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "figures" / f"{name}.csv")


STUDY = "16x/"  # folder of the figures of the longer trainings


def errors(probe: str, folder: str = "") -> pd.Series:
    "Mean error with all labels on the split that tables show: (system, objective, encoder) -> value."
    found = table(f"{folder}table1")
    found = found[found.split == main_split(set(found.split))]
    found = found[(found.probe == probe) & (found.label == "mean") & (found.metric == "mse")]
    most = found.groupby("system").labelled_flows.transform("max")
    keys = ["system", "objective", "encoder"]
    return found[found.labelled_flows == most].groupby(keys, sort=False).value.mean()


def gains(objective: str, encoder: str = "vit", verdict: str = "better") -> tuple[int, ...]:
    "In how many comparisons a row is below random weights of its network, or above."
    found = table("over_random")
    found = found[(found.objective == objective) & (found.encoder == encoder)]
    return (int((found.verdict == verdict).sum()),)


def verdicts(name: str, *which: str) -> tuple[int, ...]:
    "How many lines of a table have each verdict."
    return tuple(int((table(name).verdict == verdict).sum()) for verdict in which)


def best_without_labels(system: str) -> float:
    found = errors("attentive")[system]
    return found[
        [o.partition(".")[0] not in ("random", "supervised", "constant") and e != "none" for o, e in found.index]
    ].min()


def few(system: str, objective: str, flows: int, encoder: str = "vit") -> float:
    found = table("few_labels")
    found = found[(found.system == system) & (found.objective == objective) & (found.encoder == encoder)]
    return found[found.labelled_flows == flows].value.mean()


def falling() -> tuple[int, int]:
    "Learning curves that fall over their last factor of four, and all."
    still = still_falling(table("learning_curves"))
    return int(still.sum()), len(still)


def candidate(
    name: str, column: str, system: str = "shear_flow", lengths: tuple = (0, 4), row: str = "jepa.circular-convnext"
) -> str:
    "What a candidate has, by default at a quarter of the full length, or untrained."
    found = table("tuning").query("row == @row and system == @system and length in @lengths")
    found = found[found.candidate == name]
    return digits(found[column].item())


def ahead(frames: int) -> str:
    return digits(table("predictability").query("system == 'active_matter' and frames == @frames").ridge.item())


def speed(reader: str) -> float:
    return table("benchmarks").set_index("reader").windows_per_second[reader]


def measured(what: str) -> pd.DataFrame:
    return table("benchmarks").query("what == @what")


def over_random(objective: str, system: str = "shear_flow") -> str:
    "The error of a row on the ViT over that of random weights, after the longer training."
    found = errors("kernel", STUDY)[system]
    return digits(found[objective, "vit"] / found["random", "vit"])


def gate(objective: str, system: str, encoder: str = "vit") -> float:
    found = table(f"{STUDY}gates").query("objective == @objective and system == @system and encoder == @encoder")
    return found.x.item()


def block(objective: str, at: int) -> float:
    found = table(f"{STUDY}blocks").query("probe == 'kernel' and split == 'test' and system == 'active_matter'")
    return found.query("objective == @objective and encoder == 'vit' and block == @at").value.item()


OTHERS = ("shifted", "long_box")


def on_the_way(objective: str, encoder: str, tflop: float, system: str = "shear_flow") -> float:
    "The error in a system after so many 10^12 operations."
    found = table(f"{STUDY}learning_curves").query("system == @system and objective == @objective")
    found = found[(found.encoder == encoder) & (found.operations / 1e12 - tflop).abs().lt(0.05 * tflop)]
    return found.value.item()


def covered(how: str, flows: str) -> float:
    return table(f"{STUDY}unlike").query("flows == @flows")[how].mean()


def digits(value: float, n: int = 2) -> str:
    return f"{value:.{n}f}"


def in_table(key: tuple[str, str], system: str, folder: str) -> str:
    "An error as the README's table has it; a dash for a row without one."
    value = errors("kernel", folder).get((system, *key))
    return "–" if value is None else digits(value, 3 if system == "rayleigh_benard" else 2)


def readme_row(key: tuple[str, str]) -> tuple[str, ...]:
    "Errors in each system: of a trained row those of the study, and those of `make reproduce`."
    once = key[0].startswith("random") or key[1] == "none"
    return tuple(in_table(key, system, f) for system in SYSTEMS for f in ([""] if once else [STUDY, ""]))


def readme_line(title: str, key: tuple[str, str]) -> str:
    "The pattern of a row in the README's table."
    once = key[0].startswith("random") or key[1] == "none"
    return rf"\| {title} " + 3 * (r"\| (\S+) " if once else r"\| (\S+) \((\S+)\) ") + r"\|"


PAIR = r"MAE gains more(?: than JEPA)? in (\d+) of (\d+) comparisons"
# a pattern with a group for each number -> what the numbers are
README: dict[str, Callable[[], tuple]] = {
    readme_line(title, key): (lambda key=key: readme_row(key)) for title, key in ROWS.items()
} | {
    r"MAE has (\S+) of the error of random weights of its network on.*predicts (\S+) of the variance": lambda: (
        over_random("mae"),
        digits(gate("jepa", "shear_flow")),
    ),
    PAIR: lambda: (*verdicts(f"{STUDY}paper_order", "worse"), len(table(f"{STUDY}paper_order"))),
    r"random weights in (\d+) of (\d+) comparisons and raises": lambda: (
        *verdicts("over_random", "better"),
        len(table("over_random")),
    ),
}
PAGE: dict[str, Callable[[], tuple]] = {
    r"JEPA gains more than MAE in (\d+) of (\d+) comparisons and less in (\d+)": lambda: (
        *verdicts("paper_order", "better"),
        len(table("paper_order")),
        *verdicts("paper_order", "worse"),
    ),
    r"MAE falls to (\S+) on the shear flow, (\S+) in convection and (\S+) in active matter\. JEPA ends at "
    r"(\S+), (\S+) and (\S+)\.": lambda: tuple(
        in_table((objective, "vit"), system, STUDY) for objective in ("mae", "jepa") for system in SYSTEMS
    ),
    r"Invariance ends at (\S+) on the shear flow.* invariance has (\S+) there after 40": lambda: (
        in_table(("invariance", "vit"), "shear_flow", STUDY),
        digits(on_the_way("invariance", "vit", 40, "rayleigh_benard"), 3),
    ),
    r"MAE on it ends at (\S+) on the shear flow": lambda: (
        in_table(("mae.circular", "convnext"), "shear_flow", STUDY),
    ),
    r"forecast ends at (\S+) and (\S+): it has": lambda: tuple(
        digits(errors("kernel", STUDY)[system, "forecast", "vit"]) for system in ("shear_flow", "active_matter")
    ),
    r"JEPA is lower there: (\S+), and MAE (\S+)\. .* first point, (\S+), and ends at (\S+), where .* have (\S+)\. "
    r".* ends at (\S+), and they have (\S+)\. .* ends at (\S+), and they have (\S+)\.\n": lambda: (
        *(digits(on_the_way(*one)) for one in (("jepa.circular", "convnext", 40), ("mae", "vit", 40))),
        digits(on_the_way("jepa.circular", "convnext", 2.5)),
        *(
            in_table((objective, "convnext"), system, STUDY)
            for system in ("shear_flow", "active_matter", "rayleigh_benard")
            for objective in ("jepa.circular", "random.circular")
        ),
    ),
    PAIR: README[PAIR],
    r"JEPA explains (\S+) of its target on the shear flow, (\S+) in convection and (\S+) in active": lambda: tuple(
        digits(gate("jepa", system)) for system in SYSTEMS
    ),
    r"On the ConvNeXt it explains (\S+) in convection": lambda: (
        digits(gate("jepa.circular", "rayleigh_benard", "convnext")),
    ),
    r"The first block of JEPA is read at (\S+) in active matter, its end at (\S+)\.": lambda: tuple(
        digits(block("jepa", at)) for at in (1, 0)
    ),
    r"hold (\d+) % on flows that start in another way and (\d+) % in the longer box, "
    r"and widened ones (\d+) % and (\d+)": lambda: tuple(
        f"{100 * covered(how, flows):.0f}" for how in ("coverage", "widened") for flows in OTHERS
    ),
    r"random weights in (\d+) of (\d+) comparisons and raises it in (\d+)": lambda: (
        *verdicts("over_random", "better"),
        len(table("over_random")),
        *verdicts("over_random", "worse"),
    ),
    r"ConvNeXt explains (\S+) of the variance of its target \(b\), and kernel ridge reads it at (\S+), "
    r"where random weights have (\S+)\.": lambda: (
        candidate("b", "gate_r2"),
        candidate("b", "kernel"),
        candidate("random", "kernel"),
    ),
    r"the error is (\S+) \(e\)\. .*, it is (\S+) \(em\)\. .* read at (\S+) \(c\)": lambda: (
        candidate("e", "kernel"),
        candidate("em", "kernel"),
        candidate("c", "kernel"),
    ),
    r"beats copying, and its error is (\S+)\.\n": lambda: (candidate("em", "kernel", lengths=(16,)),),
    r"explains (\S+) of the variance of those 4 frames later, and (\S+) of those 8"
    r".* explains (\S+) of its target": lambda: (
        ahead(4),
        ahead(8),
        candidate("e_w", "gate_r2", "active_matter"),
    ),
    r"reads MAE at (\S+), where random weights have (\S+)\. .*, and its error is (\S+)\.\n": lambda: tuple(
        candidate(name, "kernel", row="mae-vit") for name in ("hand", "random", "third")
    ),
    r"In active matter kernel ridge reads MAE at (\S+), invariance at (\S+) and the forecast at (\S+), "
    r"where random weights have (\S+)\.": lambda: (
        *(candidate("hand", "kernel", "active_matter", row=f"{m}-vit") for m in ("mae", "invariance", "forecast")),
        candidate("random", "kernel", "active_matter", row="mae-vit"),
    ),
    r"ConvNeXt explains (\S+) at 160 TFLOP \(i4\)\. Its error is (\S+), where random weights have (\S+),": lambda: (
        candidate("i4", "gate_r2", "active_matter", (16,)),
        candidate("i4", "kernel", "active_matter", (16,)),
        candidate("random", "kernel", "active_matter"),
    ),
    r"without labels is (\S+) on the shear flow, (\S+) in convection and (\S+) in active matter": lambda: (
        digits(best_without_labels("shear_flow")),
        digits(best_without_labels("rayleigh_benard"), 3),
        digits(best_without_labels("active_matter")),
    ),
    r"Forecasts gain in (\d+) of 12 comparisons, masked JEPA loses in (\d+)": lambda: (
        *gains("forecast"),
        *gains("masked_jepa", verdict="worse"),
    ),
    r"by kernel ridge, have (\S+) on the shear flow": lambda: (
        digits(errors("kernel")["shear_flow", "spectra", "none"], 3),
    ),
    r"(\d+) of (\d+) learning curves still fall": falling,
    r"invariance has an error of (\S+), and statistics with spectra have (\S+)\.\n": lambda: (
        digits(few("rayleigh_benard", "invariance", 16)),
        digits(few("rayleigh_benard", "spectra", 16, "none")),
    ),
    r"update of a ViT is (\S+) times": lambda: (
        digits(measured("update").query("encoder == 'vit'").times_plain.median()),
    ),
    r"points, is (\S+) times as fast as": lambda: (digits(measured("paper's step").times_plain.item()),),
    r"solver needs (\S+) core-seconds, and Dedalus, at the same error, (\S+)\.\n": lambda: (
        digits(measured("solver").set_index("solver").seconds["physrep"].iloc[0]),
        digits(measured("solver").query("solver == 'Dedalus RK222' and error < 1.5e-5").seconds.iloc[0], 1),
    ),
    r"probes of one encoder take (\S+) core-seconds": lambda: (digits(measured("probing").seconds.item(), 0),),
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
            new += found.string[end : found.start(i)] + number
            end = found.end(i)
        text = text.replace(found[0], new + found.string[end : found.end()])
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

"""Tables of the guides that are made from code and from committed figures, so that they are true after the next run."""

import csv
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
FIGURES = ROOT / "figures"
NO_PRETRAINING = ("supervised", "random", "constant", "statistics", "spectra", "equations")
FLOPS = 4e14  # operations a second that an H100 does in bfloat16 at about 40 % of its peak of 1e15
PROBE_COLUMNS = ("linear", "knn", "kernel", "attentive")

# The published sets: frames of a trajectory, trajectories of train, valid and test. Grids and channels are in SYSTEMS.
# Sources: README and yaml files of github.com/PolymathicAI/the_well at 215f55d.
PUBLISHED = {
    "active_matter": (81, (175, 24, 26)),
    "shear_flow": (200, (896, 112, 112)),
    "rayleigh_benard": (200, (1400, 175, 175)),
}


def markdown(head: Iterable[str], rows: Iterable[Iterable]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def read_csv(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def titles() -> dict[str, str]:
    from physrep.physics.systems import SYSTEMS

    return {name: system.title for name, system in SYSTEMS.items()}


def kind(row: dict) -> str:
    "The objective of a row without its variant: `random` of `random.circular`."
    return row["objective"].partition(".")[0]


def scores(figures: Path = FIGURES) -> list[dict]:
    "Mean errors on `test` in the numbers of Table 1."
    rows = read_csv(figures / "table1.csv")
    return [r for r in rows if (r["split"], r["label"], r["metric"]) == ("test", "mean", "mse")]


def best_encoders(figures: Path = FIGURES) -> str:
    "For each system and probe: the row without labels that has the lowest error, and what it has to beat."
    rows, names = scores(figures), titles()

    def text(found: list[dict]) -> str:
        best = min(found, key=lambda r: float(r["value"]), default=None)
        if best is None:
            return ""
        value, low, high = (float(best[k]) for k in ("value", "low", "high"))
        return f"{best['objective']} on {best['encoder']}: {value:.3f} [{low:.3f}, {high:.3f}]"

    lines = []
    for system in dict.fromkeys(r["system"] for r in rows):
        for probe in PROBE_COLUMNS:
            here = [r for r in rows if (r["system"], r["probe"]) == (system, probe) and r["encoder"] != "none"]
            groups = {
                "trained": [r for r in here if kind(r) not in NO_PRETRAINING],
                "random": [r for r in here if kind(r) == "random"],
                "supervised": [r for r in here if kind(r) == "supervised"],
            }
            if groups["trained"]:
                lines.append([names.get(system, system), probe, *map(text, groups.values())])
    return markdown(["system", "probe", "trained without labels", "random weights", "trained on the labels"], lines)


def controls(figures: Path = FIGURES) -> str:
    "What can be read without any encoder: one line for each system."
    rows, names = scores(figures), titles()
    kinds = [k for k in ("statistics", "spectra", "equations") if any(r["objective"] == k for r in rows)]
    lines = []
    for system in dict.fromkeys(r["system"] for r in rows):
        here = [r for r in rows if r["system"] == system]
        found = {k: min((float(r["value"]) for r in here if r["objective"] == k), default=None) for k in kinds}
        lines.append([names.get(system, system), *("" if v is None else f"{v:.3f}" for v in found.values())])
    return markdown(["system", *kinds], lines)


def verdict(row: dict[str, str]) -> str:
    "`better`, `worse` or `undecided`: on which side of 0 the interval of a difference and every seed are."
    seeds = [float(value) for value in row["by_seed"].split()]
    if float(row["high"]) < 0 > max(seeds):
        return "better"
    return "worse" if float(row["low"]) > 0 < min(seeds) else "undecided"


def counts(figures: Path = FIGURES) -> str:
    "How often each row without labels is better or worse than random weights of its backbone, with the same probe."
    rows = [
        r
        for r in read_csv(figures / "table1_differences.csv")
        if (r["split"], r["label"], r["metric"], r["reference"]) == ("test", "mean", "mse", "random")
        and kind(r) not in NO_PRETRAINING
    ]
    lines = []
    for row in dict.fromkeys((r["objective"], r["encoder"]) for r in rows):
        here = [r for r in rows if (r["objective"], r["encoder"]) == row]
        better, worse = (sum(verdict(r) == side for r in here) for side in ("better", "worse"))
        lines.append([*row, better, worse, len(here) - better - worse])
    lines.sort(key=lambda line: line[3] - line[2])
    return markdown(["objective", "encoder", "better", "worse", "undecided"], lines)


def shipped() -> str:
    "The encoders that come with the package: what they take."
    from physrep.models.pretrained import SHIPPED, read_encoder

    lines = []
    for folder in sorted(p for p in SHIPPED.iterdir() if p.is_dir()):
        info = read_encoder(folder)[1]
        frames, *grid = info["shape"]
        dt = "any" if info["dt"] is None else f"{info['dt']:g}"
        lines.append([f"`{folder.name}`", ", ".join(info["channels"]), frames, f"{grid[0]}x{grid[1]}", dt])
    return markdown(["encoder", "channels, in this order", "frames", "grid", "time between frames"], lines)


def disk() -> str:
    "The size of the published sets, from their shapes."
    from physrep.physics.systems import SYSTEMS

    lines, everything = [], 0
    for name, (frames, trajectories) in PUBLISHED.items():
        system = SYSTEMS[name]
        h, w = system.native
        one = h * w * frames * system.n_channels * 4
        everything += one * sum(trajectories)
        arithmetic = f"{h} x {w} x {frames} x {system.n_channels} x 4 B = {one / 1e6:.1f} MB"
        lines.append([f"`{name}`", arithmetic, sum(trajectories), f"{one * sum(trajectories) / 1e9:.0f} GB"])
    lines.append(["all three", "", sum(sum(t) for _, t in PUBLISHED.values()), f"{everything / 1e9:.0f} GB"])
    return markdown(["set", "one trajectory", "trajectories", "in all"], lines)


def windows_of(system, frames: int, split: int, stride: int) -> int:
    "Windows of so many frames in a published split."
    length, trajectories = PUBLISHED[system.name]
    return trajectories[split] * ((length - frames) // stride + 1)


def features_disk() -> str:
    "What the tokens of all windows take on disk, for the ViT of preset `paper`: those that are kept, and all."
    from physrep.physics.systems import SYSTEMS
    from physrep.probing.features import coarser_grid
    from physrep.training.presets import get_preset
    from physrep.training.run import stride_of

    preset = get_preset("paper")
    vit = preset.encoder_config("vit")
    t, h, w = vit["tubelet"]
    grid = (preset.frames // t, preset.size // h, preset.size // w)
    tokens, kept = math.prod(grid), math.prod(coarser_grid(grid, preset.probe_tokens))
    lines = []
    for name in PUBLISHED:
        system = SYSTEMS[name]
        n = sum(windows_of(system, preset.frames, k, stride_of(system, preset.probe_stride)) for k in range(3))
        one = f"{kept} x {vit['dim']} x 2 B"
        sizes = [f"{n * count * vit['dim'] * 2 / 1e9:.0f} GB" for count in (kept, tokens)]
        lines.append([f"`{name}`", f"{n:,}", one, *sizes])
    return markdown(
        ["set", "windows of the three splits", "tokens of a window (float16)", "on disk", f"all {tokens}"], lines
    )


def gpu_hours() -> str:
    "Counted operations of a training at preset `paper`, and the hours that they take at an assumed speed."
    from physrep.experiments.table1 import table_rows
    from physrep.training.presets import get_preset

    preset = get_preset("paper")
    counted = {(row["objective"], row["encoder"]): float(row["train"]) for row in read_csv(HERE / "costs.csv")}
    lines, whole = [], 0.0
    for row in (row for row in table_rows(preset, "shear_flow") if row.kind == "trained"):
        train = counted[row.objective, row.encoder]
        recipes = {system: preset.recipe(row.objective, row.encoder, system) for system in preset.systems}
        recipe = recipes["shear_flow"]
        total = train * recipe.batch_size * recipe.steps
        whole += sum(train * one.batch_size * one.steps for one in recipes.values())
        lines.append(
            [
                row.title,
                f"{train / 1e12:.2f} TFLOP",
                f"{recipe.steps} x {recipe.batch_size}",
                f"{total / 1e15:.0f} PFLOP",
                f"{total / FLOPS / 3600:.2f} h",
            ]
        )
    systems = len(preset.systems)
    lines.append(
        [
            f"all of them, {systems} systems, one seed",
            "",
            "",
            f"{whole / 1e15:.0f} PFLOP",
            f"{whole / FLOPS / 3600:.1f} h",
        ]
    )
    return markdown(["row", "a window, there and back", "updates x windows", "in all", "at 400 TFLOP/s"], lines)


def frozen_clips() -> str:
    "What was measured of clips that an encoder was not trained on, and with which weights."
    from physrep.models.pretrained import SHIPPED, load_encoder
    from physrep.probing.features import encoder_digest

    found = json.loads((HERE / "frozen_clips.json").read_text(encoding="utf-8"))
    name = found["encoder"]
    same = (SHIPPED / name).is_dir() and encoder_digest(load_encoder(name)) == found["digest"]
    lines = [
        [row["clip"], *(f"{row[probe][label]:.2f}" for probe in found["probes"] for label in found["labels"])]
        for row in found["rows"]
    ]
    head = ["clip", *(f"{probe}, {label}" for probe in found["probes"] for label in found["labels"])]
    which = "the one that comes with the package" if same else "an earlier one than comes with the package today"
    return (
        f"{markdown(head, lines)}\n\nErrors on {found['flows']} new flows, encoder `{name}` ({which}), squared and "
        "relative to the variance of the logarithm: always answering the mean has 1."
    )


TABLES: dict[str, Callable[[], str]] = {
    "best-encoders": best_encoders,
    "controls": controls,
    "counts": counts,
    "shipped": shipped,
    "disk": disk,
    "features-disk": features_disk,
    "gpu-hours": gpu_hours,
    "frozen-clips": frozen_clips,
}

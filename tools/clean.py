"""Deletes what `make` made, after showing what and how much. `CONFIRM=yes` in the environment answers the question.

What was put into `data/` in another way, such as a download of hundreds of gigabytes, is kept, and said."""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("runs", "_docs", "figures/smoke", ".venv", ".snakemake", "build", "dist", "physrep.egg-info")
CACHES = (".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis")


def size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


def described(path: Path) -> str:
    link = f" -> {path.readlink()} (only the link is deleted)" if path.is_symlink() else ""
    return f"{size(path) / 1e6:10.1f} MB  {path.relative_to(ROOT)}{link}"


def is_simulated(system: Path) -> bool:
    "Whether a simulation has made all that is in the folder of a system: it has a plan, and each HDF5 file a recipe."

    def is_ours(file: Path) -> bool:
        with file.open("rb") as opened:  # the attribute stands at the beginning; h5py may not be here
            recipe = file.suffix == ".hdf5" and b"physrep_recipe" in opened.read(2**16)
        return recipe or file.name in ("plan.json", "stats.yaml", ".lock") or file.suffix == ".tmp"

    return (system / "plan.json").is_file() and all(is_ours(file) for file in system.rglob("*") if file.is_file())


def made_and_kept(root: Path) -> tuple[list[Path], list[Path]]:
    """What was made below a folder, and what is in its `data/` that no simulation has made, such as downloads of other
    systems, or sets with files of others in them."""
    made, kept = [root / name for name in (*FOLDERS, *CACHES)], []
    for p in sorted(p for p in (root / "data").iterdir() if p.name != "README.md"):
        inside = sorted(p.iterdir()) if p.is_dir() and not p.is_symlink() else []
        simulated = [system for system in inside if is_simulated(system)]
        others = [other for other in inside if other not in simulated and not other.name.startswith(".")]
        whole = p.is_symlink() or bool(simulated and not others)
        made += [p] if whole else simulated
        kept += [] if whole else others if simulated else [p]
    return [p for p in made if p.exists() or p.is_symlink()], kept


if __name__ == "__main__":
    made, kept = made_and_kept(ROOT)
    if kept:
        print(f"kept, as no simulation made it all: {', '.join(str(p.relative_to(ROOT)) for p in kept)}")
    if not made:
        print("nothing to delete")
        sys.exit()
    print(*map(described, made), f"{sum(map(size, made)) / 1e6:10.1f} MB  in all", sep="\n")
    answer = os.environ.get("CONFIRM") or (input("delete these? [yes/no] ") if sys.stdin.isatty() else "")
    if answer != "yes":
        print("nothing deleted (answer yes, or CONFIRM=yes make clean)")
        sys.exit()
    for p in made:
        shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()
    print("deleted")

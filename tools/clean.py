"""Deletes what `make` made, after showing what and how much. `CONFIRM=yes` in the environment answers the question."""

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and not p.is_symlink())


if __name__ == "__main__":
    made = [ROOT / n for n in ("runs", "figures/smoke", ".venv", ".snakemake", ".pytest_cache", ".ruff_cache", "build", "dist", "physrep.egg-info")]
    made += [p for p in (ROOT / "data").iterdir() if p.name != "README.md"]
    made = [p for p in made if p.exists()]
    if not made:
        print("nothing to delete")
        sys.exit()
    for p in made:
        print(f"{size(p) / 1e6:10.1f} MB  {p.relative_to(ROOT)}{' -> ' + str(p.readlink()) + ' (only the link is deleted)' if p.is_symlink() else ''}")
    print(f"{sum(map(size, made)) / 1e6:10.1f} MB  in all")
    answer = os.environ.get("CONFIRM") or (input("delete these? [yes/no] ") if sys.stdin.isatty() else "")
    if answer != "yes":
        print("nothing deleted (answer yes, or CONFIRM=yes make clean)")
        sys.exit()
    for p in made:
        shutil.rmtree(p) if p.is_dir() and not p.is_symlink() else p.unlink()
    print("deleted")

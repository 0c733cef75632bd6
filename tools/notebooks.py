"""Brings notebooks and what is made of them up to date.

    python tools/notebooks.py [--preset laptop] [names]    execute, clean, export
    python tools/notebooks.py --readme                     README.md from nbs/index.ipynb, and the lines *Next*

Notebooks of the library are executed in place; stages and experiments get their outputs from the runs of a preset. With
names (core/files, 03_pretrain) only those.
"""

import argparse
import base64
import io
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
BIN = Path(sys.executable).parent
# which executed notebook of a preset's runs shows a stage; that of an experiment has its own name
SHOWN = {
    "00_simulate": "shear_flow-simulate",
    "03_pretrain": "shear_flow-mae-vit-pretrain",
    "04_probe": "shear_flow-mae-vit-probe",
}
SIDE_BY_SIDE = 2  # notebooks that run at a time, one thread each


def name_of(path: Path) -> str:
    "A notebook's name below nbs/, without its ending: `core/files`, `03_pretrain`."
    return path.relative_to(NBS).with_suffix("").as_posix()


def chosen(names: list[str]) -> list[Path]:
    "All notebooks, or those of these names: `core/files`, `nbs/core/files.ipynb`, or `paths` if only one has it."
    notebooks = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    found = []
    for name in names:
        short = name.removeprefix("./").removeprefix("nbs/").removesuffix(".ipynb")
        fits = [p for p in notebooks if name_of(p) == short] or [p for p in notebooks if p.stem == short]
        if len(fits) != 1:
            known = ", ".join(map(name_of, fits or notebooks))
            raise SystemExit(f"{'several notebooks are' if fits else 'no notebook is'} called {name}: {known}")
        found += fits
    return found if names else notebooks


def is_stage(path: Path) -> bool:
    "Stages and experiments say `skip_exec` in their front matter."
    return any(c.cell_type == "raw" and "skip_exec: true" in c.source for c in nbformat.read(path, 4).cells)


def execute(path: Path) -> str:
    "Runs a notebook in place, in its own folder; returns what went wrong."
    print(name_of(path), flush=True)
    command = [BIN / "jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", "--log-level", "ERROR", path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    quiet = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(command, cwd=path.parent, env=environment, **quiet)
    if done.returncode:
        return f"{name_of(path)} failed:\n{done.stdout[-3000:]}"
    notebook = nbformat.read(path, 4)
    tidy([c for c in notebook.cells if c.cell_type == "code"])
    nbformat.write(notebook, path)
    return ""


def smaller(image: str) -> str:
    "A PNG, base64, with 256 colours, which a plot does not miss; as it is if that would be no smaller."
    from PIL import Image

    made = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB").quantize(256).save(made, "PNG", optimize=True)
    return min(base64.b64encode(made.getvalue()).decode(), image.strip(), key=len)


def tidy(cells: list) -> None:
    "Outputs without warnings, progress bars and paths of this machine, and with smaller pictures."
    for cell in cells:
        cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        for o in cell.outputs:
            if o.output_type == "stream":
                o.text = o.text.replace(f"{ROOT}/", "")
            elif "image/png" in o.get("data", {}):
                o.data["image/png"] = smaller(o.data["image/png"])


def take_outputs(path: Path, executed: Path) -> None:
    "Gives a stage the outputs of an executed copy with the same code, without the injected cell and progress bars."
    notebook, done = nbformat.read(path, 4), nbformat.read(executed, 4)
    mine = [c for c in notebook.cells if c.cell_type == "code"]
    theirs = [
        c for c in done.cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])
    ]
    if [c.source for c in theirs] != [c.source for c in mine]:
        raise ValueError(f"{executed} was made from another version of {path.name}; draw its figures with make again")
    for cell, other in zip(mine, theirs):
        cell.outputs, cell.execution_count = other.outputs, None
    tidy(mine)
    nbformat.write(notebook, path)


def show(path: Path, preset: str) -> str:
    "Takes the outputs of a stage from the runs of a preset, if they are there; returns what went wrong."
    name = SHOWN.get(path.stem, path.stem)
    executed = ROOT / "runs" / preset / "notebooks" / f"{name}.ipynb"
    if not executed.is_file():
        print(f"{name_of(path)}: outputs left as they are, there is no {executed.relative_to(ROOT)}")
        return ""
    print(f"{name_of(path)} <- {executed.relative_to(ROOT)}", flush=True)
    try:
        take_outputs(path, executed)
    except ValueError as error:
        return str(error)
    return ""


def from_root(text: str) -> str:
    "Links of nbs/index.ipynb as links of README.md: `core/x.ipynb` -> `nbs/core/x.ipynb`, `../LICENSE` -> `LICENSE`."
    text = re.sub(r"\]\((?![a-z]+:|[#/]|\.\./)([^()\s]+\.(?:ipynb|png))", r"](nbs/\1", text)
    return text.replace("](../", "](")


def write_next() -> None:
    "The line *Next* at the end of every notebook, which leads along the page of contents."
    text = (ROOT / "tools/docs/pages/contents.md").read_text(encoding="utf-8")
    road = [NBS / f"{name}.ipynb" for name in re.findall(r"/nbs/([\w/]+)\.ipynb", text)]
    for path, following in zip(road, [*road[1:], None]):
        line = "**Next:** this is the end of the road."
        if following:
            told = nbformat.read(following, 4)
            told = "\n".join(c.source for c in told.cells if c.cell_type == "markdown")
            title, about = (re.search(rf"^{mark} (.+)", told, re.M)[1].strip() for mark in "#>")
            line = f"**Next:** [{title}]({os.path.relpath(following, path.parent)}): {about}"
        notebook = nbformat.read(path, 4)
        texts = [c for c in notebook.cells if c.cell_type == "markdown"]
        last = next((c for c in texts if "**Next:**" in c.source), None)
        if last is None:
            notebook.cells.append(last := nbformat.v4.new_markdown_cell(id=f"next-{path.stem}"[:64]))
        rest = re.sub(r"\n*^\*\*Next:\*\*.*(?:\n(?!\n).*)*", "", last.source, flags=re.M).rstrip()
        wanted = f"{rest}\n\n{line}".lstrip()
        if last.source != wanted:
            last.source = wanted
            nbformat.write(notebook, path)


def write_readme() -> None:
    "README.md: the text of nbs/index.ipynb."
    cells = [c.source for c in nbformat.read(NBS / "index.ipynb", 4).cells if c.cell_type == "markdown"]
    text = re.sub(r"\n{3,}", "\n\n", from_root("\n\n".join(cells)))
    (ROOT / "README.md").write_text(text.strip() + "\n", encoding="utf-8")


def drop_widget_states(path: Path) -> None:
    "The states of widgets change at every run and are some 100 kB; without a kernel they show nothing that moves."
    notebook = nbformat.read(path, 4)
    if notebook.metadata.pop("widgets", None):
        nbformat.write(notebook, path)


def update(notebooks: list[Path], preset: str) -> None:
    "Exports, as notebooks import the package; executes the library, takes the outputs of stages, cleans and exports."
    subprocess.run([BIN / "nbdev_export"], check=True, cwd=ROOT)
    stages = {path for path in notebooks if is_stage(path)}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        errors = list(pool.map(execute, (path for path in notebooks if path not in stages)))
    errors += [show(path, preset) for path in sorted(stages)]
    for path in notebooks:
        drop_widget_states(path)
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([BIN / command], check=True, cwd=ROOT)
    if any(errors):
        raise SystemExit("\n\n".join(filter(None, errors)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, e.g. core/files or 03_pretrain; default: all")
    parser.add_argument("--preset", default="laptop", help="whose runs the outputs of stages come from")
    parser.add_argument("--readme", action="store_true", help="only write README.md")
    asked = parser.parse_args()
    if asked.readme:
        write_readme()
        write_next()
    else:
        update(chosen(asked.names), asked.preset)

"""Brings notebooks and what is made of them up to date.

    python tools/notebooks.py [--preset laptop] [names]    execute, clean, export
    python tools/notebooks.py --readme                     README.md from nbs/index.ipynb

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
# which executed notebook of a preset's runs shows a stage
SHOWN = {
    "00_simulate": "shear_flow-simulate",
    "03_pretrain": "shear_flow-mae-vit-pretrain",
    "04_probe": "shear_flow-mae-vit-probe",
    "05_table1": "table1",
    "05a_learning_curves": "learning_curves",
    "05b_resolution": "resolution",
    "05c_machines": "machines",
    "05d_leakage": "leakage",
    "05e_fine_tuned": "fine_tuned",
    "06_data_efficiency": "data_efficiency",
    "07_rollout": "rollout",
    "08_what_matters": "matters",
    "08a_tuning": "tuning",
    "08b_ablations": "ablations",
    "08c_across_systems": "across",
    "08d_regimes": "regimes",
    "08e_grid": "grid",
    "08f_box": "box",
    "08g_own_question": "question",
    "08h_learning_rates": "rates",
    "08i_longer_training": "longer-shear_flow",
    "08j_chosen_recipes": "tuned",
    "08k_probe_length": "probe_length",
    "08l_long_probe": "long_probe",
    "10_benchmarks": "benchmarks",
    "10a_scaling": "scaling",
    "10b_peer_solver": "peer_solver",
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
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=path.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    return f"{name_of(path)} failed:\n{done.stdout[-3000:]}" if done.returncode else ""


def smaller(image: str) -> str:
    "A PNG, base64, with 256 colours, which a plot does not miss; as it is if that would be no smaller."
    from PIL import Image

    made = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB").quantize(256).save(made, "PNG", optimize=True)
    return min(base64.b64encode(made.getvalue()).decode(), image.strip(), key=len)


def take_outputs(path: Path, executed: Path) -> None:
    "Gives a stage the outputs of an executed copy with the same code, without the injected cell and progress bars."
    notebook, done = nbformat.read(path, 4), nbformat.read(executed, 4)
    cells = [c for c in done.cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]
    if [c.source for c in cells] != [c.source for c in notebook.cells if c.cell_type == "code"]:
        raise ValueError(f"{executed} was made from another version of {path.name}; draw its figures with make again")
    for mine, theirs in zip((c for c in notebook.cells if c.cell_type == "code"), cells):
        outputs = [o for o in theirs.outputs if not (o.output_type == "stream" and o.name == "stderr")]
        for o in outputs:
            if o.output_type == "stream":
                o.text = o.text.replace(f"{ROOT}/", "")
            elif "image/png" in o.get("data", {}):
                o.data["image/png"] = smaller(o.data["image/png"])
        mine.outputs, mine.execution_count = outputs, None
    nbformat.write(notebook, path)


def from_root(text: str) -> str:
    "Links of nbs/index.ipynb as links of README.md: `core/x.ipynb` -> `nbs/core/x.ipynb`, `../LICENSE` -> `LICENSE`."
    text = re.sub(r"\]\((?![a-z]+:|[#/]|\.\./)([^()\s]+\.(?:ipynb|png))", r"](nbs/\1", text)
    return text.replace("](../", "](")


def write_readme() -> None:
    "README.md: the cells of nbs/index.ipynb, text outputs as they are, figures by their path in the repository."
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(NBS / "index.ipynb", 4)
    notebook.cells = [
        c for c in notebook.cells if not c.source.startswith(("#| hide", "#|hide")) and c.cell_type != "raw"
    ]
    for c in notebook.cells:
        if c.cell_type == "code" and c.source.startswith("#| echo: false"):  # only what it prints
            c.cell_type, c.source = "markdown", "```text\n" + "".join(o.text for o in c.outputs).rstrip() + "\n```"
            del c["outputs"], c["execution_count"]
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = re.sub(r"<style scoped>.*?</style>\n*", "", from_root(text), flags=re.S)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    (ROOT / "README.md").write_text(text, encoding="utf-8")


def drop_widget_states(path: Path) -> None:
    "The states of widgets change at every run and are some 100 kB; without a kernel they show nothing that moves."
    notebook = nbformat.read(path, 4)
    if notebook.metadata.pop("widgets", None):
        nbformat.write(notebook, path)


def update(notebooks: list[Path], preset: str) -> None:
    "Executes what is of the library, takes the outputs of what is a stage, cleans and exports."
    stages = {path for path in notebooks if is_stage(path)}
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        errors = [e for e in pool.map(execute, (path for path in notebooks if path not in stages)) if e]
    for path in sorted(stages):
        if path.stem not in SHOWN:
            continue
        executed = ROOT / "runs" / preset / "notebooks" / f"{SHOWN[path.stem]}.ipynb"
        if executed.is_file():
            print(f"{name_of(path)} <- {executed.relative_to(ROOT)}", flush=True)
            try:
                take_outputs(path, executed)
            except ValueError as error:
                errors.append(str(error))
        else:
            print(f"{name_of(path)}: outputs left as they are, there is no {executed.relative_to(ROOT)}")
    for path in notebooks:
        drop_widget_states(path)
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([BIN / command], check=True, cwd=ROOT)
    if errors:
        raise SystemExit("\n\n".join(errors))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks, e.g. core/files or 03_pretrain; default: all")
    parser.add_argument("--preset", default="laptop", help="whose runs the outputs of stages come from")
    parser.add_argument("--readme", action="store_true", help="only write README.md")
    asked = parser.parse_args()
    if asked.readme:
        write_readme()
    else:
        update(chosen(asked.names), asked.preset)

"""Brings notebooks and what is made of them up to date.

    python tests/notebooks.py [preset]    execute the library's notebooks in place, take the outputs of stages and experiments from
                                          the runs of that preset, clean, export
    python tests/notebooks.py --readme    README.md from nbs/index.ipynb
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
BIN = Path(sys.executable).parent
# which executed notebook of a preset's runs shows a stage
SHOWN = {
    "00g_simulate": "shear_flow-simulate", "03_pretrain": "shear_flow-mae-vit-pretrain", "04_probe": "shear_flow-mae-vit-probe",
    "05_table1": "table1", "05b_resolution": "resolution", "05c_machines": "machines", "08a_tuning": "tuning", "08b_ablations": "ablations",
    "08c_across_systems": "across", "08d_regimes": "regimes",
}


def is_stage(path: Path) -> bool:
    "Stages and experiments say `skip_exec` in their front matter."
    return any(c.cell_type == "raw" and "skip_exec: true" in c.source for c in nbformat.read(path, 4).cells)


def execute(path: Path) -> None:
    command = [BIN / "jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace", "--log-level", "ERROR", path]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, cwd=NBS)


def take_outputs(path: Path, executed: Path) -> None:
    "Gives a stage the outputs of an executed copy: cell by cell, without the injected cell, progress bars and clock readings."
    notebook, done = nbformat.read(path, 4), nbformat.read(executed, 4)
    cells = [c for c in done.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    if [c.source for c in cells] != [c.source for c in notebook.cells]:
        raise SystemExit(f"{executed} was made from another version of {path.name}; run `make reproduce` first")
    for mine, theirs in zip(notebook.cells, cells):
        if mine.cell_type == "code":
            outputs = [o for o in theirs.outputs if not (o.output_type == "stream" and o.name == "stderr")]
            for o in outputs:
                if o.output_type == "stream":
                    o.text = o.text.replace(f"{ROOT}/", "")
            mine.outputs, mine.execution_count = outputs, None
    nbformat.write(notebook, path)


def write_readme() -> None:
    "README.md: the cells of nbs/index.ipynb, text outputs as they are, figures by their path in the repository."
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(NBS / "index.ipynb", 4)
    notebook.cells = [c for c in notebook.cells if not c.source.startswith(("#| hide", "#|hide")) and c.cell_type != "raw"]
    for c in notebook.cells:
        if c.cell_type == "code" and c.source.startswith("#| echo: false"):  # only what it prints
            c.cell_type, c.source = "markdown", "```text\n" + "".join(o.text for o in c.outputs).rstrip() + "\n```"
            del c["outputs"], c["execution_count"]
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    text = text.replace("](../", "](")  # paths are relative to nbs/ in the notebook, to the root in README.md
    text = re.sub(r"<style scoped>.*?</style>\n*", "", text, flags=re.S)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    (ROOT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if "--readme" in sys.argv:
        write_readme()
        raise SystemExit
    preset = sys.argv[1] if len(sys.argv) > 1 else "laptop"
    for path in sorted(NBS.glob("*.ipynb")):
        if not is_stage(path):
            print(path.name, flush=True)
            execute(path)
        elif path.stem in SHOWN:
            executed = ROOT / "runs" / preset / "notebooks" / f"{SHOWN[path.stem]}.ipynb"
            if executed.is_file():
                print(f"{path.name} <- {executed.relative_to(ROOT)}", flush=True)
                take_outputs(path, executed)
            else:
                print(f"{path.name}: no {executed.relative_to(ROOT)}, outputs left as they are (make reproduce PRESET={preset} makes it)")
    subprocess.run([BIN / "nbdev_clean"], check=True, cwd=ROOT)
    subprocess.run([BIN / "nbdev_export"], check=True, cwd=ROOT)

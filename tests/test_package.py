"""The package as others get it: imports and floors, wheel and sdist, and what `make clean` keeps."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import readme_lines

from physrep.data.generate import make_dataset
from physrep.objectives.methods import objective_class
from physrep.results.rows import chosen_rows
from physrep.training.presets import get_preset

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "physrep"
# from the bottom: a package imports only from itself and from those before it
FLOORS = ["core", "physics", "data", "models", "objectives", "training", "probing", "results", "experiments", "explore"]
# asked for when needed
OPTIONAL = {
    "experiments": {"papermill", "the_well", "dedalus"},
    "data": {"upath", "fsspec", "xarray"},
    "explore": {"ipywidgets", "IPython"},
}


def settings() -> dict:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return dict(parser["DEFAULT"])


def imports_of(path: Path) -> list[ast.stmt]:
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_only_what_it_may(path):
    "Packages below it, public names, and what is declared."
    requirements = settings()["requirements"] + " " + settings()["download_requirements"]
    declared = {re.split("[<>=]", r)[0] for r in requirements.split()}
    declared |= OPTIONAL.get(path.parent.name, set()) | sys.stdlib_module_names | {"sklearn", "yaml"}
    module = path.relative_to(PACKAGE).with_suffix("").parts
    for node in imports_of(path):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("physrep.")):
            words = (node.module or node.names[0].name).removeprefix("physrep.").split(".")
            target = [*module[: len(module) - node.level if node.level else 0], *words][0]
            assert FLOORS.index(target) <= FLOORS.index(module[0]), f"imports {target}, which stands above it"
            assert not [a.name for a in node.names if a.name.startswith("_") or a.name == "*"]
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not {n.split(".")[0] for n in names} - declared, "no runtime dependency"


def test_every_module_is_a_notebook_of_the_same_name():
    modules = {p.relative_to(PACKAGE).with_suffix("") for p in PACKAGE.glob("*/*.py") if p.name != "__init__.py"}
    assert modules == {p.relative_to(ROOT / "nbs").with_suffix("") for p in (ROOT / "nbs").glob("*/*.ipynb")}


def build_dist(folder: Path) -> tuple[Path, Path]:
    "Wheel and sdist of the last commit, in <folder>/dist."
    copy = folder / "source"
    copy.mkdir()
    subprocess.run(["git", "-C", str(ROOT), "archive", "--output", str(folder / "source.tar"), "HEAD"], check=True)
    subprocess.run(["tar", "-xf", str(folder / "source.tar"), "-C", str(copy)], check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next((folder / "dist").glob("*.whl")), next((folder / "dist").glob("*.tar.gz"))


@pytest.mark.long  # installs torch
def test_lines_of_the_readme_run_in_an_environment_that_has_the_wheel_alone(tmp_path):
    wheel, _ = build_dist(tmp_path)
    python, elsewhere = tmp_path / "empty" / "bin" / "python", tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for command in (
        [sys.executable, "-m", "venv", str(tmp_path / "empty")],
        [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(wheel)],
        [str(python), "-c", readme_lines()],
    ):
        options = dict(cwd=elsewhere, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stderr[-2000:]
    assert "random weights of mine" in done.stdout


def test_wheel_and_sdist_work_without_the_repository(tmp_path):
    wheel, sdist = build_dist(tmp_path)
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        z.extractall(tmp_path / "site")
    assert any(n.endswith("LICENSE") for n in names) and not any(n.startswith("tests/") for n in names)
    subprocess.run(["tar", "-xzf", str(sdist), "-C", str(tmp_path)], check=True)
    unpacked = next(p for p in tmp_path.iterdir() if p.name.startswith("physrep-"))
    assert (unpacked / "setup.py").is_file() and (unpacked / "settings.ini").is_file()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import physrep, physrep.probing.evaluate, physrep.core.files as p\n"
        "from physrep.models.pretrained import SHIPPED\n"
        "assert SHIPPED.is_relative_to(sys.argv[1]), SHIPPED\n"
        "names = [folder.name for folder in SHIPPED.iterdir()]\n"
        "assert len(names) == 3 and all(physrep.load_encoder(n) and physrep.load_probe(n, 'linear') for n in names)\n"
        "try: p.project_root()\n"
        "except FileNotFoundError as error: print(error)\n"
    )
    for place in (tmp_path / "site", unpacked):
        command = [sys.executable, "-c", code, str(place)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr[-2000:]
        assert place is unpacked or "PHYSREP_ROOT" in done.stdout


def test_citation_and_changelog_name_the_version():
    version = settings()["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1] == version


def test_names_of_version_02_say_what_they_are_called_now():
    with pytest.raises(ImportError, match="use physrep.training.run.Run"):
        from physrep.training.run import Setup  # noqa: F401
    with pytest.raises(ValueError, match="'jepa_ema-vit': this method is called 'masked_jepa' since version 0.3"):
        chosen_rows("jepa_ema-vit")
    with pytest.raises(ValueError, match="objective 'jepa_ema': this method is called 'masked_jepa'"):
        objective_class("jepa_ema")


def test_tags_survive_nbdev_clean():
    assert settings()["allowed_cell_metadata_keys"] == "tags", "papermill would not find the parameters cell"


def test_clean_shows_first_and_deletes_nothing_unasked():
    before = sorted(p.name for p in ROOT.iterdir())
    unasked = {name: value for name, value in os.environ.items() if name != "CONFIRM"}  # as in `CONFIRM=yes make test`
    options = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT, env=unasked)
    done = subprocess.run([sys.executable, "tools/clean.py"], **options)
    assert "nothing" in done.stdout and sorted(p.name for p in ROOT.iterdir()) == before


def test_clean_keeps_data_that_were_not_simulated(tmp_path):
    made_and_kept = runpy.run_path(str(ROOT / "tools" / "clean.py"))["made_and_kept"]
    simulated, downloaded = ("laptop/shear_flow", "both/rayleigh_benard"), ("the_well/shear_flow", "both/shear_flow")
    for name in (*simulated, *downloaded):
        (tmp_path / "data" / name).mkdir(parents=True)
    for name in simulated:
        (tmp_path / "data" / name / "plan.json").write_text("{}")
    sim = replace(get_preset("smoke").sim("shear_flow").only(()), draws={"train": (1, 1)}, n_frames=2)
    train = make_dataset("shear_flow", sim, tmp_path / "data" / "simulated", workers=1, progress=False) / "data/train"
    shutil.copytree(train.parents[1], tmp_path / "data" / "mixed" / "shear_flow")
    (tmp_path / "data" / "mixed" / "shear_flow" / "data" / "train" / "mine.hdf5").write_bytes(b"days of work")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "data" / "the_well")
    (tmp_path / "data" / "README.md").touch()
    (tmp_path / "runs").mkdir()
    made, kept = ({str(p.relative_to(tmp_path)) for p in some} for some in made_and_kept(tmp_path))
    ours = {"runs", "data/laptop", "data/simulated", "data/both/rayleigh_benard", "data/linked"}
    assert made == ours, "of a link only the link"
    assert kept == {"data/the_well", "data/both/shear_flow", "data/mixed"}

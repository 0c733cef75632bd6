"""The package as others get it: wheel and sdist, dependencies, floors, the Makefile's promises."""

import ast
import os
import re
import runpy
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from helpers import dry_run

ROOT = Path(__file__).resolve().parent.parent
# from the bottom: a package imports only from itself and from those before it
FLOORS = ["core", "physics", "data", "models", "objectives", "training", "probing", "results", "experiments", "explore"]
# asked for when needed
OPTIONAL = {
    "experiments/command.py": {"papermill"},
    "data/download.py": {"huggingface_hub"},
    "data/remote.py": {"upath", "fsspec"},
    "experiments/scaling.py": {"the_well"},
    "experiments/peer_solver.py": {"dedalus"},
}
WIDGETS = ("parts", "live_tab", "data_tab", "latent_tab", "saw_tab", "yours_tab", "page")  # of explore: the thin layer
OPTIONAL |= {f"explore/{name}.py": {"ipywidgets", "IPython"} for name in WIDGETS}


def settings() -> dict:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return dict(parser["DEFAULT"])


def imports_of(path: Path) -> list[ast.stmt]:
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("path", sorted((ROOT / "physrep").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_module_imports_only_what_it_may(path):
    declared = {
        re.split("[<>=]", r)[0].replace("scikit-learn", "sklearn").replace("pyyaml", "yaml")
        for r in (settings()["requirements"] + " " + settings()["download_requirements"]).split()
    }
    module = path.relative_to(ROOT / "physrep").with_suffix("").parts
    if module[-1] in ("__init__", "_modidx"):
        return
    declared |= OPTIONAL.get("/".join(path.relative_to(ROOT / "physrep").parts), set())
    floor = FLOORS.index(module[0])
    for node in imports_of(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = list(module[: len(module) - node.level])
            target = [*package, *(node.module or node.names[0].name).split(".")][0]
            assert FLOORS.index(target) <= floor, f"imports {target}, which stands above it"
        else:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in (n.split(".")[0] for n in names):
                assert name in declared or name in sys.stdlib_module_names, f"{name} is no runtime dependency"
                assert name not in ("fastcore", "nbdev", "pytest")
        assert not (isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names))


def test_no_private_name_is_imported_from_another_module():
    for path in sorted((ROOT / "physrep").rglob("*.py")):
        for node in imports_of(path):
            if isinstance(node, ast.ImportFrom) and node.level:
                private = [a.name for a in node.names if a.name.startswith("_")]
                assert not private, f"{path.relative_to(ROOT)} imports {', '.join(private)}"


def test_every_module_is_a_notebook_of_the_same_name():
    modules = {p.relative_to(ROOT / "physrep").with_suffix("") for p in (ROOT / "physrep").glob("*/*.py")}
    modules = {m for m in modules if m.name != "__init__"}
    assert modules == {p.relative_to(ROOT / "nbs").with_suffix("") for p in (ROOT / "nbs").glob("*/*.ipynb")}


def test_wheel_and_sdist_import_without_the_repository(tmp_path):
    copy = tmp_path / "source"
    copy.mkdir()
    subprocess.run(["git", "-C", str(ROOT), "archive", "--output", str(tmp_path / "source.tar"), "HEAD"], check=True)
    subprocess.run(["tar", "-xf", str(tmp_path / "source.tar"), "-C", str(copy)], check=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    wheel, sdist = next((tmp_path / "dist").glob("*.whl")), next((tmp_path / "dist").glob("*.tar.gz"))
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        z.extractall(tmp_path / "site")
    assert any(n.endswith("LICENSE") for n in names) and not any(n.startswith("tests/") for n in names)
    subprocess.run(["tar", "-xzf", str(sdist), "-C", str(tmp_path)], check=True)
    unpacked = next(p for p in tmp_path.iterdir() if p.name.startswith("physrep-"))
    assert (unpacked / "setup.py").is_file() and (unpacked / "settings.ini").is_file()
    code = (
        "import physrep, pathlib, physrep.probing.evaluate as e, physrep.core.paths as p\n"
        f"assert pathlib.Path(physrep.__file__).is_relative_to({str(tmp_path)!r}), physrep.__file__\n"
        "from physrep.data.sets import known_flows\n"
        "from physrep.models.pretrained import SHIPPED\n"
        "from physrep.probing.frozen import load_probe\n"
        "names = sorted(p.name for p in SHIPPED.iterdir())\n"
        "assert len(names) == 3 and all(physrep.load_encoder(name).info['name'] == 'vit' for name in names)\n"
        "assert all(load_probe(next((SHIPPED / name).glob('probe-*.safetensors'))) for name in names)\n"
        "assert known_flows() and (pathlib.Path(physrep.__file__).parent / 'core' / 'same_numbers.json').is_file()\n"
        "try: p.project_root()\n"
        "except FileNotFoundError as error: print(error)\n"
    )
    for place in (tmp_path / "site", unpacked):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(place)!r})\n" + code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "PHYSREP_ROOT"
        in subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n" + code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        ).stdout
    )


def test_settings():
    s = settings()
    assert s["allowed_cell_metadata_keys"] == "tags", "nbdev_clean would delete the tag of the parameters cell"
    assert "fastcore" not in s["requirements"]
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in constraints if line.startswith("torch")] == ["torch>=2.9,<2.14"], "torch is a range"


def test_make_help_lists_the_targets():
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    for target in ("setup", "reproduce", "test", "clean", "notebooks", "readme"):
        assert f"make {target} " in text


def test_pythons_of_the_environment_search_less_for_garbage(tmp_path):
    "The line of the Makefile is one that Python runs as it starts, without a word."
    (line,) = re.findall(r"^FEW_SEARCHES := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    (tmp_path / "few.pth").write_text(line + "\n")
    code = f"import gc, site; site.addsitedir({str(tmp_path)!r}); print(gc.get_threshold()[0])"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and int(done.stdout) == 10_000


def ignored_variables() -> list[tuple[str, str]]:
    "Targets of make and a variable that each of them refuses."
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.findall(r"^([a-z-]+): \$\(READY\).*\n\t@\$\(call takes_no,([A-Z ]+)\)", text, re.M)
    fixed = re.findall(r"^([a-z-]+): \$\(READY\).*\n(?:\t.*\n)?\t@\$\(call seeds_of_preset\)", text, re.M)
    return [(target, name) for target, names in found for name in names.split()] + [(name, "SEEDS") for name in fixed]


def test_targets_that_run_fixed_rows_refuse_others():
    found = ignored_variables()
    assert len(found) > 20 and {("tune", "SEEDS"), ("long-probe", "ROWS"), ("study", "CELLS"), ("box", "SEEDS")} <= set(
        found
    )


@pytest.mark.parametrize("target, name", ignored_variables())
def test_make_refuses_what_a_target_would_ignore(target, name):
    given = f"{name}=x"
    # the environment is there: nothing is installed, and nothing but the refusal is run
    words = [
        "make",
        "--no-print-directory",
        "--assume-old",
        f"{sys.prefix}/.ready",
        f"VENV={sys.prefix}",
        "CORES=1",
        target,
        given,
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    why = "its seeds are fixed" if name == "SEEDS" else "it runs all rows"
    assert done.returncode and f"make {target} takes no {given}: {why}" in done.stdout
    assert f"Leave {name} out." in done.stdout and "workflow" not in done.stdout


def test_clean_shows_first_and_deletes_nothing_unasked():
    before = sorted(p.name for p in ROOT.iterdir())
    words, options = [sys.executable, "tools/clean.py"], dict(capture_output=True, text=True, stdin=subprocess.DEVNULL)
    unasked = {name: value for name, value in os.environ.items() if name != "CONFIRM"}  # as in `CONFIRM=yes make test`
    done = subprocess.run(words, cwd=ROOT, env=unasked, **options)
    assert "nothing" in done.stdout and sorted(p.name for p in ROOT.iterdir()) == before


def test_clean_keeps_data_that_were_not_simulated(tmp_path):
    made_and_kept = runpy.run_path(str(ROOT / "tools" / "clean.py"))["made_and_kept"]
    (tmp_path / "data" / "laptop" / "shear_flow").mkdir(parents=True)
    (tmp_path / "data" / "laptop" / "shear_flow" / "plan.json").write_text("{}")
    (tmp_path / "data" / "the_well" / "shear_flow" / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "both" / "shear_flow" / "data" / "train").mkdir(parents=True)  # downloaded
    (tmp_path / "data" / "both" / "rayleigh_benard").mkdir()  # simulated beside it
    (tmp_path / "data" / "both" / "rayleigh_benard" / "plan.json").write_text("{}")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "data" / "the_well")
    (tmp_path / "data" / "README.md").touch()
    (tmp_path / "runs").mkdir()
    made, kept = made_and_kept(tmp_path)
    made, kept = ({str(p.relative_to(tmp_path)) for p in some} for some in (made, kept))
    assert made == {"runs", "data/laptop", "data/both/rayleigh_benard", "data/linked"}, "of a link only the link"
    assert kept == {"data/the_well", "data/both/shear_flow"}


def test_the_graph_of_the_laptop_preset(tmp_path):
    "Snakemake finds every stage of every row: as tuned for the table, by hand for other experiments."
    preset = tmp_path / "no_results_of_this_name.yaml"
    preset.write_text("base: laptop\n")
    targets = ("table1", "tuned", "finetune", "resolution", "across", "regimes")
    done = dry_run("--forceall", *targets, preset=str(preset), data="")
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-3000:]
    for system in ("shear_flow", "rayleigh_benard", "active_matter"):
        for rule in (
            f"simulate_{system}",
            f"refine_{system}",
            f"pretrain_{system}_jepa_convnext",
            f"pretrain_{system}_jepa.tuned_convnext",
            f"probe_{system}_mae_vit",
            f"probe_{system}_mae.tuned_vit",
            f"probe_{system}_random.circular_convnext",
            f"probe_{system}_baselines",
            f"{system}_jepa.circular_convnext_finetune".replace(".", "_"),
        ):
            assert re.search(rf"^{rule}\s+1$", text, re.M), rule
    for rule in targets:
        assert re.search(rf"^{rule}\s+1$", text, re.M), rule


def test_a_workflow_is_planned_without_scikit_learn():
    "Its import takes a second, and the Snakefile is read by every command of make."
    lines = [line for line in (ROOT / "Snakefile").read_text().splitlines() if line.startswith("from physrep")]
    code = "\n".join([*lines, "import sys", "sys.exit('sklearn' in sys.modules)"])
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.DEVNULL).returncode == 0

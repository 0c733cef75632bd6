"""Do the tests notice a fault? Small faults ("mutants") in the code of physics, objectives and probing, one at a time.

    python tools/mutants.py map [tests]     once: which lines each test and each notebook's own cells run, and how long
    python tools/mutants.py run [--count N] the first N mutants of the drawn order that have no verdict yet
    python tools/mutants.py run --again     those that survived before, after a test was added (map it first)
    python tools/mutants.py score           the table of scores

tests/mutants.csv has the verdicts: `killed` by a test, `survived`, or `equivalent` with a reason (written by hand). A
tool of our own, because mutmut and cosmic-ray rewrite modules that are generated here, and do not run notebooks' cells.
"""

import argparse
import ast
import contextlib
import csv
import functools
import gc
import hashlib
import importlib
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES, COUNT, SEED = ("physics", "objectives", "probing"), 400, 1
SCORE, MAP = ROOT / "tests/mutants.csv", ROOT / "runs/mutants/map.json"
COLUMNS = ("mutant", "module", "function", "line", "kind", "before", "after", "verdict", "why")
APART = "workflow command experiments notebooks docs distributed killed app package slurm".split()  # in other processes
NAMES = re.compile(r"physrep\.(physics|objectives|probing)|from physrep import")
OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}
OTHER |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
OTHER |= {ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
_STATISTICS = r"(nan)?(mean|sum|std|var|max|min|median|quantile)|a(max|min)|arg(max|min|sort)|softmax|cumsum|norm|diff"
_LAYOUT = r"(un)?flatten|unbind|(un)?squeeze|cat|stack|concatenate|move(axis|dim)|roll|flip|chunk|split"
AXES = re.compile(f"{_STATISTICS}|{_LAYOUT}")  # methods and functions whose ints are axes
SKIPPED = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)


def text_like(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)


def name_called(parents: list[ast.AST]) -> str:
    "The name of the method or function of a module that an argument (or an item of one) is given to."
    return next((getattr(p.func, "attr", "") for p in parents if isinstance(p, ast.Call)), "")


def number(node: ast.Constant, parents: list[ast.AST]) -> tuple[str, str]:
    "Kind and text of another number, by where it stands."
    near = parents[0]
    if isinstance(node.value, int):
        if (
            AXES.fullmatch(name_called(parents[:2]))
            or isinstance(near, ast.keyword)
            and near.arg in ("dim", "axis", "axes")
        ):
            return "axis", str(node.value + 1)
        if not isinstance(near, ast.BinOp) or isinstance(near.op, (ast.Add, ast.Sub)):
            return "off by one", str(node.value + 1)
    return "factor", str(2 * node.value or 1)


def variants(node: ast.AST, parents: list[ast.AST]):
    "Kinds and texts of what may stand in a node's place."
    match node:
        case ast.BinOp(left, op, right) if not text_like(left) and not text_like(right):
            if type(op) in OTHER:
                kind = "sign" if isinstance(op, (ast.Add, ast.Sub)) else "factor"
                yield kind, ast.unparse(ast.BinOp(left, OTHER[type(op)](), right))
                yield ("term" if kind == "sign" else "factor"), ast.unparse(left)
        case ast.UnaryOp(ast.USub(), ast.Constant(value)) if AXES.fullmatch(name_called(parents[:1])):
            yield "axis", str(-value - 1)
        case ast.UnaryOp(ast.USub() | ast.Not() as op, operand):
            yield ("sign" if isinstance(op, ast.USub) else "comparison"), ast.unparse(operand)
        case ast.Compare(left, [op], [right]):
            yield "comparison", ast.unparse(ast.Compare(left, [OTHER[type(op)]()], [right]))
        case ast.BoolOp(op, values):
            yield "comparison", ast.unparse(ast.BoolOp(OTHER[type(op)](), values))
        case ast.Call(ast.Attribute(value, "detach")):
            yield "detach", ast.unparse(value)
        case ast.Call(ast.Attribute(_, "no_grad")) if isinstance(parents[0], ast.withitem):
            yield "detach", "torch.enable_grad()"
        case ast.AugAssign(target, op, value) if type(op) in OTHER:
            kind = "sign" if isinstance(op, (ast.Add, ast.Sub)) else "factor"
            yield kind, ast.unparse(ast.AugAssign(target, OTHER[type(op)](), value))
        case ast.Expr(ast.Call()):
            yield "term", "pass"
        case ast.Constant(bool() as value):
            yield "comparison", str(not value)
        case ast.Constant(int() | float()) if math.isfinite(node.value):
            yield number(node, parents)


def mutants(path: Path) -> list[dict]:
    "Every mutant of a module, with the whole text that it makes of it; lines stay where they are."
    text, found, seen = path.read_bytes(), [], defaultdict(int)
    starts = [0, *(m.end() for m in re.finditer(rb"\n", text))]

    def visit(node: ast.AST, parents: list[ast.AST], function: str, run_by: range | None) -> None:
        for kind, after in variants(node, parents):
            a = starts[node.lineno - 1] + node.col_offset
            b = starts[node.end_lineno - 1] + node.end_col_offset
            rest = "\n" * (node.end_lineno - node.lineno)
            new = f"{after}{rest}" if isinstance(node, ast.stmt) else f"({after}{rest})"
            row = dict(module=f"{path.parent.name}/{path.stem}", function=function, kind=kind)
            row |= dict(before=ast.unparse(node).replace("\n", " ")[:120], after=after.replace("\n", " ")[:120])
            name = "|".join([str(SEED), *row.values()])
            seen[name] += 1
            digest = hashlib.sha256(f"{name}|{seen[name]}".encode()).hexdigest()[:8]
            lines = run_by or range(node.lineno, node.end_lineno + 1)  # a test that runs one of these may notice
            changed = (text[:a] + new.encode() + text[b:]).decode()
            found.append(row | dict(mutant=digest, line=node.lineno, lines=lines, text=changed, path=path))
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        inside = range(node.lineno, node.end_lineno + 1) if isinstance(node, ast.FunctionDef) else run_by
        run_by = None if isinstance(node, ast.FunctionDef) else run_by
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, SKIPPED):
                    visit(child, [node, *parents], function, inside if field == "args" else run_by)

    visit(ast.parse(text), [], "", range(len(starts)))
    return found


@functools.cache
def drawn() -> list[dict]:
    "The mutants: to each module its share by its length, to each kind in turn, in an order that the seed fixes."
    paths = [p for name in PACKAGES for p in sorted((ROOT / "physrep" / name).glob("*.py")) if p.stem != "__init__"]
    lengths = {p: len(re.findall(r"\n *[^\s#]", p.read_text(encoding="utf-8"))) for p in paths}
    chosen = []
    for path in paths:
        kinds = defaultdict(list)
        for m in sorted(mutants(path), key=lambda m: m["mutant"]):
            kinds[m["kind"]].append(m)
        in_turn = [m | dict(turn=turn) for ms in kinds.values() for turn, m in enumerate(ms)]
        in_turn.sort(key=lambda m: (m["turn"], m["mutant"]))
        chosen += in_turn[: max(1, round(COUNT * lengths[path] / sum(lengths.values())))]
    return sorted(chosen, key=lambda m: m["mutant"])


def transplant(old: ModuleType, text: str) -> None:
    "Gives a module that is imported already, and all that was made of it, the code and the values of another text."
    new = ModuleType(old.__name__)
    new.__dict__.update(__package__=old.__package__, __file__=old.__file__)
    exec(compile(text, old.__file__, "exec"), new.__dict__)
    mine, theirs = defaultdict(list), defaultdict(list)
    for f in [f for f in gc.get_objects() if type(f) is FunctionType and f.__code__.co_filename == old.__file__]:
        key = (f.__qualname__, f.__code__.co_firstlineno)
        (mine if f.__globals__ is old.__dict__ else theirs)[key].append(f)
    for key, functions in mine.items():
        for f in functions if key in theirs else ():
            made = theirs[key][-1]
            f.__code__, f.__defaults__, f.__kwdefaults__ = made.__code__, made.__defaults__, made.__kwdefaults__
    for name, value in vars(new).items():
        before = vars(old).get(name)
        if isinstance(value, type) and value.__module__ == old.__name__:
            for attribute, made in vars(value).items():
                if isinstance(made, FunctionType) and made.__code__.co_filename != old.__file__:
                    getattr(before, attribute).__defaults__ = made.__defaults__  # of a dataclass
                elif isinstance(made, (int, float, str, tuple)) and attribute[:2] != "__":
                    setattr(before, attribute, made)
        elif name[:2] != "__" and repr(value) != repr(before) and not callable(value):
            for module in [m for m in sys.modules.values() if getattr(m, name, None) is before]:
                setattr(module, name, value)


class Loop:
    "A plugin of pytest: in place of its loop over the tests it has already collected, a map of them, or mutants."

    def __init__(self, command: str, count: int, seconds: float, again: bool):
        self.command, self.count, self.seconds, self.again = command, count, seconds, again
        self.lines, self.fixtures, self.said, self.failed = set(), {}, None, False
        self.trusted = set()  # tests that pass without a mutant

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        "Lines that a fixture runs count for every test that asks for it."
        outer, self.lines = self.lines, set()
        try:
            return (yield)
        finally:
            key = (fixturedef.argname, str(fixturedef.baseid))
            self.fixtures[key] = self.fixtures.get(key, set()) | self.lines
            self.lines = outer | self.lines

    def pytest_runtest_logreport(self, report):
        if report.failed and self.said:
            self.said.write_text(report.nodeid)
            os._exit(1)
        self.failed |= report.failed  # without a mutant: this test can kill none

    def pytest_runtestloop(self, session):
        {"map": self.map, "run": self.run}[self.command](session.items)
        return True

    def trace(self, frame, event, argument):
        if not any(f"/physrep/{name}/" in frame.f_code.co_filename for name in PACKAGES):
            return None
        module = "/".join(Path(frame.f_code.co_filename).with_suffix("").parts[-2:])

        def local(frame, event, argument):
            self.lines.add((module, frame.f_lineno))
            return local

        return local(frame, event, argument)

    def map(self, items) -> None:
        known = json.loads(MAP.read_text()) if MAP.is_file() else {}
        MAP.parent.mkdir(parents=True, exist_ok=True)
        items = [item for item in items if item.nodeid not in known]
        for place, item in enumerate(items):
            self.lines, self.failed, begun = set(), False, time.monotonic()
            sys.settrace(self.trace)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=(items + [None])[place + 1])
            sys.settrace(None)
            seconds = round(time.monotonic() - begun, 2)
            for (name, base), lines in self.fixtures.items():
                if name in item.fixturenames and item.nodeid.startswith(base):
                    self.lines |= lines
            lines = defaultdict(list)
            for module, line in sorted(() if self.failed else self.lines):
                lines[module].append(line)
            known[item.nodeid] = dict(seconds=seconds, lines=lines)
            print(f"{seconds:6.1f} s {item.nodeid}{' FAILED' * self.failed}", file=sys.__stderr__, flush=True)
            MAP.write_text(json.dumps(known))

    def run(self, items) -> None:
        known, rows = json.loads(MAP.read_text()), read_score()
        todo = [m for m in drawn()[: self.count] if rows.get(m["mutant"], {}).get("verdict") not in self.done()]
        for m in todo:
            tests = []
            for item in items:
                lines = set(known.get(item.nodeid, {}).get("lines", {}).get(m["module"], ()))
                if lines & set(m["lines"]):
                    tests.append((known[item.nodeid]["seconds"], item))
            tests.sort(key=lambda pair: pair[0])
            while sum(s for s, _ in tests) > self.seconds:
                tests.pop()
            begun = time.monotonic()
            verdict, why = in_child(self, m, tests)
            while verdict == "killed" and why in known and why not in self.trusted:
                place = [item.nodeid for _, item in tests].index(why)
                if in_child(self, None, tests[: place + 1])[0] == "survived":
                    self.trusted.add(why)
                else:  # it fails without a mutant, too
                    print(f"not counted, as it fails in this order without a mutant: {why}", file=sys.__stderr__)
                    del known[why], tests[place]
                    verdict, why = in_child(self, m, tests)
            rows[m["mutant"]] = {c: m.get(c, "") for c in COLUMNS} | dict(verdict=verdict, why=why)
            write_score(rows)
            said = f"{time.monotonic() - begun:6.1f} s {verdict} {m['mutant']} {m['module']}:{m['line']} {m['kind']}"
            print(f"{said} `{m['before']}` -> `{m['after']}` {why}", file=sys.__stderr__, flush=True)

    def done(self) -> tuple[str, ...]:
        return ("killed", "equivalent") if self.again else ("killed", "equivalent", "survived")


def in_child(loop: Loop, mutant: dict | None, tests: list) -> tuple[str, str]:
    "The verdict of these tests, in a process of its own that has the mutant in the place of the module."
    with tempfile.TemporaryDirectory() as folder:
        loop.said = Path(folder) / "said"
        if not (child := os.fork()):
            os.setsid()
            os.environ["TMPDIR"] = tempfile.tempdir = folder
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            try:
                if mutant:
                    transplant(importlib.import_module("physrep." + mutant["module"].replace("/", ".")), mutant["text"])
                for (_, item), following in zip(tests, [*tests[1:], (0, None)]):
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following[1])
            except BaseException as error:
                loop.said.write_text(f"import: {type(error).__name__}")
            os._exit(0)
        end = time.monotonic() + 20 + 3 * sum(s for s, _ in tests)
        while not os.waitpid(child, os.WNOHANG)[0]:
            time.sleep(0.02)
            if time.monotonic() > end:
                loop.said.write_text("time")
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        return ("killed", loop.said.read_text()) if loop.said.is_file() else ("survived", f"{len(tests)} tests")


def read_score() -> dict[str, dict]:
    if not SCORE.is_file():
        return {}
    with SCORE.open(newline="") as file:
        return {row["mutant"]: row for row in csv.DictReader(file)}


def write_score(rows: dict[str, dict]) -> None:
    "Verdicts of the mutants that are still drawn, by module and line."
    now = {m["mutant"]: m for m in drawn()}
    kept = [row | dict(line=now[key]["line"]) for key, row in rows.items() if key in now]
    with SCORE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept, key=lambda r: (r["module"], r["line"], r["mutant"])))


def show_score() -> None:
    counts = defaultdict(lambda: defaultdict(int))
    for row in read_score().values():
        for name in (row["module"], row["module"].partition("/")[0]):
            counts[name][row["verdict"]] += 1
    for name, n in sorted(counts.items()):
        real = n["killed"] + n["survived"]
        share = f"{n['survived']:3d} of {real:3d} survive ({n['survived'] / max(real, 1):.0%})"
        print(f"{name:28s} {share}, {n['equivalent']} equivalent")


def notebooks() -> list[Path]:
    return [p for name in PACKAGES for p in sorted((ROOT / "nbs" / name).glob("*.ipynb"))]


def own_cells(path: Path) -> list[str]:
    "The cells that show and assert, without those that are exported or slow."
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    cells = [c for c in cells if not re.search(r"#\|\s*(export|slow|default_exp)|eval: false", c)]
    return [re.sub(r"^(\s*)[%!](?!=).*", r"\1pass", c, flags=re.M) if c[0] in "%!" or "\n%" in c else c for c in cells]


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_cells(path, monkeypatch):
    "What a notebook shows and asserts, in the names of its module."
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(path.parent)
    names = dict(vars(importlib.import_module(f"physrep.{path.parent.name}.{path.stem}")), display=lambda *a: None)
    for cell in own_cells(path):
        exec(compile(cell, str(path), "exec"), names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("map", "run", "score"))
    parser.add_argument("tests", nargs="*")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seconds", type=float, default=240, help="of tests a mutant, the quickest first")
    parser.add_argument("--again", action="store_true")
    asked = parser.parse_intermixed_args()
    if asked.command == "score":
        show_score()
    else:
        files = [p for p in sorted(ROOT.glob("tests/test_*.py")) if NAMES.search(p.read_text())]
        files = [__file__, *(str(p) for p in files if p.stem.removeprefix("test_") not in APART)]
        options = ["-s", "-p", "no:cacheprovider", "-p", "no:terminal", "-m", "not long", f"--rootdir={ROOT}"]
        pytest.main(
            [*options, *(asked.tests or files)], plugins=[Loop(asked.command, asked.count, asked.seconds, asked.again)]
        )

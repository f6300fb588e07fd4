"""The house rules that a machine can check: floors, sizes, names, docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastalign as fa

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastalign"

# Imports go strictly down; siblings only inside one folder.
FLOORS = {
    "_C": 0, "kernels": 0, "catalogue": 0, "staging": 0,
    "ops": 1, "packing": 1, "rollout": 1,
    "losses": 2, "advantages": 2, "rewards": 2, "data": 2, "models": 2, "environment": 2,
    "algorithms": 3, "generation": 3, "training": 3, "modules": 3,
    "judges": 4, "environments": 4, "search": 4, "evaluation": 4, "serving": 4,
    "recipes": 5, "integrations": 5,
    "cli": 6, "__init__": 7, "__main__": 7,
}  # fmt: skip
SAME_FLOOR = {("rollout", "packing")}  # a rollout is written as token trees
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}


def python_files() -> list[Path]:
    folders = (PACKAGE, ROOT / "kernels", ROOT / "bench", ROOT / "tests")
    return sorted(path for folder in folders for path in folder.rglob("*.py") if (PACKAGE / "kernels") not in path.parents)


def package_files() -> list[Path]:
    return [path for path in python_files() if PACKAGE in path.parents]


def native_files() -> list[Path]:
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".h", ".cu", ".cuh"})


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room_of(module: list[str]) -> str:
    """The room of fastalign.<room>...; names imported from the package itself live in __init__."""
    return module[1] if len(module) > 1 else "__init__"


def imports_of(path: Path) -> list[tuple[int, list[str]]]:
    """(line, dotted parts) of every import from the package, relative ones resolved; type-checking blocks included."""
    package = ["fastalign", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            # `from . import x` and `from fastalign import x` name a room, or a public name of the package
            modules = [[*base, alias.name] for alias in node.names] if len(base) <= 1 else [base]
        else:
            continue
        found += [(node.lineno, module) for module in modules if module[0] == "fastalign"]
    return found


def functions_of(tree: ast.Module) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def code_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the body without the docstring: prose and signatures are free."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_house_every_room_has_a_floor():
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.suffix in {"", ".py"}}
    unknown = sorted(room for room in rooms - FLOORS.keys() if room != "__pycache__")
    assert not unknown, f"rooms without a floor: {unknown}; add them to FLOORS"


def test_house_imports_go_strictly_down():
    wrong = []
    for path in package_files():
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for line, module in imports_of(path):
            there = room_of(module)
            if there not in FLOORS or there == here or (here, there) in SAME_FLOOR:
                continue
            if FLOORS[there] >= FLOORS[here]:
                wrong.append(f"{name_of(path)}:{line}: {here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})")
    assert not wrong, "\n".join(wrong)


def test_house_native_includes_go_strictly_down():
    """math <- cpu | cuda <- bindings. A CUDA twin shares its CPU op's argument structs, which are headers."""
    allowed = {"math": {"math"}, "cpu": {"math", "cpu"}, "cuda": {"math", "cuda", "cpu"}}
    wrong = []
    for path in native_files():
        room = path.parent.name
        for include in re.findall(r'#include "([^"]+)"', path.read_text(encoding="utf-8")):
            there = (path.parent / include).resolve()
            there = there if there.exists() else ROOT / "csrc" / include
            if room in allowed and there.parent.name not in allowed[room] | {"csrc"}:
                wrong.append(f"{name_of(path)} includes {include}")
    assert not wrong, "\n".join(wrong)


def test_house_files_are_short():
    limits = [(path, 300) for path in package_files()] + [(path, 400) for path in native_files()]
    lengths = [(path, limit, len(path.read_text(encoding="utf-8").splitlines())) for path, limit in limits]
    long = [f"{name_of(path)}: {lines} lines, at most {limit}" for path, limit, lines in lengths if lines > limit]
    assert not long, "\n".join(long)


def test_house_functions_are_short():
    long = []
    for path in package_files():
        lengths = [(function, code_length(function)) for function in functions_of(tree_of(path))]
        long += [f"{name_of(path)}:{f.lineno}: {f.name} has {lines} lines, at most 40" for f, lines in lengths if lines > 40]
    assert not long, "\n".join(long)


def test_house_has_no_utils():
    found = [name_of(path) for path in python_files() if path.stem in FORBIDDEN_NAMES or path.parent.name in FORBIDDEN_NAMES]
    assert not found, f"name the file by what it means: {found}"


def test_house_no_algorithm_is_named_in_a_condition():
    """An algorithm is a row of a table, never an `if` in the loop: no comparison with a row's name outside the tables."""
    catalogue = importlib.import_module("fastalign.catalogue")
    rows = {name for table in getattr(catalogue, "ROWS", {}).values() for name in table}
    wrong = []
    for folder in ("training", "generation", "recipes"):
        for path in (PACKAGE / folder).rglob("*.py"):
            for node in ast.walk(tree_of(path)):
                if not isinstance(node, ast.Compare) or not all(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops):
                    continue
                named = {n.value for n in (node.left, *node.comparators) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                attribute = {n.attr for n in (node.left, *node.comparators) if isinstance(n, ast.Attribute)}
                if named & rows and attribute & {"loss", "algorithm", "advantage"}:
                    wrong.append(f"{name_of(path)}:{node.lineno}: compares with {sorted(named & rows)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", [name for name in fa.__all__ if not name.startswith("__")])
def test_house_public_names_have_docstrings(name):
    value = getattr(fa, name)
    assert inspect.getdoc(value), f"fastalign.{name} has no docstring"


def test_house_public_functions_take_few_options():
    wide = []
    for name in fa.__all__:
        value = getattr(fa, name)
        if inspect.isfunction(value):
            required = [p for p in inspect.signature(value).parameters.values() if p.default is p.empty]
            wide += [name] if len(required) > 8 else []
    assert not wide


def test_house_text_names_no_machine():
    """No absolute paths of somebody's machine, and no package index by its host."""
    pattern = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w+|py" + r"pi\.org|files\.pythonhosted")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    wrong = []
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and path.suffix in {".py", ".md", ".toml", ".txt", ".cpp", ".h", ".cu", ""}:
            text = path.read_text(encoding="utf-8", errors="ignore")
            wrong += [f"{name}: {match.group()}" for match in pattern.finditer(text)]
    assert not wrong, "\n".join(wrong)


def test_house_import_is_light():
    """`import fastalign` and its catalogue load neither torch nor transformers: -h answers at once."""
    code = "import sys, fastalign, fastalign.catalogue; print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_house_tests_are_named_after_what_they_test():
    wrong = []
    for path in (ROOT / "tests").glob("test_*.py"):
        wrong += [
            f"{name_of(path)}: class {node.name}"
            for node in tree_of(path).body
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test")
        ]
    assert not wrong, f"tests are plain functions: {wrong}"

"""The house: few rooms without circles, functions of a screen, a name means one thing, nothing lies about unused."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("l3env", "policies", "traces", "experiments", "tests")
ROOMS_COUNT, FUNCTION_LINES, FILE_LINES = 23, 60, 650

TOO_LONG = {  # still to be cut
    "tests/engine/reference_simulator.py:execute",
    "tests/machine/dram_rules.py:broken_rules",
}
FOR_OTHERS = {"MyPolicy"}  # the template of a policy
SAME = {  # what a name in several rooms means in all of them
    "capacity": "the highest load that is served well: the search, its command",
    "commands": "what a room adds to the command line",
    "compare": "policies on the same requests: the run, its command",
    "energy": "joules",
    "fit": "parameters fitted to measurements",
    "grid": "all combinations of systems, models, traces and loads",
    "iteration": "one iteration: its time, the kernel that runs it",
    "memory": "where KV lies",
    "plan": "what a policy wants of the next iteration, and how the engine does it",
    "registry": "things found by name",
    "requests": "the requests of a trace, and the environment that shows them one by one",
    "run": "runs what the room is for",
    "sb3": "Stable-Baselines3",
    "score": "one number for a policy on a fixed set of cells: the figure, its command",
    "timeline": "one run for a trace viewer: the events, the command",
}


@cache
def sources() -> dict[str, ast.Module]:
    """Every Python file by its path from the root; the linked rooms once."""
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8"))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not any(parent.is_symlink() for parent in path.parents)
    }


@cache
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("l3env", cache_dir=None)


def rooms() -> set[str]:
    """Packages below ``l3env`` that have modules of their own."""
    parents = Counter(module.rpartition(".")[0] for module in graph().modules)
    return {name for name in parents if name.startswith("l3env.")}


def test_few_rooms() -> None:
    assert len(rooms()) <= ROOMS_COUNT, sorted(rooms())


def test_no_circle_of_imports() -> None:
    """Of modules; the rows of rooms are import-linter's."""
    left = {module: set(graph().find_modules_directly_imported_by(module)) for module in graph().modules}
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def functions() -> Iterator[tuple[str, int]]:
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}:{node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_functions_of_a_screen() -> None:
    assert {name for name, lines in functions() if lines > FUNCTION_LINES} == TOO_LONG


def test_files_of_a_few_hundred_lines() -> None:
    long = {path for path in sources() if len((ROOT / path).read_text("utf-8").splitlines()) > FILE_LINES}
    assert {path for path in long if not path.startswith("tests/")} == set()


def test_a_name_means_one_thing() -> None:
    places = defaultdict(list)
    for path in sources():
        if not path.startswith("tests/"):
            places[Path(path).stem].append(path)
    several = {name for name, found in places.items() if len(found) > 1 and name != "__init__"}
    assert several == SAME.keys()


def test_imports_stand_at_the_top_of_packages_and_nothing_else_does() -> None:
    """An ``__init__`` is thin: a docstring, imports, names; the package's own registers its environments."""
    for path, tree in sources().items():
        if path.endswith("__init__.py") and path != "l3env/__init__.py":
            kinds = {type(node) for node in tree.body}
            assert kinds <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign}, path


def test_nothing_is_there_for_nobody() -> None:
    """What a module defines at its top is named somewhere beside its definition, in the code or as an entry point."""
    declared = (ROOT / "pyproject.toml").read_text("utf-8")
    unused = {
        node.name
        for path, tree in sources().items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list
        if not path.startswith("tests/")
        and not node.name.startswith("__")
        and words()[node.name] == 1
        and f":{node.name}" not in declared
    }
    assert unused == FOR_OTHERS


@cache
def words() -> Counter[str]:
    """How often each name stands in the code (not in the tests)."""
    found: Counter[str] = Counter()
    for path, tree in sources().items():
        if path.startswith("tests/"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                found[node.id] += 1
            elif isinstance(node, ast.Attribute):
                found[node.attr] += 1
            elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.alias):
                found[node.name] += 1
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update(node.value.replace(":", ".").split("."))
    return found

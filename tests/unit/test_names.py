"""One name means one thing in the whole project, and a local name says what the thing is."""
import ast
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for path in (ROOT / "mlops_nb").rglob("*.py") if not path.name.startswith("_"))
SOURCES = sorted(path for folder, pattern in (("nbs", "*.ipynb"), ("tests", "*.py"), ("benchmarks", "*.py"))
                 for path in (ROOT / folder).rglob(pattern) if ".ipynb_checkpoints" not in path.parts)

# Public names that two modules may define, each with its reason. At most 25.
SHARED = {
    "main": "the entry points of three processes: the command line, a task's supervisor, a warm process",
    "approve": "the command `mlops approve`, and the function that it calls",
    "list_runs": "the command `mlops runs`, and the query that it shows",
    "rollback": "the command `mlops rollback`, and the function that it calls",
    "REGRESSION": "the problem type, and its name in Databricks' monitors",
    "PROBLEM_TYPES": "the problem types, and their names in Databricks' monitors",
}
RIDDLES = {"found", "there", "said", "told", "asked", "who"}  # they do not say what the thing is


def public_names(source: str) -> set[str]:
    "The functions, classes and constants that a module defines at its top level."
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef): names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def code_cells(path: Path) -> Iterator[str]:
    "The code of a Python file, or of each cell of a notebook."
    if path.suffix == ".py": yield path.read_text()
    else:
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code": yield "".join(cell["source"])


def local_names(source: str) -> set[str]:
    "All names that code gives to variables, parameters, functions and classes."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef): names.add(node.name)
        elif isinstance(node, ast.arg): names.add(node.arg)
    return names


def test_two_modules_define_one_public_name_only_for_a_reason():
    modules = defaultdict(set)
    for path in MODULES:
        for name in public_names(path.read_text()): modules[name].add(path.relative_to(ROOT).as_posix())
    shared = {name: sorted(paths) for name, paths in modules.items() if len(paths) > 1}
    unexplained = {name: paths for name, paths in shared.items() if name not in SHARED}
    assert not unexplained, f"rename one of each, or give the reason in SHARED: {unexplained}"
    assert set(SHARED) <= set(shared), "SHARED lists names that are no longer shared"
    assert len(SHARED) <= 25


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_say_what_the_thing_is(path):
    riddles = {name for source in code_cells(path) for name in local_names(source) & RIDDLES}
    assert not riddles, f"rename {', '.join(sorted(riddles))} after what it holds or does"


def test_the_two_rules_see_what_they_should():
    source = "A, (B, _c) = 1, (2, 3)\nD: int = 4\ndef f(there): found = 1\nclass G:\n    who: str = ''\n"
    assert public_names(source) == {"A", "B", "D", "f", "G"}
    assert local_names(source) & RIDDLES == {"there", "found", "who"}

"""The house stands: a file imports from its own floor or lower, never up and never in a circle, and stays small."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = {"edgellm": "edgellm", "formats": "edgellm.formats", "kernels": "edgellm.kernels", "tui": "edgellm.tui"}


def floors() -> list[list[str]]:
    """The README's list, from the ground up; a name stands for the module or for all of the package."""
    (listed,) = re.findall(r"These are the floors.*?^```text\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [line.split(", ") for line in listed.splitlines()]


README = (ROOT / "README.md").read_text("utf-8")
FLOOR_OF = {name: number for number, names in enumerate(floors()) for name in names}

MAX_FILE_LINES = 700
MAX_FUNCTION_LINES = 60


def modules() -> dict[str, Path]:
    """Every module of the product by its import name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            names = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(names[:-1] if names[-1] == "__init__" else names)))] = path
    return found


MODULES = modules()


def imports(module: str) -> set[str]:
    """The modules of the product that a module imports anywhere: at its head, in a function, for type checking only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[
                : len(module.split(".")) - node.level + MODULES[module].name.startswith("__init__")
            ]
            source = ".".join([*(base if node.level else []), *([node.module] if node.module else [])])
            names = {f"{source}.{alias.name}" for alias in node.names}
            inside = names & MODULES.keys()
            found |= inside | ({source} if len(inside) < len(names) else set())
    return {name for name in found if name in MODULES and name != module}


def floor_name(module: str) -> str:
    """The part of the name that the list speaks of."""
    return module.removeprefix("edgellm.").split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_floor_and_imports_nothing_from_above(module: str) -> None:
    assert floor_name(module) in FLOOR_OF, f"give {module} a floor in the README's list"
    above = {name for name in imports(module) if FLOOR_OF[floor_name(name)] > FLOOR_OF[floor_name(module)]}
    assert not above, f"{module} imports from above: {sorted(above)}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module: imports(module) for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail("a circle: " + " <- ".join(circle.args[1]))


def test_the_tui_knows_the_face_of_the_library_and_no_engine_floor_name() -> None:
    hidden = {"kernels", "engine", "models"}
    for module in MODULES:
        if floor_name(module) == "tui":
            assert not {name for name in imports(module) if floor_name(name) in hidden}, module


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_small_enough_to_read(module: str) -> None:
    text = MODULES[module].read_text("utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES, f"{module}: split it by idea"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nlines = (node.end_lineno or 0) - node.lineno + 1
            assert nlines <= MAX_FUNCTION_LINES, f"{module}.{node.name}: {nlines} lines, split it by idea"

"""Tests that need a program which the extra ``test`` does not bring are skipped without it, and say so."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
OURS = {path.stem for folder in (TESTS, TESTS.parent / "benchmarks") for path in folder.rglob("*.py")} | {"edgellm"}
BROUGHT = {
    # by edgellm itself
    *("numpy", "numba", "llvmlite", "tokenizers", "sentencepiece", "jinja2", "click", "rich", "pygments", "textual"),
    *("platformdirs", "huggingface_hub"),
    # by the extra ``test``
    *("pytest", "_pytest", "hypothesis", "gguf", "setuptools", "starlette", "uvicorn", "msgspec", "llguidance"),
    *("httpx2", "jsonschema"),
}
THERE = OURS | BROUGHT | sys.stdlib_module_names


def missing(node: ast.AST, above: tuple[ast.stmt, ...] = ()) -> Iterator[tuple[int, str]]:
    """Lines that import what may not be there, where no statement above in their scopes has asked for such a thing."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            names = [child.module or ""] if isinstance(child, ast.ImportFrom) else [name.name for name in child.names]
            for name in {name.partition(".")[0] for name in names} - THERE:
                if not any("importorskip" in ast.dump(statement) for statement in above):
                    yield child.lineno, name
        elif isinstance(child, ast.Try) or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            continue
        elif isinstance(child, ast.stmt):
            yield from missing(child, above)
        if isinstance(child, ast.stmt) and not isinstance(child, ast.FunctionDef | ast.ClassDef):
            above = (*above, child)


def test_a_judge_is_imported_where_its_absence_skips() -> None:
    found = {
        str(path.relative_to(TESTS)): lines
        for path in sorted(TESTS.rglob("*.py"))
        if (lines := list(missing(ast.parse(path.read_text("utf-8")))))
    }
    assert not found, "ask by pytest.importorskip above them"

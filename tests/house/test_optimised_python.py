"""Python may leave ``assert`` out (-O, PYTHONOPTIMIZE) and docstrings too (-OO): everything works as without."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from test_house_floors import MODULES

TESTS = Path(__file__).parent.parent

# what an assert may call: it looks and changes nothing
LOOKS = {"all", "any", "enumerate", "isinstance", "items", "len", "min", "n_blocks_of", "row_nbytes", "set", "sum"}

TEXT = "The river and the water in the land, and then the wind. " * 20


def effects(test: ast.expr) -> list[str]:
    """What evaluating an expression could do besides giving a value."""
    found = []
    for node in ast.walk(test):
        if isinstance(node, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name not in LOOKS:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_assert_does_work(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Assert):
            assert not effects(node.test), f"{module}:{node.lineno}: {effects(node.test)}"


LIBRARY = """
import sys, edgellm
with edgellm.load(sys.argv[1], n_threads=1) as llm:
    greedy = dict(max_tokens=3, temperature=0)
    print(repr(llm.generate("the river", **greedy)), llm.tokenize("the river"), llm.score("the river").logprob)
    talk = llm.conversation("Be brief.", **greedy)
    print(repr(talk.send("hello")), repr(talk.send("and?")), llm.perplexity("the river and the water", 8))
"""


def python(*arguments: str, home: Path, flag: str = "", stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A Python of its own; ``flag`` is "", "-O" or "-OO"."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONOPTIMIZE"}
    return subprocess.run(
        [sys.executable, *([flag] if flag else []), *arguments],
        input=stdin, capture_output=True, text=True, timeout=600, cwd=home, encoding="utf-8", env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text."""
    home = tmp_path_factory.mktemp("optimised")
    tiny_models.write_tiny_model(home / "tiny.gguf", "llama", "F16")
    (home / "text.txt").write_text(TEXT, "utf-8")
    return home


def test_the_library_gives_the_same_without_asserts(folder: Path) -> None:
    plain, *optimised = (python("-c", LIBRARY, "tiny.gguf", home=folder, flag=flag) for flag in ("", "-O", "-OO"))
    assert plain.returncode == 0 and plain.stdout, plain.stderr
    for one in optimised:
        assert (one.returncode, one.stdout) == (0, plain.stdout), one.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "tiny.gguf", "the river", "-n", "2", "-t", "1"),
        ("chat", "tiny.gguf", "--plain", "-n", "2", "-t", "1"),
        ("quantize", "tiny.gguf", "small.gguf", "Q4_K_M", "-y", "-t", "1"),
        ("imatrix", "tiny.gguf", "-f", "text.txt", "-c", "32", "-t", "1"),
        ("perplexity", "tiny.gguf", "-f", "text.txt", "-c", "32", "-t", "1"),
        ("compare", "tiny.gguf", "tiny.gguf"),
        ("show", "tiny.gguf"),
        ("verify", "tiny.gguf"),
        ("bench", "-m", "tiny.gguf", "-p", "8", "-n", "2", "-r", "1", "-t", "1"),
        ("doctor", "--no-bandwidth", "--no-selftest"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_works_without_asserts(folder: Path, arguments: tuple[str, ...]) -> None:
    done = python("-m", "edgellm", *arguments, home=folder, flag="-O", stdin="hello\n")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr

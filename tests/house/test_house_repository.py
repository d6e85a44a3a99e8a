"""The papers of the house: the README is true, and nothing speaks of the machine that it was written on."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click import Command
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent.parent


def tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=60)
    except OSError:
        pytest.skip("git is not here")
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def readme() -> str:
    return (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme(), flags=re.DOTALL | re.MULTILINE)


def commands() -> dict[str, Command]:
    """Every command of the command line by its name."""
    from edgellm.cli.app import edgellm

    context = edgellm.make_context("edgellm", [], resilient_parsing=True)
    names = edgellm.list_commands(context)
    return {name: command for name in names if (command := edgellm.get_command(context, name))}


def test_no_file_names_the_folder_that_it_was_written_in() -> None:
    if len(ROOT.parts) < 3:
        pytest.skip("the path of this checkout is too short to be told from other words")
    here = str(ROOT)
    for path in tracked():
        assert here.encode() not in path.read_bytes(), path


def test_the_readme_draws_every_folder_and_file_that_it_should() -> None:
    tree = next(block for block in blocks("") + blocks("text") if "pyproject.toml" in block)
    for name in ("README.md", "pyproject.toml", "models.toml", "formats/", "kernels/", "edgellm/", "tui/", "tests/"):
        assert name in tree
    for folder in ("formats", "kernels", "edgellm"):
        for path in (ROOT / folder).iterdir():
            if path.is_dir() and (path / "__init__.py").exists():
                assert f"{path.name}/" in tree, f"{path} is missing in the README's tree"
            elif path.suffix == ".py" and not path.name.startswith("__"):
                assert path.name in tree, f"{path} is missing in the README's tree"
    for name in re.findall(r"[\w./-]+\.(?:py|toml|md)\b", tree):
        assert any(ROOT.rglob(name)), f"the README's tree draws {name}, which is not there"


def test_the_readme_shows_only_commands_and_flags_that_exist() -> None:
    known = commands()
    for line in "\n".join(blocks("console") + blocks("sh")).splitlines():
        match = re.search(r"edgellm (?P<name>[a-z]+)(?P<rest>[^|&#]*)", line.removeprefix("$ "))
        if match is None:
            continue
        assert match["name"] in known, line
        options = {
            flag for parameter in known[match["name"]].params for flag in parameter.opts + parameter.secondary_opts
        }
        for flag in re.findall(r"(?<=\s)--?[a-zA-Z][\w-]*", match["rest"]):
            assert flag in options | {"--help"}, f"{flag} in: {line}"


def test_the_readme_names_every_command() -> None:
    for name in commands():
        assert f"edgellm {name}" in readme(), name


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "LICENSE", "models.toml", ".ci/run"])
def test_a_paper_that_everybody_looks_for_is_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > 100


@pytest.mark.slow
def test_the_example_of_the_readme_runs(smollm2_path: Path, tmp_path: Path) -> None:
    (example,) = blocks("python")
    script = tmp_path / "example.py"
    script.write_text(example.replace('"smollm2"', repr(str(smollm2_path))))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) > 3


def test_every_command_has_a_help_page() -> None:
    for name, command in commands().items():
        done = CliRunner().invoke(command, ["--help"])
        assert done.exit_code == 0, name
        assert (command.help or "").strip(), name


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_takes_of_edgellm_is_there(path: Path) -> None:
    """Most are run by hand, seldom."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("edgellm"):
            continue
        try:
            module = importlib.import_module(str(node.module))
        except ModuleNotFoundError as error:
            assert not str(error.name).startswith("edgellm"), f"{node.module} is not there"
            continue  # an extra that is not installed
        for name in node.names:
            is_module = importlib.util.find_spec(f"{node.module}.{name.name}") if hasattr(module, "__path__") else None
            assert hasattr(module, name.name) or is_module, f"{node.module} has no {name.name}"

"""What a user installs: the wheel and the editable install hold everything, and --help stays light."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = ("numba", "llvmlite", "textual", "wgpu", "torch", "transformers", "huggingface_hub", "tokenizers", "gguf")
FOLDERS = ("edgellm", "formats", "kernels", "tui")
NOT_SOURCE = ("build", "dist", ".git", ".venv", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **environment}
    )


# --- light imports -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "edgellm", "--help"],
        ["-m", "edgellm", "run", "--help"],
        ["-m", "edgellm", "pull", "--help"],
        ["-m", "edgellm", "list"],
        ["-c", "import edgellm"],
        ["-c", "import edgellm.store.catalogue, edgellm.formats.errors"],
    ],
    ids=" ".join,
)
def test_a_light_command_imports_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    done = run(sys.executable, "-X", "importtime", *command, EDGELLM_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "edgellm" in imported
    assert not imported & set(HEAVY)


# --- what travels --------------------------------------------------------------------------------------------


def test_pyproject_names_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = {name: ROOT / folder for name, folder in settings["package-dir"].items()}
    on_disk = set()
    for name, folder in folders.items():
        for init in folder.rglob("__init__.py"):
            on_disk.add(".".join((name, *init.parent.relative_to(folder).parts)))
    assert set(settings["packages"]) == on_disk


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, so that building leaves no trace here."""
    for tool in ("setuptools", "pip"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"building without a network needs {tool} here")
    copy = tmp_path_factory.mktemp("source") / "edgellm"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
        PIP_NO_INDEX="1",
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_the_catalogue_and_nothing_else(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"edgellm/models.toml", "edgellm/py.typed"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".tcss", ".wgsl") or path.parent.name == "page":
                inside = path.relative_to(ROOT).as_posix()
                expected.add(inside if folder == "edgellm" else f"edgellm/{inside}")
    assert names == expected


def test_the_wheel_is_licensed_and_has_its_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    text = {
        name.rpartition("/")[2]: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name
    }
    assert "Apache License" in text["LICENSE"]
    assert "edgellm = edgellm.cli:main" in text["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in text["METADATA"]


def fresh_environment(folder: Path) -> Path:
    """A new virtual environment that borrows the dependencies of this one, but not its edgellm; gives its Python."""
    done = run(sys.executable, "-m", "venv", "--without-pip", folder)
    assert done.returncode == 0, done.stderr
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    import click

    found = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(found, "dependencies.pth").write_text(str(Path(click.__file__).parent.parent) + "\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_fresh_environment_has_the_command_and_the_catalogue(
    kind: str, source: Path, wheel: Path, tmp_path: Path
) -> None:
    python = fresh_environment(tmp_path / "venv")
    what = [wheel] if kind == "wheel" else ["-e", source]
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation"]
    done = run(*pip, *what, PIP_NO_INDEX="1")
    assert done.returncode == 0, done.stderr
    where = "import edgellm, edgellm.formats.errors as e; print(edgellm.__file__, e.__file__)"
    place = run(python, "-c", where, cwd=tmp_path).stdout
    assert str(source if kind == "editable" else tmp_path) in place
    command = python.with_name("edgellm.exe" if sys.platform == "win32" else "edgellm")
    assert "Usage" in run(command, "--help", cwd=tmp_path).stdout
    listed = run(command, "list", cwd=tmp_path, EDGELLM_HOME=str(tmp_path / "home"))
    assert "smollm2" in listed.stdout, listed.stderr

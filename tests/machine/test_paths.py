"""Where things are kept, and what a path means that a person typed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgellm
from edgellm.cli import main
from edgellm.formats.errors import EdgeLLMError, ParameterError
from edgellm.kernels.cpu.compile.kernel_cache import default_folder
from edgellm.machine import paths
from edgellm.store.catalogue import installed


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of our own and no variable set."""
    for name in ("EDGELLM_HOME", "EDGELLM_KERNEL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    return tmp_path


def test_one_variable_moves_models_settings_and_compiled_kernels(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("EDGELLM_HOME", "~/elsewhere")
    root = home / "elsewhere"
    assert (paths.models_dir(), paths.config_dir(), paths.cache_dir()) == tuple(
        root / name for name in ("models", "config", "cache")
    )
    assert default_folder() == root / "cache" / "kernels"


def test_without_it_compiled_kernels_lie_in_the_cache_folder() -> None:
    assert default_folder() == paths.cache_dir() / "kernels"


def test_compiled_kernels_may_have_a_folder_of_their_own(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", "~/kernels")
    assert default_folder() == home / "kernels"


NO_PATH = {
    "nobody's home": "~nosuchuser/model.gguf",
    "a zero character": "model\0.gguf",
    "a name of 256 bytes": "é" * 128,
    "5000 bytes in all": "folder/" * 715,
    "nothing": "",
    "half a character": "m\ud800.gguf",
}


@pytest.mark.parametrize("typed", NO_PATH.values(), ids=NO_PATH)
def test_what_can_be_no_path_is_said_and_may_stand_in_a_text(typed: str) -> None:
    with pytest.raises(ParameterError) as raised:
        paths.typed_path(typed)
    assert raised.value.code == "PATH" and len(str(raised.value)) < 300
    assert paths.path_if_there(typed) is None


@pytest.mark.parametrize("typed", NO_PATH.values(), ids=NO_PATH)
def test_as_a_model_it_is_an_error_with_a_name(typed: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELLM_HOME", str(home))
    for look in (installed, edgellm.load):
        try:
            assert look(typed) is None
        except EdgeLLMError as error:
            assert error.code in ("PATH", "MODEL_NOT_FOUND")


@pytest.mark.parametrize("variable", ["EDGELLM_HOME", "EDGELLM_KERNEL_CACHE"])
def test_a_variable_that_names_no_folder_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "~nosuchuser/edgellm")
    with pytest.raises(ParameterError, match=f"{variable}: .*nosuchuser"):
        paths.models_dir() if variable == "EDGELLM_HOME" else paths.kernels_dir()


COMMANDS = (
    ["run", "{}", "hello"],
    ["run", "smollm2", "-f", "{}"],
    ["run", "smollm2", "-sysf", "{}", "hello"],
    ["run", "smollm2", "--chat-template-file", "{}", "hello"],
    ["chat", "--plain", "{}"],
    ["show", "{}"],
    ["verify", "{}"],
    ["bench", "-m", "{}"],
    ["perplexity", "smollm2", "-f", "{}"],
    ["quantize", "{}", "Q8_0"],
    ["imatrix", "smollm2", "-f", "{}"],
    ["compare", "{}", "{}"],
    ["convert", "{}"],
    ["pull", "{}"],
    ["rm", "{}"],
    ["sessions", "import", "{}"],
)


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_no_command_falls_over_a_path_that_can_be_none(
    arguments: list[str], home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGELLM_HOME", str(home / "edgellm"))
    for typed in ("~nosuchuser/x.gguf", "~nosuchuser/", "x" * 300, "y/" * 3000):
        assert main([argument.format(typed) for argument in arguments]) in (1, 2)
        assert "Error: " in capsys.readouterr().err


def test_a_name_that_begins_with_a_tilde_is_a_file_like_others(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    Path("~$notes.gguf").write_bytes(b"GGUF")
    assert installed("~$notes.gguf") == Path("~$notes.gguf")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="nothing is closed to this user")
def test_a_closed_folder_is_said_to_be_closed(home: Path) -> None:
    closed = home / "closed"
    closed.mkdir(0o000)
    with pytest.raises(ParameterError, match="closed"):
        installed(closed / "model.gguf")
    assert paths.path_if_there(closed / "model.gguf") is None


def test_a_folder_on_the_way_that_denies_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(ParameterError, match="a folder on the way is closed"):
        paths.typed_file("there/model.gguf")
    assert paths.path_if_there("there/model.gguf") is None


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be deleted there")
def test_in_a_folder_that_is_gone_a_name_works_and_a_relative_path_is_refused(home: Path) -> None:
    (home / "gone").mkdir()
    script = (
        "import os, sys; os.rmdir(os.getcwd()); from edgellm.cli import main; "
        "print(main(['list']), main(['show', 'x.gguf']), main(['show', 'no-such-model']))"
    )
    environment = {**os.environ, "EDGELLM_HOME": str(home / "home"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=home / "gone", env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "0 1 1", done.stderr
    assert "Traceback" not in done.stderr and "is gone" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows always knows a home")
def test_without_any_home_the_variable_to_set_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pwd

    for name in [name for name in os.environ if name.startswith("XDG_")] + ["HOME"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    for folder in (paths.models_dir, paths.config_dir, paths.cache_dir, paths.sessions_dir):
        with pytest.raises(ParameterError, match="EDGELLM_HOME"):
            folder()
    with pytest.raises(ParameterError, match="no home folder"):
        paths.typed_path("~/model.gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert installed(file) == file
    assert main(["doctor", "--no-selftest", "--no-bandwidth"]) == 0
    said = capsys.readouterr()
    assert said.out.count("NONE: ") == 3 and "NOT KEPT" in said.out

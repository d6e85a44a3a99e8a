"""The command line as a whole: help, exit statuses, errors, pipes, encodings."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from edgellm.cli import app, main
from edgellm.cli.progress import ProgressBar
from edgellm.formats.errors import ContextFullError, ModelNotFoundError
from edgellm.machine.terminal import error_block, fields, human_bytes, human_count, table, terminal_safe


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EDGELLM_DEBUG", raising=False)
    return tmp_path / "home"


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in app.COMMANDS:
        assert f"\n  {name} " in text
    assert "..." not in text.split("Commands:")[1], "the first sentence of a command's help fits in a line"


@pytest.mark.parametrize("name", app.COMMANDS)
def test_help_of_every_command_has_an_example_and_explains_every_option(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    assert f"edgellm {name}" in capsys.readouterr().out.split("Example")[1]
    for parameter in app.edgellm.get_command(None, name).params:  # type: ignore[arg-type, union-attr]
        assert parameter.param_type_name == "argument" or parameter.help, f"{name} {parameter.opts}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in app.COMMANDS), ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = ["numba", "llvmlite", "textual", "wgpu", "numpy", "jinja2", "tokenizers", "rich", "huggingface_hub"]
    code = (
        "import sys; from edgellm.cli import main; main(sys.argv[1:]); "
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"


def test_python_m_edgellm_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "edgellm", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("edgellm ")


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["run", "--no-such-flag"], ["show"], ["bench", "-r", "0"], ["bench", "-p", "0", "-n", "0"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Error:" in captured.err


def numeric_options() -> list[tuple[str, str]]:
    found = []
    for name in app.COMMANDS:
        for parameter in app.edgellm.get_command(None, name).params:  # type: ignore[arg-type, union-attr]
            if isinstance(parameter.type, click.IntRange | click.FloatRange) or parameter.type.name in ("N", "X"):
                found.append((name, parameter.opts[0]))
    return found


@pytest.mark.parametrize("text", ["abc", "", "nan", "inf", "1e999", "0x10"])
def test_what_is_no_number_is_told_so(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = numeric_options()
    named = {"--temp", "--top-k", "-c", "--port", "--length-penalty"}
    assert len(options) > 100 and named <= {option for _, option in options}
    for command, option in options:
        assert main([command, option, text]) == 2
        said = capsys.readouterr().err
        assert f"{text!r} is not a " in said and "number." in said and option in said, (command, option, said)


def test_an_error_is_one_block_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "no-such-model"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: no-such-model") and captured.err.strip().endswith("[MODEL_NOT_FOUND]")
    assert "Traceback" not in captured.err


def test_edgellm_debug_adds_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EDGELLM_DEBUG", "1")
    assert main(["show", "no-such-model"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), 130),
        (ContextFullError("too long"), 1),
        (PermissionError(13, "Permission denied", "model.gguf"), 1),
        (MemoryError(), 1),
    ],
)
def test_every_way_of_ending_has_its_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgellm.store.catalogue.installed_models", raising(error))
    assert main(["list"]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_a_mistake_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgellm.store.catalogue.installed_models", raising(AssertionError("a bug")))
    with pytest.raises(AssertionError):
        main(["list"])


@pytest.mark.skipif(os.name != "posix", reason="pipes break otherwise elsewhere")
def test_a_closed_pipe_ends_quietly() -> None:
    code = "import sys; from edgellm.cli import main; sys.stdin.read(); sys.exit(main(['run', '--help']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()  # before it writes
    process.stdin.close()
    assert process.wait(60) == app.EXIT_BROKEN_PIPE
    assert process.stderr.read() == b""
    process.stderr.close()


def test_output_is_utf8_in_every_locale(tmp_path: Path) -> None:
    code = "from edgellm.cli import main; main(['run', '--help']); print('Gr\\xfc\\xdfe, \\u4e16\\u754c \\ud800')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8").rstrip().endswith("Grüße, 世界 ?")


def test_a_model_cannot_steer_the_terminal() -> None:
    assert terminal_safe("a\x1b[2Jb\x07\x9b1m\x00") == "a\\x1b[2Jb\\x07\\x9b1m\\x00"
    assert terminal_safe("tab\tline\nä世\r\n") == "tab\tline\nä世\n"


def test_an_error_shows_its_code_and_never_control_characters() -> None:
    assert error_block(ModelNotFoundError("x\x1b[1m: not here")) == "Error: x\\x1b[1m: not here [MODEL_NOT_FOUND]"
    assert error_block(PermissionError(13, "Permission denied", "a.gguf")) == "Error: a.gguf: Permission denied"
    assert error_block(MemoryError()) == "Error: MemoryError"


def test_numbers_come_in_the_units_people_read() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 98362432, 5 << 30)] == [
        "0 B",
        "999 B",
        "1.0 KiB",
        "93.8 MiB",
        "5.00 GiB",
    ]
    assert [human_count(n) for n in (7, 1500, 134515008, 8030261312)] == ["7", "1.50 K", "134.52 M", "8.03 B"]


def test_tables_and_fields_line_up() -> None:
    assert table(("A", "B"), [("xx", "1"), ("y", "22")], right=(1,)) == "A    B\nxx   1\ny   22"
    assert fields([("name", "one\ntwo"), ("n", 3)]) == "name  one\n      two\nn     3"


def test_progress_without_a_terminal_is_one_plain_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar() as progress:
        for done in range(3):
            progress.update("pull", done, 2 << 20, "smollm2")
        for done in range(3):
            progress.update("compile", done, 3, "matmul_q4_1")
        progress.update("load", 0, None, "smollm2")  # over within a second: not a word
        progress.update("prefill", 0, 512)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "pulling smollm2 (2.0 MiB) ...\ncompiling kernels for your CPU (3) ...\n"


def test_the_steps_of_loading_are_no_amount(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgellm.cli.progress.PLAIN_DELAY_S", 0.0)
    with ProgressBar() as progress:
        progress.update("load", 0, 2, "smollm2")
        assert progress._timer is not None
        progress._timer.join()
    assert capsys.readouterr().err == "loading smollm2 ...\n"


def test_progress_in_a_terminal_leaves_nothing_behind() -> None:
    pty = pytest.importorskip("pty", reason="there are no terminals of this kind here")
    code = (
        "import time; from edgellm.cli.progress import STAGES, ProgressBar\n"
        "with ProgressBar() as progress:\n"
        "    for stage in STAGES:\n"
        "        for done in range(3):\n"
        "            for total in (None, 3):\n"
        "                progress.update(stage, done, total, f'name of {stage} [b]\\x1b[2J')\n"
        "    progress.note('measuring')\n"
        "    progress.finish()\n"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=subprocess.STDOUT)
    os.close(slave)
    written = b""
    try:
        while chunk := os.read(master, 65536):
            written += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(master)
    assert process.wait(60) == 0, written
    assert b"Traceback" not in written
    for stage in ("pull", "load", "compile", "selftest"):
        assert f"name of {stage} [b]\\x1b[2J".encode() in written
    assert written.count(b"\x1b[?25l") == written.count(b"\x1b[?25h"), "the cursor is hidden"
    assert written.endswith(b"\x1b[2K")


def test_a_warning_is_a_sentence_and_not_a_line_of_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn() -> list[object]:
        warnings.warn("the slower kernels are used", RuntimeWarning, stacklevel=1)
        return []

    monkeypatch.setattr("edgellm.store.catalogue.installed_models", warn)
    assert main(["list"]) == 0
    assert capsys.readouterr().err == "Warning: the slower kernels are used\n"


def test_a_closed_standard_output_is_no_crash() -> None:
    shell = f'"{sys.executable}" -m edgellm list >&-'
    result = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "Traceback" not in result.stderr

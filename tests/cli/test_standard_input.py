"""``edgellm run`` beside a prompt: which standard input is read, which is left alone, and what is said of waiting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import fake_llm
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes can be asked on POSIX systems")
HANG_S = 120


def start(*arguments: str, stdin: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, fake_llm.__file__, "run", "m", *arguments],
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=HANG_S)
    return process.returncode, out, err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("one\ntwo\nthree\n", "utf-8")
    return path


def test_a_file_is_read_from_its_start(file: Path) -> None:
    with file.open() as notes:
        assert ended(start("Sum up.", stdin=notes.fileno()))[:2] == (0, "echo: one\ntwo\nthree\n\nSum up.\n")


def test_a_loop_keeps_its_lines(file: Path, tmp_path: Path) -> None:
    loop = f'while read -r line; do "{sys.executable}" "{fake_llm.__file__}" run m "$line"; done < "{file}"'
    done = subprocess.run(["sh", "-c", loop], capture_output=True, text=True, timeout=HANG_S)
    assert done.stdout == "echo: one\necho: two\necho: three\n", done.stderr


def test_a_pipe_that_brings_something_comes_first() -> None:
    read, write = os.pipe()
    process = start("Sum up.", stdin=read)
    os.close(read)
    os.write(write, b"early ")
    os.write(write, b"and late\n")
    os.close(write)
    assert ended(process) == (0, "echo: early and late\n\nSum up.\n", "")


def test_an_open_silent_pipe_is_told_of_and_can_be_left_alone() -> None:
    read, write = os.pipe()
    left_alone = ended(start("hi", "--no-stdin", stdin=read))
    assert left_alone[:2] == (0, "echo: hi\n")
    waits, asked = start("hi", stdin=read), start("-f", "-", stdin=read)
    for process in (waits, asked):
        assert process.stderr is not None and "waiting for text on standard input" in process.stderr.readline()
    os.close(write)
    assert ended(waits)[:2] == (0, "echo: hi\n")
    status, out, err = ended(asked)
    assert (status, out) == (2, "") and "there is no prompt" in err
    os.close(read)


def test_a_pipe_that_stays_silent_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellm.cli import standard_input
    from edgellm.formats.errors import ParameterError

    read, write = os.pipe()
    with os.fdopen(read) as silent:
        monkeypatch.setattr("sys.stdin", silent)
        monkeypatch.setattr(standard_input, "TOLD_S", 0.0)
        monkeypatch.setattr(standard_input, "PATIENCE_S", 0.0)
        with pytest.raises(ParameterError, match="--no-stdin") as caught:
            standard_input.brought_along()
    os.close(write)
    assert caught.value.code == "STDIN_SILENT"


@pytest.mark.parametrize("brings", [b"", b"notes"])
def test_a_connection_is_read_when_it_has_something_at_once(brings: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        if brings:
            ours.sendall(brings)
            ours.shutdown(socket.SHUT_WR)
        out = ended(start("hi", stdin=theirs.fileno()))
    assert out == (0, "echo: notes\n\nhi\n" if brings else "echo: hi\n", "")


def test_devices_and_closed_streams_bring_nothing(tmp_path: Path) -> None:
    assert ended(start("hi", stdin=subprocess.DEVNULL)) == (0, "echo: hi\n", "")
    command = f'"{sys.executable}" "{fake_llm.__file__}" %s <&-'
    for words, said in (("run m hi", "echo: hi\n"), ("chat --plain", "")):
        done = subprocess.run(["sh", "-c", command % words], capture_output=True, text=True, timeout=HANG_S)
        assert (done.returncode, done.stdout) == (0, said), done.stderr


def test_what_is_piped_must_be_text() -> None:
    for arguments, said in (
        (["run", "m"], b"standard input: byte 3 (0xe9)"),
        (["chat", "--plain"], b"[TEXT_ENCODING]"),
    ):
        command = [sys.executable, fake_llm.__file__, *arguments]
        done = subprocess.run(command, input=b"caf\xe9\n", capture_output=True, timeout=HANG_S)
        assert done.returncode == 1 and said in done.stderr, done.stderr

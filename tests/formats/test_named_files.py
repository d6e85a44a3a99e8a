"""Files that somebody names: what is no file, no text or no JSON is an error at once, wherever they are read."""

from __future__ import annotations

import codecs
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from edgellm.cli import main
from edgellm.cli.chat_session import ChatSession
from edgellm.engine.cache_file import read as read_state
from edgellm.formats.checkpoint import Checkpoint
from edgellm.formats.errors import EdgeLLMError, FormatError
from edgellm.formats.gguf import GGUFFile
from edgellm.formats.json_text import MAX_DEPTH, parse_json
from edgellm.formats.regular_file import NotAFileError, open_regular, read_regular
from edgellm.formats.safetensors import SafetensorsFile
from edgellm.formats.text_file import decode_text, read_text
from edgellm.machine.terminal import json_text
from edgellm.measure.divergence import Base
from edgellm.measure.perplexity import Perplexity
from edgellm.measure.scoring import TextScore
from edgellm.quantize.importance import read_imatrix
from edgellm.sessions import from_json
from edgellm.sessions.token_records import unpack
from edgellm.store.catalogue import catalogue

HANG_S = 60
POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes and sockets in the file system")

# ---- regular files ---------------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have 107 bytes
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


STRANGE: dict[str, Callable[[Path], None]] = {
    "a pipe": pipe,
    "a socket": bound_socket,
    "a device": link_to_zeros,
    "a directory": Path.mkdir,
}

READERS: dict[str, Callable[[Path], Any]] = {
    "text": read_text,
    "state": lambda path: read_state(path, "key"),
    "base": Base,
    "imatrix": read_imatrix,
    "gguf": GGUFFile.open,
    "safetensors": SafetensorsFile.open,
    "chat": lambda path: ChatSession("m", None).load(path),  # type: ignore[arg-type]
    "run -f": lambda path: wrong(["run", "m", "-f", str(path)]),
    "run -sysf": lambda path: wrong(["run", "m", "hi", "-sysf", str(path), "--no-stdin"]),
    "template": lambda path: wrong(["run", "m", "hi", "--chat-template-file", str(path), "--no-stdin"]),
    "sessions import": lambda path: wrong(["sessions", "import", str(path)]),
}


def wrong(arguments: list[str]) -> None:
    assert main(arguments) == 1
    raise FormatError("told on standard error")


@POSIX
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("reader", READERS)
def test_nothing_but_a_regular_file_is_opened(tmp_path: Path, reader: str, kind: str) -> None:
    STRANGE[kind](tmp_path / "strange")
    with pytest.raises(EdgeLLMError):
        READERS[reader](tmp_path / "strange")


@POSIX
@pytest.mark.parametrize("kind", STRANGE)
def test_the_error_says_what_stands_there(tmp_path: Path, kind: str) -> None:
    STRANGE[kind](tmp_path / "strange")
    with pytest.raises(NotAFileError, match=f"is {kind}, and a regular file was expected") as caught:
        open_regular(tmp_path / "strange")
    assert caught.value.kind == kind and caught.value.code == "NOT_A_FILE"


def test_what_cannot_be_opened_is_an_error_of_the_system(tmp_path: Path) -> None:
    for name in ("missing", "n" * 300, "missing/file"):
        with pytest.raises(OSError):
            open_regular(tmp_path / name)


def test_a_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5, "SIZE") == b"12345"
    with pytest.raises(FormatError, match="5 bytes long, expected up to 4"):
        read_regular(tmp_path / "file", 4, "SIZE")


@POSIX
def test_a_pipe_of_the_shell_is_a_text(tmp_path: Path) -> None:
    program = "from edgellm.formats.text_file import read_text; import sys; print(read_text(sys.argv[1]))"
    for path in ("/dev/stdin", "/dev/fd/0"):
        child = subprocess.run(
            [sys.executable, "-c", program, path], input=b"a\nb", capture_output=True, timeout=HANG_S
        )
        assert child.stdout == b"a\nb\n", child.stderr


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_text_is_utf8_or_says_what_it_is(tmp_path: Path, codec: str) -> None:
    mark = codecs.BOM_UTF16_BE if codec == "utf-16-be" else b""
    (tmp_path / "text").write_bytes(mark + "Fluß\r\n河 🌊\rend".encode(codec))
    assert read_text(tmp_path / "text") == "Fluß\n河 🌊\nend"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("café".encode("latin-1"), "byte 3 (0xe9) is no UTF-8"),
        (b"\xef\xbb\xbfab\xff", "byte 5 (0xff) is no UTF-8"),
        ("hi".encode("utf-16-le"), "has a zero byte at 1"),
        (codecs.BOM_UTF16_LE + b"h\0\0\xd8", "byte 4 (0x00) is no UTF-16"),
        (b"GGUF\x03\0\0\0", "has a zero byte at 5"),
        (b"\xed\xa0\x80", "byte 0 (0xed) is no UTF-8"),
    ],
)
def test_what_is_no_text_is_told_with_its_place(data: bytes, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        decode_text(data, "notes.txt")
    assert caught.value.code == "TEXT_ENCODING"
    assert f"notes.txt: {said}" in str(caught.value) and "iconv -f" in str(caught.value)


COMMANDS_WITH_TEXT = (
    ("perplexity", "m", "-f", "FILE"),
    ("imatrix", "m", "-f", "FILE"),
    ("run", "m", "-f", "FILE"),
    ("run", "m", "hi", "--no-stdin", "-sysf", "FILE"),
    ("chat", "--plain", "-f", "FILE"),
    ("quantize", "m", "Q4_K_M", "--tensor-type-file", "FILE"),
    ("sessions", "import", "FILE"),
)


@pytest.mark.parametrize("arguments", COMMANDS_WITH_TEXT, ids=" ".join)
def test_every_command_refuses_a_text_in_another_encoding(
    tmp_path: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert main([str(tmp_path / "latin.txt") if word == "FILE" else word for word in arguments]) == 1
    told = capsys.readouterr().err
    assert "byte 3 (0xe9)" in told and "[TEXT_ENCODING]" in told


@pytest.mark.parametrize(
    "arguments",
    [["run", "m", "caf\udce9"], ["chat", "-p", "caf\udce9"], ["run", "m", "hi", "-sys=\udce9"], ["caf\udce9"],
     ["sessions", "rename", "a", "caf\udce9"]],
)  # fmt: skip
def test_an_argument_that_is_no_utf8_is_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes there")
def test_a_path_that_is_no_utf8_may_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(b"no model, and long enough to be looked at")
    assert main(["verify", str(folder / "model.gguf")]) == 1
    assert "not a GGUF file" in "".join(capsys.readouterr())


# ---- JSON ------------------------------------------------------------------------------------------------------------

BAD_JSON = {
    "deep lists": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "one level too many": b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2),
    "a digit too many": b'{"n": ' + b"9" * 5000 + b"}",
    "a large integer": b'{"n": ' + b"9" * 50 + b"}",
    "a large float": b'{"n": 1e999}',
    "NaN": b'{"n": NaN}',
    "a name twice": b'{"n": 1, "n": 2}',
    "half a character": b'{"n": "\\ud83d"}',
    "no UTF-8": b'{"n": "\xe9"}',
    "cut short": b'{"n": [1, 2',
    "nothing": b"",
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_json_with_anything_that_no_format_has_is_refused(kind: str) -> None:
    with pytest.raises(FormatError, match=r"^file: sound JSON was expected") as caught:
        parse_json(BAD_JSON[kind], "file", "CODE")
    assert caught.value.code == "CODE"


def test_json_that_formats_have_is_read() -> None:
    text = '{"a": [1, -2.5e3, true, null, "\\ud83c\\udf0a"], "no limit": 1000000000000000019884624838656}'
    assert parse_json(text, "f", "C") == json.loads(text)
    assert parse_json(codecs.BOM_UTF8 + b"[1]", "f", "C") == [1]
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "f", "C")
    assert parse_json('{"bias": -Infinity}', "f", "C", infinities=True) == {"bias": -math.inf}
    assert parse_json('["cut \\ud83d", "\\ud83c\\udf0a"]', "f", "C", mends=True) == ["cut ?", "🌊"]


def checkpoint(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    Checkpoint.open(folder)


def safetensors(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    SafetensorsFile.open(folder / "model.safetensors")


def state(data: bytes, folder: Path) -> None:
    import hashlib

    whole = b"EDGEKV01" + len(data).to_bytes(8, "little") + data + bytes(64)
    (folder / "state").write_bytes(whole + hashlib.sha256(whole).digest())
    read_state(folder / "state", "key")


def saved_chat(data: bytes, folder: Path) -> None:
    (folder / "chat.json").write_bytes(data)
    ChatSession("m", None).load(folder / "chat.json")  # type: ignore[arg-type]


def tokens(data: bytes, folder: Path) -> None:
    import zlib

    unpack(zlib.compress(data))


def session(data: bytes, folder: Path) -> None:
    from_json(data.decode("utf-8", "replace"))


def template_arguments(data: bytes, folder: Path) -> None:
    text = data.decode("utf-8", "replace")
    assert main(["run", "m", "hi", "--no-stdin", "--chat-template-kwargs", text]) == 2
    raise FormatError("told on standard error")


@pytest.mark.parametrize("kind", ["deep lists", "deep objects", "a digit too many", "cut short"])
@pytest.mark.parametrize(
    "reader", [checkpoint, safetensors, state, saved_chat, tokens, session, template_arguments],
    ids=lambda reader: reader.__name__,
)  # fmt: skip
def test_every_reader_of_json_refuses_what_it_cannot_hold(
    tmp_path: Path, reader: Callable[[bytes, Path], None], kind: str
) -> None:
    with pytest.raises(EdgeLLMError):
        reader(BAD_JSON[kind], tmp_path)


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, f"a = {'9' * 5000}", "[a]\nsource = '\\ud83d", "a = \x00"])
def test_a_catalogue_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "models.toml").write_text(text)
    with pytest.raises(FormatError) as caught:
        catalogue()
    assert caught.value.code == "CATALOGUE"


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_a_model_that_foretells_nothing_has_infinite_perplexity() -> None:
    for losses in ([800.0, 900.0], [800.0]):
        found = Perplexity.of(np.array(losses, np.float32))
        assert found.value == math.inf and not math.isnan(found.error)
    score = TextScore(np.array([1, 2]), np.array([np.nan, -800], np.float32), np.array([-1, 0]))
    assert score.perplexity == math.inf
    assert math.isnan(TextScore(np.array([1]), np.array([np.nan], np.float32), np.array([-1])).perplexity)


@pytest.mark.parametrize(
    "arguments",
    [
        ["perplexity", "MODEL", "-f", "TEXT", "-c", "9" * 30],
        ["perplexity", "MODEL", "-f", "TEXT", "-c", "32", "-t", "9" * 30],
        ["perplexity", "MODEL", "-f", "TEXT", "-c", "32", "--save-logits", ""],
        ["imatrix", "MODEL", "-f", "TEXT", "-c", "9" * 30],
        ["quantize", "MODEL", "Q8_0", "out.gguf", "9" * 5000],
        ["quantize", "MODEL", "Q8_0", "-t", "9" * 30],
        ["bench", "MODEL", "-p", "9" * 30],
        ["bench", "MODEL", "-n", "9" * 5000],
        ["bench", "MODEL", "-pg", f"1,{'9' * 30}"],
        ["bench", "MODEL", "-t", "100000"],
        ["bench", "MODEL", "-ub", "9" * 30],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_a_number_that_no_machine_has_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("The river and the water. " * 20)
    files = {"MODEL": str(tiny_models.write_tiny_model(tmp_path / "tiny.gguf", n_layer=1)), "TEXT": "text"}
    assert main([files.get(word, word) for word in arguments]) in (1, 2)
    assert "Error" in capsys.readouterr().err


def test_json_for_programs_has_no_word_that_json_lacks() -> None:
    record = {"perplexity": math.inf, "rows": [(math.nan, -math.inf, 1.5, "NaN", None, True)]}
    assert json_text(record, indent=None) == '{"perplexity": null, "rows": [[null, null, 1.5, "NaN", null, true]]}'

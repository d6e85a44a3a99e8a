"""Nothing that a stranger wrote steers the terminal: names, metadata, templates, answers, errors, in every command."""

from __future__ import annotations

import ast
import io
import json
import re
import sys
from pathlib import Path

import pytest
from fake_llm import FakeLLM

import edgellm
from edgellm.cli import app, main
from edgellm.machine.paths import kernels_dir
from edgellm.machine.terminal import json_text, terminal_safe
from edgellm.tui.safe_text import safe_text

tiny_models = pytest.importorskip("tiny_models", reason="writing model files needs the package gguf")

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
WORD = "\x1b]0;pwned\x07[bold]\x9b31m\u202eevil\u2066\x7f\u2028\r\x85"
TEMPLATE = "{# " + WORD + " #}{{ messages[0].content }}"
NAME = WORD.replace("/", "") + ".gguf"

COMMANDS = {
    "show": ["show", "{model}"],
    "show --json": ["show", "{model}", "--json"],
    "show --template": ["show", "{model}", "--template"],
    "show --metadata": ["show", "{model}", "--metadata"],
    "show --metadata --json": ["show", "{model}", "--metadata", "--json"],
    "verify": ["verify", "{model}"],
    "verify of a bad file": ["verify", "{bad}"],
    "verify --json": ["verify", "{bad}", "--json"],
    "run": ["run", "{model}", "{word}", "-n", "3"],
    "run of a bad file": ["run", "{bad}", "hello"],
    "run of no file": ["run", "{word}.gguf", "hello"],
    "run --json": ["run", "{model}", "{word}", "--json"],
    "chat": ["chat", "{model}", "-p", "{word}"],
    "pull": ["pull", "{word}"],
    "pull of a reference": ["pull", "https://127.0.0.1/{word}.gguf"],
    "pull of a repository": ["pull", "hf:{word}/x"],
    "list": ["list"],
    "list --json": ["list", "--json"],
    "rm": ["rm", "{word}"],
    "sessions": ["sessions"],
    "sessions --json": ["sessions", "list", "--json"],
    "sessions show": ["sessions", "show", "{session}"],
    "sessions export": ["sessions", "export", "{session}"],
    "sessions export json": ["sessions", "export", "{session}", "--format", "json"],
    "sessions search": ["sessions", "search", "river"],
    "sessions of no name": ["sessions", "show", "{word}"],
    "bench of a bad file": ["bench", "-m", "{bad}"],
    "bench": ["bench", "-m", "{model}", "-p", "4", "-n", "1", "-r", "1"],
    "bench as csv": ["bench", "-m", "{model}", "-p", "4", "-n", "1", "-r", "1", "-o", "csv"],
    "bench as json": ["bench", "-m", "{model}", "-p", "4", "-n", "1", "-r", "1", "-o", "json"],
    "perplexity": ["perplexity", "{bad}", "-f", "{text}"],
    "quantize": ["quantize", "{model}", "Q8_0", "--dry-run"],
    "quantize to a file": ["quantize", "{model}", "{model}.out", "Q8_0", "-y", "--report"],
    "imatrix": ["imatrix", "{bad}", "-f", "{text}"],
    "compare": ["compare", "{model}", "{model}"],
    "compare --json": ["compare", "{model}", "{model}", "--json"],
    "convert": ["convert", "{model}", "--dry-run"],
    "convert of a bad file": ["convert", "{bad}"],
    "doctor": ["doctor", "--no-selftest", "--no-bandwidth"],
    "embed what is not there": ["embed", "-m", "{model}", "-f", "{word}"],
    "embed without a model": ["embed", "{word}"],
    "batch of what is no line": ["batch", "{text}", "{model}.out", "-m", "{model}"],
    "batch of a bad file": ["batch", "{text}", "{model}.out", "-m", "{bad}"],
    "serve what is not there": ["serve", "{word}"],
    "serve a bad file": ["serve", "{bad}", "--port", "0"],
    "no command": ["{word}"],
    "no option": ["run", "--{word}"],
    "no number": ["run", "-n", "{word}"],
    "no choice": ["convert", "{model}", "--outtype", "{word}"],
    "no path": ["perplexity", "-f", "{word}"],
}


@pytest.fixture(autouse=True)
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the commands are given: hostile files, a catalogue, a chat."""
    from edgellm.sessions import from_json, open_store

    home = tmp_path / ("home" + WORD)
    monkeypatch.setenv("EDGELLM_KERNEL_CACHE", str(kernels_dir()))  # compiled once
    monkeypatch.setenv("EDGELLM_HOME", str(home))
    model, bad, text = tmp_path / NAME, tmp_path / ("bad" + NAME), tmp_path / ("text" + WORD)
    metadata = dict.fromkeys(("general.name", "general.license", "general.description", WORD), WORD)
    tiny_models.write_tiny_model(
        model, metadata={**metadata, "tokenizer.chat_template": TEMPLATE, "general.tags": [WORD]}
    )
    bad.write_bytes(model.read_bytes().replace(b"blk.0.attn_q", b"\x1b[31m\xc2\x9b1m.q"))
    text.write_text("rivers")
    store = home / "models" / "hf" / "owner" / "repo"
    store.mkdir(parents=True)
    (store / NAME).write_bytes(b"GGUF")
    toml = f'[evil]\ndescription = {json.dumps(WORD)}\nlicence = {json.dumps(WORD)}\nsource = "path:x"\n'
    (home / "config").mkdir()
    (home / "config" / "models.toml").write_text(toml.replace("\\u007f", "\\u007F"))
    session = from_json(json.dumps([{"role": "user", "content": f"river {WORD}"}]))
    session.title, session.model = WORD, WORD
    opened, _ = open_store()
    opened.save_all(session)
    opened.close()
    return {
        "model": str(model),
        "bad": str(bad),
        "text": str(text),
        "word": WORD,
        "session": f"{session.id:016x}"[:8],
    }


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_no_command_writes_what_steers_a_terminal(
    arguments: list[str],
    words: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(edgellm, "load", lambda name, progress, **options: FakeLLM())
    monkeypatch.setattr("edgellm.cli.chat.has_screen", lambda: False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    status = main([argument.format(**words) for argument in arguments])
    captured = capsys.readouterr()
    assert status in (0, 1, 2)
    assert captured.out + captured.err
    found = UNSAFE.findall(captured.out + captured.err)
    assert not found, (found, captured.out + captured.err)


def test_every_command_is_among_them() -> None:
    assert {arguments[0] for arguments in COMMANDS.values()} >= set(app.COMMANDS)


def test_a_pipe_gets_the_answer_and_the_template_as_they_are(
    words: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(edgellm, "load", lambda name, progress, **options: FakeLLM())
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main(["run", "fake", WORD]) == 0
    assert WORD in capsys.readouterr().out
    assert main(["show", words["model"], "--template"]) == 0
    assert capsys.readouterr().out == TEMPLATE + "\n"


def test_json_keeps_every_character_and_knows_no_nan() -> None:
    value = {WORD: [WORD, "\ud800", "\x00", "é\n\t", 1.5, None]}
    text = json_text(value)
    assert not UNSAFE.search(text) and json.loads(text) == value
    assert json.loads(json_text([float("nan"), {"x": float("-inf")}, (1.0, True)])) == [None, {"x": None}, [1.0, True]]


def test_each_unsafe_character_is_spelled_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for code in range(0x11000):
        character = chr(code)
        spelled = f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
        assert terminal_safe(character) == (spelled if UNSAFE.match(character) else character)
        assert character == "\t" or safe_text(character) == terminal_safe(character)


def test_only_one_module_writes_to_the_terminal() -> None:
    folder = Path(app.__file__).parent
    for path in folder.parent.rglob("*.py"):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            allowed = path.name == "engine.py"  # numbers only, for EDGELLM_DEBUG
            assert called not in ("click.echo", "print", "sys.stdout.write", "sys.stderr.write") or allowed, path

"""``edgellm run --tools FILE``: the model calls the functions of the file that the user names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_executor import scripted_llm, tokenizer_metadata

import edgellm
from edgellm.cli import main

TEMPLATE = """{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for c in m.tool_calls or [] %}
<tool_call>
{{ c.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome\\u001b[2J"}}\n</tool_call>'
FILE = '''
from math import sqrt
from dataclasses import dataclass

@dataclass
class Place:
    name: str

def _hidden(x: int) -> int:
    return x

def weather(city: str) -> str:
    """The weather.

    Args:
        city: where
    """
    return f"sunny in {city}"

def broken() -> None:
    """Fails."""
    raise ValueError("no")
'''


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What the model will say."""
    said: list[str] = []
    tokenizer_metadata()  # it is read once, and the home below has no model
    monkeypatch.setattr(edgellm, "load", lambda *args, **options: scripted_llm(said, TEMPLATE), raising=False)
    monkeypatch.setattr("edgellm.cli.standard_input.brought_along", lambda: None)
    monkeypatch.setattr("edgellm.cli.standard_input.is_terminal", lambda: True)
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    (tmp_path / "tools.py").write_text(FILE)
    return said


def run(tmp_path: Path, *more: str, file: str = "tools.py") -> int:
    """The exit code of a run."""
    return main(["run", "m.gguf", "Weather?", "--tools", str(tmp_path / file), *more])


def test_a_call_is_run_and_shown_on_standard_error(answers: list[str], tmp_path: Path, capsys: Any) -> None:
    answers += [f"Wait. {CALL}", "It is sunny."]
    assert run(tmp_path) == 0
    captured = capsys.readouterr()
    assert captured.out == "Wait.It is sunny.\n"
    assert 'weather(city="Rome' in captured.err and "sunny in Rome" in captured.err and "\x1b" not in captured.err


def test_json_has_the_steps(answers: list[str], tmp_path: Path, capsys: Any) -> None:
    answers += [CALL, '<tool_call>\n{"name": "broken", "arguments": {}}\n</tool_call>', "Ok."]
    assert run(tmp_path, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == "Ok." and record["finish_reason"] == "stop"
    assert [step["role"] for step in record["steps"]] == ["assistant", "tool", "assistant", "tool"]
    assert "ValueError: no" in record["steps"][3]["content"]


def test_only_what_the_file_defines_is_a_tool(tmp_path: Path) -> None:
    from edgellm.cli.tools import functions_of

    (tmp_path / "tools.py").write_text(FILE)
    assert [function.__name__ for function in functions_of(str(tmp_path / "tools.py"))] == ["weather", "broken"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.py", None, "no such Python file"),
        ("words.txt", "x = 1", "no such Python file"),
        ("empty.py", "from math import sqrt\n", "defines no function"),
        ("wrong.py", "def f(:\n", "SyntaxError"),
        ("fails.py", "raise RuntimeError('boom\\nboom')\n", "RuntimeError: boom"),
        ("leaves.py", "raise SystemExit(3)\n", "SystemExit: 3"),
        ("untyped.py", "def f(x: set[int]):\n    'No.'\n", "has no JSON form"),
    ],
)
def test_a_file_that_brings_no_tools_is_named(
    answers: list[str], tmp_path: Path, capsys: Any, name: str, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    answers.append("x")
    assert run(tmp_path, file=name) != 0
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and not captured.out


def test_raw_text_takes_no_tools(answers: list[str], tmp_path: Path, capsys: Any) -> None:
    assert run(tmp_path, "--raw") == 2
    assert "--tools needs the chat template" in capsys.readouterr().err

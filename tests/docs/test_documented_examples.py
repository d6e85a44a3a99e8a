"""What README.md and docs/ show is run as it stands, but for the address and the model that stands for any other."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import real_model
from scripted_executor import scripted_llm
from served import served
from server_client import SCRIPTED, entry
from tool_template import TOOL_TEMPLATE, call_text

import edgellm
from edgellm.llm import LLM
from edgellm.loading import LoadOptions
from edgellm.server.models import ModelEntry, Models
from edgellm.server.routes import PROTOCOLS
from edgellm.server.server import Server

ROOT = Path(__file__).resolve().parent.parent.parent
ADDRESS, ANY_MODEL = "http://127.0.0.1:8080", "qwen3"
CALL = call_text("get_weather", '{"location": "Paris"}')


class Block(NamedTuple):
    file: str
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text("utf-8")
        for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 2
            found.append(Block(path.name, line, match[1], match[2]))
    return [block for block in found if block.language in languages]


def tool_user() -> LLM:
    """It calls the tool that it is shown, and tells what came of it."""
    return scripted_llm(lambda prompt: "It rains." if "<tool_response>" in prompt else CALL, TOOL_TEMPLATE)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of the model that examples name, and of the one that stands for others."""
    llm = tool_user()
    scripted = ModelEntry((ANY_MODEL,), llm.path, llm=llm, facts=SCRIPTED)
    with served(Server(Models([entry(), scripted], LoadOptions(n_ctx=2048, n_parallel=2)))) as address:
        yield address


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_that_is_shown_runs(block: Block, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            name = node.names[0].name if isinstance(node, ast.Import) else node.module or ""
            pytest.importorskip(name.partition(".")[0], reason="an example needs it")
    small, load = real_model("smollm2", "smollm2.gguf"), edgellm.load
    monkeypatch.setattr(edgellm, "load", lambda name: load(small) if name == "smollm2" else tool_user())
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    code = compile(block.text.replace(ADDRESS, url), str(block), "exec", dont_inherit=True)
    with contextlib.redirect_stdout(out):
        exec(code, {"__name__": "example"})
    assert out.getvalue().strip()


def curls() -> list[tuple[str, str]]:
    found = []
    for block in blocks("sh"):
        for command in block.text.replace("\\\n", " ").splitlines():
            if command.startswith("curl ") and "$" not in command:
                found.append((f"{block}:{len(found)}", command))
    return found


@pytest.mark.parametrize("command", [command for _, command in curls()], ids=[name for name, _ in curls()])
def test_curl_that_is_shown_gets_an_answer(command: str, url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    done = subprocess.run(command.replace(ADDRESS, url), shell=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    if "data: " in done.stdout:
        assert done.stdout.endswith("data: [DONE]\n\n")
        return
    told: dict[str, Any] = json.loads(done.stdout)
    assert "error" not in told and told


def test_settings_that_are_shown_can_be_read() -> None:
    for language, read in (("json", json.loads), ("toml", tomllib.loads)):
        shown = blocks(language)
        assert shown and all(read(block.text) for block in shown), language


def test_the_unit_of_systemd_is_sound(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd on this machine")
    (unit,) = blocks("ini")
    program = shutil.which("true")
    sound = re.sub(r"^ExecStart=\S+", f"ExecStart={program}", unit.text, flags=re.MULTILINE)
    (tmp_path / "edgellm.service").write_text(sound)
    (tmp_path / "broken.service").write_text(sound.replace("[Service]", "[Service]\nNoSuchKey=1"))

    def said_of(name: str) -> list[str]:
        command = ["systemd-analyze", "--user", "verify", str(tmp_path / name)]
        env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
        return [line for line in done.stderr.splitlines() if name in line]

    if not said_of("broken.service"):
        pytest.skip("this systemd-analyze cannot judge here")
    assert said_of("edgellm.service") == []


def test_the_endpoints_that_are_named_are_there() -> None:
    protocols = [importlib.import_module(f"edgellm.server.protocols.{name}") for name in PROTOCOLS]
    known = {route.path for protocol in protocols for route in protocol.ROUTES} | {"/openapi.json"}
    table = (ROOT / "docs" / "server.md").read_text("utf-8").partition("## Flags")[0]
    named = set(re.findall(r"`(/[\w/.-]*)`", table)) - {"/input_tokens", "/input_items"}  # behind /v1/responses
    assert named and named <= known

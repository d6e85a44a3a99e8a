"""Real agents and kits from npm, from a question over a tool to the answer, against a model that is scripted.

They run where EDGELLM_AGENTS names a folder that tests/install_agents has filled. Each reads a file by a tool of its
own, and the scripted model says what it finds of the result in its prompt, so nothing can be answered without it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scripted_executor import scripted_llm
from served import served
from server_client import scripted_server
from tool_template import TOOL_TEMPLATE, call_text

from edgellm.server.server import Server

AGENTS = Path(os.environ.get("EDGELLM_AGENTS", "/nowhere"))
SECONDS = 240
FOUND = re.compile(r"the number is (\d+)")
TOOLS = {  # of each agent the tool that reads a file
    "exec_command": lambda path: {"cmd": f"cat {path}"},
    "Read": lambda path: {"file_path": str(path)},
    "read": lambda path: {"filePath": str(path)},
    "read_file": lambda path: {"path": str(path)},
}


@dataclass
class Desk:
    """A folder with a file to be read, a home of its own, and a server whose model works there."""

    work: Path
    home: Path
    url: str
    server: Server

    def run(self, program: str, *arguments: str, **variables: str) -> str:
        """The output of a program of npm."""
        path = AGENTS / "node_modules" / ".bin" / program
        if not path.exists():
            pytest.skip(f"{program} is not installed: tests/install_agents FOLDER, and EDGELLM_AGENTS=FOLDER")
        return self.call(str(path), *arguments, **variables)

    def call(self, *command: str, **variables: str) -> str:
        """The output of a program that must succeed."""
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home), "NO_COLOR": "1", "CI": "1", **variables}
        done = subprocess.run(
            command, cwd=self.work, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    @property
    def cached(self) -> float:
        """What part of all prompts the cache held."""
        metrics = self.server.metrics
        return metrics.prompt_tokens_cached / (metrics.prompt_tokens_cached + metrics.prompt_tokens)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    if not AGENTS.is_dir():
        pytest.skip("no agents: tests/install_agents FOLDER, and EDGELLM_AGENTS=FOLDER")
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    notes = work / "notes.txt"
    notes.write_text("Whoever asks: the number is 4711.\n")

    def answer(prompt: str) -> str:
        results = prompt[prompt.rfind("<tool_response>") :] if "<tool_response>" in prompt else ""
        if found := FOUND.search(results):
            return f"It says {found[1]}."
        for name, arguments in TOOLS.items():
            if f'"name": "{name}"' in prompt:
                return "I will look.\n" + call_text(name, json.dumps(arguments(notes)))
        return "A number in a file"

    server = scripted_server(scripted_llm(answer, TOOL_TEMPLATE, n_ctx=131_072))
    with served(server) as url:
        yield Desk(work, home, url, server)


QUESTION = "Which number is in notes.txt?"


def test_codex_reads_a_file_and_answers(desk: Desk) -> None:
    provider = {"name": "edgellm", "base_url": f"{desk.url}/v1", "wire_api": "responses"}
    settings = [f"model_providers.edgellm.{key}={json.dumps(value)}" for key, value in provider.items()]
    flags = [part for setting in ("model_provider='edgellm'", *settings) for part in ("-c", setting)]
    sandbox = "--dangerously-bypass-approvals-and-sandbox"
    out = desk.run("codex", "exec", "--json", "--skip-git-repo-check", sandbox, "-m", "scripted", *flags, QUESTION)
    events = [json.loads(line) for line in out.splitlines()]
    said = [event["item"]["text"] for event in events if event.get("item", {}).get("type") == "agent_message"]
    assert said[-1] == "It says 4711." and said[0] == "I will look."
    (usage,) = [event["usage"] for event in events if event["type"] == "turn.completed"]
    assert usage["cached_input_tokens"] > 0.4 * usage["input_tokens"]


def test_claude_code_reads_a_file_and_answers(desk: Desk) -> None:
    variables = {
        "ANTHROPIC_BASE_URL": desk.url,
        "ANTHROPIC_API_KEY": "none",
        "ANTHROPIC_MODEL": "scripted",
        "ANTHROPIC_SMALL_FAST_MODEL": "scripted",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    out = desk.run("claude", "-p", QUESTION, "--output-format", "json", "--allowedTools", "Read", **variables)
    told = json.loads(out)
    assert told["result"] == "It says 4711." and not told["is_error"] and told["num_turns"] == 2
    usage = told["usage"]
    assert usage["cache_read_input_tokens"] > 0.4 * (usage["input_tokens"] + usage["cache_read_input_tokens"])


def test_opencode_reads_a_file_and_answers(desk: Desk) -> None:
    kit = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{desk.url}/v1", "apiKey": "none"}}
    model = {"scripted": {"limit": {"context": 131_072, "output": 8192}}}
    settings = {
        "provider": {"edgellm": {**kit, "models": model}},
        "model": "edgellm/scripted",
        "small_model": "edgellm/scripted",
        "autoupdate": False,
        "share": "disabled",
    }
    (desk.work / "opencode.json").write_text(json.dumps(settings))
    out = desk.run("opencode", "run", QUESTION, OPENCODE_DISABLE_MODELS_FETCH="1", OPENCODE_DISABLE_AUTOUPDATE="1")
    assert "It says 4711." in out
    assert desk.cached > 0.3


KITS = {
    "openai-compatible": "createOpenAICompatible({ name: 'edgellm', ...server })('scripted')",
    "openai": "createOpenAI(server).responses('scripted')",
    "anthropic": "createAnthropic(server)('scripted')",
}
SCRIPT = """
import { readFileSync } from 'node:fs';
import { streamText, tool, stepCountIs } from 'ai';
import { z } from 'zod';
import * as kit from '@ai-sdk/%(kit)s';
const { createOpenAICompatible, createOpenAI, createAnthropic } = kit;
const server = { baseURL: `${process.argv[2]}/v1`, apiKey: 'none' };
globalThis.AI_SDK_LOG_WARNINGS = false;
const result = streamText({
  model: %(model)s,
  prompt: process.argv[3],
  stopWhen: stepCountIs(4),
  onError: ({ error }) => { throw error; },
  tools: {
    read_file: tool({
      description: 'Reads a file.', inputSchema: z.object({ path: z.string() }),
      execute: async ({ path }) => readFileSync(path, 'utf8'),
    }),
  },
});
let text = '';
for await (const part of result.textStream) text += part;
const usage = await result.totalUsage;
console.log(JSON.stringify({ text, steps: (await result.steps).length, finish: await result.finishReason, usage }));
"""


@pytest.mark.parametrize("kit", KITS)
def test_the_ai_sdk_runs_the_tool_loop(desk: Desk, kit: str) -> None:
    if not (AGENTS / "node_modules" / "@ai-sdk" / kit).exists():
        pytest.skip(f"@ai-sdk/{kit} is not installed: tests/install_agents FOLDER, and EDGELLM_AGENTS=FOLDER")
    script = AGENTS / f"edgellm-{kit}-{os.getpid()}.mjs"
    script.write_text(SCRIPT % {"kit": kit, "model": KITS[kit]})
    try:
        told: dict[str, Any] = json.loads(desk.call("node", str(script), desk.url, QUESTION))
    finally:
        script.unlink()
    assert told["text"].endswith("It says 4711.") and told["steps"] == 2 and told["finish"] == "stop", told
    assert desk.cached > 0.3

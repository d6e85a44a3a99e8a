"""What an agent sends over a session, again: how much of each prompt the cache holds.

The cache holds what two prompts have in common from their start. So whatever changes early in a prompt costs all that
is behind it, and nothing that stays in place may be moved.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from scripted_executor import ScriptedExecutor, scripted_llm
from served import served
from server_client import client_of, scripted_server
from starlette.testclient import TestClient
from tool_template import TOOL_TEMPLATE

from edgellm.llm import LLM

SYSTEM = "You are careful. " * 400
TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {}}}
REMINDER = "<system-reminder>\nThe list of tasks is empty.\n</system-reminder>"
# one that refuses a second turn of the system and two turns of one role in a row
STRICT = """\
{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('the system speaks first') }}{% endif %}
{%- set last = messages[loop.index0 - 1].role if not loop.first else none %}
{%- if last == message.role %}{{ raise_exception('turns alternate') }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


class Session:
    """Requests to /v1/messages, and the prompts that became of them."""

    def __init__(self, llm: LLM, client: TestClient) -> None:
        assert isinstance(llm.executor, ScriptedExecutor)
        self.prompts, self.client, self.tools = llm.executor.script.prompts, client, [TOOL]
        self.tokenizer, self.answer = llm.tokenizer, llm.tokenizer.encode("Yes.", False)

    def ask(self, *turns: Any, checksum: str = "a") -> int:
        """How many tokens of the prompt the cache held."""
        header = f"x-anthropic-billing-header: cc_version=2.1.332.abc; cc_entrypoint=cli; cch={checksum};"
        system = [{"type": "text", "text": header}, {"type": "text", "text": SYSTEM}]
        messages = [{"role": role, "content": content} for role, content in turns]
        body = {"model": "scripted", "max_tokens": 9, "system": system, "messages": messages, "tools": self.tools}
        body["thinking"] = {"type": "adaptive"}  # off, this template would say so behind each prompt
        usage = self.client.post("/v1/messages?beta=true", json=body).json()["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(self.prompts[-1])
        return int(usage["cache_read_input_tokens"])

    def held(self) -> int:
        """What the last prompt has in common with one before it and its answer; the last token is always computed."""
        *before, last = self.prompts
        return min(max(shared([*prompt, *self.answer], last) for prompt in before), len(last) - 1)


def shared(one: list[int], other: list[int]) -> int:
    """How many tokens they have in common from their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


@pytest.fixture(params=[TOOL_TEMPLATE, STRICT], ids=["tools", "strict"])
def session(request: Any) -> Iterator[Session]:
    llm = scripted_llm(lambda prompt: "Yes.", request.param)
    with client_of(scripted_server(llm)) as client:
        session = Session(llm, client)
        if request.param is STRICT:
            session.tools = []
        yield session


def test_a_checksum_that_changes_in_the_header_costs_nothing(session: Session) -> None:
    assert session.ask(("user", "Hi"), checksum="11111") == 0
    assert session.ask(("user", "Hi"), checksum="fffff") == len(session.prompts[-1]) - 1
    more = session.ask(("user", "Hi"), ("assistant", "Yes."), ("user", "And?"), checksum="00000")
    assert more == session.held() > len(session.prompts[0])


def test_a_reminder_that_moves_to_the_last_turn_costs_what_is_behind_its_old_place(session: Session) -> None:
    block = lambda *texts: [{"type": "text", "text": text} for text in texts]  # noqa: E731
    session.ask(("user", block("Hi", REMINDER)))
    moved = session.ask(("user", block("Hi")), ("assistant", "Yes."), ("user", block("And?", REMINDER)))
    assert moved == session.held() and len(session.prompts[0]) - 40 < moved < len(session.prompts[0])


def test_an_in_line_turn_of_the_system_keeps_what_is_before_it(session: Session) -> None:
    session.ask(("user", "Hi"))
    begun = (("user", "Hi"), ("assistant", "Yes."), ("user", "And?"))
    session.ask(*begun)
    with_turn = session.ask(*begun, ("system", "Hurry."))
    # the strict template ends the turn of the user behind the new words: its end is computed again
    assert with_turn == session.held() >= len(session.prompts[1]) - 8
    further = session.ask(*begun, ("system", "Hurry."), ("assistant", "Yes."), ("user", "Go."))
    assert further == session.held() > len(session.prompts[2]) - 8
    assert all("Hurry." in session.tokenizer.decode(prompt) for prompt in session.prompts[2:])


def test_a_client_that_leaves_in_the_midst_of_its_prompt_loses_nothing_that_was_read() -> None:
    llm = scripted_llm(lambda prompt: "Yes.", TOOL_TEMPLATE, max_tokens_per_step=128)
    assert isinstance(llm.executor, ScriptedExecutor)
    executor = llm.executor
    server = scripted_server(llm)
    with served(server) as url:
        body = {"model": "scripted", "max_tokens": 9, "messages": [{"role": "user", "content": "river " * 3000}]}
        head = {"content-type": "application/json"}

        def request(timeout: float) -> Any:
            call = urllib.request.Request(f"{url}/v1/messages", json.dumps(body).encode(), head)
            with urllib.request.urlopen(call, timeout=timeout) as reply:
                return json.load(reply)

        executor.pause_s = 0.05
        leaving = threading.Thread(target=lambda: suppressed(request, 0.7))
        leaving.start()
        leaving.join()
        while server.active:
            time.sleep(0.01)
        executor.pause_s = 0.0
        usage = request(60)["usage"]
    n = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert 128 <= usage["cache_read_input_tokens"] < n - 128


def suppressed(call: Any, *arguments: Any) -> None:
    with suppress(OSError):
        call(*arguments)

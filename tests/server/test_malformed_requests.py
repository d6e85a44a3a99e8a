"""Two hundred broken requests to each protocol: none is the server's fault, and each error names what is wrong."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from scripted_executor import scripted_llm
from server_client import client_of, scripted_server
from tool_template import TOOL_TEMPLATE

N = 200
SCHEMA = {"type": "object", "properties": {"at": {"type": "integer"}}}
FUNCTION = {"name": "look", "description": "Looks.", "parameters": SCHEMA}
CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "scripted",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "a", "content": "3"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 4,
        "stop": ["END"],
        "seed": 1,
        "n": 1,
        "stream": False,
        "logit_bias": {"5": 1},
        "logprobs": True,
        "top_logprobs": 2,
        "stream_options": {"include_usage": True},
    },
    "/v1/responses": {
        "model": "scripted",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
            {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "3"}]},
        ],
        "instructions": "Be brief.",
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "auto",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 16,
        "stream": False,
        "store": False,
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "metadata": {"a": "b"},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "parallel_tool_calls": False,
    },
    "/v1/messages": {
        "model": "scripted",
        "max_tokens": 16,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "look", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "3"}]},
        ],
        "tools": [{"name": "look", "description": "Looks.", "input_schema": SCHEMA}],
        "tool_choice": {"type": "auto"},
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "stop_sequences": ["END"],
        "stream": False,
        "thinking": {"type": "disabled"},
        "output_config": {"effort": "low"},
    },
    "/api/chat": {
        "model": "scripted",
        "messages": [
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "look", "arguments": {"at": 1}}}],
            },
            {"role": "tool", "tool_name": "look", "content": "3"},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "options": {"temperature": 0.5, "top_k": 5, "num_predict": 4, "stop": ["END"], "seed": 1, "num_ctx": 99},
        "stream": False,
        "keep_alive": "5m",
        "think": False,
        "logprobs": True,
        "top_logprobs": 2,
    },
    "/api/generate": {
        "model": "scripted",
        "prompt": "Hi",
        "system": "Be brief.",
        "stream": False,
        "keep_alive": 60,
        "options": {"temperature": 0.5, "repeat_penalty": 1.1, "num_predict": 4, "min_p": 0.1},
    },
}
WRONG: list[Any] = [
    *(None, True, -1, 2**70, -1e300, 1.5, "", "no", "\x00\ud83d\ude00", [], {}, [None], {"a": {"b": []}}, [[[[]]]]),
    *("x" * 10_000, -(2**63), 10**400 % 7**30, ["a", 5], {"type": "dance"}),
]
FIELD = re.compile(r"^[A-Za-z_$][\w$-]*(\[\d+\]|\.[\w$-]+|\[\.\.\.\])*")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a body, but the whole body."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def broken(body: dict[str, Any], chance: random.Random) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """A copy with one thing changed, left out, or put in, and where."""
    body = copy.deepcopy(body)
    path = chance.choice(list(places(body)))
    *inner, last = path
    holder = body
    for key in inner:
        holder = holder[key]
    kind = chance.random()
    if kind < 0.15 and isinstance(holder, dict):
        del holder[last]
    elif kind < 0.25 and not inner:
        path = ("not_a_field_of_it",)
        body[path[0]] = 1
    else:
        holder[last] = chance.choice(WRONG)
    return body, path


@pytest.mark.parametrize("path", PATHS)
def test_broken_fields_are_named_and_never_the_servers_fault(path: str) -> None:
    chance = random.Random(path)
    refused = 0
    with client_of(scripted_server(scripted_llm(lambda prompt: "Yes.", TOOL_TEMPLATE))) as client:
        assert client.post(path, json=PATHS[path]).status_code == 200
        for _ in range(N):
            body, where = broken(PATHS[path], chance)
            reply = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
            assert reply.status_code < 500, (where, reply.text)
            if reply.status_code == 200:
                continue
            refused += 1
            error = reply.json()["error"]
            said = error if isinstance(error, str) else error["message"]
            named = FIELD.match(said)
            assert named, (where, said)
            assert str(where[0]) in named[0] or related(where[0], said), (where, said)
    assert refused > N // 4


def related(field: Any, said: str) -> bool:
    """Fields that depend on each other: what is wrong may show at the other one."""
    pairs = ({"tools", "tool_choice"}, {"logprobs", "top_logprobs"}, {"messages", "input"})
    return any(field in pair and any(said.startswith(other) for other in pair) for pair in pairs)


NO_JSON = [
    b"",
    b"{",
    b"[]",
    b"5",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"{]",
    b"[" * 10_000,
    b'{"a":' * 10_000,
    b'{"model": NaN}',
]


@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_json_object_is_refused(path: str) -> None:
    with client_of(scripted_server(scripted_llm([]))) as client:
        for raw in NO_JSON:
            reply = client.post(path, content=raw, headers={"content-type": "application/json"})
            assert reply.status_code == 400 and "error" in reply.json(), raw[:20]
        assert client.post(path, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
        assert client.get(path).status_code == 405

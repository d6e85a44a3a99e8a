"""Whole answers over HTTP in each protocol: every event recorded and valid, pings, failures in the midst, formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from scripted_executor import ScriptedExecutor, scripted_llm
from server_client import client_of, scripted_server
from tool_template import TOOL_TEMPLATE, call_text
from wire_schemas import check, check_ollama, check_response_event, spec, sse

from edgellm.server import sse as streams

ANSWER = "<think>\nIt was asked before.\n</think>\n\nLet me look.\n" + call_text("look", '{"at": 1}')
SCHEMA = {"type": "object", "properties": {"at": {"type": "integer"}}, "required": ["at"]}
TURN = {"role": "user", "content": "Hi"}
FUNCTION = {"name": "look", "description": "Looks.", "parameters": SCHEMA}

Parts = list[dict[str, Any]]
Protocol = tuple[dict[str, Any], dict[str, Any], Callable[[bytes], Parts], Callable[[dict[str, Any]], None]]
EVENTS = {
    "message_start": "MessageStartEvent",
    "message_delta": "MessageDeltaEvent",
    "message_stop": "MessageStopEvent",
    **{f"content_block_{kind}": f"ContentBlock{kind.title()}Event" for kind in ("start", "delta", "stop")},
}


def lines(raw: bytes) -> Parts:
    return [json.loads(line) for line in raw.splitlines()]


def valid_response(part: dict[str, Any]) -> None:
    check_response_event(part)
    if "response" in part:
        check(spec("openresponses"), part["response"], "ResponseResource")


def valid_message(part: dict[str, Any]) -> None:
    if part["type"] != "ping":
        check(spec("anthropic"), part, EVENTS[part["type"]])


def valid_line(part: dict[str, Any]) -> None:
    check_ollama(part, "ChatStreamEvent")


# path, body, a tool, how a stream is read, what judges a part of it
PROTOCOLS: dict[
    str, tuple[dict[str, Any], dict[str, Any], Callable[[bytes], Parts], Callable[[dict[str, Any]], None]]
] = {
    "/v1/responses": (
        {"model": "scripted", "input": "Hi", "stream": True},
        {"type": "function", **FUNCTION},
        lambda raw: sse([raw]),
        valid_response,
    ),
    "/v1/messages": (
        {"model": "scripted", "max_tokens": 99, "messages": [TURN], "stream": True, "thinking": {"type": "adaptive"}},
        {"name": "look", "input_schema": SCHEMA},
        lambda raw: sse([raw]),
        valid_message,
    ),
    "/api/chat": (
        {"model": "scripted", "messages": [TURN]},
        {"type": "function", "function": FUNCTION},
        lines,
        valid_line,
    ),
}


@pytest.mark.parametrize("path", PROTOCOLS)
def test_every_event_that_is_recorded_keeps_the_official_schema(path: str) -> None:
    body, tool, read, judge = PROTOCOLS[path]
    with client_of(scripted_server(scripted_llm([ANSWER], TOOL_TEMPLATE))) as client:
        parts = read(client.post(path, json={**body, "tools": [tool]}).content)
    assert "asked" in json.dumps(parts) and len(parts) > 10
    for part in parts:
        judge(part)


def is_ping(part: dict[str, Any]) -> bool:
    if "type" in part:
        return part["type"] in ("ping", "response.in_progress")
    return not part["done"] and part["message"] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_long_prompt_is_waited_for_with_pings_that_clients_take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body, _, read, judge = PROTOCOLS[path]
    monkeypatch.setattr(streams, "HEADERS_AFTER_S", 0.05)
    monkeypatch.setattr(streams, "PING_S", 0.1)
    llm = scripted_llm(["Yes."], TOOL_TEMPLATE, max_tokens_per_step=64)
    assert isinstance(llm.executor, ScriptedExecutor)
    llm.executor.pause_s = 0.15
    long = [{"role": "user", "content": "river " * 400}]
    with client_of(scripted_server(llm)) as client:
        parts = read(client.post(path, json={**body, ("input" if "input" in body else "messages"): long}).content)
    for part in parts:
        judge(part)
    pings = [part for part in parts if is_ping(part)]
    assert len(pings) > 2
    if path == "/v1/responses":
        assert [part["sequence_number"] for part in parts] == list(range(len(parts)))


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_failure_in_the_midst_is_told_as_the_protocol_has_it(path: str) -> None:
    body, _, _, _ = PROTOCOLS[path]
    llm = scripted_llm(["river " * 200], TOOL_TEMPLATE)
    assert isinstance(llm.executor, ScriptedExecutor)
    llm.executor.pause_s = 0.02
    raw = b""
    with client_of(scripted_server(llm)) as client, client.stream("POST", path, json=body) as reply:
        for chunk in reply.iter_bytes():
            raw += chunk
            if raw.count(b"river") == 3:
                llm.executor.fail = ZeroDivisionError("a secret of the inside")
    last = json.loads(raw.decode().strip().splitlines()[-1].removeprefix("data: "))
    assert reply.status_code == 200 and b"secret" not in raw and b"river" in raw
    if path == "/v1/responses":
        assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "server_error"
        valid_response(last)
    elif path == "/v1/messages":
        assert last["type"] == "error" and last["error"]["type"] == "api_error"
        check(spec("anthropic"), last, "ErrorResponse")
    else:
        assert list(last) == ["error"]


FORMATS: dict[str, dict[str, Any]] = {
    "/v1/responses": {"text": {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}}},
    "/v1/messages": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "/api/chat": {"format": SCHEMA, "think": False},
}


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_format_is_kept_whatever_the_model_would_say(path: str) -> None:
    pytest.importorskip("llguidance", reason="grammars need the extra: pip install edgellm[structured]")
    body, _, _, _ = PROTOCOLS[path]
    with client_of(scripted_server(scripted_llm(["No JSON at all: 7"], TOOL_TEMPLATE))) as client:
        reply = client.post(path, json={**body, **FORMATS[path], "stream": False}).json()
    text = {
        "/v1/responses": lambda: reply["output"][-1]["content"][0]["text"],
        "/v1/messages": lambda: reply["content"][-1]["text"],
        "/api/chat": lambda: reply["message"]["content"],
    }[path]()
    assert isinstance(json.loads(text)["at"], int)


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_format_that_cannot_be_kept_is_refused_by_its_field(path: str) -> None:
    pytest.importorskip("llguidance", reason="grammars need the extra: pip install edgellm[structured]")
    broken = {"type": "object", "properties": {"at": {"type": "moon"}}}
    fields = json.loads(json.dumps(FORMATS[path]).replace(json.dumps(SCHEMA), json.dumps(broken)))
    with client_of(scripted_server(scripted_llm([], TOOL_TEMPLATE))) as client:
        reply = client.post(path, json={**PROTOCOLS[path][0], **fields})
    error = reply.json()["error"]
    said = error if isinstance(error, str) else error["message"]
    assert reply.status_code == 400 and said.startswith(tuple(key.split(".")[0] for key in FORMATS[path])), said


def test_log_probabilities_of_a_chat_keep_the_official_schema_with_their_ids() -> None:
    body = {"messages": [TURN], "logprobs": True, "top_logprobs": 2}
    with client_of(scripted_server(scripted_llm(["A \N{SNOWFLAKE}."]))) as client:
        reply = client.post("/v1/chat/completions", json=body).json()
    check(spec("openai_chat"), reply, "CreateChatCompletionResponse")
    for row in reply["choices"][0]["logprobs"]["content"]:
        check(spec("openai_chat"), row, "ChatCompletionTokenLogprob")
        assert isinstance(row["id"], int) and all(isinstance(one["id"], int) for one in row["top_logprobs"])


BEGINS = ("content_block_start", "response.output_item.added")


def calls_in(value: Any) -> list[Any]:
    """Every call in a reply, of whatever protocol: what has a name and arguments."""
    if isinstance(value, list):
        return [call for one in value for call in calls_in(one)]
    if not isinstance(value, dict):
        return []
    found = [value[name] for name in ("arguments", "input") if isinstance(value.get("name"), str) and name in value]
    return found + [call for one in value.values() for call in calls_in(one)]


@pytest.mark.parametrize("path", [*PROTOCOLS, "/v1/chat/completions"])
def test_a_call_that_is_cut_off_is_text_and_no_call(path: str) -> None:
    chat = ({"messages": [TURN]}, {"type": "function", "function": FUNCTION}, None, None)
    body, tool, read, judge = PROTOCOLS.get(path, chat)
    places = {"/v1/responses": "max_output_tokens", "/api/chat": "options"}
    was_cut, was_whole = False, False
    for n in range(24, 44, 3):
        limit: Any = {"num_predict": n} if path == "/api/chat" else n
        asked = {**body, "tools": [tool], places.get(path, "max_tokens"): limit}
        with client_of(scripted_server(scripted_llm([ANSWER, ANSWER], TOOL_TEMPLATE))) as client:
            whole = client.post(path, json={**asked, "stream": False})
            streamed = client.post(path, json={**asked, "stream": True})
        assert whole.status_code == streamed.status_code == 200
        calls = calls_in({name: value for name, value in whole.json().items() if name != "tools"})
        assert all(json.loads(call) if isinstance(call, str) else call == {"at": 1} for call in calls), (n, calls)
        was_whole |= bool(calls)
        if read is not None and judge is not None:
            parts = read(streamed.content)
            for part in parts:
                judge(part)
            begins = [part for part in parts if part.get("type") in BEGINS]
            numbers = [part.get("index", part.get("output_index")) for part in begins]
            assert numbers == list(range(len(begins)))
            kinds = {(part.get("content_block") or part["item"])["type"] for part in begins}
            assert path != "/v1/messages" or ("tool_use" in kinds) == bool(calls)
            was_cut |= not calls and (path == "/v1/messages" or "function_call" in kinds)
    assert was_whole and (was_cut or path not in ("/v1/messages", "/v1/responses"))

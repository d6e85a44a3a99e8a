"""Ollama's protocol: lines and whole answers, durations in nanoseconds, options in range, models by tagged names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from scripted_executor import scripted_llm
from server_client import client_of, real_server, scripted_server
from wire_schemas import check_ollama

from edgellm.engine.requests import Timings
from edgellm.messages.events import (
    ContentDelta,
    Event,
    Finished,
    PromptProgress,
    ReasoningDelta,
    ToolCallBegin,
    ToolCallDelta,
    ToolCallEnd,
)
from edgellm.server.bodies import decode, msgspec
from edgellm.server.errors import ServerError
from edgellm.server.protocols import ollama
from edgellm.server.server import Server

__all__ = ["real_server"]

CHAT = {"model": "scripted:latest", "messages": [{"role": "user", "content": "Hi"}]}
TIMINGS = Timings(prompt_n=10, reused_n=4, prompt_ms=2.5, generation_n=20, generation_ms=40.0)
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALLS: list[Event] = [
    PromptProgress(0, 10, 4),
    ReasoningDelta("I should look."),
    ContentDelta("Let me look."),
    ToolCallBegin(0, "call_a", "look"),
    ToolCallDelta(0, '{"at": '),
    ToolCallDelta(0, "1}"),
    ToolCallEnd(0),
    Finished("tool_calls", 2, TIMINGS, 5),
]


def body_of(**fields: Any) -> ollama.ChatBody:
    return decode(msgspec.json.encode({**CHAT, **fields}), ollama.ChatBody)


def asked(**fields: Any) -> Any:
    return ollama.chat_request(body_of(**fields))


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_calls_are_whole_with_their_arguments_as_an_object() -> None:
    writer = ollama.LineWriter(body_of(), 7)
    told = [part for one in CALLS for part in writer.add(one)]
    call = {"id": "call_a", "function": {"index": 0, "name": "look", "arguments": {"at": 1}}}
    assert [part["message"] for part in told] == [
        {"role": "assistant", "content": "", "thinking": "I should look."},
        {"role": "assistant", "content": "Let me look."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": ""},
    ]
    assert [part["done"] for part in told] == [False, False, False, True]
    end = {"done_reason": "stop", "load_duration": 7, "prompt_eval_count": 10, "prompt_eval_duration": 2_500_000}
    assert told[-1].items() >= {**end, "eval_count": 20, "eval_duration": 40_000_000}.items()
    whole = writer.whole()
    assert whole["message"]["thinking"] == "I should look." and whole["message"]["tool_calls"] == [call]


def test_lines_and_whole_answers_keep_ollamas_schema() -> None:
    for body in (body_of(), decode(b'{"model": "m", "prompt": "x"}', ollama.GenerateBody)):
        writer = ollama.LineWriter(body, 7)
        told = [part for one in CALLS for part in writer.add(one)]
        name = "Chat" if writer.chat else "Generate"
        for part in [*told, writer.nothing()]:
            check_ollama(part, f"{name}StreamEvent")
        check_ollama(writer.whole(), f"{name}Response")


def test_a_call_that_was_cut_off_is_not_told() -> None:
    writer = ollama.LineWriter(body_of(), 0)
    told = [part for one in [*CALLS[:5], Finished("length", None, TIMINGS, 0)] for part in writer.add(one)]
    assert told[-1]["done_reason"] == "length" and not any("tool_calls" in part["message"] for part in told)
    assert "tool_calls" not in writer.whole()["message"]


def test_an_answer_streams_as_lines_unless_it_is_told_not_to() -> None:
    with client_of(scripted_server(scripted_llm(["It is three degrees."] * 2))) as client:
        streamed = client.post("/api/chat", json=CHAT)
        whole = client.post("/api/generate", json={"model": "scripted", "prompt": "Hi", "stream": False})
    assert streamed.headers["content-type"] == "application/x-ndjson"
    parts = lines(streamed.text)
    assert "".join(part["message"]["content"] for part in parts) == "It is three degrees."
    assert {part["model"] for part in parts} == {"scripted:latest"} and parts[-1]["done_reason"] == "stop"
    assert whole.headers["content-type"] == "application/json"
    assert whole.json()["response"] == "It is three degrees." and whole.json()["done"] is True


def test_without_messages_a_model_is_loaded_and_with_keep_alive_0_let_go() -> None:
    with client_of(scripted_server(scripted_llm([]))) as client:
        for path in ("/api/chat", "/api/generate"):
            loaded = client.post(path, json={"model": "scripted", "keep_alive": "5m"}).json()
            assert (loaded["done"], loaded["done_reason"]) == (True, "load")
        (running,) = client.get("/api/ps").json()["models"]
        assert running["context_length"] == 8192 and running["expires_at"] < "9999"
        gone = client.post("/api/generate", json={"model": "scripted", "keep_alive": 0}).json()
        assert gone["done_reason"] == "unload" and client.get("/api/ps").json() == {"models": []}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None),
        (300, 300),
        (-1, -1),
        ("5m", 300),
        ("1h30m", 5400),
        ("300ms", 0.3),
        ("-1", -1),
        ("0", 0),
        ("-1m", -60),
    ],
)
def test_keep_alive_is_a_number_or_a_duration(given: Any, meant: float | None) -> None:
    assert ollama.seconds("keep_alive", given) == meant


def test_options_become_sampling_fields() -> None:
    options = {"temperature": 0, "top_k": 5, "repeat_last_n": 9, "seed": -7, "num_ctx": 4096, "stop": "END"}
    request = asked(options={**options, "num_predict": 12, "mirostat": None}, think="high", format="json")
    assert request.sampling == {"temperature": 0, "top_k": 5, "penalty_last_n": 9, "seed": 2**64 - 7}
    assert request.stop == ("END",) and request.max_tokens == 12
    assert request.reasoning == "high"
    assert request.response_format == {"type": "json_object"}
    assert asked(options={"num_predict": -1}).max_tokens is None and asked(think=False).reasoning is False


def test_history_has_the_fields_that_templates_read() -> None:
    called = {
        "role": "assistant",
        "content": "",
        "thinking": "Hm.",
        "tool_calls": [{"function": {"name": "look", "arguments": {"at": 1}}}],
    }
    messages = asked(messages=[called, {"role": "tool", "tool_name": "look", "content": "3"}], tools=[TOOL]).messages
    function = {"name": "look", "arguments": {"at": 1}}
    assert messages[0]["tool_calls"] == [{"id": "call_0", "type": "function", "function": function}]
    assert messages[0]["reasoning_content"] == "Hm." and messages[1]["name"] == "look"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"options": {"temperature": -1}}, "options.temperature"),
    ("chat", {"options": {"top_k": "many"}}, "options.top_k"),
    ("chat", {"options": {"num_predict": -5}}, "options.num_predict"),
    ("chat", {"options": {"stop": [1]}}, "options.stop"),
    ("chat", {"options": {"flavour": 1}}, "options.flavour"),
    ("chat", {"keep_alive": "soon"}, "keep_alive"),
    ("chat", {"format": "xml"}, "format"),
    ("chat", {"think": "a lot"}, "think"),
    ("chat", {"messages": [{"role": "user", "content": "x", "images": ["eA=="]}]}, "messages[0].images"),
    ("chat", {"messages": [{"content": "x"}]}, "messages[0].role"),
    ("chat", {"tools": [{"type": "function"}]}, "tools[0].function"),
    ("chat", {"colour": 1}, "colour"),
    ("generate", {"suffix": "x"}, "suffix"),
    ("generate", {"template": "{{ .Prompt }}"}, "template"),
    ("generate", {"context": [1, 2]}, "context"),
    ("generate", {"prompt": 5}, "prompt"),
    ("show", {"model": ""}, "model"),
    ("embed", {"input": 5}, "input"),
]


@pytest.mark.parametrize(
    ("path", "fields", "named"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_cannot_be_kept_is_refused_by_name(path: str, fields: dict[str, Any], named: str) -> None:
    base = CHAT if path == "chat" else {"model": "scripted"}
    with client_of(scripted_server(scripted_llm([]))) as client:
        reply = client.post(f"/api/{path}", json={**base, **fields})
    assert reply.status_code == 400 and reply.json()["error"].startswith(named)


def test_errors_have_ollamas_shape() -> None:
    with client_of(scripted_server(scripted_llm([]))) as client:
        missing = client.post("/api/chat", json={**CHAT, "model": "nobody"})
        embed = client.post("/api/embed", json={"model": "scripted", "input": "x"})
        made = client.post("/api/create", json={"model": "x", "from": "y"})
        pulled = client.post("/api/pull", json={"model": "nobody"})
        here = client.post("/api/pull", json={"model": "scripted", "stream": False})
    assert missing.status_code == 404 and list(missing.json()) == ["error"]
    assert embed.status_code == 400 and made.status_code == 501 and pulled.status_code == 404
    assert here.json() == {"status": "success"}
    assert ollama.error_body(ServerError("overloaded", "Come back.")) == (503, {"error": "Come back."})


def test_models_are_listed_and_shown(real_server: Server) -> None:
    with client_of(real_server) as client:
        (listed,) = client.get("/api/tags").json()["models"]
        shown = client.post("/api/show", json={"model": listed["name"]}).json()
        assert client.get("/api/version").json() == {"version": ollama.SPOKEN}
    assert listed["name"] == "smollm2:latest" and listed["details"]["format"] == "gguf" and len(listed["digest"]) == 64
    assert shown["model_info"]["general.architecture"] == "llama" and shown["model_info"]["llama.context_length"] > 0
    assert shown["model_info"]["tokenizer.ggml.tokens"] is None and "completion" in shown["capabilities"]


def test_listings_keep_ollamas_schema(real_server: Server) -> None:
    with client_of(real_server) as client:
        check_ollama(client.get("/api/tags").json(), "ListResponse")
        client.post("/api/generate", json={"model": "smollm2"})
        check_ollama(client.get("/api/ps").json(), "PsResponse")
        check_ollama(client.post("/api/show", json={"model": "smollm2"}).json(), "ShowResponse")


def test_log_probabilities_are_a_flat_list(real_server: Server) -> None:
    body = {"model": "smollm2", "prompt": "Hi", "stream": False, "logprobs": True, "top_logprobs": 2}
    with client_of(real_server) as client:
        reply = client.post("/api/generate", json={**body, "options": {"num_predict": 4, "temperature": 0}}).json()
    assert len(reply["logprobs"]) == 4 == reply["eval_count"] and len(reply["logprobs"][0]["top_logprobs"]) == 2


def test_a_raw_prompt_is_gone_on_with_as_it_stands() -> None:
    llm = scripted_llm([" degrees."])
    script = llm.executor.script  # type: ignore[attr-defined]
    with client_of(scripted_server(llm)) as client:
        body = {"model": "scripted", "prompt": "It is three", "raw": True, "stream": False}
        assert client.post("/api/generate", json=body).json()["response"] == " degrees."
    assert llm.tokenizer.decode(script.prompts[0]) == "It is three"


def test_programs_that_ask_for_the_root_hear_the_words_they_wait_for() -> None:
    with client_of(scripted_server(scripted_llm([]))) as client:
        assert client.get("/", headers={"accept": "*/*"}).text == "Ollama is running"
        assert client.head("/").status_code == 200

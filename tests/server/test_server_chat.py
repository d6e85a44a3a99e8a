"""/v1/chat/completions: the shape of answers and streams, errors that name the field."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from scripted_executor import ScriptedExecutor, scripted_llm
from served import served
from server_client import client_of, events, real_server, scripted_server
from tool_template import TOOL_TEMPLATE, call_text

from edgellm.server.server import Server

__all__ = ["real_server"]

HELLO = [{"role": "user", "content": "Hello!"}]
PATH = "/v1/chat/completions"


def ask(server: Server, **body: Any) -> Any:
    with client_of(server) as client:
        return client.post(PATH, json={"messages": HELLO, **body})


def test_a_whole_answer_has_what_clients_read() -> None:
    reply = ask(scripted_server(scripted_llm(["It is three degrees."])), model="scripted", temperature=0).json()
    assert reply["object"] == "chat.completion" and reply["model"] == "scripted" and reply["id"].startswith("chatcmpl-")
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert choice["message"] == {"role": "assistant", "content": "It is three degrees.", "refusal": None}
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_stream_is_role_then_deltas_then_reason_then_usage_then_done() -> None:
    server = scripted_server(scripted_llm(["It is three degrees."] * 2))
    with client_of(server) as client:
        body = {"messages": HELLO, "stream": True, "temperature": 0}
        with_usage = client.post(PATH, json={**body, "stream_options": {"include_usage": True}})
        without = client.post(PATH, json=body)
    assert with_usage.headers["content-type"] == "text/event-stream"
    *chunks, last, done = events(with_usage.text)
    assert done == "[DONE]" and last["choices"] == [] and last["usage"]["completion_tokens"] > 3
    assert all(chunk["usage"] is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in [*chunks, last]}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None} and deltas[-1] == {}
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == "It is three degrees."
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    plain = events(without.text)
    assert plain[-1] == "[DONE]" and not any("usage" in chunk for chunk in plain[:-1])


def test_several_choices_come_with_their_numbers_and_share_one_prompt() -> None:
    reply = ask(scripted_server(scripted_llm(["One.", "Two.", "Three."])), n=3, temperature=0).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in reply["choices"]} == {"One.", "Two.", "Three."}


def test_logprobs_of_a_stream_are_those_of_the_whole_answer(real_server: Server) -> None:
    body = {"max_tokens": 8, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = ask(real_server, **body).json()["choices"][0]
    chunks = events(ask(real_server, **body, stream=True).text)[:-1]
    streamed = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == whole["logprobs"]["content"] and len(streamed) == 8
    assert all(len(one["top_logprobs"]) == 2 and bytes(one["bytes"]).decode() == one["token"] for one in streamed)
    assert "".join(one["token"] for one in streamed) == whole["message"]["content"]


def test_tokens_that_are_parts_of_a_character_come_with_their_own_ids_and_bytes() -> None:
    text = "Snow: \N{SNOWFLAKE}\N{LEFTWARDS ARROW WITH HOOK}!"
    llm = scripted_llm([text])
    body = {"logprobs": True, "top_logprobs": 1, "temperature": 0}
    rows = ask(scripted_server(llm), **body).json()["choices"][0]["logprobs"]["content"]
    assert [row["id"] for row in rows] == llm.tokenize(text)
    assert [row["top_logprobs"][0]["id"] for row in rows] == llm.tokenize(text)
    assert b"".join(bytes(row["bytes"]) for row in rows).decode() == text
    assert any(row["token"] == "\N{REPLACEMENT CHARACTER}" for row in rows)


def test_the_second_request_takes_the_prompt_from_the_cache(real_server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "river " * 200}], "max_tokens": 1}
    with client_of(real_server) as client:
        first, second = (client.post(PATH, json=body).json()["usage"] for _ in range(2))
    assert second["prompt_tokens_details"]["cached_tokens"] == first["prompt_tokens"] - 1


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLS = [call_text("get_weather", '{"city": "Rome"}'), call_text("get_weather", '{"city": "Oslo"}')]


def test_calls_are_streamed_as_clients_join_them_and_are_those_of_the_whole_answer() -> None:
    """A name once for each call, then pieces of its arguments, under the number of the call."""
    server = scripted_server(scripted_llm(["I look.\n" + "\n".join(CALLS)] * 2, TOOL_TEMPLATE))
    with client_of(server) as client:
        body = {"messages": HELLO, "tools": [WEATHER], "temperature": 0}
        whole = client.post(PATH, json=body).json()["choices"][0]
        chunks = events(client.post(PATH, json={**body, "stream": True}).text)[:-1]
    joined: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for delta in chunk["choices"][0]["delta"].get("tool_calls", ()):
            if "id" in delta:
                assert delta["index"] not in joined and delta["type"] == "function"
                joined[delta["index"]] = {"name": delta["function"]["name"], "arguments": ""}
            else:
                assert delta.keys() == {"index", "function"} and delta["function"].keys() == {"arguments"}
            joined[delta["index"]]["arguments"] += delta["function"]["arguments"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == whole["finish_reason"] == "tool_calls"
    told = [call["function"] for call in whole["message"]["tool_calls"]]
    assert list(joined.values()) == told and len({call["id"] for call in whole["message"]["tool_calls"]}) == 2
    assert [json.loads(call["arguments"]) for call in told] == [{"city": "Rome"}, {"city": "Oslo"}]
    assert whole["message"]["content"].strip() == "I look."


def test_reasoning_stands_apart_and_is_counted() -> None:
    server = scripted_server(scripted_llm(["<think>\nHm, hm.\n</think>\n\nFour."] * 2, TOOL_TEMPLATE))
    with client_of(server) as client:
        whole = client.post(PATH, json={"messages": HELLO}).json()
        chunks = events(client.post(PATH, json={"messages": HELLO, "stream": True}).text)[:-1]
    message = whole["choices"][0]["message"]
    assert message["content"] == "Four." and message["reasoning_content"] == message["reasoning"] == "Hm, hm."
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm, hm."
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 3


def test_a_grammar_and_a_schema_of_llama_server_begin_behind_the_reasoning() -> None:
    pytest.importorskip("llguidance", reason="grammars need the extra: pip install edgellm[structured]")
    think = "<think>\nHm, hm.\n</think>\n\n"
    server = scripted_server(
        scripted_llm(
            [think + "I say: sum 42", think + 'So: {"ok": true}', "Hm"], TOOL_TEMPLATE, control=("<think>", "</think>")
        )
    )
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    with client_of(server) as client:
        body = {"messages": HELLO, "temperature": 0, "max_tokens": 60}
        message = client.post(PATH, json={**body, "grammar": 'root ::= "sum " [0-9]+'}).json()["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("sum 42", "Hm, hm.")
        message = client.post(PATH, json={**body, "json_schema": schema}).json()["choices"][0]["message"]
        assert json.loads(message["content"]) == {"ok": True} and message["reasoning_content"] == "Hm, hm."
        for wrong in (
            {"grammar": "root ::= nothing"},
            {"grammar": 'root ::= "a"', "json_schema": schema},
            {"grammar": 'root ::= "a"', "response_format": {"type": "json_object"}},
            {"grammar": 'root ::= "a"', "tools": [WEATHER]},
        ):
            reply = client.post(PATH, json={**body, **wrong})
            assert reply.status_code == 400 and reply.json()["error"]["param"] == "grammar", wrong


def test_tools_that_the_model_cannot_be_shown_are_refused_by_name() -> None:
    channels = "to=self<|message|><|eom|>{{ messages[-1].content }}"
    reply = ask(scripted_server(scripted_llm(["No."], channels)), tools=[WEATHER])
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "tools"


def test_a_model_whose_template_knows_no_tools_is_told_of_them_in_plain_text() -> None:
    llm = scripted_llm([CALLS[0], "Sunny."])
    executor, tokenizer = llm.executor, llm.tokenizer
    with client_of(scripted_server(llm)) as client:
        choice = client.post(PATH, json={"messages": HELLO, "tools": [WEATHER]}).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls" and not choice["message"]["content"]
        (call,) = choice["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
        talk = [*HELLO, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sun"}]
        reply = client.post(PATH, json={"messages": talk, "tools": [WEATHER]}).json()
        assert reply["choices"][0]["message"]["content"] == "Sunny."
        shown = client.post("/apply-template", json={"messages": talk, "tools": [WEATHER]}).json()["prompt"]
    assert isinstance(executor, ScriptedExecutor)
    assert shown == tokenizer.decode(executor.script.prompts[-1], special=True)


def test_llm_comply_finds_nothing_to_complain_of() -> None:
    runner = pytest.importorskip("llm_comply.runner", reason="pip install llm-comply==0.5.0")
    from llm_comply.config import ComplianceConfig
    from llm_comply.tests import openai_chat
    from wire_schemas import spec

    def answer(prompt: str) -> str:
        wants = "get_weather" in prompt and "<tool_response>" not in prompt
        return call_text("get_weather", '{"location": "Paris"}') if wants else "<think>\nHm.\n</think>\n\nHello to you."

    # no model here sees; and a request without the name of a model is answered, as llama-server's clients expect
    left_out = ("chat-image-input", "chat-error-handling")
    tests = [replace(test, skip_reason=None) for test in openai_chat.OPENAI_CHAT_TESTS if test.id not in left_out]
    with served(scripted_server(scripted_llm(answer, TOOL_TEMPLATE))) as url:
        config = ComplianceConfig(base_url=f"{url}/v1", api_key="none", model="scripted")
        results = runner.TestRunner(config, tests, spec("openai_chat")).run_all().results
    assert [(result.id, result.errors) for result in results if result.errors] == []
    assert len(results) == 7

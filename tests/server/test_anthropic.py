"""/v1/messages: blocks and events in the official order, turns that stay in place, errors in its own words."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_executor import scripted_llm
from server_client import client_of, scripted_server
from wire_schemas import check, spec, sse

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
from edgellm.server.errors import STATUS, ServerError
from edgellm.server.protocols import anthropic

PATH = "/v1/messages?beta=true"
TIMINGS = Timings(prompt_n=10, reused_n=4, generation_n=20)
TOOL = {"name": "look", "description": "Looks.", "input_schema": {"type": "object", "properties": {}}}
CALLS: list[Event] = [
    PromptProgress(4, 10, 4),
    ReasoningDelta("I should look."),
    ContentDelta("Let me "),
    ContentDelta("look."),
    ToolCallBegin(0, "call_a", "look"),
    ToolCallDelta(0, '{"at": '),
    ToolCallDelta(0, "1}"),
    ToolCallEnd(0),
    ToolCallBegin(1, "call:b", "look"),
    ToolCallEnd(1),
    Finished("tool_calls", 2, TIMINGS, 5),
]
EVENTS = {
    "message_start": "MessageStartEvent",
    "content_block_start": "ContentBlockStartEvent",
    "content_block_delta": "ContentBlockDeltaEvent",
    "content_block_stop": "ContentBlockStopEvent",
    "message_delta": "MessageDeltaEvent",
    "message_stop": "MessageStopEvent",
}


def body_of(**fields: Any) -> anthropic.MessagesBody:
    body = {"model": "scripted", "max_tokens": 99, "messages": [{"role": "user", "content": "Hi"}], **fields}
    return decode(msgspec.json.encode(body), anthropic.MessagesBody)


def written(happened: list[Event], **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    writer = anthropic.MessageWriter(body_of(**fields))
    chunks = [chunk for one in happened for chunk in writer.add(one)]
    return sse(chunks), writer.as_dict()


def asked(**fields: Any) -> Any:
    return anthropic.to_request(body_of(**fields))


def turns(*messages: Any, **fields: Any) -> Any:
    pairs = [{"role": role, "content": content} for role, content in messages]
    return asked(messages=pairs, **fields).messages


def test_every_event_and_the_message_keep_the_official_schema() -> None:
    told, message = written(CALLS)
    for data in told:
        if data["type"] != "ping":
            check(spec("anthropic"), data, EVENTS[data["type"]])
    check(spec("anthropic"), message, "Message")


def test_each_block_stops_before_the_next_one_starts() -> None:
    told, message = written(CALLS)
    kinds = [data["type"].removeprefix("content_block_") for data in told if data["type"] != "ping"]
    assert kinds == [
        *("message_start", "start", "delta", "delta", "stop", "start", "delta", "delta", "stop"),
        *("start", "delta", "stop", "start", "stop", "message_delta", "message_stop"),
    ]
    blocks = [data for data in told if data["type"].startswith("content_block")]
    assert [data["index"] for data in blocks] == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 2
    deltas = [data["delta"]["type"] for data in blocks if "delta" in data]
    assert deltas[:4] == ["thinking_delta", "signature_delta", "text_delta", "text_delta"]
    assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    assert message["content"][2]["input"] == {"at": 1} and message["content"][3]["id"] == "call_b"
    assert message["stop_reason"] == "tool_use"


def test_input_tokens_leave_out_what_the_cache_held() -> None:
    told, message = written(CALLS)
    start, end = told[0]["message"]["usage"], told[-2]["usage"]
    for usage in (start, end, message["usage"]):
        assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (6, 4)
    assert start["output_tokens"] == 0 and end["output_tokens"] == 20
    assert end["output_tokens_details"] == {"thinking_tokens": 5}


@pytest.mark.parametrize(
    ("reason", "stop", "told"),
    [
        ("stop", 2, ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("length", None, ("max_tokens", None)),
        ("context_full", None, ("model_context_window_exceeded", None)),
        ("tool_calls", 2, ("tool_use", None)),
    ],
)
def test_the_reason_of_the_end_is_told(reason: Any, stop: Any, told: tuple[str, str | None]) -> None:
    _, message = written([*CALLS[:4], Finished(reason, stop, TIMINGS, 0)])
    assert (message["stop_reason"], message["stop_sequence"]) == told


AS_TEXT = [*CALLS[:6], ContentDelta('<call>{"at": '), Finished("length", None, TIMINGS, 0)]


def test_a_call_that_was_cut_off_is_told_as_text_alone() -> None:
    told, message = written(AS_TEXT, tools=[TOOL])
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert message["content"][1]["text"] == 'Let me look.<call>{"at": '
    assert [data["content_block"]["type"] for data in told if "content_block" in data] == ["thinking", "text"]
    assert told[-3]["type"] == "content_block_stop" and told[-2]["delta"]["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(("asked", "header"), [(True, False), (None, True), (False, True), (None, False)])
def test_calls_come_as_they_are_written_where_the_tool_asks_for_that(asked: bool | None, header: bool) -> None:
    writer = anthropic.MessageWriter(body_of(tools=[{**TOOL, "eager_input_streaming": asked}]), eager=header)
    told = sse([chunk for one in AS_TEXT for chunk in writer.add(one)])
    for data in told:
        check(spec("anthropic"), data, EVENTS[data["type"]])
    pieces = [data["delta"]["partial_json"] for data in told if data.get("delta", {}).get("type") == "input_json_delta"]
    assert pieces == (['{"at": '] if asked or (asked is None and header) else [])
    assert [block["type"] for block in writer.as_dict()["content"]] == ["thinking", "text", "text"][: 2 + bool(pieces)]


def test_thinking_that_is_not_shown_comes_back_in_its_signature() -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    told, message = written(CALLS, thinking=thinking)
    assert message["content"][0]["thinking"] == ""
    assert not any(data.get("delta", {}).get("type") == "thinking_delta" for data in told)
    history = turns(("user", "Hi"), ("assistant", message["content"][:2]), ("user", "And?"))
    assert history[1]["reasoning_content"] == "I should look." and history[1]["content"] == "Let me look."


def test_the_checksum_of_the_billing_header_does_not_reach_the_prompt() -> None:
    def system(checksum: str) -> Any:
        header = f"x-anthropic-billing-header: cc_version=2.1.1.abc; cc_entrypoint=cli; cch={checksum};"
        return turns(("user", "Hi"), system=[{"type": "text", "text": header}, {"type": "text", "text": "Be brief."}])

    assert system("a1b2c") == system("00fff") != system("a1b2c; more")
    assert "cch=0;" in system("a1b2c")[0]["content"] and system("x")[0]["content"].endswith("Be brief.")


def test_a_turn_of_the_system_stays_where_it_is() -> None:
    messages = turns(("user", "Hi"), ("assistant", "Yes?"), ("system", "Hurry."), ("user", "Go."), system="Be brief.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "system", "user"]


def test_results_of_tools_are_messages_of_their_own_in_their_place() -> None:
    call = {"type": "tool_use", "id": "a", "name": "look", "input": {"at": 1}}
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "3"}, picture]},
        {"type": "tool_result", "tool_use_id": "b", "content": "no such thing", "is_error": True},
        {"type": "text", "text": "Go on."},
        {"type": "text", "text": "Quickly."},
    ]
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    messages = turns(("user", "Hi"), ("assistant", [thought, {"type": "text", "text": "So:"}, call]), ("user", results))
    function = {"name": "look", "arguments": {"at": 1}}
    assert messages[1:] == [
        {
            "role": "assistant",
            "content": "So:",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "a", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "a", "name": "look", "content": "3\n[image: this model reads text only]"},
        {"role": "tool", "tool_call_id": "b", "content": "Error: no such thing"},
        {"role": "user", "content": "Go on.\n\nQuickly."},
    ]


def test_tools_and_their_choice_reach_the_model() -> None:
    for given, choice in (
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "look"}, {"name": "look"}),
        ({"type": "none"}, "none"),
    ):
        request = asked(tools=[TOOL, {"type": "web_search_20250305", "name": "web_search"}], tool_choice=given)
        assert request.tool_choice == choice and [tool["function"]["name"] for tool in request.tools] == ["look"]
    assert (
        asked(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True}).parallel_tool_calls
        is False
    )


def test_thinking_and_formats_reach_the_model() -> None:
    assert asked().reasoning is False and asked(thinking={"type": "disabled"}).reasoning is False
    assert asked(thinking={"type": "adaptive"}).reasoning is None
    assert asked(thinking={"type": "adaptive"}, output_config={"effort": "low"}).reasoning == "low"
    assert asked(thinking={"type": "enabled", "budget_tokens": 2048}).reasoning == 2048
    schema = {"type": "object", "properties": {"title": {"type": "string"}}}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    assert asked(output_config={"format": {"type": "json_schema", "schema": schema}}).response_format == wanted


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "dance"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text: it is missing"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
    ({"temperature": "warm"}, "temperature"),
    ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "no"}}, "tool_choice.name"),
    ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"shoe_size": 43}, "shoe_size"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_kept_is_refused_by_name_in_the_protocols_shape(fields: dict[str, Any], named: str) -> None:
    body = {"model": "scripted", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], **fields}
    with client_of(scripted_server(scripted_llm([]))) as client:
        reply = client.post(PATH, json=body)
    assert reply.status_code == 400 and reply.json()["error"]["message"].startswith(named)
    check(spec("anthropic"), reply.json(), "ErrorResponse")


def test_every_kind_of_error_has_its_status_and_name() -> None:
    told = {kind: anthropic.error_body(ServerError(kind, "no")) for kind in STATUS}
    assert {(status, body["error"]["type"]) for status, body in told.values()} == {
        *((400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error")),
        *((404, "not_found_error"), (413, "request_too_large"), (529, "overloaded_error"), (500, "api_error")),
        (429, "rate_limit_error"),
    }


def test_a_prompt_that_is_too_long_is_told_in_the_words_that_clients_look_for() -> None:
    body = {"model": "scripted", "max_tokens": 9, "messages": [{"role": "user", "content": "river " * 600}]}
    with client_of(scripted_server(scripted_llm([], n_ctx=256))) as client:
        counted = client.post(
            "/v1/messages/count_tokens", json={key: body[key] for key in ("model", "messages")}
        ).json()
        for stream in (False, True):
            reply = client.post(PATH, json={**body, "stream": stream})
            said = f"prompt is too long: {counted['input_tokens']} tokens > 256 maximum"
            assert reply.status_code == 400 and reply.json()["error"]["message"] == said


def test_counted_tokens_are_those_of_the_answer() -> None:
    prompt = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "system": "Be brief."}
    with client_of(scripted_server(scripted_llm(["Yes."]))) as client:
        counted = client.post("/v1/messages/count_tokens", json=prompt).json()
        usage = client.post(PATH, json={**prompt, "max_tokens": 9}).json()["usage"]
    check(spec("anthropic"), counted, "CountMessageTokensResponse")
    assert counted["input_tokens"] == usage["input_tokens"] + usage["cache_read_input_tokens"]


def test_an_answer_goes_on_from_a_last_turn_of_the_assistant() -> None:
    llm = scripted_llm([" degrees."])
    script = llm.executor.script  # type: ignore[attr-defined]
    turns = [{"role": "user", "content": "How warm?"}, {"role": "assistant", "content": "It is three"}]
    with client_of(scripted_server(llm)) as client:
        reply = client.post(PATH, json={"model": "scripted", "max_tokens": 9, "messages": turns}).json()
    assert reply["content"] == [{"type": "text", "text": " degrees.", "citations": None}]
    assert llm.tokenizer.decode(script.prompts[0]).endswith("It is three")


def test_models_have_this_protocols_shape_for_who_names_its_version() -> None:
    with client_of(scripted_server(scripted_llm([]))) as client:
        listed = client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
        one = client.get("/v1/models/scripted", headers={"anthropic-version": "2023-06-01"}).json()
        other = client.get("/v1/models").json()
    check(spec("anthropic"), listed, "ListResponse_ModelInfo_")
    assert listed["data"] == [one] and other["object"] == "list"

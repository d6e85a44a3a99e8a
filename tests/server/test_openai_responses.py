"""/v1/responses: items and events in the official order, what is asked is told, errors that name the field."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_executor import scripted_llm
from server_client import client_of, events, scripted_server
from wire_schemas import check, check_response_event, spec, sse

from edgellm.engine.requests import Timings
from edgellm.generation import TokenLogprob
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
from edgellm.sampling import SamplingParams
from edgellm.server.bodies import decode, msgspec
from edgellm.server.errors import ServerError
from edgellm.server.protocols import openai_responses as responses
from edgellm.server.response_store import ResponseStore

PATH = "/v1/responses"
TIMINGS = Timings(prompt_n=10, reused_n=4, generation_n=20)
TOOL = {"type": "function", "name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
CALLS: list[Event] = [
    PromptProgress(10, 10, 4),
    ReasoningDelta("I should "),
    ReasoningDelta("look."),
    ContentDelta("Let me "),
    ContentDelta("look."),
    ToolCallBegin(0, "call_a", "look"),
    ToolCallDelta(0, '{"at": '),
    ToolCallDelta(0, "1}"),
    ToolCallEnd(0),
    ToolCallBegin(1, "call_b", "look"),
    ToolCallDelta(1, "{}"),
    ToolCallEnd(1),
    Finished("tool_calls", 2, TIMINGS, 5),
]


def body_of(**fields: Any) -> responses.ResponseBody:
    return decode(msgspec.json.encode({"model": "scripted", "input": "Hi", **fields}), responses.ResponseBody)


def written(happened: list[Event], **fields: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events and the resource that a body gets of an answer."""
    body = body_of(**fields)
    writer = responses.ResponseWriter(body, responses.to_request(body, ResponseStore()), SamplingParams())
    chunks = [chunk for one in happened for chunk in (*writer.begin(), *writer.add(one))]
    return sse(chunks), writer.resource


def asked(**fields: Any) -> Any:
    return responses.to_request(body_of(**fields), ResponseStore())


def test_every_event_and_the_resource_keep_the_official_schema() -> None:
    told, resource = written(CALLS, tools=[TOOL], include=["reasoning.encrypted_content"])
    for data in told:
        check_response_event(data)
    check(spec("openresponses"), resource, "ResponseResource")
    assert told[-1]["response"] == resource


def test_events_come_in_the_official_order_with_numbers() -> None:
    told, resource = written(CALLS, tools=[TOOL])
    assert [data["sequence_number"] for data in told] == list(range(len(told)))
    kinds = [data["type"].removeprefix("response.") for data in told]
    part = ["content_part.added", "{}.delta", "{}.delta", "{}.done", "content_part.done"]
    item = lambda name: ["output_item.added", *[kind.format(name) for kind in part], "output_item.done"]  # noqa: E731
    call = ["function_call_arguments.delta", "function_call_arguments.done"]
    assert kinds == [
        *("created", "in_progress", *item("reasoning_text"), *item("output_text")),
        *("output_item.added", call[0], *call, "output_item.done", "output_item.added", *call, "output_item.done"),
        "completed",
    ]
    assert [item["type"] for item in resource["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert [item.get("status") for item in resource["output"]] == [None, "completed", "completed", "completed"]
    assert [data["output_index"] for data in told if data["type"].endswith("output_item.done")] == [0, 1, 2, 3]
    assert resource["output"][2]["arguments"] == '{"at": 1}' and resource["output"][2]["call_id"] == "call_a"
    assert resource["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 5},
        "total_tokens": 30,
    }


@pytest.mark.parametrize("reason", ["length", "context_full"])
def test_an_answer_that_was_cut_off_is_incomplete_and_has_no_half_call(reason: Any) -> None:
    told, resource = written([*CALLS[:8], Finished(reason, None, TIMINGS, 5)], tools=[TOOL])
    assert told[-1]["type"] == "response.incomplete"
    assert resource["status"] == "incomplete" and resource["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["type"] for item in resource["output"]] == ["reasoning", "message"]
    assert not any(data["type"] == "response.function_call_arguments.done" for data in told)
    text_cut, cut = written([ContentDelta("Half"), Finished(reason, None, TIMINGS, 0)])
    assert cut["output"][0]["status"] == "incomplete" and text_cut[-1]["type"] == "response.incomplete"


def test_log_probabilities_of_a_text_behind_reasoning_are_all_told() -> None:
    texts = [ContentDelta(text, (TokenLogprob(i, text.encode(), -0.5),)) for i, text in enumerate(("A", "B"))]
    told, resource = written([ReasoningDelta("Hm."), *texts, Finished("stop", 2, TIMINGS, 2)])
    deltas = [data["logprobs"] for data in told if data["type"] == "response.output_text.delta"]
    assert [[one["token"] for one in some] for some in deltas] == [["A"], ["B"]]
    (part,) = resource["output"][1]["content"]
    assert [one["token"] for one in part["logprobs"]] == ["A", "B"]


def test_an_empty_answer_still_has_a_message() -> None:
    told, resource = written([PromptProgress(1, 1, 0), Finished("stop", 2, TIMINGS, 0)])
    assert resource["output"][0]["content"][0]["text"] == "" and resource["status"] == "completed"
    for data in told:
        check_response_event(data)


def test_a_failure_is_told_in_the_stream_also_before_it_began() -> None:
    body = body_of()
    writer = responses.ResponseWriter(body, responses.to_request(body, ResponseStore()), SamplingParams())
    told = sse([b"".join(writer.fail(ServerError("context_exceeded", "The prompt has 9 tokens.")))])
    assert [data["type"] for data in told] == ["response.created", "response.in_progress", "response.failed"]
    assert told[-1]["response"]["error"] == {"code": "context_length_exceeded", "message": "The prompt has 9 tokens."}
    for data in told:
        check_response_event(data)


def test_pings_are_events_with_numbers() -> None:
    body = body_of()
    writer = responses.ResponseWriter(body, responses.to_request(body, ResponseStore()), SamplingParams())
    told = sse([writer.ping(), writer.ping(), *writer.add(ContentDelta("x"))])
    assert [data["type"] for data in told[:3]] == ["response.created", "response.in_progress", "response.in_progress"]
    assert [data["sequence_number"] for data in told] == list(range(len(told)))


def test_what_the_model_said_between_two_turns_is_one_message() -> None:
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": "Look."},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": '{"at": 1}'},
        {"type": "function_call", "call_id": "b", "name": "look", "arguments": "{broken"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "3"}]},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_image", "image_url": "data:x"}]},
    ]
    call = lambda name, given: {"id": name, "type": "function", "function": {"name": "look", "arguments": given}}  # noqa: E731
    assert asked(input=items, instructions="Obey.").messages == [
        {"role": "system", "content": "Obey."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Look."},
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "Yes.",
            "tool_calls": [call("a", {"at": 1}), call("b", "{broken")],
        },
        {"role": "tool", "tool_call_id": "a", "name": "look", "content": "3"},
        {"role": "tool", "tool_call_id": "b", "name": "look", "content": "[input_image: this model reads text only]"},
    ]


def test_sealed_reasoning_comes_back_as_it_was() -> None:
    _, resource = written(CALLS, include=["reasoning.encrypted_content"], tools=[TOOL])
    item = {key: value for key, value in resource["output"][0].items() if key != "content"}
    messages = asked(input=[{"role": "user", "content": "Hi"}, item]).messages
    assert messages[-1]["reasoning_content"] == "I should look."
    foreign = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAABo"}
    assert len(asked(input=[{"role": "user", "content": "Hi"}, foreign]).messages) == 1


def test_tools_of_other_kinds_are_left_out_and_never_refused() -> None:
    others = ["custom", "web_search", "local_shell", "image_generation", "namespace", "mcp", "tool_search", "of_2027"]
    request = asked(tools=[{"type": kind, "name": kind} for kind in others] + [TOOL])
    assert [tool["function"]["name"] for tool in request.tools] == ["look"]
    items = [{"type": f"{kind}_call", "id": "x", "status": "completed"} for kind in ("web_search", "local_shell")]
    assert len(asked(input=[*items, {"role": "user", "content": "Hi"}]).messages) == 1


def test_tool_choice_reaches_the_model() -> None:
    other = {**TOOL, "name": "listen"}
    for given, choice in (
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "name": "look"}, {"name": "look"}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]}, "required"),
    ):
        request = asked(tools=[TOOL, other], tool_choice=given)
        assert request.tool_choice == choice
        limited = isinstance(given, dict) and given["type"] == "allowed_tools"
        assert [tool["function"]["name"] for tool in request.tools] == (["look"] if limited else ["look", "listen"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"background": True}, "background"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"unknown_thing": 1}, "unknown_thing"),
    ({"temperature": -1}, "temperature"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"input": []}, "input"),
    ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "function_call", "name": "x"}]}, "input[0].call_id"),
    ({"input": [{"type": "strange"}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice.name"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"previous_response_id": "resp_no"}, "previous_response_id"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_kept_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with client_of(scripted_server(scripted_llm([]))) as client:
        reply = client.post(PATH, json={"model": "scripted", "input": "Hi", **fields})
    error = reply.json()["error"]
    assert 400 <= reply.status_code < 500 and error["param"] == named and error["message"].startswith(named)


def test_a_talk_goes_on_from_the_response_before_it() -> None:
    llm = scripted_llm(["Four.", "Five.", "Five."])
    script = llm.executor.script  # type: ignore[attr-defined]
    with client_of(scripted_server(llm)) as client:
        first = client.post(PATH, json={"model": "scripted", "input": "Two and two?"}).json()
        more = {"model": "scripted", "input": "And one?", "previous_response_id": first["id"]}
        second = client.post(PATH, json=more).json()
        reference = {"type": "item_reference", "id": first["output"][0]["id"]}
        items = [{"role": "user", "content": "Two and two?"}, reference, {"role": "user", "content": "And one?"}]
        assert client.post(PATH, json={"model": "scripted", "input": items}).status_code == 200
        assert client.get(f"{PATH}/{first['id']}").json() == first
        assert client.get(f"{PATH}/{first['id']}/input_items").json()["data"][0]["content"] == "Two and two?"
        assert client.delete(f"{PATH}/{first['id']}").json()["deleted"] is True
        assert client.get(f"{PATH}/{first['id']}").status_code == 404
    assert second["previous_response_id"] == first["id"]
    assert "Four." in llm.tokenizer.decode(script.prompts[1]) and script.prompts[1] == script.prompts[2]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= first["usage"]["total_tokens"] - 1


def test_the_store_is_bounded_and_drops_the_oldest() -> None:
    store = ResponseStore(max_responses=3, max_nbytes=10_000)
    for number in range(5):
        store.keep({"id": f"resp_{number}", "output": []}, (), [{"content": "x"}])
    with pytest.raises(ServerError, match="response_id"):
        store.get("resp_1", "response_id")
    store.keep({"id": "large", "output": []}, (), [{"content": "x" * 9_950}])
    assert store.nbytes <= 10_000 and store.get("large", "response_id")
    store.forget("large", "response_id")
    assert store.nbytes == 0


def test_a_prompt_that_is_too_long_ends_a_stream_with_response_failed_and_a_plain_request_with_400() -> None:
    long = {"model": "scripted", "input": "river " * 600}
    with client_of(scripted_server(scripted_llm([], n_ctx=256))) as client:
        plain = client.post(PATH, json=long)
        streamed = client.post(PATH, json={**long, "stream": True})
    assert plain.status_code == 400 and plain.json()["error"]["code"] == "context_length_exceeded"
    last = events(streamed.text)[-1]
    assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "context_length_exceeded"


def test_counted_tokens_are_those_of_the_answer() -> None:
    body = {"model": "scripted", "input": "Hi", "instructions": "Be brief."}
    with client_of(scripted_server(scripted_llm(["Yes."]))) as client:
        counted = client.post(f"{PATH}/input_tokens", json=body).json()
        answer = client.post(PATH, json=body).json()
    assert counted == {"object": "response.input_tokens", "input_tokens": answer["usage"]["input_tokens"]}

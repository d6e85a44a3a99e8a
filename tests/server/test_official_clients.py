"""The makers' own clients and a suite that checks servers, against a model whose answers are scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from scripted_executor import scripted_llm
from served import served
from server_client import scripted_server
from tool_template import TOOL_TEMPLATE, call_text
from wire_schemas import spec

WEATHER = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
CALL = call_text("get_weather", '{"location": "Paris"}')
THOUGHT = "<think>\nIt was asked before.\n</think>\n\n"


def answer(prompt: str) -> str:
    """A call where there is a tool that nobody called yet, a thought where the prompt wants one."""
    turn = prompt[prompt.rfind("<|im_start|>assistant") :]
    if "get_weather" in prompt and "<tool_response>" not in prompt:
        return "Let me look.\n" + CALL
    return "Hello to you." if "<think>" in turn else f"{THOUGHT}Hello to you."


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(scripted_server(scripted_llm(answer, TOOL_TEMPLATE))) as address:
        yield address


@pytest.mark.parametrize(("kind", "n"), [("open-responses", 12), ("anthropic", 8)])
def test_llm_comply_finds_nothing_to_complain_of(kind: str, n: int) -> None:
    comply = pytest.importorskip("llm_comply.runner", reason="pip install llm-comply==0.5.0")
    from llm_comply.config import ComplianceConfig
    from llm_comply.tests import anthropic, open_responses

    suites = {
        "open-responses": ("openresponses", open_responses.OPEN_RESPONSES_TESTS),
        "anthropic": ("anthropic", anthropic.ANTHROPIC_TESTS),
    }
    name, tests = suites[kind]
    tests = [replace(test, skip_reason=None) for test in tests if "image" not in test.id]
    # Open Responses has other names than OpenAI for the events of reasoning, so nothing is thought here
    llm = scripted_llm(lambda prompt: answer(prompt).removeprefix(THOUGHT), TOOL_TEMPLATE)
    with served(scripted_server(llm)) as url:
        config = ComplianceConfig(base_url=f"{url}/v1", api_key="none", model="scripted")
        results = comply.TestRunner(config, tests, spec(name)).run_all().results
    assert [(result.id, result.errors) for result in results if result.errors] == []
    assert len(results) == n


# -- openai -----------------------------------------------------------------------------------------------------------

RESPONSES_TOOL: Any = {"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": False}


def test_openais_client_runs_the_tool_loop_over_responses(url: str) -> None:
    openai = pytest.importorskip("openai", reason="pip install openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=True)
    talk: list[Any] = [{"role": "user", "content": "How warm is Paris?"}]
    first = client.responses.create(model="scripted", input=talk, tools=[RESPONSES_TOOL])
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert json.loads(call.arguments) == {"location": "Paris"} and first.status == "completed"
    talk += [item.model_dump() for item in first.output]
    talk.append({"type": "function_call_output", "call_id": call.call_id, "output": "3 degrees"})
    second = client.responses.create(model="scripted", input=talk, tools=[RESPONSES_TOOL])
    assert second.output_text == "Hello to you."
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens


def test_openais_client_reads_every_event_of_a_stream(url: str) -> None:
    openai = pytest.importorskip("openai", reason="pip install openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=True)
    with client.responses.stream(model="scripted", input="How warm?", tools=[RESPONSES_TOOL]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.function_call_arguments.delta" in kinds and final.output[-1].type == "function_call"
    counted = client.responses.input_tokens.count(model="scripted", input="How warm?", tools=[RESPONSES_TOOL])
    assert counted.input_tokens == final.usage.input_tokens
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nobody", input="Hi")


# -- anthropic --------------------------------------------------------------------------------------------------------

ANTHROPIC_TOOL: Any = {"name": "get_weather", "description": "Weather.", "input_schema": WEATHER}


def test_anthropics_client_runs_the_tool_loop(url: str) -> None:
    anthropic = pytest.importorskip("anthropic", reason="pip install anthropic")
    client = anthropic.Anthropic(base_url=url, api_key="none", _strict_response_validation=True)
    talk: list[Any] = [{"role": "user", "content": "How warm is Paris?"}]
    ask = {"model": "scripted", "max_tokens": 99, "tools": [ANTHROPIC_TOOL]}
    first = client.messages.create(messages=talk, **ask)
    (call,) = [block for block in first.content if block.type == "tool_use"]
    assert first.stop_reason == "tool_use" and call.input == {"location": "Paris"}
    talk.append({"role": "assistant", "content": [block.model_dump() for block in first.content]})
    talk.append({"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "3"}]})
    second = client.messages.create(messages=talk, **ask)
    assert second.content[-1].text == "Hello to you." and second.stop_reason == "end_turn"
    assert second.usage.cache_read_input_tokens > first.usage.input_tokens
    counted = client.messages.count_tokens(messages=talk, model="scripted", tools=[ANTHROPIC_TOOL])
    assert counted.input_tokens == second.usage.input_tokens + second.usage.cache_read_input_tokens


def test_anthropics_client_reads_every_event_of_a_stream(url: str) -> None:
    anthropic = pytest.importorskip("anthropic", reason="pip install anthropic")
    client = anthropic.Anthropic(base_url=url, api_key="none", _strict_response_validation=True)
    ask: Any = {"model": "scripted", "max_tokens": 99, "thinking": {"type": "adaptive"}}
    with client.messages.stream(messages=[{"role": "user", "content": "Hi"}], **ask) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[0].thinking == "It was asked before." and final.content[0].signature
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert [model.id for model in client.models.list()] == ["scripted"]
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(messages=[{"role": "user", "content": "Hi"}], model="scripted", max_tokens=-1)


# -- ollama -----------------------------------------------------------------------------------------------------------

OLLAMA_TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}


def test_ollamas_client_runs_the_tool_loop(url: str) -> None:
    ollama = pytest.importorskip("ollama", reason="pip install ollama")
    client = ollama.Client(host=url)
    talk: list[Any] = [{"role": "user", "content": "How warm is Paris?"}]
    first = client.chat("scripted", talk, tools=[OLLAMA_TOOL])
    (call,) = first.message.tool_calls
    assert call.function.name == "get_weather" and call.function.arguments == {"location": "Paris"}
    talk += [first.message, {"role": "tool", "tool_name": "get_weather", "content": "3"}]
    parts = list(client.chat("scripted", talk, tools=[OLLAMA_TOOL], stream=True, think=True))
    assert "".join(part.message.content or "" for part in parts) == "Hello to you."
    assert "".join(part.message.thinking or "" for part in parts) == "It was asked before."
    assert parts[-1].done_reason == "stop" and parts[-1].eval_duration > 0


def test_ollamas_client_lists_shows_and_completes(url: str) -> None:
    ollama = pytest.importorskip("ollama", reason="pip install ollama")
    client = ollama.Client(host=url)
    assert [model.model for model in client.list().models] == ["scripted:latest"]
    assert [model.model for model in client.ps().models] == ["scripted:latest"]
    assert client.show("scripted").details.format == "gguf"
    assert client.generate("scripted", "Hi", think=False, options={"temperature": 0}).response == "Hello to you."
    assert client.pull("scripted").status == "success"
    with pytest.raises(ollama.ResponseError, match="embeddings"):
        client.embed("scripted", "Hi")
    with pytest.raises(ollama.ResponseError, match=r"options\.top_k"):
        client.generate("scripted", "Hi", options={"top_k": -7})

    async def asynchronous() -> str:
        stream = await ollama.AsyncClient(host=url).generate("scripted", "Hi", stream=True, think=False)
        return "".join([part.response async for part in stream])

    assert asyncio.run(asynchronous()) == "Hello to you."

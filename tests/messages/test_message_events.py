"""Events from a whole model: tokens, template, scheduler and reader together, over scripted answers."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from typing import Any

import jsonschema
import pytest
from published_templates import source_of
from scripted_executor import scripted_llm

import edgellm
from edgellm.formats.errors import ParameterError, UnsupportedError
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

TEMPLATE = """
{%- if tools %}<|im_start|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking %}<think>
{% endif %}{% endif %}"""
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<unused>"]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 40}}\n</tool_call>'
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}


def model(*answers: Any, **options: Any) -> edgellm.LLM:
    """A model with a template that thinks and calls."""
    return scripted_llm(list(answers), TEMPLATE, control=MARKS, **options)


def add(a: int, b: int = 0) -> int:
    """Adds two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


def kinds(events: list[Event]) -> list[type]:
    """The types of events, repetitions left out."""
    found = [type(event) for event in events]
    return [kind for i, kind in enumerate(found) if not i or found[i - 1] is not kind]


def test_an_answer_comes_as_events_in_order() -> None:
    with model(f"<think>\nHm.\n</think>\n\nLet <unused>me see.\n{CALL}") as llm:
        stream = llm.events("2+40?", tools=[ADD])
        events = list(stream)
        assert kinds(events) == [
            PromptProgress, ReasoningDelta, ContentDelta, ToolCallBegin, ToolCallDelta, ToolCallEnd, Finished,
        ]  # fmt: skip
        last = events[-1]
        assert isinstance(last, Finished) and last == stream.finished
        assert last.reason == "tool_calls" and last.stop == llm.tokenizer.eos_id
        assert last.timings.generation_n == len(stream.message.content.tokens) + 1
        assert 3 <= last.n_reasoning <= 7
        message = stream.message
        assert message.content == "Let me see." and message.reasoning_content == "Hm."
        assert message.content.finish_reason == "stop"
        assert message.tool_calls is not None
        assert json.loads(message.tool_calls[0]["function"]["arguments"]) == {"a": 2, "b": 40}


def test_progress_comes_while_the_prompt_is_read() -> None:
    with model("a", "b", max_tokens_per_step=32) as llm:
        events = list(llm.events("word " * 100))
        done = [event for event in events if isinstance(event, PromptProgress)]
        assert len(done) > 3 and done[-1].done == done[-1].total and done[0].reused == 0
        again = [event for event in llm.events("word " * 100) if isinstance(event, PromptProgress)]
        assert again[0].reused > 0


def test_logprobs_stand_with_their_text() -> None:
    with model("<think>\na b\n</think>\n\nc d") as llm:
        events = list(llm.events("x", logprobs=2))
        for event in events:
            if isinstance(event, ContentDelta | ReasoningDelta):
                assert event.logprobs and event.text.strip() in "".join(known.text for known in event.logprobs)
                assert len(event.logprobs[0].top) == 2


def test_a_call_that_is_cut_off_is_not_executed() -> None:
    ran = []

    def add(a: int, b: int) -> None:
        """Adds."""
        ran.append((a, b))

    for n in range(1, 24):
        with model(CALL) as llm:
            reply = llm.chat("x", tools=[add], max_tokens=n)
            assert reply.content.finish_reason == "length" and not ran
            assert not reply.tool_calls or reply.content.tokens[-1] in llm.tokenizer.encode(
                "}</tool_call>\n", False, True
            )


def test_a_stop_string_ends_an_answer_and_a_cancel_flag_too() -> None:
    with model("one two three", "one two three") as llm:
        stream = llm.events("x", stop=" three")
        assert "".join(event.text for event in stream if isinstance(event, ContentDelta)) == "one two"
        assert stream.finished is not None and stream.finished.stop == " three"
        flag = threading.Event()
        events = []
        for event in llm.events("x", cancel=flag):
            events.append(event)
            flag.set()
        assert isinstance(events[-1], Finished) and events[-1].reason == "cancelled"


def test_reasoning_is_switched_by_the_templates_own_names() -> None:
    with model("so\n</think>\n\nyes", "yes", "yes") as llm:
        reply = llm.chat("x", reasoning=True)
        assert (reply.reasoning_content, reply.content) == ("so", "yes")
        assert llm.chat("x", reasoning=False).content == "yes"
        prompts = [llm.tokenizer.decode(ids, special=True) for ids in llm.executor.script.prompts]
        assert prompts[0].endswith("assistant\n<think>\n") and prompts[1].endswith("assistant\n")
        llm.chat("x", reasoning=False, template_kwargs={"enable_thinking": True})  # a template that always opens one
        last = llm.tokenizer.decode(llm.executor.script.prompts[-1], special=True)
        assert last.endswith("<think>\n\n</think>\n\n")


def test_functions_run_until_the_model_answers() -> None:
    seen: list[Event] = []
    with model(f"Wait.\n{CALL}", f"{CALL}\n{CALL}", "It is 42.") as llm:
        reply = llm.chat("2+40?", tools=[add], on_event=seen.append)
        assert reply.content == "It is 42." and not reply.tool_calls
        assert [step.role for step in reply.steps] == ["assistant", "tool", "assistant", "tool", "tool"]
        assert {step.content for step in reply.steps if step.role == "tool"} == {"42"}
        assert sum(isinstance(event, ToolCallEnd) for event in seen) == 3
        prompt = llm.tokenizer.decode(llm.executor.script.prompts[-1], special=True)
        assert prompt.count('{"name": "add", "arguments": {"a": 2, "b": 40}}') == 3
        assert reply.content.timings.reused_n > 60  # the second round goes on from the first


def test_a_listener_that_fails_ends_the_answer() -> None:
    def fails(event: Event) -> None:
        raise ValueError("no")

    with model("word " * 50) as llm:
        with pytest.raises(ValueError, match="no") as caught:
            llm.chat("x", on_event=fails)
        deadline = time.monotonic() + 30
        while llm.engine.scheduler.requests and time.monotonic() < deadline:
            time.sleep(0.01)
        assert caught.tb is not None and not llm.engine.scheduler.requests  # though the traceback still holds all of it


def test_rounds_have_a_bound() -> None:
    with model(*[CALL] * 4) as llm:
        reply = llm.chat("x", tools=[add], max_rounds=3)
        assert reply.tool_calls and len(reply.steps) == 6
    with model(CALL) as llm:
        reply = llm.chat("x", tools=[add], max_rounds=0)
        assert reply.tool_calls and not reply.steps


def test_a_described_tool_is_for_the_caller() -> None:
    with model(CALL) as llm:
        reply = llm.chat("x", tools=[ADD])
        assert reply.tool_calls and not reply.steps


def test_what_a_tool_raises_is_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgellm.messages.asking.begun_calls", lambda *_, **__: None)  # as without llguidance

    def fails(a: int) -> None:
        """Fails."""
        raise ValueError(f"no {a}")

    calls = [
        ('{"name": "fails", "arguments": {"a": 1}}', "ValueError: no 1"),
        ('{"name": "fails", "arguments": {"a": "1"}}', "TypeError: expected int"),
        ('{"name": "fails", "arguments": {"b": 1}}', "TypeError"),
        ('{"name": "nobody", "arguments": {}}', "There is no tool"),
    ]
    with model(*[f"<tool_call>\n{call}\n</tool_call>" for call, _ in calls], "Sorry.") as llm:
        reply = llm.chat("x", tools=[fails])
        results = [step.content for step in reply.steps if step.role == "tool"]
        for result, (_, expected) in zip(results, calls, strict=True):
            assert expected in json.loads(str(result))["error"]


def test_the_same_to_be_awaited() -> None:
    async def slow(a: int, b: int) -> int:
        await asyncio.sleep(0)
        return a + b

    slow.__name__ = "add"
    with model(f"{CALL}\n{CALL}", "42", "a b c d e f g h") as llm:

        async def steps() -> None:
            reply = await llm.achat("x", tools=[slow])
            assert reply.content == "42" and [step.content for step in reply.steps[1:]] == ["42", "42"]
            async for event in llm.aevents("y"):
                if isinstance(event, ContentDelta):
                    break

        asyncio.run(steps())


def test_where_all_stands_in_channels_that_have_no_calls_tools_are_refused_by_name() -> None:
    channels = "to=self<|message|><|eom|>{{ messages[-1].content }}"
    with scripted_llm(["x"], channels) as llm, pytest.raises(UnsupportedError, match="chat template") as caught:
        llm.events("x", tools=[add])
    assert caught.value.code == "TOOLS"


@pytest.mark.parametrize(
    "options",
    [
        {"tools": "add"},
        {"tools": [5]},
        {"tools": [{"name": 5}]},
        {"tools": [{"name": "a b"}]},
        {"tools": [add, add]},
        {"tools": [ADD], "tool_choice": "sometimes"},
        {"tools": [ADD], "tool_choice": {"name": "nobody"}},
        {"tool_choice": "required"},
        {"tools": [ADD], "parallel_tool_calls": "no"},
        {"reasoning": "much"},
        {"reasoning": -1},
        {"template_kwargs": {"messages": []}},
        {"temperatur": 1},
        {"messages": 5},
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any]) -> None:
    with model("x") as llm, pytest.raises(ParameterError):
        llm.events(**{"messages": "x", **options})


def test_no_call_is_looked_for_when_none_is_wanted() -> None:
    with model(CALL) as llm:
        reply = llm.chat("x", tools=[add], tool_choice="none")
        assert reply.content == CALL and not reply.tool_calls
        assert "tools" not in llm.tokenizer.decode(llm.executor.script.prompts[0], special=True)


# -- calls that are forced ---------------------------------------------------------------------------------------------


def calls_of(llm: edgellm.LLM, **options: Any) -> list[tuple[str, Any]]:
    """The calls of an answer."""
    reply = llm.chat("x", temperature=0, max_tokens=120, **options)
    assert reply.content.finish_reason == "stop", reply.content
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in reply.tool_calls or ()]


def test_a_call_is_forced() -> None:
    pytest.importorskip("llguidance", reason="llguidance keeps the grammar")
    wish = f"I would rather not. {CALL}"
    with model(wish, wish, f"Hm.\n</think>\n\n{wish}") as llm:
        options: dict[str, Any] = {"tools": [ADD, OTHER], "reasoning": False}
        assert calls_of(llm, **options, tool_choice="required")[0] == ("add", {"a": 2, "b": 40})
        assert calls_of(llm, **options, tool_choice={"name": "add"}) == [("add", {"a": 2, "b": 40})]
        reply = llm.chat("x", tools=[ADD], tool_choice="required", reasoning=True, temperature=0)
        assert reply.reasoning_content == "Hm." and reply.tool_calls and reply.content == ""


def test_a_call_that_the_model_begins_is_one_of_the_tools_with_valid_arguments() -> None:
    pytest.importorskip("llguidance", reason="llguidance keeps the grammar")
    strict = {"type": "function", "function": {**ADD["function"], "strict": True}}
    wrong = 'Hm. <tool_call>\n{"name": "add", "arguments": {"a": "two", "c": 1}}\n</tool_call>'
    nobody = '<tool_call>{"name": "nobody", "arguments": 7}</tool_call>'
    for tools in ([ADD], [strict]):
        with model(wrong, nobody, "No call at all, no {json}.") as llm:
            for _ in range(2):
                ((name, arguments),) = calls_of(llm, tools=tools)
                assert name == "add"
                jsonschema.validate(arguments, SCHEMA)
            assert calls_of(llm, tools=tools) == []


def test_what_a_grammar_cannot_keep_of_a_tool_is_refused_where_it_is_strict_and_free_where_not() -> None:
    pytest.importorskip("llguidance", reason="llguidance keeps the grammar")
    many = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}, "required": ["a"]}
    tool = {"name": "many", "parameters": many}
    call = '<tool_call>\n{"name": "many", "arguments": {"a": [1, 1]}}\n</tool_call>'
    with model(call, f"I would rather not. {call}") as llm:
        assert calls_of(llm, tools=[tool, ADD]) == [("many", {"a": [1, 1]})]
        assert calls_of(llm, tools=[tool], tool_choice="required", reasoning=False) == [("many", {"a": [1, 1]})]
        with pytest.raises(UnsupportedError, match="uniqueItems"):
            llm.chat("x", tools=[{**tool, "strict": True}, ADD])


def test_without_a_grammar_calls_are_read_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with scripted_llm([CALL], TEMPLATE, control=(*MARKS, "<a tokenizer of its own>")) as llm:
        assert calls_of(llm, tools=[ADD]) == [("add", {"a": 2, "b": 40})]
        with pytest.raises(UnsupportedError, match="llguidance"):
            llm.chat("x", tools=[ADD], tool_choice="required")


def test_a_strict_tool_of_calls_without_markers() -> None:
    pytest.importorskip("llguidance", reason="llguidance keeps the grammar")
    template = source_of("llama3_2")
    answers = ['{"name": "add", "parameters": {"a": "two"}}', "It is {no} call.", '{"sum": 1}']
    strict = {"type": "function", "function": {**ADD["function"], "strict": True}}
    with scripted_llm(answers, template) as llm:
        ((_, arguments),) = calls_of(llm, tools=[strict])
        jsonschema.validate(arguments, SCHEMA)
        reply = llm.chat("x", tools=[strict], temperature=0)
        assert not reply.tool_calls and reply.content == answers[1]
        assert llm.chat("x", tools=[ADD], temperature=0).content == answers[2]


def test_one_call_alone_where_several_are_not_wanted() -> None:
    pytest.importorskip("llguidance", reason="llguidance keeps the grammar")
    with model(f"{CALL}\n{CALL}", f"{CALL}\n{CALL}", f"{CALL}\n{CALL}") as llm:
        assert len(calls_of(llm, tools=[ADD])) == 2
        assert len(calls_of(llm, tools=[ADD], parallel_tool_calls=False)) == 1
        assert len(calls_of(llm, tools=[ADD], parallel_tool_calls=False, tool_choice="required", reasoning=False)) == 1


ANSWER = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}


@pytest.mark.parametrize("thinks", [True, False, None])
def test_a_form_begins_behind_the_reasoning(thinks: bool | None) -> None:
    pytest.importorskip("llguidance", reason="llguidance keeps the grammar")
    said = {True: "So {it} is.\n</think>\n\n", False: "", None: "<think>\nSo {it} is.\n</think>\n\n"}[thinks]
    with model(f'{said}I say: {{"sum": 42}}') as llm:
        reply = llm.chat("x", response_format=ANSWER, reasoning=thinks, temperature=0, max_tokens=60)
        assert reply.reasoning_content == ("So {it} is." if said else None)
        assert reply.content.parsed == {"sum": 42}


def test_an_answer_in_a_form_may_be_a_call() -> None:
    pytest.importorskip("llguidance", reason="llguidance keeps the grammar")
    with model(CALL, '{"sum": 42}') as llm:
        options: dict[str, Any] = {"response_format": ANSWER, "tools": [ADD], "temperature": 0, "max_tokens": 60}
        assert llm.chat("x", **options).tool_calls
        assert llm.chat("x", **options).content.parsed == {"sum": 42}
        with pytest.raises(ParameterError, match="Ask for one"):
            llm.chat("x", **options, tool_choice="required")


@pytest.mark.parametrize(
    "form", [{"grammar": 'root ::= "sum " [0-9]+'}, {"grammar": 'start: "sum " /[0-9]+/'}, {"regex": "sum [0-9]+"}]
)
def test_a_grammar_begins_behind_the_reasoning(form: dict[str, str]) -> None:
    pytest.importorskip("llguidance", reason="llguidance keeps the grammar")
    with model("So it is.\n</think>\n\nI say: sum 42", "Hm: sum 42", "Hm: sum 42", CALL) as llm:
        reply = llm.chat("x", reasoning=True, temperature=0, max_tokens=60, **form)
        assert (reply.reasoning_content, reply.content) == ("So it is.", "sum 42")
        assert llm.chat("x", reasoning=False, temperature=0, max_tokens=60, **form).content == "sum 42"
        events = [*llm.events("x", reasoning=False, temperature=0, max_tokens=60, **form)]
        assert "".join(event.text for event in events if isinstance(event, ContentDelta)) == "sum 42"
        with pytest.raises(ParameterError, match="forbid"):
            llm.chat("x", tools=[ADD], **form)


def test_a_form_stands_in_the_channel_of_the_answer() -> None:
    pytest.importorskip("llguidance", reason="llguidance keeps the grammar")
    template = source_of("gptoss")
    control = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>", "<|constrain|>")
    thinks = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    said = f"{thinks}<|channel|>final<|message|>I say: "
    answers = [said + '{"sum": 42}', said + "sum 42", said + '{"sum": 42}']
    with scripted_llm(answers, template, control=control) as llm:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 80}
        reply = llm.chat("x", response_format=ANSWER, **options)
        assert (reply.reasoning_content, reply.content.parsed) == ("Hm.", {"sum": 42})
        reply = llm.chat("x", grammar='root ::= "sum " [0-9]+', **options)
        assert (reply.reasoning_content, reply.content) == ("Hm.", "sum 42")
        reply = llm.chat("x", response_format=ANSWER, tools=[ADD], **options)
        assert (reply.reasoning_content, reply.content.parsed) == ("Hm.", {"sum": 42})


GEMMA = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "<|tool>", "<tool|>", "<|tool_call>",
         "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')  # fmt: skip
HM = "<|channel>thought\nHm.\n<channel|>"


@pytest.mark.parametrize("name", ["gemma4", "gemma4_v5", "axolotl_gemma4", "axolotl_gemma4_unified"])
def test_gemma_4_thinks_calls_and_goes_on_in_the_same_turn(name: str) -> None:
    call = "<|tool_call>call:add{a:2,b:40}<tool_call|><|tool_response>"
    opened = "<|channel>thought\n"  # some write it behind what a tool gave

    def answer(prompt: str) -> str:
        said = f"{HM}It is 42.<turn|>" if "<tool_response|>" in prompt else HM + call
        return said.removeprefix(opened) if prompt.endswith(opened) else said

    with scripted_llm(answer, source_of(name), control=GEMMA) as llm:
        assert {llm.tokenizer.token_id(text) for text in ("<turn|>", "<|tool_response>")} < llm.tokenizer.eog_ids
        reply = llm.chat("2+40?", tools=[add], reasoning=True)
        assert (reply.content, reply.reasoning_content) == ("It is 42.", "Hm.")
        first, second = (llm.detokenize(ids, special=True) for ids in llm.executor.script.prompts)
        assert "<|think|>" in first and "declaration:add{" in first and first.endswith("<|turn>model\n")
        assert "call:add{a:2,b:40}<tool_call|><|tool_response>response:add{value:" in second
        assert second.count("<|turn>model") == 1
        assert second.removesuffix(opened).endswith("<tool_response|>")


@pytest.mark.parametrize("name", ["gemma4_v5", "axolotl_gemma4"])
def test_gemma_4_is_read_where_it_thinks_nothing(name: str) -> None:
    answers = ["<|channel>thought\n<channel|>Yes.<turn|>", "Yes.<turn|>", f"{HM}Yes.<turn|>"]
    with scripted_llm(answers, source_of(name), control=GEMMA) as llm:
        replies = [llm.chat("x", reasoning=reasoning) for reasoning in (False, False, True)]
        assert [(reply.content, reply.reasoning_content) for reply in replies] == [
            ("Yes.", None), ("Yes.", None), ("Yes.", "Hm."),
        ]  # fmt: skip


@pytest.mark.parametrize("name", ["gemma4_v5", "axolotl_gemma4"])
def test_gemma_4_ends_a_thought_when_its_tokens_are_spent(name: str) -> None:
    pytest.importorskip("llguidance", reason="llguidance keeps the grammar")
    said = "<|channel>thought\n" + "round it goes " * 20 + '\n<channel|>{"sum": 42}<turn|>'
    options: dict[str, Any] = {"reasoning": 6, "temperature": 0, "max_tokens": 40}
    with scripted_llm([said] * 3, source_of(name), control=GEMMA) as llm:
        for more in ({}, {"tools": [ADD]}, {"response_format": ANSWER}):
            reply = llm.chat("x", **options, **more)
            assert reply.reasoning_content and len(reply.reasoning_content.split()) <= 6, more
            assert reply.content == '{"sum": 42}', more


@pytest.mark.parametrize("opens", [True, False])
def test_reasoning_ends_when_its_tokens_are_spent(opens: bool) -> None:
    endless = "round and round it goes " * 20
    text = endless if opens else f"<think>\n{endless}"
    with model(f"{text}</think> Done.", f"{text}</think> Done.") as llm:
        kwargs = {"enable_thinking": opens}
        reply = llm.chat("x", reasoning=6, template_kwargs=kwargs, temperature=0, max_tokens=40)
        assert reply.reasoning_content is not None and len(reply.reasoning_content.split()) <= 6
        stream = llm.events("x", reasoning=6, template_kwargs=kwargs, temperature=0, max_tokens=40)
        list(stream)
        assert stream.finished is not None and stream.finished.n_reasoning <= 12

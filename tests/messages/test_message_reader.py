"""The reader: a message depends on the text alone, and what cannot be read is text."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from edgellm.messages.built_in import GEMMA_DIALECT, HARMONY, LFM2, THINK, dsml
from edgellm.messages.events import ContentDelta, Event, ReasoningDelta, ToolCallBegin, ToolCallDelta, ToolCallEnd
from edgellm.messages.reader import MessageReader, ReadMessage
from edgellm.messages.shapes import PYTHON, CallForm, Field, Middle, Pair, Shape

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "metric": {"type": "boolean"},
    "more": {"type": "object"},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": PROPERTIES}}}
    for name in ("weather", "time.now")
]
HERMES = CallForm("json", each=Pair("<tool_call>\n", "\n</tool_call>"), between="\n")
CODER = CallForm(
    "tagged",
    each=Pair("<tool_call>\n<function=", "\n</function>\n</tool_call>"),
    head=(Field("name", ">\n"),),
    argument=Pair("<parameter=", "\n</parameter>"),
    middles=(Middle(">\n"),),
)
GLM = CallForm(
    "tagged",
    each=Pair("<tool_call>", "\n</tool_call>"),
    head=(Field("name", ""),),
    argument=Pair("<arg_key>", "</arg_value>"),
    middles=(Middle("</arg_key>\n<arg_value>"),),
)
LLAMA = CallForm("json", keys=("name", "parameters", ""), one=True)
NEMO = CallForm("json", section=Pair("[TOOL_CALLS]", ""), keys=("name", "arguments", "id"), listed=True)
SMALL = CallForm("header", each=Pair("[TOOL_CALLS]", ""), head=(Field("name", "[CALL_ID]"), Field("id", "[ARGS]")))
DEEPSEEK = CallForm(
    "header",
    section=Pair("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    each=Pair("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
    head=(Field("name", "<｜tool▁sep｜>"),),
)
GEMMA = CallForm(
    "header", each=Pair("<|tool_call>call:", "<tool_call|>"), head=(Field("name", ""),), dialect=GEMMA_DIALECT
)
KOELN = {"city": "Köln </tool_call>\n\"'\\ 🦜", "days": -3, "metric": True, "more": {"x": [1, {"y": None}], "z": {}}}
NO_CALL: list[Any] = []

# what is tried -> (form, end of the prompt, answer, (content, reasoning, [(name, arguments)]))
READ: dict[str, tuple[Shape, str, str, tuple[str, str, list[Any]]]] = {
    "plain text with blanks around it": (Shape(), "", " \n Hi <b>\n", (" \n Hi <b>\n", "", NO_CALL)),
    "reasoning, content and calls": (
        Shape(THINK, calls=HERMES),
        "",
        f"<think>\nhm <b>\n</think>\n\nWait.\n\n<tool_call>\n{json.dumps({'name': 'weather', 'arguments': KOELN})}\n"
        '</tool_call>\n<tool_call>{"arguments": {}, "name": "time.now"}</tool_call>\n',
        ("Wait.", "hm <b>", [("weather", KOELN), ("time.now", {})]),
    ),
    "the prompt has opened the reasoning": (
        Shape(THINK, calls=HERMES), "assistant\n<think>\n", "a\n\nb</think>c", ("c", "a\n\nb", NO_CALL),
    ),
    "the prompt has closed the reasoning": (
        Shape(THINK, calls=HERMES), "<think>\n\n</think>\n\n", "c", ("c", "", NO_CALL),
    ),
    "reasoning that never ends": (Shape(THINK), "<think>\n", "a </thin", ("", "a </thin", NO_CALL)),
    "a call ends the reasoning": (
        Shape(THINK, calls=HERMES),
        "<think>",
        'so: <tool_call>{"name": "weather", "arguments": "{\\"days\\": 1}"}</tool_call>',
        ("", "so:", [("weather", {"days": 1})]),
    ),
    "a content that speaks of markers": (
        Shape(THINK, calls=HERMES),
        "",
        "Write <think> first, then <tool_call> and {\"name\"}.\n",
        ("Write <think> first, then <tool_call> and {\"name\"}.\n", "", NO_CALL),
    ),
    "a call behind one that is none": (
        Shape(calls=HERMES),
        "",
        '<tool_call>{"name" <tool_call>{"name": "weather", "arguments": {}}</tool_call> and more',
        ('<tool_call>{"name"and more', "", [("weather", {})]),
    ),
    "tags for each argument": (
        Shape(THINK, calls=CODER),
        "",
        "ok\n<tool_call>\n<function=weather>\n<parameter=city>\n  a </parameter> b\n\n</parameter>\n<parameter=days>\n"
        "3\n</parameter>\n<parameter=metric>\nTrue\n</parameter><parameter=more>\n{'x': [1, \"y\"]}\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call><function=time.now></function></tool_call>",
        ("ok", "", [
            ("weather", {"city": "  a </parameter> b\n", "days": 3, "metric": True, "more": {"x": [1, "y"]}}),
            ("time.now", {}),
        ]),
    ),
    "tags for key and value": (
        Shape(THINK, calls=GLM),
        "",
        "\n<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>3</arg_value>\n<arg_key>days"
        "</arg_key><arg_value>3</arg_value></tool_call><tool_call>time.now\n</tool_call>",
        ("", "", [("weather", {"city": "3", "days": 3}), ("time.now", {})]),
    ),
    "JSON alone": (
        Shape(calls=LLAMA),
        "",
        '\n{"type": "function", "name": "weather", "parameters": {"days": 1.50}}; {"name": "time.now", '
        '"parameters": {}}',
        ("", "", [("weather", {"days": 1.5}), ("time.now", {})]),
    ),
    "JSON that is no call": (
        Shape(calls=LLAMA), "", '{"name": "Bob", "parameters": {}}', ('{"name": "Bob", "parameters": {}}', "", NO_CALL),
    ),
    "JSON with other keys": (
        Shape(calls=LLAMA), "", '{"city": "weather"}', ('{"city": "weather"}', "", NO_CALL),
    ),
    "a list": (
        Shape(calls=NEMO),
        "",
        'Hm[TOOL_CALLS][{"name": "weather", "arguments": {"city": "a"}, "id": "call00001"}, {"name": "time.now", '
        '"arguments": {}, "id": "call00002"}]',
        ("Hm", "", [("weather", {"city": "a"}), ("time.now", {})]),
    ),
    "a head with an id": (
        Shape(calls=SMALL),
        "",
        '[TOOL_CALLS]weather[CALL_ID]call00001[ARGS]{"days": 1}[TOOL_CALLS]time.now[CALL_ID]call00002[ARGS]{}',
        ("", "", [("weather", {"days": 1}), ("time.now", {})]),
    ),
    "a section": (
        Shape(THINK, calls=DEEPSEEK),
        "",
        'C<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "v"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>time.now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ("C", "", [("weather", {"city": "v"}), ("time.now", {})]),
    ),
    "types in the tags": (
        Shape(THINK, calls=dsml("function_calls")),
        "",
        '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">3'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="other" string="false">3</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        ("", "", [("weather", {"city": "3", "other": 3})]),
    ),
    "Python": (
        Shape(calls=LFM2),
        "",
        "<|tool_call_start|>[weather(city='va\"l\\'ue', days=3, metric=True, more={\"x\": [1, None]}), time.now()]"
        "<|tool_call_end|> bye",
        ("bye", "", [
            ("weather", {"city": "va\"l'ue", "days": 3, "metric": True, "more": {"x": [1, None]}}),
            ("time.now", {}),
        ]),
    ),
    "Python without markers": (
        Shape(calls=CallForm("python", listed=True, dialect=PYTHON)),
        "",
        "[weather(days=3)]",
        ("", "", [("weather", {"days": 3})]),
    ),
    "strings in marks of their own": (
        Shape(Pair("<|channel>thought\n", "\n<channel|>"), calls=GEMMA),
        "",
        "<|channel>thought\nR\n<channel|><|tool_call>call:weather{city:<|\"|>a\"b<|\"|>,days:3,more:{x:[1,<|\"|>y<|\"|>]}}"
        "<tool_call|><|tool_call>call:time.now{}<tool_call|>",
        ("", "R", [("weather", {"city": 'a"b', "days": 3, "more": {"x": [1, "y"]}}), ("time.now", {})]),
    ),
    "channels": (
        Shape(channels=HARMONY),
        "<|start|>assistant",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>First<|end|><|start|>"
        'assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "x"}<|call|>',
        ("First", "Hm.", [("weather", {"city": "x"})]),
    ),
    "channels, the recipient first": (
        Shape(channels=HARMONY),
        "<|start|>assistant",
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "x"}',
        ("", "", [("weather", {"city": "x"})]),
    ),
    "channels, the header in the prompt": (
        Shape(channels=HARMONY), "<|start|>assistant<|channel|>final<|message|>", "Hi\n", ("Hi\n", "", NO_CALL),
    ),
    "channels, none of them": (Shape(channels=HARMONY), "<|start|>assistant", "to be <b>", ("to be <b>", "", NO_CALL)),
    "marked content": (
        Shape(Pair("<|S|>", "<|E|>"), Pair("<|R|>", "<|/R|>")), "", "<|S|>a<|E|><|R|>b<|/R|>", ("b", "a", NO_CALL),
    ),
}  # fmt: skip


def read(shape: Shape, prompt: str, pieces: list[str], tools: Any = TOOLS) -> tuple[ReadMessage, list[Event]]:
    """A message and its events."""
    ids = map(str, itertools.count())
    reader = MessageReader(shape, prompt, tools, lambda: next(ids))
    events = [event for piece in pieces for event in reader.add(piece)]
    events += reader.finish()
    return reader.message, events


def result(message: ReadMessage) -> tuple[str, str, list[Any]]:
    """A message in plain values."""
    calls = [(call.name, json.loads(call.arguments)) for call in message.tool_calls]
    return message.content, message.reasoning, calls


def told(events: list[Event]) -> tuple[str, str, list[Any]]:
    """The message that the events tell: calls that never end are left out."""
    content = "".join(event.text for event in events if isinstance(event, ContentDelta))
    reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    names = {event.index: event.name for event in events if isinstance(event, ToolCallBegin)}
    arguments = dict.fromkeys(names, "")
    for event in events:
        if isinstance(event, ToolCallDelta):
            arguments[event.index] += event.arguments
    ended = [event.index for event in events if isinstance(event, ToolCallEnd)]
    return content, reasoning, [(names[index], json.loads(arguments[index])) for index in ended]


@pytest.mark.parametrize("title", READ)
def test_an_answer_is_the_same_message_however_it_is_cut(title: str) -> None:
    shape, prompt, text, expected = READ[title]
    whole, events = read(shape, prompt, [text])
    assert result(whole) == told(events) == expected
    for at in range(len(text) + 1):
        assert read(shape, prompt, [text[:at], text[at:]])[0] == whole, text[:at]
    letters, events = read(shape, prompt, list(text))
    assert letters == whole and told(events) == expected


@pytest.mark.parametrize("title", READ)
def test_a_call_that_is_cut_off_is_none(title: str) -> None:
    shape, prompt, text, (_, _, calls) = READ[title]
    for at in range(len(text)):
        message, events = read(shape, prompt, [text[:at]])
        found = result(message)
        assert found == told(events)
        assert found[2] == calls[: len(found[2])]  # whole ones alone


@pytest.mark.parametrize("title", READ)
def test_what_was_certain_is_never_taken_back(title: str) -> None:
    shape, prompt, text, _ = READ[title]
    reader = MessageReader(shape, prompt, TOOLS)
    content = reasoning = ""
    for letter in text:
        reader.add(letter)
        assert reader.message.content.startswith(content) and reader.message.reasoning.startswith(reasoning)
        content, reasoning = reader.message.content, reader.message.reasoning


def test_without_tools_a_call_is_text() -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    message, _ = read(Shape(calls=HERMES), "", [text], tools=None)
    assert message.content == text and not message.tool_calls


def test_arguments_come_while_they_are_written() -> None:
    reader = MessageReader(Shape(calls=HERMES), "", TOOLS, lambda: "call00001")
    begin = ToolCallBegin(0, "call00001", "weather")
    written = reader.add('<tool_call>{"name": "weather", "arguments": {"city": "Kö')
    assert written == [begin, ToolCallDelta(0, '{"city": "Kö')]
    assert reader.add("ln") == [ToolCallDelta(0, "ln")]


def test_ids_are_those_that_every_template_takes() -> None:
    reader = MessageReader(Shape(calls=HERMES), "", TOOLS)
    reader.add('<tool_call>{"name": "weather", "arguments": {}}</tool_call>' * 2)
    ids = [call.id for call in reader.message.tool_calls]
    assert len(set(ids)) == 2 and all(len(text) == 9 and text.isalnum() for text in ids)


ALPHABET = sorted({piece for shape, *_ in READ.values() for text in shape.texts() for piece in text.split()})
ALPHABET += [
    "weather",
    "city",
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    '"',
    "'",
    ":",
    ",",
    "=",
    "\\",
    "\n",
    " ",
    "1",
    "\\u00",
    "é",
]


def test_no_text_is_an_error() -> None:
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis makes the texts")
    st = hypothesis.strategies
    shapes = [shape for shape, *_ in READ.values()]
    pieces = st.lists(st.one_of(st.sampled_from(ALPHABET), st.text(max_size=3)), max_size=40)

    @hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
    @hypothesis.given(st.sampled_from(shapes), pieces)
    def reads(shape: Shape, text: list[str]) -> None:
        whole, events = read(shape, "", ["".join(text)])
        assert result(whole) == told(events)
        assert read(shape, "", text)[0] == whole

    reads()


@pytest.mark.parametrize("title", READ)
def test_a_damaged_answer_is_read_the_same_however_it_is_cut(title: str) -> None:
    shape, prompt, text, _ = READ[title]
    for at in range(0, len(text), 3):
        for damaged in (text[:at] + text[at + 1 :], text[:at] + '"' + text[at:], text[at:] + text[:at]):
            whole, events = read(shape, prompt, [damaged])
            assert result(whole) == told(events)
            assert read(shape, prompt, list(damaged))[0] == whole, damaged


def test_deep_and_long_values_are_text_or_values() -> None:
    start = '<tool_call>{"name": "weather", "arguments": {"more": '
    for value in ("[" * 100_000, "1" * 100_000, "[" * 59 + "]" * 59):
        message, _ = read(Shape(calls=HERMES), "", [start, value, "}}</tool_call>"])
        assert bool(message.tool_calls) == value.endswith("]")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (r'"\ud83d\ude00"', r'"\ud83d\ude00"'),
        (r'"\ud83d"', r'"\ufffd"'),
        (r'"\ude00\ud83d"', r'"\ufffd\ufffd"'),
        (r'"\uD83Dx\u00e9"', r'"\ufffdx\u00e9"'),
        (r'"\ud83d\ud83d\ude00"', r'"\ufffd\ud83d\ude00"'),
        ("1e308", "1e308"),
        ("9" * 400, "9" * 400),
        ("1e309", None),
        (f"-{'9' * 400}.5", None),
    ],
)
def test_arguments_are_json_that_every_program_reads(written: str, expected: str | None) -> None:
    """No half of a character, which UTF-8 cannot hold, and no number that is infinite elsewhere."""
    text = f'<tool_call>{{"name": "weather", "arguments": {{"city": {written}}}}}</tool_call>'
    message, _ = read(Shape(calls=HERMES), "", [text])
    assert read(Shape(calls=HERMES), "", list(text))[0] == message
    if expected is None:
        assert not message.tool_calls and message.content == text
    else:
        assert [call.arguments for call in message.tool_calls] == [f'{{"city": {expected}}}']

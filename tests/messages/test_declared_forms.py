"""A checkpoint's own ``response_template``: read as transformers reads it, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from published_templates import source_of

from edgellm.chat_template import ChatTemplate
from edgellm.formats.errors import EdgeLLMError
from edgellm.messages.declared import KEY, declared
from edgellm.messages.form import MessageForm
from edgellm.messages.reader import MessageReader

CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "d",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
THINK = {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"}
XML = {"name": "text"}


def template(
    anchor: str, calls: dict[str, Any], close: str, reasoning: dict[str, Any] | None = THINK
) -> dict[str, Any]:
    """A response_template of the usual build."""
    fields: dict[str, Any] = {"reasoning_content": reasoning} if reasoning else {}
    fields |= {"tool_calls": {"repeats": True, **calls}, "content": {"close_pattern": close, "content": "text"}}
    return {"defaults": {"role": "assistant"}, "start_anchor": anchor, "fields": fields}


# family -> (what it declares, published template, answers)
DECLARED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "hermes": (
        template(
            "<|im_start|>assistant\n",
            {
                "open": "<tool_call>",
                "close_pattern": r"</tool_call>\s*",
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            r"<\|im_end\|>\s*",
        ),
        "qwen3",
        [
            "Hello.",
            "<think>\nHm.\n</think>\n\nHello <b>.",
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "K\\u00f6ln", "days": 3}}\n</tool_call>',
            '<think>\n\n</think>\n\nLook.\n<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "</think>"}}\n</tool_call>',
        ],
    ),
    "tags": (
        template(
            "<|im_start|>assistant\n",
            {
                "open_pattern": r"<tool_call>\s*<function=(?P<name>[^\n>]+)>",
                "close_pattern": r"</tool_call>\s*",
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>",
                    "value_parser": XML,
                },
                "transform": CALL,
            },
            r"<\|im_end\|>\s*",
        ),
        "qwen3_5_think",
        [
            "<think>\nHm.\n</think>\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\na\nb\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
            "So\n<tool_call>\n<function=get_weather>\n</function>\n</tool_call>",
        ],
    ),
    "keys and values": (
        template(
            "<|assistant|>",
            {
                "open_pattern": r"<tool_call>(?P<name>\S+)\n?",
                "close_pattern": r"</tool_call>\s*",
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<arg_key>(?P<key>[^<]+)</arg_key>\s*\n<arg_value>(?P<value>.*?)</arg_value>",
                    "value_parser": XML,
                },
                "transform": CALL,
            },
            r"<\|user\|>\s*|$",
        ),
        "glm4moe",
        [
            "\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>a b</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        ],
    ),
    "JSON alone": (
        template(
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            {
                "open_pattern": r'\{"name":\s*"(?P<name>[^"]+)",\s*"parameters":\s*',
                "close_pattern": r"\}<\|eot_id\|>\s*",
                "content": "json",
                "transform": CALL,
            },
            r"<\|eot_id\|>\s*",
            reasoning=None,
        ),
        "llama3_1",
        ["Hello.", '{"name": "get_weather", "parameters": {"city": "a", "days": 3}}<|eot_id|>'],
    ),
    "strings in marks of their own": (
        template(
            "<|turn>model\n",
            {
                "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
                "close_pattern": r"<tool_call\|>\s*",
                "content": "json",
                "content_args": {"string_delims": [['<|"|>', '<|"|>']], "unquoted_keys": True},
                "transform": CALL,
            },
            r"(?:<turn\|>|<\|tool_response>|<eos>)\s*|$",
            reasoning={"open": "<|channel>thought\n", "close_pattern": r"<channel\|>\s*", "content": "text"},
        ),
        "gemma4_v5",
        [
            '<|channel>thought\nHm.\n<channel|><|tool_call>call:get_weather{city:<|"|>a"b<|"|>,days:3}<tool_call|>',
            '<|tool_call>call:get_weather{}<tool_call|><|tool_call>call:get_weather{days:1}<tool_call|>',
        ],
    ),
}  # fmt: skip


def read(form: MessageForm, text: str) -> dict[str, Any]:
    """An answer as transformers gives it."""
    reader = MessageReader(form, "", TOOLS)
    reader.add(text)
    reader.finish()
    message = reader.message
    calls = [
        {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
        for call in message.tool_calls
    ]
    found = {"content": message.content.strip(), "reasoning_content": message.reasoning, "tool_calls": calls}
    return {"role": "assistant"} | {key: value for key, value in found.items() if value}


@pytest.mark.parametrize("family", DECLARED)
def test_an_answer_is_read_as_transformers_reads_it(family: str) -> None:
    parsing = pytest.importorskip("transformers.utils.chat_parsing", reason="transformers judges the message")
    declaration, name, answers = DECLARED[family]
    source = ChatTemplate(source_of(name), bos_token="<s>", eos_token="</s>")
    form = MessageForm.of(source, None, {KEY: json.dumps(declaration)})
    assert form.source == "declared"
    others = MessageForm.of(source)
    for text in answers:
        expected = parsing.parse_response(text, declaration, prefix="", tools=TOOLS)
        assert read(form, text) == expected, text
        assert read(others, text.removesuffix("<|eot_id|>")) == expected, text  # what is derived says the same


def test_reasoning_that_the_prompt_opens_is_known_by_its_end() -> None:
    declaration, _, _ = DECLARED["tags"]
    fields = declaration["fields"]
    zero_width = {"open_pattern": r"(?=[\s\S]*?</think>)", "close_pattern": r"</think>\s*", "content": "text"}
    shape = declared({**declaration, "fields": {**fields, "reasoning_content": zero_width}})
    assert shape.reasoning == ("<think>", "</think>\n")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"fields": []},
        {"fields": {"other": {}}},
        {"fields": {"content": {"open": "<x>"}}},
        {"fields": {"tool_calls": {"open_pattern": r"(?P<name>\w+)\((?=x)", "content": "json", "transform": CALL}}},
        {"fields": {"tool_calls": {"open": "<x>", "close": "</x>", "content": "kv-lines"}}},
        {"fields": {"tool_calls": {"open_pattern": "(" * 3000, "content": "json", "transform": CALL}}},
        {"fields": {"tool_calls": {"open_pattern": "(?P<name>" + "[a]" * 600, "content": "json", "transform": CALL}}},
        {"fields": {"reasoning": {"open_pattern": "(?=.*x)", "close": "x"}}},
    ],
)
def test_what_markers_cannot_say_is_refused_and_found_another_way(change: dict[str, Any]) -> None:
    declaration = {**DECLARED["hermes"][0], **change}
    with pytest.raises(EdgeLLMError, match="response_template"):
        declared(declaration)
    form = MessageForm.of(ChatTemplate(source_of("qwen3")), None, {KEY: json.dumps(declaration)})
    assert form.source == "derived"


def test_a_damaged_declaration_is_left_aside() -> None:
    for text in ("{", "[]", '"x"', "{" * 100_000):
        assert MessageForm.of(ChatTemplate(source_of("qwen3")), None, {KEY: text}).source == "derived"

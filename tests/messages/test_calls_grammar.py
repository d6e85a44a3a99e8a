"""The grammar of a form: a model that would rather talk is made to call as its template writes it."""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import Any

import jsonschema
import pytest
from published_templates import source_of
from scripted_executor import scripted_llm
from test_message_forms import CALLING, FAMILIES, HEAD, TAIL, TOKENS, written

from edgellm.chat_template import ChatTemplate
from edgellm.formats.errors import ParameterError, TemplateError, UnsupportedError
from edgellm.messages.call_masks import begun_calls
from edgellm.messages.form import MessageForm
from edgellm.messages.probes import tags
from edgellm.messages.reader import MessageReader

pytest.importorskip("llguidance", reason="llguidance keeps the grammar")

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    "metric": {"type": "boolean"},
    "more": {"type": "object"},
    "list": {"type": "array", "items": {"type": "integer"}},
}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": ["city", "metric"], "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "noop", "description": "d", "parameters": {"type": "object"}}},
]
ALL = {
    "city": 'Köln "x" <b> 日本',
    "days": -3,
    "unit": "celsius",
    "metric": True,
    "more": {"a": [1, {"b": None}]},
    "list": [1],
}
FEW = {"city": "Rome", "metric": False}
# a template that shows the model no tools, and one that writes calls in another way than its model
NOT_FORCED = ("deepseekv3", "axolotl_llama4")
SOURCES = {**dict.fromkeys(CALLING), **{name: HEAD + text + TAIL for name, text in FAMILIES.items()}}


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A message with one call."""
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


def marks(form: MessageForm) -> list[str]:
    """The tags among the markers of a form: in vocabularies they are tokens of their own."""
    found = [tag for text in form.texts() for tag in tags(text) if len(tag) > 2 and tag[0] in "<[" and tag[-1] in ">]"]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("special", [True, False], ids=["tokens of their own", "plain text"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_call_is_forced_in_the_form_of_the_template(name: str, special: bool) -> None:
    if name in NOT_FORCED or (
        name in ("deepseek 3.2", "kimi k3") and not special
    ):  # the script's tokens are not those forced
        pytest.skip("the script cannot say what this grammar wants")
    source = SOURCES[name] or source_of(name)
    template = ChatTemplate(source, **TOKENS)
    form = MessageForm.of(template)
    answers = [written(template, call("get_weather", arguments)) for arguments in (ALL, FEW)]
    answers.append(written(template, call("noop", {})))
    assert None not in answers
    texts = [answer[1] for answer in answers if answer is not None]
    with scripted_llm(
        [f"I would rather talk. {text}" for text in texts], source, control=marks(form) if special else ()
    ) as llm:
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 250, "reasoning": False, "tools": TOOLS}
        for arguments in (ALL, FEW):
            (found,) = llm.chat("x", tool_choice={"name": "get_weather"}, **options).tool_calls
            assert found["function"]["name"] == "get_weather"
            assert json.loads(found["function"]["arguments"]) == arguments
        (found,) = llm.chat("x", tool_choice={"name": "noop"}, **options).tool_calls
        assert found["function"] == {"name": "noop", "arguments": "{}"}


STRICT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "pattern": "^[A-Z]{2}(/|-)[0-9]$", "description": "d"},
        "note": {"type": "string", "minLength": 2, "maxLength": 5},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "unit": {"type": "string", "enum": ["celsius", "it's"]},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "limit": {"anyOf": [{"type": "integer", "minimum": 30}, {"type": "null"}]},
        "list": {"type": "array", "items": {"type": "integer", "maximum": 5}, "minItems": 1, "maxItems": 3},
        "kind": {"$ref": "#/$defs/kind"},
        "more": {
            "type": "object",
            "properties": {"a": {"type": "number", "maximum": 2}, "b": {"$ref": "#/$defs/kind"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
    "required": ["code", "days", "list", "more"],
    "additionalProperties": False,
    "$defs": {"kind": {"type": "string", "enum": ["x", "y"]}},
}
STRICT_TOOL = {"type": "function", "function": {"name": "keep", "strict": True, "parameters": STRICT_SCHEMA}}


@pytest.mark.parametrize("tools", [TOOLS, [STRICT_TOOL]], ids=["plain", "strict"])
@pytest.mark.parametrize("name", SOURCES)
def test_whatever_a_grammar_lets_through_is_a_call_that_keeps_the_schema(name: str, tools: list[Any]) -> None:
    """Tokens drawn at random, those that end something before others."""
    from edgellm.messages.calls_grammar import CallsGrammar
    from edgellm.structured import compile_grammar

    source = SOURCES[name] or source_of(name)
    form = MessageForm.of(ChatTemplate(source, **TOKENS))
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    with scripted_llm([], source, control=marks(form)) as llm:
        tokenizer = llm.tokenizer
        grammar = compile_grammar(tokenizer, lark=CallsGrammar(tokenizer, form, tools, parallel=False).text)
        ended = 0
        for seed in range(6):
            ids = walk(grammar.constraint(), tokenizer, seed)
            if ids is None:
                continue
            ended += 1
            reader = MessageReader(form, "<|start|>assistant" if form.channels else "", tools)
            reader.add(tokenizer.decode(ids, special=True))
            reader.finish()
            (found,) = reader.message.tool_calls
            assert not reader.message.content.strip()
            jsonschema.validate(json.loads(found.arguments), schemas[found.name])
        assert ended


# what only JSON can say -> the part that the error names
NOT_KEPT: dict[str, dict[str, Any]] = {
    "oneOf": {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]},
    "maxLength": {"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}]},
    "pattern": {"type": "string", "pattern": "^a|b$"},
    "format": {"type": "string", "format": "date"},
}


@pytest.mark.parametrize("name", ["qwen3_5_think", "glm4moe", "gemma4", "lfm2_v2"])
def test_what_a_form_cannot_keep_of_a_strict_tool_is_refused_by_name(name: str) -> None:
    from edgellm.messages.calls_grammar import CallsGrammar

    form = MessageForm.of(ChatTemplate(source_of(name), **TOKENS))
    with scripted_llm([], source_of(name), control=marks(form)) as llm:
        for part, schema in NOT_KEPT.items():
            if part == "maxLength" and name in ("gemma4", "lfm2_v2"):  # their strings have quotes
                continue
            for strict in (True, False):
                function = {"name": "f", "strict": strict, "parameters": {"properties": {"x": schema}}}
                tools = [{"type": "function", "function": function}]
                if not strict:
                    assert CallsGrammar(llm.tokenizer, form, tools).text
                    continue
                with pytest.raises(UnsupportedError, match=part):
                    CallsGrammar(llm.tokenizer, form, tools)
        function = {"name": "f", "strict": True, "parameters": {"minProperties": 1, "properties": {"x": {}}}}
        with pytest.raises(UnsupportedError, match="minProperties"):
            CallsGrammar(llm.tokenizer, form, [{"type": "function", "function": function}])


CIRCLE = {"$ref": "#/$defs/a"}
HOSTILE: list[Any] = [
    {"properties": 7},
    {"properties": {"x": {"enum": 3, "anyOf": 1, "type": 9}}},
    {"properties": {"x": {"items": [], "minItems": "1", "type": "array"}}, "required": True},
    {"properties": {"x": {"type": "string"}}, "required": [["x"], {}]},
    {"properties": {"x": {"type": "object", "properties": {"y": {}}, "required": [{}]}}},
    {"properties": {"x": CIRCLE}, "$defs": {"a": CIRCLE}},
    {"properties": {"x": CIRCLE}, "$defs": {"a": {"anyOf": [CIRCLE, CIRCLE]}}},
    {"properties": {"x": CIRCLE}, "$defs": {"a": {"type": "object", "properties": {"a": CIRCLE, "b": CIRCLE}}}},
    {"properties": {"x": {"type": "string", "pattern": "(" * 50}}},
    {"properties": {"x": {"type": "string", "maxLength": 10**9}}},
    {"properties": {f"x{n}": {"type": "string"} for n in range(600)}},
]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "gemma4", "lfm2_v2", "devstral"])
def test_no_description_of_a_tool_takes_the_answer_along(name: str) -> None:
    source = SOURCES[name] or source_of(name)
    form = MessageForm.of(ChatTemplate(source, **TOKENS))
    n = 0
    with scripted_llm(lambda prompt: "Yes.", source, control=marks(form)) as llm:
        for schema in HOSTILE:
            tool = {"name": "hostile", "parameters": schema}
            with contextlib.suppress(TemplateError):  # some templates look into it, too
                assert (
                    llm.chat("x", tools=[tool, TOOLS[0]], reasoning=False, temperature=0, max_tokens=9).content
                    == "Yes."
                )
                n += 1
    assert n >= 4


def test_a_strict_tool_whose_schema_is_none_is_refused_by_name() -> None:
    form = MessageForm.of(ChatTemplate(source_of("qwen3"), **TOKENS))
    tool = {"name": "hostile", "strict": True, "parameters": {"properties": {"x": {}}, "required": [["x"]]}}
    with (
        scripted_llm([], source_of("qwen3"), control=marks(form)) as llm,
        pytest.raises(ParameterError, match="hostile"),
    ):
        begun_calls(llm.tokenizer, form, [{"type": "function", "function": tool}], parallel=True)


def walk(mask: Any, tokenizer: Any, seed: int) -> list[int] | None:
    """Tokens that a mask lets through; None where no end is found."""
    import numpy as np

    rng = np.random.default_rng(seed)
    closing = [tokenizer.encode(text, False)[0] for text in ('"', "'", "}", "]", ")", "\n", "</", ",", "a")]
    ids: list[int] = []
    for _ in itertools.repeat(None, 200):
        if mask.complete:
            return ids
        allowed = np.flatnonzero(mask.allowed().flags)
        few = [token for token in allowed if token in tokenizer.mark_ids and token not in tokenizer.eog_ids]
        few = few or [token for token in closing if token in allowed] or list(allowed)
        if set(allowed) & tokenizer.eog_ids:
            return ids
        token = int(rng.choice(few if len(allowed) > 3 else allowed))
        mask.accept(token)
        ids.append(token)
    return None

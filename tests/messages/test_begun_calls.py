"""A call that the model begins by itself: whatever its template writes of a valid one may be said."""

from __future__ import annotations

import json
from typing import Any

import pytest
from published_templates import source_of
from scripted_executor import scripted_llm
from test_calls_grammar import ALL, FEW, SOURCES, TOOLS, call, marks
from test_message_forms import TOKENS, written

from edgellm.chat_template import ChatTemplate
from edgellm.formats.errors import UnsupportedError
from edgellm.messages.call_masks import begun_calls, forced_calls
from edgellm.messages.form import MessageForm
from edgellm.messages.reader import MessageReader
from edgellm.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="llguidance keeps the grammar")


def tool(schema: dict[str, Any], *, strict: bool = False, name: str = "f") -> dict[str, Any]:
    """A tool."""
    return {"type": "function", "function": {"name": name, "description": "d", "strict": strict, "parameters": schema}}


def not_let_through(tokenizer: Tokenizer, mask: Any, text: str) -> str:
    """What a mask forbids of a text, in whatever tokens it is said; "" where all of it may come."""
    said, pieces = "", [tokenizer.token_bytes(token) for token in range(tokenizer.n_vocab)]
    ids = {piece: token for token, piece in enumerate(pieces) if token not in tokenizer.mark_ids}
    parts: list[int | bytes] = []
    for token in tokenizer.encode(text, False, parse_special=True):
        if token in tokenizer.mark_ids:
            parts.append(token)
        elif parts and isinstance(parts[-1], bytes):
            parts[-1] += pieces[token]
        else:
            parts.append(pieces[token])
    for part in parts:
        while part != b"":
            allowed = mask.allowed()
            if isinstance(part, int):
                fitting = [part]
            else:
                fitting = [ids[part[:n]] for n in range(1, min(len(part), 24) + 1) if part[:n] in ids]
            fitting = [token for token in fitting if allowed is None or allowed.flags[token]]
            if not fitting:
                return text[len(said) :] or repr(part)
            token = max(fitting, key=lambda token: len(pieces[token]))
            mask.accept(token)
            said += tokenizer.token_bytes(token).decode("utf-8", "replace")
            part = b"" if isinstance(part, int) else part[len(pieces[token]) :]
    return ""


A = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
B = {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]}
# kinds of schemas of all arguments -> arguments that they allow
ROOTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a reference": ({"$ref": "#/$defs/A", "$defs": {"A": A}}, {"a": 1}),
    "a reference to a reference": ({"$ref": "#/$defs/B", "$defs": {"A": A, "B": {"$ref": "#/$defs/A"}}}, {"a": 1}),
    "a reference beside properties": ({"$ref": "#/$defs/A", "$defs": {"A": A}, "properties": {"c": {}}}, {"a": 1}),
    "anyOf": ({"type": "object", "anyOf": [A, B]}, {"b": "x"}),
    "oneOf": ({"type": "object", "oneOf": [A, B]}, {"a": 1}),
    "allOf": ({"type": "object", "allOf": [A, B]}, {"a": 1, "b": "x"}),
    "patternProperties": ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, {"x1": 1}),
    "additionalProperties": ({"type": "object", "additionalProperties": {"type": "string"}}, {"a": "1"}),
    "additionalProperties true": ({**B, "additionalProperties": True}, {"b": "x", "c": {"d": 1}}),
    "a required one that is not described": (
        {"properties": {}, "required": ["a"], "additionalProperties": {}},
        {"a": 1},
    ),
}
FORMS = ("qwen3", "qwen3_5_think", "glm4moe", "gemma4", "lfm2_v2", "kimi k3", "deepseek 3.2", "minicpm 5", "devstral")


@pytest.mark.parametrize("name", FORMS)
def test_a_call_of_every_kind_of_schema_may_be_written(name: str) -> None:
    source = SOURCES[name] or source_of(name)
    template = ChatTemplate(source, **TOKENS)
    form = MessageForm.of(template)
    forbidden = {}
    with scripted_llm([], source, control=marks(form)) as llm:
        for kind, (schema, arguments) in ROOTS.items():
            found = written(template, call("f", arguments))
            assert found is not None
            grammar = begun_calls(llm.tokenizer, form, [tool(schema)], parallel=True)
            rest = grammar and not_let_through(llm.tokenizer, grammar.constraint(), found[1])
            if rest:
                forbidden[kind] = rest
    assert not forbidden


@pytest.mark.parametrize("name", ["qwen3_5_think", "gemma4", "lfm2_v2", "kimi k3"])
def test_a_kind_of_schema_that_a_form_cannot_keep_of_a_strict_tool_is_refused_by_name(name: str) -> None:
    source = SOURCES[name] or source_of(name)
    form = MessageForm.of(ChatTemplate(source, **TOKENS))
    with scripted_llm([], source, control=marks(form)) as llm:
        for kind in ("anyOf", "oneOf", "allOf", "patternProperties", "additionalProperties"):
            with pytest.raises(UnsupportedError, match=f"f is strict.*{kind}"):
                begun_calls(llm.tokenizer, form, [tool(ROOTS[kind][0], strict=True)], parallel=True)
        assert begun_calls(llm.tokenizer, form, [tool(ROOTS["a reference"][0], strict=True)], parallel=True)


@pytest.mark.parametrize("strict", [False, True])
def test_texts_of_python_calls_may_stand_in_either_quotes(strict: bool) -> None:
    form = MessageForm.of(ChatTemplate(source_of("lfm2_v2"), **TOKENS))
    code = {"type": "string", "pattern": "^[A-Z]{3}$"}
    properties = {"a": {"type": "string"}, "b": {"enum": ["it's", "x"]}, "c": code}
    schema = {"properties": properties, "required": list(properties), "additionalProperties": False}
    tools = [tool(schema, strict=strict)]
    with scripted_llm([], source_of("lfm2_v2"), control=marks(form)) as llm:
        begun, forced = (make(llm.tokenizer, form, tools, parallel=True) for make in (begun_calls, forced_calls))
        assert begun is not None
        for a, b in (("'q\\'q\"'", "'it\\'s'"), ('"q\'q\\""', '"it\'s"')):
            for c in ("'ABC'", '"ABC"'):
                text = f"<|tool_call_start|>[f(a={a}, b={b}, c={c})]<|tool_call_end|>"
                reader = MessageReader(form, "", tools)
                reader.add(text)
                reader.finish()
                (read,) = reader.message.tool_calls
                assert json.loads(read.arguments) == {"a": "q'q\"", "b": "it's", "c": "ABC"}
                for grammar in (begun, forced):
                    assert not not_let_through(llm.tokenizer, grammar.constraint(), text), text
        wrong = "<|tool_call_start|>[f(a='x\")]<|tool_call_end|>"
        assert not_let_through(llm.tokenizer, forced.constraint(), wrong)


def calls(*arguments: dict[str, Any]) -> dict[str, Any]:
    """A message with several calls."""
    several = [call("get_weather", one)["tool_calls"][0] for one in arguments]
    return {**call("get_weather", {}), "tool_calls": [{**one, "id": f"call0000{n}"} for n, one in enumerate(several)]}


# what is said behind a marker in other blanks than the template's
RELAXED = {
    "minimax m1": '<tool_calls>\n{"name": "noop", "arguments": {}}\n{"name": "noop", "arguments": {}}\n</tool_calls>',
    "minimax m2": '<minimax:tool_call>\n<invoke name="noop">\n</invoke>\n</minimax:tool_call>',
    "axolotl_jamba": '<tool_calls>[{"name": "noop", "arguments": {}},\n{"name": "noop", "arguments": {}}]</tool_calls>',
    "axolotl_command_a_tool_use": '<|START_ACTION|>[{"tool_name": "noop", "parameters": {}}]<|END_ACTION|>',
    "apriel": '<tool_calls>[{"name": "noop", "arguments": {}}]</tool_calls>',
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_a_template_writes_of_calls_may_be_said(name: str) -> None:
    """One with all arguments, one without any, two at once; with ids where the template shows them."""
    source = SOURCES[name] or source_of(name)
    template = ChatTemplate(source, **TOKENS)
    form = MessageForm.of(template)
    messages = [call("get_weather", ALL), call("noop", {}), calls(FEW, {"city": "X", "days": 1, "metric": True})]
    texts = [found[1] for message in messages if (found := written(template, message)) is not None]
    assert len(texts) >= 2
    with scripted_llm([], source, control=marks(form)) as llm:
        if (grammar := begun_calls(llm.tokenizer, form, TOOLS, parallel=True)) is None:
            return
        for text in [*texts, *([RELAXED[name]] if name in RELAXED else [])]:
            assert not not_let_through(llm.tokenizer, grammar.constraint(), text), text


FUNCTIONARY = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}>>>all\n<|start_header_id|>{{ messages[-1].content }}"
)


@pytest.mark.parametrize(("strict", "parallel"), [(True, True), (True, False), (False, False)])
def test_a_model_that_no_marker_announces_calls_of_may_answer(strict: bool, parallel: bool) -> None:
    form = MessageForm.of(ChatTemplate(FUNCTIONARY))
    known = tool({**A, "additionalProperties": False}, strict=strict)
    with scripted_llm([], FUNCTIONARY) as llm:
        grammar = begun_calls(llm.tokenizer, form, [known], parallel=parallel)
        assert grammar is not None
        for text in ("all\nHello > there.", 'f\n{"a": 1}', 'all\nWait.\n>>>f\n{"a": 1}'):
            assert not not_let_through(llm.tokenizer, grammar.constraint(), text), text
        assert not_let_through(llm.tokenizer, grammar.constraint(), 'all\nWait.>>>f\n{"b": 1}')
        both = 'f\n{"a": 1}>>>f\n{"a": 2}'
        assert bool(not_let_through(llm.tokenizer, grammar.constraint(), both)) is not parallel


# kinds of schemas of one argument -> values that they allow
VALUES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "nullable": ({"type": "object", "nullable": True, "properties": {"x": {"type": "integer"}}}, [{"x": 1}, None]),
    "allOf": ({"allOf": [{"$ref": "#/$defs/A"}], "description": "d"}, [{"a": 1}]),
    "no type": ({"description": "any"}, [{"a": 1}, [1], "x", 1.5, True, None]),
    "enum without a type": ({"enum": [1, 2]}, [1, 2]),
    "enum of several types": ({"enum": ["x", 1, None]}, ["x", 1, None]),
    "const without a type": ({"const": 3}, [3]),
    "a type beside a union": (
        {"type": "object", "properties": {"x": {}}, "anyOf": [{"required": ["x"]}, {"required": ["y"]}]},
        [{"x": 1}],
    ),
    "a union": ({"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]}, [1, "x", None]),
    "types": ({"type": ["array", "boolean"]}, [[1], True]),
}


@pytest.mark.parametrize("name", ["qwen3_5_think", "glm4moe", "gemma4", "kimi k3", "deepseek 3.2"])
def test_a_value_of_every_kind_of_schema_may_be_written(name: str) -> None:
    source = SOURCES[name] or source_of(name)
    template = ChatTemplate(source, **TOKENS)
    form = MessageForm.of(template)
    forbidden = {}
    with scripted_llm([], source, control=marks(form)) as llm:
        for kind, (schema, values) in VALUES.items():
            root = {"type": "object", "properties": {"p": schema}, "$defs": {"A": A}}
            grammar = begun_calls(llm.tokenizer, form, [tool(root)], parallel=True)
            for value in values:
                found = written(template, call("f", {"p": value}))
                assert found is not None and grammar is not None
                if rest := not_let_through(llm.tokenizer, grammar.constraint(), found[1]):
                    forbidden[f"{kind}: {value}"] = rest
    assert not forbidden


# what gpt-oss may say and may not, where f is strict
HARMONY = (
    '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
    ' to=functions.f<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>',
    ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
    '<|channel|>analysis to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
    "<|channel|>analysis<|message|>Is to=functions.g right?<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
    "<|channel|>analysis<|message|>Is to=functions.g right?<|end|><|start|>assistant to=functions.f"
    '<|channel|>commentary <|constrain|>json<|message|>{"a": 1}<|call|>',
)
HARMONY_TEXTS = (
    "<|channel|>final<|message|>Write to=functions.f <b> and so on.<|return|>",
    "<|channel|>analysis<|message|>Not to=functions.<|end|><|start|>assistant<|channel|>final<|message|>No.<|return|>",
)


def test_every_header_of_a_call_of_gpt_oss_is_kept_to_the_schema() -> None:
    source = source_of("gptoss")
    form = MessageForm.of(ChatTemplate(source, **TOKENS))
    with scripted_llm([], source, control=[*marks(form), "<|constrain|>"]) as llm:
        known = tool({**A, "additionalProperties": False}, strict=True)
        grammar = begun_calls(llm.tokenizer, form, [known], parallel=True)
        assert grammar is not None
        for text in (*HARMONY, *HARMONY_TEXTS):
            ends = ("<|call|>", "<|return|>")
            said = text.removesuffix(ends[0]).removesuffix(ends[1])
            assert not not_let_through(llm.tokenizer, grammar.constraint(), said), text
        for text in HARMONY:
            assert not_let_through(llm.tokenizer, grammar.constraint(), text.replace('"a"', '"b"')), text
            assert not_let_through(llm.tokenizer, grammar.constraint(), text.replace("functions.f", "functions.fg")), (
                text
            )

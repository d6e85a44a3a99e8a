"""The grammar of a form: a model that would rather talk is made to call as its template writes it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import jsonschema
import pytest
from published_templates import source_of
from scripted_executor import scripted_llm
from test_message_forms import CALLING, FAMILIES, HEAD, TAIL, TOKENS, written

from edgellm.chat_template import ChatTemplate
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
    if name in NOT_FORCED or (name == "deepseek 3.2" and not special):  # the script's tokens are not those forced
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


@pytest.mark.parametrize("name", SOURCES)
def test_whatever_a_grammar_lets_through_is_a_call_that_keeps_the_schema(name: str) -> None:
    """Tokens drawn at random, those that end something before others."""
    from edgellm.messages.calls_grammar import CallsGrammar
    from edgellm.structured import compile_grammar

    source = SOURCES[name] or source_of(name)
    form = MessageForm.of(ChatTemplate(source, **TOKENS))
    with scripted_llm([], source, control=marks(form)) as llm:
        tokenizer = llm.tokenizer
        grammar = compile_grammar(tokenizer, lark=CallsGrammar(tokenizer, form, TOOLS, parallel=False).text)
        ended = 0
        for seed in range(6):
            ids = walk(grammar.constraint(), tokenizer, seed)
            if ids is None:
                continue
            ended += 1
            reader = MessageReader(form, "<|start|>assistant" if form.channels else "", TOOLS)
            reader.add(tokenizer.decode(ids, special=True))
            reader.finish()
            (found,) = reader.message.tool_calls
            assert not reader.message.content.strip()
            if found.name == "get_weather":
                jsonschema.validate(json.loads(found.arguments), SCHEMA)
        assert ended


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

"""Tools for models whose template shows none: all of it is said in plain text.

The tools and how to call them stand in the turn of the system, or before the first one of a user where a template takes
no system; calls stand in the text of an answer between tags, and results are turns of a user. The reader and the
grammar of calls are those of every other form. Whether a model that was not trained for it calls by itself is another
matter; where a call is forced, its grammar sees to it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

from edgellm.chat_template import Message
from edgellm.chat_template.content import check_parts, joined
from edgellm.formats.errors import ParameterError, TemplateError
from edgellm.messages.form import MessageForm
from edgellm.messages.probes import CONTENT, USER, Template
from edgellm.messages.shapes import CallForm, Pair
from edgellm.messages.tools import as_tools

CALLS = CallForm("json", each=Pair("<tool_call>\n", "\n</tool_call>"), between="\n")
RESULT = Pair("<tool_response>\n", "\n</tool_response>")
RESULT_ROLES = ("tool", "function")
INSTRUCTIONS = """\
# Tools

You may call these functions, each described in a line of JSON:
<tools>
{tools}
</tools>

To call one, write its name and arguments as JSON between two tags:
<tool_call>
{{"name": NAME, "arguments": {{KEY: VALUE}}}}
</tool_call>
What it returns comes between <tool_response> and </tool_response>. Where no function helps, answer without one."""


class _Template(Template, Protocol):
    """A template that can be remembered."""

    def __hash__(self) -> int: ...


def form_with(form: MessageForm, tools: Sequence[Any] | None) -> MessageForm:
    """How the model writes its messages where there are these tools."""
    return replace(form, calls=CALLS, takes_tools=True) if tools and is_plain(form) else form


def is_plain(form: MessageForm) -> bool:
    """Whether the template shows no tools, or calls in no form that is known; one of channels has no place for them."""
    return form.channels is None and not (form.takes_tools and form.has_calls)


def told(template: _Template, messages: Sequence[Any], tools: Sequence[Mapping[str, Any]] | None) -> list[Any]:
    """The messages with calls, results and tools as text, for a template that knows none of them.

    ParameterError for calls and for content that are none; of content that is left as it is, whoever renders says so.
    """
    turns: list[Any] = []
    for number, message in enumerate(messages):
        turn, where = _fields(message), f"messages[{number}]"
        if turn is None:
            turns.append(message)  # whoever renders says what is wrong
            continue
        results = turns.pop() if turns and isinstance(turns[-1], _Results) else None
        if turn.get("role") in RESULT_ROLES:
            result = f"{RESULT.open}{_result_text(turn.get('content'), where)}{RESULT.close}"
            before = results and results["content"]
            turns.append(_Results(role="user", content=_joined(before, result, where, "\n")))
        elif results and turn.get("role") == "user":  # one turn: many templates want the roles to alternate
            turns.append({**turn, "content": _joined(results["content"], turn.get("content"), where)})
        else:
            turns += [results] if results else []
            turns.append(_with_calls_as_text(turn, where))
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in as_tools(tools) or ())
        _instruct(turns, INSTRUCTIONS.format(tools=lines), "system" if _takes_system(template) else "user")
    return turns


class _Results(dict[str, Any]):
    """A turn of results, to which those behind it belong, and what the user says then."""


def _instruct(turns: list[Any], text: str, role: str) -> None:
    """Behind what the system says first, or before what the user does."""
    for number, turn in enumerate(turns):
        if isinstance(turn, Mapping) and turn.get("role") == role and (role == "user" or not number):
            given, where = turn.get("content"), f"messages[{number}]"
            one, other = (given, text) if role == "system" else (text, given)
            turns[number] = {**turn, "content": _joined(one, other, where)}
            return
    turns.insert(0, {"role": role, "content": text})


@lru_cache(maxsize=64)
def _takes_system(template: _Template) -> bool:
    try:
        return CONTENT in template.render_text([{"role": "system", "content": CONTENT}, USER])
    except TemplateError as error:
        if error.code != "TEMPLATE_ERROR":
            raise
        return False


def _fields(message: Any) -> dict[str, Any] | None:
    if isinstance(message, Message):
        return message.to_dict()
    return dict(message) if isinstance(message, Mapping) else None


def _with_calls_as_text(turn: dict[str, Any], where: str) -> dict[str, Any]:
    calls = turn.get("tool_calls")
    if not calls:
        return turn
    if not isinstance(calls, list | tuple):
        raise ParameterError(f"{where}: tool_calls is a {type(calls).__name__}. Expected a list of calls.")
    written = CALLS.between.join(_call_text(call, f"{where}: tool_calls[{i}]") for i, call in enumerate(calls))
    said = {key: value for key, value in turn.items() if key != "tool_calls"}
    return {**said, "content": _joined(turn.get("content"), written, where, "\n")}


def _call_text(call: Any, where: str) -> str:
    """A call as the model writes it; arguments may come as text, as the OpenAI protocol has them."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ParameterError(
            f'{where} is no call. Expected {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}.'
        )
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, str | Mapping):
        raise ParameterError(f"{where}: its arguments are a {type(arguments).__name__}. Expected an object, or JSON.")
    written = arguments if isinstance(arguments, str) else _json(arguments, where)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'{CALLS.each.open}{{"name": {name}, "arguments": {written}}}{CALLS.each.close}'


def _joined(one: Any, other: Any, where: str, between: str = "\n\n") -> str:
    """Two contents as one text: a template may show the first part of a list alone."""
    return between.join(text for text in (_text(one, where), _text(other, where)) if text)


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    check_parts(content, where)
    return joined(content, where)


def _result_text(content: Any, where: str) -> str:
    """A result may be an object too."""
    return _json(content, where) if isinstance(content, Mapping) else _text(content, where)


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ParameterError(f"{where}: cannot be written as JSON ({error}). Give plain JSON types.") from None

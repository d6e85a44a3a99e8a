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
from edgellm.formats.errors import TemplateError
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
    """The messages with calls, results and tools as text, for a template that knows none of them."""
    turns: list[Any] = []
    for message in messages:
        turn = _fields(message)
        if turn is None:
            turns.append(message)  # whoever renders says what is wrong
        elif turn.get("role") in RESULT_ROLES:
            result = f"{RESULT.open}{_text(turn.get('content'))}{RESULT.close}"
            if turns and isinstance(turns[-1], _Results):
                turns[-1]["content"] += f"\n{result}"
            else:
                turns.append(_Results(role="user", content=result))
        elif calls := turn.get("tool_calls"):
            written = CALLS.between.join(map(_call_text, calls))
            said = {key: value for key, value in turn.items() if key != "tool_calls"}
            turns.append({**said, "content": _joined(turn.get("content"), written, "\n")})
        else:
            turns.append(turn)
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in as_tools(tools) or ())
        _instruct(turns, INSTRUCTIONS.format(tools=lines), "system" if _takes_system(template) else "user")
    return turns


class _Results(dict[str, Any]):
    """A turn of results, to which those behind it belong."""


def _instruct(turns: list[Any], text: str, role: str) -> None:
    """Behind what the system says first, or before what the user does."""
    for number, turn in enumerate(turns):
        if isinstance(turn, Mapping) and turn.get("role") == role and (role == "user" or not number):
            parts = (turn.get("content"), text) if role == "system" else (text, turn.get("content"))
            turns[number] = {**turn, "content": _joined(*parts)}
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


def _call_text(call: Any) -> str:
    """A call as the model writes it; arguments may come as text, as the OpenAI protocol has them."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    arguments = function.get("arguments") or {}
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function.get("name"), ensure_ascii=False)
    return f'{CALLS.each.open}{{"name": {name}, "arguments": {written}}}{CALLS.each.close}'


def _joined(one: Any, other: Any, between: str = "\n\n") -> Any:
    if isinstance(one, list) or isinstance(other, list):
        return [*_parts(one), *_parts(other)]
    return between.join(text for text in (one, other) if text)


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content or ""}]


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)

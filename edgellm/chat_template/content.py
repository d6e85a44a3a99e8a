"""The content of messages in the form that a template takes: a text, a list of text parts, or nothing at all.

Callers write content as the OpenAI protocol has it. Templates were written for some of its forms only, and fail on
the others or print them as Python writes them. Which ones a template takes is found as llama.cpp finds it, by a trial:
a marked text goes through it in each form. Parts become one text, a line for each, and no content an empty text. The
arguments of calls are tried likewise: some templates take objects, some the JSON text that the protocol has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgellm.formats.errors import ParameterError, TemplateError

NEEDLE = "a text to look for"
TOOL_ROLES = frozenset(("tool", "ipython", "function", "observation", "tool_response"))  # may answer with an object
PART_KEYS = frozenset(("type", "text", "annotations", "cache_control"))  # the last two say nothing to a model
CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {}}}
HI = {"role": "user", "content": "Hi"}

Trial = Callable[[list[dict[str, Any]]], str]  # renders messages as they are


class ContentForms:
    """Which forms of content one template takes; each is tried when it is first needed."""

    def __init__(self, render: Trial) -> None:
        self._render = render
        self._takes_parts: dict[str, bool] = {}
        self._takes_nothing: dict[tuple[str, bool], bool] = {}
        self._arguments: tuple[type, ...] | None = None

    def fit(self, message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """``message`` as the template takes it; ParameterError for content that is no text."""
        calls = message.get("tool_calls")
        if isinstance(calls, list | tuple) and calls:
            message = {**message, "tool_calls": [self._fit_call(call) for call in calls]}
        return self._fit_content(message, where)

    def _fit_content(self, message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        role, content = str(message.get("role")), message.get("content")
        if isinstance(content, str):
            return message
        if content is None:
            taken = self.takes_nothing(role, bool(message.get("tool_calls")))
            return message if taken else {**message, "content": ""}
        if isinstance(content, Mapping) and role in TOOL_ROLES:
            return message
        check_parts(content, where)
        return message if self.takes_parts(role) else {**message, "content": joined(content, where)}

    def _fit_call(self, call: Any) -> Any:
        """A call with its arguments as an object or as JSON text."""
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "arguments" not in function:
            return call
        given = function["arguments"]
        wrong = isinstance(given, str | Mapping) and not isinstance(given, self.arguments_taken())
        fitted = as_other(given) if wrong else given
        return call if fitted is given else {**call, "function": {**function, "arguments": fitted}}

    def arguments_taken(self) -> tuple[type, ...]:
        """The types of arguments that give their text, and no error, nothing, or what Python or JSON makes of it.

        JSON text counts where it gives what the object gives: others put it between marks of their own as it stands.
        """
        if self._arguments is None:
            given: dict[type, Any] = {dict: {"x": NEEDLE}, str: json.dumps({"x": NEEDLE})}
            shown = {kind: self._try(conversation("assistant", "", [with_arguments(v)])) for kind, v in given.items()}
            escaped = ("{'x'", '{\\"x')
            good = [k for k, out in shown.items() if out and NEEDLE in out and not any(text in out for text in escaped)]
            if len({"".join(str(shown[kind]).split()) for kind in good}) > 1:
                good = [dict]
            self._arguments = tuple(good) or (dict, str)
        return self._arguments

    def takes_parts(self, role: str) -> bool:
        """Whether a list of parts gives its text, rather than an error or the list as Python or JSON writes it."""
        if role not in self._takes_parts:
            out = self._try(conversation(role, [{"type": "text", "text": NEEDLE}]))
            quoted = out is not None and (f"'{NEEDLE}'" in out or f'"{NEEDLE}"' in out)
            self._takes_parts[role] = out is not None and NEEDLE in out and not quoted
        return self._takes_parts[role]

    def takes_nothing(self, role: str, calls: bool) -> bool:
        """Whether content that is None renders, and is not printed as ``None``."""
        if (role, calls) not in self._takes_nothing:
            given = self._try(conversation(role, None, [CALL] * calls))
            empty = self._try(conversation(role, "", [CALL] * calls))
            if empty is None:  # such a chat fails for another reason: the template has no tools, or no such role
                taken = not calls or self.takes_nothing(role, False)
            else:
                taken = given is not None and given.count("None") <= empty.count("None")
            self._takes_nothing[role, calls] = taken
        return self._takes_nothing[role, calls]

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        try:
            return self._render(messages)
        except TemplateError as error:
            if error.code != "TEMPLATE_ERROR":
                raise
            return None


def with_arguments(arguments: Any) -> dict[str, Any]:
    """The trial's call with these."""
    return {**CALL, "function": {"name": "look", "arguments": arguments}}


def as_other(arguments: str | Mapping[str, Any]) -> Any:
    """JSON text as the object that it is, an object as JSON text; what is neither as it is."""
    if not isinstance(arguments, str):
        return json.dumps(arguments, ensure_ascii=False, default=str)
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def conversation(role: str, content: Any, calls: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """A short chat with a message of ``role`` and ``content`` where templates expect one."""
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant" and calls:
        answer = {"role": "tool", "name": "look", "tool_call_id": CALL["id"], "content": "{}"}
        return [HI, {**message, "tool_calls": list(calls)}, answer, {"role": "assistant", "content": "Ok"}, HI]
    if role == "assistant":
        return [HI, message, HI]
    if role in TOOL_ROLES:
        asked = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        return [HI, asked, {**message, "name": "look", "tool_call_id": CALL["id"]}]
    return [message] if role == "user" else [message, HI]


def check_parts(content: Any, where: str) -> None:
    """ParameterError unless ``content`` is a list of text parts."""
    expected = 'Expected text, or a list of parts {"type": "text", "text": ...}'
    if not isinstance(content, list | tuple):
        raise ParameterError(f"{where}: the content is a {type(content).__name__}. {expected}.")
    for number, part in enumerate(content):
        if not isinstance(part, Mapping):
            raise ParameterError(f"{where}: part {number} of the content is a {type(part).__name__}. {expected}.")
        if part.get("type") != "text":
            raise ParameterError(
                f"{where}: part {number} of the content has the type {part.get('type')!r}. {expected}: "
                "edgellm reads nothing but text."
            )
        if not isinstance(part.get("text"), str):
            raise ParameterError(f"{where}: part {number} of the content has no text. {expected}.")


def joined(parts: Any, where: str) -> str:
    """The texts of parts, a line for each; ParameterError for what else a part says."""
    for number, part in enumerate(parts):
        if unknown := sorted(map(str, part.keys() - PART_KEYS)):
            raise ParameterError(
                f"{where}: part {number} of the content has {', '.join(unknown)}, which this model's chat template "
                "cannot take. Give its text alone."
            )
    return "\n".join(part["text"] for part in parts)

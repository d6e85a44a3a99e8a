"""The content of messages in the form that a template takes: a text, a list of text parts, or nothing at all.

Callers write content as the OpenAI protocol has it. Templates were written for some of its forms only, and fail on
the others or print them as Python writes them. Which ones a template takes is found as llama.cpp finds it, by a trial:
a marked text goes through it in each form. Parts become one text, a line for each, and no content an empty text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

    def fit(self, message: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """``message`` with its content as the template takes it; ParameterError for content that is no text."""
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
            given = self._try(conversation(role, None, calls))
            empty = self._try(conversation(role, "", calls))
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


def conversation(role: str, content: Any, calls: bool = False) -> list[dict[str, Any]]:
    """A short chat with a message of ``role`` and ``content`` where templates expect one."""
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "assistant" and calls:
        answer = {"role": "tool", "name": "look", "tool_call_id": CALL["id"], "content": "{}"}
        return [HI, {**message, "tool_calls": [CALL]}, answer, {"role": "assistant", "content": "Ok"}, HI]
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

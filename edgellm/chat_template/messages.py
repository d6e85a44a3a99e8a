"""Messages as callers give them, and the plain marked data that a template gets to see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgellm.chat_template.budget import MAX_NESTING
from edgellm.chat_template.user_text import whole
from edgellm.formats.errors import ParameterError

# A template may build a control token from a role (`'<|' + role + '|>'`); only these names may take part in one.
# fmt: off
KNOWN_ROLES = frozenset((
    "system", "user", "assistant", "tool", "developer", "function", "model", "ipython", "observation", "documents",
    "control", "critique", "environment", "available_tools", "tool_response", "context",
))
# fmt: on
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # the first is the standard name


@dataclass(frozen=True)
class Message:
    """One turn of a chat, with the field names of the OpenAI protocol; ``extra`` holds any other field."""

    role: str
    content: str | Sequence[Mapping[str, Any]] | None = None
    name: str | None = None
    tool_calls: Sequence[Mapping[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The message as a dict; optional fields that are None are left out."""
        optional = ("name", "tool_calls", "tool_call_id", "reasoning_content")
        given = {key: getattr(self, key) for key in optional if getattr(self, key) is not None}
        return {"role": self.role, "content": self.content, **given, **self.extra}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and self.to_dict() == other.to_dict()


def is_about_tools(message: Any) -> bool:
    """Whether a message has calls, or the result of one."""
    named = message.get if isinstance(message, Mapping) else lambda name: getattr(message, name, None)
    return named("role") in ("tool", "function") or bool(named("tool_calls"))


Fit = Callable[[Mapping[str, Any], str], Mapping[str, Any]]
"""Takes a message and its place, and gives it with its content in the form that the template takes."""


def template_messages(messages: Sequence[Message | Mapping[str, Any]], fit: Fit) -> list[dict[str, Any]]:
    """Fresh dicts for one render: strings marked as the user's, the reasoning under each name templates read.

    ParameterError for what is no list of messages, or has content that is no text.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ParameterError(f"messages: expected a list of messages, got {type(messages).__name__}.")
    prepared = []
    for number, message in enumerate(messages):
        fields = message.to_dict() if isinstance(message, Message) else message
        if not isinstance(fields, Mapping):
            raise ParameterError(f"messages[{number}]: expected a Message or a dict, got {type(message).__name__}.")
        data = template_data(fit(fields, f"messages[{number}]"), f"messages[{number}]")
        role = fields.get("role")
        if isinstance(role, str) and role in KNOWN_ROLES:
            data["role"] = str.__str__(role)
        reasoning = next((data[key] for key in REASONING_FIELDS if data.get(key) is not None), None)
        if reasoning is not None:
            data = {"thinking": reasoning, **data, "reasoning_content": reasoning}
        prepared.append(data)
    return prepared


def template_data(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of ``value`` in plain JSON types with every string marked; ParameterError for any other type."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return whole(str.__str__(value))
    if depth > MAX_NESTING:
        raise ParameterError(f"{where}: values are nested deeper than {MAX_NESTING}. Give flatter ones.")
    if isinstance(value, Mapping):
        return {
            template_data(key, where, depth + 1): template_data(item, where, depth + 1) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [template_data(item, where, depth + 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    raise ParameterError(
        f"{where}: a {type(value).__name__} cannot be shown to a chat template. Give plain JSON types."
    )

"""Turns in the order and of the roles that a chat template takes, without moving any of them.

Agents put turns of the system into the midst of a talk, and several turns of one role in a row. Most templates write
them down as they are; some refuse them, and some move them to the front or drop them without a word. A trial with a
marked text shows which. What a template does not take becomes a turn of the user at the same place, and turns in a row
become one: nothing moves, so the prefix that a cache holds stays as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from edgellm.chat_template import ChatTemplate
from edgellm.formats.errors import TemplateError

NEEDLE = "a turn to look for"
HI, OK = {"role": "user", "content": "a word"}, {"role": "assistant", "content": "its reply"}
MARKED = {"role": "system", "content": NEEDLE}

Turn = Mapping[str, Any]


def fitting(template: ChatTemplate, messages: Sequence[Turn]) -> Sequence[Turn]:
    """``messages`` as ``template`` takes them; the same list where it takes them as they are."""
    first_is_system = bool(messages) and messages[0].get("role") == "system"
    inline = any(message.get("role") == "system" for message in messages[first_is_system:])
    if first_is_system and not takes(template, "first"):
        messages = _as_user(messages, 0)
    if inline and not takes(template, "inline"):
        messages = _as_user(_merged(messages, "system", leading=True), 1)
    several = any(last.get("role") == turn.get("role") == "user" for last, turn in itertools.pairwise(messages))
    return _merged(messages, "user") if several and not takes(template, "in a row") else messages


@lru_cache(maxsize=64)
def takes(template: ChatTemplate, what: str) -> bool:
    """Whether the marked turn is in what the template writes: at the start, behind other turns, or behind its like."""
    talk: dict[str, list[Turn]] = {
        "first": [MARKED, HI],
        "inline": [HI, OK, MARKED, HI],
        "in a row": [HI, {"role": "user", "content": NEEDLE}],
    }
    try:
        text = template.render_text(talk[what])
        return text.find(NEEDLE) > (text.find(OK["content"]) if what == "inline" else -1)
    except TemplateError as error:
        if error.code != "TEMPLATE_ERROR":
            raise
        return False


def _as_user(messages: Sequence[Turn], start: int) -> list[Turn]:
    """Turns of the system from ``start`` on as turns of the user."""
    return [
        {**message, "role": "user"} if number >= start and message.get("role") == "system" else message
        for number, message in enumerate(messages)
    ]


def _merged(messages: Sequence[Turn], role: str, *, leading: bool = False) -> list[Turn]:
    """Turns of ``role`` in a row as one; ``leading``: at the start alone."""
    merged: list[Turn] = []
    for message in messages:
        last = merged[-1] if merged else None
        if last is not None and last.get("role") == message.get("role") == role and (len(merged) == 1 or not leading):
            merged[-1] = {**last, "content": _joined(last.get("content"), message.get("content"))}
        else:
            merged.append(message)
    return merged


def _joined(one: Any, other: Any) -> Any:
    if isinstance(one, list) or isinstance(other, list):
        return [*_parts(one), *_parts(other)]
    return "\n\n".join(text for text in (one, other) if text)


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content or ""}]

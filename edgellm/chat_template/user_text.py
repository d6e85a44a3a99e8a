"""Strings that remember which of their characters a user wrote, and their way into segments.

``UserText`` is a ``str`` with the same characters as ever, so a template sees no difference. An exact ``str`` inside a
render is the template's own text. Every operation of the sandbox that makes a string goes through the functions below;
where the origin of a character is not certain it counts as the user's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex

Spans = tuple[tuple[int, int], ...]


class Segment(NamedTuple):
    """A piece of a prompt. Only where ``special`` is true may the tokenizer read control tokens in ``text``."""

    text: str
    special: bool


class UserText(str):
    """A string with the half-open character ranges that came from a user, in order and apart from each other."""

    __slots__ = ("_spans",)  # the underscore keeps it out of a template's reach
    _spans: Spans

    def __str__(self) -> str:
        return self  # str(x) in compiled template code must not lose the ranges

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        text = str.__getitem__(self, key)
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return with_spans(text, clipped(self._spans, start, stop))
        return whole(text)

    def __iter__(self) -> Iterator[str]:
        if self._spans == ((0, len(self)),):
            return map(whole, str.__iter__(self))
        return (self[i] for i in range(len(self)))


def exact(text: str) -> str:
    """The same characters as a plain ``str`` without ranges."""
    return str.__str__(text)


def with_spans(text: str, spans: Spans) -> str:
    """``text`` as ``UserText``, or as it is when no character is a user's."""
    if not spans:
        return exact(text)
    marked = UserText(text)
    marked._spans = spans
    return marked


def whole(text: str) -> str:
    """``text``, all of it a user's. An empty string is nobody's."""
    return with_spans(text, ((0, len(text)),) if text else ())


def spans_of(text: str) -> Spans:
    """The ranges of ``text`` that are a user's; any other kind of string is a user's as a whole."""
    if type(text) is str:
        return ()
    if isinstance(text, UserText):
        return text._spans
    return ((0, len(text)),) if text else ()


def clipped(spans: Spans, start: int, stop: int) -> Spans:
    """The part of ``spans`` inside [start, stop), counted from ``start``."""
    return tuple((max(a, start) - start, min(b, stop) - start) for a, b in spans if a < stop and b > start)


def concat(parts: Sequence[str]) -> str:
    """``"".join(parts)`` that keeps the ranges."""
    text = "".join(parts)
    if all(type(part) is str for part in parts):
        return text
    spans: list[tuple[int, int]] = []
    offset = 0
    for part in parts:
        for a, b in spans_of(part):
            if spans and spans[-1][1] == a + offset:
                spans[-1] = (spans[-1][0], b + offset)
            else:
                spans.append((a + offset, b + offset))
        offset += len(part)
    return with_spans(text, tuple(spans))


def pieces(text: str, parts: Iterable[str], separator: str = "") -> list[str]:
    """``parts`` of ``text`` as ``split`` gives them, in order, ``separator`` between two; each gets its own ranges.

    Without a separator only white space may lie between two parts, or nothing.
    """
    found, position = [], 0
    for part in parts:
        position = position if separator else str.index(text, part, position)
        found.append(with_spans(part, clipped(spans_of(text), position, position + len(part))))
        position += len(part) + len(separator)
    return found


def charwise(before: str, after: str) -> str:
    """``after`` is ``before`` changed character by character (``upper``); if the length moved, all is the user's."""
    if type(before) is str:
        return after
    return with_spans(after, spans_of(before)) if len(before) == len(after) else whole(after)


def segments(chunks: Iterable[Any]) -> list[Segment]:
    """The output of a render as segments; neighbours of one kind are joined and empty ones left out."""
    out: list[Segment] = []

    def add(text: str, special: bool) -> None:
        if text and out and out[-1].special == special:
            out[-1] = Segment(out[-1].text + text, special)
        elif text:
            out.append(Segment(text, special))

    text = concat(list(chunks))
    position = 0
    for start, stop in spans_of(text):
        add(str.__getitem__(text, slice(position, start)), True)
        add(str.__getitem__(text, slice(start, stop)), False)
        position = stop
    add(str.__getitem__(text, slice(position, len(text))), True)
    return out

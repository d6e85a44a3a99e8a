"""Strings that remember which of their characters a user wrote, and their way into segments.

``UserText`` is a ``str`` with the same characters as ever, so a template sees no difference. An exact ``str`` inside a
render is the template's own text. Every operation of the sandbox that makes a string goes through the functions below;
where the origin of a character is not certain it counts as the user's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex

from markupsafe import escape as escape_html

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
        start, stop, step = (key if isinstance(key, slice) else slice(key, int(key) + 1 or None)).indices(len(self))
        spans = clipped(self._spans, start, stop) if step == 1 else ((0, len(text)),) if self._spans and text else ()
        return self._like(text, spans)

    def __iter__(self) -> Iterator[str]:
        if self._spans == ((0, len(self)),):
            return map(whole, str.__iter__(self))
        return (with_spans(str.__getitem__(self, i), clipped(self._spans, i, i + 1)) for i in range(len(self)))

    def _like(self, text: str, spans: Spans) -> str:
        return with_spans(text, spans)


class SafeText(UserText):
    """What ``|safe`` and ``|escape`` give: markupsafe's ``Markup``, which escapes any text that is added to it."""

    __slots__ = ()

    def __html__(self) -> str:
        return self

    def __repr__(self) -> str:
        return f"Markup({super().__repr__()})"

    def _like(self, text: str, spans: Spans) -> str:
        return safe(with_spans(text, spans))


def safe(text: str) -> str:
    """The same characters and ranges as ``SafeText``."""
    marked = SafeText(text)
    marked._spans = spans_of(text)
    return marked


def unsafe(text: str) -> str:
    """The same characters and ranges without the escaping."""
    return with_spans(text, text._spans) if isinstance(text, SafeText) else text


def escaped(text: str) -> str:
    """``text`` as HTML, ranges kept; a ``SafeText`` is HTML already."""
    if isinstance(text, SafeText):
        return text
    parts, position = [], 0
    for start, stop in (*spans_of(text), (len(text), len(text))):
        parts.append(str(escape_html(str.__getitem__(text, slice(position, start)))))
        parts.append(whole(str(escape_html(str.__getitem__(text, slice(start, stop))))))
        position = stop
    return safe(concat(parts))


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


def is_users(*values: Any) -> bool:
    """Whether any character of the strings among ``values`` is a user's."""
    return any(isinstance(value, str) and bool(spans_of(value)) for value in values)


def clipped(spans: Spans, start: int, stop: int) -> Spans:
    """The part of ``spans`` inside [start, stop), counted from ``start``."""
    first = bisect_right(spans, start, key=lambda span: span[1])
    found = []
    for index in range(first, len(spans)):
        a, b = spans[index]
        if a >= stop:
            break
        found.append((max(a, start) - start, min(b, stop) - start))
    return tuple(found)


def concat(parts: Sequence[str]) -> str:
    """``"".join(parts)`` that keeps the ranges."""
    text = "".join(parts)
    if all(type(part) is str for part in parts):
        return text
    spans: list[tuple[int, int]] = list(spans_of(parts[0]))  # a long text grows at its end
    offset = len(parts[0])
    for part in parts[1:]:
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
    found, position, spans = [], 0, spans_of(text)
    for part in parts:
        position = position if separator else str.index(text, part, position)
        found.append(with_spans(part, clipped(spans, position, position + len(part))))
        position += len(part) + len(separator)
    return found


def charwise(before: str, after: str) -> str:
    """``after`` is ``before`` changed character by character (``upper``); if the length moved, all is the user's."""
    spans = spans_of(before)
    return with_spans(after, spans) if len(before) == len(after) or not spans else whole(after)


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

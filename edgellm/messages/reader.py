"""From the text of an answer, in pieces of any length, to events and a message.

``MessageReader`` is a recursive descent over a text that is still growing: each step waits until what it has says
enough, so the message depends on the text alone and not on how it was cut. What looked like a call and turns out to be
none is content.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgellm.messages.calls import CallReader, ToolCall
from edgellm.messages.events import ContentDelta, Event, ReasoningDelta, ToolCallDelta
from edgellm.messages.growing_text import MAX_HEAD, GrowingText, NotACall, Steps
from edgellm.messages.shapes import CallForm, Channels, Shape

ID_CHARACTERS = string.ascii_letters + string.digits


@dataclass
class ReadMessage:
    """What was read."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


def make_id() -> str:
    """An id that all templates take: Mistral's want exactly nine letters and digits."""
    return "".join(secrets.choice(ID_CHARACTERS) for _ in range(9))


class MessageReader:
    """Takes an answer piece by piece.

    form       how the model writes
    prompt     the text of the prompt: it may have opened the reasoning
    tools      the tools of the request; without any, calls are not looked for and are text
    new_id     makes the ids of calls that have none
    """

    def __init__(
        self,
        form: Shape,
        prompt: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        new_id: Callable[[], str] = make_id,
    ) -> None:
        self.form = form
        self.reasoning = form.opened_by(prompt)  # whether what comes now is
        self.content_text, self.reasoning_text = "", ""
        self._text = GrowingText()
        self._events: list[Event] = []
        calls = (form.calls or CallForm("header")) if form.has_calls and tools else None
        self._calls = CallReader(self._text, calls, tools or (), self._events.append, new_id) if calls else None
        self._blank = ""  # held back: it counts where text of the same kind follows
        self._fresh, self._marked = True, self.reasoning  # no text since the last marker; whether there was a marker
        self._steps = self._parts() if form.channels is None else self._channels(form.channels, prompt)
        next(self._steps)

    @property
    def message(self) -> ReadMessage:
        """What was read so far."""
        calls = list(self._calls.done) if self._calls is not None else []
        return ReadMessage(self.content_text, self.reasoning_text, calls)

    def name_calls(self, new_id: Callable[[], str]) -> None:
        """Take the ids of calls that have none from here."""
        if self._calls is not None:
            self._calls.new_id = new_id

    def add(self, text: str) -> list[Event]:
        """What is certain after this piece."""
        self._text.text += text
        return self._advance()

    def finish(self) -> list[Event]:
        """No piece follows: what was held back."""
        self._text.ended = True
        return self._advance()

    def _advance(self) -> list[Event]:
        next(self._steps, None)
        events: list[Event] = []
        for event in self._events:
            joined = _joined(events[-1], event) if events else None
            events[-1:] = [joined] if joined else [*events[-1:], event]
        self._events.clear()
        return events

    # -- reasoning, content and calls between markers ----------------------------------------------------------------

    def _parts(self) -> Steps:
        while True:
            if self._bare and (yield from self._text.space(self._say)) in ("{", "["):
                yield from self._try_calls(self._text.at, bare=True)
                continue
            markers = self._markers()
            found = yield from self._text.until([text for text, _ in markers], self._say)
            if found is None:
                self._last_blanks()
                return
            kind = markers[found[1]][1]
            if kind == "call":
                yield from self._try_calls(found[0], bare=False)
            elif self._in_text(markers[found[1]][0]):
                self._say(self._text.text[found[0] : self._text.at])
            else:
                self._turn(kind == "reasoning")

    def _markers(self) -> list[tuple[str, str]]:
        """What may come now, and what it begins."""
        form, found = self.form, []
        if form.reasoning is not None:
            if self.reasoning or self._fresh:  # also the end of reasoning that the template has switched off
                found.append((form.reasoning.close, "content"))
            if self._fresh:
                found.append((form.reasoning.open, "reasoning"))
        if form.content is not None and not self.reasoning:
            found += [(text, "content") for text in form.content]
        if self._calls is not None:
            found.append((self._calls.form.begin, "call"))
        return [row for row in found if row[0].strip()]

    def _in_text(self, marker: str) -> bool:
        """Whether a marker of reasoning stands in the middle of a content, which only speaks of it."""
        form = self.form
        return not (self.reasoning or self._fresh) and form.reasoning is not None and marker in form.reasoning

    @property
    def _bare(self) -> bool:
        """Whether a call may begin here without a marker."""
        return self._calls is not None and not self._calls.form.begin and self._fresh and not self.reasoning

    def _turn(self, reasoning: bool) -> None:
        """A marker: what follows is reasoning, or not."""
        self.reasoning, self._blank, self._fresh, self._marked = reasoning, "", True, True

    def _say(self, text: str) -> None:
        """Text of the running part; blanks beside a marker are no part of it."""
        text = self._blank + text
        kept = text.rstrip()
        self._blank = text[len(kept) :]
        if kept:
            if self._fresh and (self._marked or self.reasoning):
                kept = kept.lstrip()
            self._fresh = False
            self._give(kept)

    def _last_blanks(self) -> None:
        """The end: blanks of a content that no marker has to do with count."""
        if self._blank and not self.reasoning and not (self._fresh and self._marked):
            self._give(self._blank)
        self._blank = ""

    def _give(self, text: str) -> None:
        if self.reasoning:
            self.reasoning_text += text
            self._events.append(ReasoningDelta(text))
        else:
            self.content_text += text
            self._events.append(ContentDelta(text))

    def _try_calls(self, start: int, *, bare: bool) -> Steps:
        """Calls, or else the text from ``start`` on: what begins them is said, the rest is read again."""
        assert self._calls is not None, "somebody looked for calls"
        text, n_before, begun = self._text, len(self._calls.done), self._text.at
        text.keeps = True
        try:
            yield from self._calls.section(bare=bare)
            self._turn(False)
        except NotACall:
            pass
        if len(self._calls.done) > n_before:
            self._turn(False)
            text.at = self._calls.resume
        else:
            text.at = max(begun, start + 1)
            self._say(text.text[start : text.at])
        text.keeps = False

    # -- parts with headers ------------------------------------------------------------------------------------------

    def _channels(self, form: Channels, prompt: str) -> Steps:
        """Parts one after the other; the prompt ends somewhere in the first one."""
        text = self._text
        head, opened, _ = prompt.rpartition(form.start)[2].partition(form.open)
        while True:
            found = [head]
            if not opened and head.strip():  # the prompt ends inside the header
                yield from text.until([form.open], found.append)
            elif not opened:
                found.append((yield from self._header(form)))
            kind, name = kind_of(form, "".join(found))
            self._turn(kind == "reasoning")
            if kind == "content" and self.content_text:
                self._give("\n\n")
            if kind == "call" and self._calls is not None:
                yield from self._channel_call(name)
            end = yield from text.until(form.ends, self._say)
            if end is None:
                self._last_blanks()
                return
            head, opened = "", ""
            yield from text.take(form.start)
            if not (yield from text.space()):
                return

    def _header(self, form: Channels) -> Steps:
        """A header, which is read; "" where there is none: then all is content."""
        text = self._text
        begun, text.keeps = text.at, True
        found: list[str] = []
        try:
            for head in form.heads:
                if (yield from text.take(head)):
                    found.append(head)
                    if (yield from text.until([form.open], found.append, MAX_HEAD)) is None:
                        raise NotACall
                    break
        except NotACall:
            text.at = begun
            found.clear()
        text.keeps = False
        return "".join(found)

    def _channel_call(self, name: str) -> Steps:
        """The arguments of a call; what is none is said as text."""
        assert self._calls is not None, "somebody wants calls"
        text = self._text
        begun, text.keeps = text.at, True
        try:
            yield from self._calls.one(name)
        except NotACall:
            text.at = begun
        text.keeps = False


def _joined(one: Event, other: Event) -> Event | None:
    """Two pieces of the same thing as one."""
    if isinstance(one, ContentDelta) and isinstance(other, ContentDelta):
        return ContentDelta(one.text + other.text)
    if isinstance(one, ReasoningDelta) and isinstance(other, ReasoningDelta):
        return ReasoningDelta(one.text + other.text)
    if isinstance(one, ToolCallDelta) and isinstance(other, ToolCallDelta) and one.index == other.index:
        return ToolCallDelta(one.index, one.arguments + other.arguments)
    return None


def kind_of(form: Channels, head: str) -> tuple[str, str]:
    """What a part with this header is, and the name of a call."""
    for header in form.headers:
        if found := re.search(header.pattern, head):
            return header.kind, found.groupdict().get("name", "")
    return "content", ""

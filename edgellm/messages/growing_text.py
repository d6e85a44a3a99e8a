"""A text that is still growing, and what reads it: each step waits until what there is says enough."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from edgellm.messages.shapes import find, match_at, pieces

MAX_HEAD = 512  # characters of a name or an id

Steps = Generator[None, None, Any]
"""Work on a text: ``next`` goes on as far as the text goes; the value comes at the end."""


class NotACall(Exception):
    """What began like a call is none."""


class GrowingText:
    """text     what is there and may still be needed
    at       how far it is read
    ended    nothing more comes
    keeps    what is read is kept: it may be read again
    """

    def __init__(self) -> None:
        self.text, self.at = "", 0
        self.ended = self.keeps = False

    def more(self) -> Steps:
        """Wait for another piece; False when there is none."""
        if self.ended:
            return False
        yield
        return True

    def peek(self) -> Steps:
        """The next character; "" at the end."""
        while self.at >= len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.at]

    def space(self, say: Callable[[str], None] | None = None) -> Steps:
        """Read blanks; the character behind them."""
        while (c := (yield from self.peek())).isspace():
            self.at += 1
            if say is not None:
                say(c)
        return c

    def have(self, n: int) -> Steps:
        """The next n characters, fewer at the end; they are not read."""
        while len(self.text) - self.at < n and (yield from self.more()):
            pass
        return self.text[self.at : self.at + n]

    def take(self, marker: str) -> Steps:
        """Whether a marker stands here, behind any blanks; then it is read."""
        parts = pieces(marker)
        if not parts:
            return True
        start = self.at
        yield from self.space()
        while (match := match_at(self.text, self.at, parts)) is not None:
            if match.end >= 0:
                self.at = match.end
                return True
            if not (yield from self.more()):
                break
        self.at = start
        return False

    def expect(self, marker: str) -> Steps:
        """``take``, or NotACall."""
        if not (yield from self.take(marker)):
            raise NotACall

    def until(self, markers: Sequence[str], say: Callable[[str], None], limit: int = 0) -> Steps:
        """Say the text up to the first of some markers, which is read: (where it began, its number); None at the end.

        limit   more characters before the marker are NotACall
        """
        parts, n = tuple(map(pieces, markers)), 0
        while True:
            if not self.keeps:
                self.text, self.at = self.text[self.at :], 0
            found = find(self.text, self.at, parts, self.ended)
            stop = found[0].start if found else len(self.text)
            n += stop - self.at
            if limit and n > limit:
                raise NotACall
            if stop > self.at:
                said, self.at = self.text[self.at : stop], stop
                say(said)
            if found is not None and found[0].end >= 0:
                self.at = found[0].end
                return found[0].start, found[1]
            if not (yield from self.more()):
                return None

    def name_before(self, markers: Sequence[str]) -> Steps:
        """A short text up to one of the markers, which is read, and the marker's number."""
        found: list[str] = []
        end = yield from self.until(markers, found.append, MAX_HEAD)
        if end is None:
            raise NotACall
        return "".join(found).strip(), end[1]

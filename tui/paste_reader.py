"""What a terminal sends, as messages: a paste is text until its end, and all else is keys, which Textual reads.

Textual's own parser takes an Escape inside a paste for a key, loses what stood before it, and types the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from textual import events
from textual.message import Message

START, END = "\x1b[200~", "\x1b[201~"  # around a paste
N_BEGUN = len(END) - 1  # letters that may be the beginning of one of them


class PasteReader:
    """Letters to Textual's messages: pastes are found here, all else is ``parser``'s."""

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._tail = ""  # of what the parser was given: a paste's start may come in two parts
        self._pasted: list[str] | None = None  # while a paste comes
        self._kept = ""  # the end of it, which may be the beginning of its end

    @property
    def pasting(self) -> bool:
        """Whether a paste has begun and not ended."""
        return self._pasted is not None

    def feed(self, data: str) -> Iterator[Message]:
        """Messages for all that came at once. What looks like the end of a paste and stands before its end is text."""
        while data:
            if self._pasted is None:
                begun = self._tail + data
                at = begun.find(START)
                cut = len(data) if at < 0 else at + len(START) - len(self._tail)
                yield from self._parser.feed(data[:cut])
                self._tail = begun[-N_BEGUN:] if at < 0 else ""
                self._pasted = None if at < 0 else []
                data = data[cut:]
                continue
            joined = self._kept + data
            at = joined.rfind(END)
            if at < 0:
                self._pasted.append(joined[:-N_BEGUN])
                self._kept = joined[-N_BEGUN:]
                return
            self._pasted.append(joined[:at])
            self._kept, data = "", joined[at + len(END) :]
            yield from self._whole()

    def end(self) -> Iterator[Message]:
        """The end of a paste was lost: what came of it."""
        if self._pasted is not None:
            self._pasted.append(self._kept)
            self._kept = ""
            yield from self._whole()

    def tick(self) -> Iterator[Message]:
        """Messages for keys that nothing followed."""
        if self._pasted is None:
            yield from self._parser.tick()

    def _whole(self) -> Iterator[Message]:
        text = "".join(self._pasted or ()).replace(END + START, "")  # two pastes, one right behind the other
        self._pasted = None
        yield from (other for other in self._parser.feed(END) if not isinstance(other, events.Paste))
        yield events.Paste(text)

"""Stop strings over text that arrives in pieces.

What may still become a stop string is held back, and nothing else: exactly the longest end of the text that is the
beginning of a stop string. So the text given out is the same however it was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgellm import arguments
from edgellm.formats.errors import ParameterError

MAX_STOP_STRINGS = 256
MAX_STOP_LENGTH = 4096  # characters


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """What a caller passed as ``stop``, checked: one string, several, or None."""
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else arguments.items("stop", stop, "text, or a list of texts")
    for string in strings:
        if not isinstance(string, str) or not 0 < len(string) <= MAX_STOP_LENGTH:
            raise ParameterError(
                f"A stop string is {str(string)[:40]!r}. It must be text of 1 to {MAX_STOP_LENGTH} characters."
            )
    if len(strings) > MAX_STOP_STRINGS:
        raise ParameterError(f"There are {len(strings)} stop strings. At most {MAX_STOP_STRINGS} are allowed.")
    return tuple(dict.fromkeys(strings))


class StopMatcher:
    """Takes pieces of text, gives what may be shown. ``found`` is the stop string that ended the text, once there.

    The text ends before the stop string that is complete first; of two complete at the same character, before the one
    that begins first.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """The text that is certain now. Empty once a stop string was found."""
        if self.found is not None:
            return ""
        if not self.stops:
            return piece
        text = self.held + piece
        start = self._find(text)
        if start is not None:
            self.held = ""
            return text[:start]
        n = self._open_end(text)
        self.held = text[len(text) - n :]
        return text[: len(text) - n]

    def flush(self) -> str:
        """What was held back and did not become a stop string: call it when no piece follows."""
        held, self.held = self.held, ""
        return held

    def _find(self, text: str) -> int | None:
        """Where the text ends; sets ``found``."""
        hits = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if not hits:
            return None
        _, start, self.found = min(hits)
        return start

    def _open_end(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        best = 0
        for stop in self.stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= at < len(text) - best:
                if stop.startswith(text[at:]):
                    best = len(text) - at
                at = text.find(stop[0], at + 1)
        return best

"""Lines of a chat from the keyboard or a pipe: editing and history by readline, messages of several lines.

A message goes on over a line that ends with a backslash, and between two lines with three double quotes. Lines that
come to the waiting prompt together are a paste, and one message.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Mapping
from pathlib import Path

from edgellm.formats.errors import FormatError
from edgellm.machine.terminal import echo

QUOTES = '"""'
PROMPT, CONTINUED = ">>> ", "... "
HISTORY_LINES = 1000
PASTE_S = 0.02  # between two lines of one paste


class LineInput:
    """Reads messages. With a terminal it keeps the history of lines in ``history``."""

    def __init__(self, history: Path | None) -> None:
        self.interactive = sys.stdin.isatty()
        self._history = history if self.interactive else None
        self._kept: str | None = None  # a line that was no answer to a question
        self._readline = _readline() if self.interactive else None
        if self._readline and self._history:
            with contextlib.suppress(OSError):
                self._readline.read_history_file(self._history)

    def read(self) -> str | None:
        """The next message, None at the end of the input. KeyboardInterrupt when Ctrl-C is pressed."""
        typed_ahead = self._kept is not None or self._more(0)
        line, self._kept = self._line(PROMPT) if self._kept is None else self._kept, None
        if line is None:
            return None
        if line.lstrip().startswith(QUOTES):
            return self._quoted(line.lstrip()[len(QUOTES) :])
        lines = []
        while line is not None and line.endswith("\\"):
            lines.append(line[:-1])
            line = self._line(CONTINUED)
        lines.append(line or "")
        while not typed_ahead and not lines[0].startswith("/") and self._more(PASTE_S):
            if (line := self._line("")) is None:
                break
            lines.append(line)
        return "\n".join(lines)

    def choose(self, choices: Mapping[str, str]) -> str:
        """One of the letters, "" for none of them. Any other line was typed before the question: it is read next."""
        echo("\n".join(f"  {letter}  {meaning}" for letter, meaning in choices.items()), err=True)
        try:
            line = self._line(f"{'/'.join(choices)}, or Enter to leave it: ")
        except KeyboardInterrupt:
            echo(err=True)
            return ""
        letter = (line or "").strip().lower()
        if letter and letter not in choices:
            self._kept = line
        return letter if letter in choices else ""

    def close(self) -> None:
        """Keep the history for the next time, for this user's eyes only."""
        if self._readline is None or self._history is None:
            return
        with contextlib.suppress(OSError):
            self._history.parent.mkdir(parents=True, exist_ok=True)
            self._readline.set_history_length(HISTORY_LINES)
            self._readline.write_history_file(self._history)
            os.chmod(self._history, 0o600)

    def _quoted(self, first: str) -> str:
        """The lines up to the closing quotes."""
        lines: list[str] = []
        line: str | None = first
        while line is not None:
            if line.rstrip().endswith(QUOTES):
                lines.append(line.rstrip()[: -len(QUOTES)])
                break
            lines.append(line)
            line = self._line(CONTINUED)
        if not lines[0]:
            lines = lines[1:]
        if lines and not lines[-1]:
            lines.pop()
        return "\n".join(lines)

    def _more(self, seconds: float) -> bool:
        """Whether the keyboard has brought more within so long."""
        if not self.interactive or os.name != "posix":  # consoles of Windows cannot be asked
            return False
        return bool(select.select([sys.stdin], [], [], seconds)[0])

    def _line(self, prompt: str) -> str | None:
        try:
            line = input(prompt) if self.interactive else sys.stdin.readline()
        except EOFError:
            return None
        if not line and not self.interactive:
            return None
        try:
            line.encode()  # bytes that are no UTF-8 are lone surrogates here
        except UnicodeEncodeError as error:
            raise FormatError(
                f"The line {line[: error.start]!r} goes on with a byte that is no UTF-8. Set the terminal to UTF-8, or "
                "turn what is piped into it: iconv -f LATIN1 -t UTF-8",
                code="TEXT_ENCODING",
            ) from None
        return line.rstrip("\r\n")


def _readline():  # type: ignore[no-untyped-def]
    """The readline module, None where Python has none (Windows edits lines by itself)."""
    with contextlib.suppress(ImportError):
        import readline

        return readline

"""A terminal on Linux and macOS: what it sends is read by a ``PasteReader``, and when it is gone the chat ends.

Textual's own driver stops with a traceback at a byte that is no UTF-8, and reads a terminal that has hung up for ever,
while nobody takes what is written to it. On Windows, and in a Textual that is built otherwise, it does all of the work.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import selectors
import time
from collections.abc import Iterator
from typing import IO, Any

from textual._xterm_parser import XTermParser
from textual.drivers.linux_driver import LinuxDriver
from textual.message import Message

from edgellm.tui.paste_reader import START, PasteReader

NEXT_S = 0.01  # the parts of a paste follow each other so closely; no fingers do
BEAT_S = 0.1  # keys such as Escape, which begin others, are known after it
STALLED_S = 10.0  # a paste whose end is lost is over after such a silence
N_READ = 1 << 16
HUNG_UP = 129  # exit status: 128 + SIGHUP


class TerminalDriver(LinuxDriver):
    """Textual's driver for Linux and macOS with a reader of its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._file: Any = _Output(self._file)

    def run_input_thread(self) -> None:
        """Read until the application ends, or the terminal is gone."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        reader = PasteReader(XTermParser(self._debug))
        heard_at = time.monotonic()
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            while not self.exit_event.is_set():
                if selector.select(BEAT_S):
                    data = self._read(selector, START.encode(), reader.pasting)
                    if not data:
                        with contextlib.suppress(RuntimeError):  # the loop is over already
                            self._loop.call_soon_threadsafe(self._app.exit, HUNG_UP, HUNG_UP)
                        return
                    heard_at = time.monotonic()
                    self._process(reader.feed(decoder.decode(data)))
                elif reader.pasting and time.monotonic() - heard_at > STALLED_S:
                    self._process(reader.end())
                self._process(reader.tick())

    def _read(self, selector: selectors.BaseSelector, start: bytes, pasting: bool) -> bytes:
        """What is there, of a paste all that follows closely; nothing: the terminal is gone."""
        data = part = self._read_part()
        parts = [data]
        while part and (pasting or start in data):
            pasting = True
            part = self._read_part() if selector.select(NEXT_S) else b""
            parts.append(part)
        return b"".join(parts)

    def _read_part(self) -> bytes:
        try:
            return os.read(self.fileno, N_READ)
        except OSError:
            return b""

    def _process(self, messages: Iterator[Message]) -> None:
        for message in messages:
            self.process_message(message)


class _Output:
    """Textual's output, which a terminal that is gone cannot stop: its writer would end, and the screen wait for it."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write, if anybody is there."""
        with contextlib.suppress(OSError, ValueError):
            return self._file.write(text)
        return len(text)

    def flush(self) -> None:
        """The same."""
        with contextlib.suppress(OSError, ValueError):
            self._file.flush()

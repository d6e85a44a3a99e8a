"""Ctrl-C: the first stops the answer, the second leaves.

The first press only sets a flag, which the engine sees before its next step, so that nothing is torn apart half way.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopOnInterrupt:
    """While inside the ``with`` block the first SIGINT sets ``flag``; a second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.flag = threading.Event()
        self._before: Any = None

    @property
    def stopped(self) -> bool:
        """Whether the user has asked to stop."""
        return self.flag.is_set()

    def __enter__(self) -> StopOnInterrupt:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as a shell starts what runs in the background
        if threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self.flag.is_set():
            raise KeyboardInterrupt
        self.flag.set()

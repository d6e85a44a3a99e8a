"""Work beside the screen: what may take long, such as a disk, never runs on the screen's thread.

What is done within a blink is there before the next key; for anything slower the screen goes on, and what came of it is
handed over when it is there. Everything here is called on the screen's thread but the work itself.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from edgellm.formats.errors import EdgeLLMError

T = TypeVar("T")
BLINK_S = 0.04  # the screen waits so long for what is usually done at once
NOTHING: Callable[[object], None] = lambda _: None  # noqa: E731
Work = Callable[[Callable[[], bool]], T]  # gets a function that tells whether it is still wanted


class Task:
    """One piece of work and who waits for it."""

    def __init__(
        self, work: Work[Any], then: Callable[[Any], object], failed: Callable[[BaseException], object]
    ) -> None:
        self.work, self.then, self.failed = work, then, failed
        self.unwanted = threading.Event()
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_told = False

    def run(self) -> None:
        """Do it, on a thread."""
        try:
            if not self.unwanted.is_set():
                self.result = self.work(self.unwanted.is_set)
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()

    def tell(self) -> None:
        """Hand over what came of it, once, on the screen's thread."""
        if self.is_told or self.unwanted.is_set():
            return
        self.is_told = True
        if self.error is None:
            self.then(self.result)
        elif isinstance(self.error, EdgeLLMError | OSError):
            self.failed(self.error)
        else:
            raise self.error  # our own mistake


class Aside:
    """Threads of one application.

    later    calls a function soon on the screen's thread; from any thread
    failed   gets an error whose task names nobody for it
    """

    def __init__(self, later: Callable[..., object], failed: Callable[[BaseException], object]) -> None:
        self._later, self._failed = later, failed
        self._running: dict[str, Task] = {}
        self._waiting: dict[str, Task] = {}
        self._queue: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def newest(
        self,
        kind: str,
        work: Work[T],
        then: Callable[[T], object],
        failed: Callable[[BaseException], object] | None = None,
    ) -> None:
        """The last of a kind counts: one that runs is told to end, and one that waits never begins."""
        task = Task(work, then, failed or self._failed)
        running = self._running.get(kind)
        if running is not None:
            running.unwanted.set()
            if not running.done.wait(BLINK_S):
                self._waiting[kind] = task
                return
        self._begin(kind, task)

    def forget(self, kind: str) -> None:
        """Nobody wants it any more."""
        self._waiting.pop(kind, None)
        if kind in self._running:
            self._running[kind].unwanted.set()

    def in_order(
        self,
        work: Callable[[], T],
        then: Callable[[T], object] = NOTHING,
        failed: Callable[[BaseException], object] | None = None,
    ) -> None:
        """One after the other, each to its end."""
        task = Task(lambda _: work(), then, failed or self._failed)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work_off, name="edgellm-aside", daemon=True)
            self._thread.start()
        self._queue.put(task)
        if task.done.wait(BLINK_S):
            task.tell()

    def wait(self, timeout_s: float) -> None:
        """Until what was begun in order is done: what the user asked for is not lost when he leaves."""
        if self._thread is not None:
            last = Task(lambda _: None, lambda _: None, lambda _: None)
            self._queue.put(last)
            last.done.wait(timeout_s)

    def _begin(self, kind: str, task: Task) -> None:
        self._running[kind] = task

        def run() -> None:
            task.run()
            with contextlib.suppress(RuntimeError):  # the application is over
                self._later(self._ended, kind, task)

        threading.Thread(target=run, name=f"edgellm-{kind}", daemon=True).start()
        if task.done.wait(BLINK_S):
            task.tell()

    def _ended(self, kind: str, task: Task) -> None:
        if self._running.get(kind) is task:
            del self._running[kind]
            if kind in self._waiting:
                self._begin(kind, self._waiting.pop(kind))
        task.tell()

    def _work_off(self) -> None:
        while True:
            task = self._queue.get()
            task.run()
            with contextlib.suppress(RuntimeError):
                self._later(task.tell)

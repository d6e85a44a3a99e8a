"""The end of an engine that nobody closes: its last owner drops it, or the interpreter takes itself apart."""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from typing import Protocol


class _Closes(Protocol):
    def close(self) -> None: ...


class _Ends(_Closes, Protocol):
    def is_ours(self) -> bool: ...


_engines: weakref.WeakSet[_Ends] = weakref.WeakSet()


def close_at_exit(engine: _Ends) -> None:
    """Close it before the interpreter takes itself apart, if it is still there by then."""
    _engines.add(engine)
    # last in, first out: before the finalizer of the executor, which would take the threads from a running step
    atexit.unregister(_stop_all)
    atexit.register(_stop_all)


def leave_at_exit(engine: _Ends) -> None:
    """Whoever closed it would wait for a thread that hangs."""
    _engines.discard(engine)


def closes_when_dropped(engine: _Ends, closed: _Closes) -> weakref.finalize:
    """Close what an engine owns when its last owner drops the engine; ``detach()`` where it is closed before."""
    found = weakref.finalize(engine, _close_elsewhere, closed)
    found.atexit = False
    return found


def _close_elsewhere(closed: _Closes) -> None:
    """The collector may run on any thread, also on one of an executor's own, which cannot wait for itself."""
    with contextlib.suppress(RuntimeError):  # the interpreter is on its way out
        threading.Thread(target=closed.close, name="edgellm-close").start()


def _stop_all() -> None:
    """Let no kernel run while the interpreter takes itself apart."""
    for engine in list(_engines):
        if engine.is_ours():
            engine.close()

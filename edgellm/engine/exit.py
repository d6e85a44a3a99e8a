"""The end of an engine that nobody closes: dropped by its last owner, or the interpreter takes itself apart."""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Protocol

from edgellm.kernels.program import Executor


class Closable(Protocol):
    """An engine that runs kernels in this process, or in the one it was forked from."""

    def close(self) -> None:
        """End all requests and stop the threads."""
        ...

    def is_ours(self) -> bool:
        """Whether its threads are of this process."""
        ...


engines: weakref.WeakSet[Closable] = weakref.WeakSet()


def close_elsewhere(executor: Executor) -> None:
    """Close the executor of an engine that nobody holds any more.

    The collector may run on any thread, also on one of the executor's own, which cannot wait for itself.
    """
    with contextlib.suppress(RuntimeError):  # the interpreter is on its way out
        threading.Thread(target=executor.close, name="edgellm-close").start()


def stop_all() -> None:
    """Let no kernel run while the interpreter takes itself apart."""
    for engine in list(engines):
        if engine.is_ours():
            engine.close()

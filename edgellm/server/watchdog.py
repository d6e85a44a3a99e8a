"""Whether the engines still make steps: a server that answers /health while its engine hangs helps nobody.

An engine that has work and made no step for long is given up: stacks go to standard error, its callers get an error,
the model is loaded anew by the next request, and /health fails for as long as the old thread hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
from typing import TYPE_CHECKING

from edgellm.machine.terminal import echo
from edgellm.server.errors import ServerError
from edgellm.server.models import ModelEntry, Models

if TYPE_CHECKING:
    from edgellm.llm import LLM

STUCK_S = 180.0  # a step of a prompt on a large model and few cores takes half a minute


class Watchdog:
    """Looks at the models again and again. Used from the event loop."""

    def __init__(self, models: Models, stuck_s: float = STUCK_S) -> None:
        self.models = models
        self.stuck_s = stuck_s
        self._seen: dict[str, tuple[int, int, float]] = {}  # name -> engine, steps and pieces, since when
        self._given_up: dict[str, LLM] = {}

    def stuck(self) -> list[str]:
        """The models that were given up and still hang."""
        self._given_up = {name: llm for name, llm in self._given_up.items() if llm.engine.is_running()}
        return list(self._given_up)

    def look(self) -> None:
        """Give up what made no step for too long."""
        for entry in self.models.loaded():
            if entry.llm is None:
                continue
            engine = entry.llm.engine
            now = time.monotonic()
            before = self._seen.get(entry.name)
            done = engine.scheduler.n_steps + engine.scheduler.n_looks
            if before is None or before[:2] != (id(engine), done) or not engine.is_wanted():
                self._seen[entry.name] = id(engine), done, now
            elif now - before[2] > self.stuck_s:
                self._give_up(entry)

    def _give_up(self, entry: ModelEntry) -> None:
        llm = self.models.forget(entry)
        self._given_up[entry.name] = llm
        said = f"{entry.name} made no step for {self.stuck_s:.0f} s"
        echo(f"edgellm: {said}; the stacks:", err=True)
        with contextlib.suppress(AttributeError, OSError, ValueError):  # standard error may be no file
            faulthandler.dump_traceback(sys.stderr)
        llm.engine.abandon(ServerError("server_error", f"{said} and was given up. Ask again.", status=503))

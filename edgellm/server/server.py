"""The state that all requests share: the models, who may ask, how many may, and what was counted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from edgellm.server.errors import ServerError
from edgellm.server.metrics import Metrics
from edgellm.server.models import Models
from edgellm.server.response_store import ResponseStore
from edgellm.server.security import Access
from edgellm.server.watchdog import Watchdog

TEND_S = 1.0
MAX_REQUESTS = 128  # answers under way and waiting; the engine gives them turns


@dataclass
class Server:
    """One server.

    models         which there are, loaded on demand
    access         who is let in
    max_requests   answers under way or waiting at once; one more is told to come back
    """

    models: Models
    access: Access = field(default_factory=Access)
    max_requests: int = MAX_REQUESTS
    metrics: Metrics = field(default_factory=Metrics)
    responses: ResponseStore = field(default_factory=ResponseStore)
    watchdog: Watchdog = field(init=False)
    active: int = 0
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.watchdog = Watchdog(self.models)

    async def tend(self) -> None:
        """What has to be looked at again and again, until cancelled."""
        while True:
            await asyncio.sleep(TEND_S)
            await self.models.close_idle()
            self.watchdog.look()

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """A place in the line; ServerError overloaded when it is full."""
        if self.active >= self.max_requests:
            raise ServerError(
                "overloaded", f"There are {self.active} requests under way, as many as this server takes. Come back."
            )
        self.active += 1
        self.metrics.requests += 1
        try:
            yield
        finally:
            self.active -= 1

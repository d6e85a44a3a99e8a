"""How many requests a client may send: a bucket for each, which fills at a steady rate."""

from __future__ import annotations

import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from edgellm.server.errors import ServerError

MAX_CLIENTS = 100_000  # buckets that are kept; the longest unused is full again anyway


class RateLimit:
    """Used from one event loop.

    per_minute   requests of a client in the long run
    burst        requests at once, after a pause
    """

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s, self.burst, self._clock = per_minute / 60, burst, clock
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # what is left, and when that was

    def check(self, client: str) -> None:
        """ServerError rate_limited, with when to come back, for a client that has nothing left."""
        name = hashlib.blake2b(client.encode("utf-8", "replace"), digest_size=16).digest()
        now = self._clock()
        left, then = self._buckets.pop(name, (float(self.burst), now))
        left = min(float(self.burst), left + (now - then) * self.per_s)
        allowed = left >= 1
        self._buckets[name] = left - allowed, now
        while len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if not allowed:
            wait = math.ceil((1 - left) / self.per_s)
            raise ServerError(
                "rate_limited",
                f"{self.per_s * 60:g} requests a minute are allowed, and {self.burst} at once. Wait {wait} s.",
                headers={"retry-after": str(wait)},
            )

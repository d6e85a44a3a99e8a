"""How many threads decode fastest: found while the first tokens are made, then kept.

Decoding waits for memory, which fewer threads than there are cores often fill. Each one more is one more to wait for
in every meeting, and the slowest core decides: so on many or on unequal cores fewer threads are faster.
"""

from __future__ import annotations

from time import perf_counter
from types import TracebackType
from typing import Protocol

LEAST_TO_TRY = 4
"""With fewer threads than this all of them are taken."""

SHARES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)
"""Of all threads, in the order of the trials; they end where less is much slower."""

WARM_UP, TIMED = 2, 4
"""Calls of a trial: first workers wake and pages come in, then the least time of a step counts."""

MUCH_SLOWER = 1.2
FASTER = 0.97
"""Fewer threads are taken when a step takes at most this part of what it takes with more."""


class Team(Protocol):
    """What is told how many of its threads do what follows."""

    n_threads: int
    at_once: int


class DecodeThreads:
    """Within ``with``, which holds one or several steps of one token, a team has as many threads as decode fastest."""

    def __init__(self, team: Team) -> None:
        self._team, most = team, team.n_threads
        sizes = dict.fromkeys(max(1, round(most * share)) for share in SHARES) if most >= LEAST_TO_TRY else [most]
        self._left = list(sizes)
        self._times: dict[int, float] = {}
        self._calls = 0
        self._started = 0.0
        self.n_steps = 1
        self.n = self._left.pop(0)
        self.found = not self._left

    def __enter__(self) -> DecodeThreads:
        """``n_steps`` of what is returned may be set to how many were made."""
        self._team.at_once, self.n_steps, self._started = self.n, 1, perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._team.at_once = self._team.n_threads
        if kind is None and not self.found:
            self.took((perf_counter() - self._started) / max(1, self.n_steps))

    def took(self, seconds: float) -> None:
        """Go on with the trials after a call whose steps took so long each."""
        self._calls += 1
        if self._calls > WARM_UP:
            self._times[self.n] = min(seconds, self._times.get(self.n, seconds))
        if self._calls < WARM_UP + TIMED:
            return
        best, *others = self._times
        for n in others:
            best = n if self._times[n] < FASTER * self._times[best] else best
        self.found = not self._left or self._times[self.n] > MUCH_SLOWER * self._times[best]
        self.n, self._calls = best if self.found else self._left.pop(0), 0

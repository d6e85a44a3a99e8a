"""How many threads decode fastest: measured while answers are made, and again when something may have changed.

Decoding waits for memory, which fewer threads than there are cores often fill. Each one more is one more to wait for
in every meeting, and the slowest core decides: so fewer threads are faster on many or on unequal cores, and while
another program has a part of one. Sizes of the team are tried in rounds:

    the first round     all sizes, from all threads down, until fewer are much slower
    a round after that  the size that is kept, and the next above and below: when steps have become slower, maybe by
                        another program, and now and then while some threads are left out, for it may have gone

Rounds that change nothing come ever more seldom and cost about 1 % of the time. Bits do not depend on the number.
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from time import perf_counter
from types import TracebackType
from typing import Protocol

SHARES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 1 / 8)
"""The sizes: shares of all threads."""

SAMPLE_S = 0.02
"""Steps are one sample until they have taken so long: others come and go in slices of a few milliseconds."""

SAMPLES = 5
"""The mean of so many without the slowest, in which workers woke or a disk was read, is the time of a step."""

WARM_UP = 2
"""Samples that do not count at first, while the file comes in."""

MUCH_SLOWER, LEAST_SAMPLES = 1.2, 2
"""After so few samples, each so much slower than the best, a size is given up, and with it those below."""

FASTER = 0.95
"""A step must take at most this part of its time for another size to be taken."""

SLOWED = 1.25
"""Steps that take so much longer than they did are worth a round."""

SOON, LATE = 40, 160
"""Samples from one round to the next, at first and after a change, and at most: about 1 and 4 seconds, or so long
without steps."""


class Team(Protocol):
    """What is told how many of its threads do what follows."""

    n_threads: int
    at_once: int


class DecodeThreads:
    """Within ``with``, which holds one or several decode steps, a team has as many threads as decode fastest.

    n       threads of the next steps
    kept    the best of the last round
    found   whether there was a round

    ``kin`` are, at any time, all that are kept for one team, each for another number of texts. A new one begins with
    the size of the last, and when one changes its size the others try theirs soon.
    """

    def __init__(self, team: Team, kin: Collection[DecodeThreads] = ()) -> None:
        self._team, self._kin = team, kin
        self._sizes = list(dict.fromkeys(max(1, round(team.n_threads * share)) for share in SHARES))
        self.n = self.kept = team.n_threads
        self.found = len(self._sizes) == 1
        self.n_steps = 1
        self._started = self._ended = perf_counter()
        self._seconds, self._n_taken, self._samples = 0.0, 0, list[float]()
        self._warm_up = WARM_UP
        self._left = [] if self.found else self._sizes[:]  # to be tried in this round, n first; none between rounds
        self._times: dict[int, float] = {}  # of a step, by the sizes that were tried in it
        self._usual, self._rest, self._rested = inf, SOON, 0  # seconds of a step; samples between rounds, and so far
        for last in list(kin)[-1:]:
            self.n = self.kept = last.kept
            self.found, self._left, self._warm_up, self._rested = True, [], 0, SOON

    def __enter__(self) -> DecodeThreads:
        """``n_steps`` of what is returned may be set to how many were made."""
        self._team.at_once, self.n_steps, self._started = self.n, 1, perf_counter()
        self._rested += int((self._started - self._ended) / SAMPLE_S)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._team.at_once, self._ended = self._team.n_threads, perf_counter()
        if kind is None:
            self.took(self._ended - self._started, max(1, self.n_steps))

    def took(self, seconds: float, n_steps: int = 1) -> None:
        """Go on after so many steps, which took so long together."""
        self._seconds, self._n_taken = self._seconds + seconds, self._n_taken + n_steps
        if self._seconds < SAMPLE_S or len(self._sizes) == 1:
            return
        sample, self._seconds, self._n_taken = self._seconds / self._n_taken, 0.0, 0
        if self._warm_up:
            self._warm_up -= 1
            return
        self._samples = [*self._samples[1 - SAMPLES :], sample]
        time = (sum(self._samples) - max(self._samples)) / (SAMPLES - 1)
        if len(self._samples) < SAMPLES:
            if len(self._samples) < LEAST_SAMPLES or not self._gives_up(time := min(self._samples)):
                return
            self._left = [n for n in self._left if n >= self.n]
        if self._left:
            self._tried(time)
        else:
            self._watch(time)

    def _gives_up(self, time: float) -> bool:
        """Whether the size that is tried is much slower than one before it in this round."""
        return bool(self._left) and time > MUCH_SLOWER * min(self._times.values(), default=inf)

    def _tried(self, time: float) -> None:
        """Within a round: go on to the next size, or end it with the best."""
        self._times[self.n] = time
        self._left.remove(self.n)
        if self._left:
            self._use(self._left[0])
            return
        best, *others = self._times
        for n in others:
            best = n if self._times[n] < FASTER * self._times[best] else best
        if best != self.kept:
            for other in self._kin:
                other._rest = min(other._rest, SOON)
        self._rest = SOON if best != self.kept or not self.found else min(2 * self._rest, LATE)
        self.kept, self.found, self._usual, self._rested = best, True, self._times[best], 0
        self._use(best)

    def _watch(self, time: float) -> None:
        """Between two rounds: begin one where it may be worth it."""
        self._usual, self._rested = min(self._usual, time), self._rested + 1
        if self._rested >= self._rest and (time > SLOWED * self._usual or self.kept < self._team.n_threads):
            i = self._sizes.index(self.kept)
            self._left = [self.kept, *self._sizes[max(0, i - 1) : i], *self._sizes[i + 1 : i + 2]]
            self._times = {}
            self._use(self.kept)

    def _use(self, n: int) -> None:
        """Go on with this size, and with no sample of another."""
        self.n, self._samples = n, []

"""A model drafts for itself: a block of its file (``nextn``) goes on from the hidden state that its head has read.

The block is a program of its own, with an executor and keys and values of its own. It is given the hidden states of the
tokens that an answer's steps compute logits for, one text's rows from its first answered token on; where some are
missing, as after tokens that a grammar has forced, it begins anew behind them. What it drafts is verified as any draft
is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from edgellm.engine import cache
from edgellm.engine.cache import KVCache
from edgellm.engine.draft_model import CREDIT, RestingDrafter, Trust, likeliest
from edgellm.engine.speculation import Ask, Draft, Drafter
from edgellm.formats.errors import ContextFullError, NumericError
from edgellm.kernels.program import Batch, HiddenExecutor


class NextnDrafter(RestingDrafter):
    """What is kept of one answer.

    hidden     the hidden state at a position
    sequence   keys and values of the rows that were read; its first row is that of position ``first``
    """

    def __init__(self, credit: float, trust: Trust) -> None:
        super().__init__(credit, trust)
        self.hidden: dict[int, np.ndarray] = {}
        self.sequence: cache.Sequence | None = None
        self.first = 0

    def see(self, start: int, rows: np.ndarray) -> None:
        """The hidden states from a position on; those of tokens that are rejected come again before they are read."""
        for position, row in enumerate(rows, start):
            self.hidden[position] = row.copy()

    def missing(self, tokens: Sequence[int]) -> int:
        """The first position whose row is to be read, up to the last token's: where the states before it begin."""
        position = len(tokens) - 1
        least = self.first + self.sequence.length if self.sequence is not None else 1
        while position > least and position - 2 in self.hidden:
            position -= 1
        for old in [p for p in self.hidden if p < position - 1]:
            del self.hidden[old]
        return position


@dataclass(eq=False)
class _Growing:
    """A text in one round: ids and hidden states of the rows to compute next, and what was drafted."""

    drafter: NextnDrafter
    sequence: cache.Sequence
    start: int
    n: int
    ids: list[int]
    states: list[np.ndarray]
    draft: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)


class NextnDrafts:
    """The ``DraftSource`` of a model's own block. ``close`` frees it.

    executor   of the block's program, owned from now on, as is the cache
    """

    of_tokens = False

    def __init__(self, executor: HiddenExecutor, kv: KVCache) -> None:
        self.executor, self.cache = executor, kv
        executor.keeps_hidden = True
        self._step_s = 0.0
        self._gained, self._trust = 0.0, Trust()
        self._is_over = False

    def __call__(self) -> Drafter:
        """The drafter of one answer, with little credit where the last ones did not pay."""
        return NextnDrafter(CREDIT if self._gained >= 0 else CREDIT / 3, self._trust.inherited())

    def wants(self, drafter: Drafter, tokens: Sequence[int]) -> bool:
        """See ``TapSource``: not while its drafts rest."""
        return not self._is_over and isinstance(drafter, NextnDrafter) and drafter.wants(tokens)

    def see(self, drafter: Drafter, start: int, rows: np.ndarray) -> None:
        """Hidden states of an answer's tokens from a position on, (n, n_embd), valid during the call."""
        if isinstance(drafter, NextnDrafter):
            drafter.see(start, rows)

    def release(self, drafter: Drafter) -> None:
        """Its answer is over."""
        if isinstance(drafter, NextnDrafter):
            self._gained, drafter.gained = self._gained / 2 + drafter.gained, 0.0
            self._trust = drafter.trust
            drafter.hidden.clear()
            self._let_go(drafter)

    def close(self) -> None:
        """All answers are over. May be called twice."""
        if not self._is_over:
            self._is_over = True
            self.executor.close()

    def draft_all(self, asked: Sequence[Ask], plain_s: float, row_s: float = 0.0) -> list[Draft]:
        """See ``DraftSource``."""
        if self._is_over:
            return [Draft() for _ in asked]
        growing = [self._begin(ask) for ask in asked]
        active = [one for one in growing if one is not None]
        try:
            while active:
                began = perf_counter()
                for fitting in self._fitting(active):
                    self._step(fitting)
                step_s = perf_counter() - began
                self._step_s = min(step_s, 0.75 * (self._step_s or step_s) + 0.25 * step_s)
                worth = (self._step_s + row_s) / plain_s
                active = [one for one in active if len(one.draft) < one.n and self.goes_on(one.chances[-1], worth)]
        except NumericError:  # NaN in a draft is nobody's error
            for one in growing:
                if one is not None:
                    self._let_go(one.drafter)
            return [Draft() for _ in asked]
        return [Draft() if one is None else self._finished(one, ask) for one, ask in zip(growing, asked, strict=True)]

    def goes_on(self, chance: float, worth: float) -> bool:
        """Whether one more token is likely worth so much of a plain step."""
        return chance > worth

    def _let_go(self, drafter: NextnDrafter) -> None:
        if drafter.sequence is not None:
            self.cache.release(drafter.sequence)
            drafter.sequence = None

    def _begin(self, ask: Ask) -> _Growing | None:
        """The rows of a text that are not read yet; None where it is not to be drafted now."""
        drafter, tokens = ask.drafter, ask.tokens
        if not isinstance(drafter, NextnDrafter):
            return None
        drafter.trust.look(tokens)
        start = drafter.missing(tokens)
        room = self.executor.max_tokens
        if len(tokens) - 2 not in drafter.hidden or not drafter.wants(tokens):
            return None
        start = max(start, len(tokens) - room)
        if drafter.sequence is None or drafter.first + drafter.sequence.length != start:
            self._let_go(drafter)
            drafter.sequence, drafter.first = self.cache.open((), shared=False), start
        sequence = drafter.sequence
        n = min(ask.n, self.cache.n_ctx - sequence.length - (len(tokens) - start))
        try:
            if n > 0:
                self.cache.reserve(sequence, len(tokens) - start + n)
        except ContextFullError:  # others draft meanwhile
            n = 0
        if n <= 0:
            self._let_go(drafter)
            return None
        states = [drafter.hidden[position - 1] for position in range(start, len(tokens))]
        return _Growing(drafter, sequence, sequence.length, n, list(tokens[start:]), states)

    def _fitting(self, active: Sequence[_Growing]) -> Iterator[list[_Growing]]:
        """The same by as many as have room in one batch: of many texts that waited each has many rows to read."""
        fitting: list[_Growing] = []
        for one in active:
            if sum(len(other.ids) for other in [*fitting, one]) > self.executor.max_tokens:
                yield fitting
                fitting = []
            fitting.append(one)
        yield fitting

    def _step(self, active: Sequence[_Growing]) -> None:
        """Compute the next rows of each, and draft a token behind them."""
        counts = [len(one.ids) for one in active]
        ends = np.cumsum(counts)
        outputs = np.zeros(ends[-1], bool)
        outputs[ends - 1] = True
        logits = self.executor.run(
            Batch(
                tokens=np.array([token for one in active for token in one.ids], np.int32),
                positions=np.concatenate([np.arange(one.start, one.start + len(one.ids)) for one in active]).astype(
                    np.int32
                ),
                sequences=np.repeat(np.arange(len(active), dtype=np.int32), counts),
                outputs=outputs,
                tables=tuple(np.stack(tables) for tables in zip(*(one.sequence.tables for one in active), strict=True)),
                embeddings=(np.arange(ends[-1]), np.stack([state for one in active for state in one.states])),
            )
        )
        states = self.executor.last_hidden()
        for one, row, state in zip(active, logits, states, strict=True):
            if not one.draft:  # what was read of the text itself stays
                self.cache.commit(one.sequence, one.ids)
            token, probability = likeliest(row, self.executor.draw)
            before = one.chances[-1] if one.chances else 1.0
            one.draft.append(token)
            one.probabilities.append(probability)
            one.chances.append(before * one.drafter.trust.chance(probability))
            one.start, one.ids, one.states = one.start + len(one.ids), [token], [state.copy()]

    def _finished(self, one: _Growing, ask: Ask) -> Draft:
        one.drafter.trust.expect(len(ask.tokens), one.draft, one.probabilities)
        return Draft(one.draft, one.chances, tried=True)

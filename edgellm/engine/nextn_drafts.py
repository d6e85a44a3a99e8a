"""A model drafts for itself: a block of its file (``nextn``) goes on from the hidden state that its head has read.

The block is a program of its own, with an executor and keys and values of its own. It is given the hidden states of the
tokens that an answer's steps compute logits for, one text's rows from its first answered token on; where some are
missing, as after tokens that a grammar has forced, or while drafts rested, it goes on behind them as if they were not
there. What it drafts is verified as any draft is.

A file of its own may hold such a block, too (EAGLE-3): it is given what some layers read of all tokens, those of the
prompt included, of which the last ones are kept until they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np

from edgellm.engine.cache import KVCache
from edgellm.engine.drafts import ComputedDrafts, Growing, RestingDrafter, Trust, batch_of, likeliest
from edgellm.engine.speculation import Ask, Draft, Drafter
from edgellm.formats.errors import ContextFullError
from edgellm.kernels.program import HiddenExecutor


class NextnDrafter(RestingDrafter):
    """What is kept of one answer.

    hidden     the hidden state at a position, of the last ones
    sequence   keys and values of the rows that were read; its first row is that of position ``first``, or of one before
               it where tokens in between are missing, which were not seen while drafts rested
    """

    def __init__(self, credit: float, trust: Trust) -> None:
        super().__init__(credit, trust)
        self.hidden: dict[int, np.ndarray] = {}
        self.first = 0

    def see(self, start: int, rows: np.ndarray, most: int) -> None:
        """The hidden states (n, n_embd) from a position on; those of rejected tokens come again before they are read.

        most   so many are ever read at once: older ones are let go
        """
        first = max(start, start + len(rows) - most)
        for position, row in enumerate(rows[first - start :], first):
            self.hidden[position] = row.copy()
        if len(self.hidden) > 2 * most:
            for old in [p for p in self.hidden if p < start + len(rows) - most]:
                del self.hidden[old]

    def missing(self, tokens: Sequence[int]) -> int:
        """The first position whose row is to be read, up to the last token's: where the states before it begin."""
        position = len(tokens) - 1
        least = self.first + self.sequence.length if self.sequence is not None else 1
        while position > least and position - 2 in self.hidden:
            position -= 1
        for old in [p for p in self.hidden if p < position - 1]:
            del self.hidden[old]
        return position


@dataclass(eq=False, kw_only=True)
class GrowingRows(Growing[NextnDrafter]):
    """With the ids and hidden states of the rows to compute next."""

    ids: list[int]
    states: list[np.ndarray]


class NextnDrafts(ComputedDrafts[NextnDrafter]):
    """The ``DraftSource`` of a model's own block, or of one in a file of its own. ``close`` frees it.

    executor    of the block's program, owned from now on, as is the cache
    ids         the model's id of each of those that the block drafts, None where they are the same
    of_tokens   see ``TapSource``
    tell        given a line for the user when it goes wrong
    """

    n_beside = 0  # places in the cache that a draft needs beside one for each of its tokens

    def __init__(
        self,
        executor: HiddenExecutor,
        kv: KVCache,
        ids: np.ndarray | None = None,
        *,
        of_tokens: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(executor, kv, NextnDrafter, tell)
        self.executor, self.ids, self.of_tokens = executor, ids, of_tokens
        executor.keeps_hidden = True

    def __call__(self) -> Drafter:
        """The drafter of one answer."""
        return self._last.begun(lambda credit, trust, rest: NextnDrafter(credit, trust))

    def wants(self, drafter: Drafter, tokens: Sequence[int]) -> bool:
        """See ``TapSource``: not while its drafts rest."""
        return not self._is_over and isinstance(drafter, NextnDrafter) and drafter.wants(tokens)

    def see(self, drafter: Drafter, start: int, rows: np.ndarray) -> None:
        """Hidden states of an answer's tokens from a position on, (n, n_embd), valid during the call."""
        if isinstance(drafter, NextnDrafter):
            drafter.see(start, rows, self.executor.max_tokens)

    def release(self, drafter: Drafter) -> None:
        """Its answer is over."""
        super().release(drafter)
        if isinstance(drafter, NextnDrafter):
            drafter.hidden.clear()

    def _drafts(self, asked: Sequence[Ask], plain_s: float, row_s: float) -> list[Draft]:
        growing = [self._begin(ask) for ask in asked]
        active = [one for one in growing if one is not None]
        while active:
            began = perf_counter()
            for fitting in self._fitting(active):
                self._step(fitting)
            self._note_step(perf_counter() - began)
            worth = (self._step_s + row_s) / plain_s
            active = [one for one in active if len(one.draft) < one.n and self.goes_on(one.chances[-1], worth)]
        return [Draft() if one is None else self._finished(one, ask) for one, ask in zip(growing, asked, strict=True)]

    def goes_on(self, chance: float, worth: float) -> bool:
        """Whether one more token is likely worth so much of a plain step."""
        return chance > worth

    def _begin(self, ask: Ask) -> GrowingRows | None:
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
        if drafter.sequence is None:
            drafter.sequence = self.cache.open((), shared=False)
            self.drafters.add(drafter)
        sequence = drafter.sequence
        drafter.first = start - sequence.length  # what is missing in between is passed over
        n_rows = len(tokens) - start
        n = min(ask.n, self.cache.n_ctx - sequence.length - n_rows - self.n_beside)
        try:
            if n > 0:
                self.cache.reserve(sequence, n_rows + n + self.n_beside)
        except ContextFullError:  # others draft meanwhile
            n = 0
        if n <= 0:
            self._let_go(drafter)
            return None
        states = [drafter.hidden[position - 1] for position in range(start, len(tokens))]
        ids = list(tokens[start:])
        return GrowingRows(drafter=drafter, sequence=sequence, start=sequence.length, n=n, ids=ids, states=states)

    def _fitting(self, active: Sequence[GrowingRows]) -> Iterator[list[GrowingRows]]:
        """The same by as many as have room in one batch: of many texts that waited each has many rows to read."""
        fitting: list[GrowingRows] = []
        for one in active:
            if sum(len(other.ids) for other in [*fitting, one]) > self.executor.max_tokens:
                yield fitting
                fitting = []
            fitting.append(one)
        yield fitting

    def _step(self, active: Sequence[GrowingRows]) -> None:
        """Compute the next rows of each, and draft a token behind them."""
        batch = batch_of([(one, one.ids) for one in active], [True] * len(active))
        states = np.stack([state for one in active for state in one.states])
        logits = self.executor.run(replace(batch, embeddings=(np.arange(len(batch)), states)))
        states = self.executor.last_hidden()
        for one, row, state in zip(active, logits, states, strict=True):
            if not one.draft:  # what was read of the text itself stays
                self.cache.commit(one.sequence, one.ids)
            token, probability = likeliest(row, self.executor.draw)
            token = token if self.ids is None else int(self.ids[token])
            one.add(token, probability)
            one.start, one.ids, one.states = one.start + len(one.ids), [token], [state.copy()]

    def _finished(self, one: GrowingRows, ask: Ask) -> Draft:
        one.drafter.trust.expect(len(ask.tokens), one.draft, one.probabilities)
        return Draft(one.draft, one.chances, tried=True)

"""A small model drafts for a large one: it goes on with a text by itself, and the large one says how far it is right.

One ``DraftModel`` stands behind all answers of an engine. It has an executor and a paged cache of its own, so its
memory is bounded, and what it has read of a prompt is known when another begins alike; answers that share a step draft
together. A draft is the likeliest token after the likeliest token. It goes on for as long as the chance that all of it
is right, by the model's own probabilities and by how often these were borne out, is worth a step of it; an answer whose
drafts do not pay is left alone for a while, the longer the more often that happens.

The draft model may read the text in ids of its own: see ``Reading``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Protocol

import numpy as np

from edgellm.engine.cache import KVCache
from edgellm.engine.drafts import ComputedDrafts, Growing, RestingDrafter, Trust, batch_of, likeliest
from edgellm.engine.speculation import Ask, Draft, Drafter
from edgellm.formats.errors import ContextFullError
from edgellm.kernels.draw import DrawSpec, Link, TokenDraw
from edgellm.kernels.program import Executor, TogetherDecodingExecutor

RUN = 4  # tokens that are drafted between two looks at their chances
READ_S = 0.05  # of reading what it has not seen yet, between two steps of the large model
LEAST_READ = 64  # tokens of it in any case
GREEDY = DrawSpec((Link("temperature", 0.0),), n_candidates=1, k=1, wants_sum=True)


class Reading(Protocol):
    """One text as the draft model reads it."""

    def read(self, tokens: Sequence[int]) -> tuple[Sequence[int], int] | None:
        """The draft model's ids of a text that only ever grows, and how many of the first ones will stay as they are.

        None where it cannot read the text.
        """
        ...

    def write(self, draft: Sequence[int]) -> list[int]:
        """What a draft behind the text read last is in the ids of the large model, at most as many."""
        ...


class SameIds:
    """The ``Reading`` of a draft model whose first ``n_vocab`` ids are those of the large one."""

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab
        self._n_read = 0

    def read(self, tokens: Sequence[int]) -> tuple[Sequence[int], int] | None:
        """See ``Reading``."""
        if max(tokens[self._n_read :], default=0) >= self.n_vocab:
            return None
        self._n_read = len(tokens)
        return tokens, len(tokens)

    def write(self, draft: Sequence[int]) -> list[int]:
        """See ``Reading``."""
        strange = (i for i, token in enumerate(draft) if token >= self.n_vocab)
        return list(draft[: next(strange, len(draft))])


class ModelDrafter(RestingDrafter):
    """What a draft model keeps of one answer.

    sequence   of ids that will not change
    written    ids behind those whose keys and values are there, too: of a draft, or of an end that may still change
    ids        the text as the draft model reads it
    """

    def __init__(self, reading: Reading, credit: float, trust: Trust, rest: int = 0) -> None:
        super().__init__(credit, trust, rest)
        self.reading = reading
        self.written: list[int] = []
        self.ids: Sequence[int] = ()
        self.n_stable = 0  # of the ids

    def looks(self, tokens: Sequence[int], n_ctx: int) -> bool:
        """Read the text as it is now, and see what has become of the last draft; False where that cannot be."""
        read = self.reading.read(tokens)
        if read is None or len(read[0]) >= n_ctx:  # an id it does not know, or longer than the draft model's context
            self.is_lost = True
            return False
        self.ids, self.n_stable = read
        self.trust.look(self.ids)
        return True

    def forget(self) -> None:
        """Its keys and values are gone."""
        super().forget()
        self.written = []


@dataclass(eq=False, kw_only=True)
class _Growing(Growing[ModelDrafter]):
    """First what is missing of a text is read, n_read ids in read_s; the last token of a draft is not computed yet."""

    n_read: int
    read_s: float = 0.0

    def goes_on(self, worth: float) -> bool:
        """Whether one more token is likely worth so much of a plain step."""
        return 0 < len(self.draft) < self.n and self.chances[-1] > worth


class DraftModel(ComputedDrafts[ModelDrafter]):
    """The ``DraftSource`` of a loaded model. ``close`` frees it.

    executor   owned from now on, as is the cache
    reading    makes what reads the text of one answer
    closed     called when it is closed
    tell       given a line for the user when it goes wrong
    """

    def __init__(
        self,
        executor: Executor,
        kv: KVCache,
        reading: Callable[[], Reading],
        closed: Callable[[], None] = lambda: None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(executor, kv, ModelDrafter, tell)
        self.executor = executor
        self._reading, self._closed = reading, closed
        self._together = executor if isinstance(executor, TogetherDecodingExecutor) else None
        self._draws: list[TokenDraw] = []
        self._token_s = 0.0  # of a token that is read

    def __call__(self) -> Drafter:
        """The drafter of one answer."""
        return self._last.begun(partial(ModelDrafter, self._reading()))

    def close(self) -> None:
        """Free the model. May be called twice."""
        if not self._is_over:
            super().close()
            self._closed()

    def _drafts(self, asked: Sequence[Ask], plain_s: float, row_s: float) -> list[Draft]:
        read = int(READ_S / self._token_s) if self._token_s else 0  # of the first it is not known what they take
        room = min(self.executor.max_tokens, max(LEAST_READ, read))
        growing: list[_Growing | None] = []
        for ask in asked:
            growing.append(self._begin(ask, room) if room > 0 else None)
            room -= 0 if (one := growing[-1]) is None else one.n_read
        if texts := [one for one in growing if one is not None]:
            self._read(texts)
            self._grow(texts, (self._step_s + row_s) / plain_s)
        return [Draft() if one is None else self._finished(one, ask) for one, ask in zip(growing, asked, strict=True)]

    # -- one round -------------------------------------------------------------------------------------------------

    def _begin(self, ask: Ask, room: int) -> _Growing | None:
        """Bring what is kept of a text up to its tokens; None where it is not to be drafted now."""
        drafter = ask.drafter
        if not isinstance(drafter, ModelDrafter) or not drafter.wants(ask.tokens):
            return None
        if not drafter.looks(ask.tokens, self.cache.n_ctx):
            self._let_go(drafter)
            return None
        if drafter.sequence is None:
            drafter.sequence = self.cache.open(drafter.ids)
            self.drafters.add(drafter)
        sequence, ids = drafter.sequence, drafter.ids
        known = ids[sequence.length : len(ids) - 1]  # the last is computed again, for its logits
        agree = [a == b for a, b in zip(drafter.written, known, strict=False)]
        drafter.written = drafter.written[: agree.index(False) if False in agree else len(agree)]
        self._commit(drafter)
        n_ahead = len(drafter.written)
        start = sequence.length + n_ahead
        n_read = min(len(ids) - start, room)
        n_draft = min(ask.n, self.cache.n_ctx - len(ids)) if start + n_read == len(ids) else 0
        try:
            self.cache.reserve(sequence, n_ahead + n_read + n_draft)
        except ContextFullError:  # others draft meanwhile
            self._let_go(drafter)
            return None
        return _Growing(drafter=drafter, sequence=sequence, start=start, n_read=n_read, n=n_draft)

    def _commit(self, drafter: ModelDrafter) -> None:
        """Keep what was computed of ids that will not change."""
        sequence, written = drafter.sequence, drafter.written
        assert sequence is not None, "it was opened"
        if (n := min(len(written), drafter.n_stable - sequence.length)) > 0:
            self.cache.commit(sequence, written[:n])
            drafter.written = written[n:]

    def _read(self, texts: Sequence[_Growing]) -> None:
        """Compute what is missing of the texts; those that are read to the end have a first token then."""
        began, parts, ends = perf_counter(), [], []
        for one in texts:
            parts.append((one, one.drafter.ids[one.start : one.start + one.n_read]))
            ends.append(one.start + one.n_read == len(one.drafter.ids))
        logits = iter(self.executor.run(batch_of(parts, ends)))
        for (one, ids), is_ready in zip(parts, ends, strict=True):
            one.start += len(ids)
            one.drafter.written = [*one.drafter.written, *ids]
            self._commit(one.drafter)
            if is_ready:
                one.add(*likeliest(next(logits), self.executor.draw))
        seconds, n = perf_counter() - began, sum(one.n_read for one in texts)
        for one in texts:
            one.read_s = seconds * one.n_read / n
        if n >= LEAST_READ:
            self._token_s = seconds / n

    def _grow(self, texts: Sequence[_Growing], worth: float) -> None:
        """Draft for as long as the chance that all is right is worth a step."""
        while active := [one for one in texts if one.goes_on(worth)]:
            began, n = perf_counter(), min(RUN, *(one.n - len(one.draft) for one in active))
            n_made = self._run(active, n)
            self._note_step((perf_counter() - began) / n_made)

    def _run(self, active: Sequence[_Growing], n: int) -> int:
        """Up to n tokens more for each; how many."""
        batch = batch_of([(one, one.draft[-1:]) for one in active], [True] * len(active))
        draw = self.executor.draw
        if self._together is not None and draw is not None:
            while len(self._draws) < len(active):
                self._draws.append(draw.open(GREEDY, np.random.default_rng(0)))
            draws = self._draws[: len(active)]
            drawn = self._together.decode_together(batch, n, draws, [()] * len(active))
            if n_made := min(drawn):
                for one, draw_of in zip(active, draws, strict=True):
                    self._append(one, [(step.token, 1 / step.sum) for step in draw_of.drawn(n_made)])
                return n_made
        logits = self.executor.run(batch)
        for one, row in zip(active, logits, strict=True):
            self._append(one, [likeliest(row, draw)])
        return 1

    def _append(self, one: _Growing, found: Sequence[tuple[int, float]]) -> None:
        """Tokens that were drafted one after the other: all but the last were computed, as was the one before."""
        one.drafter.written = [*one.drafter.written, one.draft[-1], *(token for token, _ in found[:-1])]
        one.start += len(found)
        for token, probability in found:
            one.add(token, probability)

    def _finished(self, one: _Growing, ask: Ask) -> Draft:
        if not one.draft:
            return Draft(read_s=one.read_s)  # there is more to read: that is a cost of the text, not of a draft
        drafter = one.drafter
        drafter.trust.expect(len(drafter.ids), one.draft, one.probabilities)
        tokens = drafter.reading.write(one.draft)[: ask.n]
        last = len(one.chances) - 1  # of another vocabulary there may be more tokens, or fewer
        chances = [one.chances[min(last, i * len(one.chances) // len(tokens))] for i in range(len(tokens))]
        return Draft(tokens, chances, tried=True)

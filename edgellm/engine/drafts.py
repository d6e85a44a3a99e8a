"""What sources of drafts share that compute them: how long a text rests, how far a draft is trusted, and their life.

A source has an executor and a paged cache of its own, and one drafter for each answer. How a draft comes about is the
affair of draft_model.py, nextn_drafts.py and block_drafts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from edgellm.engine import cache
from edgellm.engine.cache import KVCache
from edgellm.engine.speculation import Ask, Draft, Drafter
from edgellm.formats.errors import EdgeLLMError, NumericError
from edgellm.kernels.draw import Draw
from edgellm.kernels.program import Batch, Executor

REST = (16, 1024)  # tokens of an answer without drafts when these did not pay, at first and at most
CREDIT = 3.0  # tokens that drafts may cost before they rest


class RestingDrafter:
    """A drafter of one answer that is asked together with others, and rests where drafts do not pay.

    rest       tokens that are to come of the answer before it begins
    sequence   its keys and values in the cache of what drafts
    """

    def __init__(self, credit: float, trust: Trust, rest: int = 0) -> None:
        self.trust = trust
        self.gained = self.read = 0.0  # by drafts, less what was read for them
        self.is_lost = False  # its text gives NaN, say
        self.sequence: cache.Sequence | None = None
        self._balance, self._rest = credit, REST[0]
        self._n_seen = self._sleeps_until = 0
        self._first_rest = rest

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """None by itself: a ``DraftSource`` drafts for all."""
        return []

    def settle(self, gain: float) -> None:
        """As ``Drafter`` has it."""
        self.gained += gain
        self._balance = min(2 * CREDIT, self._balance + gain)
        if self._balance < 0:
            self._sleeps_until, self._balance = self._n_seen + self._rest, CREDIT / 2
            self._rest = min(4 * self._rest, REST[1])
        elif gain > 0:
            self._rest = max(REST[0], self._rest // 2)

    def charge(self, cost: float) -> None:
        """As ``Drafter`` has it."""
        self.gained, self.read = self.gained - cost, self.read + cost

    def wants(self, tokens: Sequence[int]) -> bool:
        """Whether it has a draft to make."""
        self._n_seen = len(tokens)
        if self._first_rest:
            self._sleeps_until, self._first_rest = self._n_seen + self._first_rest, 0
        return self._n_seen >= self._sleeps_until and not self.is_lost

    def forget(self) -> None:
        """Its keys and values are gone."""
        self.sequence = None


class LastAnswers:
    """What drafts have brought the last answers, for the next one to begin with.

    A long prompt is read in pieces, which is paid before anything is drafted. Where the drafts did not win that back,
    the next answer begins without: it is read once it has become long, which is four times as long each time.
    """

    def __init__(self) -> None:
        self.gained, self.rest, self._trust = 0.0, 0, Trust()

    def begun(self, make: Callable[[float, Trust, int], RestingDrafter]) -> RestingDrafter:
        """A drafter, with little credit, and later, where the last ones did not pay."""
        return make(CREDIT if self.gained >= 0 else CREDIT / 3, self._trust.inherited(), self.rest)

    def ended(self, drafter: RestingDrafter) -> None:
        """An answer is over."""
        gained, drafter.gained = drafter.gained, 0.0
        self.gained, self._trust = self.gained / 2 + gained, drafter.trust
        if drafter.read > 0 > gained:
            self.rest = min(max(REST[0], 4 * self.rest), REST[1])
        else:  # when nothing came of the rest it is tried again in time
            self.rest = self.rest // 4 if gained > 0 else self.rest * 7 // 8


class Trust:
    """How far a draft model's own probabilities are borne out, the last tokens counting most."""

    def __init__(self, right: float = 2.0, hoped: float = 2.0) -> None:
        self._right, self._hoped = right, hoped
        self._draft: list[tuple[int, float]] = []
        self._from = 0

    def expect(self, n_tokens: int, draft: Sequence[int], probabilities: Sequence[float]) -> None:
        """The large model will say what stands in place of this draft, behind n tokens."""
        self._from, self._draft = n_tokens, list(zip(draft, probabilities, strict=True))

    def look(self, tokens: Sequence[int]) -> None:
        """What came in its place; the first wrong token ends what was to be learned."""
        for (token, probability), came in zip(self._draft, tokens[self._from :], strict=False):
            self._right = 0.95 * self._right + (token == came)
            self._hoped = 0.95 * self._hoped + probability
            if token != came:
                break
        self._draft = []

    def inherited(self) -> Trust:
        """That of another text, to begin with."""
        return Trust(self._right, self._hoped)

    def chance(self, probability: float) -> float:
        """That a token of this probability is right."""
        return min(1.0, probability * (self._right + 1) / (self._hoped + 1))


AnyDrafter = TypeVar("AnyDrafter", bound=RestingDrafter)


@dataclass(eq=False, kw_only=True)
class Growing(Generic[AnyDrafter]):
    """A text in one round.

    start    where the next id to compute stands
    n        so many tokens are drafted at most
    """

    drafter: AnyDrafter
    sequence: cache.Sequence
    start: int
    n: int
    draft: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)

    def add(self, token: int, probability: float) -> None:
        """The next token of the draft."""
        before = self.chances[-1] if self.chances else 1.0
        self.draft.append(token)
        self.probabilities.append(probability)
        self.chances.append(before * self.drafter.trust.chance(probability))


class ComputedDrafts(Generic[AnyDrafter]):
    """The life of a ``DraftSource``.

    executor   owned from now on, as is the cache
    kind       of its drafters
    tell       given a line for the user when it goes wrong
    """

    def __init__(
        self, executor: Executor, kv: KVCache, kind: type[AnyDrafter], tell: Callable[[str], None] = lambda line: None
    ) -> None:
        self.cache, self.tell = kv, tell
        self.drafters: set[AnyDrafter] = set()  # that have something in the cache
        self._owned, self._kind = executor, kind
        self._last = LastAnswers()
        self._step_s = 0.0  # of a step of all that draft together
        self._is_over = False

    def release(self, drafter: Drafter) -> None:
        """Its answer is over; what was read stays findable where it is shared."""
        if isinstance(drafter, self._kind):
            self._last.ended(drafter)
            self._let_go(drafter)

    def _let_go(self, drafter: AnyDrafter, *, keep: bool = True) -> None:
        if drafter.sequence is not None:
            self.drafters.discard(drafter)
            self.cache.release(drafter.sequence, keep=keep)
            drafter.forget()

    def close(self) -> None:
        """Free what drafts. May be called twice."""
        if not self._is_over:
            self._is_over = True
            self._owned.close()

    def draft_all(self, asked: Sequence[Ask], plain_s: float, row_s: float = 0.0) -> list[Draft]:
        """See ``DraftSource``. When the executor fails there are no more drafts; the answers go on without.

        NaN is of a text, and ends its drafts, and those of the texts that were drafted with it.
        """
        if self._is_over:
            return [Draft() for _ in asked]
        try:
            return self._drafts(asked, plain_s, row_s)
        except NumericError:
            for drafter in (ask.drafter for ask in asked):
                if isinstance(drafter, self._kind):
                    self._let_go(drafter, keep=False)
                    drafter.is_lost = True
        except EdgeLLMError as error:
            for drafter in list(self.drafters):
                self._let_go(drafter)
            self.close()
            self.tell(f"There are no more drafts: {error}")
        return [Draft() for _ in asked]

    def _drafts(self, asked: Sequence[Ask], plain_s: float, row_s: float) -> list[Draft]:
        raise NotImplementedError

    def _note_step(self, seconds: float) -> None:
        self._step_s = min(seconds, 0.75 * (self._step_s or seconds) + 0.25 * seconds)


def batch_of(parts: Sequence[tuple[Growing, Sequence[int]]], ends: Sequence[bool]) -> Batch:
    """These ids of each text from its start on; ``ends``: whether the logits of the last of them are wanted."""
    counts = [len(ids) for _, ids in parts]
    outputs = np.zeros(sum(counts), bool)
    outputs[np.cumsum(counts) - 1] = ends
    starts = [one.start for one, _ in parts]
    return Batch(
        tokens=np.concatenate([np.array(ids, np.int32) for _, ids in parts]),
        positions=np.concatenate([np.arange(p, p + n, dtype=np.int32) for p, n in zip(starts, counts, strict=True)]),
        sequences=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
        outputs=outputs,
        tables=tuple(np.stack(tables) for tables in zip(*(one.sequence.tables for one, _ in parts), strict=True)),
    )


def likeliest(logits: np.ndarray, draw: Draw | None) -> tuple[int, float]:
    """The token of the largest of the logits (n_vocab,), and its probability."""
    found = draw.top_k(logits, 1, with_sum=True) if draw is not None else None
    if found is not None and found.log_sum is not None:
        return int(found.positions[0]), float(np.exp(found.values[0] - found.log_sum))
    token = int(np.argmax(logits))
    return token, float(1 / np.exp(logits - logits[token]).sum(dtype=np.float64))

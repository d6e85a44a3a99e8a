"""Speculative decoding: try several tokens in one step, keep those that would have been chosen anyway.

A ``Drafter`` guesses how the text goes on. One step computes the logits after each guessed token, the sampler takes
them in order, and the first token that it chooses otherwise ends the step. A token's logits do not depend on what it
shares a step with, so the answer is that of plain decoding to the last bit; a wrong guess costs time alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np

MAX_DRAFT = 15  # tokens; with the one before them 16, which fill a kernel's tiles


class Drafter(Protocol):
    """Guesses the next tokens of one text."""

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """At most n tokens that may follow ``tokens``, which only ever grow; none where it has no idea."""
        ...

    def settle(self, gain: float) -> None:
        """What the last draft has brought: tokens more, or less than 0, than plain decoding makes in the same time."""
        ...

    def charge(self, cost: float) -> None:
        """What reading the text has cost, in tokens: it says nothing of the drafts that come of it."""
        ...


class Draft(NamedTuple):
    """Tokens that may follow, and of each the chance that it, and all before it, is right.

    tried   whether there was work for it, whatever came of that
    read_s  what it took to read some of the text, where there is no draft yet
    """

    tokens: Sequence[int] = ()
    chances: Sequence[float] = ()
    tried: bool = False
    read_s: float = 0.0

    @classmethod
    def sure(cls, tokens: Sequence[int]) -> Draft:
        """Of a drafter that knows nothing of its chances."""
        return cls(tokens, [1.0] * len(tokens))


class Ask(NamedTuple):
    """One text of those that are drafted together: who drafts it, its tokens, and how many more there may be."""

    drafter: Drafter
    tokens: Sequence[int]
    n: int


@runtime_checkable
class DraftSource(Protocol):
    """Makes drafters whose drafts are made together, since they share what makes them. Used by the engine's thread."""

    def __call__(self) -> Drafter:
        """The drafter of one answer."""
        ...

    def draft_all(self, asked: Sequence[Ask], plain_s: float, row_s: float = 0.0) -> list[Draft]:
        """A draft for each.

        plain_s   what a decode step of all of them takes without
        row_s     and how much longer it takes for each token that it is to look at besides
        """
        ...

    def release(self, drafter: Drafter) -> None:
        """Its answer is over."""
        ...

    def close(self) -> None:
        """All answers are. May be called twice."""
        ...


@runtime_checkable
class TapSource(DraftSource, Protocol):
    """A source whose drafts go on from hidden states of the model.

    of_tokens   those of all tokens, which ``Program.tapped`` has; else those that logits are made of
    """

    of_tokens: bool

    def wants(self, drafter: Drafter, tokens: Sequence[int]) -> bool:
        """Whether those of an answer's next tokens are of use, which now has these."""
        ...

    def see(self, drafter: Drafter, start: int, rows: np.ndarray) -> None:
        """Those of an answer's tokens from a position on, (n, width), valid during the call."""
        ...


class NgramDrafter:
    """Prompt lookup: what followed the last tokens where they stood before, in the prompt or the answer.

    The longer the text here and there agree, the longer they will go on to agree: a draft is as long as the match. When
    drafts do not pay, the next match must be twice as long, so that it rests in a text that does not repeat itself;
    when they do, half as long. A match may be long by chance, so drafts are short until some have paid.
    """

    NGRAMS = (8, 2)  # tokens; texts often come back to the same two, so eight are looked up first
    UNPROVEN = 3  # tokens of a short draft: of SmolLM2 a wrong one costs 1.3 plain steps, one of 9 tokens 3.7
    PROVEN, MOST = 2.5, 6.0  # tokens that the last drafts have to have brought for long ones, and that count at most

    def __init__(self) -> None:
        self.least = min(self.NGRAMS)  # tokens of a match that is good enough
        self._balance = 0.0  # what the last drafts have brought, the newest ones most
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> where it last ended, with a token behind it
        self._n_seen = 0

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """As ``Drafter`` has it."""
        for size in self.NGRAMS:
            for place in range(max(self._n_seen, size), len(tokens)):
                self._ends[tuple(tokens[place - size : place])] = place
        self._n_seen = len(tokens)
        last = (tuple(tokens[-size:]) for size in self.NGRAMS)
        end = next((self._ends[ngram] for ngram in last if ngram in self._ends), 0)
        period, n_alike = len(tokens) - end, 0
        while n_alike < min(end, max(n, self.least)) and tokens[end - 1 - n_alike] == tokens[-1 - n_alike]:
            n_alike += 1
        # what goes on beyond the last token repeats the draft itself
        most = n if self._balance >= self.PROVEN else min(n, self.UNPROVEN)
        size = min(most, n_alike) if n_alike >= self.least else 0
        return [tokens[end + i % period] for i in range(size)]

    def settle(self, gain: float) -> None:
        """As ``Drafter`` has it."""
        self._balance = min(0.7 * self._balance + gain, self.MOST)
        if self._balance < 0:
            self.least, self._balance = 2 * self.least, 0.0
        else:
            self.least = max(min(self.NGRAMS), self.least // 2)

    def charge(self, cost: float) -> None:
        """As ``Drafter`` has it; it reads for nothing."""


DRAFTERS: dict[str, Callable[[], Drafter]] = {"ngram": NgramDrafter}
SPECULATIONS = (*DRAFTERS, "mtp")
"""Ways to draft without another model; "mtp" by a block of the model's own file (nextn_drafts.py)."""

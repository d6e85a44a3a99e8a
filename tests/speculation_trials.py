"""What tests of speculation share: drafts of any length, at any time, as if they cost nothing, right or wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

import edgellm
from edgellm.engine import draft_model
from edgellm.engine.drafts import RestingDrafter
from edgellm.engine.nextn_drafts import NextnDrafts
from edgellm.engine.scheduler import Scheduler
from edgellm.engine.speculation import NgramDrafter


def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may be drafted is, so that as much as can be is accepted and rejected."""
    monkeypatch.setattr(Scheduler, "_tokens_per_s", lambda self, n: n)
    monkeypatch.setattr(NgramDrafter, "settle", lambda self, gain: None)
    for name in ("settle", "charge"):
        monkeypatch.setattr(RestingDrafter, name, lambda self, gain: None)
    monkeypatch.setattr(NextnDrafts, "goes_on", lambda self, chance, worth: True)
    monkeypatch.setattr(draft_model._Growing, "goes_on", lambda self, worth: 0 < len(self.draft) < self.n)


class Oracle:
    """A drafter that knows how texts go on, and errs now and then."""

    def __init__(self, n_vocab: int, texts: Sequence[Sequence[int]] = (), right: float = 0.8, seed: int = 0) -> None:
        self.n_vocab, self.texts, self.right = n_vocab, [list(text) for text in texts], right
        self.rng, self.n_drafted = random.Random(seed), 0

    def known(self, tokens: Sequence[int], n: int) -> list[int]:
        """The next tokens of the text, at most n."""
        whole = next((text for text in self.texts if text[: len(tokens)] == list(tokens)), [])
        return whole[len(tokens) : len(tokens) + n]

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """See ``Drafter``, also for the next two."""
        draft = self.known(tokens, self.rng.randint(0, n))
        self.n_drafted += len(draft)
        return [t if self.rng.random() < self.right else (t + 1) % self.n_vocab for t in draft]

    def settle(self, gain: float) -> None:
        pass

    def charge(self, cost: float) -> None:
        pass


def guess(llm: edgellm.LLM, texts: Sequence[Sequence[int]], right: float = 0.7) -> Oracle:
    """Let one drafter guess in all answers of a loaded model, and give it: it knows how ``texts`` go on.

    There are no runs without Python then, which of a tiny model take a whole answer before anybody guesses, and all
    that may be drafted is, whatever steps take.
    """
    oracle = Oracle(llm.program.n_vocab, texts, right)
    llm.engine._drafter = lambda: oracle
    llm.engine.scheduler.run_length = lambda *_: 0  # type: ignore[method-assign]
    llm.engine.scheduler._tokens_per_s = lambda n: n  # type: ignore[method-assign]
    return oracle

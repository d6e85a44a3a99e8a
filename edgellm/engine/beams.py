"""Beam search: the likeliest texts, of which the best few are followed together, as transformers defines it.

The texts of a step are requests like any others: they share it, and what they begin with, which the cache's tree has. A
text that goes on in two ways is so copied on write, its last block alone; a recurrent layer's state is shared until it
is written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from edgellm.adapters.scales import AdapterScales
from edgellm.engine.requests import CancelFlag, Request
from edgellm.formats.errors import UnsupportedError
from edgellm.kernels.draw import Draw

if TYPE_CHECKING:
    from edgellm.engine.engine import Engine


class Beam(NamedTuple):
    """Tokens behind the prompt, and the sum of their log-probabilities, or what a finished text scores."""

    tokens: tuple[int, ...]
    score: float


class NextTokens(NamedTuple):
    """The likeliest tokens behind a text, and their log-probabilities, falling."""

    ids: list[int]
    logprobs: list[float]


@dataclass
class BeamSearch:
    """The texts that are followed, and those that are over; ``step`` takes what may follow each of the first.

    num_beams        texts that are followed
    eog_ids          tokens that end a text
    max_tokens       of a text
    length_penalty   a finished text scores the sum of its log-probabilities over its tokens to this power
    early_stopping   True: done once there are ``num_beams`` finished texts; False: once the best running one, as long
                     as it is now, is no better than these; "never": once none can be, however long it gets
    """

    num_beams: int
    eog_ids: Collection[int]
    max_tokens: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    running: list[Beam] = field(default_factory=lambda: [Beam((), 0.0)])
    finished: list[Beam] = field(default_factory=list)  # the best ones, best first
    is_over: bool = False
    n_reused: int = 0  # tokens of the prompt that the cache had
    prompt_s: float = 0.0  # until the first step was there

    @property
    def n_kept(self) -> int:
        """Continuations that a step looks at: so many that enough of them do not end."""
        return max(2, 1 + len(self.eog_ids)) * self.num_beams

    def step(self, following: Sequence[NextTokens]) -> None:
        """Take the likeliest tokens behind each running text."""
        n_made = len(self.running[0].tokens) + 1
        found = [
            Beam((*beam.tokens, token), beam.score + logprob)
            for beam, after in zip(self.running, following, strict=True)
            for token, logprob in zip(*after, strict=True)
        ]
        found = sorted(found, key=lambda beam: -beam.score)[: self.n_kept]
        ends = [beam.tokens[-1] in self.eog_ids or n_made >= self.max_tokens for beam in found]
        self.running = [beam for beam, is_end in zip(found, ends, strict=True) if not is_end][: self.num_beams]
        if not (self.early_stopping is True and len(self.finished) == self.num_beams):
            best = zip(found[: self.num_beams], ends, strict=False)
            self.finished += [Beam(b.tokens, b.score / n_made**self.length_penalty) for b, is_end in best if is_end]
            self.finished = sorted(self.finished, key=lambda beam: -beam.score)[: self.num_beams]
        self.is_over = not self.running or not self._can_improve(n_made)

    def _can_improve(self, n_made: int) -> bool:
        """Whether a running text may become better than the worst of the finished ones."""
        if len(self.finished) < self.num_beams:
            return True
        if self.early_stopping is True:
            return False
        to_the_end = self.early_stopping == "never" and self.length_penalty > 0
        length = self.max_tokens if to_the_end else n_made
        return self.running[0].score / length**self.length_penalty > self.finished[-1].score


class NextTokensRequest(Request):
    """What may follow some tokens."""

    def __init__(
        self,
        lock: threading.Lock,
        tokens: Sequence[int],
        cancel: CancelFlag | None,
        look: Callable[[np.ndarray], NextTokens],
    ) -> None:
        super().__init__(lock, tokens, cancel)
        self.look = look
        self.found: NextTokens | None = None
        self.n_reused: int | None = None

    def next_tokens(self, n: int) -> tuple[Sequence[int], int]:
        missing = self.tokens[self.n_computed : self.n_computed + n]
        return missing, int(len(missing) == self.n_missing)

    def accept(self, tokens: Sequence[int], logits: np.ndarray) -> int:
        if self.n_reused is None and self.sequence is not None:
            self.n_reused = self.sequence.n_reused
        if len(logits):
            self.found = self.look(logits[-1])
        return len(tokens)

    def publish(self, seconds: float) -> Iterator[Any]:
        if self.found is not None:
            yield self.found
            yield None

    def _work(self) -> str:
        return f"what follows {len(self.tokens)} tokens"


def follow(
    engine: Engine,
    prompt: Sequence[int],
    search: BeamSearch,
    banned: Collection[int],
    cancel: CancelFlag | None,
    adapters: AdapterScales | None = None,
) -> bool:
    """Carry out a search behind a prompt; False where it was cancelled. ``banned`` are ids that no text has.

    adapters   as in ``Engine.generate``

    UnsupportedError where keys of a prompt are dropped.
    """
    if engine.scheduler.snap is not None:
        raise UnsupportedError("num_beams does not go with kv_keep=snapkv: texts share what would be dropped.")
    never, began = np.array(sorted(banned), np.int64), perf_counter()

    def look(logits: np.ndarray) -> NextTokens:
        return likeliest(logits, search.n_kept, never, engine.executor.draw)

    while not search.is_over:
        requests = [NextTokensRequest(engine.lock, [*prompt, *one.tokens], cancel, look) for one in search.running]
        for request in requests:
            request.adapters = adapters
        engine.submit(*requests)
        try:
            found = [engine.take(request) for request in requests]
        finally:
            for request in requests:
                engine.drop(request)
        if any(after is None for after in found):
            return False
        if not search.prompt_s:
            search.n_reused, search.prompt_s = requests[0].n_reused or 0, perf_counter() - began
        search.step(found)
    return True


def likeliest(logits: np.ndarray, n: int, banned: np.ndarray, draw: Draw | None = None) -> NextTokens:
    """The n likeliest tokens of logits (n_vocab,), natural log-probabilities of all of the vocabulary with them."""
    n = min(n, len(logits) - len(banned))
    top = draw.top_k(logits, n + len(banned), with_sum=True) if draw is not None else None
    if top is not None and top.log_sum is not None:  # numpy takes milliseconds, which every answer waits for
        may = ~np.isin(top.positions, banned)
        ids, found = top.positions[may][:n], top.values[may][:n].astype(np.float64)
        return NextTokens(ids.tolist(), (found - top.log_sum).tolist())
    values = logits.astype(np.float64)
    largest = values.max()
    log_sum = largest + np.log(np.exp(values - largest).sum())
    values[banned] = -np.inf
    ids = np.argpartition(-values, n - 1)[:n]
    ids = ids[np.argsort(-values[ids], kind="stable")]
    return NextTokens(ids.tolist(), (values[ids] - log_sum).tolist())

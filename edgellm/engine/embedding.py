"""Texts to vectors: requests that want hidden states, and what becomes of their rows.

A text of an encoder is one step, whole; that of a decoder comes chunk by chunk, as a prompt does. Either shares its
steps with others, and is pooled by itself: its vector does not depend on any of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgellm.engine.requests import CancelFlag, Request
from edgellm.kernels.pooling import PoolingKind

if TYPE_CHECKING:
    from edgellm.adapters.scales import AdapterScales
    from edgellm.engine.engine import Engine

AHEAD = 3
"""Steps' worth of tokens of one caller's texts in line: one is computed, one is next while the caller makes another."""
STEP_BESIDE = 512
"""Tokens of such a step at most where other callers may come: for each step all that are in line are looked at."""


class EmbeddingRequest(Request):
    """A text whose pooled hidden states are wanted: one row, or all of them where they are not pooled.

    rows    what is taken of them: "mean", "cls" (the first), "last" or "none"
    types   which text of a pair each token is of, None for a single one
    whole   all of it has to be in one step
    """

    shared = False
    hidden = True

    def __init__(
        self,
        lock: threading.Lock,
        tokens: Sequence[int],
        cancel: CancelFlag | None,
        rows: PoolingKind,
        types: Sequence[int] | None,
        *,
        whole: bool,
    ) -> None:
        super().__init__(lock, tokens, cancel)
        self.rows, self.types, self.whole = rows, types, whole
        self.done = 0  # tokens whose rows were taken
        self._kept: list[np.ndarray] = []
        self._total = np.zeros(0)

    def next_tokens(self, n: int) -> tuple[Sequence[int], int]:
        start = self.n_computed
        if start < self.done:  # its blocks were given away
            return self.tokens[start : min(self.done, start + n)], 0
        missing = self.tokens[start : start + n]
        if self.rows == "last":
            return missing, int(start + len(missing) == len(self.tokens))
        return missing, len(missing)

    def accept(self, tokens: Sequence[int], logits: np.ndarray) -> int:
        end = self.n_computed + len(tokens)
        if end > self.done:
            if self.rows == "mean":  # row after row in float64: the same sum however it comes
                rows = logits.astype(np.float64)
                self._total = np.add.reduce(np.concatenate((self._total[None], rows)) if self.done else rows, axis=0)
            elif self.rows == "none" or (self.rows == "cls" and not self.done) or (self.rows == "last" and len(logits)):
                self._kept.append(logits[: None if self.rows == "none" else 1].copy())
            self.done = end
        return len(tokens)

    def publish(self, seconds: float) -> Iterator[np.ndarray | None]:
        if self.done < len(self.tokens):
            return
        if self.rows == "mean":
            yield (self._total / self.done).astype(np.float32)
        else:
            yield np.concatenate(self._kept) if self.rows == "none" else self._kept[0][0]
        yield None

    def _work(self) -> str:
        return f"{len(self.tokens)} tokens embedded"


def encode(
    engine: Engine,
    texts: Iterable[tuple[Sequence[int], Sequence[int] | None]],
    rows: PoolingKind,
    cancel: CancelFlag | None = None,
    adapters: AdapterScales | None = None,
) -> Iterator[np.ndarray]:
    """The hidden states of texts in their order, pooled: (n_embd,) float32, or (n_tokens, n_embd) for "none".

    texts   the tokens of each, and their types or None; they are taken from it as there is room for them
    rows    "mean", "cls" (the first row), "last" or "none"
    cancel  set, it ends the iteration before the next step
    adapters   how much they have of each; None: what the engine has for everybody

    ContextFullError for a text that is longer than the context, NumericError when a step gives NaN.
    """
    waiting, ahead, n_ahead = deque[EmbeddingRequest](), iter(texts), 0
    whole, scheduler = engine.executor.program.takes_whole_texts, engine.scheduler
    most = AHEAD * (min(STEP_BESIDE, scheduler.max_tokens) if scheduler.interactive else scheduler.max_tokens)
    try:
        while True:
            while n_ahead < most and (text := next(ahead, None)) is not None:
                engine.check(text[0])
                request = EmbeddingRequest(engine.lock, text[0], cancel, rows, text[1], whole=whole)
                request.adapters = adapters
                engine.submit(request)
                waiting.append(request)
                n_ahead += len(request.tokens)
            if not waiting or (vector := engine.take(waiting[0])) is None:
                return
            n_ahead -= len(waiting.popleft().tokens)
            yield vector
    finally:
        for request in waiting:
            engine.drop(request)

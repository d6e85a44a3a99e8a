"""Texts to vectors: requests that want hidden states, and what becomes of their rows.

A text of an encoder is one step, whole; that of a decoder comes chunk by chunk, as a prompt does. Either shares its
steps with others, and is pooled by itself: its vector does not depend on any of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from edgellm.engine.requests import CancelFlag, Request
from edgellm.kernels.pooling import PoolingKind


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

    def cancelled_item(self) -> None:
        return None

    def _work(self) -> str:
        return f"{len(self.tokens)} tokens embedded"

"""Which tokens may come next: what a grammar says to the sampler and to the engine, whoever made the grammar.

A mask follows one answer token by token. The engine lets it work on the next position while the executor computes the
logits; the sampler leaves out what is not allowed before its chain begins, so the answer is drawn from what the model
thinks of the allowed tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from edgellm.kernels.draw import Draw
from edgellm.sampling.candidates import Candidates

FEW = 4096  # up to here the allowed tokens are gathered; more are looked for among the whole vocabulary's logits


class AllowedTokens(NamedTuple):
    """The tokens that may come at one position.

    ids     (n,) int64, rising, where they are few, else None
    flags   (n_vocab,) bool
    """

    ids: np.ndarray | None
    flags: np.ndarray

    @classmethod
    def of_bits(cls, bits: bytes, n_vocab: int) -> AllowedTokens:
        """From one bit for each token, the first in the lowest bit of the first byte."""
        flags = np.unpackbits(np.frombuffer(bits, np.uint8), count=n_vocab, bitorder="little").view(bool)
        return cls(np.flatnonzero(flags) if np.count_nonzero(flags) <= FEW else None, flags)

    @classmethod
    def only(cls, token: int, n_vocab: int) -> AllowedTokens:
        """One token and no other."""
        flags = np.zeros(n_vocab, bool)
        flags[token] = True
        return cls(np.array([token]), flags)

    def candidates(self, logits: np.ndarray, draw: Draw | None) -> Candidates:
        """What is left of ``logits`` (n_vocab,) float32, which stay as they are."""
        if self.ids is not None:
            return Candidates(logits[self.ids].astype(np.float64), self.ids)
        return Candidates(np.where(self.flags, logits, np.float32(-np.inf)), draw=draw)


class TokenMask(Protocol):
    """What may come next in one answer; it goes on with each ``accept``, never back.

    Used by the engine's thread alone, except that a mask may compute on threads of its own between two calls.
    """

    @property
    def complete(self) -> bool:
        """Whether nothing may follow any more: the answer is over without an end-of-generation token."""
        ...

    def prepare(self, draft: Sequence[int] = ()) -> int:
        """Begin to work out what may come next, and what may come after each token of ``draft``.

        How many tokens of the draft, from the first on, may come: a step need not try the others.
        """
        ...

    def allowed(self) -> AllowedTokens | None:
        """What may come next; None where every token may."""
        ...

    def forced(self) -> int | None:
        """The one token that must come next where that is certain without a mask, else None."""
        ...

    def accept(self, token: int) -> None:
        """``token`` has come; EdgeLLMError where it may not, or where a limit of the mask is reached."""
        ...

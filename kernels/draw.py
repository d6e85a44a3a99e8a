"""What samplers ask of an executor: the largest of a vocabulary's logits, or a whole chain and the draw of a token.

An executor that can do it says so with ``Executor.draw``. A sampler without one does the same in numpy.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class Link(NamedTuple):
    """One sampler of a chain: its name, its amount, and how many candidates stay at least.

    amount   k of "top_k", p of "top_p", log p of "min_p", the temperature of "temperature"; at 0 only the largest stays
    """

    name: str
    amount: float
    min_keep: int = 1


class DrawSpec(NamedTuple):
    """A chain in numbers: ``links`` cut the ``n_candidates`` largest logits down, one of what is left is drawn.

    k           so many of the largest logits are reported, ``n_candidates`` and those banned, or more
    wants_sum   whether the sum of exp over the whole vocabulary is
    banned      ids that are no candidates; what is reported has them, but for ``shaped`` and ``left``
    """

    links: tuple[Link, ...]
    n_candidates: int
    k: int
    wants_sum: bool = False
    banned: tuple[int, ...] = ()


class TopLogits(NamedTuple):
    """The head of a vocabulary.

    positions   (k,) int64 by falling logit, ties by rising position
    values      (k,) float32, their logits
    log_sum     log of the sum of exp(logit) over the whole vocabulary, when it was asked for
    """

    positions: np.ndarray
    values: np.ndarray
    log_sum: float | None


class Drawn(NamedTuple):
    """One token that was drawn, and what it was drawn from.

    place        of the token in ``positions``
    positions    token ids by falling logit
    values       their logits
    sum          of exp(logit - the largest) over the whole vocabulary, when it was wanted
    shaped       what the chain made of the first logits; ``left[-1]`` of them stayed
    left         how many each link left
    shaped_sum   of exp(shaped - the first) over those
    """

    token: int
    place: int
    positions: list[int]
    values: list[float]
    sum: float
    shaped: list[float]
    left: list[int]
    shaped_sum: float


class TokenDraw(Protocol):
    """The chain of one sampler, ready to draw tokens one after the other; not shared between threads."""

    def draw(self, logits: np.ndarray) -> bool:
        """Draw one token from logits (n_vocab,) float32; False when one of them is not finite."""
        ...

    def tokens(self, n: int) -> list[int]:
        """The first n of those drawn last."""
        ...

    def drawn(self, n: int) -> list[Drawn]:
        """The same with what they were drawn from."""
        ...


class Draw(Protocol):
    """What an executor does with logits for any number of samplers and threads.

    max_k   the most it finds
    bans    whether it draws with banned ids
    """

    max_k: int
    bans: bool

    def top_k(self, logits: np.ndarray, k: int, with_sum: bool = False) -> TopLogits | None:
        """The k largest of logits (n,); None where they are not float32, none is the largest, or k is too large."""
        ...

    def open(self, spec: DrawSpec, rng: np.random.Generator) -> TokenDraw:
        """``rng`` belongs to it from its first token on: numbers may be drawn from it ahead."""
        ...

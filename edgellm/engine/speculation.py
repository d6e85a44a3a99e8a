"""Speculative decoding: try several tokens in one step, keep those that would have been chosen anyway.

A ``Drafter`` guesses how the text goes on. One step computes the logits after each guessed token, the sampler takes
them in order, and the first token that it chooses otherwise ends the step. A token's logits do not depend on what it
shares a step with, so the answer is that of plain decoding to the last bit; a wrong guess costs time alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

MAX_DRAFT = 15  # tokens; with the one before them 16, which fill a kernel's tiles


class Drafter(Protocol):
    """Guesses the next tokens of one text."""

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        """At most n tokens that may follow ``tokens``, which only ever grow; none where it has no idea."""
        ...

    def settle(self, gain: float) -> None:
        """What the last draft has brought: tokens more, or less than 0, than plain decoding makes in the same time."""
        ...

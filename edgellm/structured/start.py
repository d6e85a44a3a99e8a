"""Where a constraint begins: behind a text, such as the end of reasoning or the opening of a tool call.

Up to there every token may come, and nothing is computed, but for two kinds. A token that ends the text and goes on
beyond it may come where what stands behind is itself a token that the grammar may begin with. Where the text must come,
no token may end the answer before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgellm.sampling.mask import AllowedTokens
from edgellm.structured.token_trie import TokenTrie

MAX_KEPT = 64  # lists of tokens of one vocabulary


class Start:
    """The texts of one grammar; immutable.

    texts       the constraint begins behind the first of them
    must_come   whether one of them has to come
    fresh       a matcher at the beginning of the grammar
    """

    def __init__(self, trie: TokenTrie, texts: Sequence[str], must_come: bool, fresh: Any) -> None:
        self._trie = trie
        self._texts = [text.encode() for text in texts]
        first = AllowedTokens.of_bits(fresh.compute_bitmask(), trie.n_vocab).flags
        crossing = self._crossing()
        ends = sorted(trie.eog_ids) if must_come else []
        tails = {text[:n] for text in self._texts for n in range(len(text))}
        self._allowed: dict[bytes, AllowedTokens | None] = {}  # by what has come of the texts
        for tail in tails:
            flags = np.ones(trie.n_vocab, bool)
            for token, piece in crossing:
                behind = self.after(tail, piece)[1]
                flags[token] = not behind or (behind in trie.ids and first[trie.ids[behind]])
            flags[ends] = False
            self._allowed[tail] = None if flags.all() else AllowedTokens(None, flags)

    def _crossing(self) -> list[tuple[int, bytes]]:
        """The tokens that ``_may_cross``; one walk over the vocabulary for the same texts."""
        known, texts = self._trie.crossings, tuple(self._texts)
        if texts not in known:
            lasts = {text[-1:] for text in texts}
            several = [(token, piece) for token, piece in enumerate(self._trie.pieces) if len(piece) > 1]
            some = [row for row in several if any(last in row[1][:-1] for last in lasts)]
            if len(known) >= MAX_KEPT:
                known.clear()
            known[texts] = [row for row in some if self._may_cross(row[1])]
        return known[texts]

    def _may_cross(self, piece: bytes) -> bool:
        """Whether a token may hold the end of a text and something behind it."""
        return any(
            text in piece[:-1] or any(piece[:-1].startswith(text[n:]) for n in range(1, len(text)))
            for text in self._texts
        )

    def after(self, tail: bytes, piece: bytes) -> tuple[bytes, bytes | None]:
        """What has come of a text when ``piece`` has come behind ``tail``, and what stands behind the text, if it came.

        The first of these is the longest end that a text begins with.
        """
        seen = tail + piece
        ends = [place + len(text) for text in self._texts if (place := seen.find(text)) >= 0]
        if ends:
            return b"", seen[min(ends) :]
        lengths = [n for text in self._texts for n in range(1, len(text)) if seen.endswith(text[:n])]
        return seen[len(seen) - max(lengths, default=0) :], None

    def allowed(self, tail: bytes) -> AllowedTokens | None:
        """What may come behind ``tail``, which ``after`` gave; None where every token may."""
        return self._allowed[tail]

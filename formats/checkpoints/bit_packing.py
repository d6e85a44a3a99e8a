"""Small whole numbers packed into 32-bit words: one after another from the lowest bit on, over the words' borders."""

from __future__ import annotations

import numpy as np


def unpack_words(words: np.ndarray, n_bits: int, start: int, stop: int) -> np.ndarray:
    """Numbers ``start`` to ``stop`` of ``n_bits`` (1 to 8) that lie along the first axis.

    words   (n_words, m) int32 or uint32; number k has the bits from k * n_bits on of all words as one long row
    result  (stop - start, m) uint8
    """
    words = words.view(np.uint32)
    first_bit = np.arange(start, stop) * n_bits
    word, shift = first_bit >> 5, (first_bit & 31).astype(np.uint32)[:, None]
    found = words[word] >> shift
    if 32 % n_bits:
        spills = shift + n_bits > 32
        rest = words[np.minimum(word + 1, len(words) - 1)] << np.where(spills, 32 - shift, 0).astype(np.uint32)
        found |= np.where(spills, rest, 0)
    return (found & ((1 << n_bits) - 1)).astype(np.uint8)


def n_words(n: int, n_bits: int) -> int:
    """Words that hold n numbers."""
    return -(-n * n_bits // 32)

"""SentencePiece's table of character replacements, a stranger's binary, proven sound before a library follows it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MAX_REPLACEMENT_NBYTES = 64  # Unicode's longest is 33, of U+FDFA


def checked_charsmap(blob: bytes, unfit: Callable[[], Exception]) -> bytes:
    """The table, proven to keep a library inside it and to let no character grow without bound; raises ``unfit()``.

    Layout: uint32 n; a double-array trie of n bytes (uint32 units); replacement strings, each ended by a zero. The
    libraries follow offsets unchecked, so each one that a unit can lead to is checked here.
    """
    if not blob:
        return b""
    size = int.from_bytes(blob[:4], "little")
    strings = np.frombuffer(blob, np.uint8)[4 + size :]
    if len(blob) < 8 or size % 4 or not 0 < size < len(blob) - 4 or strings[-1] != 0:
        raise unfit()
    ends = np.flatnonzero(strings == 0)
    if np.diff(ends, prepend=-1).max() > MAX_REPLACEMENT_NBYTES + 1:
        raise unfit()
    units = np.frombuffer(blob, dtype="<u4", count=size // 4, offset=4)
    index = np.arange(units.size, dtype=np.int64)
    inner = units & 0x80000000 == 0  # the others hold a value
    base = index ^ ((units >> 10).astype(np.int64) << ((units & 0x200) >> 6))
    if (base[inner] | 0xFF).max(initial=0) >= units.size:
        raise unfit()
    values = units[base[inner & (units & 0x100 != 0)]] & 0x7FFFFFFF
    if values.size and int(values.max()) >= len(strings):
        raise unfit()
    return blob

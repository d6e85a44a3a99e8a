"""What a request will have read of it, as keys: two requests share their first keys when their prompts begin alike.

Made of the request's own text, without a tokenizer: whoever sends requests on needs no model for it. A key stands for
a block of the text and all that is before it, as the blocks of a cache do.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

BLOCK_NBYTES = 128  # of text: about a block of 32 tokens
MAX_KEYS = 512

# in the order in which a prompt has them
FIELDS = ("system", "instructions", "tools", "messages", "input", "prompt", "input_prefix", "query", "documents")


def prefix_keys(data: Any) -> list[int]:
    """The keys of a body's JSON, of its first block first; none for what is no prompt."""
    if not isinstance(data, dict):
        return []
    pieces, left = list[str](), MAX_KEYS * BLOCK_NBYTES  # what is behind has no keys: it is not looked at
    for piece in (piece for name in FIELDS for piece in _texts(data.get(name))):
        pieces.append(piece[:left])
        left -= len(piece) + 1
        if left <= 0:
            break
    text = "\x1f".join(pieces).encode()
    keys: list[int] = []
    before = str(data.get("model", "")).encode()
    for start in range(0, min(len(text) // BLOCK_NBYTES, MAX_KEYS) * BLOCK_NBYTES, BLOCK_NBYTES):
        before = hashlib.blake2b(before + text[start : start + BLOCK_NBYTES], digest_size=7).digest()
        keys.append(int.from_bytes(before, "little"))
    return keys


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, int):
        yield str(value)
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


class PrefixMemory:
    """The keys that a server has read, the latest last; the oldest are forgotten as its cache forgets them."""

    def __init__(self, n_keys: int) -> None:
        self.n_keys = n_keys
        self._keys: OrderedDict[int, None] = OrderedDict()

    def note(self, keys: Sequence[int]) -> None:
        """They are read now. The last ones are forgotten first: without the first ones they are worth nothing."""
        for key in reversed(keys):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self.n_keys:
            self._keys.popitem(last=False)

    def n_known(self, keys: Sequence[int]) -> int:
        """How many of them, from the first on, are known."""
        return next((n for n, key in enumerate(keys) if key not in self._keys), len(keys))

    def latest(self, n: int) -> list[int]:
        """The n that were read last, oldest first."""
        return list(self._keys)[-n:]

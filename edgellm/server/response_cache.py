"""Replies that would be the same again: to the same body at temperature 0, or to what draws nothing at all.

A hit is the reply as it was, with its id and its counts, and the header ``x-edgellm-cache: hit``.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from edgellm.server.http import encode
from edgellm.server.relay import Chunk, Part, Whole

DRAWN = ("/v1/chat/completions", "/chat/completions", "/v1/completions", "/v1/messages", "/completion", "/completions")
"""Paths whose replies are the same again at temperature 0; each says it with this field."""

SAME_AGAIN = ("/v1/embeddings", "/embedding", "/embeddings", "/rerank", "/reranking", "/v1/rerank", "/v1/reranking",
              "/tokenize", "/detokenize", "/v1/messages/count_tokens")  # fmt: skip

LARGEST = 16  # a reply takes at most such a part of the cache


def cache_key(path: str, data: Any, about: Sequence[str] = ()) -> bytes | None:
    """The key of a request whose reply may be the same again: its path, and its body in whatever order; else None.

    Whether chance had a part at temperature 0 too (mirostat, a range of temperatures) is told by the reply.

    data    of the body's JSON
    about   what else tells replies apart, such as the model that a body without one means; its name may be no UTF-8
    """
    if path not in DRAWN and path not in SAME_AGAIN:
        return None
    if path in DRAWN and (not isinstance(data.get("temperature"), int | float) or data["temperature"] != 0):
        return None
    return hashlib.blake2b(encode([path, *map(ascii, about), data], order="sorted"), digest_size=32).digest()


class ResponseCache:
    """Replies up to so many bytes; the longest unused ones go first. Used from one event loop."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used = self.hits = self.misses = 0
        self._kept: OrderedDict[bytes, tuple[Sequence[Part], int]] = OrderedDict()

    def get(self, key: bytes) -> Sequence[Part] | None:
        """The parts of a reply that is kept."""
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return found[0]

    def keep(self, key: bytes, parts: Sequence[Part]) -> None:
        """Keep a whole reply, unless it is large."""
        size = 200 + sum(
            len(part.content if isinstance(part, Whole) else part.data) + 100
            for part in parts
            if isinstance(part, Whole | Chunk)
        )
        if size * LARGEST > self.nbytes or key in self._kept:
            return
        self._kept[key] = tuple(parts), size
        self.used += size
        while self.used > self.nbytes:
            self.used -= self._kept.popitem(last=False)[1][1]

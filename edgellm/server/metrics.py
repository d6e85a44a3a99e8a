"""What the server has done so far, in the names of llama-server's /metrics, and how full a cache is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgellm.kernels.kv import BLOCK_TOKENS

if TYPE_CHECKING:
    from edgellm.engine.engine import Engine
    from edgellm.engine.requests import Timings


def cache_used(engine: Engine) -> float:
    """The share of the cache's blocks that requests hold, of the group that is fullest: 1 is all of them."""
    cache = engine.cache
    return max((used / n for used, n in zip(cache.n_used(), cache.pool.n_blocks, strict=True) if n), default=0.0)


def cache_wanted(engine: Engine) -> float:
    """The same, and the room for what requests have and the cache does not hold yet: above 1 is more than there is."""
    pool, missing = engine.cache.pool, 0
    for request in list(engine.scheduler.requests):
        sequence = request.sequence  # the engine's thread may take it any time
        if not request.whole:
            missing += len(request.tokens) - (0 if sequence is None else sequence.length)
    whole = [n for group, n in zip(pool.groups, pool.n_blocks, strict=True) if group.kind == "all"]
    return cache_used(engine) + (missing / (max(whole) * BLOCK_TOKENS) if whole else 0.0)


@dataclass
class Metrics:
    """Counters; the event loop alone changes them.

    answers   requests that gave an answer, by how it ended
    """

    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    prompt_s: float = 0.0
    generated_tokens: int = 0
    generated_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    longest: int = 0
    requests: int = 0
    answers: dict[str, int] = field(default_factory=dict)

    def count(self, timings: Timings, reason: str) -> None:
        """An answer is over."""
        self.prompt_tokens += timings.computed_n
        self.prompt_tokens_cached += timings.reused_n
        self.prompt_s += timings.prompt_ms / 1e3
        self.generated_tokens += timings.generation_n
        self.generated_s += timings.generation_ms / 1e3
        self.drafted += timings.drafted_n
        self.accepted += timings.accepted_n
        self.longest = max(self.longest, timings.prompt_n + timings.generation_n)
        self.answers[reason] = self.answers.get(reason, 0) + 1

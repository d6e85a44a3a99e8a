"""What the server has done so far, in the names of llama-server's /metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgellm.engine.requests import Timings


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

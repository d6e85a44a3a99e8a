"""What the engine works on: a caller's tokens, how far they are, and the steps that the caller gets.

A request knows what its next step computes and what comes of it; whose turn it is and who holds the blocks is the
engine's affair.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from edgellm.engine import cache
from edgellm.engine.cache import KVCache
from edgellm.kernels.program import Executor, Hook
from edgellm.kernels.token_draw import TokenDraw

SCORE_NBYTES = 64 << 20  # logits of one scoring step

FinishReason = Literal["stop", "length", "context_full", "cancelled"]


class CancelFlag(Protocol):
    """What a caller may pass to stop a request from another thread, such as ``threading.Event``."""

    def is_set(self) -> bool:
        """Whether the request is to stop."""
        ...


class TokenChoice(Protocol):
    """What a sampler gives back: the token, its log-probability, and the most likely ones when asked for."""

    @property
    def token(self) -> int:
        """The id that was chosen."""
        ...

    @property
    def logprob(self) -> float | None:
        """Its natural log-probability."""
        ...

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """The likeliest ids with theirs."""
        ...


class KernelChain(Protocol):
    """What draws tokens without Python: ``draw`` for the executor, then ``sampled`` for what came of it."""

    @property
    def draw(self) -> TokenDraw:
        """The chain, and room for some tokens."""
        ...

    def sampled(self, n: int) -> Sequence[TokenChoice]:
        """The first n tokens drawn."""
        ...


class TokenSampler(Protocol):
    """What the engine needs of ``edgellm.sampling.Sampler``."""

    @property
    def short(self) -> KernelChain | None:
        """The same choice made by kernels, where they can."""
        ...

    def sample(self, logits: np.ndarray) -> TokenChoice:
        """Choose from float32 logits (n_vocab,)."""
        ...

    def accept(self, token: int) -> None:
        """The token now stands in the text."""
        ...


class Timings(NamedTuple):
    """Counts and times of one request. Times are those of its own steps, not of waiting for others.

    prompt_n        tokens of the prompt; the cache held ``reused_n`` of them, ``computed_n`` were computed
    generation_n    tokens sampled; the first comes out of the prompt, each other one costs a decode step
    time_to_first_token_ms   from the request to its first token as the clock on the wall has it
    """

    prompt_n: int = 0
    reused_n: int = 0
    prompt_ms: float = 0.0
    generation_n: int = 0
    generation_ms: float = 0.0
    time_to_first_token_ms: float = 0.0

    @property
    def computed_n(self) -> int:
        """Tokens of the prompt that were computed."""
        return self.prompt_n - self.reused_n

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens computed per second."""
        return 1e3 * self.computed_n / self.prompt_ms if self.prompt_ms else 0.0

    @property
    def generation_tps(self) -> float:
        """Decode steps per second."""
        return 1e3 * (self.generation_n - 1) / self.generation_ms if self.generation_ms else 0.0

    def as_dict(self) -> dict[str, float]:
        """All of it, ready for JSON."""
        names = ("prompt_n", "reused_n", "computed_n", "prompt_ms", "prompt_tps", "generation_n", "generation_ms")
        return {name: getattr(self, name) for name in (*names, "generation_tps", "time_to_first_token_ms")}


class Step(NamedTuple):
    """One token of the answer. ``token`` is None when the request ended without one; ``choice`` is the sampler's."""

    token: int | None
    choice: TokenChoice | None
    finish_reason: FinishReason | None
    timings: Timings


class Progress(NamedTuple):
    """Tokens of the prompt that are done, the reused ones included, and all of them."""

    done: int
    total: int


class EngineRoom(Protocol):
    """What a request uses of the engine."""

    executor: Executor
    cache: KVCache


class Request:
    """A caller's tokens on their way through the engine. The engine's thread changes all but ``cancelled``."""

    shared = True  # takes from the prefix cache and leaves in it
    stop_ids: frozenset[int] = frozenset()

    def __init__(self, lock: threading.Lock, tokens: Sequence[int], cancel: CancelFlag | None) -> None:
        self.tokens = list(tokens)
        self.cancel = cancel
        self.cancelled = False
        self.order = 0
        self.sequence: cache.Sequence | None = None
        self.mailbox: deque[Any] = deque()
        self.error: BaseException | None = None
        self.finished = False
        self.ready = threading.Condition(lock)
        self.notify: Callable[[], None] | None = None  # called on the engine's thread; must not wait
        self.not_before = 0.0
        self.idle_since = 0.0
        self.hook: Hook | None = None

    @property
    def stopped(self) -> bool:
        """Whether the caller wants no more of it."""
        return self.cancelled or (self.cancel is not None and self.cancel.is_set())

    @property
    def n_missing(self) -> int:
        """Tokens that the cache does not hold."""
        return len(self.tokens) - (self.sequence.length if self.sequence is not None else 0)

    @property
    def alone(self) -> bool:
        """Whether it must have its steps to itself: a hook sees whole buffers."""
        return self.hook is not None

    def next_tokens(self, engine: EngineRoom, room: int) -> tuple[Sequence[int], int]:
        """The tokens to compute in the next step, at most ``room``, and how many of the last ones want logits."""
        raise NotImplementedError

    def receive(self, engine: EngineRoom, logits: np.ndarray, seconds: float) -> Iterator[Any]:
        """Those tokens are computed, in a step of so many seconds; give what the caller shall have."""
        raise NotImplementedError

    @property
    def chain(self) -> KernelChain | None:
        """What draws its next tokens without Python, where that may be."""
        return None

    @property
    def n_wanted(self) -> int:
        """Tokens that may still be sampled."""
        return 0

    def receive_drawn(self, n: int, seconds: float) -> Iterator[Any]:
        """The executor drew n tokens of ``chain`` by itself, in so many seconds; give what the caller shall have."""
        raise NotImplementedError

    def cancelled_item(self) -> Any:
        """What a caller gets in place of the rest."""
        raise NotImplementedError

    def summary(self) -> str:
        """One line about the work, for developers."""
        end = type(self.error).__name__ if self.error else "cancelled" if self.stopped else "done"
        return f"edgellm: {len(self.tokens)} tokens scored, {end}"


class GenerationRequest(Request):
    """An answer: compute what is missing, sample, until it ends."""

    def __init__(
        self,
        lock: threading.Lock,
        tokens: Sequence[int],
        cancel: CancelFlag | None,
        sampler: TokenSampler,
        limit: int,
        stop_ids: frozenset[int],
        reports: bool,
    ) -> None:
        super().__init__(lock, tokens, cancel)
        self.sampler = sampler
        self.n_prompt = len(self.tokens)
        self.limit = limit  # tokens to generate
        self.ending: FinishReason = "length"  # why there are no more
        self.stop_ids = stop_ids
        self.reports = reports
        self.reused: int | None = None
        self.generated = 0
        self.submitted = perf_counter()
        self.prompt_s = self.generation_s = self.first_s = 0.0

    def next_tokens(self, engine: EngineRoom, room: int) -> tuple[Sequence[int], int]:
        assert self.sequence is not None
        if self.reused is None:
            self.reused = self.sequence.n_reused
        missing = self.tokens[self.sequence.length : self.sequence.length + room]
        complete = self.sequence.length + len(missing) == len(self.tokens)
        return missing, 1 if complete and self.limit else 0

    def receive(self, engine: EngineRoom, logits: np.ndarray, seconds: float) -> Iterator[Any]:
        assert self.sequence is not None
        started, length = perf_counter(), self.sequence.length
        if self.reports and not self.generated:
            yield Progress(min(length, self.n_prompt), self.n_prompt)
        choice = self._sample(engine, logits[0]) if len(logits) else None
        self._count(seconds + perf_counter() - started, choice is not None)
        if choice is not None:
            yield Step(self.tokens[-1], choice, self._reason(), self.timings())
        elif length == len(self.tokens):
            yield Step(None, None, self.ending, self.timings())

    def _sample(self, engine: EngineRoom, logits: np.ndarray) -> TokenChoice:
        if not self.generated:
            assert self.sequence is not None
            engine.cache.mark(self.sequence)
        choice = self.sampler.sample(logits)
        self._accept(choice)
        return choice

    def _accept(self, choice: TokenChoice) -> None:
        token = int(choice.token)
        self.sampler.accept(token)
        self.tokens.append(token)
        self.generated += 1

    @property
    def chain(self) -> KernelChain | None:
        # the first token is wanted soon, a hook sees every step
        return self.sampler.short if self.generated and self.hook is None else None

    @property
    def n_wanted(self) -> int:
        return self.limit - self.generated

    def receive_drawn(self, n: int, seconds: float) -> Iterator[Step]:
        assert self.sampler.short is not None
        for choice in self.sampler.short.sampled(n):
            self._accept(choice)
            self._count(seconds / n, True)
            yield Step(self.tokens[-1], choice, self._reason(), self.timings())

    def _reason(self) -> FinishReason | None:
        """Why the answer is over, if it is."""
        if self.tokens[-1] in self.stop_ids:
            return "stop"
        return self.ending if self.generated >= self.limit else None

    def _count(self, seconds: float, sampled: bool) -> None:
        if self.generated <= 1:
            self.prompt_s += seconds
            if sampled:
                self.first_s = perf_counter() - self.submitted
        else:
            self.generation_s += seconds

    def timings(self) -> Timings:
        """Counts and times so far."""
        return Timings(
            self.n_prompt,
            self.reused or 0,
            1e3 * self.prompt_s,
            self.generated,
            1e3 * self.generation_s,
            1e3 * self.first_s,
        )

    def summary(self) -> str:
        t = self.timings()
        end = type(self.error).__name__ if self.error else "cancelled" if self.stopped else "done"
        return (
            f"edgellm: prompt {t.reused_n} reused + {t.computed_n} new at {t.prompt_tps:.1f} t/s, "
            f"answer {t.generation_n} at {t.generation_tps:.1f} t/s, {end}"
        )

    def cancelled_item(self) -> Step:
        return Step(None, None, "cancelled", self.timings())


class ScoringRequest(Request):
    """The logits of every position, chunk by chunk."""

    shared = False

    def __init__(
        self,
        lock: threading.Lock,
        tokens: Sequence[int],
        cancel: CancelFlag | None,
        reduce: Callable[[int, np.ndarray], Any],
    ) -> None:
        super().__init__(lock, tokens, cancel)
        self.reduce = reduce
        self.done = 0

    @property
    def alone(self) -> bool:
        return True

    def next_tokens(self, engine: EngineRoom, room: int) -> tuple[Sequence[int], int]:
        assert self.sequence is not None
        start = self.sequence.length
        if start < self.done:  # its blocks were given away
            return self.tokens[start : min(self.done, start + room)], 0
        n = min(room, max(1, SCORE_NBYTES // (4 * engine.executor.program.n_vocab)))
        missing = self.tokens[start : start + n]
        return missing, len(missing)

    def receive(self, engine: EngineRoom, logits: np.ndarray, seconds: float) -> Iterator[Any]:
        assert self.sequence is not None
        if not len(logits):
            return
        result = self.reduce(self.done, logits)
        self.done = self.sequence.length
        yield result
        if self.done == len(self.tokens):
            yield None

    def cancelled_item(self) -> None:
        return None


class Errand(Request):
    """A caller's function that wants the executor and the cache to itself, between two steps."""

    shared = False

    def __init__(self, lock: threading.Lock, function: Callable[[KVCache, Executor], Any]) -> None:
        super().__init__(lock, (), None)
        self.function = function

    @property
    def alone(self) -> bool:
        return True

    def run(self, engine: EngineRoom) -> Iterator[Any]:
        """The function's result in a tuple, then the end."""
        yield (self.function(engine.cache, engine.executor),)
        yield None

    def summary(self) -> str:
        return "edgellm: the engine was lent out"

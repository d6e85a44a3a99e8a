"""What the engine works on: a caller's tokens, how far they are, and what the caller gets.

A request says what it would compute next, how much of a computed step it accepts, and what it publishes of that. Whose
turn it is and who holds the blocks is the scheduler's affair.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from edgellm.adapters.scales import AdapterScales
from edgellm.engine import cache
from edgellm.engine.cache import KVCache
from edgellm.engine.speculation import Drafter
from edgellm.formats.errors import NumericError
from edgellm.kernels.kv import BLOCK_TOKENS
from edgellm.kernels.program import Executor, Hook
from edgellm.sampling.choice import Sampled

if TYPE_CHECKING:
    from edgellm.engine.disk_cache import Trail
    from edgellm.engine.snapkv import Watch
    from edgellm.sampling import Sampler
    from edgellm.sampling.short_chain import ShortChain

SCORE_NBYTES = 64 << 20  # logits of one scoring step

FinishReason = Literal["stop", "length", "context_full", "cancelled"]


class Accepted(NamedTuple):
    """How many tokens of its part of a step a request has accepted, what it raised, and the seconds it took."""

    n: int
    error: BaseException | None
    seconds: float

    @classmethod
    def of(cls, accept: Callable[[], int]) -> Accepted:
        """Let a request look at its part."""
        n, error, started = 0, None, perf_counter()
        try:
            n = accept()
        except BaseException as raised:
            error = raised
        return cls(n, error, perf_counter() - started)


class CancelFlag(Protocol):
    """What a caller may pass to stop a request from another thread, such as ``threading.Event``."""

    def is_set(self) -> bool:
        """Whether the request is to stop."""
        ...


class Timings(NamedTuple):
    """Counts and times of one request. Times are those of its own steps, not of waiting for others.

    prompt_n        tokens of the prompt; the cache held ``reused_n`` of them, ``computed_n`` were computed
    generation_n    tokens sampled; the first comes out of the prompt, the others out of decode steps
    drafted_n       tokens that speculation tried; ``accepted_n`` of them turned out to be those of the answer
    gained_n        tokens more, or less than 0, than plain decoding would have made in the time of these steps
    time_to_first_token_ms   from the request to its first token as the clock on the wall has it
    """

    prompt_n: int = 0
    reused_n: int = 0
    prompt_ms: float = 0.0
    generation_n: int = 0
    generation_ms: float = 0.0
    time_to_first_token_ms: float = 0.0
    drafted_n: int = 0
    accepted_n: int = 0
    gained_n: float = 0.0

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
        """Tokens after the first one per second."""
        return 1e3 * (self.generation_n - 1) / self.generation_ms if self.generation_ms else 0.0

    def as_dict(self) -> dict[str, float]:
        """All of it, ready for JSON."""
        computed = {name: getattr(self, name) for name in ("computed_n", "prompt_tps", "generation_tps")}
        return self._asdict() | computed


class GeneratedToken(NamedTuple):
    """A token of the answer; None when the request ended without another. ``choice`` is the sampler's."""

    token: int | None
    choice: Sampled | None
    finish_reason: FinishReason | None
    timings: Timings


class Progress(NamedTuple):
    """Tokens of the prompt that are done, the reused ones included, and all of them."""

    done: int
    total: int
    reused: int = 0


class Request:
    """A caller's tokens on their way through the engine. The engine's thread changes all but ``cancelled``.

    A step is a transaction: ``next_tokens`` (and ``draft``) are computed, ``accept`` says how many of them stand in the
    text, the cache keeps those, ``publish`` gives the caller what came of it. Until ``accept`` nothing has happened,
    and whatever the cache does not hold afterwards is among the next tokens.
    """

    shared = True  # takes from the prefix cache and leaves in it
    hidden = False  # wants hidden states in place of logits
    whole = False  # has all its tokens in one step
    output_rows: Sequence[int] | None = None  # of its next tokens: those that want logits, where they are not the last
    types: Sequence[int] | None = None  # which text of a pair each of them is of
    stop_ids: frozenset[int] = frozenset()
    adapters: AdapterScales | None = None  # None: those that the engine has for everybody
    choice_end = 0  # where the keys of its prompt are chosen that stay (snapkv.py), 0 for nowhere

    def __init__(self, lock: threading.Lock, tokens: Sequence[int], cancel: CancelFlag | None) -> None:
        self.tokens = list(tokens)
        self.n_prompt = len(self.tokens)
        self.cancel = cancel
        self.cancelled = False
        self.order = 0
        self.turn = 0  # of a whole text: when it had its last step, counted as ``order`` is
        self.sequence: cache.Sequence | None = None
        self.mailbox: deque[Any] = deque()
        self.error: BaseException | None = None
        self.finished = False
        self.ready = threading.Condition(lock)
        self.notify: Callable[[], None] | None = None  # called on the engine's thread; must not wait
        self.not_before = 0.0
        self.idle_since = 0.0
        self.has_moved = False  # to another executor than it began on
        self.gave_way = False  # a long step of it was broken off for others; so much is lost once
        self.hook: Hook | None = None
        self.drafter: Drafter | None = None
        self.gained = 0.0  # tokens, by its drafts
        self.trail: Trail | None = None  # what of it is on the disk
        self.watch: Watch | None = None  # what the keys are chosen by

    @property
    def stopped(self) -> bool:
        """Whether the caller wants no more of it."""
        return self.cancelled or (self.cancel is not None and self.cancel.is_set())

    @property
    def variant(self) -> str:
        """What else than its tokens makes its numbers; see ``KVCache.open``."""
        return self.adapters.variant if self.adapters is not None else ""

    def blamed(self, error: NumericError) -> NumericError:
        """What its caller is told of a step that made no numbers."""
        return error if self.adapters is None else self.adapters.blamed(error)

    @property
    def n_computed(self) -> int:
        """Tokens that the cache holds."""
        return self.sequence.length if self.sequence is not None else 0

    @property
    def n_missing(self) -> int:
        """Tokens that it does not hold."""
        return len(self.tokens) - self.n_computed

    @property
    def window_start(self) -> int:
        """The first of the tokens that choose."""
        return self.choice_end - BLOCK_TOKENS

    @property
    def chooses(self) -> bool:
        """Whether its next step is that of the tokens that choose."""
        held = self.sequence
        return bool(self.choice_end and held is not None and not held.dropped and held.length == self.window_start)

    @property
    def room(self) -> int:
        """How many tokens its next step may have at most."""
        if not self.choice_end or self.sequence is None or self.sequence.dropped:
            return len(self.tokens)
        return self.window_start - self.n_computed or BLOCK_TOKENS

    @property
    def alone(self) -> bool:
        """Whether it must have its steps to itself: a hook sees whole buffers."""
        return self.hook is not None or self.chooses

    @property
    def chain(self) -> ShortChain | None:
        """What draws its next tokens without Python, where that may be."""
        return None

    @property
    def n_wanted(self) -> int:
        """Tokens that may still be sampled."""
        return 0

    def next_tokens(self, n: int) -> tuple[Sequence[int], int]:
        """The missing tokens to compute next, at most n, and how many of the last ones want logits."""
        raise NotImplementedError

    def draft_limit(self, n: int) -> int:
        """How many tokens may be drafted, at most n."""
        return 0

    def draft(self, n: int) -> Sequence[int]:
        """At most n tokens that may come after them."""
        return ()

    def allowed(self, draft: Sequence[int]) -> Sequence[int]:
        """So much of a draft as may come."""
        return draft

    def accept(self, tokens: Sequence[int], logits: np.ndarray) -> int:
        """``tokens`` are computed, with logits (n_outputs, n_vocab); how many of them, from the first on, are right."""
        raise NotImplementedError

    def accept_drawn(self, tokens: Sequence[int], n: int) -> int:
        """The same for n tokens of ``chain`` that the executor drew by itself; all but the last stand in ``tokens``."""
        raise NotImplementedError

    def publish(self, seconds: float) -> Iterator[Any]:
        """What the caller shall have of a step that took so long."""
        raise NotImplementedError

    def cancelled_item(self) -> Any:
        """What a caller gets in place of the rest."""
        return None

    def summary(self) -> str:
        """One line about the work, for developers."""
        end = type(self.error).__name__ if self.error else "cancelled" if self.stopped else "done"
        return f"edgellm: {self._work()}, {end}"

    def _work(self) -> str:
        raise NotImplementedError


class AnswerRequest(Request):
    """A text that is written: what its caller is told of it.

    stop_ids   tokens that end it
    reports    the caller wants progress of the prompt, too
    """

    ending: FinishReason = "length"  # why there are no more
    reused: int | None = None
    drafted = accepted = 0

    def __init__(
        self,
        lock: threading.Lock,
        tokens: Sequence[int],
        cancel: CancelFlag | None,
        stop_ids: frozenset[int],
        reports: bool,
    ) -> None:
        super().__init__(lock, tokens, cancel)
        self.stop_ids, self.reports = stop_ids, reports
        self.published = 0
        self.submitted = perf_counter()
        self.prompt_s = self.generation_s = self.first_s = 0.0

    def timings(self) -> Timings:
        """Counts and times so far."""
        return Timings(
            self.n_prompt,
            self.reused or 0,
            1e3 * self.prompt_s,
            self.published,
            1e3 * self.generation_s,
            1e3 * self.first_s if self.published else 0.0,
            self.drafted,
            self.accepted,
            round(self.gained, 2),
        )

    def cancelled_item(self) -> GeneratedToken:
        return GeneratedToken(None, None, "cancelled", self.timings())


class GenerationRequest(AnswerRequest):
    """An answer: compute what is missing, sample, until it ends."""

    def __init__(
        self,
        lock: threading.Lock,
        tokens: Sequence[int],
        cancel: CancelFlag | None,
        sampler: Sampler,
        limit: int,
        stop_ids: frozenset[int],
        reports: bool,
    ) -> None:
        super().__init__(lock, tokens, cancel, stop_ids, reports)
        self.sampler = sampler
        self.mask = sampler.mask
        self.limit = limit  # tokens to generate
        self.choices: list[Sampled] = []  # accepted and not published yet

    @property
    def generated(self) -> int:
        """Tokens sampled."""
        return len(self.tokens) - self.n_prompt

    @property
    def n_wanted(self) -> int:
        return self.limit - self.generated

    @property
    def chain(self) -> ShortChain | None:
        # the first token is wanted soon, a hook sees every step
        return self.sampler.short if self.generated and self.hook is None else None

    def next_tokens(self, n: int) -> tuple[Sequence[int], int]:
        missing = self.tokens[self.n_computed : self.n_computed + n]
        wanted = len(missing) == self.n_missing and self.limit
        if wanted and self.mask is not None and (self.generated or not self.sampler.begins):
            self.mask.prepare()
        return missing, 1 if wanted else 0

    def draft_limit(self, n: int) -> int:
        return max(0, min(n, self.n_wanted - 1)) if self.drafter is not None and self.generated else 0

    def draft(self, n: int) -> Sequence[int]:
        if self.drafter is None or not self.generated:
            return ()
        return self.allowed(self.drafter.draft(self.tokens, self.draft_limit(n)))

    def allowed(self, draft: Sequence[int]) -> Sequence[int]:
        return draft[: self.mask.prepare(draft)] if self.mask is not None else draft

    def accept(self, tokens: Sequence[int], logits: np.ndarray) -> int:
        n_known = min(self.n_missing, len(tokens))
        if len(logits) and self.sampler.begins and not self.generated:
            self._begin()
            return n_known
        n = self._append(tokens, n_known, map(self.sampler.sample, logits))
        self.drafted += len(tokens) - n_known
        self.accepted += n - n_known
        self._append_forced()
        return n

    def accept_drawn(self, tokens: Sequence[int], n: int) -> int:
        assert self.sampler.short is not None
        return self._append(tokens, 1, self.sampler.short.sampled(n))

    def _append(self, tokens: Sequence[int], n_known: int, choices: Iterable[Sampled]) -> int:
        """Take the choices one by one for as long as ``tokens``, of which n are known, go on as they do."""
        for n, choice in enumerate(choices, n_known):
            self._take(choice)
            if n == len(tokens) or tokens[n] != self.tokens[-1] or self._reason():
                return n
        return n_known

    def _begin(self) -> None:
        """Take what the answer is known to begin with: the next step computes all of it at once."""
        for token in self.sampler.begins:
            self._take(Sampled(token))
            if self._reason():
                return
        self._append_forced()

    def _append_forced(self) -> None:
        """Take what the mask leaves no choice about: the next step computes all of it at once."""
        while self.mask is not None and self.hook is None and self.generated and not self._reason():
            if (choice := self.sampler.forced()) is None:
                return
            self._take(choice)

    def _take(self, choice: Sampled) -> None:
        token = int(choice.token)
        self.sampler.accept(token)
        self.tokens.append(token)
        self.choices.append(choice)

    def publish(self, seconds: float) -> Iterator[Progress | GeneratedToken]:
        choices, self.choices = self.choices, []
        if self.reused is None and self.sequence is not None:
            self.reused = self.sequence.n_reused
        if self.reports and not self.published:
            yield Progress(min(self.n_computed, self.n_prompt), self.n_prompt, self.reused or 0)
        for choice in choices:
            self.published += 1
            self._count(seconds / len(choices))
            reason = self._reason() if self.published == self.generated else None
            ends_itself = reason == "stop" and int(choice.token) not in self.stop_ids  # and the token is part of it
            yield GeneratedToken(int(choice.token), choice, None if ends_itself else reason, self.timings())
            if ends_itself:
                yield GeneratedToken(None, None, reason, self.timings())
        if not choices:
            self._count(seconds)
            if not self.n_missing:  # and no token was wanted
                yield GeneratedToken(None, None, self.ending, self.timings())

    def _reason(self) -> FinishReason | None:
        """Why the answer is over, if it is."""
        if self.tokens[-1] in self.stop_ids or (self.mask is not None and self.mask.complete):
            return "stop"
        return self.ending if self.generated >= self.limit else None

    def _count(self, seconds: float) -> None:
        if self.published > 1:
            self.generation_s += seconds
        else:
            self.prompt_s += seconds
            self.first_s = perf_counter() - self.submitted

    def _work(self) -> str:
        t = self.timings()
        drafts = f", {t.accepted_n} of {t.drafted_n} drafted" if t.drafted_n else ""
        return (
            f"prompt {t.reused_n} reused + {t.computed_n} new at {t.prompt_tps:.1f} t/s, "
            f"answer {t.generation_n} at {t.generation_tps:.1f} t/s{drafts}"
        )


class ScoringRequest(Request):
    """The logits of every position, chunk by chunk."""

    shared = False

    def __init__(
        self,
        lock: threading.Lock,
        tokens: Sequence[int],
        cancel: CancelFlag | None,
        reduce: Callable[[int, np.ndarray], Any],
        n_vocab: int,
    ) -> None:
        super().__init__(lock, tokens, cancel)
        self.reduce = reduce
        self.max_outputs = max(1, SCORE_NBYTES // (4 * n_vocab))
        self.done = 0
        self.results: list[Any] = []

    @property
    def alone(self) -> bool:
        return True

    def next_tokens(self, n: int) -> tuple[Sequence[int], int]:
        start = self.n_computed
        if start < self.done:  # its blocks were given away
            return self.tokens[start : min(self.done, start + n)], 0
        missing = self.tokens[start : start + min(n, self.max_outputs)]
        return missing, len(missing)

    def accept(self, tokens: Sequence[int], logits: np.ndarray) -> int:
        if len(logits):
            self.results.append(self.reduce(self.done, logits))
            self.done += len(logits)
        return len(tokens)

    def publish(self, seconds: float) -> Iterator[Any]:
        results, self.results = self.results, []
        yield from results
        if results and self.done == len(self.tokens):
            yield None

    def _work(self) -> str:
        return f"{len(self.tokens)} tokens scored"


class CallRequest(Request):
    """A caller's function that wants the executor and the cache to itself, between two steps."""

    shared = False

    def __init__(self, lock: threading.Lock, function: Callable[[KVCache, Executor], Any]) -> None:
        super().__init__(lock, (), None)
        self.function = function

    @property
    def alone(self) -> bool:
        return True

    def _work(self) -> str:
        return "the engine was lent out"

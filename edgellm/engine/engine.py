"""Token ids in, token ids out: longest known prefix, prefill in chunks, then one token at a time, or several.

The engine knows nothing about text. It owns the executor and the KV cache, and one thread of its own is the only one
that touches them; callers on any number of threads hand in requests and take items out of a small mailbox. So an
interrupt in a caller never leaves a half-written cache, and a caller that leaves is noticed before the next step.

A request is its tokens. Whatever the cache does not hold yet is computed, at most ``executor.max_tokens`` at a time;
when nothing is missing the next token is sampled and becomes the one that is missing. Prefill, decode and the return
of a preempted request are the same step, and requests share it (scheduler.py). A step is a transaction: it is run, each
request says how many of its tokens it accepts, the cache keeps those, and the callers get what came of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from edgellm.adapters.scales import NO_ADAPTERS, AdapterScales
from edgellm.engine.cache import KVCache
from edgellm.engine.denoising import DenoisingRequest, check_in_order
from edgellm.engine.endings import close_at_exit, closes_when_dropped, leave_at_exit
from edgellm.engine.request_checks import check_callables, check_logits, check_max_tokens, check_tokens
from edgellm.engine.requests import (
    Accepted,
    CallRequest,
    CancelFlag,
    GeneratedToken,
    GenerationRequest,
    Progress,
    Request,
    ScoringRequest,
)
from edgellm.engine.scheduler import LEAD, LONG_TOKENS, POLL_S, Scheduled, Scheduler, make_batch
from edgellm.engine.speculation import Drafter, DraftSource
from edgellm.formats.errors import (
    ClosedError,
    DeviceLostError,
    EdgeLLMError,
    MemoryWouldExceedError,
    NumericError,
    ParameterError,
)
from edgellm.kernels.program import (
    Batch,
    DecodingExecutor,
    Executor,
    Hook,
    InterruptibleExecutor,
    LoggingExecutor,
    TogetherDecodingExecutor,
)

if TYPE_CHECKING:
    from edgellm.sampling import Sampler

DEBUG = os.environ.get("EDGELLM_DEBUG", "0") not in ("", "0")  # a line on standard error for each request

DEVICE_GONE = (DeviceLostError, MemoryWouldExceedError)
"""What an executor raises when it can go on no more, and another one can."""

T = TypeVar("T")


class Engine:
    """Runs requests of any number of threads on one executor. ``close()`` frees it; requests then end with an error.

    executor   owned from now on: nobody else may run or close it
    cache      likewise; its ``n_ctx`` is the longest sequence
    eog_ids    tokens that end an answer
    drafter    makes the one that guesses the tokens of an answer, for speculative decoding; a ``DraftSource`` is owned
    """

    def __init__(
        self,
        executor: Executor,
        cache: KVCache,
        eog_ids: Collection[int] = (),
        drafter: Callable[[], Drafter] | None = None,
    ) -> None:
        self.executor = executor
        self.intact: Callable[[], None] = lambda: None  # after each step: raises once its weights are not to be trusted
        self.cache = cache
        self.eog_ids = frozenset(eog_ids)
        self.n_ctx = cache.n_ctx
        self.scheduler = Scheduler(cache, executor.max_tokens)
        self._drafter = drafter
        self.adapters: Callable[[], AdapterScales] = lambda: NO_ADAPTERS  # of requests that name none
        if isinstance(drafter, DraftSource):
            self.scheduler.source = drafter
        self.fallback: Callable[[], tuple[Executor, KVCache]] | None = None  # what goes on when a device is gone
        self.notices: list[str] = []  # what happened, for whoever shows it
        self._use(executor)
        self.lock = threading.Lock()
        self._work = threading.Condition(self.lock)
        self.scheduler.wake = partial(_notify, self._work)
        self._thread: threading.Thread | None = None  # alive while there are requests
        self._closed = False
        self._closing = threading.Lock()
        self._forgotten = closes_when_dropped(self, executor)
        close_at_exit(self)
        self._pid = os.getpid()

    def generate(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        *,
        max_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        cancel: CancelFlag | None = None,
        progress: Callable[[int, int], None] | None = None,
        hook: Hook | None = None,
        adapters: AdapterScales | None = None,
    ) -> Generator[GeneratedToken, None, None]:
        """The tokens of an answer to ``prompt``; the last one has a ``finish_reason``. Closing the iterator cancels.

        max_tokens   tokens to generate at most ("length"); None or -1 goes on to the context's end ("context_full")
        stop_ids     tokens that end the answer, ``eog_ids`` when None; pass () to go on over them
        progress     called on this thread with (done, total) tokens of the prompt, after each chunk
        hook         see ``Executor.run``; called on the engine's thread. It sees every token, and what it may have
                     changed is nobody else's: nothing is taken from the prefix cache or left in it
        adapters     how much it has of each; None: what the engine has for everybody

        ContextFullError when the prompt is longer than the context, NumericError when a step gives NaN.
        """
        request = self._generation(prompt, sampler, max_tokens, stop_ids, cancel, progress, hook, adapters)
        return self._tokens(request, progress)

    def agenerate(
        self, prompt: Sequence[int], sampler: Sampler, **options: Any
    ) -> AsyncGenerator[GeneratedToken, None]:
        """``generate`` for ``async for``; cancelling the task or closing the iterator cancels the request."""
        return self._atokens(self._generation(prompt, sampler, **options), options.get("progress"))

    def items(
        self, prompt: Sequence[int], sampler: Sampler, **options: Any
    ) -> Generator[Progress | GeneratedToken, None, None]:
        """``generate`` with the progress of the prompt among the tokens, as it comes."""
        return self._items(self._generation(prompt, sampler, **options, progress=_ignore))

    def aitems(
        self, prompt: Sequence[int], sampler: Sampler, **options: Any
    ) -> AsyncGenerator[Progress | GeneratedToken, None]:
        """``items`` for ``async for``."""
        return self._aitems(self._generation(prompt, sampler, **options, progress=_ignore))

    def score(
        self,
        tokens: Sequence[int],
        reduce: Callable[[int, np.ndarray], T],
        cancel: CancelFlag | None = None,
        adapters: AdapterScales | None = None,
    ) -> Iterator[T]:
        """``reduce(start, logits)`` for the positions from ``start`` on, chunk by chunk until all tokens are through.

        logits is float32 (n, n_vocab), what follows each position; it is valid only inside ``reduce``, which runs on
        the engine's thread. Nothing is taken from the prefix cache or left in it.
        """
        check_logits(self.executor.program)
        check_in_order(self.executor.program)
        self.check(tokens)
        request = ScoringRequest(self.lock, tokens, cancel, reduce, self.executor.program.n_vocab)
        request.adapters = adapters
        self.submit(request)
        try:
            while (item := self.take(request)) is not None:
                yield item
        finally:
            self.drop(request)

    def call(self, function: Callable[[KVCache, Executor], T]) -> T:
        """The result of ``function(cache, executor)``, run on the engine's thread between two steps.

        Nothing else touches either while it runs. ParameterError on the engine's own thread, ClosedError after close.
        """
        request = CallRequest(self.lock, function)
        self.submit(request)
        try:
            return self.take(request)[0]
        finally:
            self.drop(request)

    def close(self) -> None:
        """End all requests, stop the thread and close the executor. May be called twice.

        ParameterError on the engine's own thread: a hook, a sampler or ``call`` cannot end the step it is part of.
        """
        with self.lock:
            thread = self._thread
            if thread is threading.current_thread():
                raise ParameterError("A hook closed its own model. Close it after the answer that has the hook.")
            self._closed = True
            self._hurry()
            self._work.notify_all()
        if thread is not None:
            thread.join()
        self._forgotten.detach()
        if self.scheduler.disk is not None:
            self.scheduler.disk.close()
        with self._closing:
            if self.scheduler.source is not None:  # which may run on the executor's threads
                self.scheduler.source.close()
            self.executor.close()

    def abandon(self, error: BaseException) -> None:
        """Give all callers this error now and take no more, while the engine's thread hangs in a step that may end."""
        leave_at_exit(self)
        with self.lock:
            self._closed = True
            requests = list(self.scheduler.requests)
            for request in requests:
                request.error, request.finished = error, True
                request.ready.notify()
        for request in requests:
            if request.notify is not None:
                request.notify()

    def is_wanted(self) -> bool:
        """Whether there is a request that could have a step now."""
        return any(len(request.mailbox) < LEAD for request in list(self.scheduler.requests))

    def is_running(self) -> bool:
        """Whether its thread has something to do, or hangs."""
        return self._thread is not None

    def is_ours(self) -> bool:
        """Whether it was made in this process: a fork takes no threads along."""
        return self._pid == os.getpid()

    # -- the caller's side -----------------------------------------------------------------------------------------

    def check(self, tokens: Sequence[int], max_tokens: int | None = None) -> None:
        """Raise what ``generate`` would raise for these, ContextFullError or ParameterError."""
        check_tokens(tokens, self.n_ctx, self.executor.program.n_vocab)
        check_max_tokens(max_tokens)

    def _generation(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        max_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        cancel: CancelFlag | None = None,
        progress: Callable[[int, int], None] | None = None,
        hook: Hook | None = None,
        adapters: AdapterScales | None = None,
    ) -> Request:
        check_logits(self.executor.program)
        self.check(prompt, max_tokens)
        check_callables(cancel, progress, hook)
        # every position of the context may be filled, and the last one still gives a token where it is the next
        denoising = self.executor.program.denoising
        room = self.n_ctx - len(prompt) + (denoising is None)
        limit = room if max_tokens is None or max_tokens == -1 else min(room, max_tokens)
        stops = self.eog_ids if stop_ids is None else frozenset(stop_ids)
        kind = GenerationRequest if denoising is None else partial(DenoisingRequest, denoising)
        request = kind(self.lock, prompt, cancel, sampler, limit, stops, progress is not None)
        request.hook, request.shared, request.adapters = hook, hook is None, adapters
        if self._drafter is not None and hook is None:  # a hook shall see no token that was only guessed
            request.drafter = self._drafter()
        request.ending = "length" if limit == max_tokens else "context_full"
        request.choice_end = self.scheduler.choice_end(len(prompt))
        return request

    def submit(self, *requests: Request) -> None:
        """Put requests in line, together."""
        if not self.is_ours():
            raise ClosedError(
                "The model was loaded before a fork, which takes no threads along. Load it in this process."
            )
        if threading.current_thread() is self._thread:
            raise ParameterError("A hook asked its own model for an answer. Do it after the answer that has the hook.")
        with self.lock:
            if self._closed:
                raise ClosedError("The model is closed. Load it again to go on.")
            for request in requests:
                request.adapters = self.adapters() if request.adapters is None else request.adapters
                draw = getattr(getattr(request, "sampler", None), "draw", None)
                if draw is not None and draw is not getattr(self.executor, "draw", None):
                    request.has_moved = True  # its sampler is older than this executor
                self.scheduler.add(request)
            self._hurry()
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="edgellm-engine", daemon=True)
                self._thread.start()
            else:
                self._work.notify()

    def _tokens(
        self, request: Request, progress: Callable[[int, int], None] | None
    ) -> Generator[GeneratedToken, None, None]:
        with contextlib.closing(self._items(request)) as items:
            for item in items:
                if isinstance(item, GeneratedToken):
                    yield item
                elif progress is not None:
                    progress(item.done, item.total)

    async def _atokens(
        self, request: Request, progress: Callable[[int, int], None] | None
    ) -> AsyncGenerator[GeneratedToken, None]:
        async with contextlib.aclosing(self._aitems(request)) as items:
            async for item in items:
                if isinstance(item, GeneratedToken):
                    yield item
                elif progress is not None:
                    progress(item.done, item.total)

    def _items(self, request: Request) -> Generator[Progress | GeneratedToken, None, None]:
        self.submit(request)
        try:
            while True:
                item = self.take(request)
                yield item
                if isinstance(item, GeneratedToken) and item.finish_reason:
                    return
        finally:
            self.drop(request)

    async def _aitems(self, request: Request) -> AsyncGenerator[Progress | GeneratedToken, None]:
        import asyncio  # 40 ms, and most programs do not need it

        loop = asyncio.get_running_loop()
        ready = asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits
                loop.call_soon_threadsafe(ready.set)

        request.notify = notify
        self.submit(request)
        try:
            while True:
                ready.clear()
                item = self._take_now(request)
                if item is None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(ready.wait(), POLL_S if request.cancel is not None else None)
                else:
                    yield item
                    if isinstance(item, GeneratedToken) and item.finish_reason:
                        return
        finally:
            self.drop(request)

    def take(self, request: Request) -> Any:
        """The next item for the caller, waiting for it."""
        with self.lock:
            while True:
                found, item = self._look(request)
                if found:
                    return item
                # short waits: a wait without an end cannot be interrupted on every system
                request.ready.wait(POLL_S)

    def _take_now(self, request: Request) -> Any:
        """The next item, or None when there is none yet."""
        with self.lock:
            return self._look(request)[1]

    def _look(self, request: Request) -> tuple[bool, Any]:
        if request.stopped and not request.finished:
            request.cancelled = True
            self._hurry()
            self._work.notify()
            return True, request.cancelled_item()
        if request.mailbox:
            item = request.mailbox.popleft()
            request.idle_since = 0.0
            self._work.notify()
            return True, item
        if request.error is not None:
            raise request.error
        return False, None

    def drop(self, request: Request) -> None:
        """The caller is gone; the engine lets go of the request before its next step."""
        request.cancelled = True
        self._hurry()
        # never wait here: the garbage collector may close an iterator on a thread that holds the lock
        if self.lock.acquire(blocking=False):
            self._work.notify()
            self.lock.release()

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while requests := self._next():
                self._advance(requests)
        except BaseException as error:  # our own mistake; nobody may wait for ever because of it
            with self.lock:
                self._thread = None
                for request in list(self.scheduler.requests):
                    with contextlib.suppress(Exception):  # what ended one may fail with the next
                        self._end(request, error)
            raise

    def _next(self) -> list[Request]:
        """The requests that share the next step; none when there is nothing left to do."""
        while True:
            with self.lock:
                self._hurry(False)  # before the looks: whoever comes or leaves after them, ends the run that follows
                if not (over := self._over()):
                    if turn := self.scheduler.next_in_line():
                        return turn
                    if not self.scheduler.requests:
                        self._thread = None
                        return []
                    self._work.wait(POLL_S)
            for request, error in over:
                self._settle(request, error)
            with self.lock:
                for request, error in over:
                    self._end(request, error)

    def _over(self) -> list[tuple[Request, BaseException | None]]:
        """The requests whose callers have left, or all of them once the engine is closed, and why."""
        requests = self.scheduler.requests
        over: list[tuple[Request, BaseException | None]] = [(request, None) for request in requests if request.stopped]
        if self._closed:
            error = ClosedError("The model was closed while it answered. Load it again.")
            over += [(request, error) for request in requests if not request.stopped]
        return over

    def _advance(self, requests: list[Request]) -> None:
        """One step for all of these; each gets what comes of its own tokens."""
        try:
            self._step(requests)
        except DEVICE_GONE as error:
            if not self._fall_back(error):
                for request in requests:
                    if not request.finished:
                        self._deliver(request, [], error)

    def _fall_back(self, error: EdgeLLMError) -> bool:
        """Take another executor in place of one whose device is gone; whether there is one.

        Requests go on from their tokens: what they miss, which is all of it, is among the next ones.
        """
        if self.fallback is None:
            return False
        make, self.fallback = self.fallback, None
        try:
            executor, cache = make()
        except Exception:  # there is no memory for it, say; the first error tells more
            return False
        with self.lock:
            gone, self.executor, self.cache, self.scheduler.cache = self.executor, executor, cache, cache
            self._use(executor)
            self._forgotten.detach()
            self._forgotten = closes_when_dropped(self, executor)
            disk, self.scheduler.disk = self.scheduler.disk, None  # what it keeps is that executor's
            for request in self.scheduler.requests:
                if request.trail is not None:
                    request.trail.stop()
                request.sequence, request.trail, request.has_moved = None, None, True
            self.notices.append(f"{str(error).partition('. ')[0]}. The {executor.backend} goes on with every answer.")
        if disk is not None:
            disk.close()
        gone.close()
        return True

    def _use(self, executor: Executor) -> None:
        """Find out what it can beside a step, once: isinstance takes long with a protocol."""
        self._decoder = executor if isinstance(executor, DecodingExecutor) else None
        self._together = executor if isinstance(executor, TogetherDecodingExecutor) else None
        self._interruptible = executor if isinstance(executor, InterruptibleExecutor) else None
        self._logging = executor if isinstance(executor, LoggingExecutor) and executor.program.log_rows else None
        self.scheduler.interruptible = self._interruptible is not None
        self.scheduler.tap_into(executor)

    def _hurry(self, wanted: bool = True) -> None:
        """Let a run end with the step that it is at: there is something to look at. Needs no lock."""
        if (together := self._together) is not None:
            together.hurry(wanted)

    def _step(self, requests: list[Request]) -> None:
        first = requests[0]
        if isinstance(first, CallRequest):
            try:
                self._deliver(first, [(first.function(self.cache, self.executor),), None])
            except BaseException as error:
                if isinstance(error, DEVICE_GONE) and self.fallback is not None:
                    raise
                self._deliver(first, [], error)
            return
        started = perf_counter()
        scheduled = self.scheduler.schedule(requests, self._fail)
        if scheduled and not (
            self._run_on(scheduled[0], started) if len(scheduled) == 1 else self._run_together(scheduled, started)
        ):
            self._run(scheduled, started)

    def _fail(self, request: Request, error: BaseException) -> None:
        """It cannot have a step; a device that is gone is everybody's affair."""
        if isinstance(error, DEVICE_GONE):
            raise error
        self._deliver(request, [], error)

    def _run(self, scheduled: list[Scheduled], started: float) -> None:
        """A step. Up to the commit it leaves no trace: what fails is tried again in parts."""
        try:
            batch = self._batch(scheduled)
            try:
                logits = self._logits(scheduled, batch)
            finally:  # also in the place of a NaN, which would be its consequence
                self.intact()
            if logits is None:
                return
        except NumericError as error:
            if len(scheduled) == 1 and not scheduled[0].n_drafted:
                self._deliver(scheduled[0].request, [], scheduled[0].request.blamed(error))
            else:  # find out whose it is; after a token that was only guessed it is nobody's
                self.scheduler.drop_drafts()
                for part in scheduled:
                    self._run([part.without_draft()], perf_counter())
            return
        except DEVICE_GONE:
            raise
        except BaseException as error:
            for part in scheduled:
                self._deliver(part.request, [], error)
            return
        seconds, end, accepted, kept = perf_counter() - started, 0, [], []
        self.scheduler.tap(scheduled)
        for part in scheduled:
            mine, end = logits[end : end + part.n_outputs], end + part.n_outputs
            accepted.append(Accepted.of(partial(part.request.accept, part.tokens, mine)))
        replay_s = self._take_back(scheduled, batch, [one.n for one in accepted])
        for part, one in zip(scheduled, accepted, strict=True):
            n_computed = one.n if batch.logged else 0
            kept.append(self._commit(part, part.tokens, one, seconds + replay_s, n_computed))
        self.scheduler.note(scheduled, kept, seconds, replay_s=replay_s)

    def _batch(self, scheduled: list[Scheduled]) -> Batch:
        """A step, logged where it may be taken back."""
        batch, executor = make_batch(scheduled), self._logging
        is_logged = executor is not None and any(part.n_drafted for part in scheduled)
        return replace(batch, logged=True) if is_logged and len(batch) <= self.executor.program.log_rows else batch

    def _take_back(self, scheduled: list[Scheduled], batch: Batch, counts: Sequence[int]) -> float:
        """Let states be behind so many tokens of each part of a step that is logged; the seconds that it took."""
        started = perf_counter()
        if batch.logged and self._logging is not None:
            behind = [n if n < len(part.tokens) else 0 for part, n in zip(scheduled, counts, strict=True)]
            if any(behind):
                self._logging.replay(batch, behind)
        return perf_counter() - started

    def _logits(self, scheduled: list[Scheduled], batch: Batch) -> np.ndarray | None:
        """Those of a step; None when a long one was broken off, as all its callers left, or another came to a lone."""
        request, scheduler = scheduled[0].request, self.scheduler
        if (watch := scheduler.watch(scheduled[0], self.executor)) is not None:
            return self.executor.run(batch, watch)
        alone = request is scheduler.long
        is_long = alone or (request.whole and len(batch) > LONG_TOKENS)
        if self._interruptible is None or not is_long or request.hook is not None:
            return self.executor.run(batch, request.hook)

        def wanted() -> bool:
            scheduler.n_looks += 1
            left = self._closed or all(part.request.stopped for part in scheduled)
            return not (left or (alone and len(scheduler.requests) > 1))

        logits = self._interruptible.run_while(batch, wanted)
        request.gave_way = logits is None
        return logits

    def _run_on(self, part: Scheduled, started: float) -> bool:
        """Several tokens of one answer without Python between them; False where there are none such."""
        request = part.request
        if self._decoder is None or request.has_moved:  # its chain is of another executor
            return False
        if (chain := request.chain) is None or not (n := self.scheduler.run_length(part)):
            return False
        try:
            n_drawn = self._decoder.decode(make_batch([part]), n, chain.draw, request.stop_ids)
            self.intact()
        except DEVICE_GONE:
            raise
        except BaseException as error:
            self._deliver(request, [], error)
            return True
        if not n_drawn:  # the step that comes next says what is wrong
            return False
        tokens = [*part.tokens, *chain.draw.tokens(n_drawn - 1)]
        seconds = perf_counter() - started
        self._commit(part, tokens, Accepted.of(partial(request.accept_drawn, tokens, n_drawn)), seconds)
        self.scheduler.note([part], [1], seconds, n_drawn)
        return True

    def _run_together(self, scheduled: list[Scheduled], started: float) -> bool:
        """The same for several answers, where the executor draws for all of them."""
        requests = [part.request for part in scheduled]
        if self._together is None or any(request.has_moved for request in requests):  # whose chain is another device's
            return False
        draws = [chain.draw for request in requests if (chain := request.chain) is not None]
        if len(draws) < len(scheduled):
            return False
        if any(not part.decodes or part.n_drafted or self.scheduler.is_tapped(part) for part in scheduled):
            return False
        n_together = len(scheduled)  # a run of one step is a step as any other, but for the logits
        n = max(1, min(self.scheduler.run_length(part, n_together) for part in scheduled))
        stop_ids = [request.stop_ids for request in requests]
        try:
            drawn = self._together.decode_together(make_batch(scheduled), n, draws, stop_ids)
            self.intact()
        except DEVICE_GONE:
            raise
        except BaseException as error:
            for request in requests:
                self._deliver(request, [], error)
            return True
        if not any(drawn):
            return False
        seconds = perf_counter() - started
        for part, draw, n_drawn in zip(scheduled, draws, drawn, strict=True):
            if n_drawn:
                tokens = [*part.tokens, *draw.tokens(n_drawn - 1)]
                self._commit(part, tokens, Accepted.of(partial(part.request.accept_drawn, tokens, n_drawn)), seconds)
        self.scheduler.note(scheduled, [1] * len(scheduled), seconds, max(drawn))
        for part in (part for part, n_drawn in zip(scheduled, drawn, strict=True) if not n_drawn):
            self._run([part], perf_counter())  # it says what is wrong
        return True

    def _commit(
        self, part: Scheduled, tokens: Sequence[int], accepted: Accepted, seconds: float, n_computed: int = 0
    ) -> int:
        """Keep what a request has accepted of its part of a step; how many tokens the cache has more.

        n_computed   tokens that its state is behind, 0 for all
        """
        request, started = part.request, perf_counter() - accepted.seconds
        before = part.sequence.length
        self.cache.commit(part.sequence, tokens[: accepted.n], n_computed or len(tokens))
        if part.sequence.length == request.n_prompt:
            self.cache.mark(part.sequence)
        error = self.scheduler.keep(part) or accepted.error
        n_kept = part.sequence.length - before  # none, where its state is behind others
        items = list(request.publish(seconds + perf_counter() - started))
        self._deliver(request, items, error)
        return n_kept

    def _deliver(self, request: Request, items: list[Any], error: BaseException | None = None) -> None:
        """Put items into the caller's mailbox; the request ends with its last one or with an error."""
        last = items[-1] if items else Progress(0, 0)
        ends = (
            error is not None or last is None or (isinstance(last, GeneratedToken) and last.finish_reason is not None)
        )
        if ends:
            self._settle(request, error)
        with self.lock:
            request.mailbox.extend(items)
            if len(request.mailbox) >= LEAD:
                request.idle_since = perf_counter()
            if ends:
                self._end(request, error)
            request.ready.notify()
        if request.notify is not None:
            request.notify()

    def _settle(self, request: Request, error: BaseException | None) -> None:
        """Before a request ends, and without the lock: other callers need not wait for what is copied of it.

        Only this thread makes steps, so nobody finds anything of the request before it is whole.
        """
        self.scheduler.settle(request, keep=not isinstance(error, NumericError))

    def _end(self, request: Request, error: BaseException | None = None) -> None:
        """Take a request out of the line (the lock is held); its blocks stay findable unless they may hold NaN."""
        request.error = error
        request.finished = not request.stopped or error is not None
        try:
            self.scheduler.remove(request, keep=not isinstance(error, NumericError))
        finally:  # nobody waits for ever
            request.ready.notify()
            if request.notify is not None:
                request.notify()
        if DEBUG:
            print(request.summary(), file=sys.stderr, flush=True)


def _notify(condition: threading.Condition) -> None:
    """Without the engine in it, which shall end when its last owner drops it."""
    with condition:
        condition.notify()


def _ignore(done: int, total: int) -> None:
    """The progress of who takes it from among the tokens."""

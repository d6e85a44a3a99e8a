"""Token ids in, token ids out: longest known prefix, prefill in chunks, then one token at a time.

The engine knows nothing about text. It owns the executor and the KV cache, and one thread of its own is the only one
that touches them; callers on any number of threads hand in requests and take steps out of a small mailbox. So an
interrupt in a caller never leaves a half-written cache, and a caller that leaves is noticed before the next step.

A request is its tokens. Whatever the cache does not hold yet is computed, at most ``executor.max_tokens`` at a time;
when nothing is missing the next token is sampled and becomes the one that is missing. Prefill, decode and the return
of a request whose blocks were given to another are the same step, and requests share it (scheduler.py).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Iterator, Sequence
from itertools import count
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from edgellm.engine import exit as engine_exit
from edgellm.engine.cache import KVCache
from edgellm.engine.requests import (
    CancelFlag,
    Errand,
    GenerationRequest,
    Progress,
    Request,
    ScoringRequest,
    Step,
    TokenSampler,
)
from edgellm.engine.scheduler import Share, make_batch, n_ahead, rooms
from edgellm.formats.errors import ClosedError, ContextFullError, NumericError, ParameterError
from edgellm.kernels.program import DecodingExecutor, Executor, Hook

LEAD = 16  # steps computed ahead of the caller: it may take its tokens a few at a time
POLL_S = 0.05  # how long a cancel flag may go unseen while its request waits
DEBUG = os.environ.get("EDGELLM_DEBUG", "0") not in ("", "0")  # a line on standard error for each request
IDLE_S = 0.25  # a caller that took no step for so long may lose its blocks to a younger request

T = TypeVar("T")


class Engine:
    """Runs requests of any number of threads on one executor. ``close()`` frees it; requests then end with an error.

    executor   owned from now on: nobody else may run or close it
    cache      likewise; its ``n_ctx`` is the longest sequence
    eog_ids    tokens that end an answer
    """

    def __init__(self, executor: Executor, cache: KVCache, eog_ids: Collection[int] = ()) -> None:
        self.executor = executor
        self.intact: Callable[[], None] = lambda: None  # after each step: raises once its weights are not to be trusted
        self.cache = cache
        self.eog_ids = frozenset(eog_ids)
        self.n_ctx = cache.n_ctx
        self._decoder = executor if isinstance(executor, DecodingExecutor) else None
        self._step_s = float("inf")  # what the last step took
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._requests: list[Request] = []
        self._orders = count()
        self._thread: threading.Thread | None = None  # alive while there are requests
        self._closed = False
        self._closing = threading.Lock()
        self._forgotten = weakref.finalize(self, engine_exit.close_elsewhere, executor)
        self._forgotten.atexit = False
        engine_exit.engines.add(self)
        # last in, first out: before the finalizer of the executor, which would take the threads from a running step
        atexit.unregister(engine_exit.stop_all)
        atexit.register(engine_exit.stop_all)
        self._pid = os.getpid()

    def generate(
        self,
        prompt: Sequence[int],
        sampler: TokenSampler,
        *,
        max_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        cancel: CancelFlag | None = None,
        progress: Callable[[int, int], None] | None = None,
        hook: Hook | None = None,
    ) -> Generator[Step, None, None]:
        """The steps of an answer to ``prompt``; the last one has a ``finish_reason``. Closing the iterator cancels.

        max_tokens   tokens to generate at most ("length"); None or -1 goes on to the context's end ("context_full")
        stop_ids     tokens that end the answer, ``eog_ids`` when None; pass () to go on over them
        progress     called on this thread with (done, total) tokens of the prompt, after each chunk
        hook         see ``Executor.run``; called on the engine's thread. It sees every token, and what it may have
                     changed is nobody else's: nothing is taken from the prefix cache or left in it

        ContextFullError when the prompt is longer than the context, NumericError when a step gives NaN.
        """
        request = self._generation(prompt, sampler, max_tokens, stop_ids, cancel, progress, hook)
        return self._steps(request, progress)

    def agenerate(
        self,
        prompt: Sequence[int],
        sampler: TokenSampler,
        *,
        max_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        cancel: CancelFlag | None = None,
        progress: Callable[[int, int], None] | None = None,
        hook: Hook | None = None,
    ) -> AsyncGenerator[Step, None]:
        """``generate`` for ``async for``; cancelling the task or closing the iterator cancels the request."""
        request = self._generation(prompt, sampler, max_tokens, stop_ids, cancel, progress, hook)
        return self._asteps(request, progress)

    def score(
        self, tokens: Sequence[int], reduce: Callable[[int, np.ndarray], T], cancel: CancelFlag | None = None
    ) -> Iterator[T]:
        """``reduce(start, logits)`` for the positions from ``start`` on, chunk by chunk until all tokens are through.

        logits is float32 (n, n_vocab), what follows each position; it is valid only inside ``reduce``, which runs on
        the engine's thread. Nothing is taken from the prefix cache or left in it.
        """
        self.check(tokens)
        request = ScoringRequest(self._lock, tokens, cancel, reduce)
        self._submit(request)
        try:
            while (item := self._take(request)) is not None:
                yield item
        finally:
            self._drop(request)

    def call(self, function: Callable[[KVCache, Executor], T]) -> T:
        """The result of ``function(cache, executor)``, run on the engine's thread between two steps.

        Nothing else touches either while it runs. ParameterError on the engine's own thread, ClosedError after close.
        """
        request = Errand(self._lock, function)
        self._submit(request)
        try:
            return self._take(request)[0]
        finally:
            self._drop(request)

    def close(self) -> None:
        """End all requests, stop the thread and close the executor. May be called twice.

        ParameterError on the engine's own thread: a hook, a sampler or ``call`` cannot end the step it is part of.
        """
        with self._lock:
            thread = self._thread
            if thread is threading.current_thread():
                raise ParameterError("A hook closed its own model. Close it after the answer that has the hook.")
            self._closed = True
            self._work.notify_all()
        if thread is not None:
            thread.join()
        self._forgotten.detach()
        with self._closing:
            self.executor.close()

    def is_ours(self) -> bool:
        """Whether it was made in this process: a fork takes no threads along."""
        return self._pid == os.getpid()

    # -- the caller's side -----------------------------------------------------------------------------------------

    def check(self, tokens: Sequence[int], max_tokens: int | None = None) -> None:
        """Raise what ``generate`` would raise for these, ContextFullError or ParameterError."""
        if not len(tokens):
            raise ParameterError("The prompt has 0 tokens. Give at least one.")
        if len(tokens) > self.n_ctx:
            raise ContextFullError(
                f"The prompt has {len(tokens)} tokens, the context has room for {self.n_ctx}. "
                "Shorten the prompt or load the model with a larger context."
            )
        n_vocab = self.executor.program.n_vocab
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= n_vocab:
            raise ParameterError(
                f"Token id {low if low < 0 else high} is not in the vocabulary, which has ids 0 to {n_vocab - 1}. "
                "Use ids of this model's own tokenizer."
            )
        if max_tokens is not None and not (isinstance(max_tokens, int | np.integer) and max_tokens >= -1):
            raise ParameterError(
                f"max_tokens is {max_tokens!r}. It must be a whole number from 0 on, or -1 for no limit."
            )

    def _generation(
        self,
        prompt: Sequence[int],
        sampler: TokenSampler,
        max_tokens: int | None,
        stop_ids: Collection[int] | None,
        cancel: CancelFlag | None,
        progress: Callable[[int, int], None] | None,
        hook: Hook | None,
    ) -> GenerationRequest:
        self.check(prompt, max_tokens)
        for name, given in (("cancel", getattr(cancel, "is_set", None)), ("progress", progress), ("hook", hook)):
            if not callable(given) and (given is not None or (name == "cancel" and cancel is not None)):
                raise ParameterError(f"{name} is of the wrong type. See LLM.stream for what it must be.")
        # every position of the context may be filled, and the last one still gives a token
        room = self.n_ctx - len(prompt) + 1
        limit = room if max_tokens is None or max_tokens == -1 else min(room, max_tokens)
        stops = self.eog_ids if stop_ids is None else frozenset(stop_ids)
        request = GenerationRequest(self._lock, prompt, cancel, sampler, limit, stops, progress is not None)
        request.hook, request.shared = hook, hook is None
        request.ending = "length" if limit == max_tokens else "context_full"
        return request

    def _submit(self, request: Request) -> None:
        if not self.is_ours():
            raise ClosedError(
                "The model was loaded before a fork, which takes no threads along. Load it in this process."
            )
        if threading.current_thread() is self._thread:
            raise ParameterError("A hook asked its own model for an answer. Do it after the answer that has the hook.")
        with self._lock:
            if self._closed:
                raise ClosedError("The model is closed. Load it again to go on.")
            request.order = next(self._orders)
            self._requests.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="edgellm-engine", daemon=True)
                self._thread.start()
            else:
                self._work.notify()

    def _steps(
        self, request: GenerationRequest, progress: Callable[[int, int], None] | None
    ) -> Generator[Step, None, None]:
        self._submit(request)
        try:
            while True:
                item = self._take(request)
                if isinstance(item, Progress):
                    assert progress is not None
                    progress(*item)
                    continue
                yield item
                if item.finish_reason:
                    return
        finally:
            self._drop(request)

    async def _asteps(
        self, request: GenerationRequest, progress: Callable[[int, int], None] | None
    ) -> AsyncGenerator[Step, None]:
        import asyncio  # 40 ms, and most programs do not need it

        loop = asyncio.get_running_loop()
        ready = asyncio.Event()

        def notify() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits
                loop.call_soon_threadsafe(ready.set)

        request.notify = notify
        self._submit(request)
        try:
            while True:
                ready.clear()
                item = self._take_now(request)
                if item is None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(ready.wait(), POLL_S if request.cancel is not None else None)
                elif isinstance(item, Progress):
                    assert progress is not None
                    progress(*item)
                else:
                    yield item
                    if item.finish_reason:
                        return
        finally:
            self._drop(request)

    def _take(self, request: Request) -> Any:
        """The next item for the caller, waiting for it."""
        with self._lock:
            while True:
                found, item = self._look(request)
                if found:
                    return item
                # short waits: a wait without an end cannot be interrupted on every system
                request.ready.wait(POLL_S)

    def _take_now(self, request: Request) -> Any:
        """The next item, or None when there is none yet."""
        with self._lock:
            return self._look(request)[1]

    def _look(self, request: Request) -> tuple[bool, Any]:
        if request.stopped and not request.finished:
            request.cancelled = True
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

    def _drop(self, request: Request) -> None:
        """The caller is gone; the engine lets go of the request before its next step."""
        request.cancelled = True
        # never wait here: the garbage collector may close an iterator on a thread that holds the lock
        if self._lock.acquire(blocking=False):
            self._work.notify()
            self._lock.release()

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while requests := self._next():
                self._advance(requests)
        except BaseException as error:  # our own mistake; nobody may wait for ever because of it
            with self._lock:
                self._thread = None
                for request in list(self._requests):
                    self._end(request, error)
            raise

    def _next(self) -> list[Request]:
        """The requests that share the next step; none when there is nothing left to do."""
        with self._lock:
            while True:
                for request in [r for r in self._requests if r.stopped]:
                    self._end(request)
                if self._closed:
                    for request in list(self._requests):
                        self._end(request, ClosedError("The model was closed while it answered. Load it again."))
                if not self._requests:
                    self._thread = None
                    return []
                now = perf_counter()
                ready = [r for r in self._requests if len(r.mailbox) < LEAD and r.not_before <= now]
                if ready:
                    turn = ready[:1] if ready[0].alone else [r for r in ready if not r.alone]
                    self._requests = [r for r in self._requests if r not in turn] + turn
                    return turn
                self._work.wait(POLL_S)

    def _advance(self, requests: list[Request]) -> None:
        """One step for all of these; each gets what comes of its own tokens."""
        if isinstance(requests[0], Errand):
            self._hand_over(requests[0], requests[0].run(self))
            return
        started = perf_counter()
        shares = self._shares(requests)
        if not shares or (len(shares) == 1 and self._run_on(shares[0])):
            return
        try:
            try:
                logits = self.executor.run(make_batch(shares), shares[0].request.hook)
            finally:  # also in the place of a NaN, which would be its consequence
                self.intact()
        except NumericError as error:
            if len(shares) == 1:
                self._deliver(shares[0].request, [], error)
            else:  # find out whose it is
                for share in shares:
                    self._advance([share.request])
            return
        except BaseException as error:
            for share in shares:
                self._deliver(share.request, [], error)
            return
        for share in shares:
            self.cache.commit(share.sequence, share.tokens)
        seconds, end = perf_counter() - started, 0
        self._step_s = seconds
        for share in shares:
            end += share.n_outputs
            mine = logits[end - share.n_outputs : end]
            self._hand_over(share.request, share.request.receive(self, mine, seconds))

    def _run_on(self, share: Share) -> bool:
        """Several tokens of one answer without Python between them; False where there are none such."""
        request, started = share.request, perf_counter()
        n = n_ahead(share, self._step_s, LEAD - len(request.mailbox))
        if n < 2 or self._decoder is None or (chain := request.chain) is None:
            return False
        try:
            self.cache.reserve(share.sequence, n)  # of nobody else's blocks: these steps can wait
            n_drawn = self._decoder.decode(make_batch([share]), n, chain.draw, request.stop_ids)
            self.intact()
        except ContextFullError:
            return False
        except BaseException as error:
            self._deliver(request, [], error)
            return True
        if not n_drawn:  # the step that comes next says what is wrong
            return False
        self.cache.commit(share.sequence, [*share.tokens, *chain.draw.tokens(n_drawn - 1)])
        seconds = perf_counter() - started
        self._step_s = seconds / n_drawn
        self._hand_over(request, request.receive_drawn(n_drawn, seconds))
        return True

    def _shares(self, requests: list[Request]) -> list[Share]:
        """What each of the requests brings to the next step, with blocks reserved for it."""
        for request in requests:
            if request.sequence is None:
                request.sequence = self.cache.open(request.tokens, shared=request.shared)
        shares = []
        given = list(rooms(requests, self.executor.max_tokens))
        for request in set(requests) - {request for request, _ in given}:
            assert request.sequence is not None
            if request.sequence.length == request.sequence.n_reused:  # look again next time: there may be more to find
                self.cache.release(request.sequence)
                request.sequence = None
        for request, room in given:
            if request.sequence is None:  # an older one has just taken its blocks
                continue
            tokens, n_outputs = request.next_tokens(self, room)
            try:
                self._reserve(request, len(tokens))
                shares.append(Share(request, request.sequence, tokens, n_outputs))
            except _NoRoom:
                request.not_before = perf_counter() + POLL_S
            except BaseException as error:
                self._deliver(request, [], error)
        return [share for share in shares if share.request.sequence is share.sequence]

    def _hand_over(self, request: Request, work: Iterator[Any]) -> None:
        """Do a request's own part of a step and give the caller what comes of it."""
        items: list[Any] = []
        error: BaseException | None = None
        try:
            items.extend(work)
        except BaseException as raised:
            error = raised
        self._deliver(request, items, error)

    def _deliver(self, request: Request, items: list[Any], error: BaseException | None) -> None:
        """Put items into the caller's mailbox; the request ends with its last one or with an error."""
        with self._lock:
            request.mailbox.extend(items)
            if len(request.mailbox) >= LEAD:
                request.idle_since = perf_counter()
            last = items[-1] if items else Progress(0, 0)
            if error is not None or last is None or (isinstance(last, Step) and last.finish_reason):
                self._end(request, error)
            request.ready.notify()
        if request.notify is not None:
            request.notify()

    def _end(self, request: Request, error: BaseException | None = None) -> None:
        """Take a request off the list (the lock is held); its blocks stay findable unless they may hold NaN."""
        self._requests.remove(request)
        request.error = error
        request.finished = not request.stopped or error is not None
        if request.sequence is not None:
            self.cache.release(request.sequence, keep=not isinstance(error, NumericError))
            request.sequence = None
        request.ready.notify()
        if DEBUG:
            print(request.summary(), file=sys.stderr, flush=True)

    def _reserve(self, request: Request, n: int) -> None:
        """Blocks for n tokens, if need be those of a younger or an idle request, which then computes them again."""
        assert request.sequence is not None
        while True:
            try:
                return self.cache.reserve(request.sequence, n)
            except ContextFullError:
                others = [r for r in self._requests if r is not request and r.sequence is not None]
                if not others:
                    raise
                now = perf_counter()
                givers = [r for r in others if r.order > request.order or 0 < r.idle_since < now - IDLE_S]
                if not givers:
                    raise _NoRoom from None
                youngest = max(givers, key=lambda r: r.order)
                assert youngest.sequence is not None
                self.cache.release(youngest.sequence)
                youngest.sequence = None


class _NoRoom(Exception):
    """Older requests hold the blocks; try again later."""

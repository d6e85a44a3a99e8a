"""An answer on its way: a thread that takes chunks from the model and lays them into a message of the tree."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple, Self

from edgellm.formats.errors import EdgeLLMError, RemoteError
from edgellm.generation import GenerationChunk, TokenLogprob
from edgellm.sessions import MessageNode
from edgellm.sessions.records import LEFT_OUT
from edgellm.sessions.tree import END_THINK, THINK

N_ALTERNATIVES = 8  # likeliest tokens kept beside each one, for the token view
THOUGHTS = (THINK, END_THINK)
GATHER_S = 0.03  # tokens are taken in so often: waking up for each would cost the model 5 % of its time
WAITED_S = 0.0005  # a token that took longer was not there yet


def is_remote(llm: Any) -> bool:
    """Whether a model is behind a server: then it has no tokenizer here, and what it has read is the server's."""
    return getattr(llm, "is_remote", False)


def spelled(llm: Any, tokens: Sequence[TokenLogprob]) -> str:
    """The text of the first tokens of an answer."""
    if is_remote(llm):
        return b"".join(token.bytes for token in tokens).decode("utf-8", "ignore")
    text: str = llm.tokenizer.decode([token.token for token in tokens], False)
    return text


class Sent(NamedTuple):
    """What the model is given: messages or ids, how many messages that leaves out, options over those of the answer."""

    prompt: Any
    left_out: int = 0
    options: Mapping[str, Any] = {}


class Worker:
    """A thread that the screen looks after: ``error`` is what it ended with, once ``finished`` is set."""

    def __init__(self, name: str) -> None:
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def wait(self, timeout_s: float | None = None) -> None:
        """Until the thread is over."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        raise NotImplementedError


class Answering(Worker):
    """Streams one answer into ``node``; the screen reads the message while it grows.

    compose   called on the thread before: what to send, which may take a while to find out
    changed   called on the thread when chunks have come and at the end
    prepare   called on the thread before; what it has to say stands in ``note``
    """

    def __init__(
        self,
        llm: Any,
        node: MessageNode,
        compose: Callable[[Answering], Sent],
        options: Mapping[str, Any],
        changed: Callable[[], None],
        prepare: Callable[[], str] | None = None,
    ) -> None:
        super().__init__("edgellm-answer")
        self.node = node
        self.llm = llm
        self.compose = compose
        self.left_out = 0  # messages that the prompt goes without
        self.options = dict(options)
        self.changed = changed
        self.prepare = prepare
        self.note = ""
        self.cancel = threading.Event()
        self._left = False
        self._laying = threading.Lock()  # around what is done to the message
        self.read: tuple[int, int] = (0, 0)  # tokens of the prompt that are done, and all of them

    def stop(self) -> None:
        """End the answer before its next step; what was said stays."""
        self.cancel.set()

    def leave(self) -> None:
        """End it now, whatever its thread waits for: the message is not touched any more."""
        self.stop()
        with self._laying:
            self._left = True
            self.node.finish_reason = self.node.finish_reason or "cancelled"
            self.finished.set()

    def _run(self) -> None:
        try:
            self._stream()
        except (EdgeLLMError, OSError, MemoryError) as error:
            if not (self.cancel.is_set() and isinstance(error, RemoteError)):  # else it was hung up on
                self.error = error
        except BaseException as error:  # our own mistake: the screen must not wait for ever
            self.error = error
            raise
        finally:
            with self._laying:
                if not self._left:
                    self.node.finish_reason = self.node.finish_reason or "cancelled"
                    self.note = "\n".join(filter(None, (self.note, *getattr(self.llm, "take_notices", list)())))
                    self.finished.set()
                    self.changed()

    def whole(self, prompt: Any, options: Mapping[str, Any]) -> str:
        """The whole answer to another prompt, before this one; "" when it is stopped."""
        chunks = self.llm.stream(prompt, **self._live(), **{**self.options, **options})
        try:
            text = "".join(chunk.text for chunk in chunks)
        finally:
            chunks.close()
        return "" if self.cancel.is_set() else text

    def _live(self) -> dict[str, Any]:
        return {"cancel": self.cancel, "progress": self._progress, "thoughts": THOUGHTS}

    def _progress(self, done: int, total: int) -> None:
        self.read = (done, total)

    def _stream(self) -> None:
        if self.prepare is not None:
            self.note = self.prepare()
        sent = self.compose(self)
        with self._laying:
            if self._left:
                return
            self.left_out, self.node.finish_reason = sent.left_out, None
        told: dict[str, Any] = {"logprobs": N_ALTERNATIVES, "sampler_trace": True}
        if getattr(getattr(self.llm, "program", None), "denoising", None) is not None:  # its tokens have none
            told = {}
        chunks = self.llm.stream(sent.prompt, **told, **self._live(), **{**self.options, **sent.options})
        try:
            before = monotonic()
            for chunk in chunks:
                waited = monotonic() - before > WAITED_S
                with self._laying:
                    if self._left:
                        return
                    self._lay(chunk)
                    if waited or chunk.token is None:
                        self._show(chunk)
                if waited:
                    self.cancel.wait(GATHER_S)
                before = monotonic()
        finally:
            chunks.close()

    def _lay(self, chunk: GenerationChunk) -> None:
        """Put a chunk into the message."""
        self.node.text += chunk.text
        if chunk.token is None:
            self.node.finish_reason = chunk.finish_reason
        elif chunk.logprobs is not None:
            self.node.tokens.append(chunk.logprobs)

    def _show(self, chunk: GenerationChunk) -> None:
        """Let the screen and the file have what has come."""
        self.node.timings = chunk.timings.as_dict() | ({LEFT_OUT: self.left_out} if self.left_out else {})
        self.changed()


class Loading(Worker):
    """A model on its way into memory: a thread, and how far it is."""

    def __init__(
        self,
        load: Callable[..., Any],
        name: str,
        options: Mapping[str, Any],
        before: Any = None,
        kept: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__("edgellm-load")
        self.name = name
        self.load = load
        self.options = dict(options)
        self._before = before  # the model to close first: two may not fit
        self._kept = kept  # waits until what it has read is written
        self._lock = threading.Lock()
        self.stage: tuple[str, int, int | None, str] = ("load", 0, None, name)
        self.llm: Any = None
        self._abandoned = threading.Event()

    def abandon(self) -> None:
        """Nobody wants the model any more: end at the next report, close what came of it."""
        self._abandoned.set()

    def take_before(self) -> Any:
        """The model that was there, if it is still open: a pull leaves it, and so does a name that is none."""
        with self._lock:
            before, self._before = self._before, None
        return before

    def _close_before(self) -> None:
        before = self.take_before()
        if before is not None:
            self._kept()
            before.close()

    def _report(self, stage: str, done: int, total: int | None, name: str) -> None:
        if self._abandoned.is_set():
            raise _Abandoned
        if stage != "pull":
            self._close_before()
        self.stage = (stage, done, total, name)

    def _run(self) -> None:
        try:
            llm = self.load(self.name, progress=self._report, **self.options)
            try:
                self._close_before()
                _ = llm.chat_template  # compiled now, and a model without one is told now
                if self._abandoned.is_set():
                    raise _Abandoned
            except BaseException:
                llm.close()
                raise
            self.llm = llm
        except BaseException as error:
            self.error = error
        finally:
            self.finished.set()


class _Abandoned(Exception):
    """The user has chosen another model meanwhile."""

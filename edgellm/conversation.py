"""A chat that remembers: messages, and turns that add to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from edgellm.chat_template import Message
from edgellm.context_overflow import SUMMARY_REQUEST, Fitted, Room, fit, summary_prompts
from edgellm.formats.errors import ParameterError
from edgellm.generation import Generation, GenerationChunk

ON_OVERFLOW = ("error", "ask", "drop_oldest")
UNTOLD = 1 << 20  # tokens of context of a server that does not tell


class Answerer(Protocol):
    """What a conversation needs of an ``LLM``."""

    n_ctx: int  # 0: a server does not tell, and says itself what does not fit

    def prompt_ids(self, prompt: Any, *, tools: Any = None, template_kwargs: Any = None) -> list[int]:
        """The tokens that messages become."""
        ...

    def stream(self, prompt: Any, **options: Any) -> Any:
        """The chunks of an answer to messages, with ``close()``."""
        ...


class Conversation:
    """The messages so far; ``stream`` and ``send`` add a turn. Change ``messages`` freely between turns.

    options       those of ``LLM.stream``, for every turn
    on_overflow   when messages and answer do not fit the context: "error" is ContextFullError once the messages alone
                  do not; "ask" is ChatTooLongError with the figures, while there is room for an answer;
                  "drop_oldest" leaves the oldest turns out of the prompt. ``messages`` keeps them
    left_out      how many messages after the system message the last prompt went without
    last          the last answer with its timings, None before the first
    """

    def __init__(
        self,
        llm: Answerer,
        system: str | None = None,
        options: dict[str, Any] | None = None,
        on_overflow: str = "error",
    ) -> None:
        if on_overflow not in ON_OVERFLOW:
            raise ParameterError(f"on_overflow is {on_overflow!r}. It must be one of {', '.join(ON_OVERFLOW)}.")
        self.llm, self.options, self.on_overflow = llm, dict(options or {}), on_overflow
        self.messages = [] if system is None else [Message("system", system)]
        self.left_out = 0
        self.last: Generation | None = None

    def stream(self, text: str, **options: Any) -> Iterator[GenerationChunk]:
        """The reply to ``text`` as it grows.

        Message and reply join the conversation when the reply ends, also when it is broken off: then with what there
        is of it. When it fails before its first token nothing is added.
        """
        message = Message("user", text)
        options = {**self.options, **options}
        fitted = self._fit([*self.messages, message], options)
        chunks = self.llm.stream(fitted.messages, **options)
        self.left_out = fitted.left_out
        return self._turn(message, chunks)

    def _fit(self, messages: list[Message], options: dict[str, Any]) -> Fitted:
        if self.on_overflow == "error" or not self.llm.n_ctx:
            return Fitted(messages, 0)
        room = Room(self.llm.n_ctx, options.get("max_tokens"))
        drop = self.on_overflow == "drop_oldest"
        return fit(messages, self._counter(options), room, self.left_out, drop=drop)

    def _counter(self, options: dict[str, Any]) -> Callable[[list[Any]], int]:
        names = {name: options[name] for name in ("tools", "template_kwargs") if options.get(name)}
        return lambda messages: len(self.llm.prompt_ids(messages, **names))

    def summarize(self, **options: Any) -> Generation:
        """``summarizing`` at once: the whole summary."""
        return Generation.of(self.summarizing(**options))

    def summarizing(self, **options: Any) -> Iterator[GenerationChunk]:
        """Let the model sum up what was said, and go on from its summary alone; a longer chat is read in parts.

        The turns are replaced by one, the request and the summary, when it is whole; broken off it changes nothing.
        """
        options = {**self.options, **options, "stop": None}
        prompts = summary_prompts(self.messages, self._counter(options), self.llm.n_ctx or UNTOLD)
        prompt = next(prompts)
        while not prompt.last:
            chunks = list(self.llm.stream(prompt.messages, **{**options, "max_tokens": prompt.max_tokens}))
            if chunks[-1].finish_reason == "cancelled":
                yield chunks[-1]
                return
            prompt = prompts.send(Generation.of(chunks).text)
        received = []
        for chunk in self.llm.stream(prompt.messages, **{**options, "max_tokens": prompt.max_tokens}):
            received.append(chunk)
            yield chunk
        summary = Generation.of(received)
        if summary.finish_reason != "cancelled" and summary.text:
            self.clear()
            self.messages += [Message("user", SUMMARY_REQUEST), Message("assistant", summary.text)]
            self.last = summary

    def send(self, text: str, **options: Any) -> Generation:
        """The whole reply to ``text``."""
        for _ in self.stream(text, **options):
            pass
        assert self.last is not None
        return self.last

    def undo(self) -> Message | None:
        """Take the last turn back; the user's message of it, or None when there is none."""
        while self.messages and self.messages[-1].role != "system":
            message = self.messages.pop()
            if message.role == "user":
                return message
        return None

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages[:1] if message.role == "system"]
        self.last, self.left_out = None, 0

    def _turn(self, message: Message, chunks: Any) -> Iterator[GenerationChunk]:
        received: list[GenerationChunk] = []
        try:
            for chunk in chunks:
                received.append(chunk)
                yield chunk
        finally:
            chunks.close()
            if received:
                if received[-1].finish_reason is None:
                    received.append(GenerationChunk("", None, None, "cancelled", received[-1].timings))
                self.last = Generation.of(received)
                self.messages += [message, Message("assistant", self.last.text)]

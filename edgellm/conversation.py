"""A chat that remembers: messages, and turns that add to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from edgellm.chat_template import Message
from edgellm.generation import Generation, GenerationChunk


class Answerer(Protocol):
    """What a conversation, and a program around it, needs of an ``LLM``."""

    n_ctx: int

    def params(self, params: Any = None, **sampling: Any) -> Any:
        """The sampling that a request would use."""
        ...

    def stream(self, prompt: Any, **options: Any) -> Any:
        """The chunks of an answer to messages, with ``close()``."""
        ...


class Conversation:
    """The messages so far; ``stream`` and ``send`` add a turn. Change ``messages`` freely between turns.

    options   those of ``LLM.stream``, for every turn
    last      the last answer with its timings, None before the first
    """

    def __init__(self, llm: Answerer, system: str | None = None, options: dict[str, Any] | None = None) -> None:
        self.llm = llm
        self.options = dict(options or {})
        self.messages: list[Message] = []
        self.last: Generation | None = None
        if system is not None:
            self.messages.append(Message("system", system))

    def stream(self, text: str, **options: Any) -> Iterator[GenerationChunk]:
        """The reply to ``text`` as it grows.

        Message and reply join the conversation when the reply ends, also when it is broken off: then with what there
        is of it. When it fails before its first token nothing is added.
        """
        message = Message("user", text)
        chunks = self.llm.stream([*self.messages, message], **{**self.options, **options})
        return self._turn(message, chunks)

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
        self.last = None

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

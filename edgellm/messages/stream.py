"""The events of one answer, from the engine's tokens; what the library and every protocol read.

Markers of a form may be control tokens, which are no text elsewhere: here those that spell a part of a marker are read,
and the others are left out as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.chat_template import Message
from edgellm.engine.requests import GeneratedToken
from edgellm.engine.requests import Progress as EngineProgress
from edgellm.generation import AnswerStream, Generation, GenerationChunk, TextStream, TokenLogprob
from edgellm.messages.events import ContentDelta, Event, Finished, FinishReason, PromptProgress, ReasoningDelta
from edgellm.messages.reader import MessageReader

if TYPE_CHECKING:
    from edgellm.engine.engine import Engine
    from edgellm.sampling import Sampler
    from edgellm.tokenizer import Tokenizer


class ReadTokens:
    """Turns the tokens of one request into events.

    tokens, logprobs   of the whole answer so far
    """

    def __init__(self, tokenizer: Tokenizer, reader: MessageReader, stops: Sequence[str] = ()) -> None:
        self.reader = reader
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finished: Finished | None = None
        self._last: GenerationChunk | None = None
        self._text = TextStream(tokenizer, stops, shown=marks_of(tokenizer, reader.form.texts()))
        self._waiting: list[TokenLogprob] = []
        self._n_reasoning = 0

    def events(self, item: EngineProgress | GeneratedToken) -> Iterator[Event]:
        """The events of one item of the engine; ``Finished`` is the last."""
        if isinstance(item, EngineProgress):
            yield PromptProgress(*item)
            return
        for chunk in self._text.chunks(item):
            yield from self._with_logprobs(self._read(chunk))
            if chunk.finish_reason is not None:
                yield from self._with_logprobs(self.reader.finish())
                self._last = chunk
                calls = chunk.finish_reason == "stop" and self.reader.message.tool_calls
                reason: FinishReason = "tool_calls" if calls else chunk.finish_reason
                self.finished = Finished(reason, chunk.stop, chunk.timings, self._n_reasoning)
                yield self.finished
                return

    def _read(self, chunk: GenerationChunk) -> list[Event]:
        before = self.reader.reasoning
        events = self.reader.add(chunk.text)
        if chunk.token is not None:
            self.tokens.append(chunk.token)
            self._n_reasoning += before or self.reader.reasoning
        if chunk.logprobs is not None:
            self.logprobs.append(chunk.logprobs)
            self._waiting.append(chunk.logprobs)
        if before != self.reader.reasoning:
            self._waiting.clear()  # it ended a marker
        return events

    def _with_logprobs(self, events: Sequence[Event]) -> Iterator[Event]:
        """The events; the first text has the log-probabilities of the tokens since the last one, a call takes none."""
        for event in events:
            if isinstance(event, ContentDelta | ReasoningDelta):
                yield event._replace(logprobs=tuple(self._waiting))
            else:
                yield event
            self._waiting.clear()

    def message(self, parse: Callable[[str], Any] | None = None) -> Message:
        """The message; its content is a ``Generation``."""
        assert self._last is not None, "a message is read to its end"
        read = self.reader.message
        content = Generation.made(read.content, self.tokens, self.logprobs, self._last, parse)
        calls = [call.to_dict() for call in read.tool_calls]
        return Message("assistant", content, tool_calls=calls or None, reasoning_content=read.reasoning or None)


def marks_of(tokenizer: Tokenizer, texts: Sequence[str]) -> frozenset[int]:
    """The control tokens that markers are spelled with."""
    ids = (token for text in texts for token in tokenizer.encode(text, False, parse_special=True))
    return frozenset(token for token in ids if tokenizer.is_control(token))


class EventStream(AnswerStream[Event]):
    """The events of one answer."""

    def __init__(
        self,
        engine: Engine,
        ids: Sequence[int],
        sampler: Sampler,
        read: ReadTokens,
        options: Mapping[str, Any],
        parse: Callable[[str], Any] | None = None,
    ) -> None:
        super().__init__(engine, ids, sampler, options, read.events, _is_last, progress=True)
        self._read, self._parse = read, parse

    def name_calls(self, new_id: Callable[[], str]) -> None:
        """Ids of calls that have none come from here. Before its first event."""
        self._read.reader.name_calls(new_id)

    @property
    def tokens(self) -> list[int]:
        """Those of the answer so far; the list grows."""
        return self._read.tokens

    @property
    def message(self) -> Message:
        """The whole answer, once the events are over: its content is a ``Generation``, its calls are all whole."""
        return self._read.message(self._parse)

    @property
    def finished(self) -> Finished | None:
        """The last event, once it was there."""
        return self._read.finished


def _is_last(event: Event) -> bool:
    return isinstance(event, Finished)

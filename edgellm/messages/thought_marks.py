"""Text in which what was thought stands between two marks, whatever marks the model's own form has.

For who keeps an answer as one text, as a session does: the text of every model is then read in one way. The tokens stay
the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edgellm.generation import GenerationChunk, TextStream
from edgellm.messages.events import ContentDelta, Event, ReasoningDelta
from edgellm.messages.reader import MessageReader
from edgellm.messages.stream import marks_of

if TYPE_CHECKING:
    from edgellm.engine.requests import GeneratedToken
    from edgellm.messages.shapes import Shape
    from edgellm.tokenizer import Tokenizer


class ThoughtMarks(NamedTuple):
    """What stands before and behind a thought, such as ``<think>`` and ``</think>``."""

    open: str
    close: str


class MarkedText(TextStream):
    """The chunks of one request with their texts marked: one for each token, as of every other stream.

    prompt   its end, control tokens as their texts: it may have opened the reasoning
    begun    tokens of the answer that the prompt ends with; ``begun_text`` is their text
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        form: Shape,
        marks: ThoughtMarks,
        prompt: str,
        begun: Sequence[int] = (),
        stops: Sequence[str] = (),
    ) -> None:
        super().__init__(tokenizer, stops, shown=marks_of(tokenizer, form.texts()))
        self._reader, self._marks = MessageReader(form, prompt), marks
        self._thinks = False
        self.begun_text = self._marked(self._reader.add("".join(self.decoder.add(token) for token in begun)))

    def chunks(self, generated: GeneratedToken) -> Iterator[GenerationChunk]:
        """The chunks of one token."""
        for chunk in super().chunks(generated):
            events = self._reader.add(chunk.text)
            if chunk.finish_reason is not None:
                events += self._reader.finish()
            yield GenerationChunk(
                self._marked(events), chunk.token, chunk.logprobs, chunk.finish_reason, chunk.timings, chunk.stop
            )

    def _marked(self, events: Iterable[Event]) -> str:
        text = ""
        for event in events:
            if isinstance(event, ReasoningDelta) and event.text:
                text += event.text if self._thinks else f"{self._marks.open}\n{event.text}"
                self._thinks = True
            elif isinstance(event, ContentDelta) and event.text:
                text += f"\n{self._marks.close}\n\n{event.text}" if self._thinks else event.text
                self._thinks = False
        return text

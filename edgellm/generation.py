"""What a caller gets of an answer: chunks of text while it grows, and the whole of it at the end.

``TextStream`` turns the engine's tokens into chunks: whole characters, no control tokens, nothing of a stop string.
"""

from __future__ import annotations

import contextlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar

from edgellm.formats.errors import EdgeLLMError, ParameterError
from edgellm.stop import StopMatcher

if TYPE_CHECKING:
    from edgellm.engine.engine import Engine
    from edgellm.engine.requests import FinishReason, GeneratedToken, Timings
    from edgellm.sampling import Sampler
    from edgellm.tokenizer import Tokenizer

Item = TypeVar("Item")


class TokenLogprob(NamedTuple):
    """A token, its natural log-probability (None for the first of a text) and the likeliest in its place.

    after    with ``sampler_trace``: its log-probability after the samplers, None when one of them cut it
    cut_by   the name of that sampler
    """

    token: int
    bytes: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()
    after: float | None = None
    cut_by: str | None = None

    @property
    def text(self) -> str:
        """The token alone as text; U+FFFD where it is only part of a character."""
        return self.bytes.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class GenerationChunk:
    """One step of an answer. The chunk of a token may have no text: part of a character, or of a stop string.

    text            what is certain now; the texts of all chunks are the answer
    token           id, None in the last chunk, which brings the finish reason and what was held back
    logprobs        of the token, when asked for
    finish_reason   "stop", "length" (max_tokens), "context_full", "cancelled"; None before the last chunk
    stop            what ended the answer: the stop string, or the id of the end-of-generation token
    """

    text: str
    token: int | None
    logprobs: TokenLogprob | None
    finish_reason: FinishReason | None
    timings: Timings
    stop: str | int | None = None

    def __str__(self) -> str:
        return self.text


class Generation(str):
    """The text of an answer, a plain ``str``, and how it came about.

    score, beams   of beam search: what the answer scores, and all answers that were asked for, best first
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop: str | int | None
    timings: Timings
    score: float | None = None
    beams: tuple[Generation, ...] = ()
    _parse: Callable[[str], Any] | None

    @classmethod
    def of(cls, chunks: Iterable[GenerationChunk], parse: Callable[[str], Any] | None = None) -> Generation:
        """All chunks of one answer; ``parse`` makes what ``parsed`` gives."""
        chunks = list(chunks)
        last = chunks[-1]
        assert last.finish_reason is not None, "the chunks of an answer end with a finish reason"
        tokens = [chunk.token for chunk in chunks if chunk.token is not None]
        logprobs = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
        return cls.made("".join(chunk.text for chunk in chunks), tokens, logprobs, last, parse)

    @classmethod
    def made(
        cls,
        text: str,
        tokens: Iterable[int],
        logprobs: Iterable[TokenLogprob],
        last: GenerationChunk,
        parse: Callable[[str], Any] | None = None,
    ) -> Generation:
        """A text, the tokens of its answer, and the answer's last chunk."""
        assert last.finish_reason is not None, "the last chunk has a finish reason"
        generation = cls(text)
        generation.tokens, generation.logprobs = tuple(tokens), tuple(logprobs)
        generation.finish_reason, generation.stop, generation.timings = last.finish_reason, last.stop, last.timings
        generation._parse = parse
        return generation

    @property
    def parsed(self) -> Any:
        """The answer as the object that ``response_format`` asked for: of the class, or plain dicts and lists.

        EdgeLLMError ANSWER_CUT where the answer was cut (``finish_reason``), ParameterError where none was asked for.
        """
        if self._parse is None:
            raise ParameterError("The answer has no form to be parsed by. Ask for one with response_format.")
        if self.finish_reason != "stop" or isinstance(self.stop, str):
            why = f"the stop string {self.stop!r}" if self.finish_reason == "stop" else repr(self.finish_reason)
            raise EdgeLLMError(
                f"The answer was cut by {why} after {len(self.tokens)} tokens and is not whole. Allow more tokens.",
                code="ANSWER_CUT",
            )
        return self._parse(self.text)

    @property
    def text(self) -> str:
        """The answer as a ``str`` and nothing else."""
        return str.__str__(self)


class TextStream:
    """Turns the tokens of one request into chunks.

    special   show control tokens as their text
    shown     show these in any case
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, special: bool = False, shown: Collection[int] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.decoder = tokenizer.stream_decoder(special=special, shown=shown)
        self.matcher = StopMatcher(stops)
        self.special = special

    def chunks(self, generated: GeneratedToken) -> Iterator[GenerationChunk]:
        """The chunks of one token; after one with a finish reason the request is over."""
        text, ended = "", generated.finish_reason == "stop"
        if generated.token is not None and not ended:
            text = self.matcher.add(self.decoder.add(generated.token))
            yield GenerationChunk(text, generated.token, self._logprobs(generated), None, generated.timings)
        if self.matcher.found is not None:
            yield GenerationChunk("", None, None, "stop", generated.timings, self.matcher.found)
        elif generated.finish_reason is not None:
            yield self._last(generated, generated.finish_reason)

    def _last(self, generated: GeneratedToken, reason: FinishReason) -> GenerationChunk:
        """What was held back: the end of a broken character may still complete a stop string."""
        tail = ""
        if self.special and reason == "stop" and generated.token is not None:
            tail = self.matcher.add(self.decoder.add(generated.token))
        tail += self.matcher.add(self.decoder.flush()) + self.matcher.flush()
        if self.matcher.found is not None:
            return GenerationChunk(tail, None, None, "stop", generated.timings, self.matcher.found)
        return GenerationChunk(
            tail, None, None, reason, generated.timings, generated.token if reason == "stop" else None
        )

    def _logprobs(self, generated: GeneratedToken) -> TokenLogprob | None:
        if generated.token is None or generated.choice is None or generated.choice.logprob is None:
            return None
        after = generated.choice.after or {}

        def known(token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
            left = after.get(token)
            kept, cut_by = (None, left) if isinstance(left, str) else (left, None)
            return TokenLogprob(token, self.tokenizer.token_bytes(token), logprob, top, kept, cut_by)

        top = tuple(known(token, logprob) for token, logprob in generated.choice.top)
        return known(generated.token, generated.choice.logprob, top)


class AnswerStream(Generic[Item]):
    """What is read of one answer, for ``for`` or ``async for``, once. ``close()``, or dropping it, ends the work.

    prompt     the ids that the answer goes on from
    progress   of the prompt is read, too, and not given to a function of ``options``

    What runs does not know this object, so that it ends with its last owner.
    """

    def __init__(
        self,
        engine: Engine,
        ids: Sequence[int],
        sampler: Sampler,
        options: Mapping[str, Any],
        read: Callable[[Any], Iterator[Item]],
        ends: Callable[[Item], bool],
        *,
        progress: bool = False,
    ) -> None:
        self.prompt, self._sampler = ids, sampler
        take, atake = (engine.items, engine.aitems) if progress else (engine.generate, engine.agenerate)
        self._items = _run(partial(take, ids, sampler, **options), read, ends)
        self._begin_asynchronous = partial(_arun, partial(atake, ids, sampler, **options), read, ends)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        return next(self._items)

    def __aiter__(self) -> AsyncIterator[Item]:
        return self.asynchronous()

    def asynchronous(self) -> AsyncGenerator[Item, None]:
        """The same as an asynchronous generator."""
        return self._begin_asynchronous()

    @property
    def draws(self) -> bool:
        """Whether chance has a part in the tokens."""
        params = self._sampler.params  # the last two are of answers that are denoised
        return not self._sampler.greedy or params.diffusion_alg_temp > 0 or params.diffusion_algorithm in (0, 3)

    def begin_with(self, tokens: Sequence[int]) -> None:
        """The answer begins with these, of an earlier run: read, and not drawn. To be said before anything is taken."""
        self._sampler.begins = tuple(tokens)

    def close(self) -> None:
        """Stop within a step, or 25 ms where several are taken at once. May be called twice."""
        self._items.close()


class ChunkStream(AnswerStream[GenerationChunk]):
    """The chunks of one answer.

    parse   makes an object of the whole text, where a form was asked for
    """

    def __init__(
        self,
        engine: Engine,
        ids: Sequence[int],
        sampler: Sampler,
        text: TextStream,
        options: Mapping[str, Any],
        parse: Callable[[str], Any] | None = None,
    ) -> None:
        super().__init__(engine, ids, sampler, options, text.chunks, lambda chunk: chunk.finish_reason is not None)
        self.parse = parse


def _run(
    take: Callable[[], Generator[Any, None, None]], read: Callable[[Any], Iterator[Item]], ends: Callable[[Item], bool]
) -> Generator[Item, None, None]:
    with contextlib.closing(take()) as taken:
        for one in taken:
            for item in read(one):
                yield item
                if ends(item):
                    return


async def _arun(
    take: Callable[[], AsyncGenerator[Any, None]], read: Callable[[Any], Iterator[Item]], ends: Callable[[Item], bool]
) -> AsyncGenerator[Item, None]:
    async with contextlib.aclosing(take()) as taken:
        async for one in taken:
            for item in read(one):
                yield item
                if ends(item):
                    return

"""A request to go on with a text, whatever protocol asks, and its answer: no messages, no template, no tools."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from edgellm.engine.requests import Timings
from edgellm.formats.errors import ParameterError
from edgellm.generation import GenerationChunk, TokenLogprob
from edgellm.measure.scoring import token_logprobs
from edgellm.sampling import Sampler
from edgellm.server.chat_request import Lora
from edgellm.server.errors import invalid
from edgellm.server.lora import adapter_scales, named_scales

if TYPE_CHECKING:
    import numpy as np

    from edgellm.llm import LLM

SCORERS = ThreadPoolExecutor(2, "edgellm-score")  # each text has the engine to itself; more would only wait


@dataclass(frozen=True)
class TextRequest:
    """A text to go on with.

    prompt       text, in which control tokens count as such, or token ids, which are taken as they are
    echo         the prompt comes first, with its log-probabilities where those are asked for
    others       as in ChatRequest
    """

    model: str
    prompt: str | Sequence[int]
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    logprobs: int | None = None
    echo: bool = False
    response_format: Any = None
    grammar: Any = None
    special: bool = False
    keep_alive: float | None = None
    begins: Sequence[int] = ()
    lora: Lora = None


class PromptRead(NamedTuple):
    """The first item of an answer: the prompt's ids, its text where it is echoed, and how likely each token was."""

    ids: list[int]
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


TextItem = PromptRead | GenerationChunk


Begins = Callable[[Sequence[int], bool], Sequence[int]]


async def text_items(
    llm: LLM, request: TextRequest, begins: Begins = lambda tokens, draws: tokens
) -> AsyncGenerator[TextItem, None]:
    """A PromptRead, then the chunks of the answer.

    begins   gives the tokens that it begins with, of those of the request, when it is known whether chance has a part
    """
    ids, text = await asyncio.to_thread(_read, llm, request)
    if request.echo and request.logprobs is not None:
        async with aclosing(_scored(llm, ids, text, request, begins)) as source:
            async for item in source:
                yield item
        if request.max_tokens in (0, 1):
            return
    else:
        yield PromptRead(ids, text)
    more = {"response_format": request.response_format, "grammar": request.grammar}
    chunks = await asyncio.to_thread(
        llm.stream,
        ids,
        max_tokens=request.max_tokens,
        stop=request.stop,
        logprobs=request.logprobs,
        special=request.special,
        lora=named_scales(llm, request.lora),
        **request.sampling,
        **{name: value for name, value in more.items() if value is not None},
    )
    chunks.begin_with(begins(request.begins, chunks.draws))
    async with aclosing(chunks.asynchronous()) as source:
        async for chunk in source:
            yield chunk


def _read(llm: LLM, request: TextRequest) -> tuple[list[int], str]:
    try:
        ids = llm.prompt_ids(request.prompt, parse_special=True)
        llm.engine.check(ids, request.max_tokens)
    except ParameterError as error:
        raise invalid("prompt", str(error)) from None
    if not request.echo:
        return ids, ""
    return ids, request.prompt if isinstance(request.prompt, str) else llm.detokenize(ids, special=True)


async def _scored(
    llm: LLM, ids: list[int], text: str, request: TextRequest, begins: Begins
) -> AsyncGenerator[TextItem, None]:
    """The prompt's log-probabilities; where at most one token follows, out of the same pass over the prompt."""
    stopped = threading.Event()
    last: list[Any] = []
    sampler = _sampler(llm, ids, request)
    begins((), not sampler.greedy)

    def look(row: np.ndarray) -> None:
        last.append(sampler.sample(row))

    try:
        scoring = asyncio.get_running_loop().run_in_executor(SCORERS, _score, llm, ids, request, stopped, look)
        rows = await asyncio.shield(scoring)  # a thread ends by the flag alone
    finally:
        stopped.set()
    yield PromptRead(ids, text, tuple(rows))
    timings = Timings(prompt_n=len(ids), generation_n=request.max_tokens or 0)
    if request.max_tokens == 1:
        yield _one_token(llm, last[0], request, timings)
        ended = last[0].token in llm.tokenizer.eog_ids
        yield GenerationChunk("", None, None, "stop" if ended else "length", timings, last[0].token if ended else None)
    elif request.max_tokens == 0:
        yield GenerationChunk("", None, None, "length", timings)


def _score(
    llm: LLM, ids: list[int], request: TextRequest, stopped: threading.Event, last: Callable[[np.ndarray], None]
) -> list[TokenLogprob]:
    try:
        scales = adapter_scales(llm, request.lora)
        return token_logprobs(llm.engine, llm.tokenizer, ids, request.logprobs or 0, stopped, last, scales)
    except Exception:
        if stopped.is_set():  # nobody waits for the rest
            return []
        raise


def _sampler(llm: LLM, ids: list[int], request: TextRequest) -> Sampler:
    return Sampler(
        llm.params(logprobs=request.logprobs, **request.sampling),
        llm.program.n_vocab,
        llm.tokenizer.eog_ids,
        suppressed_ids=llm.tokenizer.suppressed_ids,
        token_bytes=llm.tokenizer.token_bytes,
        tokenize=lambda piece: llm.tokenizer.encode(piece, False),
        history=ids,
    )


def _one_token(llm: LLM, choice: Any, request: TextRequest, timings: Timings) -> GenerationChunk:
    """The token that follows, an end of generation too: who measures likelihood counts on its row."""
    token = int(choice.token)
    piece = llm.tokenizer.token_bytes
    top = tuple(TokenLogprob(other, piece(other), value) for other, value in choice.top)
    text = llm.tokenizer.decode([token], special=request.special)
    return GenerationChunk(text, token, TokenLogprob(token, piece(token), choice.logprob, top), None, timings)

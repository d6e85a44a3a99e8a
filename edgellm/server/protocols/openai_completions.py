"""``POST /v1/completions``: going on with texts, and how likely a text is (``echo`` with ``logprobs``)."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from edgellm.engine.requests import Timings
from edgellm.generation import GenerationChunk, TokenLogprob
from edgellm.server.answering import seeded, side_by_side, texts
from edgellm.server.chat_request import MAX_CHOICES, MAX_TOP_LOGPROBS, checked_lora, checked_stops
from edgellm.server.errors import ServerError, invalid
from edgellm.server.http import Call, Json, Reply, Route, Stream
from edgellm.server.protocols.openai_chat import FINISH, IGNORED, ResponseFormat, StreamOptions, format_of
from edgellm.server.protocols.openai_wire import (
    FINGERPRINT,
    CountOrAll,
    LoraScales,
    SamplingBody,
    error_body,
    finite,
    llama_timings,
    new_id,
    sampling_fields,
    usage,
)
from edgellm.server.relay import now
from edgellm.server.sse import event
from edgellm.server.text_request import PromptRead, TextItem, TextRequest

MAX_PROMPTS = 256
DEFAULT_MAX_TOKENS = 16

TokenIds = Annotated[list[Annotated[int, Meta(ge=0, le=2**31 - 1)]], Meta(min_length=1)]


class CompletionBody(SamplingBody, kw_only=True):
    """The body of a completion."""

    ignored: ClassVar[frozenset[str]] = IGNORED

    prompt: str | list[str | int | TokenIds]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: CountOrAll | None = None
    n_predict: CountOrAll | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | list[str] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | bool | None = None
    echo: bool | None = None
    suffix: str | None = None
    response_format: ResponseFormat | None = None
    lora: LoraScales | None = None


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """The prompts in order: a text, token ids, or a list of either."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("prompt", "it is an empty list; give a text or token ids.")
    if isinstance(given[0], int):
        if mixed := [number for number, part in enumerate(given) if not isinstance(part, int)]:
            raise invalid(f"prompt[{mixed[0]}]", "token ids and texts cannot be mixed in one list.")
        return [[token for token in given if isinstance(token, int)]]
    if len(given) > MAX_PROMPTS:
        raise invalid("prompt", f"at most {MAX_PROMPTS} prompts in one request.")
    prompts: list[str | list[int]] = []
    for number, part in enumerate(given):
        if isinstance(part, int):
            raise invalid(f"prompt[{number}]", "token ids and texts cannot be mixed in one list.")
        prompts.append(part)
    return prompts


def to_requests(body: CompletionBody) -> list[TextRequest]:
    """One for each choice, in the order of their numbers."""
    if body.suffix:
        raise invalid("suffix", "this endpoint has none; /infill fills in the middle.")
    n, made = choices_of(body)
    given = next((count for count in (body.max_tokens, body.n_predict) if count is not None), DEFAULT_MAX_TOKENS)
    logprobs = body.logprobs
    if isinstance(logprobs, bool):
        logprobs = 0 if logprobs else None
    if made > n and logprobs is None:
        logprobs = 0  # what is chosen by
    sampling = sampling_fields(body)
    return [
        TextRequest(
            model=body.model or "",
            prompt=prompt,
            max_tokens=given,
            stop=checked_stops("stop", body.stop),
            sampling=seeded(sampling, number),
            logprobs=logprobs,
            echo=body.echo is True,
            response_format=format_of(body.response_format),
            lora=checked_lora("lora", body.lora),
        )
        for prompt in prompts_of(body)
        for number in range(made)
    ]


def choices_of(body: CompletionBody) -> tuple[int, int]:
    """How many choices a prompt has, and how many are made for it: the likeliest per token are chosen."""
    n = body.n or 1
    made = n if body.best_of is None else body.best_of
    if made < n:
        raise invalid("best_of", f"it is {made}, fewer than n, which is {n}.")
    if made > n and body.stream:
        raise invalid("best_of", "which are the best is known at the end alone; leave stream out.")
    return n, made


async def completions(call: Call) -> Reply:
    """Whole texts, or their chunks."""
    body: CompletionBody = call.body
    requests = to_requests(body)
    name = body.model or (await call.server.models.find(None)).name
    head = {"id": new_id("cmpl-"), "object": "text_completion", "created": int(now()), "model": name}
    if body.stream:
        return Stream(_chunks(call, body, requests, head), failed=_failed)
    return Json(await _whole(call, body, requests, head))


def _failed(error: ServerError) -> bytes:
    return event(error_body(error)[1])


class _Rows:
    """The log-probabilities of a text in the form of this endpoint; ``offset`` is the place in the text."""

    def __init__(self) -> None:
        self.offset = 0

    def take(self, rows: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The columns of the next rows."""
        offsets = []
        for row in rows:
            offsets.append(self.offset)
            self.offset += len(row.text)
        return {
            "tokens": [row.text for row in rows],
            "token_logprobs": [None if row.logprob is None else finite(row.logprob) for row in rows],
            "top_logprobs": [None if row.logprob is None else _likeliest(row) for row in rows],
            "text_offset": offsets,
        }


def _likeliest(row: TokenLogprob) -> dict[str, float]:
    """By text, the likeliest of those that look the same; the token itself is always there."""
    found: dict[str, float] = {}
    for one in (*row.top, row):
        found.setdefault(one.text, finite(one.logprob))
    return found


class _Text:
    """One choice in the making."""

    def __init__(self, request: TextRequest) -> None:
        self.request = request
        self.pieces: list[str] = []
        self.rows: list[TokenLogprob] = []
        self.n_made, self.logprob = 0, 0.0  # of the answer alone
        self.reason = "length"
        self.timings = Timings()

    def add(self, item: TextItem, text: str) -> None:
        self.pieces.append(text)
        rows = _rows_of(item)
        self.rows += rows
        if isinstance(item, GenerationChunk):
            self.n_made += len(rows)
            self.logprob += sum(row.logprob for row in rows if row.logprob is not None)
        if isinstance(item, GenerationChunk) and item.finish_reason:
            self.reason, self.timings = FINISH[item.finish_reason], item.timings

    @property
    def likelihood(self) -> float:
        """The mean log-probability of its tokens; an answer without any is the least."""
        return self.logprob / self.n_made if self.n_made else -math.inf

    def as_dict(self, index: int, *, with_logprobs: bool) -> dict[str, Any]:
        logprobs = _Rows().take(self.rows) if with_logprobs else None
        return {"text": "".join(self.pieces), "index": index, "logprobs": logprobs, "finish_reason": self.reason}


def _rows_of(item: TextItem) -> tuple[TokenLogprob, ...]:
    if isinstance(item, PromptRead):
        return item.logprobs
    return (item.logprobs,) if item.logprobs is not None else ()


def _text_of(item: TextItem, request: TextRequest) -> str:
    """What an item adds to the text; of a prompt, what is to be echoed."""
    return item.text if isinstance(item, GenerationChunk) or request.echo else ""


async def _whole(call: Call, body: CompletionBody, requests: list[TextRequest], head: dict[str, Any]) -> dict[str, Any]:
    made = [_Text(request) for request in requests]
    async with aclosing(side_by_side([partial(texts, call.server, one) for one in requests])) as source:
        async for number, item in source:
            made[number].add(item, _text_of(item, requests[number]))
    n, of = choices_of(body)
    chosen = made
    if of > n:
        each = [made[start : start + of] for start in range(0, len(made), of)]
        chosen = [text for texts in each for text in sorted(texts, key=lambda text: -text.likelihood)[:n]]
    asked = body.logprobs is not None and body.logprobs is not False
    return {
        **head,
        "choices": [text.as_dict(number, with_logprobs=asked) for number, text in enumerate(chosen)],
        "usage": _usage([text.timings for text in made], requests),
        "system_fingerprint": FINGERPRINT,
        "timings": llama_timings(chosen[0].timings),
    }


def _usage(timings: list[Timings], requests: list[TextRequest]) -> dict[str, Any]:
    """Prompts are counted once, however many choices they have."""
    read: dict[int, Timings] = {id(one.prompt): times for one, times in zip(requests, timings, strict=True)}
    total = Timings(
        prompt_n=sum(times.prompt_n for times in read.values()),
        reused_n=sum(times.reused_n for times in read.values()),
    )
    return usage(total, generated=sum(times.generation_n for times in timings))


async def _chunks(
    call: Call, body: CompletionBody, requests: list[TextRequest], head: dict[str, Any]
) -> AsyncIterator[bytes]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    frame = {**head, "system_fingerprint": FINGERPRINT, **({"usage": None} if with_usage else {})}
    rows = [_Rows() for _ in requests]
    ends: dict[int, Timings] = {}
    async with aclosing(side_by_side([partial(texts, call.server, one) for one in requests])) as source:
        async for number, item in source:
            text = _text_of(item, requests[number])
            reason, more = None, {}
            if isinstance(item, GenerationChunk) and item.finish_reason:
                reason, ends[number] = FINISH[item.finish_reason], item.timings
                more = {"timings": llama_timings(item.timings)}
            told = rows[number].take(found) if (found := _rows_of(item)) else None
            if text or told or reason:
                choice = {"text": text, "index": number, "logprobs": told, "finish_reason": reason}
                yield event({**frame, "choices": [choice], **more})
    if with_usage:
        yield event({**frame, "choices": [], "usage": _usage([ends[i] for i in range(len(requests))], requests)})
    yield b"data: [DONE]\n\n"


ROUTES = (Route("POST", "/v1/completions", completions, CompletionBody, summary="Go on with a text"),)

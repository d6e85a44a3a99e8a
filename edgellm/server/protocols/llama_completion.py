"""llama-server's ``/completion`` and ``/infill``: going on with a text, and filling in what is missing in its midst."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from edgellm.generation import GenerationChunk, TokenLogprob
from edgellm.server.answering import side_by_side, texts
from edgellm.server.chat_request import MAX_GRAMMAR_CHARS, checked_lora, checked_schema, checked_stops
from edgellm.server.errors import ServerError, invalid
from edgellm.server.http import Call, Json, Reply, Route, Stream
from edgellm.server.protocols.llama_wire import error_body, settings
from edgellm.server.protocols.openai_completions import CompletionBody, TokenIds, prompts_of
from edgellm.server.protocols.openai_wire import (
    CountOrAll,
    LoraScales,
    Probability,
    SamplingBody,
    finite,
    llama_timings,
    sampling_fields,
)
from edgellm.server.sse import event
from edgellm.server.text_request import TextRequest

if TYPE_CHECKING:
    from edgellm.llm import LLM

MAX_PROBS = 1000

Penalty = Annotated[float, Meta(ge=-1000, le=1000)]


class LlamaBody(SamplingBody, kw_only=True):
    """What both endpoints take."""

    ignored: ClassVar[frozenset[str]] = frozenset(("cache_prompt", "id_slot", "n_keep", "slot_id", "n_indent"))

    model: str | None = None
    stream: bool | None = None
    n_predict: CountOrAll | None = None
    max_tokens: CountOrAll | None = None
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    n_probs: Annotated[int, Meta(ge=0, le=MAX_PROBS)] | None = None
    post_sampling_probs: bool | None = None
    adaptive_target: Annotated[float, Meta(ge=-1, le=1)] | None = None
    adaptive_decay: Probability | None = None
    return_tokens: bool | None = None
    timings_per_token: bool | None = None
    response_fields: Annotated[list[str], Meta(max_length=64)] | None = None
    lora: LoraScales | None = None


class LlamaCompletionBody(LlamaBody, kw_only=True):
    """The body of /completion."""

    prompt: str | list[str | int | TokenIds]
    json_schema: dict[str, Any] | None = None
    grammar: Annotated[str, Meta(max_length=MAX_GRAMMAR_CHARS)] | None = None


class Extra(msgspec.Struct):
    """A further file that the model may look at."""

    text: str
    filename: str = "tmp"


class InfillBody(LlamaBody, kw_only=True):
    """The body of /infill."""

    input_prefix: str
    input_suffix: str
    input_extra: Annotated[list[Extra], Meta(max_length=256)] | None = None
    prompt: str = ""


async def completion(call: Call) -> Reply:
    """Whole texts (a list of them for several prompts), or chunks."""
    body: LlamaCompletionBody = call.body
    prompts = prompts_of(CompletionBody(prompt=body.prompt))
    schema = None if body.json_schema is None else checked_schema("json_schema", body.json_schema)
    return await _answered(call, [_request(body, prompt, schema, body.grammar or None) for prompt in prompts])


async def infill(call: Call) -> Reply:
    """What stands between a prefix and a suffix. ServerError not_supported for a model without the tokens for it."""
    body: InfillBody = call.body
    async with call.server.models.lease(body.model) as entry:
        ids = await asyncio.to_thread(_infill_ids, entry.leased, body)
        return await _answered(call, [_request(body, ids, None, None)])


def _request(body: LlamaBody, prompt: str | list[int], schema: Any, grammar: str | None) -> TextRequest:
    sampling = sampling_fields(body)
    for name in ("post_sampling_probs", "adaptive_target", "adaptive_decay"):
        if getattr(body, name) is not None:
            sampling[name] = getattr(body, name)
    n = next((count for count in (body.n_predict, body.max_tokens) if count is not None), None)
    return TextRequest(
        model=body.model or "",
        prompt=prompt,
        max_tokens=n,
        stop=checked_stops("stop", body.stop),
        sampling=sampling,
        logprobs=body.n_probs or None,
        response_format=schema,
        grammar=grammar,
        lora=checked_lora("lora", body.lora),
    )


def _infill_ids(llm: LLM, body: InfillBody) -> list[int]:
    """Prefix, suffix, and the mark behind which the model writes the middle."""
    vocabulary = llm.tokenizer.vocabulary
    known = {name: vocabulary.special_id(f"fim_{name}_token_id") for name in ("pre", "suf", "mid", "rep", "sep")}
    pre, suf, mid = known["pre"], known["suf"], known["mid"]
    if pre is None or suf is None or mid is None:
        raise ServerError("not_supported", "This model has no tokens for filling in the middle. Use one made for code.")

    def plain(text: str) -> list[int]:
        return llm.tokenizer.encode(text, False)

    ids = list(llm.tokenizer.special.prefix)
    for number, extra in enumerate(body.input_extra or ()):
        if known["sep"] is None:
            raise invalid(f"input_extra[{number}]", "this model has no token that separates files.")
        if known["rep"] is not None and not number:
            ids += [known["rep"], *plain("project\n")]
        ids += [known["sep"], *plain(f"{extra.filename}\n{extra.text}\n")]
    return [*ids, pre, *plain(body.input_prefix), suf, *plain(body.input_suffix), mid, *plain(body.prompt)]


async def _answered(call: Call, requests: list[TextRequest]) -> Reply:
    body: LlamaBody = call.body
    if body.stream:
        return Stream(_chunks(call, requests), failed=_failed)
    finals: list[dict[str, Any]] = [{} for _ in requests]
    async with aclosing(_told(call, requests)) as source:
        async for number, final, _ in source:
            finals[number] = final or finals[number]
    if body.response_fields:
        finals = [_chosen(final, body.response_fields) for final in finals]
    return Json(finals[0] if len(finals) == 1 else finals)


def _failed(error: ServerError) -> bytes:
    return event(error_body(error)[1])


async def _chunks(call: Call, requests: list[TextRequest]) -> AsyncIterator[bytes]:
    async with aclosing(_told(call, requests)) as source:
        async for _, final, chunk in source:
            if final is not None:
                yield event({**final, "content": chunk["content"], "tokens": []})
            elif chunk["content"] or "completion_probabilities" in chunk:
                yield event(chunk)


async def _told(
    call: Call, requests: list[TextRequest]
) -> AsyncGenerator[tuple[int, dict[str, Any] | None, dict[str, Any]], None]:
    """(number, the whole answer once it is there, what a stream tells) for each chunk."""
    body: LlamaBody = call.body
    made = [_Answer(request) for request in requests]
    async with aclosing(side_by_side([partial(texts, call.server, one) for one in requests])) as source:
        async for number, item in source:
            if not isinstance(item, GenerationChunk):
                continue
            answer = made[number]
            chunk = answer.add(number, item, body)
            final = None
            if item.finish_reason:
                entry = await call.server.models.find(body.model)
                told = settings(entry.leased.params(**answer.request.sampling), answer.request)
                final = {**answer.whole(number, item, body), "model": entry.name, "generation_settings": told}
            yield number, final, chunk


class _Answer:
    """One answer in the making."""

    def __init__(self, request: TextRequest) -> None:
        self.request = request
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self.probabilities: list[dict[str, Any]] = []

    def add(self, number: int, item: GenerationChunk, body: LlamaBody) -> dict[str, Any]:
        self.pieces.append(item.text)
        chunk = {
            "index": number,
            "content": item.text,
            "tokens": [] if item.token is None else [item.token],
            "stop": False,
            "id_slot": 0,
            "tokens_predicted": item.timings.generation_n,
            "tokens_evaluated": item.timings.prompt_n,
        }
        if item.token is not None:
            self.tokens.append(item.token)
        if item.logprobs is not None:
            row = _probability(item.logprobs, body.post_sampling_probs is True)
            self.probabilities.append(row)
            chunk["completion_probabilities"] = [row]
        if body.timings_per_token:
            chunk["timings"] = llama_timings(item.timings)
        return chunk

    def whole(self, number: int, item: GenerationChunk, body: LlamaBody) -> dict[str, Any]:
        content = "".join(self.pieces)
        by_text = isinstance(item.stop, str)
        stop_type = "limit" if item.finish_reason != "stop" else "word" if by_text else "eos"
        told = {
            "index": number,
            "content": content,
            "tokens": self.tokens if body.return_tokens else [],
            "id_slot": 0,
            "stop": True,
            "tokens_predicted": item.timings.generation_n,
            "tokens_evaluated": item.timings.prompt_n,
            "prompt": self.request.prompt,
            "has_new_line": "\n" in content,
            "truncated": item.finish_reason == "context_full",
            "stop_type": stop_type,
            "stopping_word": item.stop if by_text else "",
            "tokens_cached": item.timings.prompt_n + item.timings.generation_n,
            "timings": llama_timings(item.timings),
        }
        return told | ({"completion_probabilities": self.probabilities} if self.probabilities else {})


def _probability(row: TokenLogprob, after_sampling: bool) -> dict[str, Any]:
    """A token and the likeliest in its place; after sampling the numbers are probabilities."""
    names = ("prob", "top_probs") if after_sampling else ("logprob", "top_logprobs")

    def told(one: TokenLogprob) -> dict[str, Any]:
        value = finite(one.logprob)
        if after_sampling:
            value = math.exp(value)
        return {"id": one.token, "token": one.text, "bytes": list(one.bytes), names[0]: value}

    return {**told(row), names[1]: [told(other) for other in row.top]}


def _chosen(final: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The fields that were asked for; ``a/b`` is the field b of a, told as b."""
    chosen = {}
    for name in names:
        value: Any = final
        for part in name.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            chosen[name.rpartition("/")[2]] = value
    return chosen


ROUTES = (
    Route("POST", "/completion", completion, LlamaCompletionBody, summary="Go on with a text"),
    Route("POST", "/completions", completion, LlamaCompletionBody, summary="Go on with a text"),
    Route("POST", "/infill", infill, InfillBody, summary="Fill in the middle"),
)

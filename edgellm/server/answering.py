"""From a request to its answer: the model loaded, a place in the line, the events of the library, and an end.

``events`` is one answer; closing it, as happens when the client leaves, frees its blocks within a step. ``choices`` are
several to one request, side by side. Neither ever blocks the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from edgellm.formats.errors import ContextFullError, EdgeLLMError
from edgellm.generation import GenerationChunk
from edgellm.messages.events import Event, Finished, PromptProgress
from edgellm.server.chat_request import ChatRequest
from edgellm.server.errors import ServerError, invalid
from edgellm.server.lora import named_scales
from edgellm.server.relay import RELAY
from edgellm.server.server import Server
from edgellm.server.text_request import TextItem, TextRequest, text_items
from edgellm.server.turns import fitting

if TYPE_CHECKING:
    from edgellm.llm import LLM
    from edgellm.messages.stream import EventStream

T = TypeVar("T")

SEEDS = 1 << 63
SIDE_BY_SIDE = 16  # answers of one request that are under way at once


async def events(server: Server, request: ChatRequest) -> AsyncGenerator[Event, None]:
    """The events of one answer, the first a PromptProgress once the prompt is known to fit. Raises ServerError."""
    async with aclosing(_answered(server, request, _message)) as source:
        async for event in source:
            if isinstance(event, Finished):
                server.metrics.count(event.timings, event.reason)
            yield event


async def texts(server: Server, request: TextRequest) -> AsyncGenerator[TextItem, None]:
    """The items of one text: a PromptRead, then chunks. Raises ServerError."""
    relay = RELAY.get()
    answer = text_items if relay is None else partial(text_items, begins=relay.begins)
    async with aclosing(_answered(server, request, answer)) as source:
        async for item in source:
            if isinstance(item, GenerationChunk):
                if item.finish_reason:
                    server.metrics.count(item.timings, item.finish_reason)
                if relay is not None and not relay.several and item.token is not None:
                    relay.tokens.append(item.token)
            yield item


async def choices(server: Server, request: ChatRequest) -> AsyncGenerator[tuple[int, Event], None]:
    """(number of the choice, event) of ``request.n`` answers as they come. They share the prompt's blocks."""
    each = [replace(request, n=1, sampling=seeded(request.sampling, number)) for number in range(request.n)]
    async with aclosing(side_by_side([partial(events, server, one) for one in each])) as source:
        async for numbered in source:
            yield numbered


def seeded(sampling: Any, number: int) -> dict[str, Any]:
    """The same sampling with the seed of the choice ``number``: several answers shall differ."""
    seed = sampling.get("seed", -1)
    if seed in (None, -1) and number and (relay := RELAY.get()) is not None:
        seed = relay.seed  # so that they can be given again
    return dict(sampling) if seed in (None, -1) else {**sampling, "seed": (seed + number) % SEEDS}


async def _answered(
    server: Server, request: Any, answer: Callable[[LLM, Any], AsyncGenerator[T, None]]
) -> AsyncGenerator[T, None]:
    """What ``answer`` yields of a loaded model, in a place of the line; every error is a ServerError."""
    with server.admitted():
        try:
            async with server.models.lease(request.model, request.keep_alive) as entry:
                if request.lora is None:
                    request = replace(request, lora=server.models.scales_of(request.model))
                if (relay := RELAY.get()) is not None:
                    request = relay.prepared(request, in_order=entry.leased.program.denoising is None)
                async with aclosing(answer(entry.leased, request)) as source:
                    async for item in source:
                        yield item
        except Exception as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError.of(error) from error


async def _message(llm: LLM, request: ChatRequest) -> AsyncGenerator[Event, None]:
    relay = RELAY.get()
    reply = await asyncio.to_thread(_reply, llm, request)
    reply.begin_with(request.begins if relay is None else relay.begins(request.begins, reply.draws))
    if relay is not None:
        reply.name_calls(lambda: relay.new_id()[:9])
        if not relay.several:
            relay.tokens = reply.tokens
    yield PromptProgress(0, len(reply.prompt), 0)  # at once: the client knows that it is understood
    async with aclosing(reply.asynchronous()) as source:
        async for event in source:
            if relay is None or not isinstance(event, PromptProgress):  # how many there are is chance
                yield event


def _reply(llm: LLM, request: ChatRequest) -> EventStream:
    """The library's reply, not yet begun: rendered, tokenized and known to fit."""
    try:
        return _asked(llm, request)
    except EdgeLLMError as error:
        if error.code in ("GRAMMAR", "SCHEMA"):
            field = "grammar" if request.grammar else request.format_field if request.response_format else "tools"
            raise invalid(field, str(error)) from error
        raise


def _asked(llm: LLM, request: ChatRequest) -> EventStream:
    return llm.events(
        fitting(llm.chat_template, request.messages),
        tools=request.tools,
        tool_choice=request.tool_choice if request.tools else "auto",  # type: ignore[arg-type]
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning=request.reasoning,
        max_tokens=request.max_tokens,
        stop=request.stop,
        logprobs=request.logprobs,
        template_kwargs=request.template_kwargs,
        response_format=request.response_format,
        grammar=request.grammar,
        lora=named_scales(llm, request.lora),
        **request.sampling,
    )


async def count_tokens(server: Server, request: ChatRequest) -> int:
    """How many tokens the prompt of ``events`` has, also where it is too long."""
    async with aclosing(_answered(server, request, _counted)) as source:
        return await anext(source)


async def _counted(llm: LLM, request: ChatRequest) -> AsyncGenerator[int, None]:
    try:
        yield len((await asyncio.to_thread(_reply, llm, request)).prompt)
    except ContextFullError as error:
        yield error.n_tokens


async def side_by_side(makers: Sequence[Callable[[], AsyncGenerator[T, None]]]) -> AsyncGenerator[tuple[int, T], None]:
    """(number, item) of several generators as the items come; an error of one ends all."""
    if len(makers) == 1:
        async with aclosing(makers[0]()) as source:
            async for item in source:
                yield 0, item
        return
    if (relay := RELAY.get()) is not None:
        relay.several = True
    coming: Iterator[tuple[int, Callable[[], AsyncGenerator[T, None]]]] = iter(enumerate(makers))
    sources: dict[int, AsyncGenerator[T, None]] = {}
    waiting: dict[asyncio.Task[T | None], int] = {}

    def begin(n: int) -> None:
        for number, make in islice(coming, n):
            sources[number] = make()
            waiting[asyncio.create_task(_next(sources[number]))] = number

    try:
        begin(SIDE_BY_SIDE)
        while waiting:
            # each in its turn where they may have to be given again, so that the chunks have one order
            looked_at = waiting if relay is None else [next(iter(waiting))]
            done, _ = await asyncio.wait(looked_at, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                number, found = waiting.pop(task), task.result()
                if found is None:
                    await sources.pop(number).aclose()
                    begin(1)
                else:
                    yield number, found
                    waiting[asyncio.create_task(_next(sources[number]))] = number
    finally:
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting)
        for source in sources.values():
            await source.aclose()


async def _next(source: AsyncGenerator[T, None]) -> T | None:
    return await anext(source, None)

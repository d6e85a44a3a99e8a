"""From a request to its answer: the model loaded, a place in the line, the events of the library, and an end.

``events`` is one answer; closing it, as happens when the client leaves, frees its blocks within a step. ``choices`` are
several to one request, side by side. Neither ever blocks the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgellm.messages.events import ContentDelta, Event, Finished, PromptProgress
from edgellm.server.chat_request import ChatRequest
from edgellm.server.errors import ServerError, invalid
from edgellm.server.server import Server

if TYPE_CHECKING:
    from edgellm.llm import LLM

SEEDS = 1 << 64


async def events(server: Server, request: ChatRequest) -> AsyncGenerator[Event, None]:
    """The events of one answer, the first a PromptProgress once the prompt is known to fit. Raises ServerError."""
    with server.admitted():
        try:
            async with server.models.lease(request.model, request.keep_alive) as entry:
                assert entry.llm is not None, "a lease is of a loaded model"
                async with contextlib.aclosing(_message(entry.llm, request)) as source:
                    async for event in source:
                        if isinstance(event, Finished):
                            server.metrics.count(event.timings, event.reason)
                        yield event
        except Exception as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError.of(error) from error


async def _message(llm: LLM, request: ChatRequest) -> AsyncGenerator[Event, None]:
    if request.response_format is not None:
        raise invalid("response_format", "this version cannot keep to a format yet.")
    chunks = await asyncio.to_thread(
        llm.stream,
        request.messages,
        max_tokens=request.max_tokens,
        stop=request.stop,
        logprobs=request.logprobs,
        tools=None if request.tool_choice == "none" else request.tools,
        template_kwargs=request.template_kwargs,
        **request.sampling,
    )
    async with contextlib.aclosing(chunks.asynchronous()) as source:
        yield PromptProgress(0, 0, 0)
        async for chunk in source:
            if chunk.text or chunk.logprobs:
                yield ContentDelta(chunk.text, (chunk.logprobs,) if chunk.logprobs else ())
            if chunk.finish_reason:
                yield Finished(chunk.finish_reason, chunk.stop, chunk.timings, 0)


async def choices(server: Server, request: ChatRequest) -> AsyncGenerator[tuple[int, Event], None]:
    """(number of the choice, event) of ``request.n`` answers as they come. They share the prompt's blocks."""
    if request.n == 1:
        async with contextlib.aclosing(events(server, request)) as source:
            async for event in source:
                yield 0, event
        return
    seed = request.sampling.get("seed")
    each = [
        replace(request, n=1, sampling={**request.sampling, "seed": (seed + number) % SEEDS})
        if number and seed not in (None, -1)
        else replace(request, n=1)
        for number in range(request.n)
    ]
    sources = [events(server, one) for one in each]
    waiting: dict[asyncio.Task[Any], int] = {}
    try:
        for number, source in enumerate(sources):
            waiting[asyncio.create_task(_next(source))] = number
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                number, event = waiting.pop(task), task.result()
                if event is not None:
                    yield number, event
                    waiting[asyncio.create_task(_next(sources[number]))] = number
    finally:
        for task in waiting:
            task.cancel()
        if waiting:
            await asyncio.wait(waiting)
        for source in sources:
            await source.aclose()


async def _next(source: AsyncIterator[Event]) -> Event | None:
    return await anext(source, None)

"""Replies that grow: server-sent events and lines of JSON, pings in between, never ahead of a slow reader.

A chunk is fetched from its source once the one before it is sent, so a reader who does not read holds back its own
answer and nothing else: the engine stops when its small mailbox is full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from edgellm.server.errors import ServerError
from edgellm.server.http import Stream, encode

HEADERS_AFTER_S = 1.0  # an error until then has a status of its own; what takes longer begins to stream
PING_S = 10.0
STALL_S = 120.0  # a reader that took nothing for so long is gone

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + encode(data) + b"\n\n"


def line(data: Any) -> bytes:
    """One line of application/x-ndjson."""
    return encode(data) + b"\n"


async def send_stream(stream: Stream, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
    """Send all of it. What its source raises before the headers are out is raised here."""
    pending = asyncio.ensure_future(_next(stream))
    try:
        await asyncio.wait({pending}, timeout=HEADERS_AFTER_S)
        if pending.done():
            pending.result()
        await _sent(send, {"type": "http.response.start", "status": 200, "headers": headers})
        if not pending.done():
            await _send_body(send, _ping(stream))
        while True:
            done, _ = await asyncio.wait({pending}, timeout=PING_S)
            try:
                chunk = pending.result() if done else _ping(stream)
            except Exception as error:
                await _send_body(send, stream.failed(ServerError.of(error)), more=False)
                raise
            if chunk is None:
                break
            await _send_body(send, chunk)
            if done:
                pending = asyncio.ensure_future(_next(stream))
        await _send_body(send, b"", more=False)
    finally:
        pending.cancel()
        await asyncio.wait({pending})
        close = getattr(stream.source, "aclose", None)
        if close is not None:
            await close()


def _ping(stream: Stream) -> bytes:
    return stream.ping if isinstance(stream.ping, bytes) else stream.ping()


async def _next(stream: Stream) -> bytes | None:
    return await anext(stream.source, None)


async def _send_body(send: Send, chunk: bytes, *, more: bool = True) -> None:
    await _sent(send, {"type": "http.response.body", "body": chunk, "more_body": more})


async def _sent(send: Send, message: MutableMapping[str, Any]) -> None:
    try:
        async with asyncio.timeout(STALL_S):
            await send(message)
    except TimeoutError:
        raise ConnectionError(f"the reader took nothing for {STALL_S:.0f} s") from None

"""An answer that another process passes on: its parts, told so that it can be given again by another server.

A front sends a call to one of several servers and passes the parts on to its client. When that server is gone, the call
goes to another one with the tokens that are known, and the front leaves out the parts that its client has. So what is
drawn by chance in a reply (ids, its time, the seed) comes from the call, and tokens are told beside the text.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from edgellm.server.chat_request import ChatRequest
from edgellm.server.errors import Kind, ServerError
from edgellm.server.http import Json, Plain, Route, Stream, encode
from edgellm.server.routes import call_route
from edgellm.server.server import Server
from edgellm.server.text_request import TextRequest

R = TypeVar("R", ChatRequest, TextRequest)

TELL_S = 0.5  # how often a whole answer tells the tokens that it has so far
AHEAD = 16  # parts that wait for the front


class RelayedCall(NamedTuple):
    """A request on its way to a server.

    path       of the route, as protocols have it
    key        of the call, 16 bytes: ids and the seed are made of it
    started    seconds since 1970
    known      tokens of the answer, when another server has begun it
    begun      there are such tokens, or the client has a part of the answer
    """

    method: str
    path: str
    raw: bytes
    headers: Mapping[str, str]
    path_params: Mapping[str, Any]
    query: Mapping[str, str]
    key: bytes
    started: float
    known: tuple[int, ...] = ()
    begun: bool = False


class Whole(NamedTuple):
    """A reply in one piece; the last part. ``draws`` where chance has a part in it."""

    status: int
    media_type: str
    content: bytes
    headers: dict[str, str]
    draws: bool = False


class Begun(NamedTuple):
    """A stream begins."""

    media_type: str
    headers: dict[str, str]
    ping: bytes


class Chunk(NamedTuple):
    """A piece of a stream, and the tokens that were made since the last part."""

    data: bytes
    tokens: tuple[int, ...] = ()


class Made(NamedTuple):
    """Tokens of a whole answer that is not there yet."""

    tokens: tuple[int, ...]


class Ended(NamedTuple):
    """A stream is over; the last part. ``draws`` as of ``Whole``."""

    draws: bool = False


class Failed(NamedTuple):
    """An error for the client; the last part. ``data`` is the last chunk of a stream that had begun."""

    kind: Kind
    message: str
    field: str | None
    status: int
    headers: dict[str, str]
    details: dict[str, Any]
    data: bytes | None = None

    @classmethod
    def of(cls, error: ServerError, data: bytes | None = None) -> Failed:
        """The error as a part."""
        return cls(error.kind, error.message, error.field, error.status, error.headers, error.details, data)

    def error(self) -> ServerError:
        """And back."""
        return ServerError(
            self.kind, self.message, self.field, status=self.status, headers=self.headers, details=self.details
        )


Part = Whole | Begun | Chunk | Made | Ended | Failed


@dataclass
class Relay:
    """What the answer to a relayed call is made with.

    tokens    of the answer so far, where there is one answer and no more
    several   the reply has several answers: they are made again from the first token on
    seeded    the client gave a seed
    draws     chance has a part in the reply
    """

    key: bytes
    started: float
    known: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    several: bool = False
    seeded: bool = False
    draws: bool = False
    n_ids: int = 0

    def new_id(self) -> str:
        """24 hex digits: the same for the same call, in the order in which they are asked for."""
        self.n_ids += 1
        return hashlib.blake2b(self.n_ids.to_bytes(4, "little"), key=self.key, digest_size=12).hexdigest()

    @property
    def seed(self) -> int:
        """Of an answer that was given none."""
        return int.from_bytes(hashlib.blake2b(b"seed", key=self.key, digest_size=6).digest(), "little")

    def prepared(self, request: R, *, in_order: bool = True) -> R:
        """The request with a seed in any case, and with the known tokens where they change nothing in the answer.

        A seed of the client's, and log-probabilities, want every token drawn again; so does a model that writes in no
        order, and cannot be told how its answer begins.
        """
        given = request.sampling
        self.seeded = has_seed = given.get("seed", -1) not in (None, -1)
        begins = self.known if in_order and request.logprobs is None and not self.several else ()
        # what goes on draws other numbers than what it follows
        sampling = given if has_seed else {**given, "seed": self.seed + len(begins)}
        return replace(request, sampling=sampling, begins=begins)

    def begins(self, tokens: Sequence[int], draws: bool) -> Sequence[int]:
        """Those of ``prepared``, once it is known whether any is drawn by chance."""
        self.draws |= draws
        return () if draws and self.seeded else tokens


RELAY: ContextVar[Relay | None] = ContextVar("relay", default=None)
"""The relayed call that this task answers."""


def now() -> float:
    """The time that a reply tells, in seconds since 1970."""
    relay = RELAY.get()
    return time.time() if relay is None else relay.started


async def parts(server: Server, route: Route, call: RelayedCall) -> AsyncGenerator[Part, None]:
    """The parts of a reply as they come; closing the generator ends the work."""
    relay = Relay(call.key, call.started, call.known)
    queue: asyncio.Queue[Part] = asyncio.Queue(AHEAD)
    work = asyncio.ensure_future(_work(server, route, call, relay, queue))  # a task: it has variables of its own
    n_told = 0

    def new() -> tuple[int, ...]:
        nonlocal n_told
        told = tuple(relay.tokens[n_told:])
        n_told += len(told)
        return told

    try:
        coming = asyncio.ensure_future(queue.get())
        while True:
            done, _ = await asyncio.wait({coming}, timeout=TELL_S)
            if not done:
                if told := new():
                    yield Made(told)
                continue
            part = coming.result()
            yield part._replace(tokens=new()) if isinstance(part, Chunk) else part
            if isinstance(part, Whole | Ended | Failed):
                return
            coming = asyncio.ensure_future(queue.get())
    finally:
        for task in (work, coming):
            task.cancel()
        await asyncio.wait({work, coming})


async def _work(server: Server, route: Route, call: RelayedCall, relay: Relay, queue: asyncio.Queue[Part]) -> None:
    RELAY.set(relay)
    try:
        reply = await call_route(server, route, call.raw, call.headers, call.path_params, call.query)
    except Exception as error:
        await queue.put(Failed.of(ServerError.told(error)))
        return
    if not isinstance(reply, Stream):
        await queue.put(_whole(reply, relay.draws))
        return
    await queue.put(Begun(reply.media_type, dict(reply.headers), _ping(reply)))
    try:
        async for data in reply.source:
            await queue.put(Chunk(data))
        await queue.put(Ended(relay.draws))
    except Exception as error:
        told = ServerError.told(error)
        await queue.put(Failed.of(told, reply.failed(told)))
    finally:
        if (close := getattr(reply.source, "aclose", None)) is not None:
            await close()


def _ping(reply: Stream) -> bytes:
    """One that is no part of the answer: those that a writer makes move it on."""
    if isinstance(reply.ping, bytes):
        return reply.ping
    return b": ping\n\n" if reply.media_type == "text/event-stream" else b""


def _whole(reply: Json | Plain, draws: bool) -> Whole:
    if isinstance(reply, Plain):
        return Whole(reply.status, reply.media_type, reply.content, dict(reply.headers), draws)
    return Whole(reply.status, "application/json", encode(reply.content), dict(reply.headers), draws)

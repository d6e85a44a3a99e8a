"""The application: finds the route, lets the request in, reads its body, runs its handler until the client leaves.

Everything passes through ``App``, so nothing is open because a check was forgotten, and every error, also of a request
that never reached a handler, has the shape of the protocol whose path was asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from starlette.routing import Match
from starlette.routing import Route as PathPattern

from edgellm.server import bodies
from edgellm.server.errors import ServerError
from edgellm.server.http import Call, Json, Plain, Reply, Route, Stream, encode
from edgellm.server.openapi import document
from edgellm.server.routes import ProtocolRoute, all_routes, call_route
from edgellm.server.security import PREFLIGHT_HEADERS, check_json, cors_headers
from edgellm.server.server import Server
from edgellm.server.sse import Send, send_stream

BODY_S = 60.0  # for a client to send its whole body

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


@dataclass(frozen=True)
class _Served:
    route: Route
    pattern: PathPattern
    protocol: ModuleType


class Asked(NamedTuple):
    """A request: header names in lower case, the body as it came, ``client`` the address that sent it."""

    route: Route
    protocol: ModuleType
    raw: bytes
    headers: dict[str, str]
    path_params: dict[str, Any]
    query: dict[str, str]
    client: str


class ClientLeft(Exception):
    """The client closed the connection; nobody is there to be told anything."""


class App:
    """The ASGI application of a server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        rows = all_routes()
        self._protocol = rows[0].protocol  # whose errors a path has that nobody has
        own = ProtocolRoute(Route("GET", "/openapi.json", self._document, summary="This document"), self._protocol)
        self._served = [
            _Served(route, PathPattern(route.path, _never, methods=[route.method]), protocol)
            for route, protocol in (*rows, own)
        ]
        self._tending: asyncio.Task[None] | None = None

    def routes(self) -> Iterator[Route]:
        """All of them."""
        return (served.route for served in self._served)

    async def _document(self, call: Call) -> Reply:
        return Json(document(self.routes()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                self._tending = asyncio.create_task(self.server.tend())
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                if self._tending is not None:
                    self._tending.cancel()
                await self.server.models.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The request's work runs beside a look at the connection, and ends when the client leaves."""
        began = _Began(send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        served, params, protocol = self._find(scope)
        origin = None
        try:
            self.server.access.check_host(headers.get("host", ""))
            origin = self.server.access.allowed_origin(headers)
            if scope["method"] == "OPTIONS" and origin is not None:
                await _reply(Plain(b"", status=204, headers=PREFLIGHT_HEADERS), began, cors_headers(origin))
                return
            self.server.access.check(headers, public=served is not None and served.route.public)
            if served is None:
                raise self._no_such_route(scope)
            raw = await self._raw(served.route, headers, receive)
            query = dict(parse_qsl(scope.get("query_string", b"").decode("latin-1")))
            asked = Asked(served.route, protocol, raw, headers, params, query, (scope.get("client") or ("",))[0])
            work = asyncio.ensure_future(self._answer(asked, began, cors_headers(origin)))
            await _until_gone(work, receive)
        except (ClientLeft, ConnectionError, asyncio.CancelledError):  # the last: the server stops
            return
        except Exception as error:
            told = ServerError.told(error)
            if not began.started:
                status, content = protocol.error_body(told)
                more = {**told.headers, **cors_headers(origin)}
                await _reply(Json(content, status, more), began, {})

    def _find(self, scope: Scope) -> tuple[_Served | None, dict[str, Any], ModuleType]:
        """The row of a path and method, and the protocol whose path it is; ``scope["path"]`` alone decides."""
        protocol = self._protocol
        for served in self._served:
            match, child = served.pattern.matches(scope)
            if match is Match.FULL:
                return served, child["path_params"], served.protocol
            if match is Match.PARTIAL:
                protocol = served.protocol
        return None, {}, protocol

    def _no_such_route(self, scope: Scope) -> ServerError:
        methods = {one.route.method for one in self._served if one.pattern.matches(scope)[0] is not Match.NONE}
        path = str(scope["path"])[:200]
        if methods:
            allow = ", ".join(sorted(methods))
            message = f"{path} takes {allow}, not {scope['method']}."
            return ServerError("invalid_request", message, status=405, headers={"allow": allow})
        return ServerError("not_found", f"There is nothing at {path}. /openapi.json lists what there is.")

    async def _raw(self, route: Route, headers: dict[str, str], receive: Receive) -> bytes:
        if route.body is None:
            return b""
        check_json(headers)
        try:
            async with asyncio.timeout(BODY_S):
                return await _read(headers, receive)
        except TimeoutError:
            raise ServerError("invalid_request", f"The body did not come within {BODY_S:.0f} s.", status=408) from None

    async def _answer(self, asked: Asked, send: Send, headers: dict[str, str]) -> None:
        await _reply(await self.respond(asked), send, headers)

    async def respond(self, asked: Asked) -> Reply:
        """The reply to a request that was let in."""
        return await call_route(self.server, asked.route, asked.raw, asked.headers, asked.path_params, asked.query)


class _Began:
    """``send`` that knows whether the response has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        self.started = True
        await self._send(message)


async def _never(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("the patterns are asked, not run")


async def _read(headers: dict[str, str], receive: Receive) -> bytes:
    most = bodies.MAX_BODY_NBYTES
    said = headers.get("content-length", "0")
    if said.isascii() and said.isdigit() and int(said[:20]) > most:
        raise _too_large()
    raw = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        raw += message.get("body", b"")
        if len(raw) > most:
            raise _too_large()
        if not message.get("more_body", False):
            return bytes(raw)


def _too_large() -> ServerError:
    return ServerError(
        "too_large", f"The body has more than {bodies.MAX_BODY_NBYTES >> 20} MiB.", headers={"connection": "close"}
    )


async def _until_gone(work: asyncio.Future[None], receive: Receive) -> None:
    """The end of ``work``, which is cancelled when the client leaves."""
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientLeft
        work.result()
    finally:
        gone.cancel()
        work.cancel()
        await asyncio.wait({work, gone})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _reply(reply: Reply, send: Send, headers: dict[str, str]) -> None:
    more = {**reply.headers, **headers, "x-content-type-options": "nosniff"}
    if isinstance(reply, Stream):
        more |= {"content-type": reply.media_type, "cache-control": "no-cache", "x-accel-buffering": "no"}
        await send_stream(reply, send, _raw(more))
        return
    if isinstance(reply, Json):
        content, media_type = encode(reply.content), "application/json"
    else:
        content, media_type = reply.content, reply.media_type
    if reply.status != 204:
        more |= {"content-type": media_type, "content-length": str(len(content))}
    await send({"type": "http.response.start", "status": reply.status, "headers": _raw(more)})
    await send({"type": "http.response.body", "body": content})


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

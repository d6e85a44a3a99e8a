"""One address before many servers: lets requests in, finds the server for each, and keeps an answer going.

``Front`` is the application of a server without models of its own. Protocols, keys and names are checked here as in
any; what needs a model is sent on, by its model's name, with the keys of its prefix. A server that is gone in the midst
of an answer is replaced by another one, and the client sees one answer (relay.py). Which servers there are, and how
they are reached, is the affair of ``send``.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from types import ModuleType
from typing import Any

from edgellm.server import bodies
from edgellm.server.app import App, Asked
from edgellm.server.errors import ServerError, invalid
from edgellm.server.http import Plain, Reply, Stream
from edgellm.server.prefix_keys import prefix_keys
from edgellm.server.rate_limit import RateLimit
from edgellm.server.relay import Begun, Chunk, Ended, Failed, Made, Part, RelayedCall, Whole
from edgellm.server.response_cache import ResponseCache, cache_key
from edgellm.server.security import Access
from edgellm.server.server import Server
from edgellm.server.sse import event, line

TRIES = 5  # servers for one answer: a request that ends them must not go round for ever

SENT_ON = frozenset(
    (
        *("/v1/chat/completions", "/chat/completions", "/v1/completions", "/v1/responses", "/responses"),
        *("/v1/responses/input_tokens", "/v1/messages", "/v1/messages/count_tokens", "/api/chat", "/api/generate"),
        *("/completion", "/completions", "/infill", "/tokenize", "/detokenize", "/tokenizer_info", "/apply-template"),
        *("/v1/embeddings", "/embedding", "/embeddings", "/api/embed", "/api/embeddings", "/props"),
        *("/rerank", "/reranking", "/v1/rerank", "/v1/reranking"),
    )
)
"""Paths whose replies a model makes; the others are answered here."""

NOT_HERE = {
    "/slots": "each server has its own",
    "/metrics": "each server's are with those of its cluster",
    "/api/ps": "each server has its own models in memory",
    "/lora-adapters": "each server has its own scales",
    "/v1/responses/{name}": "responses are not kept: the next request may be another server's",
    "/v1/responses/{name}/input_items": "responses are not kept: the next request may be another server's",
}
"""Paths of what only one server can know, and why they are refused."""

PASSED_ON = frozenset(("accept", "anthropic-version", "anthropic-beta"))
"""Headers that a reply may depend on; keys stay here."""

Send = Callable[[str, RelayedCall, Sequence[int]], AsyncGenerator[Part, None]]
"""Sends a call to a server that has the model of this name, best to one that has read such a prefix."""


class Front(App):
    """The ASGI application.

    server    whose models are those that can be asked for; none of them is ever loaded here
    send      reaches the servers
    gone      what it raises when one of them is no more
    limit     how many requests a client may send
    cache     of answers that are the same again
    """

    def __init__(
        self,
        server: Server,
        send: Send,
        gone: tuple[type[BaseException], ...],
        limit: RateLimit | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        super().__init__(server)
        self._send, self._gone, self.limit, self.cache = send, gone, limit, cache

    async def respond(self, asked: Asked) -> Reply:
        path = asked.route.path
        if (why := NOT_HERE.get(path)) is not None:
            raise ServerError("not_supported", f"{path} is not there before several servers: {why}.")
        if path not in SENT_ON:
            return await super().respond(asked)
        body, data, raw = None, None, asked.raw
        if asked.route.body is not None:
            body, data = await bodies.beside(len(raw), bodies.decode_both, raw, asked.route.body)
        access = self.server.access
        if self.limit is not None:
            self.limit.check(client_of(access, asked.headers, asked.client))
        if getattr(body, "previous_response_id", None):
            raise invalid(
                "previous_response_id", "responses are not kept before several servers. Send the whole talk as input."
            )
        # as a server does: of the query where there is no body
        name = asked.query.get("model") if body is None else getattr(body, "model", None) or getattr(body, "name", None)
        entry = await self.server.models.find(name and _bare(name), asked.route.kinds)
        about = (entry.name, access.key_of(asked.headers) or "")  # what one has asked is not another's to see
        prefix, key = await bodies.beside(len(raw), _keys, path, data, None if self.cache is None else about)
        if self.cache is not None and key is not None and (kept := self.cache.get(key)) is not None:
            return _replayed(kept)
        call = RelayedCall(
            asked.route.method,
            path,
            raw,
            {name: value for name, value in asked.headers.items() if name in PASSED_ON},
            asked.path_params,
            asked.query,
            secrets.token_bytes(16),
            time.time(),
        )
        source = self._kept_going(entry.name, call, prefix)
        try:
            return await self._reply(asked, source, key)
        except BaseException:
            await source.aclose()  # at once: it has a place in the line
            raise

    async def _reply(self, asked: Asked, source: AsyncGenerator[Part, None], key: bytes | None) -> Reply:
        keep = None if self.cache is None or key is None else partial(self.cache.keep, key)
        first = await anext(source)
        if isinstance(first, Failed):
            raise first.error()
        if isinstance(first, Whole):
            await source.aclose()
            if keep is not None and first.status == 200 and not first.draws:
                keep([first])
            return Plain(first.content, first.media_type, first.status, first.headers)
        assert isinstance(first, Begun), "a reply is whole, or a stream begins"
        return Stream(
            _Chunks(first, source, keep),
            failed=partial(_last_chunk, asked.protocol, first.media_type),
            ping=first.ping,
            media_type=first.media_type,
            headers=first.headers,
        )

    async def _kept_going(self, model: str, call: RelayedCall, prefix: Sequence[int]) -> AsyncGenerator[Part, None]:
        """The parts of a reply, once each, from as many servers as it takes."""
        n_sent, known = 0, call.known
        with self.server.admitted():
            for _ in range(TRIES):
                n_seen, made = 0, list[int]()
                call = call._replace(known=known, begun=bool(n_sent or known))
                try:
                    async with aclosing(self._send(model, call, prefix)) as source:
                        async for part in source:
                            if isinstance(part, Chunk | Made):
                                made += part.tokens
                                known = max(known, tuple(made), key=len)
                            if isinstance(part, Made):
                                continue
                            n_seen += 1
                            if n_seen > n_sent:
                                n_sent += 1
                                yield part
                            if isinstance(part, Whole | Ended | Failed):
                                return
                except self._gone:
                    continue
            said = f"{TRIES} servers in a row were lost with this request. Send another one."
            yield Failed.of(ServerError("overloaded", said))


class _Chunks:
    """The chunks of a stream. No generator: to close one that never began would not close its source."""

    def __init__(
        self, begun: Begun, source: AsyncGenerator[Part, None], keep: Callable[[Sequence[Part]], None] | None
    ) -> None:
        self._source, self._keep = source, keep
        self._kept: list[Part] = [begun]
        self._draws = False

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> bytes:
        async for part in self._source:
            if isinstance(part, Failed):
                raise StreamError(part)
            self._draws = self._draws or (isinstance(part, Ended) and part.draws)
            if self._keep is not None:
                self._kept.append(part)
            if isinstance(part, Chunk):
                return part.data
        if self._keep is not None and not self._draws:
            self._keep(self._kept)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await self._source.aclose()


class StreamError(ServerError):
    """An error in the midst of a stream; ``data`` is the stream's last chunk, as the server wrote it."""

    def __init__(self, part: Failed) -> None:
        super().__init__(part.kind, part.message, part.field, status=part.status)
        self.data = part.data


def _last_chunk(protocol: ModuleType, media_type: str, error: ServerError) -> bytes:
    """The server's own, or else the error as the protocol has it: nobody is left to write another."""
    if isinstance(error, StreamError) and error.data is not None:
        return error.data
    body = protocol.error_body(error)[1]
    return line(body) if media_type != "text/event-stream" else event(body, "error" if "type" in body else None)


def _replayed(kept: Sequence[Part]) -> Reply:
    first = kept[0]
    mark = {"x-edgellm-cache": "hit"}
    if isinstance(first, Whole):
        return Plain(first.content, first.media_type, first.status, {**first.headers, **mark})
    assert isinstance(first, Begun), "nothing else is kept"

    async def chunks() -> AsyncIterator[bytes]:
        for part in kept:
            if isinstance(part, Chunk):
                yield part.data

    return Stream(chunks(), failed=lambda error: b"", media_type=first.media_type, headers={**first.headers, **mark})


def _keys(path: str, data: Any, about: Sequence[str] | None) -> tuple[list[int], bytes | None]:
    """Those of the prefix of a body, whose JSON is ``data``, and that of its reply in the cache; None for no such."""
    return prefix_keys(data), None if about is None else cache_key(path, data, about)


def client_of(access: Access, headers: Mapping[str, str], address: str) -> str:
    """Who asks: the key that opened, or else the address; never what a client may choose."""
    key = access.key_of(headers)
    return f"address {address}" if key is None else f"key {key}"


def _bare(name: str) -> str:
    """Ollama's clients write a tag behind a name."""
    return name.removesuffix(":latest")

"""What a protocol's file is made of: routes, the call that a handler gets, and the replies that it may give."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from edgellm.loading import Kind
from edgellm.server.bodies import Body, shown
from edgellm.server.errors import ServerError
from edgellm.server.models import CHATS
from edgellm.server.server import Server


@dataclass(frozen=True)
class Call:
    """One request, checked: body as the route's type, header names in lower case, ``kinds`` the route's."""

    server: Server
    body: Any
    headers: Mapping[str, str]
    path_params: Mapping[str, Any]
    query: Mapping[str, str]
    kinds: Sequence[Kind] = CHATS


@dataclass(frozen=True)
class Json:
    """A reply of one JSON object."""

    content: Any
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plain:
    """A reply of bytes."""

    content: bytes
    media_type: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stream:
    """A reply that grows. An error before the first chunk becomes a plain error response.

    source       the chunks; closed when the client leaves
    failed       an error in the midst of it, as a last chunk
    ping         sent while nothing else is, so that no client gives up during a long prompt; or what makes it
    """

    source: AsyncIterator[bytes]
    failed: Callable[[ServerError], bytes]
    ping: bytes | Callable[[], bytes] = b": ping\n\n"
    media_type: str = "text/event-stream"
    headers: Mapping[str, str] = field(default_factory=dict)


def encode(data: Any, *, order: Literal["sorted"] | None = None) -> bytes:
    """JSON in UTF-8. What is none in a model's file, or in the name of it, is shown as U+FFFD."""
    try:
        return msgspec.json.encode(data, order=order)
    except UnicodeEncodeError:
        return msgspec.json.encode(_in_utf8(data), order=order)


def _in_utf8(data: Any) -> Any:
    if isinstance(data, str):
        return shown(data)
    if isinstance(data, list | tuple):
        return [_in_utf8(one) for one in data]
    return {_in_utf8(name): _in_utf8(one) for name, one in data.items()} if isinstance(data, dict) else data


Reply = Json | Plain | Stream
Handler = Callable[[Call], Awaitable[Reply]]


@dataclass(frozen=True)
class Route:
    """One row of a protocol.

    path     with ``{name}`` or ``{name:path}`` for parts that vary
    body     the type of its JSON body; None takes none
    public   answered without the key
    kinds    of models that a request means which names none, the likeliest first
    """

    method: str
    path: str
    handler: Handler
    body: type[Body] | None = None
    public: bool = False
    summary: str = ""
    kinds: Sequence[Kind] = CHATS

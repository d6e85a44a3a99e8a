"""Every route of every protocol, and a call of one without HTTP: typed body in, reply or error of the protocol out.

The application (app.py) finds a row by a path that a client sent. Who has no client, such as a batch, or a replica that
another process sends requests to, calls the row itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import NamedTuple

from edgellm.server import bodies
from edgellm.server.http import Call, Reply, Route
from edgellm.server.server import Server

PROTOCOLS = (
    "openai_models",
    "openai_chat",
    "openai_completions",
    "llama_completion",
    "llama_text",
    "llama_state",
    "llama_lora",
    "openai_responses",
    "anthropic",
    "ollama",
    "ollama_embed",
    "embeddings",
    "page",
)
"""Modules of ``edgellm.server.protocols``; the first one's ``error_body`` is that of a path that nobody has."""


class ProtocolRoute(NamedTuple):
    """A row, and the protocol whose words its errors have."""

    route: Route
    protocol: ModuleType


def all_routes() -> list[ProtocolRoute]:
    """The rows of all protocols, in the order in which they are looked through."""
    modules = [importlib.import_module(f"edgellm.server.protocols.{name}") for name in PROTOCOLS]
    return [ProtocolRoute(route, module) for module in modules for route in module.ROUTES]


async def call_route(
    server: Server,
    route: Route,
    raw: bytes,
    headers: Mapping[str, str] | None = None,
    path_params: Mapping[str, object] | None = None,
    query: Mapping[str, str] | None = None,
) -> Reply:
    """The reply of a row to a body of JSON (b"" where it takes none). ServerError, or what a library raises."""
    body = None if route.body is None else await bodies.beside(len(raw), bodies.decode, raw, route.body)
    return await route.handler(Call(server, body, headers or {}, path_params or {}, query or {}, route.kinds))

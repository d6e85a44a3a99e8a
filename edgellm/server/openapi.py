"""The OpenAPI document of a server, made of its routes and of the types that check their bodies."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import msgspec

from edgellm.server.http import Route

ERRORS = {
    "400": "Something in the request is wrong; the error names the field.",
    "401": "The API key is missing or wrong.",
    "403": "The Host or the Origin may not call.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "415": "The body is not application/json.",
    "429": "This client sent more than it may; the header Retry-After says when to come back.",
    "501": "edgellm cannot do this yet.",
    "503": "The server is busy; the header Retry-After says when to come back.",
}
"""What every route may answer besides 200; the shape is that of its protocol."""


def document(routes: Iterable[Route]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    routes = list(routes)
    types = list(dict.fromkeys(route.body for route in routes if route.body is not None))
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = re.sub(r":\w+\}", "}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, path, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgellm", "version": version("edgellm")},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, path: str, schema_of: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method.lower()}{re.sub(r'[^A-Za-z0-9]+', '_', path)}",
        "responses": {
            "200": {"description": "The answer."},
            **{status: {"description": text} for status, text in ERRORS.items()},
        },
        "security": [] if route.public else [{"key": []}, {}],
    }
    if names := re.findall(r"\{(\w+)\}", path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if route.body is not None:
        content = {"application/json": {"schema": schema_of[route.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation

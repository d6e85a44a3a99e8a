"""The page at ``/``: a chat with the models of this server, for a browser.

A few static files without a build step. The browser is told to load nothing from anywhere else and to run nothing but
these files; what a model says goes into the page as text.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from edgellm.server.errors import ServerError
from edgellm.server.http import Call, Plain, Reply, Route

TYPES = {
    "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **{f"{name}.js": "text/javascript; charset=utf-8" for name in ("page", "api", "chats", "markdown", "tokens")},
}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
    "vary": "Accept",
}


def wants_page(accept: str) -> bool:
    """Whether it is a browser that asks: programs send ``*/*`` or nothing."""
    return "text/html" in accept.lower()


async def root(call: Call) -> Reply:
    """The page for a browser; for programs the words that Ollama's clients wait for."""
    if wants_page(call.headers.get("accept", "")):
        return Plain(_file("index.html"), "text/html; charset=utf-8", headers=HEADERS)
    return Plain(b"Ollama is running", headers={"vary": "Accept"})


async def part(call: Call) -> Reply:
    """A file of the page."""
    name = call.path_params["name"]
    if name not in TYPES:
        raise ServerError("not_found", f"There is nothing at /page/{name[:64]}.")
    return Plain(_file(name), TYPES[name], headers=HEADERS)


def _file(name: str) -> bytes:
    return resources.files("edgellm.server").joinpath("page", name).read_bytes()


def error_body(error: ServerError) -> tuple[int, dict[str, Any]]:
    """The status and body of an error."""
    return error.status, {"error": {"message": error.message, "type": error.kind}}


ROUTES = (
    Route("GET", "/", root, public=True, summary="A chat in the browser"),
    Route("GET", "/page/{name}", part, public=True, summary="A file of the page"),
)
